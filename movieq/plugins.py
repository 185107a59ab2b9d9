"""Plug-ins: task types, engines and model table entries that other packages add.

A plug-in is an installed package with an entry point in the group `movieq.plugins` that refers to a `Plugin`:

    [project.entry-points."movieq.plugins"]
    palettes = "movieq_palettes:plugin"

Each movieq process loads the plug-ins when it starts, so install the package on the API's machine and on every worker.
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
    """The additions of a package.

    `engines`: name -> module that defines `render(job: Job) -> Output` (see `workers.child.job`). `adapters`: name -> "module:Class", a
    subclass of `workers.child.diffusion.adapters.Adapter`. `models`: entries as in `models.toml`; each names the engine, the queue and the
    expected seconds for a task type.
    """

    task_types: dict[str, TaskSpec] = {}
    engines: dict[str, str] = {}
    adapters: dict[str, str] = {}
    models: dict[str, dict[str, Any]] = {}


def load() -> list[str]:
    """Register all installed plug-ins; return their names. Raises SettingsError naming a plug-in that cannot be used."""
    names = []
    for point in entry_points(group=GROUP):
        try:
            plugin = point.load()
        except Exception as error:  # importing someone else's package may raise anything
            raise SettingsError(f"the plug-in {point.name} ({point.value}) cannot be loaded: {type(error).__name__}: {error}") from error
        if not isinstance(plugin, Plugin):
            raise SettingsError(f"the plug-in {point.name} ({point.value}) is not a movieq.plugins.Plugin")
        _add(point.name, plugin)
        names.append(point.name)
    return names


def _add(name: str, plugin: Plugin) -> None:
    places = [part for new in plugin.task_types.values() for part in (new.folder, new.media_type)]
    for each in (*plugin.task_types, *plugin.engines, *plugin.adapters, *places):
        if not _NAME.fullmatch(each):
            raise SettingsError(f"the plug-in {name}: {each!r} is not a valid name: use up to 64 of a-z, 0-9 and _, a letter first")
    for each, spec in plugin.task_types.items():
        known = REGISTRY.tasks.get(TaskType(each))
        if known is not None and known.params is not spec.params:
            raise SettingsError(f"the plug-in {name}: the task type {each} already exists")
        REGISTRY.tasks[TaskType(each)] = msgspec.structs.replace(spec, max_duration_s=min(spec.max_duration_s, LONGEST_S))
    REGISTRY.engines.update(plugin.engines)
    REGISTRY.adapters.update(plugin.adapters)
    REGISTRY.models[name] = plugin.models
