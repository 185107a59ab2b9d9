"""The contact sheet of the demo: all results on one page. Pictures, lengths and formats are read from the files."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final

import av
import font_roboto
import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from movieq.fetch.formats import Kind, decoder, read_head

Colour = tuple[int, int, int]
Mono = npt.NDArray[np.float32]

WIDTH: Final = 2400
MARGIN: Final = 96
GUTTER: Final = 24
ROW_GAP: Final = 74
COLUMNS: Final = 4
ROWS: Final = 2
FRAMES: Final = COLUMNS * ROWS

GROUND: Final = (18, 19, 22)
PANEL: Final = (27, 29, 33)
RULE: Final = (58, 61, 68)
PAPER: Final = (238, 235, 226)
QUIET: Final = (150, 152, 156)
SIGNAL: Final = (255, 196, 46)
"""The amber of a tally light, and the only accent colour, as on the slate of an animatic."""

LABEL: Final = ("RobotoMedium", 21, 0.14)
FIGURE: Final = ("Roboto", 30, 0.0)
CODE: Final = ("RobotoMedium", 25, 0.04)
SMALL: Final = ("Roboto", 23, 0.01)
TEXT: Final = ("Roboto", 28, 0.0)
TITLE: Final = ("RobotoLight", 92, -0.012)
QUOTE: Final = ("RobotoLight", 50, 0.0)

BAR: Final = 5
BAR_GAP: Final = 4
QUOTE_LINE: Final = 68

Style = tuple[str, int, float]
"""Font (a cut of Roboto), size in pixels, and letter spacing in ems."""


class Clip(msgspec.Struct, frozen=True):
    """The contents of a video file. `frames` are spread evenly, each with its number; `sound` is None if the file has none."""

    size: tuple[int, int]
    rate: float
    count: int
    codecs: str
    frames: list[tuple[int, Image.Image]]
    sound: Sound | None

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.count / self.rate


class Sound(msgspec.Struct, frozen=True):
    """The contents of a sound file, mixed to mono. Samples are in -1 to 1."""

    samples: Mono
    sample_rate: int
    codec: str

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a sheet. If `voice` is None, `voice_missing` says why."""

    title: str
    scene: str
    clip: Path
    picture: Path
    picture_text: str
    voice: Path | None
    voice_text: str
    voice_missing: str
    made_by: str


