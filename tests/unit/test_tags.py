"""What files say about themselves: what they are and, unless a setting keeps that out, by which prompt, seed and model they were made."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
from PIL import Image

from movieq import __version__
from movieq.models.table import Model
from movieq.tasks.params import AudioFormat, ImageFormat
from workers.child.animatic import engine as animatic
from workers.child.job import Flag, Made, Take
from workers.child.media import encode, metadata
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


def take(folder: Path, task_type: str = "generate_image", *, model: Model | None = None, file_tags: bool = True, **params: Any) -> Take:
    """A run of the animatic, or of a model."""
    engine, name = ("animatic", "animatic") if model is None else ("diffusers", "some-model")
    inputs = {reference: str(folder / "still.png") for reference in params.get("storyboard_images", [])}
    run = Run("run", "task-1", "film", task_type, engine, name, params, {}, inputs, 7, str(folder), model, file_tags=file_tags)
    return Take(run, lambda message: None, Flag())


def written(path: Path, kind: str, tags: encode.Tags) -> None:
    """A small file of this kind."""
    if kind in list(ImageFormat):
        encode.write_image(path, PICTURE, ImageFormat(kind), tags)
    elif kind in list(AudioFormat):
        encode.write_sound(path, NOISE, 48_000, AudioFormat(kind), tags, lambda done, of: None)
    else:
        with encode.Clip(path, encode.Format((64, 64), Fraction(24), 24), tags) as clip:
            for _ in range(24):
                clip.add(encode.planes(PICTURE))


def told(path: Path) -> dict[str, str]:
    """What the file says, by the names of its tags."""
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


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_any_format_says_how_it_was_made(tmp_path: Path, kind: str) -> None:
    made = take(tmp_path, model=MODEL, prompt=PROMPT)
    written(path := tmp_path / f"output.{kind}", kind, metadata.tags(made, "Image"))
    assert told(path) == {
        "title": "Image", "engine": "diffusers", "version": __version__, "source": "trainedAlgorithmicMedia", "prompt": PROMPT,
        "seed": "7", "model": "some-model", "revision": REVISION, "task": "task-1",
    }  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_where_tags_are_off_a_file_says_what_it_is_and_not_how_it_was_made(tmp_path: Path, kind: str) -> None:
    made = take(tmp_path, model=MODEL, prompt="Marrakesh by night", file_tags=False)
    written(path := tmp_path / f"output.{kind}", kind, metadata.tags(made, "Image"))
    assert told(path) == {"title": "Image", "engine": "diffusers", "version": __version__, "source": "trainedAlgorithmicMedia"}
    assert not [word for word in (b"Marrakesh", b"some-model", REVISION.encode(), b"task-1") if word in path.read_bytes()]


def test_a_png_says_it_in_text_too(tmp_path: Path) -> None:
    written(path := tmp_path / "output.png", "png", metadata.tags(take(tmp_path, model=MODEL, prompt=PROMPT), "Image"))
    with Image.open(path) as image:
        image.load()
        texts = {str(key): str(value) for key, value in image.info.items()}
    assert (texts["Title"], texts["Description"], texts["Software"]) == ("Image", PROMPT, f"movieq {__version__}")
    assert msgspec.json.decode(texts["Comment"])["revision"] == REVISION


@pytest.mark.parametrize("stills", [[], ["https://cdn.example/a.png"]])
def test_an_animatic_is_drawn_by_formulas_and_with_stills_a_composite(tmp_path: Path, stills: list[str]) -> None:
    PICTURE.save(tmp_path / "still.png")
    small: dict[str, Any] = {"scene_description": "A lamp", "duration": 1, "fps": 4, "resolution": "64x64"}
    made: Made = animatic.make(take(tmp_path, "generate_video", storyboard_images=stills, **small))
    source = "composite" if stills else "algorithmicMedia"
    assert made.metadata["digital_source_type"] == source
    for produced in made.files:
        path = Path(produced.path)
        said = told(path.rename(path.with_suffix(".jpeg"))) if path.suffix == ".jpg" else told(path)
        assert (said["title"], said["source"]) == ("Animatic", source)
