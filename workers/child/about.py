"""What every result says about itself, in its metadata and in its file."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import movieq
from workers.child.media import Tags
from workers.child.take import Take


def tags(take: Take, title: str) -> Tags:
    """For the file."""
    return Tags(
        title=title,
        prompt=take.params.description,
        seed=take.seed,
        engine=take.run.engine,
        model=take.run.model,
        version=movieq.__version__,
        task=take.run.task_id,
    )


def metadata(take: Take, kind: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """For the result; the worker adds the file's size."""
    found: dict[str, Any] = {"engine": take.run.engine, "model": take.run.model, "seed": take.seed, "format": kind}
    if size:
        found["resolution"] = f"{size[0]}x{size[1]}"
        found["generated"] = {"resolution": found["resolution"], "frames": 1, "fps": None}
    if take.warnings:
        found["warnings"] = take.warnings
    return found


def plain(rate: Fraction) -> int | float:
    """24 or 23.976: what people read; the file has the fraction."""
    return int(rate) if rate.denominator == 1 else round(float(rate), 3)
