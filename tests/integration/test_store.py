"""Every (state, verb) against the table of transitions; fencing, repeated verbs, the order of the queue, the indexes."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from arq.jobs import Job
from redis.exceptions import OutOfMemoryError

from movieq.errors import IdempotencyMismatch, InvalidState, QueueFull, RequestError, RunLost
from movieq.local.embedded import Valkey
from movieq.queue import store as store_module
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.tasks.states import STATES, TRANSITIONS, EventType, Kind, ProjectId, RunToken, TaskId, TaskStatus, Verb
from tests.arrange import CPU, claim, contents, later, new_task, raw, result, running

LUA = Path(store_module.__file__).with_name("lua")
BEFORE: list[TaskStatus | None] = [None, *STATES]


async def bring_to(store: Store, state: TaskStatus | None) -> tuple[TaskId, RunToken]:
    """Return a task in this state, and its run, or a run that never existed if it has none."""
    task = new_task()
    if state is None:
        return task.task_id, RunToken("none")
    await store.submit(task)
    if state is TaskStatus.QUEUED:
        return task.task_id, RunToken("none")
    (claimed,) = await claim(store)
    match state:
        case TaskStatus.COMPLETED:
            await store.complete(task.task_id, claimed.run, result())
        case TaskStatus.FAILED:
            await store.fail(task.task_id, claimed.run, "it broke", "internal")
        case TaskStatus.CANCELLED:
            await store.cancel(task.task_id)
    return task.task_id, claimed.run


async def say(store: Store, verb: Verb, task_id: TaskId, run: RunToken) -> None:
    """Call the verb as this run; for an ended task use another run, since the same run gets the same answer as before."""
    match verb:
        case Verb.SUBMIT:
            await store.submit(new_task(task_id=task_id))
        case Verb.CLAIM:
            await claim(store, "w2")
        case Verb.REPORT:
            await store.report(task_id, run, 0.5, "generating_image")
        case Verb.COMPLETE:
            await store.complete(task_id, run, result())
        case Verb.FAIL:
            await store.fail(task_id, run, "it broke", "internal")
        case Verb.REQUEUE:
            await store.requeue(task_id, run, Budget.TRIES, 3, 0, "it broke", "network")
        case Verb.CANCEL:
            await store.cancel(task_id)
        case Verb.RETRY:
            await store.retry(task_id)


@pytest.mark.parametrize("state", BEFORE)
@pytest.mark.parametrize("verb", Verb)
async def test_a_verb_leads_where_the_table_says_and_changes_nothing_elsewhere(store: Store, state: TaskStatus | None, verb: Verb) -> None:
    task_id, run = await bring_to(store, state)
    if state is not None and state.ended:
        run = RunToken("another")
    before = await raw(store).hgetall(KEYS["task"] + task_id)
    target = TRANSITIONS.get((state, verb))
    if target is None and verb in (Verb.REPORT, Verb.COMPLETE, Verb.FAIL, Verb.REQUEUE):
        with pytest.raises(RunLost):
            await say(store, verb, task_id, run)
    elif target is None and verb in (Verb.CANCEL, Verb.RETRY) and (state, verb) != (TaskStatus.CANCELLED, Verb.CANCEL):
        with pytest.raises(RequestError) as refusal:
            await say(store, verb, task_id, run)
        assert refusal.value.code == ("not_found" if state is None else "invalid_state")
    else:
        await say(store, verb, task_id, run)
    if target is None:
        assert await raw(store).hgetall(KEYS["task"] + task_id) == before
    else:
        task = await Queries(store.redis).task(task_id)
        assert task is not None
        assert task.status is target
        await holds_together(store, task_id, target)


async def holds_together(store: Store, task_id: TaskId, status: TaskStatus) -> None:
    """Assert that the task is in exactly the lists that belong to its state."""
    redis, name = raw(store), task_id.encode()
    for each in STATES:
        for task_type in ("", "generate_image"):
            listed = await redis.zrange(f"{KEYS['index']}film|{each}|{task_type}", 0, -1)
            assert (name in listed) == (each is status)
    assert name in await redis.zrange(f"{KEYS['index']}film||", 0, -1)
    waiting = await redis.zrange(KEYS["waiting"] + "cpu_intensive:film", 0, -1)
    assert (name in waiting) == (status is TaskStatus.QUEUED)
    assert (name in await redis.zrange(KEYS["waiting"] + "cpu_intensive", 0, -1)) == (status is TaskStatus.QUEUED)
    assert (name in await redis.zrange(KEYS["running"] + "cpu_intensive", 0, -1)) == (status is TaskStatus.PROCESSING)
    assert (await redis.zscore(KEYS["virtual_times"] + "cpu_intensive", "film") is not None) == (status is TaskStatus.QUEUED)
    assert (await redis.zscore(KEYS["deadlines"], task_id) is not None) == (status is TaskStatus.PROCESSING)
    assert await redis.sismember(KEYS["worker_tasks"] + "w1", task_id) + await redis.sismember(KEYS["worker_tasks"] + "w2", task_id) == (
        status is TaskStatus.PROCESSING
    )


@pytest.mark.parametrize("verb", [Verb.COMPLETE, Verb.FAIL, Verb.REQUEUE])
async def test_an_ending_verb_said_again_by_the_same_run_answers_the_same_and_writes_nothing(store: Store, verb: Verb) -> None:
    task_id, run = await running(store, callback_url="http://127.0.0.1:1/")
    await say(store, verb, task_id, run)
    before = await contents(store)
    await say(store, verb, task_id, run)
    assert await contents(store) == before


async def test_submit_of_a_known_id_answers_its_receipt(store: Store) -> None:
    task = new_task()
    first = await store.submit(task)
    assert await store.submit(task) == first
    assert await raw(store).zcard(KEYS["waiting"] + "cpu_intensive") == 1


async def test_a_claim_with_the_same_nonce_answers_the_same_tasks(store: Store) -> None:
    await store.submit(new_task())
    await store.submit(new_task())
    first = await store.claim("w1", "nonce", CPU)
    again = await store.claim("w1", "nonce", CPU)
    assert [(c.task.task_id, c.run) for c in again] == [(c.task.task_id, c.run) for c in first]
    assert len(first) == 1


async def test_cancel_said_again_answers_the_same(store: Store) -> None:
    task_id, _ = await running(store)
    first = await store.cancel(task_id)
    assert first[0] is TaskStatus.PROCESSING
    assert await store.cancel(task_id) == first


async def test_a_run_whose_task_another_run_holds_writes_nothing(store: Store) -> None:
    task_id, zombie = await running(store)
    await store.requeue(task_id, zombie, Budget.DRAIN, 0, 0, "drained", "internal")
    (present,) = await claim(store, "w2")
    before = await contents(store)
    with pytest.raises(RunLost):
        await store.report(task_id, zombie, 0.9, "generating_image")
    with pytest.raises(RunLost):
        await store.complete(task_id, zombie, result("zombie"))
    with pytest.raises(RunLost):
        await store.fail(task_id, zombie, "x", "invalid_input")
    assert await store.requeue(task_id, zombie, Budget.DRAIN, 0, 0, "drained", "internal") is TaskStatus.QUEUED  # the answer that it had
    assert await contents(store) == before
    await store.complete(task_id, present.run, result("present"))


async def test_faults_use_up_the_tries_and_the_last_one_fails_the_task(store: Store) -> None:
    task_id, run = await running(store)
    for _ in range(2):
        assert await store.requeue(task_id, run, Budget.TRIES, 3, 0, "no network", "network") is TaskStatus.QUEUED
        (claimed,) = await claim(store)
        run = claimed.run
    assert await store.requeue(task_id, run, Budget.TRIES, 3, 0, "no network", "network") is TaskStatus.FAILED
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert (task.attempt, task.error_code, task.retryable) == (3, "network", True)


async def test_a_drained_task_goes_back_uncounted(store: Store) -> None:
    task_id, run = await running(store)
    for _ in range(20):
        await store.requeue(task_id, run, Budget.DRAIN, 0, 0, "the worker stops", "internal")
        (claimed,) = await claim(store)
        run = claimed.run
    await store.complete(task_id, run, result())


@pytest.mark.parametrize("counts", [Budget.TRIES, Budget.DEATHS])
async def test_retry_gives_a_failed_task_a_new_budget(store: Store, counts: Budget) -> None:
    task_id, run = await running(store)
    for _ in range(2):
        for expected in (TaskStatus.QUEUED, TaskStatus.QUEUED, TaskStatus.FAILED):
            assert await store.requeue(task_id, run, counts, 3, 0, "x", "network") is expected
            if expected is TaskStatus.FAILED:
                await store.retry(task_id)
            (claimed,) = await claim(store)
            run = claimed.run


async def test_after_a_retry_attempts_count_on_and_the_log_goes_on(store: Store) -> None:
    task_id, run = await running(store)
    await store.fail(task_id, run, "bad", "invalid_input")
    await store.retry(task_id)
    (claimed,) = await claim(store)
    assert claimed.task.attempt == 2
    assert await raw(store).ttl(KEYS["log"] + task_id) == -1
    assert [entry.type for entry in await Queries(store.redis).log_after(task_id, None)] == ["started", "failed", "queued", "started"]


async def test_a_delayed_retry_is_claimed_only_when_it_is_due(store: Store) -> None:
    task_id, run = await running(store)
    await store.requeue(task_id, run, Budget.TRIES, 3, 60_000, "no network", "network")
    await store.tidy()
    assert await claim(store) == []
    await raw(store).zincrby(KEYS["delayed"], -60_000, task_id)
    await store.tidy()
    (claimed,) = await claim(store)
    assert claimed.task.task_id == task_id


@pytest.fixture
async def short_lease(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Let leases expire at once."""
    monkeypatch.setattr(store_module, "LEASE_MS", 1)
    yield
    monkeypatch.undo()


