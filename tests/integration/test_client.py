"""The Python client with a real API process: operations, connection faults, streams across restarts of the server, files."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from movieq.api import server as serving
from movieq.client import Client, ClientEvent, Gap, Unreachable, _Frame, _Parser
from movieq.errors import (
    IdempotencyMismatch,
    Internal,
    InvalidState,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    SettingsError,
    Unauthorized,
    Unavailable,
    ValidationFailed,
)
from movieq.local.embedded import Valkey, valkey
from movieq.queue.keys import KEYS
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.tasks.entities import UPLOAD_BYTES, DeliveryKind, DeliveryState
from movieq.tasks.states import EventType, Priority, RunToken, TaskId, TaskStatus
from movieq.tasks.wire import Snapshot
from tests import service
from tests.arrange import claim, raw, result
from tests.service import UNLIMITED

KEY = "a-key-of-the-tests"
LAMP = {"prompt": "a lamp"}


class Api:
    """A `movieq api` process, which can be killed and started again on the same port."""

    def __init__(self, redis_url: str, folder: Path, **settings: str) -> None:
        with closing(serving.listen("127.0.0.1", 0)) as sock:
            self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")},
            "MOVIEQ_REDIS_URL": redis_url,
            "MOVIEQ_API_KEYS": KEY,
            **UNLIMITED,
            "MOVIEQ_SIGNING_SECRET": "a-secret-of-the-tests",
            "MOVIEQ_STORAGE": str(folder / "media"),
            "MOVIEQ_LOG_LEVEL": "error",
            **settings,
        }

    def start(self) -> None:
        """Start the process; return once it accepts requests."""
        command = [sys.executable, "-m", "movieq.cli", "api", "--port", str(self.port)]
        self.process = subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(serving.READY)

    def end(self, signum: int = signal.SIGTERM) -> None:
        """End the process."""
        self.process.send_signal(signum)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running(redis_url: str, folder: Path, **settings: str) -> Iterator[Api]:
    """Yield an API process for the block."""
    api = Api(redis_url, folder, **settings)
    api.start()
    try:
        yield api
    finally:
        api.end()


@pytest.fixture(scope="module")
def shared(server: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Yield an API process for the tests that do not change it."""
    with running(server.url, tmp_path_factory.mktemp("api"), MOVIEQ_MAX_QUEUED_PER_PROJECT="3") as api:
        yield api


@pytest.fixture
async def client(shared: Api, store: Store) -> AsyncIterator[Client]:
    """Yield a client of the shared API on an empty Valkey."""
    async with Client(shared.url, KEY, patience_s=3) as client:
        yield client


