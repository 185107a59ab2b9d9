"""The stream of a project: a snapshot, state changes with ids, progress without; resumed, filtered, isolated, signed."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import datetime
from typing import Any

import msgspec
import pytest

from movieq import signing
from movieq.queue.keys import KEYS
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from movieq.settings import Settings
from movieq.streams.watchers import Source
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import STATES, ProjectId, TaskId
from tests.arrange import new_task, raw, result, running
from tests.contract.client import ADMIN, ALL, FILM, READ, Client, Event, Stream, schema
from tests.contract.conftest import Tasks, served
from tests.contract.test_events import ids, soon, types

LOG = Source.of_project(ProjectId("film")).log
PATH = "/api/v1/projects/film/events"
FILM_STREAM = "projects/film"


async def log_of(store: Store) -> list[str]:
    """Return the ids of the project's event log."""
    ids: list[str] = []
    while entries := await Queries(store.redis).log_after(LOG, ids[-1] if ids else None):
        ids += [entry.id for entry in entries]
    return ids


async def began(stream: Stream) -> Any:
    """Read the snapshot with which the stream begins; return its data."""
    event = await stream.next()
    assert event is not None
    assert (event.id, event.type) == (None, "snapshot")
    schema("ProjectSnapshot").validate(event.data)
    return event.data


async def some(stream: Stream, count: int) -> list[Event]:
    """Return the next events."""
    return [event for event in [await stream.next() for _ in range(count)] if event is not None]


# ── Its beginning ──


async def test_the_snapshot_says_what_runs_what_waits_and_how_much_of_all_there_is(api: Client, tasks: Tasks, store: Store) -> None:
    await tasks.completed()
    running_id, _ = await tasks.processing()
    waiting = [await tasks.queued(), await tasks.queued(task_type="process_audio", task_data={"text": "Light!"})]
    async with api.events(FILM_STREAM) as stream:
        snapshot = await began(stream)
    assert snapshot["tasks"] == {"queued": 2, "processing": 1, "completed": 1, "failed": 0, "cancelled": 0}
    assert [(task["task_id"], task["status"], task["queue_position"]) for task in snapshot["active"]] == [
        (running_id, "processing", None),
        (waiting[0], "queued", 1),
        (waiting[1], "queued", 2),
    ]
    assert snapshot["last_event_id"] == (await log_of(store))[-1]
    async with api.events(snapshot["active"][0]["events_url"], key=None) as stream:
        assert (await stream.until("started"))[0].data["task_id"] == running_id


async def test_the_snapshot_names_a_hundred_tasks_those_that_run_and_then_the_oldest(api: Client, store: Store) -> None:
    for _ in range(120):
        await store.submit(new_task())
    running_id, _ = await running(store, priority=1)
    async with api.events(FILM_STREAM) as stream:
        snapshot = await began(stream)
    first, *waiting = snapshot["active"]
    assert (first["task_id"], len(waiting), snapshot["tasks"]["queued"]) == (running_id, 99, 120)
    created = [datetime.fromisoformat(task["created_at"]) for task in waiting]
    assert created == sorted(created)
    assert {task["queue_position"] for task in waiting} <= {*range(1, 110)}


async def test_after_the_snapshot_nothing_of_before_is_told(api: Client, tasks: Tasks, store: Store) -> None:
    await tasks.completed()
    async with api.events(FILM_STREAM) as stream:
        await began(stream)
        task_id = await tasks.queued()
        (event,) = await some(stream, 1)
    assert (event.type, event.data["task_id"], event.id) == ("queued", task_id, (await log_of(store))[-1])


# ── Live ──


async def test_each_change_of_state_has_an_id_and_progress_has_none(api: Client, tasks: Tasks, store: Store) -> None:
    await tasks.cancelled()
    async with api.events(FILM_STREAM) as stream:
        await began(stream)
        before = len(await log_of(store))
        task_id, run = await tasks.processing()
        await store.report(task_id, run, 0.001, "generating_image")
        await store.report(task_id, run, 0.3, "generating_image", stage="denoise", step=3, steps=10)
        await store.requeue(task_id, run, Budget.TRIES, 3, 0, "it broke", "network")
        run = await tasks.claim()
        await store.fail(task_id, run, "it broke", "internal")
        await api.post(f"/api/v1/tasks/{task_id}/retry")
        run = await tasks.claim()
        await store.complete(task_id, run, result())
        cancelled = await tasks.cancelled()
        told = await some(stream, 11)
    changes = ["queued", "started", "retrying", "started", "failed", "queued", "started", "completed", "queued", "cancelled"]
    assert types([event for event in told if event.id]) == changes[:9]
    assert [event.type for event in told if not event.id] == ["progress", "progress"]
    assert ids(told) == (await log_of(store))[before : before + 9]
    assert {event.data["task_id"] for event in told} == {task_id, cancelled}
    for event in told:
        schema("ProcessingProgress").validate(event.data)
        assert (event.data["project_id"], event.data["task_type"], event.data["type"]) == ("film", "generate_image", event.type)


