"""Ties this process to the one that started it: it dies with it, however that one dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def hold() -> None:
    """The kernel kills this process when its parent is gone; where the parent went before that was arranged, it ends here and now.

    Only Linux can do this; elsewhere the end of file on the pipe has to do. The kernel watches the parent's *thread*: start such a
    process from a thread that lives as long as the process.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(0)