class Proxy:
    """A TCP proxy in front of a port. It breaks off connection `swallow_answer_of` instead of passing its answer on.

    While `mute` is set, nothing is passed on over the first connection, which stays open.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.connections = 0
        self.swallow_answer_of = 0
        self.mute = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass everything on over one connection until it ends."""
        self.connections += 1
        number = self.connections
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
            while chunk := await source.read(65536):
                if answers and number == self.swallow_answer_of:
                    return
                if answers and self.mute.is_set() and number == 1:
                    continue
                sink.write(chunk)
                await sink.drain()

        both = [asyncio.ensure_future(forward(reader, up_writer, False)), asyncio.ensure_future(forward(up_reader, writer, True))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in both:
                each.cancel()
            for each_writer in (writer, up_writer):
                each_writer.close()
            await asyncio.gather(*both, return_exceptions=True)  # last: the end of the test may cancel it


@asynccontextmanager
async def proxy(port: int) -> AsyncIterator[Proxy]:
    """Yield a proxy for the block."""
    proxy = Proxy(port)
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            await proxy.serve(reader, writer)
        except asyncio.CancelledError:  # the end of the test; asyncio would report it
            pass
        finally:
            handlers.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        for task in list(handlers):
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


async def step(store: Store, task_id: TaskId, run: RunToken, progress: float) -> None:
    """Report progress of the run."""
    await store.report(task_id, run, progress, "generating_image")


async def all_of(events: AsyncIterator[ClientEvent], within_s: float = 20) -> list[ClientEvent]:
    """Return the events up to the end of the stream."""
    async with asyncio.timeout(within_s):
        return [event async for event in events]


async def logged(store: Store, task_id: TaskId) -> list[str]:
    """Return the ids of the task's log."""
    return [entry.id for entry in await Queries(store.redis).log_after(task_id, None)]


# ── Operations ──


async def test_the_operations_answer_with_the_shapes_of_the_contract(client: Client, store: Store) -> None:
    receipt = await client.submit("film", "generate_image", LAMP, priority=Priority.HIGH, metadata={"scene": 4})
    assert receipt.status is TaskStatus.QUEUED
    page = await client.tasks("film", status=TaskStatus.QUEUED, task_type="generate_image", limit=5)
    assert [row.task_id for row in page.tasks] == [receipt.task_id]
    task = await Queries(store.redis).task(receipt.task_id)
    assert task is not None
    assert (task.priority, task.metadata) == (1, {"scene": 4})
    assert (await client.workers()).total_workers == 0
    assert (await client.health()).status == "degraded"  # a task waits, and nobody is there to do it
    assert (await client.cancel(receipt.task_id)).previous_state is TaskStatus.QUEUED
    assert (await client.status(receipt.task_id, wait_s=5)).status is TaskStatus.CANCELLED


async def test_a_failed_task_is_retried(client: Client, store: Store) -> None:
    task_id = (await client.submit("film", "generate_image", LAMP)).task_id
    (claimed,) = await claim(store)
    await store.fail(task_id, claimed.run, "no paper", "internal")
    assert (await client.retry(task_id)).task_id == task_id
    assert (await client.status(task_id)).status is TaskStatus.QUEUED


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 2**64, -(2**63) - 1], ids=str)
async def test_a_number_that_cannot_be_carried_is_refused_by_its_path_and_not_sent_as_another(client: Client, number: float) -> None:
    with pytest.raises(ValidationFailed, match=r"^metadata\.a\[1\]: "):
        await client.submit("film", "generate_image", {"prompt": "a lighthouse"}, metadata={"a": [1, number]})
    with pytest.raises(ValidationFailed, match=r"^task_data\.a: "):
        await client.submit("film", "generate_image", {"prompt": "a lighthouse", "a": number})


async def test_what_the_server_refuses_is_raised_as_its_own_class(client: Client, shared: Api) -> None:
    with pytest.raises(ValidationFailed, match="duration") as refused:
        await client.submit("film", "generate_video", {**LAMP, "duration": 900, "fps": 0})
    assert {path for path, _ in refused.value.errors} == {"task_data.duration", "task_data.fps"}
    with pytest.raises(NotFound):
        await client.status("123e4567-e89b-12d3-a456-426614174000")
    with pytest.raises(NotFound):
        await client.status("../../health")
    task_id = (await client.submit("film", "generate_image", LAMP, idempotency_key="one")).task_id
    with pytest.raises(IdempotencyMismatch):
        await client.submit("film", "generate_image", {"prompt": "another lamp"}, idempotency_key="one")
    with pytest.raises(InvalidState):
        await client.retry(task_id)
    async with Client(shared.url, "a-key-that-is-not-known") as stranger:
        with pytest.raises(Unauthorized):
            await stranger.workers()


async def test_a_full_queue_is_not_waited_for_longer_than_the_patience(client: Client) -> None:
    for _ in range(3):
        await client.submit("film", "generate_image", LAMP)
    with pytest.raises(QueueFull) as refused:
        await client.submit("film", "generate_image", LAMP)
    assert refused.value.retry_after_s == 30


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "ftp://127.0.0.1", "http://", "http://a:99999", ""])
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(SettingsError):
        Client(url, KEY)


# ── Faults of the connection ──


