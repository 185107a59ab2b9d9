"""One task from claim to commit: fetch its inputs, run the engine, store the files, commit the result.

Every outcome is one verb of the store. Verbs are insisted on while Redis is away: they can be said twice. A failed upload does not cost the
rendering again: the run keeps its lease, frees its slot and goes on trying; where its worker dies, another of its host finds the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import secrets
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from redis.exceptions import RedisError, ResponseError

from movieq import fetch, logs, models, params
from movieq.contracts import ProjectId, RunToken, StoredMedia, StoredResult, Task, TaskId, TaskStatus
from movieq.errors import (
    EngineUnavailable,
    InputUnavailable,
    InternalFault,
    KeyTaken,
    ModelUnavailable,
    RunLost,
    StorageFault,
    TaskFault,
    WorkerLost,
    causes,
)
from movieq.fetch import Fetcher
from movieq.models import Model
from movieq.params import AudioParams, Params, TaskType
from movieq.storage import Storage
from movieq.store import DEATHS_LIMIT, TRIES_LIMIT, Claimed, Counts, Store, is_fault, log_failure
from workers.engine import Child, ChildDied, Group, Progress
from workers.faults import HOST, PLACE, HostFault, host_problem, inside, said, without_paths
from workers.host import Host, cancel_all
from workers.kept import Kept, Made
from workers.pace import UPLOAD_AT, Pace
from workers.protocol import Done, Free, Note, Plan, Preview, Produced, Run, Step
from workers.provenance import Provenance, signed

REPORT_INTERVAL_S: Final = 0.1
PREVIEW_INTERVAL_S: Final = 0.5
PREVIEW_BYTES: Final = 10_000
WATCH_INTERVAL_S: Final = 2.0
"""Between two looks whether anybody watches the task."""
RETRY_BASE_S: Final = 2.0
RETRY_MOST_S: Final = 60.0
UNCOUNTED: Final = 10
"""From this attempt on a fault of the machine counts against the task: it may be the task that causes it."""
UNREADABLE_LIMIT: Final = 4
"""So many tries fail a task that no worker can read: with their waits a newer one has minutes to come."""
UNREADABLE_S: Final = 30.0, 600.0
"""Shortest and longest wait before a task that this version cannot read is tried again."""
OUT: Final = "out"
"""The folder of a run's spool that its engine makes files in."""

T = TypeVar("T")
log = logs.get()


class Parts(msgspec.Struct, frozen=True):
    """What a run works with."""

    store: Store
    storage: Storage
    fetcher: Fetcher
    spool: Path
    models: dict[str, Model] = {}
    provenance: Provenance = Provenance()
    kept: Kept | None = None
    """Where finished files outlive this worker; None where they need not."""
    cms: str = ""
    """Address of the collection that results go into; empty where there is no CMS."""
    host: Host | None = None
    """Where faults of this machine are noted."""
    places: tuple[Path, ...] = ()
    """Folders that no error for clients may name."""


