"""One connection to Redis for the commands of many callers: written at once, answered in order.

A pool lends a connection for one command at a time, and most of what that costs is the lending. Here a command is written when it comes,
and one reader hands out the answers. Left out: transactions, pub/sub and blocking commands, which need a connection of their own.
"""

from __future__ import annotations

import asyncio
import builtins
from collections import deque
from typing import Any, Final

import hiredis
import msgspec
from arq.connections import ArqRedis
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, ReadOnlyError, RedisError, ResponseError, TimeoutError
from redis.typing import EncodableT

from movieq.queue.keys import keys
from movieq.queue.refusals import REDIS_AWAY


class SharedConnection:
    """Opened by the first command, and again by the next after it broke. `retry` says how often a command is sent again over a new one.

    A command whose answer was lost may have been done: send only what can be said twice. A try may take `timeout_s`, all tries of a command
    together no more than `patience_s` (and the pause before the last).
    """

    def __init__(self, pool: ConnectionPool, retry: Retry, timeout_s: float, patience_s: float) -> None:
        # time limits are ours: the connection's own would take a task for each write
        self._make = lambda: pool.connection_class(**{**pool.connection_kwargs, "socket_timeout": None})
        self._retry = retry
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._opening = asyncio.Lock()
        self._connection: AbstractConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[Any]] = deque()

    async def call(self, *command: EncodableT) -> Any:
        """The answer. Raises redis's ResponseError for a refusal of the server, ConnectionError and TimeoutError where none comes."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._patience_s

        async def failed(error: RedisError) -> None:
            if loop.time() >= end_s:
                raise error

        return await self._retry.call_with_retry(lambda: self._call(command, min(loop.time() + self._timeout_s, end_s)), failed)

    async def aclose(self) -> None:
        """The connection is closed; commands that still wait fail."""
        reader = self._reader
        await self._drop(self._connection, ConnectionError("the connection was closed"))
        if reader is not None:
            await asyncio.wait({reader})

    async def _call(self, command: tuple[EncodableT, ...], end_s: float) -> Any:
        connection: AbstractConnection | None = None
        try:
            async with asyncio.timeout_at(end_s):
                connection = self._connection or await self._open()
                return await self._say(connection, command)
        except builtins.TimeoutError as error:
            await self._drop(connection, ConnectionError("the connection was given up: Redis did not answer"))
            raise TimeoutError("Redis did not answer in time") from error

    async def _say(self, connection: AbstractConnection, command: tuple[EncodableT, ...]) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_seen)
        self._waiting.append(answer)  # nothing is awaited between this and the write: the order is the same
        try:
            packed = hiredis.pack_command(command)  # type: ignore[arg-type]  # typed as a tuple of one
            await connection.send_packed_command(packed, check_health=False)
        except BaseException:  # also a cancel half way through: what was written may be no whole command, and redis-py has hung up
            await self._drop(connection, ConnectionError("the connection broke while it was written to"))
            raise
        return await answer

    async def _open(self) -> AbstractConnection:
        async with self._opening:
            if self._connection is None:
                connection = self._make()  # type: ignore[no-untyped-call]  # redis-py leaves its constructors untyped
                try:
                    await connection.connect()  # type: ignore[no-untyped-call]  # as above
                except BaseException:  # a server that hangs takes the connection and answers nothing: the time runs out in here
                    await connection.disconnect(nowait=True)
                    raise
                self._connection = connection
                self._reader = asyncio.create_task(self._read(connection))
            return self._connection

    async def _read(self, connection: AbstractConnection) -> None:
        try:
            while True:
                answer: Any
                try:
                    answer = await connection.read_response(disconnect_on_error=False)
                except ResponseError as refusal:
                    answer = refusal
                if not self._waiting:
                    raise ConnectionError(f"Redis said {str(answer)[:80]!r} without being asked")
                waiting = self._waiting.popleft()
                if not waiting.done():  # else its caller was cancelled
                    if isinstance(answer, ResponseError):
                        waiting.set_exception(answer)
                    else:
                        waiting.set_result(answer)
                if isinstance(answer, ReadOnlyError):  # no longer the primary: a new connection may lead to the one that is
                    raise ConnectionError(str(answer))
        except REDIS_AWAY as error:
            await self._drop(connection, ConnectionError(str(error) or type(error).__name__))

    async def _drop(self, connection: AbstractConnection | None, error: ConnectionError) -> None:
        """The connection, where it is still the one in use, is closed, and whoever waits for an answer over it is told."""
        if connection is None or connection is not self._connection:
            return
        self._connection = None
        waiting, self._waiting = self._waiting, deque()
        for answer in waiting:
            if not answer.done():
                answer.set_exception(error)
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        await connection.disconnect(nowait=True)


def _seen(answer: asyncio.Future[Any]) -> None:
    """So that nobody warns of an answer whose caller failed at the write."""
    if not answer.cancelled():
        answer.exception()


def connect(url: str, *, patient: bool, max_connections: int = 64, prefix: str = "movieq") -> ArqRedis:
    """A client for the Redis at `url`, with arq's methods; nothing is opened before the first command. `prefix` is that of its keys.

    `patient` is for workers: it tries again for five seconds, and a full memory does not refuse its writes, which end tasks and make room.
    The API fails fast, so that a client hears 503 within a second.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=5 if patient else 0.9,  # the patience of the store's line too
        socket_connect_timeout=2 if patient else 0.5,
        socket_timeout=5 if patient else 0.9,
        health_check_interval=0,
        # once more where a connection was broken; a Redis that hangs is not given a second 0.9 s
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.01), 12) if patient else Retry(NoBackoff(), 1, (exceptions.ConnectionError,)),
        retry_on_error=[exceptions.ConnectionError, exceptions.TimeoutError, BusyLoadingError, OSError] if patient else [],
    )
    pool.connection_class = _cancellable(pool.connection_class)
    return (_Unrefused if patient else ArqRedis)(
        pool,
        job_serializer=lambda job: msgspec.msgpack.encode(job, enc_hook=repr),
        job_deserializer=msgspec.msgpack.decode,
        default_queue_name=keys(prefix)["deliveries"],
    )


