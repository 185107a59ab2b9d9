"""Between what was asked for and what a model can make: sizes, frames, windows; and back again, to the pixel and the frame."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from PIL import Image

from movieq.models.table import Limits


class Window(NamedTuple):
    """A call of a model: `frames` pictures from the `first` of the clip on, which is the last of the window before, where there is one."""

    first: int
    frames: int


def size(limits: Limits, wanted: tuple[int, int]) -> tuple[int, int]:
    """The sides that the model makes: of this aspect, as many pixels as are wanted, within what comes out well.

    Of the sizes of about that area the one is taken whose aspect is the nearest.
    """
    fewest, most = limits.pixels
    area = min(max(wanted[0] * wanted[1], fewest), most)
    aspect = wanted[0] / wanted[1]
    step = limits.sides
    ideal = math.sqrt(area * aspect) / step, math.sqrt(area / aspect) / step
    found = []
    for across in range(max(1, math.floor(ideal[0]) - 1), math.ceil(ideal[0]) + 2):
        for down in range(max(1, math.floor(ideal[1]) - 1), math.ceil(ideal[1]) + 2):
            pixels = across * down * step * step
            if pixels <= most:
                found.append((abs(math.log(across / down / aspect)) + abs(math.log(pixels / area)), across * step, down * step))
    return min(found)[1:] if found else (step, step)


def windows(limits: Limits, seconds: float, cuts: Sequence[int] = ()) -> list[Window]:
    """The calls that make a clip of this length at the model's own rate; one ends at each cut, where the next begins."""
    needed = max(1, math.ceil(Fraction(seconds).limit_denominator(100_000) * Fraction(limits.fps).limit_denominator(1001)))
    edges = [0, *(cut for cut in cuts if 0 < cut < needed - 1), needed - 1]
    found: list[Window] = []
    for first, end in itertools.pairwise(edges):
        while True:
            frames = _allowed(limits, min(end - first + 1, limits.frames))
            found.append(Window(first, frames))
            if first + frames > end or frames < 2:
                break
            first += frames - 1
    return found


def _allowed(limits: Limits, frames: int) -> int:
    """The next count of the model from this one on, or the largest."""
    step, start = limits.frame_step, limits.frame_first
    up = start + max(0, math.ceil((frames - start) / step)) * step
    most = start + (limits.frames - start) // step * step
    return max(1, min(up, most))


def moments(count: int, frames: int, step: int) -> list[int]:
    """At which picture of a clip each of its storyboard's images stands: at the begin of its share of the time, on the model's own grid."""
    return [number * frames // count // step * step for number in range(count)]


def picked(made: int, made_fps: float, wanted: int, wanted_rate: Fraction) -> list[int]:
    """Which of the pictures that were made stands at each frame that was asked for: the one of that moment."""
    per_frame = Fraction(made_fps).limit_denominator(1001) / wanted_rate
    return [min(made - 1, math.floor(number * per_frame)) for number in range(wanted)]


def scaled(picture: Image.Image, wanted: tuple[int, int]) -> Image.Image:
    """The picture at exactly these sides, filled: what the aspect has too much is cut evenly off both ends."""
    if picture.size == wanted:
        return picture
    scale = max(wanted[0] / picture.width, wanted[1] / picture.height)
    across, down = wanted[0] / scale, wanted[1] / scale
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    return picture.resize(wanted, Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