async def test_a_submit_whose_answer_is_lost_makes_one_task(shared: Api, store: Store) -> None:
    async with proxy(shared.port) as between, Client(between.url, KEY) as client:
        between.swallow_answer_of = 1
        receipt = await client.submit("film", "generate_image", LAMP)
        assert between.connections == 2
        assert [row.task_id for row in (await client.tasks("film")).tasks] == [receipt.task_id]


async def test_a_retry_whose_answer_is_lost_is_not_said_again(shared: Api, client: Client, store: Store) -> None:
    task_id = (await client.submit("film", "generate_image", LAMP)).task_id
    (claimed,) = await claim(store)
    await store.fail(task_id, claimed.run, "no paper", "internal")
    async with proxy(shared.port) as between, Client(between.url, KEY) as unlucky:
        between.swallow_answer_of = 1
        with pytest.raises(Unavailable, match="/retry"):
            await unlucky.retry(task_id)
    assert (await client.status(task_id)).status is TaskStatus.QUEUED


async def test_a_submit_waits_for_redis_to_come_back(folder: Path) -> None:
    with valkey(folder) as own, running(own.url, folder) as api:
        async with Client(api.url, KEY) as client:
            own.kill()
            submitting = asyncio.ensure_future(client.submit("film", "generate_image", LAMP))
            assert (await client.health()).status == "unhealthy"
            assert not submitting.done()
            await asyncio.to_thread(own.start)
            async with asyncio.timeout(60):
                receipt = await submitting
            assert (await client.tasks("film")).tasks[0].task_id == receipt.task_id


async def test_where_nobody_listens_the_address_is_named() -> None:
    with closing(serving.listen("127.0.0.1", 0)) as sock:
        url = serving.address(sock)
    async with Client(url, KEY, patience_s=0.5) as client:
        with pytest.raises(Unreachable, match=url):
            await client.workers()
        with pytest.raises(Unreachable, match=url):
            await all_of(client.events("123e4567-e89b-12d3-a456-426614174000"))


async def test_something_else_than_movieq_is_told_from_it() -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<h1>It works!</h1>", content_type="text/html")

    async with service.serving({"/{path:.*}": page}) as url, Client(url, KEY) as client:
        with pytest.raises(Internal, match="unreadable answer"):
            await client.workers()
        with pytest.raises(Internal, match="not an event stream"):
            await all_of(client.events("123e4567-e89b-12d3-a456-426614174000"))
        with pytest.raises(MethodNotAllowed, match="405"):
            await client.submit("film", "generate_image", LAMP)


async def test_a_proxy_that_does_not_reach_movieq_is_tried_again_as_it_asks() -> None:
    asked: list[float] = []

    async def busy(request: web.Request) -> web.Response:
        asked.append(time.monotonic())
        return web.Response(status=503, headers={"Retry-After": "1"}, text="upstream is away")

    async with service.serving({"/{path:.*}": busy}) as url, Client(url, KEY, patience_s=1.5) as client:
        with pytest.raises(Unavailable, match="503"):
            await client.workers()
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 1


# ── Events ──


async def test_events_come_each_once_and_in_order_to_the_end(client: Client, store: Store) -> None:
    task_id = (await client.submit("film", "generate_image", LAMP)).task_id
    (claimed,) = await claim(store)
    await step(store, task_id, claimed.run, 0.5)
    following = asyncio.ensure_future(all_of(client.events(task_id)))
    await step(store, task_id, claimed.run, 0.7)
    await store.complete(task_id, claimed.run, result())
    events = await following
    assert isinstance(events[0].data, Snapshot)
    assert [event.id for event in events[1:]] == await logged(store, task_id)
    assert [event.type for event in events[1:]] == ["started", "progress", "progress", "completed"]
    last = events[-1].data
    assert not isinstance(last, Snapshot)
    assert getattr(last, "result", None) is not None
    assert await all_of(client.events(task_id, after=events[-1].id)) == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
