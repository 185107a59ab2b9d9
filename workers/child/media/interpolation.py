"""More pictures a second than a model renders: between two of them, what moves is moved, by ffmpeg's motion-compensated interpolation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Final

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

OPTIONS: Final = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:scd=fdiff"
"""Bidirectional search with overlapping blocks of variable size; a cut is not interpolated."""
PADDING: Final = 4
"""How often the last picture is repeated, so that the filter, which looks ahead, reaches the end."""


def retimed(pictures: Sequence[npt.NDArray[np.uint8]], fps: Fraction, rate: Fraction, count: int) -> Iterator[Image.Image]:
    """Yield `count` RGB pictures at `rate` from pictures (h, w, 3) at `fps`: those of the same moments, and interpolated ones between.

    A lower rate takes the nearest earlier pictures.
    """
    between = _interpolated(pictures, fps, rate) if rate > fps else None
    for number in range(count):
        at = number * fps / rate
        moved = next(between, None) if between is not None else None
        if moved is None or at.denominator == 1 or at >= len(pictures) - 1:
            yield Image.fromarray(pictures[min(int(at), len(pictures) - 1)])
        else:
            yield moved.to_image()


def _interpolated(pictures: Sequence[npt.NDArray[np.uint8]], fps: Fraction, rate: Fraction) -> Iterator[Any]:
    """Yield the frames of the filter, at `rate` from the first picture on."""
    height, width = pictures[0].shape[:2]
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("yuv444p"), time_base=1 / fps)
    moved = graph.add("minterpolate", f"fps={rate.numerator}/{rate.denominator}:{OPTIONS}")
    sink = graph.add("buffersink")
    source.link_to(moved)
    moved.link_to(sink)
    graph.configure()
    for number in range(len(pictures) + PADDING):
        frame = av.VideoFrame.from_ndarray(pictures[min(number, len(pictures) - 1)], format="rgb24").reformat(format="yuv444p")
        frame.pts, frame.time_base = number, 1 / fps
        source.push(frame)
        while True:
            try:
                yield sink.pull()
            except (av.BlockingIOError, av.EOFError):
                break
