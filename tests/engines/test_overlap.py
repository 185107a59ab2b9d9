"""A device does not wait: the next task is ready when it becomes free, and work without the device runs beside the next task."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from tests.engines.test_plugins import installed
from tests.engines.test_served import body
from tests.fleet import eventually, python_path
from tests.service import Service, service, serving
from workers.slots import LENT_MOST

ENGINE = '''
import time
from pathlib import Path
from PIL import Image
from movieq.plugins import Plugin
from movieq.tasks.registry import TaskSpec
from movieq.tasks.params import Params
from workers.child.job import Output
from workers.protocol import Produced, Stage

class GatedParams(Params, frozen=True, kw_only=True):
    work: str | None = None
    rest: str | None = None
    image: str | None = None

    @property
    def description(self):
        return "gated"

    @property
    def references(self):
        return [self.image] if self.image else []

def render(job):
    """Work on the device until the file `work` exists, then without it until the file `rest` exists."""
    job.plan(Stage("work", "working", 1.0), Stage("rest", "resting", 0.001))
    wait_for(job, "work", job.params.work)
    return lambda: finish(job)

def wait_for(job, stage, file):
    job.begin(stage)
    while file and not Path(file).exists():
        job.step(stage, 999, 1000)  # nearly done: the next task may be claimed ahead
        time.sleep(0.02)
    job.step(stage, 1, 1)

def finish(job):
    wait_for(job, "rest", job.params.rest)
    Image.new("RGB", (64, 64)).save(path := job.out_dir / "output.png")
    return Output((Produced(str(path), "output", "image/png", 64, 64),), {})

plugin = Plugin(
    task_types={"gated": TaskSpec(params=GatedParams)},
    engines={"gated": "gated"},
    models={"gated": {"engine": "gated", "kind": "cpu_intensive", "tasks": {"gated": 1}}},
)
'''


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service with that engine, whose tasks are estimated to take a second."""
    folder = tmp_path_factory.mktemp("gated")
    site = folder / "site"
    site.mkdir()
    path = python_path(installed(site, ("gated", ENGINE)))
    with service(folder, PYTHONPATH=path, MOVIEQ_ALLOW_PRIVATE_URLS="127.0.0.0/8") as started:
        yield started


@pytest.fixture
def gate(folder: Path) -> Iterator[Path]:
    """Yield a file for which tasks wait; at the end of the test it is created, so that no task waits on."""
    yield folder / "gate"
    (folder / "gate").touch()


async def claimed_ahead(running: Service, task_id: str) -> None:
    """Wait until the task is claimed."""

    async def processing() -> bool:
        _, status = await running.call("GET", f"/tasks/{task_id}/status")
        return bool(status["status"] == "processing")

    await eventually(processing, 60)


async def test_the_next_task_has_the_device_while_the_one_before_is_finished(running: Service, gate: Path) -> None:
    first = await running.submit("gated", {"rest": str(gate)})
    second = await running.submit("gated", {"work": str(gate)})
    await running.until(first, "stage", "rest")
    await running.until(second, "stage", "work")
    _, status = await running.call("GET", f"/tasks/{first}/status")
    assert status["status"] == "processing"
    gate.touch()
    for each in (first, second):
        assert (await running.ended(each))["status"] == "completed"


async def test_the_inputs_of_the_next_task_are_fetched_while_the_device_is_busy(running: Service, gate: Path) -> None:
    asked = asyncio.Event()
    still = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(still, "PNG")

    async def image(request: web.Request) -> web.Response:
        asked.set()
        return web.Response(body=still.getvalue(), content_type="image/png")

    async with serving({"/still.png": image}) as url:
        first = await running.submit("gated", {"work": str(gate)})
        await running.until(first, "stage", "work")
        second = await running.submit("gated", {"image": f"{url}/still.png"})
        async with asyncio.timeout(60):
            await asked.wait()
        _, status = await running.call("GET", f"/tasks/{first}/status")
        assert status["status"] == "processing"
        gate.touch()
        for each in (first, second):
            assert (await running.ended(each))["status"] == "completed"