async def test_the_completed_event_has_the_result_with_addresses_that_open(api: Client, tasks: Tasks) -> None:
    await tasks.cancelled()
    async with api.events(FILM_STREAM) as stream:
        await began(stream)
        task_id = await tasks.completed()
        completed = (await stream.until("completed"))[-1]
    assert completed.data["result"] == (await api.status(task_id))["result"]


async def test_tasks_of_other_projects_are_not_told(api: Client, tasks: Tasks, store: Store) -> None:
    await tasks.cancelled()
    async with api.events(FILM_STREAM) as stream:
        await began(stream)
        other, run = await tasks.processing(project_id="other")
        await store.report(other, run, 0.3, "generating_image")
        await store.complete(other, run, result())
        task_id = await tasks.queued()
        assert [event.data["task_id"] for event in await some(stream, 1)] == [task_id]


async def test_it_goes_on_after_the_last_task_has_ended(api: Client, tasks: Tasks) -> None:
    await tasks.cancelled()
    async with api.events(FILM_STREAM) as stream:
        for _ in range(2):
            await tasks.completed()
            await stream.until("completed")


async def test_when_the_server_goes_it_says_goodbye(api: Client, tasks: Tasks) -> None:
    await tasks.cancelled()
    async with api.events(FILM_STREAM) as stream:
        await began(stream)
        await soon(lambda: api.state.hub.watchers() == 1)
        api.state.hub.close()
        assert [(event.type, event.data) for event in await stream.rest()] == [("goodbye", {"project_id": "film"})]
        assert 2000 <= stream.retries[-1] < 4000


# ── Resumed ──


@pytest.mark.parametrize("by", ["header", "query"])
async def test_inside_the_log_it_goes_on_after_the_id_without_a_snapshot(api: Client, tasks: Tasks, store: Store, by: str) -> None:
    for _ in range(3):
        await tasks.completed()
    log = await log_of(store)
    for place in range(len(log) - 1):
        query, headers = ("", {"last_event_id": log[place]}) if by == "header" else (f"?after={log[place]}", {})
        async with api.events(FILM_STREAM, query, **headers) as stream:
            assert ids(await some(stream, len(log) - place - 1)) == log[place + 1 :]


async def test_at_the_newest_id_it_waits_for_more(api: Client, tasks: Tasks, store: Store) -> None:
    await tasks.completed()
    async with api.events(FILM_STREAM, last_event_id=(await log_of(store))[-1]) as stream:
        task_id = await tasks.queued()
        assert [(event.type, event.data["task_id"]) for event in await some(stream, 1)] == [("queued", task_id)]


async def test_a_client_that_comes_and_goes_misses_nothing_and_sees_nothing_twice(api: Client, store: Store) -> None:
    last = await _first(api, store)
    working = asyncio.create_task(_work(store, 150))
    told: list[str] = []
    while not working.done() or told[-1:] != (await log_of(store))[-1:]:
        async with api.events(FILM_STREAM, last_event_id=told[-1] if told else last) as stream:
            for _ in range(7):
                try:
                    event = await stream.next(0.3)
                except TimeoutError:
                    break
                told += [event.id] if event and event.id else []
    await working
    assert told == (await log_of(store))[1:]


async def _first(api: Client, store: Store) -> str:
    await store.submit(new_task())
    (first,) = await log_of(store)
    return first


async def _work(store: Store, count: int) -> None:
    for _ in range(count):
        task_id, run = await running(store)
        await store.report(task_id, run, 0.2, "generating_image")
        await store.complete(task_id, run, result())


async def test_nothing_is_missed_or_doubled_by_clients_that_connect_while_events_pour(api: Client, store: Store) -> None:
    first = await _first(api, store)

    async def watch() -> list[str]:
        async with api.events(FILM_STREAM, last_event_id=first) as stream:
            return ids(await stream.until("cancelled"))

    watching = []
    for _ in range(20):
        watching.append(asyncio.create_task(watch()))
        await _work(store, 5)
    await store.cancel((await store.submit(new_task())).task_id)
    everything = await asyncio.gather(*watching)
    log = await log_of(store)
    assert all(told == log[1:] for told in everything)


