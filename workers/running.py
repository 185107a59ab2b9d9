"""A run of a task in this worker, and what it uses."""

from __future__ import annotations

import asyncio
import time
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
from workers.eta import Pace
from workers.finished import Kept, Made
from workers.host import Host
from workers.provenance import Provenance
from workers.slots import Group
from workers.supervisor import Child


class Parts(msgspec.Struct, frozen=True):
    """What a run works with."""

    store: Store
    queries: Queries
    files: Files
    storage: Storage
    fetcher: Fetcher
    spool: Path
    models: dict[str, Model] = {}
    provenance: Provenance = Provenance()
    kept: Kept | None = None
    """Where finished files outlive this worker; None where they need not."""
    cms: str = ""
    """Address of the collection that results go into; empty where there is no CMS."""
    host: Host | None = None
    """Where faults of this machine are noted."""
    places: tuple[Path, ...] = ()
    """Folders that no error for clients may name."""


class Running:
    """A run in hand: of a child, with a group there. `stop` notes the reason before anything is cancelled.

    Of a task whose files an earlier run has made there is only their storing left: it has `made` in place of a child.
    """

    def __init__(self, claimed: Claimed, child: Child | None = None, group: Group | None = None, made: Made | None = None) -> None:
        self.claimed = claimed
        self.task: Task = claimed.task
        self.run: RunToken = claimed.run
        self.child = child
        self.group = group
        """Those that are made with it at once, and its place on the child's device."""
        self.made = made
        self.asyncio_task: asyncio.Task[None] | None = None
        self.reason: str | None = None
        self.abandoned = False
        self.started = False
        self.prefix: str | None = None
        """Where in the storage its files are, once there may be some."""
        self.begun_s = time.monotonic()
        self.pace = Pace(0.0 if made else self.task.estimate_ms / 1000)
        self._gpu: tuple[float, float, float] | None = None
        """What it had of a GPU, in ms, until when (s), and how much of one it has since."""
        if group is not None:
            group.remaining_s = self.pace.remaining_s

    def stop(self, reason: str) -> None:
        """The run ends soon: "cancelled" and "lost" write nothing, "drain" and "late" give the task back uncounted."""
        if self.reason is None and self.asyncio_task is not None:
            self.reason = reason
            if self.started:  # a task that is cancelled before its first step never comes to give anything back
                self.asyncio_task.cancel()

    def abandon(self) -> None:
        """The run ends now, even if Redis cannot be told: its lease will be over."""
        self.abandoned = True
        self.stop("drain")
        if self.asyncio_task is not None and self.started:
            self.asyncio_task.cancel()

    def take_gpu(self, share: float) -> None:
        """From now on the run has this share of its child's GPU; nothing is counted on a CPU."""
        if self.child is not None and self.child.device != "cpu":
            spent_ms, _ = self.gpu or (0.0, 0.0)
            self._gpu = spent_ms, time.monotonic(), share

    @property
    def gpu(self) -> tuple[float, float] | None:
        """What the run has had of a GPU so far, in ms, and the share of one that it has; None where it had none."""
        if self._gpu is None:
            return None
        spent_ms, since_s, share = self._gpu
        return spent_ms + (time.monotonic() - since_s) * 1000 * share, share

    def free_slot(self) -> None:
        """The device can be another's, where those of its group have left too."""
        if self.child is not None and self.group is not None:
            self.child.leave(self.group, self.run)
