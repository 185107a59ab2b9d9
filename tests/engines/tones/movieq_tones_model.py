"""A speech model that no library has: each letter becomes a noisy frame, which a codec turns into sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from workers.child.diffusion.adapters import NETWORK, Speech, Voice, VoiceSample
from workers.child.job import Job
from workers.child.media.encode import Samples


class ToneConfig(PretrainedConfig):
    model_type = "tones"


class ToneNetwork(PreTrainedModel):
    """Turns letters into frames."""

    config_class = ToneConfig

    def __init__(self, config: ToneConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(256, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.post_init()

    def forward(self, letters: Tensor) -> Tensor:
        frames: Tensor = self.embedding(letters)
        for layer in self.layers:
            frames = frames + layer(frames + torch.randn_like(frames))
        return frames


class ToneCodec(ModelMixin, ConfigMixin):
    """Turns frames into samples."""

    @register_to_config
    def __init__(self, rate: int = 8000) -> None:
        super().__init__()
        self.decoder = nn.Linear(32, rate // 20)

    def forward(self, frames: Tensor) -> Tensor:
        samples: Tensor = self.decoder(frames)
        return samples.tanh().flatten()


class Tones(Speech):
    """The adapter."""

    def processors(self, folder: Path) -> dict[str, Any]:
        return {}

    def rate(self, components: dict[str, Any]) -> int:
        return int(components["codec"].config.rate)

    def voice(self, job: Job, components: dict[str, Any], sample: VoiceSample | None) -> Voice:
        return ToneVoice(job.device, components[NETWORK], components["codec"])


class ToneVoice:
    """Speaks letter by letter."""

    def __init__(self, device: str, network: Any, codec: Any) -> None:
        self._device, self._network, self._codec = device, network, codec

    def synthesize(self, piece: str, progress: Callable[[float], None]) -> Samples | None:
        letters = torch.tensor(list(piece.encode()), device=self._device)
        samples: Samples = self._codec(self._network(letters)).float().cpu().numpy()
        return samples


def save(folder: str) -> None:
    """Write the folders with random weights."""
    torch.manual_seed(0)
    ToneNetwork(ToneConfig()).save_pretrained(f"{folder}/network")
    ToneCodec().save_pretrained(f"{folder}/codec")
