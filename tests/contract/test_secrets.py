"""The API as a process: it ends in order on SIGTERM, and neither its log nor its output contains a key or a signature."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from movieq.local.embedded import Valkey
from movieq.queue.store import Store
from tests.contract.client import ALL, BODY, FILM


class Process:
    """A running `movieq api`."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log


@pytest.fixture(params=["json", "console"])
def process(server: Valkey, store: Store, folder: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    """Run the API alone, at log level debug."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")} | {
        "MOVIEQ_REDIS_URL": server.url,
        "MOVIEQ_API_KEYS": f"{ALL},{FILM}=film",
        "MOVIEQ_STORAGE": str(folder / "media"),
        "MOVIEQ_LOG_LEVEL": "debug",
        "MOVIEQ_LOG_FORMAT": request.param,
    }
    log = folder / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            [sys.executable, "-m", "movieq.cli", "api", "--port", "0"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
        ) as started,
    ):
        assert started.stdout is not None
        try:
            line = started.stdout.readline()
            assert line.startswith("movieq ready at "), log.read_text()
            yield Process(started, line.removeprefix("movieq ready at ").strip(), log)
        finally:
            started.kill()


async def test_on_sigterm_streams_end_with_goodbye_and_nothing_secret_was_said(process: Process) -> None:
    async with aiohttp.ClientSession(process.url, timeout=aiohttp.ClientTimeout(total=20)) as session:
        key = {"X-API-Key": ALL}
        async with session.post(
            "/api/v1/tasks/submit", json={**BODY, "callback_url": "https://a.example/?token=geheim"}, headers=key
        ) as answer:
            receipt = await answer.json()
        for refused in ({"X-API-Key": "wrong-but-secret-too"}, {"Authorization": f"Bearer {FILM}x"}):
            async with session.get("/api/v1/workers/status", headers=refused) as answer:
                assert answer.status == 401
        async with session.get(receipt["events_url"].replace("signature=", "signature=x")) as answer:
            assert answer.status == 403
        async with session.get(receipt["events_url"]) as stream:
            await stream.content.readuntil(b"event: snapshot")
            process.process.send_signal(signal.SIGTERM)
            rest = await stream.content.read()
    assert b"event: goodbye" in rest
    assert await asyncio.to_thread(process.process.wait, 10) in (0, -signal.SIGTERM)  # uvicorn ends in order, and then by the signal
    signature = re.findall(r"signature=([\w-]+)", receipt["events_url"])[0]
    said = process.log.read_text()
    assert receipt["task_id"] in said
    assert [secret for secret in (ALL, FILM, "wrong-but-secret", "geheim", signature) if secret in said] == []


@pytest.mark.parametrize("log_format", ["CONSOLE", "JSON"])
def test_a_traceback_shows_no_values(log_format: str) -> None:
    script = f"""
from movieq import logs
from movieq.settings import LogFormat, LogLevel
logs.configure(LogLevel.DEBUG, LogFormat.{log_format})
def fault(key):
    raise RuntimeError("it broke")
try:
    fault("geh" + "eim")
except RuntimeError:
    logs.get().exception("broke")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "it broke" in done.stderr
    assert "geheim" not in done.stdout + done.stderr
