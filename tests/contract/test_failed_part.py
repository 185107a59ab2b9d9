"""A task of the API that dies ends the process: a load balancer and `movieq up` see it, and no client waits for events that never come."""

from __future__ import annotations

import pytest

from movieq.api import server
from movieq.errors import Internal
from movieq.queue.pubsub import Subscriber
from movieq.settings import Settings


async def test_an_api_whose_subscriber_dies_ends_with_an_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def dies(self: Subscriber) -> None:
        raise RuntimeError("the subscriber is dead")

    monkeypatch.setattr(Subscriber, "run", dies)
    with pytest.raises(Internal, match="background task of the API has failed"):
        await server.serve(settings, server.listen("127.0.0.1", 0))
