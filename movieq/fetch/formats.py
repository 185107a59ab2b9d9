"""File formats of inputs, recognized by their first bytes.

The format that `sniff` returns is the only one that a file is opened with (`decoder`): neither Pillow nor FFmpeg may guess from a name or
from the content, since some of their formats start programs or open other files and addresses (EPS, playlists).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

HEAD_BYTES: Final = 512
"""Number of bytes at the beginning of a file that `sniff` needs."""


class Kind(StrEnum):
    """A kind of input: the first half of its media type."""

    IMAGE = "image"
    AUDIO = "audio"


class _Format(NamedTuple):
    """A format that is accepted."""

    media_type: str
    name: str
    """As users know it."""
    decoder: str
    """Format of Pillow, or demuxer of FFmpeg."""
    suffixes: tuple[str, ...]
    magic: str
    """Regular expression of the first bytes, in Latin-1."""


_MP3_RATES: Final = bytes(byte for byte in range(256) if 0 < byte >> 4 < 15 and byte >> 2 & 3 != 3).decode("latin-1")
_BRANDS: Final = r"....ftyp(?:....){0,30}?"
"""The begin of a file of boxes (ISO/IEC 14496-12), up to one of its first brands."""

_FORMATS: Final = (
    _Format("image/jpeg", "jpeg", "JPEG", (".jpg", ".jpeg"), r"\xff\xd8\xff"),
    _Format("image/png", "png", "PNG", (".png",), r"\x89PNG\r\n\x1a\n"),
    _Format("image/webp", "webp", "WEBP", (".webp",), r"RIFF....WEBP"),
    _Format("image/gif", "gif", "GIF", (".gif",), r"GIF8[79]a"),
    _Format("image/tiff", "tiff", "TIFF", (".tiff", ".tif"), r"II[*+]\0|MM\0[*+]"),
    # texts may begin with "BM" too, so check the reserved zeros and the size of the second header
    _Format("image/bmp", "bmp", "BMP", (".bmp",), r"BM....\0{4}....[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}"),
    _Format("image/avif", "avif", "AVIF", (".avif",), rf"{_BRANDS}avi[fs]"),
    _Format("audio/wav", "wav", "wav", (".wav",), r"(?:RIFF|RF64)....WAVE"),
    _Format("audio/flac", "flac", "flac", (".flac",), r"fLaC"),
    _Format("audio/ogg", "ogg", "ogg", (".ogg",), r"OggS\0"),
    _Format("audio/mp4", "m4a", "mov", (".m4a",), r"....ftyp(?:M4A |M4B |mp4[12]|isom|iso[2-9]|3gp[4-7]|dash)"),
    # an ID3 tag, or a layer III frame with a valid bit rate and sample rate
    _Format("audio/mpeg", "mp3", "mp3", (".mp3",), rf"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][{re.escape(_MP3_RATES)}]"),
)
_MAGIC: Final = [(each, re.compile(each.magic.encode("latin-1"), re.DOTALL)) for each in _FORMATS]
_HEIC: Final = re.compile(rf"{_BRANDS}(?:hei[cxms]|hev[cxms]|mif1|msf1)".encode(), re.DOTALL)

CONTENT_TYPES: Final = {suffix: each.media_type for each in _FORMATS for suffix in each.suffixes}
"""Media type of each file extension."""
ACCEPTED: Final = {
    kind: f"{article} ({', '.join(each.name for each in _FORMATS if each.media_type.startswith(kind))})"
    for kind, article in ((Kind.IMAGE, "an image"), (Kind.AUDIO, "a sound"))
}
"""The formats of each kind, for messages."""


def sniff(head: bytes) -> str | None:
    """Return the media type that the first `HEAD_BYTES` bytes of a file show, or None if it is neither an image nor a sound.

    Every mp4 counts as `audio/mp4`: only opening it shows whether it has sound. SVG is not accepted: it is code that draws, not pixels.
    """
    found = _sniffed(head)
    return found.media_type if found else None


def _sniffed(head: bytes) -> _Format | None:
    return next((each for each, pattern in _MAGIC if pattern.match(head)), None)


def decoder(head: bytes, kind: Kind) -> str | None:
    """Return the format to open a file with: Pillow's name for an image, FFmpeg's for a sound; None if it is not of this kind."""
    found = _sniffed(head)
    return found.decoder if found and found.media_type.startswith(f"{kind}/") else None


def read_head(path: Path) -> bytes:
    """Return the first `HEAD_BYTES` bytes of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def kind_problem(head: bytes, kinds: Collection[Kind]) -> str | None:
    """Return what a file that begins with these bytes is and what was expected, as the end of a sentence; None if it is of these kinds."""
    media_type = sniff(head)
    if media_type is not None and media_type.partition("/")[0] in kinds:
        return None
    return f"is {media_type or _description(head)}, expected {' or '.join(ACCEPTED[kind] for kind in Kind if kind in kinds)}"


def _description(head: bytes) -> str:
    """Describe the content of a file that is not accepted, for the error message."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty"
    if b"<svg" in text:
        return "an SVG drawing"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    if _HEIC.match(head):
        return "a HEIC image (convert it to JPEG or PNG)"
    return "a file of an unknown kind"