async def test_a_dead_lease_is_returned_by_tidy_and_counted_apart_from_tries(store: Store, short_lease: None) -> None:
    task_id, _ = await running(store)
    await later(store)
    assert (await store.tidy()).reaped == 1
    (claimed,) = await claim(store, "w2")
    assert (claimed.task.task_id, claimed.task.attempt) == (task_id, 2)
    assert await raw(store).hmget(KEYS["task"] + task_id, "tries", "silences") == [b"0", b"1"]


async def test_a_task_whose_workers_fall_silent_waits_longer_each_time_and_is_a_dead_letter_after_the_tenth(store: Store) -> None:
    task_id = (await store.submit(new_task())).task_id
    waits = []
    for _ in range(10):
        (claimed,) = await claim(store)
        await store.report(task_id, claimed.run, 0.1, "rendering_video", stage="frames")
        await raw(store).zadd(KEYS["running"] + Kind.CPU_INTENSIVE, {task_id: 1})
        assert (await store.tidy()).reaped == 1
        waits.append(msgspec.json.decode((await Queries(store.redis).log_after(task_id, None, 1000))[-1].data).get("retry_in"))
        if waits[-1]:
            assert await claim(store) == []
            await raw(store).zadd(KEYS["delayed"], {task_id: 1})
            await store.tidy()
    assert waits == [0, 10, *[30] * 7, None]
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert (task.status, task.error_code, task.retryable) == (TaskStatus.FAILED, "worker_lost", True)
    (letter,), total = await Queries(store.redis).dead_letters()
    assert (letter.task_id, letter.last_stage, total) == (task_id, "frames", 1)
    await store.retry(task_id)
    assert await raw(store).hget(KEYS["task"] + task_id, "silences") == b"0"


