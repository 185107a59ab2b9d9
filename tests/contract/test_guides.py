"""The guides, run as written on one service: every command succeeds, and every answer has the shape shown below it."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from jsonschema import Draft202012Validator
from standardwebhooks import Webhook

from tests.contract.client import schema
from tests.documents import GUIDES, blocks, guide
from tests.programs import program
from tests.service import Service, receiver, service

MARK = "--- end of block ---"
OF_THE_HEARTBEAT = (".status", ".current_task_id", ".idle_gap", ".models")
"""Fields of a worker's row that depend on when its last heartbeat was: perhaps before its engine served, or during a task."""
NEW, OLD, OTHER = ("whsec_" + base64.b64encode(secret).decode() for secret in (b"new" * 8, b"old" * 8, b"other" * 8))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service that rotates the secret of its webhooks."""
    with service(tmp_path_factory.mktemp("guides"), MOVIEQ_WEBHOOK_SECRET=f"{NEW},{OLD}") as up:
        yield up


def with_language(*languages: str) -> list[Path]:
    """Return the guides that have blocks in one of these languages."""
    return [page for page in GUIDES if any(block.language in languages for block in blocks(page))]


def named(page: Path) -> str:
    return page.stem


# ── Commands ──


def walk(page: Path) -> list[tuple[str, str]]:
    """Return each block of commands with the answer shown below it, or ""."""
    found: list[tuple[str, str]] = []
    before = ""
    for block in blocks(page):
        if block.language == "sh":
            found.append((block.text, ""))
        elif before == "sh" and block.language in ("json", "text"):
            found[-1] = found[-1][0], block.text
        before = block.language
    return found


def answers(folder: Path, page: Path, url: str, key: str) -> list[str]:
    """Run the blocks one after the other in one shell, with `URL` and `KEY` of this service; return what each prints."""
    setting = f"URL={url}\nKEY={key}\n"
    script = f"set -eu\n{setting}" + "".join(f"{text}\necho; echo '{MARK}'\n" for text, _ in walk(page))
    script = re.sub(r"^URL=.*\nKEY=.*\n", lambda _: setting, script, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [part.strip() for part in done.stdout.split(f"{MARK}\n")[:-1]]


def same_shape(shown: Any, real: Any, where: str) -> None:
    """Assert the same keys and types everywhere; texts without digits (states, messages, names) must be equal."""
    if ".workers[" in where and where.endswith(OF_THE_HEARTBEAT):
        return
    assert type(shown) is type(real) or {type(shown), type(real)} <= {int, float}, f"{where}: {real!r}, the guide shows {shown!r}"
    if isinstance(shown, dict):
        assert shown.keys() == real.keys(), f"{where}: {sorted(shown.keys() ^ real.keys())}"
        for key in shown:
            same_shape(shown[key], real[key], f"{where}.{key}")
    elif isinstance(shown, list):
        for number, (left, right) in enumerate(zip(shown, real, strict=True)):
            same_shape(left, right, f"{where}[{number}]")
    elif isinstance(shown, str) and not re.search(r"\d", shown + real) and not where.endswith((".host", ".upload_id", ".url")):
        assert shown == real, where


@pytest.mark.parametrize("page", with_language("sh"), ids=named)
def test_the_commands_run_as_written_and_answer_as_shown(page: Path, running: Service, tmp_path: Path) -> None:
    real = answers(tmp_path, page, running.url, running.key)
    for number, ((_, expected), answer) in enumerate(zip(walk(page), real, strict=True)):
        if expected.startswith("{"):
            same_shape(json.loads(expected), json.loads(answer), f"answer {number}")
        elif expected:
            assert expected.strip() == answer
    clips = [path for path in tmp_path.iterdir() if path.suffix == ".mp4"]
    assert len(clips) == (page.stem in ("README", "getting-started"))
    assert all(clip.stat().st_size > 10_000 for clip in clips)


@pytest.mark.parametrize("page", with_language("python"), ids=named)
def test_the_programs_in_python_run_as_written(page: Path, running: Service) -> None:
    (program,) = [block.text for block in blocks(page) if block.language == "python"]
    environment = {**os.environ, "URL": running.url, "KEY": running.key}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[0] == "completed"


# ── JSON ──


@pytest.mark.parametrize("page", with_language("json"), ids=named)
async def test_every_example_in_json_is_an_answer_or_fits_its_schema(page: Path, running: Service) -> None:
    schemas = (await document(running))["components"]["schemas"]
    before = ""
    for block in blocks(page):
        if block.language == "json" and before != "sh":
            assert block.schema, f"what is this an example of? {block.text[:100]}"
            example = json.loads(block.text)
            schema = {"$ref": f"#/components/schemas/{block.schema}", "components": {"schemas": schemas}}
            assert [error.message for error in Draft202012Validator(schema).iter_errors(example)] == []
            if "properties" in schemas[block.schema]:  # else it allows no others
                assert example.keys() <= schemas[block.schema]["properties"].keys()
        before = block.language


async def document(running: Service) -> dict[str, Any]:
    """Return /openapi.json."""
    async with aiohttp.ClientSession() as session, session.get(f"{running.url}/openapi.json") as answer:
        return dict(await answer.json())


# ── The reference and the API ──


def rows(heading: str) -> dict[str, str]:
    """Return field -> default of the table in the API reference whose header begins with this word."""
    table = guide("api").read_text().partition(f"| `{heading}` | default |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `([a-z_]+)` \| (.*?) ?\| ", table, re.MULTILINE))


async def test_the_reference_lists_every_field_of_task_data_with_its_default(running: Service) -> None:
    _, answer = await running.call("GET", "/task-types")
    assert len(answer["task_types"]) == 4
    for each in answer["task_types"]:
        shown = rows("all types") | rows(each["task_type"])
        fields = properties(each["task_data"])
        assert shown.keys() == fields.keys(), each["task_type"]
        for name, field in fields.items():
            if field.get("default") not in (None, []):
                assert shown[name] == json.dumps(field["default"]).strip('"'), name


def properties(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a JSON Schema whose root may be a reference."""
    if "$ref" in schema:
        schema = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    return dict(schema["properties"])


