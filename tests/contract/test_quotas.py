"""What a project may store: bytes of task records and of uploads. Parameters that nothing can need any more are deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from movieq.api import limits
from movieq.errors import QuotaExceeded
from movieq.queue.files import Files
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.tasks.entities import Upload
from movieq.tasks.states import ProjectId
from tests.arrange import claim, later, new_task, now_ms, raw, result, running
from tests.contract.client import FILM, Client
from tests.contract.conftest import served

MIB = 1024 * 1024
BIG = {"prompt": "a lighthouse", "note": "x" * 500_000}
PNG = (Path(__file__).parents[2] / "movieq" / "local" / "demo" / "frame1.jpg").read_bytes()


@pytest.fixture
async def small(settings: Settings, store: Store) -> AsyncIterator[Client]:
    """Yield a client of an API whose projects may store 1 MiB of task records and of uploads."""
    async with served(msgspec.structs.replace(settings, max_record_mib_per_project=1, max_upload_mib_per_project=1)) as client:
        yield client


async def bytes_of(api: Client, project: str = "film") -> tuple[int, int]:
    """Return the bytes that a project's task records and uploads take."""
    answer = (await api.get(f"/api/v1/projects/{project}")).json
    assert (answer["record_bytes_limit"], answer["upload_bytes_limit"]) == (MIB, MIB)
    return answer["record_bytes"], answer["upload_bytes"]


async def test_a_project_may_store_only_so_many_bytes_of_task_records(small: Client) -> None:
    for _ in range(2):
        assert (await small.submit(task_data=BIG)).status == 201
    before = limits.HITS.counts["quota_exceeded"]
    refused = await small.submit(task_data=BIG)
    assert (refused.status, refused.error, refused.json["retryable"]) == (429, "quota_exceeded", True)
    assert int(refused.headers["Retry-After"]) > 0
    assert "MOVIEQ_MAX_RECORD_MIB_PER_PROJECT" in refused.message
    assert limits.HITS.counts["quota_exceeded"] == before + 1
    taken, _ = await bytes_of(small)
    assert 1_000_000 < taken <= MIB
    assert (await small.submit(task_data=BIG, project_id="other")).status == 201, "another project is not affected"
    assert (await small.submit()).status == 201, "what fits is accepted"


async def test_submit_and_cancel_in_turn_fill_nothing(small: Client) -> None:
    for _ in range(30):
        task_id = (await small.submit(task_data=BIG)).json["task_id"]
        assert (await small.delete(f"/api/v1/tasks/{task_id}/cancel")).status == 200
    taken, _ = await bytes_of(small)
    assert taken < 200_000


async def test_the_parameters_of_a_completed_or_cancelled_task_are_deleted_but_those_of_a_failed_one_are_kept(store: Store) -> None:
    completed, run = await running(store)
    await store.complete(completed, run, result())
    cancelled, _ = await running(store)
    await store.cancel(cancelled)
    failed, run = await running(store)
    await store.fail(failed, run, "it broke", "internal")
    for_cms, run = await running(store)
    await store.complete(for_cms, run, result(), cms="https://cms.example/api/media")
    for task_id, kept in ((completed, 0), (cancelled, 0), (failed, 1), (for_cms, 1)):
        assert await raw(store).exists(KEYS["job"] + task_id) == kept
    assert (await store.retry(failed)).task_id == failed
    (claimed,) = await claim(store)
    assert b"a lighthouse" in claimed.job


async def test_a_reused_result_counts_too(small: Client, store: Store) -> None:
    reused = new_task(max_bytes=10_000, metadata=b"{}")
    await store.submit(reused)
    (claimed,) = await claim(store)
    await store.complete(reused.task_id, claimed.run, result())
    await raw(store).zadd(KEYS["media"], {"projects/film/image/t/r": 2**41})
    stored = b'{"media":[],"metadata":{"note":"' + b"x" * 9_000 + b'"}}'
    again = new_task(
        max_bytes=10_000,
        fingerprint="f",
        reused=reused.task_id,
        reused_result=stored,
        reused_prefix="projects/film/image/t/r",
    )
    with pytest.raises(QuotaExceeded):
        await store.submit(again)


async def test_no_bytes_are_left_of_tasks_that_were_swept(small: Client, store: Store) -> None:
    for _ in range(3):
        task_id, run = await running(store, metadata=b'{"note":"x"}', callback_url="http://127.0.0.1:1/")
        await store.complete(task_id, run, result())
    task_id = (await small.submit()).json["task_id"]
    project = await Queries(store.redis).project(ProjectId("film"))
    assert project is not None
    await store.sweep(0)
    (left,) = [int(each) for each in await raw(store).hvals(KEYS["record_bytes"])]
    assert left == int(await raw(store).hget(KEYS["task"] + task_id, "bytes")) < project.record_bytes
    await store.cancel(task_id)
    await later(store)
    await store.sweep(0)
    assert not await raw(store).exists(KEYS["record_bytes"])


async def test_a_task_without_counted_bytes_takes_none_off_the_sum_of_its_project(store: Store) -> None:
    await store.submit(new_task())
    before = await raw(store).hget(KEYS["record_bytes"], "film")
    await store.submit(new_task())
    completed, cancelled = await claim(store, slots=2)
    for each in (completed, cancelled):  # an older version submitted them
        await raw(store).hdel(KEYS["task"] + each.task.task_id, "bytes")
    await raw(store).hset(KEYS["record_bytes"], "film", before)
    await store.cancel(cancelled.task.task_id)
    assert await raw(store).hget(KEYS["record_bytes"], "film") == before
    await store.complete(completed.task.task_id, completed.run, result())
    assert int(await raw(store).hget(KEYS["record_bytes"], "film")) >= int(before)


