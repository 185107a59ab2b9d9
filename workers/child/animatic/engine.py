"""The animatic engine, without weights and GPU: what film people make before they pay for the real thing.

Storyboard images become a timed clip with camera moves, grade, captions, slate and ambience; a description becomes a concept card; dialogue
is spoken by espeak-ng. Every output says that it is an animatic: on its slate, in its metadata, in its file. The same parameters, inputs
and seed give the same bytes.

A word that it does not know (of `camera_angle`, `lighting`, `pace`, ...) changes nothing and is listed in the `warnings` of the metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
from PIL import Image

from movieq.errors import InternalFault, UnsupportedParameter
from movieq.models import choice
from movieq.tasks import params as parameters
from movieq.tasks.params import AnimationParams, AudioParams, ImageFormat, ImageParams, VideoParams
from workers.child.animatic import camera, captions, card, cutout, espeak, grade, mannequin, typography
from workers.child.animatic.cutout import Cutout, Placement
from workers.child.animatic.plate import Plate, dissolve
from workers.child.animatic.shots import Shot, plan_shots
from workers.child.job import Job, Output
from workers.child.media import ambience, encode, images, loudness
from workers.child.media.encode import ClipFormat, ClipWriter, Planes, Samples
from workers.child.media.metadata import display_rate, file_tags, result_metadata
from workers.protocol import Produced, Stage

SPEECH_LUFS: Final = -16.0
"""Loudness of speech."""
AMBIENCE_LUFS: Final = -18.0
"""Loudness of ambience that is the whole result."""
BED_LUFS: Final = -24.0
"""Loudness of ambience under a picture."""
UNDER_SPEECH_DB: Final = 20.0
"""How much quieter the background is than the speech."""
BREATH_S: Final = 0.3
"""Background before and after a line of dialogue."""
FADE_S: Final = 0.05
"""Fade in and fade out of ambience."""

FAR_SHARE: Final = 0.35
"""How far the far plane moves with the cutout, as a share of the cutout's movement."""
NEAR_SHARE: Final = 1.3
"""How far the near plane moves against it: what is nearer moves more."""
STRIDE_POSES: Final = 16
"""Drawings of one walk or run cycle."""


def render(job: Job) -> Output:
    """Render a task of any type. Raises a TaskFault that names what the animatic cannot do."""
    if choice.loras(job.params):
        job.warn("loras are not used: the animatic has no weights")
    match job.params:
        case VideoParams() as params:
            return _render_clip(job, params)
        case ImageParams() as params:
            return _render_image(job, params)
        case AudioParams() as params:
            return _render_dialogue(job, params) if params.text else _render_ambience(job, params)
        case AnimationParams() as params:
            return _render_animation(job, params)
    raise InternalFault(f"the animatic has no {job.run.task_type}")


# -- generate_video


def _render_clip(job: Job, params: VideoParams) -> Output:
    clip = ClipFormat(parameters.size(params.resolution), parameters.frame_rate(params.fps), parameters.frames(params))
    references = params.storyboard_images
    shots = plan_shots(max(1, len(references)), clip.frames, clip.rate)
    if len(shots) < len(references):
        job.warnings.append(f"{len(references)} storyboard images do not fit into {clip.frames} frames: {len(shots)} are shown")
    if params.continuous:
        job.warnings.append("continuous is not used: each board of an animatic is a shot of its own")
    look = _look_for(job, params.lighting)
    _warn_about_camera(job, params.camera_angle)
    if params.captions:
        _warn_about_glyphs(job, params.description)
    job.plan(
        Stage("storyboard", "processing_storyboard", 0.04 * len(shots)),
        *([Stage("sound", "synthesizing_sound", 0.08)] if params.audio_cues else []),
        Stage("frames", "rendering_video", 1.0),
    )
    for number, shot in enumerate(shots, 1):
        if references:
            images.check(references[shot.still], job.input(references[shot.still]))
        job.step("storyboard", number, len(shots))
    track = _sound_track(job, params, shots, clip) if params.audio_cues else None

    overlays = captions.lower_thirds(params.character_positions, clip) if params.captions else []
    if params.captions and params.description.strip():
        overlays += captions.description_overlays(params.description, clip, [shot.first for shot in shots[1:]])
    slate = captions.Slate(clip, job.run.project_id, _scene(job), len(shots))
    pictures = _ClipRenderer(job, params, clip, look, shots).frames()
    return _encode_clip(job, clip, pictures, overlays, slate, track)


