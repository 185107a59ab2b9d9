"""The models of this process: loaded from disk on first use, cached while there is room (`eviction`), restored when needed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from movieq.errors import ModelUnavailable, OutOfMemory, TaskFault
from movieq.models.table import Model
from movieq.tasks.entities import ModelSwaps
from workers.child.diffusion import eviction, loading, placement
from workers.child.diffusion.loaded import Loaded
from workers.child.diffusion.placement import Placement
from workers.child.job import Job, device_is_broken, is_out_of_memory
from workers.faults import public_message

T = TypeVar("T")

_memory = eviction.ModelMemory()


def get(job: Job, name: str, entry: Model, device: str) -> Loaded:
    """Return the model, on the device and with room to run. It is not evicted while this run lasts.

    A cancel while a component loads ends the process: that cannot be stopped half way. Raises ModelUnavailable if weights are missing or
    cannot be loaded, and OutOfMemory if the model does not fit, which is known before anything of it is loaded.
    """
    _memory.mark_used(job.run.run, name, device)
    loaded = _memory.find(name)
    if loaded is not None and loaded.entry == entry:
        if name in _memory.offloaded:
            _retry_alone(name, lambda: _memory.restore(name))
        else:
            _memory.make_room(loaded.required_bytes, name)
        job.check()
        return loaded
    _memory.remove(name)
    try:
        loaded = _load(job, name, entry, device)
    except TaskFault:
        raise
    except Exception as error:  # the libraries raise anything for a damaged or foreign model
        if device_is_broken(error):
            raise
        raise ModelUnavailable(f"{name} cannot be loaded: {public_message(error)}") from error
    _memory.add(name, loaded)
    return loaded


def _load(job: Job, name: str, entry: Model, device: str) -> Loaded:
    """Place the model and load it. If memory runs out even so, load it with its weights in host memory."""
    found = loading.find(entry)
    sizes = placement.components(entry, {each: part.folder for each, part in found.parts.items()}, on_cpu=device == "cpu")
    needs = placement.needs(entry, sizes, on_cpu=device == "cpu")
    place = placement.choose(name, needs, *_memory.room_for(name))

    def load(place: Placement) -> Loaded:
        _memory.make_room(needs.of(place), name)
        if place is Placement.GROUPS and not _memory.make_host_room(needs.weights, name):
            raise OutOfMemory(f"host memory does not suffice for the weights of {name}: {placement.gib(needs.weights)}")
        with job.uninterruptible():
            return loading.load(found, needs, place, device, lambda done: job.step("load", done, max(needs.weights, 1)))

    if place is Placement.FP8:
        job.note(f"{name} is larger than the device's memory: {' and '.join(entry.fp8)} in 8 bits, which changes the result slightly")
    if place is Placement.GROUPS:
        job.note(f"{name} is larger than the device's memory: its weights stay in host memory, which is slower")
    try:
        return load(place)
    except Exception as error:
        if not is_out_of_memory(error) or device_is_broken(error) or isinstance(error, TaskFault):
            raise
        problem = public_message(error)
        error.__traceback__ = None  # its frames hold tensors
    evict_others(name)
    if place is Placement.GROUPS or not _memory.room_for(name).host:
        raise OutOfMemory(f"the memory of {device} does not suffice to load {name}: {problem}")
    job.note(f"out of memory while {name} was loaded: its weights stay in host memory, which is slower")
    return load(Placement.GROUPS)


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


def can_stream_groups(name: str) -> bool:
    """Whether all weights of the model lie on the device, and host memory has room for its weights; makes that room."""
    loaded = _memory.on_device.get(name)
    if loaded is None or loaded.place is Placement.GROUPS:
        return False
    return loaded.host is not None or _memory.make_host_room(loaded.copy_bytes, name)


def stop_streaming(name: str) -> None:
    """End the streaming of groups that a run began when memory ran out; the next run finds the model offloaded."""
    if (loaded := _memory.find(name)) is not None:
        loaded.stop_streaming()
        _memory.note_left(name)


def clear() -> None:
    """Remove every model from memory and reset the counts."""
    global _memory
    for name in (*_memory.on_device, *_memory.offloaded):
        _memory.remove(name)
    _memory = eviction.ModelMemory()
    eviction.free_memory()


def _retry_alone(name: str, load: Callable[[], T]) -> T:
    """Return what `load` returns; if device memory runs out, evict all other models and try once more. Raises OutOfMemory."""
    try:
        return load()
    except Exception as error:
        if not is_out_of_memory(error) or device_is_broken(error):
            raise
        error.__traceback__ = None  # its frames hold tensors
    evict_others(name)
    try:
        return load()
    except Exception as error:
        if not is_out_of_memory(error) or device_is_broken(error):
            raise
        problem = public_message(error)
    raise OutOfMemory(f"the memory of {_memory.device} does not suffice to load {name}: {problem}")
