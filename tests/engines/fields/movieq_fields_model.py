"""A model that diffusers does not have: a flow model over the latents of a VAE, led by the words of its prompt."""

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class FieldTransformer(ModelMixin, ConfigMixin):
    """Predicts the velocity of latents."""

    @register_to_config
    def __init__(self, channels: int = 4, width: int = 32, words: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, latents: Tensor, words: Tensor) -> Tensor:
        hidden = self.first(latents) + self.embedding(words).mean(dim=1)[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden.sin())
        return self.last(hidden)


class FieldPipeline(DiffusionPipeline):
    """Renders a picture from words."""

    def __init__(self, transformer: FieldTransformer, vae: AutoencoderKL, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt: str, width: int, height: int, num_inference_steps: int, generator: torch.Generator, return_dict: bool = False
    ) -> tuple[Tensor]:
        network, device = self.transformer, self._execution_device
        words = torch.tensor([[sum(map(ord, word)) % network.config.words for word in prompt.split()]], device=device)
        ratio = 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = 1, network.config.channels, height // ratio, width // ratio
        latents = randn_tensor(shape, generator=generator, device=device, dtype=network.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for moment in self.progress_bar(self.scheduler.timesteps):
            latents = self.scheduler.step(network(latents, words), moment, latents, return_dict=False)[0]
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return ((pictures / 2 + 0.5).clamp(0, 1),)


def save(folder: str) -> None:
    """Write a folder with random weights, as a training would leave them."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    FieldPipeline(FieldTransformer(), vae, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
