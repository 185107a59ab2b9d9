"""What went wrong with an HTTP request, met with real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest

from movieq.fetch.problems import HttpFault, http_fault, reason

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def peer(answer: Answer) -> AsyncIterator[int]:
    """Yield the port of a server that answers so."""

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1)
            await answer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(served, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def failed(url: str, timeout_s: float = 30) -> BaseException:
    """Return what a GET of the URL raises."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
        try:
            async with session.get(url) as answer:
                await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            return error
    raise AssertionError("it was answered")


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close without an answer."""


async def breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort")
    await writer.drain()


async def greets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.example ESMTP\r\n\r\n")
    await writer.drain()


async def is_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize(("answer", "fault"), [(hangs_up, "broke_off"), (breaks_off, "broke_off"), (greets, "not_http")])
async def test_a_connection_that_ends_early_and_a_peer_that_speaks_something_else_are_told_apart(answer: Answer, fault: str) -> None:
    async with peer(answer) as port:
        assert http_fault(await failed(f"http://127.0.0.1:{port}/")) is HttpFault(fault)


async def test_a_silent_peer_is_a_timeout() -> None:
    async with peer(is_silent) as port:
        assert http_fault(await failed(f"http://127.0.0.1:{port}/", 0.2)) is HttpFault.TIMEOUT


async def test_a_closed_port_has_the_reason_of_the_system_and_no_address() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        error = await failed(f"http://127.0.0.1:{sock.getsockname()[1]}/")
    assert http_fault(error) is HttpFault.CONNECT
    assert reason(error) == "Connection refused"


async def test_a_peer_without_tls_a_host_that_is_not_there_and_a_malformed_url() -> None:
    async with peer(greets) as port:
        assert http_fault(await failed(f"https://127.0.0.1:{port}/")) is HttpFault.TLS
    assert http_fault(await failed("http://no-such-host.invalid/")) is HttpFault.HOST
    assert http_fault(await failed("http://")) is HttpFault.URL
