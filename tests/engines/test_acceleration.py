"""Other attention kernels and compiled blocks: they change how fast a model renders, and results by rounding alone."""

from __future__ import annotations

import asyncio
import math
import os
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from movieq.errors import ModelUnavailable
from movieq.models import speed
from movieq.models.speed import Measured, Speed
from movieq.models.table import USABLE
from tests.engines.conftest import Result, Studio, difference, run_out_of_memory_once
from tests.engines.test_diffusion import pytestmark  # noqa: F401  # the same libraries
from tests.engines.test_eviction import GB, Machine, machine  # noqa: F401
from tests.engines.test_loras import PICTURE, content, lora, with_loras  # noqa: F401
from workers.child.diffusion import acceleration, engine, eviction, model_cache
from workers.child.diffusion.eviction import Budget
from workers.child.diffusion.placement import Placement
from workers.child.job import JobCancelled
from workers.model_bench import Timing, Way, fastest
from workers.protocol import FromChild, Step

PLAIN, COMPILED = Way("as torch does"), Way("compiled", compile=True)
CUDNN, BOTH = Way("cudnn", "_native_cudnn"), Way("both", "_native_cudnn", compile=True)
TOLERANCE = 2 / 255
"""Largest difference of a picture that is rounding."""


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace blocks without generating code for them, which needs a C++ compiler and minutes; and forget them afterwards."""
    monkeypatch.setattr(acceleration, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def rendered(studio: Studio, name: str = "flux", **given: Any) -> Result:
    return studio.render(name, **PICTURE, **given)


def kernels(name: str) -> set[str | None]:
    """Return the attention kernels of a loaded model's network that denoises."""
    loaded = model_cache.find(name)
    assert loaded is not None
    processors: list[Any] = [getattr(module, "processor", None) for module in loaded.pipe.transformer.modules()]
    return {each._attention_backend for each in processors if hasattr(each, "_attention_backend")}


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_another_attention_kernel_changes_a_picture_by_rounding_and_no_other_model(studio: Studio, name: str) -> None:
    plain = rendered(studio, name)
    other = rendered(studio, name, entry=studio.entry(name, attention="_native_math"))
    assert kernels(name) == {"_native_math"}
    assert other.output.metadata["attention"] == "_native_math"
    assert "attention" not in plain.output.metadata
    assert difference(plain.decoded, other.decoded) <= TOLERANCE
    neighbour = "z_image" if name == "flux" else "flux"
    rendered(studio, neighbour)
    assert kernels(neighbour) == {"native"}


def test_a_kernel_that_does_not_work_here_is_named(studio: Studio) -> None:
    with pytest.raises(ModelUnavailable, match="attention: xformers does not work on this machine"):
        rendered(studio, entry=studio.entry("flux", attention="xformers"))
    rendered(studio)


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_compiled_blocks_render_the_same_picture(studio: Studio, name: str) -> None:
    plain = rendered(studio, name)
    result = rendered(studio, name, entry=studio.entry(name, compile=True))
    assert result.output.metadata["compiled"] is True
    assert "compiled" not in plain.output.metadata
    assert difference(plain.decoded, result.decoded) <= TOLERANCE
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    assert before > 0
    again = rendered(studio, name, entry=studio.entry(name, compile=True))
    assert content(again) == content(result)
    assert stats["unique_graphs"] == before, "a second task compiles nothing"


def test_a_model_with_compiled_blocks_is_stopped_within_a_step(studio: Studio) -> None:
    entry = studio.entry("flux", compile=True)
    rendered(studio, entry=entry)
    seen: list[Step] = []

    def stop(message: FromChild) -> None:
        if isinstance(message, Step) and message.stage == "denoise":
            seen.append(message)
            studio.flag.set()

    job = studio.job("flux", stop, entry=entry, **PICTURE)
    with pytest.raises(JobCancelled):
        engine.render(job)
    assert [each.step for each in seen] == [0], "the next block sees the cancel"


def test_loras_change_a_compiled_model_and_leave_it_as_it_was(studio: Studio, lora: Callable[..., dict[str, Any]]) -> None:  # noqa: F811
    entry = msgspec.structs.replace(with_loras(studio, "flux", keeper=lora("flux")), compile=True)
    plain = rendered(studio, entry=entry)
    changed = rendered(studio, entry=entry, loras=[{"name": "keeper"}])
    assert difference(plain.decoded, changed.decoded) > TOLERANCE
    assert content(rendered(studio, entry=entry)) == content(plain)