async def test_renew_takes_back_what_was_reaped_but_not_begun_anew(store: Store, short_lease: None) -> None:
    task_id, run = await running(store)
    await later(store)
    await store.tidy()
    lost, _ = await store.renew("w1", [], [(task_id, run)], gpu_bytes=0)
    assert lost == []
    assert await claim(store, "w2") == []
    await store.complete(task_id, run, result())
    await holds_together(store, task_id, TaskStatus.COMPLETED)


async def test_renew_says_what_is_lost_and_what_was_not_mentioned(store: Store) -> None:
    cancelled, cancelled_run = await running(store)
    await store.cancel(cancelled)
    forgotten, forgotten_run = await running(store)
    lost, unmentioned = await store.renew("w1", [], [(cancelled, cancelled_run)], gpu_bytes=0)
    assert lost == [(cancelled, cancelled_run)]
    assert unmentioned == [(forgotten, forgotten_run)]


@pytest.mark.parametrize("ago_s", [pytest.param(60, id="outage"), pytest.param(-60, id="clock-back")])
async def test_nothing_is_reaped_after_an_outage_or_when_the_clock_went_back(store: Store, short_lease: None, ago_s: int) -> None:
    await running(store)
    await later(store)
    seconds, _ = await raw(store).time()
    await raw(store).set(KEYS["last_tidy"], (seconds - ago_s) * 1000)
    assert (await store.tidy()).reaped == 0
    await raw(store).delete(KEYS["leases_paused"])
    assert (await store.tidy()).reaped == 1


