"""/openapi.json describes the routes as they are. (client.py checks that every answer fits its schema.)"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route

from movieq.api import app
from movieq.settings import Scope, Settings
from tests.contract.client import BODY, READ, SUBMIT, UNKNOWN, Client, schema
from tests.documents import ROOT


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


def resolved(document: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    """Return the response, or the one that it refers to."""
    found: dict[str, Any] = document["components"]["responses"][response["$ref"].rpartition("/")[2]] if "$ref" in response else response
    return found


async def test_it_is_openapi_3_1(document: dict[str, Any]) -> None:
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert {"title", "version"} <= document["info"].keys()
    assert document["servers"][0]["url"].startswith("http://127.0.0.1:")


async def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for ref in refs(document):
        _, group, name = ref.removeprefix("#/").split("/")
        assert name in document["components"][group]


async def test_every_schema_is_one(document: dict[str, Any]) -> None:
    for name, each in document["components"]["schemas"].items():
        Draft202012Validator.check_schema(each)
        assert schema(name) is not None


async def test_every_operation_has_a_name_of_its_own_and_says_what_it_answers(document: dict[str, Any]) -> None:
    found = list(operations(document))
    assert len({operation["operationId"] for _, _, operation in found}) == len(found)
    for method, path, operation in found:
        assert any(status.startswith("2") for status in operation["responses"]), (method, path)
        answers = [resolved(document, response) for response in operation["responses"].values()]
        assert all(response["description"] for response in answers), (method, path)
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", operation["operationId"]), "generators make it the name of a function"
        assert re.fullmatch(r"[A-Z][^.]*", operation["summary"]), (method, path)
        assert re.fullmatch(r"[A-Z].*\.", operation["description"], re.DOTALL), (method, path)
        assert set(operation["tags"]) <= {tag["name"] for tag in document["tags"]}, (method, path)
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


async def test_every_operation_names_the_scope_that_its_key_needs_and_health_needs_no_key(api: Client, document: dict[str, Any]) -> None:
    found = [(method, path, operation["security"]) for method, path, operation in operations(document)]
    assert [path for _, path, security in found if not security] == ["/api/v1/health", "/api/v1/health/live", "/api/v1/health/ready"]
    without = {Scope.READ: SUBMIT, Scope.SUBMIT: READ, Scope.ADMIN: READ}
    for method, path, security in found:
        if security:
            ((scope,),) = {tuple(scopes) for each in security for scopes in each.values()}
            address = path.format(task_id=UNKNOWN, project_id="film", delivery_id="1")
            refused = await api.ask(method.upper(), address, key=without[Scope(scope)])
            assert refused.status == 403
            assert f"lacks the scope {scope};" in refused.message, (method, path)


async def test_the_body_of_submit_fits_its_schema_and_an_unknown_field_does_not(document: dict[str, Any]) -> None:
    ref = document["paths"]["/api/v1/tasks/submit"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert ref == "#/components/schemas/SubmitRequest"
    assert schema("SubmitRequest").is_valid(BODY)
    assert not schema("SubmitRequest").is_valid({**BODY, "x": 1})
    assert not schema("SubmitRequest").is_valid({**BODY, "project_id": "film\n"})


@pytest.mark.parametrize(
    ("task_type", "task_data"),
    [
        ("generate_image", {}),
        ("generate_image", {"prompt": " "}),
        ("generate_image", {"prompt": "a\0b"}),
        ("generate_image", {"reference_images": []}),
        ("generate_image", {"style_guide": None}),
        ("generate_image", {"prompt": "a", "resolution": "65x64"}),
        ("generate_image", {"prompt": "a", "resolution": "3842x64"}),
        ("generate_image", {"prompt": "a", "resolution": "62x64"}),
        ("generate_video", {"scene_description": "\n", "prompt": None, "storyboard_images": None}),
        ("process_audio", {"text": " ", "prompt": "rain"}),
        ("process_audio", {"text": "a", "language": "xx-GB"}),
        ("process_audio", {"text": "a", "language": "eng"}),
        ("process_audio", {"text": "a", "sample_rate": 9000}),
        ("render_animation", {"character_voice_profile": "upload:a"}),
    ],
)
async def test_what_the_api_refuses_in_task_data_does_not_fit_the_schema(api: Client, task_type: str, task_data: dict[str, Any]) -> None:
    assert (await api.submit(task_type=task_type, task_data=task_data)).status == 400
    assert not schema("SubmitRequest").is_valid({**BODY, "task_type": task_type, "task_data": task_data})


@pytest.mark.parametrize(
    ("task_type", "task_data"),
    [
        ("generate_image", {"style_guide": "upload:a", "weather": ["wet"]}),
        ("generate_image", {"prompt": "a", "resolution": "3840x66", "format": None, "seed": None}),
        ("generate_video", {"scene_description": " ", "prompt": "a"}),
        ("generate_video", {"storyboard_images": ["upload:a"], "fps": "24000/1001", "captions": None}),
        ("generate_video", {"prompt": "a", "fps": "23.976"}),
        ("render_animation", {"prompt": "a", "fps": 59.94}),
        ("process_audio", {"text": "a\n", "language": "PT_br"}),
        ("process_audio", {"text": "a", "language": "no"}),
        ("process_audio", {"text": "a", "language": "iw-IL"}),
        ("process_audio", {"text": "a", "language": "zh-yue"}),
        ("render_animation", {"prompt": "a", "duration": None, "fps": None, "resolution": None}),
    ],
)
async def test_what_the_api_accepts_in_task_data_fits_the_schema(api: Client, task_type: str, task_data: dict[str, Any]) -> None:
    answer = await api.submit(task_type=task_type, task_data=task_data)
    assert answer.status == 201, answer
    schema("SubmitRequest").validate({**BODY, "task_type": task_type, "task_data": task_data})


async def test_the_request_of_the_readme_is_an_example_and_every_example_is_accepted(api: Client, document: dict[str, Any]) -> None:
    (readme,) = re.findall(r"-d '(\{.*?\})'", (ROOT / "README.md").read_text(), re.DOTALL)
    schemas = document["components"]["schemas"]
    examples = [example for name, each in schemas.items() if name.startswith("Submit") for example in each.get("examples", ())]
    assert json.loads(readme) in examples
    assert {each["task_type"] for each in examples} == {"generate_video", "generate_image", "process_audio", "render_animation"}
    for example in examples:
        schema("SubmitRequest").validate(example)
        if "payload" not in example.get("metadata", {}):  # that one needs a CMS
            assert (await api.submit(**example)).status == 201, example


async def test_every_error_has_the_codes_of_its_status(document: dict[str, Any]) -> None:
    assert schema("Error429").is_valid({"error": "queue_full", "message": "", "timestamp": "2026-01-01T00:00:00Z", "retryable": True})
    assert not schema("Error429").is_valid({"error": "forbidden", "message": "", "timestamp": "2026-01-01T00:00:00Z", "retryable": True})
    for method, path, operation in operations(document):
        for status, response in operation["responses"].items():
            if status >= "400" and not (status == "503" and operation["tags"] == ["health"]):
                assert response == {"$ref": f"#/components/responses/Error{status}"}, (method, path)


async def test_the_filters_of_a_list_are_those_that_the_api_accepts(api: Client, document: dict[str, Any]) -> None:
    parameters = document["paths"]["/api/v1/projects/{project_id}/tasks"]["get"]["parameters"]
    schemas = {parameter["name"]: parameter["schema"] for parameter in parameters}
    for name in ("status", "task_type"):
        for value in schemas[name]["enum"]:
            assert (await api.get(f"/api/v1/projects/film/tasks?{name}={value}")).status == 200
    assert (await api.get(f"/api/v1/projects/film/tasks?page={schemas['page']['maximum']}")).status == 200
    assert (await api.get(f"/api/v1/projects/film/tasks?page={schemas['page']['maximum'] + 1}")).status == 400


async def test_every_answer_that_is_an_object_requires_all_of_its_keys(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        for status, response in operation["responses"].items():
            for ref in refs(response.get("content", {}).get("application/json", {})):
                each = document["components"]["schemas"][ref.rpartition("/")[2]]
                if status.startswith("2"):
                    assert set(each["required"]) == each["properties"].keys(), (method, path, status)
