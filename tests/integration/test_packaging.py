"""The packages of a release: what they contain, and that they work without the source tree and this environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Final

import pytest

from movieq import __version__

ROOT: Final = Path(__file__).parents[2]
ENVIRONMENT: Final = {name: value for name, value in os.environ.items() if not name.startswith(("MOVIEQ_", "PYTHON"))}


def run(*command: str | Path, cwd: Path, timeout_s: float = 300) -> str:
    """Run a command that must succeed; return both its outputs."""
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(kind: str, source: Path, to: Path) -> Path:
    """Build a package of the source as pip does, with every warning an error; return it."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]), file=sys.stderr)"
    run(sys.executable, "-W", "error", "-c", code, to, cwd=source)
    (built,) = to.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the sdist of a clean copy of the source tree, and the wheel built from that sdist."""
    source, to = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("movieq", "workers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    sdist = build("sdist", source, to)
    with tarfile.open(sdist) as archive:
        archive.extractall(to, filter="data")
    return sdist, build("wheel", to / f"movieq-{__version__}", to)


def ours(names: list[str]) -> set[str]:
    """Return the names that belong to our packages."""
    return {name for name in names if name.startswith(("movieq/", "workers/"))}


def test_every_file_of_the_packages_ships_and_nothing_else(packages: tuple[Path, Path]) -> None:
    sdist, wheel = packages
    files = {
        str(path.relative_to(ROOT))
        for folder in ("movieq", "workers")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with tarfile.open(sdist) as archive:
        assert ours([each.name.partition("/")[2] for each in archive if each.isfile()]) == files
    with zipfile.ZipFile(wheel) as zipped:
        assert ours(zipped.namelist()) == files
        assert {name.split("/")[0] for name in zipped.namelist()} == {"movieq", "workers", f"movieq-{__version__}.dist-info"}


def test_the_wheel_says_what_it_is(packages: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(packages[1]) as zipped:
        metadata = zipped.read(f"movieq-{__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    for line in ("Project-URL: Changelog, https://", "Classifier: Typing :: Typed", "License-Expression: MIT", "License-File: LICENSE"):
        assert f"\n{line}" in metadata
    for minor in (11, 12, 13):
        assert f"\nClassifier: Programming Language :: Python :: 3.{minor}\n" in metadata


@pytest.mark.timeout(600)  # it installs all that the wheel asks for
def test_the_wheel_makes_the_demo_in_an_environment_of_its_own(packages: tuple[Path, Path], folder: Path) -> None:
    """With what its metadata asks for, from the package index: what only the test environment has is not there."""
    place, elsewhere = folder / "venv", folder / "elsewhere"
    elsewhere.mkdir()
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--quiet",
        "--constraint",
        ROOT / "constraints.txt",
    ]
    assert run(*pip, f"{packages[1]}[speech]", cwd=elsewhere) == ""
    where = run(python, "-c", "import movieq, workers; print(movieq.__file__, workers.__file__)", cwd=elsewhere)
    assert where.count(str(place)) == 2
    said = run(place / "bin" / "movieq", "demo", cwd=elsewhere)
    assert len(re.findall("100%  completed", said)) == 3, said
    rendered = {path.name for path in (elsewhere / "demo-out").iterdir()}
    assert rendered == {"clip.mp4", "contact-sheet.png", "picture.jpg", "voice.mp3"}
    assert "Traceback" not in run(place / "bin" / "movieq", "models", "list", cwd=elsewhere)
