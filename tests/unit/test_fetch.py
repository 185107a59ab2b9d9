"""Guarded downloads, from real servers on this host that misbehave in every way a stranger's can."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import io
import os
import re
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from pathlib import Path

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from movieq.errors import InputUnavailable, InvalidInput, StorageFault
from movieq.fetch.download import BACKOFF_S, Fetched, Fetcher, image_problem
from movieq.fetch.formats import HEAD_BYTES, Kind, sniff
from movieq.fetch.guard import Guard, UrlRefused, shown
from tests.fleet import eventually
from tests.pictures import tiff

LOOPBACK = IPv4Network("127.0.0.0/8")
ONLY_ONE = IPv4Network("127.0.0.1/32")
IMAGE = (Kind.IMAGE,)
TRIES = len(BACKOFF_S) + 1


def image(name: str, size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, name)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises this size, and a little of its data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


PNG = image("PNG")
WAV = b"RIFF" + struct.pack("<I", 40) + b"WAVEfmt " + bytes(32)
HTML = b"<!doctype html><title>Sign in</title>"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A port whose connections play a script; counts them and keeps the request lines."""

    def __init__(self, script: Script, host: str) -> None:
        self.script = script
        self.host = host
        self.requests: list[str] = []
        self.connections: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> None:
        self.server = await asyncio.start_server(self.play, self.host, port)
        self.port: int = self.server.sockets[0].getsockname()[1]

    async def play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.connections.add(task)
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.requests.append(request.partition("\r\n")[0])
            await self.script(reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.connections.discard(task)
            writer.close()

    async def stop(self) -> None:
        self.server.close()
        for task in list(self.connections):
            task.cancel()
        await asyncio.gather(*self.connections)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


Serve = Callable[..., Awaitable[Server]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(script, host="127.0.0.1", port=0)` is a running Server."""
    servers: list[Server] = []

    async def start(script: Script, host: str = "127.0.0.1", port: int = 0) -> Server:
        server = Server(script, host)
        await server.start(port)
        servers.append(server)
        return server

    yield start
    for server in servers:
        await server.stop()


def answers(body: bytes, *fields: str, status: str = "200 OK", length: int | None = None) -> Script:
    """The usual script: one complete answer with these header fields."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", "Connection: close", *fields, "", ""]
        writer.write("\r\n".join(head).encode() + body)

    return script


def redirects(*locations: str) -> Script:
    """To each location in turn, then a PNG."""
    left = list(locations)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (answers(b"", f"Location: {left.pop(0)}", status="302 Found") if left else answers(PNG))(reader, writer)

    return script


class Names(AbstractResolver):
    """A name server: each name with the answers of its first lookup, its second, ...; the last one stays."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = answers
        self.lookups = 0

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        self.lookups += 1
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        known = self.answers[host]
        found = known.pop(0) if len(known) > 1 else known[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in found
        ]

    async def close(self) -> None:
        pass


async def fetched(url: str, dest: Path, *, guard: Guard | None = None, kinds: tuple[Kind, ...] = IMAGE, **limits: float) -> Fetched:
    async with Fetcher(guard or Guard((LOOPBACK,)), **limits) as fetcher:  # type: ignore[arg-type]  # max_bytes or total_s
        return await fetcher.fetch(url, dest, kinds)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "input"


# The guard

NEVER = [
    # loopback and "this host", in every spelling that a socket understands
    "http://127.0.0.1/",
    "http://127.255.255.254:8080/x",
    "http://0.0.0.0/",
    "http://0/",
    "http://2130706433/",
    "http://017700000001/",
    "http://0x7f000001/",
    "http://0X7F.0.0.1/",
    "http://0177.0.0.1/",
    "http://0x7f.1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.1./",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "http://localhost/",
    "http://LocalHost.:3000/",
    "http://cms.localhost/",
    "http://[::1]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::]/",
    # private, link-local (cloud metadata), CGNAT, benchmarks, documentation, relays, multicast, reserved, broadcast
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/",
    "http://168.63.129.16/",
    "http://100.64.0.1/",
    "http://100.100.100.200/",
    "http://192.0.0.192/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://192.88.99.1/",
    "http://224.0.0.1/",
    "http://239.255.255.250/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fec0::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
    "http://[100::1]/",
    "http://[2001:db8::1]/",
    "http://[3fff::1]/",
    "http://[5f00::1]/",
    # IPv4 inside IPv6: mapped, compatible, NAT64, 6to4, Teredo
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::10.0.0.1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::a00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a00:1::1]/",
    "http://[2001:0:4136:e378:8000:63bf:f5ff:fffe]/",
    # neither a name nor an address
    "http://999.1.1.1/",
    "http://1.2.3.4.5/",
    "http://8.8.8.0x/",
    "http://a.1/",
    "http://127.0.0.%31/",
    "http://a b/",
    "http://[::1/",
    "http://[::1%25]/",
    # no url, no host, no port, another scheme
    "",
    "x",
    "http:",
    "http:///x",
    "http:127.0.0.1",
    "//93.184.216.34/x",
    "http://93.184.216.34:0/",
    "http://93.184.216.34:99999/",
    "http://93.184.216.34:x/",
    "file:///etc/passwd",
    "ftp://93.184.216.34/",
    "gopher://93.184.216.34/",
    "unix:///run/redis.sock",
    "javascript:alert(1)",
    # userinfo, and what parsers disagree about
    "http://user:password@93.184.216.34/",
    "http://user@93.184.216.34/",
    "http://@93.184.216.34/",
    "http://93.184.216.34@127.0.0.1/",
    "http://127.0.0.1\\@93.184.216.34/",
    "http://93.184.216.34\\.example/",
    "http://93.184.216.34/\r\nX-Api-Key: 1",
    "http://93.184.216.34/\0",
    "http://93.184.\t216.34/",
    "http://\ud800/",
]


@pytest.mark.parametrize("url", NEVER)
async def test_a_url_that_no_stranger_may_name_is_refused_at_the_door_and_on_the_way(url: str, dest: Path) -> None:
    guard = Guard()
    with pytest.raises(UrlRefused):
        guard.check_url(url)
    with pytest.raises(InputUnavailable):
        await fetched(url, dest, guard=guard, total_s=2)
    assert not dest.exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://93.184.216.34/a.png",
        "HTTPS://Example.com/a?b=c#d",
        "http://example.com:8080",
        "https://bücher.example/titel seite.png",
        "http://[2606:4700:4700::1111]/",
        "http://[64:ff9b::8.8.8.8]/",
        "http://[::ffff:8.8.8.8]/",
        "http://10.example.com/",
        "http://cms:3000/media/@scope/x.png",
        "http://localhost.example/",
    ],
)
def test_a_url_of_the_open_net_passes(url: str) -> None:
    Guard().check_url(url)


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_every_spelling_of_an_address_gets_the_same_answer(address: IPv4Address) -> None:
    guard = Guard()
    number, (a, b, c, d) = int(address), address.packed
    spellings = [
        str(address),
        str(number),
        hex(number),
        f"0{number:o}",
        f"{a:#x}.{b}.{c:#o}.{d}".replace("0o", "0"),
        f"{a}.{b}.{c << 8 | d}",
    ]
    spellings += [f"[::ffff:{address}]", f"[64:ff9b::{address}]"]
    for spelling in spellings:
        if guard.permits(address):
            guard.check_url(f"http://{spelling}/")
        else:
            with pytest.raises(UrlRefused):
                guard.check_url(f"http://{spelling}/")


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    guard = Guard()
    for url in (text, f"http://{text}", f"http://example.com/{text}"):
        with contextlib.suppress(UrlRefused):
            guard.check_url(url)
        assert shown(url).isprintable()


@pytest.mark.parametrize(
    ("network", "opened", "closed"),
    [
        ("127.0.0.0/8", "http://127.0.0.1/", "http://10.0.0.1/"),
        ("127.0.0.0/8", "http://localhost/", "http://[::1]/"),
        ("127.0.0.0/8", "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/"),
        ("10.1.0.0/16", "http://10.1.2.3/", "http://10.2.0.1/"),
    ],
)
def test_a_named_network_is_open_and_no_other(network: str, opened: str, closed: str) -> None:
    guard = Guard((IPv4Network(network),))
    guard.check_url(opened)
    with pytest.raises(UrlRefused, match="MOVIEQ_ALLOW_PRIVATE_URLS"):
        guard.check_url(closed)


def test_a_named_network_can_be_of_either_version() -> None:
    guard = Guard((IPv6Network("::1"), IPv6Network("fd00::/8")))
    assert guard.permits(ip_address("::1"))
    assert guard.permits(ip_address("fd12::1"))
    assert not guard.permits(ip_address("fc12::1"))
    assert not guard.permits(ip_address("127.0.0.1"))


async def test_a_name_that_stands_for_a_private_address_is_refused_without_saying_which(serve: Serve, dest: Path) -> None:
    server = await serve(answers(PNG))
    guard = Guard(resolver=Names(**{"cdn.example": [["127.0.0.1"]]}))
    with pytest.raises(InputUnavailable, match="private network") as raised:
        await fetched(f"http://cdn.example:{server.port}/a.png", dest, guard=guard)
    assert "127.0.0.1" not in raised.value.message
    assert server.requests == []


async def test_only_the_permitted_addresses_of_a_name_are_called(serve: Serve, dest: Path) -> None:
    wanted = await serve(answers(PNG))
    inner = await serve(answers(PNG), host="127.0.0.2", port=wanted.port)
    guard = Guard((ONLY_ONE,), resolver=Names(**{"cdn.example": [["127.0.0.2", "::1", "127.0.0.1"]]}))
    await fetched(f"http://cdn.example:{wanted.port}/a.png", dest, guard=guard)
    assert (len(wanted.requests), len(inner.requests)) == (1, 0)


async def test_a_name_that_changes_its_address_between_two_lookups_gains_nothing(serve: Serve, dest: Path) -> None:
    allowed = await serve(answers(b"", status="503 Busy"))
    inner = await serve(answers(PNG), host="127.0.0.2", port=allowed.port)
    names = Names(**{"rebind.example": [["127.0.0.1"], ["127.0.0.2"]]})
    with pytest.raises(InputUnavailable, match="private network"):
        await fetched(f"http://rebind.example:{allowed.port}/", dest, guard=Guard((ONLY_ONE,), resolver=names))
    assert names.lookups == 2  # one for each connection: what was checked is what was connected to
    assert (len(allowed.requests), len(inner.requests)) == (1, 0)


async def test_a_kept_connection_does_not_lend_its_permission_to_another_host(serve: Serve, dest: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG)
            await reader.readuntil(b"\r\n\r\n")

    server = await serve(script)
    guard = Guard(origins=(f"http://cms:{server.port}",), resolver=Names(cms=[["127.0.0.1"]], other=[["127.0.0.1"]]))
    async with Fetcher(guard) as fetcher:
        await fetcher.fetch(f"http://cms:{server.port}/", dest, IMAGE)
        for host in ("other", "127.0.0.1"):
            with pytest.raises(InputUnavailable, match="private network"):
                await fetcher.fetch(f"http://{host}:{server.port}/", dest, IMAGE)
        await fetcher.fetch(f"http://cms:{server.port}/", dest, IMAGE)


async def test_an_origin_of_our_own_is_open_and_its_neighbours_are_not(serve: Serve, dest: Path) -> None:
    cms, other = await serve(answers(PNG)), await serve(answers(PNG))
    guard = Guard(origins=(f"{cms.url}/api",))
    await fetched(f"{cms.url}/media/a.png", dest, guard=guard)
    with pytest.raises(InputUnavailable, match="private network"):
        await fetched(f"{other.url}/media/a.png", dest, guard=guard)
    assert other.requests == []


async def test_a_session_of_the_guard_refuses_by_itself(serve: Serve) -> None:
    server = await serve(answers(b""))
    async with Guard().session() as session:
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
            with pytest.raises(aiohttp.ClientError) as raised:
                await session.post(f"http://{host}:{server.port}/", data=b"{}")
            assert isinstance(raised.value, UrlRefused)
    assert server.requests == []


async def test_a_session_of_the_guard_keeps_to_it_over_redirects(serve: Serve) -> None:
    inner = await serve(answers(b""), host="127.0.0.2")
    door = await serve(redirects(f"{inner.url}/"))
    async with Guard((ONLY_ONE,)).session() as session:
        with pytest.raises(UrlRefused):
            await session.get(door.url)
    assert inner.requests == []


async def test_a_session_of_the_guard_hands_out_bodies_as_they_came(serve: Serve) -> None:
    bomb = gzip.compress(bytes(1_000_000))
    server = await serve(answers(bomb, "Content-Encoding: gzip", "Set-Cookie: a=b"))
    async with Guard((LOOPBACK,)).session() as session, session.get(server.url) as answer:
        assert await answer.read() == bomb


# Redirects


async def test_redirects_are_followed_five_times(serve: Serve, dest: Path) -> None:
    server = await serve(redirects("/b", "c", "//127.0.0.1:{port}/d", "?e", "/f"))
    server.script = redirects("/b", "c", f"//127.0.0.1:{server.port}/d", "?e", "/f")
    await fetched(f"{server.url}/a", dest)
    assert [line.split()[1] for line in server.requests] == ["/a", "/b", "/c", "/d", "/d?e", "/f"]


async def test_a_sixth_redirect_and_a_loop_are_the_end(serve: Serve, dest: Path) -> None:
    server = await serve(answers(b"", "Location: /", status="307 Temporary Redirect"))
    with pytest.raises(InputUnavailable, match="more than 5 times"):
        await fetched(server.url, dest)
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.2:{port}/",
        "http://2130706434:{port}/",
        "//127.0.0.2:{port}/",
        "http://[::ffff:127.0.0.2]:{port}/",
        "file:///etc/passwd",
        "data:image/png;base64,aaaa",
        "http://user:pw@127.0.0.1:{port}/",
        "http://[",
        "http://127.0.0.1:{port}\\@127.0.0.2/",
    ],
)
async def test_a_redirect_is_checked_like_the_first_url(serve: Serve, dest: Path, location: str) -> None:
    inner = await serve(answers(PNG), host="127.0.0.2")
    door = await serve(redirects(location.format(port=inner.port)))
    with pytest.raises(InputUnavailable, match=door.url):
        await fetched(f"{door.url}/a", dest, guard=Guard((ONLY_ONE,)))
    assert (len(door.requests), inner.requests) == (1, [])


# What comes


@pytest.mark.parametrize(
    ("body", "media_type"),
    [(image(name), f"image/{name.lower()}") for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")]
    + [
        (tiff(bytes(8), (4, 2), {258: (3, [8]), 262: (3, [1])}, "<", big=True), "image/tiff"),
        (tiff(bytes(8), (4, 2), {258: (3, [8]), 262: (3, [1])}, ">", big=True), "image/tiff"),
        (re.sub(b"ftypavif", b"ftypmif1", image("AVIF")), "image/avif"),
        (WAV, "audio/wav"),
        (b"ID3\x04" + bytes(100), "audio/mpeg"),
        (b"\xff\xfb\x90\x64" + bytes(413), "audio/mpeg"),
        (b"fLaC" + bytes(40), "audio/flac"),
        (b"OggS\0" + bytes(40), "audio/ogg"),
        (b"\0\0\0\x1cftypM4A \0\0\0\0", "audio/mp4"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "audio/mp4"),
    ],
)
async def test_the_bytes_say_what_a_file_is_and_not_the_declared_type(serve: Serve, dest: Path, body: bytes, media_type: str) -> None:
    server = await serve(answers(body, "Content-Type: text/html"))
    found = await fetched(f"{server.url}/a", dest, kinds=(Kind.IMAGE, Kind.AUDIO))
    assert found == Fetched(path=dest, media_type=media_type, size_bytes=len(body))
    assert dest.read_bytes() == body


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "is empty"),
        (HTML, "an HTML page"),
        (b"\xef\xbb\xbf\n <HTML>", "an HTML page"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"BMP is what this text is about, and it is long enough", "unknown kind"),
        (b"\xff\xfe<\0h\0t\0m\0l\0", "unknown kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "unknown kind"),
        (os.urandom(16).join([b"\0\0", bytes(2000)]), "unknown kind"),
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf\0\0", r"a HEIC image \(convert it to JPEG or PNG\), expected an image"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic\0\0\0\0", "a HEIC image"),
        (b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc\0\0\0\0", "a HEIC image"),
        (WAV, "audio/wav, expected an image"),
        (PNG[:20], "header cannot be read"),
        (b"\xff\xd8\xff" + HTML, "header cannot be read"),
        (png_of(60_000, 60_000), "too many pixels"),
        (png_of(10_000, 9_000), "too many pixels|10000x9000"),
        (png_of(8_000, 5_001), "too many pixels|8000x5001 pixels, at most 40 megapixels"),
        (png_of(0, 5), "header cannot be read|pixels"),
    ],
)
async def test_what_is_no_usable_image_is_invalid_whatever_it_says_it_is(serve: Serve, dest: Path, body: bytes, what: str) -> None:
    server = await serve(answers(body, "Content-Type: image/png"))
    with pytest.raises(InvalidInput, match=what) as raised:
        await fetched(f"{server.url}/a.png", dest)
    assert f"{server.url}/a.png" in raised.value.message
    assert not dest.exists()


async def test_a_picture_is_no_voice(serve: Serve, dest: Path) -> None:
    server = await serve(answers(PNG))
    with pytest.raises(InvalidInput, match="image/png, expected a sound"):
        await fetched(f"{server.url}/voice", dest, kinds=(Kind.AUDIO,))


async def test_long_and_narrow_images_and_forty_megapixels_pass(tmp_path: Path) -> None:
    for width, height in ((1, 10_000), (8_000, 5_000)):
        path = tmp_path / "image"
        path.write_bytes(png_of(width, height))
        assert image_problem(path) is None


@pytest.mark.parametrize(("scans", "problem"), [(0, None), (50, None), (2000, "scans, at most 100 are allowed")])
def test_a_jpeg_of_very_many_scans_is_no_usable_image(tmp_path: Path, scans: int, problem: str | None) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(buffer, "JPEG", progressive=True)
    body = buffer.getvalue()
    last = body[body.rindex(b"\xff\xda") : -2]
    path = tmp_path / "image"
    path.write_bytes(body[:-2] + last * scans + body[-2:])
    found = image_problem(path)
    assert found is None if problem is None else problem in (found or "")


@pytest.mark.parametrize("name", ["EPS", "PCX", "PPM", "PDF"])
def test_formats_that_nobody_asked_for_stay_shut(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(image(name))
    assert image_problem(path) == "its image header cannot be read"


@given(st.binary(max_size=HEAD_BYTES))
def test_sniffing_takes_any_bytes(head: bytes) -> None:
    assert sniff(head) is None or sniff(head) == sniff(head + b"more")


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.integers(12, 60), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_a_problem_and_no_exception(tmp_path_factory: pytest.TempPathFactory, name: str, at: int, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    body = image(name)
    path.write_bytes(body[:at] + junk + body[at + len(junk) :])
    assert image_problem(path) is None or image_problem(path)


async def test_a_signed_url_reaches_its_server_character_by_character(serve: Serve, dest: Path) -> None:
    server = await serve(answers(PNG))
    target = "/a%7Eb/%2f%2E./x,y?X-Amz-Signature=a%2Fb%7E+c&e=&f=%25"
    await fetched(server.url + target, dest)
    assert server.requests == [f"GET {target} HTTP/1.1"]


# Limits and faults


@pytest.mark.parametrize("size", [25 * 1024 * 1024 + 1, 10**15])
async def test_a_body_that_says_it_is_too_large_is_not_read(serve: Serve, dest: Path, size: int) -> None:
    server = await serve(answers(PNG, length=size))
    with pytest.raises(InputUnavailable, match="larger than 25 MiB"):
        await fetched(server.url, dest)
    assert len(server.requests) == 1


async def test_a_body_without_end_is_cut_off(serve: Serve, dest: Path) -> None:
    sent = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            sent += 0x10000
            await writer.drain()

    server = await serve(script)
    with pytest.raises(InputUnavailable, match="larger than 1 MiB"):
        await fetched(server.url, dest, max_bytes=1024 * 1024)
    assert sent < 16 * 1024 * 1024  # what buffers hold, and no more
    assert not dest.exists()


async def test_a_body_of_exactly_the_limit_is_had(serve: Serve, dest: Path) -> None:
    body = PNG + bytes(600_000)
    server = await serve(answers(body))
    assert (await fetched(server.url, dest, max_bytes=len(body))).size_bytes == len(body)
    assert dest.read_bytes() == body


async def test_a_gzip_bomb_never_unfolds(serve: Serve, dest: Path) -> None:
    server = await serve(answers(gzip.compress(bytes(50_000_000)), "Content-Encoding: gzip", "Content-Type: image/png"))
    with pytest.raises(InputUnavailable, match="compressed"):
        await fetched(server.url, dest)
    assert not dest.exists()


@pytest.mark.parametrize("coding", ["aws-chunked", "AWS-Chunked, identity", "", "identity", "utf-8", "binary,aws-chunked"])
async def test_a_label_that_is_no_compression_is_ignored(serve: Serve, dest: Path, coding: str) -> None:
    server = await serve(answers(PNG, f"Content-Encoding: {coding}"))
    await fetched(server.url, dest)
    assert dest.read_bytes() == PNG


@pytest.mark.parametrize("coding", ["gzip", "aws-chunked,gzip", "BR", "zstd, identity", "x-gzip", "deflate"])
async def test_compressed_data_are_refused(serve: Serve, dest: Path, coding: str) -> None:
    server = await serve(answers(PNG, f"Content-Encoding: {coding}"))
    with pytest.raises(InputUnavailable, match="compressed"):
        await fetched(server.url, dest)


@pytest.mark.parametrize("sent_first", [b"HTTP/1.1 200 ", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
async def test_a_slow_loris_costs_the_total_time_and_no_more(serve: Serve, dest: Path, sent_first: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent_first)
        while True:
            writer.write(b"X")
            await writer.drain()
            await asyncio.sleep(0.05)

    server = await serve(script)
    with pytest.raises(InputUnavailable, match=r"takes longer than 0\.4 s"):
        await fetched(server.url, dest, total_s=0.4)
    assert not dest.exists()


@pytest.mark.parametrize("status", [204, 206, 226])
async def test_an_empty_success_is_invalid(serve: Serve, dest: Path, status: int) -> None:
    server = await serve(answers(b"", status=f"{status} Fine"))
    with pytest.raises(InvalidInput, match="empty"):
        await fetched(server.url, dest)


@pytest.mark.parametrize("status", [300, 304, 400, 401, 403, 404, 410, 418])
async def test_a_refusal_is_not_asked_again(serve: Serve, dest: Path, status: int) -> None:
    server = await serve(answers(b"", status=f"{status} No"))
    with pytest.raises(InputUnavailable, match=f"answered {status}"):
        await fetched(server.url, dest)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["503", "hang up", "reset", "half a body"])
async def test_a_fault_that_passes_is_no_fault(serve: Serve, dest: Path, fault: str) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(server.requests) > 2:
            await answers(PNG)(reader, writer)
        elif fault == "503":
            await answers(HTML, status="503 Busy")(reader, writer)
        elif fault == "half a body":
            await answers(bytes(400_000), length=500_000)(reader, writer)
        elif fault == "reset":
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    server = await serve(script)
    await fetched(server.url, dest)
    assert dest.read_bytes() == PNG
    assert len(server.requests) == 3


async def test_a_body_shorter_than_announced_is_never_kept(serve: Serve, dest: Path) -> None:
    server = await serve(answers(PNG, length=len(PNG) + 1))
    with pytest.raises(InputUnavailable, match="broke off"):
        await fetched(server.url, dest)
    assert len(server.requests) == TRIES
    assert not dest.exists()


async def test_nobody_at_the_port_is_unavailable(dest: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listening
        with pytest.raises(InputUnavailable, match="no connection"):
            await fetched(f"http://127.0.0.1:{bound.getsockname()[1]}/", dest)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"\0" * 100])
async def test_what_does_not_speak_http_is_unavailable(serve: Serve, dest: Path, answer: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    with pytest.raises(InputUnavailable, match=r"not HTTP|broke off"):
        await fetched((await serve(script)).url, dest)


async def test_a_host_that_does_not_exist_is_unavailable(dest: Path) -> None:
    with pytest.raises(InputUnavailable, match="was not found"):
        await fetched("http://nowhere.example/", dest, guard=Guard(resolver=Names()))
    with pytest.raises(InputUnavailable, match="not a name that can be looked up"):
        await fetched(f"http://{'a' * 64}.example/", dest, guard=Guard())


async def test_a_server_that_does_not_speak_tls_is_unavailable(dest: Path) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        with pytest.raises(InputUnavailable, match="TLS"):
            await fetched(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/", dest)


async def test_a_proxy_of_the_environment_is_not_used(serve: Serve, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, proxy = await serve(answers(PNG)), await serve(answers(PNG))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("http_proxy", proxy.url)
    await fetched(server.url, dest)
    assert proxy.requests == []


async def test_a_cancelled_download_leaves_nothing_and_stays_cancelled(serve: Serve, dest: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + bytes(900_000))
        await writer.drain()
        await asyncio.sleep(60)

    server = await serve(script)
    task = asyncio.create_task(fetched(server.url, dest))
    await eventually(lambda: dest.exists() and dest.stat().st_size > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not dest.exists()


@pytest.mark.parametrize("url", ["{server}/a.png", "data:image/png;base64," + base64.b64encode(PNG).decode()])
async def test_a_full_disk_and_a_folder_that_is_none_are_storage_faults(serve: Serve, tmp_path: Path, url: str) -> None:
    server = await serve(answers(PNG))
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(StorageFault, match=f"{full}: No space left on device"):
        await fetched(url.format(server=server.url), full)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFault, match="Not a directory"):
        await fetched(url.format(server=server.url), tmp_path / "file/input")


# Data urls


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "DATA:text/html;charset=utf-8;BASE64," + base64.b64encode(PNG).decode().rstrip("="),
        "data:;base64," + base64.b64encode(PNG).decode().replace("+", "%2B").replace("=", "%3D"),
        "data:;base64," + base64.encodebytes(PNG).decode(),
        "data:image/png; base64," + base64.b64encode(PNG).decode(),
        "data:image/png;charset=x;   Base64 ," + base64.b64encode(PNG).decode(),
        " \n\0data:image/png;base64," + base64.b64encode(PNG).decode() + "\x1f ",
        "da\tta:image/png;bas\ne64," + base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.b64encode(PNG).decode() + "#t=1",
        "data:," + "".join(f"%{byte:02x}" for byte in PNG),
    ],
)
async def test_a_data_url_is_its_bytes(dest: Path, url: str) -> None:
    assert await fetched(url, dest) == Fetched(path=dest, media_type="image/png", size_bytes=len(PNG))
    assert dest.read_bytes() == PNG


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("data:", "no comma"),
        ("data:image/png;base64", "no comma"),
        (" data:image/png;base64;" + "c2VjcmV0" * 9, "no comma"),
        ("data:" + "c2VjcmV0" * 9, "no comma"),
        ("data:" + "c2VjcmV0" * 9 + ",", "empty"),
        ("\tDATA:image/png ; base64,c2VjcmV0!", "not valid base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,a", "not valid base64"),
        ("data:image/png;base64,§§§§", "not valid base64"),
        ("data:image/png;base64,aaaa!", "not valid base64"),
        ("data:image/png,<svg/>", "SVG"),
        ("data:image/png,\ud800", "unknown kind"),
        ("data:image/png;base64,\ud800", "not valid base64"),
        ("data:audio/wav;base64," + base64.b64encode(WAV).decode(), "audio/wav, expected an image"),
    ],
)
async def test_a_data_url_of_something_else_is_invalid(dest: Path, url: str, what: str) -> None:
    with pytest.raises(InvalidInput, match=what) as raised:
        await fetched(url, dest)
    assert len(raised.value.message) < 200
    assert "c2VjcmV0" not in raised.value.message
    assert not dest.exists()


async def test_a_data_url_keeps_to_the_limit(dest: Path) -> None:
    with pytest.raises(InputUnavailable, match="larger than"):
        await fetched("data:;base64," + base64.b64encode(PNG).decode(), dest, max_bytes=len(PNG) - 1)


# Messages


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://cdn.example/a/b.png?X-Amz-Signature=secret&x=1#secret", "https://cdn.example/a/b.png?..."),
        ("https://user:secret@cdn.example/@scope/a.png", "https://cdn.example/@scope/a.png"),
        ("https://us@er:secret@cdn.example/a", "https://cdn.example/a"),
        ("user:secret@cdn.example/a", "cdn.example/a"),
        ("http:/user:secret@cdn.example", "http:/cdn.example"),
        ("http://user:secret\\@cdn.example/a", "http://cdn.example/a"),
        ("data:image/png;base64,c2VjcmV0", "data:image/png;base64,..."),
        (" data:image/png; base64,secret", "data:image/png;base64,..."),
        ("data:image/svg+xml;charset=secret,secret", "data:image/svg+xml,..."),
        ("data:secret;base64,secret", "data:;base64,..."),
        ("data:image/png;base64;secret", "data:image/png,..."),
        ("data:secret", "data:,..."),
        ("http://a/\r\n\ud800", "http://a/\\r\\n\\ud800"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, text: str) -> None:
    assert shown(url) == text
    assert "secret" not in shown(url)


def test_a_long_url_is_shown_in_part() -> None:
    assert len(shown("https://cdn.example/" + "a" * 5000 + "?q")) < 300


@pytest.mark.parametrize("userinfo", ["", "user:secret@"])
async def test_no_message_of_a_download_holds_a_secret(serve: Serve, dest: Path, userinfo: str) -> None:
    server = await serve(answers(b"secret", status="404 secret"))
    with pytest.raises(InputUnavailable) as raised:
        await fetched(f"http://{userinfo}127.0.0.1:{server.port}/a.png?token=secret", dest)
    assert "secret" not in raised.value.message
    assert f"127.0.0.1:{server.port}/a.png" in raised.value.message
