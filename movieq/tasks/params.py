"""The `task_data` of each task type: its fields and their limits.

Known fields are validated here. Unknown ones are passed to the engine unchanged and listed in the receipt's `warnings`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from movieq.tasks import faults
from movieq.tasks.faults import Fault, Faults, given

MAX_PIXELS: Final = 4_000_000_000
"""Largest width x height x frames of one task."""

LANGUAGES: Final = frozenset(
    """
    af am an ar as az ba be bg bn bpy bs ca cmn cs cv cy da de el en eo es et eu fa fi fr ga gd gn grc gu hak haw he hi hr ht hu hy ia id in
    io is it iw ja jbo ka kk kl kn ko kok ku ky la lb lfn lt ltg lv mi mk ml mo mr ms mt my nb nci ne nl no nog om or pa pap piqd pl pt py
    qu quc qya ro ru sd shn si sjn sk sl smj sq sr sv sw ta te th ti tk tn tr tt ug uk ur uz vi yue zh
    """.split()
)
"""The languages that can be spoken, as primary language subtags (BCP 47)."""
_MEANT: Final = {"in": "id", "iw": "he", "mo": "ro", "no": "nb", "zh": "cmn"}
"""The language that a subtag stands for: withdrawn subtags, Norwegian, which is spoken as Bokmål, and Chinese, as Mandarin."""

NTSC_TOLERANCE: Final = 0.01
"""How far from 24000/1001 and its like a number may be that stands for it: people write 23.97, 23.976 and 23.98."""

_DESCRIBING: Final = ("scene_description", "character_description", "prompt", "storyboard_images", "reference_images")


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
Reference = Annotated[str, Meta(min_length=1, max_length=1_000_000, description="a url, upload:ID, data: url or task:ID")]
References = Annotated[list[Reference], Meta(max_length=32)]
Seconds = Annotated[float, Meta(ge=1, le=30)]
SIZES: Final = "WIDTHxHEIGHT, even sides of 64 to 3840"
Resolution = Annotated[str, Meta(pattern=r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}(?!\n)$", description=SIZES)]
Ratio = Annotated[
    str, Meta(pattern=r"^[0-9]{1,6}([./][0-9]{1,6})?(?!\n)$", description='a ratio or number as text, such as "24000/1001" or "23.976"')
]
Fps = Annotated[int, Meta(ge=1, le=60)] | Annotated[float, Meta(ge=1, le=60)] | Ratio


class LoraUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA of the model table, and how strongly it changes the model."""

    name: Word
    weight: Annotated[float, Meta(ge=-4, le=4)] | None = None

    @property
    def strength(self) -> float:
        """The weight; 1 if none is given."""
        return 1.0 if self.weight is None else self.weight


Loras = Annotated[list[LoraUse], Meta(max_length=8)]


