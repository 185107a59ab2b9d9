"""Webhooks: the signature headers, and one try at sending.

A try returns an `Outcome` whatever the receiver does, after at most 15 s and 64 kB. Left out: the body and the schedule of tries (both in
`workers.delivery`), and which addresses are allowed (`movieq.fetch.guard.Guard.session`).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
import msgspec

from movieq.fetch.problems import HttpFault, http_fault, reason

TIMEOUT_S: Final = 15.0
MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_RETRY_AFTER_S: Final = 24 * 3600.0


class Outcome(msgspec.Struct, frozen=True):
    """The outcome of one try.

    `status` is None if no answer came, because the time was over (`timed_out`) or for another reason. `ok` is any 2xx. `gone` (410) means
    that the receiver must not be called again. `retry_after_s`, 0 to a day, is the `Retry-After` of a refusal. `problem` is the reason in
    words, without the url; it is empty if `ok`.
    """

    status: int | None
    ok: bool
    gone: bool
    retry_after_s: float | None
    problem: str
    timed_out: bool = False


def headers(secrets: tuple[str, ...], delivery_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """Return the headers of one try: those of Standard Webhooks 1.0, and `X-Webhook-Signature` for receivers of the platform.

    `delivery_id` is the same for all tries, `timestamp_s` is the time of this one. `webhook-signature` has one `v1,` part per secret.
    `X-Webhook-Signature` is the hex HMAC-SHA256 of the raw body; its key is the whole text of the first secret, prefix included. Without
    secrets there are no signatures.
    """
    found = {"webhook-id": delivery_id, "webhook-timestamp": str(timestamp_s)}
    if secrets:
        message = f"{delivery_id}.{timestamp_s}.".encode() + body
        signatures = (base64.b64encode(hmac.digest(_key(secret), message, hashlib.sha256)).decode() for secret in secrets)
        found["webhook-signature"] = " ".join(f"v1,{signature}" for signature in signatures)
        found["X-Webhook-Signature"] = hmac.digest(secrets[0].encode(), body, hashlib.sha256).hex()
    return found


async def send(session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str], timeout_s: float = TIMEOUT_S) -> Outcome:
    """POST a JSON body once and return the outcome. Redirects are not followed; nothing is raised but CancelledError.

    The status of the answer decides. Its body is read, up to 64 kB and within the time limit, only so that the connection can be reused.
    """
    sent = {"Content-Type": "application/json", **headers}
    answer: aiohttp.ClientResponse | None = None
    timed_out = False
    try:
        async with (
            asyncio.timeout(timeout_s),
            session.post(url, data=body, headers=sent, allow_redirects=False, timeout=aiohttp.ClientTimeout()) as answer,
        ):
            await _drained(answer)
    except TimeoutError:  # also aiohttp's own, which are ClientErrors
        timed_out, problem = True, f"no answer within {timeout_s:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        problem = _problem(error)
    if answer is None:
        return Outcome(status=None, ok=False, gone=False, retry_after_s=None, problem=problem, timed_out=timed_out)
    return _outcome(answer)


def retry_after_s(value: str, now_s: float) -> float | None:
    """Return the seconds of a `Retry-After` header, 0 to a day; None if it is neither a number nor an HTTP date (RFC 9110, 10.2.3)."""
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,300}", value):
        wait_s = float(value)
    else:
        try:
            date = parsedate_to_datetime(value)
            wait_s = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now_s  # the asctime form has no zone and means UTC
        except (ValueError, TypeError, IndexError, OverflowError):  # each is raised for some texts
            return None
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)


async def _drained(answer: aiohttp.ClientResponse) -> None:
    left = MAX_ANSWER_BYTES
    while left > 0 and (chunk := await answer.content.read(left)):
        left -= len(chunk)


def _outcome(answer: aiohttp.ClientResponse) -> Outcome:
    status = answer.status
    if 200 <= status < 300:
        return Outcome(status=status, ok=True, gone=False, retry_after_s=None, problem="")
    problem = f"answered {status}"
    if 300 <= status < 400:
        problem += ", but redirects are not followed: use the final url"
    wait = answer.headers.get("Retry-After")
    return Outcome(
        status=status,
        ok=False,
        gone=status == 410,
        retry_after_s=None if wait is None else retry_after_s(wait, time.time()),
        problem=problem,
    )


def _problem(error: Exception) -> str:
    why = reason(error)
    match http_fault(error):
        case HttpFault.URL:
            return why or "the address is malformed"
        case HttpFault.HOST:
            return "the host of the address was not found"
        case HttpFault.TLS:
            return "the certificate or the TLS handshake was not accepted"
        case HttpFault.CONNECT:
            return f"cannot connect: {why or 'refused'}"
        case HttpFault.BROKE_OFF:
            return "the connection broke off before an answer came"
        case HttpFault.NOT_HTTP:
            return "the answer is not HTTP"
        case HttpFault.TIMEOUT | HttpFault.OTHER:
            return f"the request failed ({why})"


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