def draw(contents: Contents, dest: Path) -> None:
    """Draw the sheet and write it to `dest` as a PNG."""
    clip = read_clip(contents.clip)
    cell = ((WIDTH - 2 * MARGIN - (COLUMNS - 1) * GUTTER) // COLUMNS, 0)
    cell = (cell[0], round(cell[0] * clip.size[1] / clip.size[0]))
    frames_top = 416
    strip_top = frames_top + ROWS * (cell[1] + ROW_GAP) + 12
    lower_top = strip_top + 208
    lower_height = 620
    image = Image.new("RGB", (WIDTH, lower_top + lower_height + 178), GROUND)
    page = ImageDraw.Draw(image)
    _head(page, contents, clip)
    _frames(image, page, clip, frames_top, cell)
    _soundtrack(page, clip, strip_top)
    _picture(image, page, contents, (MARGIN, lower_top), lower_height)
    _voice(page, contents, (MARGIN + lower_height + GUTTER, lower_top, WIDTH - MARGIN, lower_top + lower_height))
    _text(page, MARGIN, image.height - 60, contents.made_by, SMALL, QUIET)
    image.save(dest, optimize=False, compress_level=6)


# ── The parts of the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _head(page: ImageDraw.ImageDraw, contents: Contents, clip: Clip) -> None:
    _text(page, MARGIN, 112, "CONTACT SHEET", LABEL, SIGNAL)
    _text(page, MARGIN - 4, 222, contents.title, TITLE, PAPER)
    for row, line in enumerate(_wrapped(contents.scene, TEXT, 1280)[:3]):
        _text(page, MARGIN, 294 + row * 42, line, TEXT, QUIET)
    facts = [
        ("LENGTH", f"{clip.seconds:.1f} s"),
        ("FRAMES", f"{clip.count} at {clip.rate:g} fps"),
        ("PICTURE", f"{clip.size[0]} × {clip.size[1]}"),  # noqa: RUF001  # a multiplication sign
        ("CODECS", clip.codecs),
    ]
    x = float(WIDTH - MARGIN)
    for label, value in reversed(facts):
        x -= max(_width(label, LABEL), _width(value, FIGURE))
        _text(page, x, 196, label, LABEL, QUIET)
        _text(page, x, 238, value, FIGURE, PAPER)
        x -= 30
        page.line((x, 172, x, 244), fill=RULE, width=2)
        x -= 30
    page.rectangle((x + 26, 166, x + 34, 250), fill=GROUND)  # no rule before the first


def _frames(image: Image.Image, page: ImageDraw.ImageDraw, clip: Clip, top: int, cell: tuple[int, int]) -> None:
    for place, (number, frame) in enumerate(clip.frames):
        row, column = divmod(place, COLUMNS)
        x, y = MARGIN + column * (cell[0] + GUTTER), top + row * (cell[1] + ROW_GAP)
        image.paste(frame.resize(cell, Image.Resampling.LANCZOS), (x, y))
        baseline = y + cell[1] + 38
        _text(page, x, baseline, timecode(number, clip.rate), CODE, SIGNAL)
        label = f"frame {number + 1}"
        _text(page, x + cell[0] - _width(label, SMALL), baseline, label, SMALL, QUIET)


def _soundtrack(page: ImageDraw.ImageDraw, clip: Clip, top: int) -> None:
    """Draw the sound of the clip as a wave, with a mark for each frame shown above."""
    left, right = MARGIN, WIDTH - MARGIN
    if clip.sound is None:
        _text(page, left, top + 40, "no sound", SMALL, QUIET)
        return
    _wave(page, clip.sound.samples, (left, top, right, top + 96), QUIET)
    for number, _ in clip.frames:
        x = left + (right - left) * (number + 0.5) / clip.count
        page.polygon(((x - 7, top - 12), (x + 7, top - 12), (x, top - 2)), fill=SIGNAL)
    _seconds(page, clip.seconds, (left, top + 96, right), every=1)


def _picture(image: Image.Image, page: ImageDraw.ImageDraw, contents: Contents, corner: tuple[int, int], side: int) -> None:
    with Image.open(contents.picture, formats=("JPEG", "PNG", "WEBP")) as picture:
        fitted = ImageOps.pad(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS, PANEL)
        size, kind = picture.size, picture.format
    image.paste(fitted, corner)
    label = f"{size[0]} × {size[1]} {kind}"  # noqa: RUF001
    _text(page, corner[0], corner[1] + side + 38, contents.picture_text, SMALL, QUIET)
    _text(page, corner[0] + side - _width(label, SMALL), corner[1] + side + 38, label, SMALL, QUIET)


def _voice(page: ImageDraw.ImageDraw, contents: Contents, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    page.rectangle((left, top, right - 1, bottom - 1), fill=PANEL)
    left, right = left + 64, right - 64
    _text(page, left, top + 82, "VOICE", LABEL, SIGNAL)
    lines = _wrapped(f"“{contents.voice_text}”", QUOTE, right - left)[:3]
    for row, line in enumerate(lines):
        _text(page, left - (18 if row == 0 else 0), top + 164 + row * QUOTE_LINE, line, QUOTE, PAPER)  # a hanging quotation mark
    under = top + 164 + len(lines) * QUOTE_LINE
    if contents.voice is None:
        for row, line in enumerate(_wrapped(f"No voice: {contents.voice_missing}", FIGURE, right - left)[:4]):
            _text(page, left, under + 40 + row * 44, line, FIGURE, QUIET)
        return
    sound = read_sound(contents.voice)
    _wave(page, sound.samples, (left, under + 6, right, bottom - 100), SIGNAL)
    _seconds(page, sound.seconds, (left, bottom - 100, right), every=0.5 if sound.seconds < 4 else 1)
    label = f"{sound.seconds:.1f} s   {sound.sample_rate / 1000:g} kHz   {sound.codec}"
    _text(page, right - _width(label, SMALL), top + 82, label, SMALL, QUIET)


def _wave(page: ImageDraw.ImageDraw, samples: Mono, box: tuple[int, int, int, int], colour: Colour) -> None:
    """Draw a wave as bars around the middle of the box. A bar shows the peak of its samples; the loudest bar is as high as the box."""
    left, top, right, bottom = box
    count = (right - left + BAR_GAP) // (BAR + BAR_GAP)
    edges = np.linspace(0, len(samples), count + 1).astype(int)
    peaks = [float(np.abs(samples[a:b]).max(initial=0.0)) for a, b in pairwise(edges)]
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    loudest = max(max(peaks), 1e-4)
    for place, peak in enumerate(peaks):
        x, reach = left + place * (BAR + BAR_GAP), max(half * peak / loudest, 1.5)
        page.rounded_rectangle((x, middle - reach, x + BAR - 1, middle + reach), radius=2, fill=colour)


def _seconds(page: ImageDraw.ImageDraw, seconds: float, line: tuple[int, int, int], every: float) -> None:
    """Draw a ruler of seconds under a wave."""
    left, y, right = line
    page.line((left, y + 12, right, y + 12), fill=RULE, width=2)
    for mark in np.arange(0, seconds + 1e-6, every):
        x = left + (right - left) * float(mark) / seconds
        page.line((x, y + 12, x, y + 22), fill=RULE, width=2)
        label = f"{mark:g} s"
        _text(page, min(max(x - _width(label, SMALL) / 2, left), right - _width(label, SMALL)), y + 52, label, SMALL, QUIET)


def timecode(frame: int, rate: float) -> str:
    """Return the timecode HH:MM:SS:FF of a frame, counted from 0 (SMPTE ST 12-1, non-drop)."""
    seconds, rest = divmod(frame, round(rate))
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}:{rest:02}"


# ── Type ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _font(cut: str, size: int) -> ImageFont.FreeTypeFont:
    path: str = font_roboto.font_files[cut]
    return ImageFont.truetype(path, size)


def _width(text: str, style: Style) -> float:
    cut, size, tracking = style
    return _font(cut, size).getlength(text) + tracking * size * (len(text) - 1 if tracking else 0)


def _text(page: ImageDraw.ImageDraw, x: float, baseline: float, text: str, style: Style, fill: Colour) -> None:
    cut, size, tracking = style
    font = _font(cut, size)
    for part in text if tracking else [text]:
        page.text((x, baseline), part, fill=fill, font=font, anchor="ls")
        x += font.getlength(part) + tracking * size


def _wrapped(text: str, style: Style, most: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer, style) > most:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_clip(path: Path) -> Clip:
    """Read a clip. It is divided into `FRAMES` equal parts, and the middle frame of each is shown."""
    with av.open(str(path), format="mov") as container:
        video = container.streams.video[0]
        video.thread_type = "AUTO"
        count = video.frames
        wanted = {int((place + 0.5) * count / FRAMES) for place in range(FRAMES)}
        frames = [
            (number, Image.fromarray(frame.to_ndarray(format="rgb24")))
            for number, frame in enumerate(container.decode(video))
            if number in wanted
        ]
        rate = float(video.average_rate or 24)
        size = (video.codec_context.width, video.codec_context.height)
        codecs = [stream.codec_context.name for stream in (*container.streams.video, *container.streams.audio)]
        silent = not container.streams.audio
    names = " / ".join({"h264": "H.264", "aac": "AAC"}.get(codec, codec) for codec in codecs)
    return Clip(size, rate, count, names, frames, None if silent else read_sound(path))


def read_sound(path: Path) -> Sound:
    """Read the sound of a file."""
    with av.open(str(path), format=decoder(read_head(path), Kind.AUDIO) or "mov") as container:
        audio = container.streams.audio[0]
        to_mono = av.AudioResampler(format="flt", layout="mono", rate=audio.rate)
        blocks: list[Mono] = []
        for frame in container.decode(audio):
            blocks += [block.to_ndarray()[0] for block in to_mono.resample(frame)]
        rate, codec = audio.rate, audio.codec_context.name
    samples = np.concatenate(blocks) if blocks else np.zeros(1, np.float32)
    return Sound(samples, rate, {"mp3float": "MP3", "mp3": "MP3", "aac": "AAC"}.get(codec, codec))
