"""Thousands of streams at one API process: what they leave behind, and how the process ends with them."""

from __future__ import annotations

import asyncio
import base64
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from movieq.client import Client, ClientEvent, Preview
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.streams.watchers import Source
from movieq.tasks.entities import ProcessingProgress
from movieq.tasks.states import ProjectId, TaskId
from tests.arrange import new_task, raw, running
from tests.bench.sse_reader import Readers
from tests.fleet import KEY, STOP_S, Fleet, eventually, fleet
from tests.service import Service

MIB = 1024 * 1024


@pytest.fixture
async def installation(folder: Path) -> AsyncIterator[Fleet]:
    """Yield a fleet."""
    async with fleet(folder / "fleet") as installation:
        yield installation


@pytest.fixture
async def api(installation: Fleet) -> Service:
    """Start and return its API process."""
    return await installation.api(MOVIEQ_LOG_LEVEL="warning")


def opened(api: Service, task_ids: Sequence[str]) -> Readers:
    """Open a stream of each task."""
    readers = Readers()
    port = int(api.url.rpartition(":")[2])
    readers.open(port, [f"/api/v1/tasks/{task_id}/events" for task_id in task_ids], f"X-API-Key: {KEY}\r\n", 60)
    return readers


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
async def test_streams_that_came_and_went_leave_nothing_behind(installation: Fleet, api: Service, rounds: int) -> None:
    task_ids = [(await installation.store.submit(new_task())).task_id for _ in range(100)] * 5
    process = psutil.Process(api.process.pid)

    async def nobody_listens() -> bool:
        return not await raw(installation.store).pubsub_channels(KEYS["events"] + "?*")

    async def come_and_go(rounds: int) -> None:
        for _ in range(rounds):
            readers = await asyncio.to_thread(opened, api, task_ids)
            assert len(await raw(installation.store).pubsub_channels(KEYS["events"] + "?*")) == 100
            readers.close()
            await eventually(nobody_listens)

    await come_and_go(4)
    before = process.memory_info().rss, process.num_fds(), process.num_threads()
    await come_and_go(rounds)
    after = process.memory_info().rss, process.num_fds(), process.num_threads()
    assert after[0] - before[0] < 2 * MIB
    assert after[1:] == before[1:]


async def test_a_process_with_a_thousand_streams_says_goodbye_to_each_when_it_ends(installation: Fleet, api: Service) -> None:
    task_id, _ = await running(installation.store)
    readers = await asyncio.to_thread(opened, api, [task_id] * 1000)
    api.process.send_signal(signal.SIGTERM)
    ended = await asyncio.to_thread(readers.ended, STOP_S)
    assert await asyncio.to_thread(api.process.wait, STOP_S) in (0, -signal.SIGTERM)  # uvicorn ends by the signal, after all is done
    assert ended == {"count": 1000, "goodbyes": 1000, "left": 0}


async def told_from_the_start(installation: Fleet, api: Service, task_id: TaskId) -> list[ClientEvent]:
    """Return the events of a task whose worker starts when its stream is open: one that was there might be done before."""
    async with Client(api.url, KEY) as client, aclosing(client.events(task_id)) as events:
        told = [await anext(events)]
        await eventually(lambda: installation.store.watched(task_id))
        await installation.worker()
        return [*told, *[event async for event in events]]


async def test_a_task_that_did_not_ask_shows_previews_to_who_watches_it_and_makes_none_where_nobody_does(
    installation: Fleet, api: Service
) -> None:
    task = {"prompt": "a lighthouse", "duration": 8, "resolution": "640x360"}
    task_id = TaskId(await api.submit("render_animation", task))
    assert not await installation.store.watched(task_id)
    told = await told_from_the_start(installation, api, task_id)
    assert any(isinstance(event.data, Preview) for event in told)
    overheard = installation.store.redis.pubsub()
    await overheard.psubscribe(KEYS["events"] + "*")  # a pattern is nobody who watches
    await api.submit("render_animation", task)
    heard: list[bytes] = []
    async with asyncio.timeout(60):
        while not any(b"\ncompleted\n" in each for each in heard):
            if (message := await overheard.get_message(ignore_subscribe_messages=True, timeout=1)) is not None:
                heard.append(message["data"])
    await overheard.aclose()  # type: ignore[no-untyped-call]
    assert any(b"\nprogress\n" in each for each in heard)
    assert not any(b"\npreview\n" in each for each in heard)


async def test_previews_reach_whoever_watches_the_task_and_nobody_else(installation: Fleet, api: Service) -> None:
    picture = {"prompt": "a lighthouse", "duration": 6, "resolution": "640x360", "preview": True}
    begun = time.monotonic()
    task_id = await api.submit("render_animation", picture)
    told = await told_from_the_start(installation, api, TaskId(task_id))
    previews = [event for event in told if isinstance(event.data, Preview)]
    assert 1 <= len(previews) <= (time.monotonic() - begun) / 0.5 + 1
    for event in previews:
        assert isinstance(event.data, Preview)
        head, _, body = event.data.image.partition(",")
        jpeg = base64.b64decode(body)
        assert (event.id, head, jpeg[:2]) == (None, "data:image/jpeg;base64", b"\xff\xd8")
        assert len(jpeg) <= 10_000
    for log in (Source.of_task(TaskId(task_id)).log, Source.of_project(ProjectId("film")).log):
        assert "preview" not in [entry.type for entry in await Queries(installation.store.redis).log_after(log, None)]


async def test_a_run_says_how_long_it_will_take_and_its_progress_never_falls(installation: Fleet, api: Service) -> None:
    await installation.worker()
    task_id = await api.submit("generate_video", {"prompt": "a lighthouse", "duration": 3, "resolution": "640x360", "audio_cues": ["sea"]})
    async with Client(api.url, KEY) as client, aclosing(client.events(task_id)) as events:
        told = [event.data async for event in events if isinstance(event.data, ProcessingProgress)]
    running = [state for state in told if state.status == "processing" and state.stage is not None]
    assert {"sound", "frames", "upload"} <= {state.stage for state in running}
    assert [state.progress for state in told] == sorted(state.progress for state in told)
    assert all(state.estimated_remaining is not None and state.estimated_remaining > 0 for state in running)
    assert told[-1].progress == 1
