"""How long a task waits before it is tried again, and how a verb is repeated while Redis is away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from movieq import logs
from movieq.backoff import Backoff, wait_s
from movieq.queue.refusals import REDIS_AWAY, is_fault

RETRY_S: Final = 2.0, 60.0
"""Shortest and longest wait before a task that failed with a recoverable error is tried again, in seconds."""
UNREADABLE_S: Final = 30.0, 600.0
"""Shortest and longest wait before a task that this version cannot read is tried again, in seconds."""
JITTER: Final = 0.25
"""Share by which the wait of a retry varies at random, so that tasks that failed together are not retried together."""
VERB_S: Final = 0.1, 1.0
"""Shortest and longest wait before a verb is sent again while Redis is away, in seconds."""

T = TypeVar("T")
log = logs.get()


def retry_delay_ms(attempt: int) -> int:
    """Return how long a task waits after this attempt failed with a recoverable error, in ms."""
    return int(wait_s(attempt, *RETRY_S) * 1000 * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311  # spreads load, hides nothing


def unreadable_delay_ms(attempt: int) -> int:
    """Return how long a task waits for a worker that can read it, in ms."""
    return int(wait_s(attempt, *UNREADABLE_S) * 1000)


async def insist(verb: Callable[[], Awaitable[T]]) -> T:
    """Return the answer of a verb. It is sent again while Redis is away, which is safe because verbs are idempotent.

    Raises the errors of the store, and faults of a script.
    """
    backoff = Backoff(*VERB_S)
    while True:
        try:
            return await verb()
        except REDIS_AWAY as error:
            if is_fault(error):
                raise
            again_in_s = backoff.next_s()
            log.warning("redis_away", problem=str(error) or type(error).__name__, again_in_s=again_in_s)
        await asyncio.sleep(again_in_s)
