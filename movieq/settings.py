"""Every setting: one frozen Struct, read once from the environment and `.env`.

The environment variable of a field is its name in capitals with `MOVIEQ_` in front. `.env.example` and the guide "Settings"
(`movieq/web/docs/settings.md`) list the same names, defaults and sentences; a test compares the three.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import SplitResult, parse_qsl, urlsplit

import msgspec
from dotenv import dotenv_values
from dotenv.parser import Binding, parse_stream
from msgspec import Meta

from movieq.errors import SettingsError
from movieq.tasks.states import PREFIX_PATTERN, EngineChoice, Kind
from movieq.tasks.wire import PROJECT_PATTERN

PREFIX: Final = "MOVIEQ_"
MIN_SECRET: Final = 16
"""Fewest characters of a signing secret: a shorter one can be guessed from a single url."""
MIN_SECRET_BYTES: Final = 16
"""Of a webhook secret: Standard Webhooks recommends 24 to 64; below 128 bits a secret can be guessed."""
STORAGE: Final = Path(".movieq/media")
_SEGMENT: Final = "[A-Za-z0-9_-][A-Za-z0-9._-]*"
_NEAR: Final = 0.85
"""How similar to a setting a name without the prefix must be to count as a typing error."""
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_OF_REDIS: Final = {"db", "client_name"}
_OF_TLS: Final = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
"""The query parameters that a Redis url may have. Others that redis-py takes would change the form of its answers."""

Network = IPv4Network | IPv6Network


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
    """What an operator decides, parsed. The `r2_` settings are part of the bucket of `storage`."""

    redis_url: Annotated[str, Meta(description="Redis or Valkey: redis://host:6379/0, or unix:///path; unset: `up` starts its own")] = ""
    key_prefix: Annotated[
        str,
        Meta(
            pattern=rf"^{PREFIX_PATTERN}(?!\n)$",
            description="Prefix of every key and channel in Redis; installations that share a database need different ones",
        ),
    ] = "movieq"
    allow_eviction: Annotated[
        bool, Meta(description="Whether to start on a Redis that evicts keys when its memory is full, which loses tasks")
    ] = False
    public_url: Annotated[
        str, Meta(description="Url at which clients reach the API; unset: the address it listens on (workers need it)")
    ] = ""
    api_keys: Annotated[
        dict[str, Grant], Meta(description="Comma-separated, each KEY, KEY=PROJECTS or KEY=PROJECTS/SCOPES; unset: `up` generates one")
    ] = {}
    signing_secret: Annotated[
        tuple[bytes, ...],
        Meta(description="Signs event and media urls; two, comma-separated, while rotating, new first; unset: generated and kept in Redis"),
    ] = ()
    webhook_secret: Annotated[
        tuple[str, ...], Meta(description="Signs webhooks, whsec_...; two, comma-separated, while rotating; unset: unsigned")
    ] = ()
    storage: Annotated[Path | Bucket, Meta(description="Where results are stored: a folder, s3://BUCKET or s3://BUCKET/PREFIX")] = STORAGE
    r2_endpoint: Annotated[str, Meta(description="Url of the S3 service, such as https://ACCOUNT.r2.cloudflarestorage.com")] = ""
    r2_access_key_id: Annotated[str, Meta(description="Access key of the bucket: it may read, write, list and delete there")] = ""
    r2_secret_access_key: Annotated[str, Meta(description="Secret of that access key")] = ""
    r2_public_url: Annotated[str, Meta(description="Public url of the bucket; unset: urls are signed for seven days")] = ""
    spool: Annotated[str, Meta(description="Working folder of a worker; unset: one in the system's temporary folder")] = ""
    models: Annotated[str, Meta(description="File with more model entries")] = ""
    engine: Annotated[EngineChoice, Meta(description="Engine for tasks that name no model: auto, diffusers or animatic")] = (
        EngineChoice.AUTO
    )
    queues: Annotated[
        tuple[Kind, ...], Meta(description="Queues that a worker serves, comma-separated; unset: those that suit its machine")
    ] = ()
    devices: Annotated[
        str, Meta(description="GPUs that a worker uses: auto, cpu, or a list such as cuda:0,cuda:1 (numbers as CUDA sees them)")
    ] = "auto"
    cpu_slots: Annotated[int, Meta(ge=1, le=256, description="Tasks of cpu_intensive that a worker runs at once")] = 1
    drain_s: Annotated[float, Meta(ge=0, le=86400, description="Seconds that a stopping worker gives its runs to finish")] = 30.0
    step_timeout_s: Annotated[
        float, Meta(ge=1, le=604_800, description="Seconds without progress after which an engine process is killed")
    ] = 600.0
    max_queued_per_project: Annotated[int, Meta(ge=0, le=1_000_000_000, description="Most waiting tasks of a project; 0: no limit")] = (
        10_000
    )
    max_queued: Annotated[int, Meta(ge=0, le=1_000_000_000, description="Most waiting tasks of all projects together; 0: no limit")] = 0
    max_record_mib_per_project: Annotated[
        int, Meta(ge=0, le=1_000_000, description="Most MiB of a project's task records in Redis; 0: no limit")
    ] = 256
    max_upload_mib_per_project: Annotated[int, Meta(ge=0, le=1_000_000, description="Most MiB of a project's uploads; 0: no limit")] = 2048
    max_streams: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Most open event streams and waiting requests of an API process; 0: as many as its limit of open files allows",
        ),
    ] = 5_000
    max_streams_per_key: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Most streams and waiting requests of an API key, and as many arriving bodies, in an API process; 0: no limit",
        ),
    ] = 200
    max_streams_per_url: Annotated[
        int,
        Meta(ge=0, le=1_000_000, description="Most open streams of the signed urls of one task or project in an API process; 0: no limit"),
    ] = 20
    requests_per_s: Annotated[
        float, Meta(ge=0, le=1_000_000, description="Requests a second of an API key, or of a signed url of a stream; 0: no limit")
    ] = 50.0
    request_burst: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Requests that an API key or a signed url may send at once after a pause")
    ] = 200
    project_weights: Annotated[
        dict[str, float], Meta(description="Shares of the workers, such as film=3, other=1; projects that are not named have 1")
    ] = {}
    keep_tasks_days: Annotated[float, Meta(ge=0, le=36_500, description="Days that an ended task is stored; 0: for ever")] = 30.0
    keep_media_days: Annotated[float, Meta(ge=0, le=36_500, description="Days that the files of a result are stored; 0: for ever")] = 0.0
    file_tags: Annotated[bool, Meta(description="Whether to write prompt, seed and model into the tags of files")] = True
    c2pa_certificate: Annotated[
        str, Meta(description="PEM file with the certificate chain that signs results (C2PA), the signer's first; unset: unsigned")
    ] = ""
    c2pa_key: Annotated[str, Meta(description="PEM file with the private key of that certificate, without a password")] = ""
    c2pa_required: Annotated[
        bool, Meta(description="Whether to publish only signed results; a worker without a certificate does not start")
    ] = False
    allow_private_urls: Annotated[
        tuple[Network, ...], Meta(description="Private networks that inputs and callbacks may be in, comma-separated: 10.0.0.0/8")
    ] = ()
    cors_origins: Annotated[tuple[str, ...], Meta(description="Origins whose pages may call the API, comma-separated; *: all")] = ()
    payload_url: Annotated[str, Meta(description="REST API of the PayloadCMS that results are written to: https://cms.example/api")] = ""
    payload_api_key: Annotated[str, Meta(description="API key of a user of the CMS who may read, create and delete media")] = ""
    payload_users: Annotated[str, Meta(description="Collection of the CMS that this user is in")] = "users"
    payload_media: Annotated[str, Meta(description="Collection of the CMS that results go into")] = "media"
    payload_mode: Annotated[
        PayloadMode, Meta(description="upload: into an upload collection; reference: a document with the url of the file")
    ] = PayloadMode.UPLOAD
    payload_fields: Annotated[
        str, Meta(description="Names of fields and values in the CMS (guide: For CMS developers): alt=title, mediaType:audio_clip=sound")
    ] = ""
    payload_writable: Annotated[
        str, Meta(description="Fields of the CMS that metadata.payload may name, comma-separated: scenes.clip, scenes.takes.first")
    ] = ""
    log_level: Annotated[LogLevel, Meta(description="debug, info, warning or error")] = LogLevel.INFO
    log_format: Annotated[LogFormat, Meta(description="console, json, or auto: console in a terminal")] = LogFormat.AUTO

    @property
    def max_record_bytes(self) -> int:
        """Most bytes of a project's task records; 0 for no limit."""
        return self.max_record_mib_per_project * 1024 * 1024

    @property
    def max_upload_bytes(self) -> int:
        """Most bytes of a project's uploads; 0 for no limit."""
        return self.max_upload_mib_per_project * 1024 * 1024

    def own_origins(self) -> tuple[str, ...]:
        """Return the addresses of the installation's own servers, which may be contacted wherever they are."""
        return (self.payload_url,) if self.payload_url else ()


