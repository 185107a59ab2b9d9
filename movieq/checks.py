"""Checks of the machine, Redis and the settings. `movieq api`, `worker` and `up` run them at start, `movieq doctor` at any time.

Each check returns a `Finding`: what is wrong and what to do. A problem that would lose tasks, or that cannot go away by itself, prevents
the start. A temporary problem, such as full memory, is only logged. The checks that only doctor runs (CMS, bucket, API) are in its module.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

import msgspec
from arq.constants import in_progress_key_prefix, job_key_prefix, result_key_prefix, retry_key_prefix
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    ResponseError,
)

from movieq import gpus as gpu
from movieq import logs, settings
from movieq.errors import SettingsError, causes
from movieq.queue.connection import Redis, connect
from movieq.queue.keys import CHANNELS, keys
from movieq.queue.refusals import REDIS_AWAY, Refusal, is_fault, refusal
from movieq.settings import Bucket, Settings, variable

CHECK_S: Final = 10.0
"""Longest time that a check of Redis may take."""
REDIS_S: Final = 10.0
"""How long a starting process waits for Redis."""
AGAIN_S: Final = 0.2
"""Wait between two tries to reach Redis."""
ANSWER_S: Final = 3.0
"""Longest wait for a connection or an answer."""
LOW_BYTES: Final = 2 * 1024**3
FULL_BYTES: Final = 100 * 1024**2
"""Free disk space below which a folder gets a warning, and below which it counts as full."""
SKEW_S: Final = 2.0
"""Largest difference between the clocks of this machine and of Redis that is not reported."""
KEPT_MS: Final = 10_000
"""How long a key written by a check exists."""
LEAST_REDIS: Final = (7, 0)
"""The first Redis version that supports scripts with flags (`#!lua`)."""
ACL_LINE: Final = "the guide Operating (movieq/web/docs/operating.md) has the ACL line"
MAXMEMORY: Final = "run CONFIG SET maxmemory with about three quarters of it, and set the same in its configuration file"
NOEVICTION: Final = "run CONFIG SET maxmemory-policy noeviction, and set the same in its configuration file"

_FSYNC: Final = {
    "always": "every write is on disk before it is answered",
    "everysec": "a crash of its machine can lose the last second",
    "no": "a crash of its machine can lose the last 30 seconds",
}
"""Consequences of each value of appendfsync."""

_WRITE: Final = "#!lua\nreturn redis.call('SET', ARGV[1], 'check', 'PX', ARGV[2])"
"""A script that writes as movieq's scripts do: without KEYS, and refused while memory is full."""

COMMANDS: Final = """
    ping, time, eval x 0, evalsha 0 0, exists KEY, del KEY:gone, get KEY, set KEY:gone x xx, setex KEY:gone 0 x, psetex KEY:gone 0 x,
    incr KEY, incrby KEY 1, expire KEY:gone 1, pexpire KEY:gone 1, persist KEY:gone, strlen KEY:gone,
    hget KEY:gone x, hgetall KEY:gone, hmget KEY:gone x, hexists KEY:gone x, hset KEY x x, hsetnx KEY x x, hdel KEY:gone x,
    hincrby KEY:gone x x, hincrbyfloat KEY:gone x x,
    lpush KEY x, rpush KEY x, lrange KEY:gone 0 0, ltrim KEY:gone 0 0, sadd KEY x, srem KEY:gone x, spop KEY:gone, smembers KEY:gone,
    sismember KEY:gone x, unlink KEY:gone,
    zadd KEY:gone xx 0 x, zincrby KEY:gone x x, zrem KEY:gone x, zremrangebyscore KEY:gone 0 0, zcard KEY:gone, zcount KEY:gone 0 0,
    zscore KEY:gone x, zmscore KEY:gone x, zrank KEY:gone x, zrange KEY:gone 0 0, zrevrange KEY:gone 0 0, zrangebyscore KEY:gone 0 0,
    zinter 1 KEY:gone, xadd KEY:gone nomkstream * x x, xrange KEY:gone - +, xinfo|stream KEY:gone, pubsub|numsub x,
    publish CHANNEL x, watch KEY, unwatch, multi, exec, subscribe CHANNEL, unsubscribe CHANNEL
"""
"""Every command that movieq and arq use, in a form that changes nothing: KEY holds a string, KEY:gone does not exist."""

