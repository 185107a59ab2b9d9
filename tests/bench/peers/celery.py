"""Celery over Redis. Blocks on the queue (BRPOP). Results off, acknowledged once it ran, prefetch 64, no gossip, mingle or heartbeat.

At concurrency 1 the pool is `solo`, above it `threads`, which did better than `gevent` here (BENCH_POOL names another).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from celery import Celery  # type: ignore[import-not-found]  # Celery lives in an environment of its own

from tests.bench.peers import peer

ORDER = peer.Order()
POOL = os.environ.get("BENCH_POOL", "threads") if ORDER.concurrency > 1 else "solo"

begun = peer.Tally(ORDER)
app = Celery("bench", broker=f"redis+socket://{ORDER.path}")
app.conf.update(
    task_default_queue=ORDER.queue,
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=64 if ORDER.concurrency == 1 else 4,
    worker_disable_rate_limits=True,
    broker_connection_retry_on_startup=True,
    task_store_errors_even_if_ignored=False,
)


@app.task(name="noop")  # type: ignore[untyped-decorator]  # Celery is not at hand
def noop(task_data: dict[str, Any]) -> None:
    """Does nothing."""
    begun()


@asynccontextmanager
async def producer(order: peer.Order) -> AsyncIterator[peer.Enqueue]:
    """A client."""
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)

    def put() -> asyncio.Future[None]:
        noop.apply_async(kwargs=peer.PAYLOAD)
        return done

    yield put
    app.close()


def work(order: peer.Order, _: peer.Tally) -> None:
    """A worker, by its own command, which for gevent patches the standard library before anything else is imported."""
    options = ["--loglevel", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    pool = ["--pool", POOL, "--concurrency", str(order.concurrency)]
    os.execv(sys.executable, [sys.executable, "-m", "celery", "-A", "tests.bench.peers.celery:app", "worker", *pool, *options])


if __name__ == "__main__":
    peer.main(producer, work)
