"""The outcome of a run, as a value that `workers.execute` reports to the store once."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

import msgspec

from movieq import logs
from movieq.errors import InternalFault, KeyTaken, RunLost, StorageFault, TaskFault, WorkerLost
from movieq.queue.store import DEATHS_LIMIT, TRIES_LIMIT, Budget
from movieq.tasks.entities import Task
from movieq.tasks.results import StoredResult
from workers.faults import PLACE, HostFault, host_problem, inside
from workers.finished import Finished
from workers.retry import retry_delay_ms, unreadable_delay_ms
from workers.supervisor import ChildDied

UNCOUNTED: Final = 10
"""From this attempt on, a fault of the machine counts as a try of the task, which may be its cause."""
UNREADABLE_LIMIT: Final = 4
"""Tries of a task that no worker can read. With the waits between them, a newer worker has some minutes to start."""
BROKE: Final = "the worker had an internal error: see its log"

log = logs.get()


class Completed(msgspec.Struct, frozen=True):
    """The files are stored, and the result is to be committed. `finished` are the files on this machine."""

    result: StoredResult
    finished: Finished


class Failed(msgspec.Struct, frozen=True):
    """The task failed: another run would fail too."""

    error: str
    code: str


class Requeued(msgspec.Struct, frozen=True):
    """The task goes back to its queue, or fails if its count of such runs (`budget`) reaches `limit`. With limit 0 it is not counted."""

    error: str
    code: str
    budget: Budget = Budget.DRAIN
    limit: int = 0
    delay_ms: int = 0
    exit_code: int | None = None
    """Exit code of the engine process, if that died. Negative for a signal."""
    stage: str | None = None
    """The stage in which the engine process died."""
    host_problem: str = ""
    """The problem of this machine, if that is the reason."""


class Lost(msgspec.Struct, frozen=True):
    """The task was cancelled, ended or given to another run: this run may write nothing more."""

    reason: str = ""
    """Why the run was stopped; empty if the store refused its verb."""


Outcome = Completed | Failed | Requeued | Lost


class Unable(TaskFault):
    """This worker lacks the engine or the model of the task; another may have it. `code` becomes the task's `error_code` if none has."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # of this fault, not of its class


class Unreadable(InternalFault):
    """This worker cannot read the task; a worker of another version may be able to. It counts as a try: the task may be damaged."""


def outcome_of(error: Exception, task: Task, spool: Path, own: Path | None = None, *, rendered: bool = False) -> Outcome:
    """Return the outcome of a run that raised `error`. `spool` is the worker's folder, `own` the run's folder in it, if it has one.

    `rendered`: whether another run would have to render again what this one has rendered.
    """
    match error:
        case RunLost():
            return Lost()
        case ChildDied():
            budget, limit = (Budget.DRAIN, 0) if error.blameless else (Budget.DEATHS, DEATHS_LIMIT)
            delay_ms = 0 if error.blameless else retry_delay_ms(task.attempt)
            return Requeued(error.message, WorkerLost.code, budget, limit, delay_ms, error.exit_code, error.stage)
        case HostFault():
            return _host_at_fault(error.message, task, device=error.device)
        case Unable():
            log.warning("task_unsupported", problem=error.message)
            return Requeued(error.message, error.code, delay_ms=retry_delay_ms(task.attempt))  # perhaps no worker can run it yet
        case Unreadable():
            return unreadable(error.message, task)
    if (problem := _host_problem(error, spool, own)) is not None:
        log.warning("host_fault", problem=str(error))
        return _host_at_fault(problem, task)
    match error:
        case TaskFault(retryable=False):
            return Failed(error.message, error.code)
        case TaskFault():
            return Requeued(error.message, error.code, Budget.TRIES, TRIES_LIMIT, retry_delay_ms(task.attempt))
    log.error("run_broke", exc_info=error)
    if rendered:
        return Failed(BROKE, InternalFault.code)
    return Requeued(BROKE, InternalFault.code, Budget.TRIES, TRIES_LIMIT, retry_delay_ms(task.attempt))


def unreadable(problem: str, task: Task) -> Requeued:
    """Return the outcome for a task that this worker cannot read."""
    return Requeued(problem, InternalFault.code, Budget.TRIES, UNREADABLE_LIMIT, unreadable_delay_ms(task.attempt))


def _host_at_fault(problem: str, task: Task, *, device: bool = False) -> Requeued:
    """Return the outcome for a problem of this machine: another worker gets the task, at once if the run does not count as a try."""
    error, blamed = f"the worker cannot work: {problem}", "" if device else problem
    if task.attempt < UNCOUNTED:
        return Requeued(error, InternalFault.code, host_problem=blamed)
    return Requeued(error, InternalFault.code, Budget.TRIES, TRIES_LIMIT, retry_delay_ms(task.attempt), host_problem=blamed)


def _host_problem(error: Exception, spool: Path, own: Path | None) -> str | None:
    """Return the problem of this machine if the error shows one or the run's folder is gone, else None."""
    if isinstance(error, KeyTaken):
        return None
    if own is not None and not own.is_dir():
        return PLACE[errno.ENOENT]
    cause = error.__cause__ if isinstance(error, StorageFault) else None
    if isinstance(cause, OSError) and cause.errno in (errno.EIO, errno.ESTALE) and cause.filename and not inside(cause.filename, spool):
        return None  # the disk of the storage, not of the worker
    return host_problem(error, spool)
