"""Adapters: what differs between families of pipelines in code. What differs as data stands in the model's entry.

An entry names its adapter. A plug-in adds one by a subclass of `Adapter`, and its models get all that works on adapters: placement, the OOM
fallback, cancel, previews, windows.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from movieq.errors import ModelUnavailable
from movieq.models.table import Images, Model
from movieq.tasks.registry import REGISTRY


class Rendered(NamedTuple):
    """What one call for a clip rendered."""

    pictures: Tensor
    """(n, 3, height, width), 0 to 1."""
    sound: Tensor | None = None
    """(channels, n), -1 to 1."""
    rate: int = 0
    """Samples of the sound a second."""


class Adapter:
    """Pipelines of diffusers with the usual arguments and answers."""

    def __init__(self, entry: Model) -> None:
        self.entry = entry

    def conditions(self, pipe: Any, at: dict[int, Image.Image], frames: int) -> dict[str, Any]:
        """Return the arguments for the images of a clip; `at` maps frames of its `frames` to images, and has at least one."""
        if self.entry.images is Images.ENDS and frames - 1 in at and len(at) > 1:
            return {"image": at[0], "last_image": at[frames - 1]}
        return {"image": at[0]}

    def rendered(self, pipe: Any, answer: tuple[Any, ...]) -> Rendered:
        """Return the clip in the answer of a call with the output type "pt"."""
        return Rendered(answer[0][0])


class Ltx(Adapter):
    """LTX-Video: images at any frame. Its arguments `image` and `frame_index` would use the first image alone."""

    def conditions(self, pipe: Any, at: dict[int, Image.Image], frames: int) -> dict[str, Any]:
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

        return {"conditions": [LTXVideoCondition(image=still, frame_index=frame) for frame, still in at.items()]}


class Ltx2(Adapter):
    """LTX-2: images at any frame, and sound with the picture."""

    def conditions(self, pipe: Any, at: dict[int, Image.Image], frames: int) -> dict[str, Any]:
        from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

        step = pipe.vae_temporal_compression_ratio  # it counts latent frames, and the first of them is one frame of the clip
        return {"conditions": [LTX2VideoCondition(frames=still, index=-(-frame // step)) for frame, still in at.items()]}

    def rendered(self, pipe: Any, answer: tuple[Any, ...]) -> Rendered:
        return Rendered(answer[0][0], answer[1][0].float(), int(pipe.vocoder.config.output_sampling_rate))


def adapter(entry: Model) -> Adapter:
    """Return the adapter of an entry. Raises ModelUnavailable if the worker has none of that name."""
    try:
        module, _, name = REGISTRY.adapters[entry.adapter].partition(":")
    except KeyError:
        raise ModelUnavailable(f"this worker has no adapter {entry.adapter!r}; it has {', '.join(REGISTRY.adapters)}") from None
    found: Adapter = getattr(importlib.import_module(module), name)(entry)
    return found
