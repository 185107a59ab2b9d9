"""Values of JSON at the door: each is refused, or comes out of Redis, a frame to a child and a webhook as it went in."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movieq.api import tasks
from movieq.errors import ValidationFailed
from movieq.tasks import values
from movieq.tasks.faults import MOST as MOST_FAULTS
from movieq.tasks.faults import refused
from movieq.tasks.values import ELEMENTS, LEAST, MOST, NESTING
from movieq.tasks.wire import SubmitRequest

MIB = 1024 * 1024
EDGES = [LEAST - 1, LEAST, MOST, MOST + 1, 2**63, 10**400, -(10**30)]
NUMBERS = st.integers() | st.sampled_from(EDGES) | st.floats()
TEXTS = st.text(st.characters(exclude_categories=())) | st.sampled_from(["", "\0", "\ud800", "\udc00\ud800", "\ufeff", "a" * 300, '\\"'])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def body(**fields: Any) -> bytes:
    return json.dumps({"project_id": "film", "task_type": "generate_image", "task_data": {"prompt": "x"}, **fields}).encode()


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def carried(value: Any) -> bool:
    """Whether all of it can be carried."""
    match value:
        case dict():
            return all(carried(each) for pair in value.items() for each in pair)
        case list():
            return all(map(carried, value))
        case str():
            return not any("\ud800" <= character <= "\udfff" for character in value)
        case float():
            return math.isfinite(value)
        case int():
            return LEAST <= value <= MOST
    return True


def decode(text: bytes) -> SubmitRequest:
    submitted, found = tasks.decode(text)
    if found:
        raise refused(found)
    return submitted


def refusal(text: bytes) -> ValidationFailed:
    with pytest.raises(ValidationFailed) as caught:
        decode(text)
    return caught.value


@settings(deadline=None)
@given(VALUES, VALUES)
def test_any_value_is_refused_or_comes_back_equal(one: Any, other: Any) -> None:
    try:
        submitted: SubmitRequest | None = decode(body(task_data={"a": one}, metadata={"b": [other]}))
    except ValidationFailed:
        submitted = None
    assert (submitted is not None) == carried([one, other])
    if submitted is not None:
        fields = {"task_data": {"a": one}, "metadata": {"b": [other]}}
        given = {"task_data": submitted.task_data, "metadata": submitted.metadata}
        for codec in (msgspec.msgpack, msgspec.json):
            assert repr(codec.decode(codec.encode(given))) == repr(given) == repr(fields)


@pytest.mark.parametrize("field", ["task_data", "metadata"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        *((text, "64 bits") for text in ("18446744073709551616", "-9223372036854775809", "9" * 400, "9" * 5000)),
        *((text, "1.8e308") for text in ("1e400", "-1e400", "1" + "0" * 400 + ".0")),
    ],
    ids=lambda value: value[:20],
)
def test_a_number_that_is_too_large_is_refused_by_its_path(field: str, number: str, words: str) -> None:
    error = refusal(body(**{field: {"prompt": "x", "a": {"b": [0, 1, 2, "HERE"]}}}).replace(b'"HERE"', number.encode()))
    assert error.message.startswith(f"{field}.a.b[3]: ")
    assert words in error.message
    assert [path for path, _ in error.errors] == [f"{field}.a.b[3]"]


def test_all_that_is_too_large_is_named_in_one_answer() -> None:
    error = refusal(body(task_data={"a": MOST + 1}, metadata={"b": [LEAST - 1], "c": {"d": MOST + 1}}))
    assert [path for path, _ in error.errors] == ["task_data.a", "metadata.b[0]", "metadata.c.d"]


@pytest.mark.parametrize("field", ["task_data", "metadata"])
def test_what_lies_too_deep_is_refused_by_its_path(field: str) -> None:
    decode(body(**{field: {"prompt": "x", "deep": nested(NESTING - 2)}}))
    error = refusal(body(**{field: {"prompt": "x", "deep": nested(NESTING - 1)}}))
    assert error.message.startswith(f"{field}.deep")
    assert str(NESTING) in error.message


@settings(deadline=None)
@given(TEXTS.filter(carried), st.integers(1, 400))
def test_a_path_is_shown_in_a_few_printable_characters(key: str, levels: int) -> None:
    value: Any = [10**30] * 30
    for _ in range(min(levels, NESTING - 4)):
        value = {key * levels: value}
    error = refusal(body(metadata=value if isinstance(value, dict) else {"a": value}))
    assert error.message.isprintable()
    assert len(json.dumps([error.message, error.errors], ensure_ascii=False).encode()) < 1000 + 500 * len(error.errors)
    assert len(error.errors) <= MOST_FAULTS


@pytest.mark.parametrize(
    ("text", "counts"), [("1", 1), ('""', 1), ("null", 1), ("[]", 2), ("{}", 2), ('{"a":1}', 2), ('[[1,"a,[b"],{}]', 6)], ids=ascii
)
def test_a_body_of_too_many_values_is_refused_before_it_is_read(text: str, counts: int) -> None:
    def of(times: int) -> bytes:
        return body(metadata={"a": "HERE"}).replace(b'"HERE"', b"[" + b",".join([text.encode()] * times) + b"]")

    decode(of(ELEMENTS // counts - 10))
    assert str(ELEMENTS) in refusal(of(ELEMENTS // counts + 1)).message


@pytest.mark.parametrize(
    "text", ["," * MIB, '",[{' * (MIB // 5), "\\" * (MIB // 2), '\\,"[' * (MIB // 6), "x" * MIB, "a, b: " * (MIB // 6)], ids=range(6)
)
def test_a_text_of_a_mebibyte_is_one_value_whatever_is_in_it(text: str) -> None:
    empty = body(task_data={"prompt": "x", "a": ""})
    kept = json.dumps(text)[1:-1][: MIB - len(empty)]
    kept = kept[:-1] if (len(kept) - len(kept.rstrip("\\"))) % 2 else kept
    submitted = decode(empty.replace(b'"a": ""', f'"a": "{kept}"'.encode()))
    assert submitted.task_data["a"] == json.loads(f'"{kept}"')


SLOW_NUMBERS = [
    "1.3333333333333333e-300",
    "1.3333333333333333E-0310",
    "4.9406564584124654e-324",
    "1.370000000000000073407310598549573173e+300",
    "1.370000000000000073407310598549573173e300",
    "0." + "0" * 80 + "1" * 17,
    "9007199254740992." + "9" * 60,
]


@pytest.mark.parametrize("number", SLOW_NUMBERS, ids=lambda number: number[:30])
@pytest.mark.parametrize("field", ["task_data", "metadata"])
def test_numbers_that_the_json_library_reads_slowly_are_read_by_another_to_the_same_value(number: str, field: str) -> None:
    def of(times: int) -> bytes:
        return body(**{field: {"prompt": "x", "a": ["HERE"]}}).replace(b'"HERE"', ",".join([number] * times).encode())

    for times in (1, 1 + values.SLOW, values.MOST_SLOW // 5):
        sent = of(times)
        assert getattr(decode(sent), field)["a"] == [float(number)] * times
        assert values.slow(sent) == (times > values.SLOW)
    assert str(values.MOST_SLOW) in refusal(of(values.MOST_SLOW + 1)).message


@pytest.mark.parametrize("text", ["0e" * 10_000, "9" * 5000, "0e-300", '\\" 1e5, 2e5\\\\'], ids=lambda text: text[:9])
def test_texts_that_look_like_such_numbers_stay_what_they_are(text: str) -> None:
    sent = body(metadata={"a": [text] * 30, "b": 0.1})
    assert decode(sent).metadata == {"a": [text] * 30, "b": 0.1}
    assert not values.slow(sent)


@pytest.mark.parametrize("long", ["2." + "3" * 200 + "e-300", "0." + "0" * 307 + "1" * 17], ids=lambda long: long[:9])
def test_many_numbers_of_too_many_characters_are_refused(long: str) -> None:
    few = body(metadata={"a": ["HERE"]}).replace(b'"HERE"', ",".join([long] * 10).encode())
    assert decode(few).metadata == {"a": [float(long)] * 10}
    many = body(metadata={"a": ["HERE"]}).replace(b'"HERE"', ",".join([long] * 250).encode())
    assert str(values.NUMBER_CHARACTERS) in refusal(many).message


@pytest.mark.parametrize("number", ["1e400", "-1e400"])
def test_a_number_that_is_too_large_is_refused_by_its_path_among_many(number: str) -> None:
    sent = body(metadata={"a": ["HERE"]}).replace(b'"HERE"', ",".join([*["1.5e-300"] * 300, number]).encode())
    error = refusal(sent)
    assert [path for path, _ in error.errors] == ["metadata.a[300]"]
    assert "1.8e308" in error.message


def test_all_faults_are_named_whatever_their_kind() -> None:
    fields = b'"project_id": 5, "priority": 7, "task_data": {"a": "\\ud800", "b": NaN}, "metadata": {"a": 1e999}'
    sent = b'{%b, "x": %b%b}' % (fields, b"[" * 70, b"]" * 70)
    paths = [path for path, _ in refusal(sent).errors]
    assert {path for path in paths if not path.startswith("x[")} == {
        *("project_id", "priority", "task_type", "x"),
        *("task_data.a", "task_data.b", "metadata.a"),
    }


@pytest.mark.parametrize("rest", ["?", '"metadata": {"a": ' + "[" * 5000], ids=range(2))
def test_a_body_that_is_no_json_behind_its_first_fault_is_refused_as_such(rest: str) -> None:
    assert refusal(f'{{"project_id": 5, {rest}'.encode()).message.startswith("cannot read the body as JSON: ")


@settings(deadline=None)
@given(VALUES)
def test_the_count_is_never_below_what_the_body_has(value: Any) -> None:
    def count(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + sum(map(count, inner))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "ELEMENTS", count(value) - 2)  # all but the outermost, and one fewer
        if count(value) > 1:
            with pytest.raises(ValidationFailed):
                values.check_elements(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
