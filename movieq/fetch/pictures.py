"""Opening images of any kind, so that metadata never stops their pixels.

`opened` opens an image as what its first bytes show. Pillow gets a copy of a PNG, JPEG or TIFF that has only the parts that pixels and
colours need, because it raises for a comment that is too long, a fraction in a text tag and the like. A `Picture` has what else is needed
to show the pixels. Decoding them is left to `workers.child.media.images`.
"""

from __future__ import annotations

import io
import itertools
import re
import struct
import zlib
from collections.abc import Iterator, Set
from typing import Final, NamedTuple

from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError

from movieq.fetch.formats import HEAD_BYTES, Kind, decoder

MAX_PIXELS: Final = 40_000_000
MAX_PROFILE_BYTES: Final = 16 * 1024 * 1024
"""Longest colour profile of a PNG. Those of printers have a few megabytes; a longer one is ignored."""


# libavif starts a thread for each core, and each takes address space, which the probe limits
AvifImagePlugin.DEFAULT_MAX_THREADS = 4


class Picture(NamedTuple):
    """An image that is open but not decoded, and what Pillow does not say about it."""

    image: Image.Image
    """Its `info` has `icc_profile`, `gamma` and `transparency`, as far as they can be read."""
    orientation: int = 1
    """How it must be turned to be upright: 1 to 8, as in EXIF."""
    white: float = 255
    """The value of white in an image of mode I;16, I or F. Black is 0."""
    negative: bool = False
    """Whether the pixels have 0 for white."""
    swapped: bool = False
    """Whether Pillow decodes each value of more than 8 bits with its bytes in the wrong order."""
    canvas: tuple[int, int] | None = None
    """The size of the picture, if the image is only a part of it, which begins at `place`."""
    place: tuple[int, int] = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height before it is turned."""
        return self.canvas or self.image.size


def opened(body: bytes) -> Picture:
    """Open an image of these bytes. Raises Pillow's errors, which are of many kinds where the image is damaged."""
    if (pinned := decoder(body[:HEAD_BYTES], Kind.IMAGE)) is None:
        raise UnidentifiedImageError("it is of an unknown kind")
    match pinned:
        case "PNG":
            return _png(body)
        case "JPEG":
            return _jpeg(body)
        case "TIFF":
            return _tiff(body)
        case "AVIF":
            # its orientation is a property of the pixels; Pillow combines it with the EXIF tags, and fails if those are damaged
            body = re.sub(rb"(infe[\2\3].{7}(?:..)?)Exif", rb"\1free", body, flags=re.DOTALL)
    image = Image.open(io.BytesIO(body), formats=(pinned,))
    return Picture(image, _orientation(image.info.get("exif") or b""))


def _orientation(exif: bytes) -> int:
    """Return the orientation that these EXIF data declare, 1 if they are damaged."""
    try:
        return _upright(_directory(exif.removeprefix(b"Exif\0\0"), {_ORIENTATION}))
    except (ValueError, struct.error):
        return 1


# PNG (the PNG specification, third edition, and APNG)

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_CHUNKS: Final = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"sRGB", b"gAMA", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
"""The chunks that pixels and colours need."""
MAX_CHUNKS: Final = 200_000
"""Most of these in a PNG, so that a list of empty ones takes little memory."""


class _Chunk(NamedTuple):
    name: bytes
    body: bytes


