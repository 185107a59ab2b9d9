"""The animatic engine: what film people make before they pay for the real thing. No weights, no GPU, and it never pretends.

Storyboard frames become a timed clip with camera moves, a grade, captions, a slate and ambience; a description becomes a concept card; a
line is spoken by espeak-ng. Everything it makes says that it is an animatic: on its slate, in its metadata, in its file. The same
parameters, inputs and seed make the same bytes.

A word that it does not know (of `camera_angle`, `lighting`, `pace`, ...) changes nothing, and stands in `warnings` of the metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
from PIL import Image

from movieq.errors import InternalFault, UnsupportedParameter
from movieq.tasks import params as parameters
from movieq.tasks.params import AnimationParams, AudioParams, ImageFormat, ImageParams, VideoParams
from workers.child.animatic import camera, captions, card, cutout, espeak, grade, mannequin, typography
from workers.child.animatic import shots as cutting
from workers.child.animatic.cutout import Placing, Puppet
from workers.child.animatic.plate import Plate, dissolved
from workers.child.animatic.shots import Shot
from workers.child.job import Made, Take
from workers.child.media import ambience, encode, images, loudness
from workers.child.media import metadata as about
from workers.child.media.encode import Clip, Format, Planes, Samples
from workers.protocol import Produced, Stage

SPEECH_LUFS: Final = -16.0
AMBIENCE_LUFS: Final = -18.0
"""Of ambience that is the whole result."""
BED_LUFS: Final = -24.0
"""Of ambience under a picture."""
UNDER_SPEECH_DB: Final = 20.0
BREATH_S: Final = 0.3
"""Of background before and after a line that has one."""
FADE_S: Final = 0.05

FAR_SHARE: Final = 0.35
NEAR_SHARE: Final = 1.3
"""How much of the puppet's way the far plane goes with it, and the near plane against it: what is nearer moves more."""
STRIDE_POSES: Final = 16


def make(take: Take) -> Made:
    """The files of a task of any type. Raises a TaskFault that names what the animatic cannot do."""
    match take.params:
        case VideoParams() as params:
            return _clip(take, params)
        case ImageParams() as params:
            return _image(take, params)
        case AudioParams() as params:
            return _dialogue(take, params) if params.text else _ambience(take, params)
        case AnimationParams() as params:
            return _animation(take, params)
    raise InternalFault(f"the animatic has no {take.run.task_type}")


# -- generate_video


def _clip(take: Take, params: VideoParams) -> Made:
    form = Format(parameters.size(params.resolution), parameters.frame_rate(params.fps), parameters.frames(params))
    references = params.storyboard_images
    shots = cutting.cut(max(1, len(references)), form.frames, form.rate)
    if len(shots) < len(references):
        take.warnings.append(f"{len(references)} storyboard images do not fit into {form.frames} frames: {len(shots)} are shown")
    look = _look(take, params.lighting)
    _warn_of_camera(take, params.camera_angle)
    if params.captions:
        _warn_of_letters(take, params.description)
    take.plan(
        Stage("storyboard", "processing_storyboard", 0.04 * len(shots)),
        *([Stage("sound", "synthesizing_sound", 0.08)] if params.audio_cues else []),
        Stage("frames", "rendering_video", 1.0),
    )
    for number, shot in enumerate(shots, 1):
        if references:
            images.check(references[shot.still], take.input(references[shot.still]))
        take.step("storyboard", number, len(shots))
    track = _sound_track(take, params, shots, form) if params.audio_cues else None

    over = captions.lower_thirds(params.character_positions, form) if params.captions else []
    if params.captions and params.description.strip():
        over += captions.captions(params.description, form, [shot.first for shot in shots[1:]])
    slate = captions.Slate(form, take.run.project_id, _scene(take), len(shots))
    pictures = _Cutter(take, params, form, look, shots).frames()
    return _film(take, form, pictures, over, slate, track)


