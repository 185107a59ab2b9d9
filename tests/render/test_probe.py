"""The probe: what it refuses, what it costs, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import av
import numpy as np
import psutil
import pytest
from av.audio.stream import AudioStream
from PIL import Image

from movieq.errors import InvalidInput, OutOfMemory
from movieq.fetch.download import image_problem
from movieq.fetch.formats import Kind
from movieq.tasks.states import ProjectId
from tests.fleet import eventually
from workers.child.media.encode import read_sound
from workers.probe import Probe

FILM = ProjectId("film")
SOUNDS = {"wav": "pcm_s16le", "mp3": "libmp3lame", "flac": "flac", "ogg": "libopus", "mp4": "aac"}


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def with_scans(body: bytes, more: int) -> bytes:
    """Return a JPEG with this many further copies of its last scan."""
    return body[:-2] + body[body.rindex(b"\xff\xda") : -2] * more + body[-2:]


def sound(path: Path, name: str, seconds: int = 1) -> Path:
    """Write a tone of 48 kHz in this format."""
    with av.open(str(path), "w", format=name) as container:
        stream = cast(AudioStream, container.add_stream(SOUNDS[name], rate=48_000))
        tone = (8000 * np.sin(np.arange(48_000 * seconds) / 20)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone.reshape(1, -1), "s16", "mono")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Return a JPEG of 150 kB, within all limits of its header, that takes seconds to decode."""
    path = tmp_path / "slow"
    path.write_bytes(with_scans(encoded(Image.new("L", (6000, 6000), 100), "JPEG", progressive=True), 85))
    assert image_problem(path) is None
    return path


def still(path: Path) -> Path:
    path.write_bytes(encoded(Image.new("RGB", (64, 64), "teal"), "PNG"))
    return path


def children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "workers.child.probe" in each.cmdline()]


async def test_an_input_that_takes_too_long_to_decode_is_refused_and_named(tmp_path: Path, slow: Path) -> None:
    good = still(tmp_path / "good")
    with pytest.raises(InvalidInput, match=r"^http://a/slow cannot be used: it takes too long to decode; at most 1 s of processor time"):
        await Probe(decode_s=1).check(FILM, [("http://a/good", good), ("http://a/slow", slow), ("http://a/after", good)], Kind.IMAGE)
    assert not children()


async def test_an_input_that_takes_too_much_memory_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(encoded(Image.new("RGB", (7000, 5000)), "PNG", compress_level=1))
    with pytest.raises(InvalidInput, match=r"^upload:1 cannot be used: it takes too much memory to decode; at most 192 MiB"):
        await Probe(decode_bytes=192 * 1024**2).check(FILM, [("upload:1", path)], Kind.IMAGE)


@pytest.mark.parametrize(
    ("arrange", "problem"),
    [
        (lambda: encoded(Image.effect_noise((64, 64), 9), "PNG")[:-40], "no picture that can be read"),
        (lambda: b"<html>sign in", "an HTML page, expected an image"),
        (lambda: b"", "empty, expected an image"),
        (lambda: encoded(Image.new("RGB", (8, 8)), "PPM"), "a file of an unknown kind"),
        (lambda: encoded(Image.new("1", (9000, 9000)), "GIF"), "more than 40 megapixels"),
    ],
)
async def test_a_file_that_no_engine_can_read_is_refused(tmp_path: Path, arrange: Callable[[], bytes], problem: str) -> None:
    path = tmp_path / "input"
    path.write_bytes(arrange())
    with pytest.raises(InvalidInput, match=f"^task:1 is .*{problem}|^task:1 has {problem}"):
        await Probe().check(FILM, [("task:1", path)], Kind.IMAGE)


