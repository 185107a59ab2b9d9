"""The API process: its socket, uvicorn, the ready line, and a shutdown that closes open streams."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import socket
import sys
import termios
import weakref
from fcntl import ioctl
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from types import FrameType
from typing import Any

import httptools
import uvicorn
from starlette.applications import Starlette
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from movieq.api import app
from movieq.api.events import HAND_OVER, OLD_VERSIONS
from movieq.api.limits import HITS, connections_limit
from movieq.errors import (
    HeadersTooLarge,
    Internal,
    LineTooLong,
    PayloadTooLarge,
    RateLimited,
    RequestError,
    SettingsError,
    ValidationFailed,
)
from movieq.settings import Settings
from movieq.streams.watchers import SocketWatcher

SHUTDOWN_S = 5
"""Longest time that a shutdown waits for requests in progress."""
LAST_REQUESTS_S = 0.5
"""How long idle connections stay open during shutdown, so that a request already on its way is answered."""
HEAD_BYTES = 32 * 1024
"""Longest request line and headers together, in bytes; and the most that the framing of a body may add to it."""
HEAD_S = 10.0
"""Time in which a request line and headers must arrive, in seconds, after the connection opened or the last request ended."""
REFUSED_S = 1.0
"""How long a refused connection stays open for its client to read the answer."""
PIPELINED = 16
"""Most requests of a connection that wait for the answers to those before them."""
PIPELINED_BYTES = 2 * 1024 * 1024
"""Most bytes of their bodies."""
UNREAD_S = 30.0
"""Time after which a connection is aborted whose client reads nothing of an answer, in seconds."""
FRAMING = 8
"""Most bytes of framing for each byte of a body in chunks: a chunk of one byte needs five."""
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


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ip_address(sock.getsockname()[0]).is_loopback


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


class _Connections:
    """The open connections of a server. Idle ones, on which no request is in progress, are closed, the oldest first, if there are too many.

    So idle connections cannot shut out a client that sends its request at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: dict[_Protocol, None] = {}

    def opened(self, connection: _Protocol, count: int) -> None:
        """Add a connection, now one of `count`."""
        if count > self._most:
            HITS.add("connections")
            oldest = next(iter(self._idle), connection)
            self._idle.pop(oldest, None)
            oldest.transport.abort()
            if oldest is connection:
                return
        self._idle[connection] = None

    def busy(self, connection: _Protocol) -> None:
        """Note that a request has begun on the connection, or that it is closed."""
        self._idle.pop(connection, None)

    def idle(self, connection: _Protocol) -> None:
        """Note that the connection waits for another request, or for its client to read the last answer."""
        self._idle[connection] = None


