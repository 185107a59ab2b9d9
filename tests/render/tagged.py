"""Small files of every format, with tags, and how to read the tags."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
from PIL import Image

from movieq.models.table import Model
from movieq.tasks.params import AudioFormat, ImageFormat
from workers.child.job import Flag, Job
from workers.child.media import encode
from workers.protocol import Run

PROMPT = "A <weary> keeper & his lamp, in Besançon"
REVISION = "0123456789abcdef0123456789abcdef01234567"
MODEL = msgspec.convert(
    {
        "engine": "diffusers",
        "kind": "gpu_heavy",
        "tasks": {"generate_image": 1.0},
        "weights": {"repository": "team/model", "revision": REVISION},
    },
    Model,
)
FORMATS = [*ImageFormat, *AudioFormat, "mp4"]
NOISE = np.random.default_rng(1).normal(0, 0.1, (48_000, 2)).astype(np.float32)
PICTURE = Image.effect_noise((64, 64), 40).convert("RGB")


def job(folder: Path, task_type: str = "generate_image", *, model: Model | None = None, file_tags: bool = True, **params: Any) -> Job:
    """Return a job of the animatic, or of a model."""
    engine, name = ("animatic", "animatic") if model is None else ("diffusers", "some-model")
    inputs = {reference: str(folder / "still.png") for reference in params.get("storyboard_images", [])}
    run = Run("run", "task-1", "film", task_type, engine, name, params, {}, inputs, 7, str(folder), model, file_tags=file_tags)
    return Job(run, lambda message: None, Flag())


def write(path: Path, kind: str, tags: encode.Tags) -> None:
    """Write a small file of this format."""
    if kind in list(ImageFormat):
        encode.write_image(path, PICTURE, ImageFormat(kind), tags)
    elif kind in list(AudioFormat):
        encode.write_sound(path, NOISE, 48_000, AudioFormat(kind), tags, lambda done, of: None)
    else:
        with encode.ClipWriter(path, encode.ClipFormat((64, 64), Fraction(24), 24), tags) as writer:
            for _ in range(24):
                writer.add(encode.to_planes(PICTURE))


def tags_of(path: Path) -> dict[str, str]:
    """Return the tags of a file by their names."""
    if path.suffix.removeprefix(".") in list(ImageFormat):
        with Image.open(path) as image:
            image.load()
            packet = image.info["xmp"]
        root = ElementTree.fromstring(packet)
        texts = {each.tag.rpartition("}")[2]: each.text or "" for each in root.iter()}
        assert texts.pop("DigitalSourceType") == f"http://cv.iptc.org/newscodes/digitalsourcetype/{texts['source']}"
        return {name: text for name, text in texts.items() if name in encode.Tags.__struct_fields__}
    with av.open(str(path)) as container:
        comment = {key.lower(): value for key, value in container.metadata.items()}["comment"]
    return {name: str(value) for name, value in msgspec.json.decode(comment).items()}
