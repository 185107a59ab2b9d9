"""What is set over the pictures of a clip: captions, lower thirds, and the slate that says ANIMATIC.

Each is drawn once as an overlay and then laid on many frames. All of it stays inside the title-safe area (5 % from each edge, SMPTE
ST 2046-1) but the slate, which is a strip along the top edge. Type stands on a scrim that keeps 4.5:1 on a white picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from workers.child.animatic import typography
from workers.child.animatic.typography import CAP_HEIGHT, DESCENT, LINE_HEIGHT, Style, Weight
from workers.child.media.encode import Format, Planes, planes

SAFE: Final = 0.05
SCRIM: Final = (10, 10, 12, 178)
PAPER: Final = (244, 241, 232, 255)
QUIET: Final = (178, 176, 170, 255)
SIGNAL: Final = (255, 196, 46, 255)
"""The amber of a camera's tally: the one accent."""

PAGE_S: Final = 1.6
"""A caption page stands at least this long; what does not fit into the clip ends in an ellipsis."""
SNAP_S: Final = 0.7
LOWER_THIRD_S: Final = 4.0
FADE_S: Final = 0.2


_SENTENCE_END: Final = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)]*\s+")


class Overlay(NamedTuple):
    """A picture with its mask (0 to 255) and half-size mask, and where it goes; x and y are even."""

    x: int
    y: int
    picture: Planes
    mask: Image.Image
    half_mask: Image.Image


class Title(NamedTuple):
    """An overlay on screen from frame `first` up to, not including, `end`."""

    first: int
    end: int
    overlay: Overlay
    soft: bool = False
    """Comes and goes in a fifth of a second, but for the clip's own first frame."""


