"""A result and the CMS: what its document says, what stops its delivery, and what does not."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import web

from movieq.delivery.payload import configured
from movieq.errors import SettingsError
from movieq.queue.keys import KEYS
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.settings import PayloadMode, Settings
from movieq.tasks.entities import DeliveryState
from movieq.tasks.states import GENERATE_IMAGE, PROCESS_AUDIO, RENDER_ANIMATION, EventType, TaskStatus, TaskType
from tests.arrange import raw
from tests.payload.conftest import Desk, clip, still, tried
from tests.payload.server import PayloadServer, payload_server
from tests.service import serving
from workers.delivery import SCHEDULE_S, TRIES


async def test_a_result_becomes_a_document_that_says_what_it_is(desk: Desk, cms: PayloadServer) -> None:
    body = clip()
    task_id = await desk.completed(cms, body)
    async with desk.parts(cms) as parts:
        assert await tried(parts, task_id) is None
    (document,) = cms.documents(task_id)
    assert cms.file(document) == body
    assert document["filename"] == f"video_segment-{task_id}.mp4"
    assert (document["alt"], document["project"], document["mediaType"], document["agentGenerated"]) == (
        "The keeper lights the lamp",
        cms.project,
        "video_segment",
        True,
    )
    task = await desk.task(task_id)
    assert task.started_at_ms is not None
    assert task.ended_at_ms is not None
    assert document["generationMetadata"] == {
        "taskId": task_id,
        "promptUsed": "The keeper lights the lamp",
        "modelVersion": "ltx-video@abc123",
        "generationTime": (task.ended_at_ms - task.started_at_ms) / 1000,
        "seed": 7,
    }
    assert document["technicalData"] == {"duration": 7, "resolution": "1920x1080", "fps": 24000 / 1001, "sampleRate": 48000}
    assert await desk.media_id(task_id) == document["id"]
    assert (await desk.delivery(task_id)).state is DeliveryState.DELIVERED


@pytest.mark.parametrize(
    ("task_type", "body", "task_data", "alt", "media_type"),
    [
        (GENERATE_IMAGE, still(), {"character_description": "x" * 300}, "x" * 120, "character_design"),
        (GENERATE_IMAGE, still(), {"reference_images": ["upload:1"]}, "character design", "character_design"),
        (RENDER_ANIMATION, clip(), {"prompt": "a gull"}, "a gull", "video_segment"),
        (PROCESS_AUDIO, b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), {"text": "Who is there?"}, "Who is there?", "audio_clip"),
    ],
)
async def test_every_task_type_has_its_media_type_and_an_alt_text(
    desk: Desk, cms: PayloadServer, task_type: TaskType, body: bytes, task_data: dict[str, Any], alt: str, media_type: str
) -> None:
    task_id = await desk.completed(cms, body, task_type, task_data=task_data)
    async with desk.parts(cms) as parts:
        assert await tried(parts, task_id) is None
    (document,) = cms.documents(task_id)
    assert (document["alt"], document["mediaType"]) == (alt, media_type)


async def test_the_id_is_an_event_of_the_task_and_of_its_project_and_the_log_still_ends(desk: Desk, cms: PayloadServer) -> None:
    task_id = await desk.completed(cms)
    async with desk.parts(cms) as parts:
        await tried(parts, task_id)
    *_, completed, updated = await Queries(desk.store.redis).log_after(task_id, None)
    assert (completed.type, updated.type) == (EventType.COMPLETED, EventType.UPDATED)
    stored = msgspec.json.decode(updated.data)
    assert (stored["status"], stored["payload_media_id"]) == ("completed", await desk.media_id(task_id))
    assert (await Queries(desk.store.redis).log_after(f"project:{cms.project}", None))[-1].type is EventType.UPDATED
    assert (await desk.task(task_id)).last_event_id == updated.id
    assert 0 < await raw(desk.store).ttl(KEYS["log"] + task_id) <= 86400


async def test_a_log_that_has_expired_does_not_come_back(desk: Desk, cms: PayloadServer) -> None:
    task_id = await desk.completed(cms)
    before = (await desk.task(task_id)).last_event_id
    await raw(desk.store).delete(KEYS["log"] + task_id)
    async with desk.parts(cms) as parts:
        await tried(parts, task_id)
    assert not await raw(desk.store).exists(KEYS["log"] + task_id)
    assert (await desk.task(task_id)).last_event_id == before  # that of its end: who has heard it hears no more
    assert (await Queries(desk.store.redis).log_after(f"project:{cms.project}", None))[-1].type is EventType.UPDATED
    assert await desk.media_id(task_id) is not None


async def test_the_document_that_the_metadata_name_points_at_the_result(desk: Desk, cms: PayloadServer) -> None:
    scene = cms.call("POST", "/scenes", {"title": "12", "project": cms.project, "takes": {"note": "keep"}})["doc"]["id"]
    for field in ("clip", "takes.first"):
        metadata = {"payload": {"collection": "scenes", "id": scene, "field": field}}
        task_id = await desk.completed(cms, metadata=msgspec.json.encode(metadata))
        async with desk.parts(cms, payload_writable="scenes.clip, scenes.takes.first") as parts:
            assert await tried(parts, task_id) is None
        document = cms.call("GET", f"/scenes/{scene}?depth=0")
        assert {"clip": document["clip"], "takes.first": document["takes"]["first"]}[field] == await desk.media_id(task_id)
        assert (document["title"], document["takes"]["note"]) == ("12", "keep")


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ({"collection": "scenes", "id": 999, "field": "clip"}, "scenes/999"),
        ({"collection": "scenes", "id": "../users", "field": "clip"}, "metadata.payload"),
        ({"collection": "scenes/1", "id": 1, "field": "clip"}, "metadata.payload"),
        ({"collection": "scenes", "id": 1}, "metadata.payload"),
        ({"collection": "scenes", "id": 1, "field": "title"}, "scenes.title"),
        ({"collection": "scenes", "id": 1, "field": "__proto__"}, "metadata.payload"),
        ({"collection": "users", "id": 1, "field": "password"}, "users.password"),
        ({"collection": "users", "id": "me", "field": "apiKey"}, "users.apiKey"),
        ({"collection": "globals", "id": "site", "field": "clip"}, "globals.clip"),
        ("scene 12", "metadata.payload"),
    ],
)
async def test_a_document_that_may_not_be_written_costs_its_pointer_and_not_the_result(
    desk: Desk, cms: PayloadServer, named: Any, problem: str
) -> None:
    task_id = await desk.completed(cms, metadata=msgspec.json.encode({"payload": named}))
    async with desk.parts(cms, payload_writable="scenes.clip") as parts:
        assert await tried(parts, task_id) is None
    delivery = await desk.delivery(task_id)
    assert (delivery.state, delivery.tries) == (DeliveryState.FAILED, 1)
    assert problem in (delivery.last_problem or "")
    assert await desk.media_id(task_id) == cms.documents(task_id)[0]["id"]


@pytest.mark.parametrize("project", ["another", None])
async def test_a_document_of_another_project_or_of_none_is_not_written(desk: Desk, cms: PayloadServer, project: str | None) -> None:
    other = cms.call("POST", "/projects", {"title": project})["doc"]["id"] if project else None
    scene = cms.call("POST", "/scenes", {"title": "12", "project": other})["doc"]["id"]
    metadata = {"payload": {"collection": "scenes", "id": scene, "field": "clip"}}
    task_id = await desk.completed(cms, metadata=msgspec.json.encode(metadata))
    async with desk.parts(cms, payload_writable="scenes.clip") as parts:
        assert await tried(parts, task_id) is None
    delivery = await desk.delivery(task_id)
    assert (delivery.state, delivery.tries) == (DeliveryState.FAILED, 1)
    assert "project" in (delivery.last_problem or "")
    assert cms.call("GET", f"/scenes/{scene}?depth=0")["clip"] is None
    assert await desk.media_id(task_id) is not None


async def test_names_and_values_are_those_of_the_operator(desk: Desk, cms: PayloadServer) -> None:
    mapping = f"project:lighthouse={cms.project}, alt=generationMetadata.promptUsed, generationMetadata.promptUsed=alt, technicalData="
    task_id = await desk.completed(cms, task_data={"prompt": "p" * 200}, project="lighthouse")
    async with desk.parts(cms, payload_fields=mapping) as parts:
        assert await tried(parts, task_id) is None
    (document,) = cms.documents(task_id)
    assert document["project"] == cms.project
    assert (len(document["alt"]), len(document["generationMetadata"]["promptUsed"])) == (200, 120)
    assert document["technicalData"] == dict.fromkeys(document["technicalData"])


async def test_a_collection_without_files_gets_a_document_with_the_address(desk: Desk, cms: PayloadServer) -> None:
    mapping = "alt=title, project=film, url=address, mediaType=kind, mediaType:video_segment=moving, generationMetadata.taskId=task"
    settings: dict[str, Any] = {
        "payload_mode": PayloadMode.REFERENCE,
        "payload_media": "clips",
        "payload_fields": f"{mapping}, generationMetadata=, technicalData=",
    }
    task_id = await desk.completed(cms, project="lighthouse")
    async with desk.parts(cms, **settings) as parts:
        assert await tried(parts, task_id) is None
        (document,) = cms.documents(task_id, "clips", "task")
        assert document["address"].startswith(f"http://127.0.0.1:1/media/projects/lighthouse/video/{task_id}/")
        assert (document["title"], document["film"], document["kind"]) == ("The keeper lights the lamp", "lighthouse", "moving")
        assert await desk.media_id(task_id) == document["id"]
        await Outbox(desk.store.redis).resend(task_id, f"{task_id}-1")
        assert await tried(parts, task_id) is None
    assert len(cms.documents(task_id, "clips", "task")) == 1


async def test_a_400_for_a_field_stops_the_tries_and_names_it(desk: Desk, cms: PayloadServer) -> None:
    task_id = await desk.completed(cms, project="lighthouse")
    async with desk.parts(cms) as parts:
        assert await tried(parts, task_id) is None
    delivery = await desk.delivery(task_id)
    assert (delivery.state, delivery.tries, delivery.last_status) == (DeliveryState.FAILED, 1, 400)
    assert "project: " in (delivery.last_problem or "")
    assert "lighthouse" in (delivery.last_problem or "")
    assert await desk.media_id(task_id) is None


async def test_a_wrong_key_is_named_and_tried_until_it_is_right(desk: Desk, cms: PayloadServer) -> None:
    task_id = await desk.completed(cms)
    async with desk.parts(cms, payload_api_key="not-the-key") as parts:
        assert await tried(parts, task_id) is not None
    delivery = await desk.delivery(task_id)
    assert (delivery.state, delivery.last_status) == (DeliveryState.PENDING, 403)
    assert "MOVIEQ_PAYLOAD_API_KEY" in (delivery.last_problem or "")
    assert "not-the-key" not in (delivery.last_problem or "")
    async with desk.parts(cms) as parts:
        assert await tried(parts, task_id) is None
    assert len(cms.documents(task_id)) == 1


@pytest.fixture(scope="module")
def narrow() -> Iterator[PayloadServer]:
    """A CMS with Payload's own limits."""
    with payload_server(own_limits=True) as server:
        yield server


