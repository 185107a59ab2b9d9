"""How stills are laid out in time."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Final

import msgspec

DISSOLVE_S: Final = Fraction(1, 2)
"""The longest dissolve."""
DISSOLVE_SHARE: Final = Fraction(3, 10)
"""The longest dissolve, as a share of the shortest shot."""
SHORTEST_DISSOLVE_FRAMES: Final = 4


class Shot(msgspec.Struct, frozen=True):
    """A still on screen from frame `first` up to, not including, `end`, its dissolves included."""

    still: int
    first: int
    end: int
    fade_in: int
    """Frames at its start that it shares with the shot before."""

    @property
    def frames(self) -> int:
        return self.end - self.first

    def presence(self, frame: int) -> float:
        """Return the opacity of this shot over the one before: 0 to 1, in even steps through the dissolve."""
        return 1.0 if frame >= self.first + self.fade_in else (frame - self.first + 1) / (self.fade_in + 1)


def plan_shots(stills: int, frames: int, rate: Fraction) -> list[Shot]:
    """Return the shots of a clip: of equal length, joined by dissolves of at most half a second and 30 % of a shot.

    A dissolve is centred on the boundary; one shorter than four frames becomes a cut. A still that would get no frame is left out.
    """
    bounds = [round(Fraction(i * frames, stills)) for i in range(stills + 1)]
    spans = [(still, a, b) for still, (a, b) in enumerate(pairwise(bounds)) if b > a]
    shortest = min(b - a for _, a, b in spans)
    dissolve = min(int(DISSOLVE_S * rate), int(DISSOLVE_SHARE * shortest))
    if dissolve < SHORTEST_DISSOLVE_FRAMES:
        dissolve = 0
    before, after = dissolve // 2, dissolve - dissolve // 2
    return [
        Shot(
            still=still,
            first=a if number == 0 else a - before,
            end=b if number == len(spans) - 1 else b + after,
            fade_in=0 if number == 0 else dissolve,
        )
        for number, (still, a, b) in enumerate(spans)
    ]
