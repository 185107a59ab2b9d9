"""The grade: what the words of `lighting` do to a picture's colours. Baked into each still once by a 3D LUT, never frame by frame."""

from __future__ import annotations

from functools import cache
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageFilter

from workers.child.words import Words

Rgb = tuple[float, float, float]
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
_TABLE_SIDE = 25  # points a side of the colour cube: its trilinear error stays under one step of 8 bits for these curves


class Grade(msgspec.Struct, frozen=True, kw_only=True):
    """A look, applied in this order. Values are display-referred RGB, 0 to 1."""

    gain: float = 1.0
    gamma: float = 1.0
    """Above 1 lifts the midtones."""
    contrast: float = 1.0
    """Slope at the middle of an S-curve that keeps black and white."""
    saturation: float = 1.0
    shadows: Rgb = (0.0, 0.0, 0.0)
    """Added in full at black, not at all at white."""
    highlights: Rgb = (1.0, 1.0, 1.0)
    """Multiplied in full at white, not at all at black."""
    vignette: float = 0.12
    """How much darker the corners are."""
    sky: Rgb
    """The colour of the light itself, for cards drawn in this light."""


GRADES: Final = {
    "neutral": Grade(vignette=0.0, sky=(0.74, 0.77, 0.78)),
    "noir": Grade(gamma=0.82, contrast=1.75, saturation=0.0, vignette=0.45, sky=(0.80, 0.80, 0.80)),
    "golden hour": Grade(
        gamma=1.06,
        contrast=1.08,
        saturation=1.2,
        shadows=(0.06, 0.015, 0.0),
        highlights=(1.0, 0.86, 0.62),
        vignette=0.2,
        sky=(0.98, 0.72, 0.36),
    ),
    "moonlight": Grade(
        gain=0.74,
        gamma=0.8,
        contrast=1.1,
        saturation=0.38,
        shadows=(0.0, 0.02, 0.075),
        highlights=(0.70, 0.86, 1.0),
        vignette=0.3,
        sky=(0.56, 0.70, 0.92),
    ),
    "neon": Grade(
        gamma=0.88,
        contrast=1.3,
        saturation=1.5,
        shadows=(0.10, 0.0, 0.19),
        highlights=(0.72, 0.98, 1.0),
        vignette=0.3,
        sky=(0.96, 0.22, 0.62),
    ),
    "overcast": Grade(
        gain=0.9,
        gamma=1.04,
        contrast=0.8,
        saturation=0.58,
        shadows=(0.05, 0.06, 0.07),
        highlights=(0.95, 0.98, 1.0),
        vignette=0.05,
        sky=(0.74, 0.78, 0.82),
    ),
    "candlelight": Grade(
        gain=0.86,
        gamma=0.78,
        contrast=1.15,
        saturation=0.95,
        shadows=(0.045, 0.012, 0.0),
        highlights=(1.0, 0.74, 0.42),
        vignette=0.55,
        sky=(0.98, 0.64, 0.26),
    ),
    "high key": Grade(gamma=1.45, contrast=0.88, saturation=0.9, shadows=(0.16, 0.16, 0.17), vignette=0.0, sky=(0.97, 0.97, 0.95)),
    "low key": Grade(gain=0.92, gamma=0.62, contrast=1.3, saturation=0.8, vignette=0.5, sky=(0.62, 0.56, 0.50)),
    "horror": Grade(
        gain=0.82,
        gamma=0.74,
        contrast=1.4,
        saturation=0.5,
        shadows=(0.0, 0.03, 0.012),
        highlights=(0.80, 1.0, 0.72),
        vignette=0.5,
        sky=(0.56, 0.72, 0.46),
    ),
    "dawn": Grade(
        gamma=1.12,
        contrast=0.88,
        saturation=0.85,
        shadows=(0.10, 0.075, 0.14),
        highlights=(1.0, 0.86, 0.86),
        vignette=0.1,
        sky=(0.95, 0.72, 0.70),
    ),
    "sepia": Grade(
        gamma=1.0,
        contrast=0.92,
        saturation=0.0,
        shadows=(0.13, 0.075, 0.03),
        highlights=(1.0, 0.90, 0.70),
        vignette=0.25,
        sky=(0.90, 0.78, 0.56),
    ),
}
"""Look -> grade."""

