"""Functions that read and validate query parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from starlette.requests import HTTPConnection

from movieq.errors import ValidationFailed
from movieq.tasks.states import TaskStatus, TaskType

Choice = TypeVar("Choice", TaskStatus, TaskType)


def only_query(request: HTTPConnection, *names: str) -> None:
    """Raise ValidationFailed for an unknown or repeated query parameter."""
    for name in request.query_params:
        if name not in names:
            raise ValidationFailed(f"{name[:40]}: unknown query parameter; allowed: {', '.join(names) or 'none'}")
        if len(request.query_params.getlist(name)) > 1:
            raise ValidationFailed(f"{name}: given more than once in the query")


def query_int(request: HTTPConnection, name: str, default: int, least: int, most: int) -> int:
    """Return a query parameter as an integer from `least` to `most`, or `default` if it is missing. Raises ValidationFailed."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most):
        raise ValidationFailed(f"{name}: expected a whole number from {least} to {most}, got {text[:40]!r}")
    return int(text)


def query_choice(request: HTTPConnection, name: str, values: Iterable[Choice]) -> Choice | None:
    """Return a query parameter as one of these values, or None if it is missing. Raises ValidationFailed."""
    text = request.query_params.get(name)
    return None if text is None else _chosen(name, text, values)


def query_choices(request: HTTPConnection, name: str, values: Iterable[Choice]) -> frozenset[Choice]:
    """Return a comma-separated query parameter as a set of these values, empty if it is missing. Raises ValidationFailed."""
    text = request.query_params.get(name)
    return frozenset() if text is None else frozenset(_chosen(name, part.strip(), values) for part in text.split(","))


def _chosen(name: str, text: str, values: Iterable[Choice]) -> Choice:
    for value in values:
        if value == text:
            return value
    raise ValidationFailed(f"{name}: expected one of {', '.join(values)}, got {text[:80]!r}")
