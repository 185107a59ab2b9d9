"""The real servers that tests run against: Valkey on a unix socket, one for a session, emptied for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from arq.connections import ArqRedis

from movieq.embedded import Valkey, valkey
from movieq.store import Store, connect


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A Valkey of this session's own."""
    with valkey(tmp_path_factory.mktemp("valkey"), appendfsync="everysec") as running:
        yield running


@pytest.fixture
async def redis(server: Valkey) -> AsyncIterator[ArqRedis]:
    """A client of an empty Valkey."""
    client = connect(server.url, patient=True)
    await client.flushall()
    yield client
    await client.aclose()
    await client.connection_pool.disconnect()


@pytest.fixture
async def store(redis: ArqRedis) -> AsyncIterator[Store]:
    """The store of an empty Valkey."""
    made = Store(redis)
    yield made
    await made.aclose()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    return tmp_path
