"""Which errors of CUDA mean that memory ran out, which have broken the process, and which concern one call alone."""

from __future__ import annotations

import pytest

from movieq.errors import ModelUnavailable
from workers.child.job import device_is_broken, is_out_of_memory


class AcceleratorError(RuntimeError):
    """Stands for torch's class of the same name."""


class OutOfMemoryError(RuntimeError):
    """Stands for torch's class of the same name."""


def wrapped(error: Exception, by: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as cause:
            raise by from cause
    except Exception as found:
        return found


def after(first: Exception, then: Exception) -> Exception:
    """Return an error that happened while another was handled."""
    try:
        try:
            raise first
        except Exception:
            raise then  # noqa: B904
    except Exception as found:
        return found


EXHAUSTED = [
    OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
    wrapped(OutOfMemoryError("CUDA out of memory"), ValueError("the decoder failed")),
]
BROKEN = [
    AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA driver error: unknown error"),
    OSError("cannot load the shard: CUDA error: an illegal memory access was encountered"),
    wrapped(AcceleratorError("CUDA error: an illegal memory access was encountered"), ModelUnavailable("it cannot be loaded")),
    after(OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access was encountered")),
]
OTHERS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (77x768 and 4096x512)"),
    ValueError("out of range"),
]


@pytest.mark.parametrize("error", EXHAUSTED, ids=str)
def test_an_allocation_that_fails_is_out_of_memory_and_breaks_nothing(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not device_is_broken(error)


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_whatever_breaks_the_cuda_context_is_seen_through_any_wrapping(error: Exception) -> None:
    assert device_is_broken(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_neither(error: Exception) -> None:
    assert not device_is_broken(error)
    assert not is_out_of_memory(error)