async def test_images_of_each_kind_and_sounds_of_each_kind_are_accepted(tmp_path: Path) -> None:
    images = [still(tmp_path / "png")]
    for name in ("JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        images.append(tmp_path / name)
        images[-1].write_bytes(encoded(Image.effect_noise((64, 48), 50).convert("RGB"), name))
    images.append(tmp_path / "animated")
    frames = [Image.effect_noise((32, 32), 50).convert("RGB") for _ in range(3)]
    images[-1].write_bytes(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    await Probe().check(FILM, [(path.name, path) for path in images], Kind.IMAGE)
    await Probe().check(FILM, [(name, sound(tmp_path / name, name)) for name in SOUNDS], Kind.AUDIO)


async def test_a_picture_is_no_voice_and_a_voice_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is image/png, expected a sound"):
        await Probe().check(FILM, [("upload:1", still(tmp_path / "still"))], Kind.AUDIO)
    with pytest.raises(InvalidInput, match="is audio/flac, expected an image"):
        await Probe().check(FILM, [("upload:1", sound(tmp_path / "voice", "flac"))], Kind.IMAGE)


def test_a_file_is_opened_as_what_its_first_bytes_show_and_never_as_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "voice"
    tag = b"ID3\x04\0\0\0\0\0\x0eTIT2\0\0\0\x04\0\0\x03abc"
    path.write_bytes(tag + sound(tmp_path / "inner", "flac").read_bytes())
    with av.open(str(path)) as guessed:
        assert guessed.format.name == "flac"
    with pytest.raises(InvalidInput, match="its sound cannot be read"):
        read_sound("voice", path, 24_000, 1.0)


async def test_a_probe_that_the_kernel_kills_for_memory_is_tried_again(slow: Path) -> None:
    checking = asyncio.create_task(Probe().check(FILM, [("slow", slow)], Kind.IMAGE))
    await eventually(lambda: bool(children()))
    children()[0].kill()
    with pytest.raises(OutOfMemory, match="slow"):
        await checking


async def test_a_decoder_that_crashes_is_the_inputs_fault(slow: Path) -> None:
    checking = asyncio.create_task(Probe().check(FILM, [("slow", slow)], Kind.IMAGE))
    await eventually(lambda: bool(children()))
    children()[0].send_signal(signal.SIGSEGV)
    with pytest.raises(InvalidInput, match="slow cannot be used: its decoder crashed"):
        await checking


async def test_an_error_that_nobody_foresaw_in_a_decoder_is_the_inputs_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"""#!{sys.executable}
from workers.child import probe
probe.images.load_with_alpha = lambda *given, **named: None.width
probe.main()
""")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(InvalidInput, match=r"^upload:1 cannot be used: its decoder failed$"):
        await Probe().check(FILM, [("upload:1", still(tmp_path / "still"))], Kind.IMAGE)


async def test_a_cancelled_check_leaves_no_process(slow: Path) -> None:
    checking = asyncio.create_task(Probe().check(FILM, [("slow", slow)], Kind.IMAGE))
    await eventually(lambda: bool(children()))
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    assert not children()


async def test_many_checks_of_one_project_delay_no_other_project(tmp_path: Path, slow: Path) -> None:
    probe = Probe(decode_s=100)
    checks = [asyncio.create_task(probe.check(FILM, [("slow", slow)], Kind.IMAGE)) for _ in range(3)]
    await eventually(lambda: bool(children()))
    children()[0].send_signal(signal.SIGSTOP)
    await probe.check(ProjectId("other"), [("good", still(tmp_path / "good"))], Kind.IMAGE)
    assert not any(each.done() for each in checks)
    assert (len(children()), len(probe._turns)) == (1, 1)
    assert all(each.cancel() for each in checks)
    await asyncio.wait(checks)
    assert not children()
    checks.clear()
    gc.collect()
    assert not probe._turns


async def test_a_probe_ends_with_its_worker() -> None:
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-P', '-m', 'workers.child.probe'], stdin=-1).pid); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        probe = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    await eventually(lambda: not probe.is_running() or probe.status() == psutil.STATUS_ZOMBIE)


def test_the_probe_imports_no_torch_and_no_numpy() -> None:
    code = "import sys, workers.child.probe; sys.exit(bool({'torch', 'numpy', 'av', 'msgspec', 'asyncio'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0


def test_the_scans_of_a_jpeg_of_several_pictures_are_counted_too(tmp_path: Path) -> None:
    picture = Image.effect_noise((64, 64), 50)
    path = tmp_path / "mpo"
    path.write_bytes(with_scans(encoded(picture, "MPO", save_all=True, append_images=[picture], progressive=True), 200))
    with Image.open(path) as opened:
        assert opened.format == "MPO"
    assert "scans, at most 100" in (image_problem(path) or "")
