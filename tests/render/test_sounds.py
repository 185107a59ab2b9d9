"""Sounds as they come in: files whose format changes on the way, and damaged ones."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from movieq.errors import InvalidInput
from workers.child.media.encode import read_sound

RATE = 24_000
CODECS = {"wav": "pcm_s16le", "mp3": "libmp3lame", "flac": "flac", "ogg": "libopus", "mp4": "aac"}


def tone(name: str, rate: int, layout: str, pitch_hz: int, seconds: float = 1.0) -> bytes:
    """Return a tone in this format. An MP3 is frames alone, so that several can be joined."""
    buffer = io.BytesIO()
    options = {"write_xing": "0", "id3v2_version": "0"} if name == "mp3" else {}
    with av.open(buffer, "w", format=name, options=options) as container:
        stream = cast(AudioStream, container.add_stream(CODECS[name], rate=rate, layout=layout))
        wave = (8000 * np.sin(2 * np.pi * pitch_hz * np.arange(int(rate * seconds)) / rate)).astype(np.int16)
        samples = np.repeat(wave, 2) if layout == "stereo" else wave
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "s16", layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def pitch(samples: np.ndarray[tuple[int], np.dtype[np.float32]], at_s: float) -> int:
    """Return the strongest frequency of the fifth of a second that begins there, in Hz."""
    part = samples[round(at_s * RATE) :][: RATE // 5]
    return int(np.abs(np.fft.rfft(part)).argmax()) * 5


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations([(44_100, "mono"), (48_000, "stereo"), (24_000, "mono")], 2)))
def test_a_sound_whose_format_changes_on_the_way_is_heard_to_its_end(
    tmp_path: Path, first: tuple[int, str], second: tuple[int, str]
) -> None:
    path = tmp_path / "voice"
    path.write_bytes(tone("mp3", *first, 440) + tone("mp3", *second, 880))
    heard, longer = read_sound("voice", path, RATE, 60.0)
    assert not longer
    assert len(heard) / RATE == pytest.approx(2, abs=0.15)
    assert [pitch(heard, at_s) for at_s in (0.4, 1.5)] == [440, 880]


@pytest.mark.parametrize("name", ["wav", "mp3"])
def test_a_title_in_another_encoding_does_not_matter(tmp_path: Path, name: str) -> None:
    """Older programs write Latin-1, where the format has UTF-8 or no rule."""
    path = tmp_path / "voice"
    body = tone(name, 48_000, "mono", 440)
    if name == "wav":
        at = body.index(b"data")
        body = body[:at] + b"LIST\x10\0\0\0INFOINAM\x04\0\0\0M\xfcll" + body[at:]
    else:
        body = b"ID3\x04\0\0\0\0\0\x0fTIT2\0\0\0\x05\0\0\x03M\xfcll" + body
    path.write_bytes(body)
    heard, _ = read_sound("voice", path, RATE, 60.0)
    assert pitch(heard, 0.4) == 440


BODIES = {name: tone(name, 48_000, "mono", 440, 0.2) for name in CODECS}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(BODIES)), at=st.integers(0, 900), junk=st.binary(max_size=8), cut=st.integers(0, 3000) | st.none())
def test_a_damaged_sound_is_heard_or_refused_and_no_other_error(tmp_path: Path, name: str, at: int, junk: bytes, cut: int | None) -> None:
    body = BODIES[name]
    path = tmp_path / "damaged"
    path.write_bytes((body[:at] + junk + body[at + len(junk) :])[:cut])
    message = ""
    try:
        heard, _ = read_sound("https://cdn.example/voice", path, RATE, 60.0)
        assert heard.dtype == np.float32
    except InvalidInput as error:
        message = error.message
    assert message.startswith("https://cdn.example/voice") or not message
    assert str(tmp_path) not in message
