"""The events that the code of movieq and its workers can log, read from their calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

import msgspec

from tests.documents import ROOT

METHODS: Final = ("debug", "info", "warning", "error", "exception", "log")
OWN: Final = {"exc_info", "away"}
"""Arguments that are not fields of the line."""


class LogEvent(msgspec.Struct):
    """An event with the levels it is logged at and its fields. `open`: a call passes more fields than can be read from it."""

    levels: set[str] = msgspec.field(default_factory=set)
    fields: set[str] = msgspec.field(default_factory=set)
    open: bool = False


def log_events() -> dict[str, LogEvent]:
    """Return the events by name. Raises AssertionError for a call whose event or level is not written out in it."""
    found: dict[str, LogEvent] = {}
    for room in ("movieq", "workers"):
        for path in sorted((ROOT / room).rglob("*.py")):
            tree = ast.parse(path.read_text())
            passed_on = {id(node) for each in ast.walk(tree) if _is_log_failure(each) for node in ast.walk(each)}
            for call in ast.walk(tree):
                if not isinstance(call, ast.Call) or not (logged := list(_logged(call))):
                    continue
                where = f"{path.relative_to(ROOT)}:{call.lineno}"
                for name, levels in logged:
                    if not name:
                        assert id(call) in passed_on, f"{where}: the event has to be written out in the call"
                        continue
                    assert levels, f"{where}: the level has to be written out in the call"
                    event = found.setdefault(name, LogEvent())
                    event.levels |= levels
                    event.fields |= {each.arg for each in call.keywords if each.arg} - OWN
                    event.open |= any(each.arg is None for each in call.keywords)
                    if levels & {"warning"} and _function(call) == "log_failure":
                        event.fields.add("problem")
    return found


def _is_log_failure(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "log_failure"


def _function(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _logged(call: ast.Call) -> Iterator[tuple[str, set[str]]]:
    """Return each event that a call can log, with its levels; its name is empty where it is a variable. Return nothing for other calls."""
    function = call.func
    if isinstance(function, ast.Name) and function.id == "log_failure":
        away = next((_texts(each.value) for each in call.keywords if each.arg == "away"), [])
        for name in _texts(call.args[0]) or [""]:
            yield name, {"error"} if away else {"error", "warning"}
        for name in away:
            yield name, {"warning"}
    elif isinstance(function, ast.Attribute) and ast.unparse(function.value) == "log" and function.attr in METHODS:
        level, *rest = call.args if function.attr == "log" else (ast.Constant(function.attr), *call.args)
        levels = {"error" if each == "exception" else each for each in _levels(level)}
        for name in _texts(rest[0]) or [""]:
            yield name, levels


def _texts(value: ast.expr) -> list[str]:
    """Return the texts that an expression can be; nothing where that cannot be read from it."""
    match value:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp(body=body, orelse=orelse) if _texts(body) and _texts(orelse):
            return _texts(body) + _texts(orelse)
    return []


def _levels(value: ast.expr) -> list[str]:
    """Return the levels that an expression can be, in small letters."""
    match value:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return [name.lower()]
        case ast.IfExp(body=body, orelse=orelse):
            return _levels(body) + _levels(orelse)
    return []
