"""Events on their way out: each is encoded once, and the same bytes are written to the sockets of all who watch.

A `Hub` follows logs. It keeps no task and no queue for a watcher that is up to date: when a message comes over pub/sub, it writes to every
socket that takes it. A watcher that is not up to date (it has just come, or its socket is full) has a task, which reads the log from where
the watcher is until nothing is left and nothing was announced meanwhile; then it is live again. So it misses nothing of the log and sees
nothing twice. What is not in the log (progress between its entries, previews) goes to those alone who are live.

After any doubt of the connection to Redis one reading of the log serves all who were live. A client that takes nothing for 30 s is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from redis import exceptions

from movieq import logs
from movieq.channels import Channel, Subscriber
from movieq.contracts import TERMINAL_EVENTS, EventType, ProjectId, TaskId
from movieq.store import Logged, Store, event_type

COMMENT_S: Final = 15.0
COMMENT: Final = b": still here\n\n"
TICKS: Final = 60
"""In how many parts the watchers get their comments, one part after the other: fifteen thousand at once would hold up an event."""
STUCK_S: Final = 30.0
LINGER_S: Final = 2.0
"""How long the end of the process waits for clients to take their goodbye."""
AWAY_S: Final = 1.0
"""How soon a log is asked for again while Redis is away."""
RETRY_MS: Final = 2000
ENTRIES: Final = 100
"""How much of a log is read at once."""
BUFFER_BYTES: Final = 16 * 1024
"""What may wait in the process for a client that does not take it; the kernel has its own buffers."""

Id = tuple[int, int]
START: Final[Id] = (0, 0)
"""Before every entry of a log."""

_LAST: Final = TERMINAL_EVENTS | {EventType.UPDATED}
"""Events after which the stream of a task ends, unless its log goes on."""

log = logs.get()


def pair(id: str) -> Id:
    """The two numbers of a log's id: ids are compared as such."""
    ms, _, sequence = id.partition("-")
    return int(ms), int(sequence or 0)


def frame(event_type: EventType, data: bytes, id: str | None = None) -> bytes:
    """An event in the format of an event stream (WHATWG HTML, 9.2). `data` is JSON without line breaks."""
    head = f"id: {id}\nevent: {event_type}\ndata: " if id else f"event: {event_type}\ndata: "
    return head.encode() + data + b"\n\n"


def retry(wait_ms: int = RETRY_MS) -> bytes:
    """How long a client is to wait before it connects again."""
    return b"retry: %d\n\n" % wait_ms


def chunk(data: bytes) -> bytes:
    """The bytes as a chunk of HTTP/1.1 (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


Render = Callable[[EventType, bytes], bytes]
"""From the type and the stored JSON of an event to the JSON that clients get."""


class Source(msgspec.Struct, frozen=True):
    """A log that can be followed. `ends`: a terminal event is its last, unless more follow; `name` is what `goodbye` says of it."""

    log: str
    ends: bool
    name: dict[str, str]

    @classmethod
    def of_task(cls, task_id: TaskId) -> Source:
        """The log of a task."""
        return cls(task_id, True, {"task_id": task_id})

    @classmethod
    def of_project(cls, project_id: ProjectId) -> Source:
        """The log of a project: the last thousand changes of state of its tasks, for a day after the last. Their progress comes live."""
        return cls(f"project:{project_id}", False, {"project_id": project_id})


class Facts(msgspec.Struct, frozen=True):
    """What a watcher can choose by."""

    task_type: str
    status: str


_facts = msgspec.json.Decoder(Facts)


def _facts_of(data: bytes) -> Facts:
    """Return the facts in an event's JSON; empty ones where it cannot be read."""
    try:
        return _facts.decode(data)
    except msgspec.MsgspecError:
        return Facts("", "")


class Event(msgspec.Struct, frozen=True):
    """An event on its way out. `at` is its id; for one that is not in the log (`logged` False) the time it was made."""

    at: Id
    logged: bool
    type: EventType
    data: bytes
    chunk: bytes


class Opening(msgspec.Struct, frozen=True):
    """How a stream begins: with these frames, and then with what comes after `position`; None where nothing does."""

    frames: bytes
    position: Id | None


