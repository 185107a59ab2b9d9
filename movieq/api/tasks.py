"""The endpoints for tasks: submit, status, cancel, retry."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from movieq import logs
from movieq.api.auth import caller, task_of
from movieq.api.query import query
from movieq.api.state import Api, Caller, answered, api
from movieq.errors import Forbidden, PayloadTooLarge, StorageFault, ValidationFailed
from movieq.fetch.guard import UrlRefused
from movieq.models import choice
from movieq.queue.store import Accepted, NewTask
from movieq.settings import Scope
from movieq.streams.sse import START, pair
from movieq.streams.watchers import EndWatcher, Opening, Source
from movieq.tasks import faults, params, values
from movieq.tasks.entities import Task
from movieq.tasks.faults import Fault, Faults, refused
from movieq.tasks.registry import LONGEST_S, REGISTRY
from movieq.tasks.results import StoredResult, utc
from movieq.tasks.states import PRIORITY_BIAS_MS, ProjectId, TaskId, TaskStatus, TaskType
from movieq.tasks.wire import CancelAnswer, Deadline, Receipt, SubmitRequest

BODY_BYTES: Final = 1024 * 1024
METADATA_BYTES: Final = 16 * 1024
BODY_S: Final = 30.0
"""Longest time in which a body must arrive."""
STORED_S: Final = 2.0
"""Longest wait for the storage to confirm that a stored result exists; after it, the task is rendered."""
DAY_S: Final = 86400
SWEPT_WITHIN_S: Final = 3600
"""A result that will be swept within this time is not reused, since a sweep in progress does not check again."""
WAIT_S: Final = 60
"""Longest `wait` of a status request."""
WAIT_CHECK_S: Final = 1.0
"""How often a waiting request checks whether its client has disconnected."""

_decoder = msgspec.json.Decoder(SubmitRequest)
_slow_decoder = msgspec.json.Decoder(SubmitRequest, float_hook=values.fraction)
_idempotency_key = re.compile(r"[\x21-\x7e]{1,255}")
log = logs.get()


async def submit(request: Request) -> Response:
    """`POST /tasks/submit`: submit a task. Answer 201 with its receipt."""
    movieq = api(request)
    who = await caller(request, Scope.SUBMIT)
    with movieq.places.take_for_body(who.id):
        body = await read_body(request, BODY_BYTES)
    submitted, found = decode(body)
    if submitted.project_id and not who.grant.allows(submitted.project_id):
        raise Forbidden(f"this API key has no access to project {submitted.project_id}")
    new = await new_task(movieq, who, submitted, body, request.headers.get("idempotency-key"), found)
    if new.fingerprint and not submitted.task_data.get("no_cache"):
        new = await _with_earlier(movieq, new)
    accepted = await movieq.store.submit(new)
    log.info(
        "submit",
        task_id=accepted.task_id,
        project_id=new.project_id,
        task_type=new.task_type,
        model=new.model,
        kind=new.kind,
        priority=new.priority,
        reused=new.reused or None,
        replayed=accepted.replayed,
    )
    headers = {"Idempotent-Replayed": "true"} if accepted.replayed else {}
    answer = receipt(movieq, accepted, new.project_id, who, accepted.created_at_ms / 1000)
    return answered(answer, 201, {**headers, "Location": answer.status_url})


async def status(request: Request) -> Response:
    """`GET /tasks/{task_id}/status`: return a task. With `?wait=SECONDS`, answer when the task has ended or the time is up."""
    movieq = api(request)
    task, who = await task_of(request, Scope.READ)
    with query(request, "wait") as asked:
        wait_s = asked.number("wait", 0, 0, WAIT_S)
    if wait_s and not task.status.ended:
        with movieq.places.take_for_key(who.id):
            await _ended(request, task, time.monotonic() + wait_s)
        task = await movieq.queries.task(task.task_id) or task
    return answered(await movieq.task_state(task, who))


async def _ended(request: Request, task: Task, until_s: float) -> None:
    """Wait until the task has ended, the time is up, the client has disconnected, or the server shuts down."""
    hub, watcher = api(request).hub, EndWatcher()
    position = START if task.last_event_id is None else pair(task.last_event_id)

    async def opening() -> Opening:
        return Opening(b"", position)

    hub.follow(Source.of_task(task.task_id), watcher, opening)
    try:
        while not watcher.ended.is_set() and (left_s := until_s - time.monotonic()) > 0 and not await request.is_disconnected():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, WAIT_CHECK_S)):
                    await watcher.ended.wait()
    finally:
        hub.leave(watcher)


async def cancel(request: Request) -> Response:
    """`DELETE /tasks/{task_id}/cancel`: cancel a task. A repeated request gets the same answer."""
    task, _ = await task_of(request, Scope.SUBMIT)
    previous, at_ms = await api(request).store.cancel(task.task_id)
    if task.status is not TaskStatus.CANCELLED:
        with logs.bound(task_id=task.task_id, project_id=task.project_id):
            log.info("cancel", previous_state=previous)
    return answered(CancelAnswer(task.task_id, TaskStatus.CANCELLED, previous, utc(at_ms), f"the {previous} task was cancelled"))


async def retry(request: Request) -> Response:
    """`POST /tasks/{task_id}/retry`: queue a failed task again. Answer 201 with its receipt."""
    movieq = api(request)
    task, who = await task_of(request, Scope.SUBMIT)
    accepted = await movieq.store.retry(task.task_id)
    with logs.bound(task_id=task.task_id, project_id=task.project_id):
        log.info("retry", attempt=task.attempt)
    return answered(receipt(movieq, accepted, task.project_id, who, time.time()), 201)


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a JSON request.

    Raises PayloadTooLarge over `limit` bytes, ValidationFailed if it is compressed, arrives too slowly, or has another content type.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise refused([("Content-Encoding", "send the body without compression")])
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise refused([("Content-Type", f"expected application/json, got {faults.given(content_type)}")])
    chunks: list[bytes] = []
    size = 0
    async with arriving(BODY_S):
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise PayloadTooLarge(f"the body is larger than {limit} bytes")
            chunks.append(chunk)
    return b"".join(chunks)


@asynccontextmanager
async def arriving(seconds: float) -> AsyncIterator[None]:
    """Limit the time in which a body arrives, so that a slow client cannot hold a connection. Raises ValidationFailed."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ValidationFailed(f"the body did not arrive within {seconds:g} s") from None


