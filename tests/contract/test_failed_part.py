"""If a background task of the API fails, the process ends, so that a load balancer and `movieq up` notice and no client waits in vain."""

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
