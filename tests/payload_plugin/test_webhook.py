"""The webhook route: what is proven, what is written, and what comes twice, late, early or for nobody."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from standardwebhooks import Webhook

from tests.payload_plugin.conftest import FRAME, SCENE, SECRET, Cms, Movieq
from tests.service import serving

NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)


def event(scene: dict[str, Any], kind: str = "completed", at_s: float = 0, **fields: Any) -> dict[str, Any]:
    """What movieq says of the scene's task."""
    return {
        "type": f"task.{kind}",
        "timestamp": (NOW + timedelta(seconds=at_s)).isoformat().replace("+00:00", "Z"),
        "task_id": scene["taskId"],
        "project_id": "payload",
        "task_type": "generate_video",
        "status": {"updated": "completed"}.get(kind, kind),
        "result": None,
        "error": None,
        "error_code": None,
        "processing_time": 1.5,
        "metadata": {
            "scene_id": str(scene["id"]),
            "payload": {"collection": "scenes", "id": scene["id"], "field": "result"},
            "after": None,
        },
        **fields,
    }


def result(url: str, payload_media_id: Any = None) -> dict[str, Any]:
    """The result of a task whose file is at the address."""
    media = {"url": url, "media_type": "video_segment", "content_type": "image/jpeg", "file_size": 1, "poster_url": None}
    return {"media_url": url, "payload_media_id": payload_media_id, "media": [media], "metadata": {"model": "animatic", "seed": 7}}


def signed(body: str, secret: str = SECRET, age_s: float = 0) -> dict[str, str]:
    """The headers of a webhook, by the library of Standard Webhooks."""
    at = datetime.now(UTC) - timedelta(seconds=age_s)
    return {
        "Content-Type": "application/json",
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", at, body),
    }


async def tell(cms: Cms, said: dict[str, Any]) -> tuple[int, str]:
    """Status and words of the answer to a webhook that is movieq's."""
    body = json.dumps(said)
    status, answer = await cms.call("POST", "/movieq/webhook", signed(body), data=body)
    return status, answer["message"]


async def documents(cms: Cms, scene: dict[str, Any]) -> int:
    """How many media documents the task of the scene has."""
    _, answer = await cms.call("GET", f"/media?where[filename][like]={scene['taskId']}")
    return int(answer["totalDocs"])


@pytest.fixture
async def scene(api: Movieq, cms: Cms) -> dict[str, Any]:
    """A scene whose task waits, for ever."""
    return await cms.create("scenes", **SCENE, status="queued")


@pytest.fixture
async def file_url() -> AsyncIterator[str]:
    """Where a result can be had."""

    async def file(request: web.Request) -> web.Response:
        return web.Response(body=FRAME.read_bytes(), content_type="image/jpeg")

    async with serving({"/output.jpg": file}) as url:
        yield f"{url}/output.jpg"


async def test_what_is_not_signed_by_movieq_just_now_writes_nothing(cms: Cms, scene: dict[str, Any]) -> None:
    body = json.dumps(event(scene, "failed", error="forged"))
    other = "whsec_" + "YW5vdGhlciBzZWNyZXQgb2YgbGVuZ3Ro"
    for headers in (
        {"Content-Type": "application/json"},
        signed(body, other),
        signed(body, age_s=600),
        signed(body, age_s=-600),
        signed(body + " "),
    ):
        status, answer = await cms.call("POST", "/movieq/webhook", headers, data=body)
        assert (status, answer["message"].startswith("Invalid webhook")) == (401, True), headers
    assert (await cms.scene(scene["id"]))["status"] == "queued"
    status, _ = await cms.call("POST", "/movieq/webhook", signed(body), data=body)
    assert (status, (await cms.scene(scene["id"]))["error"]) == (200, "forged")


async def test_a_result_is_imported_once_however_often_its_webhook_comes(cms: Cms, scene: dict[str, Any], file_url: str) -> None:
    said = event(scene, result=result(file_url))
    answers = await asyncio.gather(*(tell(cms, said) for _ in range(4)))
    assert sorted(answers) == [(200, "no change")] * 3 + [(200, "scene updated")]
    assert await tell(cms, said) == (200, "no change")
    now = await cms.scene(scene["id"])
    assert (now["status"], now["progress"], await documents(cms, scene)) == ("completed", 1, 1)
    _, clip = await cms.call("GET", f"/media/{now['result']}")
    assert (clip["filesize"], clip["filename"]) == (FRAME.stat().st_size, f"{scene['taskId']}.jpg")


