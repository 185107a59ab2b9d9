"""The model table: which models there are, which task types each renders, and in which queue their tasks wait. Imports no torch."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

import movieq
from movieq.errors import SettingsError
from movieq.tasks import faults
from movieq.tasks.faults import Fault, given, refused
from movieq.tasks.params import AnimationParams, AudioParams, ImageParams, Params, VideoParams, frames, size
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import GENERATE_IMAGE, PROCESS_AUDIO, EngineChoice, Kind, TaskType

ANIMATIC: Final = "animatic"
IMMUTABLE: Final = ("upload:", "task:", "data:")
"""Prefixes of references that always lead to the same file."""
PREVIEW_VAE: Final = "preview_vae"
"""Name of the component that only decodes previews, an AutoencoderTiny: sharper than the colour map that is fitted to every VAE."""


NAMEABLE: Final = frozenset({"guidance_scale", "seconds"})
"""The arguments that an entry may list in `names`."""
IGNORABLE: Final = frozenset({"guidance_scale", "negative_prompt", "steps"})
"""The parameters that an entry may list in `ignores`."""


class Engine(StrEnum):
    """The engines of movieq."""

    ANIMATIC = "animatic"
    DIFFUSERS = "diffusers"


class Images(StrEnum):
    """How a model uses the images of a task."""

    REDRAW = "redraw"
    """The picture is drawn over the image, and resembles it as `strength` allows."""
    REFERENCES = "references"
    """What the images show appears in the picture: up to `limits.references` of them."""
    START = "start"
    """A clip, or each shot of it, begins with an image."""
    ENDS = "ends"
    """A clip begins with one image and leads to another."""
    FRAMES = "frames"
    """A clip passes through images at any of its frames."""


class Dtype(StrEnum):
    """Number formats of weights. On a CPU it is always float32: half precision is slower there, and some operations lack it."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source of weights: a repository of the hub at a commit, or a folder of this machine (its path, without a revision)."""

    repository: Annotated[str, Meta(min_length=1)]
    revision: Annotated[str, Meta(pattern="^[0-9a-f]{40}$")] | None = None
    subfolder: str = ""
    cls: str = ""
    """Class that loads a component. A pipeline uses the `pipeline` of its entry."""
    variant: str | None = None


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values for parameters that a task leaves out."""

    steps: Annotated[int, Meta(ge=1)] | None = None
    guidance: Annotated[float, Meta(ge=0)] | None = None
    strength: Annotated[float, Meta(gt=0, le=1)] | None = None
    """How far the result may differ from a reference image."""
    negative_prompt: str | None = None
    """Its own negative prompt, where its training or its authors expect one."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model can render. Widths and heights are multiples of `sides`; frame counts are n * `frame_step` + `frame_first`."""

    sides: Annotated[int, Meta(ge=1)] = 8
    pixels: tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]] = (1, 4_000_000)
    """Fewest and most pixels of a picture that give good results."""
    frame_step: Annotated[int, Meta(ge=1)] = 1
    frame_first: Annotated[int, Meta(ge=0)] = 0
    frames: Annotated[int, Meta(ge=1)] = 1
    """Most frames of one window."""
    fps: Annotated[float, Meta(gt=0)] = 24.0
    """Frame rate of its training."""
    seconds: Annotated[float, Meta(gt=0)] | None = None
    """Longest sound."""
    references: Annotated[int, Meta(ge=1, le=10)] = 1
    """Most images of a model that takes references."""
    batch: list[tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=2, le=16)]]] = []
    """Largest batch by picture size, as [pixels, pictures]: [[262144, 8], [589824, 4]]."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the table. `tasks` maps the task types that it renders to their default estimates, in seconds.

    For models with weights, `pipeline` is the class for tasks without images and `image_pipeline` the one for tasks with images; both
    share their weights. `call` holds further arguments of every pipeline call.
    """

    engine: str
    """`animatic`, `diffusers`, or an engine of a plug-in."""
    kind: Kind
    tasks: dict[TaskType, Annotated[float, Meta(gt=0)]]
    weights: Weights | None = None
    components: dict[str, Weights] = {}
    adapter: str = "diffusers"
    """What knows how its pipeline is called: `diffusers`, `ltx`, `ltx2`, or an adapter of a plug-in."""
    pipeline: str | None = None
    image_pipeline: str | None = None
    images: Images | None = None
    """How it uses images. An entry with an `image_pipeline` that does not say so redraws pictures, and starts clips with an image."""
    dtype: Dtype = Dtype.FLOAT32
    dtypes: dict[str, Dtype] = {}
    """Components with a dtype of their own: {"vae": "float32"}."""
    scheduler: dict[str, Any] = {}
    """`cls` is the class, the rest overrides its configuration."""
    flow_shift: list[tuple[Annotated[int, Meta(ge=1)], Annotated[float, Meta(gt=0)]]] = []
    """Shift of the noise schedule by picture size, as [pixels, shift]: [[399360, 3.0], [921600, 5.0]]. Above the last, the last counts."""
    call: dict[str, Any] = {}
    names: dict[str, str] = {}
    """What its pipeline calls an argument of movieq's: {"guidance_scale": "true_cfg_scale"}, {"seconds": "duration"}."""
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    ignores: list[str] = []
    """Parameters of tasks that change nothing, such as the guidance of a distilled model."""
    first_block_cache: Annotated[float, Meta(gt=0)] | None = None
    """Threshold: steps whose first block changes less than this are skipped. That is faster and changes the picture."""
    preferred: bool = False
    """Whether it is the default of its task types before those without this: for the models of plug-ins and of an operator's own file."""
    sound: bool = False
    """Whether its clips have sound."""
    languages: list[str] = []
    """Languages of a speech model, as first subtags of BCP 47."""
    voices: bool = False
    """Whether it can imitate the voice of a sample."""
    gpu_memory_gb: Annotated[float, Meta(ge=0)] = 0.0
    licence: str = ""
    verified: bool = False
    """Whether it has been loaded on a GPU."""

    def __post_init__(self) -> None:
        if self.image_pipeline is not None and self.images is None:
            msgspec.structs.force_setattr(self, "images", Images.REDRAW if GENERATE_IMAGE in self.tasks else Images.START)


