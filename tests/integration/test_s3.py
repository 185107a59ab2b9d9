"""Storage in a bucket: a real S3 server, behind what R2 refuses, with all faults of a server and its network."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from movieq.errors import KeyTaken, SettingsError, StorageFault
from movieq.settings import Bucket, load
from movieq.storage import s3
from movieq.storage.s3 import S3Storage
from tests.fleet import WAIT_S, eventually
from tests.r2 import R2, get, put, r2
from tests.seaweed import KEY_ID, SECRET, Seaweed, seaweed
from tests.service import fetched

KEY = "projects/p-1/video/0190/run_a/output.mp4"
PART = s3.PART_BYTES
LEAST_PART = 5 * 1024**2
LARGE_BYTES = s3.SINGLE_BYTES + PART + 12345


@pytest.fixture
async def storage(bucket: Bucket) -> AsyncIterator[S3Storage]:
    async with s3.opened(bucket, patient=True) as installation:
        yield installation


@pytest.fixture
async def far(s3_server: Seaweed) -> AsyncIterator[R2]:
    """Yield the server as R2."""
    async with r2(s3_server.endpoint) as installation:
        yield installation


@pytest.fixture
async def remote(bucket: Bucket, far: R2) -> AsyncIterator[S3Storage]:
    """Yield the storage in the bucket of that R2."""
    async with s3.opened(msgspec.structs.replace(bucket, endpoint=far.endpoint), patient=True) as installation:
        yield installation


@pytest.fixture
def clip(folder: Path) -> Path:
    path = folder / "clip.mp4"
    path.write_bytes(os.urandom(300_000))
    return path


@pytest.fixture
def large(folder: Path) -> Path:
    path = folder / "large.mp4"
    path.write_bytes(os.urandom(PART) * (LARGE_BYTES // PART) + os.urandom(LARGE_BYTES % PART))
    return path


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Upload files in parts from a small size on; return the size of a file with five parts."""
    monkeypatch.setattr(s3, "SINGLE_BYTES", LEAST_PART)
    monkeypatch.setattr(s3, "PART_BYTES", LEAST_PART)
    return 4 * LEAST_PART + 12345


@pytest.fixture
def parted(folder: Path, in_parts: int) -> Path:
    path = folder / "parted.mp4"
    path.write_bytes(os.urandom(in_parts))
    return path


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def unfinished(server: Seaweed, bucket: Bucket) -> int:
    """Return the number of multipart uploads that were neither completed nor aborted."""
    async with server.client() as client:
        return len((await client.list_multipart_uploads(Bucket=bucket.name, Prefix=bucket.prefix)).get("Uploads", []))


# ── What it keeps ──


async def test_what_is_put_can_be_opened_measured_and_deleted(storage: S3Storage, clip: Path, folder: Path) -> None:
    assert await storage.put(KEY, clip, "video/mp4") == 300_000
    assert await storage.size(KEY) == 300_000
    assert await storage.open(KEY, folder / "copy") == 300_000
    assert (folder / "copy").read_bytes() == clip.read_bytes()
    await storage.delete(KEY)
    assert await storage.size(KEY) is None


async def test_what_is_absent_is_none_and_its_deletion_no_error(storage: S3Storage, folder: Path) -> None:
    assert await storage.size(KEY) is None
    assert await storage.open(KEY, folder / "copy") is None
    assert not (folder / "copy").exists()
    await storage.delete(KEY)
    await storage.delete_prefix("projects/p-1")


async def test_a_file_opens_in_a_browser_with_its_type_and_can_be_cached(storage: S3Storage, clip: Path) -> None:
    await storage.put(KEY, clip, "video/mp4")
    status, headers, body = await fetched(storage.url(KEY, int(time.time()) + 60))
    assert (status, body) == (200, clip.read_bytes())
    assert (headers["Content-Type"], headers["Cache-Control"]) == ("video/mp4", "private, max-age=604800, immutable")


