"""Work beside a block, and work that no cancel may cut short."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from workers.concurrency import beside, first, uninterrupted


async def test_a_part_that_dies_is_logged_at_once_under_its_name_and_the_block_goes_on() -> None:
    died = asyncio.Event()

    async def dies() -> None:
        died.set()
        raise ValueError("nobody expected this")

    with structlog.testing.capture_logs() as entries:
        async with beside(counting=dies()):
            await died.wait()
            await asyncio.sleep(0)
            (entry,) = entries
    assert (entry["event"], entry["part"], entry["log_level"]) == ("part_died", "counting", "error")
    assert isinstance(entry["exc_info"], ValueError)


async def test_a_part_ends_with_its_block_also_where_that_raises() -> None:
    ended = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def block() -> None:
        async with beside(waiting=waits()):
            await asyncio.sleep(0)
            raise KeyError

    with pytest.raises(KeyError):
        await block()
    assert ended.is_set()


async def test_a_cancel_waits_for_uninterrupted_work_and_then_goes_on() -> None:
    started, go, written = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def write() -> None:
        started.set()
        await go.wait()
        written.set()

    task = asyncio.create_task(uninterrupted(write()))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert written.is_set()


async def test_uninterrupted_work_is_cancelled_where_its_caller_gives_it_up() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def write() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    task = asyncio.create_task(uninterrupted(write(), unless=lambda: True))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await cancelled.wait()


async def test_uninterrupted_work_gives_its_result_or_its_error() -> None:
    async def gives() -> int:
        return 7

    async def breaks() -> int:
        raise ValueError("broken")

    assert await uninterrupted(gives()) == 7
    with pytest.raises(ValueError, match="broken"):
        await uninterrupted(breaks())


async def test_the_first_of_several_waits_ends_the_others_and_its_error_is_raised() -> None:
    ended = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def breaks() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await first(waits(), breaks())
    assert ended.is_set()
