"""The SSE hub: each event is encoded once, and the same bytes are written to the sockets of all watchers.

A live watcher, one that is up to date, needs no asyncio task and no queue: when a message arrives over pub/sub, the hub writes it to the
watcher's socket. A watcher that is not live (it is new, or its socket is full) has an asyncio task, which reads the event log from the
watcher's position until nothing is left and nothing was announced meanwhile; then the watcher is live again. So it misses no entry of the
log and gets none twice. Events that are not in the log (progress between entries, previews) go to live watchers only.

When messages may have been missed, one read of the log serves all live watchers. A client that reads nothing for 30 s is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from redis import exceptions

from movieq import logs
from movieq.queue.pubsub import Subscriber
from movieq.queue.queries import Queries
from movieq.queue.records import Logged, event_type
from movieq.streams.sse import RETRY_MS, Id, chunk, frame, pair, retry
from movieq.streams.watchers import COMMENT, LAST_EVENTS, STUCK_S, Access, Event, Opening, Render, Source, Topic, Watcher, facts_of
from movieq.tasks.states import EventType

COMMENT_S: Final = 15.0
TICKS: Final = 60
"""Number of groups in which watchers get their comments, one after the other: comments to all fifteen thousand would delay events."""
LINGER_S: Final = 2.0
"""Longest wait at the end of the process for clients to read their goodbye."""
AWAY_S: Final = 1.0
"""Wait between two tries to read a log while Redis is unavailable."""

log = logs.get()


class Hub:
    """The event logs that this process follows, and their watchers. `run` must be running."""

    def __init__(self, queries: Queries, subscriber: Subscriber, render: Render, may_read: Callable[[Access], Awaitable[bool]]) -> None:
        self._queries = queries
        self._subscriber = subscriber
        self._render = render
        self._may_read = may_read
        self._topics: dict[str, Topic] = {}
        self._comments: list[set[Watcher]] = [set() for _ in range(TICKS)]
        self._turn = 0
        self._group: asyncio.TaskGroup
        self.closing = False

    async def run(self) -> None:
        """Send the comments, and own the asyncio tasks of watchers that are not live."""
        async with asyncio.TaskGroup() as self._group:
            tick = 0
            while True:
                await asyncio.sleep(COMMENT_S / TICKS)
                tick = (tick + 1) % TICKS
                await self._comment(self._comments[tick])

    async def _comment(self, watchers: set[Watcher]) -> None:
        """Send each watcher a comment, or end its stream if its API key was revoked."""
        comment = chunk(COMMENT)
        allowed = {access: await self._may_read(access) for access in {watcher.access for watcher in watchers} if access is not None}
        for watcher in list(watchers):
            if watcher.access is not None and not allowed.get(watcher.access, True):
                self._end_revoked(watcher)
            elif watcher.blocked:
                self._fall_behind(watcher)
            else:
                watcher.tell(comment)

    def follow(self, source: Source, watcher: Watcher, opening: Callable[[], Awaitable[Opening]]) -> None:
        """Send the watcher the opening and all later events, in order, until the log ends, the hub closes or `leave` is called.

        While Redis is unavailable, `opening` is called again every second: if the stream ended instead, the browser would reconnect, get a
        503 and never try again.
        """
        if self.closing:
            self._bid_goodbye(source, watcher)
            return
        topic = self._topics.get(source.log)
        if topic is None:
            topic = self._topics[source.log] = Topic(source)
            topic.channel = self._subscriber.listen(
                self._subscriber.events + source.log, lambda message: self._on_message(topic, message), lambda: self._on_gap(topic)
            )
        topic.watchers.add(watcher)
        watcher.topic = topic
        self._turn = (self._turn + 1) % TICKS
        watcher.comments = self._comments[self._turn]
        watcher.comments.add(watcher)
        self._serve(watcher, lambda: self._open(topic, watcher, opening))

    def leave(self, watcher: Watcher) -> None:
        """Stop sending to the watcher."""
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
            self._subscriber.leave(self._subscriber.events + topic.source.log)
            if topic.recovering is not None:
                topic.recovering.cancel()

    def close(self) -> None:
        """Send a goodbye to every stream and end it."""
        self.closing = True
        for topic in list(self._topics.values()):
            for watcher in list(topic.watchers):
                self.leave(watcher)
                self._bid_goodbye(topic.source, watcher)

    def watchers(self) -> int:
        """Return the number of open streams."""
        return sum(len(topic.watchers) for topic in self._topics.values())

    # ── Live ──

    def _on_message(self, topic: Topic, message: bytes) -> None:
        head, name, data = message.split(b"\n", 2)
        logged = not head.startswith(b">")
        topic.heard += logged
        if topic.recovering is not None:
            return  # the recovery reads it from the log
        id, at = head.decode(), pair(head.decode().removeprefix(">"))
        if at <= topic.since:
            return
        type_ = event_type(name)
        if topic.live:
            sent = frame(type_, self._render(type_, data), id if logged else None)
            self._tell(topic, Event(at, logged, type_, data, chunk(sent)))
        elif logged:
            topic.newest = at

    def _tell(self, topic: Topic, event: Event) -> None:
        """Send the event to each live watcher that has not got it from the log; a blocked watcher goes back to reading the log."""
        at, data, facts = event.at, event.chunk, None
        behind = []
        for watcher in topic.live:
            if at > watcher.since:
                if watcher.wants is not None:
                    facts = facts or facts_of(event.data)
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
            if topic.source.ends and event.type in LAST_EVENTS:
                for watcher in [each for each in topic.live if at > each.since]:
                    self._end(watcher)

    def _end(self, watcher: Watcher) -> None:
        self.leave(watcher)
        watcher.end(b"", STUCK_S)

    def _end_revoked(self, watcher: Watcher) -> None:
        """Send the watcher a goodbye and end its stream. When it reconnects, the answer says that its key was revoked."""
        topic = watcher.topic
        self.leave(watcher)
        if topic is not None:
            log.info("stream_revoked", **topic.source.name)
            self._bid_goodbye(topic.source, watcher)

    def _bid_goodbye(self, source: Source, watcher: Watcher) -> None:
        wait_ms = RETRY_MS + random.randrange(RETRY_MS)  # noqa: S311  # spreads reconnections, hides nothing
        watcher.end(retry(wait_ms) + frame(EventType.GOODBYE, msgspec.json.encode(source.name)), LINGER_S)

    def _on_gap(self, topic: Topic) -> None:
        topic.heard += 1
        if topic.live and topic.recovering is None:
            topic.recovering = self._group.create_task(self._recover(topic))

    async def _recover(self, topic: Topic) -> None:
        """Send the live watchers the entries that were missed."""
        try:
            while True:
                heard = topic.heard
                entries = await self._log_after(topic, topic.newest)
                for entry in entries or ():
                    self._tell(topic, Event(pair(entry.id), True, entry.type, entry.data, chunk(self._frame(entry))))
                if entries is None:
                    await asyncio.sleep(AWAY_S)
                elif not entries and heard == topic.heard:
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
            self._serve(watcher, lambda: self._catch_up(topic, watcher, position))

    def _serve(self, watcher: Watcher, way: Callable[[], Awaitable[bool]]) -> None:
        """Start the asyncio task that serves the watcher until it is live, has ended or is gone."""

        async def served() -> None:
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

        watcher.reading = self._group.create_task(served())

    async def _open(self, topic: Topic, watcher: Watcher, opening: Callable[[], Awaitable[Opening]]) -> bool:
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

    async def _catch_up(self, topic: Topic, watcher: Watcher, position: Id) -> bool:
        """Send the log from `position`, then make the watcher live or end it. Return False if the client reads nothing."""
        last: EventType | None = None
        while await watcher.drained():
            heard = topic.heard
            entries = await self._log_after(topic, position)
            if entries is None:
                await asyncio.sleep(AWAY_S)
                continue
            if entries:
                position, last = pair(entries[-1].id), entries[-1].type
                wanted = entries if watcher.wants is None else [each for each in entries if watcher.wants(facts_of(each.data))]
                if wanted:
                    watcher.tell(chunk(b"".join(self._frame(entry) for entry in wanted)))
            if entries or heard != topic.heard:
                continue
            if topic.source.ends and last in LAST_EVENTS:
                self._end(watcher)
            else:
                if not topic.live:
                    topic.newest = position
                watcher.since = position
                topic.live.add(watcher)
            return True
        return False

    async def _log_after(self, topic: Topic, position: Id) -> list[Logged] | None:
        """Return the next entries; None while Redis is unavailable."""
        try:
            return await self._queries.log_after(topic.source.log, f"{position[0]}-{position[1]}")
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
            return None

    def _frame(self, entry: Logged) -> bytes:
        return frame(entry.type, self._render(entry.type, entry.data), entry.id)
