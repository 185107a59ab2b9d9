"""How far a run is and how long it will still take, by its stages.

The engine announces what share of the time each stage has. What is left is reckoned at the pace that was measured: of the stage at hand
from its first step to its latest (what comes before the first is paid once), of those to come by all that was done so far. Until enough was
done to know these, the estimate of the task stands in, which is the median of what tasks of its shape took lately.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import msgspec

from workers.protocol import Stage

FETCH_SHARE: Final = 0.02
ENGINE_SHARE: Final = 0.93
UPLOAD_AT: Final = FETCH_SHARE + ENGINE_SHARE
"""How much of the bar the inputs and the engine have; the upload has the rest, and the commit makes it 1."""
LEAST_WEIGHT: Final = 1e-6
KNOWN_AT: Final = 0.2
"""The share of the engine's work after which its pace counts alone, and no longer the estimate."""
STAGE_KNOWN_AT: Final = 0.1
"""The same of a stage and its own pace."""


class Pace:
    """Of one run, from its begin."""

    def __init__(self, estimate_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._estimate_s = estimate_s
        self._clock = clock
        self._begun_s = clock()
        self._stages: tuple[Stage, ...] = ()
        self._place = 0
        self._share = 0.0
        """How much of the stage at hand is done."""
        self._first: tuple[float, float] | None = None
        """The share that the first step of the stage did, and when."""
        self._engine_begun_s = self._latest_s = self._begun_s
        self.progress = 0.0

    def plan(self, stages: tuple[Stage, ...]) -> Stage | None:
        """The engine begins, and has these stages: the first."""
        # a plug-in may announce anything: a weight that is not positive and finite counts as almost nothing
        self._stages = tuple(each if 0 < each.weight < math.inf else msgspec.structs.replace(each, weight=LEAST_WEIGHT) for each in stages)
        self._engine_begun_s = self._latest_s = self._clock()
        self.progress = FETCH_SHARE
        return self._stages[0] if stages else None

    def step(self, name: str, step: int, steps: int) -> Stage | None:
        """`step` of `steps` of a stage are done; None for a stage that was not announced, or is over."""
        place = next((place for place, stage in enumerate(self._stages) if stage.name == name and place >= self._place), None)
        if place is None:
            return None
        if place > self._place:
            self._place, self._share, self._first = place, 0.0, None
        self._share = max(self._share, min(step / max(steps, 1), 1.0))
        self._latest_s = self._clock()
        self._first = self._first or (self._share, self._latest_s)
        self.progress = FETCH_SHARE + ENGINE_SHARE * self._done() / self._total()
        return self._stages[place]

    def remaining_s(self) -> float:
        """Seconds until the end, as it looks now."""
        tail_s = self._estimate_s * (1 - UPLOAD_AT)
        if not self._stages:
            return max(self._estimate_s - (self._clock() - self._begun_s), tail_s)
        stage, total, done = self._stages[self._place], self._total(), self._done()
        pace = self._estimate_s * ENGINE_SHARE / total
        if done:
            pace = _between(pace, (self._latest_s - self._engine_begun_s) / done, done / total / KNOWN_AT)
        own = pace
        if self._first and (share := self._share - self._first[0]):
            own = _between(pace, (self._latest_s - self._first[1]) / (share * stage.weight), share / STAGE_KNOWN_AT)
        later = sum(each.weight for each in self._stages[self._place + 1 :])
        return own * (1 - self._share) * stage.weight + pace * later + tail_s

    def _done(self) -> float:
        return sum(stage.weight for stage in self._stages[: self._place]) + self._share * self._stages[self._place].weight

    def _total(self) -> float:
        return sum(stage.weight for stage in self._stages)


def _between(guessed: float, measured: float, trust: float) -> float:
    trust = min(trust, 1.0)
    return guessed * (1 - trust) + measured * trust
