"""The metadata of results and the tags of their files, alike for all engines."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import msgspec

import movieq
from movieq.models.table import ANIMATIC
from workers.child.job import Job
from workers.child.media.encode import Tags


def digital_source_type(job: Job) -> str:
    """Return the result's IPTC digital source type (cv.iptc.org/newscodes/digitalsourcetype).

    An animatic is drawn and spoken by formulas: no model was trained for it. With stills it is a `composite` of elements of unknown source;
    `compositeSynthetic` would claim that some of them are made by generative AI.
    """
    if job.run.engine != ANIMATIC:
        return "trainedAlgorithmicMedia"
    return "composite" if job.params.references else "algorithmicMedia"


def file_tags(job: Job, title: str) -> Tags:
    """Return the tags of a file: what it is and, unless the settings forbid it, its prompt, seed, model and task."""
    plain = Tags(title=title, engine=job.run.engine, version=movieq.__version__, source=digital_source_type(job))
    if not job.run.file_tags:
        return plain
    weights = job.run.entry.weights if job.run.entry else None
    return msgspec.structs.replace(
        plain,
        prompt=job.params.description,
        seed=job.seed,
        model=job.run.model,
        revision=weights.revision if weights else None,
        task=job.run.task_id,
    )


def result_metadata(job: Job, file_format: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the metadata of a result, with the job's warnings; the worker adds the file size."""
    found: dict[str, Any] = {"engine": job.run.engine, "model": job.run.model, "seed": job.seed, "format": file_format}
    found["digital_source_type"] = digital_source_type(job)
    if size:
        found["resolution"] = f"{size[0]}x{size[1]}"
        found["generated"] = {"resolution": found["resolution"], "frames": 1, "fps": None}
    if job.warnings:
        found["warnings"] = job.warnings
    return found


def display_rate(rate: Fraction) -> int | float:
    """Return the frame rate as people write it: 24 or 23.976. The file has the exact fraction."""
    return int(rate) if rate.denominator == 1 else round(float(rate), 3)