async def test_missed_deadlines_fail_a_waiting_and_a_running_task(store: Store) -> None:
    seconds, _ = await raw(store).time()
    late = new_task(start_by_ms=seconds * 1000 - 1)
    run_out, _ = await running(store, max_ms=1)
    await store.submit(late)
    await later(store)
    assert (await store.tidy()).past_deadline == 2
    for task_id in (late.task_id, run_out):
        task = await Queries(store.redis).task(task_id)
        assert task is not None
        assert (task.status, task.error_code) == (TaskStatus.FAILED, "deadline_exceeded")
        await holds_together(store, task_id, TaskStatus.FAILED)


async def test_projects_take_turns_however_many_tasks_one_has(store: Store) -> None:
    for _ in range(40):
        await store.submit(new_task("big"))
    for _ in range(3):
        await store.submit(new_task("small"))
    order = [c.task.project_id for c in await claim(store, slots=7)]
    assert order.count(ProjectId("small")) == 3


async def test_inside_a_project_high_goes_before_normal_before_low(store: Store) -> None:
    tasks = [new_task(priority=priority) for priority in (3, 2, 1)]
    for task in tasks:
        await store.submit(task)
    assert [c.task.task_id for c in await claim(store, slots=3)] == [task.task_id for task in reversed(tasks)]


async def test_every_eighth_claim_takes_the_oldest_task_whatever_its_priority(store: Store) -> None:
    old = new_task(priority=3)
    await store.submit(old)
    await later(store)
    for _ in range(20):
        await store.submit(new_task(priority=1))
    order = [c.task.task_id for c in await claim(store, slots=8)]
    assert order.index(old.task_id) == 7


async def test_the_eighth_claim_gives_no_more_to_a_project_that_is_ahead_of_its_share(store: Store) -> None:
    await store.submit(new_task("ahead"))
    await raw(store).zadd(KEYS["virtual_times"] + "cpu_intensive", {"ahead": 1e6})
    await later(store)
    for _ in range(20):
        await store.submit(new_task("fair"))
    assert {c.task.project_id for c in await claim(store, slots=16)} == {"fair"}


