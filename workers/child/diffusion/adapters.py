"""Adapters: what differs between families of models in code. What differs as data stands in the model's entry.

An entry names its adapter. A plug-in adds one by a subclass of `Adapter`, or of `Speech` for speech, and its models get all that works on
adapters: placement, the OOM fallback, progress, cancel, previews, windows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from PIL import Image
from torch import Tensor

from movieq.errors import ModelUnavailable
from movieq.models.table import Images, Model, speech_problem
from movieq.tasks.registry import REGISTRY
from workers.child.job import Job
from workers.child.media.encode import Samples


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

    stages: ClassVar[tuple[str, ...]] = ("encode", "denoise", "decode")
    """What its networks do in a run, in order."""
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


VOICE_SAMPLE_S: Final = 20.0
"""How much of a voice sample is used."""
NETWORK: Final = "transformer"
"""The name of the network that the `pipeline` of a speech model's entry is."""


class VoiceSample(NamedTuple):
    """A voice to imitate: mono samples at the model's rate, and the words in them, if they are known."""

    samples: Samples
    text: str = ""


class Voice(Protocol):
    """The voice of one run."""

    def synthesize(self, piece: str, progress: Callable[[float], None]) -> Samples | None:
        """Return a sentence, or a part of a long one, as mono samples; None if the model knows none of its letters.

        `progress` takes the share that is done, for models that take long. If memory runs out, the same piece comes again.
        """


class Speech(Adapter):
    """Models of transformers that speak, without a model_index.json: their components are the network `NETWORK` and those of the entry."""

    stages = ("denoise",)

    def processors(self, folder: Path) -> dict[str, Any]:
        """Return its processor, or its tokenizer if it has no processor, as "processor"."""
        from transformers import AutoProcessor

        return {"processor": AutoProcessor.from_pretrained(folder, local_files_only=True)}  # type: ignore[no-untyped-call]

    def rate(self, components: dict[str, Any]) -> int:
        """Return how many samples of its sound a second has."""
        return int(components["processor"].feature_extractor.sampling_rate)

    def voice(self, job: Job, components: dict[str, Any], sample: VoiceSample | None) -> Voice:
        """Return the voice for a run. A `sample` is given only if the entry has `voices`."""
        raise NotImplementedError


class Vits(Speech):
    """VITS, as MMS-TTS: one voice, which synthesizes a sentence in one forward pass."""

    def rate(self, components: dict[str, Any]) -> int:
        return int(components[NETWORK].config.sampling_rate)

    def voice(self, job: Job, components: dict[str, Any], sample: VoiceSample | None) -> Voice:
        if sample is not None:
            raise ModelUnavailable("voices: a model of VITS cannot imitate a voice; take it out of the entry")
        return _VitsVoice(job.device, components)


class _VitsVoice:
    def __init__(self, device: str, components: dict[str, Any]) -> None:
        self._device = device
        self._tokenizer, self._network = components["processor"], components[NETWORK]

    def synthesize(self, piece: str, progress: Callable[[float], None]) -> Samples | None:
        tokens = self._tokenizer(piece, return_tensors="pt").to(self._device)
        if not tokens["input_ids"].shape[-1]:
            return None
        samples: Samples = self._network(**tokens).waveform[0].float().cpu().numpy()
        return samples


class Csm(Speech):
    """CSM: goes on in the voice of its context, which is the voice sample, else its own first sentence."""

    def voice(self, job: Job, components: dict[str, Any], sample: VoiceSample | None) -> Voice:
        return _CsmVoice(job, components, sample, round(VOICE_SAMPLE_S * self.rate(components)))


class _CsmVoice:
    FRAME_S = 0.08
    """Length of an audio frame: 12.5 a second."""
    MIN_CHARACTERS_PER_S = 8
    """The slowest voice; a sentence may take as long as this, plus two seconds."""

    def __init__(self, job: Job, components: dict[str, Any], sample: VoiceSample | None, most_samples: int) -> None:
        self._job = job
        self._processor, self._network = components["processor"], components[NETWORK]
        self._context = sample
        self._most_samples = most_samples

    def synthesize(self, piece: str, progress: Callable[[float], None]) -> Samples | None:
        turns = [] if self._context is None else [_turn(self._context.text, self._context.samples)]
        inputs = self._processor.apply_chat_template([*turns, _turn(piece)], tokenize=True, return_dict=True)
        inputs = inputs.to(self._job.device, self._network.dtype)
        frames = round((len(piece) / self.MIN_CHARACTERS_PER_S + 2) / self.FRAME_S)
        counter = FrameCounter(frames, progress)
        (audio,) = self._network.generate(**inputs, output_audio=True, max_new_tokens=frames, streamer=counter)
        if counter.frames >= frames:
            self._job.warnings.append(
                f"the model did not come to an end within {frames * self.FRAME_S:.0f} s: {piece[:60]!r} may be cut off"
            )
        samples: Samples = audio.float().cpu().numpy()
        self._context = self._context or VoiceSample(samples[: self._most_samples], piece)
        return samples if len(samples) else None


def _turn(text: str, sound: Samples | None = None) -> dict[str, Any]:
    """Return a turn of a conversation in the format of transformers' chat templates."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    return {"role": "0", "content": content if sound is None else [*content, {"type": "audio", "audio": sound}]}


class FrameCounter:
    """Counts audio frames as they are generated and reports the share of the most that there may be; a streamer for `generate`."""

    def __init__(self, most_frames: int, progress: Callable[[float], None]) -> None:
        self.frames = -1  # the first call of `put` brings the prompt
        self._most_frames = most_frames
        self._progress = progress

    def put(self, value: Any) -> None:
        self.frames += 1
        self._progress(self.frames / self._most_frames)

    def end(self) -> None:
        pass


def adapter(entry: Model) -> Adapter:
    """Return the adapter of an entry. Raises ModelUnavailable if the worker has none of that name, or if it does not fit the entry."""
    if entry.adapter not in REGISTRY.adapters:
        raise ModelUnavailable(f"this worker has no adapter {entry.adapter!r}; it has {', '.join(REGISTRY.adapters)}")
    module, _, name = REGISTRY.adapters[entry.adapter].partition(":")
    try:
        found: Adapter = getattr(importlib.import_module(module), name)(entry)
    except (ImportError, AttributeError) as error:
        raise ModelUnavailable(f"the adapter {entry.adapter!r} cannot be imported: {error}") from None
    if problem := speech_problem(entry, speaks=isinstance(found, Speech)):
        raise ModelUnavailable(problem)
    return found
