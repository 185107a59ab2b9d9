"""What a well-behaved client notices while another one attacks: its p99 for submit, status and first event, and the server's memory.

Each attack runs in a process of its own against a fresh `movieq up`, bounded in count and time. Its API key belongs to the project
`attack`, the client's to `film`; attacks that need no key have none. The row "nothing" is the same client alone.
"""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
import redis

from tests.bench.report import percentile, report
from tests.service import Service, service

SECONDS: Final = float(os.environ.get("SECONDS", "10"))
"""How long each attack lasts."""
SETTLE_S: Final = 60.0
"""How long the server has afterwards for its memory to come back."""
PAUSE_S: Final = 0.1
"""Between two rounds of the well-behaved client."""
GOOD: Final = "a-key-of-the-project-film"
BAD: Final = "a-key-of-the-project-attack"
MIB: Final = 1024 * 1024

Attack = Callable[[str, int], Awaitable[None]]


# ── The attacks: each gets the server's url and port, and goes on until it is cancelled ──────────────────────────────────────────────


async def _connection(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def endless_headers(url: str, port: int) -> None:
    """Headers without end, on 8 connections."""
    line = b"X-Filler: " + b"x" * 8000 + b"\r\n"
    await _for_ever(8, lambda: _pour(port, b"GET /health HTTP/1.1\r\nHost: x\r\n", line))


async def endless_request_line(url: str, port: int) -> None:
    """A request line without end, on 8 connections."""
    await _for_ever(8, lambda: _pour(port, b"GET /", b"x" * 65536))


async def _pour(port: int, start: bytes, more: bytes) -> None:
    _, writer = await _connection(port)
    try:
        writer.write(start)
        for _ in range(3000):
            writer.write(more)
            await writer.drain()
    finally:
        writer.close()


async def silent_connections(url: str, port: int) -> None:
    """1,500 connections that say nothing or half a request, opened again whenever they are closed."""

    async def hold(number: int) -> None:
        reader, writer = await _connection(port)
        try:
            if number % 2:
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            await reader.read()
        finally:
            writer.close()

    await asyncio.gather(*(_again(lambda number=number: hold(number)) for number in range(1500)))  # type: ignore[misc]  # a default


async def streams_of_one_url(url: str, port: int) -> None:
    """1,600 streams of one signed url, opened again whenever they end."""
    async with _client() as client:
        events_url = (await _submit(client, url))["events_url"]
    head = f"GET {events_url.removeprefix(url)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    async def hold() -> None:
        reader, writer = await _connection(port)
        try:
            writer.write(head)
            await reader.read()
        finally:
            writer.close()

    await asyncio.gather(*(_again(hold) for _ in range(1600)))


async def streams_of_long_texts(url: str, port: int) -> None:
    """Failing tasks with references of 990,000 characters, and streams of them that nobody reads."""
    async with _client() as client:
        ids = [(await _submit(client, url, reference_images=["https://127.0.0.1/" + "x" * 990_000]))["task_id"] for _ in range(15)]

        async def hold(task_id: str) -> None:
            async with client.get(f"{url}/api/v1/tasks/{task_id}/events"):
                await asyncio.sleep(SECONDS)

        async def retry(task_id: str) -> None:
            async with client.post(f"{url}/api/v1/tasks/{task_id}/retry") as answer:
                await answer.read()
            await asyncio.sleep(0.1)

        await asyncio.gather(*(_again(lambda id=id: hold(id)) for id in ids), *(_again(lambda id=id: retry(id)) for id in ids))  # type: ignore[misc]  # a default


async def submit_and_cancel(url: str, port: int) -> None:
    """Submits of 1 MB, each cancelled at once, on 4 connections."""

    async def turn(client: aiohttp.ClientSession) -> None:
        receipt = await _submit(client, url, note="x" * 1_000_000)
        if "task_id" in receipt:
            async with client.delete(f"{url}/api/v1/tasks/{receipt['task_id']}/cancel") as answer:
                await answer.read()
        else:
            await asyncio.sleep(0.01)

    async with _client() as client:
        await _for_ever(4, lambda: turn(client))


async def requests_without_pause(url: str, port: int) -> None:
    """Reads of the task list, as fast as they are answered, on 32 connections."""

    async def turn(client: aiohttp.ClientSession) -> None:
        async with client.get(f"{url}/api/v1/projects/attack/tasks") as answer:
            await answer.read()

    async with _client() as client:
        await _submit(client, url)
        await _for_ever(32, lambda: turn(client))


async def slow_bodies(url: str, port: int) -> None:
    """Uploads of which one byte arrives each second, on 400 connections."""
    head = f"POST /api/v1/projects/attack/uploads HTTP/1.1\r\nHost: x\r\nX-API-Key: {BAD}\r\nContent-Length: 20000000\r\n\r\n".encode()

    async def hold() -> None:
        reader, writer = await _connection(port)
        try:
            writer.write(head)
            while not writer.is_closing() and not reader.at_eof():
                writer.write(b"x")
                await writer.drain()
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await reader.read(4096)
        finally:
            writer.close()

    await asyncio.gather(*(_again(hold) for _ in range(400)))


ATTACKS: Final[dict[str, Attack]] = {
    attack.__name__: attack
    for attack in (
        endless_headers,
        endless_request_line,
        silent_connections,
        streams_of_one_url,
        streams_of_long_texts,
        submit_and_cancel,
        requests_without_pause,
        slow_bodies,
    )
}
NEED_WORKER: Final = {"streams_of_long_texts"}


def _client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers={"X-API-Key": BAD}, timeout=aiohttp.ClientTimeout(total=60))


