"""What makes a model compute faster: another attention kernel, and compiled blocks. Both change results by rounding alone, unless the name
of the kernel says otherwise.

A block is compiled without the hooks on it: they report progress and stop the run, and would be frozen into the compiled code.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from movieq.errors import ModelUnavailable
from movieq.models import weights

COMPILER: Final = "inductor"
"""The backend of torch that compiles."""


def device_name(device: str) -> str:
    """Return the device's model, as "NVIDIA H200"; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def versions() -> dict[str, str]:
    """Return the versions of the libraries that models run on, by name."""
    import diffusers
    import transformers

    return {"torch": str(torch.__version__), "diffusers": diffusers.__version__, "transformers": transformers.__version__}


def set_attention(networks: Iterable[Any], kernel: str) -> None:
    """Let the networks use the attention kernel. Raises ModelUnavailable if it does not work here, or if none of them can use it."""
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    able = [network for network in networks if hasattr(network, "set_attention_backend")]
    if not able and kernel != AttentionBackendName.NATIVE:
        raise ModelUnavailable(f"attention: none of its networks can use {kernel}; take it out of the entry")
    # it would also change the kernel of all other models; after this block that is as before
    with attention_backend(AttentionBackendName.NATIVE):
        for network in able:
            try:
                network.set_attention_backend(kernel)
            except (ImportError, RuntimeError, ValueError) as error:
                raise ModelUnavailable(f"attention: {kernel} does not work on this machine: {error}") from None


def compile_blocks(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """Compile the blocks that repeat in the networks, at their next call, and return them. Raises ModelUnavailable if there are none."""
    if (cache := weights.cache_folder()) is not None:  # torch's own default is a folder that other users could fill first
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    found = []
    for network in networks:
        repeated = getattr(network, "_repeated_blocks", None) or ()
        found += [block for block in network.modules() if type(block).__name__ in repeated]
    if not found:
        raise ModelUnavailable("compile: none of its networks names blocks that can be compiled; take it out of the entry")
    for block in found:
        block.forward = torch.compile(block.forward, backend=COMPILER)  # not `block.compile()`, which would include its hooks
    return found


def restore_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let blocks compute as they did before they were compiled."""
    for block in blocks:
        del block.forward
