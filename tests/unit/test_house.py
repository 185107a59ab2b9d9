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
from workers.child.animatic import camera, cutout, espeak, grade, mannequin
from workers.child.media import ambience

ROOT = Path(movieq.__file__).parents[1]
ROOMS: list[set[str]] = [
    {"errors", "backoff", "pdeathsig"},
    {"tasks"},
    {"settings"},
    {"logs", "signing", "credentials"},
    {"models", "fetch", "gpus"},
    {"plugins", "storage", "delivery"},
    {"queue"},
    {"streams", "assembly", "checks", "client"},
    {"api", "workers"},
    {"local"},
    {"cli"},
]
"""The rooms of movieq, and the worker's, from the ground up: each imports from those before its own line alone."""
WINGS: list[set[str]] = [{"job", "words"}, {"media", "takes"}, {"animatic", "diffusion", "probe"}, {"__main__"}]
"""The same of the engine process, workers/child."""
LIBRARIES: dict[str, set[str]] = {
    "movieq/queue": {"arq", "redis", "hiredis"},
    "movieq/streams": {"redis"},
    "movieq/storage/base.py": set(),
    "movieq/storage/folder.py": set(),
    "movieq/storage/open.py": set(),
    "movieq/storage/s3.py": {"aiobotocore", "aiohttp", "botocore", "types_aiobotocore_s3"},
    "movieq/fetch": {"aiohttp", "PIL", "yarl"},
    "movieq/delivery": {"aiohttp", "yarl"},
    "movieq/models": {"huggingface_hub"},
    "movieq/credentials.py": {"c2pa", "cryptography"},
    "movieq/tasks": set(),
    "movieq/errors.py": set(),
    "movieq/signing.py": set(),
    "movieq/plugins.py": set(),
}
"""Which libraries a room may know, beside the standard one and msgspec."""


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


def every_module() -> dict[str, Path]:
    """Each module of movieq and workers by its dotted name."""
    found = {}
    for path in [*modules("movieq"), *modules("workers")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> dict[str, set[str]]:
    """For each module those that it imports; a package's face counts where the package itself is imported."""
    every = every_module()
    return {name: {each for each in imports(path) if each in every and each != name} for name, path in every.items()}


def room(module: str) -> str:
    head, _, rest = module.partition(".")
    return head if head == "workers" else rest.partition(".")[0]


def wing(module: str) -> str:
    return module.removeprefix("workers.child.").partition(".")[0]


def back_arrows(found: dict[str, set[str]]) -> list[str]:
    """Every import that does not lead down."""
    rank = {name: number for number, names in enumerate(ROOMS) for name in names}
    depth = {name: number for number, names in enumerate(WINGS) for name in names}
    wrong = []
    for module, others in found.items():
        for other in others:
            if "." not in module or "." not in other:  # the faces of the two packages: the version
                continue
            if (module, room(other)) == ("movieq.cli.serve", "workers"):
                continue
            inside = module.startswith("workers.child.") and other.startswith("workers.child.")
            ranks, of = (depth, wing) if inside else (rank, room)
            if of(module) != of(other) and ranks[of(other)] >= ranks[of(module)]:
                wrong.append(f"{module} -> {other}")
    return wrong


def circles(found: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Every set of modules that import one another in a circle."""
    reach: dict[str, set[str]] = {}
    for module in found:
        seen: set[str] = set()
        ahead = [module]
        while ahead:
            for other in found[ahead.pop()] - seen:
                seen.add(other)
                ahead.append(other)
        reach[module] = seen
    return sorted({tuple(sorted(b for b in reach[a] if a in reach[b])) for a in found if a in reach[a]})


def test_imports_lead_down() -> None:
    assert not back_arrows(arrows())


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert not circles(arrows())


def test_a_back_arrow_and_a_circle_are_found() -> None:
    assert back_arrows({"movieq.tasks.states": {"movieq.queue.store"}, "movieq.queue.store": set()})
    assert back_arrows({"workers.child.media.encode": {"workers.child.animatic.engine"}, "workers.child.animatic.engine": set()})
    assert circles({"movieq.a": {"movieq.b"}, "movieq.b": {"movieq.c"}, "movieq.c": {"movieq.a"}, "movieq.d": {"movieq.a"}})


def test_every_room_has_its_place() -> None:
    listed = set().union(*ROOMS)
    assert {room(name) for name in every_module() if "." in name} == listed
    assert {wing(name) for name in every_module() if name.startswith("workers.child.")} == set().union(*WINGS)


@pytest.mark.parametrize("place", LIBRARIES)
def test_a_room_knows_its_libraries_alone(place: str) -> None:
    files = [ROOT / place] if place.endswith(".py") else list(modules(place))
    for path in files:
        third_party = {full.split(".")[0] for full in imports(path)} - set(sys.stdlib_module_names) - {"movieq", "msgspec"}
        assert third_party <= LIBRARIES[place], path


def test_movieq_never_imports_workers_but_in_commands_that_render() -> None:
    for path in modules("movieq"):
        if path not in (ROOT / "movieq/cli/serve.py", ROOT / "movieq/cli/models.py"):
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
    code = "import sys, workers.app, movieq.cli, movieq.api.app; sys.exit(bool({'torch', 'diffusers', 'av'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def described() -> dict[str, tuple[str, str]]:
    """Every setting: its default as text, and its sentence."""
    found = {}
    for field in msgspec.structs.fields(Settings):
        sentence = next(each.description for each in field.type.__metadata__ if isinstance(each, msgspec.Meta))
        # a list is empty unless it is set
        found[variable(field.name)] = ("" if field.default in ((), msgspec.NODEFAULT) else str(field.default), str(sentence))
    return found


def test_the_example_file_lists_every_setting_with_its_default_and_sentence() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    listed = {}
    for comment, line in itertools.pairwise(lines):
        if match := re.fullmatch(r"#(MOVIEQ_[A-Z0-9_]+)=(.*)", line):
            listed[match[1]] = (match[2], comment.removeprefix("# "))
    assert listed == described()


def test_the_settings_page_lists_every_setting_with_its_default_and_sentence() -> None:
    rows = re.findall(r"^\| `(MOVIEQ_[A-Z0-9_]+)` \| (.*?) \| (.*) \|$", (ROOT / "movieq/web/docs/settings.md").read_text(), re.MULTILINE)
    assert {name: (default.strip("`"), sentence) for name, default, sentence in rows} == described()


def test_the_changelog_speaks_of_this_version() -> None:
    assert f"## {movieq.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_words_page_lists_every_word_that_the_animatic_knows() -> None:
    rows = dict(re.findall(r"^\| (`[a-z_`, ]+`) \| (.*) \|$", (ROOT / "movieq/web/docs/animatic-words.md").read_text(), re.MULTILINE))
    listed = {name: [word.strip() for word in re.split("[,;]", words)] for name, words in rows.items()}
    assert listed["`camera_angle`"] == [*camera.MOVES, *camera.FRAMINGS]
    assert listed["`lighting`"] == [*grade.GRADES]
    assert listed["`audio_cues`, `background_noise`"] == [*ambience.SOUNDS]
    assert listed["`pace`, `emotion`"] == [*espeak.PACES, *espeak.EMOTIONS]
    assert listed["`pose`"] == [*mannequin.POSES]
    assert listed["`motion`"] == [*cutout.MOTIONS]
