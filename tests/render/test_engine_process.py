"""The real engine process, driven over its pipes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

import psutil
import pytest
from PIL import Image

from movieq.tasks.registry import REGISTRY
from workers import protocol
from workers.child import __main__ as child_main
from workers.child import job
from workers.child.job import Flag, Job, Output
from workers.protocol import Cancel, Cancelled, Done, Failed, FromChild, Plan, Preview, Ready, Run, Step, ToChild, Watched

DEADLINE_S = 20.0


class Child:
    """An engine process, and the messages that it sends."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers.child", "--device", "cpu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        first = self.next()
        assert isinstance(first, Ready)
        self.ready = first

    def send(self, *messages: ToChild) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"".join(map(protocol.frame, messages)))
        self.process.stdin.flush()

    def next(self) -> FromChild:
        assert self.process.stdout
        body = protocol.read_frame(cast(BinaryIO, self.process.stdout))
        assert body is not None, f"the child ended with {self.process.wait(DEADLINE_S)}"
        return protocol.from_child_decoder.decode(body)

    def until_end(self, run: str) -> list[FromChild]:
        """Return all messages up to the answer to the run."""
        sent: list[FromChild] = []
        while not sent or not isinstance(sent[-1], Done | Failed | Cancelled):
            sent.append(self.next())
            assert getattr(sent[-1], "run", None) == run
        return sent

    def until_first_step(self) -> None:
        while not isinstance(self.next(), Step):
            pass

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """One process for all tests that do not end it."""
    child = Child()
    yield child
    child.close()


@pytest.fixture
def own_child() -> Iterator[Child]:
    """A process that the test ends."""
    child = Child()
    yield child
    child.close()


def long_clip(order: Any) -> Run:
    """Return work for more than `DEADLINE_S`."""
    run: Run = order("generate_video", prompt="A storm", duration=30, resolution="1920x1080")
    return run


def test_a_run_is_planned_stepped_through_and_done(child: Child, order: Any) -> None:
    run = order("generate_video", prompt="A storm", duration=1, fps=12, resolution="320x180", audio_cues=["wind"])
    child.send(run)

    plan, *steps, done = child.until_end(run.run)

    assert isinstance(plan, Plan)
    assert isinstance(done, Done)
    last = {step.stage: step for step in steps if isinstance(step, Step)}
    assert list(last) == [stage.name for stage in plan.stages]
    assert all(step.step == step.steps for step in last.values())
    assert {Path(file.path).name: file.role for file in done.files} == {"output.mp4": "output", "poster.jpg": "poster"}
    assert all(Path(file.path).parent == Path(run.out_dir) for file in done.files)


def test_runs_are_done_one_after_another(child: Child, order: Any) -> None:
    first, second = order(prompt="One", resolution="64x64"), order(prompt="Two", resolution="64x64")
    child.send(first, second)
    assert isinstance(child.until_end(first.run)[-1], Done)
    assert isinstance(child.until_end(second.run)[-1], Done)


def test_a_cancelled_run_stops_between_two_frames_and_the_child_takes_the_next(child: Child, order: Any) -> None:
    run, after = long_clip(order), order(prompt="After", resolution="64x64")
    child.send(run)
    child.until_first_step()
    child.send(Cancel(run.run), after)

    assert isinstance(child.until_end(run.run)[-1], Cancelled)
    assert list(Path(run.out_dir).glob("*.mp4")) == []
    assert isinstance(child.until_end(after.run)[-1], Done)


def test_a_run_cancelled_while_it_waits_never_begins(child: Child, order: Any) -> None:
    waiting, before = order(prompt="Waiting", resolution="64x64"), long_clip(order)
    child.send(before, waiting, Cancel(waiting.run), Cancel(before.run))
    assert isinstance(child.until_end(before.run)[-1], Cancelled)
    assert child.until_end(waiting.run) == [Cancelled(waiting.run)]


def test_cancelling_a_run_that_is_not_there_is_no_error(child: Child, order: Any) -> None:
    run = order(prompt="Still there", resolution="64x64")
    child.send(Cancel("nobody"), run)
    assert isinstance(child.until_end(run.run)[-1], Done)


