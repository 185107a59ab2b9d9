"""A prompt that a model has encoded before is not encoded again, and the result is the same."""

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
from workers.child.diffusion import model_cache
from workers.child.diffusion.prompt_cache import PromptCache

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ENCODING = [name for name in ENTRIES if name not in SPEAKERS]
FIRST = "https://a.example/0.png"


def asked(studio: Studio, name: str, prompt: str = "a lighthouse") -> dict[str, Any]:
    """Return the parameters of a small task with this prompt."""
    if name == "stable_audio":
        return {"prompt": prompt, "duration": 1, "output_format": "wav"}
    task = {"prompt": prompt, "resolution": "64x64", "entry": studio.entry(name, limits={**ENTRIES[name]["limits"], "pixels": [1, 1024]})}
    if name in IMAGES:
        return {**task, "format": "png"}
    return {**task, "duration": 1, "fps": 12, **({} if "pipeline" in ENTRIES[name] else {"storyboard_images": [FIRST]})}


@contextmanager
def encoders_used(studio: Studio, name: str) -> Iterator[list[str]]:
    """Record which text encoders of the model run within the block."""
    job = studio.job(name, print, **asked(studio, name))
    assert job.run.entry
    loaded = model_cache.get(job, name, job.run.entry, "cpu")
    found: list[str] = []
    hooks = []
    for part, module in (loaded.pipe or loaded.image_pipe).components.items():
        if part.startswith("text_encoder") and isinstance(module, nn.Module):
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: found.append(part)))
    assert hooks
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ENCODING)
def test_the_same_words_are_encoded_once_and_give_the_same_bytes(studio: Studio, stills: dict[str, Path], name: str) -> None:
    task = asked(studio, name)
    with encoders_used(studio, name) as first:
        fresh = studio.render(name, stills, **task)
    assert first
    with encoders_used(studio, name) as again:
        known = studio.render(name, stills, **task)
    assert again == []
    assert known.path.read_bytes() == fresh.path.read_bytes()
    assert known.stages == fresh.stages, "the stage is there, and over at once"
    with encoders_used(studio, name) as other:
        studio.render(name, stills, **asked(studio, name, "a storm"))
    assert other


def test_a_cache_hit_does_not_change_the_measured_time_of_encoding(studio: Studio) -> None:
    studio.render("sd", **asked(studio, "sd"))
    took = model_cache.stage_seconds("sd")["encode"]
    studio.render("sd", **asked(studio, "sd"))
    assert model_cache.stage_seconds("sd")["encode"] == took


def test_changing_an_answers_tensors_does_not_change_later_answers() -> None:
    cache = PromptCache()
    count = itertools.count()

    def encode(prompt: str) -> tuple[torch.Tensor, list[torch.Tensor], None]:
        next(count)
        return torch.ones(2, 3), [torch.zeros(2)], None

    for number in range(3):
        (first, (second,), nothing), knew = cache.call(encode, ("a lamp",), {})
        assert (knew, nothing) == (number > 0, None)
        assert torch.equal(first, torch.ones(2, 3))
        assert torch.equal(second, torch.zeros(2))
        first.add_(5)
        second.add_(5)
    assert next(count) == 1


@pytest.mark.parametrize("given", [{"embeds": torch.zeros(1)}, {"prompt": object()}, {"prompt": ["a", {"b": print}]}])
def test_arguments_that_are_not_plain_are_never_cached(given: dict[str, Any]) -> None:
    cache = PromptCache()
    assert [cache.call(lambda **_: torch.ones(1), (), given)[1] for _ in range(2)] == [False, False]
    assert cache.size_bytes == 0
    assert [cache.call(lambda: print, (), {})[1] for _ in range(2)] == [False, False]


def test_1_and_true_are_different_arguments() -> None:
    cache = PromptCache()

    def encode(flag: object) -> torch.Tensor:
        return torch.ones(1)

    assert [cache.call(encode, (each,), {})[1] for each in (1, True, 1.0, [1], (1,), 1)] == [False] * 5 + [True]


def test_the_least_recently_used_prompt_leaves_when_the_cache_is_full() -> None:
    cache = PromptCache(max_bytes=1000)

    def encode(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def knew(size: int) -> bool:
        return cache.call(encode, (size,), {})[1]

    assert [knew(each) for each in (400, 401, 400, 402, 400, 401, 1001, 1001)] == [False, False, True, False, True, False, False, False]
    assert cache.size_bytes <= 1000
