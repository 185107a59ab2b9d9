"""Which model a task gets, and which LoRAs it may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from movieq.errors import SettingsError, ValidationFailed
from movieq.models import choice
from movieq.models import table as models
from movieq.models.table import Model
from movieq.tasks.params import AudioParams, ImageParams, LoraUse, Params, VideoParams
from movieq.tasks.states import GENERATE_IMAGE, GENERATE_VIDEO, PROCESS_AUDIO, EngineChoice, ProjectId, TaskType

FILE = f"{{ repository = '/srv/loras', file = 'keeper.safetensors', sha256 = '{'0' * 64}' }}"
TABLE = f"""
[loras.keeper]
bases = ["flux2-klein-4b", "qwen-image-2512"]
weights = {FILE}
projects = ["lighthouse"]

[loras.ink]
bases = ["qwen-image-2512"]
weights = {FILE}
"""


NONE = 'flux2-klein-4b has no LoRA "keeper" for this project: '


def loaded(folder: Path, text: str) -> dict[str, Model]:
    (folder / "models.toml").write_text(text)
    return models.load(str(folder / "models.toml"))


def chosen(table: dict[str, Model], project: str, *loras: LoraUse, model: str | None = None) -> str:
    params = ImageParams(prompt="x", model=model, loras=list(loras))
    return choice.resolve(table, EngineChoice.DIFFUSERS, 0, ProjectId(project), GENERATE_IMAGE, params)


def test_a_lora_stands_with_each_of_its_bases(tmp_path: Path) -> None:
    table = loaded(tmp_path, TABLE)
    shipped = models.load()
    assert {name: list(model.loras) for name, model in table.items() if model.loras != shipped[name].loras} == {
        "flux2-klein-4b": ["keeper"],
        "qwen-image-2512": ["keeper", "ink"],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"[loras.a]\nbases = ['flux9']\nweights = {FILE}", "loras.a: bases: 'flux9' is no diffusion model of this table"),
        (f"[loras.a]\nbases = ['animatic']\nweights = {FILE}", "'animatic' is no diffusion model"),
        (f"[loras.a]\nbases = []\nweights = {FILE}", "loras.a.bases: expected a list of at least 1"),
        (f"[loras.csm]\nbases = ['flux-schnell']\nweights = {FILE}", "loras.csm: a model has this name too"),
        ("[loras.a]\nbases = ['flux-schnell']", "loras.a.weights: missing"),
        (f"[loras.a]\nbases = ['flux-schnell']\nweights = {FILE}\nstrength = 1", "loras.a.strength: unknown field"),
        (f"[loras.a]\nbases = ['flux-schnell']\nweights = {FILE.replace('0' * 64, 'abc')}", "loras.a.weights.sha256: expected"),
        (f"[loras.a]\nbases = ['flux-schnell']\nweights = {FILE.replace('.safetensors', '.pt')}", "loras.a.weights.file: expected"),
        (f"[loras.a]\nbases = ['flux-schnell']\nweights = {FILE.replace('/srv', 'srv')}", "set revision to a commit of 40 hex digits"),
        ("loras = 3", "loras: expected an object"),
    ],
)
def test_a_faulty_lora_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        loaded(tmp_path, text)
    assert said in refused.value.message
    assert "models.toml" in refused.value.message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("languages = ['en']", "languages: the adapter 'diffusers' does not speak; set adapter to 'csm' for CsmForConditionalGeneration"),
        ("languages = ['en']\nadapter = 'ltx'", "languages: the adapter 'ltx' does not speak; set adapter to 'csm'"),
        ("adapter = 'vits'", "languages: the adapter 'vits' speaks; set languages to those of the model, such as ['en']"),
    ],
)
def test_languages_and_an_adapter_for_speech_need_each_other(tmp_path: Path, fields: str, said: str) -> None:
    entry = "engine = 'diffusers'\nkind = 'gpu_medium'\ntasks = { process_audio = 1 }\nweights = { repository = '/srv/voice' }"
    with pytest.raises(SettingsError) as refused:
        loaded(tmp_path, f"[voice]\n{entry}\npipeline = 'VitsModel'\n{fields}")
    assert f"voice: {said}" in refused.value.message


def test_a_task_gets_the_first_model_that_has_its_loras(tmp_path: Path) -> None:
    table = loaded(tmp_path, TABLE)
    assert chosen(table, "lighthouse") == "flux2-klein-4b"
    assert chosen(table, "lighthouse", LoraUse("keeper")) == "flux2-klein-4b"
    assert chosen(table, "lighthouse", LoraUse("ink")) == "qwen-image-2512"
    assert chosen(table, "lighthouse", LoraUse("keeper"), LoraUse("ink", 0.5)) == "qwen-image-2512"


@pytest.mark.parametrize(
    ("project", "names", "model", "faults"),
    [
        (
            "other",
            ["keeper"],
            "flux2-klein-4b",
            [("task_data.loras[0].name", 'flux2-klein-4b has no LoRA "keeper" for this project: it has none')],
        ),
        (
            "other",
            ["ink", "keeper"],
            "qwen-image-2512",
            [("task_data.loras[1].name", 'qwen-image-2512 has no LoRA "keeper" for this project: it has ink')],
        ),
        (
            "lighthouse",
            ["ink"],
            "flux2-klein-4b",
            [
                (
                    "task_data.loras[0].name",
                    'flux2-klein-4b has no LoRA "ink" for this project: it has keeper; or set task_data.model to one of animatic, '
                    "qwen-image-2512",
                )
            ],
        ),
        ("lighthouse", ["ink", "ink"], "qwen-image-2512", [("task_data.loras[1].name", '"ink" is named twice')]),
    ],
)
def test_a_lora_that_the_model_or_the_project_has_not_is_refused(
    tmp_path: Path, project: str, names: list[str], model: str, faults: list[tuple[str, str]]
) -> None:
    with pytest.raises(ValidationFailed) as refused:
        chosen(loaded(tmp_path, TABLE), project, *map(LoraUse, names), model=model)
    found = [(path, message.removesuffix("; or set task_data.model to one of animatic")) for path, message in refused.value.errors]
    assert found == faults


@pytest.mark.parametrize(
    ("gpu_gib", "clip", "picture", "edited"),
    [
        (0, "ltx-video", "flux2-klein-4b", "flux2-klein-4b"),
        (12, "ltx-video", "flux2-klein-4b", "flux2-klein-4b"),
        (23.99, "ltx-video", "z-image-turbo", "flux2-klein-4b"),
        (79.6, "ltx23-distilled", "z-image-turbo", "flux2-klein-4b"),
    ],
)
def test_the_default_is_the_first_model_that_the_gpu_has_room_for(gpu_gib: float, clip: str, picture: str, edited: str) -> None:
    def default(task_type: TaskType, params: Params) -> str:
        gpu_bytes = int(gpu_gib * 2**30)
        return choice.resolve(models.load(), EngineChoice.DIFFUSERS, gpu_bytes, ProjectId("film"), task_type, params)

    assert default(GENERATE_VIDEO, VideoParams(prompt="x")) == clip
    assert default(GENERATE_IMAGE, ImageParams(prompt="x")) == picture
    assert default(GENERATE_IMAGE, ImageParams(prompt="x", reference_images=["upload:x"])) == edited


def test_a_model_that_is_rendered_on_request_is_never_a_default() -> None:
    def chosen(**fields: Any) -> str:
        params = AudioParams(prompt="rain on a roof", **fields)
        return choice.resolve(models.load(), EngineChoice.DIFFUSERS, 0, ProjectId("film"), PROCESS_AUDIO, params)

    assert chosen(duration=40) == "stable-audio-open"
    assert chosen(duration=55, model="ace-step-xl-turbo") == "ace-step-xl-turbo"
    with pytest.raises(ValidationFailed, match=r"at most 47 s of sound, got 55; or set task_data.model to one of animatic, ace-step"):
        chosen(duration=55)
