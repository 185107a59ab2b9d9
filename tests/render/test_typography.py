"""Typography: wrapping, balancing and choosing fonts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from workers.child.animatic import typography
from workers.child.animatic.typography import Style, Weight


def test_wrapped_lines_fit_and_lose_nothing() -> None:
    style = Style(Weight.REGULAR, 30)
    text = "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen und noch ein Wort"
    lines = typography.wrap(text, style, 300)
    assert all(typography.width(line, style) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("text", ["灯台守は嵐の夜に塔を登る。" * 600, "x" * 8000, "é" * 8000])
def test_wrapping_a_text_without_spaces_measures_each_letter_a_few_times(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = 0
    width = typography.width

    def counted(text: str, style: Style) -> float:
        nonlocal measured
        measured += len(text)
        return width(text, style)

    monkeypatch.setattr(typography, "width", counted)
    assert "".join(typography.wrap(text, Style(Weight.REGULAR, 30), 700)) == text
    assert measured < 20 * len(text), "not once more for each letter that follows it"


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
    assert typography.missing_glyphs(text) == ""


def test_a_letter_that_no_font_has_is_found_out() -> None:
    assert typography.missing_glyphs("a\U000f1234b") == "\U000f1234"


def test_letters_that_roboto_lacks_come_from_another_font() -> None:
    if typography.missing_glyphs("אור"):
        pytest.skip("fontconfig knows no font with Hebrew here")
    image = Image.new("L", (200, 60))
    typography.draw(ImageDraw.Draw(image), 5, 45, "אור", Style(Weight.REGULAR, 40), (255,))
    assert np.asarray(image).max() == 255
