"""How stills are laid out in time."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from workers.child.animatic.shots import plan_shots

rates = st.sampled_from([Fraction(1), Fraction(12), Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(60)])


@given(stills=st.integers(1, 32), frames=st.integers(1, 1800), rate=rates)
def test_every_frame_has_its_shot_and_every_still_its_equal_share(stills: int, frames: int, rate: Fraction) -> None:
    shots = plan_shots(stills, frames, rate)

    assert shots[0].first == 0
    assert shots[-1].end == frames
    assert len(shots) == min(stills, frames)
    assert [shot.still for shot in shots] == sorted({shot.still for shot in shots})
    middles = [shot.first + Fraction(shot.fade_in, 2) for shot in shots]
    lengths = [b - a for a, b in pairwise([*middles, Fraction(frames)])]
    assert max(lengths) - min(lengths) <= 2


@given(stills=st.integers(2, 32), frames=st.integers(2, 1800), rate=rates)
def test_dissolves_are_short_and_never_two_at_once(stills: int, frames: int, rate: Fraction) -> None:
    shots = plan_shots(stills, frames, rate)
    shortest = min(b.first - a.first for a, b in pairwise([*shots, shots[-1]]) if b is not a) if len(shots) > 1 else frames
    for before, shot in pairwise(shots):
        overlap = before.end - shot.first
        assert overlap == shot.fade_in
        assert overlap <= rate / 2
        assert overlap <= Fraction(3, 10) * frames / len(shots) + 1
        assert overlap == 0 or overlap >= 4
        assert overlap < max(4, shortest)
        assert before.first + before.fade_in <= shot.first


def test_a_dissolve_goes_in_even_steps() -> None:
    _, second = plan_shots(2, 48, Fraction(24))
    shares = [second.presence(frame) for frame in range(second.first, second.first + second.fade_in + 1)]
    assert shares[-1] == 1.0
    assert len({round(b - a, 6) for a, b in pairwise([0.0, *shares])}) == 1
