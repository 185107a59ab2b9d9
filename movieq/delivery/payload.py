"""PayloadCMS 3: a result becomes a document, and another document is pointed at that one.

`Cms` is what an operator decided: where the CMS is, and which of its fields say what. `Payload` asks its REST API, one step a call; a step
that fails raises CmsFault, whatever the CMS does. A document is found again by the task's id, in the field that is mapped to it and in the
name of its file.
Left out: when to try again, and what becomes of two documents of one task (`workers.deliver`).
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from movieq.errors import CmsFault, SettingsError
from movieq.fetch.problems import HttpFault, http_fault, reason
from movieq.settings import PayloadMode, Settings
from movieq.tasks import params
from movieq.tasks.entities import Delivery
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import StoredMedia
from movieq.tasks.states import TaskId, TaskType

ANSWER_S: Final = 30.0
LEAST_BYTES_S: Final = 256 * 1024
"""The slowest upload that is waited for."""
MAX_ANSWER_BYTES: Final = 1024 * 1024
ALT_CHARS: Final = 120
FOUND: Final = 10
"""How many documents of one task are looked at."""
LIMITS: Final = "`upload.limits.fileSize` (20 MiB a file) and `upload.requestSizeLimit` (50 MiB a request) in its Payload config"
"""The two that refuse large files, with their defaults."""

NAMES: Final = (
    "alt",
    "project",
    "mediaType",
    "agentGenerated",
    *(f"generationMetadata.{name}" for name in ("taskId", "promptUsed", "modelVersion", "generationTime", "seed")),
    *(f"technicalData.{name}" for name in ("duration", "resolution", "fps", "sampleRate")),
    "url",
)
"""What is said of a result; `url` in reference mode alone."""
TASK_ID: Final = "generationMetadata.taskId"
MEDIA_TYPES: Final = {"dialogue_audio": "audio_clip"}
"""Media types that the CMS knows by another word."""

_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_SLUG = re.compile(r"[A-Za-z0-9_-]{1,100}")
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.~-]{0,199}")

T = TypeVar("T")
Id = str | int
"""Of a document: a number or a text, as the CMS's database has it."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document of the CMS that is to point at a result: `field` may lie in a group (`takes.first`)."""

    collection: str
    id: Id
    field: str


class Document(msgspec.Struct, frozen=True):
    """A document that holds a result; `filesize` is that of its file."""

    id: Id
    filesize: int | None = None

    def whole(self, media: StoredMedia) -> bool:
        """Whether all of the file arrived. The CMS may store a picture anew; video and sound it keeps as they are."""
        if self.filesize is None or media.content_type.startswith("image/"):
            return self.filesize != 0
        return self.filesize == media.size_bytes