def test_a_compiled_model_whose_memory_runs_out_is_streamed_and_compiled_again(
    machine: Machine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine.room = Budget(GB, GB)
    entry = machine.studio.entry("flux", compile=True)
    before = content(rendered(machine.studio, entry=entry))
    run_out_of_memory_once(monkeypatch)
    streamed = rendered(machine.studio, entry=entry)
    assert streamed.output.metadata["warnings"] == ["out of memory: the weights were moved to host memory"]
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.compiled
    assert content(rendered(machine.studio, entry=entry)) == before


def test_a_model_larger_than_the_device_is_not_compiled(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    machine.room = Budget(GB, GB)
    rendered(machine.studio)
    loaded = model_cache.find("flux")
    assert loaded is not None
    model_cache.clear()
    monkeypatch.setattr(eviction, "ONE_MODEL_SHARE", 0)
    machine.room = Budget(int(loaded.needs.whole * USABLE) - 1, GB)
    result = rendered(machine.studio, entry=machine.studio.entry("flux", compile=True))
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.place is Placement.GROUPS
    assert "compiled" not in result.output.metadata


def test_blocks_of_a_class_are_compiled_once_and_a_third_size_compiles_nothing() -> None:
    from diffusers import FluxTransformer2DModel

    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 4, "num_single_layers": 6, "axes_dims_rope": (4, 4, 8)}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    network: Any = FluxTransformer2DModel(**sizes, **heads)  # type: ignore[no-untyped-call]

    def graphs_after(pixels: int) -> int:
        words = {"encoder_hidden_states": torch.randn(1, 8, 32), "pooled_projections": torch.randn(1, 32), "txt_ids": torch.zeros(8, 3)}
        picture = {"hidden_states": torch.randn(1, pixels, 4), "img_ids": torch.zeros(pixels, 3), "timestep": torch.ones(1)}
        with torch.no_grad():
            network(**words, **picture)
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    assert len(acceleration.compile_blocks([network])) == 10
    assert 0 < graphs_after(16) <= 3
    second = graphs_after(36)
    assert graphs_after(64) == second


def test_a_model_without_blocks_to_compile_is_refused() -> None:
    with pytest.raises(ModelUnavailable, match="compile: none of its networks names blocks"):
        acceleration.compile_blocks([torch.nn.Linear(1, 1)])


def test_what_was_measured_counts_on_the_same_device_with_the_same_libraries_and_after_the_entry(
    studio: Studio, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    entry, versions = studio.entry("flux"), acceleration.versions()
    speed.write(entry, Measured("cpu", versions, Speed("_native_math", compile=True)))
    measured = rendered(studio)
    assert (measured.output.metadata["attention"], measured.output.metadata["compiled"]) == ("_native_math", True)
    model_cache.clear()
    own = rendered(studio, entry=studio.entry("flux", attention="native", compile=False))
    assert own.output.metadata.keys().isdisjoint({"attention", "compiled"})
    for other in (
        Measured("NVIDIA H200", versions, Speed("_native_math")),
        Measured("cpu", {**versions, "torch": "1"}, Speed("_native_math")),
    ):
        speed.write(entry, other)
        model_cache.clear()
        assert "attention" not in rendered(studio).output.metadata


async def test_a_bench_measures_each_way_and_writes_the_fastest_that_changes_nothing(folder: Path, folders: Callable[[str], Path]) -> None:
    (folder / "models.toml").write_text(
        f'[tiny]\nengine = "diffusers"\nkind = "cpu_intensive"\ntasks = {{ generate_image = 1 }}\npipeline = "FluxPipeline"\n'
        f'weights = {{ repository = "{folders("flux")}" }}\ndefaults = {{ steps = 4 }}\nlimits = {{ pixels = [256, 4096] }}\n'
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")},
        "MOVIEQ_MODELS": str(folder / "models.toml"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TORCH_COMPILE_DISABLE": "1",  # it would take minutes
    }
    command = (sys.executable, "-m", "movieq.cli", "models", "bench", "tiny", "--device", "cpu")
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=environment, stdout=PIPE, stderr=PIPE)
    out, err = await asyncio.wait_for(process.communicate(), 200)
    assert process.returncode == 0, err
    lines = out.decode().splitlines()
    for way in ("as torch does", "attention _native_flash", "compiled", "first_block_cache 0.08 .* changes the result"):
        assert any(re.match(way, line) for line in lines), out
    assert any(line.startswith("attention _native_cudnn") and "No viable backend" in line for line in lines), out
    (written,) = (folder / "cache").rglob("*.speed.json")
    measured = msgspec.json.decode(written.read_bytes(), type=Measured)
    assert (measured.device, measured.versions) == ("cpu", acceleration.versions())
    assert lines[-1].startswith(f"fastest without loss on cpu: attention {measured.speed.attention}, ")


def timing(way: Way, step_s: float, psnr: float = 60.0) -> Timing:
    return Timing(way, 1.0, 1.0, step_s, psnr)


@pytest.mark.parametrize(
    ("timings", "best"),
    [
        ([], PLAIN),
        ([timing(COMPILED, 0.5)], COMPILED),
        ([timing(COMPILED, 0.99)], PLAIN),
        ([timing(COMPILED, 0.5, psnr=12.0)], PLAIN),
        ([timing(Way("sage", "sage"), 0.2), timing(Way("cache", first_block_cache=0.08), 0.2)], PLAIN),
        ([Timing(COMPILED, problem="no compiler")], PLAIN),
        ([timing(CUDNN, 0.6), timing(COMPILED, 0.7), timing(BOTH, 0.4)], BOTH),
        ([timing(CUDNN, 0.6), timing(COMPILED, 0.7), timing(BOTH, 0.65)], CUDNN),
    ],
)
def test_the_fastest_way_is_the_one_that_is_worth_it_and_changes_results_by_rounding_alone(timings: list[Timing], best: Way) -> None:
    assert fastest(timings, timing(PLAIN, 1.0, math.inf)) == best