async def test_an_idle_project_comes_back_at_the_virtual_time_of_the_last_claim(store: Store) -> None:
    for _ in range(10):
        await store.submit(new_task("busy"))
    await claim(store, slots=7)
    await store.submit(new_task("late"))
    late = await raw(store).zscore(KEYS["virtual_times"] + "cpu_intensive", "late")
    assert late == float(await raw(store).get(KEYS["claimed_virtual_time"] + "cpu_intensive") or 0) > 0


async def test_a_project_that_is_ahead_of_its_share_does_not_shed_that_by_going_idle(store: Store) -> None:
    await store.submit(new_task("ahead", estimate_ms=2000))
    await store.submit(new_task("busy", estimate_ms=10))
    assert len(await claim(store, slots=2)) == 2
    owed = float(await raw(store).hget(KEYS["idle_virtual_times"] + Kind.CPU_INTENSIVE, "ahead"))
    assert owed > float(await raw(store).get(KEYS["claimed_virtual_time"] + Kind.CPU_INTENSIVE) or 0)
    await store.submit(new_task("ahead"))
    assert await raw(store).zscore(KEYS["virtual_times"] + Kind.CPU_INTENSIVE, "ahead") == owed


async def test_a_submit_wakes_one_idle_worker_and_skips_those_that_have_gone(store: Store) -> None:
    await claim(store, "gone")
    await claim(store, "there")
    async with raw(store).pubsub() as pubsub:
        await pubsub.subscribe(KEYS["control"] + "there")
        await pubsub.get_message(timeout=5)
        await store.submit(new_task())
        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
    assert message is not None
    assert message["data"] == b"wake"
    assert await raw(store).scard(KEYS["idle"] + "cpu_intensive") <= 1


async def test_the_same_idempotency_key_answers_the_first_receipt_and_refuses_another_body(store: Store) -> None:
    answers = await asyncio.gather(*(store.submit(new_task(idempotency="key", body_hash="a")) for _ in range(50)))
    assert len({answer.task_id for answer in answers}) == 1
    assert sum(not answer.replayed for answer in answers) == 1
    assert await raw(store).zcard(KEYS["waiting"] + "cpu_intensive") == 1
    with pytest.raises(IdempotencyMismatch):
        await store.submit(new_task(idempotency="key", body_hash="b"))


async def test_a_project_with_its_most_waiting_tasks_is_told_so(store: Store) -> None:
    await store.submit(new_task(max_queued=1))
    with pytest.raises(QueueFull):
        await store.submit(new_task(max_queued=1))
    await store.submit(new_task("other", max_queued=1))


async def test_progress_never_falls_and_is_logged_in_steps_of_half_a_percent(store: Store) -> None:
    task_id, run = await running(store)
    for step in range(1, 1000):
        await store.report(task_id, run, step / 1000, "generating_image", stage="render", step=step, steps=1000)
    await store.report(task_id, run, 0.1, "generating_image")
    logged = [entry for entry in await Queries(store.redis).log_after(task_id, None) if entry.type is EventType.PROGRESS]
    assert 190 <= len(logged) <= 200
    values = [msgspec.json.decode(entry.data)["progress"] for entry in logged]
    assert values == sorted(values)
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.progress == 0.999


async def test_a_result_passes_through_unchanged(store: Store) -> None:
    task_id, run = await running(store, callback_url="http://127.0.0.1:1/", metadata=b'{"list":[],"n":12345678901234567}')
    await store.complete(task_id, run, result())
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.result == result()
    entries = await Queries(store.redis).log_after(task_id, None)
    assert msgspec.json.decode(entries[-1].data)["result"]["metadata"] == result().metadata
    facts = await raw(store).hgetall(f"{KEYS['delivery']}{task_id}-1")
    assert facts[b"metadata"] == b'{"list":[],"n":12345678901234567}'
    assert await raw(store).ttl(KEYS["log"] + task_id) > 86000


