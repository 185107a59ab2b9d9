"""One task from claim to commit: fetch its inputs, run the engine, store the files, commit the result.

Every outcome is one verb of the store. Verbs are insisted on while Redis is away: they can be said twice. A failed upload does not cost the
rendering again: the run keeps its lease, frees its slot and goes on trying; where its worker dies, another of its host finds the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from redis.exceptions import ResponseError

from movieq import logs
from movieq.errors import (
    EngineUnavailable,
    InternalFault,
    KeyTaken,
    ModelUnavailable,
    RunLost,
    StorageFault,
    TaskFault,
    WorkerLost,
    causes,
)
from movieq.models import table as models
from movieq.queue.files import Files
from movieq.queue.store import DEATHS_LIMIT, TRIES_LIMIT, Counts
from movieq.tasks import params
from movieq.tasks.entities import Task
from movieq.tasks.params import Params
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import StoredMedia, StoredResult
from movieq.tasks.states import TaskStatus, TaskType
from workers.eta import UPLOAD_AT
from workers.faults import HOST, PLACE, HostFault, host_problem, inside, said, without_paths
from workers.finished import Made
from workers.inputs import fetch_inputs
from workers.protocol import Done, Produced, Run
from workers.provenance import signed
from workers.reporter import Reporter
from workers.retry import RETRY_BASE_S, RETRY_MOST_S, insist, retry_delay_ms, unreadable_delay_ms
from workers.running import Parts, Running
from workers.supervisor import ChildDied

UNCOUNTED: Final = 10
"""From this attempt on a fault of the machine counts against the task: it may be the task that causes it."""
UNREADABLE_LIMIT: Final = 4
"""So many tries fail a task that no worker can read: with their waits a newer one has minutes to come."""
OUT: Final = "out"
"""The folder of a run's spool that its engine makes files in."""

T = TypeVar("T")
log = logs.get()


async def run_task(ctx: dict[str, Any], task_data: dict[str, Any]) -> None:
    """The arq function of every task type.

    `ctx` holds `parts` and `running`. When it returns the task is committed, failed or given back.
    """
    parts: Parts = ctx["parts"]
    running: Running = ctx["running"]
    task = running.task
    running.started = True
    with logs.bound(task_id=task.task_id, project_id=task.project_id):
        log.info("claim", task_type=task.task_type, attempt=task.attempt, child=running.child.name if running.child else None)
        spool: Path | None = None
        try:
            if running.reason is not None:
                raise asyncio.CancelledError
            if running.made is None:
                check_able(parts, task)
                spool = Path(tempfile.mkdtemp(prefix=f"{task.task_id}-", dir=parts.spool))
            await _make_and_commit(parts, running, task_data, spool or parts.spool)
            log.info("complete", attempt=task.attempt, seconds=round(time.monotonic() - running.begun_s, 3))
            if parts.host and spool:
                parts.host.proven()
        except RunLost:
            log.info("run_lost", attempt=task.attempt)
            await _disown(parts.files, running)
        except ChildDied as death:
            counts, limit = (Counts.DRAIN, 0) if death.blameless else (Counts.DEATHS, DEATHS_LIMIT)
            await _give_back(parts, running, counts, limit, death.message, WorkerLost.code, death)
        except HostFault as fault:
            await _blame_host(parts, running, fault)
        except Unable as unable:
            log.warning("unable", problem=unable.message)
            await _give_back(parts, running, Counts.DRAIN, 0, unable.message, unable.code, delay_ms=retry_delay_ms(task.attempt))
        except Unreadable as unreadable:
            await _give_back_unread(parts, running, unreadable.message)
        except TaskFault as fault:
            if (problem := _host_problem(parts, fault, spool)) is not None:
                await _blame_host(parts, running, HostFault(problem))
            elif fault.retryable:
                await _give_back(parts, running, Counts.TRIES, TRIES_LIMIT, fault.message, fault.code)
            else:
                await _fail(parts, running, fault.message, fault.code)
        except asyncio.CancelledError:
            if running.reason in ("cancelled", "lost"):
                log.info("run_stopped", reason=running.reason, attempt=task.attempt)
                await _disown(parts.files, running)
            else:
                why = "its worker was busy for longer than it looked" if running.reason == "late" else "its worker was stopped"
                await _give_back(parts, running, Counts.DRAIN, 0, why, WorkerLost.code)
                if running.reason is None:  # not the run but the worker is cancelled
                    raise
        except Exception as error:
            if (problem := _host_problem(parts, error, spool)) is not None:
                log.warning("host_fault", problem=str(error))
                await _blame_host(parts, running, HostFault(problem))
            else:
                log.exception("run_broke")
                await _give_back(parts, running, Counts.TRIES, TRIES_LIMIT, BROKE, InternalFault.code)
        finally:
            running.free_slot()
            if spool is not None:
                await asyncio.to_thread(shutil.rmtree, spool, ignore_errors=True)


