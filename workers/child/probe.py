"""A process that decodes the inputs of one task once, under limits: `python -P -m workers.child.probe`, started by `workers.probe`.

It reads a JSON list from its standard input: `[kind, seconds, seconds for all, memory in bytes, [[reference, path], ...]]`. For each file
it writes a line of JSON to its standard output: a text, empty if the file can be used, else what is wrong with it; a list of that text and
a traceback, if its decoder raised an error that nobody foresaw; or a list with the traceback of an error of its own, which ends it. Files
are decoded by the functions that the engines decode them with. If one takes too much time, the kernel ends the process by SIGXCPU.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from movieq.errors import InvalidInput
from movieq.fetch.formats import Kind, kind_problem, read_head
from movieq.pdeathsig import end_with_parent
from workers.child.media import images
from workers.faults import abbreviated

LARGEST_SIDE: Final = 3840
"""The largest side of a frame, in pixels: a still is decoded as for a frame of this size, so that no engine decodes more of it."""
SOUND_S: Final = 60.0
"""Length of the part of a sound that is decoded, in seconds: no engine reads more of it."""
SOUND_RATE: Final = 48_000


def main() -> None:
    end_with_parent(signal.SIGKILL)
    kind, seconds, all_seconds, memory_bytes, files = json.load(sys.stdin)
    try:
        decode = _decoder(Kind(kind))
        _limit(resource.RLIMIT_CORE, 0)
        if sys.platform == "linux":  # macOS accepts this limit but does not enforce it
            _limit(resource.RLIMIT_AS, memory_bytes)
        for reference, name in files:
            _limit(resource.RLIMIT_CPU, min(math.ceil(time.process_time() + seconds), all_seconds))
            try:
                _answer(_problem(decode, Kind(kind), reference, Path(name)))
            except MemoryError:
                most = f"at most {memory_bytes // 2**20} MiB of memory are allowed"
                _answer(f"{abbreviated(reference)} cannot be used: it takes too much memory to decode; {most}")
    except Exception:
        _answer([traceback.format_exc()])


def _decoder(kind: Kind) -> Callable[[str, Path], object]:
    """Return the function that decodes a file of this kind. It raises InvalidInput."""
    if kind is Kind.IMAGE:
        return partial(images.load_with_alpha, frame_size=(LARGEST_SIDE, LARGEST_SIDE))
    from workers.child.media.encode import read_sound  # its libraries take long to import, and most tasks have no sound to decode

    return partial(read_sound, rate=SOUND_RATE, seconds=SOUND_S)


def _problem(decode: Callable[[str, Path], object], kind: Kind, reference: str, path: Path) -> str | list[str]:
    """Decode the file and return the answer. Raises MemoryError, and errors of this machine."""
    if problem := kind_problem(read_head(path), [kind]):
        return f"{abbreviated(reference)} {problem}"
    try:
        decode(reference, path)
    except InvalidInput as error:
        return error.message
    except (MemoryError, ImportError, OSError):
        raise
    except Exception:  # the libraries raise errors of any kind on a file that they are not prepared for
        return [f"{abbreviated(reference)} cannot be used: its decoder failed", traceback.format_exc()]
    return ""


def _answer(what: str | list[str]) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201  # to the worker


def _limit(what: int, most: int) -> None:
    """Lower a limit of this process."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
