"""The real servers that tests run against: Valkey on a unix socket, emptied for each test, and SeaweedFS, where each test has a prefix."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from arq.connections import ArqRedis

from movieq.local.embedded import Valkey, valkey
from movieq.queue.connection import connect
from movieq.queue.store import Store
from movieq.settings import Bucket
from tests.seaweed import KEY_ID, SECRET, Seaweed, seaweed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests were skipped, in one line for each reason."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


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
