"""Reads the state of this machine's GPUs with NVIDIA's own library (NVML), without CUDA. `movieq.checks.devices` says which there are."""

from __future__ import annotations

from typing import Any

import msgspec

from movieq import logs
from movieq.checks import nvml

log = logs.get()


class Reading(msgspec.Struct, frozen=True):
    """Of one GPU, at a moment; None where it does not tell."""

    utilization: float
    """0 to 1."""
    memory_used: int
    memory_total: int
    temperature: float | None
    """Degrees Celsius."""
    power: float | None
    """Watts."""


def read(device: str) -> Reading | None:
    """How the GPU "cuda:N" is; None where that cannot be read."""
    library = nvml()
    if library is None:
        return None
    try:
        handle = library.nvmlDeviceGetHandleByIndex(int(device.removeprefix("cuda:")))
        memory = library.nvmlDeviceGetMemoryInfo(handle)
        return Reading(
            library.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            int(memory.used),
            int(memory.total),
            _told(lambda: float(library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU))),
            _told(lambda: library.nvmlDeviceGetPowerUsage(handle) / 1000),
        )
    except Exception as error:  # a GPU that has fallen off the bus, say: the worker goes on
        log.warning("gpu_unread", device=device, problem=f"{type(error).__name__}: {error}")
        return None


def _told(ask: Any) -> float | None:
    """Some cards do not tell everything."""
    try:
        return float(ask())
    except Exception:
        return None
