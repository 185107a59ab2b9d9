"""`movieq models`: a pull from a hub that breaks off, sends wrong bytes or is down; and only the pinned weights are loaded."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from movieq.errors import ModelUnavailable
from movieq.models import weights
from movieq.models.table import Weights
from tests.engines.conftest import Studio, difference
from tests.engines.hub import COMMIT, Hub, hub
from tests.engines.test_diffusion import asked, pytestmark  # noqa: F401  # the same libraries

MIB = 1024 * 1024


@pytest.fixture
async def source(folder: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    """Yield a hub with the tiny Stable Diffusion, after writing a model table with its entry."""
    table = (
        f'[tiny]\nengine = "diffusers"\nkind = "cpu_intensive"\ntasks = {{ generate_image = 1 }}\npipeline = "StableDiffusionPipeline"\n'
        f'weights = {{ repository = "team/model", revision = "{COMMIT}" }}\nlicence = "mit"\n'
    )
    (folder / "models.toml").write_text(table)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hf" / "hub"))
    async with hub(folders("sd")) as running:
        yield running


async def models(source: Hub, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run `movieq models ...`; return its exit code and output."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MOVIEQ_", "HF_"))},
        "MOVIEQ_MODELS": str(folder / "models.toml"),
        "HF_ENDPOINT": source.url,
        "HF_HOME": str(folder / "hf"),
        "COLUMNS": "160",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "movieq.cli", "models", *arguments),
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_pull_brings_what_is_needed_checks_it_and_the_engine_loads_it(source: Hub, folder: Path, studio: Studio) -> None:
    assert (await models(source, folder, "check", "tiny"))[0] == 1
    code, out, err = await models(source, folder, "pull", "tiny")
    assert code == 0, err
    assert out == "tiny: 0.0 GB, checked\n"
    assert "licence mit" in err
    assert await models(source, folder, "check", "tiny") == (0, "tiny: ok\n", "")
    entry = studio.entry("sd", weights={"repository": "team/model", "revision": COMMIT}, image_pipeline=None)
    result = studio.render("sd", entry=entry, **asked("sd"))
    assert difference(result.decoded, studio.render("sd", **asked("sd")).decoded) == 0
    assert result.output.metadata["revision"] == COMMIT


async def test_a_pull_that_was_cut_off_resumes(source: Hub, folder: Path) -> None:
    large = folder / "large"
    (large / "unet").mkdir(parents=True)
    (large / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    (large / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(24 * MIB))
    source.add(large, "team/model", COMMIT)
    source.cut = 15 * MIB
    source.received = lambda: any(path.stat().st_size >= 10 * MIB for path in (folder / "hf").rglob("*.incomplete"))
    code, _, err = await models(source, folder, "pull", "tiny")
    if code:  # else the library itself has tried again
        assert "again to continue" in err
        code, _, err = await models(source, folder, "pull", "tiny")
    assert code == 0, err
    assert [range for _, range in source.asked if range] == [f"bytes={10 * MIB}-"], "in pieces of ten, as the library writes them"
    (file,) = (weights.find(Weights("team/model", COMMIT)) / "unet").iterdir()
    assert file.read_bytes() == (large / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


async def test_a_file_with_a_wrong_hash_is_thrown_away_and_said(source: Hub, folder: Path) -> None:
    source.changed = True
    code, _, err = await models(source, folder, "pull", "tiny")
    assert code == 1
    assert "with the hash" in err
    assert (await models(source, folder, "check", "tiny"))[0] == 1
    source.changed = False
    assert (await models(source, folder, "pull", "tiny"))[0] == 0


async def test_a_hub_that_is_not_there_is_named(source: Hub, folder: Path) -> None:
    source.url = "http://127.0.0.1:9"
    code, _, err = await models(source, folder, "pull", "tiny")
    assert code == 1
    assert "team/model" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["cut off", "changed", "missing"])
async def test_a_file_that_has_changed_since_is_not_loaded(source: Hub, folder: Path, how: str) -> None:
    assert (await models(source, folder, "pull", "tiny"))[0] == 0
    of = Weights("team/model", COMMIT)
    (file,) = (weights.find(of) / "unet").glob("*.safetensors")
    file = file.resolve()
    data = file.read_bytes()
    match how:
        case "cut off":
            file.write_bytes(data[:-1])
        case "changed":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case _:
            file.unlink()
    code, out, _ = await models(source, folder, "check", "tiny")
    assert code == 1
    assert "unet/" in out
    file.write_bytes(data)
    assert (await models(source, folder, "check", "tiny"))[0] == 0, "touched, and the same"


async def test_the_list_says_what_each_model_makes_and_whether_it_is_here(source: Hub, folder: Path) -> None:
    code, out, _ = await models(source, folder, "list")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert {"animatic", "flux-schnell", "ltx-video", "tiny"} <= lines.keys()
    assert lines["animatic"].rstrip().endswith("yes")
    assert lines["flux-schnell"].rstrip().endswith("no")
    code, out, _ = await models(source, folder, "show", "flux-schnell")
    assert code == 0
    assert '"black-forest-labs/FLUX.1-schnell"' in out
    assert (await models(source, folder, "show", "nothing"))[0] == 1


REPOSITORY: dict[str, Any] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"], "vae": ["diffusers", "VAE"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None], "boundary_ratio": 0.9,
    },
    "README.md": {}, "whole.safetensors": {},
    "unet/config.json": {}, "unet/diffusion_pytorch_model.safetensors": {}, "unet/diffusion_pytorch_model.fp16.safetensors": {},
    "unet/diffusion_pytorch_model.bin": {},
    "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": {}, "vae/diffusion_pytorch_model-00001-of-00002.safetensors": {},
    "text_encoder/model.safetensors.index.json": {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "gone"}},
    "text_encoder/model-1.safetensors": {}, "text_encoder/model-2.safetensors": {},
    "text_encoder/model-of-another-time.safetensors": {}, "text_encoder/diffusion_pytorch_model.bin": {},
    "tokenizer/merges.txt": {}, "transformer_full/config.json": {}, "transformer_full/model.safetensors": {},
}  # fmt: skip
"""The files of a repository with their content, some of which no pipeline loads."""


def needed(of: Weights, repository: dict[str, Any] = REPOSITORY) -> set[str]:
    files = [weights.Wanted(name, 1, "a" * 40) for name in repository]
    return {file.name for file in weights.needed(of, files, lambda name: json.dumps(repository[name]).encode())}


def test_of_a_repository_only_what_is_loaded_is_needed() -> None:
    revision = "0" * 40
    half = needed(Weights("a/b", revision, variant="fp16"))
    encoder = {"text_encoder/model-1.safetensors", "text_encoder/model-2.safetensors"}
    assert {name for name in half if name.endswith(".safetensors")} == {
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", *encoder
    }  # fmt: skip
    full = needed(Weights("a/b", revision))
    assert {name for name in full if name.endswith(".safetensors")} == {
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model-00001-of-00002.safetensors", *encoder
    }  # fmt: skip
    read = {"model_index.json", "unet/config.json", "text_encoder/model.safetensors.index.json", "tokenizer/merges.txt"}
    assert {name for name in full if not name.endswith(".safetensors")} == read
    assert needed(Weights("a/b", revision, subfolder="vae")) == {"vae/diffusion_pytorch_model-00001-of-00002.safetensors"}


def test_of_a_speech_model_in_two_layouts_the_one_that_is_loaded_is_needed() -> None:
    """As in sesame/csm-1b, whose first file is in the layout of its authors."""
    index = {"weight_map": {"a": "transformers-00001-of-00002.safetensors", "b": "transformers-00002-of-00002.safetensors"}}
    repository = {
        "config.json": {"transformers_weights": "transformers.safetensors.index.json", "bound": float("inf")},
        "transformers.safetensors.index.json": index,
        "model.safetensors": {},
        **{key: {} for key in index["weight_map"].values()},
    }
    assert needed(Weights("a/b", "0" * 40), repository) == repository.keys() - {"model.safetensors"}


def test_an_index_that_cannot_be_read_is_named() -> None:
    files = [weights.Wanted("model_index.json", 1, "a" * 40)]
    with pytest.raises(ModelUnavailable, match=r"model_index\.json cannot be read"):
        list(weights.needed(Weights("a/b", "0" * 40), files, lambda name: b"[" * 100_000))


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("", "the folder .* does not exist on this worker's machine: put it there, or name another one in the entry"),
        ("model_index.json", "has no model_index.json"),
        ("unet", "unet has no config.json in"),
        ("vae/diffusion_pytorch_model.safetensors", "vae has no weights as safetensors"),
        ("text_encoder/config.json", "text_encoder has no config.json in .*: run `movieq models pull`, or complete the folder"),
        ("tokenizer", "tokenizer has no files in .*: run `movieq models pull`, or complete the folder"),
    ],
)
def test_a_folder_that_vanishes_or_loses_files_is_named_and_loads_once_it_is_back(
    studio: Studio, folders: Callable[[str], Path], folder: Path, lost: str, said: str
) -> None:
    shutil.copytree(folders("sd"), folder / "model")
    entry = studio.entry("sd", weights={"repository": str(folder / "model")})
    (folder / "model" / lost).rename(folder / "away")
    with pytest.raises(ModelUnavailable, match=said):
        studio.render("sd", entry=entry, **asked("sd"))
    (folder / "away").rename(folder / "model" / lost)
    studio.render("sd", entry=entry, **asked("sd"))
