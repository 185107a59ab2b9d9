"""Temporary refusals of Redis and their reasons, told apart from faults of movieq and from an unavailable Redis."""

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
    """A temporary refusal: `reason` is a clause about Redis ("its memory is full"), `cure` what the operator can do."""

    code: str
    reason: str
    cure: str


_REFUSALS: Final = {
    refusal.code: refusal
    for refusal in (
        Refusal("OOM", "its memory is full", "raise its `maxmemory`, or store ended tasks for fewer days: MOVIEQ_KEEP_TASKS_DAYS"),
        Refusal("READONLY", "it is a read-only replica", "set MOVIEQ_REDIS_URL to its primary, or promote it (REPLICAOF NO ONE)"),
        Refusal("MISCONF", "it cannot save its data to disk", "free space on its disk, and read its log"),
        Refusal("NOREPLICAS", "too few of its replicas are connected", "start them again, or lower its `min-replicas-to-write`"),
        Refusal("LOADING", "it is still loading its data from disk", "wait until it has finished"),
        Refusal("MASTERDOWN", "it is a replica that has lost its primary", "set MOVIEQ_REDIS_URL to the primary"),
        Refusal("BUSY", "a script has run for too long", "stop the script with SCRIPT KILL, or wait"),
        Refusal("CLUSTERDOWN", "it is a cluster that is down", "set MOVIEQ_REDIS_URL to a single server: movieq cannot use a cluster"),
        Refusal("TRYAGAIN", "it is a cluster that is moving keys", "set MOVIEQ_REDIS_URL to a single server: movieq cannot use a cluster"),
    )
}


_REFUSED: Final = re.compile(rf"(?:^|caused error: \W*)({'|'.join(_REFUSALS)}) ")
"""Matches an error about the server's state, not about the command; in a pipeline, redis-py puts the command before it."""


def is_fault(error: Exception) -> bool:
    """Whether the error is a fault, for example in a script, and not a temporary refusal or an unavailable Redis."""
    return isinstance(error, ResponseError) and refusal(error) is None


def refusal(error: BaseException) -> Refusal | None:
    """Return the temporary refusal that an error stands for; None for any other error."""
    match error:  # redis-py removes the code from the texts of these
        case OutOfMemoryError():
            return _REFUSALS["OOM"]
        case ReadOnlyError():
            return _REFUSALS["READONLY"]
        case BusyLoadingError():
            return _REFUSALS["LOADING"]
    found = _REFUSED.search(str(error))
    return _REFUSALS[found[1]] if found else None


def log_failure(event: str, error: Exception, *, away: str = "", **fields: Any) -> bool:
    """Log an error; return whether it is a fault, and not a temporary refusal or an unavailable Redis.

    A failed script is logged as `script_failed`, a refusal or an unavailable Redis as `away` (default: `event`), other errors as `event`.
    """
    if isinstance(error, ResponseError) and is_fault(error):
        log.error("script_failed", during=event, exc_info=error, **fields)
    elif isinstance(error, (RedisError, ConnectionError, TimeoutError)):
        log.warning(away or event, problem=str(error) or type(error).__name__, **fields)
        return False
    else:
        log.error(event, exc_info=error, **fields)
    return True
