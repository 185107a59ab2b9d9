"""Webhooks a second through the real outbox to a receiver that answers at once, and how long one takes on an idle worker.

A backlog is due when the worker starts; beside it, in the same run, the same bodies are posted by a bare aiohttp client. Then tasks end one
by one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

import aiohttp
import uvloop

from movieq.local.embedded import valkey
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.store import Store
from tests import arrange
from tests.bench.report import percentile, report

BACKLOG: Final = int(os.environ.get("WEBHOOKS", "3000"))
SINGLE, WARM_UP = 200, 20
BARE_AT_ONCE: Final = 10
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Receiver(asyncio.Protocol):
    """Answers each POST as soon as it is whole, and notes when that was."""

    came_s: list[float] = []  # noqa: RUF012  # of every connection
    body: bytes = b""
    heads: dict[str, str] = {}  # noqa: RUF012
    wanted: int = 0
    all_came: asyncio.Event

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            lines = self._buffer[:end].decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:])
            size = end + 4 + int(headers["Content-Length"])
            if len(self._buffer) < size:
                return
            Receiver.heads, Receiver.body, self._buffer = headers, self._buffer[end + 4 : size], self._buffer[size:]
            self._transport.write(ANSWER)
            Receiver.came_s.append(time.perf_counter())
            if len(Receiver.came_s) == Receiver.wanted:
                Receiver.all_came.set()


def expect(count: int) -> asyncio.Event:
    """Is set when so many have come from now on."""
    Receiver.came_s, Receiver.wanted, Receiver.all_came = [], count, asyncio.Event()
    return Receiver.all_came


async def ended(store: Store, url: str) -> None:
    """A task has ended, and its webhook is due."""
    task = arrange.new_task("bench", callback_url=url)
    await store.submit(task)
    await store.cancel(task.task_id)


async def bare(url: str, count: int) -> float:
    """As many posts of the last webhook's bytes a second."""
    body, headers, left = Receiver.body, Receiver.heads, count
    all_came = expect(count)

    async def post(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            async with session.post(url, data=body, headers=headers) as answer:
                await answer.read()

    async with aiohttp.ClientSession() as session:
        begun_s = time.perf_counter()
        await asyncio.gather(*(post(session) for _ in range(BARE_AT_ONCE)), all_came.wait())
    return count / (Receiver.came_s[-1] - begun_s)


async def measure(redis_url: str, folder: str) -> tuple[float, float, list[float]]:
    """Webhooks a second, posts a second of the bare client, and seconds from the end of a task to its webhook."""
    server = await asyncio.get_running_loop().create_server(Receiver, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    store = Store(connect(redis_url, patient=True))
    all_came = expect(BACKLOG)
    for _ in range(BACKLOG):
        await ended(store, url)
    environment = {
        **os.environ,
        "MOVIEQ_REDIS_URL": redis_url,
        "MOVIEQ_PUBLIC_URL": "http://127.0.0.1:1",
        "MOVIEQ_STORAGE": f"{folder}/media",
        "MOVIEQ_ALLOW_PRIVATE_URLS": "127.0.0.0/8",
        "MOVIEQ_WEBHOOK_SECRET": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3",
        "MOVIEQ_LOG_LEVEL": "warning",
    }
    worker = subprocess.Popen([sys.executable, "-m", "movieq.cli", "worker"], env=environment)
    try:
        async with asyncio.timeout(300):
            await all_came.wait()
        tenth = BACKLOG // 10  # what comes while the worker still starts its engine is not counted
        rate = (BACKLOG - tenth) / (Receiver.came_s[-1] - Receiver.came_s[tenth - 1])
        single = []
        for _ in range(SINGLE + WARM_UP):
            while not await arrange.raw(store).scard(KEYS["idle"] + "deliveries"):
                await asyncio.sleep(0.002)
            came = expect(1)
            begun_s = time.perf_counter()
            await ended(store, url)
            async with asyncio.timeout(30):
                await came.wait()
            single.append(Receiver.came_s[0] - begun_s)
            await asyncio.sleep(0.02)
    finally:
        worker.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            worker.wait(60)
    plain = await bare(url, BACKLOG)
    server.close()
    await store.redis.aclose()
    return rate, plain, single[WARM_UP:]


def main() -> None:
    """Prints the rates and the percentiles."""
    with tempfile.TemporaryDirectory() as folder, valkey(Path(folder) / "valkey", appendfsync="everysec") as server:
        rate, plain, single = uvloop.run(measure(server.url, folder))
    report(
        "webhooks",
        {
            "backlog": BACKLOG,
            "webhooks_per_s": rate,
            "bare_posts_per_s": plain,
            "share_of_bare": rate / plain,
            "end_to_receiver_p50_ms": percentile(single, 0.5) * 1000,
            "end_to_receiver_p99_ms": percentile(single, 0.99) * 1000,
        },
    )


if __name__ == "__main__":
    main()
