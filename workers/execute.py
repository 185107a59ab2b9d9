"""Run one task from claim to commit: fetch its inputs, let the engine render, store the files, commit the result.

The outcome of a run is a value (workers/outcome.py). It is reported to the store once, by one verb, which is repeated while Redis is away.
A failed upload does not cause another rendering: the run holds its lease, frees its slot and retries the upload. If its worker dies,
another worker of this host finds the files.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any, Final

import msgspec
from redis.exceptions import ResponseError

from movieq import logs
from movieq.backoff import Backoff
from movieq.errors import EngineUnavailable, InternalFault, KeyTaken, ModelUnavailable, RunLost, StorageFault, WorkerLost, causes
from movieq.models import choice
from movieq.models.table import ANIMATIC
from movieq.tasks import params
from movieq.tasks.entities import Task
from movieq.tasks.params import Params
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import StoredMedia, StoredResult
from movieq.tasks.states import TaskStatus, TaskType
from workers.concurrency import beside, uninterrupted
from workers.eta import UPLOAD_AT
from workers.faults import HOST, PLACE, FinishFault, HostFault, public_message, without_paths
from workers.finished import Finished
from workers.inputs import fetch_inputs
from workers.outcome import Completed, Failed, Lost, Outcome, Requeued, Unable, Unreadable, outcome_of, unreadable
from workers.protocol import Produced, Run
from workers.provenance import signed
from workers.reporter import reporting
from workers.retry import insist, retry_delay_ms
from workers.running import Parts, Running, Stop
from workers.slots import LEND_S, Group
from workers.supervisor import Child

LENDING_RUNS: Final = 2
"""Attempts of a task in which its run may lend its slot. In a later one it holds the slot, so that it gets the device in the end."""
OUT: Final = "out"
"""The folder in a run's spool that its engine writes files to."""
UPLOAD_S: Final = 1.0, 60.0
"""Shortest and longest wait before a failed upload is tried again, in seconds."""

log = logs.get()


async def run_task(ctx: dict[str, Any], task_data: dict[str, Any]) -> None:
    """Run a task and report its outcome (the arq function of every task type).

    `ctx` holds `parts` and `running`.
    """
    parts: Parts = ctx["parts"]
    running: Running = ctx["running"]
    with _started(running):
        log.info(
            "claim", task_type=running.task.task_type, attempt=running.task.attempt, child=running.child.name if running.child else None
        )
        try:
            outcome = await _outcome(parts, running, task_data)
            await _report(parts, running, outcome)
        finally:
            running.free_slot()  # before the files are removed: a disk that hangs must not hold the device
            if running.spool is not None:
                await asyncio.to_thread(shutil.rmtree, running.spool, ignore_errors=True)


async def refuse_task(ctx: dict[str, Any], problem: str, *, damaged: bool = False) -> None:
    """Requeue a task that this worker cannot run; called in place of `run_task`.

    The run counts as a try only if the parameters are `damaged`.
    """
    running: Running = ctx["running"]
    task = running.task
    requeued = Requeued(problem, InternalFault.code, delay_ms=retry_delay_ms(task.attempt))  # perhaps no worker can run it yet
    with _started(running):
        await _report(ctx["parts"], running, unreadable(problem, task) if damaged else requeued)


@contextmanager
def _started(running: Running) -> Iterator[None]:
    """Mark the run as started and bind its task to the log lines of the block; free its slot in the end."""
    running.started = True
    try:
        with logs.bound(task_id=running.task.task_id, project_id=running.task.project_id):
            yield
    finally:
        running.free_slot()


async def _outcome(parts: Parts, running: Running, task_data: dict[str, Any]) -> Outcome:
    """Run the task and return its outcome, also if the run is cancelled: `_report` lets the cancel go on."""
    try:
        if running.stop_reason is not None:
            return _stopped(running.stop_reason)
        finished = running.finished
        if finished is None:
            check_able(parts, running.task)
            running.spool = Path(tempfile.mkdtemp(prefix=f"{running.task.task_id}-", dir=parts.spool))
            # noted at once: from here on a drain lets the run finish, since only its upload is left
            finished = running.finished = await _rendered(parts, running, _parsed(running.task, task_data), task_data, running.spool)
        return Completed(await _stored(parts, running, finished), finished)
    except asyncio.CancelledError:
        return _stopped(running.stop_reason)
    except Exception as error:
        return _outcome_of(parts, running, error)


def _outcome_of(parts: Parts, running: Running, error: Exception) -> Outcome:
    saved = running.finished is not None and running.finished.folder is not None
    return outcome_of(error, running.task, parts.spool, running.spool, rendered=running.rendered_ms > 0 and not saved)


def _stopped(reason: Stop | None) -> Outcome:
    """Return the outcome of a stopped run. Without a reason it was its worker that was stopped."""
    if reason is not None and not reason.may_write:
        return Lost(reason)
    overdue = reason is Stop.OVERDUE
    return Requeued("its worker was busy for longer than expected" if overdue else "its worker was stopped", WorkerLost.code)


# ── Rendering ──


