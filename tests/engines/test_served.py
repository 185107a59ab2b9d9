"""Real models through the whole service: API, queue, worker, engine process, storage; and the ways in which an engine process ends."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import av
import pytest
from PIL import Image

from movieq.tasks.states import Kind
from tests.engines.conftest import CLIP, PICTURE
from tests.fleet import NVML, eventually, fleet, python_path
from tests.service import Service, service
from workers.supervisor import Child


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Iterator[Service]:
    """Yield a service with tiny models in its table."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "models.toml").write_text(
        f'''
        [tiny-picture]
        engine = "diffusers"
        kind = "gpu_medium"
        tasks = {{ generate_image = 1 }}
        weights = {{ repository = "{folders("flux")}" }}
        pipeline = "FluxPipeline"
        image_pipeline = "FluxImg2ImgPipeline"
        defaults = {{ steps = 2 }}
        limits = {{ sides = {PICTURE["sides"]}, pixels = {PICTURE["pixels"]} }}

        [tiny-clip]
        engine = "diffusers"
        kind = "gpu_heavy"
        tasks = {{ generate_video = 3, render_animation = 3 }}
        weights = {{ repository = "{folders("ltx_condition")}" }}
        pipeline = "LTXConditionPipeline"
        image_pipeline = "LTXConditionPipeline"
        adapter = "ltx"
        images = "frames"
        defaults = {{ steps = 2 }}
        limits = {{ sides = 32, pixels = {CLIP["pixels"]}, frame_step = 8, frame_first = 1, frames = 17, fps = 12 }}

        [tiny-voice]
        engine = "diffusers"
        kind = "gpu_medium"
        tasks = {{ process_audio = 1 }}
        weights = {{ repository = "{folders("vits")}" }}
        adapter = "vits"
        pipeline = "VitsModel"
        languages = ["en"]
        '''
    )
    with service(folder, MOVIEQ_MODELS=str(folder / "models.toml")) as started:
        yield started


async def test_a_named_model_makes_an_image_on_a_machine_without_a_gpu(running: Service) -> None:
    task = {"prompt": "a lighthouse", "resolution": "128x96", "format": "png", "model": "tiny-picture", "seed": 7}
    ended = [await running.ended(await running.submit("generate_image", task)) for _ in range(2)]
    for each in ended:
        assert each["status"] == "completed", each
        metadata = each["result"]["metadata"]
        assert (metadata["engine"], metadata["model"], metadata["seed"]) == ("diffusers", "tiny-picture", 7)
        assert metadata["generated"] == {"resolution": "64x48", "frames": 1, "fps": None}
    first, second = [await body(each["result"]["media_url"]) for each in ended]
    assert Image.open(io.BytesIO(first)).size == (128, 96)
    assert Image.open(io.BytesIO(first)).tobytes() == Image.open(io.BytesIO(second)).tobytes(), "but for the task in its tags"


async def test_a_storyboard_becomes_a_clip_by_a_model(running: Service) -> None:
    still = io.BytesIO()
    Image.new("RGB", (320, 180), "#806040").save(still, "PNG")
    task = {
        "scene_description": "The keeper lights the lamp", "storyboard_images": [await running.upload(still.getvalue())],
        "duration": 2, "resolution": "128x72", "model": "tiny-clip", "audio_cues": ["sea"],
    }  # fmt: skip
    ended = await running.ended(await running.submit("generate_video", task))
    assert ended["status"] == "completed", ended
    assert ended["result"]["metadata"]["generated"]["windows"] == 2
    with av.open(io.BytesIO(await body(ended["result"]["media_url"]))) as container:
        assert (container.streams.video[0].frames, container.streams.video[0].width) == (48, 128)
        assert len(container.streams.audio) == 1


async def test_a_line_is_spoken_by_a_model_and_the_log_has_its_stages(running: Service) -> None:
    task_id = await running.submit("process_audio", {"text": "Land ho. All hands! " * 20, "model": "tiny-voice"})
    assert (await running.ended(task_id))["status"] == "completed"
    async with running.events(task_id) as events:
        assert "synthesizing_speech" in [event["current_step"] async for event in events]


async def test_a_draft_of_a_task_for_a_model_is_the_animatic(running: Service) -> None:
    task = {"prompt": "a lighthouse", "resolution": "128x96", "model": "tiny-picture", "draft": True}
    ended = await running.ended(await running.submit("generate_image", task))
    assert ended["result"]["metadata"]["engine"] == "animatic"


async def test_a_model_that_does_not_make_this_is_refused_with_those_that_do(running: Service) -> None:
    body = {"project_id": "film", "task_type": "process_audio", "task_data": {"prompt": "rain", "model": "tiny-voice"}}
    status, answer = await running.call("POST", "/tasks/submit", json=body)
    assert status == 400
    assert (
        'expected a model for process_audio without text (animatic, stable-audio-open, ace-step-xl-turbo), got "tiny-voice"'
        in answer["message"]
    )


async def test_weights_that_are_not_here_fail_the_task_and_say_what_to_run(running: Service) -> None:
    ended = await running.ended(await running.submit("generate_image", {"prompt": "a lamp", "model": "flux-schnell"}))
    assert (ended["status"], ended["error_code"]) == ("failed", "model_unavailable")
    assert "movieq models pull" in ended["error"]


async def test_who_watches_a_model_at_work_sees_what_it_makes(running: Service) -> None:
    task = {"prompt": "a lamp", "model": "tiny-picture", "steps": 150, "resolution": "512x512"}
    _, told = await running.told("generate_image", task)
    previews = [event for event in told if event["event"] == "preview"]
    assert previews
    assert all(event["image"].startswith("data:image/jpeg;base64,") for event in previews)
    assert told[-1]["event"] == "completed"


