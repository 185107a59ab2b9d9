"""Functions that decode Redis hashes and lists into records. They tolerate damaged data and data of other versions."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Sequence
from enum import StrEnum
from typing import Any, Final, TypeVar, cast

import msgspec
from redis.asyncio.client import Pipeline

from movieq.settings import Grant, Scope
from movieq.tasks.entities import Delivery, Real, Task, Whole, WorkerStatus
from movieq.tasks.states import EventType, TaskStatus


class Able(msgspec.Struct, frozen=True):
    """The tasks that a worker can run: those of these task types with these models."""

    types: tuple[str, ...]
    models: tuple[str, ...]


class Logged(msgspec.Struct, frozen=True):
    """An entry of an event log. `data` is the JSON of a ProcessingProgress with the stored result.

    An `updated` event has a `payload_media_id` beside the result. `type` is a plain string if only a newer version knows it.
    """

    id: str
    type: EventType
    data: bytes


class _Definition(msgspec.Struct):
    """The keyword arguments of an arq job; its other fields are not decoded."""

    k: dict[str, Any]


class _StoredGrant(msgspec.Struct):
    projects: frozenset[str] | None
    scopes: frozenset[str]


Record = TypeVar("Record", Task, Delivery)

_definition = msgspec.msgpack.Decoder(_Definition)
_stored_grant = msgspec.msgpack.Decoder(_StoredGrant)
_rows = msgspec.json.Decoder(list[WorkerStatus])
_EVENT_TYPES: Final = frozenset(EventType)
_strings = msgspec.json.Decoder(list[str])
_blob = msgspec.json.Decoder(float_hook=float)  # msgspec's own parser needs 0.03 ms for some numbers, and there may be hundreds
_BLOBS = {"result", "metadata", "media_id", "payload_media_id"}
_ID: Final = re.compile(rb"[0-9]{1,18}-[0-9]{1,18}")
_UNREADABLE: Final = (ValueError, RecursionError)


def event_type(name: bytes) -> EventType:
    """Return the event type with this name; the name itself if only a newer version knows it."""
    named = text(name)
    return EventType(named) if named in _EVENT_TYPES else cast("EventType", named)


def text(stored: bytes) -> str:
    """Return the field as text; bytes that are not UTF-8 are replaced."""
    return stored.decode(errors="replace")


def number(stored: bytes | None) -> float:
    """Return the value of a counter; 0 if it is missing or damaged."""
    try:
        return msgspec.convert(text(stored or b"0"), Real, strict=False)
    except msgspec.MsgspecError:
        return 0.0


def decode_logged(id: bytes, fields: dict[bytes, bytes]) -> Logged | None:
    """Return an entry of an event log; None if it is damaged and cannot be sent in a stream."""
    name, data = fields.get(b"type"), fields.get(b"data")
    if name is None or data is None or b"\n" in name + data:
        return None
    return Logged(id.decode(), event_type(name), data)


async def execute_tolerantly(pipe: Pipeline) -> list[Any]:
    """Run the reads of a pipeline and return the answers; None for a key of the wrong type."""
    answers = await pipe.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
            raise answer
    return [None if isinstance(answer, Exception) else answer for answer in answers]


async def awaited(call: Awaitable[Any] | Any) -> Any:
    """Await a Redis command. redis-py types its answer as a union of sync and async, but ours are always async."""
    return await call


def pairs(flat: Sequence[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _named(fields: dict[bytes, bytes]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in fields.items():
        name = key.decode()
        if name == "last_event_id" and not _ID.fullmatch(value):
            continue
        named[name] = _blob.decode(value) if name in _BLOBS else value.decode()
    return named


def _merged(named: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with the CMS id merged into the result. Older versions stored it in the result only."""
    if "payload_media_id" in named and isinstance(named.get("result"), dict):
        named["result"]["payload_media_id"] = named["payload_media_id"]
    return named


def decode_task(task_id: str, fields: dict[bytes, bytes]) -> Task:
    """Return the task that a hash holds.

    If the hash is damaged or of a newer version, return the readable fields, with status `unknown` unless it is failed or cancelled.
    """
    try:
        return msgspec.convert(_merged(_named(fields)), Task, strict=False)
    except _UNREADABLE:
        found = _readable(fields)
        given_up = found.get("status") in (TaskStatus.FAILED, TaskStatus.CANCELLED)  # these states make sense without other fields
        return _salvaged(Task, {"task_id": task_id, **found}, **({} if given_up else {"status": TaskStatus.UNKNOWN}))


def decode_delivery(delivery_id: str, fields: dict[bytes, bytes]) -> Delivery | None:
    if not fields:
        return None
    try:
        return msgspec.convert(_merged(_named(fields)), Delivery, strict=False)
    except _UNREADABLE:
        task_id = delivery_id.rpartition("-")[0]
        return _salvaged(Delivery, {"task_id": task_id, **_readable(fields)})


def _readable(fields: dict[bytes, bytes]) -> dict[str, Any]:
    """Return the fields of a hash that can be decoded."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        with contextlib.suppress(*_UNREADABLE):
            found |= _named({name: value})
    return _merged(found)


def _salvaged(cls: type[Record], fields: dict[str, Any], **said: Any) -> Record:
    """Return the record with all readable fields. Names unknown to this version are kept as text; missing fields are empty."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(cls):
        given = fields.get(field.name)
        try:
            found[field.name] = msgspec.convert(given, field.type, strict=False)
        except _UNREADABLE:
            if isinstance(given, str) and isinstance(field.type, type) and issubclass(field.type, StrEnum):
                found[field.name] = given
            elif field.required:
                found[field.name] = 0 if field.type == Whole else ""
    return cls(**{**found, **said})


def decode_heartbeat(blob: bytes | None) -> list[WorkerStatus]:
    """Return the rows of a worker's heartbeat; an empty list if they cannot be read."""
    try:
        return _rows.decode(blob or b"[]")
    except msgspec.MsgspecError:
        return []


def decode_able(blob: bytes) -> Able | None:
    try:
        return msgspec.json.decode(blob, type=Able)
    except msgspec.MsgspecError:
        return None


def decode_grant(blob: bytes) -> Grant | None:
    """Return the rights of an API key, without scopes that only a newer version knows; None if they cannot be read."""
    try:
        stored = _stored_grant.decode(blob)
        return Grant(stored.projects, frozenset(Scope(scope) for scope in stored.scopes if scope in list(Scope)))
    except (msgspec.MsgspecError, ValueError):
        return None


def decode_task_data(job: bytes | None) -> dict[str, Any]:
    """Return the task data of an arq job; empty if the job is gone or cannot be read."""
    try:
        return _definition.decode(job).k.get("task_data", {}) if job else {}
    except msgspec.MsgspecError:
        return {}


def decode_warnings(stored: bytes | str) -> list[str]:
    try:
        return _strings.decode(stored)
    except msgspec.MsgspecError:  # a receipt without warnings is better than none
        return []
