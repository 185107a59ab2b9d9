"""`movieq doctor`: check the settings and the real servers. Each check gives one line: what was found, and what to do about a problem."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final

import aiohttp

from movieq import checks, credentials, gpus, logs
from movieq.checks import CHECK_S, Finding, Mark
from movieq.client import Client, Unreachable
from movieq.delivery import payload
from movieq.delivery.payload import Payload
from movieq.errors import CmsFault, ModelUnavailable, MovieqError, SettingsError, StorageFault
from movieq.fetch.guard import Guard, UrlRefused, shown
from movieq.models import table as models
from movieq.models import weights
from movieq.settings import Bucket, PayloadMode, Settings, variable
from movieq.storage.open import opened

EXPIRES_SOON: Final = timedelta(days=30)
LARGE_BYTES: Final = 20 * 1024**2 + 1
"""A file size just over Payload's default limit."""
NO_GPU: Final = "none on this machine; animatics need none, and a model that a task names runs on the CPU, slowly"


async def examine(
    given: Callable[[], Settings], data: Path, local_url: str, found: Callable[[Finding], None], callback: str | None = None
) -> bool:
    """Run every check and pass its findings to `found`, in order; return whether nothing is broken.

    `given` reads the settings; `data` is the data folder of `movieq up`, `local_url` its address; `callback` is a callback_url to try.
    """
    whole = True

    def note(finding: Finding) -> None:
        nonlocal whole
        whole = whole and finding.mark is not Mark.BROKEN
        found(finding)

    for finding in (*_packages(), _speech(), _gpu()):
        note(finding)
    try:
        for finding in checks.unknown():
            note(finding)
        settings = given()
    except SettingsError as error:
        note(Finding(Mark.BROKEN, "settings", error.message))
        return False
    for finding in (
        _api_keys(settings, data),
        _webhook_secret(settings),
        _models(settings),
        signatures(settings),
        checks.gpus(settings),
        await asyncio.to_thread(checks.spool, settings),
        await _guarded("storage", lambda: _storage(settings)),
    ):
        note(finding)
    for finding in await _redis(settings):
        note(finding)
    for finding in await _cms(settings):
        note(finding)
    note(await _guarded("callbacks", lambda: _callback(settings, callback)))
    note(await _guarded("API", lambda: _api(settings, local_url)))
    return whole


async def _guarded(subject: str, check: Callable[[], Awaitable[Finding]]) -> Finding:
    try:
        async with asyncio.timeout(CHECK_S):
            return await check()
    except TimeoutError:
        return Finding(Mark.BROKEN, subject, f"no answer within {CHECK_S:g} s")


# ── This machine ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _packages() -> list[Finding]:
    """Check that the libraries with native code load on this machine."""
    found = []
    for package, module, purpose in (("av", "av", "video and sound"), ("pillow", "PIL.Image", "pictures"), ("numpy", "numpy", "frames")):
        name = {"av": "PyAV", "pillow": "Pillow"}.get(package, package)
        try:
            importlib.import_module(module)
            found.append(Finding(Mark.GOOD, name, f"{importlib.metadata.version(package)} ({purpose})"))
        except ImportError as error:
            found.append(Finding(Mark.BROKEN, name, f"does not load: {error}; pip install --force-reinstall {package}"))
    return found


def _speech() -> Finding:
    missing = "without it, dialogue fails with engine_unavailable: pip install 'movieq[speech]' (GPL-3)"
    if importlib.util.find_spec("espeakng_loader") is None:
        return Finding(Mark.NOTE, "speech", f"espeak-ng is not installed; {missing}")
    loader = importlib.import_module("espeakng_loader")
    if not Path(loader.get_library_path()).exists() or not Path(loader.get_data_path()).exists():
        return Finding(
            Mark.BROKEN, "speech", "espeakng-loader has no library for this machine; pip install --force-reinstall espeakng-loader"
        )
    return Finding(Mark.GOOD, "speech", f"espeak-ng, from espeakng-loader {importlib.metadata.version('espeakng-loader')}")