@pytest.mark.parametrize("megabytes", [21, 60])
async def test_a_file_beyond_the_limits_of_payload_names_its_two_settings(desk: Desk, narrow: PayloadServer, megabytes: int) -> None:
    task_id = await desk.completed(narrow, clip(megabytes * 1024 * 1024))
    async with desk.parts(narrow) as parts:
        assert await tried(parts, task_id) is not None  # the limit may be raised
    problem = (await desk.delivery(task_id)).last_problem or ""
    assert "upload.limits.fileSize" in problem
    assert "upload.requestSizeLimit" in problem
    assert narrow.documents(task_id) == []


async def test_an_upload_says_its_length_and_takes_no_memory(desk: Desk, cms: PayloadServer) -> None:
    heard: list[tuple[dict[str, str], int]] = []

    async def taking(request: web.Request) -> web.Response:
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
        heard.append((dict(request.headers), size))
        return web.json_response({"doc": {"id": 1, "filesize": size}})

    file = desk.spool / "long.mp4"
    file.write_bytes(clip(80_000_000))
    async with serving({"/api/media": taking}, "POST") as url, desk.parts(cms, f"{url}/api") as parts:
        assert parts.cms is not None
        tracemalloc.start()
        await parts.cms.create({"alt": "x"}, file, "a.mp4", "video/mp4")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    ((headers, size),) = heard
    assert headers["Content-Length"] == str(size)
    assert "Transfer-Encoding" not in headers
    assert size > 80_000_000
    assert peak < 8_000_000


