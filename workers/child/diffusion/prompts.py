"""The prompt of a model: the fields of a task as one text.

The description comes first, since text encoders cut off at the end; then one short sentence for each field, always in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from movieq.tasks.params import AnimationParams, AudioParams, ImageParams, Params, VideoParams


def prompt(params: Params, *, with_sound: bool = False) -> str:
    """Return the prompt: "A lamp is lit. Camera: dolly in. Lighting: moonlight."; for sound, the description alone.

    `with_sound`: the model makes the sound of a clip too, and gets the cues.
    """
    parts = [*_parts(params)]
    if with_sound and isinstance(params, VideoParams):
        parts.append(_named("Sound", "; ".join(params.audio_cues)))
    return " ".join(_sentence(text) for text in parts if text.strip())


def _parts(params: Params) -> Iterator[str]:
    yield params.description
    match params:
        case VideoParams():
            yield _named("Camera", params.camera_angle)
            yield _named("Lighting", params.lighting)
            yield _named("In the picture", "; ".join(_position(each) for each in params.character_positions))
        case ImageParams():
            yield _named("Pose", params.pose)
            yield _named("Lighting", params.lighting)
        case AnimationParams():
            yield _named("Motion", params.motion)
        case AudioParams():
            pass


def _named(name: str, text: str | None) -> str:
    return f"{name}: {text}" if text and text.strip() else ""


def _position(position: str | dict[str, Any]) -> str:
    """Return "the keeper, left" for {"name": "the keeper", "position": "left"}: the texts and numbers, in their order."""
    if isinstance(position, str):
        return position
    return ", ".join(str(value) for value in position.values() if isinstance(value, str | int | float) and str(value).strip())


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?", "\u3002")) else f"{text}."
