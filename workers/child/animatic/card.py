"""The concept card: what a description looks like before anyone has drawn it.

A painted place with a mannequin (or the reference picture, if there is one), the description in type beside or below it, the palette as
swatches, and the word ANIMATIC. The composition follows the seed, the description and the pose.
"""

from __future__ import annotations

import hashlib
from math import floor
from typing import Final

import msgspec
import numpy as np
from PIL import Image, ImageDraw

from workers.child.animatic import backdrop, mannequin, palette, typography
from workers.child.animatic.palette import Colour, Palette
from workers.child.animatic.typography import CAP_HEIGHT, DESCENT, LINE_HEIGHT, Style, Weight
from workers.child.media.images import fill_frame

Box = tuple[int, int, int, int]

TITLE_LINES: Final = 8
"""Text of up to this many lines is set as a title, with lines of even length; longer text is running text."""
PAINTED_PIXELS: Final = 2_200_000
"""A place is painted at most this large and then enlarged: it is all soft wash, and painting costs a second for each 10 megapixels."""


class Brief(msgspec.Struct, frozen=True, kw_only=True):
    """What a card is made from."""

    description: str
    pose: str | None
    lighting: str | None
    """A look of `grade.GRADES`."""
    seed: int
    reference: Image.Image | None = None
    """RGB; shown instead of a painted place, and the source of the colours."""
    style: Image.Image | None = None
    """RGB; the source of the colours, before the reference."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a generator that is the same for the same brief.

        Each purpose has its own, so that one more draw for one does not change another.
        """
        text = "\0".join((purpose, self.description, self.pose or "", self.lighting or "", str(self.seed)))
        return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))

    def colours(self) -> Palette:
        """Return the palette of the style guide, the reference or the light, in that order."""
        source = self.style or self.reference
        return palette.from_image(source) if source else palette.from_lighting(self.lighting or "neutral")


def painting(size: tuple[int, int], brief: Brief) -> Image.Image:
    """Return the picture alone, without type, at `size`: what moves in a clip that has no stills."""
    rng, colours = brief.rng("painting"), brief.colours()
    place = _place(size, brief, colours, rng)
    picture = backdrop.flatten(place)
    width, height = picture.size
    third = 1 / 3 if rng.random() < 0.5 else 2 / 3
    tall = height * float(rng.uniform(0.40, 0.50)) if height < width * 1.3 else width * 0.55
    foot = (width * (third + float(rng.uniform(-0.03, 0.03))), height * place.ground)
    shape = _shape(picture.size, foot, tall, pose_of(brief), mirrored=third > 0.5)
    picture.paste(_silhouette(colours), mask=shape)
    return backdrop.grain(picture, rng).resize(size, Image.Resampling.BICUBIC)


def stage(size: tuple[int, int], brief: Brief) -> tuple[Image.Image, Image.Image, float]:
    """Return the painted place for a moving figure: the far planes as RGB, the nearest as RGBA, and the ground in picture heights."""
    rng, colours = brief.rng("painting"), brief.colours()
    place = _place(size, brief, colours, rng)
    far = backdrop.grain(backdrop.flatten(place, -1), rng)
    near = place.planes[-1]
    return far.resize(size, Image.Resampling.BICUBIC), near.resize(size, Image.Resampling.BICUBIC), place.ground


def mannequin_image(tall: int, pose: mannequin.Pose, colours: Palette) -> Image.Image:
    """Return the mannequin alone as RGBA, its lower foot in the middle of the lower edge."""
    size = (tall * 2, round(tall * 1.35))
    shape = _shape(size, (tall, size[1]), tall, pose, mirrored=False)
    image = Image.new("RGBA", size, (*_silhouette(colours), 255))
    image.putalpha(shape)
    return image


def pose_of(brief: Brief) -> mannequin.Pose:
    """Return the pose that the brief names, by its `pose` or in its description."""
    return mannequin.POSES[mannequin.pose_named(brief.pose or "") or mannequin.pose_named(brief.description) or "standing"]


def _place(size: tuple[int, int], brief: Brief, colours: Palette, rng: np.random.Generator) -> backdrop.Backdrop:
    shrink = min(1.0, (PAINTED_PIXELS / (size[0] * size[1])) ** 0.5)
    small = (max(16, round(size[0] * shrink)), max(16, round(size[1] * shrink)))
    return backdrop.paint(small, backdrop.place(brief.description, rng), colours, rng)


def _shape(size: tuple[int, int], foot: tuple[float, float], tall: float, pose: mannequin.Pose, *, mirrored: bool) -> Image.Image:
    """Return the mannequin as a mask, drawn at twice the size for clean edges."""
    layer = Image.new("L", (size[0] * 2, size[1] * 2))
    mannequin.draw(ImageDraw.Draw(layer), (2 * foot[0], 2 * foot[1]), 2 * tall, pose, (255,), mirrored=mirrored)
    return layer.reduce(2)


def _silhouette(colours: Palette) -> Colour:
    return palette.mix(colours.at(0.0), (0, 0, 0), 0.25)


