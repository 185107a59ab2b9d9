"""What other packages add: task types, engines, entries of the model table.

A plug-in is an installed package with an entry point of the group `movieq.plugins`, which names a `Plugin`:

    [project.entry-points."movieq.plugins"]
    palettes = "movieq_palettes:plugin"

Each process of movieq loads them when it starts: the package must be installed where the API runs and where the workers do.
"""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import Any, Final

import msgspec

from movieq.errors import SettingsError
from movieq.tasks.registry import LONGEST_S, REGISTRY, TaskSpec
from movieq.tasks.states import TaskType

GROUP: Final = "movieq.plugins"

_NAME: Final = re.compile("[a-z][a-z0-9_]{0,63}")


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """What a package adds.

    `engines`: name -> the module that has `make(take: Take) -> Made` (`workers.child.job`). `models`: entries as in `models.toml`, which
    say by which engine a type is made, in which queue it waits and how long it takes.
    """

    task_types: dict[str, TaskSpec] = {}
    engines: dict[str, str] = {}
    models: dict[str, dict[str, Any]] = {}


def load() -> list[str]:
    """Every plug-in that is installed here is in force: their names. Raises SettingsError naming the one that cannot be used."""
    names = []
    for point in entry_points(group=GROUP):
        try:
            plugin = point.load()
        except Exception as error:  # whatever a package of somebody else does when it is imported
            raise SettingsError(f"the plug-in {point.name} ({point.value}) cannot be loaded: {type(error).__name__}: {error}") from error
        if not isinstance(plugin, Plugin):
            raise SettingsError(f"the plug-in {point.name} ({point.value}) is no movieq.plugins.Plugin")
        _add(point.name, plugin)
        names.append(point.name)
    return names


def _add(name: str, plugin: Plugin) -> None:
    places = [part for new in plugin.task_types.values() for part in (new.folder, new.media_type)]
    for each in (*plugin.task_types, *plugin.engines, *places):
        if not _NAME.fullmatch(each):
            raise SettingsError(f"the plug-in {name}: {each!r} is no name: {_NAME.pattern} is expected")
    for each, spec in plugin.task_types.items():
        known = REGISTRY.tasks.get(TaskType(each))
        if known is not None and known.params is not spec.params:
            raise SettingsError(f"the plug-in {name}: there is a task type {each} already")
        REGISTRY.tasks[TaskType(each)] = msgspec.structs.replace(spec, max_duration_s=min(spec.max_duration_s, LONGEST_S))
    REGISTRY.engines.update(plugin.engines)
    REGISTRY.models[name] = plugin.models
