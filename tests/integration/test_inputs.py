"""The inputs of a task: fetched a few at once, within a limit for all of them, and decoded before an engine gets them."""

from __future__ import annotations

import asyncio
import io
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from aiohttp import web
from PIL import Image

from movieq.errors import InputUnavailable, InvalidInput
from movieq.fetch.download import Fetcher
from movieq.fetch.guard import Guard
from movieq.queue.files import Files
from movieq.queue.store import Store
from movieq.storage.folder import FolderStorage
from movieq.tasks.entities import Upload
from movieq.tasks.params import VideoParams
from movieq.tasks.states import ProjectId, TaskId
from tests.arrange import parts
from tests.service import serving
from workers import inputs


class Pictures:
    """A server of pictures. It counts the requests in progress, and answers when `open` is set."""

    def __init__(self) -> None:
        self.asked = 0
        self.at_once = 0
        self.most = 0
        self.open = asyncio.Event()
        buffer = io.BytesIO()
        Image.effect_noise((8, 8), 50).save(buffer, "PNG")
        self.body = buffer.getvalue()

    async def handle(self, request: web.Request) -> web.Response:
        self.asked += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        if self.at_once == inputs.AT_ONCE:
            self.open.set()
        await self.open.wait()
        self.at_once -= 1
        if "gone" in request.query_string:
            return web.Response(status=404)
        return web.Response(body=self.body[:-30] if "damaged" in request.query_string else self.body)


async def fetched(store: Store, folder: Path, references: list[str]) -> dict[str, str]:
    """Fetch these references as a task's inputs."""
    storage = FolderStorage(folder / "media", "http://127.0.0.1", (b"secret",))
    async with Fetcher(Guard((IPv4Network("127.0.0.0/8"),))) as fetcher:
        some = parts(store, storage, fetcher, folder)
        return await inputs.fetch_inputs(some, ProjectId("film"), TaskId("t"), VideoParams(storyboard_images=references), folder)


async def test_a_few_inputs_are_fetched_at_once_and_each_is_found_under_its_reference(store: Store, folder: Path) -> None:
    pictures = Pictures()
    async with serving({"/picture": pictures.handle}) as url:
        references = [f"{url}/picture?{number}" for number in range(10)]
        found = await fetched(store, folder, references)
    assert list(found) == references
    assert len({Path(each).read_bytes() for each in found.values()}) == 1
    assert (pictures.most, pictures.asked) == (inputs.AT_ONCE, 10)


async def test_the_input_that_is_missing_is_named_and_the_others_are_no_longer_fetched(store: Store, folder: Path) -> None:
    pictures = Pictures()
    pictures.open.set()
    async with serving({"/picture": pictures.handle}) as url:
        with pytest.raises(InputUnavailable, match="answered 404"):
            await fetched(store, folder, [f"{url}/picture?gone", *(f"{url}/picture?{number}" for number in range(31))])
    assert pictures.asked < 32


async def test_all_inputs_together_have_a_time_limit(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "ALL_S", 0.2)
    pictures = Pictures()
    async with serving({"/picture": pictures.handle}) as url:
        with pytest.raises(InputUnavailable, match=r"the 2 inputs could not all be fetched within 0.2 s"):
            await fetched(store, folder, [f"{url}/picture?1", f"{url}/picture?2"])
    assert list(folder.glob("input*")) == []


async def test_an_input_that_is_damaged_after_its_header_is_refused_before_an_engine_gets_it(store: Store, folder: Path) -> None:
    pictures = Pictures()
    pictures.open.set()
    async with serving({"/picture": pictures.handle}) as url:
        with pytest.raises(InvalidInput, match=r"/picture\?\.\.\. is no picture that can be read"):
            await fetched(store, folder, [f"{url}/picture?whole", f"{url}/picture?damaged"])


async def test_an_upload_that_is_no_picture_is_refused_where_a_picture_is_expected(store: Store, folder: Path) -> None:
    storage = FolderStorage(folder / "media", "http://127.0.0.1", (b"secret",))
    (folder / "voice").write_bytes(b"fLaC" + bytes(100))
    await Files(store.redis).add_upload("u1", Upload(ProjectId("film"), "uploads/film/u1/file", 104, "audio/flac"), "uploads/film/u1")
    await storage.put("uploads/film/u1/file", folder / "voice", "audio/flac")
    with pytest.raises(InvalidInput, match=r"upload:u1 is audio/flac, expected an image"):
        await fetched(store, folder, ["upload:u1"])
