"""Loudness, compared with FFmpeg's meter, and resampling."""

from __future__ import annotations

from collections.abc import Callable

import av
import numpy as np
import numpy.typing as npt
import pytest

from workers.child.media import ambience, encode, loudness

Samples = npt.NDArray[np.float32]


def ebur128(samples: Samples, rate: int) -> float:
    """Return the integrated loudness as FFmpeg's meter measures it."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="fltp", layout="stereo" if samples.shape[1] == 2 else "mono", time_base=f"1/{rate}")  # type: ignore[arg-type]
    meter = graph.add("ebur128", "metadata=1")
    sink = graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    level = float("nan")
    for frame in [*encode.audio_frames(samples, rate), None]:
        source.push(frame)
        try:
            while True:
                out = sink.pull()
                level = float(out.metadata.get("lavfi.r128.I", level))
        except (av.BlockingIOError, av.EOFError):
            pass
    return level


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_loudness_agrees_with_ffmpegs_meter(rate: int, channels: int) -> None:
    noise = (
        ambience.bed([("sea",)], 6 * rate, rate, np.random.default_rng(1))[:, :channels]
        * np.linspace(0.05, 0.5, 6 * rate, dtype=np.float32)[:, None]
    )
    assert loudness.lufs(noise, rate) == pytest.approx(ebur128(noise, rate), abs=0.3)


def test_a_full_scale_tone_has_the_loudness_that_the_standard_gives() -> None:
    tone = np.sin(2 * np.pi * 997 * np.arange(5 * 48000) / 48000).astype(np.float32)[:, None]
    assert loudness.lufs(tone, 48000) == pytest.approx(-3.01, abs=0.05)


def test_normalized_sound_has_the_target_loudness_on_ffmpegs_meter() -> None:
    noise = np.random.default_rng(1).normal(0, 0.05, (3 * 22050, 2)).astype(np.float32)
    assert ebur128(loudness.normalize(noise, 22050, -16), 22050) == pytest.approx(-16, abs=0.5)


def test_silence_has_no_loudness_and_stays_silent() -> None:
    silence = np.zeros((48000, 2), np.float32)
    assert loudness.lufs(silence, 48000) == float("-inf")
    assert not loudness.normalize(silence, 48000, -16).any()


def test_no_peak_is_above_the_ceiling() -> None:
    loud = loudness.normalize(ambience.loop(("footsteps",), 24_000, np.random.default_rng(1)), 24_000, -10)
    assert np.abs(loud).max() <= loudness.PEAK_CEILING + 1e-6


def test_resampling_keeps_length_and_pitch() -> None:
    tone: Callable[[int], Samples] = lambda rate: np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)[:, None]  # noqa: E731  # two uses of one formula
    out = encode.resample(tone(22050), 22050, 48000)
    assert len(out) == pytest.approx(48000, abs=40)
    assert np.argmax(np.abs(np.fft.rfft(out[:48000, 0], 48000))) == 440