def decode(body: bytes) -> tuple[SubmitRequest, list[Fault]]:
    """Return the decoded request, and its faults: fields that SubmitRequest does not allow, values that Redis or an engine cannot handle.

    Wrong fields are left out of the request. Raises ValidationFailed for a body that cannot be read, or has too many faults.
    """
    values.check_elements(body)
    try:
        submitted = (_slow_decoder if values.slow(body) else _decoder).decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError, OverflowError, ValueError) as error:
        return _partly(body, error)
    if len(found := values.found({"task_data": submitted.task_data, "metadata": submitted.metadata})) > faults.MOST:
        raise refused(found)
    return submitted, found


def _partly(body: bytes, error: Exception) -> tuple[SubmitRequest, list[Fault]]:
    """Return what can be used of a body that msgspec has refused with this error, and its faults. Raises ValidationFailed."""
    try:
        sent, found = values.untyped(body)
    except UnicodeError:
        raise ValidationFailed("cannot read the body as JSON: it is not in UTF-8") from None
    except RecursionError:
        raise ValidationFailed(f"cannot read the body as JSON: at most {values.NESTING} levels of lists and objects are allowed") from None
    except ValueError as malformed:
        raise ValidationFailed(f"cannot read the body as JSON: {malformed}") from None
    if not isinstance(sent, dict):
        raise ValidationFailed(f"the body: expected a JSON object, got {faults.given(sent)}")
    if len(found) > faults.MOST:
        raise refused(found)
    found = Faults().add(faults.of_struct(SubmitRequest, sent)).add(found)
    if not found:  # json reads more than msgspec, for example half a surrogate pair
        raise ValidationFailed(f"cannot read the body as JSON: {error}")
    kinds = {field.name: field.type for field in msgspec.structs.fields(SubmitRequest)}
    good = {name: msgspec.convert(sent[name], kind) for name, kind in kinds.items() if name in sent and faults.fits(kind, sent[name])}
    return SubmitRequest(**{"project_id": "", "task_type": "", "task_data": {}, **good}), found


