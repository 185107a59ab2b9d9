"""Webhooks: the headers that prove who sent one, and one try at sending it.

A try always ends in an `Outcome`, whatever the receiver does: it costs at most 15 s and 64 kB. Left out: what the body says, when to
try again (the outbox of `workers.deliver`), and which addresses are allowed (the session's connector, `movieq.fetch.Guard.session`).
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

from movieq.errors import SettingsError
from movieq.fetch.problems import HttpFault, http_fault, reason

TIMEOUT_S: Final = 15.0
MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_RETRY_AFTER_S: Final = 24 * 3600.0
MIN_SECRET_BYTES: Final = 16
"""Standard Webhooks recommends 24 to 64; below 128 bits a secret can be guessed."""


class Outcome(msgspec.Struct, frozen=True):
    """What came of one try.

    `status` is None when no answer came; `ok` is any 2xx; `gone` asks never to be called again (410); `retry_after_s`, 0 to a day, is what
    a receiver that refused asked for; `problem` says for people what went wrong, without the address, and is empty when `ok`.
    """

    status: int | None
    ok: bool
    gone: bool
    retry_after_s: float | None
    problem: str


def parse_secrets(text: str) -> tuple[str, ...]:
    """The secrets of `MOVIEQ_WEBHOOK_SECRET`: none, one, or more with commas between, the newest first.

    Raises SettingsError, which counts to the wrong one and never shows it.
    """
    secrets = tuple(part.strip() for part in text.split(",")) if text.strip() else ()
    for position, secret in enumerate(secrets, 1):
        try:
            fits = secret.startswith("whsec_") and len(_key(secret)) >= MIN_SECRET_BYTES
        except ValueError:  # not base64, or not ASCII
            fits = False
        if not fits:
            raise SettingsError(
                f"MOVIEQ_WEBHOOK_SECRET: secret {position} of {len(secrets)} is not whsec_ and the base64 of {MIN_SECRET_BYTES} or more "
                'bytes; make one with: echo "whsec_$(openssl rand -base64 32)"'
            )
    return secrets


def headers(secrets: tuple[str, ...], delivery_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The headers of one try (Standard Webhooks 1.0), and `X-Webhook-Signature` for receivers of the platform.

    `delivery_id` stays the same over all tries, `timestamp_s` is the time of this one. `webhook-signature` has one `v1,` part per secret.
    `X-Webhook-Signature` is the hex HMAC-SHA256 of the raw body under the first secret as it is written, prefix and all. Without secrets
    there is no signature.
    """
    found = {"webhook-id": delivery_id, "webhook-timestamp": str(timestamp_s)}
    if secrets:
        message = f"{delivery_id}.{timestamp_s}.".encode() + body
        signatures = (base64.b64encode(hmac.digest(_key(secret), message, hashlib.sha256)).decode() for secret in secrets)
        found["webhook-signature"] = " ".join(f"v1,{signature}" for signature in signatures)
        found["X-Webhook-Signature"] = hmac.digest(secrets[0].encode(), body, hashlib.sha256).hex()
    return found


async def send(session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str], timeout_s: float = TIMEOUT_S) -> Outcome:
    """One POST of a JSON body has been tried. Redirects are not followed; nothing is raised but CancelledError.

    The answer's status decides. Its body is read, up to 64 kB and within the time, only so that the connection can be used again.
    """
    sent = {"Content-Type": "application/json", **headers}
    answer: aiohttp.ClientResponse | None = None
    try:
        async with (
            asyncio.timeout(timeout_s),
            session.post(url, data=body, headers=sent, allow_redirects=False, timeout=aiohttp.ClientTimeout()) as answer,
        ):
            await _drained(answer)
    except TimeoutError:  # also aiohttp's own, which are ClientErrors
        problem = f"no answer within {timeout_s:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        problem = _problem(error)
    if answer is None:
        return Outcome(status=None, ok=False, gone=False, retry_after_s=None, problem=problem)
    return _outcome(answer)


def retry_after_s(value: str, now_s: float) -> float | None:
    """Seconds to wait by a `Retry-After` header, a number or an HTTP date, 0 to a day; None when it is neither (RFC 9110, 10.2.3)."""
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,300}", value):
        wait_s = float(value)
    else:
        try:
            date = parsedate_to_datetime(value)
            wait_s = (
                date if date.tzinfo else date.replace(tzinfo=UTC)
            ).timestamp() - now_s  # the form of asctime has no zone: it means UTC
        except (ValueError, TypeError, IndexError, OverflowError):  # each of them is raised for some text
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
        problem += ", and redirects are not followed: give the final address"
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
