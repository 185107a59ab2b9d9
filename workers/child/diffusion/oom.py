"""The OOM fallback: what is tried, step by step, when device memory runs out. Every step still renders exactly what was asked for.

The part that failed is repeated, and nothing before it: latents that took minutes are decoded again, not denoised again. What was changed
for one run is undone at its end, so that the next task gives the bytes that it would give in a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar

from movieq.errors import OutOfMemory
from workers.child.diffusion import eviction, model_cache
from workers.child.diffusion.loaded import Loaded
from workers.child.job import Job, device_is_broken, is_out_of_memory
from workers.faults import public_message

T = TypeVar("T")


class Fallback:
    """The steps of the fallback for one run on one model. A context: on exit every step is undone."""

    def __init__(self, job: Job, name: str, loaded: Loaded) -> None:
        self._job = job
        self._name = name
        self._loaded = loaded
        self._undo = ExitStack()
        self._steps = self._remaining_steps()
        self._decode_steps = self._remaining_decode_steps()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def call(self, work: Callable[[], T], in_halves: Callable[[], T] | None = None, *, decodes: bool = False) -> T:
        """Return what `work` returns, trying again after each step. Raises OutOfMemory after the last one.

        For a batch, `in_halves` does the same in two calls, and is the only step. `decodes`: the work is a decode alone. Each step is noted
        in the result's warnings.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error) or device_is_broken(error) or isinstance(error, OutOfMemory):
                    raise
                problem = public_message(error)
                error.__traceback__ = None  # its frames hold tensors
            eviction.free_memory()
            self._job.check()
            if in_halves is not None:
                self._job.note("out of memory: the batch was halved")
                return in_halves()
            step = next(self._decode_steps if decodes else self._steps, None)
            if step is None:
                raise OutOfMemory(f"the memory of {self._job.device} does not suffice for {self._name}: {problem}")
            self._job.note(f"out of memory: {step}")

    def _remaining_steps(self) -> Iterator[str]:
        """Free device memory, one measure at a time, and yield what was done."""
        if model_cache.evict_others(self._name):
            yield "other models were unloaded"
        if model_cache.can_stream_groups(self._name):
            self._loaded.stream_groups(self._job.device)
            self._undo.callback(model_cache.stop_streaming, self._name)
            yield "the weights were moved to host memory"

    def _remaining_decode_steps(self) -> Iterator[str]:
        """Do the same for a decode, where tiles help most."""
        if model_cache.evict_others(self._name):
            yield "other models were unloaded"
        if len(self._job.jobs) > 1 and self._switch("slicing"):
            yield "the pictures of the batch are decoded one by one"
        if self._switch("tiling"):
            yield "pictures are decoded in tiles"
        yield from self._steps

    def _switch(self, option: str) -> bool:
        """Let VAEs decode with this option for the rest of the run; return whether that changed anything."""
        changed = False
        for _, network in self._loaded.networks():
            if getattr(network, f"use_{option}", None) is False:
                getattr(network, f"enable_{option}")()
                self._undo.callback(getattr(network, f"disable_{option}"))
                changed = True
        return changed
