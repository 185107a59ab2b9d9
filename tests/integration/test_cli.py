"""The `movieq` command as a user runs it in a terminal: real processes, a real `movieq up`, and their output."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner
from PIL import Image

from movieq import cli
from movieq.api import server as serving
from movieq.local.embedded import Valkey
from movieq.queue.queries import Queries
from movieq.queue.store import Budget, Store
from tests.arrange import raw
from tests.arrange import running as claimed
from tests.fleet import KEY, fleet, python_path
from tests.service import Service, service

LONG = json.dumps({"prompt": "a long way up the stairs", "duration": 30, "fps": 60})
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a `movieq up`, with its key where a command in its folder looks for it."""
    folder = tmp_path_factory.mktemp("up")
    with service(folder, MOVIEQ_DRAIN_S="0") as running:
        (folder / ".movieq").symlink_to("data")
        Image.new("RGB", (320, 180), (90, 110, 140)).save(folder / "frame.jpg")
        yield running


def environment(**settings: str) -> dict[str, str]:
    """Return the environment with only these settings."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")}, **settings}


async def movieq(*arguments: str, folder: Path, stdin: str = "", **settings: str) -> tuple[int, str, str]:
    """Run a command to its end; return its exit code and both outputs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "movieq.cli", *arguments,
        cwd=folder, env=environment(**settings), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_submit_with_watch_ends_with_the_address_of_the_result(up: Service) -> None:
    code, out, err = await movieq(
        "submit", "generate_image", "--project", "pilot", "--image", "frame.jpg", "--set", "prompt=a keeper, \"grey\"",
        "--set", "resolution=256x256", "--set", "seed=7", "--set", "mood=calm", "--priority", "high", "--draft", "--watch", "--url", up.url,
        folder=up.folder,
    )  # fmt: skip
    assert (code, "Unknown field ignored: task_data.mood" in err) == (0, True), err
    task_id, url = out.split()
    assert UUID.fullmatch(task_id)
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert (answer.status, answer.content_type) == (200, "image/jpeg")
    _, status = await up.call("GET", f"/tasks/{task_id}/status")
    assert (status["project_id"], status["result"]["metadata"]["seed"]) == ("pilot", 7)
    assert re.search(r"generate_image +100%  completed", err)


async def test_what_was_ignored_is_told_once_when_a_task_is_submitted_and_when_it_is_watched(up: Service) -> None:
    unread, unknown = "warning: Unknown field ignored: task_data.mood", "warning: lighting 'glowworms' is not known"
    code, out, err = await movieq(
        "submit", "generate_image", "--project", "pilot", "--set", "prompt=a keeper", "--set", "mood=calm", "--set", "lighting=glowworms",
        "--set", "resolution=64x64", "--watch", "--url", up.url,
        folder=up.folder,
    )  # fmt: skip
    assert (code, err.count(unread), err.count(unknown)) == (0, 1, 1), err
    code, _, err = await movieq("watch", out.split()[0], "--url", up.url, folder=up.folder)
    assert (code, err.count(unread), err.count(unknown)) == (0, 1, 1), err


async def test_all_faults_of_a_submit_are_printed(up: Service) -> None:
    code, _, err = await movieq(
        "submit", "generate_video", "--project", "pilot", "--set", "duration=long", "--set", "fps=0", "--url", up.url, folder=up.folder
    )
    assert code == 1
    assert [line.partition(": ")[0] for line in err.removeprefix("Error: ").splitlines()] == [
        *("task_data.duration", "task_data.fps", "task_data.scene_description")
    ]


async def test_task_data_comes_from_a_file_or_from_standard_input(up: Service) -> None:
    (up.folder / "lamp.json").write_text('{"prompt": "a lamp", "duration": 900}')
    for data in ("@lamp.json", "-"):
        code, _, err = await movieq(
            "submit", "generate_video", "--project", "pilot", "--data", data, folder=up.folder, MOVIEQ_PUBLIC_URL=up.url,
            stdin='{"prompt": "a lamp", "duration": 900}',
        )  # fmt: skip
        assert (code, "task_data.duration" in err) == (1, True), err  # it arrived, and was refused for what it says