class _Cutter:
    """The pictures of a clip, one after another. At most two plates are in memory: the shot's, and in a dissolve the next one's."""

    def __init__(self, take: Take, params: VideoParams, form: Format, look: str, shots: list[Shot]) -> None:
        self._take = take
        self._params = params
        self._form = form
        self._look = look
        self._shots = shots

    def frames(self) -> Iterator[tuple[int, Planes]]:
        """Shot number and picture of each frame."""
        before: tuple[Shot, Plate] | None = None
        for number, shot in enumerate(self._shots):
            plate = self._plate(number, shot)
            last = number + 1 == len(self._shots)
            end = shot.end if last else self._shots[number + 1].first
            for frame in range(shot.first, end):
                picture = plate.frame(frame - shot.first)
                if before and frame < before[0].end:
                    picture = dissolved(before[1].frame(frame - before[0].first), picture, shot.presence(frame))
                yield number, picture
            before = (shot, plate)

    def _plate(self, number: int, shot: Shot) -> Plate:
        move = camera.move(self._params.camera_angle, number)
        rng = _rng(self._take.seed, f"camera {number}")
        views = camera.path(move, shot.frames, float(shot.frames / self._form.rate), self._form.aspect, rng)
        if references := self._params.storyboard_images:
            reference = references[shot.still]
            still = images.load(reference, self._take.input(reference), self._form.size)
        else:
            brief = card.Brief(description=self._params.description, pose=None, lighting=None, seed=self._take.seed)
            still = card.painting(self._form.size, brief)
        return Plate(still, self._form.size, self._look, views)


def _film(
    take: Take,
    form: Format,
    pictures: Iterator[tuple[int, Planes]],
    over: list[captions.Title],
    slate: captions.Slate,
    track: Samples | None,
) -> Made:
    """The pictures with titles and slate, as an mp4 with its poster."""
    path, poster_path = take.out_dir / "output.mp4", take.out_dir / "poster.jpg"
    tags = about.tags(take, "Animatic")
    poster_frame = form.frames // 3
    with Clip(path, form, tags, track) as clip:
        for frame, (shot, picture) in enumerate(pictures):
            for title in over:
                if title.first <= frame < title.end:
                    captions.lay(picture, title.overlay, captions.opacity(title, frame, form.rate))
            slate.lay(picture, shot, frame)
            clip.add(picture)
            if frame == poster_frame:
                encode.write_image(poster_path, encode.picture(picture), ImageFormat.JPEG, tags)
            take.preview(partial(_preview, picture))
            take.step("frames", frame + 1, form.frames)
    metadata = about.metadata(take, "mp4", form.size) | {"duration": round(form.seconds, 3), "fps": about.plain(form.rate)}
    metadata["generated"] |= {"frames": form.frames, "fps": about.plain(form.rate)}
    if track is not None:
        metadata["sample_rate"] = encode.CLIP_SAMPLE_RATE
    return Made(
        (
            Produced(str(path), "output", "video/mp4", *form.size, form.seconds),
            Produced(str(poster_path), "poster", "image/jpeg", *form.size),
        ),
        metadata,
    )


def _sound_track(take: Take, params: VideoParams, shots: list[Shot], form: Format) -> Samples:
    """Ambience as long as the clip; where there are several cues it changes with the picture."""
    scenes = [_known_cues(take, text) for text in params.audio_cues]
    per_frame = encode.CLIP_SAMPLE_RATE / form.rate
    length = round(form.frames * per_frame)
    changes = [round((shot.first + shot.fade_in / 2) * per_frame) for shot in shots[1:]]
    bed = ambience.bed(scenes, length, encode.CLIP_SAMPLE_RATE, _rng(take.seed, "sound"), changes)
    take.step("sound", 1, 2)
    bed = _faded(loudness.at(bed, encode.CLIP_SAMPLE_RATE, BED_LUFS), encode.CLIP_SAMPLE_RATE)
    take.step("sound", 2, 2)
    return bed


# -- generate_image


def _image(take: Take, params: ImageParams) -> Made:
    size = parameters.size(params.resolution)
    take.plan(
        Stage("references", "processing_storyboard", 0.2), Stage("card", "generating_image", 0.6), Stage("encode", "encoding_image", 0.2)
    )
    reference = images.load(name := params.reference_images[0], take.input(name), size) if params.reference_images else None
    style = images.load(name := params.style_guide, take.input(name), (256, 256)) if params.style_guide else None
    if len(params.reference_images) > 1:
        take.warnings.append("a concept card shows the first reference image alone")
    take.step("references", 1, 1)
    _warn_of_letters(take, params.description)
    look = _look(take, params.lighting)
    brief = card.Brief(description=params.description, pose=params.pose, lighting=look, seed=take.seed, reference=reference, style=style)
    picture = card.card(size, brief)
    take.preview(partial(encode.preview, picture))
    take.step("card", 1, 1)
    extension = "jpg" if params.format is ImageFormat.JPEG else str(params.format)
    path = take.out_dir / f"output.{extension}"
    content_type = encode.write_image(path, picture, params.format, about.tags(take, "Animatic"))
    take.step("encode", 1, 1)
    return Made((Produced(str(path), "output", content_type, *size),), about.metadata(take, str(params.format), size))


