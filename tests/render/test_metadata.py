"""The tags of files: what a file is and, unless a setting forbids it, its prompt, seed and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from movieq import __version__
from tests.render.tagged import FORMATS, MODEL, PICTURE, PROMPT, REVISION, job, tags_of, write
from workers.child.animatic import engine as animatic
from workers.child.media.metadata import file_tags


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_any_format_says_how_it_was_made(tmp_path: Path, kind: str) -> None:
    rendered = job(tmp_path, model=MODEL, prompt=PROMPT)
    write(path := tmp_path / f"output.{kind}", kind, file_tags(rendered, "Image"))
    assert tags_of(path) == {
        "title": "Image", "engine": "diffusers", "version": __version__, "source": "trainedAlgorithmicMedia", "prompt": PROMPT,
        "seed": "7", "model": "some-model", "revision": REVISION, "task": "task-1",
    }  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_where_tags_are_off_a_file_says_what_it_is_and_not_how_it_was_made(tmp_path: Path, kind: str) -> None:
    rendered = job(tmp_path, model=MODEL, prompt="Marrakesh by night", file_tags=False)
    write(path := tmp_path / f"output.{kind}", kind, file_tags(rendered, "Image"))
    assert tags_of(path) == {"title": "Image", "engine": "diffusers", "version": __version__, "source": "trainedAlgorithmicMedia"}
    assert not [word for word in (b"Marrakesh", b"some-model", REVISION.encode(), b"task-1") if word in path.read_bytes()]


def test_a_png_says_it_in_text_too(tmp_path: Path) -> None:
    write(path := tmp_path / "output.png", "png", file_tags(job(tmp_path, model=MODEL, prompt=PROMPT), "Image"))
    with Image.open(path) as image:
        image.load()
        texts = {str(key): str(value) for key, value in image.info.items()}
    assert (texts["Title"], texts["Description"], texts["Software"]) == ("Image", PROMPT, f"movieq {__version__}")
    assert msgspec.json.decode(texts["Comment"])["revision"] == REVISION


@pytest.mark.parametrize("stills", [[], ["https://cdn.example/a.png"]])
def test_an_animatic_is_drawn_by_formulas_and_with_stills_a_composite(tmp_path: Path, stills: list[str]) -> None:
    PICTURE.save(tmp_path / "still.png")
    small: dict[str, Any] = {"scene_description": "A lamp", "duration": 1, "fps": 4, "resolution": "64x64"}
    rendered = animatic.render(job(tmp_path, "generate_video", storyboard_images=stills, **small))
    source = "composite" if stills else "algorithmicMedia"
    assert rendered.metadata["digital_source_type"] == source
    for produced in rendered.files:
        path = Path(produced.path)
        tags = tags_of(path.rename(path.with_suffix(".jpeg"))) if path.suffix == ".jpg" else tags_of(path)
        assert (tags["title"], tags["source"]) == ("Animatic", source)
