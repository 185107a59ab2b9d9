"""What tests share is replaced after a failed test: a failure takes no other test with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

opened = []

@pytest.fixture(scope="module")
def below():
    opened.append("below")
    yield len(opened)
    opened.append("below closed")

@pytest.fixture(scope="module")
def shared(below):
    opened.append("shared")
    yield opened
    opened.append("shared closed")

@pytest.fixture(scope="module")
def breaks_once():
    opened.append("tried")
    if opened.count("tried") == 1:
        raise RuntimeError("it does not start")
    yield

def test_one(shared):
    pass

def test_that_fails(shared):
    raise AssertionError

def test_that_follows(shared):
    assert opened == ["below", "shared", "shared closed", "below closed", "below", "shared"]

def test_that_cannot_start(breaks_once):
    pass

def test_that_starts(breaks_once):
    pass

def test_that_is_not_concerned(shared):
    assert opened.count("shared") == 2
"""


def test_the_test_after_a_failed_one_gets_new_processes(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(TESTS)
    options = ["-p", "tests.conftest", "-p", "no:randomly", "-p", "no:cacheprovider", "-c", os.devnull, "-rfE", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_sample.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert failed == [["FAILED", "test_sample.py::test_that_fails"], ["ERROR", "test_sample.py::test_that_cannot_start"]], done.stdout
