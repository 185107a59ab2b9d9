"""LoRAs: they change what a model renders, and leave nothing behind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from movieq.errors import ModelUnavailable, UnsupportedParameter
from movieq.models.choice import batch
from movieq.models.table import USABLE, Model
from movieq.tasks.params import ImageParams, LoraUse
from tests.engines import tiny
from tests.engines.conftest import Result, Studio, run_out_of_memory_once
from tests.engines.hub import COMMIT, hub
from tests.engines.test_diffusion import pytestmark  # noqa: F401  # the same libraries
from tests.engines.test_eviction import GB, Machine
from tests.engines.test_weights import models
from workers.child.diffusion import eviction, model_cache
from workers.child.diffusion.eviction import Budget
from workers.child.diffusion.placement import Placement

PICTURE: dict[str, Any] = {"prompt": "a lighthouse", "resolution": "64x64", "format": "png"}
CLIP: dict[str, Any] = {"prompt": "a lighthouse", "resolution": "64x64", "duration": 1, "fps": 12}


@pytest.fixture
def machine(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(studio, monkeypatch)
    machine.room = Budget(GB, GB)
    return machine


@pytest.fixture
def lora(folders: Callable[[str], Path], folder: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that writes a LoRA for the attention layers of a tiny model, and returns its entry without bases."""

    def write(name: str, part: str = "transformer", seed: int = 1, width: int | None = None) -> dict[str, Any]:
        prefix = "transformer" if part == "transformer_2" else part
        return tiny.lora(folders(name) / part, folder / f"lora-{name}-{part}-{seed}-{width}", seed, width, prefix)

    return write


def with_loras(studio: Studio, name: str, **files: Any) -> Model:
    """Return the entry of a model with these LoRAs, each by the file of its weights or by more of its fields."""
    loras = {each: {"bases": [name], **({"weights": file} if "sha256" in file else file)} for each, file in files.items()}
    return studio.entry(name, loras=loras)


def rendered(studio: Studio, name: str, entry: Model, *loras: dict[str, Any], **more: Any) -> Result:
    return studio.render(name, entry=entry, loras=list(loras), **(CLIP if name.startswith("wan") else PICTURE), **more)


def content(result: Result) -> bytes:
    return result.path.read_bytes()


@pytest.mark.parametrize(
    ("name", "part"), [("sd", "unet"), ("sd3", "transformer"), ("flux", "transformer"), ("z_image", "transformer"), ("wan", "transformer")]
)
def test_a_lora_changes_the_result_and_the_next_task_is_as_in_a_fresh_process(
    studio: Studio, lora: Callable[..., dict[str, Any]], name: str, part: str
) -> None:
    entry = with_loras(studio, name, keeper=lora(name, part))
    fresh = content(rendered(studio, name, entry))
    model_cache.clear()
    added = rendered(studio, name, entry, {"name": "keeper", "weight": 0.5})
    assert added.output.metadata["loras"] == [{"name": "keeper", "weight": 0.5}]
    assert len({fresh, content(added), content(rendered(studio, name, entry, {"name": "keeper"}))}) == 3, "the weight counts"
    after = rendered(studio, name, entry)
    assert content(after) == fresh
    assert "loras" not in after.output.metadata
    assert content(rendered(studio, name, entry, {"name": "keeper", "weight": 0.5})) == content(added)


def test_loras_stay_loaded_for_the_next_task_with_the_same_ones(
    studio: Studio, lora: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxPipeline

    loaded = []
    load = FluxPipeline.load_lora_weights

    def counted(*given: Any, **more: Any) -> None:
        loaded.append(more["weight_name"])
        load(*given, **more)

    monkeypatch.setattr(FluxPipeline, "load_lora_weights", counted)
    entry = with_loras(studio, "flux", one=lora("flux", seed=1), two=lora("flux", seed=2))
    first = rendered(studio, "flux", entry, {"name": "one"}, {"name": "two", "weight": -0.5})
    again = rendered(studio, "flux", entry, {"name": "one"}, {"name": "two", "weight": -0.5})
    assert content(again) == content(first)
    assert len(loaded) == 2
    alone = rendered(studio, "flux", entry, {"name": "two", "weight": -0.5})
    assert content(alone) != content(first)
    model_cache.clear()
    assert content(rendered(studio, "flux", entry, {"name": "two", "weight": -0.5})) == content(alone)


def test_wan_has_a_file_for_each_of_its_networks(studio: Studio, lora: Callable[..., dict[str, Any]]) -> None:
    high, low = lora("wan"), lora("wan", "transformer_2", seed=2)
    entry = with_loras(studio, "wan", both={"weights": high, "second": low}, high={"weights": high})
    plain = content(rendered(studio, "wan", entry))
    both = content(rendered(studio, "wan", entry, {"name": "both"}))
    one = content(rendered(studio, "wan", entry, {"name": "high"}))
    assert len({plain, both, one}) == 3
    assert content(rendered(studio, "wan", entry)) == plain


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "is not on this worker's machine"),
        ("hash", "has the hash"),
        ("damaged", "cannot be loaded into flux"),
        ("width", "cannot be loaded into flux"),
        ("family", "has no weights for flux|cannot be loaded into flux"),
    ],
)
def test_a_lora_that_cannot_be_used_is_refused_by_name_and_the_model_is_as_before(
    studio: Studio, lora: Callable[..., dict[str, Any]], folder: Path, fault: str, message: str
) -> None:
    good = lora("flux")
    file = {
        "missing": {**good, "file": "none.safetensors"},
        "hash": {**good, "sha256": "0" * 64},
        "damaged": good,
        "width": lora("flux", seed=2, width=7),
        "family": lora("sd", "unet"),
    }[fault]
    if fault == "damaged":
        path = folder / good["file"]
        path.write_bytes(path.read_bytes()[:100])
        file["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = with_loras(studio, "flux", keeper=file)
    fresh = content(rendered(studio, "flux", entry))
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match=message) as refused:
            rendered(studio, "flux", entry, {"name": "keeper"})
        assert len(refused.value.message) < 500
        assert content(rendered(studio, "flux", entry)) == fresh


