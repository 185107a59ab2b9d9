"""Ambience and dialogue, measured: loops, loudness, pace, pitch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import combinations

import av
import numpy as np
import numpy.typing as npt
import pytest

from workers.child.animatic import espeak
from workers.child.media import ambience, encode, loudness

Samples = npt.NDArray[np.float32]

RATE = 24_000
LINE = "We hold the light until the morning comes, and then we hold it for the others."

speaks = pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="the extra `speech` is not installed")


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def ebur128(samples: Samples, rate: int) -> float:
    """Integrated loudness as FFmpeg's own meter has it."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="fltp", layout="stereo" if samples.shape[1] == 2 else "mono", time_base=f"1/{rate}")  # type: ignore[arg-type]
    meter = graph.add("ebur128", "metadata=1")
    sink = graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    level = float("nan")
    for frame in [*encode._audio_frames(samples, rate), None]:
        source.push(frame)
        try:
            while True:
                out = sink.pull()
                level = float(out.metadata.get("lavfi.r128.I", level))
        except (av.BlockingIOError, av.EOFError):
            pass
    return level


# -- ambience


def test_there_are_eight_sounds_and_more() -> None:
    assert {"rain", "wind", "city", "room", "footsteps", "fire", "sea", "crowd"} <= set(ambience.SOUNDS)


@pytest.mark.parametrize("name", ambience.SOUNDS)
def test_a_sound_is_heard_in_both_ears_and_loops_without_a_click(name: str) -> None:
    looped = ambience.loop((name,), RATE, rng())

    assert looped.shape == (ambience.LOOP_S * RATE, 2)
    assert np.abs(looped).max() == pytest.approx(1, abs=0.01)
    assert (np.sqrt((looped**2).mean(axis=0)) > 0.005).all()
    assert not np.array_equal(looped[:, 0], looped[:, 1])
    curve = np.abs(np.diff(looped, n=2, axis=0, prepend=looped[-2:])).max(axis=1)  # a step in level or slope stands out here
    assert curve[:2].max() <= np.quantile(curve, 0.9999) + 1e-6


