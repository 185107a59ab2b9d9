"""Render clips by a diffusion model: in as many windows as the clip needs, with the sound of its cues."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from movieq.models.table import Images, Model
from movieq.tasks import params as parameters
from movieq.tasks.params import AnimationParams, VideoParams
from workers.child.diffusion import conditions, frames, session, sizing, sounds
from workers.child.diffusion.adapters import adapter
from workers.child.diffusion.clip_file import ClipFile
from workers.child.diffusion.session import Session, generator
from workers.child.job import Finish, Job, Output
from workers.child.media import encode
from workers.child.media.encode import ClipFormat, Samples
from workers.child.media.metadata import display_rate


def render(job: Job, entry: Model, params: VideoParams | AnimationParams) -> Finish:
    """Render a clip; return the rest that needs no device."""
    clip = ClipFormat(parameters.size(params.resolution), parameters.frame_rate(params.fps), parameters.frames(params))
    size = sizing.model_size(entry.limits, clip.size)
    given = params.storyboard_images if isinstance(params, VideoParams) else params.reference_images
    shown = conditions.shown(job, entry, given, size) if isinstance(params, AnimationParams) and adapter(entry).shows_references else []
    stills = [] if shown else conditions.load(job, given, size)
    cues = params.audio_cues if isinstance(params, VideoParams) else []
    if isinstance(params, AnimationParams) and params.loop:
        job.warn(f"loop is not used: {job.run.model} makes no loops")
    continuous = params.continuous if isinstance(params, VideoParams) else True  # the images of a character are no boards
    parts = _planned(job, entry, stills, clip.seconds, continuous=continuous)
    with_sound = bool(cues) and not entry.sound
    later_stages = [*(["sound"] if with_sound else []), "mux"]
    track: Samples | None = None
    cuts = [part.window.first for part in parts if part.cut]
    with session.opened(job, entry, "generating_video", *later_stages) as model, ClipFile(job, clip, entry.limits.fps, cuts) as file:
        track = _rendered(model, size, parts, shown, file)
        if with_sound:
            track = sounds.track(job, cues, clip)
        metadata = model.metadata(job, "mp4", clip.size) | {"duration": round(clip.seconds, 3), "fps": display_rate(clip.rate)}
        metadata["generated"] = {
            "resolution": f"{size[0]}x{size[1]}",
            "frames": file.count,
            "fps": entry.limits.fps,
            "windows": len(parts),
        }
        if track is not None:
            metadata["sample_rate"] = encode.CLIP_SAMPLE_RATE
    return lambda: Output(file.finish(track), metadata)  # `finish` raises first, if the file could not be written


class PlannedWindow(NamedTuple):
    """A window of the clip, and the images that appear in it, by frame of the window. `cut`: another shot begins with it."""

    window: sizing.Window
    at: dict[int, Image.Image]
    cut: bool = False


def _planned(job: Job, entry: Model, stills: list[Image.Image], seconds: float, *, continuous: bool) -> list[PlannedWindow]:
    """Return the windows of the clip with their images.

    Each image begins a shot of its own. `continuous`: one shot leads through all of them, if the model can do that. Of several images for
    one frame, the last is used.
    """
    end = sizing.frame_count(entry.limits, seconds)
    if continuous and entry.images is Images.START and len(stills) > 1:
        job.warn(f"{job.run.model} starts from an image and cannot lead to one: each image begins a shot of its own")
    continuous = continuous and entry.images is not Images.START
    step = entry.limits.frame_step if continuous else 1
    still_at = dict(zip(sizing.image_frames(len(stills), end, step), stills, strict=True))
    if len(still_at) < len(stills):
        job.warn(f"{len(stills)} images do not fit into the clip: {len(still_at)} are used")
    overlap = adapter(entry).overlap
    if not continuous:
        edges = [*(still_at or [0]), end]
        shots = [sizing.windows(entry.limits, first, next_first, overlap) for first, next_first in itertools.pairwise(edges)]
        return [
            PlannedWindow(window, {0: still_at[window.first]} if still_at and begins else {}, cut=begins and shot is not shots[0])
            for shot in shots
            for window in shot
            for begins in [window is shot[0]]
        ]
    if entry.images is Images.FRAMES or not stills:
        found = sizing.windows(entry.limits, 0, end, overlap)
    else:  # a window ends at each image, and the next one begins with it
        edges = [*still_at, *([end - 1] if end - 1 not in still_at or len(still_at) == 1 else [])]
        found = [each for first, last in itertools.pairwise(edges) for each in sizing.windows(entry.limits, first, last + 1, overlap)]
    return [PlannedWindow(window, _within(still_at, window)) for window in found]


def _within(still_at: dict[int, Image.Image], window: sizing.Window) -> dict[int, Image.Image]:
    """Return the images in the window's own frames, by frame of the window."""
    return {frame - window.first: still for frame, still in still_at.items() if window.overlap <= frame - window.first < window.frames}


def _rendered(
    model: Session, size: tuple[int, int], parts: list[PlannedWindow], shown: list[Image.Image], file: ClipFile
) -> Samples | None:
    """Render the windows of the clip into its file; return the sound that the model made with them.

    `shown` are images of what the clip is to show, without being its frames.
    """
    sound: Samples | None = None
    fps, rate = model.entry.limits.fps, 0
    noise = generator(model.job.seed)
    last = parts[-1].window
    next_windows = [*(part.window for part in parts[1:]), sizing.Window(last.first + last.frames, 0)]
    before: list[Image.Image] = []
    for number, (part, next_window) in enumerate(zip(parts, next_windows, strict=True)):
        window, at = part.window, part.at
        arguments = model.arguments(model.job) | {"width": size[0], "height": size[1], "num_frames": window.frames, "generator": noise}
        with_images = bool(at or before or shown)
        pipe = model.pipe(with_images)
        arguments |= model.adapter.conditions(pipe, at, before, window.frames) if at or before else {}
        arguments |= model.adapter.references(shown) if shown else {}
        rendered = model.adapter.rendered(pipe, model.call(arguments, with_images=with_images, part=(number, len(parts))))
        own = window.first + window.overlap
        end = next_window.first + next_window.overlap - window.first  # a shot may render more frames than it has
        before = _added(file, rendered.pictures[window.overlap : end], before, next_window.overlap)
        if rendered.sound is not None:
            rate = rendered.rate
            samples = rendered.sound.cpu().numpy().T[round(window.overlap * rate / fps) : round(window.frames * rate / fps)]
            sound = samples if sound is None else np.concatenate([sound[: round(own * rate / fps)], samples])
    return None if sound is None else sounds.of_clip(sound, rate, file.clip)


def _added(file: ClipFile, rendered: Tensor, before: list[Image.Image], overlap: int) -> list[Image.Image]:
    """Add the pictures of a window to the file; return the last `overlap` pictures so far, with which the next window begins.

    `before` are those with which this one begins.
    """
    pictures = frames.to_host(rendered)
    file.add(pictures)
    return [*before, *(Image.fromarray(each) for each in pictures[-overlap:])][-overlap:] if overlap else []
