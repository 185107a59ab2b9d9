"""Decoding stills of any kind to RGB: upright, in sRGB, without transparency; and filling a frame with a still without stretching it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageCms, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

from movieq.errors import InvalidInput
from movieq.fetch import formats
from workers.faults import abbreviated, without_paths

MAX_PIXELS = 40_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

MAX_CROP_SHARE = 0.125
"""A still that loses at most this share of its area by filling the frame is cropped (16:10 in 16:9); others get a background."""

TRANSPARENCY_COLOUR = (118, 116, 112)  # mid grey, so that both black ink and white chalk show on it

_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, ArithmeticError)
"""What Pillow's decoders raise on damaged files."""


def check(reference: str, path: Path) -> None:
    """Raise InvalidInput if the file's header is not that of an image, or the image is too large. Cheap: nothing is decoded."""
    with _decoding(reference, path), _opened(path):
        pass


def load(reference: str, path: Path, frame_size: tuple[int, int]) -> Image.Image:
    """Return the still as RGB, upright, in sRGB, without transparency, at most about twice as large as `frame_size` needs.

    Raises InvalidInput naming the reference if it is no image, is damaged, or has more than 40 megapixels.
    """
    return flatten_alpha(load_with_alpha(reference, path, frame_size))


def load_with_alpha(reference: str, path: Path, frame_size: tuple[int, int]) -> Image.Image:
    """Return the still like `load`, but as RGBA if it has transparent parts."""
    with _decoding(reference, path), _opened(path) as image:
        image.draft(None, (frame_size[0] * 2, frame_size[1] * 2))  # JPEG only: decoded at a half, a quarter or an eighth
        image.load()
        still = _to_srgb(ImageOps.exif_transpose(image))
        factor = min(still.width // (2 * frame_size[0]), still.height // (2 * frame_size[1]))
        return still.reduce(factor) if factor > 1 else still


def flatten_alpha(still: Image.Image) -> Image.Image:
    """Return RGB of RGB or RGBA: transparent parts become mid grey."""
    if still.mode == "RGB":
        return still
    ground = Image.new("RGB", still.size, TRANSPARENCY_COLOUR)
    ground.paste(still, mask=still.getchannel("A"))
    return ground


def _opened(path: Path) -> Image.Image:
    """Open the file as what its first bytes show. Raises UnidentifiedImageError if that is no image."""
    if (pinned := formats.decoder(path, formats.Kind.IMAGE)) is None:
        raise UnidentifiedImageError("it is of an unknown kind")
    return Image.open(path, formats=(pinned,))


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


def _to_srgb(image: Image.Image) -> Image.Image:
    """Return RGB or RGBA of any mode: 16-bit and float values are scaled, CMYK and wide gamuts converted by their ICC profile."""
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image)
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            converted = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile: treat the values as sRGB
        else:
            assert converted is not None
            return converted
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return RGB of an image with 16-bit, 32-bit or float values."""
    import numpy as np  # only here: the probe decodes the inputs of every task, and they seldom need it

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    top = next((top for top in (1.0, 255.0, 65535.0) if values.max(initial=0) <= top), float(values.max(initial=1)))
    return Image.fromarray((values.clip(0) * (255 / top)).astype(np.uint8)).convert("RGB")
