"""How far a run is and how long it will still take, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.eta import FETCH_SHARE, UPLOAD_AT, Eta
from workers.protocol import Stage


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


LOAD, DENOISE, ENCODE = Stage("load", "loading_models", 1), Stage("denoise", "generating_video", 8), Stage("encode", "rendering_video", 1)
TIMES = {"load": [12.0], "denoise": [6.0, *[2.0] * 39], "encode": [0.5] * 20}
"""Twelve seconds to load, a slow first step, forty steps of two seconds, ten seconds to encode: 106 in all."""


def played(estimate_s: float) -> list[tuple[float, float, float]]:
    """After each step: progress, seconds that are left, and seconds that were thought to be."""
    clock = Clock()
    eta = Eta(estimate_s, clock)
    eta.plan((LOAD, DENOISE, ENCODE))
    left_s, found = sum(map(sum, TIMES.values())), [(eta.progress, 106.0, eta.remaining_s())]
    for name, times in TIMES.items():
        for step, seconds in enumerate(times, 1):
            clock.now_s += seconds
            left_s -= seconds
            assert eta.step(name, step, len(times)) is not None
            found.append((eta.progress, left_s, eta.remaining_s()))
    return found


def test_before_anything_is_done_the_estimate_counts() -> None:
    clock = Clock()
    eta = Eta(60.0, clock)
    assert eta.remaining_s() == 60
    clock.now_s += 20
    assert eta.remaining_s() == 40
    eta.plan((LOAD, DENOISE))
    assert eta.remaining_s() == pytest.approx(60 * (1 - FETCH_SHARE))


def test_an_estimate_that_was_too_short_never_says_that_nothing_is_left() -> None:
    clock = Clock()
    eta = Eta(10.0, clock)
    clock.now_s += 100
    assert eta.remaining_s() > 0
    eta.plan((LOAD, DENOISE, ENCODE))
    clock.now_s += 100
    assert eta.remaining_s() > 9


@pytest.mark.parametrize("estimate_s", [20.0, 106.0, 400.0])
def test_soon_the_measured_pace_counts_and_a_wrong_estimate_no_more(estimate_s: float) -> None:
    tail_s = estimate_s * (1 - UPLOAD_AT)
    for progress, left_s, thought_s in played(estimate_s):
        if progress > 0.3:
            assert thought_s - tail_s == pytest.approx(left_s, rel=0.25, abs=4), progress


def test_with_a_right_estimate_it_is_right_from_the_first_moment() -> None:
    for progress, left_s, thought_s in played(106.0):
        assert thought_s - 106 * (1 - UPLOAD_AT) == pytest.approx(left_s, rel=0.35, abs=6), progress


def test_progress_is_weighted_over_the_stages_and_leaves_the_last_part_to_the_upload() -> None:
    found = [progress for progress, _, _ in played(100.0)]
    assert found == sorted(found)
    assert found[0] == FETCH_SHARE
    assert found[-1] == pytest.approx(UPLOAD_AT)
    assert found[1] == pytest.approx(FETCH_SHARE + (UPLOAD_AT - FETCH_SHARE) * 0.1)


def test_a_stage_that_is_over_or_was_not_announced_changes_nothing() -> None:
    eta = Eta(10.0, Clock())
    assert eta.step("denoise", 1, 2) is None
    assert eta.plan(()) is None
    eta.plan((LOAD, DENOISE))
    eta.step("denoise", 1, 2)
    progress = eta.progress
    assert eta.step("load", 1, 1) is None
    assert eta.step("mux", 1, 1) is None
    assert eta.progress == progress


@given(
    st.lists(st.tuples(st.sampled_from([LOAD.name, DENOISE.name, ENCODE.name]), st.integers(0, 30), st.integers(0, 20), st.floats(0, 9)))
)
def test_whatever_an_engine_says_progress_never_falls_and_time_is_never_negative(said: list[tuple[str, int, int, float]]) -> None:
    clock = Clock()
    eta = Eta(10.0, clock)
    eta.plan((LOAD, DENOISE, ENCODE))
    for name, step, steps, seconds in said:
        before = eta.progress
        clock.now_s += seconds
        eta.step(name, step, steps)
        assert before <= eta.progress <= UPLOAD_AT + 1e-9
        assert eta.remaining_s() >= 0


@pytest.mark.parametrize("weights", [(1e308, 1e308, 1e308), (5e-324, 5e-324), (1e308, 5e-324), (float("inf"), 1.0), (-1.0, 0.0)])
def test_whatever_weights_a_plug_in_announces_progress_and_remaining_time_are_numbers(weights: tuple[float, ...]) -> None:
    clock = Clock()
    eta = Eta(10.0, clock)
    stages = tuple(Stage(f"stage{number}", "working", weight) for number, weight in enumerate(weights))
    eta.plan(stages)
    seen = [eta.progress]
    for stage in stages:
        for step in (1, 2):
            clock.now_s += 1
            assert eta.step(stage.name, step, 2) is not None
            assert eta.remaining_ms() >= 0
            seen.append(eta.progress)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(UPLOAD_AT)