def _first(*texts: str | None) -> str:
    """Return the first text with a visible character; empty if there is none."""
    return next((text for text in texts if text and text.strip()), "")


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that every task type has."""

    prompt: Text | None = None
    negative_prompt: Text | None = None
    model: Word | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    takes: Annotated[int, Meta(ge=1, le=8)] = 1
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
    continuous: bool = False
    loras: Loras = msgspec.field(default_factory=list)
    duration: Seconds = 7.0
    fps: Fps = 24
    resolution: Resolution = "1920x1080"

    @property
    def description(self) -> str:
        return _first(self.scene_description, self.prompt)

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
    loras: Loras = msgspec.field(default_factory=list)
    resolution: Resolution = "1024x1024"
    format: ImageFormat = ImageFormat.JPEG

    @property
    def description(self) -> str:
        return _first(self.character_description, self.prompt)

    @property
    def references(self) -> list[str]:
        return list(dict.fromkeys([*self.reference_images, *([self.style_guide] if self.style_guide else [])]))


class AudioParams(Params, frozen=True, kw_only=True):
    """`process_audio`: `text` becomes dialogue; a `prompt` alone becomes sound without speech."""

    text: Annotated[str, Meta(min_length=1, max_length=5000)] | None = None
    language: Annotated[str, Meta(min_length=2, max_length=35)] = "en"
    character_voice_profile: Reference | None = None
    character_voice_text: Annotated[str, Meta(max_length=2000)] | None = None
    emotion: Word | None = None
    pace: Word | None = None
    background_noise: Word | None = None
    duration: Annotated[float, Meta(ge=0.5, le=60)] = 5.0
    output_format: AudioFormat = AudioFormat.MP3
    sample_rate: Literal[8000, 16000, 22050, 24000, 44100, 48000] = 44100

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
    loras: Loras = msgspec.field(default_factory=list)
    duration: Seconds = 3.0
    fps: Fps = 24
    resolution: Resolution = "1280x720"
    loop: bool = False

    @property
    def description(self) -> str:
        return _first(self.character_description, self.prompt)

    @property
    def references(self) -> list[str]:
        return list(dict.fromkeys(self.reference_images))


def checked(cls: type[Params], task_data: dict[str, Any], found: Faults) -> Params | None:
    """Return the parameters, and add their faults to `found`.

    Wrong fields are left out of the parameters, also those in which faults were found before. Return None if the rest is not enough.
    """
    sent = {key: value for key, value in task_data.items() if value is not None}
    try:
        params = msgspec.convert(_without(sent, _fields(found)), cls)
    except msgspec.ValidationError as error:
        if not found.add(faults.of_struct(cls, sent, "task_data")):  # it is wrong as a whole, by a rule of a plug-in
            found.add([("task_data", str(error))])
        try:
            params = msgspec.convert(_without(sent, _fields(found)), cls)
        except msgspec.ValidationError:
            return None
    found.add(_inconsistent(params, _fields(found)))
    return params


def _without(sent: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    return {key: value for key, value in sent.items() if key not in fields} if fields else sent


def _fields(found: Iterable[Fault]) -> set[str]:
    """Return the fields of task_data in which there are faults."""
    return {name[1] for path, _ in found if (name := re.match(r"task_data\.([^.[]+)", path))}


def unknown(cls: type[Params], task_data: dict[str, Any]) -> list[str]:
    """Return the keys of `task_data` that are not fields of the task type."""
    return sorted(task_data.keys() - set(cls.__struct_fields__))


def convert(cls: type[Params], task_data: dict[str, Any]) -> Params:
    """Return the parameters of `task_data` that `checked` has accepted before; null means absent."""
    return msgspec.convert({key: value for key, value in task_data.items() if value is not None}, cls)


def size(resolution: str) -> tuple[int, int]:
    """Return width and height in pixels of a resolution such as "1920x1080"."""
    width, height = resolution.split("x")
    return int(width), int(height)


@lru_cache(maxsize=256)
def frame_rate(fps: float | str) -> Fraction:
    """Return the exact frames per second for 24, "24000/1001", or 23.976 and "23.976", which stand for 24000/1001."""
    if isinstance(fps, str) and "/" in fps:
        return Fraction(fps)
    number = float(fps)
    for whole in (24, 30, 48, 60):
        if abs(number - whole * 1000 / 1001) < NTSC_TOLERANCE:
            return Fraction(whole * 1000, 1001)
    return Fraction(number).limit_denominator(1001)


def spoken_language(tag: str) -> tuple[str, str]:
    """Return the language that a BCP 47 tag means and the rest of the tag, in lower case: "zh-yue-HK" is ("yue", "hk")."""
    primary, *rest = tag.lower().replace("_", "-").split("-")
    if primary == "zh" and rest and re.fullmatch("[a-z]{3}", rest[0]):  # a language of its own, by its extended subtag
        primary = rest.pop(0)
    return _MEANT.get(primary, primary), "-".join(rest)


def frames(params: VideoParams | AnimationParams) -> int:
    """Return the number of frames of the clip."""
    return _frames(params.duration, params.fps)


@lru_cache(maxsize=256)
def _frames(duration: float, fps: float | str) -> int:
    return max(1, round(Fraction(duration) * frame_rate(fps)))


def _inconsistent(params: Params, wrong: set[str]) -> Iterator[Fault]:
    """Yield the faults of fields that msgspec accepts. `wrong` are fields with other faults, which are not in `params`."""
    if not params.description.strip() and (isinstance(params, AudioParams) or not params.references):
        names = ["text", "prompt"] if isinstance(params, AudioParams) else [name for name in _DESCRIBING if hasattr(params, name)]
        if wrong.isdisjoint(names):
            yield f"task_data.{names[0]}", f"one of {', '.join(names)} is needed"
    for name, text in _texts(params):
        if "\0" in text:
            yield f"task_data.{name}", f"expected text without NUL characters, got {given(text)}"
    if isinstance(params, AudioParams):
        if spoken_language(params.language)[0] not in LANGUAGES:
            known = f"one of {', '.join(sorted(LANGUAGES))}, also with a region (en-gb)"
            yield "task_data.language", f"expected {known}, got {given(params.language)}"
        if params.text is not None and not params.text.strip() and params.description.strip():
            yield "task_data.text", f"expected at least one visible character, got {given(params.text)}"
    if isinstance(params, VideoParams | ImageParams | AnimationParams):
        yield from _sizes(params, wrong)


def _texts(params: Params) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every text in the parameters, also of those in lists."""
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}[{index}]", each) for index, each in enumerate(value) if isinstance(each, str))


def _sizes(params: VideoParams | ImageParams | AnimationParams, wrong: set[str]) -> Iterator[Fault]:
    width, height = size(params.resolution)
    fits = all(64 <= side <= 3840 and side % 2 == 0 for side in (width, height))
    if not fits:
        yield "task_data.resolution", f"expected {SIZES}, got {given(params.resolution)}"
    if isinstance(params, ImageParams):
        return
    try:
        rate = frame_rate(params.fps)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 1 <= rate <= 60:
        yield "task_data.fps", f"expected {faults.allowed(Fps)}, got {given(params.fps)}"
    elif fits and wrong.isdisjoint(("resolution", "fps", "duration")) and (pixels := width * height * frames(params)) > MAX_PIXELS:
        yield (
            "task_data.resolution",
            f"width x height x frames may be at most {MAX_PIXELS}, and is {pixels}: ask for a smaller resolution, duration or fps",
        )