def _gpu() -> Finding:
    """Check the driver and its GPUs, and whether models can use them, without starting CUDA."""
    if (problem := gpus.problem()) is not None:
        return Finding(Mark.BROKEN, "GPU", problem)
    if (library := gpus.nvml()) is None:
        return Finding(Mark.GOOD, "GPU", NO_GPU)
    cards = [library.nvmlDeviceGetName(library.nvmlDeviceGetHandleByIndex(each)) for each in range(library.nvmlDeviceGetCount())]
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding(Mark.BROKEN, "GPU", f"{', '.join(cards)}, but no torch: pip install 'movieq[gpu]'")
    if torch.endswith("+cpu"):
        return Finding(
            Mark.BROKEN, "GPU", f"{', '.join(cards)}, but torch {torch}, which cannot use a GPU: pip install torch from its CUDA index"
        )
    return Finding(Mark.GOOD, "GPU", f"{', '.join(cards)}; torch {torch}")


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _api_keys(settings: Settings, data: Path) -> Finding:
    count = len(settings.api_keys)
    if count:
        return Finding(Mark.GOOD, "API keys", f"{count} in {variable('api_keys')}")
    own = data / "api-key"
    if own.exists():
        return Finding(Mark.GOOD, "API keys", f"`movieq up` uses the key in {own}; for `movieq api` set {variable('api_keys')}")
    return Finding(
        Mark.NOTE, "API keys", f"{variable('api_keys')} is not set: `movieq up` generates a key in {data}, `movieq api` refuses all clients"
    )


def _webhook_secret(settings: Settings) -> Finding:
    count = len(settings.webhook_secret)
    if not count:
        return Finding(Mark.NOTE, "webhooks", f"unsigned: set {variable('webhook_secret')}, so that receivers can verify them")
    return Finding(Mark.GOOD, "webhooks", "signed" if count == 1 else f"signed with {count} secrets, as during a rotation")


def _models(settings: Settings) -> Finding:
    try:
        table = models.load(settings.models)
    except SettingsError as error:
        return Finding(Mark.BROKEN, "models", error.message)
    try:
        importlib.import_module("huggingface_hub")
    except ImportError:
        here = [name for name, model in table.items() if not weights.sources(model)]
        return Finding(Mark.GOOD, "models", f"{len(table)}; here: {', '.join(here)}; for the others: pip install 'movieq[gpu]'")
    here = []
    wrong: list[str] = []
    for name, model in table.items():
        sources = weights.sources(model)
        try:
            for source in sources:
                weights.find(source)
            here.append(name)
        except ModelUnavailable as error:
            wrong += [f"{name}: {error.message}"] if any(weights.begun(source) for source in sources) else []
    if wrong:
        return Finding(Mark.BROKEN, "models", "; ".join(wrong))
    lacking = [name for name in table if name not in here]
    text = f"{len(table)}; here: {', '.join(here)}"
    return Finding(Mark.GOOD, "models", f"{text}; `movieq models pull NAME` downloads {', '.join(lacking)}" if lacking else text)


def signatures(settings: Settings) -> Finding:
    """Return whether results can be signed, and until when."""
    try:
        signer = credentials.load(settings)
    except SettingsError as error:
        return Finding(Mark.BROKEN, "signatures", error.message)
    if signer is None:
        return Finding(Mark.GOOD, "signatures", f"results are not signed (C2PA); to sign them, set {variable('c2pa_certificate')}")
    text = f"results are signed (C2PA) by {signer.name}; the certificate expires on {signer.expires:%Y-%m-%d}"
    if signer.expires - datetime.now(UTC) < EXPIRES_SOON:
        return Finding(Mark.NOTE, "signatures", f"{text}: renew it and restart the workers")
    return Finding(Mark.GOOD, "signatures", text)


async def _storage(settings: Settings) -> Finding:
    if isinstance(settings.storage, Bucket):
        return await _bucket(settings, settings.storage)
    return await asyncio.to_thread(checks.storage, settings.storage)