def load(path: str = "") -> dict[str, Model]:
    """Return the table: shipped entries, those of plug-ins, and those of the file at `path`; later ones replace earlier ones.

    Raises SettingsError, which names the faulty entry.
    """
    shipped = Path(__file__).with_name("models.toml")
    table = _read(str(shipped), shipped)
    for name, entries in REGISTRY.models.items():
        table |= _checked(name, entries)
    return table | _read(f"MOVIEQ_MODELS: {path}", Path(path)) if path else table


def _read(name: str, file: Path) -> dict[str, Model]:
    try:
        return _checked(name, tomllib.loads(file.read_text("utf-8")))
    except UnicodeDecodeError:
        raise SettingsError(f"{name} is not text in UTF-8: save it as UTF-8") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{name}: {error}") from None


def _checked(name: str, entries: dict[str, Any]) -> dict[str, Model]:
    try:
        table = msgspec.convert(entries, dict[str, Model])
    except msgspec.ValidationError as error:
        wrong = "; ".join(f"{path}: {message}" for path, message in islice(faults.of(dict[str, Model], entries), faults.MOST))
        raise SettingsError(f"{name}: {wrong or error}") from None
    for each, model in table.items():
        if problem := _problem(model):
            raise SettingsError(f"{name}: {each}: {problem}")
    return table


def _problem(model: Model) -> str | None:
    """Return what is wrong with an entry whose fields are each valid; None if nothing is."""
    if unknown := sorted(model.tasks.keys() - REGISTRY.tasks.keys()):
        return f"tasks: unknown task type {unknown[0]}; known: {', '.join(REGISTRY.tasks)}"
    if model.engine not in REGISTRY.engines:
        return f"unknown engine {model.engine!r}; known: {', '.join(REGISTRY.engines)}"
    if model.engine != Engine.DIFFUSERS:
        return None
    if model.weights is None:
        return "weights = { repository = ..., revision = ... } is needed"
    if model.adapter not in REGISTRY.adapters:
        return f"unknown adapter {model.adapter!r}; known: {', '.join(REGISTRY.adapters)}"
    if model.pipeline is None and model.image_pipeline is None:
        return "pipeline or image_pipeline is needed: a class of diffusers or transformers"
    if model.images is not None and model.image_pipeline is None:
        return "images: only together with image_pipeline"
    if unnameable := sorted(model.names.keys() - NAMEABLE):
        return f"names: unknown argument {unnameable[0]!r}; known: {', '.join(sorted(NAMEABLE))}"
    if read := sorted(set(model.ignores) - IGNORABLE):
        return f"ignores: unknown parameter {read[0]!r}; known: {', '.join(sorted(IGNORABLE))}"
    for weights in (model.weights, *model.components.values()):
        if weights.revision is None and not Path(weights.repository).is_absolute():
            return f"{weights.repository}: set revision to a commit of 40 hex digits, or repository to the absolute path of a folder"
    if model.limits.batch and model.first_block_cache is not None:
        return "limits.batch: not together with first_block_cache, which decides over a whole batch"
    if model.limits.pixels[0] > model.limits.pixels[1]:
        return f"limits.pixels: [fewest, most] is expected, got {list(model.limits.pixels)}"
    return None


def makes(model: Model, task_type: TaskType, params: Params) -> bool:
    """Whether the model can render this task. Dialogue needs a speech model, sound needs another."""
    if task_type not in model.tasks:
        return False
    if model.engine == Engine.DIFFUSERS and isinstance(params, AudioParams):
        return bool(model.languages) == (params.text is not None)
    return True