async def test_a_cancel_stops_a_model_between_two_steps_and_the_child_lives_on(running: Service) -> None:
    await running.ended(await running.submit("generate_image", {"prompt": "a lamp", "model": "tiny-picture"}))
    (child,) = running.find("workers.child")
    task_id = await running.submit("generate_image", {"prompt": "a lamp", "model": "tiny-picture", "steps": 150, "resolution": "512x512"})
    await running.until(task_id, "stage", "denoise")
    status, _ = await running.call("DELETE", f"/tasks/{task_id}/cancel")
    assert status == 200
    next_id = await running.submit("generate_image", {"prompt": "a lamp", "model": "tiny-picture"})
    assert (await running.ended(next_id))["status"] == "completed"
    assert [each.pid for each in running.find("workers.child")] == [child.pid]


@pytest.mark.parametrize("signum", [signal.SIGSEGV, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
async def test_a_crash_while_a_model_works_costs_one_try(running: Service, signum: signal.Signals) -> None:
    task_id = await running.submit("generate_image", {"prompt": "a lamp", "model": "tiny-picture", "steps": 100})
    await running.until(task_id, "stage", "denoise")
    (child,) = running.find("workers.child")
    os.kill(child.pid, signum)
    ended = await running.ended(task_id, 90)
    assert (ended["status"], ended["attempt"]) == ("completed", 2)


async def test_the_workers_status_says_which_models_are_in_memory(running: Service) -> None:
    await running.ended(await running.submit("generate_image", {"prompt": "a lamp", "model": "tiny-picture"}))
    worker: dict[str, Any] = {}

    async def reported() -> bool:
        _, answer = await running.call("GET", "/workers/status")
        (found,) = answer["workers"]
        worker.update(found)
        return bool(worker["models"][-1] == "tiny-picture")

    await eventually(reported, 60)  # with the next heartbeat
    assert worker["models_parked"] == []
    assert worker["model_swaps"]["loads"] >= 1
    assert (worker["device"], worker["gpu_utilization"], worker["temperature"], worker["power"]) == ("cpu", 0.0, None, None)
    assert worker["memory_usage"] > 100_000_000
    assert set(worker["queues"]) == {"gpu_heavy", "gpu_medium", "cpu_intensive"}


async def body(url: str) -> bytes:
    """Fetch a URL; return the body."""
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
        return await answer.read()


# ── A worker's child ──


async def test_a_worker_that_has_only_a_gpu_that_cannot_be_used_stops_and_says_why(folder: Path) -> None:
    async with fleet(folder / "fleet") as installation:
        library = folder / "library"
        library.mkdir()
        (library / "pynvml.py").write_text(NVML)
        worker = installation.start("worker", "", [], {"PYTHONPATH": python_path(library), "MOVIEQ_QUEUES": "gpu_heavy"})
        assert await worker.ended(60) == 1
        assert "an engine cannot work on this machine: gpu0: this child cannot work on cuda:" in worker.log.read_text()


async def test_a_child_that_dies_before_it_serves_is_started_again_and_never_ends_the_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = folder / "python"
    broken.write_text(
        f"""#!/bin/sh
if [ -e {folder}/well ]; then exec {sys.executable} "$@"; fi
touch {folder}/failed
echo "no such library" >&2
exit 3
"""
    )
    broken.chmod(0o755)
    monkeypatch.setattr("workers.supervisor.sys", SimpleNamespace(executable=str(broken)))
    child = Child("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=60)
    ready = asyncio.Event()
    keeping = asyncio.create_task(child.supervise(ready.set))
    await eventually((folder / "failed").exists, 60)
    assert not ready.is_set()
    assert not keeping.done()
    (folder / "well").touch()
    await asyncio.wait_for(ready.wait(), 60)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_cancel_while_a_model_loads_frees_the_slot_without_waiting_for_it(folder: Path, folders: Callable[[str], Path]) -> None:
    library = folder / "library"
    library.mkdir()
    # an import that takes long, as from a cold disk
    (library / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'diffusers.pipelines.flux.pipeline_flux' and os.path.exists({str(folder / 'slow')!r}):\n"
        f"            open({str(folder / 'loading')!r}, 'w').close()\n"
        "            time.sleep(600)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    (folder / "slow").touch()
    (folder / "models.toml").write_text(
        f'[flux]\nengine = "diffusers"\nkind = "cpu_intensive"\ntasks = {{ generate_image = 1 }}\npipeline = "FluxPipeline"\n'
        f'weights = {{ repository = "{folders("flux")}" }}\ndefaults = {{ steps = 1 }}\nlimits = {{ sides = 16, pixels = [1, 4096] }}\n'
    )
    settings = {"MOVIEQ_MODELS": str(folder / "models.toml"), "PYTHONPATH": python_path(library)}
    async with fleet(folder / "fleet") as installation:
        api, worker = await asyncio.gather(installation.api("", 0, **settings), installation.worker("", **settings))
        child = worker.child().pid
        task_id = await api.submit("generate_image", {"prompt": "a lamp", "model": "flux"})
        await api.until(task_id, "current_step", "loading_models")
        await eventually((folder / "loading").exists, 60)
        assert (await api.call("DELETE", f"/tasks/{task_id}/cancel"))[0] == 200
        await eventually(lambda: worker.times_logged("child_ready") == 2, 60)
        assert worker.child().pid != child
        (folder / "slow").unlink()
        ended = await api.ended(await api.submit("generate_image", {"prompt": "a lamp", "model": "flux"}))
        assert (ended["status"], ended["attempt"]) == ("completed", 1)
