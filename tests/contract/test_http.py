"""Clients with another kind of HTTP: they offer an upgrade, know only HTTP/1.0, or send heads without end."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Final

import msgspec
import pytest

from movieq.api import limits, server
from movieq.api import tasks as handlers
from movieq.api.app import create
from movieq.queue.store import Store
from movieq.settings import Settings
from tests.arrange import result
from tests.contract.client import ALL, BODY, DEADLINE_S, Client
from tests.contract.conftest import Tasks

OFFER: Final = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\nUpgrade: h2c\r\n"
"""Headers that Java's HttpClient sends in each request to a server that it does not know."""
KEY: Final = f"Host: a\r\nX-API-Key: {ALL}\r\n".encode()
SUBMIT: Final = b"POST /api/v1/tasks/submit HTTP/1.1\r\nContent-Type: application/json\r\n" + KEY
HEALTH: Final = b"GET /health HTTP/1.1\r\n" + KEY
LAST: Final = HEALTH + b"Connection: close\r\n\r\n"
TASK: Final = json.dumps(BODY).encode()
CHUNKED: Final = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(TASK), TASK)
SIZED: Final = b"Content-Length: %d\r\n\r\n" % len(TASK) + TASK
JAVA: Final = Path(__file__).with_name("Ask.java")


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answers)]


# ── An upgrade that is not offered here ──


@pytest.mark.parametrize("body", [SIZED, CHUNKED], ids=["sized", "chunked"])
@pytest.mark.parametrize("offer", [OFFER, OFFER.replace(b"h2c", b"websocket"), OFFER.replace(b"h2c", b"TLS/1.2, h2c")], ids=ascii)
async def test_a_request_that_offers_another_protocol_is_answered_in_this_one(api: Client, offer: bytes, body: bytes) -> None:
    answers = await api.raw(HEALTH + offer + b"\r\n", SUBMIT + offer + body, LAST)
    assert statuses(answers) == [200, 201, 200]
    assert b"upgrade" not in answers.lower()


async def test_an_offer_is_ignored_wherever_the_network_cuts_the_request(api: Client) -> None:
    request = SUBMIT + OFFER + SIZED
    host, port = api.url.removeprefix("http://").split(":")
    for cut in (1, len(SUBMIT) + 5, len(SUBMIT + OFFER), len(request) - len(TASK), len(request) - 5):
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(DEADLINE_S):
            writer.write(request[:cut])
            await writer.drain()
            await api.get("/health")  # the first part has arrived
            writer.write(request[cut:] + LAST)
            assert statuses(await reader.read()) == [201, 200], cut
        writer.close()


async def test_offers_at_once_are_answered_one_after_the_other(api: Client) -> None:
    short = b"HEAD /health HTTP/1.1\r\nHost: a\r\nUpgrade: a\r\nConnection: upgrade\r\n\r\n"
    assert statuses(await api.raw(short * server.PIPELINED + LAST)) == [200] * (server.PIPELINED + 1)


@pytest.mark.parametrize(
    "request_",
    [
        HEALTH + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n",
        HEALTH + b"Connection: close, Upgrade\r\nUpgrade: websocket\r\n\r\n",
        HEALTH.replace(b"/1.1", b"/1.0") + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        SUBMIT + b"Connection: close\r\n" + OFFER + SIZED,
        SUBMIT + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n" + CHUNKED,
        SUBMIT.replace(b"/1.1", b"/1.0") + b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + SIZED,
    ],
    ids=["get", "get-websocket", "get-1.0", "post-java", "post-chunked", "post-1.0"],
)
async def test_an_offer_over_a_connection_that_closes_is_answered_and_the_connection_closed(api: Client, request_: bytes) -> None:
    answer = await api.raw(request_)
    assert statuses(answer) == [201 if request_.startswith(b"POST") else 200]
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert statuses(await api.raw(HEALTH + OFFER + b"\r\n" + request_)) in ([200, 200], [200, 201])


async def test_an_offer_with_a_body_that_is_too_large_or_no_json_is_refused_as_ever(api: Client) -> None:
    wrong = b"Content-Length: 2\r\n\r\n[]"
    large = b"Content-Length: %d\r\n\r\n" % (2 << 20) + b" " * (2 << 20)
    assert statuses(await api.raw(SUBMIT + OFFER + wrong, SUBMIT + OFFER + large, LAST)) == [400, 413, 200]


