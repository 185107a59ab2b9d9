"""The limits of JSON values in a request.

JSON allows numbers of any size and any depth of nesting. Workers and engine processes receive msgpack, whose integers have 64 bits, and
whose decoders recurse into nested lists. A value beyond these limits is refused with its path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import msgspec

from movieq.errors import ValidationFailed
from movieq.tasks.faults import MOST as MOST_FAULTS
from movieq.tasks.faults import PATH_CHARACTERS, Fault

ELEMENTS: Final = 20_000
"""Most values of a body, lists and objects included. Decoding so many blocks the event loop for under 10 ms; 350,000 for 160 ms."""
NESTING: Final = 64
"""Most levels of lists and objects of a body, itself included. Python's own limit depends on the stack, so a value that can be decoded here
could fail elsewhere."""
LEAST: Final = -(2**63)
MOST: Final = 2**64 - 1

SLOW: Final = 200
"""Most slow numbers that msgspec decodes: those with an exponent, or with twenty digits or more, take it up to 0.03 ms each. A body with
more of them is decoded by Python's float, in 0.002 ms each, ..."""
MOST_SLOW: Final = 5_000
"""... and one with more than these is refused."""
NUMBER_CHARACTERS: Final = 100
"""Longest number in such a body."""

_HALF: Final = re.compile("[\ud800-\udfff]")
_FLAT: Final = bytes.maketrans(b"123456789E", b"000000000e")


def found(fields: dict[str, Any]) -> list[Fault]:
    """Return the faults of values that msgpack or its decoders cannot handle."""
    try:
        msgspec.msgpack.encode(fields)
        if not _deeper(fields, NESTING):
            return []
    except (OverflowError, RecursionError):
        pass
    return faults(fields)


def faults(fields: dict[str, Any]) -> list[Fault]:
    """Return the faults of the first values that are numbers out of range, or nested too deeply."""
    return [*islice(_faults(fields), MOST_FAULTS + 1)]


def _faults(fields: dict[str, Any]) -> Iterator[Fault]:
    inside: list[tuple[Any, int, Any]] = [(fields, 1, ())]
    while inside:
        value, level, place = inside.pop()
        if isinstance(value, dict | list):
            if level > NESTING:
                yield _path(place), f"nested too deeply: at most {NESTING} levels of lists and objects are allowed"
            else:
                keys: Any = value if isinstance(value, dict) else range(len(value))
                if isinstance(value, dict) and any(map(_HALF.search, value)):
                    yield _path(place), "expected names of whole characters, got half a surrogate pair"
                inside += reversed([(value[key], level + 1, (place, key)) for key in keys])
        elif isinstance(value, str) and _HALF.search(value):
            yield _path(place), "expected text of whole characters, got half a surrogate pair"
        elif isinstance(value, int) and not LEAST <= value <= MOST:
            yield _path(place), f"expected a whole number of 64 bits, from {LEAST} to {MOST}; send a larger one as text"
        elif isinstance(value, float) and not math.isfinite(value):
            yield _path(place), "expected a number up to 1.8e308, got a larger one, or NaN"


def slow(body: bytes) -> bool:
    """Whether a body has more than `SLOW` numbers that are slow to read. Raises ValidationFailed for more than `MOST_SLOW`."""
    flat = body.translate(_FLAT)
    if _slow(flat) <= SLOW:
        return False
    found = _slow(_outside_of_texts(flat))
    if found > MOST_SLOW:
        raise ValidationFailed(
            f"the body has too many long numbers: at most {MOST_SLOW} with an exponent are allowed, each twenty digits count as one more"
        )
    return found > SLOW


def _slow(flat: bytes) -> int:
    return flat.count(b"0e") + flat.count(b"0" * 20)


def _outside_of_texts(body: bytes) -> bytes:
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(plain.split(b'"')[::2])


def fraction(text: str) -> float:
    """Return the number in this text. Raises ValueError if it is too large or too long."""
    if len(text) > NUMBER_CHARACTERS:
        raise ValueError(f"numbers of up to {NUMBER_CHARACTERS} characters are allowed, where there are over {SLOW} with an exponent")
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("Number out of range")  # as msgspec says it
    return number


def untyped(body: bytes) -> tuple[Any, list[Fault]]:
    """Return the decoded JSON, and its faults. Raises ValueError, RecursionError if it cannot be read at all."""
    try:
        value = _decoder.decode(body)
    except (ValueError, RecursionError):  # `json` reads more, in ten times the time: numbers out of range, halves of surrogate pairs
        value = json.loads(body.decode(), parse_int=lambda digits: int(digits[:40]))
        return value, faults(value) if isinstance(value, dict) else []
    return value, found(value) if isinstance(value, dict) else []


_decoder = msgspec.json.Decoder(float_hook=fraction)


def check_elements(body: bytes) -> None:
    """Raise ValidationFailed for a body with too many values. Counts the separators outside of strings."""
    if sum(map(body.count, (b",", b"[", b"{"))) <= ELEMENTS:
        return
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    texts = plain.count(b'"') // 2  # each string is a value or a name
    if texts <= 2 * ELEMENTS and sum(map(b"".join(plain.split(b'"')[::2]).count, (b",", b"[", b"{"))) <= ELEMENTS:
        return
    raise ValidationFailed(f"the body has too many values: at most {ELEMENTS} are allowed, lists and objects included")


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects in the value are nested more than `levels` deep."""
    level: list[Any] = [value]
    for _ in range(levels):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _path(place: Any) -> str:
    """Return the path, such as `metadata.a.b[3]`, of a place: a pair of the place around it and a key or index."""
    parts: list[str] = []
    while place:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{str(key)[: PATH_CHARACTERS + 1]}")
    path = "".join(reversed(parts)).removeprefix(".")
    shown = path if len(path) <= PATH_CHARACTERS else path[:PATH_CHARACTERS] + "..."
    return "".join(character if character.isprintable() else "\ufffd" for character in shown)
