"""Which models stay on the device, which are offloaded to host memory and which are dropped: least recently used first.

**On the device** a model needs room for its weights and for the activations of a call. The table's `gpu_memory_gb` is both together at the
model's largest size; if it says less than 1.25 times the weights, or nothing, 1.25 times the weights is assumed. Before a model runs, the
weights of all other models on the device plus its whole requirement must fit into what this process may use: free device memory plus what
the process has already reserved. Other models are evicted until they do, least recently used first, except those that the same run has
used: a clip's sound model does not evict its video model.

**In host memory** an evicted model is offloaded if half of the free host memory, counting offloaded models as free, has room for it; older
offloaded models are dropped for it. An offloaded model returns to the device without reading the disk. Next to a GPU its host memory is
pinned, so that copies run at bus speed. On a CPU, device and host are the same: nothing is offloaded, only dropped.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import psutil
import torch

from movieq.tasks.entities import ModelSwaps
from workers.child.diffusion.loaded import Loaded

HOST_SHARE: Final = 0.5
"""The share of host memory that offloaded models may fill or, on a CPU, all models."""
MEMORY_PER_WEIGHT: Final = 1.25
"""Device memory that a model is assumed to need, as a multiple of its weights, if the table does not say more."""


class Budget(NamedTuple):
    """Bytes that models may fill. `host` is 0 where nothing can be offloaded."""

    device: int
    host: int


def budget(device: str, offloaded_bytes: int) -> Budget:
    """Return this process's budget at this moment; `offloaded_bytes` is what its offloaded models occupy."""
    if not device.startswith("cuda"):
        return Budget(int(psutil.virtual_memory().total * HOST_SHARE), 0)
    free, _ = torch.cuda.mem_get_info(device)
    return Budget(free + torch.cuda.memory_reserved(device), int((_free_host_bytes() + offloaded_bytes) * HOST_SHARE))


def _free_host_bytes() -> int:
    """Return the free host memory, within the limit of a container if there is one."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # not on Linux, or without a limit: the file says "max"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts["inactive_file"]))  # the page cache counts as used but can be reclaimed
    return max(free, 0)


def required_bytes(loaded: Loaded) -> int:
    """Return the device memory that a model needs to run: its weights and activations."""
    return max(int(loaded.entry.gpu_memory_gb * 2**30), int(loaded.size_bytes * MEMORY_PER_WEIGHT))


def free_memory() -> None:
    """Free unreferenced tensors, and return cached blocks to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class ModelMemory:
    """The models on the device and those offloaded, and how often models were loaded, returned, offloaded and dropped."""

    def __init__(self) -> None:
        self.on_device: dict[str, Loaded] = {}
        """The least recently used first."""
        self.offloaded: dict[str, Loaded] = {}
        """The earliest offloaded first."""
        self.swaps = ModelSwaps()
        self.device = "cpu"
        self._run = ""
        self._used_by_run: set[str] = set()

    def find(self, name: str) -> Loaded | None:
        """Return the model if it is in memory, on the device or offloaded."""
        return self.on_device.get(name) or self.offloaded.get(name)

    def mark_used(self, run: str, name: str, device: str) -> None:
        """Make the model the most recently used and protect it from eviction for this run; a new run ends the previous run's protection."""
        self.device = device
        if run != self._run:
            self._run, self._used_by_run = run, set()
        self._used_by_run.add(name)
        if name in self.on_device:
            self.on_device[name] = self.on_device.pop(name)

    def add(self, name: str, loaded: Loaded) -> None:
        """Record a model that was loaded from disk onto the device, and make room for it to run."""
        self.on_device[name] = loaded
        self._count("loads")
        self.make_room(required_bytes(loaded), name)

    def restore(self, name: str) -> None:
        """Move an offloaded model back to the device. After a torch.OutOfMemoryError it is offloaded as before."""
        loaded = self.offloaded.pop(name)  # so that models offloaded to make room do not push it out
        self.make_room(required_bytes(loaded), name)
        try:
            loaded.move(self.device)
        except torch.OutOfMemoryError:
            loaded.move("cpu")
            self.offloaded[name] = loaded
            raise
        self.on_device[name] = loaded
        self._count("returns")

    def make_room(self, needed_bytes: int, name: str) -> None:
        """Evict other models until the device has room for the model, or until none is left that may be evicted."""
        for other in [each for each in self.on_device if each != name and each not in self._used_by_run]:
            if self._bytes_of_others(name) + needed_bytes <= budget(self.device, self._offloaded_bytes()).device:
                return
            self.evict(other)

    def evict(self, name: str) -> None:
        """Remove a model from the device: offload it if host memory has room, else drop it."""
        loaded, room = self.on_device.pop(name), budget(self.device, self._offloaded_bytes()).host
        if loaded.size_bytes <= room:
            while self._offloaded_bytes() + loaded.size_bytes > room:
                del self.offloaded[next(iter(self.offloaded))]
                self._count("drops")
            loaded.move("cpu")
            self.offloaded[name] = loaded
            self._count("parkings")
        else:
            self._count("drops")
        del loaded
        free_memory()

    def remove(self, name: str) -> None:
        """Remove a model from memory, wherever it is; a model that is not in memory is no error."""
        self.on_device.pop(name, None)
        self.offloaded.pop(name, None)

    def _count(self, what: str) -> None:
        self.swaps = msgspec.structs.replace(self.swaps, **{what: getattr(self.swaps, what) + 1})

    def _bytes_of_others(self, name: str) -> int:
        return sum(loaded.size_bytes for each, loaded in self.on_device.items() if each != name)

    def _offloaded_bytes(self) -> int:
        return sum(loaded.size_bytes for loaded in self.offloaded.values())
