"""Read the state of this machine's GPUs with NVIDIA's library NVML, without CUDA. `movieq.gpus` lists them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from movieq import logs
from movieq.gpus import Gpu, nvml

log = logs.get()


class Reading(msgspec.Struct, frozen=True):
    """The state of one GPU at a moment. A value is None if the card does not report it."""

    utilization: float | None
    """0 to 1. A MIG instance does not report it."""
    memory_used: int
    memory_total: int
    temperature: float | None
    """Degrees Celsius."""
    power: float | None
    """Watts."""


def read(gpu: Gpu) -> Reading | None:
    """Return the state of the GPU; None if it cannot be read."""
    library = nvml()
    if library is None:
        return None
    try:
        handle = library.nvmlDeviceGetHandleByUUID(gpu.uuid)
        memory = library.nvmlDeviceGetMemoryInfo(handle)
        return Reading(
            _reported(lambda: library.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            int(memory.used),
            int(memory.total),
            _reported(lambda: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU)),
            _reported(lambda: library.nvmlDeviceGetPowerUsage(handle) / 1000),
        )
    except Exception as error:  # for example, the GPU has fallen off the bus: the worker goes on
        log.warning("gpu_unread", device=gpu.name, problem=f"{type(error).__name__}: {error}")
        return None


def _reported(ask: Callable[[], float]) -> float | None:
    """Return a value of the card; None if the card does not report it."""
    try:
        return float(ask())
    except Exception:
        return None
