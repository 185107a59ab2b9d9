"""Type: faces, measuring, wrapping and drawing, in Roboto and, for letters that it lacks, in what fontconfig knows.

Sizes are pixels of the em square. Text is drawn from its baseline.
"""

from __future__ import annotations

import shutil
import subprocess
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from typing import Final, NamedTuple

import font_roboto
from PIL import Image, ImageDraw, ImageFont

from movieq.errors import EngineUnavailable


class Weight(StrEnum):
    """The cuts of Roboto that we set."""

    LIGHT = "RobotoLight"
    REGULAR = "Roboto"
    MEDIUM = "RobotoMedium"
    BOLD = "RobotoBold"
    BLACK = "RobotoBlack"


class Style(NamedTuple):
    """How a line is set. `tracking` is extra space between letters, in ems, for labels in capitals."""

    weight: Weight
    size: int
    tracking: float = 0.0


LINE_HEIGHT: Final = 1.28
"""Baseline to baseline, in ems."""

CAP_HEIGHT: Final = 0.711
"""Of Roboto, in ems (its OS/2 table)."""

DESCENT: Final = 0.22


def width(text: str, style: Style) -> float:
    """Pixels from the first letter's origin to where the next would begin."""
    return sum(_advance(part, style, font) for font, part in _runs(text, style))


def draw(canvas: ImageDraw.ImageDraw, x: float, baseline: float, text: str, style: Style, fill: tuple[int, ...]) -> float:
    """Draws one line from its baseline at the left and returns where the next letter would begin."""
    for font, part in _runs(text, style):
        if style.tracking:
            for letter in part:
                canvas.text((x, baseline), letter, fill=fill, font=font, anchor="ls")
                x += font.getlength(letter) + style.tracking * style.size
        else:
            canvas.text((x, baseline), part, fill=fill, font=font, anchor="ls")
            x += font.getlength(part)
    return x


def wrap(text: str, style: Style, most: float) -> list[str]:
    """Lines at most `most` pixels wide. Line ends in the text are kept; a word that is wider is broken."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            for piece in _pieces(word, style, most):
                if line and width(f"{line} {piece}", style) <= most:
                    line = f"{line} {piece}"
                else:
                    if line:
                        lines.append(line)
                    line = piece
        if line:
            lines.append(line)
    return lines


def balance(text: str, style: Style, most: float) -> list[str]:
    """The fewest lines that `wrap` needs, of lengths as even as can be: nothing hangs alone on the last one."""
    lines = wrap(text, style, most)
    low, high = most / max(1, len(lines)) * 0.9, most
    while high - low > style.size / 4:
        middle = (low + high) / 2
        if len(narrower := wrap(text, style, middle)) <= len(lines):
            lines, high = narrower, middle
        else:
            low = middle
    return lines


def shorten(text: str, style: Style, most: float) -> str:
    """The text, cut with an ellipsis where it is wider than `most`."""
    if width(text, style) <= most:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width(text[:middle].rstrip() + "…", style) <= most else (low, middle - 1)
    return text[:low].rstrip() + "…" if low else ""


def missing(text: str) -> str:
    """The letters of the text that no font at hand can draw."""
    return "".join(dict.fromkeys(c for c in text if not _ignorable(c) and _face_for(c, Weight.REGULAR) is None))


def _pieces(word: str, style: Style, most: float) -> Iterator[str]:
    while len(word) > 1 and width(word, style) > most:
        count = max(1, int(len(word) * most / width(word, style)))
        while count > 1 and width(word[:count], style) > most:
            count -= 1
        yield word[:count]
        word = word[count:]
    yield word


def _runs(text: str, style: Style) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in parts of one face. What has no shape of its own (spaces, joined accents) stays with the letters before it."""
    text = "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Cc")
    own = _path(style.weight)
    current, start = own, 0
    for index, letter in enumerate(text):
        path = current if _ignorable(letter) or (current != own and not letter.isalnum() and _has(current, letter)) else None
        path = path or _face_for(letter, style.weight) or own
        if path != current:
            if index > start:
                yield _font(current, style.size), text[start:index]
            current, start = path, index
    if start < len(text):
        yield _font(current, style.size), text[start:]


def _advance(part: str, style: Style, font: ImageFont.FreeTypeFont) -> float:
    if style.tracking:
        return sum(font.getlength(letter) for letter in part) + style.tracking * style.size * len(part)
    return font.getlength(part)


def _ignorable(letter: str) -> bool:
    """Has no shape of its own: spaces, accents that join, controls and format marks."""
    category = unicodedata.category(letter)
    return category[0] in "ZM" or category in ("Cc", "Cf")


@cache
def _path(weight: Weight) -> str:
    path: str | None = font_roboto.font_files.get(weight)
    if path is None:
        raise EngineUnavailable(f"the font {weight} is missing: pip install font-roboto")
    return path


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _face_for(letter: str, weight: Weight) -> str | None:
    """The file of a font that has the letter: Roboto, else the first of the system's; None where there is none."""
    own = _path(weight)
    if _has(own, letter):
        return own
    fonts = _system_fonts(weight in (Weight.BOLD, Weight.BLACK))
    return next((path for path, ranges in fonts if _covers(ranges, ord(letter)) and _has(path, letter)), None)


@cache
def _system_fonts(bold: bool) -> list[tuple[str, list[tuple[int, int]]]]:
    """Files of fontconfig's fonts with the characters they have, those that look most like ours first; none without fontconfig."""
    lister = shutil.which("fc-list")
    if lister is None:
        return []
    found = subprocess.run(
        [lister, "-f", "%{file}\t%{style}\t%{charset}\n"], capture_output=True, text=True, timeout=20, check=False
    ).stdout
    fonts = []
    for line in found.splitlines():
        path, style, charset = line.split("\t")
        ranges = [(int(a, 16), int(b or a, 16)) for a, _, b in (part.partition("-") for part in charset.split())]
        unlike = (
            ("Bold" in style) != bold,
            "Sans" not in path,
            "Mono" in path,
            "Oblique" in style or "Italic" in style,
            "Condensed" in style,
        )
        fonts.append((unlike, path, ranges))
    return [(path, ranges) for _, path, ranges in sorted(fonts)]


def _covers(ranges: list[tuple[int, int]], code: int) -> bool:
    place = bisect_right(ranges, (code, 0x110000)) - 1
    return place >= 0 and ranges[place][0] <= code <= ranges[place][1]


@cache
def _has(path: str, letter: str) -> bool:
    """Whether the font has a glyph for the letter: it draws something else than for a character that no font has."""
    try:
        font = _font(path, 24)
    except OSError:
        return False
    return _drawn(font, letter) != _drawn(font, "\U0010fffe")


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    image = Image.new("L", (72, 72))
    ImageDraw.Draw(image).text((16, 48), letter, fill=255, font=font, anchor="ls")
    return image.size, image.tobytes()
