"""SAQ. Blocks on the queue (BLMOVE), no poll. ttl -1: a job's key, and so its result, goes when it ends, which is its acknowledgement."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from saq import Worker  # type: ignore[import-not-found]  # SAQ lives in an environment of its own
from saq.queue.redis import RedisQueue  # type: ignore[import-not-found]  # as above

from tests.bench.peers import peer


def opened(order: peer.Order) -> Any:
    """The queue. Not by its `from_url`, which knows no unix sockets."""
    return RedisQueue(Redis.from_url(order.url), name=order.queue)


@asynccontextmanager
async def producer(order: peer.Order) -> AsyncIterator[peer.Enqueue]:
    """A client."""
    queue = opened(order)
    await queue.connect()
    yield lambda: queue.enqueue("noop", ttl=-1, **peer.PAYLOAD)
    await queue.disconnect()


async def work(order: peer.Order, begun: peer.Tally) -> None:
    """A worker."""

    async def noop(ctx: dict[str, Any], *, task_data: dict[str, Any]) -> None:
        begun()

    await Worker(opened(order), functions=[("noop", noop)], concurrency=order.concurrency).start()


if __name__ == "__main__":
    peer.main(producer, work)
