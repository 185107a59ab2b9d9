"""Signed addresses: nothing about one can be changed, and it ends."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movieq.errors import Expired, InvalidSignature
from movieq.signing import sign, verify

SECRET = b"a secret of the installation"
EXPIRES = 1_800_000_000


def test_a_signature_holds_until_its_last_second() -> None:
    signature = sign(SECRET, "media", "a/b.mp4", EXPIRES)
    verify((SECRET,), "media", "a/b.mp4", str(EXPIRES), signature, EXPIRES)
    with pytest.raises(Expired):
        verify((SECRET,), "media", "a/b.mp4", str(EXPIRES), signature, EXPIRES + 0.1)


def test_a_wrong_signature_is_wrong_also_when_it_would_have_expired() -> None:
    with pytest.raises(InvalidSignature):
        verify((SECRET,), "media", "a", str(EXPIRES), "x" * 43, EXPIRES + 1)


def test_a_signature_changed_by_any_single_character_is_refused() -> None:
    signature = sign(SECRET, "events", "task", EXPIRES)
    alphabet = string.ascii_letters + string.digits + "-_= \u00e9"
    for position in range(len(signature)):
        for character in set(alphabet) - {signature[position]}:
            changed = signature[:position] + character + signature[position + 1 :]
            with pytest.raises(InvalidSignature):
                verify((SECRET,), "events", "task", str(EXPIRES), changed, 0)
    for changed in ("", signature[:-1], signature + "=", signature + "A", "\ud800"):
        with pytest.raises(InvalidSignature):
            verify((SECRET,), "events", "task", str(EXPIRES), changed, 0)


@pytest.mark.parametrize(
    "expires",
    [f"0{EXPIRES}", f"+{EXPIRES}", f" {EXPIRES}", f"{EXPIRES}\n", f"{EXPIRES}.0", "1_800_000_000", "-1", "", "9" * 5000, "١٨٠٠٠٠٠٠٠٠", "x"],
)
def test_an_expiry_that_is_spelled_otherwise_is_refused(expires: str) -> None:
    with pytest.raises(InvalidSignature):
        verify((SECRET,), "media", "a", expires, sign(SECRET, "media", "a", EXPIRES), 0)


@pytest.mark.parametrize(
    ("secret", "purpose", "subject", "expires"),
    [
        (b"another", "media", "a", EXPIRES),
        (SECRET, "events", "a", EXPIRES),
        (SECRET, "media", "b", EXPIRES),
        (SECRET, "media", "a", EXPIRES + 1),
    ],
)
def test_a_signature_is_of_no_use_for_anything_else(secret: bytes, purpose: str, subject: str, expires: int) -> None:
    with pytest.raises(InvalidSignature):
        verify((secret,), purpose, subject, str(expires), sign(SECRET, "media", "a", EXPIRES), 0)


@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, 10**11), st.integers(0, 10**11))
def test_two_subjects_or_expiries_never_share_a_signature(one: str, other: str, early: int, late: int) -> None:
    same = sign(SECRET, "media", one, early) == sign(SECRET, "media", other, late)
    assert same == ((one, early) == (other, late))
