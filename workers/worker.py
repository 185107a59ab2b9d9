"""The arq worker of a host: claims tasks by script, renews their leases, is woken by pub/sub, drains on SIGTERM. It never imports torch.

For tasks, the verb scripts do arq's reads and writes: a claim returns what arq would read, and only the verbs write. arq's lifecycle,
signals, context and registered functions are used as they are. Deliveries are plain jobs in a plain arq queue: the outbox admits them, and
arq's own code runs them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import secrets
import signal
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

import msgspec
import psutil
from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from arq.jobs import serialize_job
from arq.worker import Worker as ArqWorker
from redis.exceptions import ResponseError

import movieq
from movieq import logs
from movieq.errors import RunLost
from movieq.models import table as models
from movieq.queue.outbox import Admitted, Outbox
from movieq.queue.pubsub import Subscriber
from movieq.queue.queries import Queries
from movieq.queue.records import Able
from movieq.queue.refusals import log_failure
from movieq.queue.store import LEASE_MS, RENEW_S, TRIES_LIMIT, Budget, Claimed, Slot, Store
from movieq.tasks.entities import WorkerState, WorkerStatus
from movieq.tasks.results import utc
from movieq.tasks.states import Kind, RunToken, TaskId, TaskStatus
from workers import gpus
from workers.concurrency import first, set_within
from workers.delivery import DEPOSITS, WEBHOOKS
from workers.execute import refuse_task
from workers.finished import SWEEP_S, FinishedFiles
from workers.host import Host
from workers.outcome import BROKE, UNREADABLE_LIMIT
from workers.retention import Retention
from workers.retry import unreadable_delay_ms
from workers.running import Running, Stop
from workers.supervisor import CANCEL_GRACE_S, Child, ChildUnfit

POLL_S: Final = 1.0
"""Time between two polls, in case a wake is missed, in seconds."""
POLL_MOST_S: Final = 5.0
"""Time limit of a poll for deliveries, in seconds."""
AWAY_S: Final = 0.5
"""Pause between two tries to renew while Redis is away, in seconds. Each try waits for Redis too."""
LAST_S: Final = CANCEL_GRACE_S + 1.5
"""Time after the drain in which runs are requeued, in seconds. An engine that does not stop first has its grace."""
GONE_S: Final = 10.0
"""Time after the drain until the worker has ended, in seconds, whatever Redis, its engines and its disk do. It holds `LAST_S`, ..."""
LETTING_GO_S: Final = 0.4
"""... twice this time, in which cancelled asyncio tasks end, ..."""
GOODBYE_S: Final = 1.0
"""... and this time limit for removing the worker from Redis."""
AGAIN_S: Final = 1.0
"""Wait before a part of the worker that failed starts again, in seconds."""

UNREADABLE: Final = "its record in Redis cannot be read by this version of movieq"
UNREADABLE_PARAMETERS: Final = "its parameters in Redis cannot be read"

_DAMAGED: Final = re.compile("WRONGTYPE|not an integer")
"""Redis's errors for a key that holds a value of another type."""

log = logs.get()


