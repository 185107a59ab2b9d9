"""A real proxy in front of a Valkey. It can lose an answer, hold answers back, cut connections, or let nothing through.

A lost answer always ends its connection, since no network drops one message from the middle of a stream.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from movieq.queue.store import Store

Command = list[bytes]
Match = Callable[[Command, bytes], bool]
"""Whether to act on a command and its answer, given as bytes from the connection."""
EMPTY = b"*0\r\n"


def script(store: Store, name: str, *words: str) -> Match:
    """Match calls of a script that changed something: all these words are among the arguments, and the answer is no empty list."""
    sha, source = store.scripts[name].sha.encode(), store.scripts[name].source.encode()
    wanted = {word.encode() for word in words}

    def match(command: Command, answer: bytes) -> bool:
        known = command[:2] in ([b"EVALSHA", sha], [b"EVAL", source]) and not answer.startswith(b"-NOSCRIPT")
        return known and wanted <= set(command) and answer != EMPTY

    return match


class Proxy:
    """A proxy in front of a Valkey; `url` is the address for clients."""

    def __init__(self, server: Path, path: Path) -> None:
        self.url = f"unix://{path}"
        self.swallowed: Command | None = None
        self.happened = asyncio.Event()
        """Set when an answer is lost or held back."""
        self._server = server
        self._swallow: Match | None = None
        self._hold: Match | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._released = asyncio.Event()
        self._open: set[_Pair] = set()

    def swallow(self, match: Match) -> None:
        """Lose the next answer to such a command: the server has run it, but the client gets no answer and its connection is closed."""
        self._swallow, self.swallowed = match, None
        self.happened.clear()

    def hold(self, match: Match) -> None:
        """Hold back the next answer to such a command, and all that follows on that connection, until `release`."""
        self._hold = match
        self.happened.clear()
        self._released.clear()

    def release(self) -> None:
        """Pass on what was held back."""
        self._hold = None
        self._released.set()

    def cut(self) -> None:
        """Close every connection."""
        for pair in list(self._open):
            pair.close()

    def freeze(self) -> None:
        """Accept and leave open connections, but pass nothing on: they are half open."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Pass on everything again, also what was sent meanwhile."""
        self._flowing.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on everything on one connection until it ends."""
        try:
            there = await asyncio.open_unix_connection(str(self._server))
        except OSError:
            writer.close()
            return
        pair = _Pair(writer, there[1])
        self._open.add(pair)
        asked: deque[Command] = deque()
        try:
            async with asyncio.TaskGroup() as group:
                for pump in (self._forward(reader, there[1], asked), self._back(there[0], writer, asked)):
                    pair.tasks.append(group.create_task(pump))
        except* (OSError, EOFError):
            pass
        finally:
            pair.close()
            self._open.discard(pair)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: deque[Command]) -> None:
        while True:
            raw, command = await _frame(reader)
            await self._flowing.wait()
            asked.append(command)
            writer.write(raw)
            await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: deque[Command]) -> None:
        while True:
            raw, _ = await _frame(reader)
            await self._flowing.wait()
            command = asked.popleft() if asked else []  # of a subscription come messages that nobody asked for
            if self._swallow is not None and self._swallow(command, raw):
                self._swallow, self.swallowed = None, command
                self.happened.set()
                raise EOFError
            if self._hold is not None and self._hold(command, raw):
                self._hold = None
                self.happened.set()
                await self._released.wait()
            writer.write(raw)
            await writer.drain()


class _Pair:
    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self._writers = writers

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()


async def _frame(reader: asyncio.StreamReader) -> tuple[bytes, Command]:
    """Return the next whole message of Redis's protocol as bytes, and its strings. Raises EOFError at the end."""
    line = await reader.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError
    kind, rest = line[:1], line[1:-2]
    if kind == b"$" and rest != b"-1":
        body = await reader.readexactly(int(rest) + 2)
        return line + body, [body[:-2]]
    raw, strings = [line], []
    if kind == b"*":
        for _ in range(int(rest)):
            part, inner = await _frame(reader)
            raw.append(part)
            strings += inner
    return b"".join(raw), strings


@asynccontextmanager
async def proxy(server: Path) -> AsyncIterator[Proxy]:
    """Yield a proxy on a socket of its own for the block."""
    with tempfile.TemporaryDirectory(prefix="movieq-proxy-") as folder:
        proxy = Proxy(server, Path(folder) / "proxy.sock")
        serving: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(proxy.serve(reader, writer))
            serving.add(task)
            task.add_done_callback(serving.discard)

        listening = await asyncio.start_unix_server(connected, Path(folder) / "proxy.sock", limit=2**20)
        try:
            yield proxy
        finally:
            listening.close()
            proxy.cut()
            proxy.thaw()
            proxy.release()
            with suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await asyncio.gather(*serving, return_exceptions=True)
