"""Stills of every kind against formulas: modes, bit depths and metadata; and that metadata never stops pixels."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from movieq.errors import InvalidInput
from movieq.fetch.download import image_problem
from movieq.fetch.pictures import MAX_CHUNKS
from tests import pictures as made
from tests.pictures import LONG, RATIONAL, SHORT, Numbers, chunk
from workers.child.media import images

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZE = (4, 2)
Shown = Callable[[bytes], Numbers]


@pytest.fixture
def shown(tmp_path: Path) -> Shown:
    """`shown(body)` is the pixels of a file as an engine gets them, RGB or RGBA."""

    def read(body: bytes) -> Numbers:
        path = tmp_path / "still"
        path.write_bytes(body)
        assert image_problem(path) is None
        return np.asarray(images.load_with_alpha("still", path, (64, 64)))

    return read


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def png_of(*before: bytes, value: tuple[int, ...] = (234, 51, 35), kind: int = 2, depth: int = 8, after: tuple[bytes, ...] = ()) -> bytes:
    """Return a PNG of one colour."""
    return made.png([list(value) * SIZE[0]] * SIZE[1], SIZE, depth, kind, *before, after=after)


# -- PNG

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
DEPTHS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16), (6, 8), (6, 16)]
"""Each colour type of PNG with its bit depths."""

COLOURS: dict[str, tuple[list[bytes], Callable[[Numbers], Numbers]]] = {
    "nothing": ([], lambda values: values),
    "sRGB": ([chunk(b"sRGB", b"\0"), made.gama(1.0)], lambda values: values),
    "gamma of sRGB": ([made.gama(0.45455)], lambda values: values),
    "linear": ([made.gama(1.0)], made.encoded),
    "gamma 1.8": ([made.gama(1 / 1.8)], lambda values: made.encoded(values**1.8)),
    "Display P3": ([made.iccp(made.P3_PROFILE), made.gama(1.0)], lambda values: made.encoded(made.linear(values) @ made.P3_TO_SRGB.T)),
}
JUNK: dict[str, bytes] = {
    "nothing": b"",
    "a long text": chunk(b"tEXt", b"Comment\0" + b"x" * 1_800_000),
    "a long compressed text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_800_000))),
    "a long international text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(1_800_000))),
    "a text of an unknown compression": chunk(b"zTXt", b"Comment\0\7xxx"),
    "a wrong checksum": chunk(b"tIME", bytes(7))[:-1] + b"x",
    "short chunks": b"".join(chunk(name, b"\1") for name in (b"pHYs", b"cHRM", b"acTL", b"fcTL", b"bKGD")),
    "an unknown chunk": chunk(b"oDDs", b"\xff" * 100),
}
EXIF: dict[str, bytes] = {
    "sound": b"",
    "a fraction for the artist": struct.pack("<HHI", 315, RATIONAL, 1),
    "a text beyond the end": struct.pack("<HHII", 306, 2, 4_000_000_000, 7),
    "an unknown type": struct.pack("<HHII", 305, 99, 1, 7),
}


def exif(orientation: int, fault: str = "sound") -> bytes:
    """Return EXIF data with this orientation, and a tag that is wrong in this way."""
    tags = {274: (SHORT, [orientation]), 305: (SHORT, [1]), 306: (LONG, [1]), 315: (RATIONAL, [1, 3])}
    body = made.exif(tags)
    if entry := EXIF[fault]:
        at = body.index(entry[:2], 10)
        body = body[:at] + entry + body[at + len(entry) :]
    return body


@st.composite
def samples(draw: st.DrawFn, kind: int, depth: int) -> Numbers:
    """Rows of pixels of channels. Colours of 16 bits have equal halves, since Pillow keeps the higher one."""
    most = 2**depth - 1
    one = st.integers(0, most if kind == 0 or depth < 16 else 255)
    width = SIZE[0] * CHANNELS[kind]
    rows = draw(st.lists(st.lists(one, min_size=width, max_size=width), min_size=SIZE[1], max_size=SIZE[1]))
    return np.array(rows).reshape(SIZE[1], SIZE[0], -1) * (257 if depth == 16 and kind else 1)


@quick
@given(st.data())
def test_a_png_of_any_kind_is_shown_by_the_formulas(shown: Shown, data: st.DataObject) -> None:
    kind, depth = data.draw(st.sampled_from(DEPTHS))
    label = data.draw(st.sampled_from(sorted(COLOURS)))
    junk = JUNK[data.draw(st.sampled_from(sorted(JUNK)))]
    orientation = data.draw(st.integers(1, 8))
    fault = data.draw(st.sampled_from(sorted(EXIF)))
    late = data.draw(st.booleans())
    pixels = data.draw(samples(kind, depth))
    chunks, formula = COLOURS[label]
    most = 2**depth - 1

    palette, alpha = b"", None
    if kind == 3:
        palette = data.draw(st.binary(min_size=3 * 2**depth, max_size=3 * 2**depth))
        colours = np.frombuffer(palette, np.uint8).reshape(-1, 3)[pixels[..., 0]] / 255
    else:
        alpha = pixels[..., -1] / most if kind in (4, 6) else None
        colours = (pixels if alpha is None else pixels[..., :-1]) / most
        colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
    transparent = b""
    if kind in (0, 2, 3) and data.draw(st.booleans()):
        if kind == 3:
            table = data.draw(st.binary(min_size=1, max_size=2**depth))
            alpha = np.frombuffer(table.ljust(2**depth, b"\xff"), np.uint8)[pixels[..., 0]] / 255
            transparent = chunk(b"tRNS", table)
        else:
            value = pixels[data.draw(st.integers(0, SIZE[1] - 1)), data.draw(st.integers(0, SIZE[0] - 1))]
            alpha = np.where((pixels == value).all(axis=2), 0.0, 1.0)
            transparent = chunk(b"tRNS", struct.pack(f">{len(value)}H", *value))

    metadata = [junk, chunk(b"eXIf", exif(orientation, fault))]
    found = shown(
        made.png(
            pixels.reshape(SIZE[1], -1).tolist(),
            SIZE,
            depth,
            kind,
            *chunks,
            *([] if late else metadata),
            transparent,
            after=metadata if late else (),
            palette=palette,
        )
    )
    wanted = formula(colours) * 255
    if alpha is not None:
        wanted = np.dstack([wanted, alpha * 255])
    assert found.shape == made.turned(wanted, orientation).shape
    assert np.abs(found - made.turned(wanted, orientation)).max() <= (2 if label == "Display P3" else 0.51)


def test_colours_of_a_display_p3_picture_are_those_of_srgb(shown: Shown) -> None:
    palette = bytes((234, 51, 35)) * 2
    for body in (
        png_of(made.iccp(made.P3_PROFILE)),
        png_of(made.iccp(made.P3_PROFILE), value=(234, 51, 35, 255), kind=6),
        made.png([[1] * SIZE[0]] * SIZE[1], SIZE, 1, 3, made.iccp(made.P3_PROFILE), palette=palette),
    ):
        assert np.abs(shown(body)[0, 0, :3].astype(int) - (255, 0, 0)).max() <= 1


def test_a_linear_grey_is_lighter_in_srgb(shown: Shown) -> None:
    assert shown(png_of(made.gama(1.0), value=(55,), kind=0))[0, 0].tolist() == [128, 128, 128]
    assert shown(png_of(made.iccp(made.LINEAR_GREY_PROFILE), value=(55,), kind=0))[0, 0].tolist() == pytest.approx([128] * 3, abs=1)
    assert shown(png_of(made.iccp(made.LINEAR_GREY_PROFILE), value=(55, 9), kind=4))[0, 0].tolist() == pytest.approx([128] * 3 + [9], abs=1)


@pytest.mark.parametrize("gamma", [b"", bytes(4), bytes(3) + b"\1", b"\xff" * 4, b"abc"])
def test_a_gamma_without_sense_changes_nothing(shown: Shown, gamma: bytes) -> None:
    assert shown(png_of(chunk(b"gAMA", gamma)))[0, 0].tolist() == [234, 51, 35]


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_800_000))),
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(20_000_000))),
        made.iccp(made.P3_PROFILE[:300]),
        made.iccp(made.LINEAR_GREY_PROFILE),
        chunk(b"iCCP", b"x\0\0" + zlib.compress(made.P3_PROFILE)[:-9]),
        chunk(b"iCCP", b"x"),
        chunk(b"iCCP", b""),
        chunk(b"tRNS", b"\1"),
    ],
    ids=["long", "huge", "cut", "of grey", "cut zlib", "a name alone", "empty", "half a colour"],
)
def test_a_damaged_profile_or_transparency_leaves_the_values(shown: Shown, broken: bytes) -> None:
    assert shown(png_of(broken))[0, 0].tolist() == [234, 51, 35]


def test_a_profile_of_two_megabytes_counts(shown: Shown) -> None:
    long = made.P3_PROFILE + bytes(2_000_000)
    profile = struct.pack(">I", len(long)) + long[4:]
    assert np.abs(shown(png_of(made.iccp(profile)))[0, 0].astype(int) - (255, 0, 0)).max() <= 1


def control(number: int, size: tuple[int, int], place: tuple[int, int] = (0, 0)) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, *size, *place, 1, 10, 0, 0))


def animated(size: tuple[int, int], place: tuple[int, int]) -> bytes:
    """Return an animation of two frames, red and blue, whose default image is green and no frame."""
    frames = [made.pixel_data([list(colour) * size[0]] * size[1], 8) for colour in ((255, 0, 0), (0, 0, 255))]
    return png_of(
        chunk(b"acTL", struct.pack(">II", 2, 0)),
        value=(0, 255, 0),
        after=(
            control(0, size, place),
            chunk(b"fdAT", struct.pack(">I", 1) + frames[0][:5]),
            chunk(b"fdAT", struct.pack(">I", 2) + frames[0][5:]),
            control(3, size, place),
            chunk(b"fdAT", struct.pack(">I", 4) + frames[1]),
        ),
    )


def test_the_default_image_of_an_animation_is_not_shown_if_it_is_no_frame(shown: Shown) -> None:
    assert shown(animated(SIZE, (0, 0))).reshape(-1, 4).tolist() == [[255, 0, 0, 255]] * 8
    part = shown(animated((2, 1), (1, 1)))
    assert part[..., 3].tolist() == [[0, 0, 0, 0], [0, 255, 255, 0]]
    assert part[1, 1].tolist() == [255, 0, 0, 255]


@pytest.mark.parametrize("place", [(3, 0), (0, 2), (2**31, 0)])
def test_a_frame_beyond_its_picture_is_left_out(shown: Shown, place: tuple[int, int]) -> None:
    assert shown(animated((2, 1), place))[0, 0].tolist() == [0, 255, 0]


def test_the_default_image_of_an_animation_is_shown_if_it_is_its_first_frame(shown: Shown) -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    assert shown(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


@quick
@given(st.integers(21, 200), st.integers(0, 9))
def test_a_png_whose_pixels_are_cut_off_is_refused(shown: Shown, cut: int, level: int) -> None:
    body = encoded(Image.effect_noise((24, 16), 90), "PNG", compress_level=level)
    with pytest.raises(InvalidInput, match="no picture that can be read"):
        shown(body[:-cut])


def test_a_png_of_very_many_chunks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "still"
    path.write_bytes(png_of(chunk(b"IDAT", b"") * (MAX_CHUNKS + 1)))
    assert image_problem(path) == "its image header cannot be read"


# -- TIFF

KINDS = [(1, 1), (2, 1), (4, 1), (8, 1), (12, 1), (16, 1), (16, 2), (32, 1), (32, 2), (32, 3)]
"""Bits and sample format of grey: unsigned, signed, or float."""
LETTERS = {(16, 1): "H", (16, 2): "h", (32, 1): "I", (32, 2): "i", (32, 3): "f"}


@quick
@given(st.data())
def test_a_grey_tiff_of_any_kind_is_shown_by_the_formulas(shown: Shown, data: st.DataObject) -> None:
    bits, sample_format = data.draw(st.sampled_from(KINDS))
    order = data.draw(st.sampled_from("<>"))
    negative, big, deflate = (data.draw(st.booleans()) for _ in range(3))
    turned_by = data.draw(st.integers(1, 8))
    most = {1: 2**bits - 1, 2: 2 ** (bits - 1) - 1, 3: 1.0}[sample_format]
    one: st.SearchStrategy[float] = {
        1: st.integers(0, 2**bits - 1),
        2: st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        3: st.one_of(st.floats(-2, 2, width=32), st.sampled_from([np.inf, -np.inf, 1.5])),
    }[sample_format]
    values = data.draw(st.lists(one, min_size=8, max_size=8))
    letter = LETTERS.get((bits, sample_format))
    rows = [values[:4], values[4:]]
    pixels = struct.pack(f"{order}8{letter}", *values) if letter else b"".join(made.packed(rows, bits))  # type: ignore[arg-type]  # whole numbers
    tags: made.Tags = {258: (SHORT, [bits]), 262: (SHORT, [0 if negative else 1]), 274: (SHORT, [turned_by]), 339: (SHORT, [sample_format])}
    noise: made.Tags = {315: (RATIONAL, [1, 3]), 282: (SHORT, [0]), 700: (12, [1.0] * 3)}
    found = shown(made.tiff(pixels, SIZE, {**tags, **noise}, order, big=big, deflate=deflate))
    levels = np.clip(np.array(rows, float) / most, 0, 1)
    wanted = made.turned((1 - levels if negative else levels) * 255, turned_by)
    assert found.shape == (*wanted.shape, 3)
    assert np.abs(found - wanted[..., None]).max() <= 0.51


def cmyk(ink: Numbers) -> Numbers:
    return 255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)


def ycbcr(values: Numbers) -> Numbers:
    y, cb, cr = values[..., 0], values[..., 1] - 128, values[..., 2] - 128
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1).clip(0, 255)


def opaque(values: Numbers) -> Numbers:
    return np.broadcast_to(values, (*values.shape[:2], 3))


def with_alpha(values: Numbers) -> Numbers:
    return np.dstack([opaque(values[..., :-1]), values[..., -1]])


def unmultiplied(values: Numbers) -> Numbers:
    alpha = values[..., -1:]
    return np.dstack([opaque(np.minimum(values[..., :-1] * 255 / np.maximum(alpha, 1), 255)), alpha])


def palette_with_alpha(values: Numbers) -> Numbers:
    return np.dstack([PALETTE[values[..., 0]], values[..., 1]])


PALETTE = np.arange(768).reshape(256, 3) * 37 % 256
TIFFS: dict[str, tuple[int, int, list[int], Callable[[Numbers], Numbers], float]] = {
    "L": (1, 1, [], opaque, 0),
    "LA": (1, 2, [2], with_alpha, 0),
    "La": (1, 2, [1], unmultiplied, 1),
    "LX": (1, 2, [0], lambda values: opaque(values[..., :1]), 0),
    "P": (3, 1, [], lambda values: PALETTE[values[..., 0]], 0),
    "PA": (3, 2, [2], palette_with_alpha, 0),
    "RGB": (2, 3, [], opaque, 0),
    "RGBA": (2, 4, [2], with_alpha, 0),
    "RGBa": (2, 4, [1], unmultiplied, 1),
    "RGBX": (2, 4, [0], lambda values: values[..., :3], 0),
    "CMYK": (5, 4, [], cmyk, 2),
    "YCbCr": (6, 3, [], ycbcr, 2),
}
"""Mode -> photometric interpretation, number of samples, extra samples, formula, tolerance."""


@quick
@given(st.data())
def test_a_tiff_of_any_mode_is_shown_by_the_formulas(shown: Shown, data: st.DataObject) -> None:
    photometric, count, extra, formula, tolerance = TIFFS[data.draw(st.sampled_from(sorted(TIFFS)))]
    order, big, orientation = data.draw(st.sampled_from("<>")), data.draw(st.booleans()), data.draw(st.integers(1, 8))
    pixels = data.draw(st.binary(min_size=8 * count, max_size=8 * count))
    tags: dict[int, tuple[int, list[float]]] = {258: (SHORT, [8] * count), 262: (SHORT, [photometric]), 274: (SHORT, [orientation])}
    if extra:
        tags[338] = (SHORT, [*extra])
    if photometric == 3:
        tags[320] = (SHORT, [int(each) * 257 for each in PALETTE.T.ravel()])
    if photometric == 6:
        tags[530] = (SHORT, [1, 1])
    found = shown(made.tiff(pixels, SIZE, tags, order, big=big))
    values = np.frombuffer(pixels, np.uint8).reshape(SIZE[1], SIZE[0], count).astype(int)
    wanted = made.turned(formula(values), orientation)
    assert found.shape == wanted.shape
    far = np.abs(found - wanted)
    if extra == [1]:  # where little is left of a colour, it cannot be told
        far = far * wanted[..., 3:] / 255
    assert far.max() <= tolerance


def test_the_profile_of_a_tiff_counts(shown: Shown) -> None:
    tags = {258: (SHORT, [8, 8, 8]), 262: (SHORT, [2]), 34675: (7, list(made.P3_PROFILE))}
    found = shown(made.tiff(bytes((234, 51, 35)) * 8, SIZE, tags))
    assert np.abs(found[0, 0].astype(int) - (255, 0, 0)).max() <= 1


# -- JPEG and the others

FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


def corners() -> Image.Image:
    """Return a picture whose corners differ, of areas large enough to survive compression."""
    image = Image.new("RGB", (64, 32), (20, 20, 20))
    for colour, place in (((200, 30, 30), (0, 0)), ((30, 160, 30), (32, 0)), ((40, 40, 200), (0, 16))):
        image.paste(colour, (*place, place[0] + 32, place[1] + 16))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", FORMATS)
def test_a_picture_of_any_format_is_turned_upright(shown: Shown, name: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[274] = orientation
    found = shown(encoded(corners(), name, exif=tags, **FORMATS[name]))
    wanted = made.turned(np.asarray(corners()), orientation)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).mean() < 2


@pytest.mark.parametrize("fault", EXIF)
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_tag_does_not_keep_a_picture_from_being_turned(shown: Shown, name: str, fault: str) -> None:
    found = shown(encoded(corners(), name, exif=b"Exif\0\0" + exif(6, fault), **FORMATS[name]))
    assert np.abs(found.astype(int) - made.turned(np.asarray(corners()), 6)).mean() < 2


@pytest.mark.parametrize("fault", EXIF)
def test_the_damaged_tags_of_an_avif_do_not_matter(shown: Shown, fault: str) -> None:
    tags = Image.Exif()
    tags[274], tags[305] = 6, "x" * 64
    body = encoded(corners(), "AVIF", exif=tags, **FORMATS["AVIF"])
    at = body.index(b"II*\0") if b"II*\0" in body else body.index(b"MM\0*")
    broken = exif(1, fault)
    found = shown(body[:at] + broken[:60] + body[at + 60 :])
    assert np.abs(found.astype(int) - made.turned(np.asarray(corners()), 6)).mean() < 2


@pytest.mark.parametrize("name", [*FORMATS, "CMYK"])
def test_the_profile_of_any_format_counts(shown: Shown, name: str) -> None:
    image = Image.new("RGB", (16, 16), (234, 51, 35))
    if name == "CMYK":  # a profile of other colours than the picture's
        found = shown(encoded(image.convert("CMYK"), "JPEG", icc_profile=made.P3_PROFILE))
        assert np.abs(found[8, 8].astype(int) - (234, 51, 35)).max() <= 4
    else:
        found = shown(encoded(image, name, icc_profile=made.P3_PROFILE, **FORMATS[name]))
        assert np.abs(found[8, 8].astype(int) - (255, 0, 0)).max() <= 4


SEGMENTS = [
    b"\xff\xe0\0\x08JFIF\0\1",
    b"\xff\xe1\0\x0aExif\0\0II",
    b"\xff\xe1\0\x08Exif\0\0",
    b"\xff\xe2\0\x10ICC_PROFILE\0\1\xff",
    b"\xff\xe2\0\x0eICC_PROFILE\0",
    b"\xff\xe2\0\x0aMPF\0MM\0*",
    b"\xff\xed\0\x12Photoshop 3.0\0\x38\x42",
    b"\xff\xee\0\x07Adobe",
    b"\xff\xfe\0\x02",
    b"\xff\xff\xff\xe5\0\x02",
]


@pytest.mark.parametrize("segment", SEGMENTS, ids=lambda segment: segment[4:9].decode("latin-1"))
def test_a_damaged_segment_of_a_jpeg_does_not_matter(shown: Shown, segment: bytes) -> None:
    body = encoded(corners(), "JPEG", **FORMATS["JPEG"])
    assert np.abs(shown(body[:2] + segment + body[2:]).astype(int) - np.asarray(corners())).mean() < 2


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("tail", [b"", b"\0" * 500, b"\r\n"])
def test_a_jpeg_that_lacks_only_its_end_marker_is_shown(shown: Shown, progressive: bool, tail: bytes) -> None:
    body = encoded(Image.effect_noise((200, 100), 90), "JPEG", progressive=progressive)
    assert (shown(body[:-2] + tail) == shown(body)).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(4, 2000), colour=st.booleans(), restarts=st.booleans())
def test_a_jpeg_that_is_cut_off_is_refused(shown: Shown, cut: int, colour: bool, restarts: bool) -> None:
    image = Image.effect_noise((100, 60), 90)
    body = encoded(image.convert("RGB") if colour else image, "JPEG", restart_marker_rows=int(restarts))
    with pytest.raises(InvalidInput, match="no picture that can be read"):
        shown(body[:-cut])


# -- what is no picture

BODIES = {name: encoded(corners(), name, **FORMATS.get(name, {})) for name in (*FORMATS, "GIF", "BMP")}
BODIES["animation"] = animated((2, 1), (1, 1))
BODIES["float"] = made.tiff(struct.pack("<8f", *range(8)), SIZE, {258: (SHORT, [32]), 262: (SHORT, [0]), 339: (SHORT, [3])}, deflate=True)
BODIES["BigTIFF"] = made.tiff(bytes(8), SIZE, {258: (SHORT, [8]), 262: (SHORT, [1])}, ">", big=True)
BODIES["metadata"] = png_of(made.iccp(made.P3_PROFILE), made.gama(0.7), chunk(b"eXIf", exif(6)), chunk(b"tRNS", bytes(6)))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(BODIES)), at=st.integers(0, 700), junk=st.binary(max_size=6), cut=st.integers(0, 900) | st.none())
def test_a_damaged_picture_is_shown_or_refused_and_no_other_error(tmp_path: Path, name: str, at: int, junk: bytes, cut: int | None) -> None:
    body = BODIES[name]
    path = tmp_path / "damaged"
    path.write_bytes((body[:at] + junk + body[at + len(junk) :])[:cut])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert image_problem(path) is None or image_problem(path)
    message = ""
    try:
        images.load_with_alpha("https://cdn.example/still", path, (64, 64))
    except InvalidInput as error:
        message = error.message
    assert message.startswith("https://cdn.example/still") or not message
    assert str(tmp_path) not in message
    assert "0x" not in message
