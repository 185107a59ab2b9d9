"""A clip of a model that renders fewer pictures a second than were asked for moves evenly."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest

from workers.child.media.interpolation import retimed

Pictures = list[npt.NDArray[np.uint8]]


def moving(count: int, step: int) -> Pictures:
    """Return pictures of a textured square that moves by `step` pixels from one to the next."""
    chance = np.random.default_rng(1)
    square = chance.integers(150, 255, (48, 48, 3), dtype=np.uint8)
    ground = chance.integers(0, 40, (96, 32 + 48 + step * count, 3), dtype=np.uint8)
    pictures = []
    for number in range(count):
        picture = ground.copy()
        picture[24:72, 16 + step * number : 64 + step * number] = square
        pictures.append(picture)
    return pictures


def centres(pictures: Pictures) -> npt.NDArray[np.float64]:
    """Return where the square is in each picture: the centre of what is brighter than the ground."""
    bright = np.stack([np.clip(each[24:72].astype(float) - 60, 0, None).mean(axis=(0, 2)) for each in pictures])
    found: npt.NDArray[np.float64] = (bright * np.arange(bright.shape[1])).sum(axis=1) / bright.sum(axis=1)
    return found


def rendered(pictures: Pictures, fps: int, rate: Fraction, seconds: float) -> Pictures:
    return [np.asarray(each) for each in retimed(pictures, Fraction(fps), rate, round(seconds * rate))]


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(24000, 1001), Fraction(60)])
def test_between_the_models_pictures_things_move_on(rate: Fraction) -> None:
    step = 6
    found = rendered(moving(33, step), 16, rate, 2)
    assert len(found) == round(2 * rate)
    last = int(2 * rate) - 3  # the model's last picture stands still
    where = centres(found)[:last]
    even = where[0] + np.arange(last) * step * 16 / float(rate)
    assert np.abs(where - even).max() < step / 4, "repeated pictures would be late by up to a step"


def test_pictures_of_the_same_moment_are_the_models_own() -> None:
    pictures = moving(33, 6)
    found = rendered(pictures, 16, Fraction(24), 2)
    assert all(np.array_equal(found[number * 3], pictures[number * 2]) for number in range(16))


@pytest.mark.parametrize(("rate", "numbers"), [(16, range(32)), (8, range(0, 32, 2))])
def test_an_equal_or_lower_rate_takes_the_pictures_as_they_are(rate: int, numbers: range) -> None:
    pictures = moving(33, 6)
    found = rendered(pictures, 16, Fraction(rate), 2)
    assert all(np.array_equal(each, pictures[number]) for each, number in zip(found, numbers, strict=True))


def test_a_cut_stays_a_cut() -> None:
    dark, light = np.full((64, 64, 3), 20, np.uint8), np.full((64, 64, 3), 230, np.uint8)
    found = rendered([dark] * 8 + [light] * 9, 16, Fraction(24), 1)
    assert {int(each.mean()) // 20 for each in found} == {1, 11}


def test_the_same_pictures_give_the_same_pictures() -> None:
    first, again = (rendered(moving(9, 5), 16, Fraction(24), 0.5) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("rate", [Fraction(8), Fraction(16), Fraction(24), Fraction(60)])
def test_pictures_are_read_a_few_ahead_and_not_kept(rate: Fraction) -> None:
    read: list[weakref.ref[npt.NDArray[np.uint8]]] = []

    def source() -> Iterator[npt.NDArray[np.uint8]]:
        for number in range(33):
            picture = np.full((64, 64, 3), number, np.uint8)
            read.append(weakref.ref(picture))
            yield picture

    for number, _ in enumerate(retimed(source(), Fraction(16), rate, round(2 * rate))):
        assert len(read) <= number * 16 / rate + 4
        assert sum(each() is not None for each in read) <= 5


def test_a_clip_of_one_picture_is_still() -> None:
    assert len(rendered(moving(1, 5), 16, Fraction(24), 0.5)) == 12
