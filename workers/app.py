"""Run one worker process from its settings until it is told to end."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from arq import func

from movieq import assembly, checks, credentials, logs
from movieq.delivery import payload, webhooks
from movieq.delivery.payload import Payload
from movieq.errors import SettingsError, first_of
from movieq.fetch.download import Fetcher
from movieq.fetch.guard import Guard
from movieq.models import table as models
from movieq.queue.connection import connect
from movieq.queue.pubsub import Subscriber
from movieq.queue.records import Able
from movieq.queue.store import Store
from movieq.settings import Settings, variable
from movieq.storage.open import opened
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import Kind
from workers.delivery import HELD_S, Outbox, deliver
from workers.execute import run_task
from workers.finished import FinishedFiles
from workers.host import Host
from workers.provenance import Provenance
from workers.retention import DAY_S, Retention
from workers.running import Parts
from workers.spool import spool
from workers.supervisor import Child, ChildUnfit
from workers.worker import Worker

DELIVERIES: Final = 32
"""How many a worker has in hand at once."""

log = logs.get()


async def serve(settings: Settings) -> None:
    """Runs a worker of these settings until a signal ends it. Raises SettingsError."""
    settings_secrets = webhooks.parse_secrets(settings.webhook_secret)
    table = models.load(settings.models)
    provenance = Provenance(settings.file_tags, credentials.load(settings), settings.c2pa_required)
    cms = payload.configured(settings)
    redis = connect(settings.redis_url, patient=True, prefix=settings.key_prefix)
    store = Store(redis, settings.key_prefix)
    guard = Guard(settings.private_networks(), settings.own_origins())
    children = _children(settings)
    worker_id = f"{socket.gethostname().partition('.')[0]}-{os.getpid()}-{secrets.token_hex(3)}"
    with _spool(settings) as folder:
        async with (
            Fetcher(guard) as fetcher,
            guard.session() as session,
            assembly.signing_secrets(settings, store) as signing_secrets,
            opened(settings, settings.public_url, signing_secrets, patient=True) as storage,
        ):
            finished = FinishedFiles(folder.parent)
            host = Host(folder, len(children))
            places = (folder.parent, *(() if settings.bucket() else (Path(settings.storage).absolute(),)))
            for child in children:
                child.spool = folder
            worker = Worker(
                worker_id=worker_id,
                store=store,
                subscriber=Subscriber(settings.redis_url, store.keys["events"]),
                children=children,
                drain_s=settings.drain_s,
                weights=settings.weights(),
                finished=finished,
                able=Able(tuple(REGISTRY.tasks), tuple(table)),
                host=host,
                retention=Retention(worker_id, store, storage, settings),
                functions=[
                    *(func(run_task, name=task_type) for task_type in REGISTRY.tasks),
                    # its own limits are shorter: what arq cuts off, it would not begin again
                    func(deliver, name="deliver", max_tries=1_000_000, keep_result=0, timeout=DAY_S),
                ],
                queue_name=store.keys["deliveries"],
                redis_pool=redis,
                max_jobs=DELIVERIES,
                job_serializer=redis.job_serializer,
                job_deserializer=redis.job_deserializer,
                ctx={
                    "parts": Parts(store, storage, fetcher, folder, table, provenance, finished, cms.address if cms else "", host, places),
                    "outbox": Outbox(store, storage, session, settings_secrets, settings, folder, Payload(cms, session) if cms else None),
                },
            )
            worker.in_progress_timeout_s = HELD_S
            worker.on_signal = _gone_within
            try:
                await worker.async_run()
            except BaseExceptionGroup as group:
                if (unfit := group.subgroup(ChildUnfit)) is None:
                    raise
                raise SettingsError(f"an engine cannot work on this machine: {first_of(unfit)}") from None
            finally:
                await worker.close()


@contextmanager
def _spool(settings: Settings) -> Iterator[Path]:
    """Yield the worker's folder. Raises SettingsError where it cannot be made."""
    try:
        entered = ExitStack()
        folder = entered.enter_context(spool(Path(settings.spool) if settings.spool else None))
    except OSError as error:
        where = settings.spool or tempfile.gettempdir()
        raise SettingsError(
            f"{variable('spool')}: no folder can be made in {where}: {error.strerror}; name a folder with room that this user may write to"
        ) from None
    with entered:
        yield folder


def _gone_within(seconds: float) -> None:
    """End the process by then, even if a thread or a system call of it never returns."""
    timer = threading.Timer(seconds, _leave)
    timer.daemon = True
    timer.start()


def _leave() -> None:
    log.error("worker_cut_off", problem="something did not end within its time")
    os._exit(1)


def _children(settings: Settings) -> list[Child]:
    """A child for each GPU, and those for the CPU: which serve the queues of GPUs only where there is none and they are named."""
    devices = checks.devices(settings.devices)
    on_gpu: tuple[Kind, ...] = tuple(kind for kind in settings.kinds() or list(Kind) if kind is not Kind.CPU_INTENSIVE)
    on_cpu = settings.kinds() or (Kind.CPU_INTENSIVE,)
    if devices:
        on_cpu = tuple(kind for kind in on_cpu if kind is Kind.CPU_INTENSIVE)
    places = [(device.replace("cuda:", "gpu"), on_gpu, device) for device in devices]
    places += [(f"cpu{number}", on_cpu, "cpu") for number in range(settings.cpu_slots)]
    return [Child(name, kinds, device, step_timeout_s=settings.step_timeout_s) for name, kinds, device in places if kinds]
