"""Fixtures for tests with several processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fleet import Fleet, fleet


@pytest.fixture
async def installation(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Yield a fleet: API processes and workers that a test starts one by one, on a Valkey of their own."""
    async with fleet(tmp_path) as started:
        yield started