def check_able(parts: Parts, task: Task) -> None:
    """Raise Unable if this worker lacks the engine or the model of the task."""
    if task.engine not in REGISTRY.engines:
        raise Unable(f"this worker has no engine {task.engine}: the task waits for a worker that has it", EngineUnavailable.code)
    if task.engine != ANIMATIC and task.model not in parts.models:
        raise Unable(f"this worker has no model {task.model}: the task waits for a worker that has it", ModelUnavailable.code)


def _parsed(task: Task, task_data: Any) -> Params:
    """Return the parameters of the task. Raises Unable if the task type is unknown, Unreadable if the parameters cannot be read."""
    if (spec := REGISTRY.tasks.get(TaskType(task.task_type))) is None:
        raise Unable(f"this worker has no task type {task.task_type}: the task waits for a worker that has it", EngineUnavailable.code)
    try:
        return params.convert(spec.params, task_data)
    except (msgspec.ValidationError, AttributeError) as error:
        place = str(error).partition(" - at `$")[2].removesuffix("`")
        log.warning("params_unread", problem=str(error))
        raise Unreadable(f"this worker cannot read task_data{place}: another version of movieq accepted it") from None


async def _rendered(parts: Parts, running: Running, parsed: Params, task_data: dict[str, Any], spool: Path) -> Finished:
    """Render the task and free its slot; return the files, signed and saved where they outlive this worker."""
    assert running.child is not None
    assert running.group is not None
    async with reporting(parts.store, running) as reporter:
        reporter.report("fetching_inputs" if parsed.references else "starting", stage="fetch")
        async with beside(lend_slot=_lend_slot(running.task, running.child, running.group)):
            inputs = await _inputs(parts, running.task, parsed, spool)
        (spool / OUT).mkdir()
        request = _request(parts, running, parsed, task_data, inputs, spool)
        done = await running.child.run(request, reporter.on_message, running.group)
    running.rendered_ms = max(1, int((time.monotonic() - running.started_s - running.group.lent_s) * 1000))
    running.use_gpu(0.0)
    running.free_slot()
    if (spool / OUT).is_dir() and not all(Path(produced.path).is_file() for produced in done.files):
        raise FinishFault("the engine names a file that it has not written")
    done = await signed(parts.provenance, running.task, parsed.description, done)
    if parts.finished is None:
        return Finished(done)
    return await asyncio.to_thread(parts.finished.save, running.task.task_id, running.run, spool / OUT, done)


async def _lend_slot(task: Task, child: Child, group: Group) -> None:
    """Lend the slot to other tasks as soon as the inputs of the task have taken long."""
    while task.attempt <= LENDING_RUNS:
        await asyncio.sleep(LEND_S)
        if child.slots.lend(group):
            return


async def _inputs(parts: Parts, task: Task, parsed: Params, spool: Path) -> dict[str, str]:
    try:
        return await fetch_inputs(parts, task.project_id, task.task_id, parsed, spool)
    except StorageFault as fault:
        log.warning("input_not_read", problem=fault.message)  # the message names folders of this machine
        raise StorageFault("an input cannot be read from the storage, or written by the worker, at the moment") from fault.__cause__


def _request(parts: Parts, running: Running, parsed: Params, task_data: dict[str, Any], inputs: dict[str, str], spool: Path) -> Run:
    task = running.task
    return Run(
        run=running.run,
        task_id=task.task_id,
        project_id=task.project_id,
        task_type=task.task_type,
        engine=task.engine,
        model=task.model,
        params=task_data,
        metadata=task.metadata,
        inputs=inputs,
        seed=secrets.randbits(32) if parsed.seed is None else parsed.seed,
        out_dir=str(spool / OUT),
        entry=parts.models.get(task.model),
        sound=choice.sound(parts.models),
        file_tags=parts.provenance.tags,
    )


# ── Storing ──


async def _stored(parts: Parts, running: Running, finished: Finished) -> StoredResult:
    """Store the files and return the result. Failed uploads are retried; raises faults that only another run can cure."""
    task, done = running.task, finished.done
    spec = REGISTRY.tasks[TaskType(task.task_type)]
    prefix = f"projects/{task.project_id}/{spec.folder}/{task.task_id}/{running.run}"
    await insist(
        lambda: parts.store.report(
            task.task_id,
            running.run,
            UPLOAD_AT,
            "uploading_result",
            stage="upload",
            remaining_ms=running.eta.remaining_ms(),
            prefix=prefix,
            gpu=running.gpu,
            host=socket.gethostname() if finished.folder else "",
            rendered_ms=running.rendered_ms,
        )
    )  # before the first byte, so that the files can be found and deleted however the run ends
    running.prefix = prefix
    try:
        stored = [(produced, *await _put(parts, running, finished, prefix, produced)) for produced in done.files]
    finally:
        if parts.host:
            parts.host.waits_no_more(running.run)
    posters = {produced.take: key for produced, key, _ in stored if produced.role == "poster"}
    media = [
        StoredMedia(
            key=key,
            media_type=spec.media_type,
            content_type=produced.content_type,
            size_bytes=size_bytes,
            poster_key=posters.get(produced.take),
            width=produced.width,
            height=produced.height,
            duration_s=produced.duration_s,
            take=produced.take,
            seed=produced.seed,
        )
        for produced, key, size_bytes in stored
        if produced.role == "output"
    ]
    if not media:
        raise InternalFault("the engine returned no file with the role output")
    return StoredResult(media, {**done.metadata, "file_size": media[0].size_bytes, "model": task.model, "engine": task.engine})


