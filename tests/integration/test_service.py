"""A task from submit to webhook on the service as a user runs it: inputs, engine, files, and the death of a part."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import aiohttp
import av
import msgspec
import psutil
import pytest
from aiohttp import web
from PIL import Image
from standardwebhooks import Webhook

from tests.fleet import eventually
from tests.service import Service, receiver, service, serving

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
SMALL: dict[str, Any] = {"prompt": "a lamp", "resolution": "64x64"}
LONG: dict[str, Any] = {"prompt": "a long way up the stairs", "duration": 30, "fps": 60, "resolution": "1920x1080"}
"""A clip that takes half a minute, so that something can happen meanwhile."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service for the tests that do not change it."""
    with service(tmp_path_factory.mktemp("service"), MOVIEQ_WEBHOOK_SECRET=SECRET, MOVIEQ_DRAIN_S="1") as up:
        yield up


def picture(size: tuple[int, int] = (320, 180), mode: str = "RGB", format: str = "PNG", **options: Any) -> bytes:
    """Return an image file."""
    buffer = io.BytesIO()
    Image.new(mode, size, 128 if mode in ("L", "I;16") else None).save(buffer, format, **options)
    return buffer.getvalue()


async def file_of(status: dict[str, Any]) -> bytes:
    """Return the file of a completed task, downloaded by its URL."""
    assert status["status"] == "completed", status
    async with aiohttp.ClientSession() as session, session.get(status["result"]["media_url"]) as answer:
        assert answer.status == 200
        return await answer.read()


async def test_what_was_made_before_with_this_seed_is_there_at_once(running: Service) -> None:
    frame = await running.upload(picture())
    data = {**SMALL, "reference_images": [frame], "seed": 7}
    first = await running.ended(await running.submit("generate_image", data))
    _, again = await running.call("GET", f"/tasks/{await running.submit('generate_image', data)}/status")
    anew = await running.ended(await running.submit("generate_image", {**data, "no_cache": True}))
    assert [each.get("result", {}).get("metadata", {}).get("cache") for each in (first, again, anew)] == [None, "hit", None]
    assert await file_of(again) == await file_of(first)
    assert anew["result"]["media_url"] != first["result"]["media_url"]


async def test_takes_are_stored_side_by_side_and_each_can_be_rendered_again(running: Service) -> None:
    data = {**SMALL, "duration": 1, "fps": 12, "seed": 4_294_967_295}
    status = await running.ended(await running.submit("render_animation", {**data, "takes": 3}))
    media = status["result"]["media"]
    assert [(each["take"], each["seed"]) for each in media] == [(1, 4_294_967_295), (2, 0), (3, 1)]
    assert status["result"]["media_url"] == media[0]["url"]
    assert status["result"]["metadata"]["seed"] == data["seed"]
    assert len({each["url"] for each in media} | {each["poster_url"] for each in media}) == 6
    alone = await running.ended(await running.submit("render_animation", {**data, "seed": 1}))
    async with aiohttp.ClientSession() as session:
        posters = [await (await session.get(each["poster_url"])).read() for each in (*media, alone["result"]["media"][0])]
    pixels = [Image.open(io.BytesIO(poster)).tobytes() for poster in posters]  # the tags differ by the task
    assert pixels[2] == pixels[3]
    assert len(set(pixels)) == 3


async def test_a_storyboard_becomes_a_clip_of_just_what_was_asked(running: Service) -> None:
    frames = [await running.upload(picture((640, 360))) for _ in range(3)]
    data = {
        "storyboard_images": frames,
        "camera_angle": "pan left",
        "duration": 2,
        "fps": "24000/1001",
        "resolution": "640x360",
        "audio_cues": ["rain"],
    }
    status = await running.ended(await running.submit("generate_video", data))
    body = await file_of(status)
    assert body.index(b"moov") < body.index(b"mdat")
    with av.open(io.BytesIO(body)) as clip:
        video = clip.streams.video[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt, video.width, video.height) == ("h264", "yuv420p", 640, 360)
        assert (video.average_rate, video.frames) == (Fraction(24000, 1001), 48)
        assert clip.streams.audio[0].codec_context.name == "aac"
    result = status["result"]
    assert result["media"][0]["media_type"] == "video_segment"
    assert result["metadata"]["engine"] == "animatic"
    assert result["metadata"]["file_size"] == len(body)
    async with aiohttp.ClientSession() as session, session.get(result["media"][0]["poster_url"]) as answer:
        assert Image.open(io.BytesIO(await answer.read())).size == (640, 360)


