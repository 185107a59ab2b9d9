"""What can be asked for in this process: the task types, the engines that render them, and models that plug-ins bring.

movieq's own entries stand here; `movieq.plugins` adds those of other packages when a process starts, before anything is opened.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from movieq.tasks.params import AnimationParams, AudioParams, ImageParams, Params, VideoParams
from movieq.tasks.states import GENERATE_IMAGE, GENERATE_VIDEO, PROCESS_AUDIO, RENDER_ANIMATION, TaskType

LONGEST_S: Final = 300 * 60
"""No run of any task may take longer."""


class TaskSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A task type. `params` says what its task_data may hold; clients see the docstring of that class, `name: what becomes of what`."""

    params: type[Params]
    max_duration_s: int = 30 * 60
    """The longest that one run may take."""
    folder: str = "other"
    """The folder of the storage that its results lie in."""
    media_type: str = "file"
    """What its result is called in the API and in the CMS."""
    image_field: str = ""
    """The field of task_data that takes pictures; empty where none does."""

    @property
    def description(self) -> str:
        """Return the sentence for clients."""
        return (self.params.__doc__ or "").partition(": ")[2]


class Registry(msgspec.Struct, frozen=True):
    """The task types by name, the engines (name -> module for the engine process to import), and model entries by plug-in."""

    tasks: dict[TaskType, TaskSpec]
    engines: dict[str, str]
    models: dict[str, dict[str, Any]]


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
    models={},
)
