"""What a model is told: the rules by which the fields of a task become one text."""

from __future__ import annotations

from typing import Any

import pytest

from movieq.tasks.params import convert
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import TaskType
from workers.child.diffusion.prompts import prompt


@pytest.mark.parametrize(
    ("task_type", "task_data", "text"),
    [
        ("generate_image", {"prompt": "a lighthouse"}, "a lighthouse."),
        ("generate_image", {"prompt": "a lighthouse", "character_description": "An old keeper."}, "An old keeper."),
        ("generate_image", {"prompt": "A keeper", "pose": "leaning on the rail", "lighting": "moonlight"},
         "A keeper. Pose: leaning on the rail. Lighting: moonlight."),
        ("generate_video",
         {"scene_description": "The lamp is lit!", "camera_angle": "dolly in", "lighting": "moonlight",
          "character_positions": ["the keeper, left", {"name": "a gull", "position": "on the rail", "mirrored": True, "extra": {"x": 1}}]},
         "The lamp is lit! Camera: dolly in. Lighting: moonlight. In the picture: the keeper, left; a gull, on the rail, True."),
        ("render_animation", {"prompt": "a gull", "motion": "flies off", "loop": True}, "a gull. Motion: flies off."),
        ("process_audio", {"prompt": "rain on a tin roof", "background_noise": "wind"}, "rain on a tin roof."),
        ("generate_video", {"prompt": "  a lamp  ", "camera_angle": " ", "lighting": ""}, "a lamp."),
        ("generate_image", {"reference_images": ["https://a.example/a.png"]}, ""),
    ],
)  # fmt: skip
def test_fields_become_sentences_in_an_order_that_never_changes(task_type: str, task_data: dict[str, Any], text: str) -> None:
    assert prompt(convert(REGISTRY.tasks[TaskType(task_type)].params, task_data)) == text
