"""The Python client: the operations of the API, a task's events over any number of broken connections, and its files.

    async with Client("http://127.0.0.1:8001", key) as movieq:
        receipt = await movieq.submit("film", "generate_image", {"prompt": "a lighthouse"})
        async for event in movieq.events(receipt.task_id):
            print(event.type, event.data)

Faults of the connection and answers that may pass (409 in flight, 429, 502, 503, 504) are tried again, with backoff, until `patience_s` is
over; a task is never made twice by that. What the server refuses is raised as its own class of `movieq.errors`, what cannot be reached as
`Unavailable` that names the address. Every wait has a limit. Leaves out: proxies, redirects, several servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from movieq import __version__
from movieq.backoff import Backoff
from movieq.delivery import webhooks
from movieq.errors import Internal, PayloadTooLarge, RequestError, SettingsError, Unavailable, ValidationFailed
from movieq.fetch.problems import HttpFault, http_fault, reason
from movieq.logs import without_query
from movieq.tasks import values
from movieq.tasks.entities import UPLOAD_BYTES, ProcessingProgress
from movieq.tasks.params import refused
from movieq.tasks.states import TERMINAL_EVENTS, EventType, Priority, TaskStatus
from movieq.tasks.wire import (
    CancelAnswer,
    DeadLettersAnswer,
    Deadline,
    DeliveriesAnswer,
    DeliveryAnswer,
    ErrorAnswer,
    HealthAnswer,
    Receipt,
    Snapshot,
    SubmitRequest,
    TaskPage,
    TaskState,
    UploadAnswer,
    WorkersAnswer,
)

__all__ = ["Client", "ClientEvent", "Gap", "Preview", "Unreachable", "ended"]

PATIENCE_S: Final = 15.0
"""How long a fault may last before it is raised."""
STREAM_PATIENCE_S: Final = 300.0
"""The same for a stream that has worked before: it outlives a restart, a deployment, a failover."""
SILENCE_S: Final = 45.0
"""A stream that says nothing for so long is dead: the server comments every 15 s."""
CONNECT_S: Final = 10.0
REQUEST_S: Final = 30.0
UPLOAD_S: Final = 300.0
STALL_S: Final = 60.0
"""A download that brings nothing for so long is begun again."""
BACKOFF_S: Final = 0.25, 8.0
RECONNECT_S: Final = 2.0, 30.0
"""Shortest and longest wait before a stream is opened again; the server's `retry:` takes the place of the first."""
CHUNK_BYTES: Final = 1024 * 1024
FRAME_BYTES: Final = 4 * 1024 * 1024
"""More than any event has: what goes on for longer is no stream of ours."""

T = TypeVar("T")


class Unreachable(Unavailable):
    """Nobody listens at the address: the request did not arrive."""


class Gap(msgspec.Struct, frozen=True):
    """A part of the log is gone: nothing between `after` and `first` can be had. The snapshot that follows says how things are."""

    after: str | None = None
    first: str | None = None
    last: str | None = None


class Preview(msgspec.Struct, frozen=True):
    """What is being made, as a data url of a small picture."""

    image: str


class ClientEvent(msgspec.Struct, frozen=True):
    """An event of a stream. `id` is None where it is not in the log; with an id a later stream can go on after it.

    `data` is a Snapshot, Gap or Preview for the type of that name, else a ProcessingProgress.
    """

    id: str | None
    type: EventType
    data: ProcessingProgress | Snapshot | Gap | Preview


def ended(event: ClientEvent) -> bool:
    """Whether nothing more happened to the task up to this event: it is its end, or news of its result."""
    return event.type in TERMINAL_EVENTS or event.type is EventType.UPDATED


