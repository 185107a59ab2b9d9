"""A line of log never ends what it tells of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOGS = """
from movieq import logs
from movieq.settings import LogFormat, LogLevel
logs.configure(LogLevel.INFO, LogFormat.{format})
for value in ("plain", "half a character: \\ud800", 2**70, object(), b"\\xff"):
    logs.get().info("an_event", value=value)
print("well")
"""


@pytest.mark.parametrize("log_format", ["JSON", "CONSOLE"])
@pytest.mark.parametrize("place", ["/dev/full", os.devnull])
def test_what_cannot_be_written_is_lost_and_nothing_else(log_format: str, place: str) -> None:
    with Path(place).open("w") as stderr:
        told = subprocess.run(
            [sys.executable, "-c", LOGS.replace("{format}", log_format)], stdout=subprocess.PIPE, stderr=stderr, text=True, check=False
        )
    assert told.stdout == "well\n"
