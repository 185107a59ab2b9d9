"""The real servers that tests run against: Valkey on a unix socket, emptied for each test, and SeaweedFS, where each test has a prefix."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from movieq.local.embedded import Valkey, valkey
from movieq.queue.connection import Redis, connect
from movieq.queue.store import Store
from movieq.settings import Bucket
from tests.seaweed import KEY_ID, SECRET, Seaweed, seaweed


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A Valkey of this session's own."""
    with valkey(tmp_path_factory.mktemp("valkey"), appendfsync="everysec") as running:
        yield running


@pytest.fixture
async def redis(server: Valkey) -> AsyncIterator[Redis]:
    """A client of an empty Valkey."""
    async with connect(server.url, patient=True) as client:
        await client.flushall()
        yield client


@pytest.fixture
def store(redis: Redis) -> Store:
    """The store of an empty Valkey."""
    return Store(redis)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    return tmp_path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """An S3 server of this session's own."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as running:
        asyncio.run(running.make_bucket("film"))
        yield running


@pytest.fixture
def bucket(s3_server: Seaweed) -> Bucket:
    """A bucket under whose prefix nothing lies."""
    return Bucket("film", f"tests/{secrets.token_hex(4)}/", s3_server.endpoint, KEY_ID, SECRET)


@pytest.fixture
def s3_settings(bucket: Bucket) -> dict[str, Any]:
    """What makes a process store into the bucket."""
    return {
        "MOVIEQ_STORAGE": f"s3://{bucket.name}/{bucket.prefix}",
        "MOVIEQ_R2_ENDPOINT": bucket.endpoint,
        "MOVIEQ_R2_ACCESS_KEY_ID": bucket.key_id,
        "MOVIEQ_R2_SECRET_ACCESS_KEY": bucket.secret,
    }
