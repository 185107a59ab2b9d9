"""Documents in PayloadCMS 3: create one for a result, and set a field of another document to its id.

`Cms` is the operator's configuration: the url of the CMS, and the names of its fields. `Payload` is a client of its REST API with a method
for each step; every failed step raises CmsFault. The documents of a task are found by the task id, which is stored in the field that is
mapped to it and in the file name.
Left out: the schedule of tries, and the removal of duplicate documents (both in `workers.delivery`).
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from msgspec import Meta
from yarl import URL

from movieq.errors import CmsFault, SettingsError
from movieq.fetch.problems import HttpFault, http_fault, reason
from movieq.settings import PayloadMode, Settings
from movieq.tasks import faults, params
from movieq.tasks.entities import Delivery
from movieq.tasks.faults import Fault
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import StoredMedia
from movieq.tasks.states import TaskId, TaskType

ANSWER_S: Final = 30.0
LEAST_BYTES_S: Final = 256 * 1024
"""Slowest upload that is not cut off, in bytes per second."""
MAX_ANSWER_BYTES: Final = 1024 * 1024
ALT_CHARS: Final = 120
FOUND: Final = 10
"""Most documents of one task that are read."""
LIMITS: Final = "`upload.limits.fileSize` (20 MiB a file) and `upload.requestSizeLimit` (50 MiB a request) in its Payload config"
"""The settings of Payload that refuse large files, with their defaults."""

NAMES: Final = (
    "alt",
    "project",
    "mediaType",
    "agentGenerated",
    *(f"generationMetadata.{name}" for name in ("taskId", "promptUsed", "modelVersion", "generationTime", "seed")),
    *(f"technicalData.{name}" for name in ("duration", "resolution", "fps", "sampleRate")),
    "url",
)
"""The fields that describe a result, by our names; `url` only in reference mode."""
TARGET: Final = "metadata.payload"
TASK_ID: Final = "generationMetadata.taskId"
MEDIA_TYPES: Final = {"dialogue_audio": "audio_clip"}
"""Media types that have another name in the CMS."""


_PATH = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")  # no __proto__
_SLUG = re.compile(r"[A-Za-z0-9_-]{1,100}")
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.~-]{0,199}")

T = TypeVar("T")
Id = str | int
"""The id of a document: a number or a text, depending on the database of the CMS."""


def _whole(pattern: re.Pattern[str]) -> str:
    return rf"^({pattern.pattern})(?!\n)$"  # Python's $ also matches before a last line break


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document of the CMS that is to refer to a result. `field` may be in a group (`takes.first`)."""

    collection: Annotated[str, Meta(pattern=_whole(_SLUG), description="the slug of a collection")]
    id: int | Annotated[str, Meta(pattern=_whole(_ID), description="the id of a document")]
    field: Annotated[str, Meta(pattern=_whole(_PATH), description="the name of a field")]


class Document(msgspec.Struct, frozen=True):
    """A document that holds a result. `filesize` is the size of its file in bytes."""

    id: Id
    filesize: int | None = None

    def whole(self, media: StoredMedia) -> bool:
        """Whether the whole file arrived. The CMS may re-encode images, but stores video and sound unchanged."""
        if self.filesize is None or media.content_type.startswith("image/"):
            return self.filesize != 0
        return self.filesize == media.size_bytes