async def test_the_document_that_movieq_made_is_taken_as_it_is(cms: Cms, scene: dict[str, Any], file_url: str) -> None:
    clip = await cms.picture(None)
    assert await tell(cms, event(scene, result=result(file_url, clip))) == (200, "scene updated")
    assert ((await cms.scene(scene["id"]))["result"], await documents(cms, scene)) == (clip, 0)


async def test_an_update_counts_whether_it_comes_after_the_end_or_before_it(cms: Cms, api: Movieq, file_url: str) -> None:
    clip = await cms.picture(None)
    completed: dict[str, Any] = {"kind": "completed", "at_s": 0, "error": None}
    updated: dict[str, Any] = {"kind": "updated", "at_s": 30, "result": result(file_url, clip)}
    for first, second, answer in ((completed, updated, "scene updated"), (updated, completed, "no change")):
        scene = await cms.create("scenes", **SCENE, status="queued")
        assert await tell(cms, event(scene, **first)) == (200, "scene updated")
        assert await tell(cms, event(scene, **second)) == (200, answer)
        now = await cms.scene(scene["id"])
        assert (now["status"], now["result"]) == ("completed", clip)


async def test_the_document_counts_where_a_page_had_asked_before_it_was_known(cms: Cms, scene: dict[str, Any], file_url: str) -> None:
    clip = await cms.picture(None)
    assert await tell(cms, event(scene)) == (200, "scene updated")
    assert await tell(cms, event(scene, result=result(file_url, clip))) == (200, "scene updated")
    assert await tell(cms, event(scene, result=result(file_url, clip))) == (200, "no change")
    assert (await cms.scene(scene["id"]))["result"] == clip


async def test_a_failure_is_told_and_an_older_one_takes_no_success_back(cms: Cms, scene: dict[str, Any], file_url: str) -> None:
    assert (await tell(cms, event(scene, "failed", error="the storyboard is empty")))[0] == 200
    now = await cms.scene(scene["id"])
    assert (now["status"], now["error"]) == ("failed", "the storyboard is empty")
    assert await tell(cms, event(scene, at_s=60, result=result(file_url))) == (200, "scene updated")  # it was retried
    assert await tell(cms, event(scene, "failed", at_s=1, error="late")) == (200, "no change")
    now = await cms.scene(scene["id"])
    assert (now["status"], now["error"]) == ("completed", None)


async def test_the_end_of_a_task_that_the_scene_has_no_more_is_passed_over(cms: Cms, scene: dict[str, Any]) -> None:
    await cms.changed(scene["id"], status="cancelled")
    await cms.changed(scene["id"], status="queued")
    assert await tell(cms, event(scene, "failed", error="of before")) == (200, "no change")
    assert (await cms.scene(scene["id"]))["status"] == "queued"


async def test_the_end_of_a_task_whose_scene_is_still_being_saved_is_asked_for_again(cms: Cms, scene: dict[str, Any]) -> None:
    said = event(scene, "failed", error="early")
    metadata = {**said["metadata"], "after": scene["taskId"]}  # submitted after the task that the scene has as yet
    status, _ = await tell(cms, {**said, "task_id": str(uuid.uuid4()), "metadata": metadata})
    assert status == 409


async def test_a_scene_that_is_gone_wants_no_more_webhooks(cms: Cms, scene: dict[str, Any]) -> None:
    await cms.call("DELETE", f"/scenes/{scene['id']}")
    assert (await tell(cms, event(scene, "cancelled")))[0] == 410


async def test_a_webhook_about_something_else_is_taken_and_left(cms: Cms, scene: dict[str, Any]) -> None:
    assert await tell(cms, event(scene, metadata={})) == (200, "ignored: not for a scene")
    assert (await cms.scene(scene["id"]))["status"] == "queued"


async def test_a_result_that_cannot_be_fetched_is_asked_for_again(cms: Cms, scene: dict[str, Any], file_url: str) -> None:
    said = event(scene, result=result(file_url.replace("output", "missing")))
    status, message = await tell(cms, said)
    assert (status, message) == (503, "movieq's file cannot be downloaded: its server answered 404.")
    assert (await cms.scene(scene["id"]))["status"] == "queued"
    assert await tell(cms, {**said, "result": result(file_url)}) == (200, "scene updated")


async def test_the_body_of_a_webhook_is_read_to_a_limit(cms: Cms) -> None:
    body = " " * (1024 * 1024 + 1)
    status, answer = await cms.call("POST", "/movieq/webhook", signed(body), data=io.BytesIO(body.encode()))
    assert (status, "over" in answer["message"]) == (413, True)
