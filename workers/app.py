"""Run one worker process from its settings until a signal ends it."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from arq import func

from movieq import assembly, credentials, gpus, logs
from movieq.delivery.payload import Payload
from movieq.errors import SettingsError, first_of
from movieq.fetch.download import Fetcher
from movieq.queue.records import Able
from movieq.settings import Settings, variable
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import Kind
from workers.delivery import DEPOSITS, HELD_S, WEBHOOKS, DeliveryParts, deliver
from workers.execute import run_task
from workers.finished import FinishedFiles
from workers.host import Host
from workers.provenance import Provenance
from workers.retention import DAY_S, Retention
from workers.running import Parts
from workers.spool import spool
from workers.supervisor import Child, ChildUnfit
from workers.worker import Worker, unending

log = logs.get()


async def serve(settings: Settings) -> None:
    """Run a worker with these settings until a signal ends it. Raises SettingsError."""
    provenance = Provenance(settings.file_tags, credentials.load(settings), settings.c2pa_required)
    children = _children(settings)
    worker_id = f"{socket.gethostname().partition('.')[0]}-{os.getpid()}-{secrets.token_hex(3)}"
    with _spool(settings) as folder:
        for child in children:
            child.spool = folder
        async with (
            assembly.opened(settings, settings.public_url, patient=True) as found,
            Fetcher(found.guard) as fetcher,
            found.guard.session() as session,
        ):
            finished, host = FinishedFiles(folder.parent), Host(folder, len(children))
            parts = Parts(
                found.store,
                found.queries,
                found.files,
                found.storage,
                fetcher,
                folder,
                found.models,
                provenance,
                finished,
                found.cms.address if found.cms else "",
                host,
                places=(folder.parent, *((settings.storage.absolute(),) if isinstance(settings.storage, Path) else ())),
            )
            cms = Payload(found.cms, session) if found.cms else None
            worker = Worker(
                worker_id=worker_id,
                store=found.store,
                queries=found.queries,
                subscriber=found.subscriber,
                children=children,
                drain_s=settings.drain_s,
                weights=settings.project_weights,
                finished=finished,
                able=Able(tuple(REGISTRY.tasks), tuple(found.models)),
                host=host,
                retention=Retention(worker_id, found.store, found.files, found.storage, settings),
                functions=[
                    *(func(run_task, name=task_type) for task_type in REGISTRY.tasks),
                    # `deliver` has shorter limits of its own: arq never retries a job that it has cut off
                    func(deliver, name="deliver", max_tries=1_000_000, keep_result=0, timeout=DAY_S),
                ],
                queue_name=found.redis.default_queue_name,
                redis_pool=found.redis,
                max_jobs=WEBHOOKS + DEPOSITS,
                queue_read_limit=1,  # what arq reads is not used: the outbox admits deliveries
                outbox=found.outbox,
                job_serializer=found.redis.job_serializer,
                job_deserializer=found.redis.job_deserializer,
                ctx={
                    "parts": parts,
                    "delivery_parts": DeliveryParts(
                        found.redis, found.outbox, found.queries, found.storage, session, settings.webhook_secret, folder, cms
                    ),
                },
            )
            worker.in_progress_timeout_s = HELD_S
            worker.on_signal = _gone_within
            await _work(worker, found)


async def _work(worker: Worker, found: assembly.Installation) -> None:
    """Run the worker until it ends. Raises SettingsError if no engine can work on this machine."""
    try:
        async with asyncio.TaskGroup() as group:
            following = group.create_task(unending("signing_secret", found.follow_signing_secret))
            try:
                await worker.async_run()
            finally:
                following.cancel()
    except BaseExceptionGroup as group_error:
        if (unfit := group_error.subgroup(ChildUnfit)) is None:
            raise
        raise SettingsError(f"an engine cannot work on this machine: {first_of(unfit)}") from None
    finally:
        await worker.close()


@contextmanager
def _spool(settings: Settings) -> Iterator[Path]:
    """Yield the worker's folder. Raises SettingsError if it cannot be created."""
    try:
        entered = ExitStack()
        folder = entered.enter_context(spool(Path(settings.spool) if settings.spool else None))
    except OSError as error:
        where = settings.spool or tempfile.gettempdir()
        raise SettingsError(
            f"{variable('spool')}: cannot create a folder in {where}: {error.strerror}; name one with space that this user may write to"
        ) from None
    with entered:
        yield folder


def _gone_within(seconds: float) -> None:
    """End the process after this many seconds, even if one of its threads or system calls never returns."""
    timer = threading.Timer(seconds, _leave)
    timer.daemon = True
    timer.start()


def _leave() -> None:
    log.error("worker_cut_off", problem="a part of the worker did not end in time")
    os._exit(1)


def _children(settings: Settings) -> list[Child]:
    """Return a child for each GPU and `cpu_slots` children for the CPU.

    Children for the CPU serve the queues of GPUs only if the settings name these queues and the machine has no GPU.
    """
    devices = gpus.devices(settings.devices)
    on_gpu: tuple[Kind, ...] = tuple(kind for kind in settings.queues or list(Kind) if kind is not Kind.CPU_INTENSIVE)
    on_cpu = settings.queues or (Kind.CPU_INTENSIVE,)
    if devices:
        on_cpu = tuple(kind for kind in on_cpu if kind is Kind.CPU_INTENSIVE)
    places: list[tuple[str, tuple[Kind, ...], gpus.Gpu | None]] = [(gpu.name.replace("cuda:", "gpu"), on_gpu, gpu) for gpu in devices]
    places += [(f"cpu{number}", on_cpu, None) for number in range(settings.cpu_slots)]
    return [Child(name, kinds, gpu, step_timeout_s=settings.step_timeout_s) for name, kinds, gpu in places if kinds]