async def _submit(client: aiohttp.ClientSession, url: str, **task_data: Any) -> dict[str, Any]:
    body = {"project_id": "attack", "task_type": "generate_image", "task_data": {"prompt": "x", **task_data}}
    async with client.post(f"{url}/api/v1/tasks/submit", json=body) as answer:
        return dict(await answer.json())


async def _again(once: Callable[[], Awaitable[None]]) -> None:
    while True:
        with suppress(OSError, aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError):
            await once()
        await asyncio.sleep(0.02)


async def _for_ever(count: int, once: Callable[[], Awaitable[None]]) -> None:
    await asyncio.gather(*(_again(once) for _ in range(count)))


async def _attack(name: str, url: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    with suppress(TimeoutError):
        async with asyncio.timeout(SECONDS):
            await ATTACKS[name](url, int(url.rpartition(":")[2]))


# ── The well-behaved client ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _behave(url: str, until_s: float) -> dict[str, list[float]]:
    """Return the seconds of each submit, status and first event until this time."""
    found: dict[str, list[float]] = {"submit": [], "status": [], "first event": []}
    body = {"project_id": "film", "task_type": "generate_image", "task_data": {"prompt": "a lamp"}, "priority": 1}
    async with aiohttp.ClientSession(headers={"X-API-Key": GOOD}, timeout=aiohttp.ClientTimeout(total=60)) as client:

        @asynccontextmanager
        async def timed(what: str, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
            begun = time.perf_counter()
            async with client.request(method, f"{url}/api/v1{path}", **options) as answer:
                assert answer.status < 300, (answer.status, await answer.text())
                await (answer.content.readuntil(b"event: ") if what == "first event" else answer.read())
                found[what].append(time.perf_counter() - begun)
                yield answer

        while time.perf_counter() < until_s:
            async with timed("submit", "POST", "/tasks/submit", json=body) as answer:
                task_id = (await answer.json())["task_id"]
            async with timed("status", "GET", f"/tasks/{task_id}/status"):
                pass
            async with timed("first event", "GET", f"/tasks/{task_id}/events"):
                pass
            async with client.delete(f"{url}/api/v1/tasks/{task_id}/cancel") as answer:
                await answer.read()
            await asyncio.sleep(PAUSE_S)
    return found


class _Memory:
    """The memory of the API process and of Redis, in MiB."""

    def __init__(self, served: Service) -> None:
        (self._api,) = served.find("api")
        (valkey,) = served.find("valkey-server") or served.find("valkey")
        path = next(str(each.laddr) for each in valkey.net_connections("unix") if str(each.laddr))
        self._redis = redis.Redis(unix_socket_path=path)

    def now(self) -> float:
        return (self._api.memory_info().rss + int(self._redis.info("memory")["used_memory"])) / MIB  # type: ignore[index]  # typed as both forms

    async def peak(self, seconds: float) -> float:
        until_s, highest = time.monotonic() + seconds, 0.0
        while time.monotonic() < until_s:
            highest = max(highest, self.now())
            await asyncio.sleep(0.1)
        return highest

    async def settled(self, before: float) -> tuple[float, float]:
        """Wait until the memory is back to within 20 % and 10 MiB, at most a minute. Return the memory and the seconds that it took."""
        begun = time.monotonic()
        while (now := self.now()) > before * 1.2 + 10 and time.monotonic() - begun < SETTLE_S:
            await asyncio.sleep(0.5)
        return now, time.monotonic() - begun


async def _measured(name: str) -> dict[str, float]:
    keys = f"{GOOD}=film,{BAD}=attack"
    limits: dict[str, Any] = {
        f"MOVIEQ_{each}": value
        for each, value in {
            "REQUESTS_PER_S": "50", "MAX_STREAMS": "5000", "MAX_STREAMS_PER_KEY": "200", "MAX_STREAMS_PER_URL": "20",
            "MAX_RECORD_MIB_PER_PROJECT": "256", "API_KEYS": keys, "LOG_LEVEL": "warning",
        }.items()
    }  # fmt: skip  # the defaults, which the tests switch off
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), options=[] if name in NEED_WORKER else ["--no-worker"], key=GOOD, **limits) as served,
    ):
        memory = _Memory(served)
        await _behave(served.url, time.perf_counter() + 1)
        before = memory.now()
        command = [sys.executable, "-m", "tests.bench.bench_abuse", name, served.url]
        async with AsyncExitStack() as stack:
            attacker = subprocess.Popen(command) if name else None
            if attacker is not None:
                stack.callback(attacker.wait)
                await asyncio.sleep(1)
            found, peak = await asyncio.gather(_behave(served.url, time.perf_counter() + SECONDS - 1), memory.peak(SECONDS - 1))
        after, back_s = await memory.settled(before)
    figures = {f"{what} p99 ms": 1000 * percentile(values, 0.99) for what, values in found.items()}
    return {**figures, "rounds": len(found["submit"]), "MiB before": before, "MiB peak": peak, "MiB after": after, "back after s": back_s}


def main() -> None:
    """Print a row for each attack."""
    if len(sys.argv) == 3:
        asyncio.run(_attack(*sys.argv[1:]))
        return
    rows = {name or "nothing": asyncio.run(_measured(name)) for name in ("", *(sys.argv[1:] or ATTACKS))}
    titles = list(rows["nothing"])
    print(f"{'':<24}" + "".join(f"{title:>20}" for title in titles))
    for name, row in rows.items():
        print(f"{name.replace('_', ' '):<24}" + "".join(f"{row[title]:>20.1f}" for title in titles))
    worst = max(
        row[title] - rows["nothing"][title] for name, row in rows.items() for title in titles if title.endswith("ms") and name != "nothing"
    )
    report("abuse", {"worst p99 above that without an attack, ms": worst, "seconds each": SECONDS}, {"rows": rows})


if __name__ == "__main__":
    main()