class Running:
    """A run in hand: of a child, with a group there. `stop` notes the reason before anything is cancelled.

    Of a task whose files an earlier run has made there is only their storing left: it has `made` in place of a child.
    """

    def __init__(self, claimed: Claimed, child: Child | None = None, group: Group | None = None, made: Made | None = None) -> None:
        self.claimed = claimed
        self.task: Task = claimed.task
        self.run: RunToken = claimed.run
        self.child = child
        self.group = group
        """Those that are made with it at once, and its place on the child's device."""
        self.made = made
        self.asyncio_task: asyncio.Task[None] | None = None
        self.reason: str | None = None
        self.abandoned = False
        self.started = False
        self.prefix: str | None = None
        """Where in the storage its files are, once there may be some."""
        self.begun_s = time.monotonic()
        self.pace = Pace(0.0 if made else self.task.estimate_ms / 1000)
        self._gpu: tuple[float, float, float] | None = None
        """What it had of a GPU, in ms, until when (s), and how much of one it has since."""
        if group is not None:
            group.remaining_s = self.pace.remaining_s

    def stop(self, reason: str) -> None:
        """The run ends soon: "cancelled" and "lost" write nothing, "drain" and "late" give the task back uncounted."""
        if self.reason is None and self.asyncio_task is not None:
            self.reason = reason
            if self.started:  # a task that is cancelled before its first step never comes to give anything back
                self.asyncio_task.cancel()

    def abandon(self) -> None:
        """The run ends now, even if Redis cannot be told: its lease will be over."""
        self.abandoned = True
        self.stop("drain")
        if self.asyncio_task is not None and self.started:
            self.asyncio_task.cancel()

    def take_gpu(self, share: float) -> None:
        """From now on the run has this share of its child's GPU; nothing is counted on a CPU."""
        if self.child is not None and self.child.device != "cpu":
            spent_ms, _ = self.gpu or (0.0, 0.0)
            self._gpu = spent_ms, time.monotonic(), share

    @property
    def gpu(self) -> tuple[float, float] | None:
        """What the run has had of a GPU so far, in ms, and the share of one that it has; None where it had none."""
        if self._gpu is None:
            return None
        spent_ms, since_s, share = self._gpu
        return spent_ms + (time.monotonic() - since_s) * 1000 * share, share

    def free_slot(self) -> None:
        """The device can be another's, where those of its group have left too."""
        if self.child is not None and self.group is not None:
            self.child.leave(self.group, self.run)


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
            await _disown(parts.store, running)
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
                await _disown(parts.store, running)
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
    if task.engine not in models.ENGINES:
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
    if task.task_type not in params.PARAMS:
        raise Unable(f"this worker does not know {task.task_type}: the task waits for one that does", EngineUnavailable.code)
    try:
        return params.convert(TaskType(task.task_type), task_data)
    except (msgspec.ValidationError, AttributeError) as error:
        place = str(error).partition(" - at `$")[2].removesuffix("`")
        log.warning("params_unread", problem=str(error))
        raise Unreadable(f"this worker cannot read task_data{place}: it was accepted by another version") from None


async def _make(parts: Parts, running: Running, parsed: Params, task_data: dict[str, Any], spool: Path) -> Done:
    assert running.child is not None
    assert running.group is not None
    task = running.task
    reporter = _Reporter(parts.store, running)
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


async def fetch_inputs(parts: Parts, project_id: ProjectId, task_id: TaskId, parsed: Params, spool: Path) -> dict[str, str]:
    """Every reference of the parameters as a local file, each fetched once. Raises InputUnavailable, InvalidInput naming the reference."""
    kinds = (fetch.Kind.AUDIO,) if isinstance(parsed, AudioParams) else (fetch.Kind.IMAGE,)
    found: dict[str, str] = {}
    for number, reference in enumerate(parsed.references):
        dest = spool / f"input{number}"
        scheme, _, rest = reference.partition(":")
        if scheme == "upload":
            await _uploaded(parts, project_id, reference, rest, dest)
        elif scheme == "task":
            await _made_before(parts, project_id, task_id, reference, rest, dest)
        else:
            await parts.fetcher.fetch(reference, dest, kinds)
        found[reference] = str(dest)
    return found


async def _uploaded(parts: Parts, project_id: ProjectId, reference: str, upload_id: str, dest: Path) -> None:
    upload = await parts.store.upload(upload_id)
    if upload is None or upload.project_id != project_id or await parts.storage.open(upload.key, dest) is None:
        raise InputUnavailable(f"{reference}: this project has no such upload (uploads are kept for seven days)")


async def _made_before(parts: Parts, project_id: ProjectId, task_id: TaskId, reference: str, other_id: str, dest: Path) -> None:
    if other_id == task_id:
        raise InputUnavailable(f"{reference}: a task cannot use its own result")
    other = await parts.store.task(TaskId(other_id))
    if other is None or other.project_id != project_id:
        raise InputUnavailable(f"{reference}: this project has no such task")
    if other.status is not TaskStatus.COMPLETED or other.result is None:
        raise InputUnavailable(f"{reference}: that task is {other.status}, only a completed one has a result")
    media = other.result.media[0]
    key = media.key if media.content_type.startswith(("image/", "audio/")) else media.poster_key or media.key
    if await parts.storage.open(key, dest) is None:
        raise InputUnavailable(f"{reference}: the file of that task is not there any more")


async def _store(parts: Parts, running: Running, made: Made, made_ms: int) -> StoredResult:
    """The files are in the storage. Goes on trying for as long as the run holds its lease. Raises what only another run can mend."""
    task, done = running.task, made.done
    folder, media_type = params.PRODUCTS[TaskType(task.task_type)]
    prefix = f"projects/{task.project_id}/{folder}/{task.task_id}/{running.run}"
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
        [_stored(output, key, size_bytes, media_type, keys.get("poster"))],
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


