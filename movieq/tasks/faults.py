"""The faults of a request, in words: which field, what is allowed, and what was given.

msgspec stops at the first fault, and its messages are for programmers. This module asks msgspec about one field after the other, and
describes what the type of each wrong one allows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from types import TracebackType, UnionType
from typing import Annotated, Any, Final, Self, Union, get_args, get_origin

import msgspec
from msgspec import inspect

from movieq.errors import ValidationFailed

Fault = tuple[str, str]
"""The path of a field, such as `task_data.duration`, and what is wrong with it."""

MOST: Final = 50
"""Most faults that an answer lists."""
SHOWN: Final = 80
"""Longest given value that a message repeats, in characters."""
PATH_CHARACTERS: Final = 100

_PLAIN: Final[dict[type[inspect.Type], str]] = {
    inspect.AnyType: "any value",
    inspect.NoneType: "null",
    inspect.BoolType: "true or false",
    inspect.DateTimeType: "a time with its zone, such as 2030-01-31T12:00:00Z",
    inspect.DateType: "a date such as 2030-01-31",
    inspect.TimeType: "a time of day such as 12:00:00",
    inspect.TimeDeltaType: "a duration in seconds",
    inspect.UUIDType: "a UUID such as 123e4567-e89b-12d3-a456-426614174000",
    inspect.DecimalType: "a number",
    inspect.BytesType: "bytes in base64",
    inspect.DictType: "an object",
    inspect.StructType: "an object",
    inspect.TypedDictType: "an object",
    inspect.DataclassType: "an object",
}


class Faults(list[Fault]):
    """The faults found so far. `with faults:` around a check adds those of its ValidationFailed, and goes on."""

    def add(self, more: Iterable[Fault]) -> Self:
        """Add these faults, but none of a value that is known to be wrong, and only as many as an answer can list."""
        known = [path for path, _ in self]
        self.extend(islice((fault for fault in more if not any(_is_in(fault[0], path) for path in known)), MOST + 1))
        return self

    def of(self, path: str) -> bool:
        """Whether a fault is known in the value at this path."""
        return any(_is_in(each, path) for each, _ in self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if not isinstance(error, ValidationFailed):
            return False
        self.add(error.errors)
        return True


def refused(faults: Iterable[Fault]) -> ValidationFailed:
    """Return the error that lists these faults: the first in its message, at most `MOST` of them in `errors`."""
    found = tuple(islice(faults, MOST + 1))
    path, message = found[0]
    more = f" (and {'at least ' if len(found) > MOST else ''}{min(len(found) - 1, MOST - 1)} more)" if len(found) > 1 else ""
    return ValidationFailed(f"{path}: {message}{more}", errors=found[:MOST])


def of(kind: Any, value: Any, path: str = "") -> Iterator[Fault]:
    """Yield the faults of a decoded value of JSON that is to be of this type; none if msgspec accepts it."""
    if fits(kind, value):
        return
    core = _core(kind, value)
    if isinstance(value, dict) and isinstance(core, type) and issubclass(core, msgspec.Struct):
        yield from of_struct(core, value, path)
        return
    found = False
    if isinstance(value, list) and get_origin(core) in (list, set, frozenset):
        (item,) = get_args(core)
        if not _length(inspect.type_info(kind), len(value)):
            yield path, f"expected {allowed(kind)}, got a list of {len(value)}"
            return
        for index, each in enumerate(value):
            for fault in of(item, each, f"{path}[{index}]"):
                found = True
                yield fault
    elif isinstance(value, dict) and get_origin(core) is dict:
        for key, each in value.items():
            for fault in of(get_args(core)[1], each, joined(path, key)):
                found = True
                yield fault
    if not found:
        yield path, f"expected {allowed(kind)}, got {given(value)}"


def of_struct(cls: type[msgspec.Struct], values: Mapping[str, Any], path: str = "") -> Iterator[Fault]:
    """Yield the faults of the fields of an object; none if msgspec accepts it, or if it is wrong only as a whole."""
    fields = _fields(cls)
    for field in fields:
        name = field.encode_name
        if name in values:
            yield from of(field.type, values[name], joined(path, name))
        elif field.required:
            yield joined(path, name), f"missing; expected {allowed(field.type)}"
    if cls.__struct_config__.forbid_unknown_fields:
        names = [field.encode_name for field in fields]
        for name in (name for name in values if name not in names):
            yield joined(path, name), f"unknown field; allowed: {', '.join(names)}"


def allowed(kind: Any) -> str:
    """Return what a type allows, such as "a number from 1 to 30", without null."""
    return _described(inspect.type_info(kind))


def given(value: object) -> str:
    """Return a given value as printable JSON; a long one is cut."""
    if isinstance(value, str) and len(value) > SHOWN:
        return f'{given(value[: SHOWN - 20])[:-1]}..." ({len(value)} characters)'
    try:
        shown = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a number of thousands of digits; nested too deeply
        return "a value that cannot be shown"
    return printable(shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}...")


def printable(text: str) -> str:
    """Return the text on one line, with control characters escaped as in JSON."""
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def joined(path: str, key: str) -> str:
    """Return the path of a field in the object at `path`; a long name is cut."""
    name = printable(key if len(key) <= PATH_CHARACTERS else f"{key[:PATH_CHARACTERS]}...")
    return f"{path}.{name}" if path else name


def fits(kind: Any, value: Any) -> bool:
    """Whether msgspec accepts a decoded value of JSON as this type. A value that is nested too deeply for it is for `values` to report."""
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError):
        return False
    except RecursionError:
        pass
    return True


@cache
def _fields(cls: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(cls)


def _is_in(path: str, outer: str) -> bool:
    return path.startswith(outer) and path[len(outer) :][:1] in ("", ".", "[")


def _core(kind: Any, value: Any) -> Any:
    """Return the type without constraints and null; of several, the only one that is of the value's kind."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) not in (Union, UnionType):
        return kind
    cores = [core for member in get_args(kind) if member is not type(None) and _holds(core := _core(member, value), value)]
    return cores[0] if len(cores) == 1 else kind


