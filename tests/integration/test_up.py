"""`movieq up` when it cannot start, and when it is ended from outside."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from movieq.errors import SettingsError
from movieq.local import up as local
from movieq.local.embedded import Valkey
from movieq.settings import Settings
from tests.fleet import eventually, free_port, python_path
from tests.service import service


def up(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a `movieq up` that is expected to end by itself."""
    environment = {**{name: value for name, value in os.environ.items() if not name.startswith("MOVIEQ_")}, **settings}
    command = [sys.executable, "-m", "movieq.cli", "up", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = up(tmp_path, "--port", str(port))
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr
    assert "--port" in ended.stderr


def test_a_second_up_in_one_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with service(tmp_path) as first:
        ended = up(tmp_path, "--port", "0", "--data", str(tmp_path / "data"))
        assert ended.returncode == 1
        assert "another movieq uses" in ended.stderr
        assert first.process.poll() is None
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(Valkey(tmp_path / "data").socket))  # its Valkey still takes connections


@pytest.mark.parametrize("folder", ["/proc/movieq", "/dev/null/movieq"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, folder: str) -> None:
    ended = up(tmp_path, "--port", "0", "--data", folder)
    assert ended.returncode == 1
    assert folder in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MOVIEQ_API_KEYS", "short", "key 1 must be 16 or more"),
        ("MOVIEQ_CPU_SLOTS", "many", "MOVIEQ_CPU_SLOTS"),
        ("MOVIEQ_ALLOW_PRIVATE_URLS", "everything", "MOVIEQ_ALLOW_PRIVATE_URLS"),
        ("MOVIEQ_STORAGE", "s3://bucket", "MOVIEQ_STORAGE"),
        ("MOVIEQ_REDIS_URL", "http://x", "MOVIEQ_REDIS_URL"),
        ("MOVIEQ_WEBHOOK_SECRET", "whsec_nonsense", "MOVIEQ_WEBHOOK_SECRET"),
        ("MOVIEQ_MODELS", "/nowhere.toml", "MOVIEQ_MODELS"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_starts(tmp_path: Path, name: str, value: str, said: str) -> None:
    ended = up(tmp_path, "--port", "0", **{name: value})
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "movieq ready" not in ended.stdout


def test_ctrl_c_stops_everything_in_order(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        end = time.monotonic() + 60
        while len(started := psutil.Process(running.process.pid).children(recursive=True)) < 4:  # Valkey, the API, the worker and its child
            assert time.monotonic() < end, started
            time.sleep(0.01)
        os.kill(running.process.pid, signal.SIGINT)
        running.process.wait(30)
        assert running.process.returncode == 0
        assert not any(process.is_running() for process in started)
        assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_kill_9_of_up_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "movieq.cli", "up", "--port", "0"]
    environment = {**os.environ, "MOVIEQ_DRAIN_S": "0"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("movieq ready"):
        assert process.poll() is None
    process.stdout.close()
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started):
        assert time.monotonic() < end, started
        time.sleep(0.05)
    with service(tmp_path, data=tmp_path / ".movieq"):
        pass  # the folder is free again


def test_the_socket_of_a_data_folder_has_one_place_which_must_be_this_users_own(tmp_path: Path) -> None:
    server = Valkey(tmp_path / "data")
    assert server.socket == Valkey(tmp_path / "." / "data").socket != Valkey(tmp_path / "other").socket
    place = server.socket.parent
    others: list[Callable[[], object]] = [lambda: place.mkdir(mode=0o755), place.touch]
    for arrange in others:
        arrange()
        with pytest.raises(SettingsError, match="not a folder that only this user can access"):
            server.start()
        server.stop()
    place.unlink()
    server.start()
    server.stop()
    assert not place.exists()


async def test_it_works_in_a_folder_that_holds_packages_of_the_same_names(tmp_path: Path) -> None:
    for name in ("movieq", "workers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not the package that was meant')\n")
    with service(tmp_path) as running:
        ended = await running.ended(await running.submit("process_audio", {"text": "The lamp."}))
        ended = await running.ended(await running.submit("generate_image", {"prompt": "a lamp", "resolution": "64x64"}))
    assert ended["status"] == "completed", ended
    assert ended["status"] == "completed" or ended["error_code"] == "engine_unavailable", ended  # without the extra `speech`
    log = (tmp_path / "log").read_text()
    assert "process_died" not in log
    assert "child_failed" not in log


@pytest.mark.parametrize("name", ["api", "worker"])
def test_it_gives_up_where_a_process_does_not_start_and_says_why(tmp_path: Path, name: str) -> None:
    broken = f"import os, sys\nif {name!r} in sys.orig_argv:\n    os.write(2, b'a library is missing here\\n')\n    os._exit(3)\n"
    (tmp_path / "sitecustomize.py").write_text(broken)  # of every Python process that is started, before anything else
    ended = up(tmp_path, "--port", "0", PYTHONPATH=python_path(tmp_path))
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last == f"Error: the {name} cannot start: it ended 5 times in a row, last with exit code 3: a library is missing here"
    assert ended.stderr.count("process_died") == 4
    with service(tmp_path, data=tmp_path / ".movieq"):
        pass  # it has stopped all that it started


async def test_what_has_been_ready_is_started_again_however_often_it_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "RESTART_S", (0.01, 0.01))
    port = free_port()
    running = asyncio.create_task(local.up(Settings(), host="127.0.0.1", port=port, folder=tmp_path / "data", worker=False))
    async with asyncio.timeout(100):
        for _ in range(local.STARTS + 1):
            await alive(port, running)
            (api,) = [each for each in psutil.Process().children() if "api" in each.cmdline()]
            api.kill()
            await asyncio.to_thread(api.wait)
        await alive(port, running)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def alive(port: int, running: asyncio.Task[None]) -> None:
    """Wait until the API at this port answers."""
    async with aiohttp.ClientSession() as session:
        while True:
            assert not running.done(), running
            try:
                async with session.get(f"http://127.0.0.1:{port}/health/live") as answer:
                    assert answer.status == 200
                    return
            except aiohttp.ClientError:  # it was killed with the connection in hand, or does not listen yet
                await asyncio.sleep(0.01)


async def test_what_was_ready_once_is_started_again_though_it_now_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, starts = tmp_path / "broken", tmp_path / "starts"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nif 'api' in sys.orig_argv and os.path.exists({str(broken)!r}):\n"
        f"    open({str(starts)!r}, 'a').write('x')\n    os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    monkeypatch.setattr(local, "RESTART_S", (0.01, 0.01))
    port = free_port()
    running = asyncio.create_task(local.up(Settings(), host="127.0.0.1", port=port, folder=tmp_path / "data", worker=False))
    await asyncio.wait_for(alive(port, running), 60)
    broken.touch()
    (api,) = [each for each in psutil.Process().children() if "api" in each.cmdline()]
    api.kill()
    await eventually(lambda: running.done() or (starts.exists() and starts.stat().st_size > local.STARTS + 1))
    assert not running.done(), running
    broken.unlink()
    await asyncio.wait_for(alive(port, running), 60)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_its_files_are_for_its_user_and_its_engines_get_no_credentials_of_other_software(tmp_path: Path) -> None:
    with service(tmp_path, AWS_SECRET_ACCESS_KEY="secret", HF_TOKEN="secret", OMP_NUM_THREADS="1") as running:
        await running.ended(await running.submit("generate_image", {"prompt": "a lamp", "resolution": "64x64"}))
        (child,) = running.find("workers.child")
        names = child.environ()
        files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
        shared = [path for path in (tmp_path / "data", *files) if path.lstat().st_mode & 0o077]
    assert shared == []
    assert {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MOVIEQ_REDIS_URL"} & names.keys() == set()
    assert {"PATH", "OMP_NUM_THREADS"} <= names.keys()


async def test_it_warns_of_a_data_folder_that_others_can_read(tmp_path: Path) -> None:
    data = tmp_path / "data"
    warnings = []
    for mode in (0o755, 0o700):
        data.mkdir(exist_ok=True)
        data.chmod(mode)
        with service(tmp_path, options=("--no-worker",)) as running:
            warnings.append([line["problem"] for line in running.log if line["message"] == "data_folder_open"])
    assert ["chmod -R go=" in problem for problem in warnings[0]] == [True]
    assert warnings[1] == []


async def test_only_on_loopback_may_inputs_and_callbacks_reach_this_machine(tmp_path: Path) -> None:
    body = {"project_id": "film", "task_type": "generate_image", "task_data": {"prompt": "a lamp", "resolution": "64x64"}}
    answers = []
    for host in ("127.0.0.1", "0.0.0.0"):  # of the test
        with service(tmp_path, options=("--host", host)) as running:
            answers.append(await running.call("POST", "/tasks/submit", json={**body, "callback_url": "http://127.0.0.1:9/hook"}))
    assert [status for status, _ in answers] == [201, 400]
    assert "MOVIEQ_ALLOW_PRIVATE_URLS" in answers[1][1]["message"]


def test_what_a_killed_server_left_in_the_temporary_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(prefix="mq"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    try:
        dead, young, living = (Valkey(tmp_path / name) for name in ("dead", "young", "living"))
        for server in (dead, young, living):
            server.start()
        dead.kill()
        young.kill()
        for server in (dead, living):
            os.utime(server.socket.parent, (0, 0))
        other = Valkey(tmp_path / "other")
        other.start()
        assert [server.socket.parent.exists() for server in (dead, young, living, other)] == [False, True, True, True]
        for server in (dead, young, living, other):
            server.stop()
    finally:
        shutil.rmtree(short)
