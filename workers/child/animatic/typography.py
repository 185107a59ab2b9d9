"""Type: faces, measuring, wrapping and drawing, in Roboto and, for letters that it lacks, in what fontconfig knows.

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

EVEN_PIECES: Final = 120
"""Of at most so many words lines are made even; beyond, it is running text."""


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
    """Lines at most `most` pixels wide. Line ends in the text are kept; a word that is wider is broken, Chinese and Japanese anywhere."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        pieces = [part for piece in _pieces(paragraph) for part in _broken(piece, style, most)]
        while pieces:
            count, wide = 0, 0.0
            while count < len(pieces) and (count == 0 or wide + _estimate(pieces[count].rstrip(), style) <= most):
                wide += _estimate(pieces[count], style)
                count += 1
            while count > 1 and width("".join(pieces[:count]).strip(), style) > most:  # shaping can make a line wider than its letters
                count -= 1
            lines.append("".join(pieces[:count]).strip())
            del pieces[:count]
    return [line for line in lines if line]


def widest_word(text: str, style: Style) -> float:
    """Pixels of the longest part of the text that a line cannot be broken in."""
    return max((_estimate(piece.rstrip(), style) for line in text.split("\n") for piece in _pieces(line)), default=0.0)


def balance(text: str, style: Style, most: float) -> list[str]:
    """As few lines as `wrap` needs, their lengths as even as can be: no word hangs alone at the end. Long texts are wrapped only."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        pieces = [part for piece in _pieces(paragraph) for part in _broken(piece, style, most)]
        wrapped = wrap(paragraph, style, most)
        lines += _even(pieces, len(wrapped), style, most) or wrapped if len(pieces) <= EVEN_PIECES else wrapped
    return lines


def _even(pieces: list[str], count: int, style: Style, most: float) -> list[str]:
    """The pieces in that many lines with the least sum of squared space at their ends; none where letter by letter they do not fit."""
    widths = [_estimate(piece, style) for piece in pieces]
    start = [0.0, *accumulate(widths)]
    best = {0: (0.0, [0])}  # pieces set so far -> cost, and where each line ended
    for _ in range(count):
        reached: dict[int, tuple[float, list[int]]] = {}
        for done, (cost, ends) in best.items():
            for end in range(done + 1, len(pieces) + 1):
                space = most - (start[end] - start[done])
                if space < 0:
                    break
                if (total := cost + space**2) < reached.get(end, (float("inf"), []))[0]:
                    reached[end] = (total, [*ends, end])
        best = reached
    _, ends = best.get(len(pieces), (0.0, []))
    return ["".join(pieces[a:b]).strip() for a, b in pairwise(ends)]


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


def _pieces(paragraph: str) -> list[str]:
    """What a line can be made of: words with the space behind them, and single signs of scripts that are written without spaces."""
    return _PIECE.findall(" ".join(paragraph.split()))


_PIECE: Final = re.compile(
    r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef] ?|[^ \u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+ ?"
)


def _broken(piece: str, style: Style, most: float) -> Iterator[str]:
    """The piece, in parts where it alone is wider than a line."""
    if _estimate(piece.rstrip(), style) <= most:
        yield piece
        return
    part, wide = "", 0.0
    for letter in piece:
        advance = _letter_width(letter, style)
        if part and wide + advance > most:
            yield part
            part, wide = "", 0.0
        part, wide = part + letter, wide + advance
    yield part


def _estimate(text: str, style: Style) -> float:
    """The width letter by letter, without kerning: what thousands of letters can be measured by."""
    return sum(_letter_width(letter, style) for letter in text)


@lru_cache(maxsize=50_000)
def _letter_width(letter: str, style: Style) -> float:
    return width(letter, style)


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
