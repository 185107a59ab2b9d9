"""The real API on a real socket, in the test's own loop, on the session's Valkey, with keys of every kind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import structlog
import uvicorn
from arq.connections import ArqRedis

from movieq.api import app
from movieq.api import server as serving
from movieq.local.embedded import Valkey, valkey
from movieq.queue import connection
from movieq.queue.connection import connect
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.tasks.states import RunToken, TaskId, TaskStatus
from tests.arrange import claim, result, settings_of
from tests.contract.client import ADMIN, ALL, DEADLINE_S, FILM, KEYS, READ, SUBMIT, Client


@asynccontextmanager
async def served(settings: Settings, send_buffer: int | None = None, port: int = 0) -> AsyncIterator[Client]:
    """Yield a client of an API with these settings. At the end the API shuts down in order, and every stream is notified.

    `send_buffer` is the number of bytes that the kernel accepts from the API for a client that does not read.
    """
    listening = serving.listen("127.0.0.1", port)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    url = serving.address(listening)
    application = app.create(settings, settings.public_url or url)
    config = serving._Server(application, url).config
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listening])
    try:
        async with Client(url, application.state.api) as client:
            yield client
    finally:  # as uvicorn's own shutdown, without its naps of a tenth of a second
        application.state.api.hub.close()
        for each in server.servers:
            each.close()
        for connection in list(server.server_state.connections):
            connection.shutdown()
        async with asyncio.timeout(DEADLINE_S):
            while server.server_state.connections or server.server_state.tasks:
                await asyncio.sleep(0.001)
            await server.lifespan.shutdown()


@pytest.fixture
def settings(server: Valkey, folder: Path) -> Settings:
    """Return the settings of an installation with a key of each kind."""
    return settings_of(
        redis_url=server.url,
        storage=str(folder / "media"),
        allow_private_urls="10.9.0.0/16",
        api_keys=f"{ALL},{FILM}=film,{READ}=film/read,{SUBMIT}=film/submit,{ADMIN}=film/admin",
    )


@pytest.fixture
def quiet_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `tidy` only once, so that every other call to Redis comes from a request or a stream."""
    monkeypatch.setattr(app, "TIDY_S", 3600)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """Return the list of everything that is logged, down to debug."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("uvicorn.access"), "disabled", True)  # pytest opens the ears that uvicorn has shut
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    yield caplog
    structlog.reset_defaults()


@pytest.fixture
async def api(
    settings: Settings, redis: ArqRedis, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Client]:
    """Yield a client of the API on an empty Valkey. At the end no error, key or signature may be in the log."""
    monkeypatch.setattr(connection, "IMPATIENT_S", DEADLINE_S)  # a busy machine is no Redis that is away
    async with served(settings) as client:
        yield client
    assert [record.getMessage() for record in logged.records if record.levelno >= logging.ERROR] == []
    assert [secret for secret in (*KEYS, *client.signatures) if secret in logged.text] == []


@contextmanager
def stopped(server: Valkey) -> Iterator[None]:
    """Stop the server for the block, so that it accepts connections and answers nothing."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.fixture
def own(folder: Path) -> Iterator[Valkey]:
    """Yield a Valkey that a test may kill."""
    with valkey(folder / "own") as running:
        yield running


@pytest.fixture
async def away(own: Valkey, settings: Settings) -> AsyncIterator[Client]:
    """Yield a client of the API on that Valkey."""
    async with served(msgspec.structs.replace(settings, redis_url=own.url)) as api:
        yield api


@pytest.fixture
async def direct(own: Valkey) -> AsyncIterator[Any]:
    """Yield a client of that Valkey."""
    client = connect(own.url, patient=True)
    yield client
    await client.aclose()
    await client.connection_pool.disconnect()


REFUSALS: Final = {
    "out of memory": "memory is full",
    "without its replica": "too few",
    "read-only": "read-only",
    "cannot save": "cannot save",
}
"""States in which Redis refuses writes -> words of the API's answer."""


async def refuse_writes(server: Valkey, direct: Any, state: str) -> None:
    """Bring the server into a state in which it refuses writes."""
    match state:
        case "out of memory":
            await direct.config_set("maxmemory", 1)
        case "without its replica":
            await direct.config_set("min-replicas-to-write", 1)
        case "read-only":
            await direct.replicaof("127.0.0.1", 1)
        case "cannot save":
            (server.folder / "dump.rdb" / "in the way").mkdir(parents=True)
            await direct.config_set("save", "3600 1")
            await direct.bgsave()
            async with asyncio.timeout(60):
                while (await direct.info("persistence"))["rdb_last_bgsave_status"] == "ok":
                    await asyncio.sleep(0.01)


async def take_writes(direct: Any) -> None:
    """Let the server accept writes again."""
    await direct.config_set("maxmemory", 0)
    await direct.config_set("min-replicas-to-write", 0)
    await direct.replicaof("NO", "ONE")
    await direct.config_set("save", "")


class Tasks:
    """Tasks that are submitted by the API and brought into a state by the verbs of a worker."""

    def __init__(self, api: Client, store: Store) -> None:
        self._api = api
        self.store = store

    async def queued(self, **fields: Any) -> TaskId:
        """Submit a task; return its id."""
        answer = await self._api.submit(**fields)
        assert answer.status == 201, answer
        return TaskId(answer.json["task_id"])

    async def processing(self, **fields: Any) -> tuple[TaskId, RunToken]:
        """Submit a task and claim it, as the only one that waits; return its id and its run."""
        task_id = await self.queued(**fields)
        return task_id, await self.claim()

    async def claim(self) -> RunToken:
        """Claim the only task that waits; return its run."""
        (claimed,) = await claim(self.store)
        return claimed.run

    async def completed(self, **fields: Any) -> TaskId:
        task_id, run = await self.processing(**fields)
        await self.store.complete(task_id, run, result())
        return task_id

    async def failed(self, **fields: Any) -> TaskId:
        task_id, run = await self.processing(**fields)
        await self.store.fail(task_id, run, "https://x.example/a.png could not be fetched: it answered 404", "input_unavailable")
        return task_id

    async def cancelled(self, **fields: Any) -> TaskId:
        task_id = await self.queued(**fields)
        await self.store.cancel(task_id)
        return task_id

    async def in_state(self, status: TaskStatus) -> TaskId:
        """Return a task in this state."""
        make: dict[TaskStatus, Callable[[], Awaitable[Any]]] = {
            TaskStatus.QUEUED: self.queued,
            TaskStatus.PROCESSING: self.processing,
            TaskStatus.COMPLETED: self.completed,
            TaskStatus.FAILED: self.failed,
            TaskStatus.CANCELLED: self.cancelled,
        }
        prepared = await make[status]()
        return TaskId(prepared[0] if isinstance(prepared, tuple) else prepared)


@pytest.fixture
def tasks(api: Client, store: Store) -> Tasks:
    """Return a factory of tasks in every state."""
    return Tasks(api, store)
