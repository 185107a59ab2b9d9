"""The Lua scripts: how the loader puts them together, and that each names just the includes that it uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from movieq.queue.scripts import LUA, includes, named_includes

FILES = sorted(LUA.rglob("*.lua"))
INCLUDES = {path.stem: path for path in sorted((LUA / "includes").glob("*.lua"))}


def code(path: Path) -> str:
    """The file without comments and texts."""
    return re.sub(r"'(\\.|[^'\\])*'", "''", re.sub(r"--[^\n]*", "", path.read_text()))


def defined(path: Path) -> set[str]:
    """The functions and other locals that an include gives to the files that name it."""
    lists = re.findall(r"^local (?:function )?(\w+(?:, \w+)*)", code(path), re.MULTILINE)
    return {name for each in lists for name in each.split(", ")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LUA)))
def test_a_file_names_just_the_includes_that_it_uses(path: Path) -> None:
    words = set(re.findall(r"(?<![.\w])[A-Za-z_]\w*", code(path)))
    used = {name for name, include in INCLUDES.items() if include != path and defined(include) & words}
    assert set(named_includes(path.read_text())) == used


def test_no_two_includes_define_one_name() -> None:
    names = [name for include in INCLUDES.values() for name in defined(include)]
    assert len(names) == len(set(names))


def test_every_include_opens_with_its_purpose_and_is_used() -> None:
    used = {name for path in FILES for name in named_includes(path.read_text())}
    assert used == INCLUDES.keys()
    assert [path.stem for path in INCLUDES.values() if not path.read_text().startswith("-- ")] == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of scripts."""
    (tmp_path / "includes").mkdir()
    return tmp_path


def write(folder: Path, **files: str) -> Path:
    """Write the script and its includes; return the script."""
    for name, source in files.items():
        path = folder / "includes" / f"{name}.lua" if name != "script" else folder / "script.lua"
        path.write_text(source)
    return folder / "script.lua"


def test_an_include_comes_once_and_after_those_that_it_needs(folder: Path) -> None:
    script = write(
        folder,
        script="-- include: events\n-- include: time record\n",
        events="-- include: record time\n",
        record="-- include: time\n",
        time="",
        unused="",
    )
    assert list(includes(script)) == ["time", "record", "events"]


def test_an_unknown_include_is_an_error_that_names_the_file(folder: Path) -> None:
    script = write(folder, script="-- include: events\n", events="-- include: evnts\n")
    with pytest.raises(ValueError, match=r"^events\.lua: include 'evnts' not found in includes/$"):
        includes(script)


def test_a_circle_of_includes_is_an_error_that_names_the_file(folder: Path) -> None:
    script = write(folder, script="-- include: events\n", events="-- include: record\n", record="-- include: events\n")
    with pytest.raises(ValueError, match=r"^record\.lua: circular includes events -> record -> events$"):
        includes(script)
