"""LoRAs in a loaded model: small weights beside those of its layers, which stay as they are.

A set of LoRAs stays loaded until a run asks for another set. Without them the layers are what they were before, to the bit: peft wraps
each layer, and takes the wrapping off again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from movieq.errors import ModelUnavailable
from movieq.models import weights
from movieq.models.table import Lora
from movieq.tasks.params import LoraUse
from workers.child.diffusion.loaded import Loaded
from workers.child.diffusion.prompt_cache import PromptCache
from workers.child.job import device_is_broken, is_out_of_memory
from workers.faults import public_message


def use(name: str, loaded: Loaded, wanted: Sequence[LoraUse]) -> None:
    """Let the model, which is called `name`, have these LoRAs and no others.

    Raises ModelUnavailable if one is missing or does not fit. After an error the model has none.
    """
    if loaded.loras == tuple(wanted):
        return
    loaded.unload_loras()
    if not wanted:
        return
    pipe = loaded.pipe or loaded.image_pipe
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelUnavailable(f"{type(pipe).__name__} takes no LoRAs: take {name} out of their bases")
    if importlib.util.find_spec("peft") is None:
        raise ModelUnavailable("LoRAs need peft: run `pip install 'movieq[gpu]'` on the worker's machine")
    names = [f"lora_{number}" for number in range(len(wanted))]
    loaded.loras, loaded.prompt_cache = tuple(wanted), PromptCache()  # a LoRA may change a text encoder too
    try:
        for adapter_name, each in zip(names, wanted, strict=True):
            _load(name, loaded, each.name, loaded.entry.loras[each.name], adapter_name)
        pipe.set_adapters(names, [each.strength for each in wanted])
    except BaseException:
        loaded.unload_loras()
        raise


def _load(name: str, loaded: Loaded, lora: str, entry: Lora, adapter_name: str) -> None:
    pipe = loaded.pipe or loaded.image_pipe
    for file, options in ((entry.weights, {}), (entry.second, {"load_into_transformer_2": True})):
        if file is None:
            continue
        path = weights.find_file(file)
        source = {"weight_name": path.name, "local_files_only": True, "use_safetensors": True}
        before = _parts(loaded, adapter_name)
        try:
            _check_widths(pipe, pipe.lora_state_dict(str(path.parent), **source))
            pipe.load_lora_weights(str(path.parent), adapter_name=adapter_name, **source, **options)
        except Exception as error:  # the libraries raise anything for a damaged or foreign file
            if device_is_broken(error) or is_out_of_memory(error):
                raise
            raise ModelUnavailable(f"LoRA {lora} cannot be loaded into {name}: {_short(error, path)}") from error
        if _parts(loaded, adapter_name) == before:
            raise ModelUnavailable(f"LoRA {lora} has no weights for {name}: {path.name} was made for another model")


def _check_widths(pipe: Any, state: Any) -> None:
    """Raise ValueError if a layer of the LoRA is not as wide as the model's: the loader of Flux would fill it up with zeros."""
    for key, tensor in (state[0] if isinstance(state, tuple) else state).items():
        part, _, name = key.partition(".")
        if not name.endswith(".lora_A.weight"):
            continue
        try:
            layer = getattr(pipe, part).get_submodule(name.removesuffix(".lora_A.weight"))
        except AttributeError:
            continue
        width = getattr(layer, "base_layer", layer).weight.shape[1]
        if tensor.shape[1] != width:
            raise ValueError(f"{name} has {tensor.shape[1]} inputs instead of {width}")


def _parts(loaded: Loaded, adapter_name: str) -> set[str]:
    """Return the networks that have this LoRA."""
    return {part for part, network in loaded.networks() if adapter_name in getattr(network, "peft_config", {})}


def _short(error: Exception, path: Path) -> str:
    """Return what is wrong with a file; the libraries list every layer that does not fit."""
    return f"{path.name}: {public_message(error)}"[:300]