class Client:
    """The API at `url` (without /api/v1), with an API key. An async context manager over one session of connections.

    Raises SettingsError for what is no http address, or no key that a header can carry.
    """

    def __init__(self, url: str, key: str, *, patience_s: float = PATIENCE_S, silence_s: float = SILENCE_S) -> None:
        self.url = _address(url)
        if not key or not key.isascii() or not key.isprintable():
            raise SettingsError("an API key is one or more visible ASCII characters")
        self._key = {"X-API-Key": key}
        self._patience_s = patience_s
        self._silence_s = silence_s

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # a stream holds its connection: a limit would be a deadlock
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"movieq/{__version__}"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self._session.close()

    # ── Operations ──

    async def submit(
        self,
        project_id: str,
        task_type: str,
        task_data: Mapping[str, Any],
        *,
        priority: Priority | int | None = None,
        callback_url: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        deadline: Deadline | None = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """The task is accepted, once: every try carries the same idempotency key, made here unless one is given."""
        number = list(Priority).index(priority) + 1 if isinstance(priority, Priority) else priority
        request = SubmitRequest(
            project_id, task_type, dict(task_data), number, callback_url, None if metadata is None else dict(metadata), deadline
        )
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return await self._ask(_Call("POST", "/tasks/submit", _json(request), headers), Receipt)

    async def status(self, task_id: str, wait_s: int = 0) -> TaskState:
        """How the task is; with `wait_s`, at most 60, as soon as it has ended or the time is over."""
        query = {"wait": str(wait_s)} if wait_s else {}
        return await self._ask(_Call("GET", f"/tasks/{_part(task_id)}/status", query=query, timeout_s=wait_s + REQUEST_S), TaskState)

    async def cancel(self, task_id: str) -> CancelAnswer:
        """The task is cancelled. Raises InvalidState where it has completed or failed."""
        return await self._ask(_Call("DELETE", f"/tasks/{_part(task_id)}/cancel"), CancelAnswer)

    async def retry(self, task_id: str) -> Receipt:
        """The failed task waits again. Raises InvalidState where it has not failed; Unavailable also where the answer was lost."""
        # not sent again once it may have arrived: the second would be refused, since the task has not failed any more
        return await self._ask(_Call("POST", f"/tasks/{_part(task_id)}/retry", repeatable=False), Receipt)

    async def tasks(
        self, project_id: str, *, status: TaskStatus | None = None, task_type: str | None = None, page: int = 1, limit: int = 20
    ) -> TaskPage:
        """A page of the project's tasks, newest first."""
        query = {"page": str(page), "limit": str(limit)}
        query |= {name: value for name, value in (("status", status), ("task_type", task_type)) if value is not None}
        return await self._ask(_Call("GET", f"/projects/{_part(project_id)}/tasks", query=query), TaskPage)

    async def dead_letters(self, limit: int = 100) -> DeadLettersAnswer:
        """The latest tasks that were given up, at most 1000 of them, and how many there are. For admin keys."""
        return await self._ask(_Call("GET", "/dead-letters", query={"limit": str(limit)}), DeadLettersAnswer)

    async def drop_dead_letter(self, task_id: str) -> None:
        """The task is listed no more, and stays failed. Raises NotFound where it is none; Unavailable also where the answer was lost."""
        # not sent again once it may have arrived: the second would not find it
        await self._body(_Call("DELETE", f"/dead-letters/{_part(task_id)}", repeatable=False))

    async def deliveries(self, task_id: str) -> DeliveriesAnswer:
        """The webhooks of the task and its way into the CMS, the oldest first, and how far each is."""
        return await self._ask(_Call("GET", f"/tasks/{_part(task_id)}/deliveries"), DeliveriesAnswer)

    async def resend(self, task_id: str, delivery_id: str) -> DeliveryAnswer:
        """The delivery is tried again, now. Raises NotFound where the task has none of this id. For admin keys."""
        path = f"/tasks/{_part(task_id)}/deliveries/{_part(delivery_id)}/resend"
        # not sent again once it may have arrived: a receiver that was reached meanwhile would be told twice
        return await self._ask(_Call("POST", path, repeatable=False), DeliveryAnswer)

    async def workers(self) -> WorkersAnswer:
        """Every child of every worker heard of in the last five minutes."""
        return await self._ask(_Call("GET", "/workers/status"), WorkersAnswer)

    async def health(self) -> HealthAnswer:
        """How the installation is, also where it is unhealthy. Asked once: raises Unavailable where nobody answers."""
        return await self._ask(_Call("GET", "/health", accepted=(503,), patient=False), HealthAnswer)

    async def upload(self, project_id: str, source: Path | bytes) -> UploadAnswer:
        """The bytes, or those of the file, are kept for seven days; the `url` of the answer stands for them in task_data.

        Raises ValidationFailed for a file that cannot be read, or that is neither a picture nor a sound.
        """
        body = source if isinstance(source, bytes) else await asyncio.to_thread(_contents, source)
        if len(body) > UPLOAD_BYTES:
            name = "the upload" if isinstance(source, bytes) else source
            raise PayloadTooLarge(f"{name} is over {UPLOAD_BYTES} bytes")
        headers = {"Content-Type": "application/octet-stream"}
        return await self._ask(_Call("POST", f"/projects/{_part(project_id)}/uploads", body, headers, timeout_s=UPLOAD_S), UploadAnswer)

    async def download(self, url: str, dest: Path) -> int:
        """What the address holds lies at `dest`, whole or not at all; returns how many bytes that is.

        The key is not sent: addresses of results are signed. Raises OSError where `dest` cannot be written.
        """
        waits = _Waits(self._patience_s, *BACKOFF_S)
        part = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            while True:
                try:
                    size = await self._downloaded(url, part)
                    await asyncio.to_thread(part.replace, dest)
                    return size
                except RequestError as error:
                    await waits.next(error)
        finally:
            part.unlink(missing_ok=True)

    # ── Events ──

    async def events(
        self, task: str, after: str | None = None, *, on_fault: Callable[[RequestError], None] | None = None
    ) -> AsyncGenerator[ClientEvent]:
        """The events of a task (its id, or an `events_url`) after an id of its log, each once and in order, to its end.

        Broken connections, 5xx and restarts of the server are bridged. Raises RequestError where the server refuses, Unavailable where it
        stays away: for the client's patience at first, for five minutes once the stream has worked. `on_fault` is told what went wrong,
        before each wait for another try. Close it (`aclosing`) where it is left early.
        """
        stream = _Stream(URL(task, encoded=True) if "://" in task else self._at(f"/tasks/{_part(task)}/events"), after)
        headers = {} if "://" in task else self._key  # a key is for its own server only
        waits = _Waits(self._patience_s, *RECONNECT_S)
        over = False
        while True:
            problem: RequestError = Unavailable(f"the stream {stream.name} ended before its task did")
            try:
                async with aclosing(self._frames(stream, headers)) as frames:
                    async for frame in frames:
                        waits = _Waits(self._patience_s if over else STREAM_PATIENCE_S, stream.retry_s, RECONNECT_S[1])
                        if (event := stream.event(frame)) is not None:
                            over = ended(event) or (over and event.id is None)
                            yield event
                if over or stream.exhausted:
                    return
            except RequestError as error:
                problem = error
            if on_fault is not None and problem.retryable:
                on_fault(problem)
            try:
                await waits.next(problem)
            except RequestError:
                if over:  # the end is known; only whether more would follow is not
                    return
                raise

    async def _frames(self, stream: _Stream, headers: dict[str, str]) -> AsyncGenerator[_Frame]:
        """What one connection of the stream brings. Raises RequestError where it is refused, breaks or falls silent."""
        sent = {**headers, "Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-store"}
        if stream.last_id is not None:
            sent["Last-Event-ID"] = stream.last_id
        parser = _Parser()
        with _translated("GET", stream.name):
            async with self._opened("GET", stream.url, sent, REQUEST_S) as answer:
                if answer.status == 204:
                    stream.exhausted = True
                    return
                if answer.content_type != "text/event-stream":
                    raise _Unreadable(f"{stream.name} answers {answer.content_type}, not an event stream: is it movieq?")
                while chunk := await self._heard(answer, stream.name):
                    for frame in parser.feed(chunk):
                        yield frame
                    if parser.pending > FRAME_BYTES:
                        raise _Unreadable(f"{stream.name} sent an event of more than {FRAME_BYTES} bytes")

    async def _heard(self, answer: aiohttp.ClientResponse, name: str) -> bytes:
        try:
            async with asyncio.timeout(self._silence_s):
                return await answer.content.readany()
        except TimeoutError:
            raise Unavailable(f"the stream {name} was silent for {self._silence_s:g} s") from None

    # ── Requests ──

    async def _ask(self, call: _Call, answer: type[T]) -> T:
        return _decoded(await self._body(call), answer, without_query(str(self._at(call.path))))

    async def _body(self, call: _Call) -> bytes:
        waits = _Waits(self._patience_s, *BACKOFF_S)
        while True:
            try:
                return await self._answered(call)
            except RequestError as error:
                lost = isinstance(error, _AnswerLost) and not call.repeatable
                if lost or isinstance(error, Internal) or not call.patient:  # a stream is opened again after a 500, a request is not
                    raise
                await waits.next(error)

    async def _answered(self, call: _Call) -> bytes:
        url = self._at(call.path).with_query(call.query)
        with _translated(call.method, without_query(str(url))):
            async with (
                asyncio.timeout(call.timeout_s),
                self._opened(call.method, url, {**self._key, **call.headers}, call.timeout_s, call.body, call.accepted) as answer,
            ):
                return await answer.read()

    async def _downloaded(self, url: str, part: Path) -> int:
        size = 0
        with _translated("GET", without_query(url)):
            async with self._opened("GET", URL(url, encoded=True), {}, REQUEST_S) as answer:
                with part.open("wb") as file:
                    while chunk := await self._chunk(answer):
                        await asyncio.to_thread(file.write, chunk)
                        size += len(chunk)
        return size

    async def _chunk(self, answer: aiohttp.ClientResponse) -> bytes:
        async with asyncio.timeout(STALL_S):
            return await answer.content.read(CHUNK_BYTES)

    @asynccontextmanager
    async def _opened(
        self, method: str, url: URL, headers: dict[str, str], head_s: float, body: bytes | None = None, accepted: tuple[int, ...] = ()
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is no error, its head read within `head_s`. Raises the RequestError that the server sent."""
        async with asyncio.timeout(head_s) as limit:
            async with self._session.request(method, url, headers=headers, data=body, allow_redirects=False) as answer:
                if answer.status >= 300 and answer.status not in accepted:
                    raise _refusal(answer, await answer.read())
                limit.reschedule(None)
                yield answer

    def _at(self, path: str) -> URL:
        return URL(f"{self.url}/api/v1{path}", encoded=True)


# ── Trying again ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Call(msgspec.Struct, frozen=True):
    """A request. `repeatable`: said twice it does the same; `patient`: worth a second try."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = {}
    query: dict[str, str] = {}
    timeout_s: float = REQUEST_S
    accepted: tuple[int, ...] = ()
    repeatable: bool = True
    patient: bool = True


class _AnswerLost(Unavailable):
    """The connection broke, or a proxy answered in movieq's stead: the request may have arrived."""


class _Unreadable(Internal):
    """What answers is not movieq, or not one that this client understands."""

    retryable = False


class _Waits:
    """The waits between tries: each twice the last, never less than the server asks for, together no longer than `patience_s`."""

    def __init__(self, patience_s: float, shortest_s: float, longest_s: float) -> None:
        self._end = 0.0
        self._patience_s = patience_s
        self._backoff = Backoff(shortest_s, longest_s)

    async def next(self, problem: RequestError) -> None:
        """Returns when it is time for another try. Raises the problem where another cannot help, or would come too late."""
        now = time.monotonic()
        self._end = self._end or now + self._patience_s
        wait_s = max(self._backoff.next_s() * random.uniform(1, 1.25), problem.retry_after_s or 0)  # noqa: S311  # spreads load, hides nothing
        if not problem.retryable or now + wait_s > self._end:
            raise problem
        await asyncio.sleep(wait_s)


_BY_CODE: Final = {cls.code: cls for cls in RequestError.__subclasses__()}
"""The classes of errors.py: those of this module are one level further down."""
_BY_STATUS: Final[dict[int, type[RequestError]]] = {
    **{cls.status: cls for cls in reversed(RequestError.__subclasses__())},  # of two classes of one status the first
    **dict.fromkeys((502, 503, 504), _AnswerLost),
}
_error_answers = msgspec.json.Decoder(ErrorAnswer)


def _refusal(answer: aiohttp.ClientResponse, body: bytes) -> RequestError:
    """The server's error as its class; where the answer is not movieq's own (a proxy's page, say), the class of its status."""
    header = answer.headers.get("Retry-After")
    wait_s = None if header is None else webhooks.retry_after_s(header, time.time())
    retry_after_s = None if wait_s is None else math.ceil(wait_s)
    try:
        sent = _error_answers.decode(body)
    except msgspec.DecodeError:
        name = without_query(str(answer.url))
        if 300 <= answer.status < 400:
            return ValidationFailed(f"{name} answers {answer.status} and sends elsewhere: name the final address")
        cls = _BY_STATUS.get(answer.status, Internal if answer.status >= 500 else ValidationFailed)
        return cls(f"{name} answers {answer.status}", retry_after_s=retry_after_s)
    errors = tuple((error.path, error.message) for error in sent.errors)
    cls = _BY_CODE.get(sent.error) or _BY_STATUS.get(answer.status, Internal if answer.status >= 500 else ValidationFailed)
    return cls(sent.message, errors=errors, retry_after_s=retry_after_s)


@contextlib.contextmanager
def _translated(method: str, name: str) -> Iterator[None]:
    """Faults of the connection leave as Unavailable that names the address; `_AnswerLost` where the request may have arrived."""
    try:
        yield
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
        raise ValidationFailed(f"{name[:200]!r} is no http or https address") from None
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise Unreachable(f"nobody answers at {name}: {_reason(error)}") from None
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        raise _AnswerLost(f"the connection for {method} {name} failed: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    match http_fault(error):
        case HttpFault.HOST:
            return "there is no host of this name"
        case HttpFault.TLS:
            return "the certificate or the TLS handshake was not accepted"
        case HttpFault.CONNECT:
            return reason(error) or "it cannot be reached"
        case HttpFault.TIMEOUT:
            return "it took too long"
    return str(error) or type(error).__name__


# ── Streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Frame(msgspec.Struct, frozen=True):
    """What an event stream dispatches, or its `retry:` alone."""

    type: str = ""
    data: str = ""
    id: str | None = None
    retry_ms: int | None = None


class _Stream:
    """Where in a task's log a reader is, over all its connections."""

    def __init__(self, url: URL, after: str | None) -> None:
        self.url = url
        self.name = without_query(str(url))
        self.last_id = after
        self.retry_s = RECONNECT_S[0]
        self.exhausted = False
        # a set, not a comparison: after a failover to a Redis whose clock is behind, new events have smaller ids than old ones
        self._seen = set() if after is None else {after}

    def event(self, frame: _Frame) -> ClientEvent | None:
        """The event of a frame; None for one that was there before, that is not for readers, or whose kind is not known here."""
        if frame.retry_ms is not None:
            self.retry_s = min(max(frame.retry_ms / 1000, BACKOFF_S[0]), RECONNECT_S[1])
        if frame.id is not None:
            self.last_id = frame.id
            if frame.id in self._seen:
                return None
            self._seen.add(frame.id)
        if frame.type not in _DATA or frame.type == EventType.GOODBYE:  # which only says that the stream is to be opened again
            return None
        event_type = EventType(frame.type)
        try:
            return ClientEvent(frame.id, event_type, msgspec.json.decode(frame.data, type=_DATA[event_type]))
        except msgspec.DecodeError:
            raise _Unreadable(f"{self.name} sent a {event_type} that cannot be read") from None


_DATA: Final[dict[str, type[ProcessingProgress | Snapshot | Gap | Preview]]] = {
    **dict.fromkeys(EventType, ProcessingProgress),
    EventType.SNAPSHOT: Snapshot,
    EventType.GAP: Gap,
    EventType.PREVIEW: Preview,
}
"""What the data of an event is."""


class _Parser:
    """Bytes of an event stream to frames (WHATWG HTML, 9.2.6), in chunks of any length."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []
        self._begun = False
        self.pending = 0

    def feed(self, chunk: bytes) -> Iterator[_Frame]:
        """The frames that are complete with this chunk."""
        if not self._begun:
            self._rest += chunk
            if len(self._rest) < 3 and b"\xef\xbb\xbf".startswith(self._rest):
                return
            self._begun, chunk, self._rest = True, self._rest.removeprefix(b"\xef\xbb\xbf"), b""
        self._rest += chunk
        # a CR at the end may be half of a CR LF
        whole, held = (self._rest[:-1], b"\r") if self._rest.endswith(b"\r") else (self._rest, b"")
        *lines, rest = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest + held
        for line in lines:
            if line:
                self._lines.append(line)
            else:
                frame, self._lines = _frame(self._lines), []
                if frame is not None:
                    yield frame
        self.pending = len(self._rest) + sum(map(len, self._lines))


def _frame(lines: list[bytes]) -> _Frame | None:
    event, id, retry_ms, data = "", None, None, []
    for line in lines:
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                event = value
            case "data":
                data.append(value)
            case "id" if "\0" not in value:
                id = value
            case "retry" if value.isascii() and value.isdigit() and len(value) < 10:
                retry_ms = int(value)
    if not data:
        return None if retry_ms is None else _Frame(retry_ms=retry_ms)
    return _Frame(event or "message", "\n".join(data), id or None, retry_ms)


# ── Shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _address(url: str) -> str:
    try:
        parsed = URL(url)
        port = parsed.port
    except ValueError:
        parsed, port = URL(), None
    if parsed.scheme not in ("http", "https") or not parsed.host or not port:
        raise SettingsError(f"{url!r} is no address of an API: it takes one such as http://127.0.0.1:8001")
    return url.rstrip("/").removesuffix("/api/v1")


def _part(text: str) -> str:
    """The text as one part of a path."""
    return quote(text, safe="")


def _json(request: SubmitRequest) -> bytes:
    # msgspec would send NaN and infinite numbers, which JSON does not have, as null
    if found := values.faults({"task_data": request.task_data, "metadata": request.metadata}):
        raise refused(found)
    try:
        return msgspec.json.encode(request)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValidationFailed(f"the task cannot be written as JSON: {error}") from None


def _decoded(body: bytes, answer: type[T], name: str) -> T:
    try:
        return msgspec.json.decode(body, type=answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Unreadable(f"what {name} answers cannot be read as a {answer.__name__}: {error}") from None


def _contents(path: Path) -> bytes:
    """The file, or so much of it that it is seen to be too long."""
    try:
        with path.open("rb") as file:
            return file.read(UPLOAD_BYTES + 1)
    except OSError as error:
        raise ValidationFailed(f"{path} cannot be read: {error.strerror}") from None
