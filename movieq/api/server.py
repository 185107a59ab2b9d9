"""The API as a process: its socket, uvicorn, the ready line, and the end of open streams."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import socket
import weakref
from functools import partial
from types import FrameType

import httptools
import uvicorn
from starlette.applications import Starlette
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from movieq.api import app
from movieq.api.events import HAND_OVER, OLD_VERSIONS
from movieq.errors import Internal, SettingsError, ValidationFailed
from movieq.settings import Settings
from movieq.streams.watchers import SocketWatcher

SHUTDOWN_S = 5
LAST_REQUESTS_S = 0.5
"""How long idle connections stay open at the end, so that a request on its way over one of them is answered."""
OPEN_FILES = 65_536
"""How many files the process may have open, where it is allowed that many: each stream is one."""
READY = "movieq ready at "


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises SettingsError where the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only where the protocol is named
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; name another with --host and --port") from None
    sock.listen(2048)
    return sock


def address(sock: socket.socket) -> str:
    """Return the url at which a client on this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104  # shown, not bound
    return f"http://{shown}:{port}"


def allow_open_files() -> int:
    """Raise the limit of open files as far as this process may, up to `OPEN_FILES`. Return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


async def serve(settings: Settings, sock: socket.socket) -> None:
    """Serve the API until a signal ends it; print the ready line when it takes requests. Raises Internal where a part of it dies."""
    allow_open_files()
    public_url = settings.public_url or address(sock)
    server = _Server(app.create(settings, public_url), public_url)
    await server.serve([sock])
    if server.failed:
        raise Internal("a part of the API has failed: its log says which")


class _Server(uvicorn.Server):
    def __init__(self, application: Starlette, public_url: str) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=_Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # it would print signatures
                server_header=False,
                proxy_headers=False,  # nothing here asks who the client is
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )
        self._app = application
        self._public_url = public_url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then print the ready line."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            gc.collect()
            gc.freeze()  # what lives as long as the process need not be looked at again
            print(f"{READY}{self._public_url}", flush=True)  # noqa: T201  # the contract's one line

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end: as uvicorn does, and also where a task of the process has died."""
        return await super().on_tick(counter) or self.failed

    @property
    def failed(self) -> bool:
        """Whether the lifespan has ended by an error: it owns the tasks of the process."""
        return isinstance(self.lifespan, LifespanOn) and self.lifespan.error_occurred

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal as uvicorn does, after closing every stream, which uvicorn would wait for."""
        if (api := getattr(self._app.state, "api", None)) is not None:  # it may be still starting
            self._loop.call_soon_threadsafe(api.hub.close)  # a signal may come in the middle of a broadcast
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does, without resetting a connection that a client has just made or is sending a request over."""
        await self._stop_listening(sockets or [])
        state = self.server_state
        state.default_headers = [*state.default_headers, (b"connection", b"close")]  # on every answer from here on
        for connection in list(state.connections):
            if not (isinstance(connection, _Protocol) and connection.idle):
                connection.shutdown()
        until_s = self._loop.time() + LAST_REQUESTS_S
        while state.connections and self._loop.time() < until_s:  # noqa: ASYNC110  # uvicorn has no event for a closed connection
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Accept no new connections, but serve those that the kernel has made already: closing the socket would reset them."""
        for sock in sockets:
            self._loop.remove_reader(sock)
        await asyncio.sleep(0)  # what asyncio has accepted becomes a connection
        waiting: list[socket.socket] = []
        for sock, server in zip(sockets, self.servers, strict=True):
            with contextlib.suppress(OSError):  # no more are waiting
                while True:
                    waiting.append(sock.accept()[0])
            server.close()
        for accepted in waiting:
            with contextlib.suppress(OSError):  # the client has gone
                await self._loop.connect_accepted_socket(self._protocol, accepted)

    def _protocol(self) -> _Protocol:
        return _Protocol(self.config, self.server_state, self.lifespan.state, self._loop)


class _Protocol(HttpToolsProtocol):
    _offer = b""
    """The head, without the offer, of a request that offers to upgrade to another protocol."""

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]  # None before the first

    def data_received(self, data: bytes) -> None:
        """Read as uvicorn does, but answer a client that offers another protocol (Java's: h2c) in HTTP/1.1 (RFC 9110, 7.8).

        The parser takes what follows such a head, even a body, for the other protocol: a new one gets the head again, without the offer.
        """
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as pause:
                    head, self._offer = self._offer, b""
                    if not head:  # CONNECT: what follows is not HTTP
                        return
                    rest = rest[pause.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)  # the other one takes nothing more where the connection is to close
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                    self.parser.feed_data(head)
        except httptools.HttpParserError:
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        """Begin a request as uvicorn does, with a way for the application to take the connection."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if self.parser.should_upgrade() and method != b"CONNECT":
            kept = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
            self._offer = b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version.encode()), *kept, b"", b""])
            return
        if version in OLD_VERSIONS:
            self.expect_100_continue = False
        super().on_headers_complete()
        cycle = weakref.ref(self.cycle)
        to, unchunked = partial(_hand_over, weakref.ref(self), cycle), partial(_unchunked, cycle)
        self.scope["extensions"] = {HAND_OVER: {"to": to, "unchunked": unchunked}}

    def on_message_complete(self) -> None:
        """End a request as uvicorn does, unless its head is read again."""
        if not self._offer:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer as uvicorn does, in the form of every error."""
        answer = app.error_answer(ValidationFailed("this is not HTTP that can be read: in an address write other than ASCII as %XX"))
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % len(answer.body) + answer.body)
        self.transport.close()


def _unchunked(cycle: weakref.ref[RequestResponseCycle]) -> None:
    """Send the body of this answer without chunks: it ends when the connection closes."""
    if (request := cycle()) is not None:
        request.chunked_encoding = False


def _hand_over(protocol: weakref.ref[_Protocol], cycle: weakref.ref[RequestResponseCycle], watcher: SocketWatcher) -> bool:
    """Give the connection to the watcher, as uvicorn does for a websocket, and end the request. Return False where the client has gone."""
    giving, request = protocol(), cycle()
    if giving is None or request is None or request.disconnected:
        return False
    request.disconnected = True  # uvicorn waits for the rest of the answer no more
    giving.flow.resume_reading()  # else nobody hears the client leave
    giving.connections.discard(giving)
    watcher.adopt(giving.transport, giving.connections)
    return True
