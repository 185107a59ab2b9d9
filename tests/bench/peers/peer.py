"""What the peers' files share: roles, the payload and the clock. The standard library alone: each file runs in its peer's own environment.

    python -m tests.bench.peers.NAME enqueue     puts BENCH_TASKS tasks into the queue
    python -m tests.bench.peers.NAME work        one worker process; says on BENCH_SOCKET when BENCH_TASKS tasks have begun
    python -m tests.bench.peers.NAME pick        puts tasks one at a time into the queue of an idle worker, prints each one's latency

The clock is CLOCK_MONOTONIC: one for all processes of a host.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

PAYLOAD: dict[str, Any] = {
    "task_data": {
        "scene_description": "A lighthouse keeper climbs the last stairs and lights the lamp while the storm comes in.",
        "storyboard_images": [f"https://cms.example/media/frame{number}.jpg" for number in range(3)],
        "camera_angle": "dolly in",
        "lighting": "moonlight",
        "duration": 7,
    }
}
"""The keyword arguments of every task: 300 bytes of JSON."""
WARM_UP = 20
WAIT_S = 30.0
AT_ONCE = 100
"""How many tasks an asynchronous client puts into the queue at once."""


@dataclass(frozen=True)
class Order:
    """What is to be measured, read from the environment."""

    url: str = os.environ.get("BENCH_URL", "")
    queue: str = os.environ.get("BENCH_QUEUE", "bench")
    concurrency: int = int(os.environ.get("BENCH_CONCURRENCY", "1"))
    tasks: int = int(os.environ.get("BENCH_TASKS", "1"))
    pause_s: float = float(os.environ.get("BENCH_PAUSE_S", "0.002"))
    socket: str = os.environ.get("BENCH_SOCKET", "")

    @property
    def path(self) -> str:
        """Of the server's unix socket."""
        return self.url.removeprefix("unix://")


class Tally:
    """Called as the first thing that a task does. Sends a datagram each time that `BENCH_TASKS` have begun."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._begun_ns: list[int] = []
        self._cpu_ns = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def __call__(self) -> None:
        self._begun_ns.append(time.monotonic_ns())
        if len(self._begun_ns) == 1:
            self._cpu_ns = time.process_time_ns()
        if len(self._begun_ns) < self._order.tasks:
            return
        begun_ns, self._begun_ns = self._begun_ns, []
        gaps_ns = sorted(after - before for before, after in pairwise(begun_ns)) or [0]
        told = {
            "first_ns": begun_ns[0],
            "seconds": (begun_ns[-1] - begun_ns[0]) / 1e9,
            "cpu_s": (time.process_time_ns() - self._cpu_ns) / 1e9,
            "gap_p50_ms": gaps_ns[len(gaps_ns) // 2] / 1e6,
            "gap_p99_ms": gaps_ns[int(len(gaps_ns) * 0.99)] / 1e6,
        }
        self._socket.sendto(json.dumps(told).encode(), self._order.socket)


Enqueue = Callable[[], Awaitable[Any]]
Producer = Callable[[Order], AbstractAsyncContextManager[Enqueue]]


async def enqueue(producer: Producer, order: Order) -> None:
    """The tasks wait in the queue."""
    async with producer(order) as put:
        for done in range(0, order.tasks, AT_ONCE):
            await asyncio.gather(*(put() for _ in range(min(AT_ONCE, order.tasks - done))))


async def pick(producer: Producer, order: Order) -> None:
    """Prints the milliseconds from the call that enqueues to the begin of the task, of each task."""
    path = Path(order.socket)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(order.socket)
        heard.settimeout(WAIT_S)
        found_ms = []
        async with producer(order) as put:
            for _ in range(WARM_UP + order.tasks):
                called_ns = time.monotonic_ns()
                await put()
                found_ms.append((json.loads(heard.recv(1024))["first_ns"] - called_ns) / 1e6)
                await asyncio.sleep(0.008 + random.random() * order.pause_s)  # the worker is idle again, at no fixed time of its poll
    print(json.dumps(found_ms[WARM_UP:]))


def main(producer: Producer, work: Callable[[Order, Tally], Coroutine[Any, Any, None] | None]) -> None:
    """Does what the command line says."""
    order, role = Order(), sys.argv[1]
    if role == "work":
        working = work(order, Tally(order))
        if working is not None:
            run(working)
    else:
        run({"enqueue": enqueue, "pick": pick}[role](producer, order))


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """By uvloop, where the peer's environment has it."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(coroutine)
    else:
        uvloop.run(coroutine)
