"""The images of a task for a model: scaled for a clip, or as the arguments of a picture."""

from __future__ import annotations

from typing import Any

from PIL import Image

from movieq.models.table import Images, Model
from workers.child.diffusion import sizing
from workers.child.job import Job
from workers.child.media import images


def load(job: Job, references: list[str], size: tuple[int, int]) -> list[Image.Image]:
    """Return the referenced images, scaled and cropped to `size`."""
    return [sizing.scale_and_crop(images.load(each, job.input(each), size), size) for each in references]


def shown(job: Job, entry: Model, references: list[str], size: tuple[int, int]) -> list[Image.Image]:
    """Return the referenced images for a clip that shows what they show, each in its own aspect."""
    most = entry.limits.references
    if len(references) > most:
        job.warn(f"{job.run.model} uses at most {most} images: the rest are ignored")
    return [images.load(each, job.input(each), size) for each in references[:most]]


def of_picture(job: Job, entry: Model, references: list[str], size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments for a picture of `size` from images: drawn over the first one, or with what they show in it."""
    if entry.images is Images.REFERENCES:  # each in its own aspect: the pipeline scales them
        return {"image": [images.load(each, job.input(each), size) for each in references]}
    if len(references) > 1:
        job.warn(f"{job.run.model} draws over one image: the first")
    return {"image": load(job, references[:1], size)[0], "strength": entry.defaults.strength or 0.6}
