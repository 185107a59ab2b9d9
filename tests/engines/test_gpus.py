"""NVIDIA's library NVML fills a worker's rows. Machines without a GPU lack it, so a stand-in with its documented interface is used."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from movieq import checks
from movieq import gpus as visible
from movieq.checks import Mark
from movieq.errors import SettingsError
from movieq.gpus import Gpu, devices
from movieq.settings import Settings
from movieq.tasks.states import Kind
from tests.fleet import python_path
from workers import gpus
from workers.protocol import EXIT_UNFIT
from workers.supervisor import Child


class Nvml(SimpleNamespace):
    """A stand-in for NVML with two cards, of which the second does not report its power; `mig` are the instances of the first."""

    NVML_TEMPERATURE_GPU = 0
    mig: tuple[str, ...] = ()
    lost: tuple[int, ...] = ()

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index in self.lost:
            raise RuntimeError("GPU is lost")
        return ("GPU-aa1", "GPU-aa2")[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if handle == "GPU-aa2":
            raise RuntimeError("Not Supported")
        return [int(bool(self.mig))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, number: int) -> str:
        if number >= len(self.mig):
            raise RuntimeError("Not Found")
        return self.mig[number]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=int(handle[-1]), total=100)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle.startswith("MIG"):
            raise RuntimeError("Not Supported")
        return SimpleNamespace(gpu=87, memory=3)

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if handle == "GPU-aa2":
            raise RuntimeError("Not Supported")
        return 312_500


FIRST, SECOND = Gpu("cuda:0", "GPU-aa1"), Gpu("cuda:1", "GPU-aa2")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """Simulate a machine with two GPUs."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml := Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return nvml


@pytest.mark.usefixtures("two")
def test_a_reading_has_every_figure_that_the_card_reports() -> None:
    assert gpus.read(FIRST) == gpus.Reading(0.87, 1, 100, 61.0, 312.5)
    assert gpus.read(SECOND) == gpus.Reading(0.87, 2, 100, 61.0, None)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("setting", "found"), [("auto", [FIRST, SECOND]), ("cpu", []), ("cuda:1", [SECOND])])
def test_a_worker_uses_all_gpus_or_those_that_are_named(setting: str, found: list[Gpu]) -> None:
    assert devices(setting) == found


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("variable", "uuids"),
    [
        ("1,0", ["GPU-aa2", "GPU-aa1"]),
        ("1", ["GPU-aa2"]),
        ("GPU-aa2", ["GPU-aa2"]),
        ("GPU-aa", []),  # it fits two
        ("0,9,1", ["GPU-aa1"]),  # as in CUDA, what follows an unknown device is not seen
        ("0,0", ["GPU-aa1"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_that_cuda_hides_are_not_used(variable: str, uuids: list[str]) -> None:
    found = devices("auto", {"CUDA_VISIBLE_DEVICES": variable})
    assert found == [Gpu(f"cuda:{number}", uuid) for number, uuid in enumerate(uuids)]


def test_of_a_divided_gpu_each_instance_is_a_device_that_reports_its_memory(two: Nvml) -> None:
    two.mig = "MIG-7", "MIG-8"
    assert [gpu.uuid for gpu in devices("auto")] == ["MIG-7", "MIG-8", "GPU-aa2"]
    assert [gpu.uuid for gpu in devices("auto", {"CUDA_VISIBLE_DEVICES": "MIG-8,1"})] == ["MIG-8", "GPU-aa2"]
    reading = gpus.read(Gpu("cuda:0", "MIG-7"))
    assert reading is not None
    assert (reading.utilization, reading.memory_used) == (None, 7)


def test_a_gpu_that_has_fallen_off_the_bus_is_left_out(two: Nvml) -> None:
    two.lost = (0,)
    assert [gpu.uuid for gpu in devices("auto")] == ["GPU-aa2"]


@pytest.mark.usefixtures("two")
def test_a_gpu_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(SettingsError, match="'cuda:2' not found; this machine has cuda:0, cuda:1"):
        devices("cuda:0,cuda:2")


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert devices("auto") == []
    assert gpus.read(FIRST) is None
    with pytest.raises(SettingsError, match="no NVIDIA GPU with a working driver"):
        devices("cuda:0")


class BrokenNvml(SimpleNamespace):
    def nvmlInit(self) -> None:
        raise RuntimeError("Driver/library version mismatch")


@pytest.mark.parametrize(
    ("library", "cure"), [(None, "nvidia-ml-py is not installed.*movieq.gpu."), (BrokenNvml(), "mismatch.*nvidia-smi")]
)
def test_a_driver_without_a_working_nvml_is_reported_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, folder: Path, library: Any, cure: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(visible, "DRIVER", folder)
    finding = checks.gpus(Settings())
    assert (finding.mark, finding.refuses) == (Mark.NOTE, False)
    assert re.search(cure, finding.text)
    monkeypatch.setattr(visible, "DRIVER", folder / "none")
    assert checks.gpus(Settings()).mark is Mark.GOOD


@pytest.mark.parametrize(("gpu", "seen"), [(SECOND, "GPU-aa2 expandable_segments:True cuda"), (None, "- - cpu")], ids=["gpu", "cpu"])
async def test_an_engine_process_sees_its_own_gpu_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, seen: str) -> None:
    report = folder / "seen"
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'workers.child' in sys.orig_argv:\n"
        "    names = 'CUDA_VISIBLE_DEVICES', 'PYTORCH_ALLOC_CONF'\n"
        f"    open({str(report)!r}, 'w').write(' '.join([*(os.environ.get(name) or '-' for name in names), sys.orig_argv[-1]]))\n"
        f"    os._exit({EXIT_UNFIT})\n"
    )
    monkeypatch.setenv("PYTHONPATH", python_path(folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    child, unfit = Child("one", (Kind.GPU_HEAVY,), gpu, step_timeout_s=60), asyncio.Event()
    supervising = asyncio.create_task(child.supervise(lambda: None, unfit.set))
    try:
        await asyncio.wait_for(unfit.wait(), 60)
    finally:
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
    assert report.read_text() == seen


@pytest.mark.slow
async def test_the_bench_of_gpus_runs_through_with_models_that_a_cpu_can_run() -> None:
    command = [sys.executable, "-m", "tests.bench.bench_gpu", "--tiny"]
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}  # it would take minutes
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=PIPE, stderr=PIPE)
    out, err = await asyncio.wait_for(process.communicate(), 200)
    assert process.returncode == 0, err.decode()
    measured = json.loads(out.decode().splitlines()[-1])
    assert {"sdxl_batch_8_32_gain", "flux_loop_to_served", "flux_compiled_s", "flux_groups_s", "sdxl_lora_switch_s"} <= measured.keys()
    assert {"in_turn_turn_s", "flux_cancel_ms", "sdxl_four_takes_to_four_tasks", "ltx_clip_s"} <= measured.keys()
