"""Signed files: whole and in ranges, of the right type, for any origin. Every other URL is refused."""

from __future__ import annotations

import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from movieq.storage.folder import FolderStorage
from tests.contract.client import Client

KEY = "projects/film/image/t/r/output.jpg"
BYTES = bytes(range(256)) * 1000


@pytest.fixture
async def url(api: Client, folder: Path) -> str:
    """Return the signed URL of a stored file."""
    source = folder / "file"
    source.write_bytes(BYTES)
    await api.state.storage.put(KEY, source, "image/jpeg")
    url = api.state.storage.url(KEY, int(time.time()) + 60)
    api.signatures.add(url.rpartition("=")[2])
    return url


async def test_a_signed_address_opens_as_it_stands(api: Client, url: str) -> None:
    answer = await api.get(url, key=None, headers={"Origin": "https://app.example"})
    assert (answer.status, answer.body) == (200, BYTES)
    headers = {
        name: answer.headers[name] for name in ("Content-Type", "X-Content-Type-Options", "Access-Control-Allow-Origin", "Accept-Ranges")
    }
    assert list(headers.values()) == ["image/jpeg", "nosniff", "*", "bytes"]


@pytest.mark.parametrize(
    ("extension", "content_type"),
    [
        ("mp4", "video/mp4"),
        ("png", "image/png"),
        ("mp3", "audio/mpeg"),
        ("html", "application/octet-stream"),
        ("svg", "application/octet-stream"),
    ],
)
async def test_the_type_is_that_of_the_extension_and_never_one_that_runs(
    api: Client, folder: Path, extension: str, content_type: str
) -> None:
    (folder / "file").write_bytes(b"<script>")
    await api.state.storage.put(f"a/output.{extension}", folder / "file", "text/html")
    answer = await api.get(api.state.storage.url(f"a/output.{extension}", int(time.time()) + 60), key=None)
    assert answer.headers["Content-Type"] == content_type
    assert "sandbox" in answer.headers["Content-Security-Policy"]


async def test_scripts_of_any_origin_may_ask_for_a_range_and_read_which_they_got(api: Client, url: str) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "range"}
    preflight = await api.ask("OPTIONS", url, key=None, headers=asked)
    assert preflight.status == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == "*"
    assert "Range" in preflight.headers["Access-Control-Allow-Headers"]
    answer = await api.get(url, key=None, headers={"Origin": "https://app.example", "Range": "bytes=0-9"})
    assert answer.status == 206
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "Content-Range" in answer.headers["Access-Control-Expose-Headers"]


async def test_a_file_without_an_extension_is_bytes(api: Client, folder: Path) -> None:
    (folder / "file").write_bytes(b"x")
    await api.state.storage.put("uploads/film/abc/file", folder / "file", "image/png")
    answer = await api.get(api.state.storage.url("uploads/film/abc/file", int(time.time()) + 60), key=None)
    assert answer.headers["Content-Type"] == "application/octet-stream"


async def test_head_says_what_get_would(api: Client, url: str) -> None:
    head, get = await api.ask("HEAD", url, key=None), await api.get(url, key=None)
    assert (head.status, head.body) == (200, b"")
    assert {**head.headers, "date": ""} == {**get.headers, "date": ""}


