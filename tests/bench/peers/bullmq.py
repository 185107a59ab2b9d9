"""BullMQ's Python port. Blocks on a marker (BZPOPMIN), no poll. removeOnComplete: a job's keys, and so its result, go when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bullmq import Queue, Worker  # type: ignore[import-not-found]  # BullMQ lives in an environment of its own

from tests.bench.peers import peer


@asynccontextmanager
async def producer(order: peer.Order) -> AsyncIterator[peer.Enqueue]:
    """A client."""
    queue = Queue(order.queue, {"connection": order.url})
    yield lambda: queue.add("noop", peer.PAYLOAD, {"removeOnComplete": True})
    await queue.close()


async def work(order: peer.Order, begun: peer.Tally) -> None:
    """A worker."""

    async def noop(job: Any, token: str) -> None:
        begun()

    worker = Worker(order.queue, noop, {"connection": order.url, "concurrency": order.concurrency, "autorun": False})
    await asyncio.ensure_future(worker.run())


if __name__ == "__main__":
    peer.main(producer, work)