def _holds(core: Any, value: Any) -> bool:
    if isinstance(value, list):
        return get_origin(core) in (list, set, frozenset)
    return isinstance(value, dict) and (get_origin(core) is dict or (isinstance(core, type) and issubclass(core, msgspec.Struct)))


def _length(info: inspect.Type, length: int) -> bool:
    """Whether a list is as long as its type allows."""
    if isinstance(info, inspect.UnionType):
        return any(_length(each, length) for each in info.types)
    if isinstance(info, inspect.Metadata):
        return _length(info.type, length)
    least, most = getattr(info, "min_length", None), getattr(info, "max_length", None)
    return isinstance(info, inspect.CollectionType) and (least or 0) <= length <= (math.inf if most is None else most)


def _described(info: inspect.Type) -> str:
    match info:
        case inspect.Metadata():
            said = (info.extra_json_schema or {}).get("description")
            core = info.type
            if said is None or not isinstance(core, inspect.StrType):
                return _described(core)
            return f"{said}{_span(' of', core.min_length, core.max_length, ' characters')}"
        case inspect.UnionType():
            return _either(info)
        case inspect.IntType() | inspect.FloatType():
            noun = "a whole number" if isinstance(info, inspect.IntType) else "a number"
            least = info.ge if info.gt is None else f"over {info.gt}"
            most = info.le if info.lt is None else f"under {info.lt}"
            if isinstance(least, str) or isinstance(most, str):
                return " ".join([noun, *(str(each) for each in (least, most) if each is not None)])
            return f"{noun}{_span('', least, most, '')}"
        case inspect.StrType(pattern=None):
            return f"text{_span(' of', info.min_length, info.max_length, ' characters')}"
        case inspect.StrType():
            return "text of the required form"
        case inspect.EnumType():
            return f"one of {', '.join(str(each.value) for each in info.cls)}"
        case inspect.LiteralType():
            return f"one of {', '.join(map(str, info.values))}"
        case inspect.CollectionType():
            return f"a list{_span(' of', info.min_length, info.max_length, ' values')}"
    return _PLAIN.get(type(info), "a value of the required kind")


def _either(info: inspect.UnionType) -> str:
    kinds = [each for each in info.types if not isinstance(each, inspect.NoneType)]
    numbers = any(isinstance(each, inspect.FloatType) for each in kinds)
    return " or ".join(dict.fromkeys(_described(each) for each in kinds if not (numbers and isinstance(each, inspect.IntType))))


def _span(of: str, least: float | None, most: float | None, unit: str) -> str:
    """Return a range in words; empty without limits."""
    if least is not None and most is not None:
        return f"{of} {least:.15g} to {most:.15g}{unit}" if of else f" from {least:.15g} to {most:.15g}{unit}"
    if least is not None:
        return f"{of} at least {least:.15g}{unit}" if of else f" of at least {least:.15g}{unit}"
    if most is not None:
        return f"{of} at most {most:.15g}{unit}" if of else f" of at most {most:.15g}{unit}"
    return ""
