"""A painted place for a card: sky, light, planes of distance and ground, as an ink wash on paper in the card's palette.

The kind of place follows the words of the description, its composition follows a random generator: the same words and seed paint the same
picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from workers.child.animatic.palette import Colour, Palette, mix
from workers.child.words import Words

GROUND: Final = 0.93
"""Where a figure stands, in picture heights from the top."""

Rng = np.random.Generator
Line = npt.NDArray[np.float64]
"""An outline: the height at each pixel column, in picture heights from the top."""

_WORDS: Final = {
    "city": (
        "city, street, alley, rooftop, rooftops, skyscraper, downtown, town, urban, tower, traffic, bridge, neon, metropolis, "
        "market, station"
    ),
    "forest": "forest, woods, tree, trees, jungle, park, garden, pine, pines, glade, leaves",
    "sea": "sea, ocean, beach, harbour, harbor, ship, boat, cliff, coast, island, wave, waves, river, lake, shore, storm, sailor, pier",
    "lighthouse": "lighthouse, beacon",
    "desert": "desert, dune, dunes, sand, canyon, mars, wasteland, dust, western, savanna",
    "room": (
        "room, kitchen, office, bedroom, interior, house, corridor, hall, bar, cafe, café, door, window, table, desk, library, "
        "hospital, lab, cell"
    ),
    "hills": "mountain, mountains, hill, hills, valley, snow, field, village, castle, road, meadow, farm",
}
KINDS: Final = tuple(_WORDS)
_PLACES: Final = Words(_WORDS)


class Backdrop(msgspec.Struct, frozen=True):
    """The sky as RGB, and the planes of distance in front of it as RGBA, from far to near."""

    sky: Image.Image
    planes: tuple[Image.Image, ...]
    ground: float
    """Where a figure stands, in picture heights from the top."""


def place(description: str, rng: Rng) -> str:
    """Return the kind of place that the description names most often; a random one of four if it names none."""
    counts = _PLACES.counted(description)
    return max(counts, key=lambda kind: counts[kind]) if counts else str(rng.choice(["hills", "city", "sea", "desert"]))


def paint(size: tuple[int, int], kind: str, palette: Palette, rng: Rng) -> Backdrop:
    """Paint the place in planes; `flatten` joins them."""
    horizon = float(rng.uniform(0.50, 0.66))
    if kind == "room":
        return _room(size, palette, rng)
    light = (float(rng.choice([rng.uniform(0.16, 0.36), rng.uniform(0.64, 0.84)])), float(rng.uniform(0.16, horizon - 0.12)))
    sky = _sky(size, palette, light, rng)
    outline = _OUTLINES[kind]
    planes = []
    count = 4
    for number in range(count):
        depth = (number + 1) / count
        line = outline(size[0], horizon, depth, rng)
        brightness = 0.66 - 0.60 * depth**0.8
        colour = mix(palette.at(brightness), palette.light, 0.22 * (1 - depth))
        plane = _plane(size, line, colour, palette, rng)
        if kind == "lighthouse" and number == 0:
            _tower(plane, mix(colour, palette.at(0.0), 0.45), palette.light)
        planes.append(plane)
    return Backdrop(sky, tuple(planes), GROUND)


def flatten(backdrop: Backdrop, upto: int | None = None) -> Image.Image:
    """Return the sky with its planes, or the first `upto` of them, as one RGB picture."""
    picture = backdrop.sky.copy()
    for plane in backdrop.planes[:upto]:
        picture.paste(plane, mask=plane.getchannel("A"))
    return picture


def grain(picture: Image.Image, rng: Rng, strength: float = 4.5) -> Image.Image:
    """Return the picture with paper grain, `strength` its standard deviation in steps of 255, equal in all channels."""
    width, height = picture.size
    fine = rng.normal(128, strength, (height, width))
    coarse = np.asarray(_cloud(picture.size, rng, 5), np.float64) - 128
    tooth = Image.fromarray((fine + coarse * strength / 60).clip(0, 255).astype(np.uint8)).convert("RGB")
    return ImageChops.overlay(picture, tooth)


def _sky(size: tuple[int, int], palette: Palette, light: tuple[float, float], rng: Rng) -> Image.Image:
    """Paint a vertical gradient with drifting clouds and a glowing sun or moon at `light` (shares of width and height)."""
    width, height = size
    y = np.linspace(0, 1, height)[:, None]
    top, low = np.array(palette.at(0.52), float), np.array(mix(palette.at(0.95), palette.light, 0.35), float)
    drift = (np.asarray(_cloud(size, rng, 3), float) - 128) / 128
    share = np.clip(y * 1.35 + drift * 0.28, 0, 1)[..., None]
    field = top + (low - top) * share
    x = np.linspace(0, 1, width)[None, :]
    distance = np.hypot((x - light[0]) * width, (y - light[1]) * height) / min(size)
    glow = np.exp(-((distance / 0.26) ** 1.3))[..., None] * 0.7
    field = field + (np.array(mix(palette.light, (255, 255, 255), 0.45), float) - field) * glow
    disc = np.clip((0.062 - distance) * min(size) / 2, 0, 1)[..., None]
    field = field + (np.array(mix(palette.light, (255, 255, 255), 0.78), float) - field) * disc
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


def _plane(size: tuple[int, int], line: Line, colour: Colour, palette: Palette, rng: Rng) -> Image.Image:
    """Paint everything below the outline in one wash: darkest at its upper edge, as wet ink gathers, and paler towards the ground."""
    height = size[1]
    y = np.arange(height, dtype=np.float64)[:, None] / height
    below = np.clip((y - line[None, :]) * height + 0.5, 0, 1)
    fall = np.clip((y - line[None, :]) / 0.30, 0, 1)
    wash = (np.asarray(_cloud(size, rng, 4), np.float64) - 128) / 128
    share = np.clip(0.06 + 0.30 * fall + 0.16 * wash, 0, 1)[..., None]
    dark, pale = np.array(colour, float), np.array(mix(colour, palette.light, 0.55), float)
    rgba = np.dstack([(dark + (pale - dark) * share).clip(0, 255), below * 255]).astype(np.uint8)
    return Image.fromarray(rgba)


def _noise(width: int, rng: Rng, knots: int) -> Line:
    """Return smooth noise of about -1 to 1 with `knots` bends."""
    values = rng.uniform(-1, 1, knots + 3)
    x = np.linspace(0.5, knots + 1.5, width)
    low = np.floor(x).astype(int)
    t = x - low
    t = t * t * (3 - 2 * t)
    return np.asarray(values[low] * (1 - t) + values[low + 1] * t)


def _ridge(width: int, rng: Rng, knots: int) -> Line:
    """Return fractal noise: six octaves."""
    return sum((_noise(width, rng, knots * 2**octave) / 2**octave for octave in range(6)), start=np.zeros(width)) / 1.6


def _hills(width: int, horizon: float, depth: float, rng: Rng) -> Line:
    base = horizon + (0.94 - horizon) * (depth - 0.25) ** 1.3
    return np.asarray(base - (0.15 - 0.10 * depth) * (0.6 + _ridge(width, rng, 3)))


def _desert(width: int, horizon: float, depth: float, rng: Rng) -> Line:
    base = horizon + (0.93 - horizon) * (depth - 0.25) ** 1.2
    line = np.abs(_noise(width, rng, 3)) ** 0.8
    return np.asarray(base - 0.09 * line - 0.02 * _noise(width, rng, 2))


def _sea(width: int, horizon: float, depth: float, rng: Rng) -> Line:
    if depth < 0.3:  # a headland on one side, and level water
        side = np.linspace(0, 1, width) if rng.random() < 0.5 else np.linspace(1, 0, width)
        land = np.clip((side - rng.uniform(0.52, 0.68)) * 6, 0, 1) ** 0.5 * (0.17 + 0.03 * _ridge(width, rng, 9))
        return np.asarray(horizon - land)
    base = horizon + (0.90 - horizon) * (depth - 0.42) ** 1.1 + 0.01
    return np.asarray(base - (0.004 + 0.016 * depth**2) * _ridge(width, rng, int(26 - 16 * depth)))


def _tower(land: Image.Image, colour: Colour, light: Colour) -> None:
    """Draw a lighthouse on the headland, with its lamp lit; at twice the size for clean edges."""
    width, height = land.size
    top_of = np.argmax(np.asarray(land.getchannel("A")) > 128, axis=0)
    x = round(width * (0.16 if top_of[: width // 4].mean() < top_of[-width // 4 :].mean() else 0.84))
    foot, tall = int(top_of[x]) + height // 60, height * 0.24
    layer = Image.new("RGBA", (width * 2, height * 2), (*colour, 0))
    canvas = ImageDraw.Draw(layer)

    def part(top: float, low: float, wide_top: float, wide_low: float, fill: tuple[int, ...]) -> None:
        """A storey, in shares of the tower's height, from its upper to its lower edge."""
        corners = ((-wide_top, top), (wide_top, top), (wide_low, low), (-wide_low, low))
        canvas.polygon([(2 * (x + dx * tall), 2 * (foot - dy * tall)) for dx, dy in corners], fill=fill)

    ink, lamp = (*colour, 255), (*mix(light, (255, 255, 255), 0.8), 255)
    part(0.76, 0, 0.065, 0.105, ink)
    part(0.79, 0.76, 0.10, 0.10, ink)
    part(0.90, 0.79, 0.052, 0.052, lamp)
    part(0.96, 0.90, 0.01, 0.068, ink)
    part(1.03, 0.96, 0.004, 0.008, ink)
    land.alpha_composite(layer.reduce(2))


