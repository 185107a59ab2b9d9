"""More pictures a second than a model renders: between two of them, what moves is moved, by ffmpeg's motion-compensated interpolation."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, Final

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.uint8]
"""(height, width, 3)."""

OPTIONS: Final = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:scd=fdiff"
"""Bidirectional search with overlapping blocks of variable size; a cut is not interpolated."""
PADDING: Final = 4
"""How often the last picture is repeated, so that the filter, which looks ahead, reaches the end."""


def retimed(pictures: Iterable[Picture], fps: Fraction, rate: Fraction, count: int) -> Iterator[Image.Image]:
    """Yield `count` RGB pictures at `rate` from pictures at `fps`: those of the same moments, and interpolated ones between.

    A lower rate takes the nearest earlier pictures. Pictures are read as they are needed, a few ahead, and not kept.
    """
    own: deque[Picture] = deque()
    read = _remembered(pictures, own)
    between = _interpolated(read, fps, rate) if rate > fps else None
    first = 0  # the number of the first picture in `own`
    for number in range(count):
        at = number * fps / rate
        moved = next(between, None) if between is not None else None
        while first + len(own) <= at and next(read, None) is not None:
            pass  # where pictures are interpolated, the filter has read further already
        while first < int(at) and len(own) > 1:
            own.popleft()
            first += 1
        if moved is None or at.denominator == 1 or len(own) == 1:  # after the last picture nothing moves
            yield Image.fromarray(own[0])
        else:
            yield moved.to_image()


def _remembered(pictures: Iterable[Picture], own: deque[Picture]) -> Iterator[Picture]:
    """Yield the pictures, and append each to `own`."""
    for picture in pictures:
        own.append(picture)
        yield picture


def _interpolated(pictures: Iterable[Picture], fps: Fraction, rate: Fraction) -> Iterator[Any]:
    """Yield the frames of the filter, at `rate` from the first picture on."""
    for number, picture in enumerate(_padded(pictures)):
        if number == 0:
            graph = _filter(picture.shape[1], picture.shape[0], fps, rate)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv444p")
        frame.pts, frame.time_base = number, 1 / fps
        graph.vpush(frame)
        while True:
            try:
                yield graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                break


def _padded(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Yield the pictures, and the last one `PADDING` times more."""
    for picture in pictures:
        yield picture
    yield from itertools.repeat(picture, PADDING)


def _filter(width: int, height: int, fps: Fraction, rate: Fraction) -> av.filter.Graph:
    """Return the filter for pictures of this size."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("yuv444p"), time_base=1 / fps)
    moved = graph.add("minterpolate", f"fps={rate.numerator}/{rate.denominator}:{OPTIONS}")
    sink = graph.add("buffersink")
    source.link_to(moved)
    moved.link_to(sink)
    graph.configure()
    return graph
