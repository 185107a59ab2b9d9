"""The status in each state, and the answers of cancel and retry."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Any

import pytest

from movieq.queue.keys import KEYS
from movieq.queue.store import Budget, Store
from movieq.tasks.states import STATES, TaskId, TaskStatus
from tests.arrange import raw, result
from tests.contract.client import UNKNOWN, Client
from tests.contract.conftest import Tasks
from tests.fleet import eventually

STATUS = {
    *(
        "task_id",
        "project_id",
        "task_type",
        "status",
        "progress",
        "current_step",
        "result",
        "error",
        "error_code",
        "retryable",
        "started_at",
    ),
    *(
        "completed_at",
        "created_at",
        "processing_time",
        "gpu_seconds",
        "attempt",
        "queue_position",
        "estimated_remaining",
        "warnings",
        "events_url",
    ),
}
ENDED = [TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED]


def when(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def test_the_warnings_of_the_receipt_and_then_of_the_result_are_in_the_status_and_the_snapshot(api: Client, tasks: Tasks) -> None:
    task_id, run = await tasks.processing(task_data={"prompt": "a lighthouse", "mood": "calm"})
    asked = ["Unknown field ignored: task_data.mood"]
    assert (await api.status(task_id))["warnings"] == asked
    done = result()
    done.metadata["warnings"] = ["lighting 'dim' is not known"]
    await tasks.store.complete(task_id, run, done)
    assert (await api.status(task_id))["warnings"] == [*asked, "lighting 'dim' is not known"]
    async with api.events(task_id) as stream:
        snapshot = await stream.next()
    assert snapshot is not None
    assert snapshot.data["warnings"] == [*asked, "lighting 'dim' is not known"]


@pytest.mark.parametrize("stored", ["", "{", "[1]", "null"])
async def test_warnings_that_cannot_be_read_are_none(api: Client, tasks: Tasks, store: Store, stored: str) -> None:
    task_id = await tasks.queued()
    await raw(store).hset(KEYS["task"] + task_id, "warnings", stored)
    status = await api.status(task_id)
    assert (status["status"], status["warnings"]) == ("queued", [])


@pytest.mark.parametrize("state", STATES)
async def test_every_key_is_there_in_every_state(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    status = await api.status(await tasks.in_state(state))
    assert status.keys() == STATUS
    assert status["status"] == state
    assert status["current_step"]


NULLS = {
    TaskStatus.QUEUED: {
        *("result", "error", "error_code", "retryable", "started_at", "completed_at", "processing_time", "estimated_remaining")
    },
    TaskStatus.PROCESSING: {*("result", "error", "error_code", "retryable", "completed_at", "processing_time", "queue_position")},
    TaskStatus.COMPLETED: {*("error", "error_code", "retryable", "queue_position", "estimated_remaining")},
    TaskStatus.FAILED: {*("result", "queue_position", "estimated_remaining")},
    TaskStatus.CANCELLED: {
        *("result", "error", "error_code", "retryable", "started_at", "processing_time", "queue_position", "estimated_remaining")
    },
}


@pytest.mark.parametrize("state", STATES)
async def test_what_is_empty_is_null(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    task_id, run = await tasks.queued(), None
    if state is not TaskStatus.QUEUED and state is not TaskStatus.CANCELLED:
        run = await tasks.claim()
        await tasks.store.report(task_id, run, 0.25, "generating_image", remaining_ms=1500)
    match state:
        case TaskStatus.COMPLETED:
            task_id = await tasks.completed()
        case TaskStatus.FAILED:
            task_id = await tasks.failed()
        case TaskStatus.CANCELLED:
            await api.delete(f"/api/v1/tasks/{task_id}/cancel")
    status = await api.status(task_id)
    assert {name for name, value in status.items() if value is None} == NULLS[state]


async def test_a_waiting_task_has_a_position_from_one(api: Client, tasks: Tasks) -> None:
    ids = [await tasks.queued() for _ in range(3)]
    assert [(await api.status(task_id))["queue_position"] for task_id in ids] == [1, 2, 3]


async def test_a_running_task_tells_how_far_it_is(api: Client, tasks: Tasks) -> None:
    task_id, run = await tasks.processing()
    await tasks.store.report(task_id, run, 0.4, "generating_image", stage="denoise", step=4, steps=10, remaining_ms=61_400)
    status = await api.status(task_id)
    told = {name: status[name] for name in ("progress", "current_step", "estimated_remaining", "attempt")}
    assert told == {"progress": 0.4, "current_step": "generating_image", "estimated_remaining": 61.4, "attempt": 1}


async def test_progress_does_not_fall_within_a_run(api: Client, tasks: Tasks) -> None:
    task_id, run = await tasks.processing()
    for progress in (0.5, 0.2):
        await tasks.store.report(task_id, run, progress, "generating_image")
    assert (await api.status(task_id))["progress"] == 0.5


async def test_a_completed_task_has_a_result_that_names_everything(api: Client, tasks: Tasks) -> None:
    status = await api.status(await tasks.completed())
    result = status["result"]
    assert (status["progress"], result.keys()) == (1.0, {"media_url", "payload_media_id", "media", "metadata"})
    assert result["media"][0]["url"] == result["media_url"]
    assert result["media_url"].startswith(f"{api.url}/media/")
    assert result["metadata"] == {"engine": "animatic", "list": [], "n": 12345678901234567}


async def test_times_follow_each_other_and_processing_time_is_between_two_of_them(api: Client, tasks: Tasks) -> None:
    status = await api.status(await tasks.completed())
    created, started, completed = (when(status[name]) for name in ("created_at", "started_at", "completed_at"))
    assert created <= started <= completed
    assert status["processing_time"] == pytest.approx((completed - started).total_seconds())


async def test_a_failed_task_says_why_and_whether_to_try_again(api: Client, tasks: Tasks) -> None:
    status = await api.status(await tasks.failed())
    assert (status["error_code"], status["retryable"]) == ("input_unavailable", False)
    assert status["error"] == "https://x.example/a.png could not be fetched: it answered 404"


async def test_a_task_that_was_given_back_waits_again(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    await store.requeue(task_id, run, Budget.DRAIN, 0, 0, "its worker was stopped", "worker_lost")
    status = await api.status(task_id)
    told = {name: status[name] for name in ("status", "attempt", "progress", "started_at", "current_step", "queue_position")}
    assert told == {
        "status": "queued",
        "attempt": 1,
        "progress": 0,
        "started_at": None,
        "current_step": "waiting_in_queue",
        "queue_position": 1,
    }


async def test_cancelled_while_it_waited_again_it_has_no_processing_time(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    await store.requeue(task_id, run, Budget.TRIES, 3, 60_000, "it broke", "network")
    await api.delete(f"/api/v1/tasks/{task_id}/cancel")
    status = await api.status(task_id)
    assert (status["status"], status["processing_time"]) == ("cancelled", None)


async def test_the_case_of_a_task_id_does_not_matter(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued()
    assert (await api.status(task_id.upper()))["task_id"] == task_id


async def test_every_status_has_a_fresh_events_url(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued()
    async with api.events((await api.status(task_id))["events_url"], key=None) as stream:
        event = await stream.next()
    assert event is not None
    assert event.data["task_id"] == task_id


# ── Waiting ──


async def test_wait_answers_when_the_task_ends(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    waiting = asyncio.create_task(api.get(f"/api/v1/tasks/{task_id}/status?wait=30"))
    await eventually(lambda: api.state.hub.watchers() == 1)
    await store.fail(task_id, run, "it broke", "internal")
    assert (await waiting).json["status"] == "failed"


async def test_wait_answers_when_the_time_is_over(api: Client, tasks: Tasks) -> None:
    task_id, begun = await tasks.queued(), time.monotonic()
    assert (await api.get(f"/api/v1/tasks/{task_id}/status?wait=1")).json["status"] == "queued"
    assert time.monotonic() - begun >= 0.9


@pytest.mark.parametrize("state", ENDED)
async def test_wait_answers_at_once_for_a_task_that_has_ended(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    task_id = await tasks.in_state(state)
    async with asyncio.timeout(50):  # less than it would wait
        assert (await api.get(f"/api/v1/tasks/{task_id}/status?wait=60")).json["status"] == state


async def test_wait_is_given_up_when_its_client_has_gone(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued()
    waiting = asyncio.create_task(api.get(f"/api/v1/tasks/{task_id}/status?wait=60"))
    await eventually(lambda: api.state.hub.watchers() == 1)
    waiting.cancel()
    await eventually(lambda: api.state.hub.watchers() == 0)


@pytest.mark.parametrize(
    "query", ["wait=61", "wait=-1", "wait=abc", "wait=1.5", "wait=", "wait=%D9%A1", "wait=1&wait=1", "w=1", "wait=1&x=2"]
)
async def test_another_query_is_a_400(api: Client, tasks: Tasks, query: str) -> None:
    answer = await api.get(f"/api/v1/tasks/{await tasks.queued()}/status?{query}")
    assert (answer.status, answer.error) == (400, "validation_failed")


# ── Cancel ──


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/cancel"), ("POST", "/cancel"), ("DELETE", "")])
@pytest.mark.parametrize("state", [TaskStatus.QUEUED, TaskStatus.PROCESSING])
async def test_cancel_says_what_the_task_was(api: Client, tasks: Tasks, method: str, path: str, state: TaskStatus) -> None:
    task_id = await tasks.in_state(state)
    answer = await api.ask(method, f"/api/v1/tasks/{task_id}{path}")
    assert answer.status == 200
    assert answer.json.keys() == {"task_id", "status", "previous_state", "cancelled_at", "message"}
    assert (answer.json["task_id"], answer.json["status"], answer.json["previous_state"]) == (task_id, "cancelled", state)
    status = await api.status(task_id)
    assert (status["status"], status["completed_at"]) == ("cancelled", answer.json["cancelled_at"])


async def test_cancelled_again_it_answers_the_same_bytes(api: Client, tasks: Tasks) -> None:
    task_id, _ = await tasks.processing()
    answers = [await api.delete(f"/api/v1/tasks/{task_id}/cancel") for _ in range(3)]
    assert [(answer.status, answer.body) for answer in answers] == [(200, answers[0].body)] * 3


async def test_of_many_cancels_at_once_all_answer_the_same(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued()
    answers = await asyncio.gather(*(api.delete(f"/api/v1/tasks/{task_id}/cancel") for _ in range(20)))
    assert {answer.body for answer in answers} == {answers[0].body}


@pytest.mark.parametrize("state", [TaskStatus.COMPLETED, TaskStatus.FAILED])
async def test_what_has_ended_cannot_be_cancelled(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    task_id = await tasks.in_state(state)
    before = await raw(tasks.store).hgetall(KEYS["task"] + task_id)
    answer = await api.delete(f"/api/v1/tasks/{task_id}/cancel")
    assert (answer.status, answer.error) == (400, "invalid_state")
    assert "cannot be cancelled" in answer.message
    assert await raw(tasks.store).hgetall(KEYS["task"] + task_id) == before


# ── Retry ──


async def test_a_failed_task_is_queued_again_as_itself(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.failed()
    answer = await api.post(f"/api/v1/tasks/{task_id}/retry")
    assert (answer.status, answer.json["task_id"], answer.json["status"], answer.json["queue_position"]) == (201, task_id, "queued", 1)
    status = await api.status(task_id)
    gone = {name: status[name] for name in ("error", "error_code", "retryable", "completed_at", "started_at", "processing_time")}
    assert (status["status"], status["progress"], gone) == ("queued", 0, dict.fromkeys(gone))


async def test_a_retried_task_counts_its_attempts_on(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.failed()
    await api.post(f"/api/v1/tasks/{task_id}/retry")
    await tasks.claim()
    assert (await api.status(task_id))["attempt"] == 2


async def test_the_receipt_of_a_retry_has_an_events_url_that_is_good_from_now(api: Client, tasks: Tasks, store: Store) -> None:
    task_id = await tasks.failed()
    two_days_ago = int((time.time() - 2 * 86_400) * 1000)
    await raw(store).hset(KEYS["task"] + task_id, "created_at_ms", two_days_ago)
    receipt = (await api.post(f"/api/v1/tasks/{task_id}/retry")).json
    async with api.events(receipt["events_url"], key=None) as stream:
        assert await stream.next() is not None


@pytest.mark.parametrize("state", set(STATES) - {TaskStatus.FAILED})
async def test_only_failed_tasks_can_be_retried(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    answer = await api.post(f"/api/v1/tasks/{await tasks.in_state(state)}/retry")
    assert (answer.status, answer.error) == (400, "invalid_state")
    assert "cannot be retried" in answer.message


async def test_of_many_retries_at_once_one_is_accepted(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.failed()
    answers = await asyncio.gather(*(api.post(f"/api/v1/tasks/{task_id}/retry") for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [201] + [400] * 19


@pytest.mark.parametrize(("method", "path"), [("GET", "status"), ("GET", "events"), ("DELETE", "cancel"), ("POST", "retry")])
async def test_an_unknown_task_is_a_404(api: Client, method: str, path: str) -> None:
    answer = await api.ask(method, f"/api/v1/tasks/{UNKNOWN}/{path}")
    assert (answer.status, answer.error) == (404, "not_found")
    assert UNKNOWN in answer.message


async def test_a_worker_hears_that_its_task_was_cancelled(api: Client, tasks: Tasks, store: Store) -> None:
    task_id, run = await tasks.processing()
    async with raw(store).pubsub() as pubsub:
        await pubsub.subscribe(KEYS["control"] + "w1")
        await pubsub.get_message(timeout=5)
        await api.delete(f"/api/v1/tasks/{task_id}/cancel")
        heard: dict[str, Any] = await pubsub.get_message(timeout=5)
    assert heard["data"].decode() == f"cancel {TaskId(task_id)} {run}"
