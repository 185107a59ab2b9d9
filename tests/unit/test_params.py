"""Parameters as people write them: frame rates and languages."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movieq.tasks import params
from movieq.tasks.faults import Faults

NTSC = {24: "23.976 23.98 23.97 23.9760 23.976024", 30: "29.97 29.970", 48: "47.952 47.95", 60: "59.94 59.9401"}


def faults(kind: type[params.Params], **sent: Any) -> list[tuple[str, str]]:
    found = Faults()
    params.checked(kind, {"prompt": "a", **sent}, found)
    return list(found)


@pytest.mark.parametrize(("written", "whole"), [(written, whole) for whole, each in NTSC.items() for written in each.split()])
def test_a_rate_of_ntsc_is_exact_as_a_number_and_as_text(written: str, whole: int) -> None:
    exact = Fraction(whole * 1000, 1001)
    assert params.frame_rate(written) == params.frame_rate(float(written)) == params.frame_rate(f"{whole}000/1001") == exact
    for fps in (written, float(written)):
        assert faults(params.VideoParams, fps=fps) == faults(params.AnimationParams, fps=fps) == []


@given(st.fractions(1, 60, max_denominator=1000).filter(lambda rate: 10**4 % rate.denominator == 0))
@settings(max_examples=100)
def test_a_rate_is_the_same_as_a_number_as_text_and_as_a_ratio(rate: Fraction) -> None:
    number = float(rate)
    written = f"{number:.4f}".rstrip("0").rstrip(".")
    assert params.frame_rate(written) == params.frame_rate(number)
    if not any(abs(number - whole * 1000 / 1001) < 0.01 for whole in (24, 30, 48, 60)):
        assert params.frame_rate(number) == rate == params.frame_rate(f"{rate.numerator}/{rate.denominator}")
    assert faults(params.VideoParams, fps=written, duration=1, resolution="64x64") == []


@pytest.mark.parametrize(
    "fps", ["0.5", "60.1", "61", "0", "24/0", "", ".5", "24.", "1e1", "-24", "24 ", "24\n", "24.1.2", "24.5/2", "٢٤", "24,5"]
)
def test_a_text_that_is_no_rate_is_refused_and_the_answer_shows_how_to_write_one(fps: str) -> None:
    ((path, message),) = faults(params.VideoParams, fps=fps)
    assert path == "task_data.fps"
    assert '"24000/1001"' in message
    assert '"23.976"' in message


@pytest.mark.parametrize(
    ("tag", "language"),
    [
        ("en-GB", ("en", "gb")),
        ("pt_BR", ("pt", "br")),
        ("zh", ("cmn", "")),
        ("zh-Hant-TW", ("cmn", "hant-tw")),
        ("zh-yue", ("yue", "")),
        ("ZH-yue-HK", ("yue", "hk")),
        ("zh-cmn-Hans", ("cmn", "hans")),
        ("zh-nan", ("nan", "")),
        ("no", ("nb", "")),
        ("no-NO", ("nb", "no")),
        ("iw", ("he", "")),
        ("iw-IL", ("he", "il")),
        ("in", ("id", "")),
        ("mo", ("ro", "")),
    ],
)
def test_a_language_tag_means_the_language_that_it_stands_for(tag: str, language: tuple[str, str]) -> None:
    assert params.spoken_language(tag) == language


@pytest.mark.parametrize("tag", ["zh-yue", "no", "iw", "in", "yue", "cmn-Hans"])
def test_old_and_extended_tags_are_accepted(tag: str) -> None:
    assert faults(params.AudioParams, text="a", language=tag) == []


@pytest.mark.parametrize("tag", ["zh-nan", "zh-wuu-CN", "tlh", "xx"])
def test_a_language_that_nothing_speaks_is_refused_and_not_spoken_as_another(tag: str) -> None:
    ((path, message),) = faults(params.AudioParams, text="a", language=tag)
    assert path == "task_data.language"
    assert msgspec.json.encode(tag).decode() in message
