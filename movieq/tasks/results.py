"""The result of a completed task: with storage keys as Redis holds it, with signed URLs as clients get it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

MEDIA_URL_S: Final = 7 * 24 * 3600
"""How long signed URLs of files are valid, in seconds."""


_SEGMENT: Final = "[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
KEY_PATTERN: Final = rf"^{_SEGMENT}(/{_SEGMENT})*(?!\n)$"
"""Storage keys. No segment starts with a dot: that excludes "." and "..", and the names of temporary files."""
MAX_KEY_CHARS: Final = 1024

StorageKey = Annotated[str, Meta(pattern=KEY_PATTERN, max_length=MAX_KEY_CHARS)]


class StoredMedia(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file of a result, by its storage key: URLs are signed when the result is read."""

    key: StorageKey
    media_type: str
    content_type: str
    size_bytes: int
    poster_key: StorageKey | None = None
    width: int | None = None
    height: int | None = None
    duration_s: float | None = None
    take: int = 1
    seed: int | None = None


class StoredResult(msgspec.Struct, frozen=True):
    """A result as `complete` commits it. `media[0]` is the result itself, and its first take."""

    media: Annotated[list[StoredMedia], Meta(min_length=1)]
    metadata: dict[str, Any]
    payload_media_id: str | int | None = None


class MediaResult(msgspec.Struct, frozen=True):
    """A file of a result for clients. `url` needs no key and is valid for at least a day."""

    url: str
    media_type: str
    content_type: str
    file_size: int
    poster_url: str | None = None
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    take: int = 1
    seed: int | None = None


class Result(msgspec.Struct, frozen=True):
    """The result of a completed task for clients."""

    media_url: str
    payload_media_id: str | int | None
    media: list[MediaResult]
    metadata: dict[str, Any]


def warnings_of(result: StoredResult | Result | None) -> list[str]:
    """Return what an engine ignored or changed when it rendered the result."""
    found = None if result is None else result.metadata.get("warnings")
    return [str(each) for each in found] if isinstance(found, list) else []


_LAST_MS: Final = 253_402_300_799_000
"""The last second of the year 9999, in milliseconds."""


def utc(ms: float) -> datetime:
    """Return milliseconds since the epoch as a datetime in UTC, limited to the years 1970 to 9999: a damaged record may hold any number."""
    return datetime.fromtimestamp(int(min(max(ms, 0), _LAST_MS)) / 1000, UTC)
