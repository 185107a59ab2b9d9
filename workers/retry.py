"""How long to wait before the next try."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from redis.exceptions import RedisError

from movieq import logs
from movieq.queue.refusals import is_fault

T = TypeVar("T")
log = logs.get()

RETRY_BASE_S: Final = 2.0
RETRY_MOST_S: Final = 60.0
UNREADABLE_S: Final = 30.0, 600.0
"""Shortest and longest wait before a task that this version cannot read is tried again."""


def retry_delay_ms(attempt: int) -> int:
    """Exponential from two seconds to a minute, with a jitter of a quarter either way, so that faults of many do not come back together."""
    return int(_doubled_s(RETRY_BASE_S, RETRY_MOST_S, attempt) * 1000 * random.uniform(0.75, 1.25))  # noqa: S311  # spreads load, hides nothing


def unreadable_delay_ms(attempt: int) -> int:
    """Exponential from half a minute to ten: time for a worker of the version that wrote the task."""
    return int(_doubled_s(*UNREADABLE_S, attempt) * 1000)


def _doubled_s(least_s: float, most_s: float, attempt: int) -> float:
    """Return the wait after an attempt, of which a damaged record may say anything."""
    return min(least_s * (1 << min(max(attempt - 1, 0), 20)), most_s)


async def insist(verb: Callable[[], Awaitable[T]]) -> T:
    """The answer of a verb, however long Redis is away; said twice it does no harm. Raises what the store raises on purpose, and faults."""
    wait_s = 0.1
    while True:
        try:
            return await verb()
        except (RedisError, OSError, TimeoutError) as error:
            if is_fault(error):
                raise
            log.warning("redis_away", problem=str(error) or type(error).__name__, again_in_s=wait_s)
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, 1.0)
