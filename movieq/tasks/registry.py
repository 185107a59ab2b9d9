"""The task types that this process knows, the engines that render them, and the models of plug-ins.

The entries of movieq itself are below; `movieq.plugins` adds those of other packages when a process starts.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from movieq.tasks.params import AnimationParams, AudioParams, ImageParams, Params, VideoParams
from movieq.tasks.states import GENERATE_IMAGE, GENERATE_VIDEO, PROCESS_AUDIO, RENDER_ANIMATION, TaskType

LONGEST_S: Final = 300 * 60
"""Longest run of any task, in seconds."""


class TaskSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A task type. `params` is the class of its task_data; the part of its docstring after the colon describes the task type to clients."""

    params: type[Params]
    max_duration_s: int = 30 * 60
    """Longest run, in seconds."""
    folder: str = "other"
    """Folder of its results in the storage."""
    media_type: str = "file"
    """Media type of its result in the API and in the CMS."""
    image_field: str = ""
    """The field of task_data that holds images; empty if there is none."""

    @property
    def description(self) -> str:
        """Return the description for clients."""
        return (self.params.__doc__ or "").partition(": ")[2]


class Registry(msgspec.Struct, frozen=True):
    """Task types, engines and adapters by name, and model entries by plug-in.

    An engine is the module that the engine process imports, an adapter is a class as "module:Class".
    """

    tasks: dict[TaskType, TaskSpec]
    engines: dict[str, str]
    adapters: dict[str, str]
    models: dict[str, dict[str, Any]]


_SPEECH: Final = {"csm": "Csm", "vits": "Vits"}
_ADAPTERS: Final = {"diffusers": "Adapter", "ltx": "Ltx", "ltx2": "Ltx2", "qwen-edit": "QwenEdit", "vace": "Vace", **_SPEECH}
SPEAKS: Final = {name: name in _SPEECH for name in _ADAPTERS}
"""Whether each adapter of movieq is for speech. Of those of plug-ins, it is known when they are imported."""
REGISTRY: Final = Registry(
    tasks={
        GENERATE_VIDEO: TaskSpec(
            params=VideoParams, max_duration_s=LONGEST_S, folder="video", media_type="video_segment", image_field="storyboard_images"
        ),
        GENERATE_IMAGE: TaskSpec(params=ImageParams, folder="image", media_type="character_design", image_field="reference_images"),
        PROCESS_AUDIO: TaskSpec(params=AudioParams, folder="audio", media_type="dialogue_audio"),
        RENDER_ANIMATION: TaskSpec(
            params=AnimationParams, max_duration_s=LONGEST_S, folder="video", media_type="video_segment", image_field="reference_images"
        ),
    },
    engines={"animatic": "workers.child.animatic.engine", "diffusers": "workers.child.diffusion.engine"},
    adapters={name: f"workers.child.diffusion.adapters:{cls}" for name, cls in _ADAPTERS.items()},
    models={},
)
