"""`movieq demo` as a new user runs it: what it renders, what it prints, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from movieq.local.demo import sheet
from movieq.local.embedded import valkey


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Yield a temporary folder that identifies the processes of one demo. Its path is short, because unix sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="mq"))
    yield folder
    shutil.rmtree(folder)


def left(temporary: Path) -> list[str]:
    """Return the processes of the demo with that temporary folder, and what lies in it."""
    found = [path.name for path in temporary.iterdir()]
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(temporary) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            pass
    return found


async def started(temporary: Path, folder: Path, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
    """Start a demo."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "movieq.cli", "demo", *arguments,
        cwd=folder, env={**os.environ, "TMPDIR": str(temporary), **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


async def said(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    """Wait until the demo ends; return its exit code and outputs."""
    async with asyncio.timeout(300):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_storyboard_becomes_a_clip_and_nothing_stays_behind(temporary: Path, folder: Path) -> None:
    code, out, err = await said(await started(temporary, folder, MOVIEQ_PUBLIC_URL="http://127.0.0.1:1", MOVIEQ_CPU_SLOTS="many"))
    assert (code, err) == (0, ""), out
    assert left(temporary) == []
    assert sorted(path.name for path in (folder / "demo-out").iterdir()) == ["clip.mp4", "contact-sheet.png", "picture.jpg", "voice.mp3"]
    with av.open(str(folder / "demo-out/clip.mp4")) as clip:
        video = clip.streams.video[0]
        assert (video.frames, video.codec_context.width, video.codec_context.height) == (168, 1920, 1080)
        assert (video.average_rate, Fraction(clip.duration or 0, av.time_base)) == (Fraction(24), Fraction(7))
        assert [stream.codec_context.name for stream in clip.streams.audio] == ["aac"]
    with Image.open(folder / "demo-out/contact-sheet.png") as page:
        assert page.width == sheet.WIDTH
    for name in ("clip", "picture", "voice"):
        assert f"demo-out/{name}." in out
        assert f"{name:8}  100%  completed" in out
    assert out.count("http://127.0.0.1:") == 4  # where it ran, and an address for each file


@pytest.mark.slow  # a second whole demo
async def test_without_speech_the_demo_shows_that_there_is_no_voice(temporary: Path, folder: Path) -> None:
    (folder / "sitecustomize.py").write_text('import sys\nsys.modules["espeakng_loader"] = None\n')  # as if it were not installed
    code, out, err = await said(await started(temporary, folder, PYTHONPATH=str(folder)))
    assert (code, err) == (0, ""), out
    assert "failed: engine_unavailable" in out
    assert "none: dialogue needs espeak-ng" in out
    assert sorted(path.name for path in (folder / "demo-out").iterdir()) == ["clip.mp4", "contact-sheet.png", "picture.jpg"]
    assert left(temporary) == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"])
async def test_a_demo_that_is_stopped_stops_what_it_started(temporary: Path, folder: Path, signum: int, code: int) -> None:
    process = await started(temporary, folder)
    assert process.stdout is not None
    async with asyncio.timeout(300):
        while b"rendering video" not in await process.stdout.readline():
            pass
    assert left(temporary)
    process.send_signal(signum)
    returned, _, err = await said(process)
    assert (returned, err) == (code, "")
    assert left(temporary) == []


async def test_a_demo_that_fails_says_why_and_stops_what_it_started(temporary: Path, folder: Path) -> None:
    with valkey(folder / "data", appendfsync="no"):
        code, _, err = await said(await started(temporary, folder, "--data", "data"))
    assert (code, "another movieq uses" in err, "movieq-up.log" in err) == (1, True, True), err
    assert "another movieq uses" in (folder / "demo-out/movieq-up.log").read_text()
    assert left(temporary) == []


def test_the_sheet_says_why_there_is_no_voice(folder: Path) -> None:
    with av.open(str(folder / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for grey in range(24):
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((180, 320, 3), grey * 8, np.uint8))))
        clip.mux(stream.encode())
    Image.new("RGB", (64, 96), (120, 90, 60)).save(folder / "picture.jpg")
    contents = sheet.Contents(
        title="A Lamp",
        scene="Somebody lights it.",
        clip=folder / "clip.mp4",
        picture=folder / "picture.jpg",
        picture_text="The lamp",
        voice=None,
        voice_text="Light.",
        voice_missing="dialogue needs espeak-ng, which is not installed here",
        made_by="movieq",
    )
    sheet.draw(contents, folder / "sheet.png")
    with Image.open(folder / "sheet.png") as page:
        assert page.width == sheet.WIDTH
    assert [number for number, _ in sheet.read_clip(folder / "clip.mp4").frames] == [1, 4, 7, 10, 13, 16, 19, 22]


@pytest.mark.parametrize(
    ("frame", "rate", "code"), [(0, 24, "00:00:00:00"), (167, 24, "00:00:06:23"), (90_061, 25, "01:00:02:11"), (1799, 29.97, "00:00:59:29")]
)
def test_a_timecode_counts_frames(frame: int, rate: float, code: str) -> None:
    assert sheet.timecode(frame, rate) == code
