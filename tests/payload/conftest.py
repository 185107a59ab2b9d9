"""The CMS that tests share, and tasks whose results are to go into it."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from arq import Retry
from PIL import Image

from movieq.delivery.payload import ANSWER_S, Payload, configured
from movieq.fetch.guard import Guard
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.storage.folder import FolderStorage
from movieq.tasks.entities import Delivery, Task
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import StoredMedia, StoredResult
from movieq.tasks.states import GENERATE_VIDEO, TaskId, TaskType
from tests.arrange import running
from tests.payload.server import PayloadServer, payload_server
from workers.delivery import Outbox, deliver

METADATA: Final = {
    "engine": "diffusers",
    "model": "ltx-video",
    "revision": "abc123",
    "seed": 7,
    "duration": 7.0,
    "resolution": "1920x1080",
    "fps": "24000/1001",
    "sample_rate": 48000,
}
CONTENT_TYPES: Final = {"video": ("mp4", "video/mp4"), "image": ("png", "image/png"), "audio": ("wav", "audio/wav")}


@pytest.fixture(scope="session")
def cms() -> Iterator[PayloadServer]:
    """A CMS that takes files of every size, and that every test leaves running."""
    with payload_server() as started:
        yield started


class Desk:
    """Completes tasks and runs their deliveries by hand, on a real queue and a real folder."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.storage = FolderStorage(folder / "media", "http://127.0.0.1:1", (b"of the tests alone, long enough",))
        self.spool = folder

    async def completed(
        self, server: PayloadServer, body: bytes | None = None, task_type: TaskType = GENERATE_VIDEO, **fields: Any
    ) -> TaskId:
        """A task that has completed with this file; its first delivery is the one to the CMS."""
        task_data = fields.pop("task_data", {"scene_description": "The keeper lights the lamp"})
        spec = REGISTRY.tasks[task_type]
        kind, media_type = spec.folder, spec.media_type
        suffix, content_type = CONTENT_TYPES[kind]
        fields = {
            "project": str(server.project),
            "task_type": task_type,
            "kwargs": msgspec.msgpack.encode({"task_data": task_data}),
            **fields,
        }
        task_id, run = await running(self.store, **fields)
        key = f"projects/{fields['project']}/{kind}/{task_id}/{run}/output.{suffix}"
        source = self.spool / "made"
        source.write_bytes(clip() if body is None else body)
        size_bytes = await self.storage.put(key, source, content_type)
        result = StoredResult([StoredMedia(key, media_type, content_type, size_bytes)], METADATA)
        await self.store.complete(task_id, run, result, f"{server.url}/media")
        return task_id

    @asynccontextmanager
    async def outbox(self, server: PayloadServer, url: str = "", answer_s: float = ANSWER_S, **settings: Any) -> AsyncIterator[Outbox]:
        """An outbox of a worker that knows this CMS, at another address where one is given."""
        read = Settings(**{"payload_url": url or server.url, "payload_api_key": server.key, **settings})
        cms = configured(read)
        assert cms is not None
        async with Guard(origins=read.own_origins()).session() as session:
            yield Outbox(self.store, self.storage, session, (), read, self.spool, Payload(cms, session, answer_s=answer_s))

    async def task(self, task_id: TaskId) -> Task:
        """The task as it is."""
        task = await self.store.task(task_id)
        assert task is not None
        return task

    async def media_id(self, task_id: TaskId) -> str | int | None:
        """What the task's result says of the CMS."""
        result = (await self.task(task_id)).result
        assert result is not None
        return result.payload_media_id

    async def delivery(self, task_id: TaskId, number: int = 1) -> Delivery:
        """A delivery of the task as it is."""
        found = {id: delivery for id, delivery, _ in await self.store.deliveries(task_id)}
        return found[f"{task_id}-{number}"]


@pytest.fixture
def desk(store: Store, folder: Path) -> Desk:
    """A desk over an empty queue."""
    return Desk(store, folder)


async def tried(outbox: Outbox, task_id: TaskId, number: int = 1) -> float | None:
    """A delivery has been tried, as arq would: how long it is to wait for the next try, None where there is none."""
    delivery_id = f"{task_id}-{number}"
    try:
        await deliver({"outbox": outbox, "job_id": delivery_id, "job_try": 1}, delivery_id)
    except Retry as again:
        return (again.defer_score or 0) / 1000
    return None


def clip(size_bytes: int = 100_000) -> bytes:
    """What Payload takes for a whole mp4: boxes from the first byte to the last, here of nothing."""
    head = (24).to_bytes(4, "big") + b"ftypisom" + (512).to_bytes(4, "big") + b"isommp41"
    return head + (size_bytes - len(head)).to_bytes(4, "big") + b"mdat" + bytes(size_bytes - len(head) - 8)


def still() -> bytes:
    """A picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(buffer, "PNG")
    return buffer.getvalue()