BROKE: Final = "a fault of the worker: its log says more"


class Unable(TaskFault):
    """This worker lacks what the task needs; another may have it. `code` is that of the fault if none has."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # of this fault, not of its class


class Unreadable(InternalFault):
    """This worker cannot read the task; one of another version may be able to. It counts as a try: the task may be damaged."""


def check_able(parts: Parts, task: Task) -> None:
    """Raises Unable where this worker has no such engine or model."""
    if task.engine not in REGISTRY.engines:
        raise Unable(f"this worker has no engine {task.engine}: the task waits for one that has", EngineUnavailable.code)
    if task.engine != models.ANIMATIC and task.model not in parts.models:
        raise Unable(f"this worker has no model {task.model}: the task waits for one that has", ModelUnavailable.code)


async def refuse_task(ctx: dict[str, Any], problem: str, *, unreadable: bool = False) -> None:
    """Give a task for which this worker has no function back, uncounted; one whose parameters are `unreadable` as a try.

    Called in place of `run_task`.
    """
    parts: Parts = ctx["parts"]
    running: Running = ctx["running"]
    running.started = True
    try:
        with logs.bound(task_id=running.task.task_id, project_id=running.task.project_id):
            if unreadable:
                await _give_back_unread(parts, running, problem)
            else:
                delay_ms = retry_delay_ms(running.task.attempt)  # perhaps no worker has it yet
                await _give_back(parts, running, Counts.DRAIN, 0, problem, InternalFault.code, delay_ms=delay_ms)
    finally:
        running.free_slot()


def _host_problem(parts: Parts, error: Exception, spool: Path | None) -> str | None:
    """Return what is wrong with this machine, where the error says so, or the run's folder is gone."""
    if isinstance(error, KeyTaken):
        return None
    if spool is not None and not spool.is_dir():
        return PLACE[errno.ENOENT]
    cause = error.__cause__ if isinstance(error, StorageFault) else None
    if (
        isinstance(cause, OSError)
        and cause.errno in (errno.EIO, errno.ESTALE)
        and cause.filename
        and not inside(cause.filename, parts.spool)
    ):
        return None  # the storage's disk, not the worker's
    return host_problem(error, parts.spool)


async def _blame_host(parts: Parts, running: Running, fault: HostFault) -> None:
    """Give the task to another worker at once; this one takes no more before it was examined."""
    if parts.host and not fault.device:
        parts.host.blame(fault.message)
    counted = running.task.attempt >= UNCOUNTED
    counts, limit = (Counts.TRIES, TRIES_LIMIT) if counted else (Counts.DRAIN, 0)
    await _give_back(parts, running, counts, limit, f"the worker cannot work: {fault.message}", InternalFault.code)


