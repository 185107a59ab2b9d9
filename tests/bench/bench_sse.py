"""Open streams of one API process, beside sse-starlette in the same run: `python -m tests.bench.bench_sse [--quick]`.

Measured: memory a stream (PSS of the process, before and after), connects a second, one broadcast to the last client, ten thousand events a
second spread over streams that each watch another task, processor time while nothing happens but comments, and at a thousand streams the
time from the call of the verb that reports to the bytes in the clients. Readers are processes of their own (`sse_reader`); the largest
broadcast is measured with one and with two, so that it shows whether the reader is what is measured.

sse-starlette runs twice: with a Redis connection for each client, and with one for all. Prints a table and, as its last line, one JSON
object.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import uvloop

from movieq.api.server import allow_open_files
from movieq.local.embedded import Valkey, valkey
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.store import Store
from movieq.tasks.states import RunToken, TaskId
from tests.arrange import new_task, raw, running
from tests.bench import environments
from tests.bench.report import machine, percentile, report
from tests.service import UNLIMITED

KEY: Final = "bench-key-0123456789"
PACKAGES: Final = (
    *("sse-starlette==3.7.0", "starlette==1.10.0", "uvicorn==0.54.0", "httptools==0.9.0", "uvloop==0.23.0"),
    *("redis==8.1.0", "hiredis==3.5.0"),
)
SPARE_FILES: Final = 200
PER_S: Final = 10_000
DATA: Final = (
    '{"task_id":"123e4567-e89b-12d3-a456-426614174000","project_id":"film","task_type":"generate_image","type":"progress",'
    '"time":"2026-11-25T04:11:26.687Z","attempt":1,"status":"processing","progress":0.4200,"current_step":"bench-%d","stage":"denoise",'
    '"step":42,"steps":100,"estimated_remaining":12.3}'
)
"""What the relay is given in the flood, and sse-starlette in everything: as large as what a worker reports."""


class Size(NamedTuple):
    """How much is measured. `own`: with how many streams the server runs that has a Redis connection for each."""

    streams: tuple[int, ...]
    own: tuple[int, ...]
    broadcasts: int
    reports: int
    idle_s: float
    flood_s: float


FULL = Size((1000, 5000, 15_000), (1000, 5000), 10, 100, 15.0, 3.0)
QUICK = Size((300, 1000), (300,), 5, 40, 3.0, 1.0)


class Reader:
    """A process of `sse_reader`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.sse_reader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=environments.ROOT,
        )

    def start(self, do: str, **order: Any) -> asyncio.Task[dict[str, Any]]:
        """It does this; the answer comes by itself."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()
        return asyncio.create_task(asyncio.to_thread(self._answer))

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the reader broke")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """It has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


class Served(NamedTuple):
    """A server with open streams. `paths` are what they asked for, `tell` makes one event for all of them, of the time that it is given."""

    process: psutil.Process
    port: int
    store: Store
    paths: Callable[[int, bool], Awaitable[list[str]]]
    tell: Callable[[int], Awaitable[Any]]
    channel: Callable[[str], str]
    message: Callable[[int], str]


@asynccontextmanager
async def ours(server: Valkey, folder: Path) -> AsyncIterator[Served]:
    """`movieq api`."""
    environment = {
        **os.environ,
        "MOVIEQ_REDIS_URL": server.url,
        "MOVIEQ_API_KEYS": KEY,
        **UNLIMITED,
        "MOVIEQ_STORAGE": f"{folder}/media",
        "MOVIEQ_LOG_LEVEL": "warning",
    }
    store = Store(connect(server.url, patient=True))
    await raw(store).flushall()
    task: tuple[TaskId, RunToken] = await running(store)
    done = iter(range(1, 1000))

    async def paths(count: int, spread: bool) -> list[str]:
        ids = [(await store.submit(new_task())).task_id for _ in range(count)] if spread else [task[0]] * count
        return [f"/api/v1/tasks/{task_id}/events" for task_id in ids]

    async with _process([sys.executable, "-m", "movieq.cli", "api", "--port", "0"], environment) as (process, line):
        yield Served(
            process,
            int(line.rpartition(":")[2]),
            store,
            paths,
            lambda at_ns: store.report(*task, next(done) / 1000, f"bench-{at_ns}"),
            lambda path: KEYS["events"] + path.split("/")[4],
            lambda at_ns: f">{time.time_ns() // 1_000_000}\nprogress\n{DATA % at_ns}",
        )
    await store.redis.aclose()