class _ClipRenderer:
    """Draws the pictures of a clip in order. At most two plates are in memory: the shot's, and during a dissolve the shot's before."""

    def __init__(self, job: Job, params: VideoParams, clip: ClipFormat, look: str, shots: list[Shot]) -> None:
        self._job = job
        self._params = params
        self._clip = clip
        self._look = look
        self._shots = shots

    def frames(self) -> Iterator[tuple[int, Planes]]:
        """Yield the shot number and the picture of each frame."""
        before: tuple[Shot, Plate] | None = None
        for number, shot in enumerate(self._shots):
            plate = self._plate(number, shot)
            last = number + 1 == len(self._shots)
            end = shot.end if last else self._shots[number + 1].first
            for frame in range(shot.first, end):
                picture = plate.frame(frame - shot.first)
                if before and frame < before[0].end:
                    picture = dissolve(before[1].frame(frame - before[0].first), picture, shot.presence(frame))
                yield number, picture
            before = (shot, plate)

    def _plate(self, number: int, shot: Shot) -> Plate:
        move = camera.move_for(self._params.camera_angle, number)
        rng = _rng(self._job.seed, f"camera {number}")
        views = camera.path(move, shot.frames, float(shot.frames / self._clip.rate), self._clip.aspect, rng)
        if references := self._params.storyboard_images:
            reference = references[shot.still]
            still = images.load(reference, self._job.input(reference), self._clip.size)
        else:
            brief = card.Brief(description=self._params.description, pose=None, lighting=None, seed=self._job.seed)
            still = card.painting(self._clip.size, brief)
        return Plate(still, self._clip.size, self._look, views)


def _encode_clip(
    job: Job,
    clip: ClipFormat,
    pictures: Iterator[tuple[int, Planes]],
    overlays: list[captions.TimedOverlay],
    slate: captions.Slate,
    track: Samples | None,
) -> Output:
    """Write the pictures with overlays and slate as an mp4 with a poster."""
    path, poster_path = job.out_dir / "output.mp4", job.out_dir / "poster.jpg"
    tags = file_tags(job, "Animatic")
    poster_frame = clip.frames // 3
    with ClipWriter(path, clip, tags, track) as writer:
        for frame, (shot, picture) in enumerate(pictures):
            for timed in overlays:
                if timed.first <= frame < timed.end:
                    captions.composite(picture, timed.overlay, captions.opacity(timed, frame, clip.rate))
            slate.draw(picture, shot, frame)
            writer.add(picture)
            if frame == poster_frame:
                encode.write_image(poster_path, encode.to_image(picture), ImageFormat.JPEG, tags)
            job.preview(partial(_preview, picture))
            job.step("frames", frame + 1, clip.frames)
    metadata = result_metadata(job, "mp4", clip.size) | {"duration": round(clip.seconds, 3), "fps": display_rate(clip.rate)}
    metadata["generated"] |= {"frames": clip.frames, "fps": display_rate(clip.rate)}
    if track is not None:
        metadata["sample_rate"] = encode.CLIP_SAMPLE_RATE
    return Output(
        (
            Produced(str(path), "output", "video/mp4", *clip.size, clip.seconds),
            Produced(str(poster_path), "poster", "image/jpeg", *clip.size),
        ),
        metadata,
    )


def _sound_track(job: Job, params: VideoParams, shots: list[Shot], clip: ClipFormat) -> Samples:
    """Return ambience as long as the clip; several cues change with the shots."""
    scenes = [_sounds(job, text) for text in params.audio_cues]
    per_frame = encode.CLIP_SAMPLE_RATE / clip.rate
    length = round(clip.frames * per_frame)
    changes = [round((shot.first + shot.fade_in / 2) * per_frame) for shot in shots[1:]]
    bed = ambience.bed(scenes, length, encode.CLIP_SAMPLE_RATE, _rng(job.seed, "sound"), changes)
    job.step("sound", 1, 2)
    bed = _fade_ends(loudness.normalize(bed, encode.CLIP_SAMPLE_RATE, BED_LUFS), encode.CLIP_SAMPLE_RATE)
    job.step("sound", 2, 2)
    return bed


# -- generate_image


def _render_image(job: Job, params: ImageParams) -> Output:
    size = parameters.size(params.resolution)
    job.plan(
        Stage("references", "processing_storyboard", 0.2), Stage("card", "generating_image", 0.6), Stage("encode", "encoding_image", 0.2)
    )
    reference = images.load(name := params.reference_images[0], job.input(name), size) if params.reference_images else None
    style = images.load(name := params.style_guide, job.input(name), (256, 256)) if params.style_guide else None
    if len(params.reference_images) > 1:
        job.warnings.append("a concept card shows the first reference image alone")
    job.step("references", 1, 1)
    _warn_about_glyphs(job, params.description)
    look = _look_for(job, params.lighting)
    brief = card.Brief(description=params.description, pose=params.pose, lighting=look, seed=job.seed, reference=reference, style=style)
    picture = card.card(size, brief)
    job.preview(partial(encode.preview_jpeg, picture))
    job.step("card", 1, 1)
    extension = "jpg" if params.format is ImageFormat.JPEG else str(params.format)
    path = job.out_dir / f"output.{extension}"
    content_type = encode.write_image(path, picture, params.format, file_tags(job, "Animatic"))
    job.step("encode", 1, 1)
    return Output((Produced(str(path), "output", content_type, *size),), result_metadata(job, str(params.format), size))


