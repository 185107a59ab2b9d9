"""A real Payload app that has the plugin as npm packs it, over a movieq that each test starts as it needs it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from arq.connections import ArqRedis

from movieq.local.demo import sheet
from movieq.local.embedded import Valkey
from movieq.settings import Settings
from tests.arrange import settings_of
from tests.contract.conftest import served
from tests.fleet import KEY, Fleet, fleet, free_port
from tests.programs import node

HERE: Final = Path(__file__).parent
PLUGIN: Final = HERE.parents[1] / "deploy" / "payload"
SECRET: Final = "whsec_" + "c2VjcmV0IG9mIHRoZSB0ZXN0cyBhbG9uZQ=="
FRAME: Final = Path(sheet.__file__).with_name("frame1.jpg")
SCENE: Final = {"title": "The lamp", "description": "The keeper lights the lamp", "duration": 1, "resolution": "640x360"}


def built() -> None:
    """The plugin is compiled, which is its type check too."""
    node(PLUGIN)
    done = subprocess.run(["npm", "run", "build", "-w", "plugin"], cwd=PLUGIN, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's app without Next, in a folder of its own: the plugin as npm packs it, the rest as npm installed it."""
    built()
    folder = tmp_path_factory.mktemp("app")
    subprocess.run(
        ["npm", "pack", "-w", "plugin", "--ignore-scripts", "--silent", "--pack-destination", folder], cwd=PLUGIN, check=True, timeout=60
    )
    (packed,) = folder.glob("*.tgz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder / "node_modules", filter="data")
    (folder / "node_modules" / "package").rename(folder / "node_modules" / "movieq-payload")
    for name in ("payload", "@payloadcms", "@types", "graphql", "react", "standardwebhooks"):
        (folder / "node_modules" / name).symlink_to(PLUGIN / "node_modules" / name)
    shutil.copy(PLUGIN / "example" / "src" / "payload.config.js", folder)
    shutil.copy(HERE / "server.mjs", folder)
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


class Cms:
    """A running Payload. `editor` logs in with a token as the admin's pages do; `key` is what movieq would have."""

    def __init__(self, url: str, movieq_port: int) -> None:
        self.url = url
        self.movieq_port = movieq_port
        self.password = uuid.uuid4().hex
        self.editor: dict[str, str] = {}
        self.key: dict[str, str] = {}

    async def call(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> tuple[int, Any]:
        """Status and JSON of an answer; as the editor, where nobody else is named."""
        async with (
            aiohttp.ClientSession(headers=self.editor if headers is None else headers) as session,
            session.request(method, f"{self.url}/api{path}", timeout=aiohttp.ClientTimeout(total=60), **options) as answer,
        ):
            return answer.status, await answer.json()

    async def create(self, collection: str, **fields: Any) -> dict[str, Any]:
        """A new document."""
        status, answer = await self.call("POST", f"/{collection}?depth=0", json=fields)
        assert status == 201, answer
        return dict(answer["doc"])

    async def changed(self, scene: Any, **fields: Any) -> dict[str, Any]:
        """The scene after a save."""
        status, answer = await self.call("PATCH", f"/scenes/{scene}?depth=0", json=fields)
        assert status == 200, answer
        return dict(answer["doc"])

    async def scene(self, scene: Any) -> dict[str, Any]:
        """The scene as it is stored."""
        status, answer = await self.call("GET", f"/scenes/{scene}?depth=0")
        assert status == 200, answer
        return dict(answer)

    async def picture(self, project: Any) -> Any:
        """The id of a new picture."""
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("file", FRAME.read_bytes(), filename="frame.jpg", content_type="image/jpeg")
        form.add_field("_payload", json.dumps({"alt": "a frame", "project": project}))
        status, answer = await self.call("POST", "/media", data=form)
        assert status == 201, answer
        return answer["doc"]["id"]

    async def settle(self) -> None:
        """There are an editor and a user with a key."""
        password = self.password
        _, first = await self.call("POST", "/users/first-register", {}, json={"email": "editor@example.test", "password": password})
        self.editor = {"Authorization": f"JWT {first['token']}"}
        key = str(uuid.uuid4())
        await self.create("users", email="movieq@example.test", password=password, enableAPIKey=True, apiKey=key)
        self.key = {"Authorization": f"users API-Key {key}"}


def environment(data: Path, port: int, movieq_port: int) -> dict[str, str]:
    """What a Payload at a port is told."""
    return {
        **os.environ,
        "NODE_ENV": "test",
        "DISABLE_PAYLOAD_HMR": "true",
        "PORT": str(port),
        "PAYLOAD_URL": f"http://127.0.0.1:{port}",
        "PAYLOAD_DATA_DIR": str(data),
        "MOVIEQ_URL": f"http://127.0.0.1:{movieq_port}",
        "MOVIEQ_API_KEY": KEY,
        "MOVIEQ_WEBHOOK_SECRET": SECRET,
    }


def started(app: Path, data: Path, port: int, movieq_port: int) -> subprocess.Popen[str]:
    """A Payload that listens."""
    with (data / "log").open("w") as log:
        process = subprocess.Popen(
            [node(PLUGIN), "server.mjs"],
            cwd=app,
            env=environment(data, port, movieq_port),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("{") and json.loads(line).get("ready"):
            return process
    process.wait()
    raise AssertionError("".join(said) + (data / "log").read_text())


@pytest.fixture(scope="session")
def running(app: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cms]:
    """A Payload, one for a session."""
    port, movieq_port = free_port(), free_port()
    process = started(app, tmp_path_factory.mktemp("cms"), port, movieq_port)
    cms = Cms(f"http://127.0.0.1:{port}", movieq_port)
    asyncio.run(cms.settle())
    yield cms
    process.terminate()
    process.wait(60)
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def cms(running: Cms) -> Cms:
    """The session's Payload, with whatever other tests left in it."""
    return running


@pytest.fixture
async def installation(folder: Path) -> AsyncIterator[Fleet]:
    """A fleet."""
    async with fleet(folder / "fleet") as installation:
        yield installation


class Movieq:
    """The API where the Payload looks for it; nothing is made, since there is no worker."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def call(self, method: str, path: str) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        async with (
            aiohttp.ClientSession(headers={"X-API-Key": KEY}) as session,
            session.request(method, f"{self.url}/api/v1{path}", timeout=aiohttp.ClientTimeout(total=60)) as answer,
        ):
            return answer.status, await answer.json()


@pytest.fixture
def settings(server: Valkey, redis: ArqRedis, folder: Path) -> Settings:
    """An installation on an empty Valkey."""
    return settings_of(redis_url=server.url, storage=str(folder / "media"), api_keys=KEY, allow_private_urls="127.0.0.0/8")


@pytest.fixture
async def api(cms: Cms, settings: Settings) -> AsyncIterator[Movieq]:
    """Its API."""
    async with served(settings, port=cms.movieq_port) as client:
        yield Movieq(client.url)
