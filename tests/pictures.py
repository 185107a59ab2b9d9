"""Image files made byte by byte, so that their values and metadata are known without an imaging library."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]

# D50 colorants of sRGB (IEC 61966-2-1) and Display P3, as ICC profiles have them; one column for each primary
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
P3_TO_SRGB = np.linalg.inv(SRGB) @ DISPLAY_P3


def linear(encoded: Numbers) -> Numbers:
    """Return linear light of sRGB values from 0 to 1."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def encoded(light: Numbers) -> Numbers:
    """Return sRGB values from 0 to 1 of linear light."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def turned(pixels: Numbers, orientation: int) -> Numbers:
    """Return the rows as they must be shown, by the definition of the orientations in EXIF."""
    across = np.swapaxes(pixels, 0, 1)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: across,
        6: across[:, ::-1],
        7: across[::-1, ::-1],
        8: across[::-1],
    }[orientation]


# PNG


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def packed(rows: Sequence[Sequence[int]], depth: int) -> list[bytes]:
    """Return the samples of each row as bytes, the first one in the highest bits."""
    found = []
    for row in rows:
        bits = "".join(format(value, f"0{depth}b") for value in row)
        found.append(int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big"))
    return found


def png(
    rows: Sequence[Sequence[int]],
    size: tuple[int, int],
    depth: int,
    kind: int,
    *before: bytes,
    after: Sequence[bytes] = (),
    palette: bytes = b"",
) -> bytes:
    """Return a PNG of this colour type, with further chunks before and after its pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    colours = [chunk(b"PLTE", palette)] if palette else []
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *(each for each in before if each[4:8] != b"tRNS"),
            *colours,
            *(each for each in before if each[4:8] == b"tRNS"),
            chunk(b"IDAT", pixel_data(rows, depth)),
            *after,
            chunk(b"IEND", b""),
        )
    )


def pixel_data(rows: Sequence[Sequence[int]], depth: int) -> bytes:
    return zlib.compress(b"".join(b"\0" + row for row in packed(rows, depth)))


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"a profile\0\0" + zlib.compress(profile))


def gama(gamma: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))


# TIFF, BigTIFF and EXIF

SHORT, LONG, RATIONAL, FLOAT = 3, 4, 5, 11
LETTERS = {1: "B", 2: "B", SHORT: "H", LONG: "I", RATIONAL: "I", 7: "B", FLOAT: "f", 12: "d", 16: "Q"}
Tags = Mapping[int, tuple[int, Sequence[float]]]


def directory(tags: Tags, order: str, start: int, big: bool = False) -> bytes:
    """Return a directory of a TIFF that begins at `start`: each tag with its type and values."""
    wide, inline = ("Q", 8) if big else ("I", 4)
    after = start + (8 if big else 2) + len(tags) * (20 if big else 12) + inline
    entries, further = b"", b""
    for number, (kind, values) in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(values)}{LETTERS[kind]}", *values)
        place = raw.ljust(inline, b"\0")
        if len(raw) > inline:
            place = struct.pack(order + wide, after + len(further))
            further += raw
        entries += struct.pack(f"{order}HH{wide}", number, kind, len(values) // (2 if kind == RATIONAL else 1)) + place
    return struct.pack(f"{order}{'Q' if big else 'H'}", len(tags)) + entries + bytes(inline) + further


def exif(tags: Tags, order: str = "<") -> bytes:
    """Return EXIF data with these tags, without the word Exif before them."""
    return {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8) + directory(tags, order, 8)


def tiff(pixels: bytes, size: tuple[int, int], tags: Tags, order: str = "<", *, big: bool = False, deflate: bool = False) -> bytes:
    """Return a TIFF of one strip."""
    data = zlib.compress(pixels) if deflate else pixels
    data += bytes(len(data) % 2)
    begin = 16 if big else 8
    every: Tags = {
        256: (SHORT, [size[0]]),
        257: (SHORT, [size[1]]),
        259: (SHORT, [8 if deflate else 1]),
        273: (16 if big else LONG, [begin]),
        277: (SHORT, [len(tags[258][1])]),
        278: (SHORT, [size[1]]),
        279: (16 if big else LONG, [len(data)]),
        **tags,
    }
    header = struct.pack(f"{order}HHHQ", 43, 8, 0, begin + len(data)) if big else struct.pack(f"{order}HI", 42, begin + len(data))
    return {"<": b"II", ">": b"MM"}[order] + header + data + directory(every, order, begin + len(data), big)


# ICC profiles


def profile(colorants: Numbers | None, curve: bytes) -> bytes:
    """Return a profile of RGB with these colorants, or of grey, with this curve."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    if colorants is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"r", b"g", b"b"), colorants.T, strict=True):
            tags[name + b"XYZ"], tags[name + b"TRC"] = b"XYZ \0\0\0\0" + fixed(*column), curve
    start = 128 + 4 + 12 * len(tags)
    bodies = [body.ljust(-(-len(body) // 4) * 4, b"\0") for body in tags.values()]
    places = itertools.accumulate((len(body) for body in bodies), initial=start)
    table = b"".join(name + struct.pack(">II", place, len(body)) for (name, body), place in zip(tags.items(), places, strict=False))
    whole = struct.pack(">I", len(tags)) + table + b"".join(bodies)
    space = b"GRAY" if colorants is None else b"RGB "
    header = struct.pack(">I4sI4s4s4s", 128 + len(whole), b"lcms", 0x04200000, b"mntr", space, b"XYZ ").ljust(36, b"\0") + b"acsp"
    return header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249).ljust(60, b"\0") + whole


def power(gamma: float) -> bytes:
    """Return the curve value = level ** gamma."""
    return b"para\0\0\0\0\0\0\0\0" + struct.pack(">i", round(gamma * 65536))


PARAMETERS = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + struct.pack(">5i", *(round(each * 65536) for each in PARAMETERS))
P3_PROFILE = profile(DISPLAY_P3, SRGB_CURVE)
LINEAR_GREY_PROFILE = profile(None, power(1.0))