def _png(body: bytes) -> Picture:
    chunks = list(itertools.islice(_chunks(body), MAX_CHUNKS + 1))
    if len(chunks) > MAX_CHUNKS:
        raise UnidentifiedImageError("it has too many chunks")
    first: dict[bytes, bytes] = {}
    for chunk in chunks:
        first.setdefault(chunk.name, chunk.body)
    header = first.get(b"IHDR", b"")
    if len(header) != 13:
        raise UnidentifiedImageError("its header is damaged")
    pixels = b"".join(chunk.body for chunk in chunks if chunk.name == b"IDAT")
    canvas, place = None, (0, 0)
    if frame := _first_frame(chunks, header):
        header, place, pixels = frame
        canvas = struct.unpack_from(">II", first[b"IHDR"])
    depth, kind = header[8], header[9]
    palette = [_chunk(b"PLTE", first[b"PLTE"])] if b"PLTE" in first else []
    transparency = [_chunk(b"tRNS", each) for each in _transparency(first.get(b"tRNS", b""), depth, kind)]
    bare = b"".join((_SIGNATURE, _chunk(b"IHDR", header), *palette, *transparency, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")))
    image = Image.open(io.BytesIO(bare), formats=("PNG",))
    if profile := _profile(first.get(b"iCCP", b"")):
        image.info["icc_profile"] = profile
    elif not first.get(b"sRGB") and len(gamma := first.get(b"gAMA", b"")) == 4:
        image.info["gamma"] = int.from_bytes(gamma, "big") / 100_000
    return Picture(image, _orientation(first.get(b"eXIf", b"")), white=2**depth - 1, canvas=canvas, place=place)


def _chunks(body: bytes) -> Iterator[_Chunk]:
    """Yield the chunks that are needed, up to the end of the image or the first damage; the last one may be cut off."""
    at = len(_SIGNATURE)
    while at + 8 <= len(body):
        length, name = struct.unpack_from(">I4s", body, at)
        end = at + 8 + length
        if not name.isalpha() or name == b"IEND":
            return
        if name in _CHUNKS:
            yield _Chunk(name, body[at + 8 : end])
        at = end + 4


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _first_frame(chunks: list[_Chunk], header: bytes) -> tuple[bytes, tuple[int, int], bytes] | None:
    """Return header, place and pixels of the first frame of an animation that the default image does not belong to."""
    names = [chunk.name for chunk in chunks]
    if b"acTL" not in names or b"fcTL" not in names or b"IDAT" not in names or names.index(b"fcTL") < names.index(b"IDAT"):
        return None
    at = names.index(b"fcTL")
    control = chunks[at].body
    frame = itertools.takewhile(lambda chunk: chunk.name != b"fcTL", chunks[at + 1 :])
    data = b"".join(chunk.body[4:] for chunk in frame if chunk.name == b"fdAT")  # without the sequence numbers
    if len(control) != 26 or not data:
        return None
    width, height, left, top = struct.unpack_from(">IIII", control, 4)
    whole_width, whole_height = struct.unpack_from(">II", header)
    if not width or not height or left + width > whole_width or top + height > whole_height or whole_width * whole_height > MAX_PIXELS:
        return None
    return control[4:12] + header[8:], (left, top), data


def _transparency(body: bytes, depth: int, kind: int) -> Iterator[bytes]:
    """Yield the tRNS chunk's body as Pillow reads it; nothing if it is damaged or does not belong to an image of this colour type."""
    if kind == 3 and body:
        yield body[:256]
    elif kind == 0 and len(body) == 2:
        value = int.from_bytes(body, "big") & 2**depth - 1
        # Pillow compares with decoded values, which are scaled to 8 bits if they have 2 or 4
        yield (value * (255 // (2**depth - 1)) if depth in (2, 4) else value).to_bytes(2, "big")
    elif kind == 2 and len(body) == 6:
        # and keeps the higher byte of the three values of 16 bits
        yield bytes(each for value in struct.unpack(">3H", body) for each in (0, value >> depth - 8 & 255))


def _profile(body: bytes) -> bytes | None:
    """Return the colour profile of an iCCP chunk, None if it is damaged or too long."""
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(body.partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if inflater.eof else None


# JPEG (ITU-T T.81)


def _jpeg(body: bytes) -> Picture:
    kept, exif, at = bytearray(body[:2]), b"", 2
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker, length = body[at + 1], int.from_bytes(body[at + 2 : at + 4], "big")
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:  # the first scan
            break
        whole = body[at : at + 2 + length]
        match marker:
            case 0xE0:
                keep = whole[4:9] == b"JFIF\0" and length >= 16
            case 0xE1:
                keep = False
                exif = exif or whole[4:] if whole[4:10] == b"Exif\0\0" else exif
            case 0xE2:
                keep = whole[4:16] == b"ICC_PROFILE\0" and length >= 16
            case 0xEE:
                keep = whole[4:9] == b"Adobe" and length >= 14
            case _:
                keep = not (0xE0 <= marker <= 0xEF or marker == 0xFE)
        if keep:
            kept += whole
        at += 2 + length
    return Picture(Image.open(io.BytesIO(kept + body[at:]), formats=("JPEG",)), _orientation(exif))


# TIFF 6.0, and BigTIFF; EXIF is built like them

_ORIENTATION: Final = 274
_BITS: Final = 258
_POLARITY: Final = 262
_COMPRESSION: Final = 259
_SAMPLE_FORMAT: Final = 339
_ICC: Final = 34675
_PIXEL_TAGS: Final = {
    *(256, 257, _BITS, _COMPRESSION, _POLARITY, 266, 273, 277, 278, 279, 284),  # size, samples, strips
    *(292, 293, 317, 320, 322, 323, 324, 325, 338, _SAMPLE_FORMAT, 347),  # compression, palette, tiles, alpha
    *(512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),  # JPEG, YCbCr
}
"""Tags that say how to read the pixels."""
_SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Number of bytes of a value of each type."""
_SHORT, _LONG, _LONG8, _IFD8 = 3, 4, 16, 18
_WHOLE: Final = {1: "B", _SHORT: "H", _LONG: "I", _LONG8: "Q", _IFD8: "Q"}
"""Types of whole numbers, with their letter in `struct`."""

# Pillow can decode these two but does not know it. The bits of 12-bit samples are packed in one way, whatever the order of bytes.
TiffImagePlugin.OPEN_INFO[(TiffImagePlugin.MM, 1, (1,), 1, (12,), ())] = ("I;16", "I;12")
TiffImagePlugin.OPEN_INFO[(TiffImagePlugin.MM, 1, (1,), 1, (32,), ())] = ("I", "I;32B")


class _Tag(NamedTuple):
    type: int
    length: int
    values: bytes
    order: str
    """Byte order of the values, as in `struct`."""

    @property
    def first(self) -> int | None:
        """Return the first value, if it is a whole number."""
        letter = _WHOLE.get(self.type)
        return struct.unpack_from(self.order + letter, self.values)[0] if letter and self.length else None


def _directory(body: bytes, wanted: Set[int]) -> dict[int, _Tag]:
    """Return those wanted tags of the first directory that are not damaged. Raises ValueError or struct.error if the header is damaged."""
    if body[:2] not in (b"II", b"MM"):
        raise ValueError("no byte order")
    order = "<" if body[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", body, 2) == (43,)
    offset, count, entry = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    (at,) = struct.unpack_from(order + offset, body, 8 if big else 4)
    (number,) = struct.unpack_from(order + count, body, at)
    at += struct.calcsize(order + count)
    number = min(number, (len(body) - at) // struct.calcsize(order + entry))
    found: dict[int, _Tag] = {}
    left = len(body)  # bytes that values may take together: tags may share theirs
    for tag, kind, length, inline in struct.iter_unpack(order + entry, body[at : at + number * struct.calcsize(order + entry)]):
        size = length * _SIZES.get(kind, len(body))
        begin = struct.unpack(order + offset, inline)[0] if size > len(inline) else 0
        if tag not in wanted or tag in found or size > left:
            continue
        values = inline[:size] if size <= len(inline) else body[begin : begin + size]
        if len(values) == size:
            found[tag] = _Tag(kind, length, values, order)
            left -= size
    return found


def _upright(tags: dict[int, _Tag]) -> int:
    tag = tags.get(_ORIENTATION)
    value = tag.first if tag and tag.length == 1 else None
    return value if value is not None and 1 <= value <= 8 else 1


def _tiff(body: bytes) -> Picture:
    try:
        tags = _directory(body, {*_PIXEL_TAGS, _ORIENTATION, _ICC})
    except (ValueError, struct.error) as error:
        raise UnidentifiedImageError("its first directory is damaged") from error
    first = {number: tag.first for number, tag in tags.items()}
    negative = first.get(_POLARITY) == 0
    if negative:  # Pillow turns only some kinds of these into positives
        tags[_POLARITY] = tags[_POLARITY]._replace(type=_SHORT, values=struct.pack(f"{tags[_POLARITY].order}H", 1), length=1)
    image = Image.open(io.BytesIO(_bare_tiff(body, tags)), formats=("TIFF",))
    if _ICC in tags:
        image.info["icc_profile"] = tags[_ICC].values
    bits = first.get(_BITS) or 1
    return Picture(
        image,
        _upright(tags),
        white=1.0 if image.mode == "F" else 2 ** (bits - (first.get(_SAMPLE_FORMAT) == 2)) - 1,
        negative=negative,
        # libtiff returns these in the order of this machine
        swapped=image.mode in ("I", "F") and body[:2] == b"MM" and first.get(_COMPRESSION, 1) != 1,
    )


def _bare_tiff(body: bytes, tags: dict[int, _Tag]) -> bytes:
    """Return the file as a plain TIFF whose only directory, at its end, has only the tags that say how to read the pixels."""
    kept = {number: tags[number] for number in sorted(tags) if number in _PIXEL_TAGS}
    order = "<" if body[:2] == b"II" else ">"
    at = len(body) + len(body) % 2
    after = at + 2 + 12 * len(kept) + 4
    entries, values = bytearray(), bytearray()
    for number, tag in kept.items():
        kind, raw = tag.type, tag.values
        if kind in (_LONG8, _IFD8):
            kind, raw = _LONG, struct.pack(f"{order}{tag.length}I", *struct.unpack(f"{order}{tag.length}Q", raw))
        inline = raw if len(raw) <= 4 else struct.pack(f"{order}I", after + len(values))
        if len(raw) > 4:
            values += raw + bytes(len(raw) % 2)
        entries += struct.pack(f"{order}HHI4s", number, kind, tag.length, inline)
    # pixels never lie in the first 8 bytes, so the header of a BigTIFF is overwritten too
    header = body[:2] + struct.pack(f"{order}HI", 42, at)
    return b"".join((header, body[8:], bytes(len(body) % 2), struct.pack(f"{order}H", len(kept)), entries, bytes(4), values))
