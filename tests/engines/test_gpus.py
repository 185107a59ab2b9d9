"""NVIDIA's library NVML fills a worker's rows. Machines without a GPU lack it, so a stand-in with its documented interface is used."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from movieq.checks import devices
from movieq.errors import SettingsError
from workers import gpus


class Nvml(SimpleNamespace):
    """A stand-in for NVML with two cards, of which the second does not report its power."""

    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=10 + handle, total=100)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=87, memory=3)

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 1:
            raise RuntimeError("Not Supported")
        return 312_500


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with two GPUs."""
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())


@pytest.mark.usefixtures("two")
def test_a_reading_has_every_figure_that_the_card_tells() -> None:
    assert gpus.read("cuda:0") == gpus.Reading(0.87, 10, 100, 61.0, 312.5)
    assert gpus.read("cuda:1") == gpus.Reading(0.87, 11, 100, 61.0, None)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("setting", "found"), [("auto", ["cuda:0", "cuda:1"]), ("cpu", []), ("cuda:1", ["cuda:1"])])
def test_a_worker_uses_all_gpus_or_those_that_are_named(setting: str, found: list[str]) -> None:
    assert devices(setting) == found


@pytest.mark.usefixtures("two")
def test_a_gpu_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(SettingsError, match="'cuda:2' not found; this machine has cuda:0, cuda:1"):
        devices("cuda:0,cuda:2")


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert devices("auto") == []
    assert gpus.read("cuda:0") is None
    with pytest.raises(SettingsError, match="no NVIDIA GPU with a working driver"):
        devices("cuda:0")


@pytest.mark.slow
async def test_the_bench_of_gpus_runs_through_with_models_that_a_cpu_can_run() -> None:
    command = [sys.executable, "-m", "tests.bench.bench_gpu", "--tiny"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await asyncio.wait_for(process.communicate(), 110)
    assert process.returncode == 0, err.decode()
    measured = json.loads(out.decode().splitlines()[-1])
    assert {"sdxl_batch_8_32_gain", "flux_loop_to_served", "ltx_clip_s"} <= measured.keys()
