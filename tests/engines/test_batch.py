"""Several pictures in one call of a model: each the same as alone, none harmed by what becomes of another."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from movieq.models.table import batch
from movieq.tasks.params import ImageParams
from tests.engines.conftest import Studio, decoded, difference
from tests.engines.test_diffusion import failing, pytestmark  # noqa: F401  # the same libraries
from workers.child import __main__ as child
from workers.child.diffusion import engine as diffusion
from workers.child.job import Finish, Flag, Made, Take
from workers.protocol import Cancelled, Done, Failed, FromChild, Note, Rows, Step

ALIKE: list[dict[str, Any]] = [
    {"prompt": "a lighthouse in a storm", "seed": 1},
    {"prompt": "12 ZEBRAS JUMP; QUIZ! (90%) & more xylophones, jazz, waltz", "seed": 7, "format": "jpeg"},
    {"prompt": "fog", "seed": 3},
]


class Batch:
    """Tasks of one batch key: what came of each, and what was said."""

    def __init__(self, studio: Studio, name: str, tasks: list[dict[str, Any]] = ALIKE, **more: Any) -> None:
        self.said: list[tuple[int, FromChild]] = []
        self.flags: list[Flag] = []
        self.takes: list[Take] = []
        for number, task in enumerate(tasks):
            given = {"resolution": "64x64", "format": "png", **task, **more}
            self.takes.append(studio.take(name, functools.partial(self.hear, number), **given))
            self.flags.append(studio.flag)

    def hear(self, number: int, message: FromChild) -> None:
        """What a row says."""
        self.said.append((number, message))

    def made(self) -> list[Made]:
        """What came of it, where nothing failed."""
        return [part() if callable(part) else self._broken(part) for part in self.parts()]

    def parts(self) -> list[Made | Finish | Exception]:
        """What the engine makes of it."""
        return diffusion.make_batch(self.takes)

    def of(self, kind: type[FromChild]) -> list[Any]:
        """What was said of a kind, and by which row."""
        return [(number, message) for number, message in self.said if isinstance(message, kind)]

    def _broken(self, part: Made | Exception) -> Made:
        assert isinstance(part, Made), part
        return part


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "z_image"])
@pytest.mark.parametrize("more", [{}, {"negative_prompt": "rain"}])
def test_each_picture_of_a_batch_is_the_one_that_its_task_alone_becomes(studio: Studio, name: str, more: dict[str, Any]) -> None:
    alone = [studio.make(name, resolution="64x64", **{"format": "png", **task, **more}) for task in ALIKE]
    together = Batch(studio, name, **more)
    made = together.made()
    for one, many in zip(alone, made, strict=True):
        assert difference(one.decoded, decoded(one.path.parent.parent / many.files[0].path)) < 1 / 255
        assert {**one.made.metadata, "batch_size": 3} == many.metadata
    stages = [[message.stage for number, message in together.of(Step) if number == row and not message.step] for row in range(3)]
    assert stages[0] == stages[1] == stages[2] != []


def test_a_row_that_is_cancelled_leaves_and_the_others_are_made(studio: Studio) -> None:
    alone = [studio.make("flux", resolution="64x64", **{"format": "png", **task}) for task in ALIKE]
    together = Batch(studio, "flux")

    def hear(number: int, message: FromChild) -> None:
        together.said.append((number, message))
        if isinstance(message, Step) and message.stage == "denoise" and message.step == 1:
            together.flags[1].set()

    for number, take in enumerate(together.takes):
        take._send = functools.partial(hear, number)
    runs = tuple(take.run for take in together.takes)
    parts = together.parts()
    answers = [child.answered(run, part) for run, part in zip(runs, parts, strict=True) if callable(part)]
    assert [type(answer) for answer in answers] == [Done, Cancelled, Done]
    for row in (0, 2):
        answer = answers[row]
        assert isinstance(answer, Done)
        assert difference(alone[row].decoded, decoded(alone[row].path.parent.parent / answer.files[0].path)) < 1 / 255
    after = [number for number, message in together.of(Step) if message.stage == "decode"]
    assert 1 not in after, "nobody speaks of it any more"


def test_when_all_rows_are_cancelled_the_call_stops(studio: Studio) -> None:
    together = Batch(studio, "flux")
    for flag in together.flags:
        flag.set()
    answers = child.perform(
        tuple(take.run for take in together.takes),
        lambda message: None,
        {take.run.run: flag for take, flag in zip(together.takes, together.flags, strict=True)},
    )
    assert [type(answer) for answer in answers] == [Cancelled] * 3


def test_a_batch_that_is_too_large_is_made_in_halves(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [studio.make("sd", resolution="64x64", **{"format": "png", **task}) for task in ALIKE]
    failing(monkeypatch, 1)
    together = Batch(studio, "sd")
    made = together.made()
    assert [each.metadata["batch_size"] for each in made] == [1, 2, 2]
    assert [message.text for _, message in together.of(Note)] == ["out of memory: the batch was halved"] * 3
    assert [message.rows for _, message in together.of(Rows)] == [1], "so many fit"
    for one, many in zip(alone, made, strict=True):
        assert difference(one.decoded, decoded(one.path.parent.parent / many.files[0].path)) < 1 / 255


def test_a_row_that_fails_fails_alone(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxPipeline

    call = FluxPipeline.__call__

    def sick(self: Any, *args: Any, **options: Any) -> Any:
        if "fog" in (options["prompt"] if isinstance(options["prompt"], list) else [options["prompt"]])[-1]:
            raise ValueError("no fog, please")
        return call(self, *args, **options)

    sick.__signature__ = __import__("inspect").signature(call)  # type: ignore[attr-defined]  # the engine reads what it takes
    monkeypatch.setattr(FluxPipeline, "__call__", sick)
    together = Batch(studio, "flux")
    first, second, third = together.parts()
    assert callable(first)
    assert callable(second)
    assert isinstance(third, ValueError)
    assert first().metadata["batch_size"] == 1
    assert "each of its 3 tasks is tried alone" in together.of(Note)[0][1].text


def test_a_fault_of_the_device_is_no_rows(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "_called", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA error: misaligned address")))
    together = Batch(studio, "sd")
    flags = {take.run.run: flag for take, flag in zip(together.takes, together.flags, strict=True)}
    answers = child.perform(tuple(take.run for take in together.takes), lambda message: None, flags)
    assert all(isinstance(answer, Failed) and answer.broken for answer in answers)


def test_what_a_call_has_one_value_for_is_in_the_batch_key(studio: Studio) -> None:
    entry = studio.entry("sd", limits={"sides": 16, "batch": [[4096, 8], [16384, 2]]})

    def key(**given: Any) -> tuple[str, int]:
        return batch("sd", entry, ImageParams(prompt="a lamp", **{"resolution": "64x64", **given}))

    same = key()
    assert same[1] == 8
    for alike in ({"seed": 3}, {"format": "png"}, {"pose": "running"}, {"preview": True}):
        assert key(**alike) == same
    for other in ({"steps": 3}, {"guidance_scale": 2.0}, {"negative_prompt": "fog"}, {"resolution": "64x48"}):
        assert key(**other)[0] not in ("", same[0])
    assert key(resolution="128x128")[1] == 2
    assert key(resolution="256x128") == ("", 1)
    assert key(reference_images=["https://a.example/0.png"]) == ("", 1)
    cached = studio.entry("sd", first_block_cache=0.1)
    assert batch("sd", cached, ImageParams(prompt="a lamp")) == ("", 1)
