"""The messages between a worker and its child, byte for byte as tests/unit/golden/messages.json has them.

Run as a program it writes that file anew:  python -P tests/unit/test_messages.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from movieq.models.table import ANIMATIC
from movieq.tasks.entities import ModelSwaps
from workers import protocol
from workers.protocol import (
    Batch,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Free,
    FromChild,
    Note,
    Plan,
    Preview,
    Produced,
    Ready,
    Rows,
    Run,
    Stage,
    Step,
    ToChild,
    Watched,
)

GOLDEN = Path(__file__).with_name("golden") / "messages.json"
CHANGED = (
    "The message {name} has changed. Workers and children of one version alone exchange messages, but a worker also reads the `done` of "
    "finished files that an earlier version saved, and plug-ins build `stage` and `produced`: add a field with a default, never rename "
    "or remove one. If the change is meant, write the file anew with `python -P tests/unit/test_messages.py` and commit it."
)

RUN = Run(
    run="run-1",
    task_id="0190a1b2",
    project_id="film",
    task_type="generate_image",
    engine=ANIMATIC,
    model=ANIMATIC,
    params={"prompt": "Ein Leuchtturm, größer als zuvor", "width": 64, "guidance": 7.5, "captions": None},
    metadata={"scene": ["a", 1, True]},
    inputs={"upload:1": "/spool/input0"},
    seed=2**32 - 1,
    out_dir="/spool/out",
)
OUTPUT = Produced("/spool/out/output.mp4", "output", "video/mp4", 1280, 720, 1.5)
POSTER = Produced("/spool/out/poster.jpg", "poster", "image/jpeg")
MESSAGES: dict[str, ToChild | FromChild] = {
    "run": RUN,
    "batch": Batch((RUN, RUN)),
    "cancel": Cancel("run-1"),
    "watched": Watched("run-1", True),
    "ready": Ready(4242, "cuda:0", "NVIDIA H200", ("flux",)),
    "plan": Plan("run-1", (Stage("load", "loading_models", 1.0), Stage("denoise", "generating_video", 8.5))),
    "step": Step("run-1", "denoise", 3, 40),
    "note": Note("run-1", "no room on the device: the text encoder runs on the CPU"),
    "free": Free("run-1", 12.25, 0.5),
    "rows": Rows("run-1", 4),
    "preview": Preview("run-1", b"\xff\xd8\xff\xd9"),
    "done": Done("run-1", (OUTPUT, POSTER), {"seed": 7}, ("flux",), ("wan",), ModelSwaps()),
    "failed": Failed("run-1", "invalid_input", "references[0] is no picture", "Traceback", broken=True, problem="its GPU does not work"),
    "cancelled": Cancelled("run-1"),
}


def encoded(message: ToChild | FromChild) -> dict[str, Any]:
    """Return the message as the file has it: its fields to read, and its bytes."""
    return {"fields": msgspec.json.decode(msgspec.json.encode(message)), "bytes": protocol.encoded(message).hex()}


def test_every_message_has_a_golden_form() -> None:
    sent = {cls.__struct_config__.tag for cls in (*get_args(ToChild), *get_args(FromChild))}
    assert sent == set(MESSAGES) == set(json.loads(GOLDEN.read_text()))


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_goes_over_the_pipe_as_it_always_did(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    assert encoded(MESSAGES[name]) == golden, CHANGED.format(name=name)


@pytest.mark.parametrize("name", MESSAGES)
def test_the_golden_bytes_are_read_as_the_message(name: str) -> None:
    body = bytes.fromhex(json.loads(GOLDEN.read_text())[name]["bytes"])
    decoder = protocol.to_child_decoder if isinstance(MESSAGES[name], ToChild) else protocol.from_child_decoder
    assert decoder.decode(body) == MESSAGES[name], CHANGED.format(name=name)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: encoded(message) for name, message in MESSAGES.items()}, indent=1, ensure_ascii=False) + "\n")
