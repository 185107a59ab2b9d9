"""The images of a task as arguments of a model: where a clip begins and where it leads, what a picture is drawn over."""

from __future__ import annotations

import sys
from typing import Any

from PIL import Image

from movieq.errors import InternalFault
from movieq.models.table import Images, Model
from workers.child.diffusion import sizing
from workers.child.job import Job
from workers.child.media import images


def load(job: Job, references: list[str], size: tuple[int, int]) -> list[Image.Image]:
    """Return the referenced images, scaled and cropped to `size`."""
    return [sizing.scale_and_crop(images.load(each, job.input(each), size), size) for each in references]


def of_picture(job: Job, entry: Model, references: list[str], size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments for a picture of `size` from images: drawn over the first one, or with what they show in it."""
    if entry.images is Images.REFERENCES:  # each in its own aspect: the pipeline scales them
        return {"image": [images.load(each, job.input(each), size) for each in references]}
    if len(references) > 1:
        job.warn(f"{job.run.model} draws over one image: the first")
    return {"image": load(job, references[:1], size)[0], "strength": entry.defaults.strength or 0.6}


def of_clip(entry: Model, pipe: Any, at: dict[int, Image.Image], frames: int) -> dict[str, Any]:
    """Return the arguments for one window of `frames` frames; `at` maps frames of the window to images."""
    if not at:
        return {}
    match entry.images:
        case Images.FRAMES:
            return {"conditions": [_condition(pipe, frame, still) for frame, still in at.items()]}
        case Images.ENDS if frames - 1 in at and len(at) > 1:
            return {"image": at[0], "last_image": at[frames - 1]}
        case _:
            return {"image": at[0]}


def _condition(pipe: Any, frame: int, still: Image.Image) -> Any:
    """Return an image at a frame as the pipeline takes it. Its arguments `image` and `frame_index` would use the first image alone."""
    module = sys.modules[type(pipe).__module__]
    try:
        return module.LTXVideoCondition(image=still, frame_index=frame)
    except AttributeError:
        raise InternalFault(f'{type(pipe).__name__} takes no images at frames: images = "frames" is wrong in its entry') from None
