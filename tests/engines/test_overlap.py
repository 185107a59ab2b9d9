"""A device has no time to lose: the next task is there when it is free, and what needs it no more is done beside the next."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from tests.engines.test_plugins import installed
from tests.engines.test_served import body
from tests.fleet import python_path
from tests.service import Service, service, serving

ENGINE = '''
import time
from PIL import Image
from movieq.tasks.params import Params
from movieq.plugins import Plugin
from movieq.tasks.registry import TaskSpec
from workers.child.job import Made
from workers.protocol import Produced, Stage

class TimedParams(Params, frozen=True, kw_only=True):
    work: float = 0.0
    rest: float = 0.0
    image: str | None = None

    @property
    def description(self):
        return "timed"

    @property
    def references(self):
        return [self.image] if self.image else []

def make(take):
    """Works for a while on its device, and for a while without it."""
    take.plan(Stage("work", "working", 1.0), Stage("rest", "resting", 1.0))
    for name in ("work", "rest"):
        if name == "rest":
            return lambda: spend(take, "rest", take.params.rest)
        spend(take, name, take.params.work)

def spend(take, stage, seconds):
    steps = max(1, round(seconds / 0.05))
    take.begin(stage)
    for step in range(steps):
        time.sleep(seconds / steps)
        take.step(stage, step + 1, steps)
    if stage == "rest":
        Image.new("RGB", (64, 64)).save(path := take.out_dir / "output.png")
        return Made((Produced(str(path), "output", "image/png", 64, 64),), {})

plugin = Plugin(
    task_types={"timed": TaskSpec(params=TimedParams)},
    engines={"timed": "timed"},
    models={"timed": {"engine": "timed", "kind": "cpu_intensive", "tasks": {"timed": 1}}},
)
'''


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with that engine, whose tasks are said to take a second."""
    folder = tmp_path_factory.mktemp("timed")
    site = folder / "site"
    site.mkdir()
    path = python_path(installed(site, ("timed", ENGINE)))
    with service(folder, PYTHONPATH=path, MOVIEQ_ALLOW_PRIVATE_URLS="127.0.0.0/8") as made:
        yield made


async def followed(running: Service, task_id: str) -> list[tuple[str, str | None, datetime]]:
    """Every event of a task, to its end: what, at which stage, when."""
    async with running.events(task_id) as events:
        return [
            (event["event"], event["stage"], datetime.fromisoformat(event["time"]))
            async for event in events
            if event["event"] != "snapshot"
        ]


def when(events: list[tuple[str, str | None, datetime]], name: str, stage: str | None = None) -> datetime:
    """Of the first such event."""
    return next(at for event, here, at in events if event == name and (stage is None or here == stage))


async def test_the_next_task_has_the_device_while_the_one_before_is_finished(running: Service) -> None:
    ids = [await running.submit("timed", {"work": 0.5, "rest": 2.0}) for _ in range(2)]
    first, second = await asyncio.gather(*(followed(running, each) for each in ids))
    assert when(second, "progress", "work") < when(first, "completed")
    assert when(first, "completed") < when(second, "completed")


async def test_the_inputs_of_the_next_task_are_fetched_while_the_device_is_busy(running: Service) -> None:
    asked = asyncio.Event()
    still = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(still, "PNG")

    async def image(request: web.Request) -> web.Response:
        asked.set()
        return web.Response(body=still.getvalue(), content_type="image/png")

    async with serving({"/still.png": image}) as url:
        first = await running.submit("timed", {"work": 1.8})
        await running.until(first, "stage", "work")
        second = await running.submit("timed", {"image": f"{url}/still.png"})
        async with asyncio.timeout(20):
            await asked.wait()
        _, status = await running.call("GET", f"/tasks/{first}/status")
        assert status["status"] == "processing"
        for each in (first, second):
            assert (await running.ended(each))["status"] == "completed"


async def test_the_status_of_a_worker_says_how_long_its_device_waits_between_two_tasks(running: Service) -> None:
    for task_id in [await running.submit("timed", {"work": 0.3}) for _ in range(6)]:
        assert (await running.ended(task_id))["status"] == "completed"
    async with asyncio.timeout(15):
        while True:
            _, answer = await running.call("GET", "/workers/status")
            if (gap := answer["workers"][0]["idle_gap"]) is not None:
                break
            await asyncio.sleep(0.5)
    assert 0 <= gap < 0.3, "a fetch, a claim and a spool would take longer on a busy machine than two pipes"


async def test_a_task_that_is_cancelled_while_it_is_finished_leaves_the_one_on_the_device_alone(running: Service) -> None:
    first = await running.submit("timed", {"work": 0.1, "rest": 20.0})
    second = await running.submit("timed", {"work": 1.5})
    await running.until(second, "stage", "work")
    (child,) = running.find("workers.child")
    assert (await running.call("DELETE", f"/tasks/{first}/cancel"))[0] == 200
    ended = await running.ended(second)
    assert (ended["status"], ended["attempt"]) == ("completed", 1)
    assert [each.pid for each in running.find("workers.child")] == [child.pid]


@pytest.mark.slow
async def test_a_task_that_waits_for_longer_than_it_was_claimed_for_is_given_back(running: Service) -> None:
    first = await running.submit("timed", {"work": 22.0})
    second = await running.submit("timed", {"work": 0.1})
    events, _ = await asyncio.gather(followed(running, second), running.ended(first))
    names = [name for name, _, _ in events]
    assert names.count("retrying") == 1, names
    ended = await running.ended(second)
    assert (ended["status"], ended["attempt"]) == ("completed", 2), "claimed anew when the device was free"


async def test_pictures_that_wait_are_made_together_and_each_gets_its_own(tmp_path_factory: pytest.TempPathFactory, folders: Any) -> None:
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
    (folder / "library" / "sitecustomize.py").write_text(  # a decoder whose memory suffices for two
        """
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

class Small(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "diffusers.models.autoencoders.autoencoder_kl":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module
        def loaded(module):
            load(module)
            import torch
            decode = module.AutoencoderKL.decode
            def small(self, latents, *args, **options):
                if len(latents) > 2:
                    raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
                return decode(self, latents, *args, **options)
            module.AutoencoderKL.decode = small
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
    assert sizes[1] == [None] * 4, "the second time it takes no more than two"


async def picture(ended: dict[str, Any]) -> Any:
    """The pixels of a result."""
    return np.asarray(Image.open(io.BytesIO(await body(ended["result"]["media_url"]))), np.int16)
