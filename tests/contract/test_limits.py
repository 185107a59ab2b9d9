"""The limits of one client: open streams, requests a second, idle and unread connections. Other clients are not affected."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from redis.exceptions import ReadOnlyError

from movieq import signing
from movieq.api import auth, events, key_cache, limits
from movieq.api import server as serving
from movieq.queue.connection import Redis
from movieq.settings import Grant, Scope, Settings, key_hash
from movieq.streams import hub
from tests.contract.client import ALL, DEADLINE_S, FILM, READ, Client
from tests.contract.conftest import Tasks, served
from tests.fleet import eventually


@pytest.fixture
async def small(settings: Settings, redis: Redis) -> AsyncIterator[Client]:
    """Yield a client of an API with few places."""
    few = msgspec.structs.replace(settings, max_streams=6, max_streams_per_key=2, max_streams_per_url=2)
    async with served(few) as client:
        yield client


async def freed(client: Client, places: int) -> None:
    """Wait until no more than so many places are taken."""
    await eventually(lambda: client.state.places.taken["streams"] <= places)


async def test_a_signed_url_has_a_limit_of_streams_of_its_own(small: Client) -> None:
    url = (await small.submit()).json["events_url"]
    async with AsyncExitStack() as opened:
        for _ in range(2):
            await opened.enter_async_context(small.events(url, key=None))
        refused = await small.get(url, key=None, headers={"Origin": "https://film.example"})
        assert (refused.status, refused.error, refused.json["retryable"]) == (429, "rate_limited", True)
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.headers["Access-Control-Allow-Origin"] == "*", "so that movieq.js can tell"
        assert "MOVIEQ_MAX_STREAMS_PER_URL" in refused.message
        fresh = (await small.status(url.split("/tasks/")[1][:36]))["events_url"]
        assert (await small.get(fresh, key=None)).status == 429, "a fresh url of the same task gives no more places"
        async with small.events((await small.submit()).json["events_url"], key=None):
            pass
    await freed(small, 0)
    async with small.events(url, key=None):
        assert small.state.places.taken["streams"] == 1


async def test_a_key_has_a_limit_of_streams_and_of_requests_that_wait(small: Client) -> None:
    task_id = (await small.submit(key=FILM)).json["task_id"]
    async with small.events(task_id, key=FILM), small.events(task_id, key=FILM):
        for path in ("events", "status?wait=5"):
            refused = await small.get(f"/api/v1/tasks/{task_id}/{path}", key=FILM)
            assert (refused.status, "MOVIEQ_MAX_STREAMS_PER_KEY" in refused.message) == (429, True)
        assert (await small.get(f"/api/v1/tasks/{task_id}/status", key=FILM)).status == 200
        async with small.events(task_id, key=READ):
            pass
    await freed(small, 0)
    waiting = asyncio.create_task(small.get(f"/api/v1/tasks/{task_id}/status?wait=50", key=FILM))
    await eventually(lambda: small.state.places.taken["streams"] == 1)
    await small.delete(f"/api/v1/tasks/{task_id}/cancel")
    assert (await waiting).json["status"] == "cancelled"
    await freed(small, 0)
    assert not small.state.places.taken


async def test_the_signed_urls_of_one_key_leave_places_for_others(small: Client) -> None:
    urls = [(await small.submit(key=FILM)).json["events_url"] for _ in range(4)]
    theirs = (await small.submit(key=ALL)).json["events_url"]
    async with small.events(urls[0], key=None), small.events(urls[1], key=None), small.events(urls[2], key=None):
        refused = await small.get(urls[3], key=None)
        assert (refused.status, "MOVIEQ_MAX_STREAMS" in refused.message) == (429, True)
        async with small.events(theirs, key=None):
            pass


async def test_a_process_has_a_limit_of_streams_but_none_of_other_requests(small: Client) -> None:
    task_id = (await small.submit()).json["task_id"]
    async with AsyncExitStack() as opened:
        for key in (ALL, ALL, FILM, FILM, READ, READ):
            await opened.enter_async_context(small.events(task_id, key=key))
        refused = await small.get((await small.submit()).json["events_url"], key=None)
        assert (refused.status, "This server" in refused.message) == (429, True)
        assert (await small.get(f"/api/v1/tasks/{task_id}/status")).status == 200


async def test_an_arriving_body_takes_a_place_of_its_key(small: Client) -> None:
    release = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await release.wait()

    bodies = [asyncio.create_task(small.submit_bytes(slow(), key=FILM)) for _ in range(2)]
    await eventually(lambda: small.state.places.taken.total() == 2)
    assert (await small.submit(key=FILM)).status == 429
    assert (await small.submit(key=ALL)).status == 201
    release.set()
    assert [answer.status for answer in await asyncio.gather(*bodies)] == [400, 400]
    assert not small.state.places.taken


async def test_a_limit_that_is_hit_is_logged_once_and_counted(
    small: Client, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HITS", limits.Hits())
    task_id = (await small.submit(key=FILM)).json["task_id"]
    async with small.events(task_id, key=FILM), small.events(task_id, key=FILM):
        for _ in range(5):
            await small.get(f"/api/v1/tasks/{task_id}/events", key=FILM)
    lines = [record.getMessage() for record in logged.records if "limit_hit" in record.getMessage()]
    assert len(lines) == 1
    assert "streams_of_key" in lines[0]
    assert limits.HITS.counts == {"streams_of_key": 5}


@pytest.fixture
def quick_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send comments all the time, and look a key up each time."""
    monkeypatch.setattr(hub, "COMMENT_S", 0.6)
    monkeypatch.setattr(key_cache, "CACHE_S", 0)


