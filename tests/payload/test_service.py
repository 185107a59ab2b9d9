"""The whole way of a result: submitted over REST, made by a worker, found in the CMS, and told of in the right order."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import pytest
from standardwebhooks import Webhook

from tests.fleet import eventually
from tests.payload.server import PayloadServer
from tests.service import Service, receiver, service

SECRET: Final = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
SMALL: Final[dict[str, Any]] = {"prompt": "a lamp", "resolution": "64x64"}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, cms: PayloadServer) -> Iterator[Service]:
    """A `movieq up` with a CMS."""
    folder = tmp_path_factory.mktemp("up")
    with service(
        folder,
        MOVIEQ_PAYLOAD_URL=cms.url,
        MOVIEQ_PAYLOAD_API_KEY=cms.key,
        MOVIEQ_PAYLOAD_WRITABLE="scenes.clip",
        MOVIEQ_WEBHOOK_SECRET=SECRET,
    ) as running:
        yield running


async def status(up: Service, task_id: str) -> dict[str, Any]:
    """The status of a task."""
    _, answer = await up.call("GET", f"/tasks/{task_id}/status")
    return dict(answer)


async def completed(up: Service, cms: PayloadServer) -> str:
    """A task that has completed."""
    task_id = await up.submit("generate_image", SMALL, str(cms.project))
    await up.ended(task_id)
    return task_id


async def written_back(up: Service, task_id: str) -> dict[str, Any]:
    """The result of a task once the CMS has it."""

    async def there() -> bool:
        return (await status(up, task_id))["result"]["payload_media_id"] is not None

    await eventually(there)
    return dict((await status(up, task_id))["result"])


async def test_a_result_is_in_the_cms_and_every_way_of_hearing_of_it_says_so(up: Service, cms: PayloadServer) -> None:
    scene = cms.call("POST", "/scenes", {"title": "12", "project": cms.project})["doc"]["id"]
    metadata = {"scene_id": "12", "payload": {"collection": "scenes", "id": scene, "field": "clip"}}
    async with receiver() as hook:
        task_id = await up.submit("generate_image", SMALL, str(cms.project), callback_url=hook.url, metadata=metadata)
        await up.ended(task_id)
        ((headers, body),) = await hook.wait_for(1)
        result = await written_back(up, task_id)
        (document,) = cms.documents(task_id)
        assert document["id"] == result["payload_media_id"] == cms.call("GET", f"/scenes/{scene}?depth=0")["clip"]
        async with aiohttp.ClientSession() as session, session.get(result["media_url"]) as answer:
            assert cms.file(document) == await answer.read()
        said = Webhook(SECRET).verify(body, headers)
        assert (said["type"], said["result"]["payload_media_id"], said["metadata"]) == ("task.completed", document["id"], metadata)
        async with asyncio.timeout(60), up.events(task_id) as events:
            heard = [event async for event in events]
        assert [event["event"] for event in heard][-2:] == ["completed", "updated"]
        assert heard[-1]["result"]["payload_media_id"] == document["id"]
        assert heard[-1]["result"]["media_url"].startswith(up.url)
        command = [sys.executable, "-m", "movieq.cli", "deliveries", task_id, "--url", up.url, "--key", up.key]
        shown = await asyncio.to_thread(subprocess.run, command, cwd=up.folder, capture_output=True, text=True, check=True)
        assert [line.split()[:3] for line in shown.stdout.splitlines()] == [
            [f"{task_id}-1", "payload", "task.completed"],
            ["delivered", "after", "1"],
            [f"{task_id}-2", "webhook", "task.completed"],
            ["delivered", "after", "1"],
        ]
        again = await asyncio.to_thread(
            subprocess.run, [*command, "--resend", f"{task_id}-2"], cwd=up.folder, capture_output=True, text=True, check=True
        )
        assert f"{task_id}-2  webhook" in again.stdout
        (_, first), (_, second) = await hook.wait_for(2)
        assert json.loads(first)["result"]["payload_media_id"] == json.loads(second)["result"]["payload_media_id"]


async def test_a_submit_that_names_a_field_which_no_task_may_write_is_refused(up: Service, cms: PayloadServer) -> None:
    for named, problem in (
        ({"collection": "users", "id": 1, "field": "password"}, "tasks may not write users.password"),
        ({"collection": "scenes", "id": 1, "field": "title"}, "MOVIEQ_PAYLOAD_WRITABLE"),
        ({"collection": "scenes", "id": "../users/1", "field": "clip"}, "the id of a document"),
        ({"collection": "scenes", "field": "clip"}, "metadata.payload.id: missing; expected"),
    ):
        body = {"project_id": str(cms.project), "task_type": "generate_image", "task_data": SMALL, "metadata": {"payload": named}}
        status, answer = await up.call("POST", "/tasks/submit", json=body)
        assert (status, answer["error"]) == (400, "validation_failed")
        assert problem in answer["message"]
        assert answer["errors"][0]["path"].startswith("metadata.payload")


async def test_a_result_that_was_made_before_is_in_the_cms_under_its_own_task(up: Service, cms: PayloadServer) -> None:
    ids = [await up.submit("generate_image", {**SMALL, "seed": 7}, str(cms.project))]
    await up.ended(ids[0])
    ids.append(await up.submit("generate_image", {**SMALL, "seed": 7}, str(cms.project)))
    assert (await up.ended(ids[1]))["result"]["metadata"]["cache"] == "hit"
    first, second = [(await written_back(up, task_id))["payload_media_id"] for task_id in ids]
    assert first != second
    assert [cms.documents(task_id)[0]["id"] for task_id in ids] == [first, second]


async def test_while_the_cms_hangs_the_task_is_complete_and_its_id_follows_in_a_second_webhook(up: Service, cms: PayloadServer) -> None:
    cms.freeze()
    try:
        async with receiver() as hook:
            task_id = await up.submit("generate_image", SMALL, str(cms.project), callback_url=hook.url)
            ended = await up.ended(task_id)
            assert (ended["status"], ended["result"]["payload_media_id"]) == ("completed", None)
            await up.call("POST", f"/tasks/{task_id}/deliveries/{task_id}-2/resend")  # as if the half minute were over
            await hook.wait_for(1)
            cms.thaw()
            await hook.wait_for(2)
            said = [json.loads(body) for _, body in hook.requests]
    finally:
        cms.thaw()
    (document,) = cms.documents(task_id)
    assert [(each["type"], each["result"]["payload_media_id"]) for each in said] == [
        ("task.completed", None),
        ("task.updated", document["id"]),
    ]
    assert (await status(up, task_id))["result"]["payload_media_id"] == document["id"]


async def test_no_log_holds_the_key_of_the_cms(up: Service, cms: PayloadServer) -> None:
    await written_back(up, await completed(up, cms))
    text = (up.folder / "log").read_text()
    assert '"kind":"payload"' in text
    assert cms.key not in text


@pytest.mark.slow
async def test_after_kill_9_of_the_worker_in_an_upload_the_next_one_brings_the_result_once(up: Service, cms: PayloadServer) -> None:
    cms.freeze()
    try:
        task_id = await completed(up, cms)
        (worker,) = up.find("worker")
        port = urlsplit(cms.url).port
        await eventually(lambda: any(bool(each.raddr) and each.raddr.port == port for each in worker.net_connections()))
        os.kill(worker.pid, signal.SIGKILL)
    finally:
        cms.thaw()
    await written_back(up, task_id)
    assert len(cms.documents(task_id)) == 1
