"""A client that checks every answer against the contract: its error body, its schema in /openapi.json, its times."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp
from jsonschema import Draft202012Validator
from multidict import CIMultiDictProxy

from movieq.api import openapi
from movieq.api.state import Api
from movieq.errors import RequestError

ALL: Final = "all-projects-all-scopes"
FILM: Final = "one-project-read-and-submit"
READ: Final = "one-project-read-only"
SUBMIT: Final = "one-project-submit-only"
ADMIN: Final = "one-project-admin-only"
KEYS: Final = (ALL, FILM, READ, SUBMIT, ADMIN)

UNKNOWN: Final = "00000000-0000-4000-8000-000000000000"
BODY: Final[dict[str, Any]] = {"project_id": "film", "task_type": "generate_image", "task_data": {"prompt": "a lighthouse"}}
TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
TIMES: Final = {"timestamp", "time", "created_at", "started_at", "completed_at", "cancelled_at", "last_heartbeat"}
STATUS_OF: Final = {error.code: error.status for error in RequestError.__subclasses__()}
DEADLINE_S: Final = 60.0
"""How long a test waits for an event that must come, in seconds."""


class Answer(NamedTuple):
    """An answer, read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The error code."""
        return str(self.json["error"])

    @property
    def message(self) -> str:
        return str(self.json["message"])


class Event(NamedTuple):
    """An event of a stream."""

    id: str | None
    type: str
    data: Any


class Stream:
    """An open stream: its first answer, and its events one by one, each checked against the OpenAPI document if `documented`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.documented = True
        self.retries: list[int] = []

    async def next(self, seconds: float = DEADLINE_S) -> Event | None:
        """Return the next event; None at the end of the stream. Raises TimeoutError."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(seconds):
            while line := (await self.response.content.readline()).decode():
                name, _, value = line.rstrip("\n").partition(": ")
                if line == "\n" and "event" in fields:
                    event = Event(fields.get("id"), fields["event"], json.loads(fields["data"]))
                    if self.documented:
                        _fits("ProjectEvent" if "/projects/" in self.response.url.path else "TaskEvent", event)
                    return event
                if name == "retry":
                    self.retries.append(int(value))
                elif line != "\n" and not line.startswith(":"):
                    fields[name] = value
        return None

    async def until(self, *types: str) -> list[Event]:
        """Return the events up to the first of one of these types."""
        found: list[Event] = []
        while (event := await self.next()) is not None:
            found.append(event)
            if event.type in types:
                return found
        raise AssertionError(f"the stream ended without {types}: {found}")

    async def rest(self) -> list[Event]:
        """Return the events up to the end of the stream."""
        found: list[Event] = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found


class Client:
    """A client of the API. `state` is the state of the API process, `signatures` are those that it has issued."""

    def __init__(self, url: str, state: Api) -> None:
        self.url = url
        self.state = state
        self.signatures: set[str] = set()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=60))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self._session.close()

    async def ask(
        self, method: str, path: str, *, key: str | None = ALL, headers: Mapping[str, str] | None = None, data: Any = None
    ) -> Answer:
        """Send a request and return the answer, checked against the contract. `path` may be an absolute URL."""
        sent = {**({} if key is None else {"X-API-Key": key}), **(headers or {})}
        async with self._session.request(method, self._at(path), headers=sent, data=data, allow_redirects=False) as response:
            answer = Answer(response.status, response.headers, await response.read())
        self.signatures |= {found.decode() for found in re.findall(rb"signature=([\w-]+)", answer.body)}
        kept(method, urlsplit(self._at(path)).path, answer)
        return answer

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask("GET", path, **options)

    async def post(self, path: str, **options: Any) -> Answer:
        return await self.ask("POST", path, **options)

    async def delete(self, path: str, **options: Any) -> Answer:
        return await self.ask("DELETE", path, **options)

    async def submit(self, key: str | None = ALL, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        """Submit a task with the fewest fields, except for these top-level fields."""
        return await self.submit_bytes(json.dumps({**BODY, **fields}).encode(), key=key, headers=headers)

    async def submit_bytes(self, body: Any, key: str | None = ALL, headers: Mapping[str, str] | None = None) -> Answer:
        """Post these bytes, or chunks, as a task."""
        return await self.post("/api/v1/tasks/submit", key=key, headers={"Content-Type": "application/json", **(headers or {})}, data=body)

    async def status(self, task_id: str) -> Any:
        """Return the JSON of a task's status."""
        answer = await self.get(f"/api/v1/tasks/{task_id}/status")
        assert answer.status == 200, answer
        return answer.json

    @asynccontextmanager
    async def events(self, task_id: str, query: str = "", *, key: str | None = ALL, **headers: str) -> AsyncIterator[Stream]:
        """Open the stream of a task, of `projects/PROJECT`, or of an absolute `events_url`; `last_event_id` and `origin` are headers."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()} | ({} if key is None else {"X-API-Key": key})
        what = task_id if "/" in task_id else f"tasks/{task_id}"
        url = task_id if task_id.startswith("http") else f"{self.url}/api/v1/{what}/events{query}"
        async with self._session.get(url, headers=sent) as response:
            assert response.status == 200, (response.status, await response.read())
            yield Stream(response)

    async def raw(self, *parts: bytes) -> bytes:
        """Send these bytes as they are; return all that comes back until the connection ends."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for part in parts:
                writer.write(part)
            async with asyncio.timeout(DEADLINE_S):
                return await reader.read()
        finally:
            writer.close()

    def _at(self, path: str) -> str:
        return path if path.startswith("http") else self.url + path


def kept(method: str, path: str, answer: Answer) -> None:
    """Raise AssertionError if an answer breaks what the contract promises of every answer."""
    if method == "HEAD" or answer.status in (204, 206):
        return
    if answer.status >= 400 and not (path.endswith(("/health", "/health/ready")) and answer.status == 503):
        assert answer.headers["Content-Type"] == "application/json", answer
        assert STATUS_OF[answer.error] == answer.status, answer
        assert len(answer.body) < 2000 + 700 * len(answer.json.get("errors", "1")), "an error repeats at most a little of what was sent"
        schema("ErrorAnswer").validate(answer.json)
    elif operation := _operation(method, path):
        assert answer.headers["Content-Type"] == "application/json", answer
        ref = operation["responses"][str(answer.status)]["content"]["application/json"]["schema"]["$ref"]
        schema(ref.rpartition("/")[2]).validate(answer.json)
    if answer.headers.get("Content-Type") == "application/json" and path != "/openapi.json":
        _times(answer.json)


def _fits(stream: str, event: Event) -> None:
    """Raise AssertionError if the data of an event is not what the document says of this stream."""
    kinds = _document()["components"]["schemas"][stream]["oneOf"]
    (data,) = [kind["properties"]["data"] for kind in kinds if event.type in kind["properties"]["event"]["enum"]]
    schema(data["contentSchema"]["$ref"].rpartition("/")[2]).validate(event.data)


def _times(value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in TIMES and inner is not None and isinstance(inner, str):
                assert TIME.fullmatch(inner), f"{name}: {inner}"
            _times(inner)
    elif isinstance(value, list):
        for inner in value:
            _times(inner)


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(openapi.document("http://127.0.0.1")))
    return document


def _operation(method: str, path: str) -> dict[str, Any] | None:
    for template, item in _document()["paths"].items():
        if method.lower() in item and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            found: dict[str, Any] = item[method.lower()]
            return found
    return None


@cache
def schema(name: str) -> Draft202012Validator:
    """Return a validator for a Struct, from its schema in /openapi.json."""
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": _document()["components"]})