async def test_expect_and_an_offer_are_answered_once_each(api: Client) -> None:
    head, body = SIZED.split(b"\r\n\r\n")
    answers = await api.raw(SUBMIT + OFFER + b"Expect: 100-continue\r\n" + head + b"\r\n\r\n", body, LAST)
    assert statuses(answers) in ([100, 201, 200], [201, 200])  # nothing is said to be awaited that is there already


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no JDK")
async def test_the_client_of_java_submits_and_asks(api: Client) -> None:
    process = await asyncio.create_subprocess_exec("java", str(JAVA), api.url, ALL, TASK.decode(), stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    assert out.decode().split() == ["201", "200", "201", "200"], err.decode()


# ── HTTP/1.0 ──


@pytest.mark.parametrize("connection", [b"", b"Connection: keep-alive\r\n"], ids=["plain", "keep-alive"])
async def test_a_stream_of_http_1_0_is_its_plain_body_until_the_connection_closes(
    api: Client, tasks: Tasks, store: Store, connection: bytes
) -> None:
    task_id, run = await tasks.processing()
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(DEADLINE_S):
        writer.write(b"GET /api/v1/tasks/%b/events HTTP/1.0\r\n" % task_id.encode() + KEY + connection + b"\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readuntil(b"event: started\n")
        await store.report(task_id, run, 0.5, "generating_image")
        await reader.readuntil(b"event: progress\n")
        await store.complete(task_id, run, result())
        rest = await reader.read()
    writer.close()
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert rest.endswith(b"\n\n")
    assert re.findall(rb"^event: (\w+)$", rest, re.MULTILINE) == [b"completed"]
    assert [line for line in rest.split(b"\n") if not re.match(rb"(id|event|data|retry|): ?|$", line)] == []


async def test_a_stream_of_http_1_0_says_goodbye(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued()
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(DEADLINE_S):
        writer.write(b"GET /api/v1/tasks/%b/events HTTP/1.0\r\n" % task_id.encode() + KEY + b"\r\n")
        await reader.readuntil(b"event: snapshot\n")
        api.state.hub.close()
        rest = await reader.read()
    writer.close()
    assert re.search(rb"\nretry: \d+\n\nevent: goodbye\ndata: {[^\n]+}\n\n$", rest), rest


async def test_no_answer_to_http_1_0_is_in_chunks_and_each_ends_its_connection(api: Client, tasks: Tasks, settings: Settings) -> None:
    task_id = await tasks.completed()
    given = {"task_id": task_id, "project_id": "film", "delivery_id": "none", "key": "none"}
    asked = 0
    for route in create(settings, api.url).routes:
        path = re.sub(r"\{(\w+)(?::path)?\}", lambda name: given[name[1]], route.path)  # type: ignore[attr-defined]
        for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS"):
            if method == "GET" and path.startswith("/api/v1/projects") and path.endswith("/events"):
                continue  # goes on for ever
            body = b"" if method == "GET" else b"Content-Type: application/json\r\n" + SIZED
            answer = await api.raw(f"{method} {path} HTTP/1.0\r\n".encode() + KEY + b"Connection: keep-alive\r\n" + (body or b"\r\n"))
            head, _, _ = answer.lower().partition(b"\r\n\r\n")
            assert b"\r\nconnection: close" in head, (method, path, head)
            assert b"\r\ntransfer-encoding" not in head, (method, path, head)
            asked += 1
    assert asked > 100


async def test_a_client_of_http_1_0_is_not_told_to_continue(api: Client) -> None:
    request = SUBMIT.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Expect: 100-continue\r\n"
    head, body = SIZED.split(b"\r\n\r\n")
    assert statuses(await api.raw(request + head + b"\r\n\r\n", body)) == [201]


# ── Requests that do not wait for the answers ──


async def test_requests_beyond_those_that_may_wait_are_refused_after_the_others_are_answered(
    api: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HITS", limits.Hits())
    monkeypatch.setattr(server, "HITS", limits.HITS)
    answers = await api.raw(b"GET /nothing HTTP/1.1\r\n\r\n" * 10_000)
    assert statuses(answers) == [404] * (server.PIPELINED + 1) + [429]
    head, _, body = answers[answers.rindex(b"HTTP/1.1") :].partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    assert b"\r\nretry-after: 1" in head
    assert msgspec.json.decode(body)["error"] == "rate_limited"
    assert limits.HITS.counts == {"pipelined_requests": 1}


async def test_a_refusal_comes_after_the_answers_to_earlier_requests(api: Client) -> None:
    ask = HEALTH + b"\r\n"
    assert statuses(await api.raw(ask * 2 + b"no HTTP\r\n\r\n" + ask)) == [200, 200, 400]
    assert statuses(await api.raw(ask * 2 + b"GET /\xff:x HTTP/1.1\r\n\r\n" + ask)) == [200, 200, 400]
    endless = SUBMIT + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 20_000
    assert statuses(await api.raw(ask * 2 + endless)) == [200, 200, 413]


async def test_a_body_that_waits_for_its_turn_has_a_limit(api: Client, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HITS", limits.Hits())
    monkeypatch.setattr(server, "HITS", limits.HITS)
    monkeypatch.setattr(handlers, "WAIT_S", 600)
    monkeypatch.setattr(handlers, "WAIT_CHECK_S", 0.001)  # each look at the connection reads on
    task_id = await tasks.queued()
    wait = f"GET /api/v1/tasks/{task_id}/status?wait=600 HTTP/1.1\r\n".encode() + KEY + b"\r\n"
    upload = b"POST /api/v1/projects/film/uploads HTTP/1.1\r\n" + KEY + b"Content-Length: 20000000\r\n\r\n" + bytes(4 << 20)
    answers = asyncio.create_task(api.raw(wait + upload))
    async with asyncio.timeout(DEADLINE_S):
        while not limits.HITS.counts["payload_too_large"]:
            await asyncio.sleep(0.001)
    await api.delete(f"/api/v1/tasks/{task_id}/cancel")
    assert statuses(await answers) == [200, 413]


async def test_a_client_that_leaves_frees_the_place_of_a_request_with_others_behind_it(
    api: Client, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "WAIT_S", 600)
    task_id = await tasks.queued()
    wait = f"GET /api/v1/tasks/{task_id}/status?wait=600 HTTP/1.1\r\n".encode() + KEY + b"\r\n"
    host, port = api.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(wait + HEALTH + b"\r\n")
    async with asyncio.timeout(DEADLINE_S):
        while not api.state.places.taken:
            await asyncio.sleep(0.001)
        writer.transport.abort()
        while api.state.places.taken:
            await asyncio.sleep(0.001)


# ── Heads and framing without end ──


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"x" * 40_000, 414),
        (b"GET /health HTTP/1.1\r\nHost: " + b"x" * 40_000, 431),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 8_000, 431),
        (b"GET /api/v1/tasks/submit HTTP/1.1\r\nHost: a\r\nX-API-Key: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"\r\n" * 20_000, 431),
        (SUBMIT + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 50_000, 413),
        (SUBMIT + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 400_000, 413),
    ],
    ids=["line", "header", "headers", "key", "empty lines", "trailers", "chunk extension"],
)
async def test_a_head_or_framing_without_end_is_refused_after_32_kib(api: Client, request_: bytes, status: int) -> None:
    answers = await api.raw(request_)
    head, _, body = answers.partition(b"\r\n\r\n")
    assert statuses(head) == [status]
    assert b"connection: close" in head
    assert msgspec.json.decode(body)["error"] == "payload_too_large"
    assert (await api.get("/health")).status == 200


async def test_a_head_of_31_kib_is_read(api: Client) -> None:
    assert (
        statuses(await api.raw(HEALTH + b"A: " + b"x" * 31_000 + b"\r\n\r\n", HEALTH + b"A: " + b"x" * 31_000 + b"\r\n\r\n", LAST))
        == [200] * 3
    )


async def test_a_body_in_chunks_of_a_byte_is_read(api: Client) -> None:
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in TASK.ljust(100_000)) + b"0\r\n\r\n"
    assert statuses(await api.raw(SUBMIT + b"Transfer-Encoding: chunked\r\n\r\n" + body, LAST)) == [201, 200]


async def test_a_connection_that_sends_no_whole_head_ends(api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.3)
    assert await api.raw(b"") == b""
    late = await api.raw(HEALTH)
    assert statuses(late) == [400]
    assert b"did not arrive within 0.3 s" in late
    assert statuses(await api.raw(HEALTH + b"\r\n", HEALTH)) == [200, 400]
