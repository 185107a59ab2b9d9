"""Decoding stills of any kind to RGB: upright, in sRGB, without transparency; and filling a frame with a still without stretching it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from PIL import Image, ImageChops, ImageCms, ImageEnhance, ImageFilter, UnidentifiedImageError

from movieq.errors import InvalidInput
from movieq.fetch import pictures
from movieq.fetch.pictures import MAX_PIXELS, Picture
from workers.faults import abbreviated, without_paths

Image.MAX_IMAGE_PIXELS = MAX_PIXELS

MAX_CROP_SHARE = 0.125
"""A still that loses at most this share of its area by filling the frame is cropped (16:10 in 16:9); others get a background."""

TRANSPARENCY_COLOUR = (118, 116, 112)  # mid grey, so that both black ink and white chalk show on it

_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, ArithmeticError, RuntimeError)
"""What Pillow's decoders raise on damaged files."""


_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture of each orientation (EXIF) is turned."""

_FILLERS: Final = (b"", bytes(byte * 73 % 251 for byte in range(2048)))
"""Two continuations of a JPEG that ends without its end marker."""


def check(reference: str, path: Path) -> None:
    """Raise InvalidInput if the file's header is not that of an image, or the image is too large. Cheap: nothing is decoded."""
    body = path.read_bytes()
    with _decoding(reference, path):
        pictures.opened(body)


def load(reference: str, path: Path, frame_size: tuple[int, int]) -> Image.Image:
    """Return the still as RGB, upright, in sRGB, without transparency, at most about twice as large as `frame_size` needs.

    Raises InvalidInput naming the reference if it is no image, is damaged, or has more than 40 megapixels.
    """
    return flatten_alpha(load_with_alpha(reference, path, frame_size))


