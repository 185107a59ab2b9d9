"""Runs for the engine process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.protocol import Run


@pytest.fixture
def order(tmp_path: Path) -> Any:
    """Return a function that returns runs, each with a folder of its own."""
    count = 0

    def order(
        task_type: str = "generate_image", engine: str = "animatic", inputs: dict[str, str] | None = None, seed: int = 1, **params: Any
    ) -> Run:
        nonlocal count
        count += 1
        out_dir = tmp_path / f"out{count}"
        out_dir.mkdir()
        run = f"run-{tmp_path.name}-{count}"
        return Run(run, "task", "project", task_type, engine, engine, params, {}, inputs or {}, seed, str(out_dir))

    return order