def test_a_fault_of_the_task_keeps_its_code_and_message(child: Child, order: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.jpg"
    page.write_text("<html>not found</html>")
    url = "https://cdn.example/still.jpg"
    run = order("generate_video", storyboard_images=[url], inputs={url: str(page)}, duration=1, resolution="64x64")
    child.send(run)
    failed = child.until_end(run.run)[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "invalid_input"
    assert url in failed.message


def test_an_unknown_engine_is_unavailable(child: Child, order: Any) -> None:
    run = order(engine="hologram", prompt="x")
    child.send(run)
    failed = child.until_end(run.run)[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "engine_unavailable"


def test_sigint_and_sigterm_are_the_workers_business(child: Child, order: Any) -> None:
    os.kill(child.ready.pid, signal.SIGINT)
    os.kill(child.ready.pid, signal.SIGTERM)
    run = order(prompt="Still here", resolution="64x64")
    child.send(run)
    assert isinstance(child.until_end(run.run)[-1], Done)


def messages(run: Run) -> list[FromChild]:
    """Render a run in this process and return what was sent on the way."""
    sent: list[FromChild] = []
    child_main.render_runs((run,), sent.append, {run.run: Flag()})
    return sent


@pytest.mark.parametrize(("interval_s", "steps"), [(0.0, [*range(1, 13)]), (3600.0, [12])])
def test_steps_wait_for_their_interval_except_the_last_of_a_stage(
    order: Any, monkeypatch: pytest.MonkeyPatch, interval_s: float, steps: list[int]
) -> None:
    assert job.STEP_INTERVAL_S == 1 / 20
    monkeypatch.setattr(job, "STEP_INTERVAL_S", interval_s)
    sent = messages(order("generate_video", prompt="x", duration=1, fps=12, resolution="64x64"))
    assert [each.step for each in sent if isinstance(each, Step) and each.stage == "frames"] == steps


@pytest.mark.parametrize(("interval_s", "count"), [(0.0, 12), (3600.0, 1)])
def test_previews_are_sent_if_asked_for_and_wait_for_their_interval(
    order: Any, monkeypatch: pytest.MonkeyPatch, interval_s: float, count: int
) -> None:
    assert job.PREVIEW_INTERVAL_S == 0.5
    monkeypatch.setattr(job, "PREVIEW_INTERVAL_S", interval_s)
    sent = messages(order("generate_video", prompt="x", duration=1, fps=12, resolution="640x360", preview=True))
    previews = [each for each in sent if isinstance(each, Preview)]
    assert len(previews) == count
    for preview in previews:
        assert len(preview.jpeg) <= 10_000
        with Image.open(io.BytesIO(preview.jpeg)) as image:
            assert (image.format, image.size) == ("JPEG", (256, 144))


def test_a_run_that_is_watched_sends_previews_without_being_asked(child: Child, order: Any) -> None:
    counts = []
    for watched in (True, False):
        run = order("generate_video", prompt="x", duration=2, resolution="320x180")
        child.send(run, Watched(run.run, watched), Watched("another", True))
        counts.append(sum(isinstance(each, Preview) for each in child.until_end(run.run)))
    assert counts[0] >= 1
    assert counts[1] == 0


def test_it_ends_when_its_pipe_closes_in_the_middle_of_a_run(own_child: Child, order: Any) -> None:
    own_child.send(long_clip(order))
    own_child.until_first_step()
    assert own_child.process.stdin
    own_child.process.stdin.close()
    assert own_child.process.wait(DEADLINE_S) == 0, "the run would last longer"


def test_a_frame_that_is_not_a_message_ends_it_with_another_code(own_child: Child) -> None:
    assert own_child.process.stdin
    own_child.process.stdin.write(protocol.HEADER.pack(3) + b"abc")
    own_child.process.stdin.flush()
    assert own_child.process.wait(DEADLINE_S) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_it_dies_with_the_process_that_started_it_even_while_its_pipes_stay_open() -> None:
    to_child, keep_open = os.pipe()
    from_child, out = os.pipe()
    starter = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'workers.child'], stdin=int(sys.argv[1]), stdout=int(sys.argv[2]))\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter, str(to_child), str(out)], pass_fds=(to_child, out)) as parent:
        os.close(out)
        os.close(to_child)
        with os.fdopen(from_child, "rb") as stream:
            body = protocol.read_frame(stream)
            assert body
            ready = protocol.from_child_decoder.decode(body)
            assert isinstance(ready, Ready)
            grandchild = psutil.Process(ready.pid)
            parent.kill()
            gone, _ = psutil.wait_procs([grandchild], timeout=DEADLINE_S)
            assert gone or grandchild.status() == psutil.STATUS_ZOMBIE
    os.close(keep_open)


def test_what_libraries_print_never_reaches_the_pipe() -> None:
    program = (
        "import os\n"
        "from workers.child.__main__ import private_pipe\n"
        "source, sink = private_pipe()\n"
        "print('noise of Python', flush=True)\n"
        "os.write(1, b'noise of C')\n"
        "assert os.read(0, 1) == b''\n"
        "sink.write(source.read())\n"
        "sink.flush()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], input=b"frames", capture_output=True, timeout=DEADLINE_S, check=True)
    assert ran.stdout == b"frames"
    assert b"noise of Python" in ran.stderr
    assert b"noise of C" in ran.stderr


def performed(run: Run) -> object:
    """Return the answer to a run that fails, in this process."""
    (answer,) = child_main.render_runs((run,), lambda message: None, {run.run: Flag()})
    return answer


def engine_that(act: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add an engine beside the animatic, as a plug-in does."""
    module = ModuleType(name)
    module.render = act  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(REGISTRY.engines, name, name)


def test_running_out_of_host_memory_is_reported_as_out_of_memory(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(_: Job) -> Output:
        bytearray(2**60)
        raise AssertionError("this machine has an exabyte of memory")

    engine_that(greedy, "greedy", monkeypatch)
    answer = performed(order(engine="greedy", prompt="x"))
    assert isinstance(answer, Failed)
    assert answer.code == "out_of_memory"


def test_a_bug_in_an_engine_is_an_internal_error_with_its_traceback(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Job) -> Output:
        Image.new("RGB", (1, 1)).getpixel((9, 9))
        raise AssertionError("Pillow no longer checks")

    engine_that(broken, "broken", monkeypatch)
    answer = performed(order(engine="broken", prompt="x"))
    assert isinstance(answer, Failed)
    assert answer.code == "internal"
    assert answer.message == "the broken engine failed: image index out of range"
    assert "getpixel" in answer.traceback


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_after_a_cuda_error_the_device_is_reported_as_broken(
    order: Any, monkeypatch: pytest.MonkeyPatch, fault: Exception, broken: bool
) -> None:
    def render(_: Job) -> Output:
        try:
            raise fault
        except RuntimeError as error:
            raise ValueError("the decoder failed") from error

    engine_that(render, "sick", monkeypatch)
    answer = performed(order(engine="sick", prompt="a lamp"))
    assert isinstance(answer, Failed)
    assert (answer.code, answer.broken) == ("internal", broken)
