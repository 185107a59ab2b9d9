"""A cutout that moves over a background that moves more slowly: how `render_animation` animates one drawing.

The cutout is the reference picture (cut out by its transparency or its plain background, else whole with a white edge) or the mannequin. It
moves like a paper puppet: shifted, rocked, turned over and squashed. A looped motion has whole cycles, so that the first frame follows the
last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from workers.child.media.encode import Planes, to_planes
from workers.child.words import Words

PLAIN_SPREAD: Final = 14.0
"""A border whose colours deviate by less than this (of 255) is a plain background, and is removed."""


class Placement(msgspec.Struct, frozen=True):
    """Where the cutout is: offsets in frame widths and heights, factors of its width and height, rotation in degrees around its foot."""

    x: float = 0.0
    y: float = 0.0
    wide: float = 1.0
    high: float = 1.0
    rock: float = 0.0


def _bob(t: float) -> float:
    return abs(math.sin(math.pi * t))


MOTIONS: Final[dict[str, Callable[[float, float], Placement]]] = {
    "walk": lambda t, u: Placement(u, -0.016 * _bob(t * 2), rock=2.6 * math.sin(2 * math.pi * t)),
    "run": lambda t, u: Placement(1.7 * u, -0.035 * _bob(t * 4), rock=5 + 4 * math.sin(4 * math.pi * t)),
    "jump": lambda t, u: Placement(
        0.3 * u, -0.22 * math.sin(math.pi * (t % 1)) ** 2, 1 - 0.05 * math.sin(2 * math.pi * t), 1 + 0.05 * math.sin(2 * math.pi * t)
    ),
    "float": lambda t, u: Placement(0.5 * u, -0.05 - 0.045 * math.sin(2 * math.pi * t), rock=3 * math.sin(2 * math.pi * t + 1)),
    "turn": lambda t, u: Placement(0.2 * u, 0, math.cos(2 * math.pi * t)),
    "wave": lambda t, u: Placement(0.15 * u, 0, rock=7 * math.sin(4 * math.pi * t)),
    "shake": lambda t, u: Placement(0.012 * math.sin(16 * math.pi * t), 0, rock=1.2 * math.sin(22 * math.pi * t)),
    "idle": lambda t, u: Placement(
        0.25 * u, 0, 1 - 0.006 * math.sin(2 * math.pi * t), 1 + 0.014 * math.sin(2 * math.pi * t), 0.7 * math.sin(2 * math.pi * t)
    ),
}
"""Motion -> placement at cycle t and at u, the way across the frame (-0.14 to 0.14 frame widths)."""

CYCLE_S: Final = {"walk": 1.1, "run": 0.7, "jump": 1.2, "float": 3.0, "turn": 2.4, "wave": 1.4, "shake": 1.0, "idle": 2.6}
"""Approximate length of a cycle: a clip has a whole number of them."""

_WORDS: Final = Words(
    {
        "run": "run, running, ran, sprint*, chase, chased, chasing, flee, fleeing",
        "walk": "walk*, stroll*, march*, approach*, enter, entered, entering, strid*, step, stepped, stepping",
        "jump": "jump*, leap*, bounce, bouncing, hop, hopping, dance, dancing",
        "float": "float*, fly, flies, flying, hover*, drift*, swim*, glid*",
        "turn": "turn, turned, turning, spin, spinning, rotat*, twirl*, flip, flipping",
        "wave": "wave, waved, waving, nod, nodding, sway*, rock, rocking, greet*",
        "shake": "shake, shaking, trembl*, shiver*, vibrat*, scared",
        "idle": "idle, idly, breath*, stand, standing, rest, resting, still, wait, waiting",
    }
)


def motion_named(motion: str | None) -> str | None:
    """Return the motion that a text names, or None."""
    return _WORDS.first(motion)


def placements(name: str, frames: int, seconds: float, *, loop: bool) -> list[tuple[float, Placement]]:
    """Return for each frame the way across (-0.14 to 0.14), which the background follows more slowly, and the placement."""
    cycles = max(1, round(seconds / CYCLE_S[name]))
    result = []
    for frame in range(frames):
        t = frame / frames if loop else frame / max(1, frames - 1)
        across = 0.14 * math.sin(2 * math.pi * t) if loop else 0.28 * (t - 0.5)
        placement = MOTIONS[name](cycles * t, across)
        if loop and name in ("walk", "run"):  # there and back: at both ends the cutout turns over and walks the other way
            turned = min(max(6 * math.cos(2 * math.pi * t), -1), 1)
            placement = msgspec.structs.replace(placement, wide=turned, rock=placement.rock * turned)
        result.append((across, placement))
    return result


class Cutout:
    """A cutout in the encoder's planes, drawn onto frames at sub-pixel positions."""

    def __init__(self, image: Image.Image, foot: tuple[float, float]) -> None:
        """`image` is RGBA at its size on screen; `foot` is the pixel of the frame where the middle of its lower edge stands."""
        left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, 1, 1)
        visible = image.crop((left, top, right, bottom))
        padded = Image.new("RGBA", (-(-visible.width // 2) * 2 + 4, -(-visible.height // 2) * 2 + 4))
        padded.paste(visible, (2, 2))
        self._foot = foot
        self._own_foot = (2 + image.width / 2 - left, 2 + image.height - top)
        self._picture = to_planes(_bleed(padded))
        self._mask = padded.getchannel("A")
        self._half_mask = self._mask.reduce(2)

    def draw(self, frame: Planes, at: Placement) -> None:
        """Draw the cutout onto the frame, in place."""
        width, height = frame.y.size
        foot = (self._foot[0] + at.x * width, self._foot[1] + at.y * height)
        forward = _forward(at, self._own_foot, foot)
        left, top, right, bottom = _bounds(forward, self._mask.size, (width, height))
        if right - left < 2 or bottom - top < 2:
            return
        size = (right - left, bottom - top)
        inverse = _inverse(forward, left, top)
        half = _halved(inverse)
        half_size = (size[0] // 2, size[1] // 2)
        _paste(frame.y, self._picture.y, self._mask, inverse, size, (left, top))
        for canvas, plane in ((frame.u, self._picture.u), (frame.v, self._picture.v)):
            _paste(canvas, plane, self._half_mask, half, half_size, (left // 2, top // 2))


Matrix = tuple[float, float, float, float, float, float]


def _forward(at: Placement, own: tuple[float, float], foot: tuple[float, float]) -> Matrix:
    """Return the affine map from the cutout's pixels to the frame's: scale, then rotation around the foot."""
    cos, sin = math.cos(math.radians(at.rock)), math.sin(math.radians(at.rock))
    wide = at.wide if abs(at.wide) > 0.02 else math.copysign(0.02, at.wide)  # seen edge on it is a line, never nothing
    a, b, d, e = cos * wide, -sin * at.high, sin * wide, cos * at.high
    return a, b, foot[0] - a * own[0] - b * own[1], d, e, foot[1] - d * own[0] - e * own[1]


def _bounds(m: Matrix, size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the part of the frame that the cutout may touch, on even pixels."""
    corners = [(m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]) for x in (0, size[0]) for y in (0, size[1])]
    xs, ys = zip(*corners, strict=True)
    return (
        max(0, math.floor(min(xs) / 2) * 2),
        max(0, math.floor(min(ys) / 2) * 2),
        min(frame[0], math.ceil(max(xs) / 2) * 2),
        min(frame[1], math.ceil(max(ys) / 2) * 2),
    )


def _inverse(m: Matrix, left: int, top: int) -> Matrix:
    """Return the affine map from the pixels of the frame's part to the cutout's, as Pillow expects it."""
    determinant = m[0] * m[4] - m[1] * m[3]
    a, b, d, e = m[4] / determinant, -m[1] / determinant, -m[3] / determinant, m[0] / determinant
    x, y = left - m[2], top - m[5]
    return a, b, a * x + b * y, d, e, d * x + e * y


def _halved(m: Matrix) -> Matrix:
    return m[0], m[1], m[2] / 2, m[3], m[4], m[5] / 2


def _paste(canvas: Image.Image, plane: Image.Image, mask: Image.Image, matrix: Matrix, size: tuple[int, int], at: tuple[int, int]) -> None:
    turned, shape = (part.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC) for part in (plane, mask))
    canvas.paste(turned, at, shape)


def extract(still: Image.Image, height: int) -> Image.Image:
    """Return the subject of an RGB or RGBA still as RGBA, about `height` pixels high, trimmed to its visible part."""
    if still.mode == "RGBA" and still.getchannel("A").getextrema()[0] < 250:  # type: ignore[operator]  # one band: a pair of numbers
        cut = still
    else:
        rgb = still.convert("RGB")
        cut = _remove_plain_background(rgb) or _paper_cut(rgb)
    cut = cut.crop(cut.getchannel("A").point(lambda v: 255 * (v > 8)).getbbox())
    width = max(2, round(cut.width * height / cut.height))
    return cut.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _remove_plain_background(still: Image.Image) -> Image.Image | None:
    """Return the still without its background if that is one plain colour along the whole border, else None."""
    small = still.copy()
    small.thumbnail((1024, 1024))
    pixels = np.asarray(small, np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    if np.abs(border - ground).max(axis=1).mean() > PLAIN_SPREAD:
        return None
    far = np.abs(pixels - ground).max(axis=2)
    near = Image.fromarray(((far < 2.5 * PLAIN_SPREAD) * 255).astype(np.uint8))
    framed = Image.new("L", (near.width + 2, near.height + 2), 255)  # a rim, so that the flood fill reaches every part of the border
    framed.paste(near, (1, 1))
    ImageDraw.floodfill(framed, (0, 0), 128)
    outside = framed.crop((1, 1, near.width + 1, near.height + 1)).point(lambda v: 255 * (v == 128))
    matte = outside.point(lambda v: 255 - v).filter(ImageFilter.MinFilter(3)).filter(ImageFilter.GaussianBlur(0.8))
    if not 0.01 < np.asarray(matte).mean() / 255 < 0.97:
        return None
    cut = still.convert("RGBA")
    cut.putalpha(matte.resize(still.size, Image.Resampling.BICUBIC))
    return cut


def _paper_cut(still: Image.Image) -> Image.Image:
    """Return the whole still with round corners and a white edge, like a cut-out print."""
    edge = max(2, min(still.size) // 40)
    paper = Image.new("RGB", (still.width + 2 * edge, still.height + 2 * edge), (246, 243, 236))
    paper.paste(still, (edge, edge))
    shape = Image.new("L", paper.size)
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, paper.width - 1, paper.height - 1), radius=2 * edge, fill=255)
    cut = paper.convert("RGBA")
    cut.putalpha(shape)
    return cut


def _bleed(part: Image.Image) -> Image.Image:
    """Return the colours extended past the edge of the alpha: half-size chroma and resampling mix in what lies there."""
    alpha = part.getchannel("A")
    own = Image.new("RGB", part.size)
    own.paste(part.convert("RGB"), mask=alpha)
    share = np.asarray(alpha.filter(ImageFilter.GaussianBlur(4)), np.float32)[..., None] / 255
    spread = np.asarray(own.filter(ImageFilter.GaussianBlur(4)), np.float32) / np.maximum(share, 0.01)
    bled = Image.fromarray(spread.clip(0, 255).astype(np.uint8))
    bled.paste(part.convert("RGB"), mask=alpha.point(lambda v: 255 * (v > 250)))
    return bled
