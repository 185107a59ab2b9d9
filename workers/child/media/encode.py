"""Encoding pictures and samples as files: mp4, jpeg, png, webp, mp3, wav, flac.

A picture for a clip is `Planes`: Y, U and V in BT.709 limited range, chroma at half size, as three "L" images of Pillow. That is what the
encoder takes, and processing three small planes costs half as much as RGB. Samples are float32 (n, channels), -1 to 1.

The same pictures, samples and tags give the same bytes: encoders run with a fixed number of threads, and no muxer writes times or versions.
Errors of the library (av.FFmpegError) are not translated: they can only come from our own data.
"""

from __future__ import annotations

import io
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast
from xml.sax.saxutils import escape

import av
import msgspec
import numpy as np
import numpy.typing as npt
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.plane import VideoPlane
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from PIL import Image, PngImagePlugin

from movieq.credentials import SOURCES
from movieq.errors import InvalidInput
from movieq.fetch import formats
from movieq.tasks.params import AudioFormat, ImageFormat
from workers.faults import abbreviated, public_message
from workers.protocol import PREVIEW_BYTES

Samples = npt.NDArray[np.float32]
"""(n, channels), -1 to 1."""

CLIP_SAMPLE_RATE = 48_000
X264_THREADS = 4  # fixed, because the output depends on it
QUEUED_FRAMES = 4
TAG_BYTES = 30_000
"""Longest escaped text in an XMP packet: a JPEG holds 65,502 bytes of XMP, and the prompt stands in it twice."""


class Planes(NamedTuple):
    """One picture for the encoder: Y (h, w), U and V (h/2, w/2), uint8, BT.709 limited range."""

    y: Image.Image
    u: Image.Image
    v: Image.Image


class ClipFormat(NamedTuple):
    """The shape of a clip: its size in pixels, frame rate and number of frames."""

    size: tuple[int, int]
    rate: Fraction
    frames: int

    @property
    def seconds(self) -> float:
        return float(self.frames / self.rate)

    @property
    def aspect(self) -> float:
        return self.size[0] / self.size[1]


class Tags(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a file says about itself. `source` is the IPTC digital source type, `revision` that of the weights."""

    title: str
    engine: str
    version: str
    source: str = ""
    prompt: str = ""
    seed: int | None = None
    model: str = ""
    revision: str | None = None
    task: str = ""

    @property
    def comment(self) -> str:
        """The tags as JSON, for programs."""
        return msgspec.json.encode(self).decode()


def to_planes(image: Image.Image) -> Planes:
    """Convert an RGB image with even sides to planes."""
    frame = av.VideoFrame.from_ndarray(np.asarray(image), "rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.MPEG
    )
    y, u, v = (Image.fromarray(np.ascontiguousarray(_plane_array(plane))) for plane in frame.planes)
    return Planes(y, u, v)


def to_image(planes: Planes) -> Image.Image:
    """Convert planes to an RGB image."""
    frame = _frame(planes).reformat(
        format="rgb24", src_colorspace=Colorspace.ITU709, src_color_range=ColorRange.MPEG, dst_color_range=ColorRange.JPEG
    )
    return Image.fromarray(frame.to_ndarray())


def _frame(planes: Planes) -> av.VideoFrame:
    frame = av.VideoFrame(planes.y.width, planes.y.height, "yuv420p")
    for plane, image in zip(frame.planes, planes, strict=True):
        _plane_array(plane)[:] = np.asarray(image)
    return frame


def _plane_array(plane: VideoPlane) -> npt.NDArray[np.uint8]:
    """Return the plane's own memory as (height, width), without the padding at the end of its rows."""
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)  # type: ignore[call-overload]  # its stub hides the buffer
    return rows[:, : plane.width]  # type: ignore[no-any-return]