_WORDS: Final = Words(
    {
        "noir": "noir, black and white, b&w, monochrome, chiaroscuro",
        "golden hour": "golden hour, golden, sunset, magic hour, late afternoon, warm sun",
        "moonlight": "moonlight, moonlit, moon, day for night, night, blue hour, dusk, twilight",
        "neon": "neon, cyberpunk, nightclub, synthwave",
        "overcast": "overcast, cloudy, grey sky, gray sky, fog, foggy, mist, soft daylight, diffuse",
        "candlelight": "candlelight, candlelit, candle, firelight, fireside, lantern, lamplight, tungsten",
        "high key": "high key, high-key, bright, daylight, clinical, studio",
        "low key": "low key, low-key, dark, dim, shadowy, silhouette, dramatic",
        "horror": "horror, eerie, sickly, fluorescent, toxic, sinister",
        "dawn": "dawn, sunrise, morning, pastel",
        "sepia": "sepia, vintage, period, old photograph",
        "neutral": "neutral, natural, even",
    }
)


def look_named(lighting: str | None) -> str | None:
    """Return the look that a `lighting` text names, by the longest word; None if it names none."""
    return next(iter(_WORDS.named(lighting)), None)


def apply(picture: Image.Image, name: str) -> Image.Image:
    """Return the RGB picture in that look, with its vignette."""
    toned = picture.filter(lut(name)) if name != "neutral" else picture
    strength = GRADES[name].vignette
    return ImageChops.multiply(toned, _vignette(picture.size, strength)) if strength else toned


def tone(rgb: npt.NDArray[np.floating], grade: Grade) -> npt.NDArray[np.float32]:
    """Return colours (..., 3), 0 to 1, in this look, without the vignette, which depends on the position."""
    value = np.clip(rgb * grade.gain, 0, 1) ** (1 / grade.gamma)
    value = _s_curve(value, grade.contrast)
    luma = (value @ _LUMA)[..., None]
    value = luma + (value - luma) * grade.saturation
    value = value + (1 - luma) ** 2 * np.array(grade.shadows, np.float32)
    value = value * (1 + luma * (np.array(grade.highlights, np.float32) - 1))
    return np.asarray(np.clip(value, 0, 1), np.float32)


def _s_curve(value: npt.NDArray[np.floating], slope: float) -> npt.NDArray[np.float32]:
    """x^s / (x^s + (1-x)^s): through black, middle and white, with that slope in the middle."""
    up, down = value**slope, (1 - value) ** slope
    return np.asarray(up / (up + down), np.float32)


@cache
def lut(name: str) -> ImageFilter.Color3DLUT:
    """Return the look as a 3D lookup table."""
    axis = np.linspace(0, 1, _TABLE_SIDE, dtype=np.float32)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")  # Pillow's order: red runs fastest
    cube = tone(np.stack([red, green, blue], axis=-1), GRADES[name])
    return ImageFilter.Color3DLUT(_TABLE_SIDE, cube.ravel())


def _vignette(size: tuple[int, int], strength: float) -> Image.Image:
    """Return a mask that is white in the middle and darker by `strength` in the corners, like a lens (cos^4, about r^2 and r^4)."""
    x = np.linspace(-1, 1, 160, dtype=np.float32)
    radius2 = (x[None, :] ** 2 + x[:, None] ** 2) / 2
    shade = 1 - strength * (0.55 * radius2 + 0.45 * radius2**2)
    return Image.fromarray((shade * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC).convert("RGB")
