"""Colours of a card: from a reference picture, or from the lighting word; and how far colours are apart."""

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
"""WCAG 2.2, 1.4.3: what text must reach on its ground."""

_BASE: Final[tuple[Colour, ...]] = ((28, 32, 40), (74, 82, 96), (128, 128, 126), (186, 172, 150), (232, 226, 214))
"""Ink wash on warm paper, before the light falls on it."""


class Palette(msgspec.Struct, frozen=True):
    """Five colours, dark to light, and the colour of the light."""

    colours: tuple[Colour, ...]
    light: Colour

    def at(self, brightness: float) -> Colour:
        """The colour at a place between the darkest, 0, and the lightest, 1."""
        place = min(max(brightness, 0.0), 1.0) * (len(self.colours) - 1)
        low = min(int(place), len(self.colours) - 2)
        return mix(self.colours[low], self.colours[low + 1], place - low)


def of_light(word: str) -> Palette:
    """The ink wash in that light."""
    grade = GRADES[word]
    tinted = [mix(colour, bytes_of(grade.sky), 0.22 * index / 4) for index, colour in enumerate(_BASE)]
    colours = tone(np.array(tinted, np.float32) / 255, grade)
    return Palette(tuple(bytes_of(tuple(colour)) for colour in colours), bytes_of(grade.sky))


def of_picture(picture: Image.Image) -> Palette:
    """The five colours that the RGB picture consists of: k-means in CIELAB, the lightest taken for the light."""
    small = picture.copy()
    small.thumbnail((96, 96))
    pixels = np.asarray(small, np.float32).reshape(-1, 3)
    centres = _k_means(lab(pixels / 255), 5)
    colours = [tuple(int(v) for v in pixels[np.argmin(((lab(pixels / 255) - centre) ** 2).sum(axis=1))]) for centre in centres]
    ordered = sorted(colours, key=lambda c: luminance((c[0], c[1], c[2])))
    palette = tuple((c[0], c[1], c[2]) for c in ordered)
    return Palette(palette, palette[-1])


def _k_means(points: Floats, count: int) -> Floats:
    """(count, 3) centres: Lloyd's rounds from evenly spread ranks of lightness, so that the same picture gives the same colours."""
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
    """CIELAB (D65) of sRGB colours (..., 3), 0 to 1; IEC 61966-2-1 and CIE 15."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.asarray(np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1), np.float32)


def luminance(colour: Colour) -> float:
    """Relative luminance, 0 to 1 (WCAG 2.2)."""
    linear = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Colour, other: Colour) -> float:
    """1 to 21 (WCAG 2.2)."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def readable(wish: Colour, ground: Colour) -> Colour:
    """The wished colour, moved towards black or white until it can be read on the ground."""
    goal: Colour = (255, 255, 255) if contrast((255, 255, 255), ground) > contrast((0, 0, 0), ground) else (0, 0, 0)
    return next(c for share in range(11) if contrast(c := mix(wish, goal, share / 10), ground) >= CONTRAST or share == 10)


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """`share` of the other in the one."""
    return (
        round(one[0] + (other[0] - one[0]) * share),
        round(one[1] + (other[1] - one[1]) * share),
        round(one[2] + (other[2] - one[2]) * share),
    )


def bytes_of(rgb: tuple[float, ...]) -> Colour:
    """0 to 255 of 0 to 1."""
    return round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)