def test_sounds_differ_in_colour_or_in_shape() -> None:
    prints = {}
    for name in ambience.SOUNDS:
        mono = ambience.loop((name,), RATE, rng()).mean(axis=1)
        spectrum = np.abs(np.fft.rfft(mono)) ** 2
        bands = np.array([part.sum() for part in np.split(spectrum, np.geomspace(40, len(spectrum) - 1, 11).astype(int))])
        envelope = np.sqrt((mono.reshape(-1, RATE // 20) ** 2).mean(axis=1))
        prints[name] = np.append(10 * np.log10(bands / bands.sum() + 1e-6), 20 * envelope.std() / envelope.mean())
    for one, other in combinations(prints, 2):
        assert np.abs(prints[one] - prints[other]).max() > 3, (one, other)


def test_the_same_generator_gives_the_same_sound() -> None:
    assert np.array_equal(ambience.loop(("rain", "wind"), RATE, rng(4)), ambience.loop(("rain", "wind"), RATE, rng(4)))
    assert not np.array_equal(ambience.loop(("rain",), RATE, rng(4)), ambience.loop(("rain",), RATE, rng(5)))


def test_scenes_change_where_the_picture_does_without_a_gap() -> None:
    bed = ambience.bed([("rain",), ("engine",)], 6 * RATE, RATE, rng(), changes=[2 * RATE])
    low = [
        np.abs(np.fft.rfft(bed[a * RATE : b * RATE, 0]))[: 100 * (b - a)].sum() / np.abs(np.fft.rfft(bed[a * RATE : b * RATE, 0])).sum()
        for a, b in ((0, 1), (3, 4))
    ]
    assert low[1] > 4 * low[0]
    power = (bed**2).mean(axis=1).reshape(-1, RATE // 10).mean(axis=1)
    assert power.min() > 0.05 * np.median(power)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("heavy rain on a tin roof", ("rain",)),
        ("Sea and wind", ("wind", "sea")),
        ("distant thunder", ("thunder",)),
        ("crackling campfire, crickets", ("fire", "night")),
        ("a restaurant full of people", ("crowd",)),
        ("brain", ()),
        ("theremin", ()),
    ],
)
def test_cues_are_found_as_people_write_them(text: str, names: tuple[str, ...]) -> None:
    assert ambience.cues(text) == names


# -- loudness


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_loudness_agrees_with_ffmpegs_meter(rate: int, channels: int) -> None:
    noise = ambience.bed([("crowd",)], 6 * rate, rate, rng())[:, :channels] * np.linspace(0.05, 0.5, 6 * rate, dtype=np.float32)[:, None]
    assert loudness.lufs(noise, rate) == pytest.approx(ebur128(noise, rate), abs=0.3)


def test_a_full_scale_tone_has_the_loudness_that_the_standard_gives() -> None:
    tone = np.sin(2 * np.pi * 997 * np.arange(5 * 48000) / 48000).astype(np.float32)[:, None]
    assert loudness.lufs(tone, 48000) == pytest.approx(-3.01, abs=0.05)


def test_silence_has_none_and_stays_silent() -> None:
    silence = np.zeros((48000, 2), np.float32)
    assert loudness.lufs(silence, 48000) == float("-inf")
    assert not loudness.at(silence, 48000, -16).any()


def test_nothing_is_louder_than_the_ceiling() -> None:
    loud = loudness.at(ambience.loop(("footsteps",), RATE, rng()), RATE, -10)
    assert np.abs(loud).max() <= loudness.CEILING + 1e-6


# -- dialogue


def spoken(text: str = LINE, pace: str | None = None, emotion: str | None = None, language: str = "en") -> Samples:
    how, warnings = espeak.delivery(pace, emotion)
    assert warnings == []
    return espeak.speak(text, language, how, lambda done, of: None)


def pitch(samples: Samples) -> float:
    """Median F0 in Hz: the autocorrelation peak of voiced 40 ms windows, 60 to 400 Hz."""
    size, step, found = 882, 441, []
    for start in range(0, len(samples) - 2 * size, step):
        part = samples[start : start + 2 * size].astype(np.float64)
        if np.sqrt((part**2).mean()) < 0.05:
            continue
        part -= part.mean()
        correlation = np.correlate(part, part, "full")[len(part) - 1 :]
        lags = slice(espeak.SAMPLE_RATE // 400, espeak.SAMPLE_RATE // 60)
        lag = int(np.argmax(correlation[lags])) + lags.start
        if correlation[lag] > 0.5 * correlation[0]:
            found.append(espeak.SAMPLE_RATE / lag)
    return float(np.median(found))


@speaks
def test_slow_lasts_at_least_one_point_four_times_fast() -> None:
    slow, normal, fast = (len(spoken(pace=pace)) for pace in ("slow", "normal", "fast"))
    assert slow > normal > fast
    assert slow >= 1.4 * fast


@speaks
def test_excited_is_at_least_fifteen_percent_higher_than_sad() -> None:
    assert pitch(spoken(emotion="excited")) >= 1.15 * pitch(spoken(emotion="sad"))


@speaks
def test_progress_comes_while_it_is_spoken() -> None:
    heard: list[int] = []
    espeak.speak(LINE * 40, "en", espeak.Delivery(), lambda done, of: heard.append(done))
    assert heard == sorted(heard)
    assert len(set(heard)) > 5


@speaks
def test_what_progress_raises_stops_the_speaker() -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, of: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        espeak.speak(LINE, "en", espeak.Delivery(), stop)


@speaks
@pytest.mark.parametrize(
    ("language", "text"), [("de-AT", "Guten Abend"), ("pt_BR", "Boa noite"), ("zh", "你好"), ("el", "Καλημέρα"), ("no", "God kveld")]
)
def test_languages_are_spoken(language: str, text: str) -> None:
    assert len(spoken(text, language=language)) > espeak.SAMPLE_RATE / 4


def test_words_that_are_not_known_change_nothing_and_are_named() -> None:
    how, warnings = espeak.delivery("sideways", "sesquipedalian")
    assert how == espeak.Delivery()
    assert [warning.split()[0] for warning in warnings] == ["pace", "emotion"]


@speaks
@pytest.mark.parametrize("rate", [8000, 44100])
def test_a_line_is_at_minus_sixteen_and_its_background_twenty_under(rate: int) -> None:
    line = loudness.at(encode.resampled(spoken()[:, None], espeak.SAMPLE_RATE, rate), rate, -16)
    assert ebur128(line, rate) == pytest.approx(-16, abs=2)


def test_resampling_keeps_length_and_pitch() -> None:
    tone: Callable[[int], Samples] = lambda rate: np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)[:, None]  # noqa: E731  # two uses of one formula
    out = encode.resampled(tone(22050), 22050, 48000)
    assert len(out) == pytest.approx(48000, abs=40)
    assert np.argmax(np.abs(np.fft.rfft(out[:48000, 0], 48000))) == 440
