"""A plug-in package adds a task type with an engine of its own: it is installed as a user would, and runs from submit to file."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.engines.test_served import body
from tests.fleet import python_path
from tests.service import Service, service

EXAMPLE = Path(__file__).with_name("palettes")


def installed(folder: Path, *names: tuple[str, str]) -> Path:
    """Return a folder for PYTHONPATH with these one-module packages, each a plug-in named after its module."""
    for name, module in names:
        (folder / f"{name}.py").write_text(module)
        (folder / f"{name}-1.0.dist-info").mkdir()
        (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(f"[movieq.plugins]\n{name} = {name}:plugin\n")
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service with the example plug-in installed."""
    folder = tmp_path_factory.mktemp("plugged")
    source = folder / "source"
    source.mkdir()
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site"), str(source)]
    subprocess.run(pip, check=True, timeout=100)
    with service(folder, PYTHONPATH=python_path(folder / "site")) as started:
        yield started


FIELDS = Path(__file__).with_name("fields")


def test_the_example_of_a_model_is_less_than_eighty_lines() -> None:
    lines = [line for file in FIELDS.glob("*.py") for line in file.read_text().splitlines()]
    assert len([line for line in lines if line.strip()]) < 80


@pytest.fixture(scope="module")
def with_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service with the plug-in that brings a model."""
    folder = tmp_path_factory.mktemp("fields")
    site = installed(folder, ("movieq_fields", (FIELDS / "movieq_fields.py").read_text()))
    (site / "movieq_fields_model.py").write_text((FIELDS / "movieq_fields_model.py").read_text())
    weights = str(folder / "weights")
    command = [sys.executable, "-c", f"import movieq_fields_model; movieq_fields_model.save({weights!r})"]
    subprocess.run(command, check=True, timeout=100, capture_output=True, cwd=site)
    with service(
        folder, PYTHONPATH=python_path(site), FIELDS_WEIGHTS=weights, XDG_CACHE_HOME=str(folder / "cache"), MOVIEQ_ENGINE="diffusers"
    ) as started:
        yield started


async def test_a_model_of_a_plug_in_is_the_default_with_previews_cancel_and_progress(with_model: Service) -> None:
    task = {"prompt": "a lighthouse at dusk", "resolution": "256x256", "seed": 4, "preview": True, "steps": 100, "format": "png"}
    task_id, told = await with_model.told("generate_image", task)
    ended = await with_model.ended(task_id)
    assert ended["status"] == "completed", ended["error"]
    assert ended["result"]["metadata"]["model"] == "fields"
    assert any(event["event"] == "preview" for event in told), [event["event"] for event in told]
    assert {"denoise", "decode"} <= {event.get("stage") for event in told}
    assert Image.open(io.BytesIO(await body(ended["result"]["media"][0]["url"]))).size == (256, 256)
    cancelled = await with_model.submit("generate_image", {**task, "seed": 5})
    await with_model.until(cancelled, "stage", "denoise")
    assert (await with_model.call("DELETE", f"/tasks/{cancelled}/cancel"))[0] == 200
    again = await with_model.ended(await with_model.submit("generate_image", {**task, "no_cache": True}))
    assert (again["status"], again["attempt"]) == ("completed", 1)


def test_the_example_is_less_than_forty_lines() -> None:
    lines = (EXAMPLE / "movieq_palettes.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) < 40


async def test_a_task_of_a_new_type_becomes_a_file_and_is_known_everywhere(running: Service) -> None:
    task_id = await running.submit("make_palette", {"prompt": "a lighthouse at dusk", "colours": 3, "seed": 4})
    ended = await running.ended(task_id)
    assert ended["status"] == "completed", ended
    (media,) = ended["result"]["media"]
    assert media["media_type"] == "palette"
    assert f"/media/projects/film/palettes/{task_id}/" in media["url"]
    assert Image.open(io.BytesIO(await body(media["url"]))).size == (192, 64)
    _, types = await running.call("GET", "/task-types")
    (new,) = [each for each in types["task_types"] if each["task_type"] == "make_palette"]
    assert (new["default_model"], new["task_data"]["properties"]["colours"]["maximum"]) == ("palettes", 16)
    _, page = await running.call("GET", "/projects/film/tasks?task_type=make_palette")
    assert [row["task_id"] for row in page["tasks"]] == [task_id]


async def test_its_parameters_are_checked_as_those_of_any_type(running: Service) -> None:
    body = {"project_id": "film", "task_type": "make_palette", "task_data": {"prompt": "x", "colours": 99}}
    status, answer = await running.call("POST", "/tasks/submit", json=body)
    assert (status, answer["errors"][0]["path"]) == (400, "task_data.colours")
    body["task_data"] = {"prompt": "x", "draft": True}
    status, answer = await running.call("POST", "/tasks/submit", json=body)
    assert status == 400
    assert "make_palette has no animatic" in answer["message"]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("raise RuntimeError('out of paint')", "cannot be loaded: RuntimeError: out of paint"),
        ("plugin = 3", "is not a movieq.plugins.Plugin"),
        ("from movieq.plugins import Plugin\nplugin = Plugin(engines={'Not A Name': 'x'})", "'Not A Name' is not a valid name"),
        ("from movieq.plugins import *\nfrom movieq.tasks.params import *\n"
         "plugin = Plugin(task_types={'generate_image': TaskSpec(params=VideoParams)})", "the task type generate_image already exists"),
        ("from movieq.plugins import Plugin\nplugin = Plugin(models={'x': {'engine': 'candle', 'kind': 'gpu_heavy', 'tasks': {}}})",
         "x: unknown engine 'candle'"),
    ],
)  # fmt: skip
async def test_a_plug_in_that_cannot_be_used_is_named_at_the_start(folder: Path, module: str, said: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "movieq.cli", "models", "list"),
        env={**os.environ, "PYTHONPATH": python_path(installed(folder, ("sick", module)))},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert "sick" in err.decode()
    assert said in " ".join(err.decode().split())
    assert "Traceback" not in err.decode()