async def test_a_stream_outlives_its_server(server: Valkey, store: Store, folder: Path, signum: int) -> None:
    with running(server.url, folder) as api:
        async with Client(api.url, KEY) as client:
            task_id = (await client.submit("film", "generate_image", LAMP)).task_id
            (claimed,) = await claim(store)
            events: list[ClientEvent] = []
            async with asyncio.timeout(60), aclosing(client.events(task_id)) as stream:
                await step(store, task_id, claimed.run, 0.1)
                async for event in stream:
                    events.append(event)
                    if event.type is EventType.PROGRESS and len(events) == 3:
                        await asyncio.to_thread(api.end, signum)
                        await step(store, task_id, claimed.run, 0.2)  # nobody listens
                        await asyncio.to_thread(api.start)
                        await step(store, task_id, claimed.run, 0.3)
                        await store.complete(task_id, claimed.run, result())
    assert [event.id for event in events if event.id] == await logged(store, task_id)
    assert [event.type for event in events] == ["snapshot", "started", "progress", "progress", "progress", "completed"]


async def test_a_stream_that_falls_silent_is_opened_again(shared: Api, store: Store) -> None:
    async with proxy(shared.port) as between, Client(between.url, KEY, silence_s=0.3) as client:
        async with Client(shared.url, KEY) as beside:
            task_id = (await beside.submit("film", "generate_image", LAMP)).task_id
        (claimed,) = await claim(store)
        events: list[ClientEvent] = []
        async with asyncio.timeout(60), aclosing(client.events(task_id)) as stream:
            async for event in stream:
                events.append(event)
                if event.type is EventType.STARTED:
                    between.mute.set()
                    await store.complete(task_id, claimed.run, result())
    assert [event.type for event in events] == ["snapshot", "started", "completed"]
    assert between.connections == 2


async def test_an_end_that_was_followed_by_a_retry_is_not_the_end(client: Client, store: Store) -> None:
    task_id = (await client.submit("film", "generate_image", LAMP)).task_id
    (first,) = await claim(store)
    await store.fail(task_id, first.run, "no paper", "internal")
    await client.retry(task_id)
    following = asyncio.ensure_future(all_of(client.events(task_id)))
    (second,) = await claim(store)
    await store.complete(task_id, second.run, result())
    assert [event.type for event in await following if event.id] == ["started", "failed", "queued", "started", "completed"]


async def test_a_run_that_is_given_back_goes_on(client: Client, store: Store) -> None:
    task_id = (await client.submit("film", "generate_image", LAMP)).task_id
    (first,) = await claim(store)
    await store.requeue(task_id, first.run, Budget.TRIES, 3, 0, "the network was away", "network")
    following = asyncio.ensure_future(all_of(client.events(task_id)))
    await store.tidy()
    (second,) = await claim(store)
    await store.complete(task_id, second.run, result())
    assert [event.type for event in await following if event.id] == ["started", "retrying", "started", "completed"]


async def test_a_resume_point_that_is_not_in_the_log_is_a_gap(client: Client, store: Store) -> None:
    task_id = (await client.submit("film", "generate_image", LAMP)).task_id
    await client.cancel(task_id)
    gap, snapshot, end = await all_of(client.events(task_id, after="99999999999999-0"))
    assert isinstance(gap.data, Gap)
    assert (gap.data.after, snapshot.type, end.type) == ("99999999999999-0", EventType.SNAPSHOT, EventType.CANCELLED)


async def test_the_end_of_a_task_is_known_after_its_log_is_gone(client: Client, store: Store) -> None:
    task_id = (await client.submit("film", "generate_image", LAMP)).task_id
    await client.cancel(task_id)
    await raw(store).delete(KEYS["log"] + task_id)
    snapshot, end = await all_of(client.events(task_id))
    assert (snapshot.type, end.type) == (EventType.SNAPSHOT, EventType.CANCELLED)


async def test_a_signed_address_needs_no_key(client: Client, shared: Api) -> None:
    receipt = await client.submit("film", "generate_image", LAMP)
    await client.cancel(receipt.task_id)
    async with Client(shared.url, "a-key-that-is-not-known") as stranger:
        assert [event.type for event in await all_of(stranger.events(receipt.events_url))] == ["snapshot", "cancelled"]


