"""The JSON Schemas of the API's bodies, made from the Structs that it decodes and encodes, with the examples of the guides.

They are written for code generators. The `default` of an optional field is inside its `anyOf` and not beside it: generators take a field
with a `default` beside its schema as always present.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from movieq.tasks import params
from movieq.tasks.entities import ProcessingProgress
from movieq.tasks.registry import REGISTRY
from movieq.tasks.states import EventType, TaskId
from movieq.tasks.wire import (
    Deadline,
    ErrorAnswer,
    Gap,
    Goodbye,
    Preview,
    ProjectSnapshot,
    Retrying,
    Snapshot,
    SubmitRequest,
    Webhook,
)

Struct = type[msgspec.Struct]
Json = dict[str, Any]

_DATA: Final[dict[EventType, Struct]] = {
    **dict.fromkeys(EventType, ProcessingProgress),
    EventType.RETRYING: Retrying,
    EventType.PREVIEW: Preview,
    EventType.GAP: Gap,
    EventType.GOODBYE: Goodbye,
}
"""The data of each event. That of a `snapshot` depends on the stream."""
_STREAMS: Final[dict[str, Struct]] = {"TaskEvent": Snapshot, "ProjectEvent": ProjectSnapshot}
_FORMATS: Final[dict[Any, str]] = {datetime: "date-time", TaskId: "uuid"}
_REQUESTS: Final[tuple[Struct, ...]] = (SubmitRequest, Deadline, params.Params, params.LoraUse)
_SPARSE: Final[tuple[Struct, ...]] = (ErrorAnswer, Webhook, ProcessingProgress, Gap, Goodbye)
"""Answers that may lack the fields that have defaults. All others have all their fields."""
_NOTHING: Final[dict[str, Json]] = {
    **{name: {"pattern": r"^\s*$"} for name in ("scene_description", "character_description", "text", "prompt")},
    **{name: {"maxItems": 0} for name in ("storyboard_images", "reference_images")},
    "style_guide": {"type": "null"},
}
"""The fields of task_data of which at least one must have content, each with the schema of its empty values."""
_EVEN: Final = "(6[468]|[78][02468]|9[02468]|[1-9][0-9][02468]|[12][0-9]{2}[02468]|3[0-7][0-9][02468]|38[0-3][02468]|3840)"
_SPOKEN: Final = "|".join("".join(f"[{letter}{letter.upper()}]" for letter in language) for language in sorted(params.LANGUAGES))
_NO_NUL: Final = r"^[^\x00]*$"
_PATTERNS: Final = {
    "resolution": rf"^{_EVEN}x{_EVEN}(?!\n)$",
    "language": rf"^({_SPOKEN})([-_][^\x00]*)?$",
    "text": r"^[^\x00]*[^\s\x00][^\x00]*$",
}
"""What `movieq.tasks.params` checks by hand, so that an error can say more than a pattern. Other texts have no NUL."""
_GUIDES: Final = Path(__file__).parents[1] / "web" / "docs"
_EXAMPLE: Final = re.compile(r"^<!-- (\w+) -->\n```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SUBMITTED: Final = re.compile(r"/tasks/submit .*? -d '(\{.*?\})'", re.DOTALL)


def ref(name: str) -> Json:
    """Return a reference to a schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def schemas(answers: Iterable[Struct], errors: dict[str, set[str]]) -> dict[str, Json]:
    """Return the schemas of these answers, of submits, the webhook and events, and of errors, given as the codes by the name of each."""
    roots: set[Struct] = {*answers, SubmitRequest, ErrorAnswer, Webhook, *_DATA.values(), *_STREAMS.values()}
    roots |= {spec.params for spec in REGISTRY.tasks.values()}
    structs = sorted(_reached(roots), key=lambda struct: struct.__name__)
    refs, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    names = {struct: found["$ref"].rpartition("/")[2] for struct, found in zip(structs, refs, strict=True)}  # longer for equal names
    for struct, name in names.items():
        _finish(struct, components[name])
    for each in components.values():
        each["description"] = inspect.cleandoc(each.get("description", ""))
        if "enum" in each:
            each["type"] = "string"
        _simplify(each)
    examples = _examples()
    for name in examples.keys() & components.keys():
        components[name]["examples"] = examples[name]
    submit = components["SubmitRequest"]
    variants = {task_type: f"Submit{task_type.title().replace('_', '')}" for task_type in REGISTRY.tasks}
    for task_type, spec in REGISTRY.tasks.items():
        components[variants[task_type]] = {
            **submit,
            "title": variants[task_type],
            "description": f"{spec.description[:1].upper()}{spec.description[1:]}",
            "properties": {
                **submit["properties"],
                "task_type": {"type": "string", "const": task_type},
                "task_data": ref(names[spec.params]),
            },
            "examples": [each for each in examples["SubmitRequest"] if each["task_type"] == task_type],
        }
    components["SubmitRequest"] = {
        "title": "SubmitRequest",
        "description": submit["description"],
        "oneOf": [ref(name) for name in variants.values()],
        "discriminator": {"propertyName": "task_type", "mapping": {key: ref(name)["$ref"] for key, name in variants.items()}},
    }
    base = components["ErrorAnswer"]
    for name, codes in errors.items():
        code = {"type": "string", "enum": sorted(codes)}
        components[name] = {**base, "title": name, "properties": {**base["properties"], "error": code}}
    return dict(sorted({**components, **{name: _stream(name) for name in _STREAMS}}.items()))


