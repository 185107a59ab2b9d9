"""Webhooks: signatures that the official package accepts, and tries that always end in an outcome."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from email.utils import formatdate

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from movieq.delivery.webhooks import MAX_ANSWER_BYTES, Outcome, headers, retry_after_s, send

BODY = '{"type": "task.completed", "text": "Škoda"}'.encode()


def secret(size: int = 32) -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(size)).decode()


# Signatures


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_official_package_accepts_the_signature_under_every_secret(count: int) -> None:
    known = tuple(secret() for _ in range(count))
    sent = headers(known, "dlv_1", int(time.time()), BODY)
    for one in known:
        assert Webhook(one).verify(BODY, sent) == json.loads(BODY)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret()).verify(BODY, sent)
    with pytest.raises(WebhookVerificationError):
        Webhook(known[0]).verify(BODY + b" ", sent)
    with pytest.raises(WebhookVerificationError):
        Webhook(known[0]).verify(BODY, {**sent, "webhook-id": "dlv_2"})


def test_the_platforms_signature_is_under_the_whole_text_of_the_first_secret() -> None:
    known = (secret(), secret())
    expected = hmac.new(known[0].encode(), BODY, hashlib.sha256).hexdigest()
    assert headers(known, "dlv_1", 1, BODY)["X-Webhook-Signature"] == expected


def test_without_a_secret_nothing_is_signed() -> None:
    assert headers((), "dlv_1", 1_800_000_000, BODY) == {"webhook-id": "dlv_1", "webhook-timestamp": "1800000000"}


# Sending

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Receiver = Callable[[Handler], Awaitable[str]]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """`await receiver(handler)` is the url of a running receiver."""
    servers: list[TestServer] = []

    async def start(handler: Handler) -> str:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        server = TestServer(app, host="127.0.0.1")
        servers.append(server)
        await server.start_server(shutdown_timeout=0.1)
        return str(server.make_url("/hook"))

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


def answering(status: int, body: bytes = b"", **fields: str) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers={name.replace("_", "-"): value for name, value in fields.items()})

    return handler


async def test_the_receiver_gets_the_bytes_that_were_signed(receiver: Receiver, session: aiohttp.ClientSession) -> None:
    known = secret()
    got: list[object] = []

    async def handler(request: web.Request) -> web.Response:
        got.extend([request.method, request.content_type, Webhook(known).verify(await request.read(), dict(request.headers))])
        return web.Response(status=204)

    outcome = await send(session, await receiver(handler), BODY, headers((known,), "dlv_1", int(time.time()), BODY))
    assert outcome == Outcome(status=204, ok=True, gone=False, retry_after_s=None, problem="")
    assert got == ["POST", "application/json", json.loads(BODY)]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome(status=200, ok=True, gone=False, retry_after_s=None, problem="")),
        (299, Outcome(status=299, ok=True, gone=False, retry_after_s=None, problem="")),
        (400, Outcome(status=400, ok=False, gone=False, retry_after_s=7.0, problem="answered 400")),
        (410, Outcome(status=410, ok=False, gone=True, retry_after_s=7.0, problem="answered 410")),
        (429, Outcome(status=429, ok=False, gone=False, retry_after_s=7.0, problem="answered 429")),
        (503, Outcome(status=503, ok=False, gone=False, retry_after_s=7.0, problem="answered 503")),
    ],
)
async def test_the_status_decides(receiver: Receiver, session: aiohttp.ClientSession, status: int, outcome: Outcome) -> None:
    assert await send(session, await receiver(answering(status, b"{}", Retry_After="7")), BODY, {}) == outcome


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_a_failure_and_not_followed(receiver: Receiver, session: aiohttp.ClientSession, status: int) -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    outcome = await send(session, await receiver(handler), BODY, {})
    assert (outcome.status, outcome.ok, asked) == (status, False, ["/hook"])
    assert "redirects are not followed" in outcome.problem


async def test_a_receiver_that_never_answers_costs_the_time_limit(receiver: Receiver, session: aiohttp.ClientSession) -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    outcome = await send(session, await receiver(handler), BODY, {}, timeout_s=0.2)
    assert outcome == Outcome(status=None, ok=False, gone=False, retry_after_s=None, problem="no answer within 0.2 s", timed_out=True)


@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_whose_body_never_ends_counts_by_its_status(
    receiver: Receiver, session: aiohttp.ClientSession, status: int
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(status=status)
        await answer.prepare(request)
        await asyncio.sleep(60)
        return answer

    outcome = await send(session, await receiver(handler), BODY, {}, timeout_s=0.3)
    assert (outcome.status, outcome.ok) == (status, status == 200)


async def test_of_a_long_answer_only_the_beginning_is_read(receiver: Receiver, session: aiohttp.ClientSession) -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(bytes(MAX_ANSWER_BYTES))
            sent += MAX_ANSWER_BYTES

    outcome = await send(session, await receiver(handler), BODY, {}, timeout_s=5)
    assert outcome.ok
    assert sent < 16 * 1024 * 1024  # what buffers hold


async def test_a_compressed_answer_never_unfolds(receiver: Receiver, session: aiohttp.ClientSession) -> None:
    url = await receiver(answering(200, gzip.compress(bytes(20_000_000)), Content_Encoding="gzip"))
    assert (await send(session, url, BODY, {})).ok


async def test_a_short_answer_leaves_the_connection_for_the_next(receiver: Receiver, session: aiohttp.ClientSession) -> None:
    peers: set[object] = set()

    async def handler(request: web.Request) -> web.Response:
        assert request.transport
        peers.add(request.transport.get_extra_info("peername"))
        return web.Response(body=b"thanks")

    url = await receiver(handler)
    for _ in range(3):
        assert (await send(session, url, BODY, {})).ok
    assert len(peers) == 1


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200", b"SSH-2.0-x\r\n"])
async def test_a_peer_that_hangs_up_or_speaks_something_else_is_a_problem(session: aiohttp.ClientSession, answer: bytes) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(peer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        outcome = await send(session, f"http://127.0.0.1:{port}/?token=hush", BODY, {})
    assert (outcome.status, outcome.ok) == (None, False)
    assert outcome.problem in ("the connection broke off before an answer came", "the answer is not HTTP")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://127.0.0.1:{unused}/?token=hush", "cannot connect"),
        ("http://hush:hush@127.0.0.1:{unused}/", "cannot connect"),
        ("https://nowhere.invalid/hush", "not found"),
        ("ftp://127.0.0.1/hush", "malformed|request failed"),
        ("hush", "malformed|request failed"),
        ("", "malformed|request failed"),
        ("http://[hush/", "malformed|request failed"),
        ("http://" + "a" * 64 + ".invalid/", "malformed|request failed|not found"),
    ],
)
async def test_an_address_that_cannot_be_called_is_a_problem_that_shows_no_secret(
    session: aiohttp.ClientSession, url: str, problem: str
) -> None:
    outcome = await send(session, url.format(unused=unused_port()), BODY, {}, timeout_s=10)
    assert (outcome.status, outcome.ok, outcome.gone) == (None, False, False)
    assert any(words in outcome.problem for words in problem.split("|")), outcome.problem
    assert "hush" not in outcome.problem


async def test_tls_that_is_none_is_a_problem(receiver: Receiver, session: aiohttp.ClientSession) -> None:
    url = (await receiver(answering(200))).replace("http:", "https:")
    assert "TLS" in (await send(session, url, BODY, {})).problem


async def test_a_cancelled_try_stays_cancelled(receiver: Receiver, session: aiohttp.ClientSession) -> None:
    asked, over = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        asked.set()
        await over.wait()
        return web.Response()

    task = asyncio.create_task(send(session, await receiver(handler), BODY, {}))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    over.set()


# Retry-After


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("86401", 86400.0),
        ("9" * 300, 86400.0),
        (formatdate(1_800_000_090, usegmt=True), 90.0),
        (formatdate(1_799_999_000, usegmt=True), 0.0),
        ("Wed, 01 Jan 2120 00:00:00 GMT", 86400.0),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("nan", None),
        ("٣", None),
        ("9" * 5000, None),
        ("Wed, 99 Jan 2120 00:00:00 GMT", None),
        ("Wed, 01 Jan 99999999 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_of_at_most_a_day(value: str, wait_s: float | None) -> None:
    assert retry_after_s(value, 1_800_000_000.0) == wait_s


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d{1,12} [A-Z][a-z]{2} \d{1,12} \d+:\d+:\d+ [+-]?\d{0,9}", fullmatch=True))
def test_no_retry_after_is_an_exception(value: str) -> None:
    wait_s = retry_after_s(value, 0.0)
    assert wait_s is None or 0 <= wait_s <= 86400


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Kolkata", "Pacific/Kiritimati", "<-11>11"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine in each of these time zones."""
    with monkeypatch.context() as context:
        context.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("zone")
@pytest.mark.parametrize(
    "date",
    [
        "Sun, 06 Nov 1994 08:49:37 GMT",  # IMF-fixdate
        "Sunday, 06-Nov-94 08:49:37 GMT",  # RFC 850
        "Sun Nov  6 08:49:37 1994",  # asctime
        "Sun, 06 Nov 1994 08:49:37 -0000",
        "Sun, 06 Nov 1994 08:49:37 UTC",
        "Sun, 06 Nov 1994 08:49:37",
        "Sun, 06 Nov 1994 09:49:37 +0100",
    ],
)
def test_a_date_to_retry_after_is_in_utc_whatever_the_zone_of_the_machine(date: str) -> None:
    assert retry_after_s(date, 784111777 - 90) == 90


@pytest.mark.parametrize(
    "value", ["Sun, 06 Nov 1994", "Sun, 99 Nov 1994 08:49:37 GMT", "tomorrow", "-5", "1.5", "", "Sun Nov  6 08:49:37 99999"]
)
def test_what_is_neither_seconds_nor_a_date_is_no_time_to_retry_after(value: str) -> None:
    assert retry_after_s(value, 784111777) is None
