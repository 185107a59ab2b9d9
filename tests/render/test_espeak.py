"""Dialogue by espeak-ng: pace, pitch, languages, progress."""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt
import pytest

from workers.child.animatic import espeak

Samples = npt.NDArray[np.float32]

LINE = "We hold the light until the morning comes, and then we hold it for the others."

speaks = pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="the extra `speech` is not installed")


def spoken(text: str = LINE, pace: str | None = None, emotion: str | None = None, language: str = "en") -> Samples:
    delivery, warnings = espeak.delivery(pace, emotion)
    assert warnings == []
    return espeak.synthesize(text, language, delivery, lambda done, of: None)


def pitch(samples: Samples) -> float:
    """Return the median F0 in Hz: the autocorrelation peak of voiced 40 ms windows, 60 to 400 Hz."""
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
def test_progress_is_reported_while_the_text_is_spoken() -> None:
    reported: list[int] = []
    espeak.synthesize(LINE * 40, "en", espeak.Delivery(), lambda done, of: reported.append(done))
    assert reported == sorted(reported)
    assert len(set(reported)) > 5


@speaks
def test_an_exception_from_progress_stops_the_speech() -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, of: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        espeak.synthesize(LINE, "en", espeak.Delivery(), stop)


@speaks
@pytest.mark.parametrize(
    ("language", "text"), [("de-AT", "Guten Abend"), ("pt_BR", "Boa noite"), ("zh", "你好"), ("el", "Καλημέρα"), ("no", "God kveld")]
)
def test_languages_are_spoken(language: str, text: str) -> None:
    assert len(spoken(text, language=language)) > espeak.SAMPLE_RATE / 4


def test_words_that_are_not_known_change_nothing_and_are_named() -> None:
    delivery, warnings = espeak.delivery("sideways", "sesquipedalian")
    assert delivery == espeak.Delivery()
    assert [warning.split()[0] for warning in warnings] == ["pace", "emotion"]


@pytest.mark.parametrize(
    "emotion",
    [
        "unhappy",
        "not happy",
        "never too happy",
        "fearless",
        "hopeless",
        "cheerless",
        "average",
        "dangerous",
        "a stranger",
        "a saddle",
        "tireless",
        "terrific",
        "unnatural",
        "a gladiator",
    ],
)
def test_a_mood_inside_another_word_or_negated_is_not_chosen(emotion: str) -> None:
    delivery, warnings = espeak.delivery(None, emotion)
    assert delivery == espeak.Delivery()
    assert emotion in warnings[0]


@pytest.mark.parametrize(("pace", "rate"), [("unhurried", "normal"), ("steadfast", "normal"), ("not fast", "normal"), ("slowly", "slow")])
def test_a_pace_inside_another_word_or_negated_is_not_chosen(pace: str, rate: str) -> None:
    assert espeak.delivery(pace, None)[0].rate == round(165 * espeak.PACES[rate])


@pytest.mark.parametrize(
    ("emotion", "mood"),
    [
        ("Joyful", "happy"),
        ("weary", "tired"),
        ("enraged", "angry"),
        ("terrified", "fearful"),
        ("excitedly", "excited"),
        ("not sad but angry", "angry"),
    ],
)
def test_moods_are_found_as_people_write_them(emotion: str, mood: str) -> None:
    assert espeak.delivery(None, emotion)[0] == espeak.delivery(None, mood)[0]
