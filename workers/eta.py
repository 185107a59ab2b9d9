"""The progress of a run and its ETA, from its stages and its measured speed.

The engine announces which share of the time each stage has. The remaining time follows from the measured speed: for the current stage, the
speed from its first step to its latest (the work before the first step comes only once); for later stages, the speed of all work so far.
Until enough work is done to measure these, the task's estimate is used: the median time of recent tasks of its shape.
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
"""The progress when the upload begins, after the shares of fetching the inputs and of the engine. The commit sets it to 1."""
LEAST_WEIGHT: Final = 1e-6
"""The least weight of a stage, also used if the announced weight is not positive and finite. The heaviest stage has 1."""
KNOWN_AT: Final = 0.2
"""The share of the engine's work after which only its measured speed counts, no longer the estimate."""
STAGE_KNOWN_AT: Final = 0.1
"""The share of a stage after which only the stage's own speed counts for it."""


class Eta:
    """The progress and the remaining time of one run."""

    def __init__(self, estimate_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._estimate_s = estimate_s
        self._clock = clock
        self._started_s = clock()
        self._stages: tuple[Stage, ...] = ()
        self._place = 0
        self._share = 0.0
        """The share of the current stage that is done, 0 to 1."""
        self._first: tuple[float, float] | None = None
        """The share of the stage that was done after its first step, and the time of that step."""
        self._engine_started_s = self._latest_s = self._started_s
        self.progress = 0.0

    def plan(self, stages: tuple[Stage, ...]) -> Stage | None:
        """Record that the engine starts with these stages; return the first, or None if there is none."""
        self._stages = _normalised(stages)
        self._engine_started_s = self._latest_s = self._clock()
        self.progress = FETCH_SHARE
        return self._stages[0] if stages else None

    def step(self, name: str, step: int, steps: int) -> Stage | None:
        """Record that `step` of `steps` of a stage are done; return the stage, or None if it was not announced or has ended."""
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
        """Return the estimated seconds until the end of the run."""
        tail_s = self._estimate_s * (1 - UPLOAD_AT)
        if not self._stages:
            return max(self._estimate_s - (self._clock() - self._started_s), tail_s)
        stage, total, done = self._stages[self._place], self._total(), self._done()
        s_per_weight = self._estimate_s * ENGINE_SHARE / total
        if done:
            s_per_weight = _between(s_per_weight, (self._latest_s - self._engine_started_s) / done, done / total / KNOWN_AT)
        own = s_per_weight
        if self._first and (share := self._share - self._first[0]):
            own = _between(s_per_weight, (self._latest_s - self._first[1]) / (share * stage.weight), share / STAGE_KNOWN_AT)
        later = sum(each.weight for each in self._stages[self._place + 1 :])
        return own * (1 - self._share) * stage.weight + s_per_weight * later + tail_s

    def remaining_ms(self) -> int:
        """Return `remaining_s` in whole milliseconds."""
        return int(self.remaining_s() * 1000)

    def _done(self) -> float:
        return sum(stage.weight for stage in self._stages[: self._place]) + self._share * self._stages[self._place].weight

    def _total(self) -> float:
        return sum(stage.weight for stage in self._stages)


def _normalised(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return the stages with weights from `LEAST_WEIGHT` to 1, so that their sum is finite whatever a plug-in announces."""
    heaviest = max((stage.weight for stage in stages if 0 < stage.weight < math.inf), default=1.0)
    return tuple(msgspec.structs.replace(stage, weight=_share_of(stage.weight, heaviest)) for stage in stages)


def _share_of(weight: float, heaviest: float) -> float:
    return max(weight / heaviest, LEAST_WEIGHT) if 0 < weight < math.inf else LEAST_WEIGHT


def _between(guessed: float, measured: float, trust: float) -> float:
    trust = min(trust, 1.0)
    return guessed * (1 - trust) + measured * trust
