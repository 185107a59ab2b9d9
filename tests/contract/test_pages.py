"""The pages of a project's tasks: newest first, filtered, limited; and the project itself."""

from __future__ import annotations

import pytest

from movieq.queue.store import Store
from movieq.tasks.states import STATES, TaskStatus
from tests.arrange import new_task
from tests.contract.client import FILM, Answer, Client
from tests.contract.conftest import Tasks

PAGE = "/api/v1/projects/film/tasks"


def ids(answer: Answer) -> list[str]:
    assert answer.status == 200, answer
    return [row["task_id"] for row in answer.json["tasks"]]


async def test_an_empty_project_has_an_empty_page(api: Client) -> None:
    answer = await api.get(PAGE)
    assert (answer.status, answer.json) == (200, {"tasks": [], "pagination": {"page": 1, "limit": 20, "total": 0, "total_pages": 0}})


@pytest.mark.parametrize("state", STATES)
async def test_a_row_has_every_key(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    task_id = await tasks.in_state(state)
    (row,) = (await api.get(PAGE)).json["tasks"]
    status = await api.status(task_id)
    same = {name: status[name] for name in ("task_id", "task_type", "status", "created_at", "completed_at", "progress")}
    assert row == {**same, "result_url": status["result"] and status["result"]["media_url"]}


async def test_the_newest_is_first_and_the_default_limit_is_twenty(api: Client, store: Store) -> None:
    newest_first = [(await store.submit(new_task())).task_id for _ in range(25)][::-1]
    assert ids(await api.get(PAGE)) == newest_first[:20]
    assert ids(await api.get(PAGE + "?page=2")) == newest_first[20:]


async def test_pages_together_are_the_whole_and_nothing_twice(api: Client, store: Store) -> None:
    submitted = {(await store.submit(new_task())).task_id for _ in range(23)}
    pages = [await api.get(f"{PAGE}?limit=5&page={page}") for page in range(1, 6)]
    found = [task_id for page in pages for task_id in ids(page)]
    assert (set(found), len(found)) == (submitted, 23)
    assert {tuple(page.json["pagination"].values())[1:] for page in pages} == {(5, 23, 5)}


async def test_a_page_beyond_the_last_is_empty(api: Client, store: Store) -> None:
    await store.submit(new_task())
    answer = await api.get(PAGE + "?page=1000000")
    assert (ids(answer), answer.json["pagination"]["total"]) == ([], 1)


@pytest.mark.parametrize("state", STATES)
async def test_a_status_filters(api: Client, tasks: Tasks, state: TaskStatus) -> None:
    in_state = {each: await tasks.in_state(each) for each in (*set(STATES) - {TaskStatus.QUEUED}, TaskStatus.QUEUED)}
    assert ids(await api.get(f"{PAGE}?status={state}")) == [in_state[state]]


async def test_a_status_and_a_type_filter_together(api: Client, tasks: Tasks) -> None:
    video, _ = await tasks.queued(task_type="generate_video"), await tasks.queued()
    answer = await api.get(f"{PAGE}?status=queued&task_type=generate_video")
    assert (ids(answer), answer.json["pagination"]["total"]) == ([video], 1)


async def test_a_page_holds_its_own_project_only(api: Client, tasks: Tasks) -> None:
    await tasks.queued(project_id="other")
    task_id = await tasks.queued()
    assert ids(await api.get(PAGE, key=FILM)) == [task_id]


@pytest.mark.parametrize("name", ["page", "limit"])
@pytest.mark.parametrize(
    "value", ["0", "-1", "abc", "1.5", "1e1", "+1", "%201", "1%20", "%D9%A1", "", "0x1", "1_0", "9" * 5000, "1%00", "%C2%B2"]
)
async def test_a_number_that_is_none_is_refused_by_name(api: Client, name: str, value: str) -> None:
    answer = await api.get(f"{PAGE}?{name}={value}")
    assert (answer.status, answer.error) == (400, "validation_failed")
    assert answer.message.startswith(name)


@pytest.mark.parametrize(
    "query",
    [
        *(
            "limit=101",
            f"page={10**18}",
            "page=1000001",
            "status=done",
            "status=",
            "status=QUEUED",
            "task_type=evaluate_department",
            "task_type=",
        ),
        *(
            "page=1&page=1",
            "page=1&page=2",
            "status=queued&status=failed",
            "offset=5",
            "pages=1",
            "=",
            "x",
            f"{'x' * 5000}=1",
            "%00=1",
            "%ff=1",
        ),
    ],
)
async def test_another_query_is_refused(api: Client, query: str) -> None:
    answer = await api.get(f"{PAGE}?{query}")
    assert (answer.status, answer.error) == (400, "validation_failed")


async def test_a_refused_filter_names_what_is_allowed(api: Client) -> None:
    assert [state for state in STATES if state not in (await api.get(PAGE + "?status=done")).message] == []


async def test_a_project_counts_its_tasks_by_state(api: Client, tasks: Tasks) -> None:
    for state in (*set(STATES) - {TaskStatus.QUEUED}, TaskStatus.QUEUED):
        await tasks.in_state(state)
    project = (await api.get("/api/v1/projects/film", key=FILM)).json
    assert project["project_id"] == "film"
    assert project["tasks"] == dict.fromkeys(STATES, 1)


async def test_a_project_without_tasks_is_unknown(api: Client) -> None:
    assert (await api.get("/api/v1/projects/film")).status == 404
