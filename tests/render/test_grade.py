"""The grade: looks differ visibly, and are baked into a still."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from workers.child.animatic import grade
from workers.child.animatic.palette import lab


def ramp(word: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return a grey ramp in that look, as CIELAB, without the vignette."""
    grey = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    picture = Image.merge("RGB", [Image.fromarray(grey)] * 3)
    looked = picture.filter(grade.lut(word)) if word != "neutral" else picture
    return lab(np.asarray(looked, np.float32)[128] / 255)


def test_there_are_eight_words_and_more() -> None:
    wanted = {"noir", "golden hour", "moonlight", "neon", "overcast", "candlelight", "high key", "horror"}
    assert wanted <= set(grade.GRADES)


def test_any_two_looks_are_five_delta_e_apart_on_greys() -> None:
    ramps = {word: ramp(word) for word in grade.GRADES}
    for one, other in itertools.combinations(ramps, 2):
        apart = np.sqrt(((ramps[one] - ramps[other]) ** 2).sum(axis=1)).mean()
        assert apart >= 5, (one, other, apart)


@pytest.mark.parametrize("word", grade.GRADES)
def test_brighter_stays_brighter(word: str) -> None:
    assert (np.diff(ramp(word)[:, 0]) > -0.4).all()


def test_neutral_leaves_colours_alone_in_the_middle() -> None:
    picture = Image.new("RGB", (64, 64), (200, 100, 50))
    assert np.abs(np.asarray(grade.apply(picture, "neutral"), int)[32, 32] - (200, 100, 50)).max() <= 2


def test_noir_is_grey() -> None:
    picture = grade.apply(Image.new("RGB", (64, 64), (200, 100, 50)), "noir")
    assert np.ptp(np.asarray(picture, int)[32, 32]) <= 1


def test_a_vignette_darkens_the_corners() -> None:
    picture = np.asarray(grade.apply(Image.new("RGB", (160, 90), (180, 180, 180)), "candlelight"), float)
    assert picture[0, 0].mean() < picture[45, 80].mean() * 0.6


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Film noir, hard shadows", "noir"),
        ("golden_hour", "golden hour"),
        ("Sunset over the bay", "golden hour"),
        ("lit by a single candle", "candlelight"),
        ("day for night", "moonlight"),
        ("high-key", "high key"),
        ("plaid", None),
        ("darkest", None),
        ("not dark", None),
        ("no candlelight, but bright", "high key"),
        ("not day for night", None),
        ("non-neutral, unnatural", None),
        ("candles", "candlelight"),
        (None, None),
    ],
)
def test_words_are_found_as_people_write_them(text: str | None, word: str | None) -> None:
    assert grade.look_named(text) == word


@pytest.mark.parametrize("word", grade.GRADES)
def test_every_look_is_found_by_its_own_name(word: str) -> None:
    assert grade.look_named(word) == word
