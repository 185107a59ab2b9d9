"""Redis pub/sub over one connection per process.

When Redis does not answer a PING, or any error occurs, the connection is reopened, all channels are subscribed again, and each listener is
told that messages may be missing (`on_gap`). Not supported: patterns, and two listeners on one channel.
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
"""Most channels in one command."""

log = logs.get()


class Channel:
    """A subscribed channel. `confirmed` is set once Redis has confirmed the subscription: from then on no message is missed."""

    __slots__ = ("confirmed", "on_gap", "on_message")

    def __init__(self, on_message: Callable[[bytes], None], on_gap: Callable[[], None]) -> None:
        self.on_message = on_message
        self.on_gap = on_gap
        self.confirmed = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the confirmation. Raises TimeoutError if Redis is unavailable; once it is back, it confirms and `on_gap` is called."""
        async with asyncio.timeout(CONFIRM_S):
            await self.confirmed.wait()


class Subscriber:
    """The pub/sub channels of a process. Messages arrive only while `run` is running."""

    def __init__(self, url: str, events: str = KEYS["events"]) -> None:
        """`events` is a channel that is always subscribed to, which keeps an otherwise unused connection in pub/sub mode."""
        self.events = events
        pool: Any = ConnectionPool.from_url(
            url, socket_connect_timeout=CONFIRM_S, socket_timeout=None, retry=Retry(NoBackoff(), 0), health_check_interval=0
        )
        self._make: Callable[[], Any] = pool.make_connection
        self._channels: dict[bytes, Channel] = {}
        self._untold: dict[bytes, None] = {}
        """Channels that were subscribed or left since the last command to Redis, in order."""
        self._news = asyncio.Event()
        self._heard = False

    def listen(self, name: str, on_message: Callable[[bytes], None], on_gap: Callable[[], None]) -> Channel:
        """Subscribe to a channel and pass its messages on.

        `on_gap` is called when messages may have been missed, and at every confirmation.
        """
        channel = self._channels[name.encode()] = Channel(on_message, on_gap)
        self._tell(name)
        return channel

    def leave(self, name: str) -> None:
        """Unsubscribe from a channel; no more of its messages are passed on."""
        self._channels.pop(name.encode(), None)
        self._tell(name)

    def _tell(self, name: str) -> None:
        self._untold[name.encode()] = None
        self._news.set()

    async def run(self) -> None:
        """Read messages for ever, reconnecting after every error."""
        backoff = Backoff(*RECONNECT_S)
        while True:
            connection = self._make()
            try:
                async with asyncio.timeout(CONFIRM_S):
                    await connection.connect()
                    await connection.send_command("SUBSCRIBE", self.events)
                backoff.reset()
                self._untold = dict.fromkeys(self._channels)
                self._news.set()
                async with asyncio.TaskGroup() as group:
                    for part in (self._read, self._ask, self._check_answers):
                        group.create_task(part(connection))
            except* (*REDIS_AWAY, TypeError, ValueError) as errors:  # the last two: the answer is not a pub/sub message
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
                continue  # a channel that was just left, or a PONG
            try:
                if kind == b"message":
                    channel.on_message(rest[0])
                elif kind == b"subscribe":
                    channel.confirmed.set()
                    channel.on_gap()
            except Exception:  # one listener's error must not stop the others
                log.exception("listener_broke", channel=name.decode(errors="replace"))

    async def _ask(self, connection: Any) -> None:
        """Send SUBSCRIBE and UNSUBSCRIBE for each channel that was added or left."""
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

    async def _check_answers(self, connection: Any) -> None:
        """Raise TimeoutError when Redis has stopped answering."""
        while True:
            self._heard = False
            await asyncio.sleep(PING_S)
            if not self._heard:
                await connection.send_command("PING")
                await asyncio.sleep(PONG_S)
                if not self._heard:
                    raise TimeoutError("Redis does not answer")
