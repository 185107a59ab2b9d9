"""Models in memory: loaded when first asked for, kept where there is room (`residency`), brought back when they are asked for again."""

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
from workers.child.job import Take
from workers.faults import said

T = TypeVar("T")


_models = eviction.Residency()


def ready(name: str) -> bool:
    """Whether the model is on the device."""
    return name in _models.resident


def names() -> tuple[str, ...]:
    """The models on the device, the one used last at the end."""
    return tuple(_models.resident)


def parked() -> tuple[str, ...]:
    """The models that wait in the host's memory."""
    return tuple(_models.parked)


def swaps() -> ModelSwaps:
    """How often models came and went since this process began."""
    return _models.swaps


def seconds(name: str) -> dict[str, float]:
    """What each stage of the model took the last time; nothing before the first."""
    loaded = _models.find(name)
    return dict(loaded.seconds) if loaded else {}


def get(take: Take, name: str, entry: Model, device: str) -> Loaded:
    """The model on the device, with the room that it needs to work. It stays there for as long as this run works.

    A cancel while it loads ends the process: nobody can stop that half way. Raises ModelUnavailable saying what is missing or wrong, and
    OutOfMemory where it does not fit though every other model has left.
    """
    _models.use(take.run.run, name, device)
    loaded = _models.find(name)
    if loaded is not None and loaded.entry == entry:
        if name in _models.parked:
            _with_room(name, lambda: _models.bring_back(name))
        else:
            _models.make_room(eviction.need(loaded), name)
        take.check()
        return loaded
    _models.forget(name)
    folders = {source: weights.find(source) for source in weights.sources(entry)}
    _models.make_room(int(entry.gpu_memory_gb * 2**30), name)
    with take.deaf():
        try:
            loaded = _with_room(name, lambda: _load(entry, device, folders))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            raise ModelUnavailable(f"{name} cannot be loaded: {said(error)}") from error
    take.check()
    _models.put(name, loaded)
    return loaded


def _with_room(name: str, bring: Callable[[], T]) -> T:
    """What this brings into memory; where that does not suffice, once more without the others. Raises OutOfMemory."""
    try:
        return bring()
    except torch.OutOfMemoryError as error:
        error.__traceback__ = None  # its frames hold tensors
    evict(name)
    try:
        return bring()
    except torch.OutOfMemoryError as error:
        problem = str(error).partition("\n")[0][:200]
    raise OutOfMemory(f"the memory of {_models.device} does not suffice to load {name}: {problem}")


def evict(keep: str) -> bool:
    """Every other model has left the device; False where there was none."""
    others = [name for name in _models.resident if name != keep]
    for name in others:
        _models.put_away(name)
    eviction.sweep()
    return bool(others)


def clear() -> None:
    """Nothing is in memory, and nothing was counted."""
    global _models
    _models = eviction.Residency()
    eviction.sweep()


def _load(entry: Model, device: str, folders: dict[Weights, Path]) -> Loaded:
    dtype = torch.float32 if device == "cpu" else {
        Dtype.FLOAT32: torch.float32, Dtype.FLOAT16: torch.float16, Dtype.BFLOAT16: torch.bfloat16
    }[entry.dtype]  # fmt: skip
    assert entry.weights is not None
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    name = entry.pipeline or entry.image_pipeline
    assert name is not None
    cls = class_of(name)
    source = folders[entry.weights] / entry.weights.subfolder
    if entry.languages:
        model = cls.from_pretrained(source, **options).to(device).eval()
        tokenizer = class_of("AutoProcessor" if entry.voices else "AutoTokenizer").from_pretrained(source, local_files_only=True)
        return Loaded(entry, model, None, tokenizer)
    components = {part: _component(each, folders[each], options) for part, each in entry.components.items()}
    tiny = components.pop(PREVIEW_VAE, None)
    variant = {"variant": entry.weights.variant} if entry.weights.variant else {}
    pipe = cls.from_pretrained(source, **options, **variant, **components)
    if entry.scheduler:
        changed = {key: value for key, value in entry.scheduler.items() if key != "cls"}
        kind = class_of(entry.scheduler["cls"]) if "cls" in entry.scheduler else type(pipe.scheduler)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **changed)
    pipe = pipe.to(device)
    if entry.first_block_cache is not None:
        for part in ("transformer", "transformer_2", "unet"):
            if (network := getattr(pipe, part, None)) is not None:
                network.enable_cache(class_of("FirstBlockCacheConfig")(threshold=entry.first_block_cache))
    if entry.image_pipeline is None:
        loaded = Loaded(entry, pipe, None)
    elif entry.image_pipeline == name:
        loaded = Loaded(entry, pipe if entry.pipeline else None, pipe)
    else:
        loaded = Loaded(entry, pipe, class_of(entry.image_pipeline).from_pipe(pipe, dtype=dtype))
    loaded.eye = _eye(entry, pipe, tiny.to(device) if tiny is not None else None)
    return loaded


def _eye(entry: Model, pipe: Any, tiny: Any) -> previews.Eye | None:
    """What reads previews off the latents of a model that makes pictures, where anything can."""
    source = entry.components.get("vae", entry.weights)
    if set(entry.tasks) == {PROCESS_AUDIO} or source is None or getattr(pipe, "vae", None) is None:
        return None
    learnt = previews.learnt(pipe.vae, weights.beside(source, "colours.json"))
    return previews.Eye(learnt, tiny) if learnt is not None else None


def _component(source: Weights, folder: Path, options: dict[str, Any]) -> Any:
    return class_of(source.cls).from_pretrained(folder / source.subfolder, **options)


def class_of(name: str) -> Any:
    """A class of diffusers or transformers. Raises ModelUnavailable where neither has it."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        try:
            return getattr(library, name)
        except AttributeError:
            continue
    raise ModelUnavailable(f"neither diffusers {diffusers.__version__} nor transformers {transformers.__version__} has a class {name!r}")
