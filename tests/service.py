"""The whole service as a user runs it, `movieq up` in a folder of its own, and the requests of a client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web

STOP_S = 60
UNLIMITED = {
    "MOVIEQ_REQUESTS_PER_S": "0",
    "MOVIEQ_MAX_RECORD_MIB_PER_PROJECT": "0",
    "MOVIEQ_MAX_STREAMS": "0",
    "MOVIEQ_MAX_STREAMS_PER_KEY": "0",
    "MOVIEQ_MAX_STREAMS_PER_URL": "0",
}
"""Settings of tests and benches whose clients ask more than a user's do."""


class Service:
    """A running `movieq up`."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], url: str, key: str) -> None:
        self.folder = folder
        self.process = process
        self.url = url
        self.key = key

    @property
    def log(self) -> list[dict[str, Any]]:
        """All lines that it has logged so far."""
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines() if line.startswith("{")]

    def find(self, *words: str) -> list[psutil.Process]:
        """Return its child processes, at any depth, that have these words as name or in their command line."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if all(word in (process.name(), *process.cmdline()) for word in words):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Send a request; return the status and the JSON of the answer.

        A request that may be repeated is, for a minute, while the answer is that Redis is unavailable: on a busy machine it is slow.
        """
        end_s = time.monotonic() + 60 if method == "GET" or "Idempotency-Key" in options.get("headers", {}) else 0.0
        while True:
            async with (
                aiohttp.ClientSession(headers={"X-API-Key": self.key}) as session,
                session.request(method, f"{self.url}/api/v1{path}", timeout=aiohttp.ClientTimeout(total=70), **options) as answer,
            ):
                content = await answer.json()
            if answer.status != 503 or content.get("error") != "unavailable" or time.monotonic() >= end_s:
                return answer.status, content
            await asyncio.sleep(0.5)

    async def submit(self, task_type: str, task_data: dict[str, Any], project: str = "film", **fields: Any) -> str:
        """Submit a task; return its id."""
        body = {"project_id": project, "task_type": task_type, "task_data": task_data, **fields}
        status, answer = await self.call("POST", "/tasks/submit", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
        assert status == 201, answer
        return str(answer["task_id"])

    async def ended(self, task_id: str, within_s: float = 120) -> dict[str, Any]:
        """Wait until the task ends; return its status."""
        end = time.monotonic() + within_s
        while True:
            _, answer = await self.call("GET", f"/tasks/{task_id}/status?wait={max(1, min(30, int(end - time.monotonic())))}")
            if answer["status"] in ("completed", "failed", "cancelled"):
                return dict(answer)
            assert time.monotonic() < end, answer

    async def upload(self, body: bytes, project: str = "film") -> str:
        """Upload a file; return its reference."""
        status, answer = await self.call("POST", f"/projects/{project}/uploads", data=body)
        assert status == 201, answer
        return str(answer["url"])

    @asynccontextmanager
    async def events(self, task_id: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Yield the data of a task's events, as they come."""
        async with (
            aiohttp.ClientSession(headers={"X-API-Key": self.key}) as session,
            session.get(f"{self.url}/api/v1/tasks/{task_id}/events", timeout=aiohttp.ClientTimeout(total=None, sock_read=60)) as answer,
        ):
            assert answer.status == 200, await answer.text()
            yield self._parsed(answer)

    async def _parsed(self, answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        name = ""
        async for raw in answer.content:
            field, _, value = raw.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield {**json.loads(value), "event": name}

    async def told(self, task_type: str, task_data: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        """Submit a task; return its id and the data of all its events. Its stream is open before the worker can claim it."""
        (worker,) = self.find("worker")
        worker.suspend()
        try:
            task_id = await self.submit(task_type, task_data)
            async with self.events(task_id) as events:
                first = await anext(events)
                worker.resume()
                return task_id, [first, *[event async for event in events]]
        finally:
            worker.resume()

    async def until(self, task_id: str, condition: str, value: Any, within_s: float = 60) -> dict[str, Any]:
        """Return the first event of the task in which this field has this value."""
        async with asyncio.timeout(within_s), self.events(task_id) as events:
            async for event in events:
                if event.get(condition) == value:
                    return event
        raise AssertionError(f"the stream ended before {condition} was {value}")


async def fetched(url: str) -> tuple[int, Any, bytes]:
    """Fetch a URL without a key; return status, headers and body."""
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, answer.headers, await answer.read()


@contextmanager
def service(folder: Path, data: Path | None = None, options: Sequence[str] = (), key: str = "", **settings: str) -> Iterator[Service]:
    """Yield a `movieq up` for the block; afterwards none of its processes is left. `key`: one of its settings; '' for its own."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")},
        "MOVIEQ_LOG_FORMAT": "json",
        **UNLIMITED,
        **settings,
    }
    # -P: as the command `movieq` does, it imports nothing from the folder that it runs in
    command = [sys.executable, "-P", "-m", "movieq.cli", "up", "--port", "0", "--data", str(data or folder / "data"), *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        url = ""
        while not url:
            line = process.stdout.readline()
            assert line, (folder / "log").read_text()
            url = line.removeprefix("movieq ready at ").strip() if line.startswith("movieq ready at ") else ""
        yield Service(folder, process, url, key or ((data or folder / "data") / "api-key").read_text())
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)
        if process.stdout is not None:
            process.stdout.close()
    left = [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert not left, left


class Receiver:
    """A receiver of webhooks. It records the requests, and answers with these statuses in turn; the last one repeats."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers) or [200]
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.url = ""
        self._came = asyncio.Event()

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append((dict(request.headers), await request.read()))
        self._came.set()
        return web.Response(status=self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])

    async def wait_for(self, count: int, within_s: float = 60) -> list[tuple[dict[str, str], bytes]]:
        """Wait for this many requests, and return all."""
        async with asyncio.timeout(within_s):
            while len(self.requests) < count:
                self._came.clear()
                await self._came.wait()
        return self.requests


@asynccontextmanager
async def receiver(*answers: int) -> AsyncIterator[Receiver]:
    """Yield a receiver on a free port of this machine."""
    receiver = Receiver(*answers)
    async with serving({"/hook": receiver.handle}, "POST") as url:
        receiver.url = f"{url}/hook"
        yield receiver


@asynccontextmanager
async def serving(routes: dict[str, Any], method: str = "GET", port: int = 0) -> AsyncIterator[str]:
    """Run a web server with these handlers, on a free port or this one; yield its URL."""
    application = web.Application()
    for path, handler in routes.items():
        application.router.add_route(method, path, handler)
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
