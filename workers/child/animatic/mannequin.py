"""The mannequin: a stand-in for a character, drawn in one tone and posed by the words of `pose` or `motion`.

A pose is a skeleton of angles in degrees, measured from straight down, positive towards the right; limbs are tapered strokes, as a
storyboard artist blocks in a body before there is a costume.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final

import msgspec
from PIL import ImageDraw

from workers.child.words import Words

Point = tuple[float, float]


class Pose(msgspec.Struct, frozen=True):
    """Angles of the limbs: `torso` from upright; of an arm or leg the upper and the lower part. Near limbs are drawn over far ones."""

    torso: float = 0.0
    head: float = 0.0
    near_arm: tuple[float, float] = (-10.0, -4.0)
    far_arm: tuple[float, float] = (12.0, 8.0)
    near_leg: tuple[float, float] = (-5.0, -3.0)
    far_leg: tuple[float, float] = (6.0, 4.0)
    lift: float = 0.0
    """Height of the lower foot above the ground, in body heights."""
    coat: bool = True
    seat: bool = False
    """Whether there is a block under the hips to sit on."""


POSES: Final = {
    "standing": Pose(),
    "walking": Pose(4, 2, (-26, -8), (24, 40), (22, 4), (-20, -40)),
    "running": Pose(18, -4, (-52, 30), (48, 130), (52, -8), (-22, -95), 0.04),
    "sitting": Pose(3, 6, (24, 62), (30, 70), (82, 4), (76, -6), 0, False, True),
    "kneeling": Pose(8, 16, (14, 42), (22, 52), (62, -10), (10, -86), 0, False),
    "jumping": Pose(6, -10, (-128, -150), (120, 150), (34, -30), (-24, -70), 0.14, False),
    "arms raised": Pose(0, -14, (-152, -168), (152, 168), (-8, -5), (9, 6)),
    "arms crossed": Pose(-2, -2, (-16, 74), (18, -70), (-8, -2), (8, 3)),
    "pointing": Pose(5, 4, (92, 94), (-14, -6), (-10, -4), (12, 6)),
    "fighting": Pose(10, 4, (48, 128), (86, 92), (34, -4), (-26, -30)),
    "leaning": Pose(-14, 8, (-8, 40), (-20, -8), (-4, -2), (20, 2)),
    "looking up": Pose(-6, -34, (-12, -2), (14, 10), (-7, -4), (8, 4)),
    "bowed": Pose(24, 40, (10, 8), (14, 12), (-4, -2), (6, 3)),
    "lying": Pose(84, 4, (70, 84), (96, 88), (-86, -88), (-82, -88), 0, False),
}
_WORDS: Final = Words(
    {
        "walking": "walk*, strid*, stroll*, march*, stepping",
        "running": "run, running, ran, sprint*, chase, chased, chasing, flee, fleeing, dash, dashed, dashing",
        "sitting": "sit, sitting, sat, seated",
        "kneeling": "kneel*, knelt, crouch*, squat*",
        "jumping": "jump*, leap*, dance, danced, dancing",
        "arms raised": "raise, raised, raising, wave, waved, waving, celebrat*, surrender*, cheer*, hands up, arms up",
        "arms crossed": "arms cross, cross-armed, crossed, crossing, folded",
        "pointing": "point, pointed, pointing, reach, reached, reaching, aim, aimed, aiming, offer, offered, offering",
        "fighting": "fight*, punch*, attack*, combat*, action, heroic*, sword",
        "leaning": "lean, leaning, leant, leaned, slouch*, lounge, lounging",
        "looking up": "look up, looks up, looking up, gaze, gazed, gazing",
        "bowed": "bow, bowed, bowing, sad, sadly, grief, griev*, mourn*, dejected, tired",
        "lying": "lying, lie, asleep, sleep*, dead, reclin*",
        "standing": "stand, standing, stood, idle, idly, neutral, upright, portrait",
    }
)


def stride(t: float, *, running: bool) -> Pose:
    """Return the pose at phase `t` (0 to 1) of a cycle of two steps: arms and legs swing in opposition, the free leg bends."""
    swing, bend = math.sin(2 * math.pi * t), math.cos(2 * math.pi * t)
    reach, fold, lean = (46.0, 70.0, 14.0) if running else (25.0, 30.0, 3.0)
    elbow = 70.0 if running else 12.0

    def leg(side: float) -> tuple[float, float]:
        thigh = side * swing * reach
        return thigh, thigh - max(0.0, side * bend) * fold - 4

    def arm(side: float) -> tuple[float, float]:
        upper = -side * swing * reach * 0.9
        return upper, upper + elbow

    return Pose(lean, 2, arm(1), arm(-1), leg(1), leg(-1), 0.04 * abs(bend) if running else 0.0)


def pose_named(text: str) -> str | None:
    """Return the pose that a text names, or None."""
    return _WORDS.first(text)


def draw(canvas: ImageDraw.ImageDraw, foot: Point, height: float, pose: Pose, fill: tuple[int, ...], *, mirrored: bool = False) -> None:
    """Draw the mannequin in one tone, its lower foot at `foot`, `height` pixels tall when upright."""
    side = -1 if mirrored else 1

    def go(start: Point, angle: float, length: float) -> Point:
        radians = math.radians(angle)
        return start[0] + side * math.sin(radians) * length * height, start[1] + math.cos(radians) * length * height

    hip = (0.0, 0.0)
    neck = go(hip, 180 - pose.torso, 0.30)
    knees = [go(hip, leg[0], 0.245) for leg in (pose.far_leg, pose.near_leg)]
    ankles = [go(knee, leg[1], 0.235) for knee, leg in zip(knees, (pose.far_leg, pose.near_leg), strict=True)]
    lowest = max(hip[1] + 0.06 * height, *(p[1] for p in (*knees, *ankles)), neck[1] + 0.03 * height)
    shift = (foot[0] - hip[0], foot[1] - lowest - pose.lift * height - 0.012 * height)

    def at(point: Point) -> Point:
        return point[0] + shift[0], point[1] + shift[1]

    def limb(points: list[Point], widths: list[float]) -> None:
        for (a, b), (wide, narrow) in zip(pairwise(points), pairwise(widths), strict=True):
            _taper(canvas, at(a), at(b), wide * height, narrow * height, fill)

    shoulder = go(neck, -pose.torso, 0.025)
    for arm in (pose.far_arm, pose.near_arm):
        elbow = go(shoulder, arm[0], 0.165)
        hand = go(elbow, arm[1], 0.15)
        limb([shoulder, elbow, hand, go(hand, arm[1], 0.035)], [0.030, 0.023, 0.016, 0.013])
    for leg, knee, ankle in zip((pose.far_leg, pose.near_leg), knees, ankles, strict=True):
        limb([hip, knee, ankle], [0.044, 0.032, 0.020])
        limb([ankle, go(ankle, min(max(leg[1] + 80, 60), 110), 0.05)], [0.019, 0.011])
    limb([hip, go(hip, 180 - pose.torso, 0.12), go(neck, -pose.torso, 0.045), neck], [0.050, 0.045, 0.062, 0.034])
    if pose.coat:
        thighs = (pose.near_leg[0], pose.far_leg[0])
        hem = [go(hip, max(thighs) + 13, 0.2), go(hip, sum(thighs) / 2, 0.215), go(hip, min(thighs) - 13, 0.2)]
        shoulders = [go(shoulder, -90 - pose.torso, 0.05), go(shoulder, 90 - pose.torso, 0.05)]
        canvas.polygon([at(point) for point in (*shoulders, *hem)], fill=fill)
    if pose.seat:
        left, right = sorted(at((side * x * height, 0.0))[0] for x in (-0.10, 0.11))
        canvas.rectangle((left, at((0.0, 0.045 * height))[1], right, foot[1]), fill=fill)
    crown = go(neck, 180 - pose.torso - pose.head, 0.088)
    limb([neck, crown], [0.024, 0.022])
    chin, brow = (at(go(neck, 180 - pose.torso - pose.head, up)) for up in (0.068, 0.105))
    _taper(canvas, chin, brow, 0.038 * height, 0.044 * height, fill)
    nose = at(go(go(neck, 180 - pose.torso - pose.head, 0.076), 90 - pose.torso - pose.head, 0.046))
    _taper(canvas, ((chin[0] + brow[0]) / 2, (chin[1] + brow[1]) / 2), nose, 0.022 * height, 0.006 * height, fill)


def _taper(canvas: ImageDraw.ImageDraw, a: Point, b: Point, wide: float, narrow: float, fill: tuple[int, ...]) -> None:
    """Draw a stroke with round ends; `wide` and `narrow` are its half widths."""
    for (x, y), radius in ((a, wide), (b, narrow)):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    length = math.hypot(b[0] - a[0], b[1] - a[1])
    if length > 0:
        across = (-(b[1] - a[1]) / length, (b[0] - a[0]) / length)
        canvas.polygon(
            [
                (p[0] + s * across[0] * r, p[1] + s * across[1] * r)
                for p, r, s in ((a, wide, 1), (b, narrow, 1), (b, narrow, -1), (a, wide, -1))
            ],
            fill=fill,
        )
