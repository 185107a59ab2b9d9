"""One copy of a model's weights in host memory, from which the device gets them back at bus speed.

torch rounds each block of pinned memory up to a power of two, so a model whose tensors are pinned one by one takes up to twice its size.
Here all tensors of a model lie in one ordinary block, which is page-locked as a whole and takes exactly its size. Weights do not change,
so the copy is made once: afterwards, a model leaves the device by dropping its tensors there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

ALIGNMENT: Final = 256
"""Each tensor begins at a multiple of so many bytes, as CUDA aligns its own."""


class HostCopy:
    """A copy of tensors in host memory, and the tensors themselves, which are either on the device or are views of this copy.

    Close it when the tensors are no longer used: page-locked memory that is freed without that stays locked.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors, which stay where they are. Raises MemoryError, or RuntimeError of torch, if the host has no room."""
        self._tensors = list({id(each): each for each in tensors}.values())
        self.size_bytes = size_bytes(self._tensors)
        self._block = torch.empty(self.size_bytes, dtype=torch.uint8)
        self._is_locked = _lock(self._block)
        self._views: dict[int, Tensor] = {}
        start = 0
        for each in self._tensors:
            view = self._block[start : start + each.nbytes].view(each.dtype).view(each.shape)
            view.copy_(each.detach(), non_blocking=True)
            self._views[id(each)] = view
            start += _aligned(each)
        _synchronize()

    def move_to(self, device: str, tensors: Iterable[Tensor]) -> None:
        """Give these tensors their data on the device. After an error all tensors have it in this copy."""
        try:
            for each in tensors:
                each.data = self._views[id(each)].to(device, non_blocking=True)
            _synchronize()
        except BaseException:
            self.move_here()
            raise

    def move_here(self) -> None:
        """Let the tensors use this copy, which frees their memory on the device."""
        for each in self._tensors:
            each.data = self._views[id(each)]

    def close(self) -> None:
        """Unlock the memory. The tensors that use it can still be read."""
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())  # type: ignore[no-untyped-call]
            self._is_locked = False


def size_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of a copy of these tensors."""
    return sum(map(_aligned, tensors))


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _lock(block: Tensor) -> bool:
    """Page-lock the block, if there is a GPU; return whether that is done. Without it, copies are slower."""
    if not torch.cuda.is_available() or not block.nbytes:
        return False
    return int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0  # type: ignore[no-untyped-call]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
