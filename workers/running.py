"""A run in this worker, and the parts that all runs share."""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum
from pathlib import Path

import msgspec

from movieq.fetch.download import Fetcher
from movieq.models.table import Model
from movieq.queue.files import Files
from movieq.queue.queries import Queries
from movieq.queue.store import Claimed, Store
from movieq.storage.base import Storage
from movieq.tasks.entities import Task
from movieq.tasks.states import RunToken
from workers.eta import Eta
from workers.finished import Finished, FinishedFiles
from workers.host import Host
from workers.probe import Probe
from workers.provenance import Provenance
from workers.slots import Group
from workers.supervisor import Child


class Parts(msgspec.Struct, frozen=True):
    """The connections and settings that all runs of a worker share."""

    store: Store
    queries: Queries
    files: Files
    storage: Storage
    fetcher: Fetcher
    spool: Path
    models: dict[str, Model] = {}
    provenance: Provenance = Provenance()
    finished: FinishedFiles | None = None
    """Saves finished files where they outlive this worker; None if they need not."""
    cms: str = ""
    """Address of the collection that results are written to; empty if there is no CMS."""
    host: Host | None = None
    """Records problems of this machine."""
    probe: Probe = msgspec.field(default_factory=Probe)
    """Decodes inputs before an engine process gets them."""
    places: tuple[Path, ...] = ()
    """Folders that no error for clients may name."""


class Stop(StrEnum):
    """Why a run is stopped before its end."""

    CANCELLED = "cancelled"
    """Its task was cancelled, or missed its deadline."""
    LOST = "lost"
    """Another run has its task."""
    DRAIN = "drain"
    """Its worker stops."""
    OVERDUE = "overdue"
    """The run before it on its device takes longer than expected."""

    @property
    def may_write(self) -> bool:
        """Whether the run still holds its task, and requeues it."""
        return self in (Stop.DRAIN, Stop.OVERDUE)


class Running:
    """A run in progress, as one of a group on a child.

    A run that only stores the files which an earlier run has rendered has `finished` in place of a child.
    """

    def __init__(self, claimed: Claimed, child: Child | None = None, group: Group | None = None, finished: Finished | None = None) -> None:
        self.claimed = claimed
        self.task: Task = claimed.task
        self.run: RunToken = claimed.run
        self.child = child
        self.group = group
        """The runs that the child renders in the same call; the group holds a slot of the device."""
        self.finished = finished
        self.asyncio_task: asyncio.Task[None] | None = None
        self.stop_reason: Stop | None = None
        self.abandoned = False
        self.started = False
        """Whether its asyncio task has taken its first step."""
        self.spool: Path | None = None
        """Its folder, once it has one."""
        self.prefix: str | None = None
        """Prefix of its files in the storage, once there may be some."""
        self.started_s = time.monotonic()
        self.rendered_ms = 0
        """Time that fetching and rendering took in its slot, in ms; 0 until then, and if an earlier run did it."""
        self.eta = Eta(0.0 if finished else self.task.estimate_ms / 1000)
        self._gpu: tuple[float, float, float] | None = None
        """The GPU time that it had used in ms, at what time in s, and the share of a GPU that it has had since."""
        if group is not None:
            group.remaining_s = self.eta.remaining_s

    def stop(self, reason: Stop) -> None:
        """Cancel the run for this reason, unless it is being stopped already."""
        if self.stop_reason is None and self.asyncio_task is not None:
            self.stop_reason = reason
            if self.started:  # an asyncio task that is cancelled before its first step could not requeue its task
                self.asyncio_task.cancel()

    def abandon(self) -> None:
        """End the run now, even if its outcome cannot be reported: its lease will expire."""
        self.abandoned = True
        self.stop(Stop.DRAIN)
        if self.asyncio_task is not None and self.started:
            self.asyncio_task.cancel()

    def use_gpu(self, share: float) -> None:
        """Record that the run has this share of its child's GPU from now on. On a CPU nothing is counted."""
        if self.child is not None and self.child.gpu is not None:
            used_ms, _ = self.gpu or (0.0, 0.0)
            self._gpu = used_ms, time.monotonic(), share

    @property
    def gpu(self) -> tuple[float, float] | None:
        """The GPU time that the run has used so far, in ms, and its share of a GPU now; None if it has used none."""
        if self._gpu is None:
            return None
        used_ms, since_s, share = self._gpu
        return used_ms + (time.monotonic() - since_s) * 1000 * share, share

    def free_slot(self) -> None:
        """Leave the slot on the device, which is free once all runs of the group have left it."""
        if self.child is not None and self.group is not None:
            self.child.slots.leave(self.group, self.run)
