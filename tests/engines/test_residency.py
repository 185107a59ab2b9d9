"""Which models stay on the device, which wait in the host's memory, and that nothing is read twice that need not be.

The device and the host are both the CPU here: what is tried is the order in which models come and go, and that they work when they are
back.
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
from workers.child.diffusion.eviction import ACTIVATIONS, Budget
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
    """Room for models, as a test likes it, and models that come to it. Each of them needs as much as its entry says."""

    def __init__(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        self.studio = studio
        self.room = Budget(GB, 0)
        self.runs = 0
        self.moves: list[tuple[str, str]] = []
        monkeypatch.setattr(eviction, "budget", lambda device, parked: self.room)
        move = Loaded.move

        def seen(loaded: Loaded, place: str) -> None:
            self.moves.append((next(iter(loaded.entry.tasks)), place))
            move(loaded, place)

        monkeypatch.setattr(Loaded, "move", seen)

    def get(self, name: str, run: str | None = None, **changes: Any) -> Loaded:
        """The model, for the next run or for one that goes on."""
        self.runs += run is None
        given: dict[str, Any] = {"text": "x"} if name.startswith("vits") else {"prompt": "x"}
        take = self.studio.take(name.partition(".")[0], print, **given)
        take.run = msgspec.structs.replace(take.run, run=run or f"run{self.runs}")
        return model_cache.get(take, name, self.studio.entry(name.partition(".")[0], **changes), "cpu")


@pytest.fixture
def machine(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(studio, monkeypatch)


def where() -> tuple[list[str], list[str]]:
    """What is on the device, and what waits."""
    return list(model_cache.names()), list(model_cache.parked())


def room_for(*loaded: Loaded, host: int = 0) -> Budget:
    """So much that these can lie there while the largest of them works."""
    largest = max(each.bytes for each in loaded)
    return Budget(sum(each.bytes for each in loaded) - largest + int(largest * ACTIVATIONS), host)


def test_the_model_used_longest_ago_leaves_first(machine: Machine) -> None:
    models = [machine.get(name) for name in ("vits", "vits.2", "vits.3")]
    assert where() == (["vits", "vits.2", "vits.3"], [])
    machine.room = room_for(*models)
    machine.get("vits")
    machine.get("vits.4")
    assert where() == (["vits.3", "vits", "vits.4"], [])
    assert model_cache.swaps() == ModelSwaps(loads=4, drops=1)


def test_what_had_to_leave_waits_in_the_hosts_memory_and_comes_back_without_the_disk(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = folder / "model"
    shutil.copytree(machine.studio.entry("sd").weights.repository, home)  # type: ignore[union-attr]
    entry = machine.studio.entry("sd", weights={"repository": str(home)})
    task: dict[str, Any] = {"prompt": "a lighthouse", "resolution": "64x64", "format": "png"}
    fresh = machine.studio.make("sd", entry=entry, **task)
    shutil.rmtree(home)
    one = model_cache._models.resident["sd"]
    machine.room = Budget(int(one.bytes * ACTIVATIONS), host=one.bytes)
    machine.get("flux")
    assert where() == (["flux"], ["sd"])
    again = machine.studio.make("sd", entry=entry, **task)
    assert again.path.read_bytes() == fresh.path.read_bytes()
    assert again.stages[0] == "load", "it takes its time, though not the disk's"
    assert where() == (["sd"], ["flux"])
    assert model_cache.swaps() == ModelSwaps(loads=2, returns=1, parkings=2)
    model_cache.clear()
    with pytest.raises(ModelUnavailable):
        machine.studio.make("sd", entry=entry, **task)


def test_the_host_keeps_what_it_has_room_for_and_drops_the_rest(machine: Machine) -> None:
    one = machine.get("vits")
    machine.room = Budget(int(one.bytes * ACTIVATIONS), host=2 * one.bytes)
    for name in ("vits.2", "vits.3", "vits.4"):
        machine.get(name)
    assert where() == (["vits.4"], ["vits.2", "vits.3"])
    assert model_cache.swaps() == ModelSwaps(loads=4, parkings=3, drops=1)
    machine.room = Budget(int(one.bytes * ACTIVATIONS), host=one.bytes - 1)
    machine.get("vits.5")
    assert where() == (["vits.5"], ["vits.2", "vits.3"]), "what is too large for the host pushes nobody out"
    assert model_cache.swaps() == ModelSwaps(loads=5, parkings=3, drops=2)


def test_on_a_cpu_nothing_waits_elsewhere() -> None:
    assert eviction.budget("cpu", 0).host == 0
    assert eviction.budget("cpu", 0).device > 100_000_000


def test_a_model_has_the_room_that_the_table_says_beside_the_weights_of_the_others(machine: Machine) -> None:
    one = machine.get("vits")
    machine.room = Budget(one.bytes + 2 * GB, 0)
    machine.get("vits.2", gpu_memory_gb=2)
    assert where() == (["vits", "vits.2"], [])
    machine.get("vits")
    machine.get("vits.2", gpu_memory_gb=2)
    assert where() == (["vits", "vits.2"], []), "it lies there, and works once more"
    machine.room = Budget(one.bytes + 2 * GB - 1, 0)
    machine.get("vits.2", gpu_memory_gb=2)
    assert where() == (["vits.2"], [])


def test_a_run_that_uses_two_models_keeps_both_however_little_room_there_is(machine: Machine) -> None:
    machine.get("vits", run="one")
    machine.room = Budget(0, 0)
    machine.get("stable_audio", run="one")
    assert where() == (["vits", "stable_audio"], [])
    machine.get("stable_audio", run="two")
    assert where() == (["stable_audio"], [])


def test_a_clip_with_sound_is_made_where_only_one_model_has_room(machine: Machine) -> None:
    sound = ("stable_audio", machine.studio.entry("stable_audio"))
    task: dict[str, Any] = {"prompt": "a lighthouse", "duration": 1, "resolution": "64x64", "fps": 12, "audio_cues": ["sea"]}
    fresh = machine.studio.make("ltx", sound=sound, **task)
    model_cache.clear()
    machine.room = Budget(0, GB)
    assert machine.studio.make("ltx", sound=sound, **task).path.read_bytes() == fresh.path.read_bytes()


def test_out_of_memory_parks_the_others_and_they_come_back(machine: Machine) -> None:
    one, _ = machine.get("vits"), machine.get("vits.2")
    machine.room = Budget(GB, GB)
    tries = iter([True, False])

    def call() -> str:
        if next(tries):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "made"

    take = machine.studio.take("vits", print, text="x")
    assert oom.climb(take, "vits.2", one.pipe, call) == "made"
    assert take.warnings == ["out of memory: other models were unloaded"]
    assert where() == (["vits.2"], ["vits"])
    assert machine.get("vits") is one


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("way", ["from the disk", "from the host"])
def test_a_model_that_does_not_fit_at_once_comes_without_the_others_or_says_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, way: str, times: int
) -> None:
    machine.room = Budget(GB, GB)
    machine.get("vits")
    if way == "from the host":
        model_cache.evict("")
    machine.get("vits.2")
    faults = iter(range(times))

    def faulty(bring: Any) -> Any:
        def brought(*given: Any) -> Any:
            if given[-1] != "cpu" or way == "from the disk":
                for _ in faults:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return bring(*given)

        return brought

    if way == "from the disk":
        model_cache._models.forget("vits")
        monkeypatch.setattr(model_cache, "_load", faulty(model_cache._load))
    else:
        monkeypatch.setattr(model_cache._models, "bring_back", faulty(model_cache._models.bring_back))
    if times == 1:
        machine.get("vits")
        assert where() == (["vits"], ["vits.2"])
        return
    with pytest.raises(OutOfMemory, match="does not suffice to load vits"):
        machine.get("vits")
    assert "vits" not in model_cache.names()
    machine.get("vits")
    assert "vits" in model_cache.names()


def test_another_entry_of_a_name_is_another_model(machine: Machine) -> None:
    machine.room = Budget(GB, GB)
    first = machine.get("vits")
    model_cache.evict("")
    assert machine.get("vits", licence="other") is not first
    assert where() == (["vits"], [])


def test_an_engine_says_what_is_where_with_each_result(machine: Machine, folder: Path) -> None:
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
        (finish,) = child_main.perform((run,), lambda message: None, {run.run: Flag()})
        assert callable(finish)
        answers.append(child_main.answered(run, finish))
    done = answers[-1]
    assert isinstance(done, Done)
    assert (done.models, done.models_parked) == (("animatic", "flux"), ("sd",))
    assert done.model_swaps == ModelSwaps(loads=2, parkings=1)