def lay(frame: Planes, overlay: Overlay, opacity: float = 1.0) -> None:
    """Puts the overlay on the frame, in place."""
    mask, half = overlay.mask, overlay.half_mask
    if opacity < 1:
        mask, half = (m.point([round(value * opacity) for value in range(256)]) for m in (mask, half))
    at, half_at = (overlay.x, overlay.y), (overlay.x // 2, overlay.y // 2)
    frame.y.paste(overlay.picture.y, at, mask)
    frame.u.paste(overlay.picture.u, half_at, half)
    frame.v.paste(overlay.picture.v, half_at, half)


def opacity(title: Title, frame: int, rate: Fraction) -> float:
    """0 to 1, at one of the title's frames."""
    if not title.soft:
        return 1.0
    fade = max(1, round(FADE_S * rate))
    rising = 1.0 if title.first == 0 else (frame - title.first + 1) / fade
    return min(1.0, rising, (title.end - frame) / fade)


def captions(text: str, form: Format, cuts: Sequence[int] = ()) -> list[Title]:
    """The text as pages of at most two lines (three in portrait), each on screen for its share of the letters.

    A page is a sentence where there is time for all of them, else as much as fits. Pages turn with the picture, at one of `cuts`, where
    one is near.
    """
    width, height = form.size
    em = _em(form.size)
    style = Style(Weight.MEDIUM, em)
    most = min(width * (1 - 2 * SAFE) - em, em * 26)
    lines_a_page = 2 if width >= height else 3
    count = max(1, int(form.seconds / PAGE_S))
    pages = _pages(" ".join(text.split()), style, most, lines_a_page, count)
    letters = [sum(map(len, page)) + 12 for page in pages]  # 12: the time to notice that there is a new one
    titles, first, seen = [], 0, 0
    for page, share in zip(pages, letters, strict=True):
        seen += share
        end = form.frames if seen == sum(letters) else _near(round(form.frames * seen / sum(letters)), cuts, round(SNAP_S * form.rate))
        if end > first:
            titles.append(Title(first, end, _caption(page, style, form.size)))
            first = end
    return titles


def _near(frame: int, cuts: Sequence[int], reach: int) -> int:
    nearest = min(cuts, key=lambda cut: abs(cut - frame), default=frame)
    return nearest if abs(nearest - frame) <= reach else frame


def _pages(text: str, style: Style, most: float, lines_a_page: int, count: int) -> list[list[str]]:
    sentences = [typography.balance(sentence, style, most) for sentence in _SENTENCE_END.split(text)]
    pages = [lines[i : i + lines_a_page] for lines in sentences for i in range(0, len(lines), lines_a_page)]
    if len(pages) > count:
        lines = typography.wrap(text, style, most)
        kept = lines[: lines_a_page * count]
        if len(kept) < len(lines):
            kept[-1] = typography.shorten(f"{kept[-1]} {lines[len(kept)]}", style, most)
        pages = [kept[i : i + lines_a_page] for i in range(0, len(kept), lines_a_page)]
    return [typography.balance(" ".join(page), style, most) for page in pages]


def _caption(lines: list[str], style: Style, size: tuple[int, int]) -> Overlay:
    width, height = size
    layer, canvas = _layer(size)
    leading = round(style.size * LINE_HEIGHT)
    pad_x, pad_y = round(style.size * 0.6), round(style.size * 0.42)
    widest = max(typography.width(line, style) for line in lines)
    bottom = height - round(height * SAFE)
    first = bottom - pad_y - round(style.size * DESCENT) - leading * (len(lines) - 1)
    canvas.rounded_rectangle(
        (
            (width - widest) / 2 - pad_x,
            first - round(style.size * CAP_HEIGHT) - pad_y - round(style.size * 0.08),
            (width + widest) / 2 + pad_x,
            bottom,
        ),
        radius=max(1, round(style.size * 0.16)),
        fill=SCRIM,
    )
    for number, line in enumerate(lines):
        typography.draw(canvas, (width - typography.width(line, style)) / 2, first + number * leading, line, style, PAPER)
    return _overlay(layer)


def lower_thirds(positions: list[str | dict[str, Any]], form: Format) -> list[Title]:
    """Who stands where, by `character_positions`: up to three names at a time, each on its side of the frame, four seconds each time."""
    people = [_person(entry) for entry in positions]
    groups = [people[i : i + 3] for i in range(0, len(people), 3)]
    titles = []
    for number, group in enumerate(groups):
        first = round(Fraction(number * form.frames, len(groups)))
        end = min(first + round(LOWER_THIRD_S * form.rate), round(Fraction((number + 1) * form.frames, len(groups))))
        if end > first:
            titles.append(Title(first, end, _names(group, form.size), soft=True))
    return titles


def _person(entry: str | dict[str, Any]) -> tuple[str, str]:
    """Name and place of an entry: "Mara: left", or an object with a name and anything else."""
    if isinstance(entry, str):
        for mark in (":", " - ", " \u2013 ", " \u2014 ", ", "):
            name, found, place = entry.partition(mark)
            if found:
                return name.strip(), place.strip()
        return entry.strip(), ""
    rest = {key: value for key, value in entry.items() if value not in (None, "")}
    name = next((rest.pop(key) for key in ("name", "character", "id") if key in rest), "")
    return str(name), ", ".join(str(v) if isinstance(v, str) else f"{k} {v}" for k, v in rest.items())


def _names(people: list[tuple[str, str]], size: tuple[int, int]) -> Overlay:
    width, height = size
    layer, canvas = _layer(size)
    em = _em(size)
    name_style, place_style = Style(Weight.BOLD, round(em * 0.86)), Style(Weight.REGULAR, round(em * 0.66))
    pad, bar = round(em * 0.4), max(2, round(em * 0.12))
    taken: dict[str, int] = {}
    for name, place in people:
        side = _side(place)
        most = width * (1 - 2 * SAFE) * (0.9 if len(people) == 1 else 0.31) - 2 * pad - bar
        name, place = typography.shorten(name, name_style, most), typography.shorten(place, place_style, most)
        inner = max(typography.width(name, name_style), typography.width(place, place_style))
        box_width, box_height = bar + 2 * pad + inner, pad * 2 + name_style.size * CAP_HEIGHT + (place_style.size * 1.3 if place else 0)
        left = {"left": width * SAFE, "right": width * (1 - SAFE) - box_width}.get(side, (width - box_width) / 2)
        row = taken[side] = taken.get(side, 0) + 1
        top = height * 0.74 - row * (box_height + pad * 0.5)
        canvas.rectangle((left, top, left + box_width, top + box_height), fill=SCRIM)
        canvas.rectangle((left, top, left + bar - 1, top + box_height), fill=SIGNAL)
        baseline = top + pad + name_style.size * CAP_HEIGHT
        typography.draw(canvas, left + bar + pad, baseline, name, name_style, PAPER)
        typography.draw(canvas, left + bar + pad, baseline + place_style.size * 1.3, place, place_style, QUIET)
    return _overlay(layer)


def _side(place: str) -> str:
    words = place.lower()
    return "left" if "left" in words else "right" if "right" in words else "middle" if "cent" in words or "middle" in words else "left"


class Slate:
    """The strip along the top edge: ANIMATIC, the project, scene and shot, time and frame. One overlay a shot; the counter's digits are
    laid on frame by frame.

    A frame too narrow for all of it keeps the word ANIMATIC and drops the rest from the end.
    """

    def __init__(self, form: Format, project: str, scene: str, shots: int) -> None:
        size = self._size = form.size
        self._rate = form.rate
        self._frames = form.frames
        self._height = max(8, round(min(size) * 0.042) // 2 * 2)
        em = max(5, round(self._height * 0.56))
        self._bold, self._plain = Style(Weight.BOLD, em, 0.12), Style(Weight.MEDIUM, em)
        self._baseline = round((self._height + em * CAP_HEIGHT) / 2)
        self._right = round(size[0] - max(self._height * 0.6, size[0] * 0.012))
        self._digits = {letter: self._glyph(letter) for letter in "0123456789:/ "}
        self._counter = round(sum(image.width for image in map(self._digits.__getitem__, self._clock(0))))
        fits = self._right - self._counter - self._label_end() > em * 2
        self._counter = self._counter if fits else 0
        self._overlays = [self._strip(self._words(project, scene, shot, shots)) for shot in range(shots)]

    def lay(self, frame: Planes, shot: int, number: int) -> None:
        """Puts the slate of that shot and frame on the picture, in place."""
        lay(frame, self._overlays[shot])
        if self._counter:
            x = self._right - self._counter
            for letter in self._clock(number):
                glyph = self._digits[letter]
                frame.y.paste(_WHITE_Y, (x, 0, x + glyph.width, self._height), glyph)
                x += glyph.width

    def _clock(self, number: int) -> str:
        """Time as minutes, seconds and frames, and the frame of all frames, counted from 1."""
        seconds, rest = divmod(number, max(1, round(self._rate)))
        digits = len(str(self._frames))
        return f"{seconds // 60:02}:{seconds % 60:02}:{rest:02}  {number + 1:0{digits}}/{self._frames}"

    def _glyph(self, letter: str) -> Image.Image:
        """The mask of one sign; digits of Roboto are all of one width."""
        image = Image.new("L", (max(1, round(typography.width(letter, self._plain))), self._height))
        typography.draw(ImageDraw.Draw(image), 0, self._baseline, letter, self._plain, (255,))
        return image

    def _label_end(self) -> float:
        return self._height * 0.9 + typography.width("ANIMATIC", self._bold)

    def _words(self, project: str, scene: str, shot: int, shots: int) -> list[str]:
        return [project, f"SC {scene}" if scene else "", f"SH {shot + 1}/{shots}"]

    def _strip(self, words: list[str]) -> Overlay:
        width = self._size[0]
        layer, canvas = _layer(self._size)
        canvas.rectangle((0, 0, width, self._height - 1), fill=(8, 8, 10, 214))
        em = self._plain.size
        dot = self._height * 0.16
        left = max(self._height * 0.35, width * 0.012)
        middle = self._height / 2
        canvas.ellipse((left, middle - dot, left + 2 * dot, middle + dot), fill=SIGNAL)
        x = typography.draw(canvas, left + 2 * dot + self._height * 0.22, self._baseline, "ANIMATIC", self._bold, SIGNAL)
        limit = self._right - self._counter - em
        for word in filter(None, words):
            x += em * 0.9
            if x + em * 3 > limit:
                break
            x = typography.draw(
                canvas, x, self._baseline, typography.shorten(word, self._plain, min(limit - x, width * 0.3)), self._plain, PAPER
            )
        return _overlay(layer)


_WHITE_Y = 228  # PAPER's luma in limited range


def _em(size: tuple[int, int]) -> int:
    """The size of a caption: 4.2 % of the frame's short side, which a viewer reads at three picture heights."""
    return max(6, round(min(size) * 0.042))


def _layer(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    layer = Image.new("RGBA", size)
    return layer, ImageDraw.Draw(layer)


def _overlay(layer: Image.Image) -> Overlay:
    """The part of a layer that is not empty, on even pixels."""
    left, top, right, bottom = layer.getbbox() or (0, 0, 2, 2)
    left, top = left // 2 * 2, top // 2 * 2
    right, bottom = min(layer.width, -(-right // 2) * 2), min(layer.height, -(-bottom // 2) * 2)
    part = layer.crop((left, top, right, bottom))
    mask = part.getchannel("A")
    return Overlay(left, top, planes(_bled(part)), mask, mask.reduce(2))


def _bled(part: Image.Image) -> Image.Image:
    """The colours without the alpha, clear pixels in the scrim's: half-size chroma would mix them in at the edges."""
    pixels = np.array(part)
    pixels[pixels[..., 3] == 0] = SCRIM
    return Image.fromarray(pixels[..., :3].copy())