@asynccontextmanager
async def sse_starlette(kind: str, server: Valkey) -> AsyncIterator[Served]:
    """A server of sse-starlette; `kind` is that of its file."""
    store = Store(connect(server.url, patient=True))
    await raw(store).flushall()

    async def paths(count: int, spread: bool) -> list[str]:
        return [f"/?channel={number if spread else 'all'}" for number in range(count)]

    command = [environments.python("sse-starlette"), "-m", "tests.bench.peers.sse_starlette", kind, server.url]
    async with _process(command, dict(os.environ)) as (process, line):
        yield Served(
            process,
            int(line),
            store,
            paths,
            lambda at_ns: raw(store).publish("all", DATA % at_ns),
            lambda path: path.partition("=")[2],
            lambda at_ns: DATA % at_ns,
        )
    await store.redis.aclose()


@asynccontextmanager
async def _process(command: list[str], environment: dict[str, str]) -> AsyncIterator[tuple[psutil.Process, str]]:
    popen = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=environments.ROOT)
    try:
        assert popen.stdout is not None
        yield psutil.Process(popen.pid), await asyncio.to_thread(popen.stdout.readline)
    finally:
        popen.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(popen.wait, 8)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        assert popen.stdout is not None
        popen.stdout.close()


@asynccontextmanager
async def readers(count: int) -> AsyncIterator[list[Reader]]:
    """That many processes that read."""
    found = [Reader() for _ in range(count)]
    try:
        yield found
    finally:
        for each in found:
            each.end()


async def opened(served: Served, clients: list[Reader], paths: list[str]) -> float:
    """All of these are open, shared among the clients; seconds that it took."""
    head = f"X-API-Key: {KEY}\r\n"
    parts = [paths[number :: len(clients)] for number in range(len(clients))]
    begun_s = time.monotonic()
    orders = [
        client.start("open", port=served.port, paths=part, head=head, timeout_s=120) for client, part in zip(clients, parts, strict=True)
    ]
    await asyncio.gather(*orders)
    return time.monotonic() - begun_s


async def warmed(served: Served, clients: list[Reader]) -> int:
    """The server has had streams before; what it weighs without any, in bytes."""
    await opened(served, clients, await served.paths(100, False))
    await asyncio.gather(*(client.start("close") for client in clients))
    await asyncio.sleep(0.5)
    return weight(served.process)


def weight(process: psutil.Process) -> int:
    """Proportional bytes of the process."""
    return int(process.memory_full_info().pss)


def cpu_s(process: psutil.Process) -> float:
    """Processor seconds that it has used."""
    times = process.cpu_times()
    return times.user + times.system


async def broadcast(served: Served, clients: list[Reader], streams: int) -> tuple[float, list[float]]:
    """One event to all: ms to the last, and to a sample of them."""
    share = streams // len(clients)
    orders = [client.start("collect", count=share, timeout_s=20) for client in clients]
    await asyncio.sleep(0.1)
    at_ns = time.perf_counter_ns()
    await served.tell(at_ns)
    answers = await asyncio.gather(*orders)
    if any(answer["count"] < share for answer in answers):
        raise RuntimeError(f"of {streams} streams {sum(answer['count'] for answer in answers)} got the event")
    return (max(answer["last_ns"] for answer in answers) - at_ns) / 1e6, [late for answer in answers for late in answer["late_ms"]]


async def crowd(served: Served, streams: int, size: Size, clients: int = 1) -> dict[str, float]:
    """Streams of one task. How late each client gets an event is measured at the least size, what idle ones cost at the largest."""
    async with readers(clients) as reading:
        before = await warmed(served, reading)
        seconds = await opened(served, reading, await served.paths(streams, False))
        await asyncio.sleep(1)
        found: dict[str, float] = {"connects_per_s": streams / seconds, "bytes": (weight(served.process) - before) / streams}
        lasts = [(await broadcast(served, reading, streams))[0] for _ in range(size.broadcasts)]
        found |= {"last_ms": statistics.median(lasts), "last_most_ms": max(lasts)}
        if streams == size.streams[0]:
            late = []
            for _ in range(size.reports):
                late += (await broadcast(served, reading, streams))[1]
            found |= {"late_p50_ms": percentile(late, 0.5), "late_p99_ms": percentile(late, 0.99)}
        if streams != size.streams[-1] or clients > 1:
            return found
        begun_s, before_s = time.monotonic(), cpu_s(served.process)
        await asyncio.sleep(size.idle_s)
        return found | {"idle_cpu_percent": (cpu_s(served.process) - before_s) / (time.monotonic() - begun_s) * 100}


