"""The shared connection to Redis, when something happens to it that nobody expected."""

from __future__ import annotations

from typing import Any

import structlog

from movieq.local.embedded import Valkey
from movieq.queue.connection import connect


async def test_a_reader_that_breaks_is_logged_and_the_command_goes_over_a_new_connection(server: Valkey) -> None:
    redis = connect(server.url, patient=False)
    real: Any = redis.connection_pool.connection_class
    broken: list[bool] = []

    class Odd(real):  # type: ignore[misc]  # the base class is a variable
        async def read_response(self, *args: Any, **options: Any) -> Any:
            if "disconnect_on_error" in options and not broken:  # only the reader of the shared connection passes it
                broken.append(True)
                raise ValueError("nobody expected this")
            return await super().read_response(*args, **options)

    redis.connection_pool.connection_class = Odd
    with structlog.testing.capture_logs() as entries:
        assert await redis.shared.call("PING") in (b"PONG", "PONG")
    assert broken
    assert [entry["event"] for entry in entries] == ["redis_reader_broke"]
    await redis.aclose()
