"""Text to speech by models of transformers, sentence by sentence.

So a run can stop between two sentences, memory does not grow with the text, and a sentence for which it runs out is repeated alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
import torch

from movieq.errors import InvalidInput
from movieq.tasks.params import AudioParams
from workers.child.diffusion.adapters import VOICE_SAMPLE_S, Speech, Voice, VoiceSample
from workers.child.diffusion.session import Session
from workers.child.job import Job
from workers.child.media import encode
from workers.child.media.encode import Samples

LUFS: Final = -16.0
"""Loudness of speech."""
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


def synthesize(model: Session, params: AudioParams) -> tuple[Samples, int]:
    """Return the spoken text as mono samples (n, 1), and their rate. Raises InvalidInput if nothing of the text can be spoken."""
    assert params.text is not None
    assert isinstance(model.adapter, Speech)
    job, components = model.job, model.pipe().components
    rate = model.adapter.rate(components)
    voice = model.adapter.voice(job, components, _sample(job, params, rate))
    pause = np.zeros(round(PAUSE_S * rate), np.float32)
    spoken: list[Samples] = []
    pieces = list(sentences(params.text))
    for number, piece in enumerate(pieces):
        part = number, len(pieces)
        if (samples := model.run(partial(_spoken, job, voice, piece, part), part)) is not None:
            spoken += [samples, pause]
        job.step("denoise", number + 1, len(pieces))
    if not spoken:
        raise InvalidInput(f"task_data.text: {job.run.model} knows none of its letters")
    return np.concatenate(spoken[:-1])[:, None], rate


def _sample(job: Job, params: AudioParams, rate: int) -> VoiceSample | None:
    """Return the beginning of the task's voice sample; None if it has none."""
    if not (profile := params.character_voice_profile):
        return None
    samples, truncated = encode.read_sound(profile, job.input(profile), rate, VOICE_SAMPLE_S)
    if truncated:
        rest = ": character_voice_text should have the words of these alone" if params.character_voice_text else ""
        job.warnings.append(f"of character_voice_profile the first {VOICE_SAMPLE_S:g} s are used{rest}")
    return VoiceSample(samples, params.character_voice_text or "")


def _spoken(job: Job, voice: Voice, piece: str, part: tuple[int, int]) -> Samples | None:
    """Return one of the text's pieces as samples, the same ones whenever it is tried again."""
    number, of = part

    def progress(share: float) -> None:
        job.step("denoise", number * 100 + min(int(share * 100), 99), of * 100)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(job.seed + number)  # these models accept no generator
        return voice.synthesize(piece, progress)


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