class Slow:
    """A server of a picture, which answers once `gate` exists. It counts who asks."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate
        self.asked = 0

    async def image(self, request: web.Request) -> web.Response:
        self.asked += 1
        await eventually(self.gate.exists, 60)
        still = io.BytesIO()
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(still, "PNG")
        return web.Response(body=still.getvalue(), content_type="image/png")


async def test_a_task_whose_inputs_are_slow_does_not_hold_the_device(running: Service, gate: Path) -> None:
    slow = Slow(gate)
    async with serving({"/still.png": slow.image}) as url:
        waiting = [await running.submit("gated", {"image": f"{url}/still.png?{number}"}) for number in range(3)]
        await eventually(lambda: slow.asked > 0, 60)
        other = await running.submit("gated", {}, project="other")
        ended = await running.ended(other)
        assert (ended["status"], ended["attempt"]) == ("completed", 1)
        _, status = await running.call("GET", f"/tasks/{waiting[0]}/status")
        assert (status["status"], status["current_step"]) == ("processing", "fetching_inputs")
        gate.touch()
        assert [(await running.ended(each))["status"] for each in waiting] == ["completed"] * 3


async def test_a_task_that_fetches_without_its_slot_can_be_cancelled(running: Service, gate: Path) -> None:
    slow = Slow(gate)
    async with serving({"/still.png": slow.image}) as url:
        waiting = await running.submit("gated", {"image": f"{url}/still.png"})
        await eventually(lambda: slow.asked > 0, 60)
        assert (await running.ended(await running.submit("gated", {})))["status"] == "completed", "the slot was lent"
        assert (await running.call("DELETE", f"/tasks/{waiting}/cancel"))[0] == 200
        assert (await running.ended(waiting))["status"] == "cancelled"
        gate.touch()


@pytest.mark.slow  # four inputs must be asked for before the first has waited for 30 s, the limit of a fetch
async def test_a_worker_claims_only_a_few_tasks_whose_inputs_are_slow(running: Service, gate: Path) -> None:
    slow = Slow(gate)
    async with serving({"/still.png": slow.image}) as url:
        waiting = [await running.submit("gated", {"image": f"{url}/still.png?{number}"}) for number in range(LENT_MOST + 3)]
        await eventually(lambda: slow.asked == LENT_MOST + 1, 60)
        _, queues = await running.call("GET", "/queues")
        (queue,) = [each for each in queues["queues"] if each["queue_name"] == "cpu_intensive"]
        assert (queue["running"], queue["pending_count"]) == (LENT_MOST + 1, 2)
        gate.touch()
        for each in waiting:
            assert (await running.ended(each))["status"] == "completed"


async def test_the_status_of_a_worker_has_the_time_that_its_device_waits_between_two_tasks(running: Service, gate: Path) -> None:
    first = await running.submit("gated", {"work": str(gate)})
    second = await running.submit("gated", {})
    await claimed_ahead(running, second)
    gate.touch()
    for each in (first, second):
        assert (await running.ended(each))["status"] == "completed"

    async def known() -> bool:
        _, answer = await running.call("GET", "/workers/status")
        gap = answer["workers"][0]["idle_gap"]
        return gap is not None and gap >= 0

    await eventually(known, 60)


async def test_cancelling_a_task_that_is_being_finished_leaves_the_next_one_alone(running: Service, gate: Path, folder: Path) -> None:
    first = await running.submit("gated", {"rest": str(folder / "never")})
    second = await running.submit("gated", {"work": str(gate)})
    await running.until(first, "stage", "rest")
    await running.until(second, "stage", "work")
    (child,) = running.find("workers.child")
    assert (await running.call("DELETE", f"/tasks/{first}/cancel"))[0] == 200
    gate.touch()
    ended = await running.ended(second)
    assert (ended["status"], ended["attempt"]) == ("completed", 1)
    assert [each.pid for each in running.find("workers.child")] == [child.pid]


@pytest.mark.slow
async def test_a_task_that_waits_longer_than_estimated_is_requeued(running: Service, gate: Path) -> None:
    first = await running.submit("gated", {"work": str(gate)})
    second = await running.submit("gated", {})
    await running.until(second, "event", "retrying", 120)
    gate.touch()
    assert (await running.ended(first))["status"] == "completed"
    ended = await running.ended(second)
    assert (ended["status"], ended["attempt"]) == ("completed", 2), "claimed again when the device was free"


async def test_waiting_pictures_are_rendered_in_one_batch(tmp_path_factory: pytest.TempPathFactory, folders: Any) -> None:
    folder = tmp_path_factory.mktemp("batched")
    (folder / "models.toml").write_text(
        f"""
        [tiny]
        engine = "diffusers"
        kind = "cpu_intensive"
        tasks = {{ generate_image = 1 }}
        weights = {{ repository = "{folders("flux")}" }}
        pipeline = "FluxPipeline"
        defaults = {{ steps = 4 }}
        limits = {{ sides = 16, pixels = [1, 4096], batch = [[4096, 4]] }}
        """
    )
    with service(folder, MOVIEQ_MODELS=str(folder / "models.toml")) as running:
        task = {"resolution": "64x64", "format": "png", "model": "tiny"}
        alone = [await running.ended(await running.submit("generate_image", {**task, "prompt": f"lamp {n}", "seed": n})) for n in range(4)]
        blocker = await running.submit("generate_image", {**task, "prompt": "a lighthouse", "steps": 150, "resolution": "512x512"})
        await running.until(blocker, "stage", "denoise")
        ids = [await running.submit("generate_image", {**task, "prompt": f"lamp {n}", "seed": n}) for n in range(4)]
        together = [await running.ended(task_id) for task_id in ids]
        pictures = [[await picture(each) for each in found] for found in (alone, together)]
    assert [each["status"] for each in together] == ["completed"] * 4
    assert max(each["result"]["metadata"]["batch_size"] for each in together) > 1
    assert {each["result"]["metadata"]["batch_size"] for each in alone} == {1}
    for one, many in zip(*pictures, strict=True):
        assert np.abs(one - many).mean() < 1


async def test_a_worker_learns_how_many_pictures_its_memory_has_room_for(tmp_path_factory: pytest.TempPathFactory, folders: Any) -> None:
    folder = tmp_path_factory.mktemp("learns")
    (folder / "library").mkdir()
    (folder / "library" / "sitecustomize.py").write_text(  # a decoder with memory for two
        """
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

