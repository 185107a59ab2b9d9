"""The rules of the house that a machine can check: who may import whom, what ships, and that docs, settings and version agree."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import movieq
from movieq.settings import Settings, variable
from workers.child import camera, figure, grade, puppet, sound, speech

ROOT = Path(movieq.__file__).parents[1]
LEAVES = ["errors", "params", "contracts", "settings", "models", "plugins", "logs", "signing"]
ADAPTERS: dict[str, set[str]] = {
    "store": {"arq", "redis", "line"},
    "line": {"redis", "hiredis"},
    "channels": {"redis"},
    "events": {"redis", "store", "channels"},
    "storage": {"s3"},
    "s3": {"aiobotocore", "aiohttp", "botocore", "storage", "types_aiobotocore_s3"},
    "fetch": {"aiohttp", "PIL", "yarl"},
    "webhooks": {"aiohttp"},
    "payload": {"aiohttp", "yarl"},
    "weights": {"huggingface_hub"},
    "credentials": {"c2pa", "cryptography"},
}


def modules(folder: str) -> Iterator[Path]:
    yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of every import of a file, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def ours(path: Path) -> set[str]:
    """The rooms of movieq that a file imports from."""
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("movieq.")}
    return {room for room in rooms if (ROOT / "movieq" / room).exists() or (ROOT / f"movieq/{room}.py").exists()}


def test_the_vocabulary_imports_downwards_only() -> None:
    allowed: set[str] = set()
    for name in LEAVES:
        assert ours(ROOT / f"movieq/{name}.py") <= allowed, name
        allowed.add(name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_imports_the_vocabulary_and_its_one_library_only(name: str) -> None:
    third_party = (
        {full.split(".")[0] for full in imports(ROOT / f"movieq/{name}.py")} - set(sys.stdlib_module_names) - {"movieq", "msgspec"}
    )
    others = ours(ROOT / f"movieq/{name}.py") - set(LEAVES)
    assert third_party | others <= ADAPTERS[name]


def test_movieq_never_imports_workers_but_to_start_one() -> None:
    for path in modules("movieq"):
        if path.name != "cli.py":
            assert not any(name.split(".")[0] == "workers" for name in imports(path)), path


def test_workers_never_import_the_api_or_the_command() -> None:
    for path in modules("workers"):
        assert not any(name.startswith(("movieq.api", "movieq.cli", "movieq.client")) for name in imports(path)), path


def test_torch_lives_in_the_child_alone() -> None:
    for path in [*modules("movieq"), *modules("workers")]:
        heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "diffusers", "transformers"}
        assert not heavy or (ROOT / "workers/child") in path.parents, path


def test_the_child_knows_neither_asyncio_nor_redis() -> None:
    for path in modules("workers/child"):
        assert not {name.split(".")[0] for name in imports(path)} & {"asyncio", "redis", "arq", "aiohttp"}, path


def test_nobody_imports_the_child() -> None:
    for path in [*modules("movieq"), *modules("workers")]:
        if (ROOT / "workers/child") not in path.parents:
            assert not any(name.startswith("workers.child") for name in imports(path)), path


def test_importing_the_worker_brings_no_torch() -> None:
    code = "import sys, workers.main, movieq.cli, movieq.api.app; sys.exit(bool({'torch', 'diffusers', 'av'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def described() -> dict[str, tuple[str, str]]:
    """Every setting: its default as text, and its sentence."""
    found = {}
    for field in msgspec.structs.fields(Settings):
        info = msgspec.inspect.type_info(field.type)
        sentence = info.extra_json_schema["description"] if isinstance(info, msgspec.inspect.Metadata) and info.extra_json_schema else ""
        found[variable(field.name)] = (str(field.default), sentence)
    return found


def test_the_example_file_lists_every_setting_with_its_default_and_sentence() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    listed = {}
    for comment, line in itertools.pairwise(lines):
        if match := re.fullmatch(r"#(MOVIEQ_[A-Z0-9_]+)=(.*)", line):
            listed[match[1]] = (match[2], comment.removeprefix("# "))
    assert listed == described()


def test_the_readme_lists_every_setting_with_its_default_and_sentence() -> None:
    rows = re.findall(r"^\| `(MOVIEQ_[A-Z0-9_]+)` \| (.*?) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name: (default.strip("`"), sentence) for name, default, sentence in rows} == described()


def test_the_changelog_speaks_of_this_version() -> None:
    assert f"## {movieq.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_lists_every_word_that_the_animatic_knows() -> None:
    rows = dict(re.findall(r"^\| (`[a-z_`, ]+`) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    listed = {name: [word.strip() for word in re.split("[,;]", words)] for name, words in rows.items()}
    assert listed["`camera_angle`"] == [*camera.MOVES, *camera.FRAMINGS]
    assert listed["`lighting`"] == [*grade.GRADES]
    assert listed["`audio_cues`, `background_noise`"] == [*sound.SOUNDS]
    assert listed["`pace`, `emotion`"] == [*speech.PACES, *speech.EMOTIONS]
    assert listed["`pose`"] == [*figure.POSES]
    assert listed["`motion`"] == [*puppet.MOTIONS]
