"""Stills of any kind become RGB pictures of the frame's shape: turned as the camera was held, never stretched, nothing left transparent."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageEnhance, ImageFilter, ImageOps

from movieq.errors import InvalidInput
from workers.child.job import shown
from workers.faults import without_paths

MAX_PIXELS = 40_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "TGA")
"""What is decoded. Not EPS or PDF, for which Pillow starts programs."""

COVER_LOSS = 0.125
"""A still that loses at most this share of itself by filling the frame is cropped (16:10 in 16:9); others stand on their own blur."""

GROUND = (118, 116, 112)  # behind transparent parts: mid grey, so that black ink and white chalk both show

_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, ArithmeticError)
"""What Pillow's decoders raise on bytes that are not what they claim to be."""


def check(reference: str, path: Path) -> None:
    """Raises InvalidInput where the file does not even begin like a picture, or is too large: found out before any work is done."""
    with _decoding(reference, path), Image.open(path, formats=FORMATS):
        pass


def load(reference: str, path: Path, most: tuple[int, int]) -> Image.Image:
    """The still as RGB, upright, in sRGB, opaque, and at most about twice as large as `most` needs.

    Raises InvalidInput naming the reference where it is no picture, is damaged, or has more than 40 megapixels.
    """
    return opaque(load_cut_out(reference, path, most))


def load_cut_out(reference: str, path: Path, most: tuple[int, int]) -> Image.Image:
    """As `load`, but RGBA where the still has transparent parts."""
    with _decoding(reference, path), Image.open(path, formats=FORMATS) as image:
        image.draft(None, (most[0] * 2, most[1] * 2))  # JPEG alone: decoded at a half, a quarter or an eighth
        image.load()
        still = _srgb(ImageOps.exif_transpose(image))
        factor = min(still.width // (2 * most[0]), still.height // (2 * most[1]))
        return still.reduce(factor) if factor > 1 else still


def opaque(still: Image.Image) -> Image.Image:
    """RGB of RGB or RGBA: transparent parts show a mid grey ground."""
    if still.mode == "RGB":
        return still
    ground = Image.new("RGB", still.size, GROUND)
    ground.paste(still, mask=still.getchannel("A"))
    return ground


@contextmanager
def _decoding(reference: str, path: Path) -> Iterator[None]:
    """Pillow's errors in our words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable files (EXIF, TIFF tags)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{shown(reference)} has more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except _UNDECODABLE as error:
        raise InvalidInput(f"{shown(reference)} is no picture that can be read ({without_paths(str(error), path)})") from error


def fill(still: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The still in a frame of `size`: it fills it where that loses little, else it stands whole on its own blurred, darkened copy."""
    width, height = size
    cover = _cover_box(still, size)
    kept = (cover[2] - cover[0]) * (cover[3] - cover[1]) / (still.width * still.height)
    if kept >= 1 - COVER_LOSS:
        return still.resize(size, Image.Resampling.LANCZOS, box=cover, reducing_gap=3.0)
    scale = min(width / still.width, height / still.height)
    inner = still.resize(
        (max(1, round(still.width * scale)), max(1, round(still.height * scale))), Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    frame = blurred(still, size)
    frame.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return frame


def blurred(still: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The still over the whole frame, out of focus and darker. Blurred small and enlarged: sixty times cheaper, and as soft."""
    cover = _cover_box(still, size)
    small = (max(1, size[0] // 8), max(1, size[1] // 8))
    soft = still.resize(small, Image.Resampling.BICUBIC, box=cover, reducing_gap=2.0).filter(ImageFilter.GaussianBlur(max(small) / 30))
    return ImageEnhance.Brightness(soft.resize(size, Image.Resampling.BICUBIC)).enhance(0.55)


def _cover_box(still: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The middle of the still that has the frame's shape."""
    scale = max(size[0] / still.width, size[1] / still.height)
    width, height = min(still.width, size[0] / scale), min(still.height, size[1] / scale)
    left, top = (still.width - width) / 2, (still.height - height) / 2
    return left, top, left + width, top + height


def _srgb(image: Image.Image) -> Image.Image:
    """RGB or RGBA of any mode: 16 bits and floats are scaled, CMYK and wide gamuts go through their profile where they carry one."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        top = next((top for top in (1.0, 255.0, 65535.0) if values.max(initial=0) <= top), float(values.max(initial=1)))
        return Image.fromarray((values.clip(0) * (255 / top)).astype(np.uint8)).convert("RGB")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            converted = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile: take the numbers as they are
        else:
            assert converted is not None
            return converted
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