async def test_what_a_run_put_into_storage_without_committing_becomes_an_orphan(store: Store) -> None:
    task_id, run = await running(store)
    await store.report(task_id, run, 0.9, "uploading_result", prefix="projects/film/image/t/r")
    await store.cancel(task_id)
    assert await raw(store).zrange(KEYS["orphans"], 0, -1) == [b"projects/film/image/t/r"]
    task_id, run = await running(store)
    await store.report(task_id, run, 0.9, "uploading_result", prefix="projects/film/image/t2/r")
    await store.complete(task_id, run, result())
    assert await raw(store).zcard(KEYS["orphans"]) == 1


async def test_arq_reads_tasks_and_deliveries_as_its_jobs(store: Store) -> None:
    task = new_task(callback_url="http://127.0.0.1:1/")
    await store.submit(task)
    (queued,) = await raw(store).queued_jobs(queue_name=KEYS["waiting"] + "cpu_intensive:film")
    assert (queued.function, queued.job_id, queued.kwargs) == ("generate_image", task.task_id, {"task_data": {"prompt": "a lighthouse"}})
    info = await Job(task.task_id, store.redis, _deserializer=msgspec.msgpack.decode).info()
    assert info is not None
    assert info.function == "generate_image"
    await store.cancel(task.task_id)
    (delivery,) = await raw(store).queued_jobs()
    assert (delivery.function, [*delivery.args], delivery.kwargs) == ("deliver", [f"{task.task_id}-1"], {})


async def test_estimates_are_the_types_default_until_five_tasks_of_the_shape_have_run(store: Store) -> None:
    for _ in range(5):
        assert (await store.submit(new_task())).estimate_ms == 2000
        (claimed,) = await claim(store)
        await store.complete(claimed.task.task_id, claimed.run, result())
    assert (await store.submit(new_task())).estimate_ms < 2000


async def test_a_full_memory_refuses_submit_and_nothing_else(store: Store) -> None:
    task_id, run = await running(store)
    waiting = new_task()
    await store.submit(waiting)
    before = (await raw(store).config_get("maxmemory"))["maxmemory"]
    await raw(store).config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            await store.submit(new_task())
        await store.renew("w1", [], [(task_id, run)], gpu_bytes=0)
        await store.report(task_id, run, 0.5, "generating_image")
        await store.complete(task_id, run, result())
        await store.cancel(waiting.task_id)
    finally:
        await raw(store).config_set("maxmemory", before)


async def commands(store: Store) -> int:
    """Return the number of commands that the server has run, including those of scripts."""
    stats = await raw(store).info("commandstats")
    return sum(entry["calls"] for name, entry in stats.items() if name not in ("cmdstat_info", "cmdstat_config|resetstat"))


async def page_cost(store: Store, project: str) -> tuple[int, dict[str, Any]]:
    """Return the number of commands for a page, and the commands themselves."""
    await Queries(store.redis).page(ProjectId(project), None, None, 1, 10)
    await raw(store).config_resetstat()
    tasks, _ = await Queries(store.redis).page(ProjectId(project), TaskStatus.QUEUED, None, 1, 10)
    assert len(tasks) == 10
    return await commands(store), await raw(store).info("commandstats")


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_a_project_page_costs_the_same_with_ten_and_with_very_many_tasks(store: Store, count: int) -> None:
    for _ in range(10):
        await store.submit(new_task("few"))
    for start in range(0, count, 2000):
        async with asyncio.TaskGroup() as group:
            for _ in range(start, start + 2000):
                group.create_task(store.submit(new_task("many")))
    few, _ = await page_cost(store, "few")
    many, stats = await page_cost(store, "many")
    assert many <= few * 1.3
    assert not {"cmdstat_scan", "cmdstat_keys", "cmdstat_smembers", "cmdstat_zscan"} & stats.keys()

    async def best_of(project: str, offset: int) -> float:
        loop, times = asyncio.get_running_loop(), []
        for _ in range(200):
            begun = loop.time()
            await Queries(store.redis).page(ProjectId(project), TaskStatus.QUEUED, None, offset, 10)
            times.append(loop.time() - begun)
        return sorted(times)[20]

    await best_of("few", 1)
    ratios = [await best_of("many", 1) / await best_of("few", 1) for _ in range(3)]
    assert min(ratios) <= 1.3


