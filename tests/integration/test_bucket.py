"""The whole service with a bucket: result URLs that work, references, and a storage that fails when it is needed."""

from __future__ import annotations

import asyncio
import io
import shutil
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from movieq.checks import Finding
from movieq.local.doctor import examine
from movieq.queue.queries import Queries
from movieq.settings import Bucket, load
from movieq.tasks.states import TaskId
from tests.fleet import Fleet, Process, eventually
from tests.r2 import R2, put, r2
from tests.service import Service, fetched, service
from workers.finished import PREFIX

SMALL = {"prompt": "a lamp", "resolution": "64x64"}


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


async def test_results_open_as_they_stand_and_can_be_referred_to_like_uploads(installation: Fleet, s3_settings: dict[str, Any]) -> None:
    api, _ = await asyncio.gather(installation.api(**s3_settings), installation.worker(**s3_settings))
    assert (await api.call("GET", "/health"))[1]["status"] == "healthy"
    upload = await api.upload(png())
    first = await api.submit("generate_image", {**SMALL, "reference_images": [upload]})
    (media,) = (await api.ended(first))["result"]["media"]
    status, headers, body = await fetched(media["url"])
    assert (status, headers["Content-Type"], len(body)) == (200, "image/jpeg", media["file_size"])
    second = await api.submit(
        "generate_video", {"prompt": "x", "storyboard_images": [f"task:{first}", upload], "duration": 1, "fps": 8, "resolution": "128x64"}
    )
    result = (await api.ended(second))["result"]
    assert [(await fetched(url))[1]["Content-Type"] for url in (result["media_url"], result["media"][0]["poster_url"])] == [
        "video/mp4",
        "image/jpeg",
    ]
    assert (await fetched(f"{api.url}/media/{media['url'].partition('?')[0].partition('/film/')[2]}"))[0] == 404
    assert not (installation.folder / "media").exists()


def test_up_stores_where_its_env_file_says(folder: Path, s3_settings: dict[str, Any]) -> None:
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in s3_settings.items()))

    async def media_url(up: Service) -> str:
        return str((await up.ended(await up.submit("generate_image", SMALL)))["result"]["media_url"])

    with service(folder) as up:
        assert s3_settings["MOVIEQ_R2_ENDPOINT"] in asyncio.run(media_url(up))


# ── While it is down ──


@pytest.fixture
async def far(bucket: Bucket) -> Any:
    """Yield the S3 server as R2."""
    async with r2(bucket.endpoint) as between:
        yield between


async def cannot_store(installation: Fleet, far: R2, settings: dict[str, Any]) -> tuple[Service, Process, TaskId, bytes]:
    """Return an API, a worker, and a task whose file is rendered but cannot be stored."""
    far.answer(503, "SlowDown", put, times=10_000)
    api, worker = await asyncio.gather(installation.api(**settings), installation.worker(**settings))
    task_id = TaskId(await api.submit("generate_image", SMALL))
    await asyncio.wait_for(far.happened.wait(), 60)
    (file,) = (path for path in (installation.folder / "spool").glob(f"{PREFIX}{task_id}.*/*") if path.suffix == ".jpg")
    return api, worker, task_id, file.read_bytes()


def settings_of(far: R2, s3_settings: dict[str, Any]) -> dict[str, Any]:
    return {**s3_settings, "MOVIEQ_R2_ENDPOINT": far.endpoint, "MOVIEQ_DRAIN_S": "0"}


async def test_a_worker_that_is_killed_while_the_storage_is_down_costs_no_second_rendering(
    installation: Fleet, far: R2, s3_settings: dict[str, Any]
) -> None:
    settings = settings_of(far, s3_settings)
    api, worker, task_id, rendered = await cannot_store(installation, far, settings)
    worker.send(signal.SIGKILL)
    await worker.ended()
    after = await installation.worker(**settings)
    far.heal()
    status = await api.ended(task_id)
    assert (status["status"], status["attempt"]) == ("completed", 2)
    assert (await fetched(status["result"]["media_url"]))[2] == rendered
    events = [msgspec.json.decode(each.data) for each in await Queries(installation.store.redis).log_after(task_id, None)]
    assert {event["stage"] for event in events if event["attempt"] == 2} <= {None, "upload"}
    assert '"child":null' in after.log.read_text()
    # the next task is made as ever
    assert (await api.ended(await api.submit("generate_image", SMALL)))["status"] == "completed"


