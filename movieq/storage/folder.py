"""The storage in a folder of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import filecmp
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from movieq import signing
from movieq.errors import KeyTaken, StorageFault
from movieq.storage.base import Storage, checked_key

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

T = TypeVar("T")


class FolderStorage(Storage):
    """A storage in a folder. Files have signed urls under `{public_url}/media/`.

    Every method raises ValueError for an invalid key, and StorageFault, naming key and folder, when the file system fails. Files are read
    and written in threads: a cancelled call ends at once, but its file operation runs to the end.
    """

    def __init__(self, root: Path, public_url: str, signing_secrets: Sequence[bytes]) -> None:
        self._root = root
        self._public_url = public_url.rstrip("/")
        self._signing_secrets = signing_secrets

    async def put(self, key: str, source: Path, content_type: str) -> int:
        """See Storage. `content_type` is not stored: the extension of the key determines it."""
        return await self._in_thread("store", key, lambda: self._put(self.local_path(key), source))

    async def open(self, key: str, dest: Path) -> int | None:
        """See Storage."""
        return await self._in_thread("read", key, lambda: _copied_out(self.local_path(key), dest))

    async def size(self, key: str) -> int | None:
        """See Storage."""
        return await self._in_thread("read the size of", key, lambda: _size(self.local_path(key)))

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
        """Return the path of the file of this key, whether the file exists or not."""
        return self._root / checked_key(key)

    def url(self, key: str, expires_at_s: int) -> str:
        """See Storage."""
        signature = signing.sign(self._signing_secrets[0], "media", checked_key(key), expires_at_s)
        return f"{self._public_url}/media/{key}?expires={expires_at_s}&signature={signature}"

    def verify(self, key: str, expires: str, signature: str, now_s: float) -> None:
        """Return if these are the parts of a url that `url` returned, and that has not expired. Raises InvalidSignature, Expired."""
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
        # After a power failure the file is found only if its folder, and each folder created for it, was flushed too.
        for folder in (self._root / parent for parent in target.relative_to(self._root).parents):
            sync(folder)
        return size

    def _copied_in(self, target: Path, source: Path) -> Path:
        """Return a durable copy of `source` beside `target`, and so on the same file system."""
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
                # A concurrent delete removes empty folders, even one that was created here a moment ago. `mkdir` then fails because the
                # folder exists, or because its parent does not. Each such error needs one more delete, so the tries do not run out.
                if not (tries_left and isinstance(error, FileNotFoundError | FileExistsError) and source.exists()):
                    raise
        return temporary

    def _delete(self, path: Path) -> None:
        while path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another delete, or a writer removing its temporary file, was faster
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


class _Taken(FileExistsError):
    """The key itself exists. Any other FileExistsError means that a file is where a folder should be."""


def _commit(temporary: Path, target: Path) -> None:
    """Give the copy its final name, unless the name is taken: `link` fails where `rename` would overwrite."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        if not filecmp.cmp(temporary, target, shallow=False):
            raise _Taken(errno.EEXIST, "the key already holds other bytes", str(target)) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            raise _Taken(errno.EEXIST, "the key already exists", str(target)) from None
        temporary.rename(target)  # exFAT and some network mounts have no hard links


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
    """Flush a file, or the entries of a folder, to disk, so that they survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
