"""One Redis connection, pipelined, for the commands of many callers.

A connection pool lends a connection for one command at a time, and most of the cost is the lending. Here each command is written at once,
and one reader passes the answers to the callers in order. Not supported: transactions, pub/sub and blocking commands, which need a
connection of their own.
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

from movieq import logs
from movieq.queue.keys import keys
from movieq.queue.refusals import REDIS_AWAY

PATIENT_S: Final = 5.0
"""How long a worker waits for Redis, in seconds."""
IMPATIENT_S: Final = 0.9
"""How long the API waits for it."""

log = logs.get()


class SharedConnection:
    """A connection for many callers. The first command opens it, and so does the next command after it broke.

    `retry` sets how often a command is sent again. A command whose answer was lost may have run, so send only commands that may run twice.
    One try takes at most `timeout_s`, all tries of a command at most `patience_s`, plus the pause before the last.
    """

    def __init__(self, pool: ConnectionPool, retry: Retry, timeout_s: float, patience_s: float) -> None:
        # time limits are set here: the connection's own limit would start an asyncio task for each write
        self._make = lambda: pool.connection_class(**{**pool.connection_kwargs, "socket_timeout": None})
        self._retry = retry
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._opening = asyncio.Lock()
        self._connection: AbstractConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[Any]] = deque()

    async def call(self, *command: EncodableT) -> Any:
        """Send a command; return its answer. Raises redis-py's ResponseError, or ConnectionError or TimeoutError if no answer comes."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._patience_s

        async def failed(error: RedisError) -> None:
            if loop.time() >= end_s:
                raise error

        return await self._retry.call_with_retry(lambda: self._call(command, min(loop.time() + self._timeout_s, end_s)), failed)

    async def aclose(self) -> None:
        """Close the connection; commands without an answer fail."""
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
            await self._drop(connection, ConnectionError("the connection was closed: Redis did not answer in time"))
            raise TimeoutError("Redis did not answer in time") from error

    async def _say(self, connection: AbstractConnection, command: tuple[EncodableT, ...]) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_seen)
        self._waiting.append(answer)  # no await between this and the write, so that answers and commands have the same order
        try:
            packed = hiredis.pack_command(command)  # type: ignore[arg-type]  # typed as a tuple of one
            await connection.send_packed_command(packed, check_health=False)
        except BaseException:  # also a cancel during the write: half a command may be written, and redis-py has disconnected
            await self._drop(connection, ConnectionError("the connection broke during a write"))
            raise
        return await answer

    async def _open(self) -> AbstractConnection:
        async with self._opening:
            if self._connection is None:
                connection = self._make()  # type: ignore[no-untyped-call]  # redis-py leaves its constructors untyped
                try:
                    await connection.connect()  # type: ignore[no-untyped-call]  # as above
                except BaseException:  # a hung server accepts the connection but does not answer: the timeout comes here
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
                    raise ConnectionError(f"Redis sent an answer without a command: {str(answer)[:80]!r}")
                waiting = self._waiting.popleft()
                if not waiting.done():  # else its caller was cancelled
                    if isinstance(answer, ResponseError):
                        waiting.set_exception(answer)
                    else:
                        waiting.set_result(answer)
                if isinstance(answer, ReadOnlyError):  # it is no longer the primary: a new connection may reach the new one
                    raise ConnectionError(str(answer))
        except REDIS_AWAY as error:
            await self._drop(connection, ConnectionError(str(error) or type(error).__name__))
        except Exception as error:
            log.exception("redis_reader_broke")
            await self._drop(connection, ConnectionError(f"the reader of its answers broke: {type(error).__name__}"))

    async def _drop(self, connection: AbstractConnection | None, error: ConnectionError) -> None:
        """Close the connection if it is still the current one, and fail the commands that wait for an answer on it."""
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
    """Mark the error of an answer as seen: if its caller failed at the write, asyncio would warn of it."""
    if not answer.cancelled():
        answer.exception()


class Redis(ArqRedis):
    """The Redis of an installation: a client with arq's methods, the one shared connection, and the names of keys and channels."""

    def __init__(self, pool: BlockingConnectionPool, prefix: str) -> None:
        self.key_names = keys(prefix, int(pool.connection_kwargs.get("db") or 0))
        super().__init__(
            pool,
            job_serializer=lambda job: msgspec.msgpack.encode(job, enc_hook=repr),
            job_deserializer=msgspec.msgpack.decode,
            default_queue_name=self.key_names["deliveries"],
        )
        settings = pool.connection_kwargs
        self.shared = SharedConnection(pool, settings["retry"], settings["socket_timeout"], patience_s=pool.timeout or 0)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close every connection."""
        await self.shared.aclose()
        await super().aclose(close_connection_pool)
        await self.connection_pool.disconnect()


def connect(url: str, *, patient: bool, max_connections: int = 64, prefix: str = "movieq") -> Redis:
    """Return a client of the Redis at `url`, which connects at the first command. `prefix` is the prefix of its keys.

    `patient` is for workers: commands are retried for `PATIENT_S`, and a Redis with full memory still accepts their writes, which end
    tasks and so free memory. The API is not patient, so that its clients get a 503 within a second.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=PATIENT_S if patient else IMPATIENT_S,  # also the patience of the store's shared connection
        socket_connect_timeout=2 if patient else 0.5,
        socket_timeout=PATIENT_S if patient else IMPATIENT_S,
        health_check_interval=0,
        # one more try after a broken connection, but none after a timeout: a hung Redis gets this time once
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.01), 12) if patient else Retry(NoBackoff(), 1, (exceptions.ConnectionError,)),
        retry_on_error=[exceptions.ConnectionError, exceptions.TimeoutError, BusyLoadingError, OSError] if patient else [],
    )
    pool.connection_class = _cancellable(pool.connection_class)
    return (_Unrefused if patient else Redis)(pool, prefix)


_GROW: Final = frozenset({"HSET", "INCRBY", "PSETEX", "SADD", "SET", "SETEX", "ZADD", "ZINCRBY"})
"""The commands, used by movieq or arq, that a Redis with full memory refuses."""
_ALLOWED: Final = "#!lua flags=allow-oom\nreturn redis.call(unpack(ARGV))"


def _allowed(command: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the command, wrapped in a script that Redis accepts with full memory if it would refuse the command."""
    return ("EVAL", _ALLOWED, 0, *command) if command[0] in _GROW else command


class _UnrefusedPipeline(Pipeline):
    def execute_command(self, *command: Any, **options: Any) -> Any:
        return super().execute_command(*_allowed(command), **options)


class _Unrefused(Redis):
    """A client whose writes succeed when Redis's memory is full: deliveries are arq jobs, which start and end with plain writes."""

    async def execute_command(self, *command: Any, **options: Any) -> Any:
        return await super().execute_command(*_allowed(command), **options)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _UnrefusedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def _cancellable(cls: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return a subclass of this connection class that does not lose cancels.

    redis-py writes under `asyncio.wait_for`, which before Python 3.12 drops a cancel that arrives as the write ends: a stream whose client
    has left would stay open for ever.
    """

    class Cancellable(cls):  # type: ignore[misc, valid-type]  # the base class is a variable
        async def send_packed_command(self, *command: Any, **options: Any) -> None:
            task = asyncio.current_task()
            before = task.cancelling() if task else 0
            try:
                await super().send_packed_command(*command, **options)
            finally:  # also if the connection broke at that moment: a retry would lose the cancel
                if task and task.cancelling() > before:
                    await self.disconnect(nowait=True)  # no caller waits for the answer
                    raise asyncio.CancelledError

    return Cancellable
