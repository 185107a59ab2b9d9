"""The real servers of the tests: Valkey on a unix socket, emptied for each test, and SeaweedFS, where each test has a prefix.

A process that several tests share is replaced after a test has failed, which may have left it in the middle of something.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from movieq.local import doctor
from movieq.local.embedded import Valkey, valkey
from movieq.queue import connection
from movieq.queue import store as store_module
from movieq.queue.connection import Redis, connect
from movieq.queue.store import Store
from movieq.settings import Bucket
from tests.seaweed import KEY_ID, SECRET, Seaweed, seaweed

_SHARED: Final = pytest.StashKey[dict[pytest.FixtureDef[Any], pytest.FixtureRequest]]()
_FAILED: Final = pytest.StashKey[bool]()
LONG: Final = {
    "test_chaos.py",
    "test_torture.py",
    "test_s3.py",
    "test_worker_end.py",
    "test_service.py",
    "test_zombies.py",
    "test_redis_faults.py",
    "test_deploys.py",
    "test_animatic.py",
}
"""Files that take long for the number of their tests. They run first: as the last one, each would leave the other cores idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; with `--no-loadscope-reorder` xdist leaves them there."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Generator[None, object, object]:
    """Record each fixture of ours, not of a plug-in, that several tests share and that must be closed."""
    if fixturedef.scope != "function" and fixturedef.baseid and inspect.isgeneratorfunction(fixturedef.func):
        request.session.stash.setdefault(_SHARED, {})[fixturedef] = request
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record that a test has failed."""
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Close the fixtures that a failed test shares with others, so that the next test that uses one gets a new one."""
    closed = False
    try:
        answer = yield
        closed = True
        return answer
    finally:
        if item.stash.get(_FAILED, False) or not closed:
            for fixturedef, request in reversed(item.session.stash.get(_SHARED, {}).items()):
                if fixturedef.argname in getattr(item, "fixturenames", ()):
                    fixturedef.finish(request)  # type: ignore[arg-type]  # pytest itself passes such a request


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped, in one line for each reason."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the patience that a busy machine needs; a test of a limit of time sets its own.

    Runs of a test's own outlast every wait, and a Redis that is slow is not unavailable. Processes that a test starts keep their limits.
    """
    monkeypatch.setattr(store_module, "LEASE_MS", 300_000)
    monkeypatch.setattr(connection, "PATIENT_S", 60.0)
    monkeypatch.setattr(connection, "IMPATIENT_S", 60.0)
    monkeypatch.setattr(doctor, "CHECK_S", 60.0)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Yield a Valkey for this session alone."""
    with valkey(tmp_path_factory.mktemp("valkey"), appendfsync="everysec") as running:
        yield running


@pytest.fixture
async def redis(server: Valkey) -> AsyncIterator[Redis]:
    """Yield a client of an empty Valkey."""
    async with connect(server.url, patient=True) as client:
        await client.flushall()
        yield client


@pytest.fixture
def store(redis: Redis) -> Store:
    """Return a store on an empty Valkey."""
    return Store(redis)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder."""
    return tmp_path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """Yield an S3 server for this session alone."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as running:
        asyncio.run(running.make_bucket("film"))
        yield running


@pytest.fixture
def bucket(s3_server: Seaweed) -> Bucket:
    """Return a bucket with an empty prefix."""
    return Bucket("film", f"tests/{secrets.token_hex(4)}/", s3_server.endpoint, KEY_ID, SECRET)


@pytest.fixture
def s3_settings(bucket: Bucket) -> dict[str, Any]:
    """Return the variables that make a process store files in the bucket."""
    return {
        "MOVIEQ_STORAGE": f"s3://{bucket.name}/{bucket.prefix}",
        "MOVIEQ_R2_ENDPOINT": bucket.endpoint,
        "MOVIEQ_R2_ACCESS_KEY_ID": bucket.key_id,
        "MOVIEQ_R2_SECRET_ACCESS_KEY": bucket.secret,
    }