log = logs.get()


class Mark(StrEnum):
    """The result of a check: good, a note, or broken."""

    GOOD = "✓"
    NOTE = "!"
    BROKEN = "✗"


class Finding(msgspec.Struct, frozen=True):
    """The result of a check. `text` describes it and, unless it is good, says what to do. `refuses`: the process must not start."""

    mark: Mark
    subject: str
    text: str
    refuses: bool = False


class Started(msgspec.Struct, frozen=True):
    """The settings with which the latest API or worker process started. `settings` maps a name to salted hashes of its parts, in order."""

    host: str
    at_ms: int
    settings: dict[str, list[str]]


async def start(read: Settings, process: str, *, works: bool) -> None:
    """Check the requirements of `process` ("api", "worker" or "up"), and log problems. Raises SettingsError if it must not start.

    `works`: the process is a worker or starts one.
    """
    found = [gpus(read), await asyncio.to_thread(spool, read)] if works else []
    if isinstance(read.storage, Path) and process != "up":  # processes wait for an unavailable storage
        found.append(msgspec.structs.replace(await asyncio.to_thread(storage, read.storage), refuses=False))
    if read.redis_url or process != "up":
        await reached(read)
        found += await server(read, process)
    if refused := [f"{finding.subject}: {finding.text}" for finding in found if finding.refuses]:
        raise SettingsError("; ".join(refused))
    for finding in found:
        if finding.mark is not Mark.GOOD and process != "up":  # its api and its worker say the same
            log.log(ERROR if finding.mark is Mark.BROKEN else WARNING, "check_failed", subject=finding.subject, problem=finding.text)


# ── This machine ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def unknown() -> list[Finding]:
    """Find variables in the environment and `.env` that look like settings but are not. Raises SettingsError if `.env` is unreadable."""
    return [Finding(Mark.NOTE, "settings", text) for text in settings.unknown().values()]


def gpus(read: Settings) -> Finding:
    """Check that this machine has the GPUs of MOVIEQ_DEVICES."""
    try:
        found = gpu.devices(read.devices)
    except SettingsError as error:
        return Finding(Mark.BROKEN, "devices", error.message, refuses=True)
    if not found and read.devices == "auto" and (problem := gpu.problem()) is not None:
        return Finding(Mark.NOTE, "devices", f"a worker here uses the CPU: {problem}")
    return Finding(Mark.GOOD, "devices", f"a worker here uses {', '.join(each.name for each in found) or 'the CPU'}")


def spool(read: Settings) -> Finding:
    """Check that a worker can write to its working folder."""
    return folder(Path(read.spool) if read.spool else Path(tempfile.gettempdir()), "spool", variable("spool"))


def storage(path: Path) -> Finding:
    """Check that results can be stored in the folder of MOVIEQ_STORAGE."""
    return folder(path, "storage", variable("storage"))


