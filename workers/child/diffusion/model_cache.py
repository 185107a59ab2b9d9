"""The models of this process: loaded from disk on first use, cached while there is room (`eviction`), restored when needed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from movieq.errors import ModelUnavailable, OutOfMemory
from movieq.models import weights
from movieq.models.table import PREVIEW_VAE, Dtype, Model, Weights
from movieq.tasks.entities import ModelSwaps
from movieq.tasks.states import PROCESS_AUDIO
from workers.child.diffusion import eviction, previews
from workers.child.diffusion.loaded import Loaded
from workers.child.job import Job
from workers.faults import public_message

T = TypeVar("T")

_memory = eviction.ModelMemory()


def get(job: Job, name: str, entry: Model, device: str) -> Loaded:
    """Return the model, on the device and with room to run. It is not evicted while this run lasts.

    A cancel while it loads ends the process: loading cannot be stopped half way. Raises ModelUnavailable if weights are missing or cannot
    be loaded, and OutOfMemory if the model does not fit even after every other model was evicted.
    """
    _memory.mark_used(job.run.run, name, device)
    loaded = _memory.find(name)
    if loaded is not None and loaded.entry == entry:
        if name in _memory.offloaded:
            _retry_alone(name, lambda: _memory.restore(name))
        else:
            _memory.make_room(eviction.required_bytes(loaded), name)
        job.check()
        return loaded
    _memory.remove(name)
    folders = {source: weights.find(source) for source in weights.sources(entry)}
    _memory.make_room(int(entry.gpu_memory_gb * 2**30), name)
    with job.uninterruptible():
        try:
            loaded = _retry_alone(name, lambda: _load(entry, device, folders))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            raise ModelUnavailable(f"{name} cannot be loaded: {public_message(error)}") from error
    job.check()
    _memory.add(name, loaded)
    return loaded


def find(name: str) -> Loaded | None:
    """Return the model if it is in memory, on the device or offloaded."""
    return _memory.find(name)


def is_loaded(name: str) -> bool:
    """Whether the model is on the device."""
    return name in _memory.on_device


def loaded_names() -> tuple[str, ...]:
    """Return the names of the models on the device, the most recently used last."""
    return tuple(_memory.on_device)


def offloaded_names() -> tuple[str, ...]:
    """Return the names of the models offloaded to host memory."""
    return tuple(_memory.offloaded)


def swaps() -> ModelSwaps:
    """Return how often models were loaded and evicted since this process started."""
    return _memory.swaps


def stage_seconds(name: str) -> dict[str, float]:
    """Return how long each stage of the model took in its last run; empty before the first."""
    loaded = _memory.find(name)
    return dict(loaded.stage_seconds) if loaded else {}


def evict_others(name: str) -> bool:
    """Evict every model but this one from the device. Return False if there was none."""
    others = [each for each in _memory.on_device if each != name]
    for each in others:
        _memory.evict(each)
    eviction.free_memory()
    return bool(others)


def clear() -> None:
    """Remove every model from memory and reset the counts."""
    global _memory
    _memory = eviction.ModelMemory()
    eviction.free_memory()


def _retry_alone(name: str, load: Callable[[], T]) -> T:
    """Return what `load` returns; if device memory runs out, evict all other models and try once more. Raises OutOfMemory."""
    try:
        return load()
    except torch.OutOfMemoryError as error:
        error.__traceback__ = None  # its frames hold tensors
    evict_others(name)
    try:
        return load()
    except torch.OutOfMemoryError as error:
        problem = str(error).partition("\n")[0][:200]
    raise OutOfMemory(f"the memory of {_memory.device} does not suffice to load {name}: {problem}")


def _load(entry: Model, device: str, folders: dict[Weights, Path]) -> Loaded:
    """Load a model from the folders of its weights onto the device, as its table entry says."""
    dtype = torch.float32 if device == "cpu" else {
        Dtype.FLOAT32: torch.float32, Dtype.FLOAT16: torch.float16, Dtype.BFLOAT16: torch.bfloat16
    }[entry.dtype]  # fmt: skip
    assert entry.weights is not None
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    name = entry.pipeline or entry.image_pipeline
    assert name is not None
    cls = library_class(name)
    source = folders[entry.weights] / entry.weights.subfolder
    if entry.languages:
        model = cls.from_pretrained(source, **options).to(device).eval()
        tokenizer = library_class("AutoProcessor" if entry.voices else "AutoTokenizer").from_pretrained(source, local_files_only=True)
        return Loaded(entry, model, None, tokenizer)
    components = {part: _component(each, folders[each], options) for part, each in entry.components.items()}
    tiny_vae = components.pop(PREVIEW_VAE, None)
    variant = {"variant": entry.weights.variant} if entry.weights.variant else {}
    pipe = cls.from_pretrained(source, **options, **variant, **components)
    if entry.scheduler:
        changed = {key: value for key, value in entry.scheduler.items() if key != "cls"}
        scheduler_class = library_class(entry.scheduler["cls"]) if "cls" in entry.scheduler else type(pipe.scheduler)
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **changed)
    pipe = pipe.to(device)
    if entry.first_block_cache is not None:
        for part in ("transformer", "transformer_2", "unet"):
            if (network := getattr(pipe, part, None)) is not None:
                network.enable_cache(library_class("FirstBlockCacheConfig")(threshold=entry.first_block_cache))
    if entry.image_pipeline is None:
        loaded = Loaded(entry, pipe, None)
    elif entry.image_pipeline == name:
        loaded = Loaded(entry, pipe if entry.pipeline else None, pipe)
    else:
        loaded = Loaded(entry, pipe, library_class(entry.image_pipeline).from_pipe(pipe, dtype=dtype))
    loaded.previewer = _previewer(entry, pipe, tiny_vae.to(device) if tiny_vae is not None else None)
    return loaded


def _previewer(entry: Model, pipe: Any, tiny_vae: Any) -> previews.Previewer | None:
    """Return the previewer of a model that renders pictures; None for sound, and for a VAE that previews cannot read."""
    source = entry.components.get("vae", entry.weights)
    if set(entry.tasks) == {PROCESS_AUDIO} or source is None or getattr(pipe, "vae", None) is None:
        return None
    colours = previews.colour_map(pipe.vae, weights.beside(source, "colours.json"))
    return previews.Previewer(colours, tiny_vae) if colours is not None else None


def _component(source: Weights, folder: Path, options: dict[str, Any]) -> Any:
    return library_class(source.cls).from_pretrained(folder / source.subfolder, **options)


def library_class(name: str) -> Any:
    """Return a class of diffusers or transformers by name. Raises ModelUnavailable if neither has it."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        try:
            return getattr(library, name)
        except AttributeError:
            continue
    raise ModelUnavailable(f"neither diffusers {diffusers.__version__} nor transformers {transformers.__version__} has a class {name!r}")