async def test_an_address_opens_until_it_expires_and_nothing_else(storage: S3Storage, clip: Path) -> None:
    await storage.put(KEY, clip, "video/mp4")
    now = int(time.time())
    short, week = storage.url(KEY, now + 1), storage.url(KEY, now + 30 * 86400)
    assert "X-Amz-Expires=604800&" in week  # no longer is allowed
    assert storage.url(KEY, now + 30 * 86400) == week  # so that caches can work
    assert (await fetched(week.replace("output", "poster")))[0] == 403

    async def expired() -> bool:
        return (await fetched(short))[0] == 403

    await eventually(expired)
    assert (await fetched(week))[0] == 200


async def test_a_public_bucket_hands_out_its_own_addresses(bucket: Bucket, clip: Path) -> None:
    public = msgspec.structs.replace(bucket, public_url="https://media.example")
    async with s3.opened(public, patient=True) as storage:
        assert storage.url(KEY, 1) == f"https://media.example/{bucket.prefix}{KEY}"


@pytest.mark.parametrize("key", ["", "..", "a/../b", "/a", "a//b", "a\nb", "é", "a/.tmp", "a?b", "a b"])
async def test_no_method_takes_what_is_not_a_key(storage: S3Storage, clip: Path, key: str) -> None:
    for call in (storage.put(key, clip, "video/mp4"), storage.open(key, clip.with_name("x")), storage.size(key), storage.delete(key)):
        with pytest.raises(ValueError, match="not a storage key"):
            await call
    with pytest.raises(ValueError, match="not a storage key"):
        storage.url(key, 1)
    with pytest.raises(ValueError, match="not a storage key"):
        await storage.delete_prefix(key)


# ── Written once and whole ──


async def test_the_same_bytes_can_be_put_again_and_others_cannot(storage: S3Storage, clip: Path, folder: Path) -> None:
    for _ in range(2):
        assert await storage.put(KEY, clip, "video/mp4") == 300_000
    for other in (b"other", bytes(300_000)):
        (folder / "other").write_bytes(other)
        with pytest.raises(KeyTaken, match="other bytes"):
            await storage.put(KEY, folder / "other", "video/mp4")
    await storage.open(KEY, folder / "copy")
    assert (folder / "copy").read_bytes() == clip.read_bytes()


