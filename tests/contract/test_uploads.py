"""Uploads: images and sounds are recognised by their bytes, limited in size, and belong to one project; all else is refused."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from PIL import Image

from movieq.queue.files import Files
from movieq.queue.keys import KEYS
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.tasks.states import ProjectId
from tests.arrange import raw
from tests.contract.client import FILM, Client

UPLOADS = "/api/v1/projects/film/uploads"
MIB = 1024 * 1024


def image(kind: str, size: tuple[int, int] = (16, 8), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return the beginning of a PNG that declares this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(b"\0\0" * 800)
    return file.getvalue()


def stored(settings: Settings) -> list[Path]:
    """Return all files in the storage."""
    assert isinstance(settings.storage, Path)
    return [path for path in settings.storage.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        (image("PNG"), "image/png"),
        (image("JPEG"), "image/jpeg"),
        (image("JPEG", mode="CMYK"), "image/jpeg"),
        (image("PNG", mode="I;16"), "image/png"),
        (image("PNG", mode="RGBA"), "image/png"),
        (image("PNG", (1, 10_000)), "image/png"),
        (image("WEBP"), "image/webp"),
        (image("GIF"), "image/gif"),
        (image("BMP"), "image/bmp"),
        (image("TIFF"), "image/tiff"),
        (image("AVIF"), "image/avif"),
        (sound(), "audio/wav"),
        (b"fLaC" + bytes(100), "audio/flac"),
        (b"ID3\x04" + bytes(100), "audio/mpeg"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_upload_is_what_its_bytes_are(api: Client, settings: Settings, body: bytes, media_type: str) -> None:
    answer = await api.post(UPLOADS, key=FILM, data=body, headers={"Content-Type": "text/html"})
    told = answer.json
    assert (answer.status, told["size"], told["media_type"], told["url"]) == (201, len(body), media_type, f"upload:{told['upload_id']}")
    assert [path.read_bytes() for path in stored(settings)] == [body]


async def test_an_upload_is_kept_for_seven_days(api: Client, store: Store) -> None:
    upload_id = (await api.post(UPLOADS, data=image("PNG"))).json["upload_id"]
    assert 7 * 86_400 - 60 < await raw(store).ttl(KEYS["upload"] + upload_id) <= 7 * 86_400
    (expiry,) = [score for _, score in await raw(store).zrange(KEYS["orphans"], 0, -1, withscores=True)]
    assert expiry / 1000 == pytest.approx((await raw(store).time())[0] + 7 * 86_400, abs=60)


async def test_an_upload_belongs_to_its_project(api: Client, store: Store) -> None:
    upload_id = (await api.post(UPLOADS, data=image("PNG"))).json["upload_id"]
    upload = await Files(store.redis).upload(upload_id)
    assert upload is not None
    assert upload.project_id == ProjectId("film")


async def test_two_uploads_of_the_same_bytes_are_two(api: Client) -> None:
    assert len({(await api.post(UPLOADS, data=image("PNG"))).json["upload_id"] for _ in range(2)}) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"<!doctype html><html><body><img src=x></body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"PK\x03\x04",
        b"\x7fELF",
        b"\0" * 1000,
        b"x",
        b"RIFF\0\0\0\0AVI LIST",
        b"BM is how this text begins",
        image("JPEG")[:20],
        image("JPEG")[:3],
        image("PNG")[:12],
        png_header(60_000, 60_000),
        png_header(0, 10),
        png_header(10_000, 4_001),
        b"GIF89a",
    ],
    ids=lambda value: ascii(value)[:30],
)
async def test_what_is_neither_an_image_nor_a_sound_is_refused_and_not_kept(api: Client, settings: Settings, body: bytes) -> None:
    answer = await api.post(UPLOADS, data=body, headers={"Content-Type": "image/png"})
    assert (answer.status, answer.error) == (400, "validation_failed")
    assert stored(settings) == []


async def test_an_empty_upload_is_refused(api: Client) -> None:
    answer = await api.post(UPLOADS, data=b"")
    assert (answer.status, answer.error) == (400, "validation_failed")
    assert "empty" in answer.message


async def test_a_compressed_upload_is_refused(api: Client) -> None:
    answer = await api.post(UPLOADS, data=image("PNG"), headers={"Content-Encoding": "gzip"})
    assert (answer.status, answer.error) == (400, "validation_failed")


async def zeros(size: int) -> AsyncIterator[bytes]:
    """Yield a PNG, followed by zeros up to this size."""
    head = image("PNG")
    yield head
    for _ in range((size - len(head)) // MIB):
        yield bytes(MIB)
    yield bytes((size - len(head)) % MIB)


async def test_25_mib_are_accepted(api: Client) -> None:
    answer = await api.post(UPLOADS, data=zeros(25 * MIB))
    assert (answer.status, answer.json["size"]) == (201, 25 * MIB)


async def test_a_byte_more_is_too_large_also_in_chunks(api: Client, settings: Settings) -> None:
    answer = await api.post(UPLOADS, data=zeros(25 * MIB + 1))
    assert (answer.status, answer.error) == (413, "payload_too_large")
    assert str(25 * MIB) in answer.message
    assert stored(settings) == []


@pytest.mark.parametrize("declared", [25 * MIB + 1, 10**15, 2**63 - 1])
async def test_a_body_that_declares_more_is_refused_before_it_is_sent(api: Client, declared: int) -> None:
    head = f"POST {UPLOADS} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-API-Key: {FILM}\r\nContent-Length: {declared}\r\n\r\n"
    assert (await api.raw(head.encode())).startswith(b"HTTP/1.1 413")
