"""Clients that are generated from /openapi.json: generated without a warning, accepted by a strict compiler, used on a running API."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.documents import ROOT, blocks, guide
from tests.programs import missing, node
from tests.service import Service, service

NODE: Final = Path(__file__).with_name("node")
BIN: Final = NODE / "node_modules" / ".bin"
PYTHON: Final = Path(sys.prefix) / "openapi-python-client" / "bin"
"""Where `make test` installs openapi-python-client, whose dependencies conflict with those of the tests."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service without workers."""
    with service(tmp_path_factory.mktemp("clients"), options=["--no-worker"]) as up:
        yield up


def generated(folder: Path, running: Service, path: Path, name: str) -> str:
    """Run the command of the API reference that generates with this program, in a folder; return what it prints."""
    (block,) = [block.text for block in blocks(guide("api")) if block.language == "console" and "openapi.json" in block.text]
    (line,) = [line for line in block.splitlines() if f" {name} " in line]
    command = re.sub(r"^\$ (npx|pipx run) ", "", line).replace("http://127.0.0.1:8001", running.url)
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "NO_COLOR": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def readme_request() -> str:
    """Return the JSON of the request in the README."""
    (text,) = re.findall(r"-d '(\{.*?\})'", (ROOT / "README.md").read_text(), re.DOTALL)
    return str(text)


def compiled(folder: Path, *files: str) -> str:
    """Return what the strict compiler of TypeScript says about these files."""
    shutil.copy(NODE / "package.json", folder)
    compiler = NODE / "node_modules" / "typescript" / "bin" / "tsc"
    options = ["--strict", "--noEmit", "--target", "es2022", "--module", "nodenext", "--allowImportingTsExtensions"]
    command = [node(NODE), str(compiler), *options, "--noUncheckedIndexedAccess", "--exactOptionalPropertyTypes", *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_the_types_of_openapi_typescript_take_the_request_of_the_readme_and_a_webhook(running: Service, folder: Path) -> None:
    node(NODE)
    generated(folder, running, BIN, "openapi-typescript")
    shutil.move(folder / "movieq.d.ts", folder / "api.d.ts")
    shutil.copy(NODE / "client.ts", folder)
    (folder / "request.ts").write_text(f"export const request = {readme_request()} as const;\n")
    assert compiled(folder, "client.ts", "api.d.ts") == ""


def test_orval_generates_a_client_without_a_warning_and_the_compiler_takes_it(running: Service, folder: Path) -> None:
    node(NODE)
    said = generated(folder, running, BIN, "orval")
    assert not re.search(r"warn|error|⚠", said, re.IGNORECASE), said
    text = (folder / "movieq.ts").read_text()
    assert {"submitTask", "getTask", "listWorkers", "uploadFile"} <= set(re.findall(r"^export const (\w+) = async", text, re.MULTILINE))
    assert compiled(folder, "movieq.ts") == ""


PROGRAM: Final = """
import json
import os
import sys

from movieq_api import AuthenticatedClient
from movieq_api.api.tasks import get_task, submit_task
from movieq_api.models import SubmitGenerateVideo

client = AuthenticatedClient(base_url=os.environ["URL"], token=os.environ["KEY"], raise_on_unexpected_status=True)
receipt = submit_task.sync(client=client, body=SubmitGenerateVideo.from_dict(json.load(sys.stdin)))
state = get_task.sync(receipt.task_id, client=client, wait=0)
print(state.status, state.task_id == receipt.task_id, state.result)
"""


def test_openapi_python_client_generates_a_client_without_a_warning_which_submits_a_task(running: Service, folder: Path) -> None:
    if not (PYTHON / "openapi-python-client").exists():
        missing("openapi-python-client (run make test)")
    assert "warning" not in generated(folder, running, PYTHON, "openapi-python-client").lower()
    environment = {**os.environ, "URL": running.url, "KEY": running.key, "PYTHONPATH": str(folder)}
    command: list[str | Path] = [PYTHON / "python", "-c", PROGRAM]
    done = subprocess.run(command, input=readme_request(), cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["queued", "True", "None"]
