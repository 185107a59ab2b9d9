"""What each key may do, and in which order that is checked. What a key may not see does not exist for it."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from movieq.queue.keys import KEYS
from movieq.queue.store import Store
from movieq.settings import Grant, Scope, Settings
from tests.arrange import raw
from tests.contract.client import ADMIN, ALL, FILM, READ, SUBMIT, UNKNOWN, Client
from tests.contract.conftest import Tasks, served

PNG = b"\x89PNG\r\n\x1a\n"
TASK = "/api/v1/tasks/{task_id}"
READS = [
    ("GET", TASK + "/status"),
    ("GET", TASK + "/events?after=1-1"),
    ("GET", "/api/v1/projects/{project}"),
    ("GET", "/api/v1/projects/{project}/tasks"),
    ("GET", "/api/v1/workers/status"),
    ("GET", "/api/v1/task-types"),
]
WRITES = [
    ("POST", "/api/v1/tasks/submit"),
    ("DELETE", TASK + "/cancel"),
    ("POST", TASK + "/cancel"),
    ("DELETE", TASK),
    ("POST", TASK + "/retry"),
    ("POST", "/api/v1/projects/{project}/uploads"),
]
OF_A_TASK = [(method, path) for method, path in READS + WRITES if "{task_id}" in path]


def at(path: str, task_id: str = UNKNOWN, project: str = "film") -> str:
    return path.replace("{task_id}", task_id).replace("{project}", project)


@pytest.mark.parametrize(("method", "path"), READS + WRITES)
@pytest.mark.parametrize("key", [None, "", "wrong", ALL + "x", ALL[:-1], ALL.upper(), "ключ", "\xff\xfe", "x" * 10_000])
async def test_without_a_known_key_everything_is_a_401(api: Client, method: str, path: str, key: str | None) -> None:
    answer = await api.ask(method, at(path), key=key)
    assert (answer.status, answer.error) == (401, "unauthorized")


@pytest.mark.parametrize(("method", "path"), READS)
async def test_reading_takes_the_scope_read(api: Client, method: str, path: str) -> None:
    answers = [await api.ask(method, at(path), key=key) for key in (SUBMIT, ADMIN)]
    assert [(answer.status, answer.error) for answer in answers] == [(403, "forbidden")] * 2


@pytest.mark.parametrize(("method", "path"), WRITES)
async def test_writing_takes_the_scope_submit(api: Client, method: str, path: str) -> None:
    answers = [await api.ask(method, at(path), key=key) for key in (READ, ADMIN)]
    assert [(answer.status, answer.error) for answer in answers] == [(403, "forbidden")] * 2
    assert Scope.SUBMIT in answers[0].message


@pytest.mark.parametrize(("method", "path"), OF_A_TASK)
async def test_a_task_of_another_project_is_answered_as_one_that_never_was(api: Client, tasks: Tasks, method: str, path: str) -> None:
    foreign = await tasks.queued(project_id="other")
    answers = [await api.ask(method, at(path, task_id), key=FILM) for task_id in (foreign, UNKNOWN)]
    assert [(answer.status, answer.error) for answer in answers] == [(404, "not_found")] * 2
    assert answers[0].message.replace(foreign, UNKNOWN) == answers[1].message


@pytest.mark.parametrize("path", ["/api/v1/projects/other", "/api/v1/projects/other/tasks"])
async def test_a_project_outside_the_key_is_answered_as_one_that_never_was(api: Client, tasks: Tasks, path: str) -> None:
    await tasks.queued(project_id="other")
    foreign, unknown = await api.get(path, key=FILM), await api.get(path.replace("other", "never"), key=FILM)
    assert (foreign.status, foreign.error, foreign.message.replace("other", "never")) == (404, "not_found", unknown.message)


async def test_submitting_to_a_project_outside_the_key_is_forbidden(api: Client) -> None:
    answer = await api.submit(key=FILM, project_id="other")
    assert (answer.status, answer.error) == (403, "forbidden")
    assert "other" in answer.message


async def test_uploading_to_a_project_outside_the_key_is_forbidden(api: Client) -> None:
    answer = await api.post("/api/v1/projects/other/uploads", key=FILM, data=PNG)
    assert (answer.status, answer.error) == (403, "forbidden")


async def test_a_key_may_do_in_its_project_what_its_scopes_say(api: Client) -> None:
    task_id = (await api.submit(key=FILM)).json["task_id"]
    asked = [("GET", TASK + "/status", READ), ("GET", TASK + "/status", FILM), ("DELETE", TASK + "/cancel", SUBMIT)]
    assert [(await api.ask(method, at(path, task_id), key=key)).status for method, path, key in asked] == [200, 200, 200]


async def test_tasks_of_a_key_for_all_projects_are_one_flow_which_no_answer_shows(api: Client, store: Store) -> None:
    hashed = hashlib.sha256(ALL.encode()).hexdigest()
    ids = {key: (await api.submit(key=key)).json["task_id"] for key in (ALL, FILM)}
    flows = {key: await raw(store).hget(KEYS["task"] + task_id, "flow") for key, task_id in ids.items()}
    assert flows == {ALL: hashed[:16].encode(), FILM: None}
    paths = ["/queues", "/workers/status", "/tasks/metrics", "/tasks/health", "/projects/film", "/projects/film/tasks"]
    paths += [f"/tasks/{task_id}/status" for task_id in ids.values()]
    answers = [await api.get(f"/api/v1{path}") for path in paths]
    assert {answer.status for answer in answers} == {200}
    without_urls = [answer.body.replace(f"key={hashed}&".encode(), b"") for answer in answers]  # an `events_url` names the key's hash
    assert [body for body in without_urls if hashed[:16].encode() in body] == []
    assert [(await api.status(task_id))["queue_position"] for task_id in ids.values()] == [1, 1]


@pytest.mark.parametrize("value", ["Bearer {}", "bearer {}", "BEARER   {}"])
async def test_the_key_may_come_as_a_bearer(api: Client, value: str) -> None:
    assert (await api.get("/api/v1/workers/status", key=None, headers={"Authorization": value.format(ALL)})).status == 200


@pytest.mark.parametrize("value", ["Basic {}", "{}", "Bearer", "Bearer wrong", "Token {}"])
async def test_another_authorization_is_a_401(api: Client, value: str) -> None:
    assert (await api.get("/api/v1/workers/status", key=None, headers={"Authorization": value.format(ALL)})).status == 401


async def test_an_empty_key_is_none_and_two_keys_are_refused(api: Client) -> None:
    head = b"GET /api/v1/workers/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    for headers, status in (
        (f"X-API-Key:\r\nAuthorization: Bearer {ALL}\r\n", b"200"),
        (f"X-API-Key: {ALL}\r\nX-API-Key: {FILM}\r\n", b"401"),
        (f"X-API-Key: {ALL}\r\nX-API-Key: {ALL}\r\n", b"200"),
    ):
        assert (await api.raw(head + headers.encode() + b"\r\n")).split()[1] == status, headers


async def test_no_cache_stores_an_answer_with_signed_urls(api: Client) -> None:
    for answer in (await api.submit(), await api.get("/api/v1/workers/status"), await api.get("/api/v1/tasks/none/status")):
        assert (answer.headers["Cache-Control"], answer.headers["X-Content-Type-Options"]) == ("no-store", "nosniff")


async def test_a_key_in_the_query_is_no_key(api: Client) -> None:
    assert (await api.get(f"/api/v1/workers/status?api_key={UNKNOWN}", key=None)).status == 401


async def test_a_key_of_redis_is_good(api: Client, store: Store) -> None:
    grant = msgspec.msgpack.encode(Grant(frozenset({"film"}), frozenset({Scope.READ})))
    await raw(store).hset(KEYS["keys"], hashlib.sha256(b"a-key-that-was-made-later").hexdigest(), grant)
    answers = [await api.get(at(path), key="a-key-that-was-made-later") for path in ("/api/v1/workers/status", "/api/v1/projects/b/tasks")]
    assert [answer.status for answer in answers] == [200, 404]


# ── The order: route, method, key, scope, project, body ──


@pytest.mark.parametrize(
    "path", ["/x", "/api", "/api/v1", "/api/v1/tasks", "/api/v1/tasks/submit/", "/api/v2/health", "/health/", "//health"]
)
@pytest.mark.parametrize("key", [None, ALL, "wrong"])
async def test_an_unknown_route_is_a_404_with_or_without_a_key(api: Client, path: str, key: str | None) -> None:
    answer = await api.get(path, key=key)
    assert (answer.status, answer.error) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/api/v1/tasks/submit", {"POST"}),
        ("PUT", "/api/v1/tasks/submit", {"POST"}),
        ("DELETE", "/api/v1/tasks/submit", {"POST"}),
        ("DELETE", "/api/v1/tasks/metrics", {"GET", "HEAD"}),
        ("DELETE", "/api/v1/tasks/health", {"GET", "HEAD"}),
        ("POST", TASK + "/status", {"GET", "HEAD"}),
        ("GET", TASK + "/cancel", {"DELETE", "POST"}),
        ("DELETE", TASK + "/retry", {"POST"}),
        ("GET", TASK, {"DELETE"}),
        ("POST", TASK + "/events", {"GET", "HEAD"}),
        ("POST", "/api/v1/projects/film/tasks", {"GET", "HEAD"}),
        ("GET", "/api/v1/projects/film/uploads", {"POST"}),
        ("POST", "/api/v1/workers/status", {"GET", "HEAD"}),
        ("DELETE", "/health", {"GET", "HEAD"}),
        ("OPTIONS", "/api/v1/tasks/submit", {"POST"}),
        ("POST", "/media/x", {"GET", "HEAD", "OPTIONS"}),
    ],
)
async def test_the_method_is_checked_before_the_key(api: Client, method: str, path: str, allowed: set[str]) -> None:
    answer = await api.ask(method, at(path), key=None)
    assert (answer.status, answer.error) == (405, "method_not_allowed")
    assert set(answer.headers["Allow"].split(", ")) == allowed
    assert method in answer.message


@pytest.mark.parametrize(
    ("key", "body", "status"),
    [
        ("wrong", b"{", 401),
        (READ, b"{", 403),
        (FILM, b'{"project_id": "other", "task_type": "x", "task_data": {}}', 403),
        (FILM, b'{"project_id": "other", "priority": 9, "colour": 1}', 403),
        (FILM, b'{"project_id": "other", "task_type": "x", "task_data": {"a": 1e999}}', 403),
        (FILM, b'{"project_id": "film", "task_type": "x", "task_data": {}}', 400),
        (FILM, b'{"project_id": "film", "priority": 9}', 400),
        (FILM, b'{"project_id": 1}', 400),
    ],
)
async def test_key_scope_project_and_body_are_checked_in_this_order(api: Client, key: str, body: bytes, status: int) -> None:
    assert (await api.submit_bytes(body, key=key)).status == status


async def test_the_key_is_checked_before_a_body_is_read(api: Client) -> None:
    head = b"POST /api/v1/tasks/submit HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 1000000\r\n\r\n"
    assert (await api.raw(head)).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(("method", "path"), OF_A_TASK)
async def test_the_scope_is_checked_before_the_task_id(api: Client, method: str, path: str) -> None:
    key = SUBMIT if (method, path) in READS else READ
    assert (await api.ask(method, at(path, "malformed"), key=key)).status == 403


async def test_the_project_is_checked_before_the_bytes_of_an_upload(api: Client) -> None:
    assert (await api.post("/api/v1/projects/other/uploads", key=FILM, data=b"<html>")).status == 403


@pytest.mark.parametrize(("method", "path"), [case for case in READS + WRITES if "submit" not in case[1] and "uploads" not in case[1]])
async def test_the_query_is_checked_last(api: Client, tasks: Tasks, method: str, path: str) -> None:
    foreign = at(path, await tasks.queued(project_id="other"), "other").partition("?")[0] + "?colour=red&after=x&wait=x&page=x"
    of_a_project = path not in ("/api/v1/workers/status", "/api/v1/task-types")
    lacking = SUBMIT if (method, path) in READS else READ
    statuses = [(await api.ask(method, foreign, key=key)).status for key in ("wrong", lacking, FILM)]
    assert statuses == [401, 403, 404 if of_a_project else 400]


async def test_the_project_is_checked_before_the_headers_of_an_upload(api: Client) -> None:
    for project, status in (("other", 403), ("film", 400)):
        headers = {"Content-Encoding": "gzip"}
        assert (await api.post(f"/api/v1/projects/{project}/uploads", key=FILM, data=PNG, headers=headers)).status == status


async def test_health_and_openapi_need_no_key(api: Client) -> None:
    assert {(await api.get(path, key=None)).status for path in ("/health", "/api/v1/health", "/openapi.json")} == {200}


# ── Other origins ──


async def test_without_origins_in_the_settings_no_page_may_call(api: Client) -> None:
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    preflight = await api.ask("OPTIONS", "/api/v1/tasks/submit", key=None, headers=headers)
    answer = await api.get("/api/v1/workers/status", headers=headers)
    assert (preflight.status, "Access-Control-Allow-Origin" in preflight.headers) == (405, False)
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.fixture
def with_origins(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, cors_origins=("https://app.example", "https://other.example"))


async def test_a_page_of_an_allowed_origin_may_submit(with_origins: Settings, store: Store) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, idempotency-key, x-api-key",
    }
    async with served(with_origins) as api:
        preflight = await api.ask("OPTIONS", "/api/v1/tasks/submit", key=None, headers=headers)
        answer = await api.submit(headers={"Origin": "https://app.example", "Idempotency-Key": "1"})
    assert (preflight.status, preflight.headers["Access-Control-Allow-Origin"]) == (200, "https://app.example")
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (201, "https://app.example")
    assert "Idempotent-Replayed" in answer.headers["Access-Control-Expose-Headers"]


async def test_a_page_of_an_allowed_origin_can_read_errors(with_origins: Settings, store: Store) -> None:
    async with served(with_origins) as api:
        answer = await api.get("/api/v1/workers/status", key=None, headers={"Origin": "https://app.example"})
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (401, "https://app.example")


@pytest.mark.parametrize("change", [{"Origin": "https://evil.example"}, {"Access-Control-Request-Method": "PUT"}])
async def test_a_refused_preflight_has_the_body_of_every_error(with_origins: Settings, store: Store, change: dict[str, Any]) -> None:
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST", **change}
    async with served(with_origins) as api:
        answer = await api.ask("OPTIONS", "/api/v1/tasks/submit", key=None, headers=headers)
    assert (answer.status, answer.error) == (400, "validation_failed")
    assert answer.headers.get("Access-Control-Allow-Origin") != "https://evil.example"
