"""The clients of a stream: each gets the events of one topic, once and in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

import msgspec

from movieq.queue.pubsub import Channel
from movieq.streams.sse import START, Id, chunk
from movieq.tasks.states import TERMINAL_EVENTS, EventType, ProjectId, TaskId

COMMENT: Final = b": still here\n\n"
STUCK_S: Final = 30.0
BUFFER_BYTES: Final = 16 * 1024
"""What may wait in the process for a client that does not take it; the kernel has its own buffers."""

LAST_EVENTS: Final = TERMINAL_EVENTS | {EventType.UPDATED}
"""Events after which the stream of a task ends, unless its log goes on."""


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


def facts_of(data: bytes) -> Facts:
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
        self.topic: Topic | None = None
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


class Topic:
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
