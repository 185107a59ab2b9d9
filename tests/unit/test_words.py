"""Words of a table in a text: where they count, and where they do not."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workers.child.words import Words

WORDS = Words({"joy": "happy, joy*", "wind": "wind, breeze", "left": "pan left, left pan", "right": "pan", "glass": "glass"})
LETTERS = st.text("abcdefghijklmnopqrstuvwxyzäéñæя", min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Happy", ["joy"]),
        ("JOYFUL!", ["joy"]),
        ("a light_breeze", ["wind"]),
        ("winds", ["wind"]),
        ("two glasses", ["glass"]),
        ("pan left", ["left"]),
        ("wind, pan left, then pan", ["left", "wind", "right"]),
        ("wind-swept", ["wind"]),
        ("\uff57ind", ["wind"]),
        ("", []),
        (None, []),
    ],
)
def test_words_are_found_as_people_write_them(text: str | None, names: list[str]) -> None:
    assert WORDS.named(text) == names


@given(LETTERS, st.sampled_from(["happy", "wind", "breeze", "pan"]))
@example("un", "happy")
@example("s", "pan")
@settings(max_examples=200)
def test_a_word_inside_another_is_not_found(letters: str, word: str) -> None:
    assert WORDS.named(f"{letters}{word}") == []
    if letters != "s":
        assert WORDS.named(f"{word}{letters}") == []


@pytest.mark.parametrize(
    "text",
    [
        "not {}",
        "no {}",
        "never {}",
        "not too {}",
        "not very {} at all",
        "isn't {}",
        "isn\u2019t really {}",
        "without any {}",
        "neither {}",
        "no more {}",
        "nor {}",
        "no heavy {}",
        "un-{}",
        "non-{}",
        "anything but {}",
        "far from {}",
        "{}-free",
        "{}less",
        "no longer {}",
        "hardly {}",
        "not sad or {}",
        "NOT {}",
        "the keeper is not {}, he sleeps",
    ],
)
@pytest.mark.parametrize("word", ["happy", "wind"])
def test_a_negated_word_is_not_found(text: str, word: str) -> None:
    assert WORDS.named(text.format(word)) == []


@pytest.mark.parametrize(
    "text",
    [
        "not sad but {}",
        "not only {}",
        "no rain, {}",
        "never mind. {}",
        "not sad; {}",
        "he does not hear the sea, and is {}",
        "a {} notary",
        "{}, not sad",
        "nothing {}",
        "the knot: {}",
        "note the {}",
    ],
)
@pytest.mark.parametrize("word", ["happy", "wind"])
def test_a_negation_ends_with_its_clause(text: str, word: str) -> None:
    assert len(WORDS.named(text.format(word))) == 1


def test_a_stem_has_any_ending_but_less() -> None:
    assert WORDS.named("joyous") == WORDS.named("joy") == ["joy"]
    assert WORDS.named("joyless") == WORDS.named("joylessly") == []


def test_the_order_of_the_table_or_of_the_text_can_be_asked_for() -> None:
    assert WORDS.first("a breeze, pan left, happy") == "joy"
    assert WORDS.first("calm") is None
    assert WORDS.counted("wind, joy, wind") == {"wind": 2, "joy": 1}
    assert list(WORDS.counted("a breeze for the happy")) == ["wind", "joy"]