def load_with_alpha(reference: str, path: Path, frame_size: tuple[int, int]) -> Image.Image:
    """Return the still like `load`, but as RGBA if it has transparent parts."""
    body = path.read_bytes()
    with _decoding(reference, path):
        most = (frame_size[0] * 2, frame_size[1] * 2)
        picture = _decoded(body, most)
        still = _to_srgb(picture)
        if picture.canvas:
            part, still = still, Image.new("RGBA", picture.canvas)
            still.paste(part, picture.place)
        if picture.orientation in _UPRIGHT:
            still = still.transpose(_UPRIGHT[picture.orientation])
        factor = min(still.width // most[0], still.height // most[1])
        return still.reduce(factor) if factor > 1 else still


def flatten_alpha(still: Image.Image) -> Image.Image:
    """Return RGB of RGB or RGBA: transparent parts become mid grey."""
    if still.mode == "RGB":
        return still
    ground = Image.new("RGB", still.size, TRANSPARENCY_COLOUR)
    ground.paste(still, mask=still.getchannel("A"))
    return ground


def _decoded(body: bytes, most: tuple[int, int]) -> Picture:
    """Return the picture with its pixels decoded; of a JPEG at least so many that it is as large as `most`."""
    picture = pictures.opened(body)
    picture.image.draft(None, most)  # JPEG only: decoded at a half, a quarter or an eighth
    try:
        picture.image.load()
    except OSError:
        if picture.image.format != "JPEG":
            raise
        # A JPEG that lacks only its end marker is whole: no pixel depends on how its data go on.
        one, other = (pictures.opened(body + filler + b"\xff\xd9") for filler in _FILLERS)
        for each in (one, other):
            each.image.draft(None, most)
            each.image.load()
        if ImageChops.difference(one.image, other.image).getbbox():
            raise
        return one
    return picture


@contextmanager
def _decoding(reference: str, path: Path) -> Iterator[None]:
    """Translate Pillow's errors to InvalidInput."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual but readable files (EXIF, TIFF tags)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{abbreviated(reference)} has more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except UnidentifiedImageError as error:  # its message shows an object of Python
        why = "its header is damaged, or it is of a variant that is not supported"
        raise InvalidInput(f"{abbreviated(reference)} is no picture that can be read ({why})") from error
    except _UNDECODABLE as error:
        raise InvalidInput(f"{abbreviated(reference)} is no picture that can be read ({without_paths(str(error), path)})") from error


def fill_frame(still: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the still in a frame of `size`: cropped to fill it if that loses little, else whole on its own blurred, darkened copy."""
    width, height = size
    cover = _cover_box(still, size)
    remaining = (cover[2] - cover[0]) * (cover[3] - cover[1]) / (still.width * still.height)
    if remaining >= 1 - MAX_CROP_SHARE:
        return still.resize(size, Image.Resampling.LANCZOS, box=cover, reducing_gap=3.0)
    scale = min(width / still.width, height / still.height)
    inner = still.resize(
        (max(1, round(still.width * scale)), max(1, round(still.height * scale))), Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    frame = blurred_background(still, size)
    frame.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return frame


def blurred_background(still: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the still cropped to the frame, blurred and darkened. Blurred at an eighth of the size: as soft, and sixty times cheaper."""
    cover = _cover_box(still, size)
    small = (max(1, size[0] // 8), max(1, size[1] // 8))
    soft = still.resize(small, Image.Resampling.BICUBIC, box=cover, reducing_gap=2.0).filter(ImageFilter.GaussianBlur(max(small) / 30))
    return ImageEnhance.Brightness(soft.resize(size, Image.Resampling.BICUBIC)).enhance(0.55)


def _cover_box(still: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the central part of the still that has the frame's aspect, as (left, top, right, bottom) in pixels."""
    scale = max(size[0] / still.width, size[1] / still.height)
    width, height = min(still.width, size[0] / scale), min(still.height, size[1] / scale)
    left, top = (still.width - width) / 2, (still.height - height) / 2
    return left, top, left + width, top + height


def _to_srgb(picture: Picture) -> Image.Image:
    """Return RGB or RGBA of an image of any mode: by its ICC profile or its gamma, if it has one, else its values are taken for sRGB."""
    colours, alpha = _split(picture)
    if picture.negative:
        colours = ImageChops.invert(colours)
    still = _by_profile(colours, picture.image.info.get("icc_profile")) or colours.convert("RGB")
    if alpha:
        still.putalpha(alpha)
    return still


def _split(picture: Picture) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours as L, RGB, CMYK or LAB of 8 bits, with the gamma of the file taken out, and the alpha channel, if there is one."""
    image, alpha = picture.image, None
    if image.mode[0] in "IF":
        return _to_8_bits(picture)
    gamma = image.info.get("gamma")
    if image.mode == "La":
        image = image.convert("LA")
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
    colours = image if image.mode in ("CMYK", "LAB") else image.convert("L" if grey else "RGB")
    return colours.point(_table(256, gamma) * len(colours.getbands())) if gamma else colours, alpha


def _to_8_bits(picture: Picture) -> tuple[Image.Image, Image.Image | None]:
    """Return an image with 16-bit, 32-bit or float values as `_split` does. Values below black are black, those above white are white."""
    import numpy as np  # only here: the probe decodes the inputs of every task, and they seldom need it

    image, white = picture.image, picture.white
    values = np.asarray(image)
    if picture.swapped:
        values = values.astype({1.0: "f4", 32767: "i2"}.get(white, "i4")).byteswap()
    if image.mode.startswith("I;16"):
        table = np.frombuffer(bytes(_table(int(white) + 1, image.info.get("gamma"))), np.uint8)
        grey = table[np.minimum(values, int(white))]
    else:
        if white == 2**32 - 1:
            values = values.view(np.uint32)
        levels = np.multiply(values, 255 / white, dtype=np.float32)
        grey = np.rint(np.nan_to_num(levels, posinf=255, neginf=0).clip(0, 255)).astype(np.uint8)
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def _table(levels: int, gamma: float | None) -> list[int]:
    """Return the sRGB value of 8 bits of each of these levels, from black to white, that were encoded with this gamma (PNG, gAMA)."""
    if gamma is None or not 0.1 < gamma < 10 or abs(gamma * 2.2 - 1) < 0.05:  # senseless, or how many programs say sRGB
        return [round(255 * level / (levels - 1)) for level in range(levels)]

    def encoded(linear: float) -> float:  # IEC 61966-2-1
        return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055

    return [round(255 * encoded((level / (levels - 1)) ** (1 / gamma))) for level in range(levels)]


def _by_profile(colours: Image.Image, profile: bytes | None) -> Image.Image | None:
    """Return the colours as sRGB by this ICC profile; None without one, and if it is damaged or made for colours of another kind."""
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
        if (mode, colours.mode) == ("RGB", "L"):
            colours = colours.convert("RGB")
        if colours.mode == mode:
            return ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        pass
    return None