async def _disown(store: Store, running: Running) -> None:
    """What the run stored will be deleted, also what came after the orphans of its end were: it may have stood still for hours."""
    if running.prefix is not None:
        prefix = running.prefix
        with _the_last_word():
            await _ended(running, lambda: store.add_orphan(prefix))


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


def retry_delay_ms(attempt: int) -> int:
    """Exponential from two seconds to a minute, with a jitter of a quarter either way, so that faults of many do not come back together."""
    return int(_doubled_s(RETRY_BASE_S, RETRY_MOST_S, attempt) * 1000 * random.uniform(0.75, 1.25))  # noqa: S311  # spreads load, hides nothing


def unreadable_delay_ms(attempt: int) -> int:
    """Exponential from half a minute to ten: time for a worker of the version that wrote the task."""
    return int(_doubled_s(*UNREADABLE_S, attempt) * 1000)


def _doubled_s(least_s: float, most_s: float, attempt: int) -> float:
    """Return the wait after an attempt, of which a damaged record may say anything."""
    return min(least_s * (1 << min(max(attempt - 1, 0), 20)), most_s)


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


class _Reporter:
    """Says how far the run is: the latest state, at most ten times a second. Within its block a loss of the run stops it."""

    def __init__(self, store: Store, running: Running) -> None:
        self._store = store
        self._running = running
        self._news = asyncio.Event()
        self._latest: tuple[str, str, int | None, int | None] | None = None
        self._stage = ""
        self._notes: deque[str] = deque()
        self._preview: bytes | None = None
        self._preview_due_s = 0.0

    async def __aenter__(self) -> None:
        self._tasks = asyncio.create_task(self._tell()), asyncio.create_task(self._look())

    async def __aexit__(self, *_: object) -> None:
        await cancel_all(self._tasks)

    def say(self, current_step: str, *, stage: str, step: int | None = None, steps: int | None = None) -> None:
        self._latest = current_step, stage, step, steps
        self._stage = stage
        self._news.set()

    def on_message(self, message: Progress) -> None:
        pace = self._running.pace
        match message:
            case Plan():
                self._running.take_gpu(1 / len(self._running.group.task_ids) if self._running.group else 0.0)
                if (stage := pace.plan(message.stages)) is not None:
                    self.say(stage.step_name, stage=stage.name)
            case Step():
                if (stage := pace.step(message.stage, message.step, message.steps)) is not None:
                    self.say(stage.step_name, stage=stage.name, step=message.step, steps=message.steps)
            case Free():
                self._running.take_gpu(0.0)
            case Note():
                log.info("engine_note", text=message.text)
                self._notes.append(without_paths(message.text))
                self._news.set()
            case Preview():
                if len(message.jpeg) <= PREVIEW_BYTES:
                    self._preview = message.jpeg
                    self._news.set()

    async def _tell(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                while self._notes:
                    await self._report(self._notes[0], self._stage, None, None, keep=True)
                    self._notes.popleft()
                if self._latest is not None:
                    latest, self._latest = self._latest, None
                    await self._report(*latest)
                if self._preview is not None and time.monotonic() >= self._preview_due_s:
                    self._preview_due_s = time.monotonic() + PREVIEW_INTERVAL_S
                    jpeg, self._preview = self._preview, None
                    await self._store.preview(self._running.task.task_id, self._running.run, jpeg)
            except RunLost:
                self._running.stop("lost")
                return
            except Exception as error:
                if log_failure("report_failed", error):  # saying it again would fail again
                    self._notes.clear()
            await asyncio.sleep(REPORT_INTERVAL_S)
            if self._preview is not None:  # one that came too soon after the last
                self._news.set()

    async def _look(self) -> None:
        """The child hears when somebody begins or ceases to watch the task."""
        said = watched = False
        while True:
            try:
                watched = await self._store.watched(self._running.task.task_id)
                if watched != said and (child := self._running.child) and child.watched(self._running.run, watched):
                    said = watched
            except Exception as error:
                log_failure("look_failed", error)
            await asyncio.sleep(WATCH_INTERVAL_S if watched == said else REPORT_INTERVAL_S)  # it may not have the run yet

    async def _report(self, current_step: str, stage: str, step: int | None, steps: int | None, keep: bool = False) -> None:
        await self._store.report(
            self._running.task.task_id,
            self._running.run,
            self._running.pace.progress,
            current_step,
            stage=stage,
            step=step,
            steps=steps,
            remaining_ms=int(self._running.pace.remaining_s() * 1000),
            keep=keep,
            gpu=self._running.gpu,
        )
