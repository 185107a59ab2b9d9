"""A plug-in with an engine of its own: the colours of a scene as a strip of swatches."""

import hashlib
from typing import Annotated

from msgspec import Meta
from PIL import Image

from movieq.plugins import Plugin
from movieq.tasks.params import Params
from movieq.tasks.registry import TaskSpec
from workers.child.job import Job, Output
from workers.child.media.metadata import result_metadata
from workers.protocol import Produced, Stage


class PaletteParams(Params, frozen=True, kw_only=True):
    """`make_palette`: a description becomes the colours of its scene."""

    colours: Annotated[int, Meta(ge=1, le=16)] = 5


def render(job: Job) -> Output:
    """Render a png with one swatch for each colour."""
    assert isinstance(job.params, PaletteParams)
    job.plan(Stage("mix", "mixing_colours", 1.0))
    strip = Image.new("RGB", (64 * job.params.colours, 64))
    for number in range(job.params.colours):
        digest = hashlib.sha256(f"{job.params.description} {job.seed} {number}".encode()).digest()
        strip.paste((digest[0], digest[1], digest[2]), (64 * number, 0, 64 * number + 64, 64))
        job.step("mix", number + 1, job.params.colours)
    strip.save(path := job.out_dir / "output.png")
    return Output((Produced(str(path), "output", "image/png", *strip.size),), result_metadata(job, "png", strip.size))


plugin = Plugin(
    task_types={"make_palette": TaskSpec(params=PaletteParams, folder="palettes", media_type="palette")},
    engines={"palettes": "movieq_palettes"},
    models={"palettes": {"engine": "palettes", "kind": "cpu_intensive", "tasks": {"make_palette": 1}}},
)
