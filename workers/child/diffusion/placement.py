"""How a model is placed in memory, decided before anything of it is loaded: from the sizes in its weight files and what is free.

A model lies on the device as a whole if that has room for it and for the activations of a call. Else, if its entry allows that, some of its
weights are held in 8 bits: about as fast, with a slightly different result. Else its weights stay in host memory, and each group of layers
is copied to the device while the one before it computes; only the VAE stays on the device. That is slower, with the same result. A model
for which there is no room even so is refused, and the message says what it needs.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

from movieq.errors import ModelUnavailable, OutOfMemory
from movieq.models import weights
from movieq.models.table import USABLE, Dtype, Model

GIB: Final = 2**30
MEMORY_PER_WEIGHT: Final = 1.25
"""Device memory that a model is assumed to need as a whole, as a multiple of its weights, if the table does not say it."""
IN_FLIGHT: Final = 3
"""Groups of layers on the device at once: one computes, one arrives, one leaves."""
CASTABLE: Final = 0.7
"""The share of a component's weights that can be held in 8 bits at least: diffusers leaves norms and embeddings as they are."""
MAX_HEADER_BYTES: Final = 100 * 2**20
"""Longest header of a safetensors file, as its own library has it."""
_BYTES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_FLOATS: Final = {"F64", "F32", "F16", "BF16"}
"""Numbers that are cast when they are loaded. Others, of quantised weights, stay as they are."""
_DTYPE_BYTES: Final = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2, Dtype.BFLOAT16: 2}


class Placement(StrEnum):
    """Where the weights of a model lie while it renders."""

    WHOLE = "whole"
    """All of them on the device."""
    FP8 = "fp8"
    """All of them on the device, those of some components as 8 bit floats; each layer is cast to its usual dtype while it computes."""
    GROUPS = "groups"
    """In host memory, from which groups of layers are copied to the device in turn."""


class Component(NamedTuple):
    """The sizes of a component, in bytes as it is loaded."""

    weights: int
    largest_group: int
    """The largest block of layers, or what belongs to no block."""


class Needs(NamedTuple):
    """What a model needs, in bytes."""

    components: dict[str, Component]
    activations: int
    saved: int = 0
    """Device memory that is saved if the components that the entry names are held in 8 bits; 0 if it names none."""

    @property
    def weights(self) -> int:
        return sum(each.weights for each in self.components.values())

    @property
    def whole(self) -> int:
        """Device memory with all weights on the device."""
        return self.weights + self.activations

    @property
    def groups(self) -> int:
        """Device memory with groups of layers on the device in turn."""
        resident = sum(each.weights for name, each in self.components.items() if stays_on_device(name))
        largest = max((each.largest_group for name, each in self.components.items() if not stays_on_device(name)), default=0)
        return resident + IN_FLIGHT * largest + self.activations

    def of(self, place: Placement) -> int:
        """Return the device memory that the model needs in this place."""
        return {Placement.WHOLE: self.whole, Placement.FP8: self.whole - self.saved, Placement.GROUPS: self.groups}[place]


def stays_on_device(component: str) -> bool:
    """Whether a component stays on the device even if the rest of its model does not: VAEs are small, and used as a whole."""
    return component.startswith(("vae", "vqvae", "audio_vae", "vocoder", "diffusion_decoder", "preview_vae"))


def choose(name: str, needs: Needs, device_bytes: int, host_bytes: int) -> Placement:
    """Return the placement of a model for so much device memory, and so much host memory for its weights. Raises OutOfMemory."""
    for place in Placement:
        has_room = needs.of(place) * USABLE <= device_bytes and (place is not Placement.GROUPS or needs.weights <= host_bytes)
        if has_room and (place is not Placement.FP8 or needs.saved):
            return place
    least = needs.of(Placement.FP8)
    ways = f"{gib(least)} of device memory, or {gib(needs.groups)} and {gib(needs.weights)} of host memory"
    raise OutOfMemory(f"{name} needs {ways}; this worker has {gib(device_bytes)} and {gib(host_bytes)} for it")


def gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def needs(entry: Model, components: Mapping[str, Component], *, on_cpu: bool) -> Needs:
    """Return what a model with these components needs. The table's `gpu_memory_gb` is weights and activations together, on a GPU."""
    weights, said = sum(each.weights for each in components.values()), 0 if on_cpu else int(entry.gpu_memory_gb * GIB)
    whole = said if said > weights else int(weights * MEMORY_PER_WEIGHT)
    saved = sum(
        int((each.weights - each.weights / _width(entry, name, on_cpu=on_cpu)) * CASTABLE)
        for name, each in components.items()
        if name in entry.fp8
    )
    return Needs(dict(components), whole - weights, saved)


def components(entry: Model, folders: Mapping[str, Path], *, on_cpu: bool) -> dict[str, Component]:
    """Return the components by name; `folders` maps each to the folder of its weights. On a CPU all weights are float32."""
    found = {}
    for name, folder in folders.items():
        width = _width(entry, name, on_cpu=on_cpu)
        tensors = [size for file in weight_files(folder, entry) for size in _tensor_sizes(file, width)]
        if tensors:
            found[name] = component(tensors)
    return found


def _width(entry: Model, component: str, *, on_cpu: bool) -> int:
    """Return the bytes of a number of a component as it is loaded."""
    return _DTYPE_BYTES[Dtype.FLOAT32 if on_cpu else entry.dtypes.get(component, entry.dtype)]


def component(tensors: Sequence[tuple[str, int]]) -> Component:
    """Return the sizes of a component from the names and sizes of its tensors."""
    return Component(sum(size for _, size in tensors), _largest_group(tensors))


def weight_files(folder: Path, entry: Model) -> list[Path]:
    """Return the files in a folder that are loaded as weights."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    variant = entry.weights.variant if entry.weights else None
    return [folder / name for name in weights.loaded_files(names, variant, lambda name: (folder / name).read_bytes())]


def _tensor_sizes(file: Path, width: int) -> Iterator[tuple[str, int]]:
    """Yield the name of each tensor of a safetensors file and its size with numbers of so many bytes. Raises ModelUnavailable."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(opened.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                own = width if tensor["dtype"] in _FLOATS else _BYTES.get(tensor["dtype"], 1)
                yield name, math.prod(tensor["shape"]) * own
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelUnavailable(f"{file.name} is not a safetensors file ({error}): run `movieq models pull` again") from None


def _largest_group(tensors: Iterable[tuple[str, int]]) -> int:
    """Return the size of the largest group: the tensors of one block (`blocks.7.`), or a tensor outside of blocks."""
    groups: dict[str, int] = {}
    for name, size in tensors:
        block = re.match(r".*?\.\d+\.", name)
        groups[block[0] if block else name] = groups.get(block[0] if block else name, 0) + size
    return max(groups.values(), default=0)
