"""The model table: which models there are, what each makes, in which queue its tasks wait. Knows no torch."""

from __future__ import annotations

import hashlib
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

import movieq
from movieq.errors import SettingsError, ValidationFailed
from movieq.tasks.params import AnimationParams, AudioParams, ImageParams, Params, VideoParams, frames, size
from movieq.tasks.states import EngineChoice, Kind, TaskType

ANIMATIC: Final = "animatic"
IMMUTABLE: Final = ("upload:", "task:", "data:")
"""How references begin behind which there is always the same file."""
ENGINES: Final[dict[str, str]] = {"animatic": "workers.child.animatic.engine", "diffusers": "workers.child.diffusion.engine"}
"""Engine -> the module with its `render`, which the engine process imports; plug-ins add theirs."""
PREVIEW_VAE: Final = "preview_vae"
"""A component that only previews are decoded by, an AutoencoderTiny: sharper than the map of colours that is fitted to every VAE."""
EXTRA: Final[dict[str, dict[str, Any]]] = {}
"""Entries of plug-ins, as they would stand in the file."""


class Engine(StrEnum):
    """What runs a model."""

    ANIMATIC = "animatic"
    DIFFUSERS = "diffusers"


class Dtype(StrEnum):
    """Of the weights while they work. A CPU has float32 alone: half precision is slower there, and some of it missing."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where weights come from: a repository of the hub at a commit, or a folder of this machine (its path, without a revision)."""

    repository: Annotated[str, Meta(min_length=1)]
    revision: Annotated[str, Meta(pattern="^[0-9a-f]{40}$")] | None = None
    subfolder: str = ""
    cls: str = ""
    """The class that loads a component; for a pipeline it is the entry's own."""
    variant: str | None = None


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a task that does not say is made with."""

    steps: Annotated[int, Meta(ge=1)] | None = None
    guidance: Annotated[float, Meta(ge=0)] | None = None
    strength: Annotated[float, Meta(gt=0, le=1)] | None = None
    """How far the result may leave an image that is only a reference."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model can make at all; `sides` and `frame_step`, `frame_first`: sides are multiples of it, frames are n * step + first."""

    sides: Annotated[int, Meta(ge=1)] = 8
    pixels: tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]] = (1, 4_000_000)
    """The fewest and the most pixels of a picture that come out well."""
    frame_step: Annotated[int, Meta(ge=1)] = 1
    frame_first: Annotated[int, Meta(ge=0)] = 0
    frames: Annotated[int, Meta(ge=1)] = 1
    """The most of one window."""
    fps: Annotated[float, Meta(gt=0)] = 24.0
    """What its movement was trained at."""
    seconds: Annotated[float, Meta(gt=0)] | None = None
    """The longest sound."""
    batch: list[tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=2, le=16)]]] = []
    """Up to how many pixels of a picture how many are made at once: [[262144, 8], [589824, 4]]."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the table. `tasks` maps what it can make to the seconds that this takes by default.

    Of what needs weights, `pipeline` is the class for a task without images and `image_pipeline` that for one with images, where it has
    one; both share their weights. `call` goes to every call of the pipeline as it stands.
    """

    engine: str
    """`animatic`, `diffusers`, or one that a plug-in brings."""
    kind: Kind
    tasks: dict[TaskType, Annotated[float, Meta(gt=0)]]
    weights: Weights | None = None
    components: dict[str, Weights] = {}
    pipeline: str | None = None
    image_pipeline: str | None = None
    dtype: Dtype = Dtype.FLOAT32
    scheduler: dict[str, Any] = {}
    """`cls` names the class, the rest changes its configuration."""
    call: dict[str, Any] = {}
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    first_block_cache: Annotated[float, Meta(gt=0)] | None = None
    """A threshold: steps whose first block changes less than this are skipped. Faster, and not the same picture."""
    languages: list[str] = []
    """What a speaking model speaks; the first subtags of BCP 47."""
    voices: bool = False
    """Whether it speaks with the voice of a sample."""
    gpu_memory_gb: Annotated[float, Meta(ge=0)] = 0.0
    licence: str = ""
    verified: bool = False
    """Whether a run on a GPU has loaded it."""


def load(path: str = "") -> dict[str, Model]:
    """The table: the shipped entries, those of plug-ins, over them those of the file at `path`. Raises SettingsError naming the entry."""
    shipped = Path(__file__).with_name("models.toml")
    table = _read(str(shipped), shipped)
    for name, entries in EXTRA.items():
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
        raise SettingsError(f"{name}: {error}") from None
    for each, model in table.items():
        if problem := _problem(model):
            raise SettingsError(f"{name}: {each}: {problem}")
    return table


