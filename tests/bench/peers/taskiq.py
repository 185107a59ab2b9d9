"""Taskiq over Redis Streams. Blocks on the stream (XREADGROUP), no poll. No result backend; a task is acknowledged once it ran."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from taskiq.api import run_receiver_task  # type: ignore[import-not-found]  # Taskiq lives in an environment of its own
from taskiq.serializers import ORJSONSerializer  # type: ignore[import-not-found]  # as above
from taskiq_redis import RedisStreamBroker  # type: ignore[import-not-found]  # as above

from tests.bench.peers import peer


def declare(order: peer.Order, begun: Callable[[], None]) -> tuple[Any, Any]:
    """The broker and its task."""
    broker = RedisStreamBroker(order.url, queue_name=order.queue).with_serializer(ORJSONSerializer())

    async def noop(task_data: dict[str, Any]) -> None:
        begun()

    return broker, broker.register_task(noop, task_name="noop")


@asynccontextmanager
async def producer(order: peer.Order) -> AsyncIterator[peer.Enqueue]:
    """A client."""
    broker, noop = declare(order, lambda: None)
    await broker.startup()
    yield lambda: noop.kiq(**peer.PAYLOAD)
    await broker.shutdown()


async def work(order: peer.Order, begun: peer.Tally) -> None:
    """A worker, as `taskiq worker --workers 1 --no-parse` has it."""
    broker, _ = declare(order, begun)
    broker.is_worker_process = True
    await run_receiver_task(broker, run_startup=True, validate_params=False, max_async_tasks=order.concurrency)


if __name__ == "__main__":
    peer.main(producer, work)
