"""A run of a task in this worker, and what it works with."""

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
from workers.provenance import Provenance
from workers.slots import Group
from workers.supervisor import Child


class Parts(msgspec.Struct, frozen=True):
    """What every run of a worker works with."""

    store: Store
    queries: Queries
    files: Files
    storage: Storage
    fetcher: Fetcher
    spool: Path
    models: dict[str, Model] = {}
    provenance: Provenance = Provenance()
    finished: FinishedFiles | None = None
    """Where finished files outlive this worker; None where they need not."""
    cms: str = ""
    """Address of the collection that results go into; empty where there is no CMS."""
    host: Host | None = None
    """Where faults of this machine are noted."""
    places: tuple[Path, ...] = ()
    """Folders that no error for clients may name."""


class Stop(StrEnum):
    """Why a run is stopped before its end."""

    CANCELLED = "cancelled"
    """Its task was cancelled, or missed its deadline."""
    LOST = "lost"
    """Its task is another run's."""
    DRAIN = "drain"
    """Its worker stops."""
    OVERDUE = "overdue"
    """The run before it on its device takes longer than expected."""

    @property
    def may_write(self) -> bool:
        """Whether the run still holds its task, and requeues it."""
        return self in (Stop.DRAIN, Stop.OVERDUE)


class Running:
    """A run in progress: on a child, as one of a group there. `stop` notes the reason before anything is cancelled.

    Where an earlier run has rendered the files, and this one is to store them, it has `finished` in place of a child.
    """

    def __init__(self, claimed: Claimed, child: Child | None = None, group: Group | None = None, finished: Finished | None = None) -> None:
        self.claimed = claimed
        self.task: Task = claimed.task
        self.run: RunToken = claimed.run
        self.child = child
        self.group = group
        """The runs that the child renders in the same call, and their place on its device."""
        self.finished = finished
        self.asyncio_task: asyncio.Task[None] | None = None
        self.stop_reason: Stop | None = None
        self.abandoned = False
        self.started = False
        """Whether its asyncio task has taken its first step."""
        self.spool: Path | None = None
        """Its folder, once it has one."""
        self.prefix: str | None = None
        """Where in the storage its files are, once there may be some."""
        self.started_s = time.monotonic()
        self.rendered_ms = 0
        """How long fetching and rendering took; 0 until then, and where an earlier run did it."""
        self.eta = Eta(0.0 if finished else self.task.estimate_ms / 1000)
        self._gpu: tuple[float, float, float] | None = None
        """The GPU time that it had, in ms, until when (s), and which share of a GPU it has had since."""
        if group is not None:
            group.remaining_s = self.eta.remaining_s

    def stop(self, reason: Stop) -> None:
        """Cancel the run for this reason, unless it is being stopped already."""
        if self.stop_reason is None and self.asyncio_task is not None:
            self.stop_reason = reason
            if self.started:  # an asyncio task that is cancelled before its first step never comes to requeue anything
                self.asyncio_task.cancel()

    def abandon(self) -> None:
        """End the run now, even if its outcome cannot be reported: its lease will expire."""
        self.abandoned = True
        self.stop(Stop.DRAIN)
        if self.asyncio_task is not None and self.started:
            self.asyncio_task.cancel()

    def use_gpu(self, share: float) -> None:
        """Note that the run has this share of its child's GPU from now on; on a CPU nothing is counted."""
        if self.child is not None and self.child.device != "cpu":
            used_ms, _ = self.gpu or (0.0, 0.0)
            self._gpu = used_ms, time.monotonic(), share

    @property
    def gpu(self) -> tuple[float, float] | None:
        """The GPU time that the run has had so far, in ms, and the share of a GPU that it has; None where it had none."""
        if self._gpu is None:
            return None
        used_ms, since_s, share = self._gpu
        return used_ms + (time.monotonic() - since_s) * 1000 * share, share

    def free_slot(self) -> None:
        """Give up its place on the device, which is another group's once all runs of this group have."""
        if self.child is not None and self.group is not None:
            self.child.slots.leave(self.group, self.run)
