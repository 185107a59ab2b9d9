"""Exponential backoff: the wait between two tries doubles up to a limit."""

from __future__ import annotations


def wait_s(tries: int, shortest_s: float, longest_s: float) -> float:
    """Return how long to wait after this many failed tries. Any number is accepted, since a damaged record may hold any."""
    return float(min(shortest_s * (1 << min(max(tries - 1, 0), 30)), longest_s))


class Backoff:
    """The backoff of a retry loop: each wait is twice the last one, up to `longest_s`."""

    __slots__ = ("_longest_s", "_shortest_s", "_tries")

    def __init__(self, shortest_s: float, longest_s: float) -> None:
        self._shortest_s = shortest_s
        self._longest_s = longest_s
        self._tries = 0

    def next_s(self) -> float:
        """Return how long to wait before the next try."""
        self._tries += 1
        return wait_s(self._tries, self._shortest_s, self._longest_s)

    def reset(self) -> None:
        """Start again with the shortest wait."""
        self._tries = 0
