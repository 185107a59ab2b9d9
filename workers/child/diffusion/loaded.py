"""A model in memory: its pipelines, and what is remembered with them until it is unloaded."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from movieq.models.table import Model
from workers.child.diffusion.previews import Previewer
from workers.child.diffusion.prompt_cache import PromptCache


class Loaded:
    """A model in memory: `pipe` serves tasks without images, `image_pipe` tasks with images; either may be None.

    `tokenizer` is that of a speech model; for a model that clones voices it is the processor, which also encodes the voice sample.
    """

    def __init__(self, entry: Model, pipe: Any, image_pipe: Any, tokenizer: Any = None) -> None:
        self.entry = entry
        self.tokenizer = tokenizer
        self.pipe = pipe
        self.image_pipe = image_pipe
        self.stage_seconds: dict[str, float] = {}
        """How long each stage took in the last run: the weights of the next run's plan."""
        self.prompt_cache = PromptCache()
        self.previewer: Previewer | None = None
        """Decodes previews from its latents; None if the model has no previews."""

    @property
    def size_bytes(self) -> int:
        """The size of its weights."""
        return sum(tensor.nbytes for network in self._networks() for tensor in (*network.parameters(), *network.buffers()))

    def move(self, device: str) -> None:
        """Move its weights to `device`, or with "cpu" to host memory, pinned where CUDA is available.

        A pipeline with CPU offload hooks keeps its weights in host memory already and is left alone.
        """
        if getattr(self.pipe or self.image_pipe, "_all_hooks", None):
            return
        for network in self._networks():
            network.to(device, non_blocking=device != "cpu")
            if device == "cpu" and torch.cuda.is_available():
                with contextlib.suppress(RuntimeError):  # no more memory can be pinned: the next copy is slower
                    for tensor in (*network.parameters(), *network.buffers()):
                        tensor.data = tensor.data.pin_memory()

    def _networks(self) -> list[nn.Module]:
        """Its networks, each once: the two pipelines share theirs."""
        found = [network for pipe in (self.pipe, self.image_pipe) if pipe is not None for _, network in networks(pipe)]
        if self.previewer is not None and self.previewer.tiny_vae is not None:
            found.append(self.previewer.tiny_vae)
        return list({id(network): network for network in found}.values())


def networks(pipe: Any) -> list[tuple[str, nn.Module]]:
    """Return the networks of a pipeline with their component names; a bare model counts as a transformer."""
    if isinstance(pipe, nn.Module):
        return [("transformer", pipe)]
    return [(name, component) for name, component in pipe.components.items() if isinstance(component, nn.Module)]
