"""Load a model from the folders of its weights, one component after another.

Each component gets the dtype that the table names for it, and goes to its place before the next one is read, so that host memory holds one
component at a time. While a component loads, its progress is what has arrived in memory: loading is as fast as the disk, and one that
stands still is a hang.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import torch
from torch import nn

from movieq.errors import ModelUnavailable
from movieq.models import speed, weights
from movieq.models.table import PREVIEW_VAE, Dtype, Model
from movieq.tasks.states import PROCESS_AUDIO
from workers.child.diffusion import acceleration, previews
from workers.child.diffusion.adapters import NETWORK, Speech, adapter
from workers.child.diffusion.loaded import Loaded, SpeechPipeline
from workers.child.diffusion.placement import Needs, Placement, stays_on_device, weight_files
from workers.child.job import JobCancelled

LOOK_S: Final = 1.0
"""Time between two looks at how much of a component has arrived in memory, in seconds."""
_CURE: Final = ": run `movieq models pull`, or complete the folder"

Progress = Callable[[int], None]
"""Takes the bytes that have been loaded so far."""


class Part(NamedTuple):
    """A component with weights: its class and the folder of its files."""

    cls: Any
    folder: Path


class Found(NamedTuple):
    """A model on this machine's disk: its folder, and its components that have weights, by name."""

    entry: Model
    folder: Path
    parts: dict[str, Part]


def find(entry: Model) -> Found:
    """Return the model after verifying its files. Raises ModelUnavailable, which says what is missing."""
    assert entry.weights is not None
    folders = {source: weights.find(source) for source in weights.sources(entry)}
    folder = folders[entry.weights] / entry.weights.subfolder
    parts = {name: Part(library_class(each.cls), folders[each] / each.subfolder) for name, each in entry.components.items()}
    if isinstance(adapter(entry), Speech):
        return _checked(Found(entry, folder, {NETWORK: Part(library_class(_pipeline_name(entry)), folder), **parts}))
    try:
        index = weights.json_object("model_index.json", (folder / "model_index.json").read_bytes())
    except OSError:
        raise ModelUnavailable(f"{entry.weights.repository} has no model_index.json: it is no pipeline of diffusers") from None
    for name, listed in index.items():
        if name not in parts and isinstance(listed, list) and len(listed) == 2 and all(isinstance(each, str) for each in listed):
            cls = _component_class(listed[0], listed[1], entry, needed=any((folder / name).glob("*.safetensors")))
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                parts[name] = Part(cls, folder / name)
            elif not any((folder / name).glob("*.json")):  # of nothing, transformers makes a tokenizer that knows no words
                raise ModelUnavailable(f"{name} has no files in {folder / name}{_CURE}")
    return _checked(Found(entry, folder, parts))


def _checked(found: Found) -> Found:
    """Return the model. Raises ModelUnavailable if a network has no configuration: then the libraries would build one of default sizes."""
    for name, part in found.parts.items():
        if not (part.folder / "config.json").is_file():
            raise ModelUnavailable(f"{name} has no config.json in {part.folder}{_CURE}")
    return found


def load(found: Found, needs: Needs, place: Placement, device: str, progress: Progress) -> Loaded:
    """Load the model onto the device, or into host memory for `Placement.GROUPS`. Raises whatever the libraries raise."""
    networks, done = {}, 0
    for name, part in found.parts.items():
        size = needs.components[name].weights if name in needs.components else 0
        with _watched(progress, done, size):
            network = _network(found.entry, name, part, device)
        if place is Placement.FP8 and name in found.entry.fp8:
            _hold_in_8_bits(name, network)
        if place is not Placement.GROUPS or stays_on_device(name):
            network.to(device)
        networks[name] = network
        done += size
        progress(done)
    loaded = _assembled(found, networks, needs, place)
    if not isinstance(adapter(found.entry), Speech):
        loaded.accelerate(speed.read(found.entry, acceleration.device_name(device), acceleration.versions()))
    if place is Placement.GROUPS:
        loaded.stream_groups(device)
    return loaded


def _network(entry: Model, name: str, part: Part, device: str) -> Any:
    files = weight_files(part.folder, entry)
    if not files:
        raise ModelUnavailable(f"{name} has no weights as safetensors; other formats are not read")
    variant = entry.weights.variant if entry.weights else None
    options: dict[str, Any] = {"dtype": _dtype(entry, name, device), "use_safetensors": True, "local_files_only": True}
    if variant is not None and any(f".{variant}" in file.name for file in files):
        options["variant"] = variant
    return part.cls.from_pretrained(part.folder, **options).eval()


def _hold_in_8_bits(name: str, network: Any) -> None:
    if not hasattr(network, "enable_layerwise_casting"):
        raise ModelUnavailable(f"fp8: {type(network).__name__} ({name}) cannot be held in 8 bits; take it out of the entry")
    dtype = network.dtype
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    for layer in network.modules():
        if getattr(getattr(layer, "weight", None), "dtype", None) == torch.float8_e4m3fn:
            layer.compute_dtype = dtype  # in which peft gives it the weights of a LoRA


def _dtype(entry: Model, name: str, device: str) -> torch.dtype:
    """Return the number format of a component. On a CPU it is float32: half precision is slower there, and some operations lack it."""
    if device == "cpu":
        return torch.float32
    chosen = entry.dtypes.get(name, entry.dtype)
    return {Dtype.FLOAT32: torch.float32, Dtype.FLOAT16: torch.float16, Dtype.BFLOAT16: torch.bfloat16}[chosen]