async def test_the_engine_goes_on_while_the_storage_is_down_and_everything_is_stored_when_it_is_back(
    installation: Fleet, far: R2, s3_settings: dict[str, Any]
) -> None:
    settings = settings_of(far, s3_settings)
    api, worker, first, _ = await cannot_store(installation, far, settings)
    others = [TaskId(await api.submit("generate_image", SMALL)) for _ in range(3)]
    await eventually(lambda: len(list((installation.folder / "spool").glob(f"{PREFIX}*"))) == 4)
    assert (await api.call("POST", "/projects/film/uploads", data=png()))[0] == 503
    far.heal()
    ended = [await api.ended(task_id) for task_id in (first, *others)]
    assert [(each["status"], each["attempt"]) for each in ended] == [("completed", 1)] * 4
    worker.send(signal.SIGTERM)
    assert await worker.ended() == 0
    assert list((installation.folder / "spool").iterdir()) == []


async def test_a_file_that_somebody_deleted_is_made_again(installation: Fleet, far: R2, s3_settings: dict[str, Any]) -> None:
    api, _, task_id, _ = await cannot_store(installation, far, settings_of(far, s3_settings))
    for path in (installation.folder / "spool").glob(f"{PREFIX}*"):
        shutil.rmtree(path)
    status = await api.until(task_id, "event", "retrying")
    assert "gone" in status["error"]
    far.heal()
    assert (await api.ended(task_id))["status"] == "completed"


async def test_a_wrong_secret_holds_the_file_until_it_is_mended(installation: Fleet, far: R2, s3_settings: dict[str, Any]) -> None:
    wrong = {**settings_of(far, s3_settings), "MOVIEQ_R2_SECRET_ACCESS_KEY": "not-the-secret"}
    right = settings_of(far, s3_settings)
    api, worker = await asyncio.gather(installation.api(**right), installation.worker(**wrong))
    task_id = await api.submit("generate_image", SMALL)
    await eventually(lambda: worker.times_logged("upload_failed") > 0)
    told = worker.log.read_text()
    assert "check MOVIEQ_R2_ACCESS_KEY_ID and MOVIEQ_R2_SECRET_ACCESS_KEY" in told
    assert "not-the-secret" not in told
    worker.send(signal.SIGTERM)
    await worker.ended()
    after = await installation.worker(**right)
    assert (await api.ended(task_id))["status"] == "completed"
    assert '"child":null' in after.log.read_text()


# ── doctor ──


@pytest.mark.parametrize(
    ("changed", "mark", "said"),
    [
        ({}, "✓", "stored, read, opened by its URL and deleted"),
        ({"MOVIEQ_R2_SECRET_ACCESS_KEY": "not-the-secret"}, "✗", "check MOVIEQ_R2_ACCESS_KEY_ID"),
        ({"MOVIEQ_STORAGE": "s3://nowhere"}, "✗", "create it, or correct MOVIEQ_STORAGE"),
        ({"MOVIEQ_R2_PUBLIC_URL": "http://127.0.0.1:1"}, "✗", "correct MOVIEQ_R2_PUBLIC_URL"),
        ({"MOVIEQ_R2_ENDPOINT": ""}, "✗", "needs MOVIEQ_R2_ENDPOINT"),
    ],
    ids=["good", "secret", "bucket", "public url", "endpoint"],
)
async def test_doctor_tries_the_bucket_and_names_the_cure(
    folder: Path, s3_settings: dict[str, Any], changed: dict[str, str], mark: str, said: str
) -> None:
    found: list[Finding] = []
    given = {**s3_settings, **changed}
    whole = await examine(lambda: load(given, folder / "none"), folder, "http://127.0.0.1:1", found.append)
    (finding,) = [each for each in found if each.subject == ("settings" if "needs" in said else "storage")]
    assert (finding.mark, whole) == (mark, mark == "✓")
    assert said in finding.text
    assert "not-the-secret" not in finding.text
