"""The child's process, the real one, spoken to over its pipes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
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
from workers.child.job import STEP_INTERVAL_S, Flag, Made, Take
from workers.protocol import Cancel, Cancelled, Done, Failed, FromChild, Plan, Preview, Ready, Run, Step, ToChild, Watched

DEADLINE_S = 20.0


class Child:
    """A child process, and what it said."""

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
        """Everything up to the frame that ends the run."""
        said: list[FromChild] = []
        while not said or not isinstance(said[-1], Done | Failed | Cancelled):
            said.append(self.next())
            assert getattr(said[-1], "run", None) == run
        return said

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
    """One process for all tests that leave it as they found it."""
    child = Child()
    yield child
    child.close()


@pytest.fixture
def own_child() -> Iterator[Child]:
    """A process to be ended."""
    child = Child()
    yield child
    child.close()


@pytest.fixture
def order(tmp_path: Path) -> Any:
    """Makes runs, each with a folder of its own."""
    count = 0

    def order(task_type: str = "generate_image", engine: str = "animatic", inputs: dict[str, str] | None = None, **params: Any) -> Run:
        nonlocal count
        count += 1
        out_dir = tmp_path / f"out{count}"
        out_dir.mkdir()
        return Run(f"run-{tmp_path.name}-{count}", "task", "project", task_type, engine, engine, params, {}, inputs or {}, 1, str(out_dir))

    return order


def long_clip(order: Any) -> Run:
    """Work for half a minute."""
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
    cancelled_at_s = time.monotonic()
    child.send(Cancel(run.run), after)

    assert isinstance(child.until_end(run.run)[-1], Cancelled)
    assert time.monotonic() - cancelled_at_s < 5
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


def test_at_most_twenty_steps_a_second_leave_it(child: Child, order: Any) -> None:
    run = order("generate_video", prompt="x", duration=10, fps=60, resolution="64x64")
    began_s = time.monotonic()
    child.send(run)
    steps = [said for said in child.until_end(run.run) if isinstance(said, Step)]
    allowed = (time.monotonic() - began_s) / STEP_INTERVAL_S + 3  # and the last of each of the two stages
    assert 2 <= len(steps) <= allowed < 600


def test_previews_come_where_they_are_asked_for_small_and_seldom(child: Child, order: Any) -> None:
    run = order("generate_video", prompt="x", duration=4, resolution="640x360", preview=True)
    began_s = time.monotonic()
    child.send(run)
    previews = [said for said in child.until_end(run.run) if isinstance(said, Preview)]
    assert 1 <= len(previews) <= (time.monotonic() - began_s) / 0.5 + 1
    for preview in previews:
        assert len(preview.jpeg) <= 10_000
        with Image.open(io.BytesIO(preview.jpeg)) as image:
            assert (image.format, image.size) == ("JPEG", (256, 144))


def test_a_run_that_is_watched_shows_previews_that_it_did_not_ask_for(child: Child, order: Any) -> None:
    seen = []
    for watched in (True, False):
        run = order("generate_video", prompt="x", duration=4, resolution="640x360")
        child.send(run, Watched(run.run, watched), Watched("another", True))
        seen.append(sum(isinstance(said, Preview) for said in child.until_end(run.run)))
    assert seen[0] >= 1
    assert seen[1] == 0


def test_it_ends_within_a_second_when_its_pipe_closes_in_the_middle_of_a_run(own_child: Child, order: Any) -> None:
    own_child.send(long_clip(order))
    own_child.until_first_step()
    assert own_child.process.stdin
    own_child.process.stdin.close()
    assert own_child.process.wait(timeout=1) == 0


def test_a_frame_that_is_no_message_ends_it_with_another_code(own_child: Child) -> None:
    assert own_child.process.stdin
    own_child.process.stdin.write(protocol.HEADER.pack(3) + b"abc")
    own_child.process.stdin.flush()
    assert own_child.process.wait(timeout=5) == 1


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
            gone, _ = psutil.wait_procs([grandchild], timeout=2)
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
    """The answer to a run, in this process."""
    (answer,) = child_main.perform((run,), lambda message: None, {run.run: Flag()})
    return answer


def engine_that(act: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts an engine beside the animatic: the way in which a real second one is added."""
    module = ModuleType(name)
    module.make = act  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(REGISTRY.engines, name, name)


def test_running_out_of_memory_may_pass_and_says_so(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(take: Take) -> Made:
        bytearray(2**60)
        raise AssertionError("this machine has an exabyte of memory")

    engine_that(greedy, "greedy", monkeypatch)
    answer = performed(order(engine="greedy", prompt="x"))
    assert isinstance(answer, Failed)
    assert answer.code == "out_of_memory"


def test_a_bug_of_an_engine_is_internal_and_brings_its_traceback(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(take: Take) -> Made:
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
def test_after_a_cuda_error_the_child_says_that_it_is_beyond_repair(
    order: Any, monkeypatch: pytest.MonkeyPatch, fault: Exception, broken: bool
) -> None:
    def make(take: Take) -> Made:
        try:
            raise fault
        except RuntimeError as error:
            raise ValueError("the decoder failed") from error

    engine_that(make, "sick", monkeypatch)
    answer = performed(order(engine="sick", prompt="a lamp"))
    assert isinstance(answer, Failed)
    assert (answer.code, answer.broken) == ("internal", broken)
