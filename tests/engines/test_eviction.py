"""Which models stay on the device, which are offloaded to host memory; an offloaded model is not read from disk again.

Device and host are both the CPU here. Tested are the order of eviction, and that an offloaded model works afterwards.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from movieq.errors import ModelUnavailable, OutOfMemory
from movieq.tasks.entities import ModelSwaps
from tests.engines.conftest import Studio
from workers.child import __main__ as child_main
from workers.child.diffusion import eviction, model_cache, oom
from workers.child.diffusion.eviction import MEMORY_PER_WEIGHT, Budget
from workers.child.diffusion.loaded import Loaded
from workers.child.job import Flag
from workers.protocol import Done, Run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

GB = 2**30


class Machine:
    """A machine with the memory for models that the test sets."""

    def __init__(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        self.studio = studio
        self.room = Budget(GB, 0)
        self.runs = 0
        monkeypatch.setattr(eviction, "budget", lambda device, parked: self.room)

    def get(self, name: str, run: str | None = None, device: str = "cpu", **changes: Any) -> Loaded:
        """Return the model for a new run, or for a run that goes on."""
        self.runs += run is None
        given: dict[str, Any] = {"text": "x"} if name.startswith("vits") else {"prompt": "x"}
        job = self.studio.job(name.partition(".")[0], print, **given)
        job.run = msgspec.structs.replace(job.run, run=run or f"run{self.runs}")
        return model_cache.get(job, name, self.studio.entry(name.partition(".")[0], **changes), device)


@pytest.fixture
def machine(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(studio, monkeypatch)


def where() -> tuple[list[str], list[str]]:
    """Return the models on the device, and those offloaded."""
    return list(model_cache.loaded_names()), list(model_cache.offloaded_names())


def room_for(*loaded: Loaded, host: int = 0) -> Budget:
    """Return a memory budget that holds all of these while the largest of them runs."""
    largest = max(each.size_bytes for each in loaded)
    return Budget(sum(each.size_bytes for each in loaded) - largest + int(largest * MEMORY_PER_WEIGHT), host)


def test_the_least_recently_used_model_is_evicted_first(machine: Machine) -> None:
    models = [machine.get(name) for name in ("vits", "vits.2", "vits.3")]
    assert where() == (["vits", "vits.2", "vits.3"], [])
    machine.room = room_for(*models)
    machine.get("vits")
    machine.get("vits.4")
    assert where() == (["vits.3", "vits", "vits.4"], [])
    assert model_cache.swaps() == ModelSwaps(loads=4, drops=1)


def test_an_evicted_model_is_offloaded_and_restored_without_reading_the_disk(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = folder / "model"
    shutil.copytree(machine.studio.entry("sd").weights.repository, home)  # type: ignore[union-attr]
    entry = machine.studio.entry("sd", weights={"repository": str(home)})
    task: dict[str, Any] = {"prompt": "a lighthouse", "resolution": "64x64", "format": "png"}
    fresh = machine.studio.render("sd", entry=entry, **task)
    shutil.rmtree(home)
    one = model_cache.find("sd")
    assert one is not None
    machine.room = Budget(int(one.size_bytes * MEMORY_PER_WEIGHT), host=one.size_bytes)
    machine.get("flux")
    assert where() == (["flux"], ["sd"])
    again = machine.studio.render("sd", entry=entry, **task)
    assert again.path.read_bytes() == fresh.path.read_bytes()
    assert again.stages[0] == "load", "restoring takes time too"
    assert where() == (["sd"], ["flux"])
    assert model_cache.swaps() == ModelSwaps(loads=2, returns=1, parkings=2)
    model_cache.clear()
    with pytest.raises(ModelUnavailable):
        machine.studio.render("sd", entry=entry, **task)


def test_host_memory_takes_what_it_has_room_for_and_the_rest_is_dropped(machine: Machine) -> None:
    one = machine.get("vits")
    machine.room = Budget(int(one.size_bytes * MEMORY_PER_WEIGHT), host=2 * one.size_bytes)
    for name in ("vits.2", "vits.3", "vits.4"):
        machine.get(name)
    assert where() == (["vits.4"], ["vits.2", "vits.3"])
    assert model_cache.swaps() == ModelSwaps(loads=4, parkings=3, drops=1)
    machine.room = Budget(int(one.size_bytes * MEMORY_PER_WEIGHT), host=one.size_bytes - 1)
    machine.get("vits.5")
    assert where() == (["vits.5"], ["vits.2", "vits.3"]), "a model too large for the host displaces no other"
    assert model_cache.swaps() == ModelSwaps(loads=5, parkings=3, drops=2)


def test_on_a_cpu_nothing_is_offloaded() -> None:
    assert eviction.budget("cpu", 0).host == 0
    assert eviction.budget("cpu", 0).device > 100_000_000


def test_a_model_gets_the_room_of_its_table_entry_beside_the_weights_of_the_others(machine: Machine) -> None:
    one = machine.get("vits")
    machine.room = Budget(one.size_bytes + 2 * GB, 0)
    machine.get("vits.2", gpu_memory_gb=2)
    assert where() == (["vits", "vits.2"], [])
    machine.get("vits")
    machine.get("vits.2", gpu_memory_gb=2)
    assert where() == (["vits", "vits.2"], []), "it is there, and runs once more"
    machine.room = Budget(one.size_bytes + 2 * GB - 1, 0)
    machine.get("vits.2", gpu_memory_gb=2)
    assert where() == (["vits.2"], [])


def test_the_models_of_one_run_do_not_evict_each_other(machine: Machine) -> None:
    machine.get("vits", run="one")
    machine.room = Budget(0, 0)
    machine.get("stable_audio", run="one")
    assert where() == (["vits", "stable_audio"], [])
    machine.get("stable_audio", run="two")
    assert where() == (["stable_audio"], [])


def test_a_clip_with_sound_is_rendered_where_only_one_model_has_room(machine: Machine) -> None:
    sound = ("stable_audio", machine.studio.entry("stable_audio"))
    task: dict[str, Any] = {"prompt": "a lighthouse", "duration": 1, "resolution": "64x64", "fps": 12, "audio_cues": ["sea"]}
    fresh = machine.studio.render("ltx", sound=sound, **task)
    model_cache.clear()
    machine.room = Budget(0, GB)
    assert machine.studio.render("ltx", sound=sound, **task).path.read_bytes() == fresh.path.read_bytes()


def test_out_of_memory_offloads_the_other_models_and_they_can_be_restored(machine: Machine) -> None:
    one, _ = machine.get("vits"), machine.get("vits.2")
    machine.room = Budget(GB, GB)
    tries = iter([True, False])

    def call() -> str:
        if next(tries):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "rendered"

    job = machine.studio.job("vits", print, text="x")
    assert oom.with_fallback(job, "vits.2", one.pipe, call) == "rendered"
    assert job.warnings == ["out of memory: other models were unloaded"]
    assert where() == (["vits.2"], ["vits"])
    assert machine.get("vits") is one


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("way", ["from the disk", "from the host"])
def test_a_model_that_does_not_fit_beside_the_others_is_loaded_without_them_or_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, way: str, times: int
) -> None:
    def get(name: str) -> None:
        machine.get(name, device="cpu:0", dtype="float32")  # another name of the CPU, so that device and host can be told apart

    machine.room = Budget(GB, GB)
    if way == "from the host":
        get("vits")
        model_cache.evict_others("")
    get("vits.2")
    to, faults = torch.nn.Module.to, iter(range(times))

    def faulty(self: Any, device: str, **options: Any) -> Any:
        if device == "cpu:0":
            for _ in faults:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return to(self, device, **options)

    monkeypatch.setattr(torch.nn.Module, "to", faulty)
    if times == 1:
        get("vits")
        assert where() == (["vits"], ["vits.2"])
        return
    with pytest.raises(OutOfMemory, match="does not suffice to load vits"):
        get("vits")
    assert "vits" not in model_cache.loaded_names()
    get("vits")
    assert "vits" in model_cache.loaded_names()


def test_a_changed_table_entry_is_another_model(machine: Machine) -> None:
    machine.room = Budget(GB, GB)
    first = machine.get("vits")
    model_cache.evict_others("")
    assert machine.get("vits", licence="other") is not first
    assert where() == (["vits"], [])


def test_each_answer_lists_the_models_in_memory(machine: Machine, folder: Path) -> None:
    machine.room = Budget(0, GB)
    answers = []
    for number, name in enumerate(("sd", "flux")):
        (folder / name).mkdir()
        given = {"prompt": "x", "resolution": "64x64"}
        run = Run(
            f"run{number}",
            "task",
            "film",
            "generate_image",
            "diffusers",
            name,
            given,
            {},
            {},
            1,
            str(folder / name),
            machine.studio.entry(name),
        )
        (finish,) = child_main.render_runs((run,), lambda message: None, {run.run: Flag()})
        assert callable(finish)
        answers.append(child_main.finish_run(run, finish))
    done = answers[-1]
    assert isinstance(done, Done)
    assert (done.models, done.models_parked) == (("animatic", "flux"), ("sd",))
    assert done.model_swaps == ModelSwaps(loads=2, parkings=1)
