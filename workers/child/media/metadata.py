"""What every result says about itself, in its metadata and in its file."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import msgspec

import movieq
from movieq.models.table import ANIMATIC
from workers.child.job import Take
from workers.child.media.encode import Tags


def source(take: Take) -> str:
    """What the result is, by its name among IPTC's digital source types (cv.iptc.org/newscodes/digitalsourcetype).

    An animatic is drawn and spoken by formulas: no model was trained for it. With stills it is a composite of elements whose own source
    nobody told: `compositeSynthetic` would claim that there is generative AI among them.
    """
    if take.run.engine != ANIMATIC:
        return "trainedAlgorithmicMedia"
    return "composite" if take.params.references else "algorithmicMedia"


def tags(take: Take, title: str) -> Tags:
    """For the file: what it is and, unless the settings keep that out of files, how it was made."""
    plain = Tags(title=title, engine=take.run.engine, version=movieq.__version__, source=source(take))
    if not take.run.file_tags:
        return plain
    weights = take.run.entry.weights if take.run.entry else None
    return msgspec.structs.replace(
        plain,
        prompt=take.params.description,
        seed=take.seed,
        model=take.run.model,
        revision=weights.revision if weights else None,
        task=take.run.task_id,
    )


def metadata(take: Take, kind: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """For the result; the worker adds the file's size."""
    found: dict[str, Any] = {"engine": take.run.engine, "model": take.run.model, "seed": take.seed, "format": kind}
    found["digital_source_type"] = source(take)
    if size:
        found["resolution"] = f"{size[0]}x{size[1]}"
        found["generated"] = {"resolution": found["resolution"], "frames": 1, "fps": None}
    if take.warnings:
        found["warnings"] = take.warnings
    return found


def plain(rate: Fraction) -> int | float:
    """24 or 23.976: what people read; the file has the fraction."""
    return int(rate) if rate.denominator == 1 else round(float(rate), 3)
