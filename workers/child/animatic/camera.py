"""What the camera does in a shot: tables from the words of `camera_angle` to framings and moves.

Offsets are shares of the whole picture's width (x) and height (y) from its centre, right and down positive; a zoom of 1 shows the whole
picture; a roll is in degrees, clockwise. Moves run at constant speed, without easing: shots are joined by cuts and dissolves, where a
camera is already moving. Zooms are exponential, so that they look even.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import msgspec
import numpy as np

from workers.child.words import Words

FULL_MOVE_S: Final = 1.5
"""A shot of this length or more gets the whole move, a shorter one its share, so that no move is a jolt."""
MOST_ROLL_ZOOM: Final = 1.7
"""The largest zoom that a roll may need to hide the corners."""


class View(msgspec.Struct, frozen=True):
    """What the camera sees at one moment."""

    zoom: float = 1.0
    x: float = 0.0
    y: float = 0.0
    roll: float = 0.0


class Move(msgspec.Struct, frozen=True):
    """A move from one view to another; `shake` is the amplitude of hand-held camera shake."""

    start: View = View()
    end: View = View()
    shake: float = 0.0


FRAMINGS: Final = {
    "wide": Move(View(1.0), View(1.05)),
    "medium": Move(View(1.34, 0, -0.03), View(1.40, 0.012, -0.03)),
    "close-up": Move(View(1.80, 0, -0.06), View(1.92, 0, -0.075)),
    "over the shoulder": Move(View(1.30, -0.085, -0.02), View(1.36, -0.045, -0.02)),
    "low angle": Move(View(1.22, 0, 0.085), View(1.26, 0, 0.045)),
    "high angle": Move(View(1.22, 0, -0.085), View(1.18, 0, -0.05)),
}
"""Starting crops, each with a slow drift, which a named move replaces."""

MOVES: Final = {
    "static": Move(),
    "pan left": Move(View(1.16, 0.065), View(1.16, -0.065)),
    "pan right": Move(View(1.16, -0.065), View(1.16, 0.065)),
    "tilt up": Move(View(1.18, 0, 0.07), View(1.18, 0, -0.07)),
    "tilt down": Move(View(1.18, 0, -0.07), View(1.18, 0, 0.07)),
    "dolly in": Move(View(1.0), View(1.17)),
    "dolly out": Move(View(1.17), View(1.0)),
    "zoom in": Move(View(1.0), View(1.45)),
    "zoom out": Move(View(1.45), View(1.0)),
    "crane up": Move(View(1.26, 0, 0.095), View(1.12, 0, -0.045)),
    "crane down": Move(View(1.12, 0, -0.045), View(1.26, 0, 0.095)),
    "tracking": Move(View(1.22, -0.085, 0.01), View(1.30, 0.10, 0.01)),
    "dutch": Move(View(1.0, roll=4.5), View(1.0, roll=9.0)),
    "handheld": Move(View(1.10), View(1.13), shake=0.011),
}

NEUTRAL: Final = (
    Move(View(1.0), View(1.10)),
    Move(View(1.12, -0.035), View(1.12, 0.035)),
    Move(View(1.10), View(1.0)),
    Move(View(1.12, 0.03, 0.02), View(1.12, -0.03, -0.02)),
)
"""Slow moves for shots without a word, used in turn, so that neighbours differ."""

_WORDS: Final = Words(
    {
        "wide": "wide, establishing, long shot, full shot, extreme long, master shot",
        "medium": "medium, mid shot, waist, cowboy, two shot, two-shot",
        "close-up": "close-up, close up, closeup, close shot, extreme close, insert, macro, tight",
        "over the shoulder": "over the shoulder, over-the-shoulder, over shoulder, ots, o.t.s.",
        "low angle": "low angle, low-angle, worm's eye, worm's-eye, from below",
        "high angle": "high angle, high-angle, bird's eye, bird's-eye, overhead, top down, from above, aerial",
        "static": "static, locked, lock-off, locked-off, tripod, still, fixed, eye level, eye-level",
        "pan left": "pan left, panning left, pans left, truck left, left pan",
        "pan right": "pan right, panning right, pans right, truck right, right pan, pan",
        "tilt up": "tilt up, tilting up, tilts up, tilt",
        "tilt down": "tilt down, tilting down, tilts down",
        "dolly in": "dolly in, dolly-in, push in, push-in, pushes in, dolly forward, track in, dolly",
        "dolly out": "dolly out, dolly-out, pull out, pull-out, pull back, pulls back, dolly back, track out",
        "zoom in": "zoom in, zoom-in, zooms in, crash zoom, zoom",
        "zoom out": "zoom out, zoom-out, zooms out",
        "crane up": "crane up, craning up, boom up, jib up, pedestal up, crane, drone",
        "crane down": "crane down, craning down, boom down, jib down, pedestal down",
        "tracking": "tracking, track, follow, following, steadicam",
        "dutch": "dutch, canted, oblique, tilted frame, dutch tilt",
        "handheld": "handheld, hand-held, hand held, shaky, documentary, pov, point of view",
    }
)


def named_words(angle: str) -> list[str]:
    """Return the words of the tables that a `camera_angle` names, longest first: "slow push-in, low angle" is low angle and dolly in."""
    return _WORDS.named(angle)


def move_for(angle: str | None, shot: int) -> Move:
    """Return the move of shot number `shot` for a `camera_angle`; a neutral one if it names none."""
    named = named_words(angle or "")
    framing = next((FRAMINGS[word] for word in named if word in FRAMINGS), None)
    moving = next((MOVES[word] for word in named if word in MOVES), None)
    if framing and moving:
        crop = framing.start
        return Move(_inside_crop(crop, moving.start), _inside_crop(crop, moving.end), moving.shake / crop.zoom)
    return framing or moving or NEUTRAL[shot % len(NEUTRAL)]


def _inside_crop(crop: View, view: View) -> View:
    """Return the view within a crop of the picture."""
    return View(crop.zoom * view.zoom, crop.x + view.x / crop.zoom, crop.y + view.y / crop.zoom, view.roll)


def path(move: Move, frames: int, seconds: float, aspect: float, rng: np.random.Generator) -> list[View]:
    """Return the view at each frame of the shot, all inside the picture. `aspect` is width over height; `rng` drives the camera shake."""
    share = min(1.0, seconds / FULL_MOVE_S)
    shake = _shake_path(frames, seconds, rng) * move.shake if move.shake else np.zeros((frames, 2))
    views = []
    for frame in range(frames):
        t = share * (frame / max(1, frames - 1))
        zoom = move.start.zoom * (move.end.zoom / move.start.zoom) ** t
        roll = move.start.roll + (move.end.roll - move.start.roll) * t
        x = move.start.x + (move.end.x - move.start.x) * t + shake[frame, 0]
        y = move.start.y + (move.end.y - move.start.y) * t + shake[frame, 1]
        views.append(_clamped(View(zoom, x, y, roll), aspect))
    return views


def tightest(views: Iterable[View]) -> float:
    """Return the largest zoom: how much finer than the frame the picture may usefully be."""
    return max(view.zoom for view in views)


def _shake_path(frames: int, seconds: float, rng: np.random.Generator) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return offsets (frames, 2) of about -1 to 1: a sum of sines of 0.4 to 2.5 Hz, the frequencies at which a hand-held camera sways."""
    t = np.linspace(0, seconds, frames)[:, None, None]
    hertz = np.array([0.43, 0.9, 1.6, 2.5])
    amplitude = np.array([0.5, 0.28, 0.15, 0.07])
    phase = rng.uniform(0, 2 * math.pi, (1, 2, 4))
    return (amplitude * np.sin(2 * math.pi * hertz * t + phase)).sum(axis=2)  # type: ignore[no-any-return]


def _clamped(view: View, aspect: float) -> View:
    """Return the view with its zoom raised until a rolled frame shows no empty corner, and its centre moved until the frame is inside.

    A roll that would need a zoom beyond `MOST_ROLL_ZOOM`, as in a very long frame, is reduced.
    """
    long = max(aspect, 1 / aspect)
    most = math.degrees(math.asin(min(1.0, (MOST_ROLL_ZOOM - 1) / long)))
    roll = min(max(view.roll, -most), most)
    angle = math.radians(abs(roll))
    spread_x = math.cos(angle) + math.sin(angle) / aspect
    spread_y = math.cos(angle) + math.sin(angle) * aspect
    zoom = max(view.zoom, spread_x, spread_y)
    room_x, room_y = (1 - spread_x / zoom) / 2, (1 - spread_y / zoom) / 2
    return View(zoom, min(max(view.x, -room_x), room_x), min(max(view.y, -room_y), room_y), roll)