async def test_each_delivery_counts_what_it_takes(store: Store) -> None:
    metadata = b'{"note":"' + b"x" * 16_000 + b'"}'
    task_id, run = await running(store, metadata=metadata, callback_url="http://127.0.0.1:1/")
    taken = [int(await raw(store).hget(KEYS["record_bytes"], "film"))]
    for number in range(1, 4):
        await store.fail(task_id, run, "it broke", "internal")
        taken.append(int(await raw(store).hget(KEYS["record_bytes"], "film")))
        delivery_id = f"{task_id}-{number}"
        used = [await raw(store).memory_usage(KEYS[key] + delivery_id, samples=0) for key in ("delivery", "job")]
        assert sum(used) <= taken[-1] - taken[-2] <= len(metadata) + 2048
        await store.retry(task_id)
        (claimed,) = await claim(store)
        run = claimed.run
    await store.cancel(task_id)
    await later(store)
    await store.sweep(0)
    assert not await raw(store).exists(KEYS["record_bytes"])


async def test_a_wrong_sum_of_bytes_is_found_and_repaired(store: Store) -> None:
    await store.submit(new_task())
    right = await raw(store).hget(KEYS["record_bytes"], "film")
    await raw(store).hset(KEYS["record_bytes"], "film", 7)
    assert any("bytes of the task records of project film" in each for each in await store.recount(apply=True))
    assert await raw(store).hget(KEYS["record_bytes"], "film") == right
    assert await store.recount(apply=False) == []


async def test_a_project_may_store_only_so_many_bytes_of_uploads(small: Client) -> None:
    await small.submit(key=FILM)
    count = 0
    while (answer := await small.post("/api/v1/projects/film/uploads", data=PNG, key=FILM)).status == 201:
        count += 1
    assert (answer.status, answer.error) == (429, "quota_exceeded")
    assert "MOVIEQ_MAX_UPLOAD_MIB_PER_PROJECT" in answer.message
    assert 6 * 24 * 3600 < int(answer.headers["Retry-After"]) <= 7 * 24 * 3600
    _, taken = await bytes_of(small)
    assert taken == count * max(len(PNG), 16384) <= MIB
    assert (await small.post("/api/v1/projects/other/uploads", data=PNG)).status == 201


async def no_upload_is_left(api: Client, store: Store) -> None:
    """Raise AssertionError unless no upload counts, and the files of the only one are deleted in a minute."""
    assert await raw(store).keys(KEYS["upload"] + "*") == await raw(store).keys(KEYS["uploads"] + "*") == []
    assert (await bytes_of(api))[1] == 0
    ((prefix, at_ms),) = await raw(store).zrange(KEYS["orphans"], 0, -1, withscores=True)
    assert prefix.startswith(b"uploads/film/")
    assert 0 < at_ms <= await now_ms(store) + 60_000
    assert not api.state.places.taken


async def test_an_upload_that_could_not_be_stored_does_not_count(small: Client, settings: Settings, store: Store) -> None:
    await small.submit()
    assert isinstance(settings.storage, Path)
    settings.storage.mkdir(exist_ok=True)
    in_the_way = settings.storage / "uploads"
    in_the_way.write_text("not a folder")
    assert (await small.post("/api/v1/projects/film/uploads", data=PNG)).status == 503
    await no_upload_is_left(small, store)
    in_the_way.unlink()
    assert (await small.post("/api/v1/projects/film/uploads", data=PNG)).status == 201


async def test_an_upload_that_is_cancelled_while_it_is_stored_does_not_count(
    small: Client, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await small.submit()
    handlers: asyncio.Queue[Any] = asyncio.Queue()

    async def put(*args: Any) -> int:
        handlers.put_nowait(asyncio.current_task())
        return await asyncio.Future()

    monkeypatch.setattr(small.state.storage, "put", put)
    sent = asyncio.create_task(small.post("/api/v1/projects/film/uploads", data=PNG))
    handler = await handlers.get()
    assert [name.partition(" ")[0] for name in small.state.places.taken] == ["bodies_of_key"]
    handler.cancel()
    await asyncio.wait({handler, sent})
    await no_upload_is_left(small, store)


async def test_an_upload_over_the_quota_is_refused_before_it_is_sent(small: Client) -> None:
    head = f"POST /api/v1/projects/film/uploads HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-API-Key: {FILM}\r\n"
    assert (await small.raw(f"{head}Content-Length: {MIB + 1}\r\n\r\n".encode())).startswith(b"HTTP/1.1 429")


async def test_an_expired_upload_no_longer_counts(store: Store) -> None:
    files, redis = Files(store.redis), raw(store)
    upload = Upload(ProjectId("film"), "uploads/film/a/file", 600_000, "image/png")
    await files.add_upload("a", upload, "uploads/film/a", MIB)
    await files.add_upload("a", upload, "uploads/film/a", MIB)  # the answer was lost
    with pytest.raises(QuotaExceeded):
        await files.add_upload("b", upload, "uploads/film/b", MIB)
    ((member, _),) = await redis.zrange(KEYS["uploads"] + "film", 0, -1, withscores=True)
    await redis.zadd(KEYS["uploads"] + "film", {member: 1})
    await files.add_upload("b", upload, "uploads/film/b", MIB)
    assert await redis.get(KEYS["upload_bytes"] + "film") == b"600000"
    assert await files.upload("b") == upload
    assert await redis.pttl(KEYS["uploads"] + "film") > 0
    assert await redis.pttl(KEYS["upload_bytes"] + "film") > 0
