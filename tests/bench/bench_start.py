"""From the first byte of a submit to the `started` event on Redis's pub/sub, on an idle worker. Aim: p50 2 ms, p99 10 ms.

The whole service runs: API, worker and its child; each task is a small picture, and the next is submitted when the one before has ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import uvloop

from movieq.local.embedded import valkey
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from tests.bench import load
from tests.bench.report import percentile, report
from tests.service import UNLIMITED

KEY = "bench-key-0123456789"
TASKS, WARM_UP = 300, 20
BODY = msgspec.json.encode(
    {"project_id": "bench", "task_type": "generate_image", "task_data": {"prompt": "a lamp", "resolution": "64x64"}},
)


async def measure(redis_url: str, url: str) -> list[float]:
    """Seconds from submit to start, of each task."""
    redis = connect(redis_url, patient=True)
    found = []
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    request = load.post("/api/v1/tasks/submit", BODY, {"X-API-Key": KEY})
    async with redis.pubsub() as pubsub:
        await pubsub.psubscribe(KEYS["events"] + "*")
        await pubsub.get_message(timeout=5)
        for _ in range(WARM_UP + TASKS):
            begun = time.perf_counter()
            writer.write(request)
            async with asyncio.timeout(30):
                while True:
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=30)
                    kind = message["data"].split(b"\n")[1]
                    if kind == b"started":
                        found.append(time.perf_counter() - begun)
                    elif kind in (b"completed", b"failed"):
                        break
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 201"), head
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            await asyncio.sleep(0.01)  # so that the worker is idle again
    writer.close()
    await redis.aclose()
    await redis.connection_pool.disconnect()
    return found[WARM_UP:]


def main() -> None:
    """Prints the percentiles."""
    with tempfile.TemporaryDirectory() as folder, valkey(Path(folder) / "valkey", appendfsync="everysec") as server:
        environment = {
            **os.environ,
            "MOVIEQ_REDIS_URL": server.url,
            "MOVIEQ_API_KEYS": KEY,
            **UNLIMITED,
            "MOVIEQ_STORAGE": f"{folder}/media",
            "MOVIEQ_LOG_LEVEL": "warning",
        }
        command = [sys.executable, "-m", "movieq.cli", "up", "--port", "0", "--data", folder]
        up = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert up.stdout is not None
            ready = up.stdout.readline()
            latencies = uvloop.run(measure(server.url, ready.split()[-1]))
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(60)
    report(
        "start",
        {
            "tasks": len(latencies),
            "submit_to_start_p50_ms": percentile(latencies, 0.5) * 1000,
            "submit_to_start_p99_ms": percentile(latencies, 0.99) * 1000,
            "submit_to_start_max_ms": max(latencies) * 1000,
        },
    )


if __name__ == "__main__":
    main()