class Cms(msgspec.Struct, frozen=True):
    """The CMS of this installation.

    `fields`: what we call it -> where the CMS keeps it, empty where it does not; `values`: (what we call it, our value) -> the CMS's value.
    """

    url: str
    api_key: str
    users: str
    media: str
    mode: PayloadMode
    fields: Mapping[str, str]
    values: Mapping[tuple[str, str], Any]

    @property
    def address(self) -> str:
        """Of the collection that results go into."""
        return f"{self.url}/{self.media}"

    def path(self, name: str) -> str:
        """Where the CMS keeps what we call so; empty where it does not."""
        group, dot, rest = name.partition(".")
        if name in self.fields or not dot or group not in self.fields:
            return self.fields.get(name, name)
        return f"{self.fields[group]}.{rest}" if self.fields[group] else ""

    def paths(self) -> list[str]:
        """Every field that a document of ours has."""
        names = NAMES if self.mode is PayloadMode.REFERENCE else NAMES[:-1]
        return [path for name in names if (path := self.path(name))]

    def document(self, delivery: Delivery, task_data: Mapping[str, Any], url: str) -> dict[str, Any]:
        """What the CMS is told of a result, nested as its fields are. `url` is the address of the file."""
        made: dict[str, Any] = {}
        for name, value in self._facts(delivery, task_data, url):
            if value is not None and (path := self.path(name)):
                *groups, last = path.split(".")
                at = made
                for group in groups:
                    at = at.setdefault(group, {})
                at[last] = self.values.get((name, str(value)), value)
        return made

    def _facts(self, delivery: Delivery, task_data: Mapping[str, Any], url: str) -> Iterator[tuple[str, Any]]:
        assert delivery.result is not None
        media, metadata = delivery.result.media[0], delivery.result.metadata
        media_type = MEDIA_TYPES.get(media.media_type, media.media_type)
        description = _description(delivery.task_type, task_data)
        version = f"{metadata['model']}@{metadata['revision']}" if metadata.get("revision") else metadata.get("model")
        seconds = None if delivery.started_at_ms is None else (delivery.ended_at_ms - delivery.started_at_ms) / 1000
        yield "alt", description[:ALT_CHARS] or media_type.replace("_", " ")
        yield "project", _id(delivery.project_id)
        yield "mediaType", media_type
        yield "agentGenerated", True
        yield TASK_ID, delivery.task_id
        yield "generationMetadata.promptUsed", description or None
        yield "generationMetadata.modelVersion", version
        yield "generationMetadata.generationTime", seconds
        yield "generationMetadata.seed", metadata.get("seed")
        yield "technicalData.duration", metadata.get("duration")
        yield "technicalData.resolution", metadata.get("resolution")
        yield "technicalData.fps", float(params.frame_rate(metadata["fps"])) if metadata.get("fps") else None
        yield "technicalData.sampleRate", metadata.get("sample_rate")
        if self.mode is PayloadMode.REFERENCE:
            yield "url", url


def configured(settings: Settings) -> Cms | None:
    """The CMS of the settings; None where there is none. Raises SettingsError naming the setting."""
    if not settings.payload_url:
        return None
    try:
        parsed = URL(settings.payload_url)
        usable = parsed.scheme in ("http", "https") and parsed.host and not (parsed.user or parsed.password or parsed.query_string)
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError("MOVIEQ_PAYLOAD_URL: the address above /media of a PayloadCMS is expected, such as https://cms.example/api")
    if not settings.payload_api_key.isascii() or not settings.payload_api_key.isprintable() or not settings.payload_api_key:
        raise SettingsError("MOVIEQ_PAYLOAD_API_KEY: the API key of a user of the CMS is expected: Enable API Key, on that user's page")
    for name in ("users", "media"):
        if not _SLUG.fullmatch(slug := getattr(settings, f"payload_{name}")):
            raise SettingsError(f"MOVIEQ_PAYLOAD_{name.upper()}: the slug of a collection is expected, got {slug!r}")
    fields, values = _mapping(settings.payload_fields)
    url = settings.payload_url.rstrip("/")
    cms = Cms(url, settings.payload_api_key, settings.payload_users, settings.payload_media, settings.payload_mode, fields, values)
    if cms.mode is PayloadMode.REFERENCE and not (cms.path(TASK_ID) and cms.path("url")):
        raise SettingsError(f"MOVIEQ_PAYLOAD_FIELDS: without a file a document needs {TASK_ID}, by which it is found again, and url")
    paths = sorted(cms.paths())
    for path, other in pairwise(paths):
        if path == other or other.startswith(f"{path}."):
            raise SettingsError(f"MOVIEQ_PAYLOAD_FIELDS: two values would go into {path}")
    return cms


def target(metadata: Mapping[str, Any]) -> Target | None:
    """The document that `metadata.payload` of a task names; None where it names none. Raises CmsFault, final."""
    if metadata.get("payload") is None:
        return None
    try:
        named = msgspec.convert(metadata["payload"], Target)
    except msgspec.ValidationError as error:
        raise CmsFault(f"metadata.payload: {error}; {{collection, id, field}} is expected", final=True) from None
    if not (_SLUG.fullmatch(named.collection) and _ID.fullmatch(str(named.id)) and _PATH.fullmatch(named.field)):
        raise CmsFault("metadata.payload: the slug of a collection, the id of a document and the name of a field are expected", final=True)
    return named


