"""How a model computes fastest on a machine, of the ways that leave its results as they are but for rounding: measured, written, read.

`movieq models bench` writes it beside the weights. It counts for the device and the versions that it was measured with, and only where the
model's entry does not say otherwise.
"""

from __future__ import annotations

import contextlib
from typing import Final

import msgspec

from movieq.models import weights
from movieq.models.table import Model

TORCHS: Final = "native"
"""The attention kernel that torch chooses by itself."""
LOSSY: Final = "sage"
"""The attention kernel that computes with fewer bits."""


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model computes."""

    attention: str = TORCHS
    compile: bool = False


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured to be fastest, and with what."""

    device: str
    versions: dict[str, str]
    speed: Speed


def read(entry: Model, device: str, versions: dict[str, str]) -> Speed:
    """Return how the model is to compute on the device with these versions: as its entry says, else as measured, else as torch does."""
    found = Speed()
    if entry.weights is not None and (path := weights.beside(entry.weights, "speed.json")) is not None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):  # never measured, or by another version of movieq
            measured = msgspec.json.decode(path.read_bytes(), type=Measured)
            if (measured.device, measured.versions) == (device, versions):
                found = measured.speed
    return Speed(found.attention if entry.attention is None else entry.attention, found.compile if entry.compile is None else entry.compile)


def write(entry: Model, measured: Measured) -> None:
    """Write what was measured beside the weights. Raises OSError if that is not possible."""
    path = weights.beside(entry.weights, "speed.json") if entry.weights else None
    if path is None:
        raise FileNotFoundError("the user has no home folder: set XDG_CACHE_HOME")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(measured)))
