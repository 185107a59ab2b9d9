"""Every parameter of a task changes what a model renders, or a warning names it: nothing is ignored silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from tests.engines.conftest import ENTRIES, SPEAKERS, Studio, task_of
from tests.engines.test_diffusion import FIRST, SECOND, asked, pytestmark, with_images  # noqa: F401  # the same libraries

COMMON: Final[dict[str, Any]] = {"negative_prompt": "fog", "steps": 2, "guidance_scale": 13.0}
PARAMETERS: Final[dict[str, dict[str, Any]]] = {
    "generate_image": {**COMMON, "pose": "kneeling", "lighting": "moonlight", "style_guide": SECOND, "reference_images": [SECOND]},
    "generate_video": {
        **COMMON,
        "camera_angle": "dolly in",
        "lighting": "moonlight",
        "character_positions": ["the keeper, left"],
        "storyboard_images": [FIRST, SECOND],
    },
    "render_animation": {**COMMON, "motion": "walk", "loop": True},
    "process_audio": {**COMMON, "duration": 1},
    "speech": {"emotion": "sad", "pace": "slow", "background_noise": "rain"},
}


def parameters(name: str) -> dict[str, Any]:
    """Return the parameters to try with a model, without the images that it refuses."""
    found = PARAMETERS["speech" if name in SPEAKERS else task_of(name)]
    return {each: value for each, value in found.items() if not each.endswith("_images") or "image_pipeline" in ENTRIES[name]}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_parameter_changes_the_result_or_is_named_in_a_warning(studio: Studio, stills: dict[str, Path], name: str) -> None:
    task = {**asked(name), **with_images(name)}
    before = studio.render(name, stills, **task)
    for parameter, value in parameters(name).items():
        after = studio.render(name, stills, **{**task, parameter: value})
        warned = any(f"{parameter} is not used" in each for each in after.output.metadata.get("warnings", []))
        same = after.decoded.shape == before.decoded.shape and bool((after.decoded == before.decoded).all())
        assert same == warned, (parameter, after.output.metadata.get("warnings"))
