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
from movieq.models.table import USABLE, Model
from movieq.tasks.entities import ModelSwaps
from tests.engines.conftest import Studio, decoded, difference, run_out_of_memory_once
from workers.child import __main__ as child_main
from workers.child.diffusion import engine as diffusion
from workers.child.diffusion import eviction, host_copy, model_cache, oom
from workers.child.diffusion.eviction import Budget
from workers.child.diffusion.loaded import Loaded
from workers.child.diffusion.placement import MEMORY_PER_WEIGHT, Placement
from workers.child.job import Flag, JobCancelled
from workers.protocol import Done, FromChild, Run, Step

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
    machine.room = Budget(int(one.size_bytes * MEMORY_PER_WEIGHT), host=one.copy_bytes)
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
    machine.room = Budget(int(one.size_bytes * MEMORY_PER_WEIGHT), host=2 * one.copy_bytes)
    for name in ("vits.2", "vits.3", "vits.4"):
        machine.get(name)
    assert where() == (["vits.4"], ["vits.2", "vits.3"])
    assert model_cache.swaps() == ModelSwaps(loads=4, parkings=3, drops=1)
    machine.room = Budget(int(one.size_bytes * MEMORY_PER_WEIGHT), host=one.copy_bytes - 1)
    machine.get("vits.5")
    assert where() == (["vits.5"], ["vits.2", "vits.3"]), "a model too large for the host displaces no other"
    assert model_cache.swaps() == ModelSwaps(loads=5, parkings=3, drops=2)


def test_on_a_cpu_nothing_is_offloaded() -> None:
    assert eviction.budget("cpu", 0).host == 0
    assert eviction.budget("cpu", 0).device > 100_000_000


def test_a_model_gets_the_room_of_its_table_entry_beside_the_weights_of_the_others(machine: Machine) -> None:
    """The table's figure is for GPUs: "cpu:0" stands for one."""
    one = machine.get("vits")
    machine.room = Budget(one.size_bytes + 2 * GB, 0)
    machine.get("vits.2", gpu_memory_gb=2, device="cpu:0")
    assert where() == (["vits", "vits.2"], [])
    machine.get("vits")
    machine.get("vits.2", gpu_memory_gb=2, device="cpu:0")
    assert where() == (["vits", "vits.2"], []), "it is there, and runs once more"
    machine.room = Budget(one.size_bytes + 2 * GB - 1, 0)
    machine.get("vits.2", gpu_memory_gb=2, device="cpu:0")
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
    one, two = machine.get("vits"), machine.get("vits.2")
    machine.room = Budget(GB, GB)
    tries = iter([True, False])

    def call() -> str:
        if next(tries):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "rendered"

    job = machine.studio.job("vits", print, text="x")
    with oom.Fallback(job, "vits.2", two) as fallback:
        assert fallback.call(call) == "rendered"
    assert job.warnings == ["out of memory: other models were unloaded"]
    assert where() == (["vits.2"], ["vits"])
    assert machine.get("vits") is one


@pytest.mark.parametrize("times", [1, 2])
def test_an_offloaded_model_that_does_not_fit_beside_the_others_returns_without_them_or_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    machine.room = Budget(GB, GB)
    one = machine.get("vits")
    model_cache.evict_others("")
    machine.get("vits.2")
    enter, faults = Loaded.enter_device, iter(range(times))

    def faulty(self: Loaded, device: str) -> None:
        for _ in faults if self is one else ():
            raise torch.OutOfMemoryError("CUDA out of memory")
        enter(self, device)

    monkeypatch.setattr(Loaded, "enter_device", faulty)
    if times == 1:
        machine.get("vits")
        assert where() == (["vits"], ["vits.2"])
        return
    with pytest.raises(OutOfMemory, match="does not suffice to load vits"):
        machine.get("vits")
    assert where() == ([], ["vits.2", "vits"])
    machine.get("vits")
    assert "vits" in model_cache.loaded_names()


# ── Placement ──


