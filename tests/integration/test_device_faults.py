"""A faulty device gets a new engine process, which must pass a self-test before it gets tasks; tasks and other devices are unaffected."""

from __future__ import annotations

import asyncio
from pathlib import Path

from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.tasks.entities import WorkerStatus
from movieq.tasks.states import Kind
from tests.arrange import raw
from tests.engines.test_plugins import installed
from tests.fleet import NVML, eventually, fleet, python_path
from workers.protocol import EXIT_UNFIT
from workers.supervisor import FAILURES

SICK = """
import os
from movieq.plugins import Plugin
from workers.child.animatic import engine as animatic

def render(job):
    if os.path.exists(MARK):
        if "at once" in getattr(job.params, "prompt", ""):
            os._exit(9)
        raise RuntimeError("cannot open /usr/lib/libsick.so.6: wrong magic")
    return animatic.render(job)

plugin = Plugin(engines={"animatic": "sick"})
"""
"""An animatic that fails while a file exists, as with a faulty library or device."""
SMALL = {"prompt": "a lamp", "resolution": "64x64"}


def sick(folder: Path) -> tuple[Path, str]:
    """Return the file that makes the engine fail, and the PYTHONPATH for a worker with that engine."""
    site, mark = folder / "site", folder / "mark"
    site.mkdir()
    return mark, python_path(installed(site, ("sick", SICK.replace("MARK", repr(str(mark))))))


async def row(store: Store, *, problem: bool) -> WorkerStatus:
    """Wait until a worker reports a problem, or none; return its row."""
    found: list[WorkerStatus] = []

    async def there() -> bool:
        found[:] = [each for each in await Queries(store.redis).workers() if (each.problem is not None) is problem]
        return bool(found)

    await eventually(there)
    return found[0]


async def tries(store: Store, task_id: str) -> int:
    """Return how many runs of the task count as tries."""
    return int(await raw(store).hget(KEYS["task"] + task_id, "tries") or 0)


async def test_after_three_tasks_failed_in_a_row_the_device_takes_nothing_before_it_passes_a_self_test(folder: Path) -> None:
    mark, path = sick(folder)
    mark.touch()
    async with fleet(folder / "fleet") as installation:
        api = await installation.api()
        task_ids = [await api.submit("generate_image", SMALL, project=f"p{number}") for number in range(FAILURES + 4)]
        worker = await installation.worker(PYTHONPATH=path)
        said = await row(installation.store, problem=True)
        assert said.queues == []
        await eventually(lambda: worker.times_logged("child_failed") > 1, 60)  # the self-test fails too
        # one that was to come next when the third failed is handed back uncounted
        tried = [task_id for task_id in task_ids if await tries(installation.store, task_id)]
        assert len(tried) == FAILURES
        mark.unlink()
        for task_id in task_ids:
            ended = await api.ended(task_id)
            assert ended["status"] == "completed", ended
            assert await tries(installation.store, task_id) == (1 if task_id in tried else 0)
        assert worker.times_logged("device_problem_over") == 1
        assert (await row(installation.store, problem=False)).queues
        for task_id in tried:
            for entry in await Queries(installation.store.redis).log_after(task_id, None):
                assert b"RuntimeError" not in entry.data


async def test_deaths_of_different_tasks_are_such_failures_too(folder: Path) -> None:
    mark, path = sick(folder)
    mark.touch()
    async with fleet(folder / "fleet") as installation:
        api, worker = await asyncio.gather(installation.api(), installation.worker(PYTHONPATH=path))
        task_ids = [
            await api.submit("generate_image", {**SMALL, "prompt": "at once"}, project=f"p{number}") for number in range(FAILURES + 2)
        ]
        await eventually(lambda: worker.times_logged("device_problem") == 1)
        mark.unlink()
        for task_id in task_ids:
            assert (await api.ended(task_id))["status"] == "completed"


async def test_one_task_that_fails_three_times_does_not_make_its_device_suspect(folder: Path) -> None:
    mark, path = sick(folder)
    mark.touch()
    async with fleet(folder / "fleet") as installation:
        api, worker = await asyncio.gather(installation.api(), installation.worker(PYTHONPATH=path))
        ended = await api.ended(await api.submit("generate_image", SMALL))
        assert (ended["status"], ended["error"]) == ("failed", "the animatic engine failed: cannot open libsick.so.6: wrong magic")
        assert worker.times_logged("device_problem") == 0


UNFIT = f"""
import os, sys
if "workers.child" in sys.orig_argv and sys.orig_argv[-1] == "cuda":
    print("no such device", file=sys.stderr, flush=True)
    os._exit({EXIT_UNFIT})
"""


async def test_an_unfit_gpu_stops_neither_the_cpu_nor_the_worker_which_says_so(folder: Path) -> None:
    library = folder / "library"
    library.mkdir()
    (library / "pynvml.py").write_text(NVML)
    (library / "sitecustomize.py").write_text(UNFIT)
    async with fleet(folder / "fleet") as installation:
        api, worker = await asyncio.gather(installation.api(), installation.worker(PYTHONPATH=python_path(library)))
        gpu = await row(installation.store, problem=True)
        assert (gpu.device, gpu.queues, gpu.problem) == ("cuda:0", [], "its engine cannot work on it")
        assert (await row(installation.store, problem=False)).queues == [Kind.CPU_INTENSIVE]
        assert (await api.ended(await api.submit("generate_image", {**SMALL, "model": "animatic"})))["status"] == "completed"
        assert worker.alive
        _, health = await api.call("GET", "/tasks/health")
        assert [alert["message"] for alert in health["alerts"] if alert["code"] == "worker_problem"]