def folder(path: Path, subject: str, name: str) -> Finding:
    """Check that a folder is writable, or can be created, and has enough free space."""
    # unlike Path.exists, os.path.exists does not raise below a folder that this user may not enter
    there = next(each for each in (path.absolute(), *path.absolute().parents) if os.path.exists(each))  # noqa: PTH110
    advice = f"choose another folder with {name}, or give this user write permission"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".movieq-doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # temporary: space may be freed later
        cure = f"free some space, or {advice.partition(',')[0]}" if full else advice
        return Finding(Mark.BROKEN, subject, f"cannot write to {there}: {error.strerror}; {cure}", refuses=not full)
    free = shutil.disk_usage(there).free
    state = "is writable" if there == path.absolute() else "will be created when needed"
    text = f"{path} {state}, {free / 1024**3:,.1f} GiB free"
    if free < FULL_BYTES:
        return Finding(Mark.BROKEN, subject, f"{text}: too little for a clip; free some space, or {advice.partition(',')[0]}")
    if free < LOW_BYTES:
        return Finding(Mark.NOTE, subject, f"{text}: almost full; free some space, or {advice.partition(',')[0]}")
    return Finding(Mark.GOOD, subject, text)


# ── Whether Redis answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def reached(read: Settings, patience_s: float = REDIS_S) -> None:
    """Wait until Redis answers. Raises SettingsError, with what to do, after `patience_s` or if waiting does not help."""
    if not read.redis_url:
        raise SettingsError(f"{variable('redis_url')} is not set: set it to a Redis or Valkey, or use `movieq up`, which starts its own")
    end_s = time.monotonic() + patience_s
    while True:
        client = _client(read)
        try:
            async with asyncio.timeout(CHECK_S):
                await client.ping()
            return
        except REDIS_AWAY as error:
            if isinstance(error, ResponseError) and not is_fault(error):
                return  # a temporary refusal: `server` reports it
            lasts = any(isinstance(cause, (AuthenticationError, ResponseError, InvalidResponse, ssl.SSLError)) for cause in causes(error))
            if lasts or time.monotonic() > end_s:
                raise SettingsError(f"{variable('redis_url')}: {await trouble(error, read.redis_url)}") from None
        finally:
            await client.aclose()
        await asyncio.sleep(AGAIN_S)


def _client(read: Settings) -> Redis:
    """Return a client that does not retry, but gives slow servers more time, for example for a TLS handshake over a long distance."""
    client = connect(read.redis_url, patient=False)
    client.connection_pool.connection_kwargs |= {"socket_connect_timeout": ANSWER_S, "socket_timeout": ANSWER_S}
    return client


async def trouble(error: Exception, url: str) -> str:
    """Return why the server at the URL does not answer as expected, and what to do. The text contains no password."""
    chain = list(causes(error))
    said = next((cause for cause in chain if isinstance(cause, (AuthenticationError, ResponseError, InvalidResponse))), error)
    parts, text = urlsplit(url), str(error)
    user = unquote(parts.username or "")
    match said:  # redis-py wraps some of these in a ConnectionError with the same text
        case AuthenticationError() if "without any password" in text:
            return "the server has no password for its default user: remove the password from the URL, or set `requirepass`"
        case AuthenticationError() if "required" in text:
            return "the server requires a password: write redis://:PASSWORD@HOST, or redis://USER:PASSWORD@HOST for a user of its ACL"
        case AuthenticationError() if user and not parts.password:
            return f"the URL has the user {user!r} but no password: write a password without a user as redis://:PASSWORD@HOST"
        case AuthenticationError() if user:
            return (
                f"the server does not accept user {user!r} with this password: run ACL GETUSER {user} to see whether the user exists and "
                "is on; if so, correct the password"
            )
        case AuthenticationError():
            return "the password is wrong for the server's default user: correct it, or add a user to the URL, redis://USER:PASSWORD@HOST"
        case NoPermissionError():
            return f"its user lacks a permission: {text}; {ACL_LINE}"
        case BusyLoadingError():
            return "the server is still loading its data from disk (LOADING): wait until it has finished, then start again"
        case ResponseError() if "DB index" in text:
            number = parts.path.strip("/") or parts.query
            return f"the server has no database {number}: choose a number below its `databases` setting, which is 16 by default"
        case _ if "protected mode" in text:
            return "the server accepts connections only from its own machine (protected mode): set a password on it (`requirepass`)"
        case _ if "max number of clients" in text:
            return "the server has reached its limit of clients: raise its `maxclients`, or disconnect some"
        case InvalidResponse() if "\\x15" in text:  # the alert of a TLS server
            return "this port requires TLS: write rediss://"
        case InvalidResponse():
            return f"the server at this address is not Redis ({text}): correct the host and port"
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is invalid ({cause.verify_message}): {_CERTIFICATE.get(cause.verify_code, 'replace it')}"
    if parts.scheme == "rediss" and (await _speaks(url, tls=False)):
        return "this port does not use TLS: write redis://, or use the server's `tls-port`"
    broken = any(isinstance(cause, ConnectionResetError) for cause in chain) or "closed by server" in text
    if parts.scheme == "rediss" and broken and await _speaks(url, tls=True):
        return "the server closes the connection: if it requires client certificates, add ?ssl_certfile=FILE&ssl_keyfile=FILE"
    if parts.scheme == "redis" and not any(isinstance(cause, ConnectionRefusedError) for cause in chain) and await _speaks(url, tls=True):
        return "this port requires TLS: write rediss://"
    return f"the server does not answer: {text or type(error).__name__}; start it, or correct the address"


