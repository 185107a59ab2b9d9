"""Stock arq. Polls every 0.5 s, as it ships. Results off; a job is acknowledged by its removal once it ran."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from arq.connections import RedisSettings, create_pool
from arq.worker import Worker, func

from tests.bench.peers import peer


@asynccontextmanager
async def producer(order: peer.Order) -> AsyncIterator[peer.Enqueue]:
    """A client."""
    pool = await create_pool(RedisSettings.from_dsn(order.url), default_queue_name=order.queue)
    yield lambda: pool.enqueue_job("noop", **peer.PAYLOAD)
    await pool.aclose()


async def work(order: peer.Order, begun: peer.Tally) -> None:
    """A worker."""

    async def noop(ctx: dict[str, Any], task_data: dict[str, Any]) -> None:
        begun()

    worker = Worker(
        [func(noop, name="noop")],
        redis_settings=RedisSettings.from_dsn(order.url),
        queue_name=order.queue,
        max_jobs=order.concurrency,
        keep_result=0,
        handle_signals=False,
    )
    await worker.async_run()


if __name__ == "__main__":
    peer.main(producer, work)
