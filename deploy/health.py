"""Check the health of a container: `health.py URL` asks its API, `health.py worker` asks Redis for the heartbeat of its worker.

The image asks `/health/live`: what a restart would not mend, such as a Redis that is away, must not restart the API. Load balancers should
ask `/health/ready`.
"""

import asyncio
import socket
import sys
import urllib.request

from movieq.queue.connection import connect
from movieq.queue.store import Store
from movieq.settings import load
from movieq.tasks.entities import WorkerState

WAIT_S = 5


def api(url: str) -> bool:
    """Whether the API answers 200. Raises HTTPError where it answers 503."""
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:  # noqa: S310  # the url is the image's own
        return bool(answer.status == 200)


async def worker() -> bool:
    """A worker of this host was heard of within the last 15 s."""
    store = Store(connect(load().redis_url, patient=False))
    try:
        async with asyncio.timeout(WAIT_S):
            rows = await store.workers()
    finally:
        await store.aclose()
    return any(row.host == socket.gethostname() and row.status is not WorkerState.OFFLINE for row in rows)


if __name__ == "__main__":
    sys.exit(not (asyncio.run(worker()) if sys.argv[1] == "worker" else api(sys.argv[1])))
