"""The palette of a card, from a reference picture or from a look, and measures of colour distance."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from workers.child.animatic.grade import GRADES, tone

Colour = tuple[int, int, int]
Floats = npt.NDArray[np.float32]

CONTRAST: Final = 4.5
"""WCAG 2.2, 1.4.3: the contrast that text must have with its background."""

_BASE: Final[tuple[Colour, ...]] = ((28, 32, 40), (74, 82, 96), (128, 128, 126), (186, 172, 150), (232, 226, 214))
"""Ink wash on warm paper, before it is lit."""


class Palette(msgspec.Struct, frozen=True):
    """Five colours, dark to light, and the colour of the light."""

    colours: tuple[Colour, ...]
    light: Colour

    def at(self, brightness: float) -> Colour:
        """Return the colour at a brightness between 0, the darkest, and 1, the lightest."""
        place = min(max(brightness, 0.0), 1.0) * (len(self.colours) - 1)
        low = min(int(place), len(self.colours) - 2)
        return mix(self.colours[low], self.colours[low + 1], place - low)


def from_lighting(look: str) -> Palette:
    """Return the ink wash in that look."""
    grade = GRADES[look]
    tinted = [mix(colour, to_8_bit(grade.sky), 0.22 * index / 4) for index, colour in enumerate(_BASE)]
    colours = tone(np.array(tinted, np.float32) / 255, grade)
    return Palette(tuple(to_8_bit(tuple(colour)) for colour in colours), to_8_bit(grade.sky))


def from_image(picture: Image.Image) -> Palette:
    """Return the five main colours of the RGB picture: k-means in CIELAB; the lightest counts as the light."""
    small = picture.copy()
    small.thumbnail((96, 96))
    pixels = np.asarray(small, np.float32).reshape(-1, 3)
    centres = _k_means(lab(pixels / 255), 5)
    colours = [tuple(int(v) for v in pixels[np.argmin(((lab(pixels / 255) - centre) ** 2).sum(axis=1))]) for centre in centres]
    ordered = sorted(colours, key=lambda c: luminance((c[0], c[1], c[2])))
    palette = tuple((c[0], c[1], c[2]) for c in ordered)
    return Palette(palette, palette[-1])


def _k_means(points: Floats, count: int) -> Floats:
    """Return (count, 3) centres by Lloyd's algorithm.

    It starts at evenly spread ranks of lightness, so that the same picture gives the same colours.
    """
    order = points[np.argsort(points[:, 0], kind="stable")]
    centres = order[np.linspace(0, len(order) - 1, count).astype(int)]
    for _ in range(24):
        nearest = ((points[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        moved = np.stack([points[nearest == i].mean(axis=0) if (nearest == i).any() else centres[i] for i in range(count)])
        if np.abs(moved - centres).max() < 0.05:
            break
        centres = moved
    return np.asarray(centres, np.float32)


def lab(rgb: npt.NDArray[np.floating]) -> Floats:
    """Return CIELAB (D65) of sRGB colours (..., 3), 0 to 1; IEC 61966-2-1 and CIE 15."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.asarray(np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1), np.float32)


def luminance(colour: Colour) -> float:
    """Return the relative luminance, 0 to 1 (WCAG 2.2)."""
    linear = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Colour, other: Colour) -> float:
    """Return the contrast ratio, 1 to 21 (WCAG 2.2)."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def readable(wanted: Colour, ground: Colour) -> Colour:
    """Return the wanted colour, moved towards black or white until its contrast with the background suffices."""
    target: Colour = (255, 255, 255) if contrast((255, 255, 255), ground) > contrast((0, 0, 0), ground) else (0, 0, 0)
    return next(c for share in range(11) if contrast(c := mix(wanted, target, share / 10), ground) >= CONTRAST or share == 10)


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """Return a mix with `share` of the second colour."""
    return (
        round(one[0] + (other[0] - one[0]) * share),
        round(one[1] + (other[1] - one[1]) * share),
        round(one[2] + (other[2] - one[2]) * share),
    )


def to_8_bit(rgb: tuple[float, ...]) -> Colour:
    """Convert 0 to 1 into 0 to 255."""
    return round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)
