"""Schemathesis sends what /openapi.json allows and what it forbids to a running API: every answer is one that the document allows."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arrange import new_task, running
from tests.arrange import result as result_of
from tests.fleet import KEY, Fleet, fleet

HERE = Path(__file__).parent


async def tasks(installation: Fleet) -> list[str]:
    """Return tasks in several states: completed, failed, cancelled, queued."""
    store = installation.store
    completed, run = await running(store)
    await store.complete(completed, run, result_of())
    failed, run = await running(store)
    await store.fail(failed, run, "it broke", "internal")
    cancelled, queued = [(await store.submit(new_task())).task_id for _ in range(2)]
    await store.cancel(cancelled)
    return [completed, failed, cancelled, queued]


async def found(folder: Path, cases: int, *options: str) -> str:
    """Return what schemathesis prints about an API of its own. It must find nothing."""
    async with fleet(folder / "fleet") as installation:
        api = await installation.api(MOVIEQ_MAX_QUEUED_PER_PROJECT="100000")
        environment = {
            **os.environ,
            "SCHEMATHESIS_HOOKS": "tests.openapi.hooks",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "TASKS": ",".join(await tasks(installation)),
        }
        command: list[str | Path] = [Path(sys.executable).with_name("st"), "--config-file", HERE / "schemathesis.toml", "run"]
        command += [f"{api.url}/openapi.json", "--header", f"X-API-Key: {KEY}", "--seed", "1"]
        command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]  # hooks.py has that check
        command += ["--max-examples", str(cases), "--continue-on-failure", "--request-timeout", "60"]
        command += ["--warnings", "off", "--no-color", *options]
        done = await asyncio.to_thread(subprocess.run, command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def count(said: str) -> int:
    """Return how many requests schemathesis has sent."""
    (number,) = re.findall(r"(\d+) generated", said)
    return int(number)


async def test_no_request_gets_an_answer_that_the_document_does_not_allow(folder: Path) -> None:
    assert count(await found(folder, 12, "--phases", "examples,coverage,fuzzing")) > 500


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_no_request_of_thousands_gets_an_answer_that_the_document_does_not_allow(folder: Path) -> None:
    assert count(await found(folder, 320, "--phases", "fuzzing")) > 5000
