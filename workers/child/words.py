"""Finding the words of a table in a text as people write it.

A word counts where it stands alone: `window` is not wind, and `unhappy` is not happy. A word that is negated does not count: "not happy",
"without any wind", "rain-free". What is left out: irony, and negations of whole sentences ("it is not true that he is happy").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Final

REACH: Final = 100
"""How far before a word a negation is looked for, in characters."""

_NEGATIONS: Final = frozenset(
    "no not never without nor neither none hardly barely scarcely cannot avoid avoiding lacking less minus "
    "arent cant couldnt didnt doesnt dont hasnt havent isnt shouldnt wasnt werent wont wouldnt".split()
)
_BETWEEN: Final = frozenset(
    "a an all and any anything at be been being bit by even ever exactly from in is it like longer more much of one or particularly quite "
    "really so some sound sounds such terribly that the their this to too very with you your his her".split()
)
"""Words that may stand between a negation and what it negates, any number of them, and beside them one word of any kind."""
_CLAUSE_END: Final = re.compile(r"[.,;:!?()\n\u2026\u2013\u2014]|\b(?:although|but|instead|just|only|rather|then|though|until|while|yet)\b")
_PHRASES: Final = re.compile(r"\b(?:anything but|far from|free of|free from)\s+(?:\w+\s+){0,2}$")


class Words:
    """A table of names and, separated by commas, the words that stand for each.

    A word also counts with the ending of a plural; one that is written with a star (`excit*`) counts with any ending but -less.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        words = [(word, name) for name, words in table.items() for word in words.split(", ")]
        self._names = tuple(table)
        self._patterns = [(_pattern(word), name) for word, name in sorted(words, key=lambda each: -len(each[0]))]

    def named(self, text: str | None) -> list[str]:
        """Return the names that the text names, those with the longest words first."""
        return list(dict.fromkeys(name for _, name in self._found(text)))

    def first(self, text: str | None) -> str | None:
        """Return the first name of the table that the text names, or None."""
        named = self.named(text)
        return next((name for name in self._names if name in named), None)

    def counted(self, text: str | None) -> dict[str, int]:
        """Return how often the text names each name that it names, in the order of the text."""
        counts: dict[str, int] = {}
        for _, name in sorted(self._found(text)):
            counts[name] = counts.get(name, 0) + 1
        return counts

    def _found(self, text: str | None) -> Iterator[tuple[int, str]]:
        """Yield where the text names a name, the longest words first: "pan left" is not also a pan."""
        plain = unicodedata.normalize("NFKC", text or "").lower().replace("\u2019", "'").replace("_", " ")
        taken: list[tuple[int, int]] = []
        for pattern, name in self._patterns:
            for match in pattern.finditer(plain):
                start, end = match.span()
                if any(a <= start and end <= b and (a, b) != (start, end) for a, b in taken):
                    continue
                taken.append((start, end))
                if not _negated(plain, start):
                    yield start, name


def _pattern(word: str) -> re.Pattern[str]:
    stem = word.removesuffix("*")
    plural = "(?:es)?" if stem.endswith(("s", "x", "z", "ch", "sh")) else "s?"
    ending = r"(?!less)\w*" if word != stem else plural
    return re.compile(rf"(?<!\w)(?<!\bun-)(?<!\bnon-)(?<!\banti-){re.escape(stem)}{ending}(?!\w)(?!-(?:free|less)\b)")


def _negated(text: str, start: int) -> bool:
    """Whether a negation before the word at `start` reaches it."""
    before = text[max(0, start - REACH) : start]
    if _PHRASES.search(before):
        return True
    others = 0
    for word in reversed(re.findall(r"[\w']+", _CLAUSE_END.split(before)[-1])):
        if word in _NEGATIONS or word.endswith("n't"):
            return True
        others += word not in _BETWEEN
        if others > 1:
            return False
    return False
