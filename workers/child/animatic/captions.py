"""What is laid over the pictures of a clip: captions, lower thirds, and the slate that says ANIMATIC.

Each is drawn once as an overlay and then composited onto many frames. All of it stays inside the title-safe area (5 % from each edge, SMPTE
ST 2046-1) except the slate, a strip along the top edge. Text stands on a scrim that gives a contrast of 4.5:1 even on a white picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from workers.child.animatic import typography
from workers.child.animatic.typography import CAP_HEIGHT, DESCENT, LINE_HEIGHT, Style, Weight
from workers.child.media.encode import ClipFormat, Planes, to_planes
from workers.child.words import Words

TITLE_SAFE: Final = 0.05
"""The margin of the title-safe area, as a share of width and height."""
SCRIM_COLOUR: Final = (10, 10, 12, 178)
TEXT_COLOUR: Final = (244, 241, 232, 255)
SECONDARY_COLOUR: Final = (178, 176, 170, 255)
ACCENT_COLOUR: Final = (255, 196, 46, 255)
"""The amber of a camera's tally light: the only accent."""

PAGE_S: Final = 1.6
"""A caption page is shown at least this long; text that does not fit into the clip ends in an ellipsis."""
SNAP_S: Final = 0.7
"""A page turns with the picture if a cut is at most this far away."""
LOWER_THIRD_S: Final = 4.0
"""How long a lower third is shown."""
FADE_S: Final = 0.2
"""Fade in and fade out of a lower third."""

_CLOSING: Final = r"\"')\]}\u2019\u201c\u201d\u00ab\u00bb\u2039\u203a\u300d\u300f\uff09"
"""Quotes and brackets that belong to the sentence before them, where they follow its end without a space."""
_WIDE_ENDS: Final = r"\u3002\uff01\uff1f"
"""The ends of sentences of Chinese and Japanese, which no space follows."""
_SENTENCE_END: Final = re.compile(
    rf"[.!?\u2026\u061f\u06d4\u0964{_WIDE_ENDS}]+[{_CLOSING}]*(?=\s)|[{_WIDE_ENDS}]+(?![{_WIDE_ENDS}{_CLOSING}\s])"
)
_ABBREVIATIONS: Final = frozenset(
    "mr mrs ms mx dr prof rev hon st mt sr sra srta messrs mme mlle mgr gen col maj capt cmdr lt sgt cpl pvt adm gov sen rep pres supt "
    "insp det vs cf int ext e.g i.e z.b d.h bzw ca approx".split()
)
"""What is written with a period and does not end a sentence, whatever follows."""
_BEFORE_NUMBERS: Final = frozenset("no nos nr fig figs vol p pp ch sc art jan feb mar apr jun jul aug sep sept oct nov dec".split())
"""What does not end a sentence before a number."""
_INITIALS: Final = re.compile(r"(?!I$)(?:[A-Z]\.)*[A-Z]")


class Overlay(NamedTuple):
    """A picture with its mask (0 to 255), the mask at half size for chroma, and its position; x and y are even."""

    x: int
    y: int
    picture: Planes
    mask: Image.Image
    half_mask: Image.Image


class TimedOverlay(NamedTuple):
    """An overlay on screen from frame `first` up to, not including, `end`."""

    first: int
    end: int
    overlay: Overlay
    soft: bool = False
    """Whether it fades in and out; on the clip's first frame it is fully visible."""