async def _bucket(settings: Settings, bucket: Bucket) -> Finding:
    """Check that a small file can be stored, read, opened by its URL and deleted."""
    key = f"doctor/{secrets.token_hex(8)}.txt"
    with tempfile.TemporaryDirectory(prefix="movieq-doctor-") as folder:
        sent, received = Path(folder) / "sent", Path(folder) / "received"
        sent.write_text(key)
        try:
            async with opened(settings, settings.public_url, (), patient=False) as storage:
                await storage.put(key, sent, "text/plain")
                whole = await storage.open(key, received) is not None and received.read_text() == key
                problem = await _address_problem(storage.url(key, int(time.time()) + 60), key, public=bool(bucket.public_url))
                await storage.delete(key)
        except StorageFault as fault:
            return Finding(Mark.BROKEN, "storage", fault.message)
    if not whole:
        return Finding(Mark.BROKEN, "storage", f"bucket {bucket.name} of {bucket.endpoint} returned other bytes than were stored")
    if problem:
        return Finding(Mark.BROKEN, "storage", problem)
    return Finding(
        Mark.GOOD, "storage", f"bucket {bucket.name} of {bucket.endpoint}: a file was stored, read, opened by its URL and deleted"
    )


async def _address_problem(url: str, body: str, *, public: bool) -> str | None:
    """Return why the URL does not serve the stored file; None if it does."""
    cure = f"correct {variable('r2_public_url')}, or leave it unset to use signed URLs" if public else "signed URLs do not work there"
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            if answer.status == 200 and await answer.text() == body:
                return None
            return f"{logs.without_query(url)} answers {answer.status} instead of the file; {cure}"
    except (aiohttp.ClientError, OSError) as error:
        return f"{logs.without_query(url)} cannot be opened: {error}; {cure}"


# ── Servers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _redis(settings: Settings) -> list[Finding]:
    if not settings.redis_url:
        return [
            Finding(
                Mark.GOOD,
                "Redis",
                f"{variable('redis_url')} is not set: `movieq up` starts its own Valkey; `movieq api` and `movieq worker` need the setting",
            )
        ]
    return await checks.server(settings, "doctor")


async def _cms(settings: Settings) -> list[Finding]:
    try:
        cms = payload.configured(settings)
    except SettingsError as error:
        return [Finding(Mark.BROKEN, "CMS", error.message)]
    if cms is None:
        return [Finding(Mark.GOOD, "CMS", f"{variable('payload_url')} is not set: results are reported by webhooks only")]
    found: list[Finding] = []
    async with Guard(origins=settings.own_origins()).session() as session:
        asked = Payload(cms, session, answer_s=CHECK_S)
        checks = [_cms_key, _cms_collection, _cms_fields, _cms_writable, *([_cms_limits] if asked.takes_files else [])]
        for check in checks:
            try:
                found.append(await check(asked))
            except CmsFault as fault:
                found.append(Finding(Mark.BROKEN, "CMS", f"{cms.url}: {fault.message}"))
            if found[-1].mark is Mark.BROKEN:
                break  # the next checks would fail for the same reason
    return found


async def _cms_key(asked: Payload) -> Finding:
    if await asked.known():
        return Finding(Mark.GOOD, "CMS", f"{asked.cms.url} accepts the key")
    advice = f"choose Enable API Key on a user's page and set {variable('payload_api_key')}, or correct {variable('payload_users')}"
    return Finding(Mark.BROKEN, "CMS", f"{asked.cms.url} has no user with this key in {asked.cms.users!r}: {advice}")


async def _cms_collection(asked: Payload) -> Finding:
    may, name = await asked.may(), asked.cms.media
    if "create" not in may or "read" not in may:
        return Finding(
            Mark.BROKEN, "CMS media", f"the key's user may not create and read {name!r}: widen its `access` in the Payload config"
        )
    if "delete" not in may:
        return Finding(Mark.NOTE, "CMS media", f"the key's user may not delete in {name!r}: duplicates left by a fault stay")
    return Finding(Mark.GOOD, "CMS media", f"the key's user may create, read and delete in {name!r}")


