"""Lines spoken by models of transformers, sentence by sentence: a run can stop between two, and memory does not grow with the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from movieq.errors import InvalidInput, UnsupportedParameter
from movieq.models.table import Model
from movieq.tasks.params import AudioParams
from workers.child.diffusion.hooks import Watch
from workers.child.diffusion.loaded import Loaded
from workers.child.job import Take
from workers.child.media import encode
from workers.child.media.encode import Samples

LUFS: Final = -16.0
SAMPLE_S: Final = 20.0
"""Of a voice sample that a model hears."""
FRAME_S: Final = 0.08
"""What a model that speaks frame by frame adds at a time: 12.5 a second, as all codecs of that kind have it."""
SLOWEST: Final = 8
"""Characters a second of the slowest voice: what a sentence may take, and two seconds more."""
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
    rate = int(loaded.tokenizer.feature_extractor.sampling_rate if loaded.entry.voices else loaded.pipe.config.sampling_rate)
    pause = np.zeros(round(PAUSE_S * rate), np.float32)
    spoken: list[Samples] = []
    pieces = list(sentences(params.text))
    say = _Voice(take, loaded, params, rate, len(pieces)).say if loaded.entry.voices else _Letters(take, loaded).say
    with Watch(take, loaded.pipe) as watch, torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(take.seed)  # these models take no generator
        for number, piece in enumerate(pieces, 1):
            if (samples := say(piece)) is not None:
                spoken += [samples, pause]
            take.step("denoise", number, len(pieces))
    loaded.seconds |= watch.seconds
    if not spoken:
        raise InvalidInput(f"task_data.text: {take.run.model} knows none of its letters")
    return np.concatenate(spoken[:-1])[:, None], rate


class _Letters:
    """A model with one voice, which makes a sentence in one pass (VITS)."""

    def __init__(self, take: Take, loaded: Loaded) -> None:
        self._device = take.device
        self._loaded = loaded

    def say(self, piece: str) -> Samples | None:
        found: Any = self._loaded.tokenizer(piece, return_tensors="pt").to(self._device)
        if not found["input_ids"].shape[-1]:
            return None
        samples: Samples = self._loaded.pipe(**found).waveform[0].float().cpu().numpy()
        return samples


class _Voice:
    """A model that goes on in the voice that it has heard (CSM): that of the sample, else that of its own first sentence."""

    def __init__(self, take: Take, loaded: Loaded, params: AudioParams, rate: int, pieces: int) -> None:
        self._take = take
        self._loaded = loaded
        self._rate = rate
        self._said, self._pieces = 0, pieces
        self._heard: tuple[str, Samples] | None = None
        if voice := params.character_voice_profile:
            sample, more = encode.read_sound(voice, take.input(voice), rate, SAMPLE_S)
            self._heard = "", sample
            if more:
                take.warnings.append(f"of character_voice_profile the first {SAMPLE_S:g} s are used")

    def say(self, piece: str) -> Samples | None:
        turns = [_turn(piece)] if self._heard is None else [_turn(*self._heard), _turn(piece)]
        given = self._loaded.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
        model = self._loaded.pipe
        frames = round((len(piece) / SLOWEST + 2) / FRAME_S)
        counted = _Counted(self._take, self._said, self._pieces, frames)
        (found,) = model.generate(**given.to(model.device, model.dtype), output_audio=True, max_new_tokens=frames, streamer=counted)
        self._said += 1
        if counted.frames >= frames:
            self._take.warnings.append(f"the model did not come to an end within {frames * FRAME_S:.0f} s: {piece[:60]!r} may be cut off")
        samples: Samples = found.float().cpu().numpy()
        self._heard = self._heard or (piece, samples[: round(SAMPLE_S * self._rate)])
        return samples if len(samples) else None


def _turn(text: str, sound: Samples | None = None) -> dict[str, Any]:
    """A turn of a conversation, in the words of transformers' chat templates."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    return {"role": "0", "content": content if sound is None else [*content, {"type": "audio", "audio": sound}]}


class _Counted:
    """Hears each frame as it is made, as a streamer of transformers."""

    def __init__(self, take: Take, said: int, pieces: int, most: int) -> None:
        self.frames = -1  # the prompt comes first
        self._take = take
        self._said, self._pieces, self._most = said, pieces, most

    def put(self, value: Any) -> None:
        self.frames += 1
        self._take.step("denoise", self._said * self._most + min(max(self.frames, 0), self._most - 1), self._pieces * self._most)

    def end(self) -> None:
        pass


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