# -- process_audio


def _dialogue(take: Take, params: AudioParams) -> Made:
    if params.character_voice_profile:
        raise UnsupportedParameter(
            "task_data.character_voice_profile: the animatic speaks with espeak-ng, which cannot take on the voice of a sample; "
            "leave it out, or ask for a model that clones voices"
        )
    assert params.text
    take.plan(Stage("speech", "synthesizing_speech", 0.6), Stage("mix", "mixing_sound", 0.2), Stage("encode", "encoding_audio", 0.2))
    how, warnings = espeak.delivery(params.pace, params.emotion)
    take.warnings += warnings
    spoken = espeak.speak(params.text, params.language, how, lambda done, of: take.step("speech", done, of))
    take.step("speech", len(params.text), len(params.text))
    rate = params.sample_rate
    line = loudness.at(encode.resampled(spoken[:, None], espeak.SAMPLE_RATE, rate), rate, SPEECH_LUFS)
    take.step("mix", 1, 2)
    if params.background_noise:
        line = _over_background(take, line, rate, params.background_noise)
    take.step("mix", 2, 2)
    return _heard(take, params, line)


def _over_background(take: Take, line: Samples, rate: int, text: str) -> Samples:
    """The line in stereo, with ambience 20 dB under it that begins a breath before and ends a breath after."""
    breath = np.zeros((int(BREATH_S * rate), 2), np.float32)
    voice = np.concatenate([breath, np.repeat(line, 2, axis=1), breath])
    bed = ambience.bed([_known_cues(take, text)], len(voice), rate, _rng(take.seed, "sound"))
    under = loudness.at(bed, rate, loudness.lufs(voice, rate) - UNDER_SPEECH_DB)
    return loudness.limited(voice + _faded(under, rate))


def _ambience(take: Take, params: AudioParams) -> Made:
    take.plan(Stage("mix", "synthesizing_sound", 0.7), Stage("encode", "encoding_audio", 0.3))
    rate = params.sample_rate
    scene = _known_cues(take, params.description)
    bed = ambience.bed([scene], round(params.duration * rate), rate, _rng(take.seed, "sound"))
    take.step("mix", 1, 2)
    bed = loudness.at(bed, rate, AMBIENCE_LUFS)
    take.step("mix", 2, 2)
    return _heard(take, params, bed)


def _heard(take: Take, params: AudioParams, samples: Samples) -> Made:
    path = take.out_dir / f"output.{params.output_format}"
    rate = params.sample_rate
    content_type = encode.write_sound(
        path, samples, rate, params.output_format, about.tags(take, "Animatic"), lambda done, of: take.step("encode", done, of)
    )
    seconds = len(samples) / rate
    metadata = about.metadata(take, str(params.output_format), None) | {
        "duration": round(seconds, 3),
        "sample_rate": rate,
        "channels": samples.shape[1],
    }
    return Made((Produced(str(path), "output", content_type, duration_s=seconds),), metadata)


# -- render_animation


def _animation(take: Take, params: AnimationParams) -> Made:
    form = Format(parameters.size(params.resolution), parameters.frame_rate(params.fps), parameters.frames(params))
    motion = cutout.word(params.motion)
    if params.motion and motion is None:
        take.warnings.append(f"motion {params.motion!r} is not known and was taken as idle; known: {', '.join(cutout.MOTIONS)}")
    if len(params.reference_images) > 1:
        take.warnings.append("one reference image is animated: the first")
    take.plan(Stage("cut_out", "processing_storyboard", 0.15), Stage("frames", "rendering_animation", 1.0))
    scene = _Puppetry(take, params, form, motion or "idle")
    take.step("cut_out", 1, 1)
    slate = captions.Slate(form, take.run.project_id, _scene(take), 1)
    return _film(take, form, scene.frames(), [], slate, None)


