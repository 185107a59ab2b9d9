"""The OOM fallback: what is tried, step by step, when device memory runs out. Every step still renders exactly what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from movieq.errors import OutOfMemory
from workers.child.diffusion import eviction, model_cache
from workers.child.job import Job

T = TypeVar("T")


def with_fallback(job: Job, name: str, pipe: Any, call: Callable[[], T], in_halves: Callable[[], T] | None = None) -> T:
    """Return what `call` returns, trying again after each step of the fallback. Raises OutOfMemory after the last one.

    For a batch, `in_halves` renders the same in two calls, and is the only step. Each step is noted in the result's warnings.
    """
    steps = _steps(name, pipe)
    while True:
        try:
            return call()
        except (torch.OutOfMemoryError, MemoryError) as error:
            problem = str(error).partition("\n")[0][:200]
            error.__traceback__ = None  # its frames hold tensors
        eviction.free_memory()
        job.check()
        if in_halves is not None:
            job.note("out of memory: the batch was halved")
            return in_halves()
        step = next(steps, None)
        if step is None:
            raise OutOfMemory(f"the memory of {job.device} does not suffice for {name}: {problem}")
        job.note(f"out of memory: {step}")


def _steps(name: str, pipe: Any) -> Iterator[str]:
    """Free device memory, one measure at a time, and yield what was done: evict other models, tile the VAE, offload to the CPU."""
    if model_cache.evict_others(name):
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
