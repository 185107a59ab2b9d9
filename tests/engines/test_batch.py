"""Several pictures in one call of a model: each is the same as when rendered alone, and the failure of one does not affect the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from movieq.models.choice import batch
from movieq.tasks.params import ImageParams
from tests.engines.conftest import PICTURE, Studio, decoded, difference
from tests.engines.test_diffusion import failing, pytestmark  # noqa: F401  # the same libraries
from workers.child import __main__ as child
from workers.child.diffusion import engine as diffusion
from workers.child.job import Finish, Flag, Job, Output
from workers.protocol import Cancelled, Done, Failed, FromChild, Note, Rows, Step

ALIKE: list[dict[str, Any]] = [
    {"prompt": "a lighthouse in a storm", "seed": 1},
    {"prompt": "12 ZEBRAS JUMP; QUIZ! (90%) & more xylophones, jazz, waltz", "seed": 7, "format": "jpeg"},
    {"prompt": "fog", "seed": 3},
]


class Batch:
    """Jobs with one batch key, and the messages that each of them sent. `on_message` is called for each message."""

    def __init__(
        self, studio: Studio, name: str, on_message: Callable[[int, FromChild], None] = lambda number, message: None, **more: Any
    ) -> None:
        self._on_message = on_message
        self.sent: list[tuple[int, FromChild]] = []
        self.flags: list[Flag] = []
        self.jobs: list[Job] = []
        for number, task in enumerate(ALIKE):
            given = {"resolution": "64x64", "format": "png", **task, **more}
            self.jobs.append(studio.job(name, functools.partial(self._receive, number), **given))
            self.flags.append(studio.flag)

    def _receive(self, number: int, message: FromChild) -> None:
        self.sent.append((number, message))
        self._on_message(number, message)

    def outputs(self) -> list[Output]:
        """Render the batch to its end; none may fail."""
        return [result() if callable(result) else self._no_error(result) for result in self.render()]

    def render(self) -> list[Output | Finish | Exception]:
        """Render the batch."""
        return diffusion.render_batch(self.jobs)

    def of(self, kind: type[FromChild]) -> list[Any]:
        """Return the messages of one type, with the job that sent each."""
        return [(number, message) for number, message in self.sent if isinstance(message, kind)]

    def _no_error(self, result: Output | Exception) -> Output:
        assert isinstance(result, Output), result
        return result


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "z_image"])
@pytest.mark.parametrize("more", [{}, {"negative_prompt": "rain"}])
def test_each_picture_of_a_batch_is_the_one_that_its_task_alone_becomes(studio: Studio, name: str, more: dict[str, Any]) -> None:
    alone = [studio.render(name, resolution="64x64", **{"format": "png", **task, **more}) for task in ALIKE]
    together = Batch(studio, name, **more)
    outputs = together.outputs()
    for one, many in zip(alone, outputs, strict=True):
        assert difference(one.decoded, decoded(one.path.parent.parent / many.files[0].path)) < 1 / 255
        assert {**one.output.metadata, "batch_size": 3} == many.metadata
    stages = [[message.stage for number, message in together.of(Step) if number == row and not message.step] for row in range(3)]
    assert stages[0] == stages[1] == stages[2] != []


def test_a_job_cancelled_in_a_batch_leaves_it_and_the_others_are_rendered(studio: Studio) -> None:
    alone = [studio.render("flux", resolution="64x64", **{"format": "png", **task}) for task in ALIKE]

    def cancel_one(number: int, message: FromChild) -> None:
        if isinstance(message, Step) and message.stage == "denoise" and message.step == 1:
            together.flags[1].set()

    together = Batch(studio, "flux", cancel_one)
    runs = tuple(job.run for job in together.jobs)
    results = together.render()
    answers = [child.finish_run(run, result) for run, result in zip(runs, results, strict=True) if callable(result)]
    assert [type(answer) for answer in answers] == [Done, Cancelled, Done]
    for row in (0, 2):
        answer = answers[row]
        assert isinstance(answer, Done)
        assert difference(alone[row].decoded, decoded(alone[row].path.parent.parent / answer.files[0].path)) < 1 / 255
    after = [number for number, message in together.of(Step) if message.stage == "decode"]
    assert 1 not in after, "no message about it is sent any more"


def test_when_all_jobs_of_a_batch_are_cancelled_the_call_stops(studio: Studio) -> None:
    together = Batch(studio, "flux")
    for flag in together.flags:
        flag.set()
    answers = child.render_runs(
        tuple(job.run for job in together.jobs),
        lambda message: None,
        {job.run.run: flag for job, flag in zip(together.jobs, together.flags, strict=True)},
    )
    assert [type(answer) for answer in answers] == [Cancelled] * 3


def test_a_batch_that_is_too_large_to_decode_at_once_is_denoised_once(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [studio.render("sd", resolution="64x64", **{"format": "png", **task}) for task in ALIKE]
    failing(monkeypatch, 1)
    together = Batch(studio, "sd")
    outputs = together.outputs()
    assert [each.metadata["batch_size"] for each in outputs] == [3, 3, 3]
    assert {message.text for _, message in together.of(Note)} == {"out of memory: the pictures of the batch are decoded one by one"}
    for one, many in zip(alone, outputs, strict=True):
        assert difference(one.decoded, decoded(one.path.parent.parent / many.files[0].path)) < 1 / 255


def test_a_batch_that_is_too_large_is_rendered_in_halves(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    alone = [studio.render("sd", resolution="64x64", **{"format": "png", **task}) for task in ALIKE]
    denoise, faults = UNet2DConditionModel.forward, iter(range(1))

    def faulty(self: Any, *args: Any, **options: Any) -> Any:
        for _ in faults:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return denoise(self, *args, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", faulty)
    together = Batch(studio, "sd")
    outputs = together.outputs()
    assert [each.metadata["batch_size"] for each in outputs] == [1, 2, 2]
    assert [message.text for _, message in together.of(Note)] == ["out of memory: the batch was halved"] * 3
    assert [message.rows for _, message in together.of(Rows)] == [1], "the limit is reported"
    for one, many in zip(alone, outputs, strict=True):
        assert difference(one.decoded, decoded(one.path.parent.parent / many.files[0].path)) < 1 / 255


def test_a_job_that_fails_in_a_batch_fails_alone(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxPipeline

    call = FluxPipeline.__call__

    @functools.wraps(call)  # the engine reads its signature
    def sick(self: Any, *args: Any, **options: Any) -> Any:
        if "fog" in (options["prompt"] if isinstance(options["prompt"], list) else [options["prompt"]])[-1]:
            raise ValueError("no fog, please")
        return call(self, *args, **options)

    monkeypatch.setattr(FluxPipeline, "__call__", sick)
    together = Batch(studio, "flux")
    first, second, third = together.render()
    assert callable(first)
    assert callable(second)
    assert isinstance(third, ValueError)
    assert first().metadata["batch_size"] == 1
    assert "each of its 3 tasks is tried alone" in together.of(Note)[0][1].text


def test_a_broken_device_fails_the_whole_batch(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    @functools.wraps(StableDiffusionPipeline.__call__)
    def broken(self: Any, *args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", broken)
    together = Batch(studio, "sd")
    flags = {job.run.run: flag for job, flag in zip(together.jobs, together.flags, strict=True)}
    answers = child.render_runs(tuple(job.run for job in together.jobs), lambda message: None, flags)
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


@pytest.mark.parametrize(("rows", "calls"), [([], 3), ([[4096, 2]], 2)])
def test_takes_share_calls_and_each_is_what_a_task_of_its_seed_becomes(studio: Studio, rows: list[list[int]], calls: int) -> None:
    entry = studio.entry("flux", limits={**PICTURE, "batch": rows})
    data: dict[str, Any] = {"entry": entry, "resolution": "64x64", "format": "png", "prompt": "a lighthouse in a storm"}
    alone = [studio.render("flux", seed=seed, **data) for seed in (5, 6, 7)]
    sent: list[FromChild] = []
    job = studio.job("flux", sent.append, seed=5, takes=3, **data)
    (finish,) = child.render_runs((job.run,), sent.append, {job.run.run: Flag()})
    assert callable(finish)
    answer = child.finish_run(job.run, finish)
    assert isinstance(answer, Done), answer
    for one, file in zip(alone, answer.files, strict=True):
        assert difference(one.decoded, decoded(Path(file.path))) < 1 / 255
    assert sum(isinstance(message, Step) and message.stage == "denoise" and message.step == message.steps for message in sent) == calls