def default(table: dict[str, Model], engine: Engine, task_type: TaskType, params: Params | None = None) -> str | None:
    """Return the first model of the engine that renders this task, or this task type if there are no parameters; None if there is none.

    A model that refuses the task is the default only if every other one refuses it too.
    """
    fitting = [
        name
        for name, model in table.items()
        if model.engine == engine and (task_type in model.tasks if params is None else makes(model, task_type, params))
    ]
    fitting.sort(key=lambda name: not table[name].preferred)
    able = [name for name in fitting if params is None or not any(refusals(name, table[name], params))]
    return next(iter((*able, *fitting)), None)


def refusals(name: str, model: Model, params: Params) -> Iterator[Fault]:
    """Yield what the model cannot do of a task that it renders otherwise: the field of task_data, and why."""
    if model.engine != Engine.DIFFUSERS:
        return
    match params:
        case AudioParams() if params.text is None:
            if model.limits.seconds is not None and params.duration > model.limits.seconds:
                yield "duration", f"{name} makes at most {model.limits.seconds:g} s of sound, got {params.duration:g}"
        case AudioParams():
            if (language := params.language.lower().replace("_", "-").partition("-")[0]) not in model.languages:
                yield "language", f"{name} speaks {', '.join(model.languages)}, got {given(language)}"
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


def sound(table: dict[str, Model]) -> tuple[str, Model] | None:
    """Return the model that renders the sound of a clip, with its name: the default for sound without speech."""
    name = default(table, Engine.DIFFUSERS, PROCESS_AUDIO, AudioParams())
    return None if name is None else (name, table[name])


def resolve(table: dict[str, Model], choice: EngineChoice, had_gpu: bool, task_type: TaskType, params: Params) -> str:
    """Return the model for this task: the animatic for a draft, else `model`, else the default. Raises ValidationFailed."""
    if params.draft:
        if task_type not in table[ANIMATIC].tasks:
            raise refused([("task_data.draft", f"{task_type} has no animatic; leave draft out")])
        return ANIMATIC
    if params.model is not None:
        fitting = [name for name, model in table.items() if makes(model, task_type, params)]
        if params.model not in fitting:
            called = _called(task_type, params)
            raise refused([("task_data.model", f"expected a model for {called} ({', '.join(fitting)}), got {given(params.model)}")])
        return _able_model(table, params.model, task_type, params)
    if choice is EngineChoice.DIFFUSERS or (choice is EngineChoice.AUTO and had_gpu):
        name = default(table, Engine.DIFFUSERS, task_type, params)
        if name is None and choice is EngineChoice.DIFFUSERS:
            called = _called(task_type, params)
            raise refused([("task_type", f"MOVIEQ_ENGINE is diffusers, and no model renders {called}; add one, or send draft")])
        if name is not None:
            return _able_model(table, name, task_type, params)
    for name in (ANIMATIC, *table):
        if makes(table[name], task_type, params) and table[name].engine != Engine.DIFFUSERS:
            return name
    raise refused([("task_type", f"{_called(task_type, params)} has no default model here; set task_data.model")])


def _able_model(table: dict[str, Model], name: str, task_type: TaskType, params: Params) -> str:
    """Return the name of the model. Raises ValidationFailed with all that it cannot do of the task, and with the models that can."""
    if not (found := list(refusals(name, table[name], params))):
        return name
    able = [other for other, model in table.items() if makes(model, task_type, params) and not any(refusals(other, model, params))]
    advice = f"; or set task_data.model to one of {', '.join(able)}" if able else ""
    raise refused([(f"task_data.{field}", f"{why}{advice}") for field, why in found])


def _called(task_type: TaskType, params: Params) -> str:
    if isinstance(params, AudioParams):
        return f"{task_type} with text" if params.text is not None else f"{task_type} without text"
    return task_type


def batch(name: str, model: Model, params: Params) -> tuple[str, int]:
    """Return the key of the tasks that can share a call of the model with this one, and how many can; "" and 1 if none can.

    The key has everything for which a call takes one value: size, steps, guidance. Only pictures from text alone are batched, and never
    with a step cache: it decides for the whole batch, so that a picture would depend on its neighbours.
    """
    if not isinstance(params, ImageParams) or params.references or model.engine != Engine.DIFFUSERS or model.first_block_cache is not None:
        return "", 1
    width, height = size(params.resolution)
    rows = next((rows for pixels, rows in sorted(model.limits.batch) if width * height <= pixels), 1)
    if rows == 1:
        return "", 1
    return f"{name}|{params.resolution}|{params.steps}|{params.guidance_scale}|{params.negative_prompt is not None}", rows


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
    used = [(name, table[name]), *([sound_under] if sound_under else [])]
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
    match params:
        case VideoParams() | AnimationParams():
            return f"{task_type}|{model}|{params.resolution}|{frames(params)}|{params.steps}"
        case ImageParams():
            return f"{task_type}|{model}|{params.resolution}|{params.format}|{params.steps}"
        case AudioParams():
            return f"{task_type}|{model}|{len(params.text or '') // 200}|{params.duration if params.text is None else ''}"
    return f"{task_type}|{model}"
