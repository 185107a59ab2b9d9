"""Several takes of one task: each is what a task of its own seed renders, whatever the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from movieq.errors import InvalidInput
from tests.render.test_engine_process import engine_that
from workers.child import __main__ as child_main
from workers.child.job import Finish, Flag, Job, Output
from workers.eta import UPLOAD_AT, Eta
from workers.protocol import Cancelled, Done, Failed, FromChild, Note, Plan, Preview, Produced, Rows, Run, Stage, Step

PICTURE: dict[str, Any] = {"prompt": "a lighthouse in a storm", "resolution": "64x64", "format": "png"}
CLIP: dict[str, Any] = {"prompt": "a lighthouse in a storm", "resolution": "64x64", "duration": 1, "fps": 12}


def answered(run: Run, send: Callable[[FromChild], None] = lambda message: None, flag: Flag | None = None) -> object:
    """Render a run to its end; return its answer."""
    (result,) = child_main.render_runs((run,), send, {run.run: flag or Flag()})
    return child_main.finish_run(run, result) if callable(result) else result


def done(run: Run, send: Callable[[FromChild], None] = lambda message: None) -> Done:
    answer = answered(run, send)
    assert isinstance(answer, Done), answer
    return answer


@pytest.mark.parametrize(("task_type", "data"), [("generate_image", PICTURE), ("generate_video", CLIP), ("render_animation", CLIP)])
def test_each_take_is_what_a_task_of_its_seed_renders(order: Any, task_type: str, data: dict[str, Any]) -> None:
    together = done(order(task_type, seed=41, takes=3, **data))
    outputs = [file for file in together.files if file.role == "output"]
    assert [(file.take, file.seed) for file in outputs] == [(1, 41), (2, 42), (3, 43)]
    for file in together.files:
        alone = done(order(task_type, seed=file.seed, **data))
        (same,) = [each for each in alone.files if each.role == file.role]
        assert Path(same.path).read_bytes() == Path(file.path).read_bytes()
        assert msgspec.structs.replace(same, path="", take=0) == msgspec.structs.replace(file, path="", take=0)
    assert len({Path(file.path).read_bytes() for file in outputs}) == 3, "the seed changes the result"


def test_the_seeds_of_takes_go_on_from_zero_after_the_largest(order: Any) -> None:
    files = done(order("generate_image", seed=2**32 - 1, takes=2, **PICTURE)).files
    assert [file.seed for file in files] == [2**32 - 1, 0]


def test_the_files_lie_in_the_folder_of_the_run_under_names_of_their_own(order: Any) -> None:
    run = order("generate_video", takes=2, **CLIP)
    files = done(run).files
    assert {Path(file.path).name for file in files} == {"output-1.mp4", "poster-1.jpg", "output-2.mp4", "poster-2.jpg"}
    assert {path.name for path in Path(run.out_dir).iterdir()} == {Path(file.path).name for file in files}


def test_progress_counts_all_takes_and_never_falls(order: Any) -> None:
    sent: list[FromChild] = []
    run = order("generate_video", takes=3, preview=True, **CLIP)
    done(run, sent.append)
    assert {getattr(message, "run", None) for message in sent} == {run.run}
    eta, seen = Eta(10.0), [0.0]
    for message in sent:
        if isinstance(message, Plan):
            eta.plan(message.stages)
        elif isinstance(message, Step):
            assert eta.step(message.stage, message.step, message.steps) is not None, message
            seen.append(eta.progress)
    assert seen == sorted(seen)
    assert max(after - before for before, after in itertools.pairwise(seen)) < 0.34
    assert seen[-1] == pytest.approx(UPLOAD_AT)


def test_progress_counts_takes_whose_files_are_written_while_the_next_renders(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(job: Job) -> Finish:
        job.plan(Stage("denoise", "speaking", 1), Stage("mux", "encoding", 1))
        for step in (1, 2, 3, 4):
            job.step("denoise", step, 4)

        def finish() -> Output:
            job.step("mux", 1, 1)
            return Output((), {})

        return finish

    engine_that(act, "takes_speak", monkeypatch)
    monkeypatch.setattr("workers.child.job.STEP_INTERVAL_S", 0.0)
    eta, seen = Eta(10.0), [0.0]

    def receive(message: FromChild) -> None:
        if isinstance(message, Plan):
            eta.plan(message.stages)
        elif isinstance(message, Step):
            eta.step(message.stage, message.step, message.steps)
            seen.append(eta.progress)

    done(order(engine="takes_speak", takes=4, **PICTURE), receive)
    assert seen == sorted(seen)
    assert max(after - before for before, after in itertools.pairwise(seen)) < 0.2
    assert seen[-1] == pytest.approx(UPLOAD_AT)


def test_a_cancel_stops_before_the_next_take(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flag, rendered = Flag(), []

    def act(job: Job) -> Output:
        rendered.append(job.seed)
        job.check()
        flag.set()
        return Output((), {})

    engine_that(act, "takes_cancel", monkeypatch)
    assert isinstance(answered(order(engine="takes_cancel", seed=7, takes=3, **PICTURE), flag=flag), Cancelled)
    assert rendered == [7, 8]


@pytest.mark.parametrize("late", [False, True])
def test_a_take_that_fails_fails_the_task(order: Any, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    def act(job: Job) -> Output | Finish:
        def finish() -> Output:
            if job.seed == 8:
                raise InvalidInput("the second take fails")
            return Output((), {})

        return finish if late else finish()

    engine_that(act, "takes_fail", monkeypatch)
    failed = answered(order(engine="takes_fail", seed=7, takes=3, **PICTURE))
    assert isinstance(failed, Failed)
    assert (failed.code, failed.message) == ("invalid_input", "the second take fails")


def test_when_a_take_fails_what_is_left_of_the_next_one_ends_as_if_cancelled(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def act(job: Job) -> Finish:
        def finish() -> Output:
            if job.seed == 7:
                raise InvalidInput("the first take fails")
            ended.append(job.seed)
            job.check()
            raise AssertionError("nobody needs this take")

        return finish

    engine_that(act, "takes_left", monkeypatch)
    failed = answered(order(engine="takes_left", seed=7, takes=2, **PICTURE))
    assert isinstance(failed, Failed)
    assert failed.message == "the first take fails"
    assert ended == [8]


def test_what_takes_report_is_reported_once_and_their_warnings_are_joined(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(job: Job) -> Output:
        job.plan(Stage("load", "loading_models", 1), Stage("denoise", "generating_image", 1))
        job.warn("the light is not used")
        job.note(f"seed {job.seed}")
        job.report_batch_limit(1)
        job.preview(lambda: b"jpeg")
        path = job.out_dir / "output.png"
        path.write_bytes(b"png")
        return Output((Produced(str(path), "output", "image/png"),), {"warnings": job.warnings, "seed": job.seed})

    engine_that(act, "takes_report", monkeypatch)
    sent: list[FromChild] = []
    result = done(order(engine="takes_report", seed=7, takes=2, preview=True, **PICTURE), sent.append)
    (plan,) = [message for message in sent if isinstance(message, Plan)]
    assert [stage.name for stage in plan.stages] == ["load", "denoise", "denoise"], "a model is loaded once"
    assert [message.text for message in sent if isinstance(message, Note)] == ["seed 7", "seed 8"]
    assert sum(isinstance(message, Preview) for message in sent) == 2
    assert not [message for message in sent if isinstance(message, Rows)]
    assert result.metadata == {"seed": 7, "warnings": ["the light is not used", "seed 7", "seed 8"]}
