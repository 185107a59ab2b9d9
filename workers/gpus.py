"""The GPUs of this machine, by NVIDIA's own library (NVML): how many there are, and how they are. It starts no CUDA."""

from __future__ import annotations

from typing import Any

import msgspec

from movieq import logs
from movieq.errors import SettingsError

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


def nvml() -> Any | None:
    """NVIDIA's library, ready for questions; None on a machine without a GPU of theirs."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # not installed, no driver, a driver of another version: no GPU that could be used
        log.debug("no_gpu", problem=f"{type(error).__name__}: {error}")
        return None
    return pynvml


def devices(setting: str) -> list[str]:
    """ "cuda:0", ... of MOVIEQ_DEVICES: all that there are for `auto`, none for `cpu`. Raises SettingsError for one that is not there."""
    library = None if setting == "cpu" else nvml()
    count = 0 if library is None else int(library.nvmlDeviceGetCount())
    there = [f"cuda:{number}" for number in range(count)]
    if setting in ("auto", "cpu"):
        return there
    named = [part.strip() for part in setting.split(",") if part.strip()]
    if missing := [name for name in named if name not in there]:
        have = ", ".join(there) or "no GPU that NVIDIA's driver knows"
        raise SettingsError(f"MOVIEQ_DEVICES: {missing[0]!r} is not there; this machine has {have} (auto, cpu, or a list of cuda:N)")
    return named


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
