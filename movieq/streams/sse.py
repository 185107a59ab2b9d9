"""The wire format of server-sent events."""

from __future__ import annotations

from typing import Final

from movieq.tasks.states import EventType

RETRY_MS: Final = 2000

Id = tuple[int, int]
START: Final[Id] = (0, 0)
"""Before every entry of a log."""


def pair(id: str) -> Id:
    """The two numbers of a log's id: ids are compared as such."""
    ms, _, sequence = id.partition("-")
    return int(ms), int(sequence or 0)


def frame(event_type: EventType, data: bytes, id: str | None = None) -> bytes:
    """An event in the format of an event stream (WHATWG HTML, 9.2). `data` is JSON without line breaks."""
    head = f"id: {id}\nevent: {event_type}\ndata: " if id else f"event: {event_type}\ndata: "
    return head.encode() + data + b"\n\n"


def retry(wait_ms: int = RETRY_MS) -> bytes:
    """How long a client is to wait before it connects again."""
    return b"retry: %d\n\n" % wait_ms


def chunk(data: bytes) -> bytes:
    """The bytes as a chunk of HTTP/1.1 (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)
