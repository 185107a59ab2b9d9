"""Environments of the benches' peers: each with just the packages that its bench names, under .cache/bench."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".cache" / "bench"


def python(name: str) -> str:
    """The interpreter of an environment."""
    return str(ENVIRONMENTS / name / "bin" / "python")


def make(name: str, packages: tuple[str, ...]) -> None:
    """The environment is there, and has these packages."""
    folder = ENVIRONMENTS / name
    stamp = folder / "packages"
    if stamp.exists() and stamp.read_text().split() == list(packages):
        return
    print(f"making {folder.relative_to(ROOT)}: {' '.join(packages)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python(name), "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", *packages], check=True)
    stamp.write_text(" ".join(packages))