async def test_the_pages_name_every_field_of_every_answer_and_event(running: Service) -> None:
    schemas = (await document(running))["components"]["schemas"]
    unnamed = set()
    events = ("ProcessingProgress", "Snapshot", "ProjectSnapshot", "Retrying", "Preview", "Gap", "Goodbye")
    for name, each in schemas.items():
        page = guide({"Webhook": "cms"}.get(name, "events" if name in events else "api"))
        text = page.read_text() + (guide("api").read_text() if page.stem == "events" else "")
        unnamed |= {f"{name}.{field}" for field in each.get("properties", {}) if not re.search(rf"[`\"]{field}[`\"]", text)}
    assert unnamed == set()


async def test_the_reference_lists_the_routes_of_the_api_and_no_others(running: Service) -> None:
    routes = {
        f"{method.upper()} {path.removeprefix('/api/v1')}" for path, item in (await document(running))["paths"].items() for method in item
    }
    shown = set(re.findall(r"`((?:GET|POST|DELETE|PATCH|PUT) /[^ `?]*)`", guide("api").read_text()))
    assert shown - {"GET /openapi.json", "GET /movieq.js", "GET /movieq.d.ts", "GET /media/..."} == routes


@pytest.mark.parametrize("page", GUIDES, ids=named)
async def test_every_route_that_a_guide_names_exists(page: Path, running: Service) -> None:
    routes = {
        f"{method.upper()} {path.removeprefix('/api/v1')}" for path, item in (await document(running))["paths"].items() for method in item
    }
    shown = re.findall(r"`((?:GET|POST|DELETE|PATCH|PUT) /[^ `?]*)`", page.read_text())
    others = ("GET /openapi.json", "GET /movieq", "GET /media")
    assert {each.replace("/api/v1", "") for each in shown if not each.startswith(others)} - routes == set()


# ── Webhooks ──


async def test_the_verifications_of_a_webhook_accept_a_real_one_and_refuse_what_was_changed(running: Service, tmp_path: Path) -> None:
    data = {"prompt": "a gull", "duration": 1, "resolution": "64x64"}
    async with receiver() as hook:
        await running.submit("generate_video", data, callback_url=hook.url, metadata={"scene_id": "Škoda 🎬"})
        ((sent, raw),) = await hook.wait_for(1)
    headers, body = {name.lower(): value for name, value in sent.items()}, raw.decode()
    (example,) = [json.loads(block.text) for block in blocks(guide("cms")) if block.schema == "Webhook"]
    assert json.loads(body).keys() == example.keys()
    schema("Webhook").validate(json.loads(body))

    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    late = {
        "webhook-id": headers["webhook-id"],
        "webhook-timestamp": str(int(an_hour_ago.timestamp())),
        "webhook-signature": Webhook(NEW).sign(headers["webhook-id"], an_hour_ago, body),
    }
    cases = [(NEW, headers, body), (OLD, headers, body), (OTHER, headers, body), (NEW, headers, body.replace("completed", "cancelled"))]
    cases += [(NEW, {**headers, "webhook-id": "another"}, body), (NEW, late, body), (NEW, {**headers, "webhook-signature": ""}, body)]
    expected = [True, True, False, False, False, False, False]
    assert [in_python(*case) for case in cases] == expected
    assert in_node(tmp_path, cases) == expected


def in_python(secret: str, headers: dict[str, str], body: str) -> bool:
    """Whether the guide's function in Python accepts a webhook."""
    (text,) = [block.text for block in blocks(guide("cms")) if block.language == "py"]
    names: dict[str, Any] = {}
    exec(text, names)
    try:
        return bool(names["verify_webhook"](headers, body.encode(), secret) == json.loads(body))
    except ValueError:
        return False


def in_node(folder: Path, cases: list[tuple[str, dict[str, str], str]]) -> list[bool]:
    """Whether the guide's function in Node accepts each webhook."""
    (text,) = [block.text for block in blocks(guide("cms")) if block.language == "js"]
    (folder / "verify.mjs").write_text(text)
    (folder / "ask.mjs").write_text("""
        import { readFileSync } from "node:fs";
        import { verifyWebhook } from "./verify.mjs";
        const accepted = ([secret, headers, body]) => {
          try {
            return verifyWebhook(headers, Buffer.from(body), secret).task_id === JSON.parse(body).task_id;
          } catch {
            return false;
          }
        };
        console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(accepted)));
    """)
    command = [program("node", "nodejs"), str(folder / "ask.mjs")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=True, timeout=60)
    return list(json.loads(done.stdout))
