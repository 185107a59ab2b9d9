"""The Python client of the API: its operations, a task's events across broken connections, uploads and downloads.

    async with Client("http://127.0.0.1:8001", key) as movieq:
        receipt = await movieq.submit("film", "generate_image", {"prompt": "a lighthouse"})
        async for event in movieq.events(receipt.task_id):
            print(event.type, event.data)

Connection errors and temporary answers (409 in progress, 429, 502, 503, 504) are retried with backoff for up to `patience_s`; a retried
submit never creates a second task. An error answer is raised as its class in `movieq.errors`; an unreachable server raises `Unavailable`
with its address. Every wait has a limit. Not supported: proxies, redirects, several servers.
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
from movieq.tasks.faults import refused
from movieq.tasks.states import TERMINAL_EVENTS, EventType, Priority, TaskStatus
from movieq.tasks.wire import (
    CancelAnswer,
    DeadLettersAnswer,
    Deadline,
    DeliveriesAnswer,
    DeliveryAnswer,
    ErrorAnswer,
    Gap,
    HealthAnswer,
    Preview,
    Receipt,
    Retrying,
    Snapshot,
    SubmitRequest,
    TaskPage,
    TaskState,
    UploadAnswer,
    WorkersAnswer,
)

__all__ = ["Client", "ClientEvent", "Gap", "Preview", "Unreachable", "ended"]

PATIENCE_S: Final = 15.0
"""How long a fault is retried before it is raised."""
STREAM_PATIENCE_S: Final = 300.0
"""The same for a stream that has worked before: long enough for a restart, a deployment or a failover."""
SILENCE_S: Final = 45.0
"""Longest silence of a stream before it counts as dead: the server sends a comment every 15 s."""
CONNECT_S: Final = 10.0
REQUEST_S: Final = 30.0
UPLOAD_S: Final = 300.0
STALL_S: Final = 60.0
"""Longest wait for the next bytes of a download before it is started again."""
BACKOFF_S: Final = 0.25, 8.0
RECONNECT_S: Final = 2.0, 30.0
"""Shortest and longest wait before a stream is reopened; the server's `retry:` replaces the shortest."""
CHUNK_BYTES: Final = 1024 * 1024
FRAME_BYTES: Final = 4 * 1024 * 1024
"""Largest accepted event; movieq's own are far smaller."""

T = TypeVar("T")


class Unreachable(Unavailable):
    """No server listens at the address: the request did not arrive."""


class ClientEvent(msgspec.Struct, frozen=True):
    """An event of a stream. `id` is its position in the log, from which a later stream can continue; None for an event that is not logged.

    `data` is a Snapshot, Retrying, Gap or Preview for the type of that name, else a ProcessingProgress.
    """

    id: str | None
    type: EventType
    data: ProcessingProgress | Snapshot | Gap | Preview


def ended(event: ClientEvent) -> bool:
    """Whether the task has ended with this event, or its result was updated after it had ended."""
    return event.type in TERMINAL_EVENTS or event.type is EventType.UPDATED


