"""A relay in front of the CMS, so that a fault strikes in the middle of an upload, and of a chosen one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

CHUNK: Final = 16 * 1024


class Relay:
    """`url` takes the place of the CMS's. What is asked for strikes once, at the next upload."""

    def __init__(self, port: int) -> None:
        self.url = ""
        self.struck = asyncio.Event()
        self._port = port
        self._strike: Callable[[], object] | None = None
        self._after_bytes: int | None = None
        self._held: asyncio.Event | None = None

    def at_upload(self, strike: Callable[[], object], after_bytes: int = 0) -> None:
        """The strike comes when more than so many bytes of the upload have gone on to the CMS."""
        self._strike, self._after_bytes = strike, after_bytes

    def at_answer(self, strike: Callable[[], object] = lambda: None) -> None:
        """The strike comes with the answer to the upload, of which nothing arrives."""
        self._strike, self._after_bytes = strike, None

    def hold(self) -> asyncio.Event:
        """The upload lies here until this event is set, even where its client has gone meanwhile."""
        self._held = asyncio.Event()
        return self._held

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.close()
            return
        pumps = [asyncio.create_task(self._forward(reader, back, answered := asyncio.Event()))]
        pumps.append(asyncio.create_task(self._answer(there, writer, answered)))
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for each in (writer, back):
                each.close()

    def _hit(self) -> None:
        strike, self._strike = self._strike, None
        if strike is not None:
            strike()
            self.struck.set()

    async def _forward(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, answered: asyncio.Event) -> None:
        sent = 0
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                upload = data.startswith(b"POST ")
                if upload and self._held is not None:
                    held, self._held = self._held, None
                    data += await reader.read()  # to the end: its client gives up
                    await held.wait()
                    back.write(data)
                    await back.drain()
                    await answered.wait()
                    return
                back.write(data)
                await back.drain()
                sent = len(data) if upload else sent + len(data) if sent else 0
                if sent and self._after_bytes is not None and sent > self._after_bytes:
                    self._hit()

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, answered: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await there.read(CHUNK):
                answered.set()
                if self._strike is not None and self._after_bytes is None and data.startswith(b"HTTP/1.1 201"):
                    self._hit()
                    return
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def relay(url: str) -> AsyncIterator[Relay]:
    """A relay to the CMS at this address, for the length of a block."""
    host, _, path = url.removeprefix("http://").partition("/")
    relay = Relay(int(host.partition(":")[2]))
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    relay.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/{path}"
    async with server:
        yield relay
