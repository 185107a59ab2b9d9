"""`movieq keys`: API keys in Redis."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from movieq import checks
from movieq.cli.context import read_settings, refuse, run_async
from movieq.queue.api_keys import ApiKeys
from movieq.queue.connection import connect
from movieq.settings import Grant, Scope, key_hash
from movieq.tasks.faults import given
from movieq.tasks.wire import PROJECT_PATTERN, PROJECT_RULE

if TYPE_CHECKING:
    pass

T = TypeVar("T")


@click.group()
def keys() -> None:
    """Create, list and revoke API keys. These are stored in Redis, in addition to those of MOVIEQ_API_KEYS."""


@keys.command("create")
@click.option("--project", "projects", multiple=True, help="Project that the key may use; repeat for more. Default: all projects.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([str(scope) for scope in Scope]),
    help="Scope of the key; repeat for more. Default: read and submit with --project, else all.",
)
def keys_create(projects: tuple[str, ...], scopes: tuple[str, ...]) -> None:
    """Create a key and print it. It is not shown again."""
    if wrong := [project for project in projects if not re.fullmatch(PROJECT_PATTERN, project)]:
        refuse(f"--project: expected {PROJECT_RULE}, got {given(wrong[0])}")
    key = secrets.token_urlsafe(24)
    default = frozenset({Scope.READ, Scope.SUBMIT}) if projects else frozenset(Scope)
    grant = Grant(frozenset(projects) if projects else None, frozenset(map(Scope, scopes)) or default)
    _with_api_keys(lambda api_keys: api_keys.add_grant(key_hash(key), grant))
    print(key)


@keys.command("list")
def keys_list() -> None:
    """List the keys by the start of their hash, with projects and scopes."""
    for id, grant in _with_api_keys(lambda api_keys: api_keys.grants()).items():
        projects = "all projects" if grant.projects is None else ", ".join(sorted(grant.projects))
        print(f"{id[:12]}  {projects}  {'+'.join(sorted(grant.scopes))}")


@keys.command("revoke")
@click.argument("key_or_hash")
def keys_revoke(key_or_hash: str) -> None:
    """Revoke a key, given as itself or as the start of its hash. It stops working within five seconds."""

    async def revoke(api_keys: ApiKeys) -> bool:
        found = [
            id for id in await api_keys.grants() if id == key_hash(key_or_hash) or (len(key_or_hash) >= 8 and id.startswith(key_or_hash))
        ]
        return len(found) == 1 and await api_keys.revoke(found[0])

    if not _with_api_keys(revoke):
        refuse("no key matches, or more than one does: see `movieq keys list`")


def _with_api_keys(work: Callable[[ApiKeys], Awaitable[T]]) -> T:
    settings = read_settings()

    async def run() -> T:
        await checks.reached(settings)
        async with connect(settings.redis_url, patient=True, prefix=settings.key_prefix) as redis:
            return await work(ApiKeys(redis))

    return run_async(run)
