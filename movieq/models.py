"""The model table: which models there are, what each makes, in which queue its tasks wait. Knows no torch."""

from __future__ import annotations

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from movieq.contracts import Kind
from movieq.errors import SettingsError, ValidationFailed
from movieq.params import AnimationParams, AudioParams, ImageParams, Params, TaskType, VideoParams, frames
from movieq.settings import EngineChoice

ANIMATIC: Final = "animatic"


class Engine(StrEnum):
    """What runs a model."""

    ANIMATIC = "animatic"
    DIFFUSERS = "diffusers"


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the table. `tasks` maps what it can make to the seconds that this takes by default."""

    engine: Engine
    kind: Kind
    tasks: dict[TaskType, Annotated[float, Meta(gt=0)]]


def load(path: str = "") -> dict[str, Model]:
    """The table: the shipped entries, and those of the file at `path` over them. Raises SettingsError naming the entry."""
    table: dict[str, Model] = {}
    for file in [Path(__file__).with_name("models.toml"), *([Path(path)] if path else [])]:
        try:
            table |= msgspec.convert(tomllib.loads(file.read_text()), dict[str, Model])
        except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
            raise SettingsError(f"MOVIEQ_MODELS: {file}: {error}") from None
    return table


def default(table: dict[str, Model], engine: Engine, task_type: TaskType) -> str | None:
    """The first model of the table by which the engine makes this type."""
    return next((name for name, model in table.items() if model.engine is engine and task_type in model.tasks), None)


def resolve(table: dict[str, Model], choice: EngineChoice, had_gpu: bool, task_type: TaskType, params: Params) -> str:
    """The model that makes this task: draft, else `model`, else the default of the installation. Raises ValidationFailed."""
    if params.draft:
        return ANIMATIC
    if params.model is not None:
        fitting = [name for name, model in table.items() if task_type in model.tasks]
        if params.model not in fitting:
            message = f"{params.model!r} cannot be used for {task_type}; there are: {', '.join(fitting)}"
            raise ValidationFailed(f"task_data.model: {message}", errors=(("task_data.model", message),))
        return params.model
    if choice is EngineChoice.DIFFUSERS or (choice is EngineChoice.AUTO and had_gpu):
        name = default(table, Engine.DIFFUSERS, task_type)
        if name is None and choice is EngineChoice.DIFFUSERS:
            raise ValidationFailed(
                f"task_type: MOVIEQ_ENGINE is diffusers, and no model of the table makes {task_type}; add one, or send draft"
            )
        return name or ANIMATIC
    return ANIMATIC


def shape(model: str, task_type: TaskType, params: Params) -> str:
    """Names the tasks that take about as long as this one."""
    match params:
        case VideoParams() | AnimationParams():
            return f"{task_type}|{model}|{params.resolution}|{frames(params)}|{params.steps}"
        case ImageParams():
            return f"{task_type}|{model}|{params.resolution}|{params.format}|{params.steps}"
        case AudioParams():
            return f"{task_type}|{model}|{len(params.text or '') // 200}|{params.duration if params.text is None else ''}"
    raise AssertionError(task_type)
