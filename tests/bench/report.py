"""How benches print: a table for people, and as the last line one JSON object."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def machine() -> dict[str, str | int]:
    """Where and what was measured."""
    root = Path(__file__).parents[2]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "commit": commit,
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(name: str, rows: Mapping[str, float | int | str], details: Mapping[str, Any] | None = None) -> None:
    """Prints the table and the object; `details` are in the object alone."""
    print(f"\n{name}")
    for label, value in rows.items():
        print(f"  {label:<42} {value:>14,.3f}" if isinstance(value, float) else f"  {label:<42} {value:>14}")
    print(json.dumps({"bench": name, **rows, **(details or {}), **machine()}))
