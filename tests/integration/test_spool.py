"""The spools of workers: those of dead workers are removed, those of living ones never."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fleet import fleet
from workers.spool import PREFIX, spool


def spools(folder: Path) -> set[Path]:
    return set(folder.glob(f"{PREFIX}*"))


async def test_a_worker_that_starts_removes_the_spool_of_one_that_was_killed_and_no_other(folder: Path) -> None:
    async with fleet(folder) as installation:
        shared = folder / "spool"
        killed, stopped = await asyncio.gather(*(installation.worker(MOVIEQ_SPOOL=str(shared)) for _ in range(2)))
        before = spools(shared)
        for each in before:
            (each / "task").mkdir()
            (each / "task" / "input0").write_bytes(b"x")
        killed.send(signal.SIGKILL)
        await killed.ended()
        assert spools(shared) == before
        starting = await installation.worker(MOVIEQ_SPOOL=str(shared))
        (living,) = before & spools(shared)
        assert (living / "task" / "input0").exists()
        assert len(spools(shared)) == 2
        starting.send(signal.SIGTERM)
        stopped.send(signal.SIGTERM)
        await asyncio.gather(starting.ended(), stopped.ended())
        assert spools(shared) == set()


def test_a_spool_is_gone_with_its_block_also_where_the_block_broke(folder: Path) -> None:
    with pytest.raises(FileNotFoundError), spool(folder) as own:
        (own / "frame").write_bytes((own / "nothing").read_bytes())
    assert spools(folder) == set()


def test_a_link_that_somebody_laid_is_not_followed(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "letter").write_text("dear")
    (folder / f"{PREFIX}link").symlink_to(elsewhere)
    (folder / f"{PREFIX}file").write_text("no folder")
    with spool(folder):
        assert (elsewhere / "letter").read_text() == "dear"
        assert len(spools(folder)) == 3


def test_workers_that_start_at_the_same_moment_each_keep_their_own(folder: Path) -> None:
    with ExitStack() as held, ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: held.enter_context(spool(folder)), range(200)))
        assert set(folders) == spools(folder)
    assert spools(folder) == set()
