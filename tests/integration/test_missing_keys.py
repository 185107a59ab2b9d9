"""Every script with each of the keys that it reads missing: it refuses and writes nothing, or adds no inconsistency."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from movieq.queue.api_keys import ApiKeys
from movieq.queue.files import Files
from movieq.queue.outbox import Outbox
from movieq.queue.repair import inconsistencies
from movieq.queue.scripts import LUA
from movieq.queue.store import Budget, Store
from movieq.tasks.entities import DeliveryState, Upload
from movieq.tasks.states import ProjectId, RunToken, TaskId
from tests.arrange import CPU, contents, new_task, raw, result
from tests.integration.test_damage import IDS, REFUSALS, busy, put

END = "the end of what was monitored"
FIRST, SECOND = f"{IDS['completed']}-1", f"{IDS['completed']}-2"
"""The deliveries of the completed task: to the CMS, and the webhook."""
NEW = TaskId("00000000-0000-4000-8000-00000000000a")
UPLOAD = Upload(ProjectId("film"), "uploads/film/upload/file", 1000, "image/png")


class Runs(NamedTuple):
    """Runs of the busy installation: one that holds its lease, and one whose lease has expired."""

    current: RunToken
    reaped: RunToken


Call = Callable[[Store, Runs], Awaitable[Any]]


def run_calls(act: Callable[[Store, TaskId, RunToken], Awaitable[Any]]) -> list[Call]:
    """Return calls of the verb by the run that holds its lease, and by the run whose lease has expired."""
    return [
        lambda store, runs: act(store, IDS["processing"], runs.current),
        lambda store, runs: act(store, IDS["reaped"], runs.reaped),
    ]


def expire(name: str, act: Call) -> Call:
    """Return the call, preceded by making everything in this list due."""

    async def call(store: Store, runs: Runs) -> Any:
        for key in await raw(store).keys(store.keys[name] + "*"):
            for task_id in await raw(store).zrange(key, 0, -1):
                await raw(store).zadd(key, {task_id: 1})
        return await act(store, runs)

    return call


CALLS: dict[str, list[Call]] = {
    "submit": [
        lambda store, runs: store.submit(new_task(task_id=NEW, callback_url="http://127.0.0.1:1/", max_queued=99, max_queued_all=99)),
        lambda store, runs: store.submit(new_task(task_id=NEW, idempotency="completed", body_hash="b")),
        lambda store, runs: store.submit(
            new_task(
                task_id=NEW, fingerprint="completed", reused=IDS["completed"], reused_result=b"{}", reused_prefix="projects/film/image/t/r"
            )
        ),
    ],
    "claim": [
        lambda store, runs: store.claim("w2", "n", CPU * 2, rows={"b": 2}, host="here"),
        lambda store, runs: store.claim("w1", "first", CPU),
    ],
    "report": run_calls(lambda store, task_id, run: store.report(task_id, run, 0.6, "generating_image", gpu=(2.0, 1.0), keep=True)),
    "preview": run_calls(lambda store, task_id, run: store.preview(task_id, run, b"jpeg")),
    "complete": run_calls(lambda store, task_id, run: store.complete(task_id, run, result(), "http://127.0.0.1:1/cms")),
    "fail": run_calls(lambda store, task_id, run: store.fail(task_id, run, "it broke", "internal")),
    "requeue": [
        *run_calls(lambda store, task_id, run: store.requeue(task_id, run, Budget.TRIES, 3, 0, "it broke", "network")),
        *run_calls(lambda store, task_id, run: store.requeue(task_id, run, Budget.DEATHS, 1, 0, "it died", "worker_lost")),
    ],
    "cancel": [lambda store, runs, name=name: store.cancel(IDS[name]) for name in ("queued", "delayed", "processing", "reaped")],  # type: ignore[misc]
    "retry": [lambda store, runs: store.retry(IDS["failed"])],
    "renew": [
        lambda store, runs: store.renew("w1", [], [(IDS["processing"], runs.current), (IDS["reaped"], runs.reaped)], gpu_bytes=24 * 2**30),
        lambda store, runs: store.renew("w1", [], [], gpu_bytes=0),
    ],
    "leave": [lambda store, runs: store.leave("w1")],
    "tidy": [expire(name, lambda store, runs: store.tidy()) for name in ("running", "delayed", "deadlines", "heartbeat_times")],
    "sweep": [expire("ended", lambda store, runs: store.sweep(0))],
    "retire": [expire("media", lambda store, runs: store.retire(0))],
    "take_turn": [lambda store, runs: store.take_turn("w1", 30_000)],
    "write_check": [lambda store, runs: store.check_write()],
    "admit": [
        lambda store, runs: Outbox(store.redis).admit("w1", "nonce", 9, 9, [], 30_000),
        expire("deliveries", lambda store, runs: Outbox(store.redis).admit("w1", "nonce", 1, 1, [], 30_000)),
    ],
    "begin": [lambda store, runs, id=id: Outbox(store.redis).begin(id, 30_000) for id in (FIRST, SECOND)],  # type: ignore[misc]
    "record_answer": [lambda store, runs, yes=yes: Outbox(store.redis).record_answer(SECOND, answered=yes) for yes in (True, False)],  # type: ignore[misc]
    "delivered": [
        lambda store, runs: Outbox(store.redis).delivered(FIRST, DeliveryState.DELIVERED, 1, 200, "", 7),
        lambda store, runs: Outbox(store.redis).delivered(SECOND, DeliveryState.FAILED, 1, 500, "no"),
    ],
    "resend": [lambda store, runs: Outbox(store.redis).resend(IDS["completed"], SECOND)],
    "repair": [lambda store, runs, name=name: store.repair(IDS[name], [], apply=True) for name in IDS],  # type: ignore[misc]
    "recount": [lambda store, runs: store.recount(apply=True)],
    "take_tokens": [lambda store, runs: ApiKeys(store.redis).take_tokens("key", 1, 9, 3)],
    "add_upload": [lambda store, runs: Files(store.redis).add_upload("upload", UPLOAD, "uploads/film/upload", 2**30)],
    "drop_upload": [lambda store, runs: Files(store.redis).drop_upload("upload", UPLOAD, "uploads/film/upload")],
}


def test_every_script_has_calls() -> None:
    assert CALLS.keys() == {path.stem for path in LUA.glob("*.lua")}


async def found(store: Store) -> set[tuple[TaskId | None, str]]:
    """Return the inconsistencies, without the values of counters."""
    return {(each.task_id, each.text.partition(" as ")[0]) async for each in inconsistencies(store, apply=False)}


@contextlib.asynccontextmanager
async def reads(store: Store, keys: dict[bytes, bytes], into: set[bytes]) -> AsyncIterator[None]:
    """Collect in `into` those of these keys that commands name while the block runs."""
    async with raw(store).monitor() as monitor:
        yield
        await raw(store).echo(END)
        while END not in (command := (await monitor.next_command())["command"]):
            into |= {key for key in keys if key.decode() in command}


WITHOUT: dict[bytes, set[tuple[TaskId | None, str]]] = {}
"""Missing key -> inconsistencies of the busy installation without it, as far as they were looked up."""
CASES = [(name, number) for name, calls in CALLS.items() for number in range(len(calls))]


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}-{number}" for name, number in CASES])
async def test_a_missing_key_makes_no_half_written_record(store: Store, name: str, number: int) -> None:
    call = CALLS[name][number]
    keys = await busy(store)
    runs = Runs(*[RunToken((await raw(store).get(key)).decode()) for key in ("runs", "reaped_run")])
    keys = {key: value for key, value in keys.items() if key not in (b"runs", b"reaped_run")}
    read: set[bytes] = set()
    await put(store, keys)
    async with reads(store, keys, read):
        with contextlib.suppress(*REFUSALS):
            await call(store, runs)
    assert await found(store) == set()
    for missing in sorted(read):
        left = {key: value for key, value in keys.items() if key != missing}
        await put(store, left)
        if missing not in WITHOUT:
            WITHOUT[missing] = await found(store)
        try:
            await call(store, runs)
        except REFUSALS:
            after = await contents(store)
            await put(store, left)
            assert await contents(store) == after, missing
        else:
            assert await found(store) - WITHOUT[missing] == set(), missing
