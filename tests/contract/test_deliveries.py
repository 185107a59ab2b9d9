"""A key that may read a task lists its deliveries; an admin key resends them. Deliveries of other projects do not exist."""

from __future__ import annotations

import msgspec
import pytest
from arq.connections import ArqRedis

from movieq.queue.outbox import Outbox
from movieq.queue.store import Store
from movieq.settings import Settings
from movieq.tasks.entities import DeliveryState
from movieq.tasks.states import TaskId
from tests.arrange import result, running
from tests.contract.client import ADMIN, ALL, FILM, READ, UNKNOWN, Client
from tests.contract.conftest import served

URL = "https://cms.example/hooks?token=hush"


async def delivered(store: Store, project: str = "film") -> TaskId:
    """Return a task whose delivery to the CMS has failed for good, and whose webhook is pending."""
    task_id, run = await running(store, project=project, callback_url=URL)
    await store.complete(task_id, run, result(), "https://cms.example/api/media")
    await Outbox(store.redis).delivered(f"{task_id}-1", DeliveryState.FAILED, 1, 400, "alt: This field is required.")
    return task_id


async def test_deliveries_are_listed_with_how_far_they_are_and_without_what_may_be_secret(api: Client, store: Store) -> None:
    task_id = await delivered(store)
    answer = await api.get(f"/api/v1/tasks/{task_id}/deliveries", key=READ)
    assert answer.status == 200
    cms, hook = answer.json["deliveries"]
    assert (cms["delivery_id"], cms["kind"], cms["state"], cms["tries"]) == (f"{task_id}-1", "payload", "failed", 1)
    assert (cms["last_status"], cms["last_problem"], cms["next_try_at"]) == (400, "alt: This field is required.", None)
    assert (hook["delivery_id"], hook["kind"], hook["type"], hook["state"]) == (f"{task_id}-2", "webhook", "task.completed", "pending")
    assert (hook["url"], hook["last_problem"]) == ("https://cms.example/hooks", None)
    assert hook["next_try_at"].endswith("Z")


async def test_a_task_that_tells_nobody_has_no_deliveries(api: Client, store: Store) -> None:
    task_id, _ = await running(store)
    assert (await api.get(f"/api/v1/tasks/{task_id}/deliveries", key=READ)).json == {"deliveries": []}


async def test_an_admin_sends_a_delivery_again(api: Client, store: Store) -> None:
    task_id = await delivered(store)
    answer = await api.post(f"/api/v1/tasks/{task_id}/deliveries/{task_id}-1/resend", key=ADMIN)
    assert (answer.status, answer.json["state"], answer.json["tries"]) == (200, "pending", 0)
    assert answer.json["next_try_at"] is not None


@pytest.mark.parametrize(("key", "status"), [(READ, 403), (FILM, 403), (ADMIN, 200), (ALL, 200)])
async def test_sending_again_takes_the_scope_admin(api: Client, store: Store, key: str, status: int) -> None:
    task_id = await delivered(store)
    assert (await api.post(f"/api/v1/tasks/{task_id}/deliveries/{task_id}-2/resend", key=key)).status == status


async def test_deliveries_of_another_project_and_of_no_task_do_not_exist(api: Client, store: Store) -> None:
    task_id = await delivered(store, "secret")
    for path in (f"/api/v1/tasks/{task_id}/deliveries", f"/api/v1/tasks/{UNKNOWN}/deliveries"):
        assert (await api.get(path, key=READ)).status == 404
        assert (await api.post(f"{path}/{task_id}-1/resend", key=ADMIN)).status == 404


async def test_the_cms_may_be_called_back_wherever_it_is_and_nothing_beside_it(settings: Settings, redis: ArqRedis) -> None:
    cms = msgspec.structs.replace(settings, payload_url="http://192.168.7.7:3000/api", payload_api_key="k", allow_private_urls=())
    async with served(cms) as api:
        assert (await api.submit(callback_url="http://192.168.7.7:3000/hooks/movieq")).status == 201
        for url in ("http://192.168.7.7:3001/hooks", "http://192.168.7.8:3000/hooks", "https://192.168.7.7/hooks"):
            answer = await api.submit(callback_url=url)
            assert (answer.status, "MOVIEQ_ALLOW_PRIVATE_URLS" in answer.message) == (400, True)


@pytest.mark.parametrize("name", ["{own}-3", "{other}-1", "none", "{own}-1.1", "{own}-%201"])
async def test_a_delivery_that_is_not_the_tasks_cannot_be_sent_again(api: Client, store: Store, name: str) -> None:
    own, other = await delivered(store), await delivered(store)
    answer = await api.post(f"/api/v1/tasks/{own}/deliveries/{name.format(own=own, other=other)}/resend", key=ADMIN)
    assert (answer.status, answer.error) == (404, "not_found")
    assert [delivery.state for _, delivery, _ in await Outbox(store.redis).deliveries(other)] == [
        DeliveryState.FAILED,
        DeliveryState.PENDING,
    ]