# -- process_audio


def _render_dialogue(job: Job, params: AudioParams) -> Output:
    if params.character_voice_profile:
        raise UnsupportedParameter(
            "task_data.character_voice_profile: the animatic speaks with espeak-ng, which cannot take on the voice of a sample; "
            "leave it out, or ask for a model that clones voices"
        )
    if params.character_voice_text:
        job.warn("character_voice_text is not used: the animatic follows no voice")
    assert params.text
    job.plan(Stage("speech", "synthesizing_speech", 0.6), Stage("mix", "mixing_sound", 0.2), Stage("encode", "encoding_audio", 0.2))
    delivery, warnings = espeak.delivery(params.pace, params.emotion)
    job.warnings += warnings
    spoken = espeak.synthesize(params.text, params.language, delivery, lambda done, of: job.step("speech", done, of))
    job.step("speech", len(params.text), len(params.text))
    rate = params.sample_rate
    line = loudness.normalize(encode.resample(spoken[:, None], espeak.SAMPLE_RATE, rate), rate, SPEECH_LUFS)
    job.step("mix", 1, 2)
    if params.background_noise:
        line = _mix_background(job, line, rate, params.background_noise)
    job.step("mix", 2, 2)
    return _write_audio(job, params, line)


def _mix_background(job: Job, line: Samples, rate: int, text: str) -> Samples:
    """Return the line in stereo with ambience 20 dB below it, which starts a breath earlier and ends a breath later."""
    breath = np.zeros((int(BREATH_S * rate), 2), np.float32)
    voice = np.concatenate([breath, np.repeat(line, 2, axis=1), breath])
    bed = ambience.bed([_sounds(job, text)], len(voice), rate, _rng(job.seed, "sound"))
    under = loudness.normalize(bed, rate, loudness.lufs(voice, rate) - UNDER_SPEECH_DB)
    return loudness.limit_peaks(voice + _fade_ends(under, rate))


def _render_ambience(job: Job, params: AudioParams) -> Output:
    job.plan(Stage("mix", "synthesizing_sound", 0.7), Stage("encode", "encoding_audio", 0.3))
    rate = params.sample_rate
    scene = _sounds(job, params.description)
    bed = ambience.bed([scene], round(params.duration * rate), rate, _rng(job.seed, "sound"))
    job.step("mix", 1, 2)
    bed = loudness.normalize(bed, rate, AMBIENCE_LUFS)
    job.step("mix", 2, 2)
    return _write_audio(job, params, bed)


def _write_audio(job: Job, params: AudioParams, samples: Samples) -> Output:
    path = job.out_dir / f"output.{params.output_format}"
    rate = params.sample_rate
    content_type = encode.write_sound(
        path, samples, rate, params.output_format, file_tags(job, "Animatic"), lambda done, of: job.step("encode", done, of)
    )
    seconds = len(samples) / rate
    metadata = result_metadata(job, str(params.output_format), None) | {
        "duration": round(seconds, 3),
        "sample_rate": rate,
        "channels": samples.shape[1],
    }
    return Output((Produced(str(path), "output", content_type, duration_s=seconds),), metadata)


# -- render_animation


def _render_animation(job: Job, params: AnimationParams) -> Output:
    clip = ClipFormat(parameters.size(params.resolution), parameters.frame_rate(params.fps), parameters.frames(params))
    motion = cutout.motion_named(params.motion)
    if params.motion and motion is None:
        job.warnings.append(f"motion {params.motion!r} is not known and was taken as idle; known: {', '.join(cutout.MOTIONS)}")
    if len(params.reference_images) > 1:
        job.warnings.append("one reference image is animated: the first")
    job.plan(Stage("cut_out", "processing_storyboard", 0.15), Stage("frames", "rendering_animation", 1.0))
    scene = _AnimationRenderer(job, params, clip, motion or "idle")
    job.step("cut_out", 1, 1)
    slate = captions.Slate(clip, job.run.project_id, _scene(job), 1)
    return _encode_clip(job, clip, scene.frames(), [], slate, None)