async def _make_and_commit(parts: Parts, running: Running, task_data: dict[str, Any], spool: Path) -> None:
    made_ms = 0
    if running.made is None:
        parsed = _parsed(running.task, task_data)
        done = await _make(parts, running, parsed, task_data, spool)
        made_ms = max(1, int((time.monotonic() - running.begun_s) * 1000))
        running.take_gpu(0.0)
        running.free_slot()
        done = await signed(parts.provenance, running.task, parsed.description, done)
        task_id, run, kept = running.task.task_id, running.run, parts.kept
        running.made = await asyncio.to_thread(kept.keep, task_id, run, spool / OUT, done) if kept else Made(done)
    stored = await _store(parts, running, running.made, made_ms)
    await _ended(running, lambda: parts.store.complete(running.task.task_id, running.run, stored, parts.cms))
    if parts.kept:
        parts.kept.touch(running.made)


def _parsed(task: Task, task_data: Any) -> Params:
    """Return the parameters of the task. Raises Unable, or Unreadable where a worker of another version may be able to read them."""
    if (spec := REGISTRY.tasks.get(TaskType(task.task_type))) is None:
        raise Unable(f"this worker does not know {task.task_type}: the task waits for one that does", EngineUnavailable.code)
    try:
        return params.convert(spec.params, task_data)
    except (msgspec.ValidationError, AttributeError) as error:
        place = str(error).partition(" - at `$")[2].removesuffix("`")
        log.warning("params_unread", problem=str(error))
        raise Unreadable(f"this worker cannot read task_data{place}: it was accepted by another version") from None


async def _make(parts: Parts, running: Running, parsed: Params, task_data: dict[str, Any], spool: Path) -> Done:
    assert running.child is not None
    assert running.group is not None
    task = running.task
    reporter = Reporter(parts.store, running)
    async with reporter:
        reporter.say("fetching_inputs" if parsed.references else "starting", stage="fetch")
        try:
            inputs = await fetch_inputs(parts, task.project_id, task.task_id, parsed, spool)
        except StorageFault as fault:
            log.warning("input_not_read", problem=fault.message)  # the message names folders of this machine
            raise StorageFault("an input cannot be read from the storage, or kept by the worker, at the moment") from fault.__cause__
        out_dir = spool / OUT
        out_dir.mkdir()
        request = Run(
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
            out_dir=str(out_dir),
            entry=parts.models.get(task.model),
            sound=models.sound(parts.models),
            file_tags=parts.provenance.tags,
        )
        return await running.child.run(request, reporter.on_message, running.group)


async def _store(parts: Parts, running: Running, made: Made, made_ms: int) -> StoredResult:
    """The files are in the storage. Goes on trying for as long as the run holds its lease. Raises what only another run can mend."""
    task, done = running.task, made.done
    spec = REGISTRY.tasks[TaskType(task.task_type)]
    prefix = f"projects/{task.project_id}/{spec.folder}/{task.task_id}/{running.run}"
    await insist(
        lambda: parts.store.report(
            task.task_id,
            running.run,
            UPLOAD_AT,
            "uploading_result",
            stage="upload",
            remaining_ms=int(running.pace.remaining_s() * 1000),
            prefix=prefix,
            gpu=running.gpu,
            host=socket.gethostname() if made.folder else "",
            made_ms=made_ms,
        )
    )  # before the first byte: whatever becomes of the run, its files are known
    running.prefix = prefix
    try:
        keys = {produced.role: await _put(parts, running, made, prefix, produced) for produced in done.files}
    finally:
        if parts.host:
            parts.host.waits_no_more(running.run)
    output = next(produced for produced in done.files if produced.role == "output")
    key, size_bytes = keys["output"]
    return StoredResult(
        [_stored(output, key, size_bytes, spec.media_type, keys.get("poster"))],
        {**done.metadata, "file_size": size_bytes, "model": task.model, "engine": task.engine},
    )