class Payload:
    """Asks the CMS. Each call raises CmsFault, and nothing else but CancelledError.

    The session is the guard's (`movieq.fetch`); redirects are not followed, so that the key goes nowhere else.
    """

    def __init__(self, cms: Cms, session: aiohttp.ClientSession, *, answer_s: float = ANSWER_S) -> None:
        self.cms = cms
        self.takes_files = cms.mode is PayloadMode.UPLOAD
        self._session = session
        self._answer_s = answer_s
        self._by_field = True

    async def find(self, task_id: TaskId) -> list[Document]:
        """The documents of a task, the oldest first."""
        path = self.cms.path(TASK_ID)
        if path and self._by_field:
            wanted: dict[str, str] = {f"where[or][0][{path}][equals]": task_id}
            if self.takes_files:
                wanted["where[or][1][filename][contains]"] = task_id
            try:
                return await self._find(wanted)
            except CmsFault as fault:
                if not (self.takes_files and fault.final):
                    raise
                self._by_field = False  # the collection has no such field, and leaves it out of what it is given
        return await self._find({"where[filename][contains]": task_id})

    async def _find(self, where: dict[str, str]) -> list[Document]:
        query = {**where, "sort": "createdAt", "limit": str(FOUND), "select[filesize]": "true"}
        return (await self._ask("GET", self.cms.media, _Page, query=query)).docs

    async def create(self, fields: dict[str, Any], file: Path | None, name: str, content_type: str) -> Document:
        """The document is there, with the file, unless it is None. Of `name` the CMS makes one that is not taken.

        The file is streamed; its length goes ahead, as Payload takes a body without for an empty one.
        """
        if file is None:
            return (await self._ask("POST", self.cms.media, _Made, json=fields)).doc
        size_bytes = file.stat().st_size
        with file.open("rb") as opened:
            form = aiohttp.FormData(quote_fields=False)
            form.add_field("_payload", msgspec.json.encode(fields).decode())
            form.add_field("file", opened, filename=name, content_type=content_type)
            try:
                made = await self._ask("POST", self.cms.media, _Made, data=form, more_s=size_bytes / LEAST_BYTES_S)
            except (_TooLarge, _BrokeOff) as fault:
                text = f"{fault.message}; the file has {size_bytes} bytes: where that is too many for the CMS, raise {LIMITS}"
                raise CmsFault(text, status=fault.status, retry_after=fault.retry_after) from None
        return made.doc

    async def remove(self, id: Id) -> None:
        """There is no document of this id."""
        try:
            await self._ask("DELETE", f"{self.cms.media}/{_part(id)}", msgspec.Raw)
        except CmsFault as fault:
            if fault.status != 404:
                raise

    async def point(self, document: Target, id: Id) -> None:
        """The document's field holds the id of the result's."""
        *groups, last = document.field.split(".")
        fields: dict[str, Any] = {last: id}
        for group in reversed(groups):
            fields = {group: fields}
        try:
            await self._ask("PATCH", f"{document.collection}/{_part(document.id)}", msgspec.Raw, json=fields)
        except CmsFault as fault:
            text = f"{document.collection}/{document.id}, which metadata.payload names: {fault.message}"
            final = fault.final or fault.status in (400, 404)
            raise CmsFault(text, final=final, status=fault.status, retry_after=fault.retry_after) from None

    # ── For `movieq doctor` ──

    async def known(self) -> bool:
        """Whether the CMS knows the key."""
        return (await self._ask("GET", f"{self.cms.users}/me", _Me)).user is not None

    async def may(self) -> list[str]:
        """Which of create, read and delete the key's user may do in the collection."""
        rights = await self._ask("POST", f"{self.cms.media}/access", dict[str, Any])
        return [verb for verb in ("create", "read", "delete") if rights.get(verb)]

    async def missing(self) -> list[str]:
        """Fields of our documents that the collection does not have."""
        query = {f"where[or][{number}][{path}][exists]": "true" for number, path in enumerate(self.cms.paths())}
        try:
            await self._ask("GET", self.cms.media, _Page, query={**query, "limit": "1", "select[filesize]": "true"})
        except _Unqueried as fault:
            return [path for path in self.cms.paths() if any(path == each or path.startswith(f"{each}.") for each in fault.paths)]
        return []

    async def limit_bytes(self, size_bytes: int) -> int | None:
        """What a file may have, where that is less than `size_bytes`. So many bytes are sent, to a place where they come to nothing."""
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("file", io.BytesIO(bytes(size_bytes)), filename="movieq-doctor.bin", content_type="application/octet-stream")
        try:
            await self._ask("POST", f"{self.cms.media}/access", msgspec.Raw, data=form, more_s=size_bytes / LEAST_BYTES_S)
        except _TooLarge as fault:
            return fault.limit_bytes or size_bytes - 1
        except _BrokeOff:
            return size_bytes - 1
        return None

    async def _ask(
        self, method: str, path: str, answer_type: type[T], *, query: Mapping[str, str] | None = None, more_s: float = 0.0, **body: Any
    ) -> T:
        """The answer. `more_s` is added to its time limit; `body` is what aiohttp takes for one."""
        limit_s = self._answer_s + more_s
        headers = {"Authorization": f"{self.cms.users} API-Key {self.cms.api_key}", "Accept-Encoding": "identity"}
        try:
            async with (
                asyncio.timeout(limit_s),
                self._session.request(
                    method,
                    f"{self.cms.url}/{path}",
                    params={**(query or {}), "depth": "0"},
                    headers=headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(),
                    **body,
                ) as answer,
            ):
                told = await _read(answer)
                if answer.connection is not None and answer.connection.transport is not None:  # it has said no before it heard all
                    answer.connection.transport.abort()
        except TimeoutError:
            raise CmsFault(f"the CMS gave no answer within {limit_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _fault(error) from None
        if not 200 <= answer.status < 300:
            raise _refusal(answer, told)
        try:
            return msgspec.json.decode(told, type=answer_type)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise CmsFault(
                f"what answers at {self.cms.url} is no PayloadCMS: MOVIEQ_PAYLOAD_URL is the address above /media", status=answer.status
            ) from None


class _Page(msgspec.Struct, frozen=True):
    docs: list[Document]


class _Made(msgspec.Struct, frozen=True):
    doc: Document


class _Me(msgspec.Struct, frozen=True):
    user: dict[str, Any] | None


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    data: Any = None


class _Errors(msgspec.Struct, frozen=True):
    errors: list[_Error] = []


class _BrokeOff(CmsFault):
    """The connection ended before an answer came: where a file is too large, the CMS may say so in this way."""


class _TooLarge(CmsFault):
    """413. `limit_bytes`: what a file may have, where the CMS says it."""

    def __init__(self, limit_bytes: int | None, retry_after: str) -> None:
        text = f", at most {limit_bytes} bytes" if limit_bytes else ""
        super().__init__(f"the CMS takes no such large file{text}", status=413, retry_after=retry_after)
        self.limit_bytes = limit_bytes


class _Unqueried(CmsFault):
    """The CMS was asked by fields that the collection does not have."""

    def __init__(self, message: str, paths: list[str]) -> None:
        super().__init__(message, final=True, status=400)
        self.paths = paths


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """The body; where it is too long to be an answer, its beginning."""
    body = bytearray()
    while len(body) < MAX_ANSWER_BYTES and (chunk := await answer.content.read(MAX_ANSWER_BYTES - len(body))):
        body += chunk
    return bytes(body)


def _refusal(answer: aiohttp.ClientResponse, body: bytes) -> CmsFault:
    """What the CMS said no to. Errors are told by status and path: their names are shortened where Payload was built for production."""
    try:
        errors = msgspec.json.decode(body, type=_Errors).errors
    except (msgspec.DecodeError, UnicodeDecodeError):
        errors = []
    first = errors[0] if errors else _Error()
    retry_after = answer.headers.get("Retry-After", "")
    match answer.status:
        case 400 if isinstance(first.data, list):
            paths = [str(each["path"]) for each in first.data if isinstance(each, dict) and "path" in each]
            return _Unqueried(f"its collection has no field {', '.join(paths)}: add it, or map it by MOVIEQ_PAYLOAD_FIELDS", paths)
        case 400 if fields := _fields(first.data):
            taken = [path for path, _ in fields] == ["filename"]  # by another upload of the same moment
            text = "; ".join(f"{path}: {message}" for path, message in fields)
            return CmsFault(f"the CMS refuses {text}", final=not taken, status=400)
        case 401 | 403:
            text = "the CMS does not allow it: is MOVIEQ_PAYLOAD_API_KEY right, and may its user do this?"
            return CmsFault(f"{text} ({first.message or answer.status})", status=answer.status)
        case 413:
            size = first.data.get("size") if isinstance(first.data, dict) else None
            return _TooLarge(size if isinstance(size, int) else None, retry_after)
        case status:
            text = f": {first.message}" if first.message else ""
            if 300 <= status < 400:
                text = ", and redirects are not followed: MOVIEQ_PAYLOAD_URL is to be the final address"
            return CmsFault(f"the CMS answered {status}{text}", status=status, retry_after=retry_after)


def _fields(data: Any) -> list[tuple[str, str]]:
    """Paths and messages of a ValidationError."""
    listed = data.get("errors") if isinstance(data, dict) else None
    return [(str(each["path"]), str(each.get("message", ""))) for each in listed or () if isinstance(each, dict) and "path" in each]


def _fault(error: Exception) -> CmsFault:
    why = reason(error)
    match http_fault(error):
        case HttpFault.HOST:
            return CmsFault("the host of the CMS was not found")
        case HttpFault.TLS:
            return CmsFault("the certificate of the CMS, or its TLS handshake, was not accepted")
        case HttpFault.CONNECT:
            return CmsFault(f"the CMS cannot be reached: {why or 'refused'}")
        case HttpFault.BROKE_OFF:
            return _BrokeOff("the connection to the CMS broke off")
        case _:
            return CmsFault(f"the CMS could not be asked ({type(error).__name__})")


def _mapping(text: str) -> tuple[dict[str, str], dict[tuple[str, str], Any]]:
    """`MOVIEQ_PAYLOAD_FIELDS`: parts `NAME=PATH`, `NAME=` to leave out, `NAME:VALUE=VALUE`. Raises SettingsError."""
    fields: dict[str, str] = {}
    values: dict[tuple[str, str], Any] = {}
    known = {*NAMES, *(name.partition(".")[0] for name in NAMES)}
    for part in filter(None, (part.strip() for part in text.split(","))):
        left, equals, right = (piece.strip() for piece in part.partition("="))
        name, colon, value = left.partition(":")
        if not equals or name not in known or (not colon and right and not _PATH.fullmatch(right)):
            raise SettingsError(
                f"MOVIEQ_PAYLOAD_FIELDS: {part!r} is no NAME=FIELD, NAME= or NAME:VALUE=VALUE with one of the names {', '.join(NAMES)}"
            )
        if colon:
            values[name, value] = _scalar(right)
        else:
            fields[name] = right
    return fields, values


def _scalar(text: str) -> Any:
    """A number, true, false or a text in quotes, as JSON has them; else the text itself."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return text if isinstance(value, list | dict) else value


def _id(text: str) -> Id:
    """A project's id as the CMS has it: SQL databases count documents, and Payload takes no text for a number."""
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,14}", text) else text


def _description(task_type: str, task_data: Mapping[str, Any]) -> str:
    try:
        return params.convert(REGISTRY.tasks[TaskType(task_type)].params, dict(task_data)).description.strip()
    except (KeyError, msgspec.ValidationError):  # of another version, or gone
        return ""


def _part(id: Id) -> str:
    """An id as one part of a path."""
    return quote(str(id), safe="")