class ClipWriter:
    """Writes an mp4: H.264 High, yuv420p tagged BT.709, AAC if there is sound, moov first. `add_sound` adds the sound afterwards.

    Pictures are encoded in a thread of this object, so that the next ones can be drawn meanwhile; at most `QUEUED_FRAMES` wait. If the
    block ends with an exception, the file is deleted.
    """

    def __init__(self, path: Path, clip: ClipFormat, tags: Tags, sound: Samples | None = None) -> None:
        """`sound` is stereo at `CLIP_SAMPLE_RATE`, as long as the clip."""
        self._path = path
        self._rate = clip.rate
        self._waiting: queue.Queue[Planes | None] = queue.Queue(QUEUED_FRAMES)
        self._abandoned = False
        self._fault: BaseException | None = None
        self._container = _open_mp4(path, tags)
        self._video = self._video_stream(clip)
        self._sound = _SoundTrack(self._container, sound, clip.rate) if sound is not None else None
        self._thread = threading.Thread(target=self._encode, name="encode")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._abandoned = kind is not None
        self._waiting.put(None)
        self._thread.join()
        self._container.close()
        if self._abandoned or self._fault:
            self._path.unlink(missing_ok=True)
        if self._fault and not self._abandoned:
            raise self._fault

    def add(self, planes: Planes) -> None:
        """Append one picture; wait while the queue is full. Raises what the encoder raised."""
        if self._fault:
            raise self._fault
        self._waiting.put(planes)

    def _video_stream(self, clip: ClipFormat) -> VideoStream:
        options = {
            "preset": "veryfast",
            "crf": "20",
            "profile": "high",
            "threads": str(X264_THREADS),
            "thread_type": "slice",  # at 2160p as fast as frame threads, with 240 MB less memory
            # mbtree's AVX code reads past its rows: the same pictures gave 30 different files in 40 runs (av 18.1); without it, one
            "x264-params": "mbtree=0",
        }
        stream = self._container.add_stream("libx264", rate=clip.rate, options=options)
        stream.width, stream.height = clip.size
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = 1 / clip.rate
        codec.gop_size = max(1, round(2 * clip.rate))
        codec.flags |= av.codec.context.Flags.bitexact
        codec.color_range = ColorRange.MPEG
        codec.colorspace = Colorspace.ITU709
        codec.color_primaries = ColorPrimaries.BT709
        codec.color_trc = ColorTrc.BT709
        return stream

    def _encode(self) -> None:
        item = None
        try:
            count = 0
            while (item := self._waiting.get()) is not None:
                frame = _frame(item)
                frame.pts, frame.time_base = count, 1 / self._rate
                self._container.mux(self._video.encode(frame))
                count += 1
                if self._sound:
                    self._sound.encode_until(count)
            if not self._abandoned:
                self._container.mux(self._video.encode(None))
                if self._sound:
                    self._sound.end()
        except BaseException as fault:  # raised again by `add` or at the end of the block
            self._fault = fault
            while item is not None:
                item = self._waiting.get()


class _SoundTrack:
    """The AAC stream of an mp4, encoded with its pictures and interleaved with them, so that players need not seek."""

    def __init__(self, container: OutputContainer, samples: Samples, rate: Fraction) -> None:
        """`samples` are stereo at `CLIP_SAMPLE_RATE`; `rate` is that of the pictures."""
        self._container = container
        self._samples = samples
        self._rate = rate
        self._stream = container.add_stream("aac", rate=CLIP_SAMPLE_RATE, layout="stereo")
        self._stream.codec_context.bit_rate = 160_000
        self._stream.codec_context.flags |= av.codec.context.Flags.bitexact

    def encode_until(self, count: int) -> None:
        """Encode the sound of picture number `count`, counted from 1."""
        first, last = (round(i * CLIP_SAMPLE_RATE / self._rate) for i in (count - 1, count))
        for frame in audio_frames(self._samples[first:last], CLIP_SAMPLE_RATE, first):
            self._container.mux(self._stream.encode(frame))

    def end(self) -> None:
        """Encode what the encoder still holds."""
        self._container.mux(self._stream.encode(None))


