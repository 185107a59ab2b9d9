"""What leaving costs: files to a bucket and back, beside plain aiobotocore and `aws s3 cp`; and the engine, while uploads are slow.

Aims: not slower than either; a file of 2 GB in less than 200 MB of memory; no engine that waits for an upload. The three take turns on one
SeaweedFS on loopback, with a file in the page cache: what differs is the client. `aws` starts a process for each copy; the time that it
takes for a file of one byte is taken off. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from movieq.queue.queries import Queries
from movieq.settings import Bucket
from movieq.storage import s3
from movieq.tasks.states import TaskId
from tests.bench import environments
from tests.bench.report import report
from tests.fleet import fleet
from tests.integration.test_s3 import PUT_2_GB
from tests.r2 import put, r2
from tests.seaweed import KEY_ID, SECRET, Seaweed, seaweed

AWSCLI: Final = ("awscli==1.46.3",)
"""In an environment of its own: it wants another botocore than aiobotocore."""
ROUNDS: Final = 7
BYTES: Final = 256 * 1000**2
CLIPS: Final = 16
SLOW_S: Final = 1.0

Copy = Callable[[str, Path], Awaitable[object]]


async def transfers(server: Seaweed, folder: Path) -> dict[str, float]:
    """MB/s of each client, there and back."""
    source, back = folder / "source", folder / "back"
    source.write_bytes(os.urandom(BYTES // 8) * 8)
    async with s3.opened(Bucket("film", "", server.endpoint, KEY_ID, SECRET), patient=True) as ours, server.client() as plain:
        copies: dict[str, tuple[Copy, Copy]] = {
            "movieq": (lambda key, path: ours.put(key, path, "video/mp4"), ours.open),
            "aiobotocore": _plain(plain),
            "aws s3 cp": _aws(server),
        }
        start_s = await _start_of_aws(copies["aws s3 cp"], folder)
        seconds: dict[str, list[float]] = {}
        for number in range(ROUNDS):
            for name, (up, down) in copies.items():
                for way, copy, path in (("up", up, source), ("down", down, back)):
                    begun = time.perf_counter()
                    await copy(f"{number}/{name.replace(' ', '-')}.mp4", path)
                    took = time.perf_counter() - begun - (start_s if name == "aws s3 cp" else 0)
                    seconds.setdefault(f"{name}, {way}, MB/s", []).append(took)
                assert back.stat().st_size == BYTES
                if number == 0:
                    assert back.read_bytes() == source.read_bytes()
    return {name: BYTES / 1e6 / statistics.median(took) for name, took in seconds.items()} | {"start of aws, s": start_s}


def _plain(client: Any) -> tuple[Copy, Copy]:
    """aiobotocore as its documentation shows it."""

    async def up(key: str, path: Path) -> None:
        with path.open("rb") as file:
            await client.put_object(Bucket="film", Key=key, Body=file)

    async def down(key: str, path: Path) -> None:
        answer = await client.get_object(Bucket="film", Key=key)
        with path.open("wb") as file:
            async for chunk in answer["Body"].iter_chunks(1024**2):
                file.write(chunk)

    return up, down


def _aws(server: Seaweed) -> tuple[Copy, Copy]:
    command = [environments.python("awscli"), "-m", "awscli", "--endpoint-url", server.endpoint, "s3", "cp", "--quiet"]
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(server.folder), "AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip

    async def run(*places: str) -> None:
        process = await asyncio.create_subprocess_exec(*command, *places, env=environment)
        assert await process.wait() == 0

    return lambda key, path: run(str(path), f"s3://film/{key}"), lambda key, path: run(f"s3://film/{key}", str(path))


async def _start_of_aws(copies: tuple[Copy, Copy], folder: Path) -> float:
    (folder / "byte").write_bytes(b"x")
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        await copies[0]("byte", folder / "byte")
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def memory(server: Seaweed, folder: Path) -> dict[str, float]:
    """The most that a process had while a file of 2 GB went there and back, in MB."""
    source = folder / "big"
    with source.open("wb") as file:
        os.truncate(file.fileno(), 2 * 1024**3)
    done = subprocess.run(
        [sys.executable, "-c", PUT_2_GB, "film", "", server.endpoint, KEY_ID, SECRET, str(source)],
        capture_output=True,
        text=True,
        check=True,
    )
    return {"memory for 2 GB there and back, MB": int(done.stdout) / 1000}


async def overlap(server: Seaweed, folder: Path) -> dict[str, float]:
    """How much longer the engine needs for a row of pictures where every upload takes a second, for each picture."""
    async with r2(server.endpoint) as far, fleet(folder / "fleet") as installation:
        settings: dict[str, Any] = {
            "MOVIEQ_STORAGE": "s3://film/overlap", "MOVIEQ_R2_ENDPOINT": far.endpoint, "MOVIEQ_R2_ACCESS_KEY_ID": KEY_ID,
            "MOVIEQ_R2_SECRET_ACCESS_KEY": SECRET,
        }  # fmt: skip
        api = await installation.api(**settings)
        await installation.worker(**settings)
        rows: dict[str, list[float]] = {"fast": [], "slow": []}
        for number in range(2 * 3 + 2):  # the first two are not counted
            name = ("fast", "slow")[number % 2]
            far.heal()
            if name == "slow":
                far.slow(put, SLOW_S, times=1000)
            ids = [
                TaskId(await api.submit("generate_image", {"prompt": "a lamp", "resolution": "1024x1024", "seed": each, "no_cache": True}))
                for each in range(CLIPS)
            ]
            for task_id in ids:
                assert (await api.ended(task_id))["attempt"] == 1
            logs = [
                [msgspec.json.decode(entry.data) for entry in await Queries(installation.store.redis).log_after(task_id, None)]
                for task_id in ids
            ]
            begun = min(_at(event) for log in logs for event in log if event["type"] == "started")
            rendered = max(_at(event) for log in logs for event in log if event["stage"] == "upload" and event["type"] == "progress")
            if number > 1:
                rows[name].append((rendered - begun) / CLIPS)
    fast, slow = (statistics.median(rows[name]) * 1000 for name in ("fast", "slow"))
    return {
        "engine, ms a picture, storage at once": fast,
        f"the same, {SLOW_S:g} s an upload": slow,
        "engine idle by uploads, ms a picture": slow - fast,
    }


def _at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def main() -> None:
    """Everything, on one server."""
    environments.make("awscli", AWSCLI)
    with tempfile.TemporaryDirectory(prefix="movieq-bench-") as name, seaweed(Path(name) / "seaweed") as server:
        folder = Path(name)
        asyncio.run(server.make_bucket("film"))
        rows = {
            **asyncio.run(transfers(server, folder)),
            **memory(server, folder),
            **asyncio.run(overlap(server, folder)),
        }
    report("deliver", rows)


if __name__ == "__main__":
    main()
