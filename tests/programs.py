"""Programs and npm packages that not all machines have. Where one is missing, a test that needs it is skipped, or fails in CI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def program(name: str, package: str) -> str:
    """Return the path of a program on this machine."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin")
    return found or missing(f"{name} (apt-get install {package})")


def node(folder: Path) -> str:
    """Return the path of Node, for a test that uses the npm packages of this folder."""
    found = program("node", "nodejs npm")
    if not (folder / "node_modules").exists():
        missing("npm packages (install Node 20 or newer with npm, then run make test)")
    return found


def missing(what: str) -> NoReturn:
    """Skip the test because this machine lacks something; fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"needs {what}")
    pytest.skip(f"needs {what}")
