"""The interface of a storage, which holds files under keys. `folder.py` and `s3.py` implement it.

A key is written once and completely: a reader sees the whole file or none of it, even after a power failure, and the bytes of a stored key
never change. A key contains the token of the run that wrote it (`projects/p/video/TASK/RUN/output.mp4`), so two different files for one
key are an error.
Left out: listing, quotas, and Range requests (for a folder, the media route serves the file at `local_path`).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from movieq.fetch import formats
from movieq.tasks.results import KEY_PATTERN, MAX_KEY_CHARS, MediaResult, Result, StoredResult

CONTENT_TYPES: Final = {".mp4": "video/mp4", **formats.CONTENT_TYPES}
"""Media type of each file extension. The extension decides, because a folder stores no media type with a file."""

_KEY = re.compile(KEY_PATTERN)


def content_type(key: str) -> str:
    """Return the media type of a key, by its extension; `application/octet-stream` for an unknown extension."""
    return CONTENT_TYPES.get(PurePosixPath(key).suffix.lower(), "application/octet-stream")


def checked_key(key: str) -> str:
    """Return the key. Raise ValueError if it is not a storage key.

    A storage key consists of segments of `[A-Za-z0-9._-]`, none starting with a dot, joined by single slashes.
    """
    if len(key) > MAX_KEY_CHARS or not _KEY.match(key):
        raise ValueError(f"not a storage key: {key[:200]!r}")
    return key


class Storage(Protocol):
    """A storage of results. Methods raise ValueError for an invalid key, StorageFault for a fault, and return None for a missing file."""

    async def put(self, key: str, source: Path, content_type: str) -> int:
        """Store the bytes of `source` durably under `key` and return their number.

        Storing the same bytes again changes nothing. Other bytes raise KeyTaken and change nothing.
        """
        ...

    async def open(self, key: str, dest: Path) -> int | None:
        """Copy the file to `dest` and return its size in bytes. Return None, and leave nothing at `dest`, if the key does not exist."""
        ...

    async def size(self, key: str) -> int | None:
        """Return the size of the file in bytes, or None if the key does not exist."""
        ...

    async def delete(self, key: str) -> None:
        """Delete the file, if there is one."""
        ...

    async def delete_prefix(self, prefix: str) -> None:
        """Delete all files in this folder of keys, unfinished ones included. Only whole segments match: "a/b" leaves "a/bc" alone."""
        ...

    async def usable(self) -> bool:
        """Whether the storage works at the moment."""
        ...

    def url(self, key: str, expires_at_s: int) -> str:
        """Return a url that anyone can open until `expires_at_s`, a Unix time."""
        ...

    def result(self, stored: StoredResult, expires_at_s: int) -> Result:
        """Return the result with urls that anyone can open until `expires_at_s`, a Unix time."""
        media = [
            MediaResult(
                url=self.url(each.key, expires_at_s),
                media_type=each.media_type,
                content_type=each.content_type,
                file_size=each.size_bytes,
                poster_url=None if each.poster_key is None else self.url(each.poster_key, expires_at_s),
                width=each.width,
                height=each.height,
                duration=each.duration_s,
                take=each.take,
                seed=each.seed,
            )
            for each in stored.media
        ]
        return Result(media[0].url, stored.payload_media_id, media, stored.metadata)