async def test_a_character_becomes_an_image(running: Service) -> None:
    status = await running.ended(await running.submit("generate_image", {"character_description": "a keeper in oilskins"}))
    image = Image.open(io.BytesIO(await file_of(status)))
    assert (image.size, image.format) == ((1024, 1024), "JPEG")


async def test_a_line_becomes_a_voice(running: Service) -> None:
    status = await running.ended(await running.submit("process_audio", {"text": "The lamp must not go out."}))
    with av.open(io.BytesIO(await file_of(status))) as sound:
        assert sound.streams.audio[0].codec_context.name == "mp3float"
        assert sound.streams.audio[0].rate == 44100


async def test_a_character_becomes_an_animation(running: Service) -> None:
    status = await running.ended(await running.submit("render_animation", {"prompt": "a gull", "duration": 1, "resolution": "320x180"}))
    with av.open(io.BytesIO(await file_of(status))) as clip:
        assert clip.streams.video[0].frames == 24


async def test_the_result_of_one_task_is_the_input_of_another(running: Service) -> None:
    first = await running.submit("generate_image", {**SMALL, "resolution": "256x256"})
    await running.ended(first)
    second = await running.submit("generate_image", {"reference_images": [f"task:{first}"], "resolution": "128x128"})
    assert (await running.ended(second))["status"] == "completed"


async def test_the_webhook_is_signed_and_says_what_the_status_says(running: Service) -> None:
    async with receiver() as hook:
        task_id = await running.submit("generate_image", SMALL, callback_url=hook.url, metadata={"scene_id": "s1", "list": [], "n": 2**53})
        status = await running.ended(task_id)
        ((headers, body),) = await hook.wait_for(1)
    Webhook(SECRET).verify(body, {name.lower(): value for name, value in headers.items()})
    said = msgspec.json.decode(body)
    assert (said["type"], said["task_id"], said["taskId"], said["event"]) == ("task.completed", task_id, task_id, "complete")
    assert said["metadata"] == {"scene_id": "s1", "list": [], "n": 2**53}
    assert said["scene_id"] == "s1"
    assert said["result"]["metadata"] == status["result"]["metadata"]
    assert said["processing_time"] == status["processing_time"]


async def test_a_webhook_that_is_refused_comes_again_under_the_same_id(running: Service) -> None:
    async with receiver(500, 200) as hook:
        await running.submit("generate_image", SMALL, callback_url=hook.url)
        (first, _), (second, _) = await hook.wait_for(2)
    assert first["webhook-id"] == second["webhook-id"]


@pytest.mark.parametrize("verb", ["failed", "cancelled"])
async def test_a_task_without_a_result_tells_its_receiver_too(running: Service, verb: str) -> None:
    async with receiver() as hook:
        data = LONG if verb == "cancelled" else {"storyboard_images": ["upload:none"]}
        task_id = await running.submit("generate_video", data, callback_url=hook.url)
        if verb == "cancelled":
            await running.until(task_id, "event", "started")
            await running.call("DELETE", f"/tasks/{task_id}/cancel")
        ((_, body),) = await hook.wait_for(1)
    said = msgspec.json.decode(body)
    assert (said["type"], said["status"], said["result"]) == (f"task.{verb}", verb, None)
    assert f"{verb}_at" in said


