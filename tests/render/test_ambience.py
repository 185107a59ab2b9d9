"""Ambience: loops without a click, scenes that change with the picture, words that name sounds."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from workers.child.media import ambience

RATE = 24_000


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


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
        ("a window opens", ()),
        ("the officer reads a card in his seat, without care", ()),
        ("a human hummingbird", ()),
        ("a rainbow", ()),
        ("no wind", ()),
        ("no wind, only rain", ("rain",)),
        ("without any people or traffic", ()),
        ("windswept shores, thundering", ("thunder", "wind", "sea")),
        ("passing cars", ("city", "engine")),
        ("cafe\u0301", ("crowd",)),
    ],
)
def test_cues_are_found_as_people_write_them(text: str, names: tuple[str, ...]) -> None:
    assert ambience.named_sounds(text) == names