_UNKNOWN_CA: Final = "add the certificate of its authority to the URL, ?ssl_ca_certs=FILE"
_CERTIFICATE: Final = {
    10: "renew it",
    9: "set the clock of this machine",
    62: "use a host name that the certificate contains",
    64: "use a host name that the certificate contains",
    **dict.fromkeys((18, 19, 20, 21), _UNKNOWN_CA),
}
"""What to do about each of OpenSSL's verification codes (x509_vfy.h)."""


async def _speaks(url: str, *, tls: bool) -> bool:
    """Return whether the port of the URL answers as Redis without TLS or, with `tls`, completes a TLS handshake."""
    parts = urlsplit(url)
    context = ssl.create_default_context() if tls else None
    if context is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent over it
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 6379, ssl=context)
            try:
                if tls:
                    return True
                writer.write(b"PING\r\n")
                return await reader.read(1) in (b"+", b"-")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


# ── The state of Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def server(read: Settings, process: str) -> list[Finding]:
    """Check the Redis of the settings for `process`: "doctor", "up", "api" or "worker". The last two record their settings in it."""
    client = _client(read)
    try:
        async with asyncio.timeout(CHECK_S):
            try:
                await client.ping()
            except ResponseError as error:
                if is_fault(error):
                    raise
            info = await _asked(client.info())
            found = [_answers(info), await _eviction(client, info, allowed=read.allow_eviction), await _persistence(client, info)]
            found += [await _writes(read, client, info), *await _rights(read, client), await _clock(client)]
            return found if process == "up" else [*found, *await _same(read, process, client)]
    except REDIS_AWAY as error:
        return [Finding(Mark.BROKEN, "Redis", f"{variable('redis_url')}: {await trouble(error, read.redis_url)}")]
    finally:
        await client.aclose()


async def _asked(call: Any) -> dict[str, Any]:
    """Return the answer; empty if the server refuses the command, as managed servers and ACLs may."""
    try:
        return dict(await call)
    except ResponseError:
        return {}


def _answers(info: dict[str, Any]) -> Finding:
    if not info:
        return Finding(Mark.GOOD, "Redis", "the server answers; its version is unknown because it does not allow INFO")
    valkey = info.get("valkey_version")
    version = str(valkey or info.get("redis_version", "?"))
    name = f"{'Valkey' if valkey else 'Redis'} {version}"
    if info.get("cluster_enabled") or info.get("redis_mode", "standalone") != "standalone":
        mode = "Sentinel" if info.get("redis_mode") == "sentinel" else "cluster"
        return Finding(Mark.BROKEN, "Redis", f"{name} is a {mode}: movieq needs a single server; use the address of one", refuses=True)
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < LEAST_REDIS:
        least = ".".join(map(str, LEAST_REDIS))
        return Finding(Mark.BROKEN, "Redis", f"{name} is too old: use version {least} or newer, or any Valkey", refuses=True)
    return Finding(Mark.GOOD, "Redis", f"{name} answers")


