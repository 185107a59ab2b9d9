"""Every file of a result (clip, poster, picture, sound) is signed, as C2PA's own reader verifies, or it is not published."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from movieq import credentials
from movieq.fetch.download import Fetcher
from movieq.fetch.guard import Guard
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.storage.folder import FolderStorage
from movieq.tasks.states import Kind, TaskStatus
from tests.arrange import claim, new_task, parts
from tests.certificates import HOLDER, Chain, chain
from tests.service import Service, service
from tests.unit.test_credentials import Read
from workers.execute import run_task
from workers.provenance import Provenance
from workers.running import Running
from workers.supervisor import Child

CLIP = {"scene_description": "Marrakesh by night", "duration": 1, "fps": 12, "resolution": "128x72"}


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Return a chain of certificates."""
    return chain(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory, issued: Chain) -> Iterator[Service]:
    """Yield an installation that publishes only signed files, and writes no tags into files."""
    settings = issued.settings | {"MOVIEQ_C2PA_REQUIRED": "true", "MOVIEQ_FILE_TAGS": "false"}
    with service(tmp_path_factory.mktemp("up"), None, **settings) as up:
        yield up


async def body(url: str) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
        return await answer.read()


@pytest.mark.parametrize(
    ("task_type", "task_data"),
    [
        ("generate_video", CLIP),
        ("generate_image", {"prompt": "Marrakesh by night", "resolution": "64x64", "format": "webp"}),
        ("process_audio", {"prompt": "Marrakesh by night, rain", "duration": 0.5, "output_format": "flac"}),
    ],
)
async def test_everything_that_is_published_is_signed_as_an_animatic(
    signing: Service, issued: Chain, task_type: str, task_data: dict[str, Any]
) -> None:
    ended = await signing.ended(await signing.submit(task_type, task_data))
    assert ended["status"] == "completed", ended
    (media,) = ended["result"]["media"]
    assert ended["result"]["metadata"]["signed_by"] == HOLDER
    urls = {media["url"]: media["content_type"], **({media["poster_url"]: "image/jpeg"} if media["poster_url"] else {})}
    assert len(urls) == (2 if task_type == "generate_video" else 1)
    for url, content_type in urls.items():
        file = await body(url)
        read = Read(file, content_type, issued.root)
        assert (read.state, read.source.rpartition("/")[2]) == ("Trusted", "algorithmicMedia")
        assert read.assertion("movieq.generation") == {"task_id": ended["task_id"], "task_type": task_type}
        assert b"Marrakesh" not in file, "the prompt is in no tag and in no claim"
    assert len(await body(media["url"])) == media["file_size"]


async def test_where_signing_is_required_and_fails_the_task_fails_and_nothing_is_stored(store: Store, tmp_path: Path) -> None:
    expired = credentials.read(*chain(tmp_path / "expired", days=0.5)[:2])
    await store.submit(new_task())
    (claimed,) = await claim(store)
    child = Child("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=60)
    ready = asyncio.Event()
    async with Fetcher(Guard(())) as fetcher, asyncio.TaskGroup() as group:
        keeping = group.create_task(child.supervise(ready.set))
        await asyncio.wait_for(ready.wait(), 60)
        storage = FolderStorage(tmp_path / "media", "http://127.0.0.1", (b"secret",))
        (tmp_path / "spool").mkdir()
        prepared = parts(store, storage, fetcher, tmp_path / "spool", provenance=Provenance(credentials=expired, required=True))
        running = Running(claimed, child, child.slots.reserve([claimed.task.task_id]))
        await run_task({"parts": prepared, "running": running}, {"prompt": "a lamp", "resolution": "64x64"})
        keeping.cancel()
    task = await Queries(store.redis).task(claimed.task.task_id)
    assert task is not None
    assert (task.status, task.error_code, task.retryable) == (TaskStatus.FAILED, "unsigned", False)
    assert "cannot be signed" in (task.error or "")
    assert not [path for path in (tmp_path / "media").rglob("*") if path.is_file()]