@pytest.mark.parametrize("after", ["1764000000000-0", "9999999999999-0"])
async def test_a_resume_point_that_is_not_in_the_log_is_a_gap_and_then_a_snapshot(
    api: Client, tasks: Tasks, store: Store, after: str
) -> None:
    await tasks.completed()
    async with api.events(FILM_STREAM, last_event_id=after) as stream:
        gap = await stream.next()
        assert gap is not None
        log = await log_of(store)
        assert (gap.type, gap.id, gap.data) == ("gap", None, {"project_id": "film", "after": after, "first": log[0], "last": log[-1]})
        await began(stream)


async def test_when_the_log_has_expired_the_resume_point_is_a_gap_also_when_a_new_one_has_begun(
    api: Client, tasks: Tasks, store: Store
) -> None:
    await tasks.completed()
    last = (await log_of(store))[-1]
    await raw(store).delete(KEYS["log"] + LOG)
    for _ in range(2):
        async with api.events(FILM_STREAM, last_event_id=last) as stream:
            assert types(await some(stream, 2)) == ["gap", "snapshot"]
        await tasks.completed()


async def test_the_log_holds_about_the_last_thousand_changes_for_a_day(api: Client, store: Store) -> None:
    for _ in range(1300):
        await store.submit(new_task())
    assert 1000 <= len(await log_of(store)) < 1200
    assert 86_000 < await raw(store).ttl(KEYS["log"] + LOG) <= 86_400


async def test_a_long_log_is_told_whole(api: Client, store: Store) -> None:
    first = await _first(api, store)
    for _ in range(350):
        await store.submit(new_task())
    async with api.events(FILM_STREAM, last_event_id=first) as stream:
        assert ids(await some(stream, 350)) == (await log_of(store))[1:]


@pytest.mark.parametrize("text", ["abc", "1", "1-a", "$"])
async def test_a_malformed_resume_point_is_a_400(api: Client, tasks: Tasks, text: str) -> None:
    await tasks.queued()
    answer = await api.get(f"{PATH}?after={text}")
    assert (answer.status, answer.error) == (400, "validation_failed")


# ── Filtered ──


async def test_it_can_be_asked_for_some_task_types_only(api: Client, tasks: Tasks, store: Store) -> None:
    image, sound = await tasks.queued(), await tasks.queued(task_type="process_audio", task_data={"text": "Light!"})
    clip = await tasks.queued(task_type="render_animation")
    async with api.events(FILM_STREAM, "?task_type=process_audio,render_animation") as stream:
        assert [task["task_id"] for task in (await began(stream))["active"]] == [sound, clip]
        for task_id in (image, sound, clip):
            await store.cancel(task_id)
        assert [event.data["task_id"] for event in await some(stream, 2)] == [sound, clip]


