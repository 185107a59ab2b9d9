"""Files under keys: what a storage promises, and the one in a folder. The one in a bucket is in s3.py.

A key is written once and whole: a reader sees all of a file or none of it, also after a power cut, and a committed key never gets other
bytes. Keys carry the run that made them (`projects/p/video/TASK/RUN/output.mp4`), so two writers of one key are a fault, not a race to win.
Left out: listing, quotas, and Range (the media route serves `local_path` of a folder).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import filecmp
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Final, Protocol, TypeVar

from movieq import signing
from movieq.contracts import KEY_PATTERN, MAX_KEY_CHARS, MediaResult, Result, StoredResult
from movieq.errors import KeyTaken, StorageFault
from movieq.settings import Settings

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
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

T = TypeVar("T")


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


class FolderStorage(Storage):
    """Results in a folder, handed out under signed urls of `{public_url}/media/`.

    Every method raises ValueError for a key that is none, and StorageFault, naming key and folder, when the file system fails; absence is
    None. The work is done in threads: a cancelled caller goes at once, the file operation runs to its end.
    """

    def __init__(self, root: Path, public_url: str, signing_secrets: Sequence[bytes]) -> None:
        self._root = root
        self._public_url = public_url.rstrip("/")
        self._signing_secrets = signing_secrets

    async def put(self, key: str, source: Path, content_type: str) -> int:
        """The bytes of `source` are on disk under `key`. Of `content_type` nothing is kept: the extension of the key says it."""
        return await self._in_thread("store", key, lambda: self._put(self.local_path(key), source))

    async def open(self, key: str, dest: Path) -> int | None:
        """See Storage."""
        return await self._in_thread("read", key, lambda: _copied_out(self.local_path(key), dest))

    async def size(self, key: str) -> int | None:
        """See Storage."""
        return await self._in_thread("look at", key, lambda: _size(self.local_path(key)))

    async def delete(self, key: str) -> None:
        """See Storage."""
        await self._in_thread("delete", key, lambda: self._delete(self.local_path(key)))

    async def delete_prefix(self, prefix: str) -> None:
        """See Storage."""
        await self._in_thread("delete", prefix, lambda: self._delete(self.local_path(prefix.removesuffix("/"))))

    async def usable(self) -> bool:
        """Whether files can be written."""
        return await asyncio.to_thread(_usable, self._root)

    def local_path(self, key: str) -> Path:
        """Where the file of this key lies, or would lie."""
        return self._root / checked_key(key)

    def url(self, key: str, expires_at_s: int) -> str:
        """See Storage."""
        signature = signing.sign(self._signing_secrets[0], "media", checked_key(key), expires_at_s)
        return f"{self._public_url}/media/{key}?expires={expires_at_s}&signature={signature}"

    def verify(self, key: str, expires: str, signature: str, now_s: float) -> None:
        """Return if these are the parts of an address that `url` gave and that still holds; raises Forbidden, see `signing.verify`."""
        signing.verify(self._signing_secrets, "media", key, expires, signature, now_s)

    async def _in_thread(self, verb: str, key: str, work: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            fault = KeyTaken if isinstance(error, _Taken) else StorageFault
            raise fault(f"cannot {verb} {key} in {self._root}: {error.strerror or error}") from error

    def _put(self, target: Path, source: Path) -> int:
        temporary = self._copied_in(target, source)
        try:
            size = temporary.stat().st_size
            _commit(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        # The name must outlive a power cut like the bytes do, and so must the folders that were made for it.
        for folder in (self._root / parent for parent in target.relative_to(self._root).parents):
            sync(folder)
        return size

    def _copied_in(self, target: Path, source: Path) -> Path:
        """A durable copy of `source`, beside `target` and so on its file system."""
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        for tries_left in reversed(range(100)):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, temporary)
                sync(temporary)
                break
            except OSError as error:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                # A delete next door takes away folders that are still empty, also the one that was made here or is being made: mkdir then
                # says that it exists, or that its parent does not. Each such fault needs another delete, so tries do not run out.
                if not (tries_left and isinstance(error, FileNotFoundError | FileExistsError) and source.exists()):
                    raise
        return temporary

    def _delete(self, path: Path) -> None:
        while path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another deleter, or a writer that tidies up, was faster with one of the files
                shutil.rmtree(path)
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:  # not empty
                break


@asynccontextmanager
async def opened(settings: Settings, public_url: str, signing_secrets: Sequence[bytes], *, patient: bool) -> AsyncIterator[Storage]:
    """The storage that the settings name, for the length of a block; `patient` is for workers. Raises SettingsError."""
    if (bucket := settings.bucket()) is None:
        yield FolderStorage(Path(settings.storage), public_url, signing_secrets)
    else:
        from movieq import s3  # slow to import, and only this needs it

        async with s3.opened(bucket, patient=patient) as storage:
            yield storage


class _Taken(FileExistsError):
    """Not a file in the way of a folder, but one under the key itself."""


def _commit(temporary: Path, target: Path) -> None:
    """Give the copy its name, unless the name is taken: link refuses where rename would overwrite."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        if not filecmp.cmp(temporary, target, shallow=False):
            raise _Taken(errno.EEXIST, "the key holds other bytes already", str(target)) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            raise _Taken(errno.EEXIST, "the key exists already", str(target)) from None
        temporary.rename(target)  # exFAT and some network mounts know no links


def _copied_out(path: Path, dest: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        shutil.copyfile(path, dest)
    except BaseException:
        dest.unlink(missing_ok=True)
        raise
    return dest.stat().st_size


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except FileNotFoundError:
        return None


def _usable(root: Path) -> bool:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return True
    except OSError:
        return False


def sync(path: Path) -> None:
    """The file, or what a folder lists, outlives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