class Worker(ArqWorker):
    """An arq worker with slots: its tasks run in `children`, its plain jobs as arq runs them."""

    def __init__(
        self,
        *,
        worker_id: str,
        store: Store,
        queries: Queries,
        subscriber: Subscriber,
        children: list[Child],
        drain_s: float,
        weights: Mapping[str, float],
        finished: FinishedFiles | None = None,
        able: Able | None = None,
        outbox: Outbox | None = None,
        host: Host | None = None,
        retention: Retention | None = None,
        **arq: Any,
    ) -> None:
        super().__init__(**arq)
        self.worker_id = worker_id
        self.store = store
        self._queries = queries
        self.children = children
        self.runs: dict[RunToken, Running] = {}
        self._subscriber = subscriber
        self._drain_s = drain_s
        self._weights = msgspec.json.encode(weights)
        self._finished = finished
        self._able = able
        self._outbox = outbox
        self._in_flight: dict[str, Admitted] = {}
        self._retention = retention
        self._host = host
        self._hostname = socket.gethostname()
        self._memory_total = int(psutil.virtual_memory().total)
        self._stale: set[RunToken | int] = set()
        """Runs, and groups by their id, that had no running asyncio task at the last `tend`."""
        self._heartbeat: list[WorkerStatus] = []
        self._readings: dict[str, gpus.Reading] = {}
        self._nonce: str | None = None
        self._wake = asyncio.Event()
        self._ready = False
        """Whether one of its engines has served."""
        self._full = False
        """Whether deliveries wait for a place."""
        self._renew_soon = asyncio.Event()
        """Set after Redis was away or a message may have been missed: leases are renewed at once, before anything is claimed."""
        self._renewed_s = time.monotonic()
        self._draining = asyncio.Event()
        self._hurry = asyncio.Event()
        self.on_signal: Callable[[float], None] = lambda seconds: None
        """Called at each signal with the seconds within which the worker must end."""
        # a renewal in the middle of a claim would treat the claimed tasks as forgotten ones
        self._leases = asyncio.Lock()

    async def main(self) -> None:
        """Work until a signal asks the worker to end; then finish or requeue its runs."""
        self.ctx["redis"] = self.pool
        if self.on_startup:
            await self.on_startup(self.ctx)
        log.info("worker_started", worker=self.worker_id, queues=self._kinds(), children=[child.name for child in self.children])
        async with asyncio.TaskGroup() as group:
            parts: dict[str, Callable[[], Awaitable[None]]] = {
                "subscriber": self._subscriber.run,
                "listen": self._listen,
                "hold_leases": self._hold_leases,
                "read_gpus": self._read_gpus,
                "sweep_finished": self._sweep_finished,
                **{child.name: partial(child.supervise, self._on_room, self._on_unfit) for child in self.children},
            }
            if self._retention is not None:
                parts["retention"] = self._retention.run
            if self._host is not None:
                parts["host"] = partial(self._host.monitor, self._wake.set)
            serving = [group.create_task(unending(name, part), name=name) for name, part in parts.items()]
            async with asyncio.TaskGroup() as runs:
                working = runs.create_task(self._work(runs))
                await first(asyncio.wait({working}), self._draining.wait())
                await self._drain(working)
            await _let_go(serving)
        log.info("worker_ended", worker=self.worker_id)

    def _on_room(self) -> None:
        """Claim at once. When the first engine serves, print that the worker is ready."""
        if not self._ready and any(child.served for child in self.children):
            self._ready = True
            with suppress(OSError):  # standard output may be closed
                print(logs.WORKER_READY, flush=True)  # noqa: T201
        self._wake.set()

    def _on_unfit(self) -> None:
        """Raise ChildUnfit if every child of this worker reports that it cannot work, and none has ever served."""
        if all(child.unfit is not None and not child.served for child in self.children):
            raise ChildUnfit(str(self.children[0].unfit))

    def handle_sig(self, signum: signal.Signals) -> None:
        """Drain at the first signal, requeue everything at once at the second."""
        log.info("drain", signal=signal.Signals(signum).name, runs=len(self.runs), seconds=self._drain_s)
        if self._draining.is_set():
            self._hurry.set()
        self.on_signal((0.0 if self._draining.is_set() else self._drain_s) + GONE_S)
        self.allow_pick_jobs = False
        self._draining.set()
        self._wake.set()

    async def close(self) -> None:
        """Remove this worker from the list of workers, and close the connections that arq opened."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self.store.leave(self.worker_id)
                await self.pool.delete(self.health_check_key)
                if self._finished:
                    await self._finished.sweep(self._queries, committed_s=0)
        except Exception as error:
            log_failure("leave_failed", error)
        if self.on_shutdown:
            await self.on_shutdown(self.ctx)
        await self.store.redis.aclose()

    # ── Claiming ──

    async def _work(self, runs: asyncio.TaskGroup) -> None:
        while not self._draining.is_set():
            self._wake.clear()
            try:
                await self.claim(runs)
                async with asyncio.timeout(POLL_MOST_S):  # arq itself would wait longer, and delay a drain
                    await self._poll_iteration()
                if self.burst and await self._burst_over():
                    return
            except Exception as error:
                self._renew_soon.set()
                if log_failure("claim_failed", error, away="redis_away"):
                    self._nonce = None  # the next renewal requeues what was claimed
            await set_within(self._wake, self.poll_delay_s if self.burst else POLL_S * random.uniform(0.75, 1.25))  # noqa: S311  # spreads load

    async def _burst_over(self) -> bool:
        if not 0 <= self.max_burst_jobs <= self._jobs_started() and await self.pool.zcard(self.queue_name):
            return False
        await asyncio.gather(*self.tasks.values())
        return True

    async def start_jobs(self, job_ids: list[bytes]) -> None:
        """Start the deliveries that the outbox admits, as arq starts jobs. Without an outbox, start these jobs as arq does.

        A job that still runs here although its hold has expired is not started twice. An entry that is not text is dropped.
        """
        if self._outbox is None:
            await super().start_jobs(job_ids)
            return
        webhooks = sum(each.is_webhook for each in self._in_flight.values())
        free, free_cms = WEBHOOKS - webhooks, DEPOSITS - (len(self._in_flight) - webhooks)
        held_ms = int(self.in_progress_timeout_s * 1000)
        admission = await self._outbox.admit(self.worker_id, secrets.token_hex(8), free, free_cms, self._in_flight.values(), held_ms)
        self._full = admission.left
        if admission.more:
            self._wake.set()
        for each in admission.admitted:
            try:
                job_id = each.job.decode()
            except UnicodeDecodeError:
                await self.pool.zrem(self.queue_name, each.job)
                log.warning("entries_dropped", entries=[f"deliveries {each.job!r}"], cure="none is needed: it names no delivery")
                continue
            if job_id not in self._in_flight:
                await self.sem.acquire()
                self._in_flight[job_id] = each
                self.job_counter += 1
                self.tasks[job_id] = self.loop.create_task(self.run_job(job_id, each.score))
                self.tasks[job_id].add_done_callback(partial(self._delivered, job_id))

    def _delivered(self, job_id: str, _: asyncio.Task[None]) -> None:
        """Free the place of a delivery."""
        self._in_flight.pop(job_id, None)
        self._release_sem_dec_counter_on_complete()

    async def finish_job(
        self,
        job_id: str,
        finish: bool,
        result_data: bytes | None,
        result_timeout_s: float | None,
        keep_result_forever: bool,
        incr_score: int | None,
        keep_in_progress: float | None,
    ) -> None:
        """End a job as arq does. A delivery that was interrupted is due at once, and so is one that was made due during its try."""
        if (admitted := self._in_flight.get(job_id)) is not None and not finish:
            score = await self.pool.zscore(self.queue_name, job_id) or admitted.score
            if score < admitted.score or not incr_score:
                incr_score = int(admitted.score - score) - int(self.in_progress_timeout_s * 1000)
        await super().finish_job(job_id, finish, result_data, result_timeout_s, keep_result_forever, incr_score, keep_in_progress)

    async def run_job(self, job_id: str, score: int) -> None:
        """Run a job as arq does. If its keys are damaged, write them again from its name; it is due now."""
        try:
            await super().run_job(job_id, score)
        except ResponseError as error:
            if not _DAMAGED.search(str(error)):
                raise
            log.warning("job_repaired", job_id=job_id, problem=str(error))
            definition = serialize_job("deliver", (job_id.partition(".")[0],), {}, None, score, serializer=self.job_serializer)
            await self.pool.set(job_key_prefix + job_id, definition)
            await self.pool.zadd(self.queue_name, {job_id: int(time.time() * 1000)}, xx=True)
            await self.pool.delete(retry_key_prefix + job_id, in_progress_key_prefix + job_id)

    def _release_sem_dec_counter_on_complete(self) -> None:
        super()._release_sem_dec_counter_on_complete()
        if self._full:
            self._wake.set()

    async def claim(self, runs: asyncio.TaskGroup) -> None:
        """Claim a task for each slot, and start the runs in `runs`."""
        if self._renew_soon.is_set() or time.monotonic() - self._renewed_s > LEASE_MS / 1000:
            await self.renew()  # what this worker still holds must not be claimed again
        if self._draining.is_set():
            return
        async with self._leases:
            self._nonce = self._nonce or secrets.token_hex(8)
            rows = {key: most for child in self.children for key, most in child.rows.items()}
            storing = self._hostname if self._finished and (self._host is None or self._host.can_store) else ""
            claimed = await self.store.claim(self.worker_id, self._nonce, self._slots(), self._weights, rows, storing, self._able)
            self._nonce = None
            for slot, together in itertools.groupby(claimed, key=lambda each: each.slot):
                for each in [list(together)] if slot >= 0 else [[one] for one in together]:
                    try:
                        self._start_group(runs, each)
                    except Exception:
                        log.exception("start_failed", task_ids=[one.task.task_id for one in each])
                        for one in each:
                            if one.run not in self.runs:
                                runs.create_task(self._requeue(one.task.task_id, one.run, BROKE, Budget.TRIES, TRIES_LIMIT))

    def _slots(self) -> list[Slot]:
        """Return the slots in which a task can run now, or in a moment."""
        found = [
            Slot(child.kinds, tuple(name for name in child.models_next if name != models.ANIMATIC), child.slots.free)
            for child in self._available()
        ]
        return [Slot(("deliveries",)), *found]  # no task has this kind: it lets the end of a task wake an idle worker for the deliveries

    def _available(self) -> list[Child]:
        """Return the children that can get a task."""
        return [child for child in self.children if (child.slots.free or child.slots.soon) and self._problem(child) is None]

    def _problem(self, child: Child) -> str | None:
        """Return the problem for which the child gets no tasks; None while there is none."""
        return (self._host.problem if self._host else None) or child.problem

    def _start_group(self, runs: asyncio.TaskGroup, together: list[Claimed]) -> None:
        """Start runs that were claimed together, on a child that is free now or soon; those with finished files here need no child."""
        to_render = []
        for claimed in together:
            if claimed.task.status is TaskStatus.UNKNOWN:  # a worker of another version may be able to read it
                delay_ms = unreadable_delay_ms(claimed.task.attempt)
                requeuing = self._requeue(claimed.task.task_id, claimed.run, UNREADABLE, Budget.TRIES, UNREADABLE_LIMIT, delay_ms)
                runs.create_task(requeuing)
            elif self._finished and claimed.task.attempt > 1 and (finished := self._finished.find(claimed.task.task_id)) is not None:
                self.start(runs, Running(claimed, finished=finished))
            else:
                to_render.append(claimed)
        if not to_render:
            return
        task = to_render[0].task
        able = [] if self._draining.is_set() else [child for child in self._available() if task.kind in child.kinds]
        if not able:
            for claimed in to_render:
                runs.create_task(self._requeue(claimed.task.task_id, claimed.run))
            return
        child = min(able, key=lambda child: (not child.slots.free, len(child.slots.groups), task.model not in child.models))
        group = child.slots.reserve([claimed.task.task_id for claimed in to_render], task.model, task.batch)
        for claimed in to_render:
            self.start(runs, Running(claimed, child, group))
        if child.slots.soon:
            self._wake.set()

    def start(self, runs: asyncio.TaskGroup, running: Running) -> None:
        """Start a run in `runs`; its end frees its slot."""
        claimed = running.claimed
        self.runs[claimed.run] = running
        running.asyncio_task = runs.create_task(self._run(running), name=claimed.task.task_id)
        running.asyncio_task.add_done_callback(lambda _: self._forget(running))  # even if it never started

    def _forget(self, running: Running) -> None:
        """Forget the run, and free its slot."""
        self.runs.pop(running.run, None)
        running.free_slot()

    async def _run(self, running: Running) -> None:
        """Run the task. An exception requeues this task and affects no other."""
        claimed = running.claimed
        context = {**self.ctx, "job_id": claimed.task.task_id, "job_try": claimed.task.attempt, "running": running}
        try:
            try:
                job = msgspec.msgpack.decode(claimed.job)
                if job["f"] in self.functions:
                    coroutine = self.functions[job["f"]].coroutine(context, *job["a"], **job["k"])
                else:  # a function of a newer version, or of a plug-in
                    log.error("no_such_job", task_id=claimed.task.task_id, function=job["f"])
                    coroutine = refuse_task(context, f"this worker cannot run {claimed.task.task_type}")
            except Exception as error:
                log.error("job_unread", task_id=claimed.task.task_id, problem=f"{type(error).__name__}: {error}")
                coroutine = refuse_task(context, UNREADABLE_PARAMETERS, damaged=True)
            await coroutine
        except Exception:
            log.exception("run_broke", task_id=claimed.task.task_id)
            await self._requeue(claimed.task.task_id, claimed.run, BROKE, Budget.TRIES, TRIES_LIMIT)

    async def _requeue(
        self,
        task_id: TaskId,
        run: RunToken,
        why: str = "its worker had no free slot",
        budget: Budget = Budget.DRAIN,
        limit: int = 0,
        delay_ms: int = 0,
    ) -> None:
        """Requeue a task that was claimed and does not run: the answer to its claim was lost, or its child died meanwhile."""
        try:
            await self.store.requeue(task_id, run, budget, limit, delay_ms, why, "internal" if limit else "worker_lost")
        except RunLost:
            pass
        except Exception as error:
            log_failure("requeue_failed", error)  # the next renewal returns the task again

    # ── Leases ──

    async def _hold_leases(self) -> None:
        while True:
            try:
                self.tend()
                for running in self.runs.values():
                    if running.child and running.group is running.child.slots.late():
                        running.stop(Stop.OVERDUE)
            except Exception:
                log.exception("run_check_failed")
            try:
                await self.renew()
            except Exception as error:
                log_failure("renew_failed", error)
                await asyncio.sleep(AWAY_S)
                continue
            try:
                await self.store.tidy()
            except Exception as error:
                log_failure("tidy_failed", error)
            await set_within(self._renew_soon, RENEW_S)

    def tend(self) -> None:
        """Drop runs, and groups in slots, that have had no running asyncio task since this was last called.

        The next renewal does not name their tasks, and so they are requeued.
        """
        found: set[RunToken | int] = set()
        for run, running in list(self.runs.items()):
            if running.asyncio_task is None or running.asyncio_task.done():
                found.add(run)
                if run in self._stale:
                    log.error("run_without_task", task_id=running.task.task_id, run=run)
                    self._forget(running)
        run_groups = {id(running.group) for running in self.runs.values()}
        for child in self.children:
            for group in [group for group in child.slots.groups if id(group) not in run_groups]:
                found.add(id(group))
                if id(group) in self._stale:
                    log.error("slot_without_run", child=child.name, task_ids=group.task_ids)
                    child.slots.release(group)
        self._stale = found

    async def _sweep_finished(self) -> None:
        while self._finished is not None:
            try:
                await self._finished.sweep(self._queries)
            except Exception as error:
                log_failure("sweep_finished_failed", error)
            await asyncio.sleep(SWEEP_S)

    async def _read_gpus(self) -> None:
        """Read the state of the GPUs, apart from the renewals: a driver that hangs must not cost the worker its leases."""
        while found := [child.gpu for child in self.children if child.gpu is not None]:
            for gpu in found:
                if (reading := await asyncio.to_thread(gpus.read, gpu)) is not None:
                    self._readings[gpu.name] = reading
            await asyncio.sleep(RENEW_S)

    async def renew(self) -> None:
        """Renew the leases of all runs; stop those that are lost, and requeue tasks that this worker holds without running them."""
        try:
            self._heartbeat = self.rows()
        except Exception:  # with too many open files, for example: the leases are renewed even so
            log.exception("heartbeat_failed")
        async with self._leases:
            self._renew_soon.clear()
            try:
                lost, forgotten = await self.store.renew(
                    self.worker_id,
                    self._heartbeat,
                    [(running.task.task_id, run) for run, running in self.runs.items()],
                    gpu_bytes=self._gpu_bytes(),
                    able=self._able,
                )
            except BaseException:
                self._renew_soon.set()
                raise
            self._renewed_s = time.monotonic()
            if self._nonce is not None and not self._draining.is_set():
                forgotten = []  # they belong to a claim whose answer was lost: the repeated claim returns them
        for _, run in lost:
            if run in self.runs:
                self.runs[run].stop(Stop.LOST)
        for task_id, run in forgotten:
            log.warning("forgotten_task", task_id=task_id)
            await self._requeue(task_id, run)

    def _gpu_bytes(self) -> int:
        """Return the memory of the largest GPU that a child works on: 0 if none has one, 1 if it cannot be read."""
        readings = [self._readings.get(child.device) for child in self.children if child.gpu and child.unfit is None]
        return max((reading.memory_total if reading else 1 for reading in readings), default=0)

    async def _listen(self) -> None:
        """Subscribe to the worker's own channel; the subscriber repeats this on every new connection."""
        channel = self._subscriber.listen(self.store.keys["control"] + self.worker_id, self._on_control, self._on_gap)
        with suppress(TimeoutError):  # the subscriber goes on once Redis is back; until then the worker polls
            await channel.wait()

    def _on_gap(self) -> None:
        self._renew_soon.set()  # a cancel may have been missed
        self._wake.set()

    def _on_control(self, message: bytes) -> None:
        match message.decode(errors="replace").split():
            case ["wake"]:
                self._wake.set()
            case ["cancel", _, run]:
                if (running := self.runs.get(RunToken(run))) is not None:
                    running.stop(Stop.CANCELLED)
            case _:  # a message of a newer version, or not from movieq
                log.warning("unknown_message", text=message[:100].decode(errors="replace"))

    def rows(self) -> list[WorkerStatus]:
        """Return this worker's rows in the list of workers: one for each child."""
        taking = not self._draining.is_set()
        rows = []
        for child in self.children:
            gpu = self._readings.get(child.device)
            rows.append(
                WorkerStatus(
                    worker_id=f"{self.worker_id}/{child.name}",
                    worker_type=min(child.kinds, key=list(Kind).index),
                    status=WorkerState.BUSY if child.slots.task_id else WorkerState.IDLE,
                    current_task_id=child.slots.task_id,
                    gpu_utilization=gpu.utilization or 0.0 if gpu else 0.0,
                    memory_usage=gpu.memory_used if gpu else child.memory_bytes(),
                    tasks_completed=child.tasks_completed,
                    last_heartbeat=utc(int(time.time() * 1000)),
                    queues=list(child.kinds) if taking and self._problem(child) is None else [],
                    problem=self._problem(child),
                    device=child.device,
                    memory_total=gpu.memory_total if gpu else self._memory_total,
                    temperature=gpu.temperature if gpu else None,
                    power=gpu.power if gpu else None,
                    models=child.models if child.pid else [],
                    models_parked=child.models_parked,
                    model_swaps=child.model_swaps,
                    idle_gap=statistics.median(child.idle_s) if child.idle_s else None,
                    host=self._hostname,
                    version=movieq.__version__,
                )
            )
        return rows

    # ── Draining ──

    async def _drain(self, working: asyncio.Task[None]) -> None:
        """Requeue at once the runs that cannot end within `drain_s`, wait for the others, then requeue what is left.

        A claim in flight may still end meanwhile; its tasks are requeued.
        """
        for running in list(self.runs.values()):
            if running.finished is None and running.eta.remaining_s() > self._drain_s:
                running.stop(Stop.DRAIN)
        await self._ended_within(self._drain_s, unless=self._hurry)
        for running in list(self.runs.values()):
            running.stop(Stop.DRAIN)
        for job in self.tasks.values():
            job.cancel()
        await self._ended_within(LAST_S)
        for running in list(self.runs.values()):
            running.abandon()
        await _let_go([working, *(running.asyncio_task for running in self.runs.values() if running.asyncio_task), *self.tasks.values()])

    async def _ended_within(self, seconds: float, unless: asyncio.Event | None = None) -> None:
        """Wait until all runs and jobs have ended or the event is set, but at most this many seconds."""
        tasks: set[asyncio.Task[Any]] = {running.asyncio_task for running in self.runs.values() if running.asyncio_task}
        tasks.update(self.tasks.values())
        if tasks:
            await first(asyncio.wait(tasks), (unless or asyncio.Event()).wait(), within_s=seconds)

    def _kinds(self) -> list[Kind]:
        return sorted({kind for child in self.children for kind in child.kinds}, key=list(Kind).index)


async def unending(name: str, part: Callable[[], Awaitable[None]]) -> None:
    """Run a part of the worker until it returns or is cancelled; start it again if it fails. Raises ChildUnfit."""
    while True:
        try:
            await part()
            return
        except ChildUnfit:
            raise
        except Exception as error:
            log_failure("part_failed", error, part=name)
        await asyncio.sleep(AGAIN_S)


async def _let_go(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait for them, for a limited time. One that is reporting its outcome to Redis needs the second cancel."""
    for _ in range(2):
        if not (left := {task for task in tasks if not task.done()}):
            return
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=LETTING_GO_S)