class Bucket(msgspec.Struct, frozen=True):
    """A bucket of an S3 service. `prefix` is empty or ends with a slash; without a `public_url` addresses are signed."""

    name: str
    prefix: str
    endpoint: str = ""
    key_id: str = ""
    secret: str = ""
    public_url: str = ""


def key_hash(key: str) -> str:
    """Return the hash by which an API key is known. Keys are random and long, so a plain hash will do."""
    return hashlib.sha256(key.encode()).hexdigest()


class Scope(StrEnum):
    """What a key may do: `read` states and events, `submit` tasks (also cancel, retry, upload), `admin` the rest."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


class Grant(msgspec.Struct, frozen=True):
    """What a key may do; `projects` is None for all projects."""

    projects: frozenset[str] | None
    scopes: frozenset[Scope]

    def allows(self, project_id: str) -> bool:
        """Return whether the key belongs to the project."""
        return self.projects is None or project_id in self.projects


def variable(field: str) -> str:
    """Return the environment variable of a field."""
    return PREFIX + field.upper()


def load(environ: Mapping[str, str] = os.environ, env_file: Path = Path(".env"), *, storage: Path = STORAGE) -> Settings:
    """Return the settings of this process: the environment first, then `.env`, then defaults. Raises SettingsError naming all faults.

    `storage` is the default of the setting of that name.
    """
    found = {**_read(env_file), **environ}
    values: dict[str, Any] = {"storage": storage}
    problems: list[str] = []
    for field in msgspec.structs.fields(Settings):
        text = found.get(variable(field.name), "").strip()
        try:
            text.encode()
            if text:
                parse = _PARSERS.get(field.name)
                values[field.name] = parse(text) if parse else _converted(text, field.type)
        except SettingsError as error:
            problems.append(error.message)
        except UnicodeEncodeError:
            problems.append(f"{variable(field.name)}: its value is not UTF-8; set it in a UTF-8 locale")
        except ValueError:
            problems.append(f"{variable(field.name)}: {_allowed(field.type)} is allowed, got {text[:40]!r}")
    if isinstance(bucket := values.get("storage"), Bucket):
        try:
            values["storage"] = _with_service(bucket, values)
        except SettingsError as error:
            problems.append(error.message)
    if problems:
        raise SettingsError("; ".join(problems))
    return Settings(**values)


def unknown(environ: Mapping[str, str] = os.environ, env_file: Path = Path(".env")) -> dict[str, str]:
    """Return each name that looks like a setting and is none, with a sentence: a typing error, or a setting of another version.

    A line of `.env` that cannot be read is named by its number, since it may hold a secret. Raises SettingsError for an unreadable file.
    """
    known = [variable(field) for field in Settings.__struct_fields__]
    found = {name: said for name in sorted(environ) if (said := _not_a_setting(name, known, ""))}
    for binding in _bindings(env_file):
        if binding.error:
            line = f"line {binding.original.line}"
            found[line] = f"{line} of {env_file} cannot be read: write NAME=value, and close every quote"
        elif binding.key is not None and (said := _not_a_setting(binding.key, known, f" (in {env_file})")):
            found[binding.key] = said
        elif binding.key in known and binding.value is None:
            found[binding.key] = f"{binding.key} (in {env_file}) has no value: write {binding.key}=value"
    return found


def _not_a_setting(name: str, known: list[str], where: str) -> str | None:
    """Return the sentence about a name that looks like a setting and is none; None for any other name."""
    if name in known:
        return None
    near = difflib.get_close_matches(name.upper(), known, 1, 0.6 if name.upper().startswith("MOVIEQ") else _NEAR)
    if not near and not name.upper().startswith(PREFIX):
        return None
    return f"{name}{where} is not a setting{f'; did you mean {near[0]}?' if near else ''}"


def _read(env_file: Path) -> dict[str, str]:
    """Return the variables of a `.env`. Raises SettingsError where it is not text."""
    lines = "".join(binding.original.string for binding in _bindings(env_file) if not binding.error)
    return {name: value for name, value in dotenv_values(stream=io.StringIO(lines)).items() if value is not None}


def _bindings(env_file: Path) -> list[Binding]:
    if env_file.is_dir() or not (env_file.exists() or env_file.is_symlink()):  # a folder .env is a virtual environment
        return []
    try:
        text = env_file.read_text("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{env_file} cannot be read: {error.strerror}; give this user the right to read it, or remove it") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16, or a binary
        raise SettingsError(f"{env_file} is not text in UTF-8: save it as UTF-8 (Notepad calls UTF-16 Unicode), or remove it")
    return list(parse_stream(io.StringIO(text)))


def _converted(text: str, kind: Any) -> Any:
    """Return the value of a setting that is given as text. Raises ValueError where that is not allowed."""
    value = msgspec.convert(text, kind, strict=False)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(text)
    return value


def _allowed(kind: Any) -> str:
    """Return in words what a setting of this type takes."""
    info = msgspec.inspect.type_info(kind)
    while isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    match info:
        case msgspec.inspect.IntType():
            return f"a whole number from {info.ge} to {info.le}"
        case msgspec.inspect.FloatType():
            return f"a number from {info.ge} to {info.le}"
        case msgspec.inspect.EnumType():
            return f"one of {', '.join(info.cls)}"
    return "true or false"


# ── Values with a form of their own ───────────────────────────────────────────────────────────────────────────────────────────────────


def _networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ip_network(part, strict=False) for part in _parts(text))
    except ValueError as error:
        raise SettingsError(f"{PREFIX}ALLOW_PRIVATE_URLS: {error}; it takes networks such as 127.0.0.0/8, 10.1.2.3") from None


def _storage(text: str) -> Path | Bucket:
    """Return the folder, or the bucket without its service."""
    if not text.startswith("s3://"):
        if re.match(r"[A-Za-z0-9+.-]+://|s3:", text):
            raise SettingsError(f"{PREFIX}STORAGE: {text[:200]!r} is neither a folder nor s3://BUCKET or s3://BUCKET/PREFIX")
        return Path(text)
    name, _, prefix = text.removeprefix("s3://").rstrip("/").partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name) or not re.fullmatch(rf"({_SEGMENT}(/{_SEGMENT})*)?", prefix):
        raise SettingsError(f"{PREFIX}STORAGE: {text!r} is no s3://BUCKET or s3://BUCKET/PREFIX of A-Z a-z 0-9 . _ -")
    return Bucket(name, f"{prefix}/" if prefix else "")


def _with_service(bucket: Bucket, values: Mapping[str, str]) -> Bucket:
    """Return the bucket with the S3 service that the `r2_` settings name."""
    for field in ("r2_endpoint", "r2_public_url"):
        split = _split(values.get(field, ""))
        url = split and split[0]
        if url is None or (url.geturl() and (url.scheme not in ("http", "https") or not url.hostname or url.username or url.query)):
            raise SettingsError(f"{variable(field)}: it takes an address such as https://files.example.com, without a user or a query")
    missing = [variable(f) for f in ("r2_endpoint", "r2_access_key_id", "r2_secret_access_key") if f not in values]
    if missing:
        place = f"s3://{bucket.name}/{bucket.prefix}".rstrip("/")
        raise SettingsError(f"{PREFIX}STORAGE: {place} needs {', '.join(missing)} too")
    return msgspec.structs.replace(
        bucket,
        endpoint=values["r2_endpoint"].rstrip("/"),
        key_id=values["r2_access_key_id"],
        secret=values["r2_secret_access_key"],
        public_url=values.get("r2_public_url", "").rstrip("/"),
    )


def _signing_secrets(text: str) -> tuple[bytes, ...]:
    """Return the secrets: the first signs, all verify. An error never shows one."""
    secrets = _parts(text)
    for position, secret in enumerate(secrets, 1):
        if len(secret) < MIN_SECRET:
            raise SettingsError(
                f"{PREFIX}SIGNING_SECRET: secret {position} of {len(secrets)} is shorter than {MIN_SECRET} characters; "
                "make one with: openssl rand -base64 32"
            )
    return tuple(secret.encode() for secret in secrets)


def _webhook_secrets(text: str) -> tuple[str, ...]:
    """Return the secrets, the newest first. An error counts to the wrong one and never shows it."""
    secrets = tuple(part.strip() for part in text.split(","))
    for position, secret in enumerate(secrets, 1):
        try:
            fits = secret.startswith("whsec_") and len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) >= MIN_SECRET_BYTES
        except ValueError:  # not base64, or not ASCII
            fits = False
        if not fits:
            raise SettingsError(
                f"{PREFIX}WEBHOOK_SECRET: secret {position} of {len(secrets)} is not whsec_ and the base64 of {MIN_SECRET_BYTES} or more "
                'bytes; make one with: echo "whsec_$(openssl rand -base64 32)"'
            )
    return secrets


def _kinds(text: str) -> tuple[Kind, ...]:
    try:
        return tuple(Kind(part) for part in _parts(text))
    except ValueError as error:
        raise SettingsError(f"{PREFIX}QUEUES: {error}; it takes {', '.join(Kind)}") from None


def _weights(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in _parts(text):
        project, _, weight = part.partition("=")
        if not re.fullmatch(PROJECT_PATTERN, project) or not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", weight) or float(weight) == 0:
            raise SettingsError(f"{PREFIX}PROJECT_WEIGHTS: {part!r} is no project=weight, such as film=3")
        found[project] = float(weight)
    return found


def _origins(text: str) -> tuple[str, ...]:
    """Return the origins. Raises SettingsError for one that no browser sends."""
    origins = _parts(text)
    for origin in origins:
        if origin != "*" and (sent := _as_sent(origin)) != origin:
            example = sent or "https://app.example"
            raise SettingsError(
                f"{PREFIX}CORS_ORIGINS: {origin!r} is not an origin as browsers send it: scheme and host, a port only where it is not "
                f"the scheme's default, no path and no final slash; write {example}, or * for every origin"
            )
    return tuple(origins)


def _grants(text: str) -> dict[str, Grant]:
    """Return what each API key may do. An error names the position, never the key."""
    grants: dict[str, Grant] = {}
    for position, part in enumerate(_parts(text), 1):
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


# ── Addresses ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _split(url: str) -> tuple[SplitResult, int | None] | None:
    """Return the parts of an address and its port; None for text that is no address."""
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError:
        return None


def _as_sent(origin: str) -> str | None:
    """Return the origin that a browser sends for a page at this address (RFC 6454); None where there is none."""
    split = _split(origin if "://" in origin else f"https://{origin}")
    if split is None or not split[0].hostname:
        return None
    parts, port = split
    try:
        host = str(parts.hostname).encode("idna").decode() if not str(parts.hostname).isascii() else str(parts.hostname)
    except UnicodeError:
        return None
    if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host) or origin == "null":
        return None
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + (f":{port}" if port and port != _DEFAULT_PORTS.get(parts.scheme) else "")


def _public_url(url: str) -> str:
    split = _split(url)
    if split is None or split[0].scheme not in ("http", "https") or not split[0].hostname or re.search(r"[?#@\s]", url):
        raise SettingsError(f"{PREFIX}PUBLIC_URL: {url[:200]!r} is not an address such as https://movieq.example; write that of the API")
    return url.rstrip("/")


def _redis_url(url: str) -> str:
    """Return the url. Raises SettingsError, which shows no password, for one that redis-py would misread silently or fail on later."""
    if problem := _redis_url_problem(url):
        raise SettingsError(f"{PREFIX}REDIS_URL: {problem}; it takes redis://USER:PASSWORD@HOST:6379/0, rediss:// for TLS, or unix:///path")
    return url


def _redis_url_problem(url: str) -> str | None:
    scheme, slashes, rest = url.partition("://")
    if not slashes or scheme not in ("redis", "rediss", "unix"):
        return "it must begin with redis://, rediss:// or unix://"
    if "@" in re.split("[/?#]", rest, maxsplit=1)[-1] or rest.rpartition("@")[0].count("[") or rest.rpartition("@")[0].count("]"):
        return "in its user and password write / as %2F, ? as %3F, # as %23, [ as %5B, ] as %5D and @ as %40"
    split = _split(url)
    if split is None or (split[0].netloc.endswith(":") and scheme != "unix") or split[1] == 0:
        return "its port must be a number from 1 to 65535"
    parts, _ = split
    if "#" in url:
        return "it must not have a part after #"
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = dict(pairs)
    taken = _OF_REDIS | (_OF_TLS if scheme == "rediss" else set())
    for name, value in pairs:
        if name not in taken:
            return f"{name[:40]!r} in its query is for rediss:// only" if name in _OF_TLS else f"{name[:40]!r} is not allowed in its query"
        if not value or len(query) < len(pairs):
            return f"{name} may appear in its query once, as {name}=VALUE"
    if query.get("ssl_cert_reqs", "none") not in ("none", "optional", "required"):
        return "ssl_cert_reqs must be none, optional or required"
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if name in query and not os.access(query[name], os.R_OK):
            return f"the file of {name}, {query[name]}, does not exist, or this user may not read it"
    number = query.get("db", "")
    if scheme == "unix":
        if parts.hostname or not parts.path.strip("/"):
            return "the path of a socket must be absolute: unix:///run/valkey.sock, with three slashes"
    elif not parts.hostname:
        return "it names no host"
    elif "," in parts.netloc:
        return "it must name one host: movieq needs one server, not a cluster"
    elif parts.path.strip("/"):
        if number:
            return "the database is given both in its path and in its query"
        number = parts.path.removeprefix("/")
    if number and not re.fullmatch("[0-9]{1,5}", number):
        return f"{number[:40]!r} is not a database: they have numbers, 0 to 15 unless the server is configured otherwise"
    return None


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "redis_url": _redis_url,
    "public_url": _public_url,
    "api_keys": _grants,
    "signing_secret": _signing_secrets,
    "webhook_secret": _webhook_secrets,
    "storage": _storage,
    "queues": _kinds,
    "project_weights": _weights,
    "allow_private_urls": _networks,
    "cors_origins": _origins,
}
"""How a setting is parsed whose value is no number, bool, choice or plain text. Each raises SettingsError."""
