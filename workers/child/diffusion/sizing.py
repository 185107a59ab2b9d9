"""Choosing a size, frame count and windows that a model can render, and scaling the result back to exactly what was asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from PIL import Image

from movieq.models.table import Limits


class Window(NamedTuple):
    """One call of a model: `frames` frames of the clip from `first`, which is also the last frame of the window before."""

    first: int
    frames: int


def model_size(limits: Limits, wanted: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height at which the model renders: near the wanted aspect and area, within the model's limits.

    Both sides are multiples of `limits.sides`. Of the sizes near the wanted area, the one with the nearest aspect is chosen.
    """
    min_pixels, max_pixels = limits.pixels
    area = min(max(wanted[0] * wanted[1], min_pixels), max_pixels)
    aspect = wanted[0] / wanted[1]
    step = limits.sides
    ideal = math.sqrt(area * aspect) / step, math.sqrt(area / aspect) / step
    candidates = []
    for columns in range(max(1, math.floor(ideal[0]) - 1), math.ceil(ideal[0]) + 2):
        for rows in range(max(1, math.floor(ideal[1]) - 1), math.ceil(ideal[1]) + 2):
            pixels = columns * rows * step * step
            if pixels <= max_pixels:
                candidates.append((abs(math.log(columns / rows / aspect)) + abs(math.log(pixels / area)), columns * step, rows * step))
    return min(candidates)[1:] if candidates else (step, step)


def windows(limits: Limits, seconds: float, cuts: Sequence[int] = ()) -> list[Window]:
    """Return the windows that cover a clip of this length, in frames of the model's own rate.

    At each frame of `cuts` one window ends and the next one starts.
    """
    needed = max(1, math.ceil(Fraction(seconds).limit_denominator(100_000) * Fraction(limits.fps).limit_denominator(1001)))
    edges = [0, *(cut for cut in cuts if 0 < cut < needed - 1), needed - 1]
    found: list[Window] = []
    for first, end in itertools.pairwise(edges):
        while True:
            frames = _allowed_frames(limits, min(end - first + 1, limits.frames))
            found.append(Window(first, frames))
            if first + frames > end or frames < 2:
                break
            first += frames - 1
    return found


def _allowed_frames(limits: Limits, frames: int) -> int:
    """Return the smallest frame count of the model that is at least `frames`, or its largest."""
    step, start = limits.frame_step, limits.frame_first
    enough = start + max(0, math.ceil((frames - start) / step)) * step
    largest = start + (limits.frames - start) // step * step
    return max(1, min(enough, largest))


def image_frames(count: int, frames: int, step: int) -> list[int]:
    """Return the frame at which each of `count` images appears: the start of its equal share of the clip, on a multiple of `step`."""
    return [number * frames // count // step * step for number in range(count)]


def scale_and_crop(picture: Image.Image, wanted: tuple[int, int]) -> Image.Image:
    """Scale the picture to fill exactly these sides; what does not fit the aspect is cropped evenly at both ends."""
    if picture.size == wanted:
        return picture
    scale = max(wanted[0] / picture.width, wanted[1] / picture.height)
    across, down = wanted[0] / scale, wanted[1] / scale
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    return picture.resize(wanted, Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
