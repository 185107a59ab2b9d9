"""Every setting: one frozen Struct, read once from the environment and `.env`.

The environment variable of a field is its name in capitals with `MOVIEQ_` in front. `.env.example` and the README list the same names,
defaults and sentences; a test compares the three.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
from dotenv import dotenv_values
from msgspec import Meta

from movieq.contracts import PREFIX_PATTERN, PROJECT_PATTERN, Kind
from movieq.errors import SettingsError

PREFIX: Final = "MOVIEQ_"
_SEGMENT: Final = "[A-Za-z0-9_-][A-Za-z0-9._-]*"


class EngineChoice(StrEnum):
    """Which engine makes what names no model: `auto` takes diffusers where the installation has had a GPU worker in the last 30 days."""

    AUTO = "auto"
    DIFFUSERS = "diffusers"
    ANIMATIC = "animatic"


class PayloadMode(StrEnum):
    """What a result becomes in the CMS: a file of an upload collection, or a document that refers to the file by its address."""

    UPLOAD = "upload"
    REFERENCE = "reference"


class LogFormat(StrEnum):
    """`auto`: console in a terminal, else json."""

    AUTO = "auto"
    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    """Least severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator decides."""

    redis_url: Annotated[str, Meta(description="Redis or Valkey: redis://host:6379/0, or unix:///path; unset: `up` starts its own")] = ""
    key_prefix: Annotated[
        str,
        Meta(
            pattern=rf"^{PREFIX_PATTERN}(?!\n)$",
            description="Begins every key and channel in Redis; two installations on one server need two",
        ),
    ] = "movieq"
    public_url: Annotated[
        str, Meta(description="Address under which clients reach the API; unset: where it listens (a worker needs it)")
    ] = ""
    api_keys: Annotated[str, Meta(description="Comma-separated, each KEY, KEY=PROJECTS or KEY=PROJECTS/SCOPES; unset: `up` makes one")] = ""
    signing_secret: Annotated[
        str, Meta(description="Signs event and media urls; two, comma-separated, while rotating, new first; unset: one is kept in Redis")
    ] = ""
    webhook_secret: Annotated[str, Meta(description="Signs webhooks, whsec_...; two, comma-separated, while rotating; unset: unsigned")] = (
        ""
    )
    storage: Annotated[str, Meta(description="Where results are stored: a folder, s3://BUCKET or s3://BUCKET/PREFIX")] = ".movieq/media"
    r2_endpoint: Annotated[str, Meta(description="Address of the S3 service: https://ACCOUNT.r2.cloudflarestorage.com, say")] = ""
    r2_access_key_id: Annotated[str, Meta(description="Access key of the bucket: it may read, write, list and delete there")] = ""
    r2_secret_access_key: Annotated[str, Meta(description="Secret of that access key")] = ""
    r2_public_url: Annotated[str, Meta(description="Address that the bucket is public under; unset: urls are signed for seven days")] = ""
    spool: Annotated[str, Meta(description="Folder that a worker works in; unset: one in the system's temporary folder")] = ""
    models: Annotated[str, Meta(description="File of model entries, beside those that ship with movieq")] = ""
    engine: Annotated[EngineChoice, Meta(description="What makes tasks that name no model: auto, diffusers or animatic")] = (
        EngineChoice.AUTO
    )
    queues: Annotated[str, Meta(description="Queues that a worker serves, comma-separated; unset: those that its machine fits")] = ""
    devices: Annotated[str, Meta(description="GPUs that a worker uses: auto, cpu, or a list such as cuda:0,cuda:1")] = "auto"
    cpu_slots: Annotated[int, Meta(ge=1, le=256, description="Tasks of cpu_intensive that a worker runs at once")] = 1
    drain_s: Annotated[float, Meta(ge=0, le=86400, description="How long a stopping worker lets its runs go on, seconds")] = 30.0
    step_timeout_s: Annotated[float, Meta(ge=1, description="An engine that shows no progress for so long is killed, seconds")] = 600.0
    max_queued_per_project: Annotated[int, Meta(ge=0, description="Waiting tasks a project may have; 0: no limit")] = 10_000
    max_queued: Annotated[int, Meta(ge=0, description="Waiting tasks of all projects together; 0: no limit")] = 0
    project_weights: Annotated[str, Meta(description="Shares of the queue, film=3, other=1; a project not named has 1")] = ""
    keep_tasks_days: Annotated[float, Meta(ge=0, description="Days that an ended task is kept; 0: for ever")] = 30.0
    keep_media_days: Annotated[float, Meta(ge=0, description="Days that the files of a result are kept; 0: for ever")] = 0.0
    file_tags: Annotated[bool, Meta(description="Whether files say in their tags by which prompt, seed and model they were made")] = True
    c2pa_certificate: Annotated[
        str, Meta(description="Signs results (C2PA): file with the certificate and those above it, PEM, its own first; unset: unsigned")
    ] = ""
    c2pa_key: Annotated[str, Meta(description="File with the private key of that certificate, PEM without a password")] = ""
    c2pa_required: Annotated[bool, Meta(description="Whether nothing unsigned may be published; a worker without a certificate ends")] = (
        False
    )
    allow_private_urls: Annotated[str, Meta(description="Private networks that inputs and callbacks may lie in: 10.0.0.0/8, ...")] = ""
    cors_origins: Annotated[str, Meta(description="Origins whose pages may call the API, comma-separated; *: all")] = ""
    payload_url: Annotated[str, Meta(description="PayloadCMS that results go to, the address above /media: https://cms.example/api")] = ""
    payload_api_key: Annotated[str, Meta(description="API key of a user of the CMS who may read, create and delete media")] = ""
    payload_users: Annotated[str, Meta(description="Collection of the CMS that this user is in")] = "users"
    payload_media: Annotated[str, Meta(description="Collection of the CMS that results go into")] = "media"
    payload_mode: Annotated[
        PayloadMode, Meta(description="upload: into an upload collection; reference: a document with the address of the file")
    ] = PayloadMode.UPLOAD
    payload_fields: Annotated[
        str, Meta(description="What the CMS calls fields and values (README, PayloadCMS): alt=title, mediaType:audio_clip=sound")
    ] = ""
    log_level: Annotated[LogLevel, Meta(description="debug, info, warning or error")] = LogLevel.INFO
    log_format: Annotated[LogFormat, Meta(description="console, json, or auto: console in a terminal")] = LogFormat.AUTO

    def private_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks of `allow_private_urls`. Raises SettingsError."""
        try:
            return tuple(ip_network(part, strict=False) for part in _parts(self.allow_private_urls))
        except ValueError as error:
            raise SettingsError(f"{PREFIX}ALLOW_PRIVATE_URLS: {error}; it takes networks such as 127.0.0.0/8, 10.1.2.3") from None

    def bucket(self) -> Bucket | None:
        """The bucket of `storage`; None where that is a folder. Raises SettingsError."""
        if not self.storage.startswith("s3://"):
            return None
        name, _, prefix = self.storage.removeprefix("s3://").rstrip("/").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name) or not re.fullmatch(rf"({_SEGMENT}(/{_SEGMENT})*)?", prefix):
            raise SettingsError(f"{PREFIX}STORAGE: {self.storage!r} is no s3://BUCKET or s3://BUCKET/PREFIX of A-Z a-z 0-9 . _ -")
        for field in ("r2_endpoint", "r2_public_url"):
            url = urlsplit(getattr(self, field))
            if url.geturl() and (url.scheme not in ("http", "https") or not url.hostname or url.username or url.query):
                raise SettingsError(f"{variable(field)}: it takes an address such as https://files.example.com, got {url.scheme!r} ...")
        missing = [variable(f) for f in ("r2_endpoint", "r2_access_key_id", "r2_secret_access_key") if not getattr(self, f)]
        if missing:
            raise SettingsError(f"{PREFIX}STORAGE: {self.storage} needs {', '.join(missing)} too")
        return Bucket(
            name,
            f"{prefix}/" if prefix else "",
            self.r2_endpoint.rstrip("/"),
            self.r2_access_key_id,
            self.r2_secret_access_key,
            self.r2_public_url.rstrip("/"),
        )

    def signing_secrets(self) -> tuple[bytes, ...]:
        """The secrets of `signing_secret`: the first signs, each verifies."""
        return tuple(part.encode() for part in _parts(self.signing_secret))

    def kinds(self) -> tuple[Kind, ...]:
        """The queues of `queues`. Raises SettingsError."""
        try:
            return tuple(Kind(part) for part in _parts(self.queues))
        except ValueError as error:
            raise SettingsError(f"{PREFIX}QUEUES: {error}; it takes {', '.join(Kind)}") from None

    def weights(self) -> dict[str, float]:
        """The weights of `project_weights`. Raises SettingsError."""
        found: dict[str, float] = {}
        for part in _parts(self.project_weights):
            project, _, weight = part.partition("=")
            if not re.fullmatch(PROJECT_PATTERN, project) or not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", weight) or float(weight) == 0:
                raise SettingsError(f"{PREFIX}PROJECT_WEIGHTS: {part!r} is no project=weight, such as film=3")
            found[project] = float(weight)
        return found

    def origins(self) -> list[str]:
        """The origins of `cors_origins`."""
        return _parts(self.cors_origins)

    def own_origins(self) -> tuple[str, ...]:
        """Addresses of the installation's own servers, which may be called wherever they are."""
        return (self.payload_url,) if self.payload_url else ()

    def keys(self) -> dict[str, Grant]:
        """The API keys of `api_keys` and what each may. Raises SettingsError that names the position, never the key."""
        grants: dict[str, Grant] = {}
        for position, part in enumerate(_parts(self.api_keys), 1):
            head, _, scopes_text = part.partition("/")
            key, restricted, projects_text = head.partition("=")
            if not re.fullmatch(r"[A-Za-z0-9_.~-]{16,}", key):
                raise SettingsError(f"{PREFIX}API_KEYS: key {position} must be 16 or more of A-Z a-z 0-9 _ . ~ -")
            projects = projects_text.split("|") if restricted else []
            if any(not re.fullmatch(PROJECT_PATTERN, project) for project in projects):
                raise SettingsError(f"{PREFIX}API_KEYS: a project of key {position} does not match {PROJECT_PATTERN}")
            try:
                scopes = frozenset(Scope(name) for name in scopes_text.split("+")) if scopes_text else None
            except ValueError:
                raise SettingsError(f"{PREFIX}API_KEYS: a scope of key {position} is none of {', '.join(Scope)}") from None
            default = frozenset({Scope.READ, Scope.SUBMIT}) if restricted else frozenset(Scope)
            grants[key] = Grant(frozenset(projects) if restricted else None, scopes or default)
        return grants


