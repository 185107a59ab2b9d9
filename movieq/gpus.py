"""Which GPUs of this machine movieq may use, by NVIDIA's library NVML and without CUDA.

NVML lists every card in the order of the PCI bus and knows nothing of `CUDA_VISIBLE_DEVICES`. Each engine process therefore gets one GPU,
or one MIG instance, by its UUID, which means the same to both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from movieq import logs
from movieq.errors import SettingsError

DRIVER: Final = Path("/proc/driver/nvidia/version")
"""Exists where the kernel has loaded NVIDIA's driver."""
ALLOWED: Final = "allowed: auto, cpu, or a list such as cuda:0,cuda:1"

log = logs.get()


class Gpu(msgspec.Struct, frozen=True):
    """A GPU, or a MIG instance of one. `name` is "cuda:N", its number among those that this process may see."""

    name: str
    uuid: str


def nvml() -> Any | None:
    """Return NVIDIA's management library, initialised; None without a usable NVIDIA GPU."""
    try:
        return _initialised()
    except Exception as error:  # not installed, no driver, or a driver of another version
        log.debug("no_gpu", problem=f"{type(error).__name__}: {error}")
        return None


def problem() -> str | None:
    """Return why no GPU can be used on a machine that has NVIDIA's driver, and the cure; None if nothing is wrong."""
    if not DRIVER.exists():
        return None
    try:
        _initialised()
    except ImportError:
        return "this machine has NVIDIA's driver, but nvidia-ml-py is not installed: run `pip install 'movieq[gpu]'`"
    except Exception as error:
        return f"this machine has NVIDIA's driver, but its library NVML does not work ({error}): see whether `nvidia-smi` runs"
    return None


def _initialised() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def devices(setting: str, environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the GPUs of MOVIEQ_DEVICES: all visible ones for `auto`, none for `cpu`. Raises SettingsError if one is missing."""
    library = None if setting == "cpu" else nvml()
    uuids = [] if library is None else _visible(list(_uuids(library)), environ.get("CUDA_VISIBLE_DEVICES"))
    there = {f"cuda:{number}": Gpu(f"cuda:{number}", uuid) for number, uuid in enumerate(uuids)}
    if setting in ("auto", "cpu"):
        return list(there.values())
    named = [part.strip() for part in setting.split(",")]
    if missing := [name for name in named if name not in there]:
        have = ", ".join(there) or "no NVIDIA GPU with a working driver"
        raise SettingsError(f"MOVIEQ_DEVICES: {missing[0]!r} not found; this machine has {have}; {ALLOWED}")
    if len(set(named)) < len(named):
        raise SettingsError(f"MOVIEQ_DEVICES: {setting!r} names a GPU twice; {ALLOWED}")
    return [there[name] for name in named]


def _uuids(library: Any) -> Iterator[list[str]]:
    """Yield for each card, in PCI order, the UUIDs that CUDA accepts for it: of its MIG instances, or its own; none if it is broken."""
    for index in range(int(library.nvmlDeviceGetCount())):
        try:
            handle = library.nvmlDeviceGetHandleByIndex(index)
            yield list(_mig_uuids(library, handle)) or [_text(library.nvmlDeviceGetUUID(handle))]
        except Exception as error:  # for example, it has fallen off the bus: the others are used
            log.warning("gpu_unread", device=f"cuda:{index}", problem=f"{type(error).__name__}: {error}")
            yield []


def _mig_uuids(library: Any, handle: Any) -> Iterator[str]:
    """Yield the UUIDs of a card's MIG instances; none if it is not divided."""
    try:
        count = library.nvmlDeviceGetMaxMigDeviceCount(handle) if library.nvmlDeviceGetMigMode(handle)[0] else 0
    except Exception:  # most cards cannot be divided
        return
    for number in range(count):
        with suppress(Exception):  # this place holds no instance
            yield _text(library.nvmlDeviceGetUUID(library.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)))


def _text(uuid: str | bytes) -> str:
    return uuid.decode() if isinstance(uuid, bytes) else uuid


def _visible(cards: list[list[str]], setting: str | None) -> list[str]:
    """Return the UUIDs that CUDA_VISIBLE_DEVICES leaves visible, in its order: numbers, or UUIDs that may be cut short.

    As in CUDA, the first entry that names nothing ends the list. Numbers count in PCI order.
    """
    every = [uuid for card in cards for uuid in card]
    if setting is None:
        return every
    found: list[str] = []
    for part in (each.strip() for each in setting.split(",")):
        if part.isdecimal():
            matching = cards[int(part)][:1] if int(part) < len(cards) else []
        else:
            matching = [uuid for uuid in every if part and uuid.startswith(part)]
        if len(matching) != 1 or matching[0] in found:
            break
        found += matching
    return found
