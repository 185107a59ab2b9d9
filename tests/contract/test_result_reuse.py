"""A task with a seed is completed at once with the stored result of an identical task of its project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import movieq
from movieq.api import tasks as tasks_module
from movieq.models import choice
from movieq.models.table import Model
from movieq.queue.files import Files
from movieq.queue.keys import KEYS
from movieq.queue.outbox import Outbox
from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.tasks import params
from movieq.tasks.registry import REGISTRY
from movieq.tasks.results import StoredMedia, StoredResult
from movieq.tasks.states import GENERATE_IMAGE, GENERATE_VIDEO, Kind, TaskId, TaskStatus, TaskType
from tests.arrange import later, new_task, raw
from tests.contract.client import FILM, Client
from tests.contract.conftest import Tasks, served

DATA: dict[str, Any] = {"prompt": "a lamp", "seed": 7}
FILE = b"the bytes of a picture"


async def make(api: Client, tasks: Tasks, folder: Path, metadata: dict[str, Any] | None = None, **fields: Any) -> TaskId:
    """Submit a task and complete it as a worker does, with a file in the storage."""
    task_id = await tasks.queued(**{"task_data": DATA, **fields})
    await work(api, tasks, folder, task_id, metadata)
    return task_id


async def work(api: Client, tasks: Tasks, folder: Path, task_id: TaskId, metadata: dict[str, Any] | None = None) -> None:
    """Complete the task, which must be the next to run."""
    run = await tasks.claim()
    key = f"projects/film/image/{task_id}/{run}/output.jpg"
    (folder / "made").write_bytes(FILE)
    await api.state.storage.put(key, folder / "made", "image/jpeg")
    await tasks.store.report(task_id, run, 0.9, "uploading_result", prefix=key.rpartition("/")[0], gpu=(5000, 0))
    media = StoredMedia(key, "character_design", "image/jpeg", len(FILE))
    await tasks.store.complete(task_id, run, StoredResult([media], {"engine": "animatic", "seed": 7, **(metadata or {})}))


async def ask(api: Client, **fields: Any) -> Any:
    """Submit a task; return its status right afterwards."""
    answer = await api.submit(**{"task_data": DATA, **fields})
    assert (answer.status, answer.json["status"]) == (201, "queued"), answer
    return await api.status(answer.json["task_id"])


async def test_the_result_is_there_at_once_and_costs_nothing(api: Client, tasks: Tasks, folder: Path) -> None:
    first = await api.status(await make(api, tasks, folder))
    again = await ask(api)
    assert again["task_id"] != first["task_id"]
    assert (again["status"], again["progress"], again["current_step"], again["attempt"]) == ("completed", 1.0, "upload_complete", 1)
    assert again["result"]["metadata"] == {**first["result"]["metadata"], "cache": "hit"}
    assert again["result"]["media"] == first["result"]["media"]
    assert (await api.get(again["result"]["media_url"], key=None)).body == FILE
    assert (again["gpu_seconds"], again["processing_time"], again["started_at"]) == (0, 0, again["created_at"])


async def test_no_worker_and_no_queue_hears_of_it(api: Client, tasks: Tasks, folder: Path) -> None:
    await make(api, tasks, folder)
    receipt = (await api.submit(task_data=DATA)).json
    assert (receipt["queue_position"], receipt["estimated_duration"]) == (1, 0)
    assert await raw(tasks.store).zcard(KEYS["waiting"] + Kind.CPU_INTENSIVE) == 0
    assert await raw(tasks.store).zcard(KEYS["virtual_times"] + Kind.CPU_INTENSIVE) == 0
    assert await raw(tasks.store).zscore(KEYS["deadlines"], receipt["task_id"]) is None
    assert (await Queries(tasks.store.redis).totals(None))[TaskStatus.COMPLETED] == 2
    page = (await api.get("/api/v1/projects/film/tasks?status=completed")).json
    assert page["tasks"][0]["task_id"] == receipt["task_id"]


async def test_its_stream_its_project_and_its_webhook_tell_it_like_any_other(api: Client, tasks: Tasks, folder: Path) -> None:
    await make(api, tasks, folder)
    async with api.events("projects/film") as project:
        await project.until("snapshot")
        status = await ask(api, callback_url="https://cms.example/hook", metadata={"scene_id": "12"})
        assert [event.type for event in await project.until("completed")] == ["queued", "started", "completed"]
    async with api.events(status["task_id"]) as stream:
        events = await stream.rest()
    assert [(event.type, event.data["status"]) for event in events] == [
        ("snapshot", "completed"), ("started", "processing"), ("completed", "completed"),
    ]  # fmt: skip
    assert events[-1].data["result"]["metadata"]["cache"] == "hit"
    ((_, delivery, _),) = await Outbox(tasks.store.redis).deliveries(status["task_id"])
    assert delivery.result is not None
    assert (delivery.status, delivery.metadata, delivery.result.metadata["cache"]) == (TaskStatus.COMPLETED, {"scene_id": "12"}, "hit")


@pytest.mark.parametrize(
    "fields",
    [
        {"task_data": {"seed": 7, "prompt": "a lamp", "negative_prompt": None}},
        {"task_data": {**DATA, "resolution": "1024x1024", "draft": False}},
        {"task_data": {**DATA, "preview": True}},
        {"task_data": {**DATA, "no_cache": False}},
        {"priority": 1, "metadata": {"scene_id": "13"}},
    ],
)
async def test_what_says_the_same_is_the_same(api: Client, tasks: Tasks, folder: Path, fields: dict[str, Any]) -> None:
    await make(api, tasks, folder)
    assert (await ask(api, **fields))["status"] == "completed"


@pytest.mark.parametrize(
    "fields",
    [
        {"task_data": {**DATA, "seed": 8}},
        {"task_data": {**DATA, "prompt": "a lamp."}},
        {"task_data": {**DATA, "format": "png"}},
        {"task_data": {**DATA, "weather": "storm"}},
        {"task_data": {**DATA, "no_cache": True}},
        {"task_data": {**DATA, "takes": 2}},
        {"task_type": "render_animation"},
        {"project_id": "other"},
    ],
)
async def test_what_says_something_else_is_made(api: Client, tasks: Tasks, folder: Path, fields: dict[str, Any]) -> None:
    await make(api, tasks, folder)
    assert (await ask(api, **fields))["status"] == "queued"


async def test_all_takes_must_still_be_stored(api: Client, tasks: Tasks, folder: Path) -> None:
    data = {**DATA, "takes": 2}
    task_id = await tasks.queued(task_data=data)
    run = await tasks.claim()
    prefix = f"projects/film/image/{task_id}/{run}"
    keys = [f"{prefix}/output.jpg", f"{prefix}/output-2.jpg"]
    (folder / "made").write_bytes(FILE)
    for key in keys:
        await api.state.storage.put(key, folder / "made", "image/jpeg")
    await tasks.store.report(task_id, run, 0.9, "uploading_result", prefix=prefix)
    media = [StoredMedia(key, "character_design", "image/jpeg", len(FILE), take=take, seed=6 + take) for take, key in enumerate(keys, 1)]
    await tasks.store.complete(task_id, run, StoredResult(media, {"engine": "animatic", "seed": 7}))
    again = await ask(api, task_data=data)
    assert again["status"] == "completed"
    assert [(each["take"], each["seed"]) for each in again["result"]["media"]] == [(1, 7), (2, 8)]
    await api.state.storage.delete(keys[1])
    assert (await ask(api, task_data=data))["status"] == "queued"


@pytest.mark.parametrize("data", [{"prompt": "a lamp"}, {**DATA, "reference_images": ["https://cdn.example/a.png"]}])
async def test_what_need_not_come_out_the_same_is_made_again(api: Client, tasks: Tasks, folder: Path, data: dict[str, Any]) -> None:
    await make(api, tasks, folder, task_data=data)
    assert (await ask(api, task_data=data))["status"] == "queued"


@pytest.mark.parametrize("reference", ["upload:abc", "task:123e4567-e89b-12d3-a456-426614174000", "data:image/png;base64,AAAA"])
async def test_references_that_never_change_are_no_hindrance(api: Client, tasks: Tasks, folder: Path, reference: str) -> None:
    data = {**DATA, "reference_images": [reference]}
    await make(api, tasks, folder, task_data=data)
    assert (await ask(api, task_data=data))["status"] == "completed"


async def test_what_was_made_with_no_cache_takes_the_place_of_what_was_there(api: Client, tasks: Tasks, folder: Path) -> None:
    await make(api, tasks, folder)
    anew = await make(api, tasks, folder, task_data={**DATA, "no_cache": True})
    assert f"/{anew}/" in (await ask(api))["result"]["media_url"]


async def test_two_in_flight_both_run_and_the_later_one_is_given_on(api: Client, tasks: Tasks, folder: Path) -> None:
    both = [await tasks.queued(task_data=DATA) for _ in range(2)]
    for task_id in both:
        await work(api, tasks, folder, task_id)
    assert f"/{both[1]}/" in (await ask(api))["result"]["media_url"]


@pytest.mark.parametrize("gone", ["deleted", "of another size", "storage too slow"])
async def test_a_file_that_is_not_as_it_was_is_made_again(
    api: Client, tasks: Tasks, folder: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make(api, tasks, folder)
    (path,) = (folder / "media").rglob("output.jpg")
    if gone == "deleted":
        path.unlink()
    elif gone == "of another size":
        path.write_bytes(b"less")
    else:
        monkeypatch.setattr(tasks_module, "STORED_S", 0)
    assert (await ask(api))["status"] == "queued"


async def test_a_full_project_is_given_what_is_there(settings: Settings, store: Store, folder: Path) -> None:
    async with served(msgspec.structs.replace(settings, max_queued_per_project=1, max_queued=1)) as api:
        await make(api, Tasks(api, store), folder)
        assert (await api.submit()).status == 201
        assert (await api.submit()).status == 429
        assert (await ask(api))["status"] == "completed"


async def test_where_everything_must_be_signed_an_unsigned_result_is_made_again(settings: Settings, store: Store, folder: Path) -> None:
    async with served(msgspec.structs.replace(settings, c2pa_required=True)) as api:
        await make(api, Tasks(api, store), folder)
        unsigned = await ask(api)
        assert unsigned["status"] == "queued"
        await store.cancel(unsigned["task_id"])
        await make(api, Tasks(api, store), folder, {"signed_by": "Lighthouse Pictures"})
        assert (await ask(api))["status"] == "completed"


async def test_a_result_with_tags_is_not_given_where_tags_are_off(settings: Settings, store: Store, folder: Path) -> None:
    async with served(settings) as api:
        await make(api, Tasks(api, store), folder)
    async with served(msgspec.structs.replace(settings, file_tags=False)) as api:
        assert (await ask(api))["status"] == "queued"


async def test_the_same_idempotency_key_gives_the_same_receipt_of_it(api: Client, tasks: Tasks, folder: Path) -> None:
    await make(api, tasks, folder)
    answers = [await api.submit(task_data=DATA, headers={"Idempotency-Key": "take-1"}) for _ in range(2)]
    assert answers[0].body == answers[1].body
    assert (await Queries(tasks.store.redis).totals(None))[TaskStatus.COMPLETED] == 2


async def test_a_key_of_the_project_is_enough(api: Client, tasks: Tasks, folder: Path) -> None:
    await make(api, tasks, folder)
    task_id = (await api.submit(key=FILM, task_data=DATA)).json["task_id"]
    assert (await api.status(task_id))["status"] == "completed"


# ── What is swept ──


async def test_the_file_outlives_the_task_that_made_it(api: Client, tasks: Tasks, folder: Path) -> None:
    first = await make(api, tasks, folder)
    again = await ask(api)
    await raw(tasks.store).zadd(KEYS["ended"], {first: 1})
    assert await tasks.store.sweep(3600) == (1, [])
    assert await Queries(tasks.store.redis).task(first) is None
    assert (await api.get(again["result"]["media_url"], key=None)).body == FILE
    assert (await ask(api))["status"] == "completed", "the younger one is found in its place"


async def test_when_the_last_is_swept_nothing_remembers_it(api: Client, tasks: Tasks, folder: Path) -> None:
    await make(api, tasks, folder)
    await ask(api)
    await later(tasks.store)
    await tasks.store.sweep(0)
    assert not await raw(tasks.store).keys(KEYS["reusable"] + "*")


async def test_files_are_swept_by_the_age_of_the_last_task_that_has_them(api: Client, tasks: Tasks, folder: Path) -> None:
    await make(api, tasks, folder)
    (prefix,) = await raw(tasks.store).zrange(KEYS["media"], 0, -1)
    await raw(tasks.store).zadd(KEYS["media"], {prefix: 1})
    await ask(api)
    assert await tasks.store.retire(3600) == 0
    await raw(tasks.store).zadd(KEYS["media"], {prefix: 1})
    assert await tasks.store.retire(3600) == 1
    assert await Files(tasks.store.redis).due_orphans() == [prefix.decode()]
    assert (await ask(api))["status"] == "queued", "files that are being deleted are given to nobody"


@pytest.mark.parametrize(("hours", "status"), [(22, "completed"), (23.5, "queued"), (25, "queued")])
async def test_files_that_are_about_to_be_swept_are_given_to_nobody(
    settings: Settings, store: Store, folder: Path, hours: float, status: str
) -> None:
    async with served(msgspec.structs.replace(settings, keep_media_days=1)) as api:
        await make(api, Tasks(api, store), folder)
        (prefix,) = await raw(store).zrange(KEYS["media"], 0, -1)
        seconds, _ = await raw(store).time()
        await raw(store).zadd(KEYS["media"], {prefix: (seconds - hours * 3600) * 1000})
        assert (await ask(api))["status"] == status


@pytest.mark.parametrize("gone", ["task", "files", "project"])
async def test_the_script_looks_once_more_itself(api: Client, tasks: Tasks, folder: Path, gone: str) -> None:
    first = await make(api, tasks, folder)
    (prefix,) = await raw(tasks.store).zrange(KEYS["media"], 0, -1)
    if gone == "task":
        await raw(tasks.store).delete(KEYS["task"] + first)
    elif gone == "files":
        await tasks.store.retire(0)
    new = new_task(
        "other" if gone == "project" else "film", fingerprint="f", reused=first, reused_result=b"{}", reused_prefix=prefix.decode()
    )
    await tasks.store.submit(new)
    task = await Queries(tasks.store.redis).task(new.task_id)
    assert task is not None
    assert task.status is TaskStatus.QUEUED


# ── The fingerprint ──

REVISION = "0123456789abcdef0123456789abcdef01234567"


def model(**changes: Any) -> Model:
    fields = {
        "engine": "diffusers", "kind": "gpu_heavy", "tasks": {"generate_image": 1.0, "generate_video": 1.0},
        "weights": {"repository": "team/model", "revision": REVISION}, "pipeline": "FluxPipeline",
    }  # fmt: skip
    return msgspec.convert({**fields, **changes}, Model)


def named(entry: Model, task_type: TaskType = GENERATE_IMAGE, sound: Model | None = None, **data: Any) -> str | None:
    """Return the fingerprint of a task with this model, in a table with this model and the model for sound."""
    task_data = {**DATA, **data}
    table = {"model": entry, **({"noise": sound} if sound else {})}
    return choice.fingerprint("film", table, "model", task_type, params.convert(REGISTRY.tasks[task_type].params, task_data), task_data)


def test_only_the_loras_that_a_task_names_count() -> None:
    def lora(sha256: str) -> dict[str, Any]:
        return {"bases": ["model"], "weights": {"repository": "/srv", "file": "a.safetensors", "sha256": sha256}}

    keeper, other = lora("0" * 64), lora("1" * 64)
    one, both = model(loras={"keeper": keeper}), model(loras={"keeper": keeper, "other": other})
    assert named(model()) == named(one) == named(both)
    asked: dict[str, Any] = {"loras": [{"name": "keeper"}]}
    assert named(one, **asked) == named(both, **asked)
    assert len({named(one), named(one, **asked), named(model(loras={"keeper": other}), **asked)}) == 3
    assert named(one, **asked) == named(one, loras=[{"name": "keeper", "weight": None}])


def test_another_revision_or_entry_or_version_makes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {named(model()), named(model()), named(model(weights={"repository": "team/model", "revision": "f" * 40}))}
    found |= {named(model(scheduler={"shift": 3})), named(model(defaults={"steps": 8}))}
    monkeypatch.setattr(movieq, "__version__", "9.9.9")
    found.add(named(model()))
    assert None not in found
    assert len(found) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "candle"},
        {"weights": {"repository": "/models/ours"}},
        {"components": {"vae": {"repository": "/models/vae", "cls": "AutoencoderKL"}}},
    ],
)
def test_what_a_plug_in_or_weights_without_a_revision_make_need_not_be_the_same(changes: dict[str, Any]) -> None:
    assert named(model(**changes)) is None


def test_sound_under_a_picture_counts_where_there_is_some() -> None:
    noise, other = (
        model(tasks={"process_audio": 1.0}, weights={"repository": "team/noise", "revision": revision}) for revision in ("a" * 40, "b" * 40)
    )
    assert named(model(), GENERATE_VIDEO, noise) == named(model(), GENERATE_VIDEO, other)
    heard = [named(model(), GENERATE_VIDEO, sound, audio_cues=["sea"]) for sound in (noise, other)]
    assert heard[0] != heard[1]
