"""Which models lie where: on the device, in the host's memory, or on the disk alone. By least recent use, within what there is room for.

**On the device** a model needs more than its weights: what a call makes on its way, its activations, has to fit beside them. The table's
`gpu_memory_gb` is both together at the model's largest size; where it says less than the weights and a quarter, or nothing, that is taken.
So before a model works, the weights of all others on the device and the whole need of this one fit into what the process may fill: what is
free and what it holds already. The others leave, the one used longest ago first, but for those that the same run has used: a clip's model
for sound does not put away its model for pictures.

**In the host's memory** a model that had to leave waits, if half of what the host has free can take it and what waits there already; the
one used longest ago goes first there too. From there it comes back without a look at the disk. On a GPU's host its memory is pinned, and
copies run at the speed of the bus. On a CPU the device is the host, so nothing waits: it stays, or it is dropped.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import psutil
import torch

from movieq.tasks.entities import ModelSwaps

if TYPE_CHECKING:
    from workers.child.diffusion.loaded import Loaded

KEPT_SHARE: Final = 0.5
"""Of the host's memory that may be filled: with models that wait, or, where it is the device, with all of them."""
ACTIVATIONS: Final = 1.25
"""What a model needs for each byte of its weights where the table does not know better."""


class Budget(NamedTuple):
    """What models may fill, bytes. `host` is 0 where none can wait."""

    device: int
    host: int


def budget(device: str, parked: int) -> Budget:
    """Of this process, just now. `parked` is what its models in the host's memory take."""
    if not device.startswith("cuda"):
        return Budget(int(psutil.virtual_memory().total * KEPT_SHARE), 0)
    free, _ = torch.cuda.mem_get_info(device)
    return Budget(free + torch.cuda.memory_reserved(device), int((_host_free() + parked) * KEPT_SHARE))


def _host_free() -> int:
    """What the host has free, or what is left of what a container may have."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # not on Linux, or without a limit: the file says "max"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts["inactive_file"]))  # files that were read and may be forgotten count as used
    return max(free, 0)


def need(loaded: Loaded) -> int:
    """What a model needs of its device to work."""
    return max(int(loaded.entry.gpu_memory_gb * 2**30), int(loaded.bytes * ACTIVATIONS))


def sweep() -> None:
    """What nobody refers to has left the memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Residency:
    """What lies where, and how often that changed."""

    def __init__(self) -> None:
        self.resident: dict[str, Loaded] = {}
        """On the device, the one used last at the end."""
        self.parked: dict[str, Loaded] = {}
        """In the host's memory, the one parked last at the end."""
        self.swaps = ModelSwaps()
        self.device = "cpu"
        self._run = ""
        self._used: set[str] = set()

    def find(self, name: str) -> Loaded | None:
        """The model, wherever in memory it is."""
        return self.resident.get(name) or self.parked.get(name)

    def use(self, run: str, name: str, device: str) -> None:
        """The run works with this model from now on; those of the run before may leave."""
        self.device = device
        if run != self._run:
            self._run, self._used = run, set()
        self._used.add(name)
        if name in self.resident:
            self.resident[name] = self.resident.pop(name)

    def put(self, name: str, loaded: Loaded) -> None:
        """A model that came from the disk lies on the device, and has the room that it needs."""
        self.resident[name] = loaded
        self._count("loads")
        self.make_room(need(loaded), name)

    def bring_back(self, name: str) -> None:
        """A model that is parked lies on the device. Raises torch.OutOfMemoryError; then it is where it was."""
        loaded = self.parked.pop(name)  # so that nobody who is parked now pushes it out
        self.make_room(need(loaded), name)
        try:
            loaded.move(self.device)
        except torch.OutOfMemoryError:
            loaded.move("cpu")
            self.parked[name] = loaded
            raise
        self.resident[name] = loaded
        self._count("returns")

    def make_room(self, needed: int, name: str) -> None:
        """Others have left the device until this model has what it needs, or none is left that may."""
        for other in [each for each in self.resident if each != name and each not in self._used]:
            if self._beside(name) + needed <= budget(self.device, self._waiting()).device:
                return
            self.put_away(other)

    def put_away(self, name: str) -> None:
        """A model has left the device: it is parked where the host has room, or dropped."""
        loaded, room = self.resident.pop(name), budget(self.device, self._waiting()).host
        if loaded.bytes <= room:
            while self._waiting() + loaded.bytes > room:
                self._drop(next(iter(self.parked)))
            loaded.move("cpu")
            self.parked[name] = loaded
            self._count("parkings")
        else:
            self._count("drops")
        del loaded
        sweep()

    def forget(self, name: str) -> None:
        """The model is nowhere in memory."""
        self.resident.pop(name, None)
        self.parked.pop(name, None)

    def _drop(self, name: str) -> None:
        del self.parked[name]
        self._count("drops")

    def _count(self, what: str) -> None:
        self.swaps = msgspec.structs.replace(self.swaps, **{what: getattr(self.swaps, what) + 1})

    def _beside(self, name: str) -> int:
        return sum(loaded.bytes for each, loaded in self.resident.items() if each != name)

    def _waiting(self) -> int:
        return sum(loaded.bytes for loaded in self.parked.values())
