"""Render sound and speech by a model, and the sound of a clip."""

from __future__ import annotations

import inspect
from typing import Any, Final

import numpy as np

from movieq.errors import ModelUnavailable
from movieq.models import weights
from movieq.models.table import Model
from movieq.tasks.params import AudioParams
from workers.child.diffusion import session, tts
from workers.child.diffusion.session import Session, generator
from workers.child.job import Finish, Job, Output
from workers.child.media import ambience, encode, loudness
from workers.child.media.encode import ClipFormat, Samples
from workers.child.media.metadata import file_tags
from workers.protocol import Produced

SOUND_LUFS: Final = -18.0
"""Loudness of sound that is the whole result."""
BED_LUFS: Final = -24.0
"""Loudness of sound under a picture."""
_SECONDS: Final = ("audio_end_in_s", "audio_length_in_s", "audio_duration")
"""What pipelines call the length of a sound. An entry can name another (`names.seconds`)."""


def render_ambience(job: Job, entry: Model, params: AudioParams) -> Finish:
    """Render sound without speech; return the rest that needs no device."""
    with session.opened(job, entry, "synthesizing_sound", "mux") as model:
        samples, rate = _samples(model, model.arguments(job), params.duration)
        return _finish(job, model, params, samples, rate, SOUND_LUFS)


def render_speech(job: Job, entry: Model, params: AudioParams) -> Finish:
    """Render a line of dialogue; return the rest that needs no device."""
    tts.warn(job, params)
    with session.opened(job, entry, "synthesizing_speech", "mux") as model:
        samples, rate = tts.synthesize(model, params)
        return _finish(job, model, params, samples, rate, tts.LUFS)


def track(job: Job, cues: list[str], clip: ClipFormat) -> Samples:
    """Return the cues' sound as long as the clip, one cue after another: by the run's sound model if it is here, else synthesized.

    A sound model that is here and does not work fails the task: its error is for the operator, and no reason for another sound.
    """
    job.begin("sound")
    length = round(clip.frames * encode.CLIP_SAMPLE_RATE / clip.rate)
    sound = _model_sound(job, cues, clip.seconds / len(cues)) if job.run.sound else None
    if sound is None:
        job.warn("the sound is the animatic's: no model for sound is on this worker's machine")
        scenes = [ambience.named_sounds(cue) or ("room",) for cue in cues]
        sound = ambience.bed(scenes, length, encode.CLIP_SAMPLE_RATE, np.random.default_rng([job.seed, 1]))
    bed = np.zeros((length, 2), np.float32)
    bed[: len(sound)] = sound[:length]
    job.step("sound", 1, 1)
    return loudness.normalize(bed, encode.CLIP_SAMPLE_RATE, BED_LUFS)


def of_clip(sound: Samples, rate: int, clip: ClipFormat) -> Samples:
    """Return the sound that a model made with the picture, (n, channels), as stereo of the clip's length and usual loudness."""
    stereo = encode.resample(np.repeat(sound, 2, axis=1) if sound.shape[1] == 1 else sound[:, :2], rate, encode.CLIP_SAMPLE_RATE)
    found = np.zeros((round(clip.frames * encode.CLIP_SAMPLE_RATE / clip.rate), 2), np.float32)
    found[: len(stereo)] = stereo[: len(found)]
    return loudness.normalize(found, encode.CLIP_SAMPLE_RATE, SOUND_LUFS)


def _model_sound(job: Job, cues: list[str], seconds: float) -> Samples | None:
    """Return `seconds` of stereo sound for each cue by the run's sound model; None if the model's weights were never pulled."""
    assert job.run.sound is not None
    name, entry = job.run.sound
    if not all(weights.begun(each) for each in weights.sources(entry)):
        return None
    parts = []
    with session.on_model(job, name, entry) as model:
        for number, cue in enumerate(cues):
            # the task's own steps and guidance are those of the picture
            arguments = model.defaults() | {"prompt": cue, "generator": generator(job.seed + number)}
            samples, rate = _samples(model, arguments, min(seconds, entry.limits.seconds or seconds))
            stereo = np.repeat(samples, 2, axis=1) if samples.shape[1] == 1 else samples
            parts.append(encode.resample(stereo, rate, encode.CLIP_SAMPLE_RATE))
    return np.concatenate(parts)


def _samples(model: Session, arguments: dict[str, Any], seconds: float) -> tuple[Samples, int]:
    """Return `seconds` of sound by a sound model, (n, channels), and the sample rate."""
    pipe = model.pipe()
    accepted = inspect.signature(pipe.__call__).parameters
    length = model.entry.names.get("seconds") or next((name for name in _SECONDS if name in accepted), None)
    if length is None:
        raise ModelUnavailable(f"the entry of {model.name} does not say how {type(pipe).__name__} calls the length: set names.seconds")
    rendered = model.call(arguments | {length: max(seconds, model.entry.limits.least_seconds), "output_type": "pt"})[0][0]  # (channels, n)
    samples = rendered.float().cpu().numpy().reshape(-1, rendered.shape[-1]).T
    rate = int(getattr(pipe.vae, "sampling_rate", None) or pipe.vocoder.config.sampling_rate)
    return np.ascontiguousarray(samples[: round(seconds * rate), :2], np.float32), rate


def _finish(job: Job, model: Session, params: AudioParams, rendered: Samples, rendered_rate: int, lufs: float) -> Finish:
    """Return the rest of the work on a sound: resampling, setting the loudness, encoding."""
    rate, metadata, tags = params.sample_rate, model.metadata(job, str(params.output_format), None), file_tags(job, "Sound")

    def finish() -> Output:
        job.begin("mux")
        path = job.out_dir / f"output.{params.output_format}"
        samples = loudness.normalize(encode.resample(rendered, rendered_rate, rate), rate, lufs)
        content_type = encode.write_sound(path, samples, rate, params.output_format, tags, lambda done, of: job.step("mux", done, of))
        seconds = len(samples) / rate
        measured = {"duration": round(seconds, 3), "sample_rate": rate, "channels": samples.shape[1]}
        return Output((Produced(str(path), "output", content_type, duration_s=seconds),), metadata | measured)

    return finish
