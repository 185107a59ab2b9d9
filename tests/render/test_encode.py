"""Sound files: every format at every rate."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from movieq.tasks.params import AudioFormat
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
