"""Adapters: what differs between families of pipelines in code. What differs as data stands in the model's entry.

An entry names its adapter. A plug-in adds one by a subclass of `Adapter`, and its models get all that works on adapters: placement, the OOM
fallback, cancel, previews, windows.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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

    overlap: ClassVar[int] = 1
    """Frames that a window shares with the one that it continues. More than one carry the motion on, if the model can follow a clip."""

    def __init__(self, entry: Model) -> None:
        self.entry = entry

    shows_references: ClassVar[bool] = False
    """Whether a clip can show what images show, without having them as frames."""

    def processors(self, folder: Path) -> dict[str, Any]:
        """Return components without weights that the pipeline cannot load from `folder` by itself, by name."""
        return {}

    def conditions(self, pipe: Any, at: dict[int, Image.Image], before: list[Image.Image], frames: int) -> dict[str, Any]:
        """Return the arguments for the images of a window of `frames` frames; `at` maps frames of it to images.

        `before` are the last pictures of the window that it continues, `overlap` of them or one, if it continues one. Then they, else an
        image, are at its first frame.
        """
        first = before[-1] if before else at[0]
        if self.entry.images is Images.ENDS and frames - 1 in at and frames > 1:
            return {"image": first, "last_image": at[frames - 1]}
        return {"image": first}

    def references(self, images: list[Image.Image]) -> dict[str, Any]:
        """Return the arguments that let a clip show what the images show, where `shows_references`."""
        raise NotImplementedError

    def rendered(self, pipe: Any, answer: tuple[Any, ...]) -> Rendered:
        """Return the clip in the answer of a call with the output type "pt"."""
        return Rendered(answer[0][0])


class QwenEdit(Adapter):
    """Qwen-Image-Edit: pictures of what other pictures show."""

    def processors(self, folder: Path) -> dict[str, Any]:
        """Return its processor, without the part for videos, which would need torchvision."""
        from transformers import AutoTokenizer, Qwen2VLProcessor
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        class Pictures(Qwen2VLProcessor):
            def __init__(self, image_processor: Any, tokenizer: Any) -> None:
                super().__init__(image_processor, tokenizer)  # type: ignore[no-untyped-call]

        own = folder / "processor"
        tokenizer = AutoTokenizer.from_pretrained(own, local_files_only=True)
        return {"processor": Pictures(Qwen2VLImageProcessorPil.from_pretrained(own, local_files_only=True), tokenizer)}


class Ltx(Adapter):
    """LTX-Video: images at any frame. Its arguments `image` and `frame_index` would use the first image alone."""

    overlap = 9

    def conditions(self, pipe: Any, at: dict[int, Image.Image], before: list[Image.Image], frames: int) -> dict[str, Any]:
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

        clip = [LTXVideoCondition(video=before, frame_index=0)] if before else []
        return {"conditions": clip + [LTXVideoCondition(image=still, frame_index=frame) for frame, still in at.items()]}


class Ltx2(Adapter):
    """LTX-2: images at any frame, and sound with the picture."""

    overlap = 9

    def conditions(self, pipe: Any, at: dict[int, Image.Image], before: list[Image.Image], frames: int) -> dict[str, Any]:
        from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

        step = pipe.vae_temporal_compression_ratio
        last = (frames - 1) // step  # it counts latent frames: the first is one frame of the clip, each other one stands for `step`
        clip = [LTX2VideoCondition(frames=before, index=0)] if before else []
        return {
            "conditions": clip
            + [LTX2VideoCondition(frames=still, index=min(frame // step + 1, last) if frame else 0) for frame, still in at.items()]
        }

    def rendered(self, pipe: Any, answer: tuple[Any, ...]) -> Rendered:
        return Rendered(answer[0][0], answer[1][0].float(), int(pipe.vocoder.config.output_sampling_rate))


class Vace(Adapter):
    """Wan VACE: images at any frame, as a clip with a mask for what is to be rendered, and references."""

    overlap = 13
    shows_references = True

    def conditions(self, pipe: Any, at: dict[int, Image.Image], before: list[Image.Image], frames: int) -> dict[str, Any]:
        known = dict(enumerate(before)) | at
        size = next(iter(known.values())).size
        empty, keep, render = Image.new("RGB", size, "#808080"), Image.new("L", size, 0), Image.new("L", size, 255)
        numbers = range(frames)
        return {
            "video": [known.get(number, empty) for number in numbers],
            "mask": [keep if number in known else render for number in numbers],
        }

    def references(self, images: list[Image.Image]) -> dict[str, Any]:
        return {"reference_images": images}


def adapter(entry: Model) -> Adapter:
    """Return the adapter of an entry. Raises ModelUnavailable if the worker has none of that name."""
    try:
        module, _, name = REGISTRY.adapters[entry.adapter].partition(":")
    except KeyError:
        raise ModelUnavailable(f"this worker has no adapter {entry.adapter!r}; it has {', '.join(REGISTRY.adapters)}") from None
    found: Adapter = getattr(importlib.import_module(module), name)(entry)
    return found