_GROW: Final = frozenset({"HSET", "INCRBY", "PSETEX", "SADD", "SET", "SETEX", "ZADD", "ZINCRBY"})
"""The commands used here and by arq that a full memory refuses."""
_ALLOWED: Final = "#!lua flags=allow-oom\nreturn redis.call(unpack(ARGV))"


def _allowed(command: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the command, in a script that a full memory does not refuse where it would refuse the command itself."""
    return ("EVAL", _ALLOWED, 0, *command) if command[0] in _GROW else command


class _UnrefusedPipeline(Pipeline):
    def execute_command(self, *command: Any, **options: Any) -> Any:
        return super().execute_command(*_allowed(command), **options)


class _Unrefused(ArqRedis):
    """A client of arq whose writes a full memory does not refuse: deliveries are arq jobs, which begin and end with plain writes."""

    async def execute_command(self, *command: Any, **options: Any) -> Any:
        return await super().execute_command(*_allowed(command), **options)  # type: ignore[no-untyped-call]  # as redis-py has it

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _UnrefusedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def _cancellable(cls: type[AbstractConnection]) -> type[AbstractConnection]:
    """The connections of this class, without their loss of cancels.

    redis-py writes under `asyncio.wait_for`, which before Python 3.12 drops a cancel that comes while the write ends: a stream whose client
    has left would be kept for ever.
    """

    class Cancellable(cls):  # type: ignore[misc, valid-type]  # a base that is a value
        async def send_packed_command(self, *command: Any, **options: Any) -> None:
            task = asyncio.current_task()
            before = task.cancelling() if task else 0
            try:
                await super().send_packed_command(*command, **options)
            finally:  # also where the connection broke at that moment: whoever tries again would never hear of the cancel
                if task and task.cancelling() > before:
                    await self.disconnect(nowait=True)  # nobody waits for its answer
                    raise asyncio.CancelledError

    return Cancellable