async def test_a_document_whose_file_did_not_arrive_whole_is_made_anew(desk: Desk, cms: PayloadServer) -> None:
    task_id = await desk.completed(cms)
    short = desk.spool / "short"
    short.write_bytes(clip(500))
    async with desk.parts(cms) as parts:
        assert parts.cms is not None
        fields = {"alt": "x", "project": cms.project, "mediaType": "video_segment", "generationMetadata": {"taskId": task_id}}
        await parts.cms.create(fields, short, "a.mp4", "video/mp4")
        assert await tried(parts, task_id) is not None
        assert "500 of 100000 bytes" in ((await desk.delivery(task_id)).last_problem or "")
        assert await tried(parts, task_id) is None
    (document,) = cms.documents(task_id)
    assert document["filesize"] == 100_000


async def test_a_cms_that_is_down_is_tried_for_more_than_a_day_and_then_given_up(desk: Desk, cms: PayloadServer) -> None:
    task_id = await desk.completed(cms)
    waits = []
    async with desk.parts(cms, "http://127.0.0.1:9/api") as parts:
        while (wait := await tried(parts, task_id)) is not None:
            waits.append(wait)
    expected = [*SCHEDULE_S[1:], *[SCHEDULE_S[-1]] * (TRIES - len(SCHEDULE_S))]
    assert waits == pytest.approx(expected, rel=0.101)
    assert sum(waits) > 86400
    assert waits != expected
    delivery = await desk.delivery(task_id)
    assert (delivery.state, delivery.tries) == (DeliveryState.FAILED, TRIES)
    task = await desk.task(task_id)
    assert task.status is TaskStatus.COMPLETED  # a CMS that is down delays the document, never the task
    await Outbox(desk.store.redis).resend(task_id, f"{task_id}-1")
    async with desk.parts(cms) as parts:
        assert await tried(parts, task_id) is None
    assert await desk.media_id(task_id) == cms.documents(task_id)[0]["id"]