def _assembled(found: Found, networks: dict[str, Any], needs: Needs, place: Placement) -> Loaded:
    """Return the model with its pipelines around the loaded networks."""
    entry, source, own = found.entry, found.folder, adapter(found.entry)
    if isinstance(own, Speech):
        return Loaded(entry, SpeechPipeline({**own.processors(source), **networks}), None, place=place, needs=needs)
    tiny_vae = networks.pop(PREVIEW_VAE, None)
    cls = library_class(_pipeline_name(entry))
    pipe = cls.from_pretrained(source, local_files_only=True, **own.processors(source), **networks)
    if entry.scheduler:
        changed = {key: value for key, value in entry.scheduler.items() if key != "cls"}
        scheduler_class = library_class(entry.scheduler["cls"]) if "cls" in entry.scheduler else type(pipe.scheduler)
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **changed)
    if entry.first_block_cache is not None:
        for part in ("transformer", "transformer_2", "unet"):
            if (network := getattr(pipe, part, None)) is not None:
                if not hasattr(network, "enable_cache"):
                    raise ModelUnavailable(
                        f"first_block_cache: {type(network).__name__} of diffusers cannot skip steps; take it out of the entry"
                    )
                network.enable_cache(library_class("FirstBlockCacheConfig")(threshold=entry.first_block_cache))
    image_pipe = None
    if entry.image_pipeline is not None:
        image_pipe = pipe if entry.image_pipeline == _pipeline_name(entry) else sibling(library_class(entry.image_pipeline), pipe)
    loaded = Loaded(entry, pipe if entry.pipeline else None, image_pipe, place=place, needs=needs)
    loaded.previewer = _previewer(entry, pipe, tiny_vae)
    return loaded


def sibling(cls: Any, pipe: Any) -> Any:
    """Return a pipeline of another class over the same components, which stay as they are.

    `from_pipe` of diffusers would cast them all to one dtype, also those that must stay float32, and refuses quantised ones.
    """
    accepted = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in {**pipe.config, **pipe.components}.items() if name in accepted})


def _previewer(entry: Model, pipe: Any, tiny_vae: Any) -> previews.Previewer | None:
    """Return the previewer of a model that renders pictures; None for sound, and for a VAE that previews cannot read."""
    source = entry.components.get("vae", entry.weights)
    if set(entry.tasks) == {PROCESS_AUDIO} or source is None or getattr(pipe, "vae", None) is None:
        return None
    colours = previews.colour_map(pipe.vae, weights.beside(source, "colours.json"))
    return previews.Previewer(colours, tiny_vae) if colours is not None else None


@contextmanager
def _watched(progress: Progress, done: int, size: int) -> Iterator[None]:
    """Report, while the block loads a component of this size, how much of it has arrived in memory."""
    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        seen = 0
        while not ended.wait(LOOK_S):
            arrived = min(process.memory_info().rss - before, size)
            if arrived > seen:
                seen = arrived
                with suppress(JobCancelled):  # the thread that reads the pipe ends the process
                    progress(done + seen)

    watcher = threading.Thread(target=watch, name="loading", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _pipeline_name(entry: Model) -> str:
    name = entry.pipeline or entry.image_pipeline
    assert name is not None
    return name


def _component_class(library: str, name: str, entry: Model, *, needed: bool) -> Any:
    """Return the class of a component in model_index.json: of diffusers, of transformers, or of the module of its pipeline.

    Raises ModelUnavailable if a library is missing that it needs, or if there is no such class; if it is not `needed`, None is returned for
    that: old names of tokenizers are known to `from_pretrained` alone.
    """
    if library in ("diffusers", "transformers"):
        try:
            return library_class(name)
        except _NoSuchClass:
            if needed:
                raise
            return None
    own = _pipeline_name(entry).partition(":")[0]
    try:
        return getattr(importlib.import_module(own if library == own else f"diffusers.pipelines.{library}"), name)
    except (ImportError, AttributeError):
        raise ModelUnavailable(f"{name} of {library} is neither in diffusers nor in transformers; other code is not run") from None


class _NoSuchClass(ModelUnavailable):
    """Neither library has a class of this name."""


def library_class(name: str) -> Any:
    """Return a class of diffusers or transformers by name, or another one as "module:Class".

    Raises ModelUnavailable if there is none, or a library is missing.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    module, _, own = name.partition(":")
    if own:  # of a plug-in
        try:
            return getattr(importlib.import_module(module), own)
        except (ImportError, AttributeError) as error:
            raise ModelUnavailable(f"{name} cannot be imported: {error}") from None
    for library in (diffusers, transformers):
        try:
            found = getattr(library, name)
        except AttributeError:
            continue
        if missing := _missing_libraries(found):
            raise ModelUnavailable(f"{name} needs {', '.join(missing)}: run `pip install 'movieq[gpu]'` on the worker's machine")
        return found
    raise _NoSuchClass(f"neither diffusers {diffusers.__version__} nor transformers {transformers.__version__} has a class {name!r}")


def _missing_libraries(cls: Any) -> list[str]:
    """Return the libraries without which this class is only a placeholder, as diffusers and transformers have them."""
    backends = getattr(cls, "_backends", ()) if type(cls).__name__ == "DummyObject" else ()
    return [name for name in backends if importlib.util.find_spec(name) is None]
