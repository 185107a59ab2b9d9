"""Which models stay on the device, which are offloaded to host memory and which are dropped: least recently used first.

**On the device** a model needs room for its weights and for the activations of a call (`placement`). Before a model runs, the weights of
all other models on the device plus its whole requirement must fit into what this process may use: free device memory plus what the process
has already reserved. Other models are evicted until they do, least recently used first, except those that the same run has used: a clip's
sound model does not evict its video model.

**In host memory** an evicted model is offloaded if half of the free host memory, counting copies of models as free, has room for it. Its
copy there is made once; when it returns to the device, the copy stays, and the next eviction only frees the device. For another model,
copies of models that are on the device anyway go first, then the models that were offloaded earliest. On a CPU, device and host are the
same: nothing is offloaded, only dropped.
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
from workers.child.diffusion.placement import Placement
from workers.child.job import is_out_of_memory

HOST_SHARE: Final = 0.5
"""The share of host memory that offloaded models may fill or, on a CPU, all models."""
ONE_MODEL_SHARE: Final = 0.9
"""The share of host memory that one model may fill on a CPU."""


class Budget(NamedTuple):
    """Bytes that models may fill. `host` is 0 where nothing can be offloaded."""

    device: int
    host: int


def budget(device: str, copies_bytes: int) -> Budget:
    """Return this process's budget at this moment; `copies_bytes` is what the copies of its models in host memory occupy."""
    if not device.startswith("cuda"):
        return Budget(int(psutil.virtual_memory().total * HOST_SHARE), 0)
    free, _ = torch.cuda.mem_get_info(device)
    return Budget(free + torch.cuda.memory_reserved(device), int((_free_host_bytes() + copies_bytes) * HOST_SHARE))


def _free_host_bytes() -> int:
    """Return the free host memory, within the limit of a container if there is one."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # not on Linux, or without a limit: the file says "max"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts["inactive_file"]))  # the page cache counts as used but can be reclaimed
    return max(free, 0)


def free_memory() -> None:
    """Free unreferenced tensors, and return cached blocks to the device and to the host."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned blocks of earlier copies; torch has no public function for it


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

    def room_for(self, name: str) -> Budget:
        """Return the memory that a model to be loaded may take once all others are evicted that may be."""
        device, host = budget(self.device, self._copies_bytes())
        if not self.device.startswith("cuda"):
            device = max(device, int(psutil.virtual_memory().total * ONE_MODEL_SHARE))
        held = sum(loaded.device_bytes for each, loaded in self.on_device.items() if each != name and each in self._used_by_run)
        return Budget(device - held, host)

    def add(self, name: str, loaded: Loaded) -> None:
        """Record a model that was loaded from disk, and make room for it to run."""
        self.on_device[name] = loaded
        self._count("loads")
        self.make_room(loaded.required_bytes, name)

    def restore(self, name: str) -> None:
        """Move an offloaded model back to the device. After an error it is offloaded as before."""
        loaded = self.offloaded.pop(name)  # so that models offloaded to make room do not push it out
        self.make_room(loaded.required_bytes, name)
        try:
            loaded.enter_device(self.device)
        except BaseException:
            self.offloaded[name] = loaded
            raise
        self.on_device[name] = loaded
        self._count("returns")

    def make_room(self, needed_bytes: int, name: str) -> None:
        """Evict other models until the device has room for the model, or until none is left that may be evicted."""
        for other in [each for each in self.on_device if each != name and each not in self._used_by_run]:
            if self._bytes_of_others(name) + needed_bytes <= budget(self.device, self._copies_bytes()).device:
                return
            self.evict(other)

    def make_host_room(self, needed_bytes: int, name: str) -> bool:
        """Free copies in host memory until it has room for one of this size; return whether it has. `name` is the model to come."""
        room = budget(self.device, self._copies_bytes()).host
        if needed_bytes > room:
            return False
        spare = [loaded for each, loaded in self.on_device.items() if each != name and loaded.place is not Placement.GROUPS and loaded.host]
        while self._copies_bytes() + needed_bytes > room and spare:
            spare.pop(0).drop_host_copy()
        while self._copies_bytes() + needed_bytes > room and self.offloaded:
            self.offloaded.pop(next(iter(self.offloaded))).close()
            self._count("drops")
        return True

    def evict(self, name: str) -> None:
        """Remove a model from the device: offload it if host memory has room, else drop it."""
        loaded = self.on_device.pop(name)
        loaded.unload_loras()
        try:
            offloaded = loaded.host is not None or self.make_host_room(loaded.copy_bytes, name)
            if offloaded:
                loaded.leave_device()
        except Exception as error:  # torch reports a host without memory in many ways
            if not is_out_of_memory(error) and not isinstance(error, RuntimeError):
                raise
            offloaded = False
        if offloaded:
            self.offloaded[name] = loaded
            self._count("parkings")
        else:
            loaded.close()
            self._count("drops")
        del loaded
        free_memory()

    def note_left(self, name: str) -> None:
        """Record that a model has moved to host memory by itself."""
        if (loaded := self.on_device.pop(name, None)) is not None:
            self.offloaded[name] = loaded

    def remove(self, name: str) -> None:
        """Remove a model from memory, wherever it is; a model that is not in memory is no error."""
        for models in (self.on_device, self.offloaded):
            if (loaded := models.pop(name, None)) is not None:
                loaded.close()

    def _count(self, what: str) -> None:
        self.swaps = msgspec.structs.replace(self.swaps, **{what: getattr(self.swaps, what) + 1})

    def _bytes_of_others(self, name: str) -> int:
        return sum(loaded.device_bytes for each, loaded in self.on_device.items() if each != name)

    def _copies_bytes(self) -> int:
        return sum(loaded.host_bytes for loaded in (*self.on_device.values(), *self.offloaded.values()))