def _forest(width: int, horizon: float, depth: float, rng: Rng) -> Line:
    base = horizon + (0.95 - horizon) * (depth - 0.25) ** 1.2
    line = base - 0.03 * _noise(width, rng, 4)
    x = np.arange(width) / width
    if depth == 1:
        return np.asarray(line)
    for _ in range(int(34 - 26 * depth)):
        middle, tall, wide = (
            rng.uniform(-0.05, 1.05),
            rng.uniform(0.18, 0.34) * (0.5 + 1.2 * depth),
            rng.uniform(0.020, 0.034) * (0.5 + 1.4 * depth),
        )
        across = np.abs(x - middle) / wide
        tiers = 0.16 * np.abs(((1 - across) * 5) % 1 - 0.5)  # the layers of a fir's branches
        line = np.where(across < 1, np.minimum(line, base + 0.02 - tall * (1 - across) * (1 - tiers)), line)
    return np.asarray(line)


def _city(width: int, horizon: float, depth: float, rng: Rng) -> Line:
    base = horizon + (0.95 - horizon) * (depth - 0.25) ** 1.2
    line = np.full(width, base + 0.01)
    if depth == 1:
        return line - 0.004 * _noise(width, rng, 3)
    x = 0.0
    while x < 1:
        wide = rng.uniform(0.03, 0.085) * (0.5 + 1.1 * depth)
        gap = abs(x + wide / 2 - 0.5) * 2  # the street is open in the middle of the near planes
        tall = rng.uniform(0.06, 0.40) * (0.75 + 0.55 * depth) * (1 if depth < 0.4 else 0.25 + 0.95 * gap**1.5)
        a, b = int(x * width), int(min(1, x + wide) * width)
        line[a:b] = base - tall
        if rng.random() < 0.45:
            inset = int((b - a) * rng.uniform(0.2, 0.4))
            line[a + inset : b - inset] -= tall * rng.uniform(0.06, 0.16)
        if rng.random() < 0.3:
            mast = (a + b) // 2
            line[mast : mast + max(1, width // 500)] -= tall * 0.35
        x += wide + (rng.uniform(0, 0.02) if rng.random() < 0.4 else 0)
    return line


_OUTLINES: Final[dict[str, Callable[[int, float, float, Rng], Line]]] = {
    "hills": _hills,
    "desert": _desert,
    "sea": _sea,
    "lighthouse": _sea,
    "forest": _forest,
    "city": _city,
}


def _room(size: tuple[int, int], palette: Palette, rng: Rng) -> Backdrop:
    """Paint a wall with a window whose light falls across the floor."""
    width, height = size
    floor = float(rng.uniform(0.70, 0.76))
    wall = Image.composite(
        Image.new("RGB", size, palette.at(0.42)),
        Image.new("RGB", size, palette.at(0.18)),
        _cloud(size, rng, 2).point(lambda v: min(255, v + 20)),
    )
    light = mix(palette.light, (255, 255, 255), 0.45)
    left = float(rng.choice([rng.uniform(0.10, 0.22), rng.uniform(0.56, 0.66)]))
    tall, wide = 0.36, 0.22 * min(1.6, height / width + 0.55)
    top = floor - 0.16 - tall
    glow = Image.new("L", size)
    canvas = ImageDraw.Draw(glow)
    panes = [
        (left + wide * (column * 0.52), top + tall * (row * 0.52), left + wide * (column * 0.52 + 0.48), top + tall * (row * 0.52 + 0.48))
        for column in range(2)
        for row in range(2)
    ]
    for a, b, c, d in panes:
        canvas.rectangle((a * width, b * height, c * width, d * height), fill=255)
    lean = 0.26 if left < 0.4 else -0.26
    beam = Image.new("L", size)
    shaft = ImageDraw.Draw(beam)
    for a, _, c, d in panes:
        near, far = floor + (1 - floor) * 0.12, floor + (1 - floor) * 0.9
        low, high = (near, (near + far) / 2 - 0.01) if d > top + tall * 0.6 else ((near + far) / 2 + 0.01, far)
        shaft.polygon(
            [
                ((a + lean * (low - floor) * 3) * width, low * height),
                ((c + lean * (low - floor) * 3) * width, low * height),
                ((c + lean * (high - floor) * 3 + 0.02) * width, high * height),
                ((a + lean * (high - floor) * 3 - 0.02) * width, high * height),
            ],
            fill=150,
        )
    line = np.full(width, floor)
    ground = _plane(size, line, palette.at(0.10), palette, rng)
    soft = ImageChops.lighter(glow, glow.filter(ImageFilter.GaussianBlur(min(size) / 14)))
    wall.paste(light, mask=soft)
    ground.paste((*light, 255), mask=ImageChops.multiply(beam.filter(ImageFilter.GaussianBlur(min(size) / 160)), ground.getchannel("A")))
    return Backdrop(wall, (ground,), GROUND)


def _cloud(size: tuple[int, int], rng: Rng, octaves: int) -> Image.Image:
    """Return soft noise around 128 as "L": coarse noise of several sizes, enlarged."""
    width, height = size
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        cells = 3 * 2**octave
        wide, high = max(2, cells * width // max(size)), max(2, cells * height // max(size))
        coarse = Image.fromarray(rng.integers(0, 256, (high, wide), dtype=np.uint8))
        total += (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32) - 128) / 2**octave
    return Image.fromarray((128 + total * 0.8).clip(0, 255).astype(np.uint8))
