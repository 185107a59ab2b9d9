"""Signed URLs: each grants read access to one resource until a given second.

A signature covers a purpose ("media", "events"), a subject (a storage key, a task id) and an expiry; changing any of them invalidates it.
The URL of a stream is issued to an API key, whose hash is part of the signed subject; it is invalid once that key is revoked. The URL of a
file names no client and cannot be revoked before it expires. A new secret invalidates all signatures at once, unless the old secret stays
listed after it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Sequence

from movieq.errors import Expired, InvalidSignature

_SECOND = re.compile(r"0|[1-9][0-9]{0,11}")


def sign(secret: bytes, purpose: str, subject: str, expires: int) -> str:
    """Return the HMAC-SHA256 of purpose, expiry (Unix time in seconds) and subject, as 43 characters of URL-safe base64.

    `purpose` is a fixed word of the program, without line breaks; the subject comes last, so it may contain any character.
    """
    message = f"{purpose}\n{expires}\n{subject}".encode("utf-8", "backslashreplace")
    return base64.urlsafe_b64encode(hmac.digest(secret, message, hashlib.sha256)).rstrip(b"=").decode()


def subject(id: str, key_id: str) -> str:
    """Return the subject of a URL for the resource `id`, issued to the API key with this hash; '' if it is issued to no key."""
    return f"{id}\n{key_id}" if key_id else id


def verify(secrets: Sequence[bytes], purpose: str, subject: str, expires: str, signature: str, now_s: float) -> None:
    """Return if `signature` was made by `sign` with one of the secrets and has not expired.

    `expires` and `signature` are the raw values from the URL.

    Raises InvalidSignature, or Expired.
    """
    # Compare the texts, not the decoded values: "0123" and "123", or two spellings of the last base64 character, decode to the same
    # value, but a URL with any changed character must be refused.
    given = signature.encode("utf-8", "backslashreplace")
    good = _SECOND.fullmatch(expires) is not None and any(
        hmac.compare_digest(sign(secret, purpose, subject, int(expires)).encode(), given) for secret in secrets
    )
    if not good:
        raise InvalidSignature("Invalid signature: use the URL exactly as issued")
    if now_s > int(expires):
        raise Expired("This URL has expired: request the task or project again for a fresh one")
