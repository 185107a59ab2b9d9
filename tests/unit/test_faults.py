"""The messages for every wrong field of every request: they name the field, what was given and what is allowed, in plain English."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta, inspect

from movieq.delivery.payload import Target
from movieq.tasks import faults, params
from movieq.tasks.params import Params
from movieq.tasks.registry import REGISTRY
from movieq.tasks.wire import Deadline, SubmitRequest

PARAMS = [spec.params for spec in REGISTRY.tasks.values()]
REQUESTS: list[type[msgspec.Struct]] = [SubmitRequest, Deadline, Target, *PARAMS]
FIELDS = [(cls, field) for cls in REQUESTS for field in msgspec.structs.fields(cls)]
WORDS = "str int bool float dict array None NoneType Literal datetime struct msgspec regex pattern Expected Object"
PROGRAMMERS = re.compile(rf"[`^$]|\b({WORDS.replace(' ', '|')})\b")
TEXTS = ["", "x", "\u202e\n", "x" * 1_000_001]
HUGE = 10**5000
ODD: list[Any] = [None, True, 0, -1, 0.5, 10**30, 1e300, *TEXTS, [], ["x"] * 10, [None], [[]], {}, {"": {}}, {"a": 1, "b": []}]


def named(value: Any) -> str:
    return getattr(value, "__name__", None) or getattr(value, "name", None) or (ascii(value)[:20] if value != HUGE else "huge")


def edges(info: inspect.Type) -> Iterator[Any]:
    """Values just beyond what a type allows."""
    match info:
        case inspect.UnionType():
            for each in info.types:
                yield from edges(each)
        case inspect.Metadata():
            yield from edges(info.type)
        case inspect.IntType() | inspect.FloatType():
            yield from (value for value in (info.ge and info.ge - 1, info.le and info.le + 1) if value is not None)
        case inspect.StrType():
            yield from ("x" * length for length in ((info.min_length or 0) - 1, (info.max_length or -2) + 1) if length >= 0)
        case inspect.CollectionType():
            yield from ([each] for each in edges(info.item_type))
            yield [""] * ((info.max_length or 0) + 1)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=named)
def test_every_message_of_every_field_is_plain_english(cls: type[msgspec.Struct], field: msgspec.structs.FieldInfo) -> None:
    name, seen = field.encode_name, 0
    for value in (*ODD, *edges(inspect.type_info(field.type))):
        found = [fault for fault in faults.of_struct(cls, {name: value}, "body") if fault[0].startswith(f"body.{name}")]
        assert bool(found) != faults.fits(field.type, value), value
        for path, message in found:
            seen += 1
            assert re.fullmatch(r"body(\.[a-z_]*)+(\[\d+\])*", path)
            said, _, shown = message.partition(", got ")
            assert re.match(r"expected [a-zA-Z0-9]|missing; expected |unknown field; allowed: ", said), message
            assert shown or not said.startswith("expected "), message
            assert not PROGRAMMERS.search(said), message
            assert message.isprintable()
            assert len(message) < 400
    assert seen or field.type in (Any, dict[str, Any])


@pytest.mark.parametrize("cls", REQUESTS, ids=named)
def test_a_field_that_is_missing_and_one_that_is_unknown_are_named(cls: type[msgspec.Struct]) -> None:
    found = dict(faults.of_struct(cls, {"no\nsuch": 1}))
    required = {field.encode_name for field in msgspec.structs.fields(cls) if field.required}
    assert found.keys() == required | ({"no\\nsuch"} if cls.__struct_config__.forbid_unknown_fields else set())
    assert [message for message in found.values() if PROGRAMMERS.search(message)] == []


@pytest.mark.parametrize(
    ("cls", "sent", "words"),
    [
        (params.VideoParams, {"duration": "long"}, 'task_data.duration: expected a number from 1 to 30, got "long"'),
        (
            params.VideoParams,
            {"fps": 0},
            'task_data.fps: expected a number from 1 to 60 or a ratio or number as text, such as "24000/1001" or "23.976", got 0',
        ),
        (params.VideoParams, {"resolution": "big"}, 'task_data.resolution: expected WIDTHxHEIGHT, even sides of 64 to 3840, got "big"'),
        (params.VideoParams, {"captions": "yes"}, 'task_data.captions: expected true or false, got "yes"'),
        (params.VideoParams, {"audio_cues": ["rain", 1]}, "task_data.audio_cues[1]: expected text of at most 200 characters, got 1"),
        (params.VideoParams, {"audio_cues": ["x"] * 33}, "task_data.audio_cues: expected a list of at most 32 values, got a list of 33"),
        (params.ImageParams, {"format": "gif"}, 'task_data.format: expected one of jpeg, png, webp, got "gif"'),
        (params.ImageParams, {"seed": -1}, "task_data.seed: expected a whole number from 0 to 4294967295, got -1"),
        (params.AudioParams, {"sample_rate": 1}, "task_data.sample_rate: expected one of 8000, 16000, 22050, 24000, 44100, 48000, got 1"),
        (
            params.AudioParams,
            {"emotion": "x" * 300},
            f'task_data.emotion: expected text of at most 200 characters, got "{"x" * 60}..." (300 characters)',
        ),
        (SubmitRequest, {"priority": 4}, "task_data.priority: expected a whole number from 1 to 3, got 4"),
        (SubmitRequest, {"deadline": {"start_by": "soon"}}, "task_data.deadline.start_by: expected a time with its zone"),
        (SubmitRequest, {"project_id": "a b"}, "task_data.project_id: expected 1 to 100 ASCII letters, digits, hyphens or underscores"),
        (SubmitRequest, {}, "task_data.project_id: missing; expected 1 to 100 ASCII letters"),
        (Target, {"id": "../1"}, 'task_data.id: expected a whole number or the id of a document, got "../1"'),
    ],
    ids=lambda value: named(value)[:40],
)
def test_a_message_says_what_is_allowed_and_what_was_given(cls: type[msgspec.Struct], sent: dict[str, Any], words: str) -> None:
    assert any(f"{path}: {message}".startswith(words) for path, message in faults.of_struct(cls, sent, "task_data"))


@pytest.mark.parametrize("cls", PARAMS, ids=named)
def test_all_faults_of_task_data_are_found_at_once_and_none_that_follows_from_another(cls: type[Params]) -> None:
    names = [field.encode_name for field in msgspec.structs.fields(cls)]
    found = faults.Faults()
    params.checked(cls, {name: {"a": []} for name in names}, found)
    assert [path for path, _ in found] == [f"task_data.{name}" for name in names]
    # what is checked between fields is found beside what is wrong in one
    found = faults.Faults()
    params.checked(cls, {"steps": 0, "resolution": "65x65", "fps": "1/0", "language": "xx"}, found)
    expected = {"steps", "resolution", "fps", "language"} & {*names}
    assert {path.removeprefix("task_data.") for path, _ in found} >= expected
    assert sum("is needed" in message for _, message in found) == 1
    assert [message for _, message in found if PROGRAMMERS.search(message)] == []


class Inner(msgspec.Struct, tag="inner"):
    size: Annotated[int, Meta(gt=3)]


class Other(msgspec.Struct, tag="other"):
    pass


class Odd(Params, frozen=True, kw_only=True):
    code: Annotated[str, Meta(pattern="^[a-z]+$")]
    inner: Inner | Other | None = None
    table: dict[str, Annotated[float, Meta(lt=1)]] | None = None

    def __post_init__(self) -> None:
        if self.code == "no":
            raise ValueError("code: no is not allowed")


def found_in(task_data: dict[str, Any]) -> dict[str, str]:
    found = faults.Faults()
    params.checked(Odd, task_data, found)
    return dict(found)


def test_a_type_of_a_plugin_is_described() -> None:
    sent = {"code": "A", "inner": {"type": "inner", "size": 3}, "table": {"a": 0, "b": 1}, "prompt": "x"}
    assert found_in(sent) == {
        "task_data.code": 'expected text of the required form, got "A"',
        "task_data.inner": 'expected an object, got {"type": "inner", "size": 3}',
        "task_data.table.b": "expected a number under 1, got 1",
    }
    assert found_in({"code": "no"}) == {"task_data": "code: no is not allowed"}
    assert found_in({"code": "yes", "prompt": "x"}) == {}


def test_of_very_many_faults_fifty_are_listed() -> None:
    error = faults.refused((f"field_{number}", "missing") for number in range(1000))
    assert len(error.errors) == faults.MOST == 50
    assert error.message == "field_0: missing (and at least 49 more)"


@pytest.mark.parametrize("value", [*ODD, float("nan"), "\ud800", "\x1b[31m", HUGE], ids=named)
def test_a_given_value_is_short_and_printable(value: Any) -> None:
    shown = faults.given(value)
    assert shown.isprintable()
    assert len(shown) <= 100
    if value not in (HUGE, TEXTS[-1]) and value == value:
        assert json.loads(shown) == value
