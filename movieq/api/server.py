"""The API process: its socket, uvicorn, the ready line, and a shutdown that closes open streams."""

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
"""Longest time that a shutdown waits for requests in progress."""
LAST_REQUESTS_S = 0.5
"""How long idle connections stay open during shutdown, so that a request already on its way is answered."""
OPEN_FILES = 65_536
"""Open files that the process asks for, if its hard limit allows; each stream needs one."""
READY = "movieq ready at "


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 selects a free port. Raises SettingsError if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only if the protocol is given
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; choose another address with --host and --port") from None
    sock.listen(2048)
    return sock


def address(sock: socket.socket) -> str:
    """Return the URL at which a client on this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104  # shown, not bound
    return f"http://{shown}:{port}"


def allow_open_files() -> int:
    """Raise this process's limit of open files as far as allowed, up to `OPEN_FILES`. Return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


async def serve(settings: Settings, sock: socket.socket) -> None:
    """Serve the API until a signal arrives. Print the ready line once it accepts requests. Raises Internal if a background task fails."""
    allow_open_files()
    public_url = settings.public_url or address(sock)
    server = _Server(app.create(settings, public_url), public_url)
    await server.serve([sock])
    if server.failed:
        raise Internal("a background task of the API has failed: see its log" if server.started else "the API could not start: see its log")


class _Server(uvicorn.Server):
    def __init__(self, application: Starlette, public_url: str) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=_Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # it would log signatures
                server_header=False,
                proxy_headers=False,  # the client's address is not used
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )
        self._app = application
        self._public_url = public_url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start uvicorn, then print the ready line."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            gc.collect()
            gc.freeze()  # these objects live as long as the process, so the collector can skip them
            print(f"{READY}{self._public_url}", flush=True)  # noqa: T201  # the contract's one line

    async def on_tick(self, counter: int) -> bool:
        """Return whether to shut down: when uvicorn would, or when a background task has failed."""
        return await super().on_tick(counter) or self.failed

    @property
    def failed(self) -> bool:
        """Whether the lifespan, which owns the background tasks, has ended with an error."""
        return isinstance(self.lifespan, LifespanOn) and self.lifespan.error_occurred

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Close every stream, since uvicorn would wait for them; then handle the signal as uvicorn does."""
        if (api := getattr(self._app.state, "api", None)) is not None:  # None during start-up
            self._loop.call_soon_threadsafe(api.hub.close)  # not at once: the signal may interrupt a broadcast
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does, but do not reset connections that are new or on which a request is arriving."""
        await self._stop_listening(sockets or [])
        state = self.server_state
        state.default_headers = [*state.default_headers, (b"connection", b"close")]  # in every response from now on
        for connection in list(state.connections):
            if not (isinstance(connection, _Protocol) and connection.idle):
                connection.shutdown()
        until_s = self._loop.time() + LAST_REQUESTS_S
        while state.connections and self._loop.time() < until_s:  # noqa: ASYNC110  # uvicorn has no event for a closed connection
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Stop listening, but serve the connections that the kernel has already accepted: closing the socket would reset them."""
        for sock in sockets:
            self._loop.remove_reader(sock)
        await asyncio.sleep(0)  # lets asyncio set up the connections that it has accepted
        waiting: list[socket.socket] = []
        for sock, server in zip(sockets, self.servers, strict=True):
            with contextlib.suppress(OSError):  # raised when no more connections are waiting
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
    """The head of a request that offers a protocol upgrade, without the Upgrade header; empty for other requests."""

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]  # None before the first

    def data_received(self, data: bytes) -> None:
        """Read as uvicorn does, but answer a request that offers a protocol upgrade (Java's client offers h2c) in HTTP/1.1 (RFC 9110, 7.8).

        After such a head the parser treats everything, even the body, as the other protocol. So a new parser gets the head again, without
        the Upgrade header, and then the rest.
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
                    if not head:  # CONNECT: the following bytes are not HTTP
                        return
                    rest = rest[pause.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)  # the old parser reads nothing more after `Connection: close`
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                    self.parser.feed_data(head)
        except httptools.HttpParserError:
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        """Start a request as uvicorn does, and add the extension by which the application can take over the connection."""
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
        """End a request as uvicorn does, unless its head has to be parsed again."""
        if not self._offer:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer 400 as uvicorn does, but in the JSON format of the API's errors."""
        answer = app.error_answer(ValidationFailed("malformed HTTP request: percent-encode non-ASCII characters in the URL"))
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % len(answer.body) + answer.body)
        self.transport.close()


def _unchunked(cycle: weakref.ref[RequestResponseCycle]) -> None:
    """Send this response's body without chunks; the end of the connection marks its end."""
    if (request := cycle()) is not None:
        request.chunked_encoding = False


def _hand_over(protocol: weakref.ref[_Protocol], cycle: weakref.ref[RequestResponseCycle], watcher: SocketWatcher) -> bool:
    """Hand the connection over to the watcher, as uvicorn does for a websocket, and end the request. Return False if the client left."""
    giving, request = protocol(), cycle()
    if giving is None or request is None or request.disconnected:
        return False
    request.disconnected = True  # else uvicorn would wait for the rest of the response
    giving.flow.resume_reading()  # else a disconnect of the client would go unnoticed
    giving.connections.discard(giving)
    watcher.adopt(giving.transport, giving.connections)
    return True