class Bucket(msgspec.Struct, frozen=True):
    """A bucket of an S3 service. `prefix` is empty or ends with a slash; without a `public_url` addresses are signed."""

    name: str
    prefix: str
    endpoint: str
    key_id: str
    secret: str
    public_url: str = ""


def key_hash(key: str) -> str:
    """The hash by which an API key is known. Keys are random and long, so a plain hash will do."""
    return hashlib.sha256(key.encode()).hexdigest()


class Scope(StrEnum):
    """What a key may: `read` states and events, `submit` tasks (also cancel, retry, upload), `admin` the rest."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


class Grant(msgspec.Struct, frozen=True):
    """What a key may; `projects` None means all."""

    projects: frozenset[str] | None
    scopes: frozenset[Scope]

    def allows(self, project_id: str) -> bool:
        """Whether the key belongs to the project."""
        return self.projects is None or project_id in self.projects


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def load(environ: Mapping[str, str] = os.environ, env_file: Path = Path(".env")) -> Settings:
    """The settings of this process: the environment first, then `.env`, then defaults. Raises SettingsError naming the setting."""
    found = {**{key: value for key, value in dotenv_values(env_file).items() if value is not None}, **environ}
    fields = Settings.__struct_fields__
    values = {field: found[variable(field)].strip() for field in fields if found.get(variable(field), "").strip()}
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise SettingsError(f"{variable(path.removesuffix('`'))}: {message}") from None
    settings.private_networks(), settings.kinds(), settings.keys(), settings.weights(), settings.bucket()
    return settings


def unknown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that look like settings and are none: a slip of the pen, or a setting of another version."""
    known = {variable(field) for field in Settings.__struct_fields__}
    return sorted(key for key in environ if key.startswith(PREFIX) and key not in known)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
