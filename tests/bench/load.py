"""A load of one request over many kept connections: raw sockets, so that the client costs less than what it measures."""

from __future__ import annotations

import asyncio
import time
from typing import cast


class _Connection(asyncio.Protocol):
    """Sends the request again as soon as its answer is whole."""

    def __init__(self, request: bytes, until_s: float, done: asyncio.Future[None]) -> None:
        self._request = request
        self._until_s = until_s
        self._done = done
        self._buffer = b""
        self.answers = 0
        self.latencies_s: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._send()

    def _send(self) -> None:
        self._begun = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        lower = head.lower()
        length = int(lower.split(b"content-length: ")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 2"):
            self._done.set_exception(RuntimeError(head.split(b"\r\n")[0].decode()))
            self._transport.close()
            return
        self.latencies_s.append(time.perf_counter() - self._begun)
        self._buffer = b""
        if time.perf_counter() < self._until_s:
            self._send()
        else:
            self._transport.close()
            self._done.set_result(None)


async def run(port: int, request: bytes, connections: int, seconds: float) -> tuple[float, list[float]]:
    """Answers a second, and each one's latency in seconds. Raises RuntimeError for an answer that is none of the 200s."""
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    opened: list[_Connection] = []
    waiting = []
    for _ in range(connections):
        done: asyncio.Future[None] = loop.create_future()
        _, protocol = await loop.create_connection(lambda done=done: _Connection(request, begun + seconds, done), "127.0.0.1", port)  # type: ignore[misc]  # mypy infers no type for a lambda with a default
        opened.append(protocol)
        waiting.append(done)
    async with asyncio.timeout(seconds + 30):
        await asyncio.gather(*waiting)
    latencies = [latency for connection in opened for latency in connection.latencies_s]
    return len(latencies) / (time.perf_counter() - begun), latencies


def post(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The bytes of a POST over a kept connection."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", "Content-Type: application/json"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body
