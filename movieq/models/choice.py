"""The choice of a model for a task: what each can render, which is the default, and what follows from the choice.

Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import msgspec

import movieq
from movieq.models.table import ANIMATIC, USABLE, Engine, Images, Model, Weights
from movieq.tasks.faults import Fault, given, refused
from movieq.tasks.params import AnimationParams, AudioParams, ImageParams, LoraUse, Params, VideoParams, frames, size, spoken_language
from movieq.tasks.states import PROCESS_AUDIO, EngineChoice, ProjectId, TaskType

IMMUTABLE: Final = ("upload:", "task:", "data:")
"""Prefixes of references that always lead to the same file."""
GIB: Final = 2**30


def makes(model: Model, task_type: TaskType, params: Params) -> bool:
    """Whether the model can render this task. Dialogue needs a speech model, sound needs another."""
    if task_type not in model.tasks:
        return False
    if model.engine == Engine.DIFFUSERS and isinstance(params, AudioParams):
        return bool(model.languages) == (params.text is not None)
    return True


def default(
    table: dict[str, Model], engine: Engine, task_type: TaskType, params: Params | None = None, project: str = "", gpu_bytes: int = 0
) -> str | None:
    """Return the first model of the engine that renders this task, or this task type if there are no parameters; None if there is none.

    Models that a GPU of `gpu_bytes` has room for as a whole come first, then the others, smallest first. For a picture with references,
    models that show what those show come before models that draw over the first. A model that refuses the task is the default only if every
    other one refuses it too.
    """
    fitting = [
        name
        for name, model in table.items()
        if model.engine == engine
        and not model.on_request
        and (task_type in model.tasks if params is None else makes(model, task_type, params))
    ]
    with_references = isinstance(params, ImageParams) and bool(params.reference_images)

    def rank(name: str) -> tuple[bool, bool, float]:
        model = table[name]
        has_room = model.gpu_memory_gb * GIB * USABLE <= gpu_bytes
        return not model.preferred, with_references and model.images is not Images.REFERENCES, 0.0 if has_room else model.gpu_memory_gb

    fitting.sort(key=rank)
    able = [name for name in fitting if params is None or not any(refusals(name, table[name], params, project))]
    return next(iter((*able, *fitting)), None)


def refusals(name: str, model: Model, params: Params, project: str) -> Iterator[Fault]:
    """Yield what the model cannot do of a task of the project that it renders otherwise: the field of task_data, and why."""
    if model.engine != Engine.DIFFUSERS:
        return
    yield from _lora_refusals(name, model, params, project)
    match params:
        case AudioParams() if params.text is None:
            if model.limits.seconds is not None and params.duration > model.limits.seconds:
                yield "duration", f"{name} makes at most {model.limits.seconds:g} s of sound, got {params.duration:g}"
        case AudioParams():
            if spoken_language(params.language)[0] not in {spoken_language(each)[0] for each in model.languages}:
                yield "language", f"{name} speaks {', '.join(model.languages)}, got {given(params.language)}"
            if params.character_voice_profile and not model.voices:
                yield "character_voice_profile", f"{name} has a voice of its own and cannot take on that of a sample: leave it out"
        case VideoParams() | AnimationParams():
            field = "storyboard_images" if isinstance(params, VideoParams) else "reference_images"
            yield from _image_refusals(name, model, field, getattr(params, field))
            longest_s = model.limits.frames / model.limits.fps
            if model.images is None and params.duration > longest_s:
                yield "duration", f"{name} makes at most {longest_s:.1f} s, and takes no image to go on from, got {params.duration:g}"
        case ImageParams():
            yield from _image_refusals(name, model, "reference_images", params.reference_images)
            if model.images is Images.REFERENCES and len(params.reference_images) > model.limits.references:
                most = model.limits.references
                yield "reference_images", f"{name} takes at most {most} images, got {len(params.reference_images)}"


def _image_refusals(name: str, model: Model, field: str, images: list[str]) -> Iterator[Fault]:
    if images and model.image_pipeline is None:
        yield field, f"{name} takes no images: leave them out"
    if not images and model.pipeline is None:
        yield field, f"{name} begins with an image: give one"


def _lora_refusals(name: str, model: Model, params: Params, project: str) -> Iterator[Fault]:
    allowed = [each for each, lora in model.loras.items() if lora.allows(project)]
    for number, lora in enumerate(uses := loras(params)):
        if lora.name not in allowed:
            have = f"it has {', '.join(allowed)}" if allowed else "it has none"
            yield f"loras[{number}].name", f"{name} has no LoRA {given(lora.name)} for this project: {have}"
        elif lora.name in [other.name for other in (*model.with_loras, *uses[:number])]:
            yield f"loras[{number}].name", f"{given(lora.name)} is named twice"


def loras(params: Params) -> list[LoraUse]:
    """Return the LoRAs that a task asks for."""
    return params.loras if isinstance(params, ImageParams | VideoParams | AnimationParams) else []


def sound(table: dict[str, Model]) -> tuple[str, Model] | None:
    """Return the model that renders the sound of a clip, with its name: the default for sound without speech."""
    name = default(table, Engine.DIFFUSERS, PROCESS_AUDIO, AudioParams())
    return None if name is None else (name, table[name])


def resolve(table: dict[str, Model], choice: EngineChoice, gpu_bytes: int, project: ProjectId, task_type: TaskType, params: Params) -> str:
    """Return the model for this task of the project: the animatic for a draft, else `model`, else the default. Raises ValidationFailed.

    `gpu_bytes` is the memory of the installation's largest GPU; 0 if it has had none.
    """
    if params.draft:
        if task_type not in table[ANIMATIC].tasks:
            raise refused([("task_data.draft", f"{task_type} has no animatic; leave draft out")])
        return ANIMATIC
    if params.model is not None:
        fitting = [name for name, model in table.items() if makes(model, task_type, params)]
        if params.model not in fitting:
            called = _called(task_type, params)
            raise refused([("task_data.model", f"expected a model for {called} ({', '.join(fitting)}), got {given(params.model)}")])
        return _able_model(table, params.model, project, task_type, params)
    if choice is EngineChoice.DIFFUSERS or (choice is EngineChoice.AUTO and gpu_bytes > 0):
        name = default(table, Engine.DIFFUSERS, task_type, params, project, gpu_bytes)
        if name is None and choice is EngineChoice.DIFFUSERS:
            called = _called(task_type, params)
            raise refused([("task_type", f"MOVIEQ_ENGINE is diffusers, and no model renders {called}; add one, or send draft")])
        if name is not None:
            return _able_model(table, name, project, task_type, params)
    for name in (ANIMATIC, *table):
        if makes(table[name], task_type, params) and table[name].engine != Engine.DIFFUSERS:
            return name
    raise refused([("task_type", f"{_called(task_type, params)} has no default model here; set task_data.model")])


def _able_model(table: dict[str, Model], name: str, project: ProjectId, task_type: TaskType, params: Params) -> str:
    """Return the name of the model. Raises ValidationFailed with all that it cannot do of the task, and with the models that can."""
    if not (found := list(refusals(name, table[name], params, project))):
        return name
    makers = [(other, model) for other, model in table.items() if makes(model, task_type, params)]
    able = [other for other, model in makers if not any(refusals(other, model, params, project))]
    advice = f"; or set task_data.model to one of {', '.join(able)}" if able else ""
    raise refused([(f"task_data.{field}", f"{why}{advice}") for field, why in found])


def _called(task_type: TaskType, params: Params) -> str:
    if isinstance(params, AudioParams):
        return f"{task_type} with text" if params.text is not None else f"{task_type} without text"
    return task_type


def rows(model: Model, params: Params) -> int:
    """Return how many pictures with these parameters the model can render in one call.

    Only pictures from text alone are batched, and never with a step cache: it decides for the whole batch, so that a picture would depend
    on its neighbours.
    """
    if not isinstance(params, ImageParams) or params.references or model.engine != Engine.DIFFUSERS or model.first_block_cache is not None:
        return 1
    width, height = size(params.resolution)
    return next((most for pixels, most in sorted(model.limits.batch) if width * height <= pixels), 1)


def batch(name: str, model: Model, params: Params) -> tuple[str, int]:
    """Return the key of the tasks that can share a call of the model with this one, and how many can; "" and 1 if none can.

    The key has everything for which a call takes one value: size, steps, guidance, LoRAs. A task with several takes fills calls by itself.
    """
    if not isinstance(params, ImageParams) or params.takes > 1 or (most := rows(model, params)) == 1:
        return "", 1
    added = ",".join(f"{lora.name}:{lora.strength}" for lora in params.loras)
    return f"{name}|{params.resolution}|{params.steps}|{params.guidance_scale}|{params.negative_prompt is not None}|{added}", most


def fingerprint(
    project: str, table: dict[str, Model], name: str, task_type: TaskType, params: Params, task_data: dict[str, Any], *options: Any
) -> str | None:
    """Return a hash of everything that determines the result: tasks of one project with equal hashes have equal results.

    `options` are settings on which the files depend. None if results can differ: without a seed, with references or weights that can
    change, or by an engine of a plug-in.
    """
    if params.seed is None:
        return None
    sound_under = sound(table) if isinstance(params, VideoParams) and params.audio_cues and not table[name].sound else None
    asked_loras = {each.name for each in (*table[name].with_loras, *loras(params))}
    own = {each: lora for each, lora in table[name].loras.items() if each in asked_loras}
    used = [(name, msgspec.structs.replace(table[name], loras=own)), *([sound_under] if sound_under else [])]
    fixed = all(
        model.engine == Engine.ANIMATIC or (model.engine == Engine.DIFFUSERS and all(each.revision for each in _weights(model)))
        for _, model in used
    )
    if not fixed or not all(each.startswith(IMMUTABLE) for each in params.references):
        return None
    asked = {key: value for key, value in task_data.items() if value is not None} | msgspec.to_builtins(params)
    facts = (project, task_type, used, {key: asked[key] for key in asked.keys() - {"no_cache", "preview"}}, movieq.__version__, options)
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


def _weights(model: Model) -> list[Weights]:
    return [*([model.weights] if model.weights else []), *model.components.values()]


def shape(model: str, task_type: TaskType, params: Params) -> str:
    """Return a key that is equal for tasks which take about equally long."""
    takes = f"|{params.takes} takes" if params.takes > 1 else ""
    match params:
        case VideoParams() | AnimationParams():
            return f"{task_type}|{model}|{params.resolution}|{frames(params)}|{params.steps}{takes}"
        case ImageParams():
            return f"{task_type}|{model}|{params.resolution}|{params.format}|{params.steps}{takes}"
        case AudioParams():
            return f"{task_type}|{model}|{len(params.text or '') // 200}|{params.duration if params.text is None else ''}{takes}"
    return f"{task_type}|{model}{takes}"
