"""Signed, expiring addresses: who holds one may read one thing until a given second.

A signature binds a purpose ("media", "events"), a subject (a key, a task id) and an expiry, so that none of the three can be exchanged. It
says nothing about who asks, and cannot be taken back before it expires; a new secret ends all of them at once, unless the old one still
stands behind it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Sequence

from movieq.errors import Forbidden

_SECOND = re.compile(r"0|[1-9][0-9]{0,11}")


def sign(secret: bytes, purpose: str, subject: str, expires: int) -> str:
    """43 characters of url-safe base64: HMAC-SHA256 over purpose, expiry (a Unix time in seconds) and subject.

    `purpose` is a word of the program's own, without line breaks; the subject comes last, so it may hold anything.
    """
    message = f"{purpose}\n{expires}\n{subject}".encode("utf-8", "backslashreplace")
    return base64.urlsafe_b64encode(hmac.digest(secret, message, hashlib.sha256)).rstrip(b"=").decode()


def verify(secrets: Sequence[bytes], purpose: str, subject: str, expires: str, signature: str, now_s: float) -> None:
    """Return if `signature` is that of `sign` by any of the secrets, and its last second has not passed.

    `expires` and `signature` are what stands in the url.

    Raises Forbidden, saying whether the address is wrong or was right once and has expired.
    """
    # Texts are compared, not what they decode to: "0123" and "123", or two spellings of the last base64 character, mean the same
    # and yet an address that was changed by one character must not pass.
    given = signature.encode("utf-8", "backslashreplace")
    good = _SECOND.fullmatch(expires) is not None and any(
        hmac.compare_digest(sign(secret, purpose, subject, int(expires)).encode(), given) for secret in secrets
    )
    if not good:
        raise Forbidden("the signature does not fit this address: take the address as it was given, unchanged")
    if now_s > int(expires):
        raise Forbidden("this address has expired: ask for the task or the project again to get a fresh one")