class Client:
    """A client of the API at `url` (without /api/v1) with an API key. An async context manager that owns one HTTP session.

    Raises SettingsError for an invalid URL, or a key that a header cannot contain.
    """

    def __init__(self, url: str, key: str, *, patience_s: float = PATIENCE_S, silence_s: float = SILENCE_S) -> None:
        self.url = _address(url)
        if not key or not key.isascii() or not key.isprintable():
            raise SettingsError("the API key must be one or more visible ASCII characters")
        self._key = {"X-API-Key": key}
        self._patience_s = patience_s
        self._silence_s = silence_s

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # each stream holds a connection: with a limit, requests could wait forever
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
        """Submit a task; return its receipt. All tries send the same idempotency key (a random one by default), so one task is created."""
        number = list(Priority).index(priority) + 1 if isinstance(priority, Priority) else priority
        request = SubmitRequest(
            project_id, task_type, dict(task_data), number, callback_url, None if metadata is None else dict(metadata), deadline
        )
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return await self._ask(_Call("POST", "/tasks/submit", _json(request), headers), Receipt)

    async def status(self, task_id: str, wait_s: int = 0) -> TaskState:
        """Return the status of a task. `wait_s`, up to 60, waits until the task has ended or the time is over."""
        query = {"wait": str(wait_s)} if wait_s else {}
        return await self._ask(_Call("GET", f"/tasks/{_part(task_id)}/status", query=query, timeout_s=wait_s + REQUEST_S), TaskState)

    async def cancel(self, task_id: str) -> CancelAnswer:
        """Cancel a task. Raises InvalidState if it has completed or failed."""
        return await self._ask(_Call("DELETE", f"/tasks/{_part(task_id)}/cancel"), CancelAnswer)

    async def retry(self, task_id: str) -> Receipt:
        """Queue a failed task again. Raises InvalidState if it has not failed, Unavailable also if the answer was lost."""
        # not sent again if it may have arrived: the second request would be refused, since the task is queued by then
        return await self._ask(_Call("POST", f"/tasks/{_part(task_id)}/retry", repeatable=False), Receipt)

    async def tasks(
        self, project_id: str, *, status: TaskStatus | None = None, task_type: str | None = None, page: int = 1, limit: int = 20
    ) -> TaskPage:
        """Return a page of the project's tasks, newest first."""
        query = {"page": str(page), "limit": str(limit)}
        query |= {name: value for name, value in (("status", status), ("task_type", task_type)) if value is not None}
        return await self._ask(_Call("GET", f"/projects/{_part(project_id)}/tasks", query=query), TaskPage)

    async def dead_letters(self, limit: int = 100) -> DeadLettersAnswer:
        """Return the newest dead letters, at most 1000, and their total number. For admin keys."""
        return await self._ask(_Call("GET", "/dead-letters", query={"limit": str(limit)}), DeadLettersAnswer)

    async def drop_dead_letter(self, task_id: str) -> None:
        """Remove a task from the dead letters; it stays failed.

        Raises NotFound if it is not a dead letter, Unavailable also if the answer was lost.
        """
        # not sent again if it may have arrived: the second request would not find it
        await self._body(_Call("DELETE", f"/dead-letters/{_part(task_id)}", repeatable=False))

    async def deliveries(self, task_id: str) -> DeliveriesAnswer:
        """Return the task's webhook and CMS deliveries with their states, oldest first."""
        return await self._ask(_Call("GET", f"/tasks/{_part(task_id)}/deliveries"), DeliveriesAnswer)

    async def resend(self, task_id: str, delivery_id: str) -> DeliveryAnswer:
        """Try a delivery again now. Raises NotFound if the task has no delivery of this id. For admin keys."""
        path = f"/tasks/{_part(task_id)}/deliveries/{_part(delivery_id)}/resend"
        # not sent again if it may have arrived: the receiver could get the delivery twice
        return await self._ask(_Call("POST", path, repeatable=False), DeliveryAnswer)

    async def workers(self) -> WorkersAnswer:
        """Return the engine processes of all workers seen in the last five minutes."""
        return await self._ask(_Call("GET", "/workers/status"), WorkersAnswer)

    async def health(self) -> HealthAnswer:
        """Return the health report, including for an unhealthy installation. Not retried: raises Unavailable without an answer."""
        return await self._ask(_Call("GET", "/health", accepted=(503,), patient=False), HealthAnswer)

    async def upload(self, project_id: str, source: Path | bytes) -> UploadAnswer:
        """Upload a picture or sound, from bytes or a file, for use in tasks; it is stored for seven days.

        Use the answer's `url` in task_data. Raises ValidationFailed for an unreadable file or another kind of file, PayloadTooLarge for one
        that is too large.
        """
        body = source if isinstance(source, bytes) else await asyncio.to_thread(_contents, source)
        if len(body) > UPLOAD_BYTES:
            name = "the upload" if isinstance(source, bytes) else source
            raise PayloadTooLarge(f"{name} is too large: an upload may have at most {UPLOAD_BYTES} bytes")
        headers = {"Content-Type": "application/octet-stream"}
        return await self._ask(_Call("POST", f"/projects/{_part(project_id)}/uploads", body, headers, timeout_s=UPLOAD_S), UploadAnswer)

    async def download(self, url: str, dest: Path) -> int:
        """Download a URL to `dest`, completely or not at all; return the size in bytes.

        The API key is not sent: result URLs are signed. Raises OSError if `dest` cannot be written.
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
        """Yield the events of a task, each once and in order, until the task ends.

        `task` is a task id or an `events_url`; `after` is the id of the last event already seen. The stream is reopened after broken
        connections, 5xx answers and restarts of the server. Raises RequestError if the server refuses the request, and Unavailable if it
        stays away for longer than `patience_s`, or than five minutes once the stream has worked. `on_fault` is called with the error before
        each wait for another try. If you leave the iteration early, close it (`aclosing`).
        """
        stream = _Stream(URL(task, encoded=True) if "://" in task else self._at(f"/tasks/{_part(task)}/events"), after)
        headers = {} if "://" in task else self._key  # a URL may name another server, which must not get the key
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
                if over:  # the task's end has arrived; only later updates may be missing
                    return
                raise

    async def _frames(self, stream: _Stream, headers: dict[str, str]) -> AsyncGenerator[_Frame]:
        """Yield the frames of one connection. Raises RequestError if it is refused, breaks or falls silent."""
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
                    raise _Unreadable(f"{stream.name} answers {answer.content_type}, not an event stream: check that it is movieq")
                while chunk := await self._heard(answer, stream.name):
                    for frame in parser.feed(chunk):
                        yield frame
                    if parser.pending > FRAME_BYTES:
                        raise _Unreadable(f"{stream.name} sent an event of more than {FRAME_BYTES} bytes: check that it is movieq")

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
                if lost or isinstance(error, Internal) or not call.patient:  # a 500 reopens a stream, but retries no request
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
        """Send a request; yield its answer once the headers have arrived, within `head_s`. Raises an error answer as its RequestError."""
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
    """A request. `repeatable`: sending it twice has the same effect as once; `patient`: retry it after temporary errors."""

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
    """The connection broke, or a proxy answered instead of movieq: the request may have arrived."""


class _Unreadable(Internal):
    """The answer cannot be read: the server is not movieq, or a version that this client does not understand."""

    retryable = False


class _Waits:
    """The waits between tries: each doubles the last and is at least `Retry-After`; together they last at most `patience_s`."""

    def __init__(self, patience_s: float, shortest_s: float, longest_s: float) -> None:
        self._end = 0.0
        self._patience_s = patience_s
        self._backoff = Backoff(shortest_s, longest_s)

    async def next(self, problem: RequestError) -> None:
        """Sleep until the next try. Raises the problem if another try cannot help or would come too late."""
        now = time.monotonic()
        self._end = self._end or now + self._patience_s
        wait_s = max(self._backoff.next_s() * random.uniform(1, 1.25), problem.retry_after_s or 0)  # noqa: S311  # spreads load, hides nothing
        if not problem.retryable or now + wait_s > self._end:
            raise problem
        await asyncio.sleep(wait_s)


_BY_CODE: Final = {cls.code: cls for cls in RequestError.__subclasses__()}
"""The error classes of errors.py by code; this module's own subclasses are not among them."""
_BY_STATUS: Final[dict[int, type[RequestError]]] = {
    **{cls.status: cls for cls in reversed(RequestError.__subclasses__())},  # the first of two classes with the same status wins
    **dict.fromkeys((502, 503, 504), _AnswerLost),
}
_error_answers = msgspec.json.Decoder(ErrorAnswer)


