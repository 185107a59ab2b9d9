"""Typography: choosing fonts, measuring, wrapping and drawing text, in Roboto and, for letters that it lacks, in what fontconfig finds.

Sizes are pixels of the em square. Text is drawn from its baseline.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from enum import StrEnum
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import font_roboto
from PIL import Image, ImageDraw, ImageFont

from movieq.errors import EngineUnavailable


class Weight(StrEnum):
    """The weights of Roboto that are used."""

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
"""Of Roboto, in ems (from its OS/2 table)."""

DESCENT: Final = 0.22
"""Of Roboto, in ems."""

MAX_BALANCED_PIECES: Final = 120
"""Text of up to this many words gets lines of even length; longer text is running text."""


def width(text: str, style: Style) -> float:
    """Return the pixels from the first letter's origin to where the next letter would start."""
    return sum(_advance(part, style, font) for font, part in _runs(text, style))


def draw(canvas: ImageDraw.ImageDraw, x: float, baseline: float, text: str, style: Style, fill: tuple[int, ...]) -> float:
    """Draw one line from its baseline and return where the next letter would start."""
    for font, part in _runs(text, style):
        if style.tracking:
            for letter in part:
                canvas.text((x, baseline), letter, fill=fill, font=font, anchor="ls")
                x += font.getlength(letter) + style.tracking * style.size
        else:
            canvas.text((x, baseline), part, fill=fill, font=font, anchor="ls")
            x += font.getlength(part)
    return x


def wrap(text: str, style: Style, max_width: float) -> list[str]:
    """Return lines at most `max_width` pixels wide.

    Line breaks in the text are kept. A word wider than a line is broken; Chinese and Japanese may break anywhere.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        pieces = [part for piece in _pieces(paragraph) for part in _split_to_width(piece, style, max_width)]
        while pieces:
            count, wide = 0, 0.0
            while count < len(pieces) and (count == 0 or wide + _approximate_width(pieces[count].rstrip(), style) <= max_width):
                wide += _approximate_width(pieces[count], style)
                count += 1
            # shaping can make a line wider than the sum of its letters
            while count > 1 and width("".join(pieces[:count]).strip(), style) > max_width:
                count -= 1
            lines.append("".join(pieces[:count]).strip())
            del pieces[:count]
    return [line for line in lines if line]


def widest_word(text: str, style: Style) -> float:
    """Return the width in pixels of the widest part of the text that contains no line break opportunity."""
    return max((_approximate_width(piece.rstrip(), style) for line in text.split("\n") for piece in _pieces(line)), default=0.0)


def balance(text: str, style: Style, max_width: float) -> list[str]:
    """Return as few lines as `wrap`, as even in length as possible, so that no word hangs alone at the end. Long texts are only wrapped."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        pieces = [part for piece in _pieces(paragraph) for part in _split_to_width(piece, style, max_width)]
        wrapped = wrap(paragraph, style, max_width)
        lines += _even(pieces, len(wrapped), style, max_width) or wrapped if len(pieces) <= MAX_BALANCED_PIECES else wrapped
    return lines


def _even(pieces: list[str], count: int, style: Style, max_width: float) -> list[str]:
    """Return the pieces in `count` lines with the least sum of squared space at their ends; empty if they do not fit."""
    widths = [_approximate_width(piece, style) for piece in pieces]
    start = [0.0, *accumulate(widths)]
    best = {0: (0.0, [0])}  # pieces set so far -> cost, and where each line ended
    for _ in range(count):
        reached: dict[int, tuple[float, list[int]]] = {}
        for done, (cost, ends) in best.items():
            for end in range(done + 1, len(pieces) + 1):
                space = max_width - (start[end] - start[done])
                if space < 0:
                    break
                if (total := cost + space**2) < reached.get(end, (float("inf"), []))[0]:
                    reached[end] = (total, [*ends, end])
        best = reached
    _, ends = best.get(len(pieces), (0.0, []))
    return ["".join(pieces[a:b]).strip() for a, b in pairwise(ends)]


def shorten(text: str, style: Style, max_width: float) -> str:
    """Return the text, cut with an ellipsis if it is wider than `max_width`."""
    if width(text, style) <= max_width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width(text[:middle].rstrip() + "…", style) <= max_width else (low, middle - 1)
    return text[:low].rstrip() + "…" if low else ""


def missing_glyphs(text: str) -> str:
    """Return the letters of the text that no available font has."""
    return "".join(dict.fromkeys(c for c in text if not _has_no_glyph(c) and _face_for(c, Weight.REGULAR) is None))


def _pieces(paragraph: str) -> list[str]:
    """Split a paragraph where a line may break: after each space, and between characters of scripts written without spaces."""
    return _PIECE.findall(" ".join(paragraph.split()))


_PIECE: Final = re.compile(
    r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef] ?|[^ \u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+ ?"
)


def _split_to_width(piece: str, style: Style, max_width: float) -> Iterator[str]:
    """Yield the piece, or parts of it if it is wider than a line."""
    if _approximate_width(piece.rstrip(), style) <= max_width:
        yield piece
        return
    part, wide = "", 0.0
    for letter in piece:
        advance = _glyph_width(letter, style)
        if part and wide + advance > max_width:
            yield part
            part, wide = "", 0.0
        part, wide = part + letter, wide + advance
    yield part


def _approximate_width(text: str, style: Style) -> float:
    """Return the width letter by letter, without kerning: fast enough for thousands of letters."""
    return sum(_glyph_width(letter, style) for letter in text)


@lru_cache(maxsize=50_000)
def _glyph_width(letter: str, style: Style) -> float:
    return width(letter, style)


def _runs(text: str, style: Style) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """Yield the text in runs of one font. What has no glyph of its own (spaces, combining accents) stays with the letters before it."""
    text = "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Cc")
    own = _path(style.weight)
    current, start = own, 0
    for index, letter in enumerate(text):
        path = current if _has_no_glyph(letter) or (current != own and not letter.isalnum() and _has_glyph(current, letter)) else None
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


def _has_no_glyph(letter: str) -> bool:
    """Whether the character has no shape of its own: spaces, combining accents, control and format characters."""
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
    """Return the file of a font that has the letter: Roboto, else the first suitable system font; None if there is none."""
    own = _path(weight)
    if _has_glyph(own, letter):
        return own
    fonts = _system_fonts(weight in (Weight.BOLD, Weight.BLACK))
    return next((path for path, ranges in fonts if _covers(ranges, ord(letter)) and _has_glyph(path, letter)), None)


@cache
def _system_fonts(bold: bool) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return the font files that fontconfig lists, with their character ranges, those most like Roboto first; empty without fontconfig."""
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
def _has_glyph(path: str, letter: str) -> bool:
    """Whether the font has a glyph for the letter: it draws something other than for a character that no font has."""
    try:
        font = _font(path, 24)
    except OSError:
        return False
    return _rendered(font, letter) != _rendered(font, "\U0010fffe")


def _rendered(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    image = Image.new("L", (72, 72))
    ImageDraw.Draw(image).text((16, 48), letter, fill=255, font=font, anchor="ls")
    return image.size, image.tobytes()
