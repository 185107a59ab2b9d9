"""The `task_data` of each task type: its fields and their limits.

Known fields are validated here. Unknown ones are passed to the engine unchanged and listed in the receipt's `warnings`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from movieq.errors import ValidationFailed

MAX_PIXELS: Final = 4_000_000_000
"""Largest width x height x frames of one task."""

LANGUAGES: Final = frozenset(
    """
    af am an ar as az ba be bg bn bpy bs ca cmn cs cv cy da de el en eo es et eu fa fi fr ga gd gn grc gu hak haw he hi hr ht hu hy ia id io
    is it ja jbo ka kk kl kn ko kok ku ky la lb lfn lt ltg lv mi mk ml mr ms mt my nb nci ne nl nog om or pa pap piqd pl pt py qu quc
    qya ro ru sd shn si sjn sk sl smj sq sr sv sw ta te th ti tk tn tr tt ug uk ur uz vi yue zh
    """.split()
)
"""The languages that can be spoken, as primary language subtags (BCP 47)."""


class ImageFormat(StrEnum):
    """The formats of `generate_image`. Files of jpeg end with .jpg."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"


class AudioFormat(StrEnum):
    """The formats of `process_audio`."""

    MP3 = "mp3"
    WAV = "wav"
    FLAC = "flac"


