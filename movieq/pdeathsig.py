"""The kernel's parent-death signal, which ends a process when its parent dies, for whatever reason."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def end_with_parent(signum: int = signal.SIGTERM) -> None:
    """Have the kernel send this process `signum` when its parent dies. Exit at once if the parent is already dead.

    Does nothing except on Linux. The kernel watches the *thread* that started this process, so start it from a thread that lives as long as
    the parent process. Can be used as `preexec_fn`, since the setting survives exec. Raises OSError if the kernel refuses.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(0)
