"""A plug-in: the colours of a scene as a strip of fields, by an engine of its own."""

import hashlib
from typing import Annotated

from msgspec import Meta
from PIL import Image

from movieq.plugins import Plugin
from movieq.tasks.params import Params
from movieq.tasks.registry import TaskSpec
from workers.child.job import Made, Take
from workers.child.media import metadata
from workers.protocol import Produced, Stage


class PaletteParams(Params, frozen=True, kw_only=True):
    """`make_palette`: a description becomes the colours of its scene."""

    colours: Annotated[int, Meta(ge=1, le=16)] = 5


def make(take: Take) -> Made:
    """A png of as many fields as there are to be colours."""
    assert isinstance(take.params, PaletteParams)
    take.plan(Stage("mix", "mixing_colours", 1.0))
    strip = Image.new("RGB", (64 * take.params.colours, 64))
    for number in range(take.params.colours):
        digest = hashlib.sha256(f"{take.params.description} {take.seed} {number}".encode()).digest()
        strip.paste((digest[0], digest[1], digest[2]), (64 * number, 0, 64 * number + 64, 64))
        take.step("mix", number + 1, take.params.colours)
    strip.save(path := take.out_dir / "output.png")
    return Made((Produced(str(path), "output", "image/png", *strip.size),), metadata.metadata(take, "png", strip.size))


plugin = Plugin(
    task_types={"make_palette": TaskSpec(params=PaletteParams, folder="palettes", media_type="palette")},
    engines={"palettes": "movieq_palettes"},
    models={"palettes": {"engine": "palettes", "kind": "cpu_intensive", "tasks": {"make_palette": 1}}},
)
