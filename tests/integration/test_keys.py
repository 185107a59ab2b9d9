"""API keys in Redis: created, listed and revoked by the command, and accepted by the API."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from movieq.api import key_cache
from movieq.api.key_cache import KeyCache
from movieq.local.embedded import Valkey
from movieq.queue.api_keys import ApiKeys
from movieq.queue.store import Store
from movieq.settings import Grant, Scope, key_hash


def movieq(server: Valkey, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a `movieq keys` command against the server of the test."""
    environment = {**os.environ, "MOVIEQ_REDIS_URL": server.url}
    return subprocess.run(
        [sys.executable, "-m", "movieq.cli", "keys", *words], env=environment, capture_output=True, text=True, timeout=30, check=False
    )


async def test_a_key_is_shown_once_kept_as_a_hash_and_can_be_taken_back(
    server: Valkey, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_cache, "CACHE_S", 0)
    created = movieq(server, "create", "--project", "film", "--scope", "read")
    key = created.stdout.strip()
    keys = KeyCache({}, ApiKeys(store.redis))
    assert await keys.grant(key_hash(key)) == Grant(frozenset({"film"}), frozenset({Scope.READ}))
    listed = movieq(server, "list").stdout
    assert listed.split() == [key_hash(key)[:12], "film", "read"]
    assert movieq(server, "revoke", key_hash(key)[:12]).returncode == 0
    assert await keys.grant(key_hash(key)) is None
    assert movieq(server, "revoke", key).returncode == 1


async def test_a_project_that_is_none_is_refused(server: Valkey, store: Store) -> None:
    refused = movieq(server, "create", "--project", "a b")
    assert refused.returncode == 1
    assert await ApiKeys(store.redis).grants() == {}
