"""Render pictures by a diffusion model: one, or a batch in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from PIL import Image

from movieq.models.table import Model
from movieq.tasks import params as parameters
from movieq.tasks.params import ImageFormat, ImageParams
from workers.child.diffusion import conditions, frames, session, sizing
from workers.child.diffusion.session import Session
from workers.child.job import BatchJob, Finish, Job, JobCancelled, Output, device_is_broken
from workers.child.media import encode
from workers.child.media.metadata import file_tags
from workers.faults import public_message
from workers.protocol import Produced


class Rendered(NamedTuple):
    """A picture, and how many were rendered in the same call."""

    picture: Image.Image
    batch_size: int


def render(job: Job, entry: Model, params: ImageParams) -> Finish:
    """Render a picture; return the rest that needs no device."""
    size = sizing.model_size(entry.limits, parameters.size(params.resolution))
    given = conditions.of_picture(job, entry, params.reference_images, size) if params.reference_images else {}
    if params.style_guide:
        job.warn(f"style_guide is not used: {job.run.model} takes no style from an image")
    with session.opened(job, entry, "generating_image", "mux") as model:
        if not given:
            return _finish(job, model, params, size, _rendered([job], model, size))
        arguments = model.arguments(job) | {"width": size[0], "height": size[1]} | given
        (picture,) = _pictures(model.call(arguments, with_images=True))
        return _finish(job, model, params, size, {job.run.run: Rendered(picture, 1)})


def render_batch(jobs: Sequence[Job], entry: Model) -> list[Output | Finish | Exception]:
    """Render pictures of one batch key in one call, each from the noise of its own seed. If the call fails, render each alone.

    Returns for each job the rest that needs no device, or the error of that job.
    """
    batch = BatchJob(jobs)
    params = [cast(ImageParams, job.params) for job in jobs]
    size = sizing.model_size(entry.limits, parameters.size(params[0].resolution))
    failed: dict[str, Exception] = {}
    with session.opened(batch, entry, "generating_image", "mux") as model:
        try:
            pictures = _rendered(jobs, model, size)
        except Exception as error:
            if device_is_broken(error):
                raise
            batch.note(f"the batch failed, each of its {len(jobs)} tasks is tried alone: {public_message(error)}"[:500])
            pictures = {}
            for job in jobs:
                try:
                    pictures |= {} if job.cancelled else _rendered([job], model, size)
                except Exception as error_alone:
                    if device_is_broken(error_alone):
                        raise
                    failed[job.run.run] = error_alone
        return [failed.get(job.run.run) or _finish(job, model, each, size, pictures) for job, each in zip(jobs, params, strict=True)]


def _rendered(jobs: Sequence[Job], model: Session, size: tuple[int, int]) -> dict[str, Rendered]:
    """Return, by run, the picture of each job that is not cancelled. A batch that runs out of memory is rendered in halves."""
    jobs = [job for job in jobs if not job.cancelled] or jobs[:1]
    batch = BatchJob(jobs) if len(jobs) > 1 else jobs[0]
    arguments = model.arguments(jobs[0]) | {"width": size[0], "height": size[1]}
    if len(jobs) > 1:
        each = [model.arguments(job) for job in jobs]
        arguments |= {name: [one[name] for one in each] for name in ("prompt", "generator", "negative_prompt") if name in arguments}

    def in_halves() -> dict[str, Rendered]:
        middle = len(jobs) // 2
        batch.report_batch_limit(middle)
        return _rendered(jobs[:middle], model, size) | _rendered(jobs[middle:], model, size)

    answer = model.call(arguments, job=batch, in_halves=in_halves if len(jobs) > 1 else None)
    if isinstance(answer, dict):  # of the two halves
        return answer
    return {job.run.run: Rendered(picture, len(jobs)) for job, picture in zip(jobs, _pictures(answer), strict=True)}


def _pictures(answer: Any) -> list[Image.Image]:
    return [Image.fromarray(each) for each in frames.to_host(answer[0])]


def _finish(job: Job, model: Session, params: ImageParams, size: tuple[int, int], pictures: dict[str, Rendered]) -> Finish:
    """Return the rest of the work on a picture of `size`: scaling and encoding. A job without a picture was cancelled."""
    if job.run.run not in pictures:
        return _raise_cancelled
    picture, batch_size = pictures[job.run.run]
    wanted = parameters.size(params.resolution)
    metadata = model.metadata(job, str(params.format), wanted)
    metadata |= {"generated": {"resolution": f"{size[0]}x{size[1]}", "frames": 1, "fps": None}, "batch_size": batch_size}
    tags = file_tags(job, "Image")

    def finish() -> Output:
        job.begin("mux")
        extension = "jpg" if params.format is ImageFormat.JPEG else str(params.format)
        path = job.out_dir / f"output.{extension}"
        content_type = encode.write_image(path, sizing.scale_and_crop(picture, wanted), params.format, tags)
        job.step("mux", 1, 1)
        return Output((Produced(str(path), "output", content_type, *wanted),), metadata)

    return finish


def _raise_cancelled() -> Output:
    raise JobCancelled
