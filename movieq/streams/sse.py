"""The wire format of server-sent events."""

from __future__ import annotations

from typing import Final

from movieq.tasks.states import EventType

RETRY_MS: Final = 2000

Id = tuple[int, int]
START: Final[Id] = (0, 0)
"""The position before the first entry of a log."""


def pair(id: str) -> Id:
    """Return a log id as its two numbers, which can be compared."""
    ms, _, sequence = id.partition("-")
    return int(ms), int(sequence or 0)


def frame(event_type: EventType, data: bytes, id: str | None = None) -> bytes:
    """Return an event in the wire format (WHATWG HTML, 9.2). `data` is JSON without line breaks."""
    head = f"id: {id}\nevent: {event_type}\ndata: " if id else f"event: {event_type}\ndata: "
    return head.encode() + data + b"\n\n"


def retry(wait_ms: int = RETRY_MS) -> bytes:
    """Return the field that sets how long a client waits before it reconnects."""
    return b"retry: %d\n\n" % wait_ms


def chunk(data: bytes) -> bytes:
    """Return the bytes as an HTTP/1.1 chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)
