"""Encoded prompts of earlier tasks, for tasks with the same words. They are stored in host memory: the copy to a GPU takes no time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

MAX_BYTES: Final = 128 * 2**20
"""For each model: a few dozen prompts of the largest text encoders. The least recently used leave first."""


class _Uncacheable(TypeError):
    """A value that cannot be compared or copied reliably."""


class _Entry(NamedTuple):
    answer: Any
    size_bytes: int


class PromptCache:
    """The encoded prompts of one model. Every answer has tensors of its own: changing them in place does not change later answers."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._entries: dict[Hashable, _Entry] = {}

    @property
    def size_bytes(self) -> int:
        """The host memory that the cache occupies."""
        return sum(each.size_bytes for each in self._entries.values())

    def call(self, encode: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """Return what `encode`, a pipeline's method, returns for these arguments, and whether it came from the cache.

        The same method with equal plain arguments counts as the same call. Of the pipeline's own state such methods read only whether
        there is guidance, which is part of the key (checked for every `encode_prompt` of diffusers 0.42).
        """
        guided = getattr(getattr(encode, "__self__", None), "do_classifier_free_guidance", None)
        try:
            key = getattr(encode, "__func__", encode), bool(guided), _key(args), _key(kwargs)
        except _Uncacheable:
            return encode(*args, **kwargs), False
        if (entry := self._entries.pop(key, None)) is not None:
            self._entries[key] = entry
            return _from_host(entry.answer), True
        answer = encode(*args, **kwargs)
        try:
            new = _Entry(_to_host(answer), _size_bytes(answer))
        except _Uncacheable:
            return answer, False
        while self._entries and self.size_bytes + new.size_bytes > self._max_bytes:
            del self._entries[next(iter(self._entries))]
        if new.size_bytes <= self._max_bytes:
            self._entries[key] = new
        return answer, False


def _key(value: Any) -> Hashable:
    """Return the value as a dictionary key in which 1, 1.0 and True differ. Raises _Uncacheable."""
    match value:
        case None | bool() | int() | float() | str() | torch.device() | torch.dtype():
            return type(value), value
        case list() | tuple():
            return type(value), tuple(map(_key, value))
        case dict():
            return dict, tuple((name, _key(each)) for name, each in sorted(value.items()))
    raise _Uncacheable


class _HostTensor(NamedTuple):
    """A tensor in host memory, and the device that it was copied from."""

    tensor: Tensor
    device: torch.device


def _to_host(answer: Any) -> Any:
    match answer:
        case None | bool() | int() | float() | str():
            return answer
        case Tensor():
            return _HostTensor(answer.detach().to("cpu", copy=True), answer.device)
        case list():
            return list(map(_to_host, answer))
        case tuple() if type(answer) is tuple:
            return tuple(map(_to_host, answer))
    raise _Uncacheable


def _from_host(stored: Any) -> Any:
    match stored:
        case _HostTensor():
            return stored.tensor.to(stored.device, copy=True)
        case list():
            return list(map(_from_host, stored))
        case tuple():
            return tuple(map(_from_host, stored))
    return stored


def _size_bytes(answer: Any) -> int:
    match answer:
        case Tensor():
            return answer.nbytes
        case list() | tuple():
            return sum(map(_size_bytes, answer))
    return 0
