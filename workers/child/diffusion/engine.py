"""The engine of neural models: diffusers for pictures, clips and sound, transformers for speech.

The model table says what to load, how it is called and what of a task it uses; hooks report its progress (`hooks`). A model renders the
nearest size and the next larger frame count that it supports; the result is scaled, cropped and retimed to exactly what was asked for, and
its metadata says what was rendered. What a model cannot do is refused by name or listed in `warnings`; nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Sequence

from movieq.errors import InternalFault, ModelUnavailable, UnsupportedParameter
from movieq.models import choice
from movieq.models.table import Model
from movieq.tasks.params import AnimationParams, AudioParams, ImageParams, VideoParams
from workers.child.diffusion import clips, pictures, sounds
from workers.child.job import Finish, Job, Output


def render(job: Job) -> Finish:
    """Render a task of any type; return the rest that needs no device. Raises a TaskFault that names what the model cannot do."""
    entry = _entry(job)
    if refusals := list(choice.refusals(job.run.model, entry, job.params, job.run.project_id)):
        raise UnsupportedParameter(
            "; ".join(f"task_data.{field}: {why}" for field, why in refusals)
        )  # the API has checked this too, with its own table
    match job.params:
        case ImageParams() as params:
            return pictures.render(job, entry, params)
        case VideoParams() | AnimationParams() as params:
            return clips.render(job, entry, params)
        case AudioParams() as params:
            return sounds.render_ambience(job, entry, params) if params.text is None else sounds.render_speech(job, entry, params)
    raise InternalFault(f"no model makes {job.run.task_type}")


def render_batch(jobs: Sequence[Job]) -> list[Output | Finish | Exception]:
    """Render pictures of one batch key in one call. Returns for each job the rest that needs no device, or the error of that job."""
    return pictures.render_batch(jobs, _entry(jobs[0]))


def _entry(job: Job) -> Model:
    if job.run.entry is None:
        raise ModelUnavailable(f"{job.run.model} is not in this worker's table of models (MOVIEQ_MODELS)")
    return job.run.entry