async def test_of_many_that_put_different_bytes_at_once_one_wins_whole(storage: S3Storage, folder: Path) -> None:
    sources = [folder / str(number) for number in range(8)]
    for number, source in enumerate(sources):
        source.write_bytes(bytes([number]) * 200_000)
    outcomes = await asyncio.gather(*(storage.put(KEY, source, "video/mp4") for source in sources), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["KeyTaken"] * 7 + ["int"]
    await storage.open(KEY, folder / "copy")
    assert (folder / "copy").read_bytes() == sources[outcomes.index(200_000)].read_bytes()


async def test_a_server_without_conditions_is_looked_at_before_it_is_written_to(
    remote: S3Storage, far: R2, clip: Path, folder: Path
) -> None:
    far.answer(501, "NotImplemented", lambda request: "If-None-Match" in request.headers, times=100)
    for _ in range(2):
        assert await remote.put(KEY, clip, "video/mp4") == 300_000
    (folder / "other").write_bytes(bytes(300_000))
    with pytest.raises(KeyTaken):
        await remote.put(KEY, folder / "other", "video/mp4")


async def test_an_answer_that_was_lost_is_no_other_file(remote: S3Storage, far: R2, clip: Path) -> None:
    passed_on = far.passed_on

    async def lose(request: Any) -> Any:
        answer = await passed_on(request)
        if request.method == "PUT":
            far.passed_on = passed_on  # type: ignore[method-assign]  # once
            request.transport.abort()
        return answer

    far.passed_on = lose  # type: ignore[method-assign]  # the server has done it, the client hears nothing
    assert await remote.put(KEY, clip, "video/mp4") == 300_000


async def test_deleting_a_prefix_takes_what_lies_under_it_and_unfinished_parts_but_no_neighbour(
    storage: S3Storage, s3_server: Seaweed, bucket: Bucket, clip: Path
) -> None:
    for key in ("p/t/run/output.mp4", "p/t/run/poster.jpg", "p/t/run2/output.mp4"):
        await storage.put(key, clip, "video/mp4")
    async with s3_server.client() as client:
        for key in ("p/t/run/output.mp4", "p/t/run2/big.mp4"):
            await client.create_multipart_upload(Bucket=bucket.name, Key=bucket.prefix + key)
    await storage.delete_prefix("p/t/run/")
    assert [await storage.size(f"p/t/{key}") for key in ("run/output.mp4", "run/poster.jpg", "run2/output.mp4")] == [None, None, 300_000]
    assert await unfinished(s3_server, bucket) == 1


# ── As R2 wants it ──


async def test_a_large_file_goes_in_equal_parts_four_at_a_time_and_nothing_that_r2_refuses(
    remote: S3Storage, far: R2, large: Path, clip: Path, folder: Path
) -> None:
    await remote.put(KEY, clip, "video/mp4")
    await remote.put("large.mp4", large, "video/mp4")
    assert far.refused == []
    assert sum("partNumber" in line for line in far.asked) == LARGE_BYTES // PART + 1
    assert far.parts_at_once == 4
    assert await remote.open("large.mp4", folder / "copy") == LARGE_BYTES
    assert digest(folder / "copy") == digest(large)
    status, headers, _ = await fetched(remote.url("large.mp4", int(time.time()) + 60))
    assert (status, headers["Content-Type"]) == (200, "video/mp4")


async def test_the_proxy_refuses_what_aiobotocore_sends_unless_it_is_told_not_to(s3_server: Seaweed, bucket: Bucket, far: R2) -> None:
    async with s3_server.client(far.endpoint) as client:
        with pytest.raises(Exception, match="Unauthorized"):
            await client.put_object(Bucket=bucket.name, Key="a", Body=b"x")
    assert "checksum" in far.refused[0].lower()


async def test_a_part_that_fails_for_good_takes_the_others_with_it(
    remote: S3Storage, far: R2, s3_server: Seaweed, bucket: Bucket, parted: Path
) -> None:
    far.answer(400, "InvalidPart", lambda request: request.query.get("partNumber") == "3", times=9)
    with pytest.raises(StorageFault, match="InvalidPart"):
        await remote.put(KEY, parted, "video/mp4")
    assert await unfinished(s3_server, bucket) == 0
    assert await remote.size(KEY) is None


async def test_a_put_that_is_cancelled_leaves_no_parts(
    remote: S3Storage, far: R2, s3_server: Seaweed, bucket: Bucket, parted: Path
) -> None:
    far.hang(lambda request: request.query.get("partNumber") == "3")
    putting = asyncio.create_task(remote.put(KEY, parted, "video/mp4"))
    await far.happened.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert await unfinished(s3_server, bucket) == 0


# ── Faults ──


async def test_wrong_keys_and_a_missing_bucket_are_for_the_operator_who_is_told_what_to_mend(bucket: Bucket, clip: Path) -> None:
    for wrong, cure in [
        ({"secret": "another-secret"}, "check MOVIEQ_R2_ACCESS_KEY_ID and MOVIEQ_R2_SECRET_ACCESS_KEY"),
        ({"key_id": "AKIANOBODY0000000000"}, "check MOVIEQ_R2_ACCESS_KEY_ID and MOVIEQ_R2_SECRET_ACCESS_KEY"),
        ({"name": "no-such-bucket"}, "create it, or correct MOVIEQ_STORAGE"),
    ]:
        async with s3.opened(msgspec.structs.replace(bucket, **wrong), patient=True) as storage:
            assert not await storage.usable()
            with pytest.raises(StorageFault, match=cure) as raised:
                await storage.put(KEY, clip, "video/mp4")
            assert not raised.value.passes
            assert KEY in raised.value.message
            assert "secret" not in raised.value.message.lower().replace("movieq_r2_secret_access_key", "")


@pytest.mark.parametrize(
    ("status", "code", "passes", "said"),
    [
        (503, "SlowDown", True, "overloaded"),
        (500, "InternalError", True, "InternalError"),
        (507, "InsufficientStorage", False, "make room"),
        (403, "QuotaExceeded", False, "make room"),
        (403, "RequestTimeTooSkewed", False, "clock"),
        (401, "Unauthorized", False, "check MOVIEQ_R2_ACCESS_KEY_ID"),
        (400, "RequestTimeout", True, "RequestTimeout"),
    ],
)
async def test_each_refusal_says_whether_it_passes(
    remote: S3Storage, far: R2, clip: Path, at_once: None, status: int, code: str, passes: bool, said: str
) -> None:
    far.answer(status, code, put, times=99)
    with pytest.raises(StorageFault, match=said) as raised:
        await remote.put(KEY, clip, "video/mp4")
    assert raised.value.passes == passes
    far.heal()
    assert await remote.put(KEY, clip, "video/mp4") == 300_000


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without a pause."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    """Wait at most two seconds for a server."""
    monkeypatch.setattr(s3, "ANSWER_S", (2.0, 2.0))
    monkeypatch.setattr(s3, "IDLE_S", 2.0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "fault",
    [
        lambda far: far.answer(503, "SlowDown", put, times=2),
        lambda far: far.cut(put, after_bytes=100_000, times=2),
        lambda far: far.cut(put, times=2),
        lambda far: far.hang(put),
    ],
    ids=["slow down", "cut half way", "cut at once", "hangs"],
)
async def test_what_passes_is_tried_again_and_the_file_is_whole(
    bucket: Bucket, far: R2, clip: Path, folder: Path, fault: Callable[[R2], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with s3.opened(msgspec.structs.replace(bucket, endpoint=far.endpoint), patient=True) as remote:
        monkeypatch.setattr(s3, "IDLE_S", 10.0)
        fault(far)
        assert await remote.put(KEY, clip, "video/mp4") == 300_000
        await remote.open(KEY, folder / "copy")
    assert (folder / "copy").read_bytes() == clip.read_bytes()


@pytest.mark.usefixtures("quick")
async def test_a_server_that_takes_nothing_does_not_hold_anybody_for_ever(bucket: Bucket, far: R2, parted: Path) -> None:
    async with s3.opened(msgspec.structs.replace(bucket, endpoint=far.endpoint), patient=True) as remote:
        far.hang(put, times=99)
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(StorageFault) as raised:
                await remote.put(KEY, parted, "video/mp4")
        assert raised.value.passes


async def test_a_download_that_breaks_off_leaves_no_part_of_the_file(
    remote: S3Storage, far: R2, clip: Path, folder: Path, at_once: None
) -> None:
    await remote.put(KEY, clip, "video/mp4")
    far.cut(get, times=99)
    with pytest.raises(StorageFault) as raised:
        await remote.open(KEY, folder / "copy")
    assert raised.value.passes
    assert not (folder / "copy").exists()


async def test_a_source_that_is_gone_is_named(storage: S3Storage, folder: Path) -> None:
    with pytest.raises(StorageFault, match="absent"):
        await storage.put(KEY, folder / "absent", "video/mp4")


async def test_a_server_that_is_killed_half_way_has_the_whole_file_when_it_is_back(folder: Path, parted: Path, at_once: None) -> None:
    with seaweed(folder / "own") as server:
        await server.make_bucket("film")
        async with r2(server.endpoint) as between:
            bucket = Bucket("film", "", between.endpoint, KEY_ID, SECRET)
            async with s3.opened(bucket, patient=True) as remote:
                putting = asyncio.create_task(remote.put(KEY, parted, "video/mp4"))
                while sum("partNumber" in line for line in between.asked) < 2:
                    await asyncio.sleep(0.001)
                server.kill()
                with pytest.raises(StorageFault) as raised:
                    await putting
                assert raised.value.passes
                assert not await remote.usable()
                server.start()
                assert await remote.put(KEY, parted, "video/mp4") == parted.stat().st_size
                await remote.open(KEY, folder / "copy")
                await remote.delete_prefix("projects")
                assert await unfinished(server, bucket) == 0
    assert digest(folder / "copy") == digest(parted)


async def test_a_disk_that_fills_up_leaves_nothing_under_the_key(folder: Path, parted: Path, at_once: None) -> None:
    with seaweed(folder / "own") as server:
        await server.make_bucket("film")
        psutil.Process(server.pid).rlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
        bucket = Bucket("film", "", server.endpoint, KEY_ID, SECRET)
        async with s3.opened(bucket, patient=True) as storage:
            with pytest.raises(StorageFault):
                await storage.put(KEY, parted, "video/mp4")
            assert await storage.size(KEY) is None


async def test_health_asks_the_server_once_in_a_while_only(remote: S3Storage, far: R2) -> None:
    assert [await remote.usable() for _ in range(20)] == [True] * 20
    assert len(far.asked) == 1


# ── Settings ──


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MOVIEQ_STORAGE": "s3://"}, "MOVIEQ_STORAGE"),
        ({"MOVIEQ_STORAGE": "s3://Film"}, "MOVIEQ_STORAGE"),
        ({"MOVIEQ_STORAGE": "s3://film/../x"}, "MOVIEQ_STORAGE"),
        ({"MOVIEQ_R2_ENDPOINT": ""}, "needs MOVIEQ_R2_ENDPOINT"),
        ({"MOVIEQ_R2_SECRET_ACCESS_KEY": ""}, "needs MOVIEQ_R2_SECRET_ACCESS_KEY"),
        ({"MOVIEQ_R2_ENDPOINT": "r2.example"}, "MOVIEQ_R2_ENDPOINT: it takes an address"),
        ({"MOVIEQ_R2_PUBLIC_URL": "media"}, "MOVIEQ_R2_PUBLIC_URL: it takes an address"),
    ],
)
def test_a_setting_of_the_bucket_that_is_wrong_or_missing_is_named(folder: Path, changed: dict[str, str], said: str) -> None:
    good = {
        "MOVIEQ_STORAGE": "s3://film/a/b",
        "MOVIEQ_R2_ENDPOINT": "https://x.r2.cloudflarestorage.com/",
        "MOVIEQ_R2_ACCESS_KEY_ID": "id",
        "MOVIEQ_R2_SECRET_ACCESS_KEY": "hidden",
    }
    found = load(good, folder / "none").storage
    assert found == Bucket("film", "a/b/", "https://x.r2.cloudflarestorage.com", "id", "hidden")
    with pytest.raises(SettingsError, match=said) as raised:
        load({**good, **changed}, folder / "none")
    assert "hidden" not in str(raised.value)


def test_the_region_is_that_of_the_endpoint() -> None:
    assert s3.region("https://x.r2.cloudflarestorage.com") == "auto"
    assert s3.region("https://s3.eu-central-1.amazonaws.com") == "eu-central-1"
    assert s3.region("https://s3.us-west-004.backblazeb2.com") == "us-west-004"


# ── Memory ──

PUT_2_GB = """
import asyncio, sys
from pathlib import Path
from movieq.storage import s3
from movieq.settings import Bucket

async def main():
    async with s3.opened(Bucket(*sys.argv[1:6]), patient=True) as storage:
        assert await storage.put("big.mp4", Path(sys.argv[6]), "video/mp4") == 2 * 1024**3
        assert await storage.open("big.mp4", Path(sys.argv[6] + ".copy")) == 2 * 1024**3
    # not ru_maxrss, which begins with what the process that started this one had
    print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))

asyncio.run(main())
"""


@pytest.mark.slow
def test_two_gigabytes_go_there_and_back_in_less_than_200_mb(bucket: Bucket, folder: Path) -> None:
    source = folder / "big"
    with source.open("wb") as file:
        os.truncate(file.fileno(), 2 * 1024**3)
    facts = [bucket.name, bucket.prefix, bucket.endpoint, bucket.key_id, bucket.secret, str(source)]
    done = subprocess.run([sys.executable, "-c", PUT_2_GB, *facts], capture_output=True, text=True, check=True)
    print(f"peak {int(done.stdout) / 1000:.0f} MB")
    assert int(done.stdout) < 200_000
