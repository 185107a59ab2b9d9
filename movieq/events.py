"""Events on their way out: one Redis subscription for a process, any number of bounded watchers.

`Subscriber` keeps the connection: it demands an answer to its PING, and on any doubt connects anew and says so. `Hub` spreads the events of
tasks: each is rendered once, the same bytes go to all. A watcher that falls behind, or whose connection was in doubt, reads the log again
from where it is: it misses nothing of the log and sees nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import msgspec
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from movieq import logs
from movieq.contracts import KEYS, TERMINAL_EVENTS, EventType, TaskId
from movieq.store import Logged, Store

PING_S: Final = 15.0
PONG_S: Final = 5.0
CONFIRM_S: Final = 5.0
RECONNECT_S: Final = 0.05, 1.0
"""Shortest and longest wait between two tries to connect."""
QUEUE_EVENTS: Final = 256
"""What may wait for a slow watcher before it is put back on the log."""

_LAST = TERMINAL_EVENTS | {EventType.UPDATED}
"""Events after which a stream ends, unless the log goes on."""

log = logs.get()


class Subscriber:
    """Channels of Redis's pub/sub over one connection. `run` must be running for anything to arrive."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._channels: dict[bytes, _Channel] = {}
        self._pubsub: Any = None

    async def run(self) -> None:
        """Reads for ever; whatever happens to the connection, it is made anew."""
        wait_s = RECONNECT_S[0]
        while True:
            client = Redis.from_url(
                self._url, socket_connect_timeout=CONFIRM_S, socket_timeout=None, retry=Retry(NoBackoff(), 0), health_check_interval=0
            )
            try:
                async with client.pubsub() as pubsub:
                    async with asyncio.timeout(CONFIRM_S):
                        await pubsub.subscribe(KEYS["events"])  # keeps an otherwise unused connection open
                        self._pubsub = pubsub  # from here on whoever adds a channel subscribes to it
                        if self._channels:
                            await pubsub.subscribe(*self._channels)
                    wait_s = RECONNECT_S[0]
                    await self._read(pubsub)
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("subscription_lost", problem=str(error) or type(error).__name__)
            finally:
                self._pubsub = None
                await client.aclose()
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, RECONNECT_S[1])

    async def _read(self, pubsub: Any) -> None:
        while True:
            message = await pubsub.get_message(timeout=PING_S)
            if message is None:
                async with asyncio.timeout(PONG_S):
                    await pubsub.ping()
                    message = await pubsub.get_message(timeout=None)
            channel = self._channels.get(message["channel"]) if message["channel"] else None
            if channel is None:
                continue
            if message["type"] == "subscribe":
                channel.confirmed.set()
                channel.on_doubt()
            elif message["type"] == "message":
                channel.on_message(message["data"])

    async def subscribe(self, name: str, on_message: Callable[[bytes], None], on_doubt: Callable[[], None]) -> None:
        """From here on each message of the channel is passed on. `on_doubt` is called where some may have been missed.

        Raises TimeoutError where Redis does not confirm; the channel is subscribed as soon as Redis is back.
        """
        channel = self._channels[name.encode()] = _Channel(on_message, on_doubt)
        async with asyncio.timeout(CONFIRM_S):
            if self._pubsub is not None:
                with contextlib.suppress(RedisError, OSError):  # the reader notices too, and its next connection subscribes to it
                    await self._pubsub.subscribe(name)
            await channel.confirmed.wait()

    async def unsubscribe(self, name: str) -> None:
        """Nothing of the channel is passed on any more."""
        self._channels.pop(name.encode(), None)
        if self._pubsub is not None:
            try:
                async with asyncio.timeout(CONFIRM_S):
                    await self._pubsub.unsubscribe(name)
            except (RedisError, OSError, TimeoutError):
                pass  # the reader notices too, and its next connection does not subscribe to it


class _Channel:
    def __init__(self, on_message: Callable[[bytes], None], on_doubt: Callable[[], None]) -> None:
        self.on_message = on_message
        self.on_doubt = on_doubt
        self.confirmed = asyncio.Event()


class Event(msgspec.Struct, frozen=True):
    """An event as it goes to a browser; `id` None where it is not in the log, `follows` then names the entry before it."""

    id: str | None
    type: EventType
    frame: bytes
    follows: str = ""


Render = Callable[[EventType, bytes], bytes]
"""From the type and the stored JSON of an event to the JSON that clients get."""


def frame(event_type: EventType, data: bytes, id: str | None = None) -> bytes:
    """An event in the format of an event stream (WHATWG HTML, 9.2). `data` is JSON without line breaks."""
    head = f"id: {id}\nevent: {event_type}\ndata: " if id else f"event: {event_type}\ndata: "
    return head.encode() + data + b"\n\n"


