"""The query parameters of a request, with all their faults in one answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import HTTPConnection

from movieq.tasks.faults import Faults, given, printable, refused
from movieq.tasks.states import TaskStatus, TaskType

Choice = TypeVar("Choice", TaskStatus, TaskType)


@contextmanager
def query(request: HTTPConnection, *names: str) -> Iterator[Query]:
    """Yield the query parameters; only these names are allowed. Raises ValidationFailed at the end of the block, with all their faults."""
    asked = Query(request, *names)
    yield asked
    if asked.faults:
        raise refused(asked.faults)


def only_query(request: HTTPConnection, *names: str) -> None:
    """Raise ValidationFailed if there are other query parameters, or repeated ones."""
    with query(request, *names):
        pass


class Query:
    """Query parameters, read by kind. A missing or faulty one reads as its default; `faults` says what is wrong."""

    def __init__(self, request: HTTPConnection, *names: str) -> None:
        self.faults = Faults()
        self._given = request.query_params
        for name in self._given:
            if name not in names:
                self._fault(printable(name[:40]), f"unknown query parameter; allowed: {', '.join(names) or 'none'}")
            elif len(self._given.getlist(name)) > 1:
                self._fault(name, "given more than once in the query")

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """Return the parameter as a whole number from `least` to `most`, or `default`."""
        text = self._given.get(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most):
            self._fault(name, f"expected a whole number from {least} to {most}, got {given(text)}")
            return default
        return int(text)

    def choice(self, name: str, values: Iterable[Choice]) -> Choice | None:
        """Return the parameter as one of these values, or None."""
        text = self._given.get(name)
        return None if text is None else self._chosen(name, text, values)

    def choices(self, name: str, values: Iterable[Choice]) -> frozenset[Choice]:
        """Return the comma-separated parameter as a set of these values; empty if it is missing."""
        text = self._given.get(name)
        chosen = () if text is None else (self._chosen(name, part.strip(), values) for part in text.split(","))
        return frozenset(each for each in chosen if each is not None)

    def _chosen(self, name: str, text: str, values: Iterable[Choice]) -> Choice | None:
        for value in values:
            if value == text:
                return value
        self._fault(name, f"expected one of {', '.join(values)}, got {given(text)}")
        return None

    def _fault(self, name: str, message: str) -> None:
        self.faults.add([(name, message)])
