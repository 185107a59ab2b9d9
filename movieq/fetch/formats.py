"""File formats of inputs, recognized by their first bytes.

The format that `sniff` returns is the only one that a file is opened with (`decoder`): neither Pillow nor FFmpeg may guess from a name or
from the content, since some of their formats start programs or open other files and addresses (EPS, playlists).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Final

HEAD_BYTES: Final = 512
"""Number of bytes at the beginning of a file that `sniff` needs."""


class Kind(StrEnum):
    """A kind of input: the first half of its media type."""

    IMAGE = "image"
    AUDIO = "audio"


_ACCEPTED: Final = {Kind.IMAGE: "an image (jpeg, png, webp, gif, tiff, bmp)", Kind.AUDIO: "a sound (wav, mp3, flac, ogg, m4a)"}

_MP3_RATES: Final = bytes(byte for byte in range(256) if 0 < byte >> 4 < 15 and byte >> 2 & 3 != 3)

_MAGIC: Final = [
    (media_type, re.compile(pattern, re.DOTALL))
    for media_type, pattern in (
        ("image/jpeg", rb"\xff\xd8\xff"),
        ("image/png", rb"\x89PNG\r\n\x1a\n"),
        ("image/webp", rb"RIFF....WEBP"),
        ("image/gif", rb"GIF8[79]a"),
        ("image/tiff", rb"II\*\0|MM\0\*"),
        # texts may begin with "BM" too, so check the reserved zeros and the size of the second header
        ("image/bmp", rb"BM....\0{4}....[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}"),
        ("audio/wav", rb"(?:RIFF|RF64)....WAVE"),
        ("audio/flac", rb"fLaC"),
        ("audio/ogg", rb"OggS\0"),
        ("audio/mp4", rb"....ftyp(?:M4A |M4B |mp4[12]|isom|iso[2-9]|3gp[4-7]|dash)"),
        # an ID3 tag, or a layer III frame with a valid bit rate and sample rate
        ("audio/mpeg", rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][" + re.escape(_MP3_RATES) + rb"]"),
    )
]
_DECODERS: Final = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
    "image/tiff": "TIFF",
    "image/bmp": "BMP",
    "audio/wav": "wav",
    "audio/flac": "flac",
    "audio/ogg": "ogg",
    "audio/mp4": "mov",
    "audio/mpeg": "mp3",
}
"""Media type -> format of Pillow, or demuxer of FFmpeg."""


def sniff(head: bytes) -> str | None:
    """Return the media type that the first `HEAD_BYTES` bytes of a file show, or None if it is neither an image nor a sound.

    Every mp4 counts as `audio/mp4`: only opening it shows whether it has sound. SVG is not accepted: it is code that draws, not pixels.
    """
    for media_type, pattern in _MAGIC:
        if pattern.match(head):
            return media_type
    return None


def decoder(path: Path, kind: Kind) -> str | None:
    """Return the format to open the file with: Pillow's name for an image, FFmpeg's for a sound; None if it is not of this kind."""
    media_type = sniff(read_head(path))
    return _DECODERS[media_type] if media_type and media_type.startswith(f"{kind}/") else None


def read_head(path: Path) -> bytes:
    """Return the first `HEAD_BYTES` bytes of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def kind_problem(head: bytes, kinds: Collection[Kind]) -> str | None:
    """Return what a file that begins with these bytes is and what was expected, as the end of a sentence; None if it is of these kinds."""
    media_type = sniff(head)
    if media_type is not None and media_type.partition("/")[0] in kinds:
        return None
    return f"is {media_type or _description(head)}, expected {' or '.join(_ACCEPTED[kind] for kind in Kind if kind in kinds)}"


def _description(head: bytes) -> str:
    """Describe the content of a file that is not accepted, for the error message."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty"
    if b"<svg" in text:
        return "an SVG drawing"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    return "a file of an unknown kind"
