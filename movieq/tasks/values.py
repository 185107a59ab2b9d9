"""Which JSON values are accepted: those that everything behind the API can carry.

JSON allows numbers of any size and any depth of nesting. Workers and their children get msgpack, whose whole numbers have 64 bits, and
readers of nested lists recurse. A value that they could not carry is refused with its path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import msgspec

from movieq.errors import ValidationFailed
from movieq.tasks.params import refused

ELEMENTS: Final = 20_000
"""How many values a body may have, lists and objects included. Reading so many blocks the event loop for under 10 ms; 350,000, for 160."""
NESTING: Final = 64
"""How many levels of lists and objects a body may have, itself included. Python's own limit depends on the stack: what can be read here
could fail elsewhere."""
LEAST: Final = -(2**63)
MOST: Final = 2**64 - 1

SLOW: Final = 200
"""How many numbers with an exponent, or twenties of digits, msgspec reads in a body: some cost it 0.03 ms each. Python reads more of them,
in 0.002 ms each, ..."""
MOST_SLOW: Final = 5_000
"""... and beyond these a body is refused."""
NUMBER_CHARACTERS: Final = 100
"""How long a number may be where there are so many."""

FAULTS: Final = 5
"""How many wrong values an answer names."""
PATH_CHARACTERS: Final = 100
_FLAT: Final = bytes.maketrans(b"123456789E", b"000000000e")


def check(**fields: Any) -> None:
    """Raise ValidationFailed naming the values in the fields that msgpack, or a reader of it, cannot carry."""
    try:
        msgspec.msgpack.encode(fields)
        if not _deeper(fields, NESTING):
            return
    except (OverflowError, RecursionError):
        pass
    raise refused(faults(fields))


def faults(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the path and the problem of the first values in the fields that are numbers out of range, or nested too deeply."""
    return [*islice(_faults(fields), FAULTS)]


def _faults(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    inside: list[tuple[Any, int, Any]] = [(fields, 1, ())]
    while inside:
        value, level, place = inside.pop()
        if isinstance(value, dict | list):
            if level > NESTING:
                yield _path(place), f"nested too deeply: at most {NESTING} levels of lists and objects are allowed"
            else:
                keys: Any = value if isinstance(value, dict) else range(len(value))
                inside += reversed([(value[key], level + 1, (place, key)) for key in keys])
        elif isinstance(value, int) and not LEAST <= value <= MOST:
            yield _path(place), f"whole numbers of 64 bits are allowed, {LEAST} to {MOST}; send a larger one as text"
        elif isinstance(value, float) and not math.isfinite(value):
            yield _path(place), "numbers up to 1.8e308 are allowed, got a larger one, or NaN"


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
    """Return the number of this text. Raises ValueError for one that is too large or too long."""
    if len(text) > NUMBER_CHARACTERS:
        raise ValueError(f"numbers of up to {NUMBER_CHARACTERS} characters are allowed, where there are over {SLOW} with an exponent")
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("Number out of range")  # as msgspec says it
    return number


def faults_of(body: bytes) -> list[tuple[str, str]]:
    """Return the same for JSON that could not be read because of a number in it; empty where something else is wrong."""
    try:
        value = json.loads(body, parse_int=lambda digits: int(digits[:40]))
    except (ValueError, RecursionError):
        return []
    return faults(value) if isinstance(value, dict) else []


def check_elements(body: bytes) -> None:
    """Raise ValidationFailed for a body of too many values. It counts the separators between them, outside of strings."""
    if sum(map(body.count, (b",", b"[", b"{"))) <= ELEMENTS:
        return
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    texts = plain.count(b'"') // 2  # each is a value or a name
    if texts <= 2 * ELEMENTS and sum(map(b"".join(plain.split(b'"')[::2]).count, (b",", b"[", b"{"))) <= ELEMENTS:
        return
    raise ValidationFailed(f"the body has too many values: at most {ELEMENTS} are allowed, lists and objects included")


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects in it are nested more than `levels` deep."""
    level: list[Any] = [value]
    for _ in range(levels):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _path(place: Any) -> str:
    """Return the path, such as `metadata.a.b[3]`, of a place: (the place around it, key or index)."""
    parts: list[str] = []
    while place:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{str(key)[: PATH_CHARACTERS + 1]}")
    path = "".join(reversed(parts)).removeprefix(".")
    shown = path if len(path) <= PATH_CHARACTERS else path[:PATH_CHARACTERS] + "..."
    return "".join(character if character.isprintable() else "\ufffd" for character in shown)
