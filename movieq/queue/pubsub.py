"""Channels of Redis's pub/sub over one connection for a process.

The connection is in doubt whenever Redis does not answer a PING, or anything goes wrong: then it is made anew, every channel is subscribed
to again, and whoever listens is told that messages may be missing. Left out: patterns, and two listeners of one channel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from movieq import logs
from movieq.backoff import Backoff
from movieq.errors import first_of
from movieq.queue.keys import KEYS
from movieq.queue.refusals import REDIS_AWAY

PING_S: Final = 15.0
PONG_S: Final = 5.0
CONFIRM_S: Final = 5.0
RECONNECT_S: Final = 0.05, 1.0
"""Shortest and longest wait between two tries to connect."""
BATCH: Final = 500
"""How many channels one command names."""

log = logs.get()


class Channel:
    """A channel that is listened to. `confirmed` is set once nothing that is published is missed."""

    __slots__ = ("confirmed", "on_doubt", "on_message")

    def __init__(self, on_message: Callable[[bytes], None], on_doubt: Callable[[], None]) -> None:
        self.on_message = on_message
        self.on_doubt = on_doubt
        self.confirmed = asyncio.Event()

    async def wait(self) -> None:
        """It is confirmed. Raises TimeoutError where Redis is away; it will be as soon as Redis is back, and there is doubt then."""
        async with asyncio.timeout(CONFIRM_S):
            await self.confirmed.wait()


class Subscriber:
    """The channels of a process. `run` must be running for anything to arrive."""

    def __init__(self, url: str, events: str = KEYS["events"]) -> None:
        """`events` is a channel that is always subscribed to, which keeps an otherwise unused connection in pub/sub mode."""
        self._events = events
        pool: Any = ConnectionPool.from_url(
            url, socket_connect_timeout=CONFIRM_S, socket_timeout=None, retry=Retry(NoBackoff(), 0), health_check_interval=0
        )
        self._make: Callable[[], Any] = pool.make_connection
        self._channels: dict[bytes, Channel] = {}
        self._untold: dict[bytes, None] = {}
        """Channels that were taken up or left since Redis was last told, in their order."""
        self._news = asyncio.Event()
        self._heard = False

    def listen(self, name: str, on_message: Callable[[bytes], None], on_doubt: Callable[[], None]) -> Channel:
        """Each message of the channel is passed on, once it is confirmed.

        `on_doubt` is called where some may have been missed, and at every confirmation.
        """
        channel = self._channels[name.encode()] = Channel(on_message, on_doubt)
        self._tell(name)
        return channel

    def leave(self, name: str) -> None:
        """Nothing of the channel is passed on any more."""
        self._channels.pop(name.encode(), None)
        self._tell(name)

    def _tell(self, name: str) -> None:
        self._untold[name.encode()] = None
        self._news.set()

    async def run(self) -> None:
        """Reads for ever; whatever happens to the connection, it is made anew."""
        backoff = Backoff(*RECONNECT_S)
        while True:
            connection = self._make()
            try:
                async with asyncio.timeout(CONFIRM_S):
                    await connection.connect()
                    await connection.send_command("SUBSCRIBE", self._events)
                backoff.reset()
                self._untold = dict.fromkeys(self._channels)
                self._news.set()
                async with asyncio.TaskGroup() as group:
                    for part in (self._read, self._ask, self._doubt):
                        group.create_task(part(connection))
            except* (*REDIS_AWAY, TypeError, ValueError) as errors:  # the last two: what it read is no pub/sub message
                first = first_of(errors)
                log.warning("subscription_lost", problem=str(first) or type(first).__name__)
            finally:
                await connection.disconnect(nowait=True)
            await asyncio.sleep(backoff.next_s())

    async def _read(self, connection: Any) -> None:
        while True:
            kind, name, *rest = await connection.read_response(disconnect_on_error=False)
            self._heard = True
            channel = self._channels.get(name)
            if channel is None:
                continue  # left, and Redis does not know yet; or a PONG
            try:
                if kind == b"message":
                    channel.on_message(rest[0])
                elif kind == b"subscribe":
                    channel.confirmed.set()
                    channel.on_doubt()
            except Exception:  # of one listener: the others go on
                log.exception("listener_broke", channel=name.decode(errors="replace"))

    async def _ask(self, connection: Any) -> None:
        """Redis is told of each channel that was taken up or left."""
        while True:
            await self._news.wait()
            self._news.clear()
            untold, self._untold = list(self._untold), {}
            for start in range(0, len(untold), BATCH):
                names = untold[start : start + BATCH]
                left = [name for name in names if name not in self._channels]
                taken = [name for name in names if name in self._channels]
                if left:
                    await connection.send_command("UNSUBSCRIBE", *left)
                if taken:
                    await connection.send_command("SUBSCRIBE", *taken)

    async def _doubt(self, connection: Any) -> None:
        """Raises TimeoutError where Redis has fallen silent."""
        while True:
            self._heard = False
            await asyncio.sleep(PING_S)
            if not self._heard:
                await connection.send_command("PING")
                await asyncio.sleep(PONG_S)
                if not self._heard:
                    raise TimeoutError("Redis does not answer")
