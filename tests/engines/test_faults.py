"""All that an engine can do to its process, done by a plug-in: each costs one try and a restart, and the worker goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.test_plugins import installed
from tests.fleet import eventually, python_path
from tests.service import Service, service
from workers.protocol import EXIT_BROKEN

ENGINE = """
import re
from pathlib import Path
from PIL import Image
from movieq.tasks.params import Params
from movieq.plugins import Plugin
from movieq.tasks.registry import TaskSpec
from workers.child.job import Output
from workers.protocol import Produced, Stage

class FaultParams(Params, frozen=True, kw_only=True):
    fault: str
    once: str

    @property
    def description(self):
        return self.fault

def render(job):
    job.plan(Stage("work", "working", 1.0))
    job.begin("work")
    mark = Path(job.params.once)
    if not mark.exists():
        mark.touch()
        if job.params.fault == "finish":
            return lambda: finish(job)
        if job.params.fault == "unsendable":
            return Output((), {"model": object()})
        if job.params.fault == "unwritten":
            return Output((Produced(str(job.out_dir / "output.png"), "output", "image/png", 64, 64),), {})
        if job.params.fault == "hang":
            re.match(r"(a|a)+b", "a" * 64)  # for ever, and it holds the GIL
        if job.params.fault == "cuda":
            try:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            except RuntimeError as error:
                raise ValueError("the denoiser failed") from error
    Image.new("RGB", (64, 64)).save(path := job.out_dir / "output.png")
    return Output((Produced(str(path), "output", "image/png", 64, 64),), {})

def finish(job):
    raise ValueError("a tag cannot be written")

plugin = Plugin(
    task_types={"fault": TaskSpec(params=FaultParams)},
    engines={"faults": "faults"},
    models={"faults": {"engine": "faults", "kind": "cpu_intensive", "tasks": {"fault": 1}}},
)
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service with that engine; it kills an engine process that reports no progress for three seconds."""
    folder = tmp_path_factory.mktemp("faults")
    site = folder / "site"
    site.mkdir()
    with service(folder, PYTHONPATH=python_path(installed(site, ("faults", ENGINE))), MOVIEQ_STEP_TIMEOUT_S="3") as started:
        yield started


def exit_codes(running: Service) -> list[int]:
    """Return the exit codes of the engine processes that have ended."""
    return [line["exit_code"] for line in running.log if line.get("message") == "child_ended"]


async def test_a_model_that_hangs_is_killed_after_the_step_timeout_and_tried_again(running: Service, folder: Path) -> None:
    ended = await running.ended(await running.submit("fault", {"fault": "hang", "once": str(folder / "once")}))
    assert (ended["status"], ended["attempt"]) == ("completed", 2), ended
    assert -9 in exit_codes(running)


async def test_a_model_that_hangs_and_is_cancelled_is_killed_after_the_grace(running: Service, folder: Path) -> None:
    task_id = await running.submit("fault", {"fault": "hang", "once": str(folder / "once")})
    await running.until(task_id, "stage", "work")
    before = len(exit_codes(running))
    assert (await running.call("DELETE", f"/tasks/{task_id}/cancel"))[0] == 200
    await eventually(lambda: len(exit_codes(running)) > before, 60)
    assert exit_codes(running)[-1] == -9
    ended = await running.ended(await running.submit("fault", {"fault": "none", "once": str(folder / "once")}))
    assert (ended["status"], ended["attempt"]) == ("completed", 1)


async def test_an_engine_process_with_a_broken_device_ends_by_itself_and_the_next_one_renders(running: Service, folder: Path) -> None:
    ended = await running.ended(await running.submit("fault", {"fault": "cuda", "once": str(folder / "once")}))
    assert (ended["status"], ended["attempt"]) == ("completed", 2), ended
    assert EXIT_BROKEN in exit_codes(running)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("finish", "the faults engine failed: a tag cannot be written"),
        ("unsendable", "the engine answered with something that cannot be passed on"),
        ("unwritten", "the engine names a file that it has not written"),
    ],
)
async def test_a_fault_after_the_rendering_does_not_repeat_the_rendering(running: Service, folder: Path, fault: str, error: str) -> None:
    ended = await running.ended(await running.submit("fault", {"fault": fault, "once": str(folder / "once")}))
    assert (ended["status"], ended["error_code"], ended["attempt"]) == ("failed", "internal", 1), ended
    assert error in ended["error"]


async def test_a_field_that_a_plug_in_needs_is_named_where_it_is_missing(running: Service) -> None:
    body = {"project_id": "film", "task_type": "fault", "task_data": {"fault": "none"}}
    status, answer = await running.call("POST", "/tasks/submit", json=body)
    assert (status, answer["errors"]) == (400, [{"path": "task_data.once", "message": "missing; expected text"}])
