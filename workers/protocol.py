"""The messages between a worker and its child, over two pipes.

A frame is a big-endian uint32 length and that many bytes of msgpack: one of the Structs below, told apart by their tag. The child sends
`Ready` once; then, for each `Run`, one `Plan`, any number of `Step`s, `Note`s and `Preview`s, and exactly one of `Done`, `Failed` and
`Cancelled`. `Free` comes before that if the next run may start while the rest of this one is done on the CPU.
End of file on its input ends the child at once; end of file on its output means that the child is dead.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

import msgspec

from movieq.models.table import Model
from movieq.tasks.entities import ModelSwaps

MAX_FRAME_BYTES = 64 * 1024 * 1024
EXIT_UNFIT = 78
"""Exit code of a child that cannot work here at all (EX_CONFIG of sysexits.h). Its standard error has the reason."""
EXIT_BROKEN = 70
"""Exit code of a child that can no longer use its device; a new process may be able to."""
HEADER = struct.Struct(">I")


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Render this task. `inputs` maps each reference in `params` (a url, `upload:ID`, ...) to the local file it was fetched to.

    Files go into `out_dir`, which exists and is empty. `seed` is set, also if the task has none. `entry` is the entry of
    `model` in the worker's model table; `sound` is the name and the entry of the model for the sound of a clip. None: the table has none.
    """

    run: str
    task_id: str
    project_id: str
    task_type: str
    engine: str
    model: str
    params: dict[str, Any]
    metadata: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    out_dir: str
    entry: Model | None = None
    sound: tuple[str, Model] | None = None
    file_tags: bool = True
    """Whether its files carry tags with the prompt, seed and model."""


class Batch(msgspec.Struct, frozen=True, tag="batch"):
    """Render these tasks in one call of their model. They share a batch key: they differ only in their texts and seeds."""

    runs: tuple[Run, ...]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop this run between two steps and answer `Cancelled`. It is no error if the run has not started or has ended."""

    run: str


class Watched(msgspec.Struct, frozen=True, tag="watched"):
    """The run now has watchers, who get previews, or has none any more. It is no error if the run has ended."""

    run: str
    watched: bool


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The child accepts runs. `device` is "cpu" or "cuda", the only GPU that it sees."""

    pid: int
    device: str
    device_name: str
    models: tuple[str, ...] = ()
    """The loaded models."""


class Stage(msgspec.Struct, frozen=True):
    """A part of a run: `name` is the stage, `step_name` what `current_step` shows, `weight` its share of the time."""

    name: str
    step_name: str
    weight: float


class Plan(msgspec.Struct, frozen=True, tag="plan"):
    """The stages of the run, in order. Weights are relative; the worker adds its own stages before and after."""

    run: str
    stages: tuple[Stage, ...]


class Step(msgspec.Struct, frozen=True, tag="step"):
    """`step` of `steps` of `stage` are done. Sent at most 20 times a second, and always for the last step of a stage."""

    run: str
    stage: str
    step: int
    steps: int


class Note(msgspec.Struct, frozen=True, tag="note"):
    """A text for the task's event log, for example about a fallback."""

    run: str
    text: str


class Free(msgspec.Struct, frozen=True, tag="free"):
    """The run no longer needs the device, which was idle for `idle_s` and then used for `device_s`. The next run may start."""

    run: str
    device_s: float
    idle_s: float


class Rows(msgspec.Struct, frozen=True, tag="rows"):
    """Memory has room for at most `rows` runs of the run's batch key in one call."""

    run: str
    rows: int


PREVIEW_BYTES: Final = 10_000
"""The largest preview that is passed on."""


class Preview(msgspec.Struct, frozen=True, tag="preview"):
    """A JPEG of the picture in progress, of at most `PREVIEW_BYTES`."""

    run: str
    jpeg: bytes


class Produced(msgspec.Struct, frozen=True):
    """A finished file. `role` is "output" or "poster"; `seed` is that of its take; None stands for the run's."""

    path: str
    role: str
    content_type: str
    width: int | None = None
    height: int | None = None
    duration_s: float | None = None
    take: int = 1
    seed: int | None = None


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The run rendered these files; `metadata` goes into the result unchanged (duration, resolution, fps, format, seed, ...)."""

    run: str
    files: tuple[Produced, ...]
    metadata: dict[str, Any]
    models: tuple[str, ...] = ()
    """The models loaded now, the most recently used one last."""
    models_parked: tuple[str, ...] = ()
    """The models offloaded to host memory."""
    model_swaps: ModelSwaps = ModelSwaps()
    """Counted since the child started."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The run failed. `code` is one of `movieq.errors.TASK_FAULTS`; `traceback` is for the log only."""

    run: str
    code: str
    message: str
    traceback: str = ""
    broken: bool = False
    """Whether the child ends now, since its next run would fail too."""
    problem: str = ""
    """The problem of this machine, or of the device if `broken`; empty if the run is at fault."""
    rendered: bool = False
    """Whether the device had done its part: another run would repeat that, only to fail in the same way."""


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """The run stopped as asked; nothing of it is left in the child."""

    run: str


ToChild = Run | Batch | Cancel | Watched
FromChild = Ready | Plan | Step | Note | Rows | Preview | Free | Done | Failed | Cancelled

_encoder = msgspec.msgpack.Encoder()
to_child_decoder: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
from_child_decoder: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


class Unsendable(ValueError):
    """A message cannot be sent over the pipe; the text gives the reason."""


class _Batch(msgspec.Struct, frozen=True, tag="batch"):
    """A Batch of encoded runs."""

    runs: tuple[msgspec.Raw, ...]


def encoded(message: ToChild | FromChild) -> bytes:
    """Return the message in msgpack. Raises Unsendable."""
    try:
        body = _encoder.encode(message)
    except OverflowError:
        raise Unsendable("it contains a whole number beyond 64 bits") from None
    except RecursionError:
        raise Unsendable("it is nested too deeply") from None
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise Unsendable("it contains something other than text, numbers, true, false, null, lists and maps") from error
    if len(body) > MAX_FRAME_BYTES:
        raise Unsendable(f"it has {len(body)} bytes, at most {MAX_FRAME_BYTES} are allowed")
    return body


def encoded_run(run: Run) -> bytes:
    """Return the run in msgpack, after checking that a child can decode it. Raises Unsendable."""
    body = encoded(run)
    try:
        to_child_decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Unsendable("it cannot be decoded again") from error
    return body


def frame(message: ToChild | FromChild) -> bytes:
    """Return the message as a frame for the pipe. Raises Unsendable."""
    body = encoded(message)
    return HEADER.pack(len(body)) + body


def framed(runs: Sequence[bytes]) -> bytes:
    """Return encoded runs as frames for the pipe: several as one Batch, unless that is too long for one frame."""
    bodies = runs
    if len(runs) > 1:
        batch = _encoder.encode(_Batch(tuple(map(msgspec.Raw, runs))))
        bodies = [batch] if len(batch) <= MAX_FRAME_BYTES else runs
    return b"".join(HEADER.pack(len(body)) + body for body in bodies)


def read_frame(stream: BinaryIO) -> bytes | None:
    """Return the body of the next frame of a blocking stream; None at its end. Raises ValueError on a frame over `MAX_FRAME_BYTES`."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {size} bytes, at most {MAX_FRAME_BYTES} allowed")
    body = stream.read(size)
    return body if len(body) == size else None
