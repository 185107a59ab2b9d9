"""Values of JSON at the door: what everything behind it can carry.

JSON knows numbers of any size, and lists in lists without end. Workers and their children are told in msgpack, whose whole numbers have 64
bits, and a reader of nested lists calls itself. What they could not carry is refused with the path of the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import msgspec

from movieq.errors import ValidationFailed
from movieq.params import refused

ELEMENTS: Final = 20_000
"""How many values a body may have, lists and objects too. Reading so many holds the event loop up for less than 10 ms; 350,000, for 160."""
NESTING: Final = 64
"""How deep lists and objects may lie in each other, the body too. Python's own limit hangs on the stack: what is read here could fail
elsewhere."""
LEAST: Final = -(2**63)
MOST: Final = 2**64 - 1

FAULTS: Final = 5
"""How many values that are wrong an answer names."""
PATH_CHARACTERS: Final = 100


def check(**fields: Any) -> None:
    """Raises ValidationFailed naming each value in the fields that msgpack, or who reads it, cannot carry."""
    try:
        msgspec.msgpack.encode(fields)
        if not _deeper(fields, NESTING):
            return
    except (OverflowError, RecursionError):
        pass
    raise refused(faults(fields))


def faults(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Path and problem of the first values in the fields that are no numbers of 64 bits, or lie too deep."""
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
            yield _path(place), f"whole numbers of 64 bits are allowed, {LEAST} to {MOST}; send a longer one as a text"
        elif isinstance(value, float) and not math.isfinite(value):
            yield _path(place), "numbers up to 1.8e308 are allowed, got one beyond that or none at all"


def faults_of(body: bytes) -> list[tuple[str, str]]:
    """The same of JSON that could not be read for a number in it; empty where it has another fault."""
    try:
        value = json.loads(body, parse_int=lambda digits: int(digits[:40]))
    except (ValueError, RecursionError):
        return []
    return faults(value) if isinstance(value, dict) else []


def check_elements(body: bytes) -> None:
    """Raises ValidationFailed for a body of more values than may be read at once. It counts what separates them, outside of texts."""
    if sum(map(body.count, (b",", b"[", b"{"))) <= ELEMENTS:
        return
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    texts = plain.count(b'"') // 2  # each is a value, or the name of one
    if texts <= 2 * ELEMENTS and sum(map(b"".join(plain.split(b'"')[::2]).count, (b",", b"[", b"{"))) <= ELEMENTS:
        return
    raise ValidationFailed(f"the body has too many values: at most {ELEMENTS} are allowed, lists and objects counted too")


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects lie in it more than so many levels deep."""
    level: list[Any] = [value]
    for _ in range(levels):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _path(place: Any) -> str:
    """From a place, (the place around it, key or index), to `metadata.a.b[3]`."""
    parts: list[str] = []
    while place:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{str(key)[: PATH_CHARACTERS + 1]}")
    path = "".join(reversed(parts)).removeprefix(".")
    shown = path if len(path) <= PATH_CHARACTERS else path[:PATH_CHARACTERS] + "..."
    return "".join(character if character.isprintable() else "\ufffd" for character in shown)