def card(size: tuple[int, int], brief: Brief) -> Image.Image:
    """Return the card at `size` as RGB. Type stays inside margins of 5 % and has a contrast of 4.5:1."""
    colours = brief.colours()
    dark = palette.luminance(colours.at(0.5)) < 0.16
    paper = palette.mix(colours.at(0.0), (0, 0, 0), 0.35) if dark else palette.mix(colours.at(1.0), (255, 255, 255), 0.35)
    picture_box, type_box = layout(size, brief)
    image = Image.new("RGB", size, paper)
    picture_size = (picture_box[2] - picture_box[0], picture_box[3] - picture_box[1])
    picture = fill_frame(brief.reference, picture_size) if brief.reference else painting(picture_size, brief)
    image.paste(picture, picture_box[:2])
    _set_type(image, type_box, brief, colours, paper)
    return image


def layout(size: tuple[int, int], brief: Brief) -> tuple[Box, Box]:
    """Return the boxes of the picture and of the type: side by side, or one above the other. Long texts get more room."""
    width, height = size
    margin = max(3, round(min(size) * 0.05))
    share = 0.62 if len(brief.description) < 260 else 0.5 if len(brief.description) < 700 else 0.4
    rng = brief.rng("composition")
    share += float(rng.uniform(-0.03, 0.03))
    if height >= width * 0.9:
        edge = round(height * share)
        if rng.random() < 0.5:
            return (0, 0, width, edge), (margin, edge + margin, width - margin, height - margin)
        return (0, height - edge, width, height), (margin, margin, width - margin, height - edge - margin)
    edge = round(width * share)
    if rng.random() < 0.5:
        return (0, 0, edge, height), (edge + margin, margin, width - margin, height - margin)
    return (width - edge, 0, width, height), (margin, margin, width - edge - margin, height - margin)


def _set_type(picture: Image.Image, box: Box, brief: Brief, colours: Palette, paper: Colour) -> None:
    """Draw head, description and foot: the description as large as it fits, the rest small."""
    canvas = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    max_width, unit = right - left, min(picture.size)
    ink = palette.readable(colours.at(0.0) if palette.luminance(paper) > 0.2 else colours.at(1.0), paper)
    accent = palette.readable(palette.mix(colours.light, (214, 92, 20), 0.55), paper)
    small = Style(Weight.BOLD, max(5, round(unit * 0.0185)), 0.14)
    if unit >= 200:
        typography.draw(
            canvas, left, top + small.size * CAP_HEIGHT, typography.shorten("CONCEPT — ANIMATIC", small, max_width), small, accent
        )
        canvas.rectangle((left, top + small.size * 1.5, left + small.size * 3, top + small.size * 1.5 + max(1, unit // 400)), fill=accent)
        top += round(small.size * 3.2)
        bottom = _foot(canvas, (left, top, right, bottom), unit, brief, colours, ink)
    style, lines = fit_text(brief.description.strip() or "Untitled", max_width, bottom - top, unit)
    baseline = top + style.size * CAP_HEIGHT
    for line in lines:
        typography.draw(canvas, left, baseline, line, style, ink)
        baseline += style.size * LINE_HEIGHT


def fit_text(text: str, max_width: int, height: int, unit: int) -> tuple[Style, list[str]]:
    """Return the largest style in which the text fits without breaking a word, and its lines; text too long even at the smallest is cut.

    The size is at most 8.5 % of `unit`, the card's short side; a short text, such as a single word, is set as a title of up to 30 %.
    """
    letters = len(text)
    low, high = max(5, round(unit * 0.0165)), max(5, round(unit * (0.085 + 0.215 * max(0.0, 1 - letters / 20))))

    def lines_at(size: int) -> tuple[Style, list[str], int]:
        style = Style(Weight.BLACK if size > unit * 0.055 else Weight.BOLD if size > unit * 0.038 else Weight.REGULAR, size)
        room = 1 + floor((height - size * (CAP_HEIGHT + DESCENT)) / (size * LINE_HEIGHT))
        return style, typography.wrap(text, style, max_width), room

    while low < high:
        size = (low + high + 1) // 2
        style, lines, room = lines_at(size)
        whole = len(lines) <= room and typography.widest_word(text, style) <= max_width
        low, high = (size, high) if whole else (low, size - 1)
    style, lines, room = lines_at(low)
    if len(lines) <= TITLE_LINES:
        lines = typography.balance(text, style, max_width)
    room = max(1, room)
    if len(lines) > room:
        lines = [*lines[: room - 1], typography.shorten(f"{lines[room - 1]} {lines[room]}", style, max_width)]
    return style, lines


def _foot(canvas: ImageDraw.ImageDraw, box: Box, unit: int, brief: Brief, colours: Palette, ink: Colour) -> int:
    """Draw swatches and small print along the lower edge; return the bottom of the room above them."""
    left, _, right, bottom = box
    print_style = Style(Weight.MEDIUM, max(5, round(unit * 0.0165)))
    facts = [("LIGHT", brief.lighting or "neutral"), ("POSE", brief.pose or ""), ("SEED", str(brief.seed))]
    text = "   ".join(f"{name} {value}" for name, value in facts if value)
    typography.draw(
        canvas, left, bottom - print_style.size * DESCENT, typography.shorten(text, print_style, right - left), print_style, ink
    )
    side = round(unit * 0.042)
    top = bottom - round(print_style.size * 1.9) - side
    for index, colour in enumerate(colours.colours):
        x = left + index * (side + max(1, side // 8))
        if x + side <= right:
            canvas.rectangle((x, top, x + side - 1, top + side - 1), fill=colour)
    return top - round(unit * 0.03)