class _Puppetry:
    """The pictures of an animation: a far plane that moves little, the puppet, and with the lay figure a near plane that moves much."""

    def __init__(self, take: Take, params: AnimationParams, form: Format, motion: str) -> None:
        size = form.size
        self._cycles = max(1, round(form.seconds / cutout.CYCLE_S[motion]))
        self._placings = cutout.placings(motion, form.frames, form.seconds, loop=params.loop)
        brief = card.Brief(description=params.description, pose=None, lighting=None, seed=take.seed)
        views = [camera.View(1.25, across * FAR_SHARE / 1.25) for across, _ in self._placings]
        if params.reference_images:
            reference = params.reference_images[0]
            still = images.load_cut_out(reference, take.input(reference), size)
            far = images.blurred(images.opaque(still), size)
            cut = cutout.cut_out(still, min(round(size[1] * 0.66), round(size[0] * 0.8 * still.height / still.width)))
            self._near = None
            self._puppets = [Puppet(cut, (size[0] / 2, size[1] * 0.86))]
        else:
            far, near, ground = card.stage(size, brief)
            wide = near.resize((round(size[0] * 1.5), size[1]), Image.Resampling.BICUBIC)
            self._near = Puppet(wide, (size[0] / 2, size[1]))
            self._puppets = _lay_figures(brief, size, ground, motion)
        self._plate = Plate(far, size, "neutral", views)

    def frames(self) -> Iterator[tuple[int, Planes]]:
        """Shot number, which is always 0, and picture of each frame."""
        for number, (across, placing) in enumerate(self._placings):
            picture = self._plate.frame(number)
            if self._near:
                self._near.lay(picture, Placing(-across * NEAR_SHARE))
            phase = number * self._cycles * len(self._puppets) // len(self._placings) % len(self._puppets)
            self._puppets[phase].lay(picture, placing)
            yield 0, picture


def _lay_figures(brief: card.Brief, size: tuple[int, int], ground: float, motion: str) -> list[Puppet]:
    """One puppet, or those of a stride where the figure walks or runs."""
    tall = round(min(size[1] * 0.5, size[0] * 0.6))
    if motion in ("walk", "run"):
        poses = [mannequin.stride(step / STRIDE_POSES, running=motion == "run") for step in range(STRIDE_POSES)]
    else:
        poses = [card.pose_of(brief)]
    colours = brief.colours()
    return [Puppet(card.stand_in(tall, pose, colours), (size[0] / 2, size[1] * ground)) for pose in poses]


# -- what all of them share


def _preview(picture: Planes) -> bytes:
    return encode.preview(encode.picture(picture))


def _warn_of_letters(take: Take, text: str) -> None:
    if letters := typography.missing(text):
        take.warnings.append(f"no font here has the letters {letters[:20]!r}: they are drawn as boxes")


def _look(take: Take, lighting: str | None) -> str:
    """The word of the grade table; neutral, with a warning, for what is not in it."""
    look = grade.word(lighting)
    if lighting and look is None:
        take.warnings.append(f"lighting {lighting!r} is not known and was taken as neutral; known: {', '.join(grade.GRADES)}")
    return look or "neutral"


def _warn_of_camera(take: Take, angle: str | None) -> None:
    if angle and not camera.words(angle):
        known = ", ".join([*camera.FRAMINGS, *camera.MOVES])
        take.warnings.append(f"camera_angle {angle!r} is not known and was taken as neutral; known: {known}")


def _known_cues(take: Take, text: str) -> tuple[str, ...]:
    """The sounds that a text names; a quiet room, with a warning, where it names none."""
    names = ambience.cues(text)
    if not names:
        take.warnings.append(f"no known sound in {text[:80]!r}, a quiet room stands in; known: {', '.join(ambience.SOUNDS)}")
    return names or ("room",)


def _scene(take: Take) -> str:
    """The scene's number or id, where the task's metadata names it."""
    return next((str(value) for key in ("scene", "scene_number", "scene_id") if (value := take.run.metadata.get(key))), "")


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *hashlib.sha256(purpose.encode()).digest()[:8]])


def _faded(samples: Samples, rate: int) -> Samples:
    """Without a click at either end."""
    n = min(len(samples) // 2, int(FADE_S * rate))
    ramp = np.linspace(0, 1, n, dtype=np.float32)[:, None]
    out = samples.copy()
    out[:n] *= ramp
    out[len(out) - n :] *= ramp[::-1]
    return out