async def _eviction(client: Redis, info: dict[str, Any], *, allowed: bool) -> Finding:
    policy = info.get("maxmemory_policy") or (await _asked(client.config_get("maxmemory-policy"))).get("maxmemory-policy")
    if policy is None:
        return Finding(Mark.NOTE, "Redis memory", "the server does not show its maxmemory-policy: make sure that it is noeviction")
    if policy == "noeviction" and info.get("maxmemory") == 0:
        return Finding(Mark.NOTE, "Redis memory", f"no maxmemory: if the machine's memory is full, the system kills Redis; {MAXMEMORY}")
    if policy == "noeviction":
        return Finding(Mark.GOOD, "Redis memory", "maxmemory-policy noeviction: it never evicts a task")
    text = f"maxmemory-policy {policy}: it evicts tasks when memory is full; {NOEVICTION}"
    if allowed:
        return Finding(Mark.NOTE, "Redis memory", f"{text} ({variable('allow_eviction')} allows it)")
    return Finding(Mark.BROKEN, "Redis memory", f"{text} (to start anyway: {variable('allow_eviction')}=true)", refuses=True)


async def _persistence(client: Redis, info: dict[str, Any]) -> Finding:
    config = {**await _asked(client.config_get("appendfsync")), **await _asked(client.config_get("save"))}
    cure = "run CONFIG SET appendonly yes, and set the same in its configuration file"
    if not info:
        return Finding(Mark.NOTE, "Redis disk", "the server does not allow INFO: make sure that its append-only file is on")
    if not info.get("aof_enabled"):
        saves = config.get("save")
        if saves == "":
            return Finding(Mark.NOTE, "Redis disk", f"no append-only file and no snapshots: a restart loses every task; {cure}")
        return Finding(Mark.NOTE, "Redis disk", f"no append-only file: a crash loses every task since the last snapshot; {cure}")
    if info.get("aof_last_write_status", "ok") != "ok":
        return Finding(Mark.BROKEN, "Redis disk", "it cannot write its append-only file: free space on its disk")
    fsync = config.get("appendfsync")
    if fsync is None:
        return Finding(Mark.GOOD, "Redis disk", "append-only file on; the server does not show appendfsync")
    mark = Mark.NOTE if fsync == "no" else Mark.GOOD
    return Finding(mark, "Redis disk", f"append-only file on, appendfsync {fsync}: {_FSYNC.get(fsync, 'unknown')}")


def _names(read: Settings, client: Redis) -> Mapping[str, str]:
    """Return the keys and channels of this installation."""
    return keys(read.key_prefix, int(client.connection_pool.connection_kwargs.get("db") or 0))


async def _writes(read: Settings, client: Redis, info: dict[str, Any]) -> Finding:
    """Check that a script can write now, using a temporary key."""
    try:
        await cast("Any", client).eval(_WRITE, 0, _names(read, client)["check"] + secrets.token_hex(8), KEPT_MS)
    except ResponseError as error:
        return Finding(Mark.BROKEN, "Redis writes", _why_refused(error, info))
    return Finding(Mark.GOOD, "Redis writes", "a script can write")


def _why_refused(error: Exception, info: dict[str, Any]) -> str:
    """Return why the server refuses writes, with details from its INFO, and what to do."""
    text = str(error)
    if isinstance(error, NoPermissionError) or "ACL failure" in text:
        return f"its user lacks a permission: {text.partition(' script: ')[0]}; {ACL_LINE}"
    match refusal(error):
        case None:
            return f"a script cannot write: {text}"
        case Refusal("OOM", reason, cure):
            return f"{reason} (OOM, maxmemory {info.get('maxmemory_human', 'unknown')}): {cure}"
        case Refusal("READONLY", reason, cure) if "master_host" in info:
            return f"{reason} of {info['master_host']}:{info['master_port']} (READONLY): {cure}"
        case Refusal(code, reason, cure):
            return f"{reason} ({code}): {cure}"