async def _put(parts: Parts, running: Running, made: Made, prefix: str, produced: Produced) -> tuple[str, int]:
    """Return the key that a file is stored under, and its size in bytes. Raises what another try cannot mend."""
    key = f"{prefix}/{'poster' if produced.role == 'poster' else 'output'}{Path(produced.path).suffix}"
    wait_s = RETRY_BASE_S / 2
    while True:
        try:
            return key, await parts.storage.put(key, Path(produced.path), produced.content_type)
        except StorageFault as fault:
            if isinstance(fault, KeyTaken):
                raise
            if any(isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE) for cause in causes(fault)):
                raise HostFault(HOST[errno.EMFILE]) from fault
            if not Path(produced.path).exists():
                log.error("made_is_gone", path=produced.path)
                if not Path(produced.path).parent.is_dir():
                    raise HostFault(PLACE[errno.ENOENT]) from None
                raise InternalFault("a file that was made is gone before it was stored") from None
            log.log(WARNING if fault.passes else ERROR, "upload_failed", problem=fault.message, again_in_s=wait_s)
            if parts.host:
                why = said(fault.__cause__) if isinstance(fault.__cause__, OSError) else ""
                parts.host.refused(running.run, why or without_paths(fault.message, *parts.places))
            if parts.kept:
                parts.kept.touch(made)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, RETRY_MOST_S)


def _stored(output: Produced, key: str, size_bytes: int, media_type: str, poster: tuple[str, int] | None) -> StoredMedia:
    return StoredMedia(
        key=key,
        media_type=media_type,
        content_type=output.content_type,
        size_bytes=size_bytes,
        poster_key=poster[0] if poster else None,
        width=output.width,
        height=output.height,
        duration_s=output.duration_s,
    )


@contextlib.contextmanager
def _the_last_word() -> Iterator[None]:
    """The run is over whatever its last verb meets: it is named in no renewal, so that its task is handed back."""
    try:
        yield
    except RunLost:
        log.info("run_lost")
    except ResponseError:
        log.exception("script_failed")


async def _disown(files: Files, running: Running) -> None:
    """What the run stored will be deleted, also what came after the orphans of its end were: it may have stood still for hours."""
    if running.prefix is not None:
        prefix = running.prefix
        with _the_last_word():
            await _ended(running, lambda: files.add_orphan(prefix))


async def _fail(parts: Parts, running: Running, error: str, code: str) -> None:
    error = without_paths(error, *parts.places)
    with _the_last_word():
        await _ended(running, lambda: parts.store.fail(running.task.task_id, running.run, error, code))
        log.info("fail", error_code=code, error=error)


async def _give_back(
    parts: Parts,
    running: Running,
    counts: Counts,
    limit: int,
    error: str,
    code: str,
    death: ChildDied | None = None,
    delay_ms: int | None = None,
) -> None:
    if delay_ms is None:
        delay_ms = 0 if counts is Counts.DRAIN else retry_delay_ms(running.task.attempt)
    error = without_paths(error, *parts.places)
    status: TaskStatus | None = None

    async def say() -> None:
        nonlocal status
        status = await parts.store.requeue(
            running.task.task_id,
            running.run,
            counts,
            limit,
            delay_ms,
            error,
            code,
            exit_code=death.exit_code if death else None,
            stage=death.stage if death else None,
        )

    with _the_last_word():
        await _ended(running, say)
        log.warning("requeue" if status is TaskStatus.QUEUED else "fail", counts=counts, error_code=code, error=error, delay_ms=delay_ms)


async def _give_back_unread(parts: Parts, running: Running, error: str) -> None:
    delay_ms = unreadable_delay_ms(running.task.attempt)
    await _give_back(parts, running, Counts.TRIES, UNREADABLE_LIMIT, error, InternalFault.code, delay_ms=delay_ms)


async def _ended(running: Running, verb: Callable[[], Awaitable[None]]) -> None:
    """The ending verb is said and answered; cancels that come meanwhile wait for that, unless the worker abandons the run."""
    saying = asyncio.ensure_future(insist(verb))
    while not saying.done():
        try:
            await asyncio.wait({saying})
        except asyncio.CancelledError:
            if running.abandoned:
                saying.cancel()
                raise
    saying.result()