@pytest.mark.usefixtures("quick_comments")
async def test_the_streams_of_a_revoked_key_end_and_its_urls_are_dead(api: Client) -> None:
    key = "a-key-that-will-be-revoked"
    await api.state.api_keys.add_grant(key_hash(key), Grant(frozenset({"film"}), frozenset(Scope)))
    receipt = (await api.submit(key=key)).json
    project = (await api.get("/api/v1/projects/film", key=key)).json["events_url"]
    async with (
        api.events(receipt["task_id"], key=key) as keyed,
        api.events(receipt["events_url"], key=None) as signed,
        api.events(project, key=None) as of_project,
        api.events(receipt["task_id"]) as other,
    ):
        for stream in (keyed, signed, of_project, other):
            assert (await stream.until("snapshot"))[-1].type == "snapshot"
        await api.state.api_keys.revoke(key_hash(key))
        for stream in (keyed, signed, of_project):
            assert [event.type for event in await stream.rest()] == ["goodbye"]
        for url in (receipt["events_url"], project):
            answer = await api.get(url, key=None)
            assert (answer.status, "revoked" in answer.message) == (403, True)
        await api.delete(f"/api/v1/tasks/{receipt['task_id']}/cancel")
        assert (await other.until("cancelled"))[-1].type == "cancelled"


@pytest.mark.usefixtures("quick_comments")
async def test_a_key_that_loses_a_project_loses_its_streams(api: Client) -> None:
    key = "a-key-that-will-be-changed"
    await api.state.api_keys.add_grant(key_hash(key), Grant(None, frozenset(Scope)))
    receipt = (await api.submit(key=key)).json
    async with api.events(receipt["events_url"], key=None) as signed:
        await signed.until("snapshot")
        await api.state.api_keys.add_grant(key_hash(key), Grant(frozenset({"other"}), frozenset(Scope)))
        assert [event.type for event in await signed.rest()] == ["goodbye"]
    assert (await api.get(receipt["events_url"], key=None)).status == 404


async def test_the_key_of_a_signed_url_cannot_be_changed_or_removed(api: Client) -> None:
    url = (await api.submit(key=FILM)).json["events_url"]
    (key_id,) = parse_qs(urlsplit(url).query)["key"]
    assert key_id == key_hash(FILM)
    for changed in (url.replace(key_id, key_hash(ALL)), url.replace(f"key={key_id}&", ""), url.replace("key=", "kez=")):
        assert (await api.get(changed, key=None)).status == 403