def test_a_model_that_does_not_fit_is_refused_before_anything_of_it_is_read(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr("workers.child.diffusion.loading.load", lambda *given: read.append(given))
    machine.room = Budget(1000, 1000)
    monkeypatch.setattr(eviction, "ONE_MODEL_SHARE", 0)
    with pytest.raises(OutOfMemory, match=r"sd needs .* GiB of device memory, or .*; this worker has"):
        machine.get("sd")
    assert not read


TASK: dict[str, Any] = {"prompt": "a lighthouse", "resolution": "64x64", "format": "png"}


def test_a_model_larger_than_the_device_renders_the_same_bytes_with_its_weights_in_host_memory(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.room = Budget(GB, GB)
    whole = machine.studio.render("flux", **TASK)
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.place is Placement.WHOLE
    model_cache.clear()
    monkeypatch.setattr(eviction, "ONE_MODEL_SHARE", 0)
    machine.room = Budget(int(loaded.needs.whole * USABLE) - 1, GB)
    streamed = machine.studio.render("flux", **TASK)
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.place is Placement.GROUPS
    assert streamed.path.read_bytes() == whole.path.read_bytes()
    assert any("its weights stay in host memory" in each for each in streamed.output.metadata["warnings"])
    assert machine.studio.render("flux", **TASK).path.read_bytes() == whole.path.read_bytes()


def test_a_run_that_is_cancelled_while_weights_are_streamed_leaves_nothing_behind(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.room = Budget(GB, GB)
    whole = machine.studio.render("flux", **TASK)
    one = model_cache.find("flux")
    assert one is not None
    one.stream_groups("cpu")

    def cancel(message: FromChild) -> None:
        if isinstance(message, Step) and message.stage == "denoise" and message.step:
            machine.studio.flag.set()

    with pytest.raises(JobCancelled):
        diffusion.render(machine.studio.job("flux", cancel, **TASK))
    assert machine.studio.render("flux", **TASK).path.read_bytes() == whole.path.read_bytes()


def test_memory_that_runs_out_in_a_step_moves_the_weights_to_host_memory_for_this_run_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.room = Budget(GB, GB)
    whole = machine.studio.render("flux", **TASK)
    run_out_of_memory_once(monkeypatch)
    result = machine.studio.render("flux", **TASK)
    assert result.output.metadata["warnings"] == ["out of memory: the weights were moved to host memory"]
    assert result.path.read_bytes() == whole.path.read_bytes()
    assert where() == ([], ["flux"]), "it returns for the next task, as a whole"
    assert machine.studio.render("flux", **TASK).path.read_bytes() == whole.path.read_bytes()
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.place is Placement.WHOLE


def small_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch, entry: Model) -> bytes:
    """Render on a machine that has room for the whole model, then take room away until it has only room for 8 bits."""
    machine.room = Budget(GB, GB)
    whole = machine.studio.render("flux", entry=entry, **TASK).path.read_bytes()
    loaded = model_cache.find("flux")
    assert loaded is not None
    model_cache.clear()
    monkeypatch.setattr(eviction, "ONE_MODEL_SHARE", 0)
    machine.room = Budget(int(loaded.needs.whole * USABLE) - 1, GB)
    return whole


def test_a_model_is_held_in_8_bits_if_its_entry_allows_that_and_the_result_says_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = machine.studio.entry("flux", fp8=["transformer"])
    whole = small_machine(machine, monkeypatch, entry)
    result = machine.studio.render("flux", entry=entry, **TASK)
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.place is Placement.FP8
    assert loaded.size_bytes < loaded.needs.weights - loaded.needs.saved * 0.7
    assert result.output.metadata["lossy"] == ["transformer in 8 bits"]
    assert any("in 8 bits, which changes the result slightly" in each for each in result.output.metadata["warnings"])
    (folder,) = {result.path.parent}
    (folder / "whole.png").write_bytes(whole)
    assert 0 < difference(decoded(folder / "whole.png"), result.decoded) < 0.1
    again = machine.studio.render("flux", entry=entry, **TASK)
    assert again.path.read_bytes() == result.path.read_bytes()
    assert again.output.metadata["lossy"] == ["transformer in 8 bits"]
    model_cache.evict_others("")
    assert where() == ([], ["flux"])
    assert machine.studio.render("flux", entry=entry, **TASK).path.read_bytes() == result.path.read_bytes()


def test_a_model_in_8_bits_is_streamed_for_a_run_whose_memory_runs_out(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = machine.studio.entry("flux", fp8=["transformer"])
    small_machine(machine, monkeypatch, entry)
    before = machine.studio.render("flux", entry=entry, **TASK).path.read_bytes()
    run_out_of_memory_once(monkeypatch)
    assert machine.studio.render("flux", entry=entry, **TASK).path.read_bytes() == before
    assert machine.studio.render("flux", entry=entry, **TASK).path.read_bytes() == before
    loaded = model_cache.find("flux")
    assert loaded is not None
    assert loaded.place is Placement.FP8


@pytest.mark.parametrize(("name", "cls", "method"), [("vits", "VitsModel", "forward"), ("csm", "CsmForConditionalGeneration", "generate")])
def test_a_sentence_for_which_memory_runs_out_is_repeated_alone_and_sounds_the_same(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, cls: str, method: str
) -> None:
    import transformers

    machine.room = Budget(GB, GB)
    line: dict[str, Any] = {"text": "Land ho. All hands!", "output_format": "wav"}
    whole = machine.studio.render(name, **line)
    machine.studio.render("flux", **TASK)
    work, tries = getattr(getattr(transformers, cls), method), iter(["spoken", "failed", "failed", "spoken"])

    def failing_twice(self: Any, *args: Any, **options: Any) -> Any:
        answer = work(self, *args, **options)
        if next(tries) == "failed":
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return answer

    monkeypatch.setattr(getattr(transformers, cls), method, failing_twice)
    result = machine.studio.render(name, **line)
    notes = ["out of memory: other models were unloaded", "out of memory: the weights were moved to host memory"]
    assert [each for each in result.output.metadata["warnings"] if "memory" in each] == notes
    assert next(tries, None) is None
    assert result.path.read_bytes() == whole.path.read_bytes()


def test_a_component_that_cannot_be_held_in_8_bits_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = machine.studio.entry("flux", fp8=["text_encoder"])
    small_machine(machine, monkeypatch, entry)
    with pytest.raises(ModelUnavailable, match=r"fp8: CLIPTextModel \(text_encoder\) cannot be held in 8 bits; take it out of the entry"):
        machine.studio.render("flux", entry=entry, **TASK)


# ── The copy in host memory ──


def test_a_host_copy_takes_the_size_of_its_tensors_and_is_made_once(machine: Machine) -> None:
    machine.room = Budget(GB, GB)
    one = machine.get("vits")
    before = [each.clone() for _, network in one.networks() for each in network.parameters()]
    model_cache.evict_others("")
    copy = one.host
    assert copy is not None
    tensors = sum(1 for _, network in one.networks() for _ in (*network.parameters(), *network.buffers()))
    assert one.size_bytes <= copy.size_bytes <= one.size_bytes + tensors * host_copy.ALIGNMENT
    machine.get("vits")
    model_cache.evict_others("")
    assert one.host is copy
    after = [each for _, network in one.networks() for each in network.parameters()]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_a_copy_of_a_model_on_the_device_goes_before_a_model_that_is_offloaded(machine: Machine) -> None:
    machine.room = Budget(GB, GB)
    one, two = machine.get("vits"), machine.get("vits.2")
    model_cache.evict_others("")
    machine.get("vits")
    three = machine.get("vits.3")
    assert one.host is not None
    machine.room = Budget(GB, one.host_bytes + two.host_bytes)
    model_cache.evict_others("vits")
    assert three.host is not None
    assert one.host is None, "it is on the device"
    assert where() == (["vits"], ["vits.2", "vits.3"])


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