class Small(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "diffusers.models.unets.unet_2d_condition":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module
        def loaded(module):
            load(module)
            import torch
            forward = module.UNet2DConditionModel.forward
            def small(self, latents, *args, **options):
                if len(latents) > 4:  # guidance doubles them
                    raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
                return forward(self, latents, *args, **options)
            module.UNet2DConditionModel.forward = small
        spec.loader.exec_module = loaded
        return spec

sys.meta_path.insert(0, Small())
"""
    )
    (folder / "models.toml").write_text(
        f"""
        [tiny]
        engine = "diffusers"
        kind = "cpu_intensive"
        tasks = {{ generate_image = 1 }}
        weights = {{ repository = "{folders("sd")}" }}
        pipeline = "StableDiffusionPipeline"
        defaults = {{ steps = 2 }}
        limits = {{ sides = 8, pixels = [1, 4096], batch = [[4096, 4]] }}
        """
    )
    with service(folder, MOVIEQ_MODELS=str(folder / "models.toml"), PYTHONPATH=python_path(folder / "library")) as running:
        task = {"resolution": "64x64", "model": "tiny", "prompt": "a lamp"}
        sizes = []
        for _ in range(2):
            blocker = await running.submit("generate_image", {**task, "steps": 150})
            await running.until(blocker, "stage", "denoise")
            ids = [await running.submit("generate_image", task) for _ in range(4)]
            ended = [await running.ended(task_id) for task_id in ids]
            assert [each["status"] for each in ended] == ["completed"] * 4, ended
            sizes.append([each["result"]["metadata"].get("warnings") for each in ended])
            assert {each["result"]["metadata"]["batch_size"] for each in ended} == {2}
    assert sizes[0] == [["out of memory: the batch was halved"]] * 4
    assert sizes[1] == [None] * 4, "the second time no batch is larger than two"


async def picture(ended: dict[str, Any]) -> Any:
    """Return the pixels of a result."""
    return np.asarray(Image.open(io.BytesIO(await body(ended["result"]["media_url"]))), np.int16)
