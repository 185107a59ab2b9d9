"""A clip is encoded while its later windows are rendered, and however that ends, no thread and no unfinished file is left."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from torch import Tensor

from movieq.errors import OutOfMemory
from tests.engines.conftest import Studio, decoded
from workers.child.diffusion import engine as diffusion
from workers.child.diffusion import frames
from workers.child.diffusion.clip_file import ClipFile
from workers.child.job import JobCancelled
from workers.child.media import encode
from workers.child.media.encode import ClipFormat, ClipWriter, Planes
from workers.protocol import FromChild, Step

pytestmark = [
    # warnings of the libraries about each other
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WINDOWS = 4
PICTURES = 36
TASK: dict[str, Any] = {
    "prompt": "a lighthouse", "resolution": "96x64", "duration": 3, "fps": 12, "storyboard_images": ["https://a.example/0.png"]
}  # fmt: skip
"""A clip of four windows."""


def before_each_window(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[weakref.ref[frames.Pictures]]:
    """Call `act` with the number of each window when its pictures are copied to the host; return references to those of all windows."""
    windows: list[weakref.ref[frames.Pictures]] = []
    to_host = frames.to_host

    def observed(pictures: Tensor) -> frames.Pictures:
        act(len(windows))
        found = to_host(pictures)
        windows.append(weakref.ref(found))
        return found

    monkeypatch.setattr(frames, "to_host", observed)
    return windows


def before_each_picture(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Call `act` with the number of each picture that the encoder gets."""
    count = 0
    add = ClipWriter.add

    def observed(self: ClipWriter, planes: Planes) -> None:
        nonlocal count
        act(count)
        count += 1
        add(self, planes)

    monkeypatch.setattr(ClipWriter, "add", observed)


def nothing_is_left(folder: Path) -> bool:
    """Assert that no thread of a clip runs, and no file is in the folder."""
    assert not [each.name for each in threading.enumerate() if each.name in ("clip", "encode")]
    assert not [path.name for path in folder.iterdir()]
    return True


def test_pictures_are_encoded_while_later_windows_are_rendered(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def act(window: int) -> None:
        assert window < WINDOWS - 1 or begun.wait(60), "the encoder waits for the last window"

    before_each_window(monkeypatch, act)
    before_each_picture(monkeypatch, lambda picture: begun.set())
    monkeypatch.setattr("workers.child.job.STEP_INTERVAL_S", 0.0)
    result = studio.render("ltx_condition", stills, **TASK)
    assert result.output.metadata["generated"]["windows"] == WINDOWS
    assert len(result.decoded) == PICTURES
    assert result.stages == ["load", "encode", "denoise", "decode", "mux"], "encoding is reported when nothing is left to render"
    steps = [each.step / each.steps for each in result.sent if isinstance(each, Step) and each.stage == "mux"]
    assert steps == sorted(steps)
    assert steps[-1] == 1


def test_no_picture_mixes_two_shots(studio: Studio) -> None:
    """Of shots this alike, the interpolation does not notice the cut by itself."""
    job = studio.job("ltx_condition", lambda message: None, **TASK)
    clip = ClipFormat((96, 64), Fraction(24), 24)
    with ClipFile(job, clip, 8, cuts=[3]) as file:
        file.add(np.concatenate([np.full((3, 64, 96, 3), 100, np.uint8), np.full((5, 64, 96, 3), 120, np.uint8)]))
    path = Path(file.finish(None)[0].path)
    brightness = decoded(path).mean(axis=(1, 2, 3)) * 255
    assert brightness == pytest.approx([100] * 9 + [120] * 15, abs=2)


def test_a_slow_encoder_holds_up_the_rendering_so_that_the_pictures_of_two_windows_are_in_memory_at_most(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory: list[int] = []
    last = threading.Event()

    def count(window: int) -> None:
        in_memory.append(sum(each() is not None for each in windows) + 1)
        if window == WINDOWS - 1:
            last.set()

    def linger(picture: int) -> None:
        if picture in (0, 32):  # the first of all, and the last of the first window, when the second is being read
            last.wait(2)

    windows = before_each_window(monkeypatch, count)
    before_each_picture(monkeypatch, linger)
    studio.render("ltx_condition", stills, **TASK | {"fps": 24})
    assert len(in_memory) == WINDOWS
    assert max(in_memory) <= 2


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), OutOfMemory("no memory"), JobCancelled()])
def test_a_run_that_fails_in_its_second_window_leaves_no_thread_and_no_file(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    begun = threading.Event()

    def fail(window: int) -> None:
        if window == 1:
            assert begun.wait(60)
            assert (job.out_dir / "silent.mp4").exists()
            raise error

    before_each_window(monkeypatch, fail)
    before_each_picture(monkeypatch, lambda picture: begun.set())
    job = studio.job("ltx_condition", lambda message: None, stills, **TASK)
    with pytest.raises(type(error)):
        diffusion.render(job)
    assert nothing_is_left(job.out_dir)


@pytest.mark.parametrize(("at", "windows"), [(0, 2), (PICTURES - 1, WINDOWS)])
def test_a_fault_of_the_encoder_stops_the_rendering_at_the_next_window_and_fails_the_run(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch, at: int, windows: int
) -> None:
    def fail(picture: int) -> None:
        if picture == at:
            raise av.FFmpegError(28, "no space left")

    rendered = before_each_window(monkeypatch, lambda window: None)
    before_each_picture(monkeypatch, fail)
    job = studio.job("ltx_condition", lambda message: None, stills, **TASK)
    finish = diffusion.render(job)
    with pytest.raises(av.FFmpegError, match="no space left"):
        finish()
    assert len(rendered) == windows
    assert nothing_is_left(job.out_dir)


@pytest.mark.parametrize("with_sound", [False, True])
def test_a_cancel_while_a_clip_is_finished_leaves_no_thread_and_no_file(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch, with_sound: bool
) -> None:
    def cancel(message: FromChild) -> None:
        if not with_sound and isinstance(message, Step) and message.stage == "mux":
            studio.flag.set()

    def cancelled(*args: Any, add_sound: Callable[..., None] = encode.add_sound) -> None:
        studio.flag.set()
        add_sound(*args)

    monkeypatch.setattr(encode, "add_sound", cancelled)
    job = studio.job("ltx_condition", cancel, stills, **TASK, audio_cues=["sea"] * with_sound)
    finish = diffusion.render(job)
    with pytest.raises(JobCancelled):
        finish()
    assert nothing_is_left(job.out_dir)


def test_a_cancel_ends_the_wait_for_a_slow_encoder(studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()
    join = ClipFile.add

    def add(self: ClipFile, pictures: frames.Pictures) -> None:
        if self.count:
            waiting.set()
        join(self, pictures)

    def cancel(picture: int) -> None:
        assert picture == 0, "no picture is encoded after the cancel"
        assert waiting.wait(60)
        studio.flag.set()

    monkeypatch.setattr(ClipFile, "add", add)
    before_each_picture(monkeypatch, cancel)
    job = studio.job("ltx_condition", lambda message: None, stills, **TASK)
    with pytest.raises(JobCancelled):
        diffusion.render(job)
    assert nothing_is_left(job.out_dir)


def test_a_clip_with_sound_has_the_same_bytes_each_time(studio: Studio, stills: dict[str, Path]) -> None:
    first, again = (studio.render("ltx_condition", stills, **TASK, audio_cues=["sea"]) for _ in range(2))
    assert first.path.read_bytes() == again.path.read_bytes()
    assert sorted(path.name for path in first.path.parent.iterdir()) == ["output.mp4", "poster.jpg"]
