"""A scene that an editor saves: what is submitted, stopped, written back, and what nobody can do to it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from movieq.queue.store import Store
from movieq.settings import Settings
from tests.arrange import claim
from tests.contract.conftest import served
from tests.fleet import KEY, Fleet, eventually
from tests.payload_plugin.conftest import PLUGIN, SCENE, SECRET, Cms, Movieq
from tests.programs import node
from tests.service import serving


async def tasks(api: Movieq, project: str) -> list[dict[str, Any]]:
    """The tasks of a movieq project, newest first."""
    _, page = await api.call("GET", f"/projects/{project}/tasks")
    return list(page["tasks"])


async def test_a_scene_saved_as_queued_becomes_a_clip_in_the_media_of_its_project(installation: Fleet, cms: Cms) -> None:
    api = await installation.api(port=cms.movieq_port)
    await installation.worker(MOVIEQ_WEBHOOK_SECRET=SECRET, MOVIEQ_PUBLIC_URL=api.url)
    project = (await cms.create("projects", title="Lighthouse"))["id"]
    boards = [await cms.picture(project), await cms.picture(project)]
    scene = await cms.create("scenes", **SCENE, project=project, storyboard=boards, lighting="moonlight")
    assert scene["status"] == "draft"
    saved = await cms.changed(scene["id"], status="queued")
    assert saved["status"] == "queued"
    assert saved["eventsUrl"].startswith(api.url)

    async def ended() -> bool:
        return (await cms.scene(scene["id"]))["status"] in ("completed", "failed")

    await eventually(ended)
    scene = await cms.scene(scene["id"])
    assert (scene["status"], scene["error"], scene["progress"]) == ("completed", None, 1)
    _, clip = await cms.call("GET", f"/media/{scene['result']}?depth=0")
    assert (clip["mimeType"], clip["mediaType"], clip["project"]) == ("video/mp4", "video_segment", project)
    assert (clip["alt"], clip["generationMetadata"]["taskId"]) == (SCENE["description"], scene["taskId"])
    _, status = await api.call("GET", f"/tasks/{scene['taskId']}/status")
    assert clip["filesize"] == status["result"]["metadata"]["file_size"]
    assert status["project_id"] == str(project)


async def test_a_scene_made_as_queued_is_submitted_too(api: Movieq, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE, status="queued")
    (task,) = await tasks(api, "payload")
    assert scene["taskId"] == task["task_id"]
    assert (await cms.scene(scene["id"]))["taskId"] == task["task_id"]


async def test_a_scene_saved_many_times_at_once_is_one_task(api: Movieq, cms: Cms) -> None:
    project = (await cms.create("projects", title="Doubles"))["id"]
    scene = await cms.create("scenes", **SCENE, project=project, storyboard=[await cms.picture(project)])
    saves = await asyncio.gather(*(cms.changed(scene["id"], status="queued") for _ in range(6)))
    await cms.changed(scene["id"], status="queued", title="The lamp, later")
    (task,) = await tasks(api, str(project))
    assert {each["taskId"] for each in saves} <= {task["task_id"], None}
    assert (await cms.scene(scene["id"]))["taskId"] == task["task_id"]


async def test_a_scene_whose_receipt_was_lost_gets_the_same_task_when_it_is_saved_again(cms: Cms, settings: Settings) -> None:
    lost: list[dict[str, Any]] = []
    async with served(settings) as client:

        async def passed_on(request: web.Request) -> web.Response:
            url, body = client.url + request.path_qs, await request.read()
            async with aiohttp.request(request.method, url, headers=request.headers, data=body) as answer:
                said = await answer.read()
            if request.path.endswith("/submit") and not lost:
                lost.append(json.loads(said))
                assert request.transport is not None
                request.transport.close()
            return web.Response(body=said, status=answer.status, content_type="application/json")

        async with serving({"/{path:.*}": passed_on}, "*", cms.movieq_port):
            scene = await cms.create("scenes", **SCENE, status="queued")
            assert (scene["status"], scene["taskId"]) == ("failed", None)
            assert (await cms.changed(scene["id"], status="queued"))["taskId"] == lost[0]["task_id"]
        assert len(await tasks(Movieq(client.url), "payload")) == 1


async def test_where_movieq_is_away_the_scene_is_kept_and_says_so_and_can_be_queued_again(installation: Fleet, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE)
    saved = await cms.changed(scene["id"], status="queued", title="Kept")
    assert (saved["status"], saved["title"], saved["taskId"]) == ("failed", "Kept", None)
    assert saved["error"] == f"Not started: movieq at http://127.0.0.1:{cms.movieq_port} cannot be reached: no server listens there."
    await installation.api(port=cms.movieq_port)
    saved = await cms.changed(scene["id"], status="queued")
    assert (saved["status"], saved["error"]) == ("queued", None)
    assert saved["taskId"]


async def test_what_movieq_refuses_is_told_in_its_words(api: Movieq, cms: Cms) -> None:
    saved = await cms.create("scenes", title="Too long", duration=30, resolution="1920x1080", cameraAngle="x" * 300, status="queued")
    assert saved["status"] == "failed"
    assert "task_data.camera_angle" in saved["error"]


async def test_a_scene_saved_as_cancelled_stops_its_task(api: Movieq, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE, status="queued")
    saved = await cms.changed(scene["id"], status="cancelled")
    assert (saved["status"], saved["error"]) == ("cancelled", None)
    _, status = await api.call("GET", f"/tasks/{scene['taskId']}/status")
    assert status["status"] == "cancelled"


async def test_a_scene_queued_again_after_its_end_is_another_task(api: Movieq, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE, status="queued")
    await cms.changed(scene["id"], status="cancelled")
    again = await cms.changed(scene["id"], status="queued")
    assert again["taskId"] not in (None, scene["taskId"])
    assert again["status"] == "queued"


async def test_a_deleted_scene_leaves_no_task_that_runs(api: Movieq, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE, status="queued")
    await cms.call("DELETE", f"/scenes/{scene['id']}")
    _, status = await api.call("GET", f"/tasks/{scene['taskId']}/status")
    assert status["status"] == "cancelled"


async def test_an_outdated_page_changes_nothing_that_movieq_writes(api: Movieq, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE, status="queued")
    stale = {
        "status": "draft",
        "taskId": "another",
        "progress": 0.5,
        "error": "none",
        "eventsUrl": "http://other.example",
        "taskEventAt": None,
    }
    saved = await cms.changed(scene["id"], **stale, title="New title")
    kept = {name: scene[name] for name in stale}
    assert {name: saved[name] for name in stale} == kept
    assert saved["title"] == "New title"
    for status in ("completed", None):
        assert (await cms.changed(scene["id"], status=status))["status"] == "queued"


async def test_a_copy_of_a_running_scene_is_a_draft_without_a_task(api: Movieq, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE, status="queued")
    _, answer = await cms.call("POST", f"/scenes/{scene['id']}/duplicate", json={})
    assert (answer["doc"]["status"], answer["doc"]["taskId"], answer["doc"]["eventsUrl"]) == ("draft", None, None)


async def test_the_key_of_movieq_writes_the_result_and_an_editor_does_not(api: Movieq, cms: Cms) -> None:
    clip = await cms.picture((await cms.create("projects", title="Back"))["id"])
    scene = await cms.create("scenes", **SCENE)
    assert (await cms.changed(scene["id"], result=clip))["result"] is None
    status, answer = await cms.call("PATCH", f"/scenes/{scene['id']}?depth=0", cms.key, json={"result": clip})
    assert (status, answer["doc"]["result"]) == (200, clip)


async def test_the_page_of_a_scene_gets_its_state_and_never_the_key(api: Movieq, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE, status="queued")
    status, state = await cms.call("GET", f"/movieq/scenes/{scene['id']}")
    assert status == 200
    assert (state["status"], state["queuePosition"], state["problem"]) == ("queued", 1, None)
    assert state["eventsUrl"].startswith(f"{api.url}/api/v1/tasks/{scene['taskId']}/events?expires=")
    assert (await cms.call("GET", f"/movieq/scenes/{scene['id']}", {}))[0] == 401
    assert (await cms.call("GET", "/movieq/scenes/9999"))[0] == 404
    assert KEY not in str(state) + str(await cms.scene(scene["id"]))


async def test_the_client_retries_what_has_failed_and_says_what_is_refused(app: Path, api: Movieq, store: Store, cms: Cms) -> None:
    scene = await cms.create("scenes", **SCENE, status="queued")
    (claimed,) = await claim(store)
    await store.fail(claimed.task.task_id, claimed.run, "out of luck", "internal")
    script = f"""
        import {{ Movieq }} from 'movieq-payload'
        const movieq = new Movieq({{ url: '{api.url}', apiKey: '{KEY}' }})
        console.log((await movieq.status('{scene["taskId"]}')).error)
        console.log((await movieq.retry('{scene["taskId"]}')).status)
        await movieq.retry('{scene["taskId"]}').catch((error) => console.log(error.name, error.status, error.code, error.message))
    """
    process = await asyncio.create_subprocess_exec(
        node(PLUGIN), "--input-type=module", "--eval", script, cwd=app, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    failed, queued, refused = said.decode().splitlines()
    assert (failed, queued) == ("out of luck", "queued")
    assert refused.startswith("MovieqError 400 invalid_state movieq refused the request: the task is queued")