async def _rights(read: Settings, client: Redis) -> list[Finding]:
    """Find permissions that the URL's user lacks, by sending each command that movieq uses in a form that changes nothing."""
    ours = _names(read, client)
    key = ours["check"] + secrets.token_hex(8)
    commands = [each.split() for each in COMMANDS.replace("KEY", key).replace("CHANNEL", ours["events"]).split(",")]
    if not await _set(client, key):
        commands = [
            command for command in commands if command[1:2] != [key]
        ]  # these change nothing if the key is a string, but would create a missing key
    prefixes = (job_key_prefix, in_progress_key_prefix, retry_key_prefix, result_key_prefix)
    names = [*(name for verb, name in ours.items() if verb not in CHANNELS), *prefixes]
    commands = [["publish", ours["control"] + key, "x"], *(["exists", name] for name in names), *commands]
    commands = [*(["del", f"{prefix}{key}"] for prefix in prefixes), *commands]
    lacks: dict[str, list[str]] = {"": [], "~": [], "&": []}
    connection: Any = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    try:
        await connection.connect()
        await connection.send_packed_command(connection.pack_commands([*each[0].upper().split("|"), *each[1:]] for each in commands))
        for command in commands:
            try:
                await connection.read_response(disconnect_on_error=False)
            except NoPermissionError as error:
                whose = "~" if re.search(r"access (a key|one of the keys)", str(error)) else "&" if "channel" in str(error) else ""
                lacks[whose].append(command[1] if whose else command[0])
            except ResponseError:  # for example the wrong type of key: the user may run the command
                pass
    finally:
        await connection.disconnect(nowait=True)
    missing = [f"+{name}" for name in dict.fromkeys(lacks[""])]
    missing += dict.fromkeys(f"{sign}{name.split(':')[0]}:*" for sign in "~&" for name in lacks[sign])
    if not missing:
        return []
    user = unquote(urlsplit(read.redis_url).username or "default")
    return [Finding(Mark.BROKEN, "Redis rights", f"its user lacks permissions: run ACL SETUSER {user} {' '.join(missing)}")]


async def _set(client: Redis, key: str) -> bool:
    try:
        return bool(await client.set(key, "x", px=KEPT_MS))
    except ResponseError:
        return False


async def _clock(client: Redis) -> Finding:
    """Check that this machine's clock agrees with that of Redis, allowing for the round trip."""
    before_s = time.time()
    seconds, micros = await client.time()
    after_s = time.time()
    ahead_s = (before_s + after_s) / 2 - (seconds + micros / 1e6)
    if abs(ahead_s) - (after_s - before_s) / 2 <= SKEW_S:
        return Finding(Mark.GOOD, "clock", "agrees with the clock of Redis")
    return Finding(
        Mark.NOTE,
        "clock",
        f"this machine's clock is {abs(ahead_s):,.1f} s {'ahead of' if ahead_s > 0 else 'behind'} that of Redis: signed URLs expire too "
        "early or too late, and times disagree; set both clocks with NTP (chronyd, systemd-timesyncd)",
    )


# ── Whether every process has the same settings ───────────────────────────────────────────────────────────────────────────────────────

_APART: Final = {
    "storage": "one process cannot serve the files that another stores",
    "signing_secret": "one process rejects the URLs that another signs",
    "webhook_secret": "receivers cannot verify some webhooks",
}
"""Settings that must be the same in every process, and what breaks if they differ."""


