"""The camera's moves, measured in the pictures: shift, scale and rotation between two frames, by phase correlation."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from workers.child.animatic import camera
from workers.child.animatic.plate import Plate

Floats = npt.NDArray[np.float64]

SIZE = (512, 288)
SECONDS = 3.0
FRAMES = 72


class Motion(NamedTuple):
    """How the picture moved: pixels right and down, scale factor, degrees clockwise."""

    x: float
    y: float
    scale: float
    turn: float


def scene(size: tuple[int, int] = (1536, 864)) -> Image.Image:
    """Return a picture with detail of every size, so that a correlation has one peak."""
    rng = np.random.default_rng(5)
    total = np.zeros(size[::-1])
    for cells in (12, 30, 80, 200):
        coarse = Image.fromarray(rng.integers(0, 256, (cells * 9 // 16 + 2, cells), dtype=np.uint8))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float) - 128
    grey = (128 + total * 0.45).clip(0, 255).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(grey)] * 3)


def shot(angle: str | None, *, seconds: float = SECONDS, size: tuple[int, int] = SIZE) -> tuple[Plate, int]:
    frames = round(seconds * 24)
    views = camera.path(camera.move_for(angle, 0), frames, seconds, size[0] / size[1], np.random.default_rng(3))
    return Plate(scene(), size, "neutral", views), frames


def grey(plate: Plate, frame: int) -> Floats:
    return np.asarray(plate.frame(frame).y, float)


def motion(first: Floats, last: Floats) -> Motion:
    """Return scale and rotation by log-polar spectra (Reddy and Chatterji 1996), and the shift of the frames aligned by them."""
    height, width = first.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    scale, turn = _scale_and_turn(*_shared(first, last, *shift(first * window, last * window)))
    aligned = Image.fromarray(last.astype(np.uint8)).transform(
        (width, height), Image.Transform.AFFINE, _about_middle(scale, turn, width, height), Image.Resampling.BICUBIC
    )
    dx, dy = shift(first * window, np.asarray(aligned, float) * window)
    return Motion(dx, dy, scale, turn)


def _shared(first: Floats, last: Floats, dx: float, dy: float) -> tuple[Floats, Floats]:
    """Return the parts of two frames that show the same, given the approximate shift."""
    x, y = round(dx), round(dy)
    height, width = first.shape
    return (
        first[max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)],
        last[max(0, y) : height - max(0, -y), max(0, x) : width - max(0, -x)],
    )


def _scale_and_turn(first: Floats, last: Floats) -> tuple[float, float]:
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    side = 512
    spectra = [np.log1p(np.abs(np.fft.fftshift(np.fft.fft2((frame - frame.mean()) * window, (side, side))))) for frame in (first, last)]
    angles, radii = 720, 512
    theta = np.linspace(-np.pi / 2, np.pi / 2, angles, endpoint=False)
    base = (side / 2) ** (1 / radii)
    radius = base ** np.arange(radii)
    x, y = side / 2 + np.outer(np.cos(theta), radius), side / 2 + np.outer(np.sin(theta), radius)
    polar = [_sampled(spectrum, x, y)[:, 180:] for spectrum in spectra]
    dr, dt = shift(polar[0], polar[1])
    return base ** (-dr), dt * 180 / angles


def _about_middle(scale: float, turn: float, width: int, height: int) -> tuple[float, ...]:
    cos, sin = scale * np.cos(np.radians(turn)), scale * np.sin(np.radians(turn))
    return cos, -sin, width / 2 - cos * width / 2 + sin * height / 2, sin, cos, height / 2 - sin * width / 2 - cos * height / 2


def _sampled(image: Floats, x: Floats, y: Floats) -> Floats:
    x0, y0 = np.clip(x.astype(int), 0, image.shape[1] - 2), np.clip(y.astype(int), 0, image.shape[0] - 2)
    fx, fy = x - x0, y - y0
    top = image[y0, x0] * (1 - fx) + image[y0, x0 + 1] * fx
    low = image[y0 + 1, x0] * (1 - fx) + image[y0 + 1, x0 + 1] * fx
    return np.asarray(top * (1 - fy) + low * fy)


def shift(first: Floats, second: Floats) -> tuple[float, float]:
    """Return the shift right and down in pixels, to a few hundredths.

    By phase correlation, its peak refined by an upsampled transform around it (Guizar-Sicairos 2008).
    """
    a, b = np.fft.fft2(first - first.mean()), np.fft.fft2(second - second.mean())
    cross = b * a.conj()
    cross /= np.abs(cross) + 1e-3 * np.abs(cross).max()
    peak = np.unravel_index(np.argmax(np.fft.ifft2(cross).real), cross.shape)
    height, width = cross.shape
    y, x = (float(p if p <= n // 2 else p - n) for p, n in zip(peak, (height, width), strict=True))
    for reach, steps in ((1.0, 21), (0.1, 21)):
        ys, xs = y + np.linspace(-reach, reach, steps), x + np.linspace(-reach, reach, steps)
        rows = np.exp(2j * np.pi * np.outer(ys, np.fft.fftfreq(height)))
        columns = np.exp(2j * np.pi * np.outer(np.fft.fftfreq(width), xs))
        j, i = np.unravel_index(np.argmax((rows @ cross @ columns).real), (steps, steps))
        y, x = float(ys[j]), float(xs[i])
    return x, y


@pytest.fixture(scope="module")
def measured() -> dict[str, Motion]:
    """The motion from the first to the last frame of a three-second shot, for every word."""
    result = {}
    for word in [*camera.FRAMINGS, *camera.MOVES]:
        plate, frames = shot(word)
        result[word] = motion(grey(plate, 0), grey(plate, frames - 1))
    return result


def test_the_measure_finds_what_is_known() -> None:
    picture = scene()
    first = np.asarray(picture.resize(SIZE, Image.Resampling.BICUBIC, box=(200, 100, 1224, 676)).convert("L"), float)
    moved = np.asarray(picture.resize(SIZE, Image.Resampling.BICUBIC, box=(207, 94, 1231, 670)).convert("L"), float)
    grown = np.asarray(picture.resize(SIZE, Image.Resampling.BICUBIC, box=(278.8, 144.3, 1145.2, 631.7)).convert("L"), float)
    assert shift(first, moved) == pytest.approx((-3.5, 3.0), abs=0.06)
    assert motion(first, grown).scale == pytest.approx(1024 / 866.4, abs=0.01)


def test_there_are_twelve_words_and_more() -> None:
    assert {
        "static",
        "pan left",
        "pan right",
        "tilt up",
        "tilt down",
        "dolly in",
        "dolly out",
        "zoom in",
        "crane up",
        "dutch",
        "handheld",
        "tracking",
    } <= set(camera.MOVES)
    assert {"wide", "medium", "close-up", "over the shoulder"} <= set(camera.FRAMINGS)


def test_static_stands(measured: dict[str, Motion]) -> None:
    still = measured["static"]
    assert np.hypot(still.x, still.y) < 1
    assert still.scale == pytest.approx(1, abs=0.003)


def test_a_pan_moves_the_picture_the_other_way_by_a_twentieth_of_the_width_or_more(measured: dict[str, Motion]) -> None:
    assert measured["pan left"].x >= SIZE[0] * 0.05
    assert measured["pan right"].x <= -SIZE[0] * 0.05
    assert measured["tracking"].x <= -SIZE[0] * 0.05
    assert measured["tilt up"].y >= SIZE[1] * 0.05
    assert measured["tilt down"].y <= -SIZE[1] * 0.05
    assert measured["crane up"].y >= SIZE[1] * 0.05


def test_a_dolly_scales_by_eight_percent_or_more(measured: dict[str, Motion]) -> None:
    assert measured["dolly in"].scale >= 1.08
    assert measured["dolly out"].scale <= 1 / 1.08
    assert measured["zoom in"].scale >= 1.3


def test_dutch_turns_by_four_degrees_or_more(measured: dict[str, Motion]) -> None:
    assert abs(measured["dutch"].turn) >= 4
    plate, _ = shot("dutch")
    upright, _ = shot("static")
    assert abs(motion(grey(upright, 0), grey(plate, 0)).turn) >= 4


def test_no_two_words_give_the_same_motion(measured: dict[str, Motion]) -> None:
    for (one, a), (other, b) in itertools.combinations(measured.items(), 2):
        apart = max(abs(a.x - b.x) / SIZE[0], abs(a.y - b.y) / SIZE[1], abs(a.scale - b.scale), abs(a.turn - b.turn) / 90)
        assert apart > 0.008, (one, other, a, b)


def test_framings_start_closer() -> None:
    starts = {word: camera.FRAMINGS[word].start.zoom for word in ("wide", "medium", "close-up")}
    assert starts["wide"] < starts["medium"] < starts["close-up"]


def test_a_pan_runs_evenly() -> None:
    plate, frames = shot("pan left", seconds=2)
    shown = [grey(plate, frame) for frame in range(frames)]
    window = np.outer(np.hanning(SIZE[1]), np.hanning(SIZE[0]))
    steps = np.array([shift(a * window, b * window)[0] for a, b in itertools.pairwise(shown)])
    assert steps.mean() > 0.5
    assert np.abs(steps - steps.mean()).max() < 0.1


def test_a_framing_and_a_move_work_together() -> None:
    alone, together = camera.move_for("dolly in", 0), camera.move_for("Close-up, slow push-in", 0)
    assert together.start.zoom == camera.FRAMINGS["close-up"].start.zoom
    assert together.end.zoom / together.start.zoom == pytest.approx(alone.end.zoom / alone.start.zoom)


@pytest.mark.parametrize(
    ("angle", "words"),
    [
        ("Slow dolly in", ["dolly in"]),
        ("low-angle wide shot", ["low angle", "wide"]),
        ("OTS", ["over the shoulder"]),
        ("bird's-eye", ["high angle"]),
        ("over_the_shoulder", ["over the shoulder"]),
        ("panorama of wideness", []),
        ("no dolly in", []),
        ("without zoom, static", ["static"]),
        ("not handheld but on a tripod", ["static"]),
        ("", []),
    ],
)
def test_words_are_found_as_people_write_them(angle: str, words: list[str]) -> None:
    assert sorted(camera.named_words(angle)) == sorted(words)


def test_short_shots_move_less() -> None:
    short, frames = shot("pan left", seconds=0.5)
    long, long_frames = shot("pan left", seconds=3)
    assert motion(grey(short, 0), grey(short, frames - 1)).x < motion(grey(long, 0), grey(long, long_frames - 1)).x / 2


@pytest.mark.parametrize("aspect", [1 / 60, 9 / 16, 1.0, 16 / 9, 60.0])
@pytest.mark.parametrize("word", [*camera.FRAMINGS, *camera.MOVES])
def test_the_camera_never_sees_past_the_edge(word: str, aspect: float) -> None:
    for view in camera.path(camera.move_for(word, 0), 30, 4.0, aspect, np.random.default_rng(9)):
        angle = np.radians(abs(view.roll))
        half_x = (np.cos(angle) + np.sin(angle) / aspect) / view.zoom / 2
        half_y = (np.cos(angle) + np.sin(angle) * aspect) / view.zoom / 2
        assert abs(view.x) + half_x <= 0.5 + 1e-9
        assert abs(view.y) + half_y <= 0.5 + 1e-9
        assert view.zoom <= 2.3