class Cms(msgspec.Struct, frozen=True):
    """The configuration of this installation's CMS.

    `fields`: our name -> the field of the CMS, empty if it has none. `values`: (our name, our value) -> the value of the CMS.
    """

    url: str
    api_key: str
    users: str
    media: str
    mode: PayloadMode
    fields: Mapping[str, str]
    values: Mapping[tuple[str, str], Any]
    writable: frozenset[tuple[str, str]] = frozenset()
    """The (collection, field) pairs that tasks may set to the id of their result."""

    @property
    def address(self) -> str:
        """The url of the collection for results."""
        return f"{self.url}/{self.media}"

    def path(self, name: str) -> str:
        """Return the CMS's field for one of our names; empty if it has none."""
        group, dot, rest = name.partition(".")
        if name in self.fields or not dot or group not in self.fields:
            return self.fields.get(name, name)
        return f"{self.fields[group]}.{rest}" if self.fields[group] else ""

    def target(self, metadata: Mapping[str, Any]) -> Target | None:
        """Return the document that `metadata.payload` of a task names, or None if it names none. Raises a final CmsFault."""
        if found := self.target_faults(metadata):
            raise CmsFault(faults.refused(found).message, final=True)
        named = metadata.get("payload")
        return None if named is None else msgspec.convert(named, Target)

    def target_faults(self, metadata: Mapping[str, Any]) -> list[Fault]:
        """Return the faults of `metadata.payload`: it is not a Target, or one that tasks may not write."""
        named = metadata.get("payload")
        if named is None or (found := [*faults.of(Target, named, TARGET)]):
            return [] if named is None else found
        pair = named["collection"], named["field"]
        if pair in self.writable:
            return []
        what = faults.printable(".".join(pair)[:200])
        return [(TARGET, f"tasks may not write {what}; the operator can allow it with MOVIEQ_PAYLOAD_WRITABLE")]

    def project(self, project_id: str) -> Any:
        """Return a project's id in the CMS."""
        return self.values.get(("project", project_id), _id(project_id))

    def paths(self) -> list[str]:
        """Return all fields of our documents."""
        names = NAMES if self.mode is PayloadMode.REFERENCE else NAMES[:-1]
        return [path for name in names if (path := self.path(name))]

    def document(self, delivery: Delivery, task_data: Mapping[str, Any], url: str) -> dict[str, Any]:
        """Return the fields of a result's document, nested as in the CMS. `url` is the url of the file."""
        document: dict[str, Any] = {}
        for name, value in self._facts(delivery, task_data, url):
            if value is not None and (path := self.path(name)):
                *groups, last = path.split(".")
                at = document
                for group in groups:
                    at = at.setdefault(group, {})
                at[last] = self.values.get((name, str(value)), value)
        return document

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
    """Return the CMS of the settings, or None if there is none. Raises SettingsError naming the setting."""
    if not settings.payload_url:
        return None
    try:
        parsed = URL(settings.payload_url)
        usable = parsed.scheme in ("http", "https") and parsed.host and not (parsed.user or parsed.password or parsed.query_string)
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError("MOVIEQ_PAYLOAD_URL: expected the API url of a PayloadCMS, without /media, such as https://cms.example/api")
    if not settings.payload_api_key.isascii() or not settings.payload_api_key.isprintable() or not settings.payload_api_key:
        raise SettingsError("MOVIEQ_PAYLOAD_API_KEY: expected the API key of a user of the CMS; choose Enable API Key on that user's page")
    for name in ("users", "media"):
        if not _SLUG.fullmatch(slug := getattr(settings, f"payload_{name}")):
            raise SettingsError(
                f"MOVIEQ_PAYLOAD_{name.upper()}: expected the slug of a collection, in letters, digits, - and _, got {slug!r}"
            )
    fields, values = _mapping(settings.payload_fields)
    url = settings.payload_url.rstrip("/")
    cms = Cms(
        url=url,
        api_key=settings.payload_api_key,
        users=settings.payload_users,
        media=settings.payload_media,
        mode=settings.payload_mode,
        fields=fields,
        values=values,
        writable=_writable(settings),
    )
    if cms.mode is PayloadMode.REFERENCE and not (cms.path(TASK_ID) and cms.path("url")):
        raise SettingsError(f"MOVIEQ_PAYLOAD_FIELDS: reference mode needs a field for {TASK_ID} and one for url")
    paths = sorted(cms.paths())
    for path, other in pairwise(paths):
        if path == other or other.startswith(f"{path}."):
            raise SettingsError(f"MOVIEQ_PAYLOAD_FIELDS: two values would be written to {path}; map each to a field of its own")
    return cms


