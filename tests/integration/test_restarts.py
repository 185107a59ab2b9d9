"""API processes restart under load: no request that reached one of them, or the nginx in front of two, is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from movieq.api import app
from movieq.api import server as serving
from movieq.local.embedded import Valkey
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from tests.arrange import settings_of
from tests.fleet import KEY, Fleet, eventually, fleet, free_port
from tests.nginx import nginx
from tests.service import Service

REQUESTS = 1500
CLIENTS = 6
SUBMIT = {"project_id": "film", "task_type": "generate_image", "task_data": {"prompt": "a lighthouse", "draft": True}}
ASK = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


class Load:
    """Clients that in turn submit a task and request its status, one request after the other."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/api/v1"
        self.answers: Counter[str] = Counter()
        self.accepted: list[str] = []
        self.over = False

    async def run(self) -> None:
        """Send requests until `over` is set and there were enough of them."""
        async with aiohttp.ClientSession(headers={"X-API-Key": KEY}, timeout=aiohttp.ClientTimeout(total=60)) as session:
            while not self.over or self.answers.total() < REQUESTS:
                submit, task_id = {"Idempotency-Key": uuid.uuid4().hex}, None
                while task_id is None:
                    async with session.post(f"{self.url}/tasks/submit", json=SUBMIT, headers=submit) as answer:
                        task_id = (await self._counted(answer)).get("task_id")
                self.accepted.append(task_id)
                async with session.get(f"{self.url}/tasks/{task_id}/status") as answer:
                    await self._counted(answer)

    async def _counted(self, answer: aiohttp.ClientResponse) -> dict[str, Any]:
        """Count an answer and return its content. One that says that Redis, on a busy machine, is slow has been given too."""
        content = await answer.json() if answer.content_type == "application/json" else {}
        self.answers["answered" if answer.ok or content.get("error") == "unavailable" else f"{answer.status} {content}"] += 1
        return content if answer.ok else {}


async def restarted(installation: Fleet, api: Service, port: int, signum: signal.Signals) -> Service:
    """End the API process with this signal; return the one that takes its place."""
    api.process.send_signal(signum)
    await asyncio.to_thread(api.process.wait, 60)
    return await installation.api(port=port)


async def test_nginx_answers_every_request_while_two_api_processes_restart_in_turn(folder: Path) -> None:
    ports = [free_port(), free_port()]
    async with fleet(folder / "fleet") as installation:
        apis = [await installation.api(port=port) for port in ports]
        site = free_port()
        with nginx(folder / "nginx", site, *ports) as proxy:
            await eventually(lambda: not refuses(site))
            load = Load(proxy.url)
            async with asyncio.timeout(300), asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(load.run())
                await eventually(lambda: load.answers.total() > 100)
                for signum in (signal.SIGTERM, signal.SIGKILL):  # one that ends in order, and one that cannot
                    for number, port in enumerate(ports):
                        apis[number] = await restarted(installation, apis[number], port, signum)
                load.over = True
        assert load.answers.keys() == {"answered"}, load.answers
        assert load.answers.total() >= REQUESTS
        page = await Queries(installation.store.redis).project(SUBMIT["project_id"])  # type: ignore[arg-type]
        assert page is not None
        assert sum(page.tasks.values()) == len(load.accepted) == len(set(load.accepted)), "each was accepted once"


async def test_connections_that_wait_for_a_process_when_it_is_told_to_end_are_served(folder: Path) -> None:
    async with fleet(folder / "fleet") as installation, AsyncExitStack() as stack:
        api = await installation.api()
        port = int(api.url.rpartition(":")[2])
        used = [await connected(stack, port) for _ in range(20)]
        for reader, writer in used:
            writer.write(ASK)
            assert (await answered(reader))[0] == 200
        api.process.send_signal(signal.SIGSTOP)
        try:
            api.process.send_signal(signal.SIGTERM)
            fresh = [await connected(stack, port) for _ in range(50)]
            for _, writer in (*used, *fresh):
                writer.write(ASK)
                await writer.drain()  # when it goes on, it finds the signal, the connections and the requests at once
        finally:
            api.process.send_signal(signal.SIGCONT)
        for reader, _ in (*used, *fresh):
            assert (await answered(reader))[0] == 200
            assert await reader.read() == b"", "closed in order"
        assert await asyncio.to_thread(api.process.wait, 60) in (0, -signal.SIGTERM)


async def test_a_request_over_an_idle_connection_is_answered_after_new_ones_are_refused(
    server: Valkey, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LAST_REQUESTS_S", 30.0)
    sock = serving.listen("127.0.0.1", 0)
    url = serving.address(sock)
    settings = settings_of(redis_url=server.url, storage=str(folder / "media"), api_keys=KEY)
    api = serving._Server(app.create(settings, url), url)
    serves = asyncio.create_task(api.serve([sock]))
    async with AsyncExitStack() as stack:
        stack.callback(gc.unfreeze)
        stack.push_async_callback(asyncio.wait_for, serves, 60)
        stack.callback(setattr, api, "should_exit", True)
        port = sock.getsockname()[1]
        reader, writer = await connected(stack, port)
        writer.write(ASK)
        assert await answered(reader) == (200, False)
        api.should_exit = True
        await eventually(lambda: refuses(port))
        writer.write(ASK)
        assert await answered(reader) == (200, True)
        assert await reader.read() == b""


async def connected(stack: AsyncExitStack, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection that the stack closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stack.callback(writer.close)
    return reader, writer


async def answered(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Return the status of the next answer, and whether it is the last of its connection."""
    async with asyncio.timeout(60):
        head = await reader.readuntil(b"\r\n\r\n")
        fields: dict[str, Any] = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
        await reader.readexactly(int(fields["content-length"]))
    return int(head.split()[1]), fields.get("connection") == "close"


def refuses(port: int) -> bool:
    with contextlib.closing(socket.socket()) as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0
