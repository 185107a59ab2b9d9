"""The stream of a task: snapshot, log, live events, end. It resumes without a gap or a duplicate; its signature opens it in browsers."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from movieq import signing
from movieq.local.embedded import Valkey, valkey
from movieq.queue import pubsub
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.settings import Settings
from movieq.streams import hub as hub_module
from movieq.streams import watchers
from movieq.streams.watchers import STUCK_S
from movieq.tasks.entities import DeliveryState, ProcessingProgress
from movieq.tasks.states import STATES, RunToken, TaskId, TaskStatus
from tests.arrange import raw, result
from tests.contract.client import ALL, DEADLINE_S, READ, UNKNOWN, Answer, Client, Event, Stream, schema
from tests.contract.conftest import Tasks, served, stopped
from tests.contract.test_status_cancel_retry import STATUS

PROGRESS = {
    *("task_id", "project_id", "type", "time", "attempt", "status", "progress", "current_step", "stage", "step", "steps"),
    "estimated_remaining",
}


async def log_of(store: Store, task_id: TaskId) -> list[str]:
    """Return the ids of a task's event log."""
    ids: list[str] = []
    while entries := await Queries(store.redis).log_after(task_id, ids[-1] if ids else None):
        ids += [entry.id for entry in entries]
    return ids


async def work(store: Store, task_id: TaskId, run: RunToken, steps: int = 10) -> None:
    """Report a run in steps of one percent."""
    for step in range(1, steps + 1):
        await store.report(task_id, run, step / 100, "generating_image", stage="denoise", step=step, steps=steps)


async def soon(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until the condition holds, at most until the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.005)


def ids(events: list[Event]) -> list[str]:
    return [event.id for event in events if event.id]


def types(events: list[Event]) -> list[str]:
    return [event.type for event in events]


# ── From the beginning ──


async def test_a_stream_is_one_that_no_proxy_keeps_back(api: Client, tasks: Tasks) -> None:
    async with api.events(await tasks.queued()) as stream:
        assert stream.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert (stream.response.headers["Cache-Control"], stream.response.headers["X-Accel-Buffering"]) == ("no-store, no-transform", "no")
        await stream.next()
        assert stream.retries == [2000]