async def test_what_answers_and_is_no_payload_is_named(desk: Desk, cms: PayloadServer) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html>")

    async def moved(_: web.Request) -> web.Response:
        raise web.HTTPFound("http://10.0.0.1/")

    async def busy(_: web.Request) -> web.Response:
        return web.Response(status=503, headers={"Retry-After": "77"})

    for handler, words, least_s in ((page, "not a PayloadCMS", 0), (moved, "redirects are not followed", 0), (busy, "answered 503", 77)):
        task_id = await desk.completed(cms)
        async with serving({"/api/media": handler}) as url, desk.parts(cms, f"{url}/api") as parts:
            wait = await tried(parts, task_id)
        assert wait is not None
        assert wait >= least_s
        assert words in ((await desk.delivery(task_id)).last_problem or "")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"payload_url": "cms.example/api"}, "PAYLOAD_URL"),
        ({"payload_url": "https://user:pw@cms.example/api"}, "PAYLOAD_URL"),
        ({"payload_url": "http://["}, "PAYLOAD_URL"),
        ({"payload_api_key": ""}, "PAYLOAD_API_KEY"),
        ({"payload_api_key": "a\nb"}, "PAYLOAD_API_KEY"),
        ({"payload_media": "a/b"}, "PAYLOAD_MEDIA"),
        ({"payload_writable": "scenes"}, "PAYLOAD_WRITABLE"),
        ({"payload_writable": "scenes.__proto__"}, "PAYLOAD_WRITABLE"),
        ({"payload_writable": "scenes.clip, users.password"}, "PAYLOAD_WRITABLE"),
        ({"payload_writable": "people.photo", "payload_users": "people"}, "PAYLOAD_WRITABLE"),
        ({"payload_fields": "altt=title"}, "PAYLOAD_FIELDS"),
        ({"payload_fields": "alt"}, "PAYLOAD_FIELDS"),
        ({"payload_fields": "alt=a title"}, "PAYLOAD_FIELDS"),
        ({"payload_fields": "alt=mediaType"}, "PAYLOAD_FIELDS"),
        ({"payload_fields": "alt=technicalData"}, "PAYLOAD_FIELDS"),
        ({"payload_mode": PayloadMode.REFERENCE, "payload_fields": "generationMetadata="}, "PAYLOAD_FIELDS"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name_and_shows_no_secret(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingsError, match=f"MOVIEQ_{name}") as raised:
        configured(Settings(**{"payload_url": "https://cms.example/api", "payload_api_key": "the-key", **settings}))
    assert "the-key" not in raised.value.message
    assert "pw" not in raised.value.message


def test_a_value_is_a_number_where_it_reads_as_one_unless_it_is_quoted() -> None:
    text = 'project:film=3, project:pilot="4", mediaType:audio_clip=sound'
    read = configured(Settings(payload_url="https://cms.example/api/", payload_api_key="k", payload_fields=text))
    assert read is not None
    assert read.values == {("project", "film"): 3, ("project", "pilot"): "4", ("mediaType", "audio_clip"): "sound"}
    assert read.address == "https://cms.example/api/media"


def test_metadata_without_a_document_names_none() -> None:
    cms = configured(Settings(payload_url="https://cms.example/api/", payload_api_key="k"))
    assert cms is not None
    assert cms.target({}) is None
    assert cms.target({"payload": None}) is None
