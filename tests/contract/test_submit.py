"""Submit: the receipt, its warnings, and the same receipt again for the same Idempotency-Key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import msgspec
import pytest
from arq import ArqRedis
from arq.jobs import Job

from movieq.api import tasks
from movieq.queue.api_keys import ApiKeys
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.settings import Grant, Scope, Settings, key_hash
from tests.arrange import raw
from tests.contract.client import ALL, BODY, FILM, Client
from tests.contract.conftest import Tasks, served

ONCE = {"Idempotency-Key": "shot-42/take-1"}


async def test_the_receipt_says_where_the_task_is(api: Client) -> None:
    answer = await api.submit()
    receipt = answer.json
    assert answer.status == 201
    assert str(UUID(receipt["task_id"])) == receipt["task_id"]
    assert (receipt["status"], receipt["project_id"], receipt["warnings"]) == ("queued", "film", [])
    assert receipt["status_url"] == answer.headers["Location"] == f"{api.url}/api/v1/tasks/{receipt['task_id']}/status"
    assert receipt["events_url"].startswith(f"{api.url}/api/v1/tasks/{receipt['task_id']}/events?")
    assert (await api.get(receipt["status_url"])).status == 200


async def test_the_receipt_counts_in_integers(api: Client) -> None:
    receipt = (await api.submit()).json
    assert {type(receipt[name]) for name in ("estimated_duration", "queue_position")} == {int}


async def test_every_answer_names_the_public_url(settings: Settings, store: Store) -> None:
    async with served(msgspec.structs.replace(settings, public_url="https://movieq.example")) as api:
        task_id = await Tasks(api, store).completed()
        status, receipt = await api.status(task_id), (await api.submit()).json
    urls = [receipt["status_url"], receipt["events_url"], status["events_url"], status["result"]["media_url"]]
    assert {urlsplit(url)[:2] for url in urls} == {("https", "movieq.example")}


async def test_the_queue_position_is_exact_while_one_project_waits(api: Client) -> None:
    assert [(await api.submit()).json["queue_position"] for _ in range(3)] == [1, 2, 3]


async def test_a_high_priority_stands_in_front(api: Client) -> None:
    await api.submit(priority=3)
    assert (await api.submit(priority=1)).json["queue_position"] == 1


async def test_after_five_tasks_of_a_shape_the_estimate_is_their_median(api: Client, tasks: Tasks) -> None:
    assert (await api.submit()).json["estimated_duration"] == 2
    await tasks.claim()
    for _ in range(5):
        await tasks.completed()
    assert (await api.submit()).json["estimated_duration"] <= 1


@pytest.mark.parametrize("task_type", ["generate_video", "generate_image", "process_audio", "render_animation"])
async def test_a_prompt_alone_is_enough_for_every_type(api: Client, task_type: str) -> None:
    assert (await api.submit(task_type=task_type)).status == 201


@pytest.mark.parametrize(
    ("task_type", "task_data"),
    [
        ("generate_video", {"scene_description": "dusk"}),
        ("generate_video", {"storyboard_images": ["https://x.example/a.png"]}),
        ("generate_image", {"character_description": "a keeper"}),
        ("generate_image", {"reference_images": ["upload:abc"]}),
        ("process_audio", {"text": "Land ho."}),
        ("render_animation", {"reference_images": ["task:123e4567-e89b-12d3-a456-426614174000"]}),
        ("generate_video", {"prompt": "x", "fps": "24000/1001", "resolution": "64x3840", "duration": 30, "seed": 2**32 - 1}),
        ("generate_video", {"prompt": "x" * 8000, "storyboard_images": ["https://x.example/a.png"] * 32}),
        ("process_audio", {"text": "x" * 5000, "language": "pt-BR", "output_format": "flac", "sample_rate": 48000}),
        ("process_audio", {"prompt": "rain", "duration": 60}),
    ],
)
async def test_what_the_contract_allows_is_accepted(api: Client, task_type: str, task_data: dict[str, Any]) -> None:
    answer = await api.submit(task_type=task_type, task_data=task_data)
    assert (answer.status, answer.json.get("warnings")) == (201, [])


async def test_null_means_absent(api: Client) -> None:
    optional = dict.fromkeys(("priority", "callback_url", "metadata", "deadline"))
    data = {"prompt": "x", "seed": None, "resolution": None, "format": None, "reference_images": None}
    answer = await api.submit(**optional, task_data=data)
    assert (answer.status, answer.json["warnings"]) == (201, [])


async def test_warnings_name_what_nothing_reads(api: Client) -> None:
    answer = await api.submit(task_data={"prompt": "x", "colour": "red", "fps": 24})
    assert answer.json["warnings"] == ["Unknown field ignored: task_data.colour", "Unknown field ignored: task_data.fps"]


async def test_unread_keys_reach_the_worker_as_they_came(api: Client, store: Store) -> None:
    unread: dict[str, Any] = {"colour": "red", "list": [], "none": None, "big": 2**64 - 1, "nul": "a\0b", "deep": [[[{}]]]}
    receipt = (await api.submit(task_data={"prompt": "x", **unread})).json
    info = await Job(receipt["task_id"], store.redis, _deserializer=msgspec.msgpack.decode).info()
    assert info is not None
    assert info.kwargs["task_data"] == {"prompt": "x", **unread}


async def test_metadata_of_16_kib_is_accepted(api: Client) -> None:
    assert (await api.submit(metadata={"a": "x" * (16 * 1024 - len('{"a":""}'))})).status == 201


async def test_a_public_callback_and_a_deadline_are_accepted(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued(
        callback_url="https://cms.example/hooks/movieq?x=1", deadline={"start_by": "2999-01-01T00:00:00+02:00", "finish_by": None}
    )
    assert (await api.status(task_id))["status"] == "queued"


async def test_a_private_callback_is_accepted_where_the_setting_names_its_network(api: Client) -> None:
    assert (await api.submit(callback_url="http://10.9.8.7:3000/hook")).status == 201


async def test_a_deadline_that_has_passed_fails_the_task(api: Client, tasks: Tasks) -> None:
    task_id = await tasks.queued(deadline={"start_by": "2020-01-01T00:00:00Z"})
    status = (await api.get(f"/api/v1/tasks/{task_id}/status?wait=5")).json
    assert (status["status"], status["error_code"], status["processing_time"]) == ("failed", "deadline_exceeded", None)


async def test_draft_is_always_the_animatic(api: Client, store: Store, tasks: Tasks) -> None:
    task = await Queries(store.redis).task(await tasks.queued(task_data={"prompt": "x", "draft": True, "model": "animatic"}))
    assert task is not None
    assert (task.engine, task.kind) == ("animatic", "cpu_intensive")


@pytest.mark.parametrize(
    ("model", "task_type", "task_data", "field", "said"),
    [
        ("wan22-t2v", "generate_video", {}, "duration", "makes at most 5.1 s"),
        ("wan22-t2v", "generate_video", {"duration": 3, "storyboard_images": ["upload:x"]}, "storyboard_images", "takes no images"),
        ("wan22-i2v", "render_animation", {}, "reference_images", "begins with an image"),
        ("stable-audio-open", "process_audio", {"duration": 50}, "duration", "makes at most 47 s of sound"),
        ("csm", "process_audio", {"text": "hallo", "language": "de"}, "language", "speaks en, got"),
    ],
)  # fmt: skip
async def test_what_a_model_cannot_do_is_refused_at_once_with_the_models_that_can(
    api: Client, model: str, task_type: str, task_data: dict[str, Any], field: str, said: str
) -> None:
    answer = await api.submit(task_type=task_type, task_data={"prompt": "a lighthouse", "model": model, **task_data})
    assert answer.status == 400
    (error,) = answer.json["errors"]
    assert error["path"] == f"task_data.{field}"
    assert said in error["message"]
    if task_type == "generate_video":
        assert "or set task_data.model to one of animatic, ltx23-distilled" in error["message"]


async def test_a_full_project_is_told_when_to_come_back(settings: Settings, store: Store) -> None:
    async with served(msgspec.structs.replace(settings, max_queued_per_project=2)) as api:
        await api.submit()
        await api.submit()
        answer = await api.submit()
        assert (answer.status, answer.error, answer.json["retryable"]) == (429, "queue_full", True)
        assert int(answer.headers["Retry-After"]) > 0
        assert (await api.submit(project_id="other")).status == 201


# ── Idempotency-Key ──


async def test_the_same_key_and_body_give_the_same_bytes_again(api: Client) -> None:
    first, again = await api.submit(headers=ONCE), await api.submit(headers=ONCE)
    assert (again.status, again.body) == (201, first.body)
    assert [answer.headers.get("Idempotent-Replayed") for answer in (first, again)] == [None, "true"]


async def test_the_receipt_stays_the_same_whatever_has_become_of_the_task(api: Client, tasks: Tasks) -> None:
    await api.submit()
    first = await api.submit(headers=ONCE)
    await tasks.claim()
    await tasks.store.fail(first.json["task_id"], await tasks.claim(), "broke", "internal")
    await api.post(f"/api/v1/tasks/{first.json['task_id']}/retry")
    assert (await api.submit(headers=ONCE)).body == first.body


async def test_a_burst_of_requests_opens_one_connection_to_redis_at_most(api: Client, redis: ArqRedis, store: Store) -> None:
    await ApiKeys(store.redis).add_grant(key_hash("kept in Redis"), Grant(None, frozenset(Scope)))
    for _ in range(5):  # a machine that stands still for a second is answered 503, and the connection is made anew
        before = (await redis.info("stats"))["total_connections_received"]
        statuses = {answer.status for answer in await asyncio.gather(*(api.submit("kept in Redis") for _ in range(50)))}
        connections = (await redis.info("stats"))["total_connections_received"] - before
        if statuses == {201}:
            break
    assert statuses == {201}
    assert connections <= 1


async def test_fifty_at_once_are_one_task_and_fifty_equal_answers(api: Client, store: Store) -> None:
    answers = await asyncio.gather(*(api.submit(headers=ONCE) for _ in range(50)))
    assert {(answer.status, answer.body) for answer in answers} == {(201, answers[0].body)}
    assert sum(answer.headers.get("Idempotent-Replayed") == "true" for answer in answers) == 49
    assert (await api.get("/api/v1/projects/film/tasks")).json["pagination"]["total"] == 1


async def test_the_same_key_with_another_body_is_a_mismatch(api: Client) -> None:
    await api.submit(headers=ONCE)
    answer = await api.submit(headers=ONCE, priority=1)
    assert (answer.status, answer.error) == (422, "idempotency_mismatch")


async def test_other_spaces_are_another_body(api: Client) -> None:
    await api.submit_bytes(json.dumps(BODY).encode(), headers=ONCE)
    assert (await api.submit_bytes(json.dumps(BODY, indent=1).encode(), headers=ONCE)).status == 422


async def test_the_key_counts_within_its_api_key_and_project(api: Client) -> None:
    answers = [await api.submit(headers=ONCE, key=key, project_id=project) for key, project in ((ALL, "film"), (FILM, "film"), (ALL, "b"))]
    assert len({answer.json["task_id"] for answer in answers}) == 3


async def test_a_refused_body_does_not_use_up_the_key(api: Client) -> None:
    assert (await api.submit(headers=ONCE, priority=9)).status == 400
    assert (await api.submit(headers=ONCE)).status == 201


async def test_a_replay_is_answered_also_where_the_project_is_full(settings: Settings, store: Store) -> None:
    async with served(msgspec.structs.replace(settings, max_queued_per_project=1)) as api:
        assert [(await api.submit(headers=ONCE)).status for _ in range(2)] == [201, 201]


async def test_the_key_is_remembered_for_a_day_under_a_hash(api: Client, store: Store) -> None:
    await api.submit(headers=ONCE)
    (name,) = [name async for name in raw(store).scan_iter("movieq:idempotency:*")]
    assert ONCE["Idempotency-Key"].encode() not in name
    assert 86_000 < await raw(store).ttl(name) <= 86_400


@pytest.mark.parametrize("key", ["", "x" * 256, "x" * 10_000, "two words", "clé", "日本", "tab\tbed"])
async def test_an_idempotency_key_is_visible_ascii_of_bounded_length(api: Client, key: str) -> None:
    body = json.dumps(BODY)
    head = f"POST /api/v1/tasks/submit HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\nX-API-Key: {ALL}\r\n"
    answer = await api.raw(f"{head}Idempotency-Key: {key}\r\n\r\n{body}".encode())
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"Idempotency-Key: expected 1 to 255" in answer


async def test_an_idempotency_key_of_255_characters_is_accepted(api: Client) -> None:
    assert (await api.submit(headers={"Idempotency-Key": "~" * 255})).status == 201


async def test_a_body_that_trickles_in_is_refused_in_time(api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "BODY_S", 0.2)

    answered = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"project_id": '
        await answered.wait()

    answer = await api.submit_bytes(slow())
    answered.set()
    assert (answer.status, answer.json["error"]) == (400, "validation_failed")
    assert "did not arrive" in answer.json["message"]