def test_a_lora_of_another_project_is_refused(studio: Studio, lora: Callable[..., dict[str, Any]]) -> None:
    file = lora("flux")
    entry = with_loras(studio, "flux", keeper={"weights": file, "projects": ["other"]}, ours={"weights": file, "projects": ["film"]})
    with pytest.raises(UnsupportedParameter, match=r'loras\[0\].name: flux has no LoRA "keeper" for this project: it has ours$'):
        rendered(studio, "flux", entry, {"name": "keeper"})
    rendered(studio, "flux", entry, {"name": "ours"})


def test_a_model_that_was_evicted_has_its_loras_again(machine: Machine, lora: Callable[..., dict[str, Any]]) -> None:
    entry = with_loras(machine.studio, "flux", keeper=lora("flux"))
    before, plain = (content(rendered(machine.studio, "flux", entry, *loras)) for loras in ([{"name": "keeper"}], []))
    rendered(machine.studio, "flux", entry, {"name": "keeper"})
    model_cache.evict_others("")
    assert content(rendered(machine.studio, "flux", entry, {"name": "keeper"})) == before
    model_cache.evict_others("")
    assert content(rendered(machine.studio, "flux", entry)) == plain


def test_loras_of_a_model_whose_weights_are_streamed_change_it_alike(
    machine: Machine, lora: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = with_loras(machine.studio, "flux", keeper=lora("flux"))
    plain, whole = (content(rendered(machine.studio, "flux", entry, *loras)) for loras in ([], [{"name": "keeper"}]))
    loaded = model_cache.find("flux")
    assert loaded is not None
    model_cache.clear()
    monkeypatch.setattr(eviction, "ONE_MODEL_SHARE", 0)
    machine.room = Budget(int(loaded.needs.whole * USABLE) - 1, GB)
    assert content(rendered(machine.studio, "flux", entry, {"name": "keeper"})) == whole
    assert content(rendered(machine.studio, "flux", entry)) == plain
    assert content(rendered(machine.studio, "flux", entry, {"name": "keeper"})) == whole
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.place is Placement.GROUPS


def test_memory_that_runs_out_in_a_run_with_loras_leaves_them_in_it(
    machine: Machine, lora: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = with_loras(machine.studio, "flux", keeper=lora("flux"))
    plain, whole = (content(rendered(machine.studio, "flux", entry, *loras)) for loras in ([], [{"name": "keeper"}]))
    run_out_of_memory_once(monkeypatch)
    result = rendered(machine.studio, "flux", entry, {"name": "keeper"})
    assert result.output.metadata["warnings"] == ["out of memory: the weights were moved to host memory"]
    assert content(result) == whole
    assert content(rendered(machine.studio, "flux", entry, {"name": "keeper"})) == whole
    assert content(rendered(machine.studio, "flux", entry)) == plain


def test_only_tasks_with_equal_loras_share_a_call(studio: Studio) -> None:
    entry = studio.entry("flux", limits={"batch": [[4096, 4]]})
    keys = {
        batch("flux", entry, ImageParams(prompt="x", resolution="64x64", loras=loras))[0]
        for loras in ([], [LoraUse("keeper")], [LoraUse("keeper", 0.5)], [LoraUse("other")], [LoraUse("keeper", 1.0)])
    }
    assert len(keys) == 4
    assert "" not in keys


def test_the_words_of_a_prompt_are_encoded_again_when_the_loras_change(studio: Studio, lora: Callable[..., dict[str, Any]]) -> None:
    entry = with_loras(studio, "sd", keeper=lora("sd", "unet"))
    plain = content(rendered(studio, "sd", entry))
    loaded = model_cache.find("sd")
    assert loaded is not None
    first = loaded.prompt_cache
    rendered(studio, "sd", entry, {"name": "keeper"})
    assert loaded.prompt_cache is not first
    assert content(rendered(studio, "sd", entry)) == plain


def test_loras_change_a_model_in_8_bits_and_leave_it_as_it_was(
    machine: Machine, lora: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = machine.studio.entry("flux", fp8=["transformer"], loras={"keeper": {"bases": ["flux"], "weights": lora("flux")}})
    rendered(machine.studio, "flux", entry)
    loaded = model_cache.find("flux")
    assert loaded is not None
    model_cache.clear()
    monkeypatch.setattr(eviction, "ONE_MODEL_SHARE", 0)
    machine.room = Budget(int(loaded.needs.whole * USABLE) - 1, GB)
    plain = content(rendered(machine.studio, "flux", entry))
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.place is Placement.FP8
    changed = content(rendered(machine.studio, "flux", entry, {"name": "keeper"}))
    assert changed != plain
    assert content(rendered(machine.studio, "flux", entry)) == plain
    assert content(rendered(machine.studio, "flux", entry, {"name": "keeper"})) == changed


async def test_a_lora_of_the_hub_is_pulled_verified_and_found(folder: Path, folders: Callable[[str], Path]) -> None:
    file = "styles/ink.safetensors"
    (folder / "repository" / "styles").mkdir(parents=True)
    tiny.lora(folders("sd") / "unet", folder / "repository" / file)
    (folder / "models.toml").write_text(
        f'[loras.ink]\nbases = ["flux-schnell"]\nlicence = "mit"\n'
        f'weights = {{ repository = "team/lora", revision = "{COMMIT}", file = "{file}" }}\n'
    )
    async with hub(folder / "repository", "team/lora") as served:
        code, out, _ = await models(served, folder, "check", "ink")
        assert (code, "run `movieq models pull`" in out) == (1, True)
        served.changed = True
        code, _, error = await models(served, folder, "pull", "ink")
        assert (code, "and was deleted" in error) == (1, True)
        served.changed = False
        code, out, error = await models(served, folder, "pull", "ink")
        assert code == 0, error
        assert "licence mit" in error
    code, out, _ = await models(served, folder, "check", "ink")
    assert (code, out.strip()) == (0, "ink: ok")
    code, out, _ = await models(served, folder, "list")
    assert re.search(r"^ink +flux-schnell +all +mit +yes", out, re.MULTILINE)
    (pulled,) = (folder / "hf").rglob("ink.safetensors")
    pulled.resolve().write_bytes(pulled.read_bytes()[:-1] + b"!")
    code, out, _ = await models(served, folder, "check", "ink")
    assert (code, "differs from revision" in out) == (1, True)


def test_a_model_always_has_the_loras_of_its_entry_and_the_result_says_so(studio: Studio, lora: Callable[..., dict[str, Any]]) -> None:
    few, own = lora("flux", seed=1), lora("flux", seed=2)
    plain = content(rendered(studio, "flux", with_loras(studio, "flux", few=few, own=own)))
    model_cache.clear()
    entry = msgspec.structs.replace(with_loras(studio, "flux", few=few, own=own), with_loras=[LoraUse("few")])
    always = rendered(studio, "flux", entry)
    assert content(always) != plain
    assert always.output.metadata["lossy"] == ["LoRA few"]
    assert "loras" not in always.output.metadata
    both = rendered(studio, "flux", entry, {"name": "own"})
    assert content(both) not in (plain, content(always))
    assert content(rendered(studio, "flux", entry)) == content(always)
    with pytest.raises(UnsupportedParameter, match='"few" is named twice'):
        rendered(studio, "flux", entry, {"name": "few"})


def test_a_streamed_run_that_is_tried_again_has_its_loras_again(
    machine: Machine, lora: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = with_loras(machine.studio, "flux", keeper=lora("flux"))
    whole = content(rendered(machine.studio, "flux", entry, {"name": "keeper"}))
    loaded = model_cache.find("flux")
    assert loaded is not None
    model_cache.clear()
    monkeypatch.setattr(eviction, "ONE_MODEL_SHARE", 0)
    machine.room = Budget(int(loaded.needs.whole * USABLE) - 1, GB)
    rendered(machine.studio, "flux", entry)
    machine.room = Budget(GB, GB)
    machine.get("vits")  # which the fallback unloads
    run_out_of_memory_once(monkeypatch)
    result = rendered(machine.studio, "flux", entry, {"name": "keeper"})
    assert "out of memory: other models were unloaded" in result.output.metadata["warnings"]
    assert content(result) == whole
