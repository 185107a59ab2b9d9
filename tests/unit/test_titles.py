"""Type on a picture: where it stands, and that it can be read."""

from __future__ import annotations

import time
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from workers.child.animatic import captions, palette, typography
from workers.child.animatic.typography import Style, Weight
from workers.child.media import encode
from workers.child.media.encode import Format

SIZES = [(1920, 1080), (1080, 1920), (640, 360), (1000, 1000)]
RATE = Fraction(24)
TEXT = "The keeper climbs the stair in the storm, counting aloud. At the top he strikes a match, and his hands are still."


def ground(size: tuple[int, int], grey: int) -> encode.Planes:
    return encode.planes(Image.new("RGB", size, (grey, grey, grey)))


def rgb(frame: encode.Planes) -> npt.NDArray[np.int16]:
    return np.asarray(encode.picture(frame), np.int16)


@pytest.mark.parametrize("size", SIZES)
def test_captions_and_lower_thirds_stay_inside_the_title_safe_area(size: tuple[int, int]) -> None:
    people: list[str | dict[str, object]] = [
        "Ismael: left, at the glass",
        {"name": "A very long name indeed, of an old house", "position": "right"},
        "Zoë, centre",
    ]
    for title in [*captions.captions(TEXT, Format(size, RATE, 168)), *captions.lower_thirds(people, Format(size, RATE, 168))]:
        left, top = title.overlay.x, title.overlay.y
        right, bottom = left + title.overlay.mask.width, top + title.overlay.mask.height
        margin_x, margin_y = size[0] * captions.SAFE - 2, size[1] * captions.SAFE - 2
        assert left >= margin_x
        assert top >= margin_y
        assert right <= size[0] - margin_x
        assert bottom <= size[1] - margin_y


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_captions_can_be_read_on_any_picture(grey: int) -> None:
    frame = ground((1280, 720), grey)
    title = captions.captions(TEXT, Format((1280, 720), RATE, 168))[0]
    captions.lay(frame, title.overlay)
    x, y = title.overlay.x, title.overlay.y
    part = rgb(frame)[y : y + title.overlay.mask.height, x : x + title.overlay.mask.width]
    pixels = [tuple(int(v) for v in pixel) for pixel in part.reshape(-1, 3)]
    letters = max(pixels, key=lambda pixel: sum(pixel))
    middle = part[4, part.shape[1] // 2]
    scrim = (int(middle[0]), int(middle[1]), int(middle[2]))
    assert palette.contrast((letters[0], letters[1], letters[2]), scrim) >= 4.5


def test_captions_are_shown_one_after_another_until_the_end() -> None:
    pages = captions.captions(TEXT, Format((1280, 720), RATE, 168))
    assert len(pages) >= 2
    assert pages[0].first == 0
    assert pages[-1].end == 168
    assert all(a.end == b.first for a, b in pairwise(pages))


def test_captions_turn_with_the_picture_where_it_is_near() -> None:
    assert 80 in {page.first for page in captions.captions(TEXT, Format((1280, 720), RATE, 168), cuts=[80])}


def test_more_text_than_time_ends_in_an_ellipsis() -> None:
    style = Style(Weight.MEDIUM, 45)
    (page,) = captions._pages("word " * 400, style, 1000, 2, 1)
    assert page[-1].endswith("…")
    assert len(page) == 2


def test_wrapped_lines_fit_and_lose_nothing() -> None:
    style = Style(Weight.REGULAR, 30)
    text = "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen und noch ein Wort"
    lines = typography.wrap(text, style, 300)
    assert all(typography.width(line, style) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_text_without_spaces_is_wrapped_as_fast_as_any_other() -> None:
    style = Style(Weight.REGULAR, 30)
    for text in ("灯台守は嵐の夜に塔を登る。" * 600, "x" * 8000, "é" * 8000):
        began_s = time.monotonic()
        lines = typography.wrap(text, style, 700)
        assert time.monotonic() - began_s < 10  # it took minutes when each piece measured all that was left
        assert "".join(lines) == text


def test_balanced_lines_are_of_even_length() -> None:
    style = Style(Weight.REGULAR, 30)
    lines = typography.balance("The keeper climbs the stair in the storm and counts it aloud", style, 700)
    widths = [typography.width(line, style) for line in lines]
    assert len(lines) == 2
    assert min(widths) > 0.75 * max(widths)


@pytest.mark.parametrize(
    "text",
    [
        "Crème brûlée, Łódź, Ærø, Þórr, İstanbul, Nguyễn",
        "Дочь смотрителя — Київ, Ђорђе",
        "Ζωή και φως, ᾠδή",
        "\u201cQuotes\u201d \u2013 \u2018dashes\u2019 \u2014 \u2026 € £ № ½ ©",
    ],
)
def test_accents_cyrillic_and_greek_are_drawn(text: str) -> None:
    assert typography.missing(text) == ""


def test_a_letter_that_no_font_has_is_found_out() -> None:
    assert typography.missing("a\U000f1234b") == "\U000f1234"


def test_letters_that_roboto_lacks_come_from_another_font() -> None:
    if typography.missing("אור"):
        pytest.skip("fontconfig knows no font with Hebrew here")
    image = Image.new("L", (200, 60))
    typography.draw(ImageDraw.Draw(image), 5, 45, "אור", Style(Weight.REGULAR, 40), (255,))
    assert np.asarray(image).max() == 255


@pytest.mark.parametrize("size", [*SIZES, (64, 64), (64, 640), (640, 64)])
def test_the_slate_says_animatic_at_every_size(size: tuple[int, int]) -> None:
    frame = ground(size, 128)
    captions.Slate(Format(size, RATE, 100), "project", "12", 3).lay(frame, 0, 0)
    strip = rgb(frame)[: max(8, round(min(size) * 0.042))]
    amber = (strip[..., 0] > strip[..., 2] + 50).mean()
    assert amber > 0.004
    assert np.abs(rgb(frame)[-4:] - 128).max() <= 3


def test_lower_thirds_read_strings_and_objects() -> None:
    assert captions._person("Mara: left, at the rail") == ("Mara", "left, at the rail")
    assert captions._person("Mara") == ("Mara", "")
    assert captions._person({"name": "Mara", "position": "left", "depth": 2}) == ("Mara", "left, depth 2")
    assert captions._person({"x": 0.5}) == ("", "x 0.5")
