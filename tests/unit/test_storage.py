"""The folder storage: keys stay inside, files are whole, faults say what and where."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movieq.errors import Expired, InvalidSignature, StorageFault
from movieq.storage.base import checked_key, content_type
from movieq.storage.folder import FolderStorage

KEY = "projects/p-1/video/0190/run_a/output.mp4"
NOT_KEYS = [
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "../x",
    "a/../b",
    "a/..",
    "a/./b",
    "a//b",
    "a/",
    "/a",
    "a\\b",
    "..\\b",
    "C:/x",
    "a\0b",
    "a\nb",
    "a/b\n",
    "a b",
    ".hidden",
    "a/.tmp",
    "a/%2e%2e/b",
    "é",
    "~",
    "a" * 201,
    "a/" * 600 + "a",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "media"


@pytest.fixture
def storage(root: Path) -> FolderStorage:
    return FolderStorage(root, "https://m.example/", (b"key",))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(os.urandom(300_000))
    return path


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


async def test_what_is_put_can_be_opened_measured_and_deleted(storage: FolderStorage, root: Path, clip: Path, tmp_path: Path) -> None:
    assert await storage.put(KEY, clip, "video/mp4") == 300_000
    assert await storage.size(KEY) == 300_000
    assert await storage.open(KEY, tmp_path / "copy") == 300_000
    assert (tmp_path / "copy").read_bytes() == storage.local_path(KEY).read_bytes() == clip.read_bytes()
    assert [name for name in files(root) if (root / name).is_file()] == [KEY]
    await storage.delete(KEY)
    assert files(root) == []


async def test_what_is_absent_is_none_and_its_deletion_no_error(storage: FolderStorage, tmp_path: Path) -> None:
    assert await storage.size(KEY) is None
    assert await storage.open(KEY, tmp_path / "copy") is None
    assert not (tmp_path / "copy").exists()
    await storage.delete(KEY)
    await storage.delete_prefix("projects/p-1")


async def test_a_folder_of_keys_is_no_file(storage: FolderStorage, clip: Path, tmp_path: Path) -> None:
    await storage.put(KEY, clip, "video/mp4")
    assert await storage.size("projects/p-1") is None
    assert await storage.open("projects/p-1", tmp_path / "copy") is None


async def test_the_same_bytes_can_be_put_again_and_others_cannot(storage: FolderStorage, clip: Path, tmp_path: Path) -> None:
    await storage.put(KEY, clip, "video/mp4")
    assert await storage.put(KEY, clip, "video/mp4") == 300_000
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with pytest.raises(StorageFault, match="other bytes"):
        await storage.put(KEY, other, "video/mp4")
    assert storage.local_path(KEY).read_bytes() == clip.read_bytes()
    assert [path.name for path in storage.local_path(KEY).parent.iterdir()] == ["output.mp4"]


async def test_of_many_that_put_different_bytes_at_once_one_wins_whole(storage: FolderStorage, tmp_path: Path) -> None:
    sources = [tmp_path / str(number) for number in range(8)]
    for number, source in enumerate(sources):
        source.write_bytes(bytes([number]) * 200_000)
    outcomes = await asyncio.gather(*(storage.put(KEY, source, "video/mp4") for source in sources), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["KeyTaken"] * 7 + ["int"]
    winner = next(number for number, outcome in enumerate(outcomes) if outcome == 200_000)
    assert storage.local_path(KEY).read_bytes() == bytes([winner]) * 200_000


async def test_a_reader_never_sees_a_part_of_a_file(storage: FolderStorage, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(bytes(20_000_000))
    put = asyncio.create_task(storage.put(KEY, source, "video/mp4"))
    seen: set[int | None] = set()
    while not put.done():
        seen.add(await storage.size(KEY))
    assert await put == 20_000_000
    assert seen <= {None, 20_000_000}


async def test_deleting_a_prefix_takes_its_folder_and_empty_parents_but_no_neighbour(
    storage: FolderStorage, root: Path, clip: Path
) -> None:
    for key in ("p/t/run/output.mp4", "p/t/run/poster.jpg", "p/t/run2/output.mp4", "q/run/a.png"):
        await storage.put(key, clip, content_type(key))
    (root / "p/t/run/.0123.tmp").write_bytes(b"left by a worker that was killed")
    await storage.delete_prefix("p/t/run/")
    await storage.delete_prefix("q/run")
    assert files(root) == ["p", "p/t", "p/t/run2", "p/t/run2/output.mp4"]


async def test_puts_survive_deletions_that_take_away_empty_folders_next_door(storage: FolderStorage, root: Path, clip: Path) -> None:
    for number in range(40):
        await asyncio.gather(
            *(storage.put(f"p/{number}/{name}.mp4", clip, "video/mp4") for name in "ab"),
            *(storage.delete(f"p/{number}/{name}.jpg") for name in "abcdef"),
        )
        await storage.delete_prefix(f"p/{number}")
    assert files(root) == []


@pytest.mark.parametrize("key", NOT_KEYS)
async def test_no_method_takes_what_is_not_a_key(storage: FolderStorage, root: Path, clip: Path, key: str) -> None:
    (root.parent / "outside").write_text("kept")
    for call in (storage.put(key, clip, "video/mp4"), storage.open(key, clip), storage.size(key), storage.delete(key)):
        with pytest.raises(ValueError, match="not a storage key"):
            await call
    with pytest.raises(ValueError, match="not a storage key"):
        storage.url(key, 1)
    if not key.endswith("a/"):  # a prefix may end in a slash
        with pytest.raises(ValueError, match="not a storage key"):
            await storage.delete_prefix(key)
    assert not root.exists()


@given(st.text(alphabet=st.sampled_from("a.b/\\%~\0 \n-_:e\u0301\uff0e"), max_size=30))
def test_every_key_lies_inside_the_root(text: str) -> None:
    storage = FolderStorage(Path("/srv/media"), "https://m.example", (b"key",))
    try:
        path = storage.local_path(text)
    except ValueError:
        return
    assert Path(os.path.normpath(path)) == path
    assert path.is_relative_to("/srv/media/")
    assert path != Path("/srv/media")


async def test_a_file_where_a_folder_should_be_is_a_storage_fault_that_names_key_and_folder(
    storage: FolderStorage, root: Path, clip: Path
) -> None:
    root.mkdir()
    (root / "projects").write_text("in the way")
    with pytest.raises(StorageFault) as raised:
        await storage.put(KEY, clip, "video/mp4")
    assert raised.value.retryable
    assert KEY in raised.value.message
    assert str(root) in raised.value.message
    assert await storage.size(KEY) is None


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """A disk that fills up: the kernel refuses what a file grows beyond this, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_disk_that_fills_up_leaves_no_part_of_the_file(storage: FolderStorage, root: Path, clip: Path, tmp_path: Path) -> None:
    with files_of_at_most(100_000), pytest.raises(StorageFault, match="cannot store"):
        await storage.put(KEY, clip, "video/mp4")
    assert [name for name in files(root) if (root / name).is_file()] == []
    assert await storage.put(KEY, clip, "video/mp4") == 300_000
    with files_of_at_most(100_000), pytest.raises(StorageFault, match="cannot read"):
        await storage.open(KEY, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


async def test_a_source_that_is_gone_is_a_storage_fault(storage: FolderStorage, tmp_path: Path) -> None:
    with pytest.raises(StorageFault, match="No such file"):
        await storage.put(KEY, tmp_path / "absent", "video/mp4")


async def test_a_folder_that_cannot_be_written_is_not_usable(storage: FolderStorage, root: Path) -> None:
    assert await storage.usable()
    root.rmdir()
    root.write_text("in the way")
    assert not await storage.usable()


@pytest.fixture
def address(storage: FolderStorage) -> tuple[str, str, str]:
    """Key, expires and signature as a route gets them from `url`."""
    parts = urlsplit(storage.url(KEY, 1_800_000_000))
    assert (parts.scheme, parts.netloc) == ("https", "m.example")
    query = parse_qs(parts.query, strict_parsing=True)
    return parts.path.removeprefix("/media/"), query["expires"][0], query["signature"][0]


def test_an_address_opens_until_it_expires(storage: FolderStorage, address: tuple[str, str, str]) -> None:
    storage.verify(*address, now_s=1_800_000_000.0)
    with pytest.raises(Expired):
        storage.verify(*address, now_s=1_800_000_001.0)


def test_an_address_opens_nothing_else(storage: FolderStorage, address: tuple[str, str, str]) -> None:
    _, expires, signature = address
    for key in ("projects/p-1/video/0190/run_a/poster.jpg", "../" + KEY, KEY + "/", ""):
        with pytest.raises(InvalidSignature):
            storage.verify(key, expires, signature, now_s=0)
    with pytest.raises(InvalidSignature):
        FolderStorage(Path("/x"), "https://m.example", (b"another key",)).verify(*address, now_s=0)


@pytest.mark.parametrize(
    ("key", "media_type"),
    [
        ("a/output.mp4", "video/mp4"),
        ("a/poster.jpg", "image/jpeg"),
        ("a/output.PNG", "image/png"),
        ("a/output.webp", "image/webp"),
        ("a/output.avif", "image/avif"),
        ("a/output.tif", "image/tiff"),
        ("a/output.mp3", "audio/mpeg"),
        ("a/output.wav", "audio/wav"),
        ("a/output.flac", "audio/flac"),
        ("a/output.html", "application/octet-stream"),
        ("a/output", "application/octet-stream"),
    ],
)
def test_the_extension_says_the_type(key: str, media_type: str) -> None:
    assert content_type(checked_key(key)) == media_type