async def _cms_fields(asked: Payload) -> Finding:
    missing, cms = await asked.missing(), asked.cms
    if not missing:
        return Finding(Mark.GOOD, "CMS fields", f"{cms.media!r} has all needed fields: {', '.join(cms.paths())}")
    needed = {cms.path(payload.TASK_ID), cms.path("url")} if cms.mode is PayloadMode.REFERENCE else set()
    advice = f"add them to the collection, or map or omit them with {variable('payload_fields')}"
    mark = Mark.BROKEN if needed & set(missing) else Mark.NOTE
    return Finding(mark, "CMS fields", f"{cms.media!r} has no {', '.join(missing)}; their values are lost: {advice}")


async def _cms_writable(asked: Payload) -> Finding:
    pairs = ", ".join(sorted(".".join(pair) for pair in asked.cms.writable))
    return Finding(
        Mark.GOOD, "CMS writable", f"{variable('payload_writable')} lets tasks set {pairs or 'no field'} of their project's documents"
    )


async def _cms_limits(asked: Payload) -> Finding:
    limit = await asked.limit_bytes(LARGE_BYTES)
    if limit is None:
        return Finding(Mark.GOOD, "CMS limits", f"files over {LARGE_BYTES // 1024**2} MiB are accepted")
    return Finding(
        Mark.NOTE, "CMS limits", f"files over {limit / 1024**2:.0f} MiB are refused, and clips can be larger: raise {payload.LIMITS}"
    )


async def _callback(settings: Settings, url: str | None) -> Finding:
    networks = settings.allow_private_urls
    if not settings.redis_url and not networks:  # as `movieq up` has it
        networks = (IPv4Network("127.0.0.0/8"), IPv6Network("::1"))
    allowed = ", ".join(["public addresses", *map(str, networks), *settings.own_origins()])
    if url is None:
        return Finding(Mark.GOOD, "callbacks", f"may go to {allowed}; to try one: movieq doctor --callback URL")
    guard, name = Guard(networks, settings.own_origins()), shown(url)
    try:
        async with guard.session() as session, session.head(guard.check_url(url), allow_redirects=False) as answer:
            status = answer.status
    except UrlRefused as error:
        return Finding(Mark.BROKEN, "callbacks", f"{name} is not allowed: {error.description}; allowed are {allowed}")
    except (aiohttp.ClientError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        return Finding(Mark.BROKEN, "callbacks", f"{name} cannot be reached from here: {reason}; start its server, or allow the connection")
    if 300 <= status < 400:
        return Finding(Mark.BROKEN, "callbacks", f"{name} redirects ({status}), and redirects are not followed: use the final URL")
    if status >= 500:
        return Finding(Mark.NOTE, "callbacks", f"{name} answers {status}: read its server's log")
    return Finding(Mark.GOOD, "callbacks", f"{name} can be reached (it answers {status} to a HEAD)")


async def _api(settings: Settings, local_url: str) -> Finding:
    url = settings.public_url or local_url
    name = f"{url} ({variable('public_url')})" if settings.public_url else url
    try:
        async with Client(url, "none", patience_s=0) as client:
            health = await client.health()
    except SettingsError as error:
        return Finding(Mark.BROKEN, "API", f"{variable('public_url')}: {error.message}")
    except Unreachable:
        return Finding(Mark.NOTE, "API", f"no API runs at {name}; start one with `movieq up` or `movieq api`")
    except MovieqError as error:
        return Finding(Mark.BROKEN, "API", f"{name} is not movieq: {error.message}")
    summary = f"movieq {health.version} at {name} is {health.status}: Redis {health.redis_status}, {health.worker_count} workers"
    if health.status == "healthy":
        return Finding(Mark.GOOD, "API", summary)
    waiting = sum(health.queue_sizes.values())
    advice = f"{waiting} tasks wait for a worker; start one with `movieq worker`" if waiting else "read its log"
    return Finding(Mark.BROKEN if health.status == "unhealthy" else Mark.NOTE, "API", f"{summary}; {advice}")