class Hub:
    """The events of tasks for the streams of one process."""

    def __init__(self, store: Store, subscriber: Subscriber, render: Render) -> None:
        self._store = store
        self._subscriber = subscriber
        self._render = render
        self._topics: dict[TaskId, _Topic] = {}
        self.closing = asyncio.Event()

    async def follow(self, task_id: TaskId, after: str | None, tick_s: float) -> AsyncGenerator[Event | None]:
        """The events of a task after an id of its log (None: from its beginning), each once, in order, to its end or the hub's.

        Gives None after every `tick_s` seconds without an event. Goes on, with a None a second, where Redis is away: a browser that was
        sent away would meet a 503, and after that it does not come back. Close it (`aclosing`) where it is left early.
        """
        watcher = _Watcher()
        await self._join(task_id, watcher)
        try:
            position, last = after, None
            while not self.closing.is_set():
                watcher.behind = False
                watcher.queue.clear()
                while (entries := await self._log_after(task_id, position)) is None and not self.closing.is_set():
                    yield None
                    await watcher.wait(RECONNECT_S[1])
                while entries:
                    for entry in entries:
                        position, last = entry.id, entry.type
                        yield self._event(entry)
                    entries = await self._log_after(task_id, position)
                if entries is None:
                    continue
                if last in _LAST:
                    return
                while not watcher.behind and not self.closing.is_set():
                    if not watcher.queue and not await watcher.wait(tick_s):
                        yield None
                    while watcher.queue:
                        event = watcher.queue.popleft()
                        if event.id is not None:
                            if position is not None and not _later(event.id, position):
                                continue
                            position = event.id
                        elif position is not None and event.follows and _later(position, event.follows):
                            continue  # the log has told what came after it
                        yield event
                        if event.type in _LAST:
                            return
        finally:
            await self._part(task_id, watcher)

    def close(self) -> None:
        """Every stream ends."""
        self.closing.set()
        for topic in self._topics.values():
            topic.wake()

    def watchers(self) -> int:
        """How many streams are open."""
        return sum(len(topic.watchers) for topic in self._topics.values())

    async def _join(self, task_id: TaskId, watcher: _Watcher) -> None:
        topic = self._topics.get(task_id)
        if topic is None:
            topic = self._topics[task_id] = _Topic(self._live)
            topic.ready = asyncio.ensure_future(self._subscriber.subscribe(KEYS["events"] + task_id, topic.on_message, topic.on_doubt))
        topic.watchers.add(watcher)
        try:
            await asyncio.shield(topic.ready)
        except TimeoutError:
            pass  # Redis is away: once it is back the watcher hears of doubt, and reads the log again
        except BaseException:
            await self._part(task_id, watcher)
            raise

    async def _log_after(self, task_id: TaskId, position: str | None) -> list[Logged] | None:
        """The next entries; None where Redis is away."""
        try:
            return await self._store.log_after(task_id, position)
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
            return None

    async def _part(self, task_id: TaskId, watcher: _Watcher) -> None:
        topic = self._topics[task_id]
        topic.watchers.discard(watcher)
        if not topic.watchers:
            del self._topics[task_id]
            topic.ready.cancel()
            await asyncio.wait({topic.ready})
            if not topic.ready.cancelled():
                topic.ready.exception()
            if task_id not in self._topics:  # nobody came meanwhile
                await self._subscriber.unsubscribe(KEYS["events"] + task_id)

    def _live(self, message: bytes) -> Event:
        head, event_type, data = message.split(b"\n", 2)
        id, _, follows = head.decode().partition(">")
        return self._event(Logged(id, EventType(event_type.decode()), data), follows)

    def _event(self, entry: Logged, follows: str = "") -> Event:
        return Event(entry.id or None, entry.type, frame(entry.type, self._render(entry.type, entry.data), entry.id), follows)


class _Topic:
    """The watchers of one task."""

    ready: asyncio.Future[None]

    def __init__(self, live: Callable[[bytes], Event]) -> None:
        self._live = live
        self.watchers: set[_Watcher] = set()

    def on_message(self, message: bytes) -> None:
        event = self._live(message)
        for watcher in self.watchers:
            watcher.put(event)

    def on_doubt(self) -> None:
        for watcher in self.watchers:
            watcher.behind = True
        self.wake()

    def wake(self) -> None:
        for watcher in self.watchers:
            watcher.ready.set()


class _Watcher:
    """What one stream has yet to send. When that is too much, it is `behind`, takes nothing more and goes back to the log."""

    def __init__(self) -> None:
        self.queue: deque[Event] = deque()
        self.ready = asyncio.Event()
        self.behind = False

    def put(self, event: Event) -> None:
        if self.behind or len(self.queue) >= QUEUE_EVENTS:
            self.behind = True  # and what comes now would pass what was left out: its id would hide the others'
        else:
            self.queue.append(event)
        self.ready.set()

    async def wait(self, seconds: float) -> bool:
        """Whether something came within the time."""
        self.ready.clear()
        try:
            async with asyncio.timeout(seconds):
                await self.ready.wait()
        except TimeoutError:
            return False
        return True


def _later(id: str, than: str) -> bool:
    """Ids are pairs of numbers and are compared as such."""
    return pair(id) > pair(than)


def pair(id: str) -> tuple[int, int]:
    """The two numbers of a log's id."""
    ms, _, sequence = id.partition("-")
    return int(ms), int(sequence or 0)
