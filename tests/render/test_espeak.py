"""Dialogue by espeak-ng: pace, pitch, languages, progress."""

from __future__ import annotations

import importlib.util
import unicodedata

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movieq.errors import InvalidInput
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


@speaks
@pytest.mark.parametrize(
    ("language", "written", "meant"),
    [
        ("de", unicodedata.normalize("NFD", "das hält mich"), "das hält mich"),
        ("vi", unicodedata.normalize("NFD", "một tiếng động"), "một tiếng động"),
        ("ko", unicodedata.normalize("NFD", "안녕"), "안녕"),
        ("en", "\ufb01nal o\ufb03ce", "final office"),
        ("en", "\uff28ello", "Hello"),
        ("en", "\U0001d40bight", "Light"),
        ("ja", "\uff76\uff9e\uff97\uff7d", "ガラス"),
        ("ar", "\ufee3\ufeae\ufea3\ufe92\ufe8e", "مرحبا"),
    ],
)
def test_equivalent_texts_sound_alike(language: str, written: str, meant: str) -> None:
    assert written != meant
    assert np.array_equal(spoken(written, language=language), spoken(meant, language=language))


@pytest.mark.parametrize("text", ["x² and 1½", "Wait…", "ห้ามทำ"])
def test_what_is_no_letter_is_spoken_as_it_is_written(text: str) -> None:
    assert espeak.prepared(text) == text


@given(st.text(st.characters(codec="utf-8")))
@settings(max_examples=200)
def test_a_text_is_prepared_alike_in_all_its_equivalent_forms(text: str) -> None:
    assert espeak.prepared(text) == espeak.prepared(unicodedata.normalize("NFD", text)) == espeak.prepared(espeak.prepared(text))


@pytest.mark.parametrize(
    ("language", "text", "named"),
    [
        ("ja", "灯台は嵐の夜に", "Chinese characters '灯台嵐夜'"),
        ("ko", "漢字", "Chinese characters '漢字'"),
        ("en", "He says こんにちは.", "kana 'こんにちは'"),
        ("zh", "トラ", "kana 'トラ'"),
        ("yue", "ㄅㄆ", "bopomofo 'ㄅㄆ'"),
    ],
)
def test_letters_that_would_all_be_read_alike_are_refused_by_name(language: str, text: str, named: str) -> None:
    with pytest.raises(InvalidInput, match=named) as refused:
        spoken(text, language=language)
    assert str(refused.value).startswith("text: ")


@speaks
@pytest.mark.parametrize(
    ("language", "text"), [("zh-yue", "你好"), ("ja", "とうだい"), ("ja", "トラー"), ("zh-Hans", "你好"), ("ko", "안녕")]
)
def test_letters_of_the_language_itself_are_spoken(language: str, text: str) -> None:
    assert len(spoken(text, language=language)) > espeak.SAMPLE_RATE / 4


@speaks
@pytest.mark.parametrize(("tag", "meant"), [("zh-yue", "yue"), ("zh-yue-HK", "yue"), ("no", "nb"), ("iw", "he"), ("in", "id")])
def test_a_language_by_another_name_is_spoken_as_what_it_means(tag: str, meant: str) -> None:
    text = {"yue": "你好", "he": "שלום"}.get(meant, "selamat")
    assert np.array_equal(spoken(text, language=tag), spoken(text, language=meant))


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
