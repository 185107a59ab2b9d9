"""How a run that met a fault comes back."""

from __future__ import annotations

import pytest

from workers.retry import retry_delay_ms


@pytest.mark.parametrize("attempt", range(1, 12))
def test_retries_wait_twice_as_long_each_time_up_to_a_minute_and_never_all_the_same(attempt: int) -> None:
    base = min(2000 * 2 ** (attempt - 1), 60_000)
    delays = [retry_delay_ms(attempt) for _ in range(200)]
    assert 0.75 * base - 1 <= min(delays) < 0.85 * base
    assert 1.15 * base < max(delays) <= 1.25 * base
