"""The documents for people, and their blocks of code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

import movieq

ROOT: Final = Path(movieq.__file__).parents[1]
GUIDES: Final = (ROOT / "README.md", *sorted((ROOT / "movieq" / "web" / "docs").glob("*.md")))
"""The README and the guides: the pages for users."""
DOCUMENTS: Final = (
    *GUIDES,
    *(ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CHANGELOG", "CONTRIBUTING", "GLOSSARY", "SECURITY")),
    ROOT / "deploy/payload/README.md",
    ROOT / "tests/bench/README.md",
)
"""All pages for users and developers."""

_BLOCK: Final = re.compile(r"(?:^<!-- (\w+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code. `schema` is the schema that a JSON block must fit, as a comment before it says; empty if there is none."""

    language: str
    text: str
    schema: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of code of a page, in order."""
    return [Block(language, text, schema) for schema, language, text in _BLOCK.findall(page.read_text())]


def guide(name: str) -> Path:
    """Return the path of a guide."""
    return ROOT / "movieq" / "web" / "docs" / f"{name}.md"