async def _put(parts: Parts, running: Running, finished: Finished, prefix: str, produced: Produced) -> tuple[str, int]:
    """Store a file; return its storage key and its size in bytes. Raises faults that another try cannot cure."""
    path = Path(produced.path)
    take = f"-{produced.take}" if produced.take > 1 else ""
    key = f"{prefix}/{'poster' if produced.role == 'poster' else 'output'}{take}{path.suffix}"
    backoff = Backoff(*UPLOAD_S)
    while True:
        try:
            return key, await parts.storage.put(key, path, produced.content_type)
        except StorageFault as fault:
            _raise_where_final(fault, path)
            again_in_s = backoff.next_s()
            log.log(WARNING if fault.passes else ERROR, "upload_failed", problem=fault.message, again_in_s=again_in_s)
            if parts.host:
                why = public_message(fault.__cause__) if isinstance(fault.__cause__, OSError) else ""
                parts.host.refused(running.run, why or without_paths(fault.message, *parts.places))
            if parts.finished:
                parts.finished.touch(finished)
        await asyncio.sleep(again_in_s)


def _raise_where_final(fault: StorageFault, path: Path) -> None:
    """Raise if another try cannot help: the storage key is taken, the file is gone, or this machine cannot open it."""
    if isinstance(fault, KeyTaken):
        raise fault
    if any(isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE) for cause in causes(fault)):
        raise HostFault(HOST[errno.EMFILE]) from fault
    if not path.exists():
        log.error("finished_file_gone", path=str(path))
        if not path.parent.is_dir():
            raise HostFault(PLACE[errno.ENOENT]) from None
        raise InternalFault("a rendered file disappeared before it was stored") from None


# ── Reporting ──


async def _report(parts: Parts, running: Running, outcome: Outcome) -> None:
    """Report the outcome. A cancel that came before or meanwhile goes on once the store has answered or the worker abandons the run."""
    await uninterrupted(_reported(parts, running, outcome), unless=lambda: running.abandoned)
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError


async def _reported(parts: Parts, running: Running, outcome: Outcome) -> None:
    """Write the outcome; if that fails, write the outcome that follows from the failure.

    A fault of a script is only logged: the run has ended and its lease is not renewed, so its task is requeued.
    """
    try:
        await _write(parts, running, outcome)
    except RunLost:
        await _reported(parts, running, Lost())
    except Exception as error:
        if isinstance(outcome, Completed):  # the result cannot be committed
            await _reported(parts, running, _outcome_of(parts, running, error))
        elif isinstance(error, ResponseError):
            log.exception("script_failed", during="report")
        else:
            raise


async def _write(parts: Parts, running: Running, outcome: Outcome) -> None:
    """Write the outcome to the store, and log it. Raises RunLost if the run no longer holds its task."""
    store, task, run = parts.store, running.task, running.run
    match outcome:
        case Completed():
            await insist(lambda: store.complete(task.task_id, run, outcome.result, parts.cms))
            log.info("complete", attempt=task.attempt, seconds=round(time.monotonic() - running.started_s, 3))
            if parts.finished:
                parts.finished.touch(outcome.finished)
            if parts.host and running.spool:
                parts.host.proven()
        case Failed():
            error = without_paths(outcome.error, *parts.places)
            await insist(lambda: store.fail(task.task_id, run, error, outcome.code))
            log.info("fail", error_code=outcome.code, error=error)
        case Requeued():
            if parts.host and outcome.host_problem:
                parts.host.blame(outcome.host_problem)
            await _requeue(parts, running, outcome)
        case Lost():
            if outcome.reason:
                log.info("run_stopped", reason=outcome.reason, attempt=task.attempt)
            else:
                log.info("run_lost", attempt=task.attempt)
            if (prefix := running.prefix) is not None:
                # its files must be deleted, also those stored after another run got the task: this process may have been frozen for hours
                await insist(lambda: parts.files.add_orphan(prefix))


async def _requeue(parts: Parts, running: Running, outcome: Requeued) -> None:
    error = without_paths(outcome.error, *parts.places)
    status = await insist(
        lambda: parts.store.requeue(
            running.task.task_id,
            running.run,
            outcome.budget,
            outcome.limit,
            outcome.delay_ms,
            error,
            outcome.code,
            exit_code=outcome.exit_code,
            stage=outcome.stage,
        )
    )
    log.warning(
        "requeue" if status is TaskStatus.QUEUED else "fail",
        budget=outcome.budget,
        error_code=outcome.code,
        error=error,
        delay_ms=outcome.delay_ms,
    )
