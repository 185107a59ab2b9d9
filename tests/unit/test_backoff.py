"""Waits that double."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from movieq.backoff import Backoff, wait_s


def test_each_wait_is_twice_the_last_up_to_the_longest() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_reset_starts_again_with_the_shortest() -> None:
    backoff = Backoff(0.5, 3.0)
    backoff.next_s()
    backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 0.5


@given(st.integers())
def test_any_number_of_tries_gives_a_wait_within_the_limits(tries: int) -> None:
    assert 2.0 <= wait_s(tries, 2.0, 60.0) <= 60.0
