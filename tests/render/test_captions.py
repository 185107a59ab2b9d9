"""Captions, lower thirds and slate: where they stand, when they are shown, and that they can be read."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from workers.child.animatic import captions, palette
from workers.child.animatic.typography import Style, Weight
from workers.child.media import encode
from workers.child.media.encode import ClipFormat

SIZES = [(1920, 1080), (1080, 1920), (640, 360), (1000, 1000)]
RATE = Fraction(24)
TEXT = "The keeper climbs the stair in the storm, counting aloud. At the top he strikes a match, and his hands are still."


def ground(size: tuple[int, int], grey: int) -> encode.Planes:
    return encode.to_planes(Image.new("RGB", size, (grey, grey, grey)))


def rgb(frame: encode.Planes) -> npt.NDArray[np.int16]:
    return np.asarray(encode.to_image(frame), np.int16)


@pytest.mark.parametrize("size", SIZES)
def test_captions_and_lower_thirds_stay_inside_the_title_safe_area(size: tuple[int, int]) -> None:
    people: list[str | dict[str, object]] = [
        "Ismael: left, at the glass",
        {"name": "A very long name indeed, of an old house", "position": "right"},
        "Zoë, centre",
    ]
    clip = ClipFormat(size, RATE, 168)
    for timed in [*captions.description_overlays(TEXT, clip), *captions.lower_thirds(people, clip)]:
        left, top = timed.overlay.x, timed.overlay.y
        right, bottom = left + timed.overlay.mask.width, top + timed.overlay.mask.height
        margin_x, margin_y = size[0] * captions.TITLE_SAFE - 2, size[1] * captions.TITLE_SAFE - 2
        assert left >= margin_x
        assert top >= margin_y
        assert right <= size[0] - margin_x
        assert bottom <= size[1] - margin_y


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_captions_can_be_read_on_any_picture(grey: int) -> None:
    frame = ground((1280, 720), grey)
    timed = captions.description_overlays(TEXT, ClipFormat((1280, 720), RATE, 168))[0]
    captions.composite(frame, timed.overlay)
    x, y = timed.overlay.x, timed.overlay.y
    part = rgb(frame)[y : y + timed.overlay.mask.height, x : x + timed.overlay.mask.width]
    pixels = [tuple(int(v) for v in pixel) for pixel in part.reshape(-1, 3)]
    letters = max(pixels, key=lambda pixel: sum(pixel))
    middle = part[4, part.shape[1] // 2]
    scrim = (int(middle[0]), int(middle[1]), int(middle[2]))
    assert palette.contrast((letters[0], letters[1], letters[2]), scrim) >= 4.5


def test_captions_are_shown_one_after_another_until_the_end() -> None:
    pages = captions.description_overlays(TEXT, ClipFormat((1280, 720), RATE, 168))
    assert len(pages) >= 2
    assert pages[0].first == 0
    assert pages[-1].end == 168
    assert all(a.end == b.first for a, b in pairwise(pages))


def test_captions_turn_with_the_picture_where_it_is_near() -> None:
    assert 80 in {page.first for page in captions.description_overlays(TEXT, ClipFormat((1280, 720), RATE, 168), cuts=[80])}


def test_more_text_than_time_ends_in_an_ellipsis() -> None:
    style = Style(Weight.MEDIUM, 45)
    (page,) = captions.paginate("word " * 400, style, 1000, 2, 1)
    assert page[-1].endswith("…")
    assert len(page) == 2


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('"Stop!" He runs.', ['"Stop!"', "He runs."]),
        ("\u201cStop!\u201d He runs.", ["\u201cStop!\u201d", "He runs."]),
        ("\u201eHalt!\u201c Er rennt.", ["\u201eHalt!\u201c", "Er rennt."]),
        ("(He stops.) He runs.", ["(He stops.)", "He runs."]),
        ('"Stop!" he says.', ['"Stop!" he says.']),
        ("Mr. Smith waits.", ["Mr. Smith waits."]),
        ("Dr. Lee and Mrs. J. R. Smith wait. He runs.", ["Dr. Lee and Mrs. J. R. Smith wait.", "He runs."]),
        ("It is 5 p.m. sharp. They wait at St. Mary's.", ["It is 5 p.m. sharp.", "They wait at St. Mary's."]),
        ("He served in the U.S. Navy. It ends.", ["He served in the U.S. Navy.", "It ends."]),
        ("INT. LIGHTHOUSE - NIGHT. He climbs.", ["INT. LIGHTHOUSE - NIGHT.", "He climbs."]),
        ("Door No. 7 opens, see fig. 3. No. He waits.", ["Door No. 7 opens, see fig. 3.", "No.", "He waits."]),
        ("So am I. He left.", ["So am I.", "He left."]),
        ("Wait... what? Now!", ["Wait... what?", "Now!"]),
        ("Wait\u2026 He runs.", ["Wait\u2026", "He runs."]),
        ("It costs 3.5 dollars. What?! Yes.", ["It costs 3.5 dollars.", "What?!", "Yes."]),
        ("هل أنت هناك؟ نعم.", ["هل أنت هناك؟", "نعم."]),
        ("灯台守は塔を登る。嵐だ\uff01", ["灯台守は塔を登る。", "嵐だ\uff01"]),
        ("「止まれ\uff01」と彼は言う。", ["「止まれ\uff01」と彼は言う。"]),
        ("no end", ["no end"]),
        ("", [""]),
    ],
)
def test_a_sentence_ends_after_its_closing_quote_and_not_after_an_abbreviation(text: str, sentences: list[str]) -> None:
    assert captions.sentences(text) == sentences


@given(st.text(st.sampled_from("ab A.!?\"')\u201d\u2026 Mr.。」"), max_size=60))
@settings(max_examples=200)
def test_sentences_lose_nothing(text: str) -> None:
    plain = " ".join(text.split())
    assert "".join(captions.sentences(plain)).replace(" ", "") == plain.replace(" ", "")


def test_each_sentence_has_a_page_of_its_own_where_there_is_time() -> None:
    style = Style(Weight.MEDIUM, 45)
    assert captions.paginate('"Stop!" He runs.', style, 1000, 2, 9) == [['"Stop!"'], ["He runs."]]
    assert captions.paginate("Mr. Smith waits.", style, 1000, 2, 9) == [["Mr. Smith waits."]]


def test_lines_of_scripts_without_spaces_are_not_joined_with_spaces() -> None:
    pages = captions.paginate("塔を登る。" * 16, Style(Weight.MEDIUM, 45), 500, 2, 2)
    assert len(pages) == 2
    assert " " not in "".join(line for page in pages for line in page)


@pytest.mark.parametrize(
    ("rate", "number", "time"),
    [
        (Fraction(25, 2), 300, "00:24:00"),
        (Fraction(25, 2), 301, "00:24:01"),
        (Fraction(25, 2), 12, "00:00:12"),
        (Fraction(25, 2), 13, "00:01:00"),
        (Fraction(24), 24 * 61 + 5, "01:01:05"),
        (Fraction(24000, 1001), 24, "00:01:00"),
        (Fraction(30000, 1001), 720, "00:24:00"),
        (Fraction(3, 2), 3, "00:02:00"),
    ],
)
def test_the_slate_counts_real_seconds_at_any_rate(rate: Fraction, number: int, time: str) -> None:
    assert captions.timecode(number, rate) == time


@given(st.fractions(1, 60, max_denominator=1001), st.integers(0, 2000))
@settings(max_examples=200)
def test_a_timecode_is_the_second_of_the_frame_and_the_frame_within_it(rate: Fraction, number: int) -> None:
    minutes, seconds, frame = map(int, captions.timecode(number, rate).split(":"))
    whole = 60 * minutes + seconds
    assert whole <= number / rate < whole + 1
    assert frame == len([each for each in range(max(0, number - 70), number) if each >= whole * rate])


@pytest.mark.parametrize("size", [*SIZES, (64, 64), (64, 640), (640, 64)])
def test_the_slate_says_animatic_at_every_size(size: tuple[int, int]) -> None:
    frame = ground(size, 128)
    captions.Slate(ClipFormat(size, RATE, 100), "project", "12", 3).draw(frame, 0, 0)
    strip = rgb(frame)[: max(8, round(min(size) * 0.042))]
    amber = (strip[..., 0] > strip[..., 2] + 50).mean()
    assert amber > 0.004
    assert np.abs(rgb(frame)[-4:] - 128).max() <= 3


def test_lower_thirds_read_strings_and_objects() -> None:
    assert captions.name_and_position("Mara: left, at the rail") == ("Mara", "left, at the rail")
    assert captions.name_and_position("Mara") == ("Mara", "")
    assert captions.name_and_position({"name": "Mara", "position": "left", "depth": 2}) == ("Mara", "left, depth 2")
    assert captions.name_and_position({"x": 0.5}) == ("", "x 0.5")