async def test_it_can_be_asked_for_some_states_only(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    await tasks.queued()
    async with api.events(FILM_STREAM, "?status=completed,queued") as stream:
        assert [task["status"] for task in (await began(stream))["active"]] == ["queued"]
        await store.report(task_id, run, 0.3, "generating_image")
        await store.complete(task_id, run, result())
        await tasks.queued()
        assert types(await some(stream, 2)) == ["completed", "queued"]


async def test_the_log_is_filtered_as_what_comes_live_is(api: Client, tasks: Tasks, store: Store) -> None:
    for _ in range(3):
        await tasks.completed()
    log = await log_of(store)
    async with api.events(FILM_STREAM, "?status=completed", last_event_id=log[0]) as stream:
        assert types(await some(stream, 3)) == ["completed"] * 3
        await tasks.completed()
        assert types(await some(stream, 1)) == ["completed"]


@pytest.mark.parametrize(
    ("query", "allowed"),
    [
        ("status=done", STATES),
        ("status=queued,", STATES),
        ("task_type=generate_image,mine", REGISTRY.tasks),
        ("task_type=", REGISTRY.tasks),
    ],
)
async def test_an_unknown_filter_is_a_400_that_names_those_allowed(api: Client, tasks: Tasks, query: str, allowed: Any) -> None:
    await tasks.queued()
    answer = await api.get(f"{PATH}?{query}")
    assert (answer.status, answer.error) == (400, "validation_failed")
    assert all(value in answer.message for value in allowed)


@pytest.mark.parametrize("query", ["taks_type=generate_image", "status=queued&status=failed"])
async def test_a_query_that_nothing_reads_is_a_400(api: Client, tasks: Tasks, query: str) -> None:
    await tasks.queued()
    assert (await api.get(f"{PATH}?{query}")).status == 400


# ── Who may ──


async def test_a_key_reads_its_own_projects_only(api: Client, tasks: Tasks) -> None:
    await tasks.queued()
    await tasks.queued(project_id="other")
    for key in (ALL, FILM, READ):
        async with api.events(FILM_STREAM, key=key) as stream:
            await began(stream)
    refused: list[tuple[str, str | None, int]] = [("film", None, 401), ("film", ADMIN, 403), ("other", READ, 404), ("no", ALL, 404)]
    for project, who, status in refused:
        assert (await api.get(PATH.replace("film", project), key=who)).status == status


async def test_head_answers_without_a_stream(api: Client, tasks: Tasks) -> None:
    await tasks.queued()
    answer = await api.ask("HEAD", PATH)
    assert (answer.status, answer.body, api.state.hub.watchers()) == (200, b"", 0)


@pytest.fixture
async def signed(api: Client, tasks: Tasks) -> str:
    """Return the events_url of the project."""
    await tasks.queued()
    return str((await api.get("/api/v1/projects/film")).json["events_url"])


async def test_the_events_url_of_a_project_needs_no_key_and_is_open_to_any_origin_for_a_day(api: Client, signed: str) -> None:
    async with api.events(signed, key=None, origin="https://anywhere.example") as stream:
        assert stream.response.headers["Access-Control-Allow-Origin"] == "*"
        await began(stream)
    async with api.events(f"{signed}&status=failed&after=1-1", key=None) as stream:
        assert types(await some(stream, 2)) == ["gap", "snapshot"]
    assert 86_400 - 60 < int(re.findall(r"expires=(\d+)", signed)[0]) - time.time() <= 86_400


async def test_an_events_url_is_for_its_own_project_and_no_task_and_the_other_way_round(api: Client, tasks: Tasks, signed: str) -> None:
    task_id = await tasks.queued(project_id="other")
    of_task = (await api.status(task_id))["events_url"]
    for url in (
        signed.replace("/film/", "/other/"),
        signed.replace("/projects/film/", f"/tasks/{task_id}/"),
        of_task.replace(f"/tasks/{task_id}/", "/projects/other/"),
    ):
        assert (await api.get(url, key=None)).status == 403


async def test_a_project_cannot_be_named_so_that_a_signature_is_one_for_a_task(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued()
    await tasks.queued(project_id=task_id)
    url = (await api.get(f"/api/v1/projects/{task_id}")).json["events_url"]
    assert (await api.get(url.replace("/projects/", "/tasks/"), key=None)).status == 403


async def test_an_events_url_that_has_expired_says_so(api: Client, signed: str) -> None:
    expires = int(time.time()) - 1
    signature = signing.sign(api.state.signing_secrets[0], "project-events", "film", expires)
    answer = await api.get(f"{PATH}?expires={expires}&signature={signature}", key=None)
    assert (answer.status, "expired" in answer.message) == (403, True)
    changed = await api.get(f"{signed}x", key=None)
    assert (changed.status, "expired" in changed.message) == (403, False)


async def test_a_signing_secret_is_rotated_without_an_address_losing_its_worth(settings: Settings, store: Store) -> None:
    async def urls(secrets: tuple[bytes, ...], *old: str) -> list[str]:
        async with served(msgspec.structs.replace(settings, signing_secret=secrets, public_url="http://movieq.example")) as api:
            tasks = Tasks(api, store)
            task_id = await tasks.completed()
            for url in old:
                answer = await api.ask("HEAD" if "events" in url else "GET", api.url + url, key=None)
                found.append(answer.status)
            status = await api.status(task_id)
            project = (await api.get("/api/v1/projects/film")).json
            return [
                each.removeprefix("http://movieq.example")
                for each in (status["events_url"], project["events_url"], status["result"]["media_url"])
            ]

    found: list[int] = []
    old = await urls((b"an old secret of ours",))
    new = await urls((b"a new secret of ours", b"an old secret of ours"), *old)
    assert found == [200, 200, 404]  # the file was never there
    found.clear()
    await urls((b"a new secret of ours",), *new)
    assert found == [200, 200, 404]
    found.clear()
    await urls((b"a new secret of ours",), *old)
    assert found == [403, 403, 403]


def test_no_task_can_be_named_as_a_project_is() -> None:
    assert not re.fullmatch(r"[0-9a-f-]{36}", Source.of_project(ProjectId(TaskId("a" * 36))).log)
