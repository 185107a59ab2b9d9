"""The concept card: its type, its colours, its composition."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from workers.child.animatic import card, palette
from workers.child.animatic.grade import GRADES
from workers.child.animatic.typography import CAP_HEIGHT, DESCENT, LINE_HEIGHT

TEXT = "Salt in his beard, one hand on the brass of the lamp, he waits for a boat that will not come. "


def brief(text: str = TEXT, **more: object) -> card.Brief:
    fields: dict[str, object] = {"description": text, "pose": None, "lighting": "neutral", "seed": 1}
    return card.Brief(**(fields | more))  # type: ignore[arg-type]  # the factory of the tests: each names what it is about


def pixels(image: Image.Image) -> npt.NDArray[np.int16]:
    return np.asarray(image, np.int16)


@pytest.mark.parametrize("letters", [1, 120, 1200])
@pytest.mark.parametrize("size", [(512, 512), (960, 540), (450, 800)])
def test_type_stands_inside_its_margins(letters: int, size: tuple[int, int]) -> None:
    asked = brief((TEXT * 20)[:letters])
    image = pixels(card.card(size, asked))
    picture, box = card.layout(size, asked)
    paper = image[box[1] - 3, box[0] - 3]
    ink = np.abs(image - paper).max(axis=2) > 40
    ink[picture[1] : picture[3], picture[0] : picture[2]] = False
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    margin = round(min(size) * 0.05)
    for first, last, side in ((columns[0], columns[-1], size[0]), (rows[0], rows[-1], size[1])):
        assert first >= min(margin, side) - 2
        assert last <= side - margin + 2


@pytest.mark.parametrize("lighting", GRADES)
def test_type_reaches_its_contrast_in_every_light(lighting: str) -> None:
    asked = brief("Light", lighting=lighting)
    size = (600, 600)
    image = pixels(card.card(size, asked))
    picture, box = card.layout(size, asked)
    paper = tuple(int(v) for v in image[box[1] - 3, box[0] - 3])
    title = image[box[1] + 45 : box[3] - 70, box[0] : box[2]].reshape(-1, 3)
    furthest = tuple(int(v) for v in title[np.abs(title - paper).sum(axis=1).argmax()])
    assert palette.contrast((paper[0], paper[1], paper[2]), (furthest[0], furthest[1], furthest[2])) >= 4.5
    assert picture[2] - picture[0] > 100


def test_readable_reaches_the_contrast_wherever_it_can_be_reached() -> None:
    rng = np.random.default_rng(1)
    for wish, ground in rng.integers(0, 256, (300, 2, 3)).tolist():
        colour = palette.readable(tuple(wish), tuple(ground))
        assert palette.contrast(colour, tuple(ground)) >= 4.5


@pytest.mark.parametrize("letters", [1, 20, 120])
def test_no_word_of_a_title_is_broken(letters: int) -> None:
    text = ("смотрителя " * 12)[:letters].strip()
    style, lines = card.fit_text(text, 400, 900, 1000)
    assert " ".join(lines) == text
    assert style.size >= 40


def test_short_texts_are_set_larger() -> None:
    sizes = [card.fit_text((TEXT * 20)[:letters], 700, 500, 1000)[0].size for letters in (1, 120, 1200)]
    assert sizes[0] > 2 * sizes[1] > 2 * sizes[2]


@pytest.mark.parametrize("height", [90, 200, 700])
@pytest.mark.parametrize("letters", [1, 12, 120, 1200])
def test_a_text_ends_above_what_stands_below_it(letters: int, height: int) -> None:
    style, lines = card.fit_text((TEXT * 20)[:letters], 700, height, 1000)
    assert style.size * (CAP_HEIGHT + DESCENT + LINE_HEIGHT * (len(lines) - 1)) <= height


def test_a_text_that_cannot_fit_ends_in_an_ellipsis() -> None:
    _, lines = card.fit_text(TEXT * 60, 300, 200, 400)
    assert lines[-1].endswith("…")


def test_colours_come_from_the_reference() -> None:
    reference = Image.new("RGB", (400, 300), (30, 40, 60))
    canvas = ImageDraw.Draw(reference)
    own = [(30, 40, 60), (190, 60, 40), (230, 200, 120), (90, 120, 90), (240, 240, 236)]
    for index, colour in enumerate(own[1:]):
        canvas.rectangle((index * 100, 60, index * 100 + 90, 280), fill=colour)
    found = palette.from_image(reference).colours
    for colour in own:
        apart = min(delta_e(colour, other) for other in found)
        assert apart < 10, (colour, found)
    image = pixels(card.card((800, 600), brief(reference=Image.new("RGB", (4, 4), (9, 9, 9)), style=reference)))
    for colour in found:
        assert (np.abs(image - colour).max(axis=2) <= 2).any()


def delta_e(one: palette.Colour, other: palette.Colour) -> float:
    a, b = (palette.lab(np.array(colour, np.float32) / 255) for colour in (one, other))
    return float(np.sqrt(((a - b) ** 2).sum()))


def test_lab_is_that_of_the_standard() -> None:
    assert palette.lab(np.array([1.0, 0.0, 0.0])) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert palette.lab(np.array([1.0, 1.0, 1.0])) == pytest.approx([100, 0, 0], abs=0.02)


def test_cards_differ_with_prompt_pose_and_light() -> None:
    variants = [
        brief("A lighthouse keeper by the sea"),
        brief("A courier in the city"),
        brief("A lighthouse keeper by the sea", pose="running"),
        brief("A lighthouse keeper by the sea", lighting="neon"),
    ]
    images = [pixels(card.card((512, 512), variant)) for variant in variants]
    for one, other in combinations(images, 2):
        assert (np.abs(one - other).max(axis=2) > 24).mean() > 0.1


def test_the_same_brief_draws_the_same_card() -> None:
    assert np.array_equal(pixels(card.card((256, 256), brief())), pixels(card.card((256, 256), brief())))


@pytest.mark.parametrize("pose", ["standing", "walking", "sitting", "jumping", "lying"])
def test_the_figure_stands_whole_in_its_picture(pose: str) -> None:
    from workers.child.animatic import mannequin

    image = card.mannequin_image(200, mannequin.POSES[pose], palette.from_lighting("neutral"))
    box = image.getchannel("A").getbbox()
    assert box is not None
    assert box[0] > 0
    assert box[1] > 0
    assert box[2] < image.width
    assert box[3] <= image.height


def test_the_demo_ships_three_small_frames() -> None:
    import movieq

    frames = sorted((Path(movieq.__file__).parent / "local/demo").glob("frame*.jpg"))
    assert [path.name for path in frames] == ["frame1.jpg", "frame2.jpg", "frame3.jpg"]
    assert sum(path.stat().st_size for path in frames) < 500_000