def _refusal(answer: aiohttp.ClientResponse, body: bytes) -> RequestError:
    """Return the error that the server sent; for an answer that is not movieq's, such as a proxy's page, an error chosen by its status."""
    header = answer.headers.get("Retry-After")
    wait_s = None if header is None else webhooks.retry_after_s(header, time.time())
    retry_after_s = None if wait_s is None else math.ceil(wait_s)
    try:
        sent = _error_answers.decode(body)
    except msgspec.DecodeError:
        name = without_query(str(answer.url))
        if 300 <= answer.status < 400:
            return ValidationFailed(f"{name} redirects ({answer.status}), and redirects are not followed: use the final URL")
        cls = _BY_STATUS.get(answer.status, Internal if answer.status >= 500 else ValidationFailed)
        return cls(f"{name} answers {answer.status}", retry_after_s=retry_after_s)
    errors = tuple((error.path, error.message) for error in sent.errors)
    cls = _BY_CODE.get(sent.error) or _BY_STATUS.get(answer.status, Internal if answer.status >= 500 else ValidationFailed)
    return cls(sent.message, errors=errors, retry_after_s=retry_after_s)


@contextlib.contextmanager
def _translated(method: str, name: str) -> Iterator[None]:
    """Raise connection errors as Unavailable with the address: Unreachable if the request did not arrive, `_AnswerLost` if it may have."""
    try:
        yield
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
        raise ValidationFailed(f"{name[:200]!r} is not a valid http or https URL") from None
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise Unreachable(f"cannot connect to {name}: {_reason(error)}") from None
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        raise _AnswerLost(f"the connection for {method} {name} failed: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    match http_fault(error):
        case HttpFault.HOST:
            return "unknown host name"
        case HttpFault.TLS:
            return "the certificate or the TLS handshake was not accepted"
        case HttpFault.CONNECT:
            return reason(error) or "the connection failed"
        case HttpFault.TIMEOUT:
            return "no answer in time"
    return str(error) or type(error).__name__


# ── Streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Frame(msgspec.Struct, frozen=True):
    """An event of the wire format, or a lone `retry:` field."""

    type: str = ""
    data: str = ""
    id: str | None = None
    retry_ms: int | None = None


class _Stream:
    """A reader's position in a task's log, kept across connections."""

    def __init__(self, url: URL, after: str | None) -> None:
        self.url = url
        self.name = without_query(str(url))
        self.last_id = after
        self.retry_s = RECONNECT_S[0]
        self.exhausted = False
        # a set, not a comparison: after a failover to a Redis whose clock is behind, new events have smaller ids than old ones
        self._seen = set() if after is None else {after}

    def event(self, frame: _Frame) -> ClientEvent | None:
        """Return the event of a frame; None for a repeated event, a goodbye, or a type that this client does not know."""
        if frame.retry_ms is not None:
            self.retry_s = min(max(frame.retry_ms / 1000, BACKOFF_S[0]), RECONNECT_S[1])
        if frame.id is not None:
            self.last_id = frame.id
            if frame.id in self._seen:
                return None
            self._seen.add(frame.id)
        if frame.type not in _DATA or frame.type == EventType.GOODBYE:  # a goodbye only asks to reopen the stream
            return None
        event_type = EventType(frame.type)
        try:
            return ClientEvent(frame.id, event_type, msgspec.json.decode(frame.data, type=_DATA[event_type]))
        except msgspec.DecodeError:
            raise _Unreadable(f"{self.name} sent an unreadable {event_type} event: use a client of the server's version") from None


_DATA: Final[dict[str, type[ProcessingProgress | Snapshot | Gap | Preview]]] = {
    **dict.fromkeys(EventType, ProcessingProgress),
    EventType.SNAPSHOT: Snapshot,
    EventType.RETRYING: Retrying,
    EventType.GAP: Gap,
    EventType.PREVIEW: Preview,
}
"""The type of an event's data."""


class _Parser:
    """A parser of event streams (WHATWG HTML, 9.2.6) that takes chunks of any length."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []
        self._begun = False
        self.pending = 0

    def feed(self, chunk: bytes) -> Iterator[_Frame]:
        """Yield the frames that this chunk completes."""
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
        raise SettingsError(f"{url!r} is not an API URL: use one such as http://127.0.0.1:8001")
    return url.rstrip("/").removesuffix("/api/v1")


def _part(text: str) -> str:
    """Return the text quoted as one path segment."""
    return quote(text, safe="")


def _json(request: SubmitRequest) -> bytes:
    # msgspec would write NaN and infinity, which JSON does not have, as null
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
        raise _Unreadable(f"{name} sent an unreadable answer: {error}; check that it is movieq, and its version") from None


def _contents(path: Path) -> bytes:
    """Return the file's bytes, cut off one byte past the upload limit."""
    try:
        with path.open("rb") as file:
            return file.read(UPLOAD_BYTES + 1)
    except OSError as error:
        raise ValidationFailed(f"{path} cannot be read: {error.strerror}") from None