def add_sound(silent: Path, path: Path, clip: ClipFormat, tags: Tags, sound: Samples, check: Callable[[], None]) -> None:
    """Write the clip of the file `silent` with a sound, as `ClipWriter` does. Its pictures are copied, not encoded again.

    `check` is called for each picture, and can stop the work by raising.
    """
    with av.open(str(silent)) as source, _open_mp4(path, tags) as target:
        pictures = target.add_stream_from_template(source.streams.video[0], opaque=True)
        track = _SoundTrack(target, sound, clip.rate)
        packets = (packet for packet in source.demux(video=0) if packet.dts is not None)  # the last one only ends the stream
        for count, packet in enumerate(packets, 1):
            check()
            packet.stream = pictures
            target.mux(packet)
            track.encode_until(count)
        track.end()


def _open_mp4(path: Path, tags: Tags) -> OutputContainer:
    """Open an mp4 with these tags for writing: its index comes first, and nothing in it depends on the time or the library's version."""
    container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"})
    container.metadata.update({"title": tags.title, "description": tags.prompt, "comment": tags.comment})
    return container


def audio_frames(samples: Samples, rate: int, first: int = 0) -> Iterator[av.AudioFrame]:
    """Yield the samples as planar frames of at most a second."""
    for start in range(0, len(samples), rate):
        part = samples[start : start + rate]
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part.T), "fltp", "stereo" if part.shape[1] == 2 else "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, first + start, Fraction(1, rate)
        yield frame


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Return the samples at another rate."""
    resampler = av.AudioResampler("fltp", "stereo" if samples.shape[1] == 2 else "mono", wanted)
    frames = [out for frame in (*audio_frames(samples, rate), None) for out in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray().T for frame in frames]).astype(np.float32)


def read_sound(reference: str, path: Path, rate: int, seconds: float) -> tuple[Samples, bool]:
    """Return the sound of a file as mono samples at `rate` Hz, cut after `seconds`, and whether it was longer.

    Raises InvalidInput naming the reference if the file has no sound that can be decoded.
    """
    if (pinned := formats.decoder(formats.read_head(path), formats.Kind.AUDIO)) is None:
        raise InvalidInput(f"{abbreviated(reference)}: its sound cannot be read: it is of an unknown kind")
    wanted, size = round(seconds * rate), 0
    parts: list[Samples] = []
    try:
        with av.open(str(path), format=pinned, metadata_errors="replace") as container:
            for part in _resampled(container.decode(audio=0), rate):
                parts.append(part)
                size += len(part)
                if size > wanted:
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:  # damaged after its header, or a video without sound
        raise InvalidInput(f"{abbreviated(reference)}: its sound cannot be read: {public_message(error)}") from error
    if not size:
        raise InvalidInput(f"{abbreviated(reference)}: there is no sound in it")
    return np.concatenate(parts)[:wanted].astype(np.float32), size > wanted


def _resampled(frames: Iterable[av.AudioFrame], rate: int) -> Iterator[Samples]:
    """Yield mono samples at `rate` Hz. The frames may change their rate and layout, as in files that were joined end to end."""
    for _, alike in itertools.groupby(frames, lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)):
        resampler = av.AudioResampler("fltp", "mono", rate)
        for frame in itertools.chain(alike, (None,)):
            for each in resampler.resample(frame):
                yield each.to_ndarray()[0]


class _Sound(NamedTuple):
    """How an audio format is written."""

    codec: str
    container: str
    content_type: str


_SOUNDS = {
    AudioFormat.MP3: _Sound("libmp3lame", "mp3", "audio/mpeg"),
    AudioFormat.WAV: _Sound("pcm_s16le", "wav", "audio/wav"),
    AudioFormat.FLAC: _Sound("flac", "flac", "audio/flac"),
}
_MP3_BIT_RATES = {8000: 48_000, 16000: 96_000, 22050: 128_000, 24000: 128_000, 44100: 192_000, 48000: 192_000}


def write_sound(path: Path, samples: Samples, rate: int, kind: AudioFormat, tags: Tags, done: Callable[[int, int], None]) -> str:
    """Write mono or stereo samples at `rate` Hz and return the content type; call `done(second, seconds)` after each second."""
    sound = _SOUNDS[kind]
    with av.open(str(path), "w", format=sound.container, options={"fflags": "+bitexact"}) as container:
        container.metadata.update({"title": tags.title, "comment": tags.comment})
        stream = cast(AudioStream, container.add_stream(sound.codec, rate=rate, layout="stereo" if samples.shape[1] == 2 else "mono"))
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        if kind is AudioFormat.MP3:
            stream.codec_context.bit_rate = _MP3_BIT_RATES[rate]
        seconds = -(-len(samples) // rate)
        for second, frame in enumerate(audio_frames(samples, rate), 1):
            container.mux(stream.encode(frame))
            done(second, seconds)
        container.mux(stream.encode(None))
    return sound.content_type


def write_image(path: Path, image: Image.Image, kind: ImageFormat, tags: Tags) -> str:
    """Write the RGB image with its tags as XMP, in a PNG also as text, and return the content type."""
    xmp = _xmp(tags)
    if kind is ImageFormat.JPEG:
        image.save(path, "JPEG", quality=90, subsampling=0, xmp=xmp)
    elif kind is ImageFormat.WEBP:
        image.save(path, "WEBP", quality=88, method=2, xmp=xmp)
    else:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        texts = {"Title": tags.title, "Description": tags.prompt, "Software": f"movieq {tags.version}", "Comment": tags.comment}
        for keyword, text in texts.items():
            if text:
                info.add_itxt(keyword, text)
        image.save(path, "PNG", compress_level=3, pnginfo=info)
    return f"image/{kind}"


def preview_jpeg(image: Image.Image, side: int = 256) -> bytes:
    """Return the image as a JPEG of at most `PREVIEW_BYTES`.

    Its longer side has at most `side` pixels, and half as many if no quality makes it small enough.
    """
    small = image.copy()
    while True:
        small.thumbnail((side, side))
        for quality in (70, 50, 30, 10):
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= PREVIEW_BYTES:
                return buffer.getvalue()
        side //= 2  # noise, as the first steps of a model show it


def _xmp(tags: Tags) -> bytes:
    """Return the tags as an XMP packet, which photo tools read (XMP specification, part 1)."""
    fields: dict[str, Any] = msgspec.to_builtins(tags)
    own = "".join(f"<movieq:{name}>{_xml(str(value))}</movieq:{name}>" for name, value in fields.items())
    if tags.source:
        own += f"<Iptc4xmpExt:DigitalSourceType>{SOURCES}{tags.source}</Iptc4xmpExt:DigitalSourceType>"
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:movieq="urn:movieq:tags" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f"<xmp:CreatorTool>movieq {_xml(tags.version)}</xmp:CreatorTool>"
        f'<dc:title><rdf:Alt><rdf:li xml:lang="x-default">{_xml(tags.title)}</rdf:li></rdf:Alt></dc:title>'
        f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{_xml(tags.prompt)}</rdf:li></rdf:Alt></dc:description>'
        f'{own}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _xml(text: str) -> str:
    """Escape text for XML 1.0 and cut it to `TAG_BYTES`. Characters that XML forbids even escaped are left out."""
    escaped = [escape(c) for c in text if (c >= " " and c not in "\ufffe\uffff") or c in "\t\n\r"]
    ends = itertools.accumulate(len(each.encode()) for each in escaped)
    return "".join(each for each, end in zip(escaped, ends, strict=True) if end <= TAG_BYTES)
