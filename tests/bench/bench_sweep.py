"""Measures how long a worker takes to delete ended tasks and their files, and how long status reads and submits take before and meanwhile.

A real API and a real worker on one Valkey; the files lie in a folder. The worker runs from the start, and waits for its turn. Run it with
`python -m tests.bench.bench_sweep [TASKS]`. It ends after five minutes at most and reports what was left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from movieq.local.embedded import valkey
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.store import Store
from tests.arrange import claim, new_task, result
from tests.bench import load
from tests.bench.report import percentile, report
from tests.service import UNLIMITED

KEY = "bench-key-0123456789"
TASKS, MOST_S = 100_000, 300.0
AT_ONCE = 200
SETTLE_S, BEFORE_S, PAUSE_S = 5.0, 10.0, 0.01
BODY = msgspec.json.encode({"project_id": "bench", "task_type": "generate_image", "task_data": {"prompt": "a lamp"}})


def lay(media: Path, prefixes: list[str]) -> None:
    """A result and its poster under each prefix."""
    for prefix in prefixes:
        (media / prefix).mkdir(parents=True)
        for name in ("output.mp4", "poster.jpg"):
            (media / prefix / name).write_bytes(b"film" * 256)


async def fill(store: Store, media: Path, tasks: int) -> None:
    """So many tasks have ended, with their files."""
    pool = ThreadPoolExecutor(1)
    laid = []
    for number in range(0, tasks, AT_ONCE):
        count = min(AT_ONCE, tasks - number)
        await asyncio.gather(*(store.submit(new_task(project=f"film{each % 10}")) for each in range(count)))
        claimed = await claim(store, slots=count)
        while len(claimed) < count:
            claimed += await claim(store, slots=count - len(claimed))
        prefixes = [f"projects/{each.task.project_id}/video/{each.task.task_id}/{each.run}" for each in claimed]
        laid.append(asyncio.get_running_loop().run_in_executor(pool, lay, media, prefixes))
        runs = [(each.task.task_id, each.run, prefix) for each, prefix in zip(claimed, prefixes, strict=True)]
        await asyncio.gather(*(store.report(task_id, run, 0.9, "uploading_result", prefix=prefix) for task_id, run, prefix in runs))
        await asyncio.gather(*(store.complete(task_id, run, result(f"{prefix}/output.mp4")) for task_id, run, prefix in runs))
    await asyncio.gather(*laid)


async def ask(port: int, request: bytes, found: list[float]) -> None:
    """Ask again and again, a hundredth of a second apart, until cancelled; note the seconds that each answer took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            begun = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            assert head.startswith(b"HTTP/1.1 2"), head
            found.append(time.perf_counter() - begun)
            await asyncio.sleep(PAUSE_S)
    finally:
        writer.close()


class Asked:
    """Status reads and submits, at the same time, for the length of a block."""

    def __init__(self, port: int, task_id: str) -> None:
        status = f"GET /api/v1/tasks/{task_id}/status HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {KEY}\r\n\r\n".encode()
        self._requests = {"status": status, "submit": load.post("/api/v1/tasks/submit", BODY, {"X-API-Key": KEY})}
        self._port = port
        self.seconds: dict[str, list[float]] = {name: [] for name in self._requests}

    async def __aenter__(self) -> Asked:
        self._tasks = [asyncio.create_task(ask(self._port, request, self.seconds[name])) for name, request in self._requests.items()]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    def p99_ms(self, name: str) -> float:
        return percentile(self.seconds[name], 0.99) * 1000


async def measure(redis_url: str, port: int, media: Path, environment: dict[str, str], tasks: int) -> dict[str, Any]:
    """The rows of the report."""
    store = Store(connect(redis_url, patient=True))
    redis: Any = store.redis
    await fill(store, media, tasks)
    task_id = (await store.submit(new_task())).task_id
    await store.take_turn("bench", 3_600_000)
    worker = subprocess.Popen([sys.executable, "-m", "movieq.cli", "worker"], env=environment)
    try:
        while not await redis.exists(KEYS["heartbeat_times"]):
            await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE_S)
        async with Asked(port, task_id) as before:
            await asyncio.sleep(BEFORE_S)
        async with Asked(port, task_id) as beside:
            await store.take_turn("bench", 0)
            begun, tasks_s = time.monotonic(), 0.0
            while time.monotonic() - begun < MOST_S:
                ended, retired, orphans = [await redis.zcard(KEYS[name]) for name in ("ended", "media", "orphans")]
                if not ended and not tasks_s:
                    tasks_s = time.monotonic() - begun
                if not ended + retired + orphans:
                    break
                await asyncio.sleep(0.05)
            seconds = time.monotonic() - begun
    finally:
        worker.send_signal(signal.SIGTERM)
        await asyncio.to_thread(worker.wait, 60)
    await store.redis.aclose()
    return {
        "n": tasks,
        "left": ended + retired + orphans,
        "seconds": seconds,
        "seconds_until_the_tasks_were_gone": tasks_s,
        "status_p99_ms": beside.p99_ms("status"),
        "status_p99_before_ms": before.p99_ms("status"),
        "submit_p99_ms": beside.p99_ms("submit"),
        "submit_p99_before_ms": before.p99_ms("submit"),
    }


def main() -> None:
    """Prints the report."""
    tasks = int(sys.argv[1]) if len(sys.argv) > 1 else TASKS
    with tempfile.TemporaryDirectory() as folder, valkey(Path(folder) / "valkey", appendfsync="everysec") as server:
        environment = {
            **os.environ,
            "MOVIEQ_REDIS_URL": server.url,
            "MOVIEQ_API_KEYS": KEY,
            **UNLIMITED,
            "MOVIEQ_STORAGE": f"{folder}/media",
            "MOVIEQ_SPOOL": f"{folder}/spool",
            "MOVIEQ_LOG_LEVEL": "warning",
            "MOVIEQ_MAX_QUEUED_PER_PROJECT": "0",
            "MOVIEQ_PUBLIC_URL": "http://127.0.0.1:1",
        }
        command = [sys.executable, "-m", "movieq.cli", "api", "--port", "0"]
        api = subprocess.Popen(command, env={**environment, "MOVIEQ_PUBLIC_URL": ""}, stdout=subprocess.PIPE, text=True)
        try:
            assert api.stdout is not None
            port = int(api.stdout.readline().rpartition(":")[2])
            # nothing that ended is kept; what is submitted meanwhile waits in a queue that this worker does not serve
            short = {**environment, "MOVIEQ_KEEP_TASKS_DAYS": "0.00001", "MOVIEQ_KEEP_MEDIA_DAYS": "0.00001", "MOVIEQ_QUEUES": "gpu_heavy"}
            rows = uvloop.run(measure(server.url, port, Path(folder) / "media", short, tasks))
        finally:
            api.send_signal(signal.SIGTERM)
            api.wait(30)
    report("sweep", rows)


if __name__ == "__main__":
    main()