async def test_a_task_that_fails_ends_with_1_and_says_why(up: Service) -> None:
    code, out, err = await movieq(
        "submit", "generate_video", "--project", "pilot", "--set", 'storyboard_images=["upload:never"]', "--watch", "--url", up.url,
        folder=up.folder,
    )  # fmt: skip
    assert (code, len(out.split())) == (1, 1)
    assert "upload:never" in err
    assert "input_unavailable" in err


async def test_watch_outlives_the_api_and_ctrl_c_leaves_the_task_running(up: Service) -> None:
    task_id = await up.submit("generate_video", json.loads(LONG))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "movieq.cli", "watch", task_id, "--url", up.url,
        cwd=up.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"rendering video" not in await process.stderr.readline():
            pass
        up.find("api")[0].kill()
        assert b"the server is unavailable" in await process.stderr.readline()
        assert b"rendering video" in await process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = (await process.communicate())[1].decode()
    assert process.returncode == 130
    assert f"movieq watch {task_id} --url {up.url}" in said
    assert f"movieq cancel {task_id} --url {up.url}" in said
    assert (await up.call("GET", f"/tasks/{task_id}/status"))[1]["status"] == "processing"

    code, out, _ = await movieq("cancel", task_id, "--url", up.url, folder=up.folder)
    assert (code, "was cancelled" in out) == (0, True)
    code, out, err = await movieq("watch", task_id, "--url", up.url, folder=up.folder)
    assert (code, out, err.split()[-1]) == (1, "", "cancelled")


async def test_a_terminal_gets_a_live_bar(up: Service) -> None:
    task_id = await up.submit("generate_image", {"prompt": "a lamp", "resolution": "64x64"})
    leader, follower = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "movieq.cli", "watch", task_id, "--url", up.url,
        cwd=up.folder, env=environment(TERM="xterm-256color", COLUMNS="100"), stdout=subprocess.PIPE, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    async with asyncio.timeout(60):
        await process.communicate()
    shown = os.read(leader, 1_000_000).decode()
    os.close(leader)
    assert process.returncode == 0
    assert "━" * 30 in shown
    assert "100 %" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


async def test_without_a_server_or_a_key_the_command_says_what_is_missing(folder: Path) -> None:
    with closing(serving.listen("127.0.0.1", 0)) as sock:
        nowhere = serving.address(sock)
    task_id = "123e4567-e89b-12d3-a456-426614174000"
    (code, _, err), (keyless, _, why) = await asyncio.gather(
        movieq("watch", task_id, "--url", nowhere, "--key", "a-key-of-the-tests", folder=folder),
        movieq("watch", task_id, folder=folder),
    )
    assert (code, nowhere in err, "Traceback" in err) == (1, True, False)
    assert (keyless, "--key" in why, "MOVIEQ_API_KEYS" in why) == (1, True, True)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["submit", "evaluate_department", "--project", "p"], "generate_video"),
        (["submit", "generate_image"], "--project"),
        (["submit", "generate_image", "--project", "p", "--data", "[1]"], "object"),
        (["submit", "generate_image", "--project", "p", "--data", "{"], "--data"),
        (["submit", "generate_image", "--project", "p", "--data", "@/nothing.json"], "/nothing.json"),
        (["submit", "generate_image", "--project", "p", "--set", "prompt"], "NAME=VALUE"),
        (["submit", "process_audio", "--project", "p", "--image", "a.png"], "takes no images"),
        (["submit", "generate_image", "--project", "p", "--priority", "4"], "normal"),
    ],
)
def test_a_wrong_use_is_explained(arguments: list[str], word: str) -> None:
    outcome = CliRunner().invoke(cli.main, arguments)
    assert (outcome.exit_code, word in outcome.output) == (2, True), outcome.output


@pytest.mark.parametrize("command", ["submit", "watch", "cancel", "deliveries", "dead", "dead list", "dead retry", "dead drop"])
def test_help_teaches_by_example(command: str) -> None:
    assert re.search(rf"^ +movieq {command} \S", CliRunner().invoke(cli.main, [*command.split(), "--help"]).output, re.MULTILINE)


def test_every_command_has_a_sentence() -> None:
    for name, command in cli.main.commands.items():
        assert command.help, name


