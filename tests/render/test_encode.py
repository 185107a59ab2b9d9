"""Sound files: every format at every rate. Clips whose sound is added afterwards."""

from __future__ import annotations

import io
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from movieq.tasks.params import AudioFormat
from tests.render import tagged
from workers.child.job import JobCancelled
from workers.child.media import encode
from workers.protocol import PREVIEW_BYTES

CODECS = {AudioFormat.MP3: "mp3float", AudioFormat.WAV: "pcm_s16le", AudioFormat.FLAC: "flac"}
TAGS = encode.Tags(title="Sound", engine="animatic", version="1")


@pytest.mark.parametrize("audio_format", AudioFormat)
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_written_in_each_format_at_each_rate(tmp_path: Path, audio_format: AudioFormat, rate: int, channels: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate).astype(np.float32) * np.float32(0.5)
    path = tmp_path / f"sound.{audio_format}"
    encode.write_sound(path, np.repeat(tone[:, None], channels, axis=1), rate, audio_format, TAGS, lambda done, of: None)
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.rate, stream.channels) == (CODECS[audio_format], rate, channels)
        decoded = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    assert len(decoded) / channels / rate == pytest.approx(0.5, abs=0.3)  # an MP3 is padded to whole frames
    assert np.abs(decoded.astype(np.float64)).max() > 0.1


def test_a_preview_of_noise_is_small_enough_to_be_sent() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (512, 512, 3), np.uint8)
    jpeg = encode.preview_jpeg(Image.fromarray(noise), 512)
    assert len(jpeg) <= PREVIEW_BYTES
    with Image.open(io.BytesIO(jpeg)) as small:
        assert small.size == (256, 256)


CLIP = encode.ClipFormat((64, 64), Fraction(24000, 1001), 120)
SOUND = np.random.default_rng(1).normal(0, 0.1, (round(CLIP.frames * 48_000 / CLIP.rate), 2)).astype(np.float32)


def written(path: Path, sound: encode.Samples | None = None, clip: encode.ClipFormat = CLIP) -> Path:
    """Write a clip of noise; return its path."""
    chance = np.random.default_rng(1)
    with encode.ClipWriter(path, clip, TAGS, sound) as writer:
        for _ in range(clip.frames):
            writer.add(encode.to_planes(Image.fromarray(chance.integers(0, 256, (*clip.size, 3), np.uint8))))
    return path


def packets(path: Path) -> list[tuple[str, int | None, int | None, int | None, bytes]]:
    """Return the packets of a file in the order in which they lie there: kind, times and content."""
    with av.open(str(path)) as container:
        found = sorted((each for each in container.demux() if each.size), key=lambda each: each.pos or 0)
        return [(each.stream.type, each.dts, each.pts, each.duration, bytes(each)) for each in found]


def test_a_sound_that_is_added_afterwards_is_interleaved_as_one_that_is_encoded_with_the_pictures(tmp_path: Path) -> None:
    together = written(tmp_path / "together.mp4", SOUND)
    silent = written(tmp_path / "silent.mp4")
    added = []
    for name in ("first.mp4", "again.mp4"):
        encode.add_sound(silent, tmp_path / name, CLIP, TAGS, SOUND, lambda: None)
        added.append((tmp_path / name).read_bytes())
    assert added[0] == added[1]
    assert added[0].index(b"moov") < added[0].index(b"mdat")
    found = packets(tmp_path / "first.mp4")
    assert found == packets(together)
    assert [each[1:] for each in found if each[0] == "video"] == [each[1:] for each in packets(silent)], "no picture is encoded again"
    assert tagged.tags_of(tmp_path / "first.mp4") == tagged.tags_of(silent)
    runs = [len(list(run)) for _, run in itertools.groupby(kind for kind, *_ in found)]
    assert max(runs) < 9, "players need not seek"


def test_adding_a_sound_can_be_stopped_at_each_picture(tmp_path: Path) -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        encode.add_sound(written(tmp_path / "silent.mp4"), tmp_path / "clip.mp4", CLIP, TAGS, SOUND, stop)
    assert calls == 3


def test_a_disk_that_is_full_when_the_last_pictures_are_written_fails_the_clip(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").symlink_to("/dev/full")
    clip = CLIP._replace(size=(256, 256), frames=3)  # so few that the encoder holds them all until the end
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "clip.mp4", clip=clip)
