"""sse-starlette as its documentation has it, on uvicorn as movieq is: `python -m tests.bench.peers.sse_starlette shared|own REDIS_URL`.

`own`: each client has a Redis connection. `shared`: one connection for all, and a bounded queue for each client. Prints its port.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
import uvicorn
from sse_starlette import EventSourceResponse  # type: ignore[import-not-found]  # it lives in an environment of its own
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

BEGIN = {"event": "snapshot", "data": "{}"}


def event(data: bytes) -> dict[str, str]:
    """A message as an event."""
    return {"event": "progress", "id": "1764000000000-0", "data": data.decode()}


def application(url: str, *, shared: bool) -> Starlette:
    """One route, `/?channel=NAME`."""
    queues: defaultdict[str, set[asyncio.Queue[bytes]]] = defaultdict(set)
    connected: Any = redis.asyncio.from_url  # which redis-py leaves untyped
    pubsub = connected(url).pubsub()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        reading = asyncio.create_task(read()) if shared else None
        yield
        if reading:
            reading.cancel()

    async def read() -> None:
        await pubsub.psubscribe("*")
        async for message in pubsub.listen():
            if message["type"] == "pmessage":
                for queue in queues[message["channel"].decode()]:
                    if not queue.full():
                        queue.put_nowait(message["data"])

    async def from_queue(channel: str) -> AsyncIterator[dict[str, str]]:
        queue: asyncio.Queue[bytes] = asyncio.Queue(256)
        queues[channel].add(queue)
        try:
            yield BEGIN
            while True:
                yield event(await queue.get())
        finally:
            queues[channel].discard(queue)

    async def from_own(channel: str) -> AsyncIterator[dict[str, str]]:
        client = connected(url)
        async with client, client.pubsub() as own:
            await own.subscribe(channel)
            yield BEGIN
            async for message in own.listen():
                if message["type"] == "message":
                    yield event(message["data"])

    async def stream(request: Request) -> EventSourceResponse:
        channel = request.query_params["channel"]
        return EventSourceResponse(from_queue(channel) if shared else from_own(channel), ping=15)

    return Starlette(routes=[Route("/", stream)], lifespan=lifespan)


async def main() -> None:
    """Serves until it is ended."""
    config = uvicorn.Config(
        application(sys.argv[2], shared=sys.argv[1] == "shared"),
        port=0, http="httptools", ws="none", log_level="error", access_log=False, timeout_graceful_shutdown=1, backlog=2048,
    )  # fmt: skip
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