class Watcher:
    """Somebody who follows a log. What it is told it has taken, unless it is `blocked`."""

    __slots__ = ("blocked", "comments", "reading", "since", "topic", "wants")

    def __init__(self, wants: Callable[[Facts], bool] | None = None) -> None:
        self.wants = wants
        """Which events of the log and its channel it gets; None for all."""
        self.blocked = False
        self.since: Id = START
        """Up to where it was told from the log: messages of what was before come late."""
        self.reading: asyncio.Task[None] | None = None
        self.topic: _Topic | None = None
        self.comments: set[Watcher] | None = None

    def tell(self, chunk: bytes) -> None:
        """It gets a chunk."""

    def end(self, data: bytes, linger_s: float) -> None:
        """It gets the data, and nothing after it."""

    def drop(self) -> None:
        """It gets nothing any more, also of what it has not taken yet."""

    async def drained(self) -> bool:
        """True once it is not blocked any more; False where it takes nothing."""
        return True


class SocketWatcher(Watcher, asyncio.Protocol):
    """A client at the other end of a socket whose HTTP answer has begun, `chunked` or not. It is the socket's protocol from here on.

    What the client still sends is not read for anything: an event stream has the connection to itself, and closes it at its end.
    """

    __slots__ = ("_chunked", "_connections", "_gone", "_lingering", "_taken", "_transport")

    def __init__(self, gone: Callable[[Watcher], None], wants: Callable[[Facts], bool] | None = None, *, chunked: bool = True) -> None:
        super().__init__(wants)
        self._gone = gone
        self._chunked = chunked
        self._connections: set[Any] = set()
        self._lingering: asyncio.TimerHandle | None = None
        self._taken: asyncio.Event | None = None

    def adopt(self, transport: asyncio.Transport, connections: set[Any]) -> None:
        """The socket is this watcher's; `connections` are those for which the server waits at its end."""
        self._transport = transport
        self._connections = connections
        connections.add(self)
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        transport.set_protocol(self)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # a client that has lost its network says nothing: the kernel notices that comments are not acknowledged
            self._option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STUCK_S * 1000))

    def tell(self, chunk: bytes) -> None:
        self._transport.write(chunk if self._chunked else chunk[chunk.index(b"\r\n") + 2 : -2])

    def end(self, data: bytes, linger_s: float) -> None:
        self._transport.write(((chunk(data) if data else b"") + b"0\r\n\r\n") if self._chunked else data)
        self._transport.close()
        self._lingering = asyncio.get_running_loop().call_later(linger_s, self.drop)

    def drop(self) -> None:
        # a reset: else the kernel would go on offering what the client does not take
        self._option(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _option(self, level: int, name: int, value: int | bytes) -> None:
        with contextlib.suppress(OSError):  # it may be closed already
            self._transport.get_extra_info("socket").setsockopt(level, name, value)

    async def drained(self) -> bool:
        while self.blocked:
            before = self._transport.get_write_buffer_size()
            self._taken = asyncio.Event()
            try:
                async with asyncio.timeout(STUCK_S):
                    await self._taken.wait()
            except TimeoutError:
                if self._transport.get_write_buffer_size() >= before:
                    return False
        return True

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        if self._taken is not None:
            self._taken.set()
            self._taken = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        if self._lingering is not None:
            self._lingering.cancel()
        self._gone(self)

    def shutdown(self) -> None:
        """uvicorn says that the process ends; the hub has ended the stream already."""


class EndWatcher(Watcher):
    """Waits for the end of a task, and for nothing else."""

    __slots__ = ("ended",)

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()

    def end(self, data: bytes, linger_s: float) -> None:
        self.ended.set()

    def drop(self) -> None:
        self.ended.set()


class _Topic:
    """A log that is followed, and by whom."""

    __slots__ = ("channel", "heard", "live", "newest", "recovering", "since", "source", "watchers")

    channel: Channel

    def __init__(self, source: Source) -> None:
        self.source = source
        self.watchers: set[Watcher] = set()
        self.live: set[Watcher] = set()
        """Those who have been told everything up to `newest`."""
        self.newest: Id = START
        self.since: Id = START
        """Up to where they were told from the log after a doubt."""
        self.heard = 0
        """How many entries, and doubts, were announced: a log that was read while it did not change is read to its end."""
        self.recovering: asyncio.Task[None] | None = None


class Hub:
    """The logs that are followed in this process. `run` must be running."""

    def __init__(self, store: Store, subscriber: Subscriber, render: Render) -> None:
        self._store = store
        self._subscriber = subscriber
        self._render = render
        self._topics: dict[str, _Topic] = {}
        self._comments: list[set[Watcher]] = [set() for _ in range(TICKS)]
        self._turn = 0
        self._group: asyncio.TaskGroup
        self.closing = False

    async def run(self) -> None:
        """Owns the tasks of watchers that are not live, and sends the comments."""
        async with asyncio.TaskGroup() as self._group:
            tick = 0
            while True:
                await asyncio.sleep(COMMENT_S / TICKS)
                tick = (tick + 1) % TICKS
                comment = chunk(COMMENT)
                for watcher in list(self._comments[tick]):
                    if watcher.blocked:
                        self._fall_behind(watcher)
                    else:
                        watcher.tell(comment)

    def follow(self, source: Source, watcher: Watcher, opening: Callable[[], Awaitable[Opening]]) -> None:
        """The watcher gets the opening and what comes after it, each entry once, in order, to the end of the log or the hub, or to `part`.

        The opening is made anew, a second later, where Redis is away: a browser that was sent away would meet a 503, and after that it does
        not come back.
        """
        if self.closing:
            self._bid_goodbye(source, watcher)
            return
        topic = self._topics.get(source.log)
        if topic is None:
            topic = self._topics[source.log] = _Topic(source)
            topic.channel = self._subscriber.listen(
                self._store.keys["events"] + source.log, lambda message: self._on_message(topic, message), lambda: self._on_doubt(topic)
            )
        topic.watchers.add(watcher)
        watcher.topic = topic
        self._turn = (self._turn + 1) % TICKS
        watcher.comments = self._comments[self._turn]
        watcher.comments.add(watcher)
        self._lead(watcher, lambda: self._open(topic, watcher, opening))

    def part(self, watcher: Watcher) -> None:
        """The watcher follows nothing any more."""
        topic, watcher.topic = watcher.topic, None
        reading, watcher.reading = watcher.reading, None
        if reading is not None and reading is not asyncio.current_task():
            reading.cancel()
        if watcher.comments is not None:
            watcher.comments.discard(watcher)
        if topic is None:
            return
        topic.watchers.discard(watcher)
        topic.live.discard(watcher)
        if not topic.watchers and self._topics.get(topic.source.log) is topic:
            del self._topics[topic.source.log]
            self._subscriber.leave(self._store.keys["events"] + topic.source.log)
            if topic.recovering is not None:
                topic.recovering.cancel()

    def close(self) -> None:
        """Every stream says goodbye and ends."""
        self.closing = True
        for topic in list(self._topics.values()):
            for watcher in list(topic.watchers):
                self.part(watcher)
                self._bid_goodbye(topic.source, watcher)

    def watchers(self) -> int:
        """How many streams are open."""
        return sum(len(topic.watchers) for topic in self._topics.values())

    # ── Live ──

    def _on_message(self, topic: _Topic, message: bytes) -> None:
        head, name, data = message.split(b"\n", 2)
        logged = not head.startswith(b">")
        topic.heard += logged
        if topic.recovering is not None:
            return  # the log will tell
        id, at = head.decode(), pair(head.decode().removeprefix(">"))
        if at <= topic.since:
            return
        type_ = event_type(name)
        if topic.live:
            sent = frame(type_, self._render(type_, data), id if logged else None)
            self._tell(topic, Event(at, logged, type_, data, chunk(sent)))
        elif logged:
            topic.newest = at

    def _tell(self, topic: _Topic, event: Event) -> None:
        """Every live watcher that has not had it from the log gets the event, or, where it is blocked, goes back to the log."""
        at, data, facts = event.at, event.chunk, None
        behind = []
        for watcher in topic.live:
            if at > watcher.since:
                if watcher.wants is not None:
                    facts = facts or _facts_of(event.data)
                    if not watcher.wants(facts):
                        continue
                if watcher.blocked:
                    behind.append(watcher)
                else:
                    watcher.tell(data)
        for watcher in behind:
            self._fall_behind(watcher)
        if event.logged:
            topic.newest = at
            if topic.source.ends and event.type in _LAST:
                for watcher in [each for each in topic.live if at > each.since]:
                    self._end(watcher)

    def _end(self, watcher: Watcher) -> None:
        self.part(watcher)
        watcher.end(b"", STUCK_S)

    def _bid_goodbye(self, source: Source, watcher: Watcher) -> None:
        wait_ms = RETRY_MS + random.randrange(RETRY_MS)  # noqa: S311  # spreads reconnections, hides nothing
        watcher.end(retry(wait_ms) + frame(EventType.GOODBYE, msgspec.json.encode(source.name)), LINGER_S)

    def _on_doubt(self, topic: _Topic) -> None:
        topic.heard += 1
        if topic.live and topic.recovering is None:
            topic.recovering = self._group.create_task(self._recover(topic))

    async def _recover(self, topic: _Topic) -> None:
        """Whoever was live has what was missed."""
        try:
            while True:
                heard = topic.heard
                entries = await self._log_after(topic, topic.newest)
                for entry in entries or ():
                    self._tell(topic, Event(pair(entry.id), True, entry.type, entry.data, chunk(self._frame(entry))))
                if entries is None:
                    await asyncio.sleep(AWAY_S)
                elif len(entries) < ENTRIES and heard == topic.heard:
                    topic.since = topic.newest
                    return
        except Exception:
            log.exception("stream_broke")
            for watcher in list(topic.live):
                watcher.drop()
        finally:
            topic.recovering = None

    # ── From the log ──

    def _fall_behind(self, watcher: Watcher) -> None:
        topic = watcher.topic
        if topic is not None and watcher in topic.live:
            topic.live.discard(watcher)
            position = max(watcher.since, topic.newest)
            self._lead(watcher, lambda: self._catch_up(topic, watcher, position))

    def _lead(self, watcher: Watcher, way: Callable[[], Awaitable[bool]]) -> None:
        """A task leads the watcher until it is live, has ended or is gone."""

        async def led() -> None:
            try:
                if not await way():
                    log.info("stream_stuck", **(watcher.topic.source.name if watcher.topic else {}))
                    watcher.drop()
            except Exception:
                log.exception("stream_broke")
                watcher.drop()
            finally:
                if watcher.reading is asyncio.current_task():
                    watcher.reading = None

        watcher.reading = self._group.create_task(led())

    async def _open(self, topic: _Topic, watcher: Watcher, opening: Callable[[], Awaitable[Opening]]) -> bool:
        with contextlib.suppress(TimeoutError):
            await topic.channel.wait()
        while True:
            try:
                opened = await opening()
                break
            except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
                await asyncio.sleep(AWAY_S)
        if opened.frames:
            watcher.tell(chunk(opened.frames))
        if opened.position is None:
            self._end(watcher)
            return True
        return await self._catch_up(topic, watcher, opened.position)

    async def _catch_up(self, topic: _Topic, watcher: Watcher, position: Id) -> bool:
        """The watcher has had what the log holds, and is live or has ended; False where it takes nothing."""
        last: EventType | None = None
        while await watcher.drained():
            heard = topic.heard
            entries = await self._log_after(topic, position)
            if entries is None:
                await asyncio.sleep(AWAY_S)
                continue
            if entries:
                position, last = pair(entries[-1].id), entries[-1].type
                wanted = entries if watcher.wants is None else [each for each in entries if watcher.wants(_facts_of(each.data))]
                if wanted:
                    watcher.tell(chunk(b"".join(self._frame(entry) for entry in wanted)))
            if len(entries) == ENTRIES or heard != topic.heard:
                continue
            if topic.source.ends and last in _LAST:
                self._end(watcher)
            else:
                if not topic.live:
                    topic.newest = position
                watcher.since = position
                topic.live.add(watcher)
            return True
        return False

    async def _log_after(self, topic: _Topic, position: Id) -> list[Logged] | None:
        """The next entries; None where Redis is away."""
        try:
            return await self._store.log_after(topic.source.log, f"{position[0]}-{position[1]}", ENTRIES)
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
            return None

    def _frame(self, entry: Logged) -> bytes:
        return frame(entry.type, self._render(entry.type, entry.data), entry.id)
