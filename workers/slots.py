"""The slots of a device: which runs use it, and when the next ones may be claimed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from movieq.tasks.states import TaskId
from workers.protocol import framed

AHEAD_S: Final = 2.0
"""Seconds before the estimated end of a run at which the next is claimed, so that its inputs are there when the device is free."""
AHEAD_MOST_S: Final = 10.0
"""Longest wait of a run that is ready for its device, in seconds. Then it is requeued: the one before it takes longer than expected."""
LEND_S: Final = 1.0
"""Time that a group may fetch its inputs in its slot, in seconds. Then it lends the slot to other tasks until the inputs are there."""
LENT_MOST: Final = 3
"""Most groups of a device that lend their slot at the same time: so a worker claims only a few tasks more than it can render."""


class Group:
    """Runs that were claimed for one call of a child, mostly one. The group lasts until they no longer need the device."""

    def __init__(self, task_ids: Sequence[TaskId], model: str, batch: str) -> None:
        self.task_ids = tuple(task_ids)
        self.model = model
        self.batch = batch
        self.since_s = time.monotonic()
        self.remaining_s: Callable[[], float] = lambda: math.inf
        """Returns the estimated seconds until its end."""
        self.started = asyncio.Event()
        """Set once the group was sent to the child."""
        self.overdue = False
        """Whether it takes longer than expected: then no further run is claimed ahead."""
        self.waited = False
        """Whether it was claimed before the device became free."""
        self.lends = False
        """Whether it still fetches its inputs and lends its slot meanwhile."""
        self.lent_s = 0.0
        """How long it was without its slot, from lending it to its start on the device."""
        self.patience_s = AHEAD_MOST_S
        """How long it waits for its device once it is ready, in seconds."""
        self._ready_at_s: float | None = None
        self._lent_at_s: float | None = None
        self._missing = len(task_ids)
        self._left: set[str] = set()
        self._requests: dict[str, bytes] = {}

    def add(self, run: str, request: bytes) -> None:
        """Add the encoded request of a run that is ready to be rendered."""
        self._missing -= 1
        self._requests[run] = request

    @property
    def ready(self) -> bool:
        """Whether every run was added or removed, and one is left to be rendered."""
        return not self._missing and bool(self._requests)

    def lend(self) -> None:
        """Lend the slot, until the group is ready."""
        self.lends, self._lent_at_s = True, time.monotonic()

    def note_if_ready(self) -> None:
        """Record when the group became ready. If it lent its slot, it holds it again, and waits for its device as long as it fetched."""
        if not self.ready or self._ready_at_s is not None:
            return
        self.lends, self._ready_at_s = False, time.monotonic()
        if self._lent_at_s is not None:
            self.patience_s = max(AHEAD_MOST_S, self._ready_at_s - self._lent_at_s)

    @property
    def late(self) -> bool:
        """Whether it is ready and has waited too long for its device."""
        return not self.started.is_set() and self._ready_at_s is not None and time.monotonic() - self._ready_at_s >= self.patience_s

    def start(self) -> None:
        """Record that the group was sent to the child."""
        if self._lent_at_s is not None:
            self.lent_s = time.monotonic() - self._lent_at_s
        self.started.set()

    def remove(self, run: str) -> bool:
        """Remove a run, whether it was added or not; return whether none is left. Removing it again changes nothing."""
        if run not in self._left:
            self._left.add(run)
            if self._requests.pop(run, None) is None:
                self._missing -= 1
        return not self._missing and not self._requests

    def frames(self) -> bytes | None:
        """Return the frames for the child; None until every run was added or removed, or if all were removed."""
        return framed(list(self._requests.values())) if self.ready else None


class Slots:
    """The two slots of a device: one for the group that is on it, one for the group that comes next.

    `send` passes frames to the child. A group goes to the device once the device is free and open, and all runs of the group are ready.
    A group whose inputs take long lends its slot, so that other tasks are claimed and rendered meanwhile.
    """

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._open = False
        self._free_since_s = time.monotonic()
        self.groups: list[Group] = []
        self.on_device: Group | None = None
        self.on_room: Callable[[], None] = lambda: None
        """Called whenever a slot becomes free."""

    @property
    def free(self) -> bool:
        """Whether a run can start now."""
        return self._open and not self.holders

    @property
    def soon(self) -> bool:
        """Whether a run that is claimed now can start in a moment: its inputs are fetched while the one before it ends."""
        holders = self.holders
        return self._open and len(holders) == 1 and not holders[0].overdue and holders[0].remaining_s() < AHEAD_S

    @property
    def holders(self) -> list[Group]:
        """The groups that hold a slot: those that do not lend it."""
        return [group for group in self.groups if not group.lends]

    @property
    def task_id(self) -> TaskId | None:
        """The task on the device, else the one that comes next; of a batch, the first."""
        group = self.on_device or (self.groups[0] if self.groups else None)
        return group.task_ids[0] if group else None

    def open(self) -> None:
        """Let groups onto the device, since the child serves."""
        self._open = True
        self.advance()
        self.on_room()

    def close(self) -> None:
        """Let no more groups onto the device, since there is no child, or it cannot be trusted."""
        self._open = False

    def reserve(self, task_ids: Sequence[TaskId], model: str = "", batch: str = "") -> Group:
        """Return a new group, with a slot, for tasks of a model that are claimed together."""
        group = Group(task_ids, model, batch)
        self.groups.append(group)
        return group

    def add(self, group: Group, run: str, request: bytes) -> None:
        """Add a run that is ready to its group, which may be complete now."""
        group.add(run, request)
        group.note_if_ready()
        self.advance()

    def lend(self, group: Group) -> bool:
        """Lend the slot of a group that still fetches its inputs; return whether that is done. Not if enough groups do so already."""
        if group.lends:
            return True
        if group not in self.groups or group.ready or group.started.is_set() or len(self.groups) - len(self.holders) >= LENT_MOST:
            return False
        group.lend()
        self.on_room()
        return True

    def leave(self, group: Group, run: str) -> None:
        """Remove a run that no longer needs the device, or never got to it; the slot is free once all runs of the group have left."""
        if group.remove(run):
            self.release(group)
        else:
            group.note_if_ready()
            self.advance()

    def release(self, group: Group) -> None:
        """Free the slot of the group."""
        if group in self.groups:
            self.groups.remove(group)
            if self.on_device is group:
                self.on_device, self._free_since_s = None, time.monotonic()
            self.advance()
            self.on_room()

    def late(self) -> Group | None:
        """Return a group that has waited too long and must be requeued, if there is one; mark the group on the device as overdue."""
        if self.on_device is None:
            return None
        for group in self.groups:
            if group.late:
                self.on_device.overdue = True
                return group
        return None

    def advance(self) -> None:
        """Send the oldest complete group to the device, if that is open and free."""
        if not self._open or self.on_device is not None:
            return
        for group in self.groups:
            if not group.started.is_set() and (frames := group.frames()) is not None:
                self.on_device = group
                group.waited = group.since_s < self._free_since_s
                group.start()
                self._send(frames)
                return