def test_every_script_opens_with_its_contract() -> None:
    for path in LUA.glob("*.lua"):
        shebang, *lines = path.read_text().split("\n")
        assert re.match(r"^#!lua( flags=allow-oom)?$", shebang), path.name
        head = list(itertools.takewhile(lambda line: line.startswith("-- "), lines))
        for word in ("-- args: ", "-- Returns ", "-- Cost: "):
            assert any(line.startswith(word) for line in head[1:]), f"{path.name}: {word}"
        (args,) = (line.removeprefix("-- args: ").split() for line in head if line.startswith("-- args: "))
        described = [name for line in head if (found := re.match(r"--   ([\w, ]+|\.\.\.): ", line)) for name in found[1].split(", ")]
        assert described == args, path.name
    assert {path.stem for path in LUA.glob("*.lua")} == {
        *Verb,
        "preview",
        "renew",
        "leave",
        "tidy",
        "sweep",
        "retire",
        "take_turn",
        "write_check",
        "admit",
        "begin",
        "record_answer",
        "delivered",
        "resend",
        "repair",
        "recount",
        "take_tokens",
        "add_upload",
        "drop_upload",
    }


def test_no_python_or_lua_spells_a_key_of_its_own() -> None:
    root = LUA.parents[1]
    for path in [*root.glob("movieq/**/*.py"), *root.glob("workers/**/*.py"), *root.glob("movieq/queue/lua/**/*.lua")]:
        if path.name != "keys.py":
            assert not re.search(r"""["'](movieq|arq):[a-z]""", path.read_text()), path


async def test_a_new_run_has_none_of_the_fields_of_the_one_before(store: Store) -> None:
    declared = (LUA / "includes/run_fields.lua").read_text().split("RUN_FIELDS = {")[1].split("\n}")[0]
    fields = set(re.findall(r"'(\w+)'", declared))
    assert len(fields) > 10
    task_id, run = await running(store)
    await raw(store).hset(KEYS["task"] + task_id, mapping={**dict.fromkeys(fields, "1"), "run": run, "gpu_before_ms": 1, "gpu_ms": 1})
    await store.requeue(task_id, run, Budget.DRAIN, 0, 0, "stopped", "worker_lost")
    waiting = await Queries(store.redis).task(task_id)
    assert waiting is not None
    assert (waiting.run, waiting.stage, waiting.step, waiting.steps, waiting.remaining_ms) == (None, None, None, None, None)
    await raw(store).zadd(KEYS["offered"] + "1", {task_id: 1})
    (again,) = await store.claim("w2", "another", [], host="1")
    left = {each.decode() for each in await raw(store).hkeys(KEYS["task"] + task_id)} & fields
    assert (left, again.run != run) == ({"run"}, True)


async def test_refused_states_say_what_the_state_is(store: Store) -> None:
    task_id, run = await running(store)
    await store.complete(task_id, run, result())
    with pytest.raises(InvalidState, match="completed and cannot be cancelled"):
        await store.cancel(task_id)
    with pytest.raises(InvalidState, match="completed and cannot be retried"):
        await store.retry(task_id)


async def test_a_cancel_of_the_caller_does_not_stop_a_verb_half_way(store: Store, server: Valkey) -> None:
    task_id = (await store.submit(new_task())).task_id
    other = Store(connect(server.url, patient=True))  # which has its connection yet to open
    call = asyncio.create_task(other.claim("w1", "nonce", CPU))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await other.redis.aclose()
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.status is TaskStatus.PROCESSING


def test_the_kinds_are_the_three_of_the_contract() -> None:
    assert [*Kind] == ["gpu_heavy", "gpu_medium", "cpu_intensive"]
