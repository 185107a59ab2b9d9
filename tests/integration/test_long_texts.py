"""Text of a request that is repeated in errors and events: it is cut before it is stored, and logs are read in small parts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from movieq.errors import CmsFault, InputUnavailable, InvalidState, ValidationFailed, cut
from movieq.fetch.download import Fetcher
from movieq.fetch.guard import Guard
from movieq.queue.keys import KEYS
from movieq.queue.outbox import Outbox
from movieq.queue.queries import LOG_BYTES, Queries
from movieq.queue.store import RETRIES_LIMIT, Budget, Store
from movieq.storage.folder import FolderStorage
from movieq.tasks.params import VideoParams
from movieq.tasks.states import ProjectId, TaskId
from tests.arrange import claim, new_task, parts, raw, running
from workers.inputs import fetch_inputs


async def stored_bytes(store: Store) -> int:
    """Return the size of everything in Redis, serialised."""
    return sum([len(await raw(store).dump(key)) for key in await raw(store).keys("*")])


@pytest.mark.parametrize("text", ["upload:" + "x" * 990_000, "task:" + "x" * 990_000, "https://" + "x" * 990_000])
async def test_a_reference_of_a_megabyte_is_named_in_a_short_error(store: Store, folder: Path, text: str) -> None:
    storage = FolderStorage(folder / "media", "http://127.0.0.1", (b"secret",))
    async with Fetcher(Guard(())) as fetcher:
        some = parts(store, storage, fetcher, folder)
        with pytest.raises(InputUnavailable) as raised:
            await fetch_inputs(some, ProjectId("film"), TaskId("t"), VideoParams(prompt="a lamp", storyboard_images=[text]), folder)
    assert len(raised.value.message) <= 500
    assert text[:20] in raised.value.message


async def test_whatever_a_worker_reports_is_cut_before_it_is_stored(store: Store) -> None:
    long = "ä€" * 100_000  # two and three bytes
    task_id, run = await running(store, callback_url="http://127.0.0.1:1/")
    await store.requeue(task_id, run, Budget.TRIES, 3, 0, long, "network")
    (claimed,) = await claim(store)
    await store.fail(task_id, claimed.run, long, "network")
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.error is not None
    assert long.startswith(task.error)
    assert 1990 <= len(task.error.encode()) <= 2000
    ((_, delivery, _),) = await Outbox(store.redis).deliveries(task_id)
    assert delivery.error == task.error
    assert await stored_bytes(store) < 32 * 1024


async def test_a_task_can_be_retried_twenty_times(store: Store) -> None:
    task_id, run = await running(store)
    for number in range(RETRIES_LIMIT + 1):
        if number:
            await store.retry(task_id)
            run = (await claim(store))[0].run
        await store.fail(task_id, run, "it broke", "internal")
    with pytest.raises(InvalidState, match=r"was retried 20 times.*submit it as a new task"):
        await store.retry(task_id)


async def test_a_log_is_read_in_parts_of_limited_size(store: Store) -> None:
    task_id = new_task().task_id
    data = msgspec.json.encode({"text": "x" * 20_000})
    for _ in range(300):
        await raw(store).xadd(KEYS["log"] + task_id, {"type": "progress", "data": data})
    queries, after, sizes, count = Queries(store.redis), None, [], 0
    while entries := await queries.log_after(task_id, after):
        sizes.append(sum(len(entry.data) for entry in entries))
        count, after = count + len(entries), entries[-1].id
    assert count == 300
    assert max(sizes) < LOG_BYTES + 200 * len(data) * 1.1


def test_a_cut_text_says_how_long_it_was() -> None:
    assert cut("x" * 500) == "x" * 500
    assert cut("x" * 501) == "x" * 480 + "... (501 characters)"
    for error in (InputUnavailable("x" * 9999), CmsFault("x" * 9999), ValidationFailed("x" * 9999, errors=(("p" * 9999, "x" * 9999),))):
        assert len(error.message) == 500
        assert all(len(path) <= 200 and len(text) <= 500 for path, text in getattr(error, "errors", ()))
