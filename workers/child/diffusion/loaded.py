"""A model in memory: its pipelines, where its weights lie, and what is remembered with them until it is unloaded."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from movieq.models.speed import Speed
from movieq.models.table import Model
from movieq.tasks.params import LoraUse
from workers.child.diffusion import acceleration
from workers.child.diffusion.host_copy import HostCopy, size_bytes
from workers.child.diffusion.placement import Needs, Placement, stays_on_device
from workers.child.diffusion.previews import Previewer
from workers.child.diffusion.prompt_cache import PromptCache

_DENOISERS: Final = ("transformer", "unet", "prior", "decoder_pipe")
_DECODERS: Final = ("vae", "vqvae", "vocoder", "audio_vae", "diffusion_decoder")
_GROUP_HOOKS: Final = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""The names under which diffusers registers the hooks of group offloading; it has no function that removes them."""


class SpeechPipeline:
    """The components of a speech model by name: networks, and what has no weights. Neither library has pipelines of such models."""

    def __init__(self, components: dict[str, Any]) -> None:
        self.components = components


class Loaded:
    """A model in memory: `pipe` serves tasks without images, `image_pipe` tasks with images; either may be None."""

    def __init__(
        self,
        entry: Model,
        pipe: Any,
        image_pipe: Any,
        *,
        place: Placement = Placement.WHOLE,
        needs: Needs,
    ) -> None:
        self.entry = entry
        self.pipe = pipe
        self.image_pipe = image_pipe
        self.place = self._loaded_place = place
        self.needs = needs
        self.host: HostCopy | None = None
        """The copy of its weights in host memory, once there is one."""
        self.stage_seconds: dict[str, float] = {}
        """How long each stage took in the last run: the weights of the next run's plan."""
        self.prompt_cache = PromptCache()
        self.loras: tuple[LoraUse, ...] = ()
        """The LoRAs that it has now (`loras`)."""
        self.speed = Speed()
        """How it computes."""
        self.compiled: list[nn.Module] = []
        """Its blocks that are compiled."""
        self.previewer: Previewer | None = None
        """Decodes previews from its latents; None if the model has no previews."""

    @property
    def has_8_bits(self) -> bool:
        """Whether the components that its entry names are held as 8 bit floats."""
        return self._loaded_place is Placement.FP8

    @property
    def required_bytes(self) -> int:
        """The device memory that it needs to run: weights and activations."""
        return self.needs.of(self.place)

    @property
    def size_bytes(self) -> int:
        """The size of its weights."""
        return sum(each.nbytes for each in self._tensors())

    @property
    def device_bytes(self) -> int:
        """The device memory that its weights take while it is on the device and does not run."""
        if self.place is not Placement.GROUPS:
            return self.size_bytes
        return sum(each.nbytes for each in self._tensors(resident=True))

    @property
    def copy_bytes(self) -> int:
        """The host memory that a copy of its weights takes."""
        return size_bytes(self._tensors())

    @property
    def host_bytes(self) -> int:
        """The host memory that the copy of its weights takes now: 0 if there is none."""
        return self.host.size_bytes if self.host else 0

    def leave_device(self) -> None:
        """Let the weights lie in host memory alone, in their copy, which is made if there is none yet."""
        if self.host is None:
            self.host = HostCopy(self._tensors())
        self.host.move_here()

    def enter_device(self, device: str) -> None:
        """Bring the weights to the device from their copy: all, or those that stay there while groups of layers come and go."""
        assert self.host is not None
        self.host.move_to(device, self._tensors(resident=self.place is Placement.GROUPS))

    def accelerate(self, speed: Speed) -> None:
        """Let it compute in this way. Blocks are compiled only where all weights lie on the device as they are."""
        acceleration.set_attention(self._denoisers(), speed.attention)
        self.speed = Speed(speed.attention, compile=speed.compile and self.place is Placement.WHOLE)
        if self.speed.compile:
            self.compiled = acceleration.compile_blocks(self._denoisers())

    def unload_loras(self) -> None:
        """Take all LoRAs off its layers, which are then what they were before."""
        if self.loras:
            (self.pipe or self.image_pipe).unload_lora_weights()
            self.loras, self.prompt_cache = (), PromptCache()  # a LoRA may have changed a text encoder too

    def stream_groups(self, device: str) -> None:
        """Hold the weights in host memory from now on, and copy groups of layers to the device while others compute."""
        from diffusers.hooks.group_offloading import apply_group_offloading

        self.place = Placement.GROUPS
        acceleration.restore_blocks(self.compiled)  # the hooks that copy weights work within blocks
        self.compiled = []
        self.leave_device()
        self.enter_device(device)
        cuda = device.startswith("cuda")
        for name, network in self.networks():
            if not stays_on_device(name):
                apply_group_offloading(
                    network,
                    onload_device=torch.device(device),
                    offload_type="leaf_level",
                    use_stream=cuda,
                    record_stream=cuda,
                    low_cpu_mem_usage=True,  # else it makes a copy of its own
                )

    def stop_streaming(self) -> None:
        """End `stream_groups`: the weights lie in host memory, and the model is to be on the device as a whole again."""
        from diffusers.hooks.hooks import HookRegistry

        for _, network in self.networks():
            registry = HookRegistry.check_if_exists_or_initialize(network)
            for hook in _GROUP_HOOKS:
                registry.remove_hook(hook, recurse=True)
        self.unload_loras()  # their weights lie wherever the hooks have left them
        self.place = self._loaded_place
        if self.speed.compile:
            self.compiled = acceleration.compile_blocks(self._denoisers())
        self.leave_device()

    def close(self) -> None:
        """Unlock the copy in host memory, before the model is dropped."""
        if self.host is not None:
            self.host.close()
            self.host = None

    def drop_host_copy(self) -> None:
        """Free the copy in host memory of a model that lies on the device."""
        if self.place is not Placement.GROUPS:
            self.close()

    def networks(self) -> list[tuple[str, nn.Module]]:
        """Return its networks with their component names, each once: the two pipelines share theirs."""
        found = [each for pipe in (self.pipe, self.image_pipe) if pipe is not None for each in networks(pipe)]
        if self.previewer is not None and self.previewer.tiny_vae is not None:
            found.append(("preview_vae", self.previewer.tiny_vae))
        return list({id(network): (name, network) for name, network in found}.values())

    def _denoisers(self) -> list[nn.Module]:
        return [network for name, network in self.networks() if stage_of(name) == "denoise"]

    def _tensors(self, *, resident: bool = False) -> list[Tensor]:
        """Return its weights without those of LoRAs, or only those that stay on the device while groups of layers come and go."""
        networks = [network for name, network in self.networks() if not resident or stays_on_device(name)]
        named = [each for network in networks for each in (*network.named_parameters(), *network.named_buffers())]
        return [tensor for name, tensor in named if ".lora_" not in name]


def networks(pipe: Any) -> list[tuple[str, nn.Module]]:
    """Return the networks of a pipeline with their component names."""
    return [(name, component) for name, component in pipe.components.items() if isinstance(component, nn.Module)]


def stage_of(name: str) -> str:
    """Return the stage in which a component of this name works: "denoise", "decode", or "encode" for everything that prepares."""
    if name.startswith(_DENOISERS):
        return "denoise"
    return "decode" if name.startswith(_DECODERS) else "encode"
