"""The CMS and the worker are killed, stopped and cut off from each other: every result gets there, and no result twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest

from movieq.queue.outbox import Outbox
from movieq.tasks.entities import DeliveryState
from movieq.tasks.states import TaskId
from tests.fleet import eventually
from tests.payload.conftest import Desk, tried
from tests.payload.relay import Relay, relay
from tests.payload.server import PayloadServer
from tests.service import fetched
from workers.delivery import DOUBT_S, DeliveryParts

Fault = Callable[[Relay, PayloadServer], None]


@pytest.fixture
async def cut(cms: PayloadServer) -> AsyncIterator[Relay]:
    """A relay to the CMS, which runs again in the end."""
    async with relay(cms.url) as installation:
        yield installation
    recovered(cms)


def recovered(cms: PayloadServer) -> None:
    """The CMS serves again, whatever had happened to it."""
    cms.thaw()
    if cms.process.poll() is not None:
        cms.start()


async def delivered(parts: DeliveryParts, task_id: TaskId, cms: PayloadServer) -> None:
    """Try the delivery, without its waits, until nothing of it is left to do."""
    for _ in range(30):
        wait_s = await tried(parts, task_id)
        if wait_s is None:
            return
        if wait_s == DOUBT_S:
            await settled(cms)
    raise AssertionError("it was tried thirty times")


async def settled(cms: PayloadServer) -> None:
    """Return when the CMS has ended all that it had in hand: outside, it is given a minute for this."""

    async def idle() -> bool:
        try:
            return (await fetched(cms.url.removesuffix("/api") + "/busy"))[2] == b"0"
        except aiohttp.ClientError:
            return False

    await eventually(idle)


async def only_one(desk: Desk, cms: PayloadServer, task_id: TaskId) -> None:
    """The CMS has one document of the task, whole, and the task's result names it."""
    (document,) = cms.documents(task_id)
    assert document["filesize"] == 100_000
    assert await desk.media_id(task_id) == document["id"]
    assert (await desk.delivery(task_id)).state is DeliveryState.DELIVERED


FAULTS: dict[str, Fault] = {
    "stopped as the upload begins": lambda cut, cms: cut.at_upload(cms.freeze),
    "stopped in the upload": lambda cut, cms: cut.at_upload(cms.freeze, 50_000),
    "killed as the upload begins": lambda cut, cms: cut.at_upload(cms.kill),
    "killed in the upload": lambda cut, cms: cut.at_upload(cms.kill, 50_000),
    "killed as it answers": lambda cut, cms: cut.at_answer(cms.kill),
    "its answer lost": lambda cut, cms: cut.at_answer(),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_of_the_cms_in_an_upload_costs_a_try_and_makes_no_second_document(
    desk: Desk, cms: PayloadServer, cut: Relay, name: str
) -> None:
    task_id = await desk.completed(cms)
    async with desk.parts(cms, cut.url, answer_s=1) as parts:
        FAULTS[name](cut, cms)
        assert await tried(parts, task_id) is not None
        assert cut.struck.is_set()
        assert await desk.media_id(task_id) is None
        recovered(cms)
        await delivered(parts, task_id, cms)
    await only_one(desk, cms, task_id)


async def test_a_document_that_is_there_is_found_and_not_made_again(desk: Desk, cms: PayloadServer, cut: Relay) -> None:
    task_id = await desk.completed(cms)
    async with desk.parts(cms, cut.url) as parts:
        cut.at_answer()
        assert await tried(parts, task_id) is not None
        (first,) = cms.documents(task_id)
        assert await tried(parts, task_id) == DOUBT_S
        assert [document["id"] for document in cms.documents(task_id)] == [first["id"]]


@pytest.mark.parametrize("after_bytes", [0, 50_000, None])
async def test_a_worker_that_dies_in_an_upload_leaves_it_to_the_next_which_makes_no_second_document(
    desk: Desk, cms: PayloadServer, cut: Relay, after_bytes: int | None
) -> None:
    task_id = await desk.completed(cms)
    async with desk.parts(cms, cut.url) as parts:
        trying = asyncio.create_task(tried(parts, task_id))
        if after_bytes is None:
            cut.at_answer(trying.cancel)
        else:
            cut.at_upload(trying.cancel, after_bytes)
        with pytest.raises(asyncio.CancelledError):
            await trying
        assert cut.struck.is_set()
        await delivered(parts, task_id, cms)
    await only_one(desk, cms, task_id)


async def test_an_upload_that_arrives_after_it_was_given_up_is_removed_again(desk: Desk, cms: PayloadServer, cut: Relay) -> None:
    task_id = await desk.completed(cms)
    async with desk.parts(cms, cut.url, answer_s=0.5) as parts:
        late = cut.hold()
        assert await tried(parts, task_id) is not None
        assert await tried(parts, task_id) == DOUBT_S
        kept = await desk.media_id(task_id)
        late.set()
        await eventually(lambda: len(cms.documents(task_id)) == 2)
        assert await tried(parts, task_id) is None
    await only_one(desk, cms, task_id)
    assert await desk.media_id(task_id) == kept
    assert not (await desk.delivery(task_id)).doubt


async def test_two_workers_that_hold_the_same_delivery_leave_one_document(desk: Desk, cms: PayloadServer) -> None:
    task_id = await desk.completed(cms)
    async with desk.parts(cms) as one, desk.parts(cms) as other:
        await asyncio.gather(tried(one, task_id), tried(other, task_id))
        await delivered(one, task_id, cms)
    await only_one(desk, cms, task_id)


async def test_after_an_hour_of_kills_and_stops_every_document_is_there_and_none_twice(desk: Desk, cms: PayloadServer, cut: Relay) -> None:
    tasks = [await desk.completed(cms) for _ in range(12)]
    done: set[TaskId] = set()

    async def persistent(parts: DeliveryParts, task_id: TaskId) -> None:
        while True:
            wait_s = await tried(parts, task_id)
            if (await desk.delivery(task_id)).state is DeliveryState.FAILED:  # ten tries are soon used up without their waits
                await Outbox(desk.store.redis).resend(task_id, f"{task_id}-1")
            elif wait_s is None:
                break
            if wait_s == DOUBT_S:
                await settled(cms)
            else:
                await asyncio.sleep(random.uniform(0.05, 0.3))  # the pause before the next try
        done.add(task_id)

    async with desk.parts(cms, cut.url, answer_s=3) as parts, asyncio.TaskGroup() as group:
        for task_id in tasks:
            group.create_task(persistent(parts, task_id))
        for strike in (cms.freeze, cms.kill, cms.freeze, cms.kill):
            cut.struck.clear()
            cut.at_upload(strike, random.choice([0, 50_000]))
            await eventually(lambda: cut.struck.is_set() or len(done) == len(tasks))
            await asyncio.sleep(0.4)  # the fault lasts
            recovered(cms)  # here, not in a thread: it would end with that
    for task_id in tasks:
        await only_one(desk, cms, task_id)