@pytest.mark.parametrize("state", STATES)
async def test_the_snapshot_comes_first_and_is_the_status_with_the_newest_id(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    task_id = await tasks.in_state(state)
    async with api.events(task_id) as stream:
        snapshot = await stream.next()
    assert snapshot is not None
    assert (snapshot.id, snapshot.type, snapshot.data.keys()) == (None, "snapshot", STATUS | {"last_event_id"})
    assert snapshot.data["last_event_id"] == ([None, *await log_of(tasks.store, task_id)])[-1]
    schema("Snapshot").validate(snapshot.data)


async def test_snapshot_log_live_end(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    await work(store, task_id, run, 2)
    async with api.events(task_id) as stream:
        begun = [await stream.next() for _ in range(4)]
        assert [event.type for event in begun if event] == ["snapshot", "started", "progress", "progress"]
        await store.report(task_id, run, 0.5, "uploading_result")
        await store.complete(task_id, run, result())
        rest = await stream.rest()
    assert types(rest) == ["progress", "completed"]
    assert ids([event for event in begun if event] + rest) == await log_of(store, task_id)


@pytest.mark.parametrize("state", [TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED])
async def test_the_stream_of_a_task_that_has_ended_tells_its_log_and_ends(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    task_id = await tasks.in_state(state)
    async with api.events(task_id) as stream:
        told = await stream.rest()
    assert types(told)[0] == "snapshot"
    assert types(told)[-1] == state
    assert ids(told) == await log_of(tasks.store, task_id)


async def test_an_event_has_every_key_and_says_its_own_name(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    await store.report(task_id, run, 0.4, "generating_image", stage="denoise", step=4, steps=10, remaining_ms=61_400)
    await store.report(task_id, run, 0.5, "generating_image")
    await store.fail(task_id, run, 'it "broke"\n/ wholly', "internal")
    async with api.events(task_id) as stream:
        told = [event for event in await stream.rest() if event.type != "snapshot"]
    for event in told:
        assert event.data.keys() >= PROGRESS
        assert (event.data["type"], event.data["task_id"], event.data["project_id"]) == (event.type, task_id, "film")
        schema("ProcessingProgress").validate(event.data)
    step = {name: told[1].data[name] for name in ("progress", "stage", "step", "steps", "estimated_remaining")}
    assert step == {"progress": 0.4, "stage": "denoise", "step": 4, "steps": 10, "estimated_remaining": 61.4}
    assert (told[-1].data["error"], told[-1].data["error_code"]) == ('it "broke"\n/ wholly', "internal")


async def test_the_completed_event_has_the_result_with_addresses_that_open(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.completed()
    async with api.events(task_id) as stream:
        completed = (await stream.rest())[-1]
    assert completed.data["result"] == (await api.status(task_id))["result"]
    schema("ProcessingProgress").validate(completed.data)


async def test_the_updated_event_has_the_id_of_the_cms_in_its_result_and_nowhere_else(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    await store.complete(task_id, run, result(), "http://127.0.0.1:1/cms")
    await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.DELIVERED, 1, 201, "", 7)
    async with api.events(task_id) as stream:
        (updated,) = [event for event in await stream.rest() if event.type == "updated"]
    assert updated.data["result"]["payload_media_id"] == 7
    assert updated.data["result"] == (await api.status(task_id))["result"]
    assert "payload_media_id" not in updated.data
    schema("ProcessingProgress").validate(updated.data)


async def test_progress_between_the_entries_of_the_log_is_told_without_an_id(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    async with api.events(task_id) as stream:
        await stream.until("started")
        for step in range(1, 31):
            await store.report(task_id, run, step / 1000, "generating_image")
        told = [await stream.next() for _ in range(30)]
    progress = [event.data["progress"] for event in told if event]
    assert progress == sorted(progress)
    assert [bool(event.id) for event in told if event] == [step % 5 == 0 for step in range(1, 31)]


async def test_a_run_has_at_most_two_hundred_entries_of_progress(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    for step in range(1000):
        await store.report(task_id, run, step / 1000, "generating_image")
    assert 195 <= len(await log_of(store, task_id)) <= 201


async def test_a_task_that_is_given_back_and_taken_again_goes_on_in_the_same_stream(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    async with api.events(task_id) as stream:
        await stream.until("started")
        await store.requeue(task_id, run, Budget.TRIES, 3, 0, "it broke", "network")
        await store.complete(task_id, await tasks.claim(), result())
        assert [(event.type, event.data["attempt"]) for event in await stream.rest()] == [("retrying", 1), ("started", 2), ("completed", 2)]


async def test_after_a_retry_the_stream_does_not_end_at_the_old_failure(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.failed()
    await api.post(f"/api/v1/tasks/{task_id}/retry")
    async with api.events(task_id) as stream:
        assert types(await stream.until("queued")) == ["snapshot", "started", "failed", "queued"]
        await store.complete(task_id, await tasks.claim(), result())
        assert types(await stream.rest()) == ["started", "completed"]


async def test_a_waiting_task_that_is_cancelled_ends_its_stream(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued()
    async with api.events(task_id) as stream:
        await stream.next()
        await api.delete(f"/api/v1/tasks/{task_id}/cancel")
        assert types(await stream.rest()) == ["cancelled"]


async def test_head_answers_without_a_stream(api: Client, tasks: Tasks) -> None:
    answer = await api.ask("HEAD", f"/api/v1/tasks/{await tasks.queued()}/events")
    assert (answer.status, answer.body, api.state.hub.watchers()) == (200, b"", 0)


async def test_a_comment_is_sent_while_nothing_happens(api: Client, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_module.COMMENT_S == 15
    monkeypatch.setattr(hub_module, "COMMENT_S", 0.05)
    task_id = await tasks.queued()
    async with api.events(task_id) as stream:
        await stream.next()
        await quiet(stream)


# ── Resumed ──


@pytest.fixture
async def ended(tasks: Tasks, store: Store) -> TaskId:
    """Return a completed task whose log has twelve entries."""
    task_id, run = await tasks.processing()
    await work(store, task_id, run)
    await store.complete(task_id, run, result())
    return task_id


@pytest.mark.parametrize("by", ["header", "query"])
async def test_inside_the_log_it_goes_on_after_the_id_without_a_snapshot(api: Client, store: Store, ended: TaskId, by: str) -> None:
    log = await log_of(store, ended)
    for place in range(len(log) - 1):
        query, headers = ("", {"last_event_id": log[place]}) if by == "header" else (f"?after={log[place]}", {})
        async with api.events(ended, query, **headers) as stream:
            told = await stream.rest()
        assert [event.id for event in told] == log[place + 1 :]


async def test_the_header_wins_over_the_query(api: Client, store: Store, ended: TaskId) -> None:
    log = await log_of(store, ended)
    async with api.events(ended, f"?after={log[0]}", last_event_id=log[5]) as stream:
        assert ids(await stream.rest()) == log[6:]


async def test_at_the_newest_id_of_a_task_that_has_ended_there_is_nothing_more(api: Client, store: Store, ended: TaskId) -> None:
    newest = (await log_of(store, ended))[-1]
    for query, headers in ((f"?after={newest}", {}), ("", {"Last-Event-ID": newest})):
        answer = await api.get(f"/api/v1/tasks/{ended}/events{query}", headers=headers)
        assert (answer.status, answer.body) == (204, b"")


async def test_at_the_newest_id_of_a_running_task_it_waits_for_more(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    (newest,) = await log_of(store, task_id)
    async with api.events(task_id, last_event_id=newest) as stream:
        await store.complete(task_id, run, result())
        assert types(await stream.rest()) == ["completed"]


async def test_before_a_log_that_is_whole_nothing_is_missing(api: Client, store: Store, ended: TaskId) -> None:
    async with api.events(ended, "?after=0-0") as stream:
        told = await stream.rest()
    assert (types(told)[0], ids(told)) == ("snapshot", await log_of(store, ended))
    assert "gap" not in types(told)


async def test_before_a_log_that_was_trimmed_is_a_gap_and_then_a_snapshot(api: Client, store: Store, ended: TaskId) -> None:
    before = await log_of(store, ended)
    await raw(store).xtrim(KEYS["log"] + ended, maxlen=5, approximate=False)
    async with api.events(ended, last_event_id=before[2]) as stream:
        told = await stream.rest()
    assert (types(told)[:2], ids(told)) == (["gap", "snapshot"], before[-5:])


async def test_inside_what_is_left_of_a_trimmed_log_there_is_no_gap(api: Client, store: Store, ended: TaskId) -> None:
    before = await log_of(store, ended)
    await raw(store).xtrim(KEYS["log"] + ended, maxlen=5, approximate=False)
    async with api.events(ended, last_event_id=before[-4]) as stream:
        assert ids(await stream.rest()) == before[-3:]


@pytest.mark.parametrize("after", ["9999999999999-0", "999999999999999999-999999999999999999"])
async def test_beyond_the_log_is_a_gap_and_then_a_snapshot(api: Client, ended: TaskId, after: str) -> None:
    async with api.events(ended, last_event_id=after) as stream:
        assert types(await stream.rest())[:2] == ["gap", "snapshot"]


async def test_ids_are_compared_as_numbers_and_not_as_texts(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    (entry,) = await Queries(store.redis).log_after(task_id, None)
    ms = int(entry.id.partition("-")[0]) + 5000
    for sequence in (9, 10):
        await raw(store).xadd(KEYS["log"] + task_id, {"type": "progress", "data": entry.data}, id=f"{ms}-{sequence}")
    async with api.events(task_id, f"?after={ms}-9") as stream:
        first = await stream.next()
        await store.complete(task_id, run, result())
        assert [event.id for event in [first, *await stream.rest()] if event] == [f"{ms}-10", f"{ms}-11"]


@pytest.mark.parametrize("state", [TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED])
async def test_when_the_log_is_gone_the_end_is_told_from_the_task(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    task_id = await tasks.in_state(state)
    async with api.events(task_id) as stream:
        as_it_was = (await stream.rest())[-1]
    await raw(tasks.store).delete(KEYS["log"] + task_id)
    async with api.events(task_id) as stream:
        told = await stream.rest()
    assert types(told) == ["snapshot", state]
    assert told[-1].id == as_it_was.id
    now, before = (msgspec.convert({"result": None, **event.data}, ProcessingProgress) for event in (told[-1], as_it_was))
    assert now == before


async def test_when_the_log_is_gone_its_newest_id_still_means_nothing_more(api: Client, store: Store, ended: TaskId) -> None:
    log = await log_of(store, ended)
    await raw(store).delete(KEYS["log"] + ended)
    assert (await api.get(f"/api/v1/tasks/{ended}/events?after={log[-1]}")).status == 204
    async with api.events(ended, f"?after={log[3]}") as stream:
        assert types(await stream.rest()) == ["gap", "snapshot", "completed"]


async def test_an_id_of_a_log_that_expired_is_a_gap_also_when_a_retry_has_begun_another(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.failed()
    first, _ = await log_of(store, task_id)
    await raw(store).delete(KEYS["log"] + task_id)
    await api.post(f"/api/v1/tasks/{task_id}/retry")
    async with api.events(task_id, last_event_id=first) as stream:
        assert types(await stream.until("queued")) == ["gap", "snapshot", "queued"]


async def test_a_log_is_kept_for_a_day_after_the_end_and_holds_about_the_last_two_thousand(tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    for _ in range(12):
        for step in range(200):
            await store.report(task_id, run, step / 200, "generating_image")
        await store.requeue(task_id, run, Budget.DRAIN, 0, 0, "its worker was stopped", "worker_lost")
        run = await tasks.claim()
    assert await raw(store).ttl(KEYS["log"] + task_id) == -1
    assert 2000 <= len(await log_of(store, task_id)) < 2200
    await store.complete(task_id, run, result())
    assert 86_000 < await raw(store).ttl(KEYS["log"] + task_id) <= 86_400


@pytest.mark.parametrize(
    "text", ["abc", "1", "1-", "-1", "1-1-1", "1-a", " ", "1 -1", "\u0663-\u0661", "1" * 19 + "-1", "x" * 5000, "$", "+"]
)
async def test_a_malformed_resume_point_is_a_400(api: Client, ended: TaskId, text: str) -> None:
    answers = [await api.get(f"/api/v1/tasks/{ended}/events?after={text}".replace(" ", "%20").replace("+", "%2B"))]
    if text.strip() and text.isascii():
        answers.append(await api.get(f"/api/v1/tasks/{ended}/events", headers={"Last-Event-ID": text}))
    assert {(answer.status, answer.error) for answer in answers} == {(400, "validation_failed")}


async def test_an_empty_resume_point_is_none(api: Client, ended: TaskId) -> None:
    async with api.events(ended, "?after=", last_event_id="") as stream:
        first = await stream.next()
    assert first is not None
    assert first.type == "snapshot"


# ── Signed ──


@pytest.fixture
async def signed(api: Client, ended: TaskId) -> str:
    """Return the events_url of an ended task."""
    return str((await api.status(ended))["events_url"])


async def test_a_signed_stream_needs_no_key_and_is_open_to_any_origin(api: Client, signed: str) -> None:
    async with api.events(signed, key=None, origin="https://anywhere.example") as stream:
        assert stream.response.headers["Access-Control-Allow-Origin"] == "*"
        assert types(await stream.rest())[-1] == "completed"


async def test_a_signed_stream_can_be_resumed_by_its_header_and_by_the_query(api: Client, store: Store, signed: str, ended: TaskId) -> None:
    log = await log_of(store, ended)
    async with api.events(signed, key=None, last_event_id=log[3]) as stream:
        by_header = ids(await stream.rest())
    async with api.events(f"{signed}&after={log[3]}", key=None) as stream:
        by_query = ids(await stream.rest())
    assert by_header == by_query == log[4:]


async def test_a_signed_204_is_open_to_any_origin_too(api: Client, store: Store, signed: str, ended: TaskId) -> None:
    answer = await api.get(f"{signed}&after={(await log_of(store, ended))[-1]}", key=None)
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, "*")


async def test_an_events_url_with_one_character_changed_is_forbidden(api: Client, signed: str) -> None:
    start = signed.index("/tasks/") + len("/tasks/")
    for position in range(start, len(signed)):
        if signed[position] in "/&?=" or signed[position:].startswith(("events", "xpires", "ignature")) or signed[position] in "vents?":
            continue
        changed = signed[:position] + ("a" if signed[position] != "a" else "b") + signed[position + 1 :]
        assert (await api.get(changed, key=None)).status == 403, changed


async def test_a_letter_of_another_case_is_a_change(api: Client, signed: str) -> None:
    for position in [place for place, letter in enumerate(signed) if letter.isalpha() and place > signed.index("/tasks/") + 6]:
        if "/events?" in signed[position - 7 : position + 7] or signed[position : position + 10].partition("=")[1]:
            continue
        changed = signed[:position] + signed[position].swapcase() + signed[position + 1 :]
        assert (await api.get(changed, key=None)).status == 403, changed


@pytest.mark.parametrize(
    "change", [("&signature=.*", ""), (r"expires=\d+&", ""), ("expires=", "expires=0"), ("signature", "sign"), ("$", "x")]
)
async def test_an_events_url_without_its_whole_signature_is_forbidden(api: Client, signed: str, change: tuple[str, str]) -> None:
    for key in (None, ALL):
        answer = await api.get(re.sub(*change, signed, count=1), key=key)
        assert (answer.status, answer.error) == (403, "invalid_signature")


async def test_an_events_url_that_has_expired_is_forbidden_and_says_so(api: Client, ended: TaskId) -> None:
    expires = int(time.time()) - 1
    signature = signing.sign(api.state.signing_secrets[0], "events", ended, expires)
    answer = await api.get(f"/api/v1/tasks/{ended}/events?expires={expires}&signature={signature}", key=None)
    assert (answer.status, answer.error) == (403, "expired")
    assert "expired" in answer.message


def errors_of_signed_urls(api: Client) -> dict[str, tuple[int, str]]:
    """Return urls of streams and files that are answered with an error, and the errors."""
    secret, now = api.state.signing_secrets[0], int(time.time())

    def url(path: str, purpose: str, subject: str, expires: int = now + 60) -> str:
        return f"{api.url}{path}?expires={expires}&signature={signing.sign(secret, purpose, subject, expires)}"

    task, project, file = f"/api/v1/tasks/{UNKNOWN}/events", "/api/v1/projects/film/events", "/media/a.png"
    return {
        url(task, "events", UNKNOWN): (404, "not_found"),
        url(project, "project-events", "film"): (404, "not_found"),
        url(file, "media", "a.png"): (404, "not_found"),
        f"{url(project, 'project-events', 'film')}&after=x&colour=red": (400, "validation_failed"),
        url(task, "project-events", UNKNOWN): (403, "invalid_signature"),
        url(project, "events", "film"): (403, "invalid_signature"),
        url(file, "events", "a.png"): (403, "invalid_signature"),
        url(task, "events", UNKNOWN, now - 1): (403, "expired"),
        url(project, "project-events", "film", now - 1): (403, "expired"),
        url(file, "media", "a.png", now - 1): (403, "expired"),
        url(task.replace("events", "event"), "events", UNKNOWN): (404, "not_found"),
    }


@pytest.mark.parametrize("origins", [(), ("https://app.example",), ("*",)], ids=["none", "one", "all"])
async def test_every_error_of_a_signed_url_can_be_read_by_a_page_of_any_origin(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch, origins: tuple[str, ...]
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError

    async with served(msgspec.structs.replace(settings, cors_origins=origins)) as api:
        expected = errors_of_signed_urls(api)
        for origin in ("https://app.example", "https://anywhere.example"):
            headers = {"Origin": origin}
            answers = {url: await api.get(url, key=None, headers=headers) for url in expected}
            assert {url: (answer.status, answer.error) for url, answer in answers.items()} == expected
            refused = await api.post(next(iter(expected)), key=None, headers=headers)
            assert (refused.status, refused.error) == (405, "method_not_allowed")
            with monkeypatch.context() as patch:
                patch.setattr(api.state.queries, "task", broken)
                crashed = await api.get(next(iter(expected)), key=None, headers=headers)
            assert (crashed.status, crashed.error) == (500, "internal")
            for answer in (*answers.values(), refused, crashed):
                assert answer.headers["Access-Control-Allow-Origin"] in ("*", origin)
                if not (origins == ("*",) and answer is crashed):
                    assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]


async def test_that_redis_is_away_can_be_read_by_a_page_of_any_origin(own: Valkey, away: Client) -> None:
    urls = [(await away.submit()).json["events_url"], (await away.get("/api/v1/projects/film")).json["events_url"]]
    await asyncio.to_thread(own.kill)
    for url in urls:
        answer = await away.get(url, key=None, headers={"Origin": "https://anywhere.example"})
        assert (answer.status, answer.error, answer.headers["Access-Control-Allow-Origin"]) == (503, "unavailable", "*")
        assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After"
        assert int(answer.headers["Retry-After"]) > 0


async def test_an_events_url_opens_its_own_task_only(api: Client, tasks: Tasks, signed: str, ended: TaskId) -> None:
    assert (await api.get(signed.replace(ended, await tasks.queued()), key=None)).status == 403


async def test_an_events_url_is_good_for_a_day(api: Client, signed: str) -> None:
    expires = int(re.findall(r"expires=(\d+)", signed)[0])
    assert 86_400 - 60 < expires - time.time() <= 86_400


async def test_a_stream_with_a_key_is_not_open_to_other_origins(api: Client, ended: TaskId) -> None:
    async with api.events(ended, key=READ, origin="https://anywhere.example") as stream:
        assert "Access-Control-Allow-Origin" not in stream.response.headers


# ── Many, slow, gone ──


async def test_nothing_is_missed_or_doubled_by_clients_that_connect_while_events_pour(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()

    async def watch(after: str | None) -> list[Event]:
        async with api.events(task_id, f"?after={after}" if after else "") as stream:
            return await stream.rest()

    (first,) = await log_of(store, task_id)
    watching: list[asyncio.Task[list[Event]]] = []
    for step in range(1, 400):
        if step % 10 == 0:
            watching.append(asyncio.create_task(watch(first if len(watching) % 2 else None)))
        await store.report(task_id, run, step / 400, "generating_image")
    await soon(lambda: api.state.hub.watchers() == len(watching))
    await store.complete(task_id, run, result())
    log = await log_of(store, task_id)
    for number, told in enumerate(await asyncio.gather(*watching)):
        assert ids(told) == (log[1:] if number % 2 else log)
        progress = [event.data["progress"] for event in told if event.type == "progress"]
        assert progress == sorted(progress)


async def test_all_watchers_of_a_task_share_one_subscription(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.queued()
    channel = KEYS["events"] + task_id
    async with api.events(task_id) as one, api.events(task_id) as other:
        await one.next()
        await other.next()
        await soon(lambda: api.state.hub.watchers() == 2)
        assert await raw(store).pubsub_numsub(channel) == [(channel.encode(), 1)]


async def test_what_hangs_up_leaves_no_watcher_task_or_subscription_behind(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.queued()
    channel = KEYS["events"] + task_id
    before = asyncio.all_tasks()
    for _ in range(20):
        async with api.events(task_id) as stream:
            await stream.next()
    await soon(lambda: api.state.hub.watchers() == 0 and asyncio.all_tasks() <= before)

    async def nobody_listens() -> bool:
        return bool(await raw(store).pubsub_numsub(channel) == [(channel.encode(), 0)])

    await soon(nobody_listens)


async def test_a_watcher_that_comes_while_the_last_one_leaves_misses_nothing(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    for step in range(1, 30):
        async with api.events(task_id, last_event_id=(await log_of(store, task_id))[-1]) as stream:
            await store.report(task_id, run, step / 100, "generating_image")
            event = await stream.next()
            assert event is not None
            assert event.data["progress"] == step / 100


async def quiet(*streams: Stream) -> None:
    """Wait until each stream has received many comments and nothing else."""
    async with asyncio.timeout(DEADLINE_S):
        for stream in streams:
            for _ in range(20):
                assert (await stream.response.content.readline()).startswith((b":", b"\n"))


@pytest.mark.usefixtures("quiet_loop")
async def test_idle_streams_cost_redis_nothing(settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pubsub, "PING_S", 3600)
    monkeypatch.setattr(hub_module, "COMMENT_S", 0.05)
    # else the secret that is kept in Redis is asked for each second, streams or not
    async with served(msgspec.structs.replace(settings, signing_secret=(b"a-secret-of-this-test",))) as api:
        task_id = await Tasks(api, store).queued()
        async with api.events(task_id) as one, api.events(task_id) as other:
            await one.next()
            await other.next()
            await quiet(one, other)
            await raw(store).config_resetstat()
            await quiet(one, other)
            spent = {name: said["calls"] for name, said in (await raw(store).info("commandstats")).items()}
    assert {name: calls for name, calls in spent.items() if name not in ("cmdstat_config|resetstat", "cmdstat_info")} == {}


class Slow:
    """A client whose socket accepts almost nothing until it is read."""

    def __init__(self, api: Client, task_id: str) -> None:
        self.found = b""
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = api.url.removeprefix("http://").split(":")
        self.sock.connect((host, int(port)))
        self.sock.sendall(f"GET /api/v1/tasks/{task_id}/events HTTP/1.1\r\nHost: a\r\nX-API-Key: {ALL}\r\n\r\n".encode())
        self.sock.setblocking(False)

    def sip(self, size: int) -> None:
        """Read a few bytes of what has arrived."""
        with contextlib.suppress(BlockingIOError):
            self.found += self.sock.recv(size)

    def lost(self) -> bool:
        """Whether the server has closed the connection. It has either reset it, or the kernel has given it up: then a byte is reset."""
        try:
            self.sock.send(b"x")
        except BlockingIOError:
            return False
        except OSError:
            return True
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    async def read(self) -> str:
        """Return everything up to the end of the stream or of the connection."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionResetError):
                while not self.found.endswith(b"\r\n0\r\n\r\n") and (part := await loop.sock_recv(self.sock, 65536)):
                    self.found += part
        self.sock.close()
        return re.sub(r"\r\n[0-9a-f]+\r\n", "", self.found.decode())


async def test_a_slow_reader_falls_behind_and_still_gets_every_entry_once(settings: Settings, store: Store) -> None:
    async with served(settings, send_buffer=4096) as api:
        tasks = Tasks(api, store)
        task_id, run = await tasks.processing()
        slow = Slow(api, task_id)
        await soon(lambda: api.state.hub.watchers() == 1)
        for _ in range(8):
            for step in range(200):
                await store.report(task_id, run, step / 200, "generating_image")
                slow.sip(200)  # less than what comes: it reads, and falls behind all the same
            await store.requeue(task_id, run, Budget.DRAIN, 0, 0, "its worker was stopped", "worker_lost")
            run = await tasks.claim()
        await store.complete(task_id, run, result())
        told = re.findall(r"^id: (\S+)$", await slow.read(), re.MULTILINE)
        assert told == await log_of(store, task_id)


async def test_a_reader_that_takes_nothing_is_left_and_loses_its_socket(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert STUCK_S == 30
    for module in (hub_module, watchers):
        monkeypatch.setattr(module, "STUCK_S", 0.2)
    async with served(settings, send_buffer=4096) as api:
        tasks = Tasks(api, store)
        task_id, run = await tasks.processing()
        slow = Slow(api, task_id)
        await soon(lambda: api.state.hub.watchers() == 1)
        for step in range(900):
            await store.report(task_id, run, step / 1000, "generating_image")
        await soon(lambda: api.state.hub.watchers() == 0)
        await soon(slow.lost)  # it took nothing before
        assert not (await slow.read()).endswith("\r\n0\r\n\r\n")


async def test_the_end_of_a_stream_waits_no_longer_for_a_reader_that_takes_nothing(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (hub_module, watchers):
        monkeypatch.setattr(module, "STUCK_S", 0.2)
    async with served(settings, send_buffer=4096) as api:
        tasks = Tasks(api, store)
        task_id, run = await tasks.processing()
        slow = Slow(api, task_id)
        await soon(lambda: api.state.hub.watchers() == 1)
        for step in range(40):
            await store.report(task_id, run, step / 100, "generating_image")
        await store.complete(task_id, run, result())
        await soon(slow.lost)
        slow.sock.close()


async def test_a_broadcast_passes_a_reader_that_takes_nothing(settings: Settings, store: Store) -> None:
    async with served(settings, send_buffer=4096) as api:
        tasks = Tasks(api, store)
        task_id, run = await tasks.processing()
        slow = Slow(api, task_id)
        await soon(lambda: api.state.hub.watchers() == 1)
        for step in range(500):
            await store.report(task_id, run, step / 1000, "generating_image")
        async with api.events(task_id, last_event_id=(await log_of(store, task_id))[-1]) as stream:
            await soon(lambda: api.state.hub.watchers() == 2)
            await store.complete(task_id, run, result())
            assert types(await stream.rest()) == ["completed"]
        slow.sock.close()


async def test_when_the_server_goes_every_stream_says_goodbye(api: Client, tasks: Tasks) -> None:
    ids = [await tasks.queued() for _ in range(2)]
    async with api.events(ids[0]) as one, api.events(ids[1]) as other:
        await one.next()
        await other.next()
        api.state.hub.close()
        for stream in (one, other):
            assert types(await stream.rest()) == ["goodbye"]
            assert 2000 <= stream.retries[-1] < 4000


# ── Redis goes and comes ──


@pytest.fixture
def own(folder: Path) -> Iterator[Valkey]:
    """Yield a Valkey that a test may kill."""
    with valkey(folder / "own") as running:
        yield running


@pytest.fixture
async def own_store(own: Valkey) -> AsyncIterator[Store]:
    store = Store(connect(own.url, patient=True))
    yield store
    await store.redis.aclose()


@pytest.mark.parametrize("away_s", [0, 1.5])
async def test_through_a_restart_of_redis_nothing_is_missed_or_doubled(
    own: Valkey, own_store: Store, settings: Settings, away_s: float
) -> None:
    async with served(msgspec.structs.replace(settings, redis_url=own.url)) as api:
        task_id, run = await Tasks(api, own_store).processing()
        await work(own_store, task_id, run, 5)
        streams: list[Stream] = []
        async with api.events(task_id) as one, api.events(task_id) as other:
            streams += [one, other]
            told = [await stream.until("progress") for stream in streams]
            await asyncio.to_thread(own.kill)
            await asyncio.sleep(away_s)  # it is away for several tries to connect
            await asyncio.to_thread(own.start)
            await work(own_store, task_id, run, 20)
            await own_store.complete(task_id, run, result())
            for before, stream in zip(told, streams, strict=True):
                assert ids(before + await stream.rest()) == await log_of(own_store, task_id)


async def test_a_redis_that_hangs_is_noticed_by_its_silence(
    own: Valkey, own_store: Store, settings: Settings, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub, "PING_S", 0.2)
    monkeypatch.setattr(pubsub, "PONG_S", 0.2)
    async with served(msgspec.structs.replace(settings, redis_url=own.url)) as api:
        task_id, run = await Tasks(api, own_store).processing()
        async with api.events(task_id) as stream:
            told = await stream.until("started")
            with stopped(own):
                await soon(lambda: "subscription_lost" in logged.text)
            await work(own_store, task_id, run, 5)
            await own_store.complete(task_id, run, result())
            assert ids(told + await stream.rest()) == await log_of(own_store, task_id)


async def test_a_stream_opened_while_redis_comes_back_waits_for_its_subscription(own: Valkey, own_store: Store, settings: Settings) -> None:
    async with served(msgspec.structs.replace(settings, redis_url=own.url)) as api:
        task_id, run = await Tasks(api, own_store).processing()
        async with api.events(task_id) as first:
            await first.next()
            await asyncio.to_thread(own.kill)
            await asyncio.sleep(0.3)  # it is away for several tries to connect
            await asyncio.to_thread(own.start)
            answer: Answer | None = None
            while answer is None or answer.status != 200:
                answer = await api.get(f"/api/v1/tasks/{task_id}/status")
            async with api.events(task_id) as stream:
                await stream.until("started")
                await own_store.complete(task_id, run, result())
                assert types(await stream.rest()) == ["completed"]
