"""A prompt that a model has read before is not read again, and nobody can tell by the result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engines.conftest import ENTRIES, IMAGES, SPEAKERS, Studio
from workers.child.diffusion import model_cache, prompt_cache
from workers.child.diffusion.prompt_cache import Embeddings

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

READERS = [name for name in ENTRIES if name not in SPEAKERS]
FIRST = "https://a.example/0.png"


def asked(studio: Studio, name: str, prompt: str = "a lighthouse") -> dict[str, Any]:
    """A small task with these words."""
    if name == "stable_audio":
        return {"prompt": prompt, "duration": 1, "output_format": "wav"}
    task = {"prompt": prompt, "resolution": "64x64", "entry": studio.entry(name, limits={**ENTRIES[name]["limits"], "pixels": [1, 1024]})}
    if name in IMAGES:
        return {**task, "format": "png"}
    return {**task, "duration": 1, "fps": 12, **({} if "pipeline" in ENTRIES[name] else {"storyboard_images": [FIRST]})}


@contextmanager
def read(studio: Studio, name: str) -> Iterator[list[str]]:
    """The text encoders of the model that work within the block."""
    take = studio.take(name, print, **asked(studio, name))
    assert take.run.entry
    loaded = model_cache.get(take, name, take.run.entry, "cpu")
    found: list[str] = []
    hooks = []
    for part, module in (loaded.pipe or loaded.image_pipe).components.items():
        if part.startswith("text_encoder") and isinstance(module, nn.Module):
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: found.append(part)))
    assert hooks
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", READERS)
def test_the_same_words_are_encoded_once_and_give_the_same_bytes(studio: Studio, stills: dict[str, Path], name: str) -> None:
    task = asked(studio, name)
    with read(studio, name) as first:
        fresh = studio.make(name, stills, **task)
    assert first
    with read(studio, name) as again:
        known = studio.make(name, stills, **task)
    assert again == []
    assert known.path.read_bytes() == fresh.path.read_bytes()
    assert known.stages == fresh.stages, "the stage is there, and over at once"
    with read(studio, name) as other:
        studio.make(name, stills, **asked(studio, name, "a storm"))
    assert other


def test_how_long_reading_takes_is_learnt_of_what_is_new(studio: Studio) -> None:
    studio.make("sd", **asked(studio, "sd"))
    took = model_cache.seconds("sd")["encode"]
    studio.make("sd", **asked(studio, "sd"))
    assert model_cache.seconds("sd")["encode"] == took


def test_what_a_task_does_to_its_tensors_does_not_reach_the_next() -> None:
    known = Embeddings()
    count = itertools.count()

    def encode(prompt: str) -> tuple[torch.Tensor, list[torch.Tensor], None]:
        next(count)
        return torch.ones(2, 3), [torch.zeros(2)], None

    for harm in range(3):
        (first, (second,), nothing), knew = known.of(encode, ("a lamp",), {})
        assert (knew, nothing) == (harm > 0, None)
        assert torch.equal(first, torch.ones(2, 3))
        assert torch.equal(second, torch.zeros(2))
        first.add_(5)
        second.add_(5)
    assert next(count) == 1


@pytest.mark.parametrize("given", [{"embeds": torch.zeros(1)}, {"prompt": object()}, {"prompt": ["a", {"b": print}]}])
def test_what_is_not_plain_is_encoded_each_time(given: dict[str, Any]) -> None:
    known = Embeddings()
    assert [known.of(lambda **_: torch.ones(1), (), given)[1] for _ in range(2)] == [False, False]
    assert known.bytes == 0
    assert [known.of(lambda: print, (), {})[1] for _ in range(2)] == [False, False]


def test_one_and_true_are_not_the_same() -> None:
    known = Embeddings()

    def encode(flag: object) -> torch.Tensor:
        return torch.ones(1)

    assert [known.of(encode, (each,), {})[1] for each in (1, True, 1.0, [1], (1,), 1)] == [False] * 5 + [True]


def test_what_was_not_used_for_longest_goes_when_there_is_no_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "MOST_BYTES", 1000)
    known = Embeddings()

    def encode(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def knew(size: int) -> bool:
        return known.of(encode, (size,), {})[1]

    assert [knew(each) for each in (400, 401, 400, 402, 400, 401, 1001, 1001)] == [False, False, True, False, True, False, False, False]
    assert known.bytes <= 1000
