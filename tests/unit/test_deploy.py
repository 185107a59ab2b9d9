"""The files of deploy/: what linters say of them, that they agree with the settings, and that the health checks tell the truth."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from asyncio.subprocess import DEVNULL
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from movieq import __version__, settings
from movieq.local.up import API_STOP_S, WORKER_STOP_S
from tests import nginx
from tests.fleet import eventually, fleet, free_port
from workers.worker import GONE_S

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
DOCKERFILES: Final = sorted(DEPLOY.glob("Dockerfile.*"))
COMPOSE: Final = DEPLOY / "docker-compose.yml"
UNITS: Final = sorted(DEPLOY.glob("*.service"))
WORKERS: Final = ("worker", "worker-cpu")


def has_compose() -> bool:
    """Whether the client of docker is here, with its compose."""
    return shutil.which("docker") is not None and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


def tool(name: str) -> str:
    """The path of a program of the test environment."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is missing: make setup-test"
    return found


def services() -> dict[str, Any]:
    """The services of the compose file, anchors resolved."""
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def said(command: list[str]) -> str:
    """What a check complains of, empty where it does not."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say_of_a_dockerfile(path: Path, folder: Path) -> None:
    assert said([tool("hadolint"), "--failure-threshold", "info", str(path)]) == ""
    (folder / "Dockerfile").write_text(path.read_text().replace("USER 10001", "USER root"))
    assert "DL3002" in said([tool("hadolint"), "--failure-threshold", "info", str(folder / "Dockerfile")])


def test_the_compose_file_is_one_by_the_schema_of_the_compose_spec(folder: Path) -> None:
    check = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    assert said([*check, str(COMPOSE)]) == ""
    (folder / "wrong.yml").write_text(COMPOSE.read_text().replace("stop_grace_period: 15s", "stop_grace: 15s"))
    assert "stop_grace" in said([*check, str(folder / "wrong.yml")])


@pytest.mark.skipif(not has_compose(), reason="there is no docker client with compose")
def test_the_client_of_docker_takes_the_compose_file(folder: Path) -> None:
    shutil.copytree(DEPLOY, folder / "deploy", ignore=shutil.ignore_patterns("payload"))
    (folder / "deploy" / "movieq.env").touch()
    assert said(["docker", "compose", "-f", str(folder / "deploy" / COMPOSE.name), "--profile", "gpu", "config", "--quiet"]) == ""


def test_nginx_takes_its_configuration_for_one_process_and_for_three(folder: Path) -> None:
    for count in (1, 3):
        check = [*nginx.command(folder / str(count), free_port(), *range(8001, 8001 + count)), "-t"]
        assert said(check) == ""
    site = folder / "3" / "site.conf"
    site.write_text(site.read_text().replace("max_fails=0", "max_fail=0"))
    assert "max_fail" in said(check)


def test_nginx_forgives_each_process_its_restart() -> None:
    servers = re.findall(r"^ +(?:# )?server ([^{;]+);", nginx.SITE.read_text(), re.MULTILINE)
    assert len(servers) == 2, "it shows how a second one is named"
    assert all(server.endswith(" max_fails=0") for server in servers), servers


def test_who_is_stopped_has_the_time_to_drain() -> None:
    """Less, and a worker is killed while it hands back what it runs."""
    for name in WORKERS:
        service = services()[name]
        assert seconds(service["stop_grace_period"]) >= float(service["environment"]["MOVIEQ_DRAIN_S"]) + WORKER_STOP_S
    assert seconds(services()["api"]["stop_grace_period"]) >= API_STOP_S
    unit = (DEPLOY / "movieq-worker.service").read_text()
    (drain,), (stop,) = re.findall(r"MOVIEQ_DRAIN_S=(\d+)", unit), re.findall(r"^TimeoutStopSec=(\d+)", unit, re.MULTILINE)
    assert float(stop) >= float(drain) + WORKER_STOP_S
    assert WORKER_STOP_S > GONE_S
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)", (DEPLOY / "movieq-api.service").read_text(), re.MULTILINE)
    assert float(stop) >= API_STOP_S


def test_what_they_set_are_settings() -> None:
    for path in [*DOCKERFILES, COMPOSE, *UNITS]:
        named = set(re.findall(r"\bMOVIEQ_[A-Z_]+", path.read_text()))
        assert named or path.name == "movieq-api.service"
        assert settings.unknown(dict.fromkeys(named, ""), ROOT / "none") == {}, path.name


def test_nothing_runs_as_root_or_without_a_health_check_and_the_queue_forgets_nothing() -> None:
    for path in DOCKERFILES:
        final = path.read_text().split("\nFROM ")[-1]
        assert "\nUSER 10001\n" in final
        assert "\nHEALTHCHECK " in final
    queue = services()["queue"]
    assert {"--appendonly", "noeviction"} <= set(queue["command"])
    assert "valkey-cli" in queue["healthcheck"]["test"]
    for name in ("api", *WORKERS):
        assert services()[name]["depends_on"]["queue"]["condition"] == "service_healthy"
        assert services()[name]["env_file"] == ["movieq.env"]


def test_torch_is_pinned_and_no_weights_are_in_the_image() -> None:
    text = (DEPLOY / "Dockerfile.worker").read_text()
    assert "--constraint constraints.txt torch" in text
    assert re.search(r"^torch==[0-9.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert "models pull" not in "".join(line for line in text.splitlines() if not line.startswith("#"))
    assert "models:/models" in services()["worker"]["volumes"]


async def test_the_health_checks_say_whether_who_they_ask_serves(folder: Path) -> None:
    async with fleet(folder / "fleet") as installation:
        api = await installation.api()

        async def healthy(argument: str) -> bool:
            command = [sys.executable, str(DEPLOY / "health.py"), argument]
            process = await asyncio.create_subprocess_exec(
                *command, env={"MOVIEQ_REDIS_URL": installation.valkey.url}, cwd=folder, stderr=DEVNULL
            )
            return await asyncio.wait_for(process.wait(), 60) == 0

        live, ready = f"{api.url}/health/live", f"{api.url}/health/ready"
        assert [await healthy(each) for each in (live, ready, "worker")] == [True, False, False]
        await installation.worker()
        assert [await healthy(each) for each in (live, ready, "worker")] == [True, True, True]
        installation.valkey.stop()

        async def noticed() -> bool:  # the checks are reused for a second
            return [await healthy(each) for each in (live, ready, "worker")] == [True, False, False]

        await eventually(noticed)


def test_the_image_of_the_api_is_restarted_for_nothing_that_a_restart_would_not_mend() -> None:
    assert re.search(r"^HEALTHCHECK .*/health/live\"\]$", (DEPLOY / "Dockerfile.api").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_the_steps_of_the_image_of_the_api_work_on_what_its_context_lets_through(folder: Path) -> None:
    """The RUN and COPY lines of its first stage, without a container: what .dockerignore keeps out is not there."""
    context, source, target = folder / "context", folder / "src", folder / "movieq"
    source.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            (context / line[1:]).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / line[1:]).is_dir() else shutil.copy
            copy(ROOT / line[1:], context / line[1:])
    stage = (DEPLOY / "Dockerfile.api").read_text().split("\nFROM ")[1]
    for line in stage.splitlines():
        verb, _, rest = line.replace("/opt/movieq", str(target)).partition(" ")
        if verb == "RUN":
            subprocess.run(rest, shell=True, cwd=source, check=True, timeout=400)
        elif verb == "COPY":
            *names, to = rest.split()
            for name in names:
                if (context / name).is_dir():
                    shutil.copytree(context / name, source / to)
                else:
                    shutil.copy(context / name, source / to)
    done = subprocess.run([target / "bin" / "movieq", "--version"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith(__version__)
    assert list(target.glob("lib/*/site-packages/movieq/queue/lua/claim.lua"))
