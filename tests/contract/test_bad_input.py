"""Bad input to submit: a 400 or 413 that names the field, the value and what is allowed; the API goes on."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from movieq.queue.queries import Queries
from movieq.queue.store import Store
from movieq.settings import Settings
from tests.arrange import claim
from tests.contract.client import ALL, BODY, UNKNOWN, Answer, Client
from tests.contract.conftest import Tasks, served
from workers.protocol import Run

MIB = 1024 * 1024
HUGE = int("1" + "0" * 400)
DEEP = 100_000
HEAD = (
    f"POST /api/v1/tasks/submit HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-API-Key: {ALL}\r\nContent-Type: application/json\r\n".encode()
)


def refused(answer: Answer, *words: str) -> None:
    """Assert that the answer is a 400 whose message has these words."""
    assert (answer.status, answer.error, answer.json["retryable"]) == (400, "validation_failed", False), answer
    assert [word for word in words if word not in answer.message] == [], answer.message


def short(value: object) -> str:
    """Return a short name for a case."""
    return ascii(value)[:40]


def bytes_of(**fields: Any) -> bytes:
    return json.dumps({**BODY, **fields}).encode()


@pytest.fixture(autouse=True)
async def lives_on(api: Client) -> AsyncIterator[None]:
    """Check after the block that the next task is accepted, and that no other was."""
    yield
    assert (await api.submit(project_id="next")).status == 201
    assert (await api.get("/api/v1/projects/film/tasks")).json["pagination"]["total"] == 0


# ── Fields ──


@pytest.mark.parametrize("name", BODY, ids=short)
async def test_a_required_field_that_is_missing_is_named(api: Client, name: str) -> None:
    refused(await api.submit_bytes(json.dumps({key: value for key, value in BODY.items() if key != name}).encode()), name)


WRONG_TYPES: dict[str, list[Any]] = {
    "project_id": [None, 1, True, [], {}, 1.5, HUGE],
    "task_type": [None, 1, False, [], {}, HUGE],
    "task_data": [None, 1, "x", [], [{}], True, HUGE],
    "priority": ["1", 1.5, True, [], {}, HUGE],
    "callback_url": [1, True, [], {}, HUGE],
    "metadata": [1, "x", [], True, HUGE],
    "deadline": [1, "2999-01-01T00:00:00Z", [], True, HUGE],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values], ids=short)
async def test_a_top_level_field_of_another_type_is_named(api: Client, name: str, value: Any) -> None:
    refused(await api.submit(**{name: value}), name)


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("priority", 0, "got 0"),
        ("priority", 4, "got 4"),
        ("priority", -1, "got -1"),
        ("project_id", "", 'got ""'),
        ("project_id", "a" * 101, 'got "aaa'),
        ("project_id", "a b", 'got "a b"'),
        ("project_id", "a/b", 'got "a/b"'),
        ("project_id", "film\n", 'got "film\\n"'),
        ("project_id", "film\0", "got"),
        ("project_id", "fílm", 'got "fílm"'),
        ("project_id", "x" * (MIB - 200), "got"),
        ("callback_url", "https://a.example/" + "x" * 10_000, "got"),
        ("deadline", {"start_by": "2999-01-01T00:00:00"}, 'got "2999'),
        ("deadline", {"start_by": "2999-01-01"}, "got"),
        ("deadline", {"finish_by": "10000-01-01T00:00:00Z"}, "got"),
        ("deadline", {"finish_by": "2999-02-30T00:00:00Z"}, "got"),
        ("deadline", {"finish_by": 1}, "got"),
    ],
    ids=short,
)
async def test_a_value_out_of_range_is_repeated(api: Client, name: str, value: Any, given: str) -> None:
    refused(await api.submit(**{name: value}), name, given)


@pytest.mark.parametrize("year", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"], ids=short)
async def test_a_deadline_at_the_ends_of_time_is_a_deadline(api: Client, year: str) -> None:
    assert (await api.submit(project_id="other", deadline={"finish_by": year})).status == 201


async def test_an_unknown_field_is_refused_by_name(api: Client) -> None:
    refused(await api.submit(taskData={}), "taskData")


async def test_an_unknown_field_of_the_deadline_is_refused_by_name(api: Client) -> None:
    refused(await api.submit(deadline={"by": None}), "deadline", "by")


@pytest.mark.parametrize(
    "task_type", ["evaluate_department", "generate_story", "", "GENERATE_IMAGE", "generate_image\n", "x" * 1000], ids=short
)
async def test_a_task_type_of_a_neighbour_is_refused_with_the_list(api: Client, task_type: str) -> None:
    refused(await api.submit(task_type=task_type), "task_type", "generate_video", "generate_image", "process_audio", "render_animation")


async def test_all_faults_of_a_request_are_in_one_answer(api: Client) -> None:
    wrong: dict[str, Any] = {
        "project_id": "a b",
        "task_type": "generate_video",
        "task_data": {
            "fps": 0,
            "duration": "long",
            "audio_cues": ["rain", 1, "wind", 2],
            "resolution": "65x64",
            "model": "none",
            "a": HUGE,
        },
        "priority": 9,
        "callback_url": "http://10.0.0.1/",
        "metadata": {"a": "x" * 20_000},
        "deadline": {"start_by": "soon", "by": 1},
        "colour": 1,
    }
    answer = await api.submit(headers={"Idempotency-Key": "a b"}, **wrong)
    refused(answer, "(and 15 more)")
    assert {error["path"] for error in answer.json["errors"]} == {
        *("project_id", "task_data.fps", "task_data.duration", "task_data.audio_cues[1]", "task_data.audio_cues[3]"),
        *("task_data.resolution", "task_data.model", "task_data.a", "task_data.scene_description", "priority", "callback_url", "metadata"),
        *("deadline.start_by", "deadline.by", "colour", "Idempotency-Key"),
    }
    assert not {error["path"] for error in (await api.submit(**(wrong | {"task_type": "x"}))).json["errors"]} & {"task_data.fps"}


async def test_a_faulty_document_of_the_cms_is_told_with_the_other_faults(settings: Settings, store: Store) -> None:
    cms = {"payload_url": "https://cms.example/api", "payload_api_key": "the-key-of-the-cms"}
    async with served(msgspec.structs.replace(settings, **cms)) as api:
        answer = await api.submit(priority=0, metadata={"payload": {"collection": "a/b", "id": 1.5, "name": "x"}})
        refused(answer)
        assert {error["path"].removeprefix("metadata.payload.") for error in answer.json["errors"]} == {
            *("priority", "collection", "id", "field", "name")
        }
        refused(await api.submit(metadata={"payload": {"collection": "a", "id": 1, "field": "b"}}), "a.b", "MOVIEQ_PAYLOAD_WRITABLE")


async def test_of_many_faults_fifty_are_listed(api: Client) -> None:
    for fields in ({f"field_{number}": 1 for number in range(1000)}, {"metadata": {"a": [10**30] * 1000}}):
        answer = await api.submit(**fields)
        refused(answer, "(and at least 49 more)")
        assert len(answer.json["errors"]) == 50


async def test_all_faults_of_a_query_are_in_one_answer(api: Client) -> None:
    await api.submit(project_id="other")
    answer = await api.get("/api/v1/projects/other/tasks?page=0&limit=many&limit=2&status=done&task_type=x&colour=red")
    refused(answer, "(and 4 more)")
    assert [error["path"] for error in answer.json["errors"]] == ["limit", "colour", "page", "status", "task_type"]
    answer = await api.get("/api/v1/projects/other/events?after=x&status=queued,done,over&task_type=x&colour=red")
    refused(answer)
    assert [error["path"] for error in answer.json["errors"]] == ["colour", "after", "task_type", "status"]


TASK_DATA: dict[str, dict[str, list[Any]]] = {
    "generate_video": {
        "fps": [0, -1, 61, 1e9, HUGE, "0", "24/0", "1/2", "61", "1e1", "24\n", "", True, [], {}],
        "duration": [0, -1, 0.99, 30.01, 1e9, HUGE, "7", True, []],
        "resolution": [
            *("1921x1080", "62x64", "3842x64", "99999x99999", "0x0", "-64x64", "1920", "1920X1080", "1920x1080\n", "1920x1080x2", "٦٤x٦٤"),
            *("", 1080, [1920, 1080], HUGE),
        ],
        "seed": [-1, 2**32, 1.5, 1.0, "1", True, HUGE],
        "steps": [0, 151, 1.5, "1", HUGE],
        "guidance_scale": [-0.1, 101, "1", HUGE],
        "prompt": ["x" * 8001, 1, [], "a\0b", HUGE],
        "scene_description": ["x" * 8001, 1, "a\0b"],
        "negative_prompt": ["x" * 8001, 1],
        "storyboard_images": [["u"] * 33, "https://x.example/a.png", [1], [""], [None], HUGE],
        "camera_angle": ["x" * 201, 1],
        "lighting": ["x" * 201, {}],
        "character_positions": [[1], "left", [None]],
        "audio_cues": [["x" * 201], [1], "rain", ["x"] * 33],
        "captions": [1, "true", HUGE],
        "draft": [1, "yes"],
        "preview": [0],
        "model": ["no-such-model", 1, "x" * 300],
    },
    "generate_image": {
        "format": ["gif", "JPEG", "jpg", 1, HUGE],
        "style_guide": ["", 1, []],
        "reference_images": [["u"] * 33, "u"],
        "resolution": ["1x10000", "1023x1024"],
    },
    "process_audio": {
        "text": ["", "  \n", "x" * 5001, 1, "a\0b"],
        "language": ["xx", "", "klingon", 1, "e", "x" * 100],
        "sample_rate": [44101, 0, -1, 8000.5, "44100", HUGE],
        "output_format": ["ogg", "MP3", 1],
        "duration": [0.4, 60.1, "5"],
        "character_voice_profile": ["", 1],
        "character_voice_text": ["x" * 2001, 1, "a\0b"],
    },
    "render_animation": {"loop": [1, "yes"], "motion": ["x" * 201], "fps": [0, 61], "duration": [0, 31]},
}


@pytest.mark.parametrize(
    ("task_type", "name"), [(task_type, name) for task_type, fields in TASK_DATA.items() for name in fields], ids=short
)
async def test_a_field_of_task_data_that_is_wrong_is_named(api: Client, task_type: str, name: str) -> None:
    for value in TASK_DATA[task_type][name]:
        refused(await api.submit(task_type=task_type, task_data={"prompt": "x", name: value}), f"task_data.{name}")


@pytest.mark.parametrize("task_type", ["generate_video", "generate_image", "process_audio", "render_animation"], ids=short)
@pytest.mark.parametrize("task_data", [{}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": None}, {"lighting": "dusk"}], ids=short)
async def test_a_task_that_says_nothing_of_what_to_make_is_refused(api: Client, task_type: str, task_data: dict[str, Any]) -> None:
    refused(await api.submit(task_type=task_type, task_data=task_data), "task_data", "prompt", "needed")


async def test_a_clip_of_too_many_pixels_is_refused_with_the_sum(api: Client) -> None:
    data = {"prompt": "x", "resolution": "3840x2160", "duration": 30, "fps": 60}
    refused(await api.submit(task_type="generate_video", task_data=data), "task_data.resolution", str(3840 * 2160 * 1800))


async def test_an_unknown_language_is_refused_with_the_list(api: Client) -> None:
    refused(await api.submit(task_type="process_audio", task_data={"text": "x", "language": "qq"}), "task_data.language", "fr", "de")


@pytest.mark.parametrize("number", [HUGE, 2**64, -(2**63) - 1], ids=short)
async def test_a_number_beyond_64_bits_that_nothing_reads_is_refused_by_its_path(api: Client, number: int) -> None:
    refused(await api.submit(task_data={"prompt": "x", "colour": [{"a": number}]}), "task_data.colour[0].a: ", "64 bits")
    refused(await api.submit(metadata={"a": {"b": [0, 1, 2, number]}}), "metadata.a.b[3]: ", "64 bits")


@pytest.mark.parametrize(
    "value",
    [2**64 - 1, -(2**63), 1.7976931348623157e308, 5e-324, -0.0, "a\0b", "\ufeff", {"": {"a.b": [[], {}, None, True, 1.0]}}],
    ids=short,
)
async def test_what_is_accepted_reaches_the_worker_and_the_webhook_as_it_was(api: Client, tasks: Tasks, store: Store, value: Any) -> None:
    task_id = await tasks.queued(project_id="other", task_data={"prompt": "x", "a": value}, metadata={"a": value})
    (claimed,) = await claim(store)
    job = msgspec.msgpack.decode(claimed.job)["k"]["task_data"]
    request = Run(claimed.run, task_id, "other", "generate_image", "animatic", "animatic", job, claimed.task.metadata, {}, 1, "out")
    framed = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Run)
    for found in (framed.params["a"], framed.metadata["a"], msgspec.json.decode(msgspec.json.encode(framed.metadata))["a"]):
        assert repr(found) == repr(value)


async def test_a_body_of_many_small_lists_is_refused_with_the_limit(api: Client) -> None:
    refused(await api.submit_bytes(bytes_of(metadata={"a": [[]] * (MIB // 5)}).replace(b" ", b"")), "20000")


@pytest.mark.parametrize("value", ["x" * 16 * 1024, {"x" * 9000: "y" * 9000}, ["€"] * 4000], ids=short)
async def test_metadata_over_16_kib_is_refused(api: Client, value: Any) -> None:
    refused(await api.submit(metadata={"a": value}), "metadata", "16384")


# ── Callback addresses ──


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/x", "http://[::1]:8000/", "http://localhost/", "http://10.0.0.1/", "http://169.254.169.254/latest"),
        *("http://0x7f.1/", "http://2130706433/", "http://[::ffff:127.0.0.1]/", "http://①②⑦.0.0.1/", "http://0/"),
    ],
    ids=short,
)
async def test_a_private_callback_is_refused_by_the_name_of_its_setting(api: Client, url: str) -> None:
    refused(await api.submit(callback_url=url), "callback_url", "MOVIEQ_ALLOW_PRIVATE_URLS")


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "//a.example/", "ftp://a.example/", "file:///etc/passwd", "javascript:alert(1)", "http://", "http:///x", "http://?x"),
        *("http://a:0/", "http://a:99999/", "http://a:b/", "http://[::1", "http://a b/", "http://a.example:80:80/", "http://a\0/"),
        *("http://a\r\nX: y/", "http://a\\@b/", "http://1.2.3.4.5/", "http://[fe80::1%25eth0]/", "http://" + "a" * 300, "http://\u200b/"),
    ],
    ids=short,
)
async def test_a_callback_that_cannot_be_called_is_refused(api: Client, url: str) -> None:
    refused(await api.submit(callback_url=url), "callback_url")


async def test_a_password_in_a_callback_is_refused_and_not_repeated(api: Client) -> None:
    answer = await api.submit(callback_url="https://user:geheim@a.example/")
    refused(answer, "callback_url", "password")
    assert b"geheim" not in answer.body


# ── Bodies ──


def deep(template: str, levels: int) -> bytes:
    return template.replace("DEEP", "[" * levels + "]" * levels).encode()


NESTED = [
    "DEEP",
    json.dumps({**BODY, "x": "DEEP"}).replace('"DEEP"', "DEEP"),
    json.dumps({**BODY, "metadata": {"a": "DEEP"}}).replace('"DEEP"', "DEEP"),
    json.dumps({**BODY, "task_data": {"prompt": "x", "a": "DEEP"}}).replace('"DEEP"', "DEEP"),
    json.dumps({**BODY, "task_data": {"prompt": "DEEP"}}).replace('"DEEP"', "DEEP"),
    json.dumps({**BODY, "task_type": "generate_video", "task_data": {"character_positions": [{"a": "DEEP"}]}}).replace('"DEEP"', "DEEP"),
    json.dumps({**BODY, "deadline": "DEEP"}).replace('"DEEP"', "DEEP"),
    json.dumps({**BODY, "priority": "DEEP"}).replace('"DEEP"', "DEEP"),
]


@pytest.mark.parametrize("template", NESTED, ids=short)
async def test_json_nested_a_hundred_thousand_deep_is_refused(api: Client, template: str) -> None:
    refused(await api.submit_bytes(deep(template, DEEP)))
    refused(await api.submit_bytes(deep(template, DEEP).replace(b"[", b'{"a":').replace(b"]", b"}").replace(b":}", b":1}")))


@pytest.mark.parametrize("template", NESTED[2:4], ids=short)
async def test_what_is_nested_near_the_limit_of_python_is_refused_and_not_stored_to_break_later(api: Client, template: str) -> None:
    for levels in (*range(60, 1000, 90), *range(940, 1000)):
        answer = await api.submit_bytes(deep(template.replace('"film"', '"deep"'), levels))
        assert answer.status == (201 if levels < 63 else 400), levels
    assert (await api.get("/api/v1/projects/deep/tasks")).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"[{}]",
        b"\0",
        b"{}{}",
        b"\xef\xbb\xbf" + bytes_of(),
        bytes_of().decode().encode("utf-16"),
        bytes_of().replace(b"film", b"\xff\xfe"),
        bytes_of().replace(b"film", b"\xed\xa0\x80"),
        bytes_of().replace(b"film", b"\\ud800"),
        bytes_of().replace(b"a lighthouse", b"\xc3\x28"),
        bytes_of().replace(b"a lighthouse", b"\\udc00\\ud800"),
        bytes_of().replace(b"a lighthouse", b"a\\u0000b"),
        bytes_of().replace(b"a lighthouse", b"a\0b"),
        bytes_of().replace(b'"a lighthouse"', b"NaN"),
        bytes_of().replace(b'"a lighthouse"', b'"x", "a": NaN'),
        bytes_of().replace(b'"a lighthouse"', b'"x", "a": -Infinity'),
        bytes_of().replace(b'"a lighthouse"', b'"x", "a": 1e999'),
        bytes_of().replace(b'"a lighthouse"', b'"x", "a": ' + b"9" * 5000),
        bytes_of().replace(b'"a lighthouse"', b'"x", "a": 01'),
        bytes_of()[:-1] + b",}",
        bytes_of().replace(b'"', b"'"),
    ],
    ids=short,
)
async def test_a_body_that_is_not_such_json_is_refused(api: Client, body: bytes) -> None:
    refused(await api.submit_bytes(body))


async def test_a_body_of_a_mebibyte_is_read(api: Client) -> None:
    body = bytes_of(project_id="other", task_data={"prompt": "x", "a": ""})
    assert (await api.submit_bytes(body.replace(b'"a": ""', b'"a": "' + b"x" * (MIB - len(body)) + b'"'))).status == 201


async def test_a_body_of_a_mebibyte_and_a_byte_is_too_large(api: Client) -> None:
    answer = await api.submit_bytes(io.BytesIO(bytes_of() + b" " * (MIB + 1 - len(bytes_of()))))
    assert (answer.status, answer.error) == (413, "payload_too_large")
    assert str(MIB) in answer.message


async def test_a_chunked_body_of_two_mebibytes_is_too_large(api: Client) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield b" " * 65536

    answer = await api.submit_bytes(chunks())
    assert (answer.status, answer.error) == (413, "payload_too_large")


async def test_the_connection_goes_on_after_a_body_that_was_too_large(api: Client) -> None:
    head = HEAD.replace(b"Connection: close\r\n", b"")
    parts = head, b"Content-Length: %d\r\n\r\n" % (2 * MIB), b" " * 2 * MIB, b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answers = await api.raw(*parts)
    assert [answers.count(line) for line in (b"HTTP/1.1 413", b"HTTP/1.1 200")] == [1, 1]


async def test_a_client_that_hangs_up_in_its_body_leaves_no_error_behind(api: Client) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(HEAD + b"Content-Length: 1000\r\n\r\n{")
    await writer.drain()
    await api.get("/health")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"], ids=short)
async def test_a_compressed_body_is_refused(api: Client, encoding: str) -> None:
    refused(await api.submit_bytes(gzip.compress(bytes_of()), headers={"Content-Encoding": encoding}), "Content-Encoding")


async def test_a_gzip_body_that_does_not_say_so_is_refused(api: Client) -> None:
    refused(await api.submit_bytes(gzip.compress(bytes_of())))


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json", "x" * 5000],
    ids=short,
)
async def test_another_content_type_is_refused_by_name(api: Client, content_type: str) -> None:
    refused(await api.submit(headers={"Content-Type": content_type}), "Content-Type", "application/json")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/merge-patch+json"], ids=short)
async def test_json_by_another_spelling_is_read(api: Client, content_type: str) -> None:
    assert (await api.submit(project_id="other", headers={"Content-Type": content_type})).status == 201


async def test_without_a_content_type_json_is_meant(api: Client) -> None:
    body = bytes_of(project_id="other")
    head = HEAD.replace(b"Content-Type: application/json\r\n", b"")
    assert (await api.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)).startswith(b"HTTP/1.1 201")


# ── Addresses ──


@pytest.mark.parametrize(
    "task_id",
    ["x", "%00", "%ff", "123e4567e89b12d3a456426614174000", "123e4567-e89b-12d3-a456-42661417400g", "a" * 3000, "%0A", f"{UNKNOWN}%0A"],
    ids=short,
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "status"), ("GET", "events"), ("DELETE", "cancel"), ("POST", "cancel"), ("POST", "retry")], ids=short
)
async def test_a_malformed_task_id_is_a_400(api: Client, method: str, path: str, task_id: str) -> None:
    refused(await api.ask(method, f"/api/v1/tasks/{task_id}/{path}"), "task_id", "UUID")


@pytest.mark.parametrize("project_id", ["a%20b", "a%0A", "%00", "a" * 101, "%C3%AD", "."], ids=short)
@pytest.mark.parametrize("path", ["", "/tasks"], ids=short)
async def test_a_malformed_project_id_is_a_400(api: Client, project_id: str, path: str) -> None:
    answer = await api.get(f"/api/v1/projects/{project_id}{path}")
    if project_id == "." and answer.status == 404:
        return  # aiohttp's client has resolved the dot
    refused(answer, "project_id")


@pytest.mark.parametrize(
    "request_line",
    [
        b"GARBAGE",
        "GET /api/v1/projects/é/tasks HTTP/1.1".encode(),
        b"GET http://[::1 HTTP/1.1",
        b"FOO /health HTTP/1.1",
        b"GET /a b HTTP/1.1",
    ],
    ids=short,
)
async def test_what_is_no_http_has_the_body_of_every_error(api: Client, request_line: bytes) -> None:
    head, _, body = (await api.raw(request_line + b"\r\nHost: a\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"] == "validation_failed"


@pytest.mark.parametrize("host", [b"[", b"\xff", b"", b"a b", b"evil.example/..//", b"a:b:c"], ids=short)
async def test_a_strange_host_changes_nothing(api: Client, host: bytes) -> None:
    answer = await api.raw(b"GET /api/v1/tasks/submit/ HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"evil" not in answer


async def test_text_of_any_language_reaches_the_worker(api: Client, tasks: Tasks, store: Store) -> None:
    text = "Ω≈ç√ 灯台 🎬 \u202e rtl \u0301 \x7f"
    task_id = await tasks.queued(project_id="other", task_data={"prompt": text}, metadata={"title": text})
    task = await Queries(store.redis).task(task_id)
    assert task is not None
    assert task.metadata == {"title": text}
