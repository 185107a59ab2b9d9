"""/openapi.json describes the routes as they are. (client.py checks that every answer fits its schema.)"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route

from movieq.api import app
from movieq.settings import Settings
from tests.contract.client import BODY, Client, schema


@pytest.fixture
async def document(api: Client) -> dict[str, Any]:
    """Return the document as it is served."""
    answer = await api.get("/openapi.json", key=None)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    return dict(answer.json)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from refs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from refs(inner)


async def test_it_is_openapi_3_1(document: dict[str, Any]) -> None:
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert {"title", "version"} <= document["info"].keys()
    assert document["servers"][0]["url"].startswith("http://127.0.0.1:")


async def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    names = {ref.rpartition("/")[2] for ref in refs(document)}
    assert names <= document["components"]["schemas"].keys()


async def test_every_schema_is_one(document: dict[str, Any]) -> None:
    for name, each in document["components"]["schemas"].items():
        Draft202012Validator.check_schema(each)
        assert schema(name) is not None


async def test_every_operation_has_a_name_of_its_own_and_says_what_it_answers(document: dict[str, Any]) -> None:
    found = list(operations(document))
    assert len({operation["operationId"] for _, _, operation in found}) == len(found)
    for method, path, operation in found:
        assert any(status.startswith("2") for status in operation["responses"]), (method, path)
        assert all(response["description"] for response in operation["responses"].values()), (method, path)
        asked = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
        assert asked == set(re.findall(r"\{(\w+)\}", path)), (method, path)


async def test_it_has_every_route_of_the_api_and_no_other(document: dict[str, Any], settings: Settings) -> None:
    routes = {
        (method.lower(), re.sub(r":\w+", "", route.path))
        for route in app.create(settings, "http://a").routes
        if isinstance(route, Route) and route.path.startswith("/api/v1/")
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert {(method, path) for method, path, _ in operations(document)} == routes


async def test_every_operation_takes_a_key_and_health_none(document: dict[str, Any]) -> None:
    assert document["security"] == [{"key": []}, {"bearer": []}]
    assert [path for _, path, operation in operations(document) if operation.get("security") == []] == [
        "/api/v1/health",
        "/api/v1/health/live",
        "/api/v1/health/ready",
    ]


async def test_the_body_of_submit_fits_its_schema_and_an_unknown_field_does_not(document: dict[str, Any]) -> None:
    ref = document["paths"]["/api/v1/tasks/submit"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert ref == "#/components/schemas/SubmitRequest"
    assert schema("SubmitRequest").is_valid(BODY)
    assert not schema("SubmitRequest").is_valid({**BODY, "x": 1})
    assert not schema("SubmitRequest").is_valid({**BODY, "project_id": "film\n"})


async def test_every_answer_that_is_an_object_requires_all_of_its_keys(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        for status, response in operation["responses"].items():
            for ref in refs(response.get("content", {})):
                each = document["components"]["schemas"][ref.rpartition("/")[2]]
                if status.startswith("2"):
                    assert set(each["required"]) == each["properties"].keys(), (method, path, status)