# ── dead letters ──


async def test_dead_letters_are_listed_with_how_they_died_and_retried_or_dropped(folder: Path) -> None:
    async with fleet(folder) as installation:
        api = await installation.api()
        ids = []
        for _ in range(2):
            task_id, run = await claimed(installation.store)
            await installation.store.requeue(
                task_id, run, Budget.DEATHS, 1, 0, "killed\n\x1b[2J", "worker_lost", exit_code=-9, stage="frames"
            )
            ids.append(task_id)

        async def dead(*arguments: str) -> tuple[int, str, str]:
            return await movieq("dead", *arguments, folder=folder, MOVIEQ_API_KEYS=KEY, MOVIEQ_PUBLIC_URL=api.url)

        code, out, err = await dead("list")
        assert (code, err) == (0, "")
        for task_id in ids:
            assert re.search(
                rf"^{task_id}  film  generate_image  20\d\d-\d\d-\d\d [\d:]+ UTC\n"
                r".*killed\\n\\u001b\[2J, attempt 1\n.*frames, exit code -9\n"
                r".*\{\"prompt\":\"a lighthouse\"\}$",
                out,
                re.MULTILINE,
            ), out
        code, out, err = await dead("list", "--limit", "1")
        assert (code, out.count("exit code"), "1 of 2" in err) == (0, 1, True)

        code, out, _ = await dead("retry", ids[0])
        assert (code, out) == (0, f"{ids[0]}: queued again, position 1\n")
        code, out, err = await dead("drop", ids[0], ids[1])  # the first is one no longer
        assert (code, out) == (1, f"{ids[1]}: dropped\n")
        assert f"{ids[0]}: " in err
        assert await Queries(installation.store.redis).dead_letters() == ([], 0)
        assert [(await api.call("GET", f"/tasks/{task_id}/status"))[1]["status"] for task_id in ids] == ["queued", "failed"]
        code, out, err = await dead("list")
        assert (code, out, err) == (0, "", "no dead letters\n")


# ── doctor ──


def marked(out: str) -> dict[str, str]:
    """Return subject -> mark of doctor's output."""
    return {match[2].strip(): match[1] for match in re.finditer(r"^ (.) (.{13}) ", out, re.MULTILINE)}


async def test_doctor_finds_nothing_broken_in_a_good_installation(server: Valkey, folder: Path) -> None:
    with closing(serving.listen("127.0.0.1", 0)) as sock:
        nowhere = serving.address(sock)
    code, out, err = await movieq(
        "doctor", folder=folder, MOVIEQ_REDIS_URL=server.url, MOVIEQ_API_KEYS="a-key-of-the-tests", MOVIEQ_PUBLIC_URL=nowhere,
        MOVIEQ_WEBHOOK_SECRET="whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", MOVIEQ_STORRAGE="media",
    )  # fmt: skip
    marks = marked(out)
    assert (code, err) == (0, ""), out
    assert [line for line in out.splitlines() if not re.match(" [✓!] .{13} ", line)] == [], "a line that is no finding"
    assert {subject for subject, mark in marks.items() if mark == "!"} == {"settings", "API"}
    assert {
        "Redis",
        "Redis memory",
        "Redis disk",
        "storage",
        "models",
        "speech",
        "GPU",
        "PyAV",
        "Pillow",
        "API keys",
    } <= marks.keys()
    assert "did you mean MOVIEQ_STORAGE?" in out
    assert "a-key-of-the-tests" not in out


async def test_doctor_names_everything_that_is_broken(folder: Path) -> None:
    (folder / "file").write_text("")
    (folder / "models.toml").write_text("[lamp]\nengine = 'candle'\n")
    code, out, _ = await movieq(
        "doctor", folder=folder, MOVIEQ_REDIS_URL="redis://127.0.0.1:1/0", MOVIEQ_STORAGE=str(folder / "file" / "media"),
        MOVIEQ_MODELS="models.toml", MOVIEQ_DEVICES="cuda:9",
        MOVIEQ_SPOOL=str(folder / "file" / "spool"), MOVIEQ_C2PA_REQUIRED="true",
    )  # fmt: skip
    assert code == 1
    assert {subject for subject, mark in marked(out).items() if mark == "✗"} == {
        "Redis",
        "storage",
        "models",
        "signatures",
        "devices",
        "spool",
    }, out


