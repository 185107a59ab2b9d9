"""Wait for events, run work beside a block, and shield work from a cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from movieq import logs

CANCEL_AGAIN_S: Final = 0.5
"""Wait before a task that has not ended is cancelled again, in seconds."""

T = TypeVar("T")
log = logs.get()


async def set_within(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, but at most this many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


@asynccontextmanager
async def beside(**parts: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run the named coroutines while the block runs, then cancel them. If one raises, that is logged at once and the block goes on."""
    tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    for task in tasks:
        task.add_done_callback(_log_death)
    try:
        yield
    finally:
        await cancel_all(tasks)


def _log_death(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("part_died", part=task.get_name(), exc_info=error)


async def first(*waits: Coroutine[Any, Any, Any], within_s: float | None = None) -> None:
    """Wait until the first of these ends, but at most `within_s`; then cancel the others. Raises what the first one raised."""
    tasks = [asyncio.ensure_future(each) for each in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel_all(tasks)


async def cancel_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait until they have ended. The cancel is repeated, because a library may swallow one."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)


async def uninterrupted(work: Coroutine[Any, Any, T], unless: Callable[[], bool] = lambda: False) -> T:
    """Return the result of `work`. If the caller is cancelled, `work` still runs to its end before the cancel goes on.

    If `unless()` is true when the cancel comes, `work` is cancelled too.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
            if unless():
                task.cancel()
                break
    if cancelled is not None:
        if task.done():
            _log_death(task)
        raise cancelled
    return task.result()
