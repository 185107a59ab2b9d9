"""A plug-in package adds a task type with an engine, or a model: it is installed as a user would, and runs from submit to file."""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from movieq.errors import ModelUnavailable
from movieq.models.table import Model
from movieq.tasks.registry import REGISTRY
from tests.engines.conftest import Studio
from tests.engines.test_served import body
from tests.fleet import python_path
from tests.service import Service, service
from workers.child import job as jobs
from workers.child.diffusion import engine, model_cache
from workers.child.job import JobCancelled
from workers.protocol import FromChild, Step

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
TONES = Path(__file__).with_name("tones")


def test_the_example_of_a_model_is_less_than_eighty_lines() -> None:
    lines = [line for file in FIELDS.glob("*.py") for line in file.read_text().splitlines()]
    assert len([line for line in lines if line.strip()]) < 80


@pytest.fixture(scope="module")
def with_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service with the plug-ins that bring a model: one for pictures and one for speech."""
    folder = tmp_path_factory.mktemp("fields")
    sources = {"fields": FIELDS, "tones": TONES}
    site = installed(folder, *((f"movieq_{name}", (source / f"movieq_{name}.py").read_text()) for name, source in sources.items()))
    weights = {name: str(folder / "weights" / name) for name in sources}
    for name, source in sources.items():
        (site / f"movieq_{name}_model.py").write_text((source / f"movieq_{name}_model.py").read_text())
        command = [sys.executable, "-c", f"import movieq_{name}_model; movieq_{name}_model.save({weights[name]!r})"]
        environment = {**os.environ, "PYTHONPATH": python_path(site)}
        subprocess.run(command, check=True, timeout=100, capture_output=True, env=environment)
    with service(
        folder,
        PYTHONPATH=python_path(site),
        FIELDS_WEIGHTS=weights["fields"],
        TONES_WEIGHTS=weights["tones"],
        XDG_CACHE_HOME=str(folder / "cache"),
        MOVIEQ_ENGINE="diffusers",
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


async def test_a_speech_model_of_a_plug_in_speaks_a_line_and_a_cancel_stops_it(with_model: Service) -> None:
    task = {"text": "Land ho. " * 500, "output_format": "wav", "seed": 4}
    task_id, told = await with_model.told("process_audio", task)
    ended = await with_model.ended(task_id)
    assert ended["status"] == "completed", ended["error"]
    assert (ended["result"]["metadata"]["model"], ended["result"]["metadata"].get("warnings")) == ("tones", None)
    assert any(0 < event["progress"] < 1 and event.get("stage") == "denoise" for event in told)
    cancelled = await with_model.submit("process_audio", {**task, "seed": 5})
    await with_model.until(cancelled, "stage", "denoise")
    assert (await with_model.call("DELETE", f"/tasks/{cancelled}/cancel"))[0] == 200
    again = await with_model.ended(await with_model.submit("process_audio", {**task, "no_cache": True}))
    assert (again["status"], again["attempt"]) == ("completed", 1)


@pytest.fixture
def tones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Return the entry of the speech model, whose adapter this process has as if the plug-in were installed."""
    monkeypatch.setenv("TONES_WEIGHTS", str(folder / "tones"))
    monkeypatch.syspath_prepend(str(TONES))
    monkeypatch.delitem(sys.modules, "movieq_tones", raising=False)
    plugin, model = (importlib.import_module(name) for name in ("movieq_tones", "movieq_tones_model"))
    model.save(str(folder / "tones"))
    monkeypatch.setitem(REGISTRY.adapters, "tones", plugin.plugin.adapters["tones"])
    return msgspec.convert(plugin.plugin.models["tones"], Model)


LINE: dict[str, Any] = {"text": "Land ho. All hands! Light the lamp.", "output_format": "wav"}


def test_a_speech_model_of_a_plug_in_reports_each_sentence_and_stops_between_two(
    studio: Studio, tones: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "STEP_INTERVAL_S", 0)
    whole = studio.render("vits", entry=tones, **LINE)
    assert whole.stages == ["load", "denoise", "mux"]
    done = [each.step / each.steps for each in whole.sent if isinstance(each, Step) and each.stage == "denoise"]
    assert done == [0, 1 / 3, 2 / 3, 1]
    sent: list[FromChild] = []

    def receive(message: FromChild) -> None:
        sent.append(message)
        if isinstance(message, Step) and (message.stage, message.step, message.steps) == ("denoise", 1, 3):
            studio.flag.set()

    with pytest.raises(JobCancelled):
        engine.render(studio.job("vits", receive, entry=tones, **LINE))
    assert isinstance(sent[-1], Step)
    assert (sent[-1].step, sent[-1].steps) == (1, 3), "nothing of the second sentence"
    assert studio.render("vits", entry=tones, **LINE).path.read_bytes() == whole.path.read_bytes()


def test_all_networks_of_a_plug_ins_speech_model_are_placed_and_streamed(studio: Studio, tones: Model) -> None:
    whole = studio.render("vits", entry=tones, **LINE)
    loaded = model_cache.find("vits")
    assert loaded is not None
    assert {name for name, _ in loaded.networks()} == loaded.needs.components.keys() == {"transformer", "codec"}
    loaded.stream_groups("cpu")
    assert studio.render("vits", entry=tones, **LINE).path.read_bytes() == whole.path.read_bytes()


def test_a_plug_ins_adapter_that_is_not_for_speech_is_named_where_an_entry_has_languages(
    studio: Studio, tones: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY.adapters, "tones", "workers.child.diffusion.adapters:Ltx")
    with pytest.raises(ModelUnavailable, match="languages: the adapter 'tones' does not speak; set adapter to"):
        studio.render("vits", entry=tones, **LINE)


def test_an_adapter_that_cannot_be_imported_is_named(studio: Studio, tones: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY.adapters, "tones", "movieq_tones_model:NoSuch")
    with pytest.raises(ModelUnavailable, match="the adapter 'tones' cannot be imported"):
        studio.render("vits", entry=tones, **LINE)


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
