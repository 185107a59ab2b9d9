"""Read and check query parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from starlette.requests import HTTPConnection

from movieq.errors import ValidationFailed
from movieq.tasks.states import TaskStatus, TaskType

Choice = TypeVar("Choice", TaskStatus, TaskType)


def only_query(request: HTTPConnection, *names: str) -> None:
    """Raise ValidationFailed for an unknown query parameter, or one that stands twice."""
    for name in request.query_params:
        if name not in names:
            raise ValidationFailed(f"{name[:40]}: no such query parameter; there are: {', '.join(names) or 'none'}")
        if len(request.query_params.getlist(name)) > 1:
            raise ValidationFailed(f"{name}: stands twice in the query")


def query_int(request: HTTPConnection, name: str, default: int, least: int, most: int) -> int:
    """Return a whole number of the query. Raises ValidationFailed."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most):
        raise ValidationFailed(f"{name}: a whole number of {least} to {most} is allowed, got {text[:40]!r}")
    return int(text)


def query_choice(request: HTTPConnection, name: str, values: Iterable[Choice]) -> Choice | None:
    """Return one of these values. Raises ValidationFailed."""
    text = request.query_params.get(name)
    return None if text is None else _chosen(name, text, values)


def query_choices(request: HTTPConnection, name: str, values: Iterable[Choice]) -> frozenset[Choice]:
    """Return any number of these values, comma-separated. Raises ValidationFailed."""
    text = request.query_params.get(name)
    return frozenset() if text is None else frozenset(_chosen(name, part.strip(), values) for part in text.split(","))


def _chosen(name: str, text: str, values: Iterable[Choice]) -> Choice:
    for value in values:
        if value == text:
            return value
    raise ValidationFailed(f"{name}: one of {', '.join(values)} is allowed, got {text[:80]!r}")
