"""Files under keys: what a storage promises, and the one in a folder. The one in a bucket is in s3.py.

A key is written once and whole: a reader sees all of a file or none of it, also after a power cut, and a committed key never gets other
bytes. Keys carry the run that made them (`projects/p/video/TASK/RUN/output.mp4`), so two writers of one key are a fault, not a race to win.
Left out: listing, quotas, and Range (the media route serves `local_path` of a folder).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from movieq.tasks.results import KEY_PATTERN, MAX_KEY_CHARS, MediaResult, Result, StoredResult

CONTENT_TYPES: Final = {
    ".mp4": "video/mp4",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".tiff": "image/tiff",
    ".bmp": "image/bmp",
    ".mp3": "audio/mpeg",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".m4a": "audio/mp4",
}
"""By the key's extension: a folder has nowhere else to keep it."""

_KEY = re.compile(KEY_PATTERN)


def content_type(key: str) -> str:
    """The media type that a file of this key is served as; `application/octet-stream` where the extension is none of ours."""
    return CONTENT_TYPES.get(PurePosixPath(key).suffix.lower(), "application/octet-stream")


def checked_key(key: str) -> str:
    """The key itself. Raises ValueError unless it is segments of `[A-Za-z0-9._-]`, none beginning with a dot, joined by single slashes."""
    if len(key) > MAX_KEY_CHARS or not _KEY.match(key):
        raise ValueError(f"not a storage key: {key[:200]!r}")
    return key


class Storage(Protocol):
    """Where results lie. Methods raise ValueError for a key that is none, and StorageFault; absence is None."""

    async def put(self, key: str, source: Path, content_type: str) -> int:
        """The bytes of `source` are under `key` for good; returns how many there are.

        The same bytes again are no error; other bytes are KeyTaken and change nothing.
        """
        ...

    async def open(self, key: str, dest: Path) -> int | None:
        """A copy of the file lies at `dest`; returns its size in bytes, or None, and nothing at `dest`, if there is no such key."""
        ...

    async def size(self, key: str) -> int | None:
        """Bytes under this key, or None."""
        ...

    async def delete(self, key: str) -> None:
        """Nothing is under this key."""
        ...

    async def delete_prefix(self, prefix: str) -> None:
        """Nothing is in this folder of keys (whole segments: "a/b" leaves "a/bc" alone), unfinished files included."""
        ...

    async def usable(self) -> bool:
        """Whether it answers as it should."""
        ...

    def url(self, key: str, expires_at_s: int) -> str:
        """An address that anyone can open until `expires_at_s`, a Unix time."""
        ...

    def result(self, stored: StoredResult, expires_at_s: int) -> Result:
        """The result with addresses that anyone can open until `expires_at_s`, a Unix time."""
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
            )
            for each in stored.media
        ]
        return Result(media[0].url, stored.payload_media_id, media, stored.metadata)
