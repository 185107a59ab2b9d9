"""Whatever the documents name exists: pages, headings, files, commands, settings, codes, states. Their examples are those of the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import yaml

from movieq.cli import main
from movieq.errors import MovieqError, RequestError, TaskFault
from movieq.fetch.formats import ACCEPTED
from movieq.models import table as models
from movieq.settings import Settings, variable
from movieq.tasks.states import TRANSITIONS
from tests.documents import DOCUMENTS, GUIDES, ROOT, blocks, guide
from tests.log_events import log_events
from workers.child.job import Job

OTHERS = {"MOVIEQ_", "MOVIEQ_URL", "MOVIEQ_API_KEY"}
"""The prefix of all settings, and variables of the Payload example."""
FOLDERS = ("movieq/", "workers/", "tests/", "deploy/")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def pages(*paths: Path) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", paths, ids=lambda path: str(path.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[str]:
    """The commands that a page names: the lines of its console blocks that begin with a prompt, and those in its text."""
    for block in blocks(page):
        if block.language == "console":
            yield from re.findall(r"^\$ (.*?)(?: +#.*)?$", block.text, re.MULTILINE)
    yield from INLINE.findall(prose(page))


def subclasses(cls: type[MovieqError]) -> Iterator[type[MovieqError]]:
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


# ── Links, files and commands ──


@pages(*DOCUMENTS)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not link.startswith(("http://", "https://")) and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert broken == []


@pages(*DOCUMENTS)
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = [text for text in INLINE.findall(prose(page)) if text.startswith(FOLDERS) and " " not in text]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pages(*DOCUMENTS)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match[1] for command in commands(page) if (match := re.match(r"make ([a-z-]+)", command))}
    assert named - targets == set()


@pages(*DOCUMENTS)
def test_every_command_that_is_named_exists_with_its_options(page: Path) -> None:
    for command in commands(page):
        if not re.match(r"movieq [a-z]", command):
            continue
        found: click.Command = main
        words = command.split()[1:]
        while words and isinstance(found, click.Group):
            name = words.pop(0)
            inner = found.commands.get(name)
            assert inner is not None, f"{command}: there is no {name}"
            found = inner
        known = {option for parameter in found.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} - known == set(), command


@pages(*DOCUMENTS)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"MOVIEQ_[A-Z0-9_]*", page.read_text()))
    assert named - {variable(field) for field in Settings.__struct_fields__} - OTHERS == set()


def test_the_compose_file_has_the_services_and_profiles_that_are_named() -> None:
    services = yaml.safe_load((ROOT / "deploy/docker-compose.yml").read_text())["services"]
    named = [command for command in commands(guide("operating")) if command.startswith("docker compose ")]
    assert {name for command in named for name in re.findall(r" run (\S+)", command)} <= services.keys()
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
    assert {name for command in named for name in re.findall(r"--profile (\S+)", command)} == {"gpu"} <= profiles


# ── What the pages repeat of the code ──


def test_the_operating_guide_lists_every_alert() -> None:
    raised = re.findall(r'Alert\("([a-z_]+)"', (ROOT / "movieq/api/queues.py").read_text())
    table = guide("operating").read_text().partition("| alert |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE) == raised


def test_the_page_of_log_events_lists_every_event_with_its_levels_and_fields() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| ([a-z, ]+) \| (.*?) ?\| .+ \|$", guide("log-events").read_text(), re.MULTILINE)
    listed = {event: (set(levels.split(", ")), set(re.findall("`([a-z_]+)`", fields))) for event, levels, fields in rows}
    logged = log_events()
    assert len(rows) == len(listed), "an event is listed twice"
    assert listed.keys() == logged.keys()
    assert {event: levels for event, (levels, _) in listed.items()} == {event: each.levels for event, each in logged.items()}
    assert [(event, field) for event, each in logged.items() for field in each.fields - listed[event][1]] == []
    assert [(event, field) for event, each in logged.items() if not each.open for field in listed[event][1] - each.fields] == []


def test_the_reference_lists_every_error_code_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \|", guide("api").read_text(), re.MULTILINE))
    assert {code: int(status) for code, status in rows.items()} == {each.code: each.status for each in RequestError.__subclasses__()}


def test_the_reference_lists_every_error_code_of_a_task() -> None:
    table = guide("api").read_text().partition("| `error_code` | cause |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)) == {each.code for each in subclasses(TaskFault)}


def test_the_reference_lists_every_format_of_inputs() -> None:
    listed = guide("api").read_text().partition("\n## References\n")[2].partition("\n## ")[0].lower()
    assert [name for names in ACCEPTED.values() for name in re.findall(r"\w+", names.partition("(")[2]) if name not in listed] == []


def test_the_models_page_lists_the_shipped_table() -> None:
    table = guide("models").read_text().partition("## The shipped table")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \| (?:(\d+) GiB|none) \| .*? ?\| (.*?) \|$", table, re.MULTILINE)
    shipped = models.load()
    assert [row[0] for row in rows] == list(shipped)
    for name, tasks, memory, licence in rows[1:]:
        model = shipped[name]
        assert re.findall("`([a-z_]+)`", tasks) == list(model.tasks)
        assert (float(memory), licence) == (model.gpu_memory_gb, model.licence)


def test_the_models_page_explains_every_field_of_an_entry() -> None:
    _, *tables = guide("models").read_text().split("| field | meaning |")
    fields = [
        set(re.findall(r"`([a-z0-9_]+)`", re.sub(r"\|[^|]*\|$", "|", table.partition("\n\n")[0], flags=re.MULTILINE))) for table in tables
    ]
    of_model = set(models.Model.__struct_fields__) - {models.LORAS}  # each LoRA is described by itself
    assert fields == [of_model, set(models.Lora.__struct_fields__)]


def test_the_entries_of_the_models_page_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text("\n".join(block.text for block in blocks(guide("models")) if block.language == "toml"))
    table = models.load(str(tmp_path / "models.toml"))
    assert table["my-sdxl"].gpu_memory_gb == 10
    assert table["flux2-klein-4b"].loras["keeper"].projects == ["lighthouse"]


def test_the_state_diagram_has_the_transitions_of_the_code() -> None:
    (diagram,) = [block.text for block in blocks(ROOT / "ARCHITECTURE.md") if block.language == "mermaid"]
    drawn = re.findall(r"^ +(\w+|\[\*\]) --> (\w+): (\w+)$", diagram, re.MULTILINE)
    assert {(None if start == "[*]" else start, verb, end) for start, end, verb in drawn} == {
        (start and str(start), str(verb), str(end)) for (start, verb), end in TRANSITIONS.items()
    }


def test_the_plug_ins_of_the_guide_are_those_that_the_tests_run() -> None:
    engines = ROOT / "tests/engines"
    shown = [block.text for block in blocks(guide("writing-an-engine")) if block.language in ("toml", "py")]
    run = ["palettes/pyproject.toml", "palettes/movieq_palettes.py", "fields/movieq_fields.py", "fields/movieq_fields_model.py"]
    assert shown == [(engines / name).read_text() for name in run]


def test_the_guide_to_engines_names_members_that_a_job_has() -> None:
    table = guide("writing-an-engine").read_text().partition("| member of the job |")[2].partition("\n\n")[0]
    called = dict(re.findall(r"`(\w+)\(([^)`]*)\)` \|", table))
    assert called.keys() >= {"plan", "step", "check"}
    assert {name: f"({given})" for name, given in called.items()} == {name: _shown_signature(getattr(Job, name)) for name in called}


def _shown_signature(method: Callable[..., None]) -> str:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return f"({', '.join(f'*{each.name}' if each.kind is each.VAR_POSITIONAL else each.name for each in parameters)})"


def test_the_readme_is_about_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 800


def test_every_guide_is_linked_from_the_readme() -> None:
    readme = GUIDES[0].read_text()
    assert [page.name for page in GUIDES[1:] if f"movieq/web/docs/{page.name})" not in readme] == []