async def flood(served: Served, streams: int, size: Size) -> dict[str, float]:
    """Ten thousand events a second over streams of as many tasks."""
    async with readers(1) as reading:
        before = await warmed(served, reading)
        paths = await served.paths(streams, True)
        await opened(served, reading, paths)
        await asyncio.sleep(1)
        found = {"bytes": (weight(served.process) - before) / streams}
        channels, count = [served.channel(path) for path in paths], int(PER_S * size.flood_s)
        order = reading[0].start("collect", count=count, timeout_s=size.flood_s + 20)
        await asyncio.sleep(0.1)
        begun_s, before_s, redis = time.monotonic(), cpu_s(served.process), raw(served.store)
        for number in range(0, count, 50):
            if (ahead_s := begun_s + number / PER_S - time.monotonic()) > 0:
                await asyncio.sleep(ahead_s)
            async with redis.pipeline(transaction=False) as pipe:
                at_ns = time.perf_counter_ns()
                for place in range(number, number + 50):
                    pipe.publish(channels[place % streams], served.message(at_ns))
                await pipe.execute()
        sent_s = time.monotonic() - begun_s
        answer = await order
        late = answer["late_ms"]
        return found | {
            "sent_per_s": count / sent_s,
            "lost": count - answer["count"],
            "p50_ms": percentile(late, 0.5),
            "p99_ms": percentile(late, 0.99),
            "cpu_percent": (cpu_s(served.process) - before_s) / (time.monotonic() - begun_s) * 100,
        }


async def measure(size: Size, server: Valkey, folder: Path) -> dict[str, Any]:
    """Everything, each with a server of its own."""
    found: dict[str, Any] = {"ours": {}, "shared": {}, "own": {}}
    for streams in size.streams:
        async with ours(server, folder) as served:
            found["ours"][streams] = await crowd(served, streams, size)
        async with sse_starlette("shared", server) as served:
            found["shared"][streams] = await crowd(served, streams, size)
        if streams in size.own:
            async with sse_starlette("own", server) as served:
                found["own"][streams] = await crowd(served, streams, size)
        for name in ("ours", "shared", "own"):
            if streams in found[name]:
                _print(name, streams, found[name][streams])
    most = size.streams[-1]
    async with ours(server, folder) as served:
        found["two_clients"] = await crowd(served, most - most % 2, size, clients=2)
    _print("ours, two clients", most, found["two_clients"])
    found["flood"] = {}
    for name, streams in (("ours", size.streams[0]), ("ours", most), ("shared", size.streams[0])):
        async with ours(server, folder) if name == "ours" else sse_starlette(name, server) as served:
            flooded = found["flood"][f"{name} {streams}"] = await flood(served, streams, size)
        _print(f"{name}, {PER_S:,} events/s", streams, flooded)
    return found


def _print(name: str, streams: int, row: dict[str, float]) -> None:
    print(f"  {name:24} {streams:>6} streams: " + ", ".join(f"{key} {value:,.1f}" for key, value in row.items()), flush=True)


def main() -> None:
    """Prints everything."""
    size = QUICK if "--quick" in sys.argv[1:] else FULL
    allowed = allow_open_files()
    size = size._replace(streams=tuple(streams for streams in size.streams if streams + SPARE_FILES <= allowed))
    environments.make("sse-starlette", PACKAGES)
    print(
        ", ".join(f"{key} {value}" for key, value in machine().items()), f"open files {allowed}", " ".join(PACKAGES), sep=", ", flush=True
    )
    begun_s, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-") as name, valkey(Path(name) / "valkey", appendfsync="everysec") as server:
        found = uvloop.run(measure(size, server, Path(name)))
    first, most, both = size.streams[0], size.streams[-1], size.own[-1]
    mine, shared, own = (found[name] for name in ("ours", "shared", "own"))
    report(
        "sse",
        {
            "streams": most,
            "open_files": allowed,
            "bytes_a_stream": mine[most]["bytes"],
            "bytes_a_stream_aim": 15_000,
            "bytes_a_stream_each_of_another_task": found["flood"][f"ours {most}"]["bytes"],
            "connects_per_s": mine[most]["connects_per_s"],
            "broadcast_last_ms": mine[most]["last_ms"],
            "broadcast_last_ms_aim": 300,
            "broadcast_last_most_ms": mine[most]["last_most_ms"],
            "broadcast_last_most_ms_aim": 500,
            "broadcast_last_ms_two_clients": found["two_clients"]["last_ms"],
            "report_to_bytes_p50_ms": mine[first]["late_p50_ms"],
            "report_to_bytes_p99_ms": mine[first]["late_p99_ms"],
            "report_to_bytes_p99_ms_aim": 20,
            "flood_p50_ms": found["flood"][f"ours {first}"]["p50_ms"],
            "flood_p99_ms": found["flood"][f"ours {first}"]["p99_ms"],
            "idle_cpu_percent": mine[most]["idle_cpu_percent"],
            "density_to_shared": shared[most]["bytes"] / mine[most]["bytes"],
            "density_to_own": own[both]["bytes"] / mine[both]["bytes"],
            "density_aim": 2.5,
            "broadcast_to_shared": mine[most]["last_ms"] / shared[most]["last_ms"],
            "broadcast_to_own": mine[both]["last_ms"] / own[both]["last_ms"],
            "broadcast_aim": 0.5,
            "load_before": load,
            "seconds": time.monotonic() - begun_s,
        },
        found,
    )


if __name__ == "__main__":
    main()
