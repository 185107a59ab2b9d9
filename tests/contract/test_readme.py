"""The walk-through of the README, run as it is written: every command succeeds, and its answer has the shape that stands below it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import movieq
from tests.service import service

README = Path(movieq.__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "--- end of block ---"
OF_THE_HEARTBEAT = (".status", ".current_task_id", ".idle_gap", ".models")
"""Of a worker's row: how it was at its last heartbeat, before its engine was there or while a task still ran, perhaps."""


def walkthrough() -> list[tuple[str, str]]:
    """Each command block of the walk-through, and the answer that stands below it, or nothing."""
    section = README.read_text().partition("## One request, from POST to file")[2].partition("\n## ")[0]
    blocks = BLOCK.findall(section)
    found: list[tuple[str, str]] = []
    for language, text in blocks:
        if language == "sh":
            found.append((text, ""))
        elif language != "js":  # that is run by tests/browser
            found[-1] = (found[-1][0], text)
    return found


def answers(folder: Path, url: str, key: str) -> list[str]:
    """What each block prints, run one after the other in one shell; `URL` and `KEY` are those of the service at hand."""
    commands = [text for text, _ in walkthrough()]
    assert commands[0].startswith("URL=")
    commands[0] = f"URL={url}\nKEY={key}\n"
    script = "set -eu\n" + "".join(f"{text}\necho; echo '{MARK}'\n" for text in commands)
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [part.strip() for part in done.stdout.split(f"{MARK}\n")[:-1]]


def same_shape(shown: Any, real: Any, where: str) -> None:
    """The same keys and types everywhere; texts without digits (states, messages, names) are equal."""
    if ".workers[" in where and where.endswith(OF_THE_HEARTBEAT):
        return
    assert type(shown) is type(real) or {type(shown), type(real)} <= {int, float}, f"{where}: {real!r}, the README shows {shown!r}"
    if isinstance(shown, dict):
        assert shown.keys() == real.keys(), f"{where}: {sorted(shown.keys() ^ real.keys())}"
        for key in shown:
            same_shape(shown[key], real[key], f"{where}.{key}")
    elif isinstance(shown, list):
        for number, (left, right) in enumerate(zip(shown, real, strict=True)):
            same_shape(left, right, f"{where}[{number}]")
    elif isinstance(shown, str) and not re.search(r"\d", shown + real) and not where.endswith(".host"):
        assert shown == real, where


def test_the_walk_through_of_the_readme_runs_as_written_and_answers_as_shown(tmp_path: Path) -> None:
    with service(tmp_path) as up:
        real = answers(tmp_path, up.url, up.key)
    assert (tmp_path / "clip.mp4").stat().st_size > 10_000
    shown = [answer for _, answer in walkthrough()]
    assert sum(bool(answer) for answer in shown) == 8
    for number, (expected, answer) in enumerate(zip(shown, real, strict=True)):
        if expected.startswith("{"):
            same_shape(json.loads(expected), json.loads(answer), f"answer {number}")
        elif expected:
            assert expected.strip() == answer
