"""The slot of a device: which tasks have it, and which may be sent ahead."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from movieq.tasks.states import TaskId
from workers.protocol import framed

AHEAD_S: Final = 2.0
"""A child whose run ends in so short a time is given the next one, so that its inputs are there when the device is free."""
AHEAD_MOST_S: Final = 10.0
"""What has waited for so long is given back: what it waited for takes longer than it looked."""


class Group:
    """Runs that were claimed for one call of a child, mostly one: from the claim until the device needs nothing more of them."""

    def __init__(self, task_ids: Sequence[TaskId], model: str, batch: str) -> None:
        self.task_ids = tuple(task_ids)
        self.model = model
        self.batch = batch
        self.since_s = time.monotonic()
        self.remaining_s: Callable[[], float] = lambda: math.inf
        """Until its end, as it looks now."""
        self.begun = asyncio.Event()
        """The child has it."""
        self.overdue = False
        """It takes longer than it looked: nothing more is claimed to come after it."""
        self.waited = False
        """It was there already when the device became free."""
        self._missing = len(task_ids)
        self._left: set[str] = set()
        self._requests: dict[str, bytes] = {}

    def come(self, run: str, request: bytes) -> None:
        """A row, with its encoded request, is ready to be made."""
        self._missing -= 1
        self._requests[run] = request

    def leave(self, run: str) -> bool:
        """A row is over, whether it came or not; true where it was the last. Said again it changes nothing."""
        if run not in self._left:
            self._left.add(run)
            if self._requests.pop(run, None) is None:
                self._missing -= 1
        return not self._missing and not self._requests

    def frames(self) -> bytes | None:
        """What the child is sent, once no row is missing."""
        return None if self._missing or not self._requests else framed(list(self._requests.values()))