def _problem(model: Model) -> str | None:
    """What makes an entry useless, though each field is well formed."""
    if model.engine not in ENGINES:
        return f"engine {model.engine!r} is not there; there are: {', '.join(ENGINES)}"
    if model.engine != Engine.DIFFUSERS:
        return None
    if model.weights is None:
        return "weights = { repository = ..., revision = ... } is needed"
    if model.pipeline is None and model.image_pipeline is None:
        return "pipeline or image_pipeline is needed: a class of diffusers or transformers"
    for weights in (model.weights, *model.components.values()):
        if weights.revision is None and not Path(weights.repository).is_absolute():
            return f"{weights.repository}: name the revision, a commit of 40 hex digits, or a folder by its whole path"
    if model.limits.batch and model.first_block_cache is not None:
        return "limits.batch: not together with first_block_cache, which decides over a whole batch"
    if model.limits.pixels[0] > model.limits.pixels[1]:
        return f"limits.pixels: the fewest come first, got {list(model.limits.pixels)}"
    return None


def makes(model: Model, task_type: TaskType, params: Params) -> bool:
    """Whether the model can make this task: a line wants one that speaks, and a sound one that does not."""
    if task_type not in model.tasks:
        return False
    if model.engine == Engine.DIFFUSERS and isinstance(params, AudioParams):
        return bool(model.languages) == (params.text is not None)
    return True


def default(table: dict[str, Model], engine: Engine, task_type: TaskType, params: Params | None = None) -> str | None:
    """The first model of the table by which the engine makes this task, or tasks of this type."""
    for name, model in table.items():
        if model.engine == engine and (task_type in model.tasks if params is None else makes(model, task_type, params)):
            return name
    return None


def sound(table: dict[str, Model]) -> tuple[str, Model] | None:
    """What makes the sound under a picture: the default for sound without speech."""
    name = default(table, Engine.DIFFUSERS, TaskType.PROCESS_AUDIO, AudioParams())
    return None if name is None else (name, table[name])


def resolve(table: dict[str, Model], choice: EngineChoice, had_gpu: bool, task_type: TaskType, params: Params) -> str:
    """The model that makes this task: draft, else `model`, else the default of the installation. Raises ValidationFailed."""
    if params.draft:
        if task_type not in table[ANIMATIC].tasks:
            raise ValidationFailed(f"task_data.draft: there is no animatic of {task_type}; leave draft out")
        return ANIMATIC
    if params.model is not None:
        fitting = [name for name, model in table.items() if makes(model, task_type, params)]
        if params.model not in fitting:
            message = f"{params.model!r} cannot be used for {_called(task_type, params)}; there are: {', '.join(fitting)}"
            raise ValidationFailed(f"task_data.model: {message}", errors=(("task_data.model", message),))
        return params.model
    if choice is EngineChoice.DIFFUSERS or (choice is EngineChoice.AUTO and had_gpu):
        name = default(table, Engine.DIFFUSERS, task_type, params)
        if name is None and choice is EngineChoice.DIFFUSERS:
            raise ValidationFailed(
                f"task_type: MOVIEQ_ENGINE is diffusers, and no model of the table makes {_called(task_type, params)}; "
                "add one, or send draft"
            )
        if name is not None:
            return name
    for name in (ANIMATIC, *table):
        if makes(table[name], task_type, params) and table[name].engine != Engine.DIFFUSERS:
            return name
    raise ValidationFailed(f"task_type: no model of the table makes {_called(task_type, params)} without being named; name one as model")


def _called(task_type: TaskType, params: Params) -> str:
    if isinstance(params, AudioParams):
        return f"{task_type} with text" if params.text is not None else f"{task_type} without text"
    return task_type


def batch(name: str, model: Model, params: Params) -> tuple[str, int]:
    """The key of the tasks that can be made with this one in one call of the model, and how many at most; "" and 1 where none can.

    All that a call has one value for is in the key: pictures of one size, from words alone, by as many steps and as much guidance. Never
    with a cache that skips steps: it decides over the whole batch, and a row would differ.
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
    """Names what a task makes: two of one project with the same make the same. `options`: what else of this installation its files hang on.

    None where they need not: without a seed, with references or weights that can change, by an engine of a plug-in.
    """
    if params.seed is None:
        return None
    sound_under = sound(table) if isinstance(params, VideoParams) and params.audio_cues else None
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
    """Names the tasks that take about as long as this one."""
    match params:
        case VideoParams() | AnimationParams():
            return f"{task_type}|{model}|{params.resolution}|{frames(params)}|{params.steps}"
        case ImageParams():
            return f"{task_type}|{model}|{params.resolution}|{params.format}|{params.steps}"
        case AudioParams():
            return f"{task_type}|{model}|{len(params.text or '') // 200}|{params.duration if params.text is None else ''}"
    return f"{task_type}|{model}"
