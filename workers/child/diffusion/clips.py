"""Render clips by a diffusion model: in as many windows as the clip needs, with the sound of its cues."""

from __future__ import annotations

from fractions import Fraction

from PIL import Image

from movieq.models.table import Images, Model
from movieq.tasks import params as parameters
from movieq.tasks.params import AnimationParams, ImageFormat, VideoParams
from workers.child.diffusion import conditions, frames, session, sizing, sounds
from workers.child.diffusion.session import Session, generator
from workers.child.job import Finish, Job, Output
from workers.child.media import encode, interpolation
from workers.child.media.encode import ClipFormat, ClipWriter, Samples
from workers.child.media.metadata import display_rate, file_tags
from workers.protocol import Produced


def render(job: Job, entry: Model, params: VideoParams | AnimationParams) -> Finish:
    """Render a clip; return the rest that needs no device."""
    clip = ClipFormat(parameters.size(params.resolution), parameters.frame_rate(params.fps), parameters.frames(params))
    size = sizing.model_size(entry.limits, clip.size)
    stills = conditions.load(job, params.storyboard_images if isinstance(params, VideoParams) else params.reference_images, size)
    cues = params.audio_cues if isinstance(params, VideoParams) else []
    if isinstance(params, AnimationParams) and params.loop:
        job.warn(f"loop is not used: {job.run.model} makes no loops")
    still_at, windows = _planned(job, entry, stills, clip.seconds)
    with_sound = bool(cues) and not entry.sound
    with session.opened(job, entry, "generating_video", *(["sound"] if with_sound else []), "mux") as model:
        pictures, track = _rendered(model, size, still_at, windows, clip)
        if with_sound:
            track = sounds.track(job, cues, clip)
        metadata = model.metadata(job, "mp4", clip.size) | {"duration": round(clip.seconds, 3), "fps": display_rate(clip.rate)}
    metadata["generated"] = {
        "resolution": f"{size[0]}x{size[1]}",
        "frames": len(pictures),
        "fps": entry.limits.fps,
        "windows": len(windows),
    }
    if track is not None:
        metadata["sample_rate"] = encode.CLIP_SAMPLE_RATE
    return lambda: Output(_encoded(job, pictures, entry.limits.fps, clip, track), metadata)


def _planned(job: Job, entry: Model, stills: list[Image.Image], seconds: float) -> tuple[dict[int, Image.Image], list[sizing.Window]]:
    """Return the stills by the frame of the clip at which each appears, and the windows.

    A model that takes images only at the ends of a window gets a window for each. Of several stills for one frame, the last is used.
    """
    windows = sizing.windows(entry.limits, seconds)
    length = windows[-1].first + windows[-1].frames
    still_at = dict(zip(sizing.image_frames(len(stills), length, entry.limits.frame_step), stills, strict=True))
    if len(still_at) < len(stills):
        job.warn(f"{len(stills)} images do not fit into the clip: {len(still_at)} are used")
    if len(still_at) > 1 and entry.images is Images.START:
        job.warn(f"{job.run.model} begins with an image and leads to none: each image begins a shot of its own")
    if stills and entry.images is not Images.FRAMES:
        windows = sizing.windows(entry.limits, seconds, list(still_at))
    return still_at, windows


def _rendered(
    model: Session, size: tuple[int, int], still_at: dict[int, Image.Image], windows: list[sizing.Window], clip: ClipFormat
) -> tuple[list[frames.Pictures], Samples | None]:
    """Return the pictures of the clip, one array (height, width, 3) each, and the sound that the model made with them.

    Each window goes on from the last picture of the one before.
    """
    pictures: list[frames.Pictures] = []
    sound: list[Samples] = []
    rate = 0
    noise = generator(model.job.seed)
    for number, window in enumerate(windows):
        here = {frame - window.first: still for frame, still in still_at.items() if window.first <= frame < window.first + window.frames}
        continues = bool(pictures) and 0 not in here
        if continues:
            here = {0: Image.fromarray(pictures[window.first]), **here}
        arguments = model.arguments(model.job) | {"width": size[0], "height": size[1], "num_frames": window.frames, "generator": noise}
        pipe = model.pipe(bool(here))
        arguments |= model.adapter.conditions(pipe, here, window.frames) if here else {}
        rendered = model.adapter.rendered(pipe, model.call(arguments, with_images=bool(here), part=(number, len(windows))))
        pictures[window.first + continues :] = frames.to_host(rendered.pictures)[continues:]
        if rendered.sound is not None:
            rate = rendered.rate
            first = round(rate / model.entry.limits.fps) if number else 0  # of the picture that both windows have
            length = round(window.frames * rate / model.entry.limits.fps)
            sound.append(rendered.sound.cpu().numpy().T[first:length])
    return pictures, sounds.of_clip(sound, rate, clip) if sound else None


def _encoded(job: Job, pictures: list[frames.Pictures], fps: float, clip: ClipFormat, track: Samples | None) -> tuple[Produced, ...]:
    """Write the pictures, rendered at `fps`, as an mp4 of the clip's frame rate with a poster."""
    job.begin("mux")
    path, poster_path = job.out_dir / "output.mp4", job.out_dir / "poster.jpg"
    tags = file_tags(job, "Clip")
    retimed = interpolation.retimed(pictures, Fraction(fps).limit_denominator(1001), clip.rate, clip.frames)
    with ClipWriter(path, clip, tags, track) as writer:
        for frame, picture in enumerate(retimed):
            planes = encode.to_planes(sizing.scale_and_crop(picture, clip.size))
            writer.add(planes)
            if frame == clip.frames // 3:
                encode.write_image(poster_path, encode.to_image(planes), ImageFormat.JPEG, tags)
            job.step("mux", frame + 1, clip.frames)
    return (
        Produced(str(path), "output", "video/mp4", *clip.size, clip.seconds),
        Produced(str(poster_path), "poster", "image/jpeg", *clip.size),
    )