class _Server(uvicorn.Server):
    def __init__(self, application: Starlette, public_url: str) -> None:
        protocol: Any = partial(_Protocol, open_connections=_Connections(connections_limit()))
        super().__init__(
            uvicorn.Config(
                application,
                http=protocol,
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

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(self.config, self.server_state, self.lifespan.state, self._loop)
        return protocol


class _Protocol(HttpToolsProtocol):
    _offer = b""
    """The head of a request that offers a protocol upgrade, without the Upgrade header; empty for other requests."""
    _in_head = True
    """Whether the next bytes belong to a request line or headers."""
    _begun = False
    """Whether a part of a request has arrived."""
    _line_read = False
    """Whether the request line of this head has arrived."""
    _head_bytes = 0
    """Bytes of this head so far."""
    _framing_bytes = 0
    """Bytes of this body's framing, trailers included, beyond what its data allow."""
    _late: asyncio.TimerHandle | None = None
    """Ends the connection if the head does not arrive in time."""
    _unread: asyncio.TimerHandle | None = None
    """Ends the connection if its client does not read."""
    _running: RequestResponseCycle | None = None
    """The last request that has begun; `cycle` is the last that has arrived."""
    _refusal: RequestError | None = None
    """The last answer of the connection. What still arrives is dropped."""

    def __init__(self, *args: Any, open_connections: _Connections, **named: Any) -> None:
        super().__init__(*args, **named)
        self._open_connections = open_connections

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        return self._running is None or self._running.response_complete or self._running.disconnected

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Accept a connection as uvicorn does, and wait for its first request."""
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_S, self._end_late)
        self._open_connections.opened(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        """End as uvicorn does, and end the running request too: uvicorn ends the last one that has arrived."""
        self._wait_no_longer()
        self._watch_no_longer()
        self._open_connections.busy(self)
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            _abandon(self._running)

    def data_received(self, data: bytes) -> None:
        """Read as uvicorn does, but answer a request that offers a protocol upgrade (Java's client offers h2c) in HTTP/1.1 (RFC 9110, 7.8).

        After such a head the parser treats everything, even the body, as the other protocol. So a new parser gets the head again, without
        the Upgrade header, and then the rest.
        """
        if self._refusal is not None:
            return
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest:
                part = rest[: HEAD_BYTES - self._head_bytes] if self._in_head else rest
                used = len(part)
                try:
                    self._count(part)
                    self.parser.feed_data(part)
                except httptools.HttpParserUpgrade as pause:
                    head, self._offer = self._offer, b""
                    if not head:  # CONNECT: the following bytes are not HTTP
                        return
                    used = pause.args[0]
                    self.parser = httptools.HttpRequestParser(self)  # the old parser reads nothing more after `Connection: close`
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                    self.parser.feed_data(head)
                rest = rest[used:]
                if self._in_head and self._head_bytes >= HEAD_BYTES:
                    what, kind = ("headers", HeadersTooLarge) if self._line_read else ("request line", LineTooLong)
                    self._refuse(kind(f"the {what} of the request are too long: at most {HEAD_BYTES} bytes are read before the body"))
                    return
                if self._framing_bytes > HEAD_BYTES:
                    self._refuse(PayloadTooLarge("the chunks or trailers of the body are too small or too many: send larger chunks"))
                    return
        except httptools.HttpParserError as error:
            refusal = error.__context__  # raised by a method that the parser called
            if not isinstance(refusal, RequestError):
                refusal = ValidationFailed("malformed HTTP request: percent-encode non-ASCII characters in the URL")
            self._refuse(refusal)
        else:
            if self._in_head and self._late is None:
                self._late = self.loop.call_later(HEAD_S, self._end_late)

    def _count(self, part: memoryview) -> None:
        """Count bytes that are about to be parsed."""
        if self._in_head:
            self._head_bytes += len(part)
            self._line_read = self._line_read or b"\n" in bytes(part)
        else:
            self._framing_bytes += len(part)

    def on_message_begin(self) -> None:
        """Begin a request as uvicorn does. Raises RateLimited if too many wait for their turn on this connection."""
        if len(self.pipeline) >= PIPELINED:
            HITS.add("pipelined_requests")
            raise RateLimited(f"at most {PIPELINED} requests of a connection may wait: read the answers first", retry_after_s=1)
        self._begun = True
        super().on_message_begin()

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
        self._in_head, self._framing_bytes = False, 0
        self._wait_no_longer()
        self._open_connections.busy(self)
        cycle = weakref.ref(self.cycle)
        to, unchunked = partial(_hand_over, weakref.ref(self), cycle), partial(_unchunked, cycle)
        self.scope["extensions"] = {HAND_OVER: {"to": to, "unchunked": unchunked}}

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """End a response as uvicorn does, and wait for the next request, or for the client to read the last answer."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch()
            self._open_connections.idle(self)
        elif not self.idle:
            if self.pipeline:
                self.flow.pause_reading()
        elif self._refusal is not None:
            self._answer_refusal(self._refusal)
        else:
            self._open_connections.idle(self)

    def pause_writing(self) -> None:
        """Stop writing as uvicorn does until the client has read, and end the connection if it does not."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Go on writing as uvicorn does."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._watch_no_longer()

    def eof_received(self) -> None:
        """Close the connection when the client has read the rest."""
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which no other request has arrived."""
        self._close()

    def on_body(self, body: bytes) -> None:
        """Read a part of a body as uvicorn does. Raises PayloadTooLarge if the bodies that wait for their turn are too large."""
        self._framing_bytes = max(0, self._framing_bytes - (1 + FRAMING) * len(body))
        super().on_body(body)
        if self.pipeline and sum(len(cycle.body) for cycle, _ in self.pipeline) > PIPELINED_BYTES:
            raise PayloadTooLarge("requests that wait for earlier answers of their connection are too large: read the answers first")

    def on_message_complete(self) -> None:
        """End a request as uvicorn does, unless its head has to be parsed again."""
        if not self._offer:
            self._in_head, self._begun, self._line_read, self._head_bytes, self._framing_bytes = True, False, False, 0, 0
            super().on_message_complete()

    def _refuse(self, error: RequestError) -> None:
        """Answer a request that is not parsed further, after the requests before it, and close the connection."""
        if isinstance(error, PayloadTooLarge):
            HITS.add(error.code)
        self._refusal = error
        self._wait_no_longer()
        if self._in_head:
            answered = False
        else:  # the application has the request, or will get it, without the rest of its body
            answered = self.cycle.response_started
            _abandon(self.cycle)
            if self.cycle is not self._running:
                self.pipeline.popleft()
        if answered:
            self._linger()
        elif self.idle:
            self._answer_refusal(error)

    def _answer_refusal(self, error: RequestError) -> None:
        answer = app.error_answer(error)
        line = b"HTTP/1.1 %d %b\r\nconnection: close\r\n" % (error.status, HTTPStatus(error.status).phrase.encode())
        headers = (part for name, value in answer.raw_headers for part in (name, b": ", value, b"\r\n"))
        self.transport.write(b"".join([line, *headers, b"\r\n", answer.body]))
        self._linger()

    def _linger(self) -> None:
        """Close the connection when its client has had time to read: at once, unread bytes would reset it before the answer is read."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._late = self.loop.call_later(REFUSED_S, self._close)

    def _close(self) -> None:
        """Close the connection, and abort it if the client does not read what it was sent."""
        if not self.transport.is_closing():
            self.transport.close()
            self._watch()

    def _watch(self) -> None:
        """Abort the connection if the client reads nothing for `UNREAD_S`."""
        self._watch_no_longer()
        self._unread = self.loop.call_later(UNREAD_S, self._end_unread, self._unread_bytes())

    def _watch_no_longer(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _end_unread(self, before: int) -> None:
        if self._unread_bytes() < before:
            self._watch()
        else:
            HITS.add("unread_answers")
            self.transport.abort()

    def _unread_bytes(self) -> int:
        """Return how many bytes the client has not received, the kernel's included: it takes more from the process in large steps."""
        queued = bytes(4)
        with contextlib.suppress(OSError):  # the connection has ended
            queued = ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def _end_late(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if not self.idle:  # uvicorn limits the time after the response
            self._late = self.loop.call_later(HEAD_S, self._end_late)
        elif self._begun:
            HITS.add("slow_headers")
            self._refuse(ValidationFailed(f"the request line and headers did not arrive within {HEAD_S:g} s"))
        else:
            self._close()

    def _wait_no_longer(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def _abandon(cycle: RequestResponseCycle) -> None:
    """Tell the application that the client has left, and send nothing more of the response."""
    cycle.disconnected = True
    cycle.message_event.set()


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
    if giving.transport.is_closing():
        return False
    giving._wait_no_longer()
    giving._watch_no_longer()
    giving._open_connections.busy(giving)
    giving.flow.resume_reading()  # else a disconnect of the client would go unnoticed
    giving.connections.discard(giving)
    watcher.adopt(giving.transport, giving.connections)
    return True