class Payload:
    """A client of the CMS. Its methods raise CmsFault, and nothing else but CancelledError.

    The session comes from the guard (`movieq.fetch`). Redirects are not followed, so that the API key reaches no other server.
    """

    def __init__(self, cms: Cms, session: aiohttp.ClientSession, *, answer_s: float = ANSWER_S) -> None:
        self.cms = cms
        self.takes_files = cms.mode is PayloadMode.UPLOAD
        self._session = session
        self._answer_s = answer_s
        self._by_field = True

    async def find(self, task_id: TaskId) -> list[Document]:
        """Return the documents of a task, oldest first."""
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
                self._by_field = False  # the collection has no such field, and ignores it in new documents
        return await self._find({"where[filename][contains]": task_id})

    async def _find(self, where: dict[str, str]) -> list[Document]:
        query = {**where, "sort": "createdAt", "limit": str(FOUND), "select[filesize]": "true"}
        return (await self._ask("GET", self.cms.media, _Page, query=query)).docs

    async def create(self, fields: dict[str, Any], file: Path | None, name: str, content_type: str) -> Document:
        """Create a document, with `file` unless that is None, and return it. The CMS changes `name` if it is taken.

        The file is streamed, with its length in the headers: Payload treats a body without a length as empty.
        """
        if file is None:
            return (await self._ask("POST", self.cms.media, _Created, json=fields)).doc
        size_bytes = file.stat().st_size
        with file.open("rb") as opened:
            form = aiohttp.FormData(quote_fields=False)
            form.add_field("_payload", msgspec.json.encode(fields).decode())
            form.add_field("file", opened, filename=name, content_type=content_type)
            try:
                created = await self._ask("POST", self.cms.media, _Created, data=form, more_s=size_bytes / LEAST_BYTES_S)
            except (_TooLarge, _BrokeOff) as fault:
                text = f"{fault.message}; the file has {size_bytes} bytes: if that is more than the CMS allows, raise {LIMITS}"
                raise CmsFault(text, status=fault.status, retry_after=fault.retry_after) from None
        return created.doc

    async def remove(self, id: Id) -> None:
        """Delete the document, if it exists."""
        try:
            await self._ask("DELETE", f"{self.cms.media}/{_part(id)}", msgspec.Raw)
        except CmsFault as fault:
            if fault.status != 404:
                raise

    async def point(self, document: Target, id: Id, project_id: str) -> None:
        """Set the field of this document, which must belong to the project, to `id`, the id of a result's document."""
        *groups, last = document.field.split(".")
        fields: dict[str, Any] = {last: id}
        for group in reversed(groups):
            fields = {group: fields}
        path, name = f"{document.collection}/{_part(document.id)}", self.cms.path("project") or "project"
        try:
            at: Any = await self._ask("GET", path, dict[str, Any], query={f"select[{name}]": "true"})
            for group in name.split("."):
                at = at.get(group) if isinstance(at, dict) else None
            if at is None or str(at) != str(self.cms.project(project_id)):
                raise CmsFault(f"its {name} is not the project of the task", final=True)
            await self._ask("PATCH", path, msgspec.Raw, json=fields)
        except CmsFault as fault:
            text = f"{TARGET} names {document.collection}/{document.id}: {fault.message}"
            final = fault.final or fault.status in (400, 404)
            raise CmsFault(text, final=final, status=fault.status, retry_after=fault.retry_after) from None

    # ── For `movieq doctor` ──

    async def known(self) -> bool:
        """Whether the CMS accepts the API key."""
        return (await self._ask("GET", f"{self.cms.users}/me", _Me)).user is not None

    async def may(self) -> list[str]:
        """Return which of create, read and delete the key's user may do in the collection."""
        rights = await self._ask("POST", f"{self.cms.media}/access", dict[str, Any])
        return [verb for verb in ("create", "read", "delete") if rights.get(verb)]

    async def missing(self) -> list[str]:
        """Return the fields of our documents that the collection does not have."""
        query = {f"where[or][{number}][{path}][exists]": "true" for number, path in enumerate(self.cms.paths())}
        try:
            await self._ask("GET", self.cms.media, _Page, query={**query, "limit": "1", "select[filesize]": "true"})
        except _Unqueried as fault:
            return [path for path in self.cms.paths() if any(path == each or path.startswith(f"{each}.") for each in fault.paths)]
        return []

    async def limit_bytes(self, size_bytes: int) -> int | None:
        """Return the largest file size that the CMS accepts, if that is less than `size_bytes`, else None.

        A file of that size is sent, to a route that does not store it.
        """
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
        """Send a request and return its decoded answer. `more_s` extends the time limit; `body` is the argument of aiohttp for a body."""
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
                answer_body = await _read(answer)
                if answer.connection is not None and answer.connection.transport is not None:  # the CMS refused before it had read all
                    answer.connection.transport.abort()
        except TimeoutError:
            raise CmsFault(f"the CMS did not answer within {limit_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _fault(error) from None
        if not 200 <= answer.status < 300:
            raise _refusal(answer, answer_body)
        try:
            return msgspec.json.decode(answer_body, type=answer_type)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise CmsFault(
                f"the server at {self.cms.url} is not a PayloadCMS: set MOVIEQ_PAYLOAD_URL to its API url, without /media",
                status=answer.status,
            ) from None


class _Page(msgspec.Struct, frozen=True):
    docs: list[Document]


class _Created(msgspec.Struct, frozen=True):
    doc: Document


class _Me(msgspec.Struct, frozen=True):
    user: dict[str, Any] | None


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    data: Any = None


class _Errors(msgspec.Struct, frozen=True):
    errors: list[_Error] = []


class _BrokeOff(CmsFault):
    """The connection ended before an answer came. The CMS may refuse a file that is too large in this way."""


class _TooLarge(CmsFault):
    """The CMS answered 413. `limit_bytes`: the largest file size, if the CMS names it."""

    def __init__(self, limit_bytes: int | None, retry_after: str) -> None:
        text = f", at most {limit_bytes} bytes" if limit_bytes else ""
        super().__init__(f"the file is too large for the CMS{text}", status=413, retry_after=retry_after)
        self.limit_bytes = limit_bytes


class _Unqueried(CmsFault):
    """A query named fields that the collection does not have."""

    def __init__(self, message: str, paths: list[str]) -> None:
        super().__init__(message, final=True, status=400)
        self.paths = paths


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """Return the body, cut off after `MAX_ANSWER_BYTES`."""
    body = bytearray()
    while len(body) < MAX_ANSWER_BYTES and (chunk := await answer.content.read(MAX_ANSWER_BYTES - len(body))):
        body += chunk
    return bytes(body)


def _refusal(answer: aiohttp.ClientResponse, body: bytes) -> CmsFault:
    """Return the fault for a refusal. Status and paths tell refusals apart: production builds of Payload shorten the names of errors."""
    try:
        errors = msgspec.json.decode(body, type=_Errors).errors
    except (msgspec.DecodeError, UnicodeDecodeError):
        errors = []
    first = errors[0] if errors else _Error()
    retry_after = answer.headers.get("Retry-After", "")
    match answer.status:
        case 400 if isinstance(first.data, list):
            paths = [str(each["path"]) for each in first.data if isinstance(each, dict) and "path" in each]
            return _Unqueried(f"the collection has no field {', '.join(paths)}: add it, or map it with MOVIEQ_PAYLOAD_FIELDS", paths)
        case 400 if fields := _fields(first.data):
            taken = [path for path, _ in fields] == ["filename"]  # by an upload at the same time
            text = "; ".join(f"{path}: {message}" for path, message in fields)
            return CmsFault(f"the CMS refused the document: {text}", final=not taken, status=400)
        case 401 | 403:
            text = "the CMS denied access: check MOVIEQ_PAYLOAD_API_KEY and the access rights of its user"
            return CmsFault(f"{text} ({first.message or answer.status})", status=answer.status)
        case 413:
            size = first.data.get("size") if isinstance(first.data, dict) else None
            return _TooLarge(size if isinstance(size, int) else None, retry_after)
        case status:
            text = f": {first.message}" if first.message else ""
            if 300 <= status < 400:
                text = ", but redirects are not followed: set MOVIEQ_PAYLOAD_URL to the final url"
            return CmsFault(f"the CMS answered {status}{text}", status=status, retry_after=retry_after)


def _fields(data: Any) -> list[tuple[str, str]]:
    """Return the paths and messages of a ValidationError of Payload."""
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
    """Parse `MOVIEQ_PAYLOAD_FIELDS`: `NAME=FIELD`, `NAME=` to leave a field out, `NAME:VALUE=VALUE`, with commas. Raises SettingsError."""
    fields: dict[str, str] = {}
    values: dict[tuple[str, str], Any] = {}
    known = {*NAMES, *(name.partition(".")[0] for name in NAMES)}
    for part in filter(None, (part.strip() for part in text.split(","))):
        left, equals, right = (piece.strip() for piece in part.partition("="))
        name, colon, value = left.partition(":")
        if not equals or name not in known or (not colon and right and not _PATH.fullmatch(right)):
            raise SettingsError(
                f"MOVIEQ_PAYLOAD_FIELDS: expected NAME=FIELD, NAME= or NAME:VALUE=VALUE, got {part!r}; the names are {', '.join(NAMES)}"
            )
        if colon:
            values[name, value] = _scalar(right)
        else:
            fields[name] = right
    return fields, values


def _writable(settings: Settings) -> frozenset[tuple[str, str]]:
    """Parse `MOVIEQ_PAYLOAD_WRITABLE`: `COLLECTION.FIELD`, with commas. Raises SettingsError."""
    pairs = set()
    for part in filter(None, (part.strip() for part in settings.payload_writable.split(","))):
        collection, _, field = part.partition(".")
        if not (_SLUG.fullmatch(collection) and _PATH.fullmatch(field)):
            raise SettingsError(f"MOVIEQ_PAYLOAD_WRITABLE: expected COLLECTION.FIELD, such as scenes.clip, got {part[:200]!r}")
        if collection == settings.payload_users:
            raise SettingsError(f"MOVIEQ_PAYLOAD_WRITABLE: {part[:200]} is in the collection of users, where no task may write")
        pairs.add((collection, field))
    return frozenset(pairs)


def _scalar(text: str) -> Any:
    """Return the value of a JSON number, true, false or a quoted text; any other text is returned unchanged."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return text if isinstance(value, list | dict) else value


def _id(text: str) -> Id:
    """Return a project's id in the type of the CMS: SQL databases number their documents, and Payload refuses a text for a number."""
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,14}", text) else text


def _description(task_type: str, task_data: Mapping[str, Any]) -> str:
    try:
        return params.convert(REGISTRY.tasks[TaskType(task_type)].params, dict(task_data)).description.strip()
    except (KeyError, msgspec.ValidationError):  # the task is of another version, or its parameters were deleted
        return ""


def _part(id: Id) -> str:
    """Return an id as one segment of a url's path."""
    return quote(str(id), safe="")