class _AnimationRenderer:
    """Draws the pictures of an animation: a far plane that moves little, the cutout, and a near plane that moves much.

    The near plane is there only with the mannequin.
    """

    def __init__(self, job: Job, params: AnimationParams, clip: ClipFormat, motion: str) -> None:
        size = clip.size
        self._cycles = max(1, round(clip.seconds / cutout.CYCLE_S[motion]))
        self._placements = cutout.placements(motion, clip.frames, clip.seconds, loop=params.loop)
        brief = card.Brief(description=params.description, pose=None, lighting=None, seed=job.seed)
        views = [camera.View(1.25, across * FAR_SHARE / 1.25) for across, _ in self._placements]
        if params.reference_images:
            reference = params.reference_images[0]
            still = images.load_with_alpha(reference, job.input(reference), size)
            far = images.blurred_background(images.flatten_alpha(still), size)
            cut = cutout.extract(still, min(round(size[1] * 0.66), round(size[0] * 0.8 * still.height / still.width)))
            self._near = None
            self._cutouts = [Cutout(cut, (size[0] / 2, size[1] * 0.86))]
        else:
            far, near, ground = card.stage(size, brief)
            wide = near.resize((round(size[0] * 1.5), size[1]), Image.Resampling.BICUBIC)
            self._near = Cutout(wide, (size[0] / 2, size[1]))
            self._cutouts = _mannequins(brief, size, ground, motion)
        self._plate = Plate(far, size, "neutral", views)

    def frames(self) -> Iterator[tuple[int, Planes]]:
        """Yield the shot number, which is always 0, and the picture of each frame."""
        for number, (across, placement) in enumerate(self._placements):
            picture = self._plate.frame(number)
            if self._near:
                self._near.draw(picture, Placement(-across * NEAR_SHARE))
            phase = number * self._cycles * len(self._cutouts) // len(self._placements) % len(self._cutouts)
            self._cutouts[phase].draw(picture, placement)
            yield 0, picture


def _mannequins(brief: card.Brief, size: tuple[int, int], ground: float, motion: str) -> list[Cutout]:
    """Return the mannequin as one cutout or, if it walks or runs, one for each pose of a stride."""
    tall = round(min(size[1] * 0.5, size[0] * 0.6))
    if motion in ("walk", "run"):
        poses = [mannequin.stride(step / STRIDE_POSES, running=motion == "run") for step in range(STRIDE_POSES)]
    else:
        poses = [card.pose_of(brief)]
    colours = brief.colours()
    return [Cutout(card.mannequin_image(tall, pose, colours), (size[0] / 2, size[1] * ground)) for pose in poses]


# -- shared by all task types


def _preview(picture: Planes) -> bytes:
    return encode.preview_jpeg(encode.to_image(picture))


def _warn_about_glyphs(job: Job, text: str) -> None:
    if letters := typography.missing_glyphs(text):
        job.warnings.append(f"no font here has the letters {letters[:20]!r}: they are drawn as boxes")


def _look_for(job: Job, lighting: str | None) -> str:
    """Return the look that `lighting` names; "neutral", with a warning, if it names none."""
    look = grade.look_named(lighting)
    if lighting and look is None:
        job.warnings.append(f"lighting {lighting!r} is not known and was taken as neutral; known: {', '.join(grade.GRADES)}")
    return look or "neutral"


def _warn_about_camera(job: Job, angle: str | None) -> None:
    if angle and not camera.named_words(angle):
        known = ", ".join([*camera.FRAMINGS, *camera.MOVES])
        job.warnings.append(f"camera_angle {angle!r} is not known and was taken as neutral; known: {known}")


def _sounds(job: Job, text: str) -> tuple[str, ...]:
    """Return the sounds that a text names; a quiet room, with a warning, if it names none."""
    names = ambience.named_sounds(text)
    if not names:
        job.warnings.append(f"no known sound in {text[:80]!r}, a quiet room stands in; known: {', '.join(ambience.SOUNDS)}")
    return names or ("room",)


def _scene(job: Job) -> str:
    """Return the scene's number or id from the task's metadata, "" without one."""
    return next((str(value) for key in ("scene", "scene_number", "scene_id") if (value := job.run.metadata.get(key))), "")


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """Return a generator for one purpose, so that one more draw for a purpose does not change another."""
    return np.random.default_rng([seed, *hashlib.sha256(purpose.encode()).digest()[:8]])


def _fade_ends(samples: Samples, rate: int) -> Samples:
    """Return the samples with a short fade at both ends, so that they do not click."""
    n = min(len(samples) // 2, int(FADE_S * rate))
    ramp = np.linspace(0, 1, n, dtype=np.float32)[:, None]
    out = samples.copy()
    out[:n] *= ramp
    out[len(out) - n :] *= ramp[::-1]
    return out
