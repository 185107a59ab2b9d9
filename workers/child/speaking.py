"""Lines spoken by models of transformers, sentence by sentence: a run can stop between two, and memory does not grow with the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from movieq.errors import InvalidInput, UnsupportedParameter
from movieq.models import Model
from movieq.params import AudioParams
from workers.child.media import Samples
from workers.child.shelf import Loaded
from workers.child.take import Take
from workers.child.watch import Watch

LUFS: Final = -16.0
PAUSE_S: Final = 0.25
"""Between two sentences."""
MOST: Final = 400
"""Characters that are spoken at once."""


def check(take: Take, entry: Model, params: AudioParams) -> None:
    """Raises UnsupportedParameter for what this model cannot do, before it is loaded."""
    primary = params.language.lower().replace("_", "-").partition("-")[0]
    if primary not in entry.languages:
        raise UnsupportedParameter(f"task_data.language: {take.run.model} speaks {', '.join(entry.languages)}, got {params.language!r}")
    if params.character_voice_profile and not entry.voices:
        raise UnsupportedParameter(
            f"task_data.character_voice_profile: {take.run.model} has a voice of its own and cannot take on that of a sample; "
            "leave it out, or ask for a model that can (`movieq models list` shows which)"
        )
    take.warnings += [
        f"{name} is not used: {take.run.model} reads the text alone"
        for name in ("emotion", "pace", "background_noise")
        if getattr(params, name)
    ]


def speak(take: Take, loaded: Loaded, params: AudioParams) -> tuple[Samples, int]:
    """The text as mono samples and their rate. Raises InvalidInput where there is nothing that can be spoken."""
    assert params.text is not None
    model, tokenizer = loaded.pipe, loaded.tokenizer
    rate = int(model.config.sampling_rate)
    pause = np.zeros(round(PAUSE_S * rate), np.float32)
    spoken: list[Samples] = []
    pieces = list(sentences(params.text))
    with Watch(take, model) as watch, torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(take.seed)  # these models take no generator
        for number, piece in enumerate(pieces, 1):
            found: Any = tokenizer(piece, return_tensors="pt").to(take.device)
            if found["input_ids"].shape[-1]:
                samples = model(**found).waveform[0].float().cpu().numpy()
                spoken += [samples, pause]
            take.step("denoise", number, len(pieces))
    loaded.seconds |= watch.seconds
    if not spoken:
        raise InvalidInput(f"task_data.text: {take.run.model} knows none of its letters")
    return np.concatenate(spoken[:-1])[:, None], rate


def sentences(text: str) -> Iterator[str]:
    """The text in pieces that a model can speak at once: sentences, and long ones cut at a comma or a space."""
    for sentence in re.split(r"(?<=[.!?\u3002])\s+|\n+", text.strip()):
        rest = sentence.strip()
        while len(rest) > MOST:
            cut = max(rest.rfind(", ", 0, MOST) + 1, rest.rfind(" ", 0, MOST), 1)
            yield rest[:cut].strip()
            rest = rest[cut:].strip()
        if re.search(r"\w", rest):
            yield rest
