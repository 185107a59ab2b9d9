"""What arq's tests of its worker need, with our worker as `arq.worker.Worker`: the conftest of the suite, copied beside it by run.py."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import arq.worker
import msgspec
import pytest
from arq.connections import ArqRedis, RedisSettings, create_pool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError

from movieq.local.embedded import Valkey, valkey
from movieq.queue.connection import connect
from movieq.queue.pubsub import Subscriber
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from workers.worker import Worker

msgpack: Any = types.ModuleType("msgpack")  # what of it the suite uses, by msgspec
msgpack.packb = functools.partial(msgspec.msgpack.encode, enc_hook=repr)
msgpack.unpackb = lambda data, raw: msgspec.msgpack.decode(data)
sys.modules["msgpack"] = msgpack

EXCEPTIONS = {
    "test_handle_sig": "a signal drains: it cancels neither the worker nor its jobs at once",
    "test_handle_no_sig": "a worker is ended by a signal, and `close` closes what it had open",
    "test_no_jobs": "a worker is given its client, which its store uses too; it makes none from settings",
    "test_max_bursts_sub_call": "looks for the functions' names in arq's first line of log, which ours has in its own words",
    "test_worker_retry[exception_thrown1]": "over a unix socket redis-py says ConnectionError; arq's own worker does not pass it either",
}
"""Tests of the suite that ours does not pass, each with its reason."""


class Plain(Worker):
    """Our worker as arq's tests make it: without slots, its store on a connection of its own."""

    url = ""

    def __init__(self, functions: Any = (), **arq: Any) -> None:
        store = Store(connect(f"{self.url}?db=1", patient=True))  # the suite counts the keys of its own database
        super().__init__(
            worker_id="suite",
            store=store,
            queries=Queries(store.redis),
            subscriber=Subscriber(self.url),
            children=[],
            drain_s=1.0,
            weights={},
            functions=functions,
            **arq,
        )


Plain.__signature__ = inspect.signature(arq.worker.Worker)  # type: ignore[attr-defined]  # arq reads the settings of a class by it
arq.worker.Worker = Plain  # type: ignore[misc]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The exceptions must fail: one that passes is none any more."""
    for item in items:
        if (reason := EXCEPTIONS.get(item.name)) is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A Valkey on a unix socket."""
    with valkey(Path(tmp_path_factory.mktemp("valkey"))) as running:
        Plain.url = running.url
        yield running


@pytest.fixture
def test_redis_settings(server: Valkey) -> RedisSettings:
    """Where it is, in arq's words."""
    return RedisSettings(unix_socket_path=str(server.socket))


@pytest.fixture
def make_redis(server: Valkey) -> Callable[..., ArqRedis]:
    """Makes clients of arq's."""
    return functools.partial(ArqRedis, unix_socket_path=str(server.socket), encoding="utf-8")


async def emptied(redis: ArqRedis) -> AsyncIterator[ArqRedis]:
    """The client of an empty Redis, closed afterwards."""
    await redis.flushall()
    yield redis
    await redis.aclose(close_connection_pool=True)


@pytest.fixture
async def arq_redis(make_redis: Callable[..., ArqRedis]) -> AsyncIterator[ArqRedis]:
    """A client."""
    async for redis in emptied(make_redis()):
        yield redis


@pytest.fixture
async def arq_redis_msgpack(make_redis: Callable[..., ArqRedis]) -> AsyncIterator[ArqRedis]:
    """A client whose jobs are msgpack."""
    redis = make_redis(job_serializer=msgpack.packb, job_deserializer=functools.partial(msgpack.unpackb, raw=False))
    async for each in emptied(redis):
        yield each


@pytest.fixture
async def arq_redis_retry(make_redis: Callable[..., ArqRedis]) -> AsyncIterator[ArqRedis]:
    """A client that tries again."""
    redis = make_redis(retry=Retry(NoBackoff(), 3), retry_on_timeout=True, retry_on_error=[ConnectionError])
    async for each in emptied(redis):
        yield each


async def workers(redis: ArqRedis) -> AsyncIterator[Callable[..., Plain]]:
    """Makes workers as arq's tests want them; the last one is closed afterwards."""
    last: list[Plain] = []

    def create(functions: Any = (), **options: Any) -> Plain:
        worker = Plain(functions, **{"redis_pool": redis, "burst": True, "poll_delay": 0, "max_jobs": 10, **_renamed(options)})
        last[:] = [worker]
        return worker

    yield create
    for worker in last:
        await worker.close()


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    return {{"arq_redis": "redis_pool"}.get(name, name): value for name, value in options.items()}


@pytest.fixture
async def worker(arq_redis: ArqRedis) -> AsyncIterator[Callable[..., Plain]]:
    """Makes workers."""
    async for create in workers(arq_redis):
        yield create


@pytest.fixture
async def worker_retry(arq_redis_retry: ArqRedis) -> AsyncIterator[Callable[..., Plain]]:
    """Makes workers whose client tries again."""
    async for create in workers(arq_redis_retry):
        yield create


@pytest.fixture
async def loop() -> asyncio.AbstractEventLoop:
    """The loop, also for the tests that are no coroutines."""
    return asyncio.get_running_loop()


@pytest.fixture(name="create_pool")
async def pools() -> AsyncIterator[Callable[..., Awaitable[ArqRedis]]]:
    """arq's `create_pool`; what it made is closed afterwards."""
    open_pools: list[ArqRedis] = []

    async def create(settings: RedisSettings) -> ArqRedis:
        open_pools.append(await create_pool(settings))
        return open_pools[-1]

    yield create
    for pool in open_pools:
        await pool.aclose(close_connection_pool=True)