def composite(frame: Planes, overlay: Overlay, opacity: float = 1.0) -> None:
    """Composite the overlay onto the frame, in place."""
    mask, half = overlay.mask, overlay.half_mask
    if opacity < 1:
        mask, half = (m.point([round(value * opacity) for value in range(256)]) for m in (mask, half))
    at, half_at = (overlay.x, overlay.y), (overlay.x // 2, overlay.y // 2)
    frame.y.paste(overlay.picture.y, at, mask)
    frame.u.paste(overlay.picture.u, half_at, half)
    frame.v.paste(overlay.picture.v, half_at, half)


def opacity(timed: TimedOverlay, frame: int, rate: Fraction) -> float:
    """Return the overlay's opacity, 0 to 1, at one of its frames."""
    if not timed.soft:
        return 1.0
    fade = max(1, round(FADE_S * rate))
    rising = 1.0 if timed.first == 0 else (frame - timed.first + 1) / fade
    return min(1.0, rising, (timed.end - frame) / fade)


def description_overlays(text: str, clip: ClipFormat, cuts: Sequence[int] = ()) -> list[TimedOverlay]:
    """Return the text as caption pages of at most two lines (three in portrait), each shown for its share of the letters.

    A page is a sentence if there is time for all sentences, else as much as fits. A page turns with the picture if one of `cuts` is near.
    """
    width, height = clip.size
    em = _em(clip.size)
    style = Style(Weight.MEDIUM, em)
    max_width = min(width * (1 - 2 * TITLE_SAFE) - em, em * 26)
    lines_a_page = 2 if width >= height else 3
    count = max(1, int(clip.seconds / PAGE_S))
    pages = paginate(" ".join(text.split()), style, max_width, lines_a_page, count)
    letters = [sum(map(len, page)) + 12 for page in pages]  # 12: the time to notice the new page
    overlays, first, seen = [], 0, 0
    for page, share in zip(pages, letters, strict=True):
        seen += share
        end = clip.frames if seen == sum(letters) else _snap(round(clip.frames * seen / sum(letters)), cuts, round(SNAP_S * clip.rate))
        if end > first:
            overlays.append(TimedOverlay(first, end, _caption(page, style, clip.size)))
            first = end
    return overlays


def _snap(frame: int, cuts: Sequence[int], reach: int) -> int:
    """Return the nearest cut if it is within `reach` frames, else the frame itself."""
    nearest = min(cuts, key=lambda cut: abs(cut - frame), default=frame)
    return nearest if abs(nearest - frame) <= reach else frame


def sentences(text: str) -> list[str]:
    """Return the sentences of the text, each with its closing quotes; none ends after an abbreviation or before a small letter."""
    found, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        if not _goes_on(text, end):
            found.append(text[start : end.end()].strip())
            start = end.end()
    rest = text[start:].strip()
    return [*found, rest] if rest or not found else found


def _goes_on(text: str, end: re.Match[str]) -> bool:
    """Whether a sentence goes on after what looks like its end."""
    after = text[end.end() :].lstrip()[:1] if end.end() == len(text) or text[end.end()].isspace() else text[end.end()]
    if after.islower() or end[0] != ".":
        return after.islower()
    word = re.split(rf"[\s({_CLOSING}\u2018\u201e]", text[max(0, end.start() - 40) : end.start()])[-1]
    if _INITIALS.fullmatch(word) or word.lower() in _ABBREVIATIONS:
        return True
    return after.isdigit() and word.lower() in _BEFORE_NUMBERS


def paginate(text: str, style: Style, max_width: float, lines_a_page: int, count: int) -> list[list[str]]:
    """Return at most `count` pages of lines, balanced; text that does not fit ends in an ellipsis."""
    text = " ".join(text.split())
    balanced = [typography.balance(sentence, style, max_width) for sentence in sentences(text)]
    pages = [lines[i : i + lines_a_page] for lines in balanced for i in range(0, len(lines), lines_a_page)]
    if len(pages) > count:
        lines = typography.wrap(text, style, max_width)
        shown = lines[: lines_a_page * count]
        if len(shown) < len(lines):
            shown[-1] = typography.shorten(_joined([shown[-1], lines[len(shown)]], text), style, max_width)
        pages = [shown[i : i + lines_a_page] for i in range(0, len(shown), lines_a_page)]
    return [typography.balance(_joined(page, text), style, max_width) for page in pages]


def _joined(lines: list[str], text: str) -> str:
    """Return lines of the text in one, with a space between two of them only where the text has it."""
    joined = lines[0]
    for line in lines[1:]:
        joined += line if joined + line in text else f" {line}"
    return joined


def _caption(lines: list[str], style: Style, size: tuple[int, int]) -> Overlay:
    """Draw the lines on a scrim at the bottom of the title-safe area."""
    width, height = size
    layer, canvas = _layer(size)
    leading = round(style.size * LINE_HEIGHT)
    pad_x, pad_y = round(style.size * 0.6), round(style.size * 0.42)
    widest = max(typography.width(line, style) for line in lines)
    bottom = height - round(height * TITLE_SAFE)
    first = bottom - pad_y - round(style.size * DESCENT) - leading * (len(lines) - 1)
    canvas.rounded_rectangle(
        (
            (width - widest) / 2 - pad_x,
            first - round(style.size * CAP_HEIGHT) - pad_y - round(style.size * 0.08),
            (width + widest) / 2 + pad_x,
            bottom,
        ),
        radius=max(1, round(style.size * 0.16)),
        fill=SCRIM_COLOUR,
    )
    for number, line in enumerate(lines):
        typography.draw(canvas, (width - typography.width(line, style)) / 2, first + number * leading, line, style, TEXT_COLOUR)
    return _overlay(layer)


def lower_thirds(positions: list[str | dict[str, Any]], clip: ClipFormat) -> list[TimedOverlay]:
    """Return lower thirds for `character_positions`: up to three names at a time, each on its side of the frame, for four seconds."""
    people = [name_and_position(entry) for entry in positions]
    groups = [people[i : i + 3] for i in range(0, len(people), 3)]
    overlays = []
    for number, group in enumerate(groups):
        first = round(Fraction(number * clip.frames, len(groups)))
        end = min(first + round(LOWER_THIRD_S * clip.rate), round(Fraction((number + 1) * clip.frames, len(groups))))
        if end > first:
            overlays.append(TimedOverlay(first, end, _lower_third(group, clip.size), soft=True))
    return overlays


def name_and_position(entry: str | dict[str, Any]) -> tuple[str, str]:
    """Return name and position of an entry: "Mara: left", or an object with a name and anything else."""
    if isinstance(entry, str):
        for mark in (":", " - ", " \u2013 ", " \u2014 ", ", "):
            name, found, place = entry.partition(mark)
            if found:
                return name.strip(), place.strip()
        return entry.strip(), ""
    rest = {key: value for key, value in entry.items() if value not in (None, "")}
    name = next((rest.pop(key) for key in ("name", "character", "id") if key in rest), "")
    return str(name), ", ".join(str(v) if isinstance(v, str) else f"{k} {v}" for k, v in rest.items())


def _lower_third(people: list[tuple[str, str]], size: tuple[int, int]) -> Overlay:
    """Draw the names and positions, each on its side of the frame."""
    width, height = size
    layer, canvas = _layer(size)
    em = _em(size)
    name_style, place_style = Style(Weight.BOLD, round(em * 0.86)), Style(Weight.REGULAR, round(em * 0.66))
    pad, bar = round(em * 0.4), max(2, round(em * 0.12))
    taken: dict[str, int] = {}
    for name, place in people:
        side = _side(place)
        max_width = width * (1 - 2 * TITLE_SAFE) * (0.9 if len(people) == 1 else 0.31) - 2 * pad - bar
        name, place = typography.shorten(name, name_style, max_width), typography.shorten(place, place_style, max_width)
        inner = max(typography.width(name, name_style), typography.width(place, place_style))
        box_width, box_height = bar + 2 * pad + inner, pad * 2 + name_style.size * CAP_HEIGHT + (place_style.size * 1.3 if place else 0)
        left = {"left": width * TITLE_SAFE, "right": width * (1 - TITLE_SAFE) - box_width}.get(side, (width - box_width) / 2)
        row = taken[side] = taken.get(side, 0) + 1
        top = height * 0.74 - row * (box_height + pad * 0.5)
        canvas.rectangle((left, top, left + box_width, top + box_height), fill=SCRIM_COLOUR)
        canvas.rectangle((left, top, left + bar - 1, top + box_height), fill=ACCENT_COLOUR)
        baseline = top + pad + name_style.size * CAP_HEIGHT
        typography.draw(canvas, left + bar + pad, baseline, name, name_style, TEXT_COLOUR)
        typography.draw(canvas, left + bar + pad, baseline + place_style.size * 1.3, place, place_style, SECONDARY_COLOUR)
    return _overlay(layer)


_SIDES: Final = Words(
    {
        "left": "left",
        "right": "right",
        "middle": "middle, center, centre, centered, centred, central",
    }
)


def _side(place: str) -> str:
    """Return the side of the frame that a position names; "left" if it names none."""
    return _SIDES.first(place) or "left"


def timecode(number: int, rate: Fraction) -> str:
    """Return when frame `number` is shown, as minutes, seconds, and frames since the first frame of that second."""
    seconds = number // rate
    return f"{seconds // 60:02}:{seconds % 60:02}:{number - ceil(seconds * rate):02}"


class Slate:
    """The strip along the top edge: ANIMATIC, project, scene and shot, time and frame.

    One overlay for each shot; the digits of the counter are drawn frame by frame. A frame too narrow for all of it keeps the word ANIMATIC
    and drops the rest from the end.
    """

    def __init__(self, clip: ClipFormat, project: str, scene: str, shots: int) -> None:
        size = self._size = clip.size
        self._rate = clip.rate
        self._frames = clip.frames
        self._height = max(8, round(min(size) * 0.042) // 2 * 2)
        em = max(5, round(self._height * 0.56))
        self._bold, self._plain = Style(Weight.BOLD, em, 0.12), Style(Weight.MEDIUM, em)
        self._baseline = round((self._height + em * CAP_HEIGHT) / 2)
        self._right = round(size[0] - max(self._height * 0.6, size[0] * 0.012))
        self._digits = {letter: self._glyph(letter) for letter in "0123456789:/ "}
        self._counter = round(sum(image.width for image in map(self._digits.__getitem__, self._counter_text(0))))
        fits = self._right - self._counter - self._label_end() > em * 2
        self._counter = self._counter if fits else 0
        self._overlays = [self._strip(self._words(project, scene, shot, shots)) for shot in range(shots)]

    def draw(self, frame: Planes, shot: int, number: int) -> None:
        """Draw the slate of that shot and frame onto the picture, in place."""
        composite(frame, self._overlays[shot])
        if self._counter:
            x = self._right - self._counter
            for letter in self._counter_text(number):
                glyph = self._digits[letter]
                frame.y.paste(_TEXT_LUMA, (x, 0, x + glyph.width, self._height), glyph)
                x += glyph.width

    def _counter_text(self, number: int) -> str:
        """Return the time as minutes, seconds and frames, and the frame number of all frames, counted from 1."""
        digits = len(str(self._frames))
        return f"{timecode(number, self._rate)}  {number + 1:0{digits}}/{self._frames}"

    def _glyph(self, letter: str) -> Image.Image:
        """Return the mask of one character; Roboto's digits all have the same width."""
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
        canvas.ellipse((left, middle - dot, left + 2 * dot, middle + dot), fill=ACCENT_COLOUR)
        x = typography.draw(canvas, left + 2 * dot + self._height * 0.22, self._baseline, "ANIMATIC", self._bold, ACCENT_COLOUR)
        limit = self._right - self._counter - em
        for word in filter(None, words):
            x += em * 0.9
            if x + em * 3 > limit:
                break
            x = typography.draw(
                canvas, x, self._baseline, typography.shorten(word, self._plain, min(limit - x, width * 0.3)), self._plain, TEXT_COLOUR
            )
        return _overlay(layer)


_TEXT_LUMA = 228  # the luma of TEXT_COLOUR in limited range


def _em(size: tuple[int, int]) -> int:
    """Return the size of a caption: 4.2 % of the frame's short side, readable from three picture heights away."""
    return max(6, round(min(size) * 0.042))


def _layer(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    layer = Image.new("RGBA", size)
    return layer, ImageDraw.Draw(layer)


def _overlay(layer: Image.Image) -> Overlay:
    """Crop a layer to its visible part, on even pixels."""
    left, top, right, bottom = layer.getbbox() or (0, 0, 2, 2)
    left, top = left // 2 * 2, top // 2 * 2
    right, bottom = min(layer.width, -(-right // 2) * 2), min(layer.height, -(-bottom // 2) * 2)
    part = layer.crop((left, top, right, bottom))
    mask = part.getchannel("A")
    return Overlay(left, top, to_planes(_fill_transparent(part)), mask, mask.reduce(2))


def _fill_transparent(part: Image.Image) -> Image.Image:
    """Return the colours without alpha, transparent pixels in the scrim's colour: half-size chroma would bleed theirs into the edges."""
    pixels = np.array(part)
    pixels[pixels[..., 3] == 0] = SCRIM_COLOUR
    return Image.fromarray(pixels[..., :3].copy())
