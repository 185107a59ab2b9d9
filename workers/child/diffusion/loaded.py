"""A model in memory."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from movieq.models.table import Model
from workers.child.diffusion import previews
from workers.child.diffusion.prompt_cache import Embeddings


class Loaded:
    """A model in memory: `pipe` for tasks without images, `image_pipe` for those with; either may be missing.

    `tokenizer` is that of a model that speaks; of one that takes a voice from a sample it is the processor, which hears too.
    """

    def __init__(self, entry: Model, pipe: Any, image_pipe: Any, tokenizer: Any = None) -> None:
        self.entry = entry
        self.tokenizer = tokenizer
        self.pipe = pipe
        self.image_pipe = image_pipe
        self.seconds: dict[str, float] = {}
        """What each stage took the last time: the weights of the next plan."""
        self.embeddings = Embeddings()
        self.eye: previews.Eye | None = None
        """What reads previews off its latents; None where nothing can."""

    @property
    def bytes(self) -> int:
        """What its weights take."""
        return sum(tensor.nbytes for part in self._networks() for tensor in (*part.parameters(), *part.buffers()))

    def move(self, place: str) -> None:
        """Its weights lie on the device, or in the host's memory; the parts that the ladder sent there wait there anyway."""
        if getattr(self.pipe or self.image_pipe, "_all_hooks", None):
            return
        for part in self._networks():
            part.to(place, non_blocking=place != "cpu")
            if place == "cpu" and torch.cuda.is_available():
                with contextlib.suppress(RuntimeError):  # the host gives no more of it: a copy takes longer
                    for tensor in (*part.parameters(), *part.buffers()):
                        tensor.data = tensor.data.pin_memory()

    def _networks(self) -> list[torch.nn.Module]:
        own = [part for pipe in (self.pipe, self.image_pipe) if pipe is not None for part in _networks(pipe)]
        tiny = self.eye.tiny if self.eye is not None else None
        return list({id(part): part for part in [*own, *([tiny] if tiny is not None else [])]}.values())


def _networks(pipe: Any) -> list[torch.nn.Module]:
    parts = [pipe] if isinstance(pipe, torch.nn.Module) else pipe.components.values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]