async def test_doctor_says_which_models_are_here_and_what_is_wrong_with_them(folder: Path) -> None:
    (folder / "weights").mkdir()
    table = (
        '[lamp]\nengine = "diffusers"\nkind = "gpu_medium"\ntasks = { generate_image = 1 }\npipeline = "FluxPipeline"\n'
        f'weights = {{ repository = "{folder / "weights"}" }}\n'
    )
    (folder / "models.toml").write_text(table)
    _, out, _ = await movieq("doctor", folder=folder, MOVIEQ_MODELS="models.toml", HF_HOME=str(folder / "hub"))
    assert "here: animatic, lamp; `movieq models pull NAME` downloads z-image-turbo" in " ".join(out.split())
    (folder / "weights").rmdir()
    code, out, _ = await movieq("doctor", folder=folder, MOVIEQ_MODELS="models.toml", HF_HOME=str(folder / "hub"))
    assert (code, marked(out)["models"]) == (1, "✗")
    assert "lamp: the folder" in " ".join(out.split())


@pytest.mark.parametrize(
    ("torch", "mark", "said"),
    [
        ("2.13.0+cu130", "✓", "NVIDIA H100 80GB HBM3; torch 2.13.0+cu130"),
        ("2.13.0+cpu", "✗", "torch 2.13.0+cpu, which cannot use a GPU"),
    ],
)
async def test_doctor_says_whether_the_gpu_of_this_machine_can_be_used(folder: Path, torch: str, mark: str, said: str) -> None:
    site = folder / "site"
    (site / "torch-0.dist-info").mkdir(parents=True)
    (site / "torch-0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    (site / "pynvml.py").write_text(  # as NVIDIA's, of a machine with one card
        "class NVMLError(Exception): pass\nnvmlInit = lambda: None\nnvmlDeviceGetCount = lambda: 1\n"
        "nvmlDeviceGetHandleByIndex = lambda number: number\nnvmlDeviceGetName = lambda handle: 'NVIDIA H100 80GB HBM3'\n"
    )
    _, out, _ = await movieq("doctor", folder=folder, PYTHONPATH=python_path(site))
    assert marked(out)["GPU"] == mark, out
    assert said in " ".join(out.split())


async def test_a_worker_that_must_sign_and_cannot_does_not_start(server: Valkey, folder: Path) -> None:
    needed = {"MOVIEQ_REDIS_URL": server.url, "MOVIEQ_PUBLIC_URL": "http://127.0.0.1:1", "MOVIEQ_C2PA_REQUIRED": "true"}
    code, _, err = await movieq("worker", folder=folder, **needed)
    assert (code, "MOVIEQ_C2PA_REQUIRED is set: name a certificate" in err) == (1, True), err


async def test_doctor_speaks_of_a_setting_that_cannot_be_read(folder: Path) -> None:
    (folder / ".env").write_text("MOVIEQ_CPU_SLOTS=many\n")
    code, out, _ = await movieq("doctor", folder=folder)
    assert (code, "MOVIEQ_CPU_SLOTS" in out) == (1, True)


async def test_doctor_warns_of_a_redis_that_forgets(server: Valkey, store: Store, folder: Path) -> None:
    await raw(store).config_set("maxmemory-policy", "allkeys-lru")
    await raw(store).config_set("appendonly", "no")
    try:
        code, out, _ = await movieq("doctor", folder=folder, MOVIEQ_REDIS_URL=server.url)
    finally:
        await raw(store).config_set("appendonly", "yes")
        await raw(store).config_set("maxmemory-policy", "noeviction")
    marks = marked(out)
    assert (code, marks["Redis memory"], marks["Redis disk"]) == (1, "✗", "!")


async def test_doctor_asks_the_api_that_runs(up: Service) -> None:
    code, out, _ = await movieq("doctor", folder=up.folder, MOVIEQ_PUBLIC_URL=up.url)
    assert (code, marked(out)["API"]) == (0, "✓"), out
    assert f"at {up.url} (MOVIEQ_PUBLIC_URL) is healthy: Redis connected, 1 workers" in out