async def test_a_url_that_an_earlier_version_issued_works_until_it_expires(api: Client) -> None:
    task_id = (await api.submit()).json["task_id"]
    expires = int(time.time()) + 60
    signature = signing.sign(api.state.signing_secrets[0], "events", task_id, expires)
    async with api.events(f"{api.url}/api/v1/tasks/{task_id}/events?expires={expires}&signature={signature}", key=None) as stream:
        (snapshot,) = await stream.until("snapshot")
    assert parse_qs(urlsplit(snapshot.data["events_url"]).query)["expires"] == [str(expires)], "it must not be prolonged for ever"


@pytest.fixture
async def slow_refill(settings: Settings, redis: Redis) -> AsyncIterator[Client]:
    """Yield a client of an API whose keys have 20 requests, and the next after hours."""
    async with served(msgspec.structs.replace(settings, requests_per_s=0.0001, request_burst=20)) as client:
        yield client


async def test_a_key_has_a_limit_of_requests(slow_refill: Client) -> None:
    task_id = (await slow_refill.submit(key=FILM)).json["task_id"]
    left = [int((await slow_refill.get(f"/api/v1/tasks/{task_id}/status", key=FILM)).headers["X-RateLimit-Remaining"]) for _ in range(19)]
    assert left == [*range(18, -1, -1)]
    refused = await slow_refill.submit(key=FILM)
    assert (refused.status, refused.error) == (429, "rate_limited")
    assert int(refused.headers["Retry-After"]) > 0
    assert (refused.headers["X-RateLimit-Limit"], refused.headers["X-RateLimit-Remaining"]) == ("20", "0")
    assert "MOVIEQ_REQUESTS_PER_S" in refused.message
    assert (await slow_refill.submit(key=ALL)).status == 201, "another key is not affected"
    assert (await slow_refill.get("/health", key=None)).status == 200


async def test_a_signed_url_has_a_limit_of_requests_of_its_own(slow_refill: Client) -> None:
    url = (await slow_refill.submit(key=FILM)).json["events_url"]
    for _ in range(20):
        async with slow_refill.events(url, key=None):
            pass
    assert (await slow_refill.get(url, key=None)).status == 429
    assert (await slow_refill.get("/api/v1/projects/film", key=FILM)).status == 200


async def test_tokens_come_back_at_their_rate(settings: Settings, redis: Redis) -> None:
    async with served(msgspec.structs.replace(settings, requests_per_s=1000.0, request_burst=1)) as client:
        async with asyncio.timeout(DEADLINE_S):
            served_count = 0
            while served_count < 20:
                served_count += (await client.get("/api/v1/task-types", key=FILM)).status == 200
        assert await redis.ttl(f"movieq:tokens:{key_hash(FILM)}") <= 1, "a full bucket needs no key"


async def test_requests_without_a_limit_have_no_headers_of_one(api: Client) -> None:
    assert "X-RateLimit-Limit" not in (await api.get("/api/v1/task-types")).headers


async def test_silent_connections_shut_nobody_out(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "connections_limit", lambda: 8)
    monkeypatch.setattr(limits, "HITS", limits.Hits())
    monkeypatch.setattr(serving, "HITS", limits.HITS)
    async with served(settings) as client:
        host, port = client.url.removeprefix("http://").split(":")
        task_id = (await client.submit()).json["task_id"]
        async with client.events(task_id) as stream, AsyncExitStack() as opened:
            for number in range(40):
                _, writer = await asyncio.open_connection(host, int(port))
                opened.callback(writer.close)
                if number % 2:
                    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            assert (await client.status(task_id))["status"] == "queued"
            await client.delete(f"/api/v1/tasks/{task_id}/cancel")
            assert (await stream.until("cancelled"))[-1].type == "cancelled", "an open stream is kept"
    assert limits.HITS.counts["connections"] >= 30
    assert len([record for record in logged.records if "limit_hit" in record.getMessage()]) == 1


UNREAD = b"GET /openapi.json HTTP/1.%d\r\nHost: x\r\n\r\n"
"""A request with a large answer."""