async def _same(read: Settings, process: str, client: Redis) -> list[Finding]:
    """Compare this process's settings with those of the latest API and worker, and record them. Redis holds only salted hashes."""
    name, redis = _names(read, client)["installation"], cast("Any", client)  # redis-py types answers as a union of sync and async
    try:
        if process != "doctor":
            await redis.hsetnx(name, "salt", secrets.token_hex(16))
        kept: dict[bytes, bytes] = await redis.hgetall(name)
        salt = kept.pop(b"salt", None)
        if salt is None:
            return []
        others = {sort.decode(): started for sort, blob in kept.items() if (started := _started(blob)) is not None}
        mine = Started(socket.gethostname(), time.time_ns() // 1_000_000, await asyncio.to_thread(_fingerprints, read, process, salt))
        if process != "doctor":
            await redis.hset(name, process, msgspec.json.encode(mine))
    except ResponseError as error:  # such as a temporary refusal of writes
        return [Finding(Mark.NOTE, "settings", f"cannot be compared with those of other processes: {error}")]
    found = [_difference(field, mine, sort, other) for sort, other in others.items() for field in _differing(mine, other)]
    if process == "doctor" and {"api", "worker"} <= others.keys():
        for field in _differing(others["api"], others["worker"]):
            apart = f"{variable(field)}: differs between the API and the worker that started last: {_APART[field]}"
            found.insert(0, Finding(Mark.BROKEN, "settings", f"{apart}; set the same value for every process, and restart them"))
    return found


def _started(blob: bytes) -> Started | None:
    try:
        return msgspec.json.decode(blob, type=Started)
    except msgspec.MsgspecError:  # written by another version
        return None


def _differing(mine: Started, other: Started) -> list[str]:
    """Return the settings that differ. Rotated secrets count as equal if each process knows the other's first secret."""
    return [
        field
        for field in _APART
        if (ours := mine.settings.get(field)) and (theirs := other.settings.get(field)) and (ours[0] not in theirs or theirs[0] not in ours)
    ]


def _difference(field: str, mine: Started, sort: str, other: Started) -> Finding:
    since = datetime.fromtimestamp(other.at_ms / 1000, UTC)
    return Finding(
        Mark.NOTE,
        "settings",
        f"{variable(field)}: the {sort} that started last (on {other.host}, {since:%Y-%m-%d %H:%M:%S} UTC) has another value: "
        f"{_APART[field]}; set the same value for every process, and restart those with the old value",
    )


def _fingerprints(read: Settings, process: str, salt: bytes) -> dict[str, list[str]]:
    """Return slow, salted hashes of the settings that must be the same. A storage folder is identified by the mark in it, not its path."""
    found = {"signing_secret": [secret.decode() for secret in read.signing_secret] or [""]}
    if process == "worker" or read.webhook_secret:  # only workers sign webhooks, so others may have no secret
        found["webhook_secret"] = list(read.webhook_secret) or [""]
    if isinstance(place := read.storage, Bucket):
        found["storage"] = [f"{place.endpoint} {place.name} {place.prefix}"]
    elif mark := _mark_of(place, make=process != "doctor"):
        found["storage"] = [mark]
    return {
        field: [hashlib.scrypt(f"{field} {part}".encode(), salt=salt, n=2**12, r=8, p=1, dklen=8).hex() for part in parts]
        for field, parts in found.items()
    }


def _mark_of(root: Path, *, make: bool) -> str | None:
    """Return the name in the folder's `.installation`, by which processes recognise the same folder; None if there is none.

    With `make`, create it if it is missing. Paths are not compared, because in two containers one path may be two folders.
    """
    home = root / ".installation"
    try:
        if make and not home.exists():
            root.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=".installation-", dir=root))
            new.chmod(0o755)
            (new / secrets.token_hex(8)).mkdir()
            try:
                new.rename(home)  # if several processes start at once, one succeeds
            except OSError:
                shutil.rmtree(new)
        return next((path.name for path in home.iterdir()), None)
    except OSError:  # for example an unavailable storage, for which uploads wait
        return None
