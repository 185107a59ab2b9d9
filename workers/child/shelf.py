"""Models that are loaded: brought in when first asked for, kept while there is room, by least recent use."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from movieq import weights
from movieq.errors import ModelUnavailable
from movieq.models import Dtype, Model, Weights
from workers.child.take import Take

KEPT_SHARE: Final = 0.5
"""Of the memory of the device that models which nobody uses just now may keep."""


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

    @property
    def bytes(self) -> int:
        """What its weights take."""
        networks = {id(part): part for pipe in (self.pipe, self.image_pipe) if pipe is not None for part in _networks(pipe)}
        return sum(tensor.nbytes for part in networks.values() for tensor in (*part.parameters(), *part.buffers()))


_shelf: dict[str, Loaded] = {}


def ready(name: str) -> bool:
    """Whether the model is in memory."""
    return name in _shelf


def names() -> tuple[str, ...]:
    """The models in memory, the one used last at the end."""
    return tuple(_shelf)


def seconds(name: str) -> dict[str, float]:
    """What each stage of the model took the last time; nothing before the first."""
    return dict(_shelf[name].seconds) if name in _shelf else {}


def get(take: Take, name: str, entry: Model, device: str) -> Loaded:
    """The model, loaded where it is not. A cancel while it loads ends the process: nobody can stop that half way.

    Raises ModelUnavailable saying what is missing or wrong.
    """
    if name in _shelf and _shelf[name].entry == entry:
        _shelf[name] = _shelf.pop(name)
        return _shelf[name]
    _shelf.pop(name, None)
    folders = {source: weights.find(source) for source in weights.sources(entry)}
    _make_room(device)
    with take.deaf():
        try:
            loaded = _load(entry, device, folders)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelUnavailable(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
    take.check()
    _shelf[name] = loaded
    return loaded


def evict(keep: str) -> bool:
    """Every other model leaves; False where there was none."""
    others = [name for name in _shelf if name != keep]
    for name in others:
        del _shelf[name]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return bool(others)


def _make_room(device: str) -> None:
    total = torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else psutil.virtual_memory().total
    while _shelf and sum(loaded.bytes for loaded in _shelf.values()) > total * KEPT_SHARE:
        del _shelf[next(iter(_shelf))]
        gc.collect()


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
        return Loaded(entry, pipe, None)
    if entry.image_pipeline == name:
        return Loaded(entry, pipe if entry.pipeline else None, pipe)
    return Loaded(entry, pipe, class_of(entry.image_pipeline).from_pipe(pipe, dtype=dtype))


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


def _networks(pipe: Any) -> list[torch.nn.Module]:
    parts = [pipe] if isinstance(pipe, torch.nn.Module) else pipe.components.values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]
