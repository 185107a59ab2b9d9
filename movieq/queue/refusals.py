"""What Redis refuses for now and why, told apart from faults of ours and from a Redis that is away."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from movieq import logs

log = logs.get()

REDIS_AWAY: Final = (RedisError, OSError)
"""What is raised where Redis is away, cannot be reached or does not answer in time (a TimeoutError is an OSError).

A RedisError may also be a fault of ours or a refusal: see `is_fault` and `refusal`."""


class Refusal(msgspec.Struct, frozen=True):
    """Why Redis refuses a command for now, as a clause whose subject is Redis, and what its operator can do."""

    code: str
    reason: str
    cure: str


_REFUSALS: Final = {
    refusal.code: refusal
    for refusal in (
        Refusal("OOM", "its memory is full", "raise its `maxmemory`, or keep ended tasks for fewer days: MOVIEQ_KEEP_TASKS_DAYS"),
        Refusal("READONLY", "it is a read-only replica", "name its primary in MOVIEQ_REDIS_URL, or promote it (REPLICAOF NO ONE)"),
        Refusal("MISCONF", "it cannot save its data to disk", "make room on its disk, and see its log"),
        Refusal("NOREPLICAS", "too few of its replicas are connected", "bring them back, or lower its `min-replicas-to-write`"),
        Refusal("LOADING", "it is still loading its data from disk", "wait until it has finished"),
        Refusal("MASTERDOWN", "it is a replica that has lost its primary", "name the primary in MOVIEQ_REDIS_URL"),
        Refusal("BUSY", "a script has kept it busy for too long", "stop the script with SCRIPT KILL, or wait"),
        Refusal("CLUSTERDOWN", "it is a cluster that is down", "name a single server in MOVIEQ_REDIS_URL: movieq cannot use a cluster"),
        Refusal("TRYAGAIN", "it is a cluster that is moving keys", "name a single server in MOVIEQ_REDIS_URL: movieq cannot use a cluster"),
    )
}


_REFUSED: Final = re.compile(rf"(?:^|caused error: \W*)({'|'.join(_REFUSALS)}) ")
"""How a server begins a refusal that says how it is, not what was wrong; redis-py puts the command of a pipeline before it."""


def is_fault(error: Exception) -> bool:
    """Whether Redis could not do what it was asked, because of a fault in our scripts, say; else it is away, or refuses for now."""
    return isinstance(error, ResponseError) and refusal(error) is None


def refusal(error: BaseException) -> Refusal | None:
    """Return why Redis refuses what it was asked for now; None for any other error."""
    match error:  # redis-py takes the code away from these
        case OutOfMemoryError():
            return _REFUSALS["OOM"]
        case ReadOnlyError():
            return _REFUSALS["READONLY"]
        case BusyLoadingError():
            return _REFUSALS["LOADING"]
    found = _REFUSED.search(str(error))
    return _REFUSALS[found[1]] if found else None


def log_failure(event: str, error: Exception, *, away: str = "", **fields: Any) -> bool:
    """Log an error as what it is; return whether it is a fault rather than a Redis that is away or refuses for now.

    A script that failed is `script_failed`; a Redis that is away is logged as `away`, where that is given; the rest is logged as `event`.
    """
    if isinstance(error, ResponseError) and is_fault(error):
        log.error("script_failed", during=event, exc_info=error, **fields)
    elif isinstance(error, (RedisError, ConnectionError, TimeoutError)):
        log.warning(away or event, problem=str(error) or type(error).__name__, **fields)
        return False
    else:
        log.error(event, exc_info=error, **fields)
    return True
