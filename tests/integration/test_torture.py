"""Clients come and go at random while API processes and Redis are killed and return: each receives the whole log, once and in order."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import aiohttp
import pytest
from redis.exceptions import RedisError

from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.streams.watchers import Source
from movieq.tasks.states import ProjectId
from tests.arrange import CPU, new_task, result
from tests.fleet import KEY, Fleet, fleet, free_port
from tests.service import Service

TASKS = 12
P = ParamSpec("P")
T = TypeVar("T")


async def insist(verb: Callable[P, Awaitable[T]], *args: P.args, **options: P.kwargs) -> T:
    """Call the verb until Redis answers; return the answer."""
    while True:
        try:
            return await verb(*args, **options)
        except (RedisError, OSError, TimeoutError):
            await asyncio.sleep(0.05)


class Reader:
    """A client that disconnects at random and resumes after its last event id, at any of the processes."""

    def __init__(self, source: Source, ports: Sequence[int]) -> None:
        self.ids: list[str] = []
        self.connects = 0
        self.odd: list[str] = []
        """What it received and must not receive: a gap, a refusal."""
        self.after: str | None = None
        """The last entry before its stream began, if that begins with a snapshot (the stream of a project)."""
        self.last: str | None = None
        """The last entry of all, once it is known: the only end of a project's stream."""
        self._source = source
        self._ports = ports
        ((name, value),) = source.name.items()
        self._path = f"/api/v1/{name.removesuffix('_id')}s/{value}/events"

    async def follow(self, session: aiohttp.ClientSession) -> None:
        """Read until no more events will come."""
        while self._source.ends or self.last is None or (self.ids[-1] if self.ids else self.after) != self.last:
            self.connects += 1
            headers = {"Last-Event-ID": self.ids[-1]} if self.ids else {}
            url = f"http://127.0.0.1:{random.choice(self._ports)}{self._path}"
            try:
                async with asyncio.timeout(random.uniform(0, 3)), session.get(url, headers=headers) as answer:
                    if answer.status == 204:
                        return
                    if answer.status == 200:
                        await self._read(answer)
                    elif answer.status != 503:
                        self.odd.append(f"{answer.status} {await answer.text()}")
            except (TimeoutError, aiohttp.ClientError):
                pass
            await asyncio.sleep(random.uniform(0, 0.2))

    async def _read(self, answer: aiohttp.ClientResponse) -> None:
        id = event = data = ""
        async for raw in answer.content:
            name, _, value = raw.decode().rstrip("\n").partition(": ")
            if name == "id":
                id = value
            elif name == "event":
                event = value
            elif name == "data":
                data = value
            elif not name and event:  # an event counts when it is whole
                if id:
                    self.ids.append(id)
                elif event == "gap":
                    self.odd.append("a gap")
                elif event == "snapshot" and not self._source.ends:
                    self.odd += ["a second beginning"] * bool(self.ids)
                    self.after = json.loads(data)["last_event_id"]
                id = event = data = ""


async def runs(store: Store, worker: str, over: asyncio.Event) -> None:
    """Work as a worker does: report, renew leases, requeue now and then, and complete when the time is over."""
    for nonce in itertools.count():
        (claimed,) = await insist(store.claim, worker, f"{worker}-{nonce}", CPU)
        task_id, run = claimed.task.task_id, claimed.run
        for step in range(1, 80):
            if over.is_set():
                await insist(store.complete, task_id, run, result())
                return
            await insist(store.renew, worker, [], [(task_id, run)], gpu_bytes=0)
            await insist(store.report, task_id, run, step / 100, "generating_image", stage="denoise")
            await asyncio.sleep(0.1)
        await insist(store.requeue, task_id, run, Budget.DRAIN, 0, 0, "its worker was stopped", "worker_lost")


async def kills(installation: Fleet, apis: dict[int, Service], over: asyncio.Event, counts: dict[str, int]) -> None:
    """Kill an API process every two seconds, and Redis every five, at least once each; restart each in its place."""
    for turn in itertools.count(1):
        await asyncio.sleep(1)
        if over.is_set():
            return
        if turn % 2 == 0:
            port = random.choice([*apis])
            apis[port].process.send_signal(random.choice([signal.SIGKILL, signal.SIGTERM]))
            await asyncio.to_thread(apis[port].process.wait)
            apis[port] = await installation.api(port=port)
            counts["api"] += 1
        if turn % 5 == 0:
            await asyncio.to_thread(installation.valkey.kill)
            await asyncio.sleep(random.uniform(0, 2))
            await asyncio.to_thread(installation.valkey.start)
            counts["redis"] += 1


@pytest.mark.parametrize(("clients", "seconds"), [(40, 8), pytest.param(300, 90, marks=pytest.mark.slow)], ids=["small", "whole"])
async def test_clients_that_come_and_go_hear_the_whole_log_once_through_every_death(folder: Path, clients: int, seconds: int) -> None:
    over, counts = asyncio.Event(), {"api": 0, "redis": 0}
    async with fleet(folder / "fleet", appendfsync="always") as installation:
        apis = {port: await installation.api(port=port) for port in (free_port(), free_port())}
        task_ids = [(await installation.store.submit(new_task())).task_id for _ in range(TASKS)]
        sources = [Source.of_task(task_ids[number % TASKS]) for number in range(clients * 9 // 10)]
        sources += [Source.of_project(ProjectId("film"))] * (clients - len(sources))
        readers = [(Reader(source, [*apis]), source) for source in sources]
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, headers={"X-API-Key": KEY}) as session, asyncio.TaskGroup() as group:
            working = [group.create_task(runs(installation.store, f"w{number}", over)) for number in range(TASKS)]
            for reader, _ in readers:
                group.create_task(reader.follow(session))
            killing = group.create_task(kills(installation, apis, over, counts))
            await asyncio.sleep(seconds)
            while not all(counts.values()):
                await asyncio.sleep(0.1)
            over.set()
            await asyncio.gather(killing, *working)
            logs = {
                source.log: [entry.id for entry in await Queries(installation.store.redis).log_after(source.log, None, 10_000)]
                for source in sources
            }
            for reader, source in readers:
                reader.last = logs[source.log][-1]
    assert [reader.odd for reader, _ in readers if reader.odd] == []
    for reader, source in readers:
        log = logs[source.log]
        assert reader.ids == log[log.index(reader.after) + 1 if reader.after else 0 :], source.log
    print(f"{len(readers)} clients, {sum(reader.connects for reader, _ in readers)} connections, {counts} killed")