def _stream(name: str) -> Json:
    """Return the schema of an event of a stream as it is sent."""
    kinds: dict[str, list[EventType]] = {}
    for kind, struct in {**_DATA, EventType.SNAPSHOT: _STREAMS[name]}.items():
        kinds.setdefault(struct.__name__, []).append(kind)
    data = {struct: {"type": "string", "contentMediaType": "application/json", "contentSchema": ref(struct)} for struct in kinds}
    found = "; ".join(f"{', '.join(f'`{each}`' for each in kinds[struct])}: `{struct}`" for struct in kinds)
    return {
        "title": name,
        "description": f"A server-sent event. Its `data` is JSON, whose schema depends on `event`. {found}.",
        "oneOf": [
            {
                "type": "object",
                "properties": {"event": {"type": "string", "enum": each}, "id": {"type": "string"}, "data": data[struct]},
                "required": ["event", "data"],
            }
            for struct, each in kinds.items()
        ],
    }


def _reached(structs: Iterable[Struct]) -> set[Struct]:
    """Return the Structs and those that their fields hold, at any depth."""
    found: set[Struct] = set()
    left = [*structs]
    while left:
        struct = left.pop()
        if struct not in found:
            found.add(struct)
            left += [part for field in msgspec.structs.fields(struct) for part in _parts(field.type) if _is_struct(part)]
    return found


def _is_struct(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, msgspec.Struct)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield the type and all types inside it."""
    yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _finish(struct: Struct, schema: Json) -> None:
    """Complete the schema of a Struct: formats, which fields are optional, and for parameters what no single field says."""
    fields = schema["properties"]
    for field in msgspec.structs.fields(struct):
        name, parts = field.encode_name, {part for part in _parts(field.type) if getattr(part, "__hash__", None)}
        for kind, text in _FORMATS.items():
            if kind in parts:
                for each in fields[name].get("anyOf", [fields[name]]):
                    if each.get("type") == "string":
                        each["format"] = text
        if struct.__module__ == params.__name__:
            _restrict(fields[name], _PATTERNS.get(name))
        fields[name] = _optional(fields[name]) if issubclass(struct, _REQUESTS) and not field.required else fields[name]
        fields[name].pop("default", None)
    if not issubclass(struct, (*_REQUESTS, *_SPARSE)):
        schema["required"] = [*fields]
    if issubclass(struct, params.Params):
        schema["additionalProperties"] = True
        if struct.__module__ == params.__name__:  # a plug-in's may have other rules
            schema["not"] = {"properties": {name: nothing for name, nothing in _NOTHING.items() if name in fields}}


def _restrict(schema: Any, pattern: str | None) -> None:
    """Give the texts in a schema a pattern, by default one that forbids NUL."""
    if isinstance(schema, list):
        for inner in schema:
            _restrict(inner, pattern)
    elif isinstance(schema, dict):
        if schema.get("type") == "string" and (pattern or not {"pattern", "enum"} & schema.keys()):
            schema["pattern"] = pattern or _NO_NUL
        for name in {"anyOf", "items"} & schema.keys():
            _restrict(schema[name], pattern)


def _optional(schema: Json) -> Json:
    """Return the schema of a field that may be null, with its default inside."""
    default = schema.pop("default", None)
    description = {"description": schema.pop("description")} if "description" in schema else {}
    kinds = schema.get("anyOf", [schema])
    if default:
        kinds[0] = {**kinds[0], "default": default}
    return {**description, "anyOf": [*kinds, *([] if {"type": "null"} in kinds else [{"type": "null"}])]}


def _simplify(schema: Any) -> None:
    """Allow any properties in objects that declare none, and write a nullable simple value as a list of types, at any depth."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and not {"properties", "additionalProperties"} & schema.keys():
            schema["additionalProperties"] = True
        match schema.get("anyOf"):
            case [{"type": "string" | "integer" | "number" | "boolean" as kind, **rest}, {"type": "null"}] if (
                not {"enum", "default"} & rest.keys()
            ):
                del schema["anyOf"]
                schema |= {**rest, "type": [kind, "null"]}
        for inner in schema.values():
            _simplify(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _simplify(inner)


@cache
def _examples() -> dict[str, list[Json]]:
    """Return schema -> the examples in the guides: JSON below the name of its schema, and the requests of the first steps."""
    found: dict[str, list[Json]] = {}
    for page in sorted(_GUIDES.glob("*.md")):
        for name, example in _EXAMPLE.findall(page.read_text("utf-8")):
            found.setdefault(name, []).append(json.loads(example))
    first = (_GUIDES / "getting-started.md").read_text("utf-8")
    found["SubmitRequest"] += [json.loads(body) for body in _SUBMITTED.findall(first)]
    return found