STREAM = (
    ": a comment\n"
    "retry: 1500\n"
    "\n"
    "id: 1-0\nevent: progress\ndata: {\ndata:}\n"
    "\n"
    "event: goodbye\nunknown: x\ndata\n"
    "\n"
    "id: 2\x00-0\ndata: ü\n"
    "\n"
    "event: progress\ndata: never finished\n"
)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
@given(cuts=st.lists(st.integers(1, 40), max_size=20))
def test_a_stream_is_parsed_alike_however_it_is_cut(newline: str, begin: bytes, cuts: list[int]) -> None:
    text, parser = begin + STREAM.replace("\n", newline).encode(), _Parser()
    frames: list[_Frame] = []
    for cut in [*cuts, len(text)]:
        frames += parser.feed(text[:cut])
        text = text[cut:]
    assert [(frame.type, frame.data, frame.id, frame.retry_ms) for frame in frames] == [
        ("", "", None, 1500),
        ("progress", "{\n}", "1-0", None),
        ("goodbye", "", None, None),
        ("message", "ü", None, None),
    ]


# ── Files ──


async def test_an_upload_can_be_referred_to(client: Client, folder: Path, png: bytes) -> None:
    (folder / "a.png").write_bytes(png)
    answers = [await client.upload("film", png), await client.upload("film", folder / "a.png")]
    assert [(answer.size, answer.media_type) for answer in answers] == [(len(png), "image/png")] * 2
    assert all(answer.url.startswith("upload:") for answer in answers)


async def test_a_file_that_cannot_be_uploaded_is_named(client: Client, folder: Path) -> None:
    with pytest.raises(ValidationFailed, match=r"nothing\.png cannot be read"):
        await client.upload("film", folder / "nothing.png")
    with pytest.raises(ValidationFailed, match="unsupported file type"):
        await client.upload("film", b"plain text")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(UPLOAD_BYTES + 1)
    with pytest.raises(PayloadTooLarge, match=r"huge\.png"):
        await client.upload("film", folder / "huge.png")


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def breaking_once(body: bytes) -> tuple[Handler, list[Any]]:
    """Return a handler that breaks off half way through its first answer, and the headers of all its requests."""
    requests: list[Any] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        requests.append(request.headers)
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        if len(requests) == 1:
            await response.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.close()
        else:
            await response.write(body)
        return response

    return handle, requests


async def test_a_download_is_whole_or_not_at_all_and_sends_no_key(client: Client, folder: Path) -> None:
    body = os.urandom(3_000_000)
    handler, requests = breaking_once(body)
    async with service.serving({"/file": handler}) as url:
        assert await client.download(f"{url}/file", folder / "file") == len(body)
        assert (folder / "file").read_bytes() == body
        assert len(requests) == 2
        assert not [name for headers in requests for name in headers if name.lower() in ("x-api-key", "authorization")]
        with pytest.raises(NotFound):
            await client.download(f"{url}/other", folder / "other")
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.fixture
def png() -> bytes:
    """Return a small picture."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 36), (200, 120, 40)).save(buffer, "PNG")
    return buffer.getvalue()


async def test_deliveries_are_listed_and_sent_again(client: Client, store: Store) -> None:
    receipt = await client.submit("film", "generate_image", LAMP, callback_url="https://cms.example/hook")
    assert (await client.deliveries(receipt.task_id)).deliveries == []
    await client.cancel(receipt.task_id)
    (waiting,) = (await client.deliveries(receipt.task_id)).deliveries
    assert (waiting.kind, waiting.type, waiting.state) == (DeliveryKind.WEBHOOK, "task.cancelled", DeliveryState.PENDING)
    await Outbox(store.redis).delivered(waiting.delivery_id, DeliveryState.FAILED, 10, 500, "answered 500")
    again = await client.resend(receipt.task_id, waiting.delivery_id)
    assert (again.delivery_id, again.state, again.tries) == (waiting.delivery_id, DeliveryState.PENDING, 0)
    with pytest.raises(NotFound, match="no delivery"):
        await client.resend(receipt.task_id, f"{receipt.task_id}-2")