Text = Annotated[str, Meta(max_length=8000)]
Word = Annotated[str, Meta(max_length=200)]
Reference = Annotated[str, Meta(min_length=1, max_length=1_000_000, description="url, upload:ID, data: url or task:ID")]
References = Annotated[list[Reference], Meta(max_length=32)]
Seconds = Annotated[float, Meta(ge=1, le=30)]
Resolution = Annotated[str, Meta(pattern=r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}(?!\n)$", description="WIDTHxHEIGHT, even sides of 64 to 3840")]
Ratio = Annotated[str, Meta(pattern=r"^[0-9]{1,6}(/[0-9]{1,6})?(?!\n)$")]
Fps = Annotated[int, Meta(ge=1, le=60)] | Annotated[float, Meta(ge=1, le=60)] | Ratio


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that every task type has."""

    prompt: Text | None = None
    negative_prompt: Text | None = None
    model: Word | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    steps: Annotated[int, Meta(ge=1, le=150)] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=100)] | None = None
    draft: bool = False
    preview: bool = False
    no_cache: bool = False

    @property
    def description(self) -> str:
        """Return the text that describes the result; empty if only images do."""
        return self.prompt or ""

    @property
    def references(self) -> list[str]:
        """Return the references to inputs, each once, in order."""
        return []


class VideoParams(Params, frozen=True, kw_only=True):
    """`generate_video`: a storyboard or a description becomes an mp4."""

    scene_description: Text | None = None
    storyboard_images: References = msgspec.field(default_factory=list)
    camera_angle: Word | None = None
    lighting: Word | None = None
    character_positions: Annotated[list[Text | dict[str, Any]], Meta(max_length=32)] = msgspec.field(default_factory=list)
    audio_cues: Annotated[list[Word], Meta(max_length=32)] = msgspec.field(default_factory=list)
    captions: bool = True
    duration: Seconds = 7.0
    fps: Fps = 24
    resolution: Resolution = "1920x1080"

    @property
    def description(self) -> str:
        return self.scene_description or self.prompt or ""

    @property
    def references(self) -> list[str]:
        return list(dict.fromkeys(self.storyboard_images))


class ImageParams(Params, frozen=True, kw_only=True):
    """`generate_image`: a description becomes a still."""

    character_description: Text | None = None
    style_guide: Reference | None = None
    reference_images: References = msgspec.field(default_factory=list)
    pose: Word | None = None
    lighting: Word | None = None
    resolution: Resolution = "1024x1024"
    format: ImageFormat = ImageFormat.JPEG

    @property
    def description(self) -> str:
        return self.character_description or self.prompt or ""

    @property
    def references(self) -> list[str]:
        return list(dict.fromkeys([*self.reference_images, *([self.style_guide] if self.style_guide else [])]))


class AudioParams(Params, frozen=True, kw_only=True):
    """`process_audio`: `text` becomes dialogue; a `prompt` alone becomes sound without speech."""

    text: Annotated[str, Meta(min_length=1, max_length=5000)] | None = None
    language: Annotated[str, Meta(min_length=2, max_length=35)] = "en"
    character_voice_profile: Reference | None = None
    emotion: Word | None = None
    pace: Word | None = None
    background_noise: Word | None = None
    duration: Annotated[float, Meta(ge=0.5, le=60)] = 5.0
    output_format: AudioFormat = AudioFormat.MP3
    sample_rate: Annotated[int, Meta(ge=8000, le=48000)] = 44100

    @property
    def description(self) -> str:
        return self.text or self.prompt or ""

    @property
    def references(self) -> list[str]:
        return [self.character_voice_profile] if self.character_voice_profile else []


class AnimationParams(Params, frozen=True, kw_only=True):
    """`render_animation`: a character moves."""

    character_description: Text | None = None
    reference_images: References = msgspec.field(default_factory=list)
    motion: Word | None = None
    duration: Seconds = 3.0
    fps: Fps = 24
    resolution: Resolution = "1280x720"
    loop: bool = False

    @property
    def description(self) -> str:
        return self.character_description or self.prompt or ""

    @property
    def references(self) -> list[str]:
        return list(dict.fromkeys(self.reference_images))


SAMPLE_RATES: Final = (8000, 16000, 22050, 24000, 44100, 48000)


def parse(cls: type[Params], task_data: dict[str, Any]) -> tuple[Params, list[str]]:
    """Return the validated parameters, and the unknown keys of `task_data`.

    Raises ValidationFailed, which names each wrong field, its value and what is allowed.
    """
    try:
        params = convert(cls, task_data)
    except msgspec.ValidationError:
        raise refused(_problems(cls, task_data)) from None
    if errors := list(_inconsistent(params)):
        raise refused(errors)
    return params, sorted(task_data.keys() - set(cls.__struct_fields__))


def convert(cls: type[Params], task_data: dict[str, Any]) -> Params:
    """Return the parameters of `task_data` that `parse` has accepted before; null means absent."""
    return msgspec.convert({key: value for key, value in task_data.items() if value is not None}, cls)


def size(resolution: str) -> tuple[int, int]:
    """Return width and height in pixels of a resolution such as "1920x1080"."""
    width, height = resolution.split("x")
    return int(width), int(height)


@lru_cache(maxsize=256)
def frame_rate(fps: float | str) -> Fraction:
    """Return the exact frames per second for 24, "24000/1001", or 23.976, which stands for 24000/1001."""
    if isinstance(fps, str):
        return Fraction(fps)
    for whole in (24, 30, 48, 60):
        if abs(fps - whole * 1000 / 1001) < 0.005:
            return Fraction(whole * 1000, 1001)
    return Fraction(fps).limit_denominator(1001)


def frames(params: VideoParams | AnimationParams) -> int:
    """Return the number of frames of the clip."""
    return _frames(params.duration, params.fps)


@lru_cache(maxsize=256)
def _frames(duration: float, fps: float | str) -> int:
    return max(1, round(Fraction(duration) * frame_rate(fps)))


def _problems(cls: type[Params], task_data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return every wrong field with its problem; msgspec itself stops at the first."""
    errors: list[tuple[str, str]] = []
    for field in msgspec.structs.fields(cls):
        value = task_data.get(field.encode_name)
        if value is not None:
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                errors.append(_problem(field.encode_name, value, str(error)))
        elif field.required:  # only plug-ins have required fields
            errors.append((f"task_data.{field.encode_name}", "required"))
    return errors


def given(text: str, value: object) -> str:
    """Return the text of msgspec with the given value after it, as JSON of at most 80 characters."""
    shown = msgspec.json.encode(value).decode() if not isinstance(value, float) or math.isfinite(value) else str(value)
    return f"{text}{'' if ', got ' in text else ', got'} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _problem(key: str, value: object, message: str) -> tuple[str, str]:
    text, _, path = message.partition(" - at `$")
    return f"task_data.{key}{path.removesuffix('`')}", given(text, value)


def refused(errors: list[tuple[str, str]]) -> ValidationFailed:
    """Return the error for wrong values, which are pairs of path and message."""
    path, message = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ValidationFailed(f"{path}: {message}{more}", errors=tuple(errors))


def _inconsistent(params: Params) -> list[tuple[str, str]]:
    errors: list[tuple[str, str]] = []
    if not params.description.strip():
        if isinstance(params, AudioParams):
            errors.append(("task_data.text", "one of text (dialogue) and prompt (sound without speech) is needed"))
        elif not params.references:
            names = [
                n
                for n in ("scene_description", "character_description", "prompt", "storyboard_images", "reference_images")
                if hasattr(params, n)
            ]
            errors.append((f"task_data.{names[0]}", f"one of {', '.join(names)} is needed"))
    for name, text in _texts(params):
        if "\0" in text or not _encodable(text):
            errors.append((f"task_data.{name}", "text with NUL or half a surrogate pair cannot be drawn or spoken"))
    if isinstance(params, AudioParams):
        if params.sample_rate not in SAMPLE_RATES:
            errors.append(("task_data.sample_rate", f"one of {', '.join(map(str, SAMPLE_RATES))} is allowed, got {params.sample_rate}"))
        if params.language.lower().replace("_", "-").split("-")[0] not in LANGUAGES:
            errors.append(
                (
                    "task_data.language",
                    f"{params.language!r} cannot be spoken; allowed: {', '.join(sorted(LANGUAGES))}, with a region behind (en-gb)",
                )
            )
        if params.text is not None and not params.text.strip():
            errors.append(("task_data.text", "at least one visible character is needed"))
    if isinstance(params, VideoParams | ImageParams | AnimationParams):
        errors += _sizes(params)
    return errors


def _texts(params: Params) -> Iterator[tuple[str, str]]:
    """Yield the field and the text of every text in the parameters, also of those in lists."""
    for name in params.__struct_fields__:
        value = getattr(params, name)
        for each in value if isinstance(value, list) else (value,):
            if isinstance(each, str):
                yield name, each


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sizes(params: VideoParams | ImageParams | AnimationParams) -> list[tuple[str, str]]:
    width, height = size(params.resolution)
    if not (64 <= width <= 3840 and 64 <= height <= 3840) or width % 2 or height % 2:
        return [("task_data.resolution", f"both sides must be even and 64 to 3840, got {params.resolution!r}")]
    if isinstance(params, ImageParams):
        return []
    try:
        rate = frame_rate(params.fps)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 1 <= rate <= 60:
        return [("task_data.fps", f"1 to 60 frames a second are allowed, got {params.fps!r}")]
    if (pixels := width * height * frames(params)) > MAX_PIXELS:
        return [("task_data.resolution", f"width x height x frames is {pixels}, at most {MAX_PIXELS} allowed: ask for less of one of them")]
    return []