SIZE = len(BYTES)


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=100-199", 100, 199),
        ("bytes=100-", 100, SIZE - 1),
        ("bytes=-10", SIZE - 10, SIZE - 1),
        (f"bytes=-{SIZE * 2}", 0, SIZE - 1),
        (f"bytes=0-{10**30}", 0, SIZE - 1),
        (f"bytes={SIZE - 1}-{SIZE}", SIZE - 1, SIZE - 1),
    ],
)
async def test_a_range_is_answered_with_just_that(api: Client, url: str, asked: str, first: int, last: int) -> None:
    answer = await api.get(url, key=None, headers={"Range": asked})
    assert (answer.status, answer.body) == (206, BYTES[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={10**30}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=-0"])
async def test_a_range_beyond_the_end_is_a_416_that_says_where_that_is(api: Client, url: str, asked: str) -> None:
    answer = await api.get(url, key=None, headers={"Range": asked})
    assert (answer.status, answer.error) == (416, "range_not_satisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize("asked", ["", "x", "bytes", "bytes=", "bytes=a-b", "bytes=5-1", "lines=1-2", "bytes=--", "bytes=-", "bytes=1"])
async def test_a_range_that_is_not_understood_counts_as_none(api: Client, url: str, asked: str) -> None:
    answer = await api.get(url, key=None, headers={"Range": asked})
    assert (answer.status, answer.body) == (200, BYTES)


async def test_a_hundred_and_more_ranges_are_answered_with_the_whole(api: Client, url: str) -> None:
    answer = await api.get(url, key=None, headers={"Range": "bytes=" + ",".join(f"{i * 2}-{i * 2}" for i in range(200))})
    assert (answer.status, len(answer.body)) == (200, SIZE)


async def test_if_range_with_the_etag_gives_the_range_and_with_another_the_whole(api: Client, url: str) -> None:
    etag = (await api.get(url, key=None)).headers["ETag"]
    answers = [await api.get(url, key=None, headers={"Range": "bytes=0-9", "If-Range": value}) for value in (etag, '"other"', f"W/{etag}")]
    assert [answer.status for answer in answers] == [206, 200, 200]


async def test_an_address_with_one_character_changed_is_forbidden(api: Client, url: str) -> None:
    start = url.index("/media/") + len("/media/")
    for position in [*range(start, len(url), 7), *range(len(url) - 44, len(url))]:
        if url[position] in "?&=/":
            continue
        changed = url[:position] + ("A" if url[position] != "A" else "B") + url[position + 1 :]
        answer = await api.get(changed, key=None)
        assert (answer.status, answer.error) == (403, "invalid_signature"), changed


@pytest.mark.parametrize(
    "change", [(r"\?.*", ""), (r"expires=\d+", "expires="), (r"expires=", "expires=0"), (r"&signature=.*", ""), (r"$", "=")]
)
async def test_an_address_without_its_whole_signature_is_forbidden(api: Client, url: str, change: tuple[str, str]) -> None:
    answer = await api.get(re.sub(*change, url, count=1), key=None)
    assert (answer.status, answer.error) == (403, "invalid_signature")


async def test_a_key_does_not_open_what_is_not_signed(api: Client, url: str) -> None:
    assert (await api.get(url.partition("?")[0])).status == 403


async def test_an_address_that_has_expired_is_forbidden_and_says_so(api: Client, url: str) -> None:
    answer = await api.get(api.state.storage.url(KEY, int(time.time()) - 1), key=None)
    assert (answer.status, answer.error) == (403, "expired")
    assert "expired" in answer.message


async def test_the_signature_of_a_stream_does_not_open_a_file(api: Client, url: str) -> None:
    task_id = (await api.submit()).json["task_id"]
    query = urlsplit((await api.status(task_id))["events_url"]).query
    assert (await api.get(f"{url.partition('?')[0]}?{query}", key=None)).status == 403


@pytest.mark.parametrize(
    "path",
    [
        *(
            "../../../etc/passwd",
            "..%2f..%2f..%2fetc%2fpasswd",
            "%2e%2e/%2e%2e/etc/passwd",
            "/etc/passwd",
            "%2fetc%2fpasswd",
            "....//etc/passwd",
        ),
        *("a//b", "a%00b", "", ".", "a\\..\\b", "%c0%ae%c0%ae/x", "x" * 5000),
    ],
)
async def test_no_path_leads_out_of_the_folder(api: Client, url: str, path: str) -> None:
    head = f"GET /media/{path}?{urlsplit(url).query} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer = await api.raw(head.encode())
    assert answer.startswith((b"HTTP/1.1 403", b"HTTP/1.1 404"))
    assert b"root:" not in answer


async def test_a_signed_file_that_is_gone_is_a_404(api: Client) -> None:
    answer = await api.get(api.state.storage.url("projects/film/gone.png", int(time.time()) + 60), key=None)
    assert (answer.status, answer.error) == (404, "not_found")


async def test_a_folder_is_no_file(api: Client, url: str) -> None:
    answer = await api.get(api.state.storage.url("projects/film", int(time.time()) + 60), key=None)
    assert (answer.status, answer.error) == (404, "not_found")


async def test_a_result_can_be_opened_for_at_least_a_day_and_the_same_address_serves_an_hour(api: Client) -> None:
    expiry_s = api.state.media_expiry_s()
    assert isinstance(api.state.storage, FolderStorage)
    assert expiry_s - time.time() >= 86_400
    assert expiry_s % 3600 == 0


async def test_a_slow_reader_of_a_file_gets_all_of_it(api: Client, url: str) -> None:
    parts = urlsplit(url)
    answer = await api.raw(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert answer.endswith(BYTES)
