"""Tell faults of this machine from faults of a task, and turn exceptions into text for clients.

The worker and its engine processes use this. The log has the whole error; the text for clients names no path and no class.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from pathlib import Path
from typing import Final

from movieq.errors import InternalFault, MovieqError, causes
from movieq.fetch.data_urls import is_data_url, shown_data_url

HOST: Final = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "its disk quota is used up",
    errno.EFBIG: "it may not write files of this size",
    errno.EROFS: "its disk is read-only",
    errno.EIO: "its disk reports errors",
    errno.ESTALE: "its disk is no longer there",
    errno.EMFILE: "it has too many files open",
    errno.ENFILE: "it has too many files open",
}
"""Errors of the operating system that no task causes -> the problem of the machine, as a clause about it."""
PLACE: Final = {
    errno.ENOENT: "its working folder is gone",
    errno.ENOTDIR: "its working folder is gone",
    errno.ENOTCONN: "its working folder is gone",
    errno.EACCES: "it may not write to its working folder",
    errno.EPERM: "it may not write to its working folder",
}
"""The same for errors about a file in the worker's spool."""
_LIBRARIES: Final = "av."
"""Modules whose "input/output error" may mean a damaged file: PyAV."""
LONGEST: Final = 500

_DEVICE: Final = re.compile(
    r"ECC|uncorrectable|no CUDA-capable device|device\(s\) is/are busy|unavailable|initialization error|NVLink|unknown error"
)
"""Matches the messages of CUDA that mean that the device itself is at fault, whatever task it ran."""


class HostFault(MovieqError):
    """This machine, or with `device` one of its devices, cannot work: the next task would fail too. The message names the problem."""

    def __init__(self, message: str, *, device: bool = False) -> None:
        super().__init__(message)
        self.device = device


class FinishFault(InternalFault):
    """An internal error after the rendering. The task fails at once: another run would repeat the whole rendering, and fail again."""

    retryable = False


def host_problem(error: BaseException | None, *places: Path) -> str | None:
    """Return the problem of this machine that the error or one of its causes shows, if any. `places`: the folders of the worker."""
    for cause in causes(error):
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError) and cause.errno is not None:
            foreign = type(cause).__module__.startswith(_LIBRARIES)
            if cause.errno in HOST and not (foreign and cause.errno == errno.EIO):
                return HOST[cause.errno]
            if cause.errno in PLACE and any(inside(name, *places) for name in (cause.filename, cause.filename2)):
                return PLACE[cause.errno]
    return None


def device_problem(error: BaseException | None) -> str | None:
    """Return the problem of the device that CUDA reports, if any. A failed kernel is not one: its input may be at fault."""
    found = any("CUDA" in str(cause) and _DEVICE.search(str(cause)) for cause in causes(error))
    return "its GPU does not work" if found else None


_SYSTEM: Final = r"/(?:bin|data|dev|etc|home|lib|lib64|media|mnt|nix|opt|proc|root|run|srv|sys|tmp|usr|var|Users)(?=/)"


def inside(name: object, *places: Path) -> bool:
    """Whether this is the name of a file in one of these folders."""
    return isinstance(name, str | bytes) and any(Path(os.fsdecode(name)).is_relative_to(place) for place in places)


def public_message(error: BaseException) -> str:
    """Return the message of an error for clients: one line, without class and path."""
    text = (error.strerror or "") if isinstance(error, OSError) and error.errno is not None else str(error)
    return without_paths(text).strip().partition("\n")[0][:LONGEST].strip()


def _own_places() -> list[str]:
    """Return the folders of this process. This opens no file, since too many may be open."""
    places = [sys.prefix, sys.base_prefix, *filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP", "HOME")))]
    with contextlib.suppress(OSError):  # the working directory may be gone
        places.append(os.getcwd())  # noqa: PTH109  # as text
    return places


def without_paths(text: str, *places: Path | str) -> str:
    """Return the text with each path cut to its file name: paths under `places`, folders of this process and common system folders."""
    roots = {str(place).rstrip("/") for place in (*places, *_own_places())}
    named = "|".join(re.escape(root) for root in sorted(roots, key=len, reverse=True) if len(root) > 1)
    return re.sub(rf"(?<![\w/.:-])(?:{named}|{_SYSTEM})(?:/[^\s'\"`,;:)\]]*)?", lambda found: Path(found[0]).name, text)


def abbreviated(reference: str) -> str:
    """Return a reference for a message: a long one is cut, and a `data:` url is shown without its data."""
    if is_data_url(reference):
        return shown_data_url(reference)
    return reference if len(reference) <= 200 else f"{reference[:60]}... ({len(reference)} characters)"
