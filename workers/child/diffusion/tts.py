"""Text to speech by models of transformers, sentence by sentence.

So a run can stop between two sentences, and memory does not grow with the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from movieq.errors import InvalidInput
from movieq.tasks.params import AudioParams
from workers.child.diffusion.hooks import PipelineHooks
from workers.child.diffusion.loaded import Loaded
from workers.child.job import Job
from workers.child.media import encode
from workers.child.media.encode import Samples

LUFS: Final = -16.0
"""Loudness of speech."""
VOICE_SAMPLE_S: Final = 20.0
"""How much of a voice sample is used."""
FRAME_S: Final = 0.08
"""Length of an audio frame: 12.5 a second in all models that generate frame by frame."""
MIN_CHARACTERS_PER_S: Final = 8
"""The slowest voice; a sentence may take as long as this, plus two seconds."""
PAUSE_S: Final = 0.25
"""Silence between two sentences."""
MAX_CHARACTERS: Final = 400
"""The longest text that is synthesized in one call."""


def warn(job: Job, params: AudioParams) -> None:
    """Warn about the parameters that speech models ignore."""
    for name in ("emotion", "pace", "background_noise"):
        if getattr(params, name):
            job.warn(f"{name} is not used: {job.run.model} reads the text alone")
    if params.character_voice_text and not params.character_voice_profile:
        job.warn("character_voice_text is not used: there is no character_voice_profile with its words")


def synthesize(job: Job, loaded: Loaded, params: AudioParams) -> tuple[Samples, int]:
    """Return the spoken text as mono samples (n, 1), and their rate. Raises InvalidInput if nothing of the text can be spoken."""
    assert params.text is not None
    rate = int(loaded.tokenizer.feature_extractor.sampling_rate if loaded.entry.voices else loaded.pipe.config.sampling_rate)
    pause = np.zeros(round(PAUSE_S * rate), np.float32)
    spoken: list[Samples] = []
    pieces = list(sentences(params.text))
    voice = _ClonedVoice(job, loaded, params, rate, len(pieces)) if loaded.entry.voices else _SinglePassVoice(job, loaded)
    with PipelineHooks(job, loaded.pipe) as hooks, torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(job.seed)  # these models accept no generator
        for number, piece in enumerate(pieces, 1):
            if (samples := voice.synthesize(piece)) is not None:
                spoken += [samples, pause]
            job.step("denoise", number, len(pieces))
    loaded.stage_seconds |= hooks.stage_seconds
    if not spoken:
        raise InvalidInput(f"task_data.text: {job.run.model} knows none of its letters")
    return np.concatenate(spoken[:-1])[:, None], rate


class _SinglePassVoice:
    """A model with one voice that synthesizes a sentence in one forward pass (VITS)."""

    def __init__(self, job: Job, loaded: Loaded) -> None:
        self._device = job.device
        self._loaded = loaded

    def synthesize(self, piece: str) -> Samples | None:
        tokens: Any = self._loaded.tokenizer(piece, return_tensors="pt").to(self._device)
        if not tokens["input_ids"].shape[-1]:
            return None
        samples: Samples = self._loaded.pipe(**tokens).waveform[0].float().cpu().numpy()
        return samples


class _ClonedVoice:
    """A model that continues in the voice of its context (CSM): the voice sample, else its own first sentence."""

    def __init__(self, job: Job, loaded: Loaded, params: AudioParams, rate: int, sentences: int) -> None:
        self._job = job
        self._loaded = loaded
        self._rate = rate
        self._sentences_done, self._sentences = 0, sentences
        self._reference: tuple[str, Samples] | None = None
        if voice := params.character_voice_profile:
            sample, truncated = encode.read_sound(voice, job.input(voice), rate, VOICE_SAMPLE_S)
            self._reference = params.character_voice_text or "", sample
            if truncated:
                rest = ": character_voice_text should have the words of these alone" if params.character_voice_text else ""
                job.warnings.append(f"of character_voice_profile the first {VOICE_SAMPLE_S:g} s are used{rest}")

    def synthesize(self, piece: str) -> Samples | None:
        turns = [_turn(piece)] if self._reference is None else [_turn(*self._reference), _turn(piece)]
        inputs = self._loaded.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
        model = self._loaded.pipe
        frames = round((len(piece) / MIN_CHARACTERS_PER_S + 2) / FRAME_S)
        counter = _FrameCounter(self._job, self._sentences_done, self._sentences, frames)
        (audio,) = model.generate(**inputs.to(model.device, model.dtype), output_audio=True, max_new_tokens=frames, streamer=counter)
        self._sentences_done += 1
        if counter.frames >= frames:
            self._job.warnings.append(f"the model did not come to an end within {frames * FRAME_S:.0f} s: {piece[:60]!r} may be cut off")
        samples: Samples = audio.float().cpu().numpy()
        self._reference = self._reference or (piece, samples[: round(VOICE_SAMPLE_S * self._rate)])
        return samples if len(samples) else None


def _turn(text: str, sound: Samples | None = None) -> dict[str, Any]:
    """Return a turn of a conversation in the format of transformers' chat templates."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    return {"role": "0", "content": content if sound is None else [*content, {"type": "audio", "audio": sound}]}


class _FrameCounter:
    """Counts audio frames as they are generated and reports progress; a streamer for transformers' `generate`."""

    def __init__(self, job: Job, sentences_done: int, sentences: int, max_frames: int) -> None:
        self.frames = -1  # the first call of `put` brings the prompt
        self._job = job
        self._sentences_done, self._sentences, self._max_frames = sentences_done, sentences, max_frames

    def put(self, value: Any) -> None:
        self.frames += 1
        step = self._sentences_done * self._max_frames + min(max(self.frames, 0), self._max_frames - 1)
        self._job.step("denoise", step, self._sentences * self._max_frames)

    def end(self) -> None:
        pass


def sentences(text: str) -> Iterator[str]:
    """Yield the text in pieces short enough for one call: sentences, long ones cut at a comma or a space."""
    for sentence in re.split(r"(?<=[.!?\u3002])\s+|\n+", text.strip()):
        rest = sentence.strip()
        while len(rest) > MAX_CHARACTERS:
            cut = max(rest.rfind(", ", 0, MAX_CHARACTERS) + 1, rest.rfind(" ", 0, MAX_CHARACTERS), 1)
            yield rest[:cut].strip()
            rest = rest[cut:].strip()
        if re.search(r"\w", rest):
            yield rest