async def new_task(
    movieq: Api, who: Caller, submitted: SubmitRequest, body: bytes, idempotency_key: str | None, found: Iterable[Fault] = ()
) -> NewTask:
    """Return the task to store, fully validated. Raises ValidationFailed with all faults, those `found` before included."""
    faulty, project_id = Faults(found), ProjectId(submitted.project_id)
    task_type, spec, parsed = TaskType(submitted.task_type), REGISTRY.tasks.get(TaskType(submitted.task_type)), None
    if spec is None:
        faulty.add([("task_type", f"expected one of {', '.join(REGISTRY.tasks)}, got {faults.given(submitted.task_type)}")])
    elif (parsed := params.checked(spec.params, submitted.task_data, faulty)) is not None:
        with faulty:
            name = choice.resolve(movieq.models, movieq.settings.engine, await movieq.gpu_bytes(), project_id, task_type, parsed)
    if not faulty.of("metadata"):
        with faulty:
            metadata = _metadata(submitted.metadata or {})
        if movieq.cms is not None:
            faulty.add(movieq.cms.target_faults(submitted.metadata or {}))
    with faulty:
        callback_url = _callback(movieq, submitted.callback_url)
    deadline = submitted.deadline or Deadline()
    with faulty:
        start_by_ms = _deadline("start_by", deadline.start_by)
    with faulty:
        finish_by_ms = _deadline("finish_by", deadline.finish_by)
    with faulty:
        idempotency = _idempotency(who, submitted.project_id, idempotency_key)
    if spec is None or parsed is None or faulty:
        raise refused(faulty)
    model = movieq.models[name]
    batch, batch_rows = choice.batch(name, model, parsed)
    priority = submitted.priority or 2
    return NewTask(
        task_id=TaskId(str(uuid.uuid4())),
        project_id=project_id,
        flow=who.flow,
        task_type=task_type,
        kind=model.kind,
        engine=model.engine,
        model=name,
        shape=choice.shape(name, task_type, parsed),
        priority=priority,
        bias_ms=PRIORITY_BIAS_MS[priority],
        kwargs=msgspec.msgpack.encode({"task_data": submitted.task_data}),
        metadata=metadata,
        estimate_ms=int(model.tasks[task_type] * parsed.takes * 1000),
        max_ms=min(spec.max_duration_s * parsed.takes, LONGEST_S) * 1000,
        batch=batch,
        batch_rows=batch_rows,
        callback_url=callback_url,
        start_by_ms=start_by_ms,
        finish_by_ms=finish_by_ms,
        warnings=tuple(f"Unknown field ignored: task_data.{key[:200]}" for key in params.unknown(spec.params, submitted.task_data)[:100]),
        idempotency=idempotency,
        body_hash=hashlib.sha256(body).hexdigest(),
        fingerprint=choice.fingerprint(
            submitted.project_id, movieq.models, name, task_type, parsed, submitted.task_data, movieq.settings.file_tags
        )
        or "",
        max_queued=movieq.settings.max_queued_per_project,
        max_queued_all=movieq.settings.max_queued,
        max_bytes=movieq.settings.max_record_bytes,
    )


async def _with_earlier(movieq: Api, new: NewTask) -> NewTask:
    """Return the task with the stored result of an identical earlier task of its project; unchanged if none is stored."""
    earlier = await movieq.queries.reusable(new.fingerprint)
    if earlier is None or earlier.status is not TaskStatus.COMPLETED or earlier.result is None:
        return new
    result, media, days = earlier.result, earlier.result.media, movieq.settings.keep_media_days
    if movieq.settings.c2pa_required and "signed_by" not in result.metadata:
        return new
    try:
        async with asyncio.timeout(STORED_S):
            sizes = await asyncio.gather(*(movieq.storage.size(each.key) for each in media))
            if sizes != [each.size_bytes for each in media]:
                return new
    except (StorageFault, TimeoutError) as error:
        log.warning("storage_away", problem=str(error) or type(error).__name__)
        return new
    return msgspec.structs.replace(
        new,
        reused=earlier.task_id,
        reused_result=msgspec.json.encode(StoredResult(media, {**result.metadata, "cache": "hit"})),
        reused_prefix=media[0].key.rpartition("/")[0],
        reuse_within_ms=int((days * DAY_S - SWEPT_WITHIN_S) * 1000) if days else None,
        reused_cms=movieq.cms.address if movieq.cms else "",
    )


def receipt(movieq: Api, accepted: Accepted, project_id: ProjectId, who: Caller, from_s: float) -> Receipt:
    """Return the receipt of a task. Its `events_url` is valid for a day from the Unix time `from_s`; equal times give equal bytes."""
    return Receipt(
        accepted.task_id,
        TaskStatus.QUEUED,
        project_id,
        math.ceil(accepted.estimate_ms / 1000),
        accepted.queue_position,
        utc(accepted.created_at_ms),
        movieq.events_url(accepted.task_id, who, from_s),
        movieq.url(f"/tasks/{accepted.task_id}/status"),
        accepted.warnings,
    )


def _metadata(metadata: dict[str, Any]) -> bytes:
    encoded = msgspec.json.encode(metadata)
    if len(encoded) > METADATA_BYTES:
        raise refused([("metadata", f"expected at most {METADATA_BYTES} bytes of JSON, got {len(encoded)}")])
    return encoded


def _callback(movieq: Api, url: str | None) -> str:
    if url is None:
        return ""
    try:
        movieq.guard.check_url(url)
    except UrlRefused as error:
        raise refused([("callback_url", f"{error.description}, got {faults.given(str(error.url))}")]) from None
    return url


def _deadline(name: str, at: datetime | None) -> int | None:
    if at is None:
        return None
    try:
        return int(at.timestamp() * 1000)
    except (OverflowError, ValueError):
        raise refused([(f"deadline.{name}", f"expected a time between the years 1 and 9999, got {at.isoformat()}")]) from None


def _idempotency(who: Caller, project_id: str, key: str | None) -> str:
    if key is None:
        return ""
    if not _idempotency_key.fullmatch(key):
        raise refused([("Idempotency-Key", f"expected 1 to 255 visible ASCII characters, got {faults.given(key)}")])
    return hashlib.sha256(f"{who.id}\n{project_id}\n{key}".encode()).hexdigest()