BAD_IMAGES = {
    "zero bytes": b"",
    "html": b"<!doctype html><p>not found",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "truncated jpeg": picture(format="JPEG")[:400],
    "60000x60000 png": picture((8, 8))[:16] + (60000).to_bytes(4, "big") * 2 + picture((8, 8))[24:],
}
ODD_IMAGES = {
    "cmyk": picture(mode="CMYK", format="JPEG"),
    "16 bit": picture(mode="I;16"),
    "alpha": picture(mode="RGBA"),
    "1x10000": picture((1, 10000)),
    "turned by exif": picture((180, 320), format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
}


async def clip_of(running: Service, url: str) -> dict[str, Any]:
    data = {"storyboard_images": [url], "duration": 1, "fps": 8, "resolution": "128x72"}
    return await running.ended(await running.submit("generate_video", data))


@pytest.mark.parametrize("name", BAD_IMAGES)
async def test_a_reference_that_is_no_usable_image_fails_its_task_by_name_and_the_next_is_fine(running: Service, name: str) -> None:
    async def image(_: web.Request) -> web.Response:
        return web.Response(body=BAD_IMAGES[name], content_type="image/png")

    async with serving({"/frame": image}) as url:
        status = await clip_of(running, f"{url}/frame")
    assert status["status"] == "failed"
    assert status["error_code"] in ("invalid_input", "input_unavailable")
    assert f"{url}/frame" in status["error"]
    assert (await running.ended(await running.submit("generate_image", SMALL)))["status"] == "completed"


@pytest.mark.parametrize("name", ODD_IMAGES)
async def test_an_odd_image_is_still_a_frame(running: Service, name: str) -> None:
    async def image(_: web.Request) -> web.Response:
        return web.Response(body=ODD_IMAGES[name])

    async with serving({"/frame": image}) as url:
        assert (await clip_of(running, f"{url}/frame"))["status"] == "completed"


async def test_references_that_cannot_be_had_are_named(running: Service) -> None:
    async def moved(_: web.Request) -> web.Response:
        raise web.HTTPFound("http://10.0.0.1/private.png")

    foreign = await running.submit("generate_image", SMALL, project="other")
    await running.ended(foreign)
    failed = await running.submit("generate_image", {"reference_images": ["upload:none"]})
    await running.ended(failed)
    async with serving({"/moved": moved}) as url:
        for reference in (
            f"{url}/none",
            f"{url}/moved",
            "http://127.0.0.1:1/x.png",
            f"task:{foreign}",
            f"task:{failed}",
            "task:none",
            "upload:x",
            "ftp://x/y",
        ):
            status = await clip_of(running, reference)
            assert (status["status"], status["error_code"]) == ("failed", "input_unavailable"), reference
            assert reference in status["error"]


async def test_no_progress_comes_from_a_child_that_does_not_work(running: Service) -> None:
    task_id = await running.submit("generate_video", LONG)
    await running.until(task_id, "stage", "frames")
    (child,) = running.find("workers.child")

    async def progress() -> Any:
        return (await running.call("GET", f"/tasks/{task_id}/status"))[1]["progress"]

    async def heartbeat() -> Any:
        return (await running.call("GET", "/workers/status"))[1]["workers"][0]["last_heartbeat"]

    async def next_heartbeat() -> None:
        before = await heartbeat()

        async def beat() -> bool:
            return bool(await heartbeat() != before)

        await eventually(beat)

    async def settled() -> bool:
        """Whether the worker lives and has nothing to report."""
        before = await progress()
        await next_heartbeat()
        return bool(await progress() == before)

    async def goes_on() -> bool:
        return bool(await progress() > stopped)

    child.suspend()
    try:
        await eventually(settled)
        stopped = await progress()
    finally:
        child.resume()
    await eventually(goes_on)
    await running.call("DELETE", f"/tasks/{task_id}/cancel")
    await running.ended(task_id)


async def test_cancel_frees_the_slot_for_the_next_task_in_the_same_engine(running: Service) -> None:
    task_id = await running.submit("generate_video", LONG)
    await running.until(task_id, "stage", "frames")
    (child,) = running.find("workers.child")
    await running.call("DELETE", f"/tasks/{task_id}/cancel")
    assert (await running.ended(await running.submit("generate_image", SMALL)))["status"] == "completed"
    assert running.find("workers.child")[0].pid == child.pid
    assert (await running.call("GET", f"/tasks/{task_id}/status"))[1]["status"] == "cancelled"


async def test_a_child_that_is_killed_costs_one_attempt(running: Service) -> None:
    task_id = await running.submit("generate_video", {**LONG, "duration": 5, "fps": 24, "resolution": "960x540"})
    await running.until(task_id, "stage", "frames")
    (child,) = running.find("workers.child")
    child.kill()
    event = await running.until(task_id, "event", "retrying")
    assert "SIGKILL" in event["error"]
    status = await running.ended(task_id)
    assert (status["status"], status["attempt"]) == ("completed", 2)


async def test_a_stopping_worker_hands_back_what_cannot_end_in_time_uncounted(running: Service) -> None:
    task_id = await running.submit("generate_video", {**LONG, "duration": 6, "fps": 24})
    await running.until(task_id, "stage", "frames")
    (worker,) = running.find("worker")
    worker.terminate()
    await running.until(task_id, "event", "retrying")
    status = await running.ended(task_id)
    assert (status["status"], status["attempt"]) == ("completed", 2)


async def test_after_kill_9_of_the_worker_another_attempt_runs_and_leaves_one_file_and_one_webhook(tmp_path: Path) -> None:
    with service(tmp_path) as up:
        async with receiver() as hook:
            task_id = await up.submit("generate_video", {**LONG, "duration": 10, "fps": 24, "resolution": "960x540"}, callback_url=hook.url)
            await up.until(task_id, "stage", "frames")
            (worker,), (child,) = up.find("worker"), up.find("workers.child")
            os.kill(worker.pid, signal.SIGKILL)
            await eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
            status = await up.ended(task_id)
            await hook.wait_for(1)
        assert (status["status"], status["attempt"]) == ("completed", 2)
        _, answer = await up.call("GET", f"/tasks/{task_id}/deliveries")
        assert len(answer["deliveries"]) == len(hook.requests) == 1
        assert len(list((up.folder / "data/media").rglob("output.*"))) == 1


async def test_what_dies_under_up_is_started_again(tmp_path: Path) -> None:
    with service(tmp_path) as up:
        kept = await up.submit("generate_image", SMALL)
        await up.ended(kept)
        for words in (("api",), ("worker",), ("valkey-server",)):
            (process,) = up.find(*words)
            process.kill()
            await eventually(lambda words=words, dead=process.pid: any(each.pid != dead for each in up.find(*words)))  # type: ignore[misc]
        task_ids: list[str] = []

        async def takes_tasks() -> bool:
            with contextlib.suppress(AssertionError, aiohttp.ClientError):
                task_ids.append(await up.submit("generate_image", SMALL))
            return bool(task_ids)

        await eventually(takes_tasks)
        assert (await up.ended(task_ids[0]))["status"] == "completed"
        assert (await up.call("GET", f"/tasks/{kept}/status"))[1]["status"] == "completed"


async def test_every_state_change_is_one_line_with_its_ids_and_no_secret_is_logged(running: Service) -> None:
    task_id = await running.submit("generate_image", SMALL)
    await running.ended(task_id)
    await eventually(lambda: any(line["message"] == "complete" and line.get("task_id") == task_id for line in running.log))
    lines = [line for line in running.log if line.get("task_id") == task_id]
    messages = [line["message"] for line in lines]
    assert sorted(messages) == ["claim", "complete", "submit"]
    assert messages.index("claim") < messages.index("complete")  # another process writes "submit", after Redis has answered it
    assert all(line["project_id"] == "film" for line in lines)
    text = (running.folder / "log").read_text()
    assert running.key not in text
    assert "signature=" not in text
    assert SECRET not in text
