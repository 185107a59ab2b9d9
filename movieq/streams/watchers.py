"""The watchers of a log: each gets the events of one topic, once and in order."""

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
"""Most bytes that wait in the process for a slow client; the kernel has its own buffers."""

LAST_EVENTS: Final = TERMINAL_EVENTS | {EventType.UPDATED}
"""Events after which a task's stream ends, unless its log has later entries."""


Render = Callable[[EventType, bytes], bytes]
"""A function from an event's type and stored JSON to the JSON that clients get."""


class Source(msgspec.Struct, frozen=True):
    """A log that can be followed. `ends`: the stream ends after the last terminal event; `name` is the data of the `goodbye` event."""

    log: str
    ends: bool
    name: dict[str, str]

    @classmethod
    def of_task(cls, task_id: TaskId) -> Source:
        """Return the log of a task."""
        return cls(task_id, True, {"task_id": task_id})

    @classmethod
    def of_project(cls, project_id: ProjectId) -> Source:
        """Return the log of a project: the last thousand state changes of its tasks, for a day after the newest. Progress is only live."""
        return cls(f"project:{project_id}", False, {"project_id": project_id})


class Facts(msgspec.Struct, frozen=True):
    """The fields of an event that a watcher can filter by."""

    task_type: str
    status: str


_facts = msgspec.json.Decoder(Facts)


def facts_of(data: bytes) -> Facts:
    """Return the facts of an event's JSON; empty ones if it cannot be read."""
    try:
        return _facts.decode(data)
    except msgspec.MsgspecError:
        return Facts("", "")


class Event(msgspec.Struct, frozen=True):
    """An event to send. `at` is its id in the log; for an event that is not in the log (`logged` is False), the time it was created."""

    at: Id
    logged: bool
    type: EventType
    data: bytes
    chunk: bytes


class Opening(msgspec.Struct, frozen=True):
    """The start of a stream: these frames, then the entries after `position`. None: nothing follows, and the stream ends."""

    frames: bytes
    position: Id | None


class Access(msgspec.Struct, frozen=True):
    """The API key by which a stream was opened, by its hash, and the project that it reads."""

    key_id: str
    project_id: ProjectId


class Watcher:
    """A receiver of a log's events. While `blocked` is set, it has not taken all that was sent."""

    __slots__ = ("access", "blocked", "comments", "reading", "since", "topic", "wants")

    def __init__(self, wants: Callable[[Facts], bool] | None = None, access: Access | None = None) -> None:
        self.wants = wants
        """Which events the watcher gets; None for all."""
        self.access = access
        """What it may read: the stream ends once the key is revoked. None: it may read until it leaves."""
        self.blocked = False
        self.since: Id = START
        """The position up to which it was served from the log: messages of earlier events arrive late and are skipped."""
        self.reading: asyncio.Task[None] | None = None
        self.topic: Topic | None = None
        self.comments: set[Watcher] | None = None

    def tell(self, chunk: bytes) -> None:
        """Send a chunk."""

    def end(self, data: bytes, linger_s: float) -> None:
        """Send the data, then end the stream; drop it after `linger_s`."""

    def drop(self) -> None:
        """End the stream at once and discard what was not taken yet."""

    async def drained(self) -> bool:
        """Wait until the watcher is no longer blocked. Return False if it takes nothing for `STUCK_S`."""
        return True


class SocketWatcher(Watcher, asyncio.Protocol):
    """A client on a socket whose HTTP answer has begun, `chunked` or not. This object becomes the socket's protocol.

    Further input from the client is ignored: an event stream uses the connection alone and closes it at its end.
    """

    __slots__ = ("_chunked", "_connections", "_gone", "_lingering", "_taken", "_transport")

    def __init__(
        self,
        gone: Callable[[Watcher], None],
        wants: Callable[[Facts], bool] | None = None,
        access: Access | None = None,
        *,
        chunked: bool = True,
    ) -> None:
        super().__init__(wants, access)
        self._gone = gone
        self._chunked = chunked
        self._connections: set[Any] = set()
        self._lingering: asyncio.TimerHandle | None = None
        self._taken: asyncio.Event | None = None

    def adopt(self, transport: asyncio.Transport, connections: set[Any]) -> None:
        """Take over the socket; `connections` is the set that the server waits for when it stops."""
        self._transport = transport
        self._connections = connections
        connections.add(self)
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        transport.set_protocol(self)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # a client that has lost its network does not close the connection: the kernel notices that comments are not acknowledged
            self._option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STUCK_S * 1000))

    def tell(self, chunk: bytes) -> None:
        self._transport.write(chunk if self._chunked else chunk[chunk.index(b"\r\n") + 2 : -2])

    def end(self, data: bytes, linger_s: float) -> None:
        self._transport.write(((chunk(data) if data else b"") + b"0\r\n\r\n") if self._chunked else data)
        self._transport.close()
        self._lingering = asyncio.get_running_loop().call_later(linger_s, self.drop)

    def drop(self) -> None:
        # a reset: else the kernel would keep trying to send the buffered data
        self._option(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _option(self, level: int, name: int, value: int | bytes) -> None:
        with contextlib.suppress(OSError):  # the socket may be closed already
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
        """Do nothing: uvicorn calls this when the process ends, and the hub has ended the stream already."""


class EndWatcher(Watcher):
    """A watcher that only waits for the end of a task."""

    __slots__ = ("ended",)

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()

    def end(self, data: bytes, linger_s: float) -> None:
        self.ended.set()

    def drop(self) -> None:
        self.ended.set()


class Topic:
    """A followed log and its watchers."""

    __slots__ = ("channel", "heard", "live", "newest", "recovering", "since", "source", "watchers")

    channel: Channel

    def __init__(self, source: Source) -> None:
        self.source = source
        self.watchers: set[Watcher] = set()
        self.live: set[Watcher] = set()
        """The watchers that have got every event up to `newest`."""
        self.newest: Id = START
        self.since: Id = START
        """The position up to which the last recovery served the live watchers from the log."""
        self.heard = 0
        """Count of announced entries and of gaps: if it is the same before and after a read, the log was read to its end."""
        self.recovering: asyncio.Task[None] | None = None
