"""What is tried when a device's memory does not suffice, one rung after another. No rung makes less than was asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from movieq.errors import OutOfMemory
from workers.child.diffusion import model_cache
from workers.child.job import Take

T = TypeVar("T")


def climb(take: Take, name: str, pipe: Any, call: Callable[[], T], halves: Callable[[], T] | None = None) -> T:
    """What the call makes; `halves` makes the same in two calls, where it is a batch. Raises OutOfMemory after the last rung."""
    rungs = _rungs(name, pipe)
    while True:
        try:
            return call()
        except (torch.OutOfMemoryError, MemoryError) as error:
            problem = str(error).partition("\n")[0][:200]
            error.__traceback__ = None  # its frames hold tensors
        _sweep()
        take.check()
        if halves is not None:
            take.note("out of memory: the batch was halved")
            return halves()
        rung = next(rungs, None)
        if rung is None:
            raise OutOfMemory(f"the memory of {take.device} does not suffice for {name}: {problem}")
        take.note(f"out of memory: {rung}")


def _rungs(name: str, pipe: Any) -> Iterator[str]:
    if model_cache.evict(name):
        yield "other models were unloaded"
    vae = getattr(pipe, "vae", None)
    tiled = False
    for option in ("enable_tiling", "enable_slicing"):
        if vae is not None and hasattr(vae, option):
            getattr(vae, option)()
            tiled = True
    if tiled:
        yield "pictures are decoded in tiles"
    if torch.cuda.is_available() and hasattr(pipe, "enable_model_cpu_offload"):
        pipe.enable_model_cpu_offload()
        yield "parts of the model wait in the host's memory"


def _sweep() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