@pytest.fixture
async def narrow(settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """Yield a client of an API from which the kernel takes little for a client that does not read."""
    monkeypatch.setattr(limits, "HITS", limits.Hits())
    monkeypatch.setattr(serving, "HITS", limits.HITS)
    async with served(settings, send_buffer=4096) as client:
        yield client


def not_reading(api: Client) -> socket.socket:
    """Return a connection whose kernel accepts little that is not read."""
    unread = socket.socket()
    unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = api.url.removeprefix("http://").split(":")
    unread.connect((host, int(port)))
    return unread


@pytest.mark.parametrize("asked", ["closes", "pipelined", "leaves half"])
async def test_a_client_that_does_not_read_its_answer_is_disconnected(narrow: Client, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "UNREAD_S", 0.2)
    with not_reading(narrow) as unread:
        unread.sendall(UNREAD % 0 if asked == "closes" else UNREAD % 1 * 5)
        if asked == "leaves half":
            unread.shutdown(socket.SHUT_WR)
        await eventually(lambda: bool(limits.HITS.counts))
    assert limits.HITS.counts == {"unread_answers": 1}


@pytest.mark.parametrize("version", [0, 1])
async def test_a_client_that_reads_slowly_gets_all_of_its_answer(narrow: Client, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, got, checks = (await narrow.get("/openapi.json")).body, bytearray(), 0
    with not_reading(narrow) as reading:
        check = serving._Protocol._end_unread

        def read_a_little_and_check(connection: serving._Protocol, before: int) -> None:
            nonlocal checks
            checks += 1
            until_s = time.monotonic() + DEADLINE_S
            while connection._unread_bytes() >= before and time.monotonic() < until_s:
                with contextlib.suppress(BlockingIOError):
                    got.extend(reading.recv(1000))
            check(connection, before)

        monkeypatch.setattr(serving._Protocol, "_end_unread", read_a_little_and_check)
        monkeypatch.setattr(serving, "UNREAD_S", 0.01)
        reading.setblocking(False)
        reading.sendall(UNREAD % version)
        await eventually(lambda: checks >= 5)
        async with asyncio.timeout(DEADLINE_S):
            monkeypatch.setattr(serving, "UNREAD_S", DEADLINE_S)
            while not got.endswith(whole):
                got.extend(await asyncio.get_running_loop().sock_recv(reading, 65_536))
    assert not limits.HITS.counts


async def test_connections_that_close_and_are_not_read_shut_nobody_out(narrow: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "connections_limit", lambda: 8)
    async with served(narrow.state.settings, send_buffer=4096) as client:
        with ExitStack() as opened:
            for _ in range(20):
                unread = opened.enter_context(not_reading(client))
                unread.setblocking(False)
                unread.sendall(UNREAD % 0)
                await asyncio.get_running_loop().sock_recv(unread, 10)
            assert (await client.get("/health", key=None)).status == 200
    assert limits.HITS.counts["connections"] >= 12


async def test_a_stream_on_a_connection_that_closes_does_not_begin(narrow: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    task_id = (await narrow.submit()).json["task_id"]
    found, closing = asyncio.Event(), asyncio.Event()
    look_up, end, give = auth.task_of, serving._Protocol.eof_received, serving._hand_over
    handed_over: list[bool] = []

    async def found_late(*asked: Any) -> Any:
        found.set()
        await closing.wait()
        return await look_up(*asked)

    def ended(connection: serving._Protocol) -> None:
        end(connection)
        closing.set()

    def hand_over(*asked: Any) -> bool:
        handed_over.append(give(*asked))
        return handed_over[-1]

    monkeypatch.setattr(serving, "_hand_over", hand_over)
    monkeypatch.setattr(events, "task_of", found_late)
    monkeypatch.setattr(serving._Protocol, "eof_received", ended)
    with not_reading(narrow) as unread:
        unread.sendall(b"GET /movieq.js HTTP/1.1\r\n\r\n" * 7)  # more than the kernel takes, and less than what makes answers wait
        unread.sendall(f"GET /api/v1/tasks/{task_id}/events HTTP/1.1\r\nX-API-Key: {ALL}\r\n\r\n".encode())
        async with asyncio.timeout(DEADLINE_S):
            await found.wait()
            unread.shutdown(socket.SHUT_WR)
            await closing.wait()
            while not handed_over or narrow.state.places.taken:
                await asyncio.sleep(0.001)
    assert handed_over == [False]


async def test_a_stream_whose_client_has_left_before_it_began_frees_its_place(small: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued()
    head = f"GET /api/v1/tasks/{task_id}/events HTTP/1.1\r\nHost: x\r\nX-API-Key: {ALL}\r\n\r\n".encode()
    host, port = small.url.removeprefix("http://").split(":")
    for _ in range(20):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        writer.transport.abort()
    await freed(small, 0)


def test_hits_are_logged_again_after_a_minute(monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    hits = limits.Hits()
    for now_s in (100.0, 110.0, 159.0, 161.0):  # noqa: B007  # the clock reads it
        hits.add("requests")
    lines = [record.getMessage() for record in logged.records if record.levelno == logging.WARNING]
    assert [line.partition("hits=")[2].split()[0] for line in lines] == ["1", "3"]


async def test_a_signed_url_gives_no_urls_that_outlive_it(api: Client) -> None:
    for path, field in (("tasks", "task_id"), ("projects", "project_id")):
        receipt = (await api.submit(key=FILM)).json
        purpose, id = {"tasks": "events", "projects": "project-events"}[path], receipt[field]
        expires = int(time.time()) + 60
        signature = signing.sign(api.state.signing_secrets[0], purpose, signing.subject(id, key_hash(FILM)), expires)
        url = f"{api.url}/api/v1/{path}/{id}/events?expires={expires}&key={key_hash(FILM)}&signature={signature}"
        async with api.events(url, key=None) as stream:
            (snapshot,) = await stream.until("snapshot")
        assert parse_qs(urlsplit(snapshot.data["events_url"]).query)["expires"] == [str(expires)]


async def test_the_url_of_a_revoked_key_takes_nothing_from_others(slow_refill: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_cache, "CACHE_S", 0)
    key = "a-key-that-will-be-revoked"
    await slow_refill.state.api_keys.add_grant(key_hash(key), Grant(None, frozenset(Scope)))
    await slow_refill.submit(key=key)
    revoked, good = [(await slow_refill.get("/api/v1/projects/film", key=each)).json["events_url"] for each in (key, FILM)]
    await slow_refill.state.api_keys.revoke(key_hash(key))
    assert {(await slow_refill.get(revoked, key=None)).status for _ in range(40)} == {403}
    async with slow_refill.events(good, key=None):
        pass


async def test_a_clock_that_steps_back_refuses_nobody(slow_refill: Client, redis: Redis) -> None:
    bucket = f"movieq:tokens:{key_hash(FILM)}"
    await slow_refill.get("/api/v1/task-types", key=FILM)
    slow_refill.state.rates._held.clear()
    seconds, _ = await redis.time()
    await redis.set(bucket, (seconds + 10**9) * 1000)
    taken, _, wait_ms = await slow_refill.state.api_keys.take_tokens(key_hash(FILM), 1000.0, 20, 1)
    assert (taken, wait_ms) == (0, 1), "the bucket is empty, and fills from now on"


async def test_while_redis_refuses_writes_one_request_a_second_asks_for_tokens(
    slow_refill: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def refused(*args: object) -> tuple[int, int, int]:
        nonlocal asked
        asked += 1
        raise ReadOnlyError("You can't write against a read only replica.")

    monkeypatch.setattr(slow_refill.state.api_keys, "take_tokens", refused)
    monkeypatch.setattr(limits, "REFUSED_S", 3600)
    answers = [await slow_refill.get("/api/v1/task-types", key=FILM) for _ in range(50)]
    assert {answer.status for answer in answers} == {200}
    assert asked == 1


async def test_refusals_do_not_ask_redis(slow_refill: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(21):
        last = await slow_refill.get("/api/v1/task-types", key=FILM)
    assert last.status == 429

    async def asked(*args: object) -> tuple[int, int, int]:
        raise AssertionError("the next token is hours away")

    monkeypatch.setattr(slow_refill.state.api_keys, "take_tokens", asked)
    assert {(await slow_refill.get("/api/v1/task-types", key=FILM)).status for _ in range(20)} == {429}
