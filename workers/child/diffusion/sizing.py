"""Choosing a size, frame count and windows that a model can render, and scaling the result back to exactly what was asked for."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from PIL import Image

from movieq.models.table import Limits


class Window(NamedTuple):
    """One call of a model: `frames` frames of the clip from `first`. It shares its first `overlap` with the window that it continues."""

    first: int
    frames: int
    overlap: int = 0


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


def frame_count(limits: Limits, seconds: float) -> int:
    """Return the frames of a clip of this length at the model's own rate."""
    return max(1, math.ceil(Fraction(seconds).limit_denominator(100_000) * Fraction(limits.fps).limit_denominator(1001)))


def windows(limits: Limits, first: int, end: int, overlap: int = 1) -> list[Window]:
    """Return the windows that cover the frames of a shot from `first` up to `end`. Each continues the last `overlap` frames of another."""
    if _allowed_frames(limits, limits.frames) <= overlap:
        overlap = 1
    found: list[Window] = []
    while True:
        frames = _allowed_frames(limits, min(end - first, limits.frames))
        found.append(Window(first, frames, overlap if found else 0))
        if first + frames >= end or frames <= overlap:
            return found
        first += frames - overlap


def _allowed_frames(limits: Limits, frames: int) -> int:
    """Return the smallest frame count of the model that is at least `frames`, or its largest."""
    step, start = limits.frame_step, limits.frame_first
    enough = start + max(0, math.ceil((frames - start) / step)) * step
    largest = start + (limits.frames - start) // step * step
    return max(1, min(enough, largest))


def image_frames(count: int, frames: int, step: int) -> list[int]:
    """Return the frame at which each of `count` images appears: the multiple of `step` nearest to the start of its equal share."""
    last = (frames - 1) // step * step
    return [min((2 * number * frames + count * step) // (2 * count * step) * step, last) for number in range(count)]


def scale_and_crop(picture: Image.Image, wanted: tuple[int, int]) -> Image.Image:
    """Scale the picture to fill exactly these sides; what does not fit the aspect is cropped evenly at both ends."""
    if picture.size == wanted:
        return picture
    scale = max(wanted[0] / picture.width, wanted[1] / picture.height)
    across, down = wanted[0] / scale, wanted[1] / scale
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    return picture.resize(wanted, Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
