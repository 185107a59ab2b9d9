"""Limits of one client in an API process: places for open connections, and requests a second.

A refusal is a 429 that names the limit and its setting. Each kind of refusal is counted for `/tasks/metrics`, and logged at most once a
minute, so that an attacker cannot fill the log.
"""

from __future__ import annotations

import math
import resource
import time
from collections import Counter
from typing import Final

import msgspec
from redis.exceptions import ResponseError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from movieq import logs
from movieq.errors import RateLimited
from movieq.queue.api_keys import ApiKeys
from movieq.queue.refusals import is_fault
from movieq.settings import Settings, variable

RESERVED_FILES: Final = 256
"""Open files that are not for connections of clients: connections to Redis and the storage, and temporary files."""
FEWEST_CONNECTIONS: Final = 64
STREAMS_SHARE: Final = 0.75
"""The share of the connections that streams may take, so that some are always free for other requests."""
LOGGED_EVERY_S: Final = 60.0
PLACES_RETRY_S: Final = 10
"""`Retry-After` of a client that got no place."""
BLOCK_S: Final = 0.2
"""A process takes the requests of a key from Redis in blocks, each of what the key may send in this time."""
REFUSED_S: Final = 1.0
"""How long a process asks for no tokens after Redis has refused them."""
BUCKETS: Final = 10_000
"""Most clients whose blocks are remembered; when there are more, all are forgotten."""

ALLOWANCE: Final = "movieq.allowance"
"""The item of an ASGI scope that holds the `Allowance` of the request's API key."""

log = logs.get()


class Hits:
    """How often each limit has refused a client since the process started."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}

    def add(self, limit: str) -> None:
        """Count a refusal. The first of a minute is logged, with the number of refusals since the last line."""
        self.counts[limit] += 1
        now_s = time.monotonic()
        last_s, count = self._logged.get(limit, (-math.inf, 0))
        if now_s - last_s >= LOGGED_EVERY_S:
            self._logged[limit] = now_s, self.counts[limit]
            log.warning("limit_hit", limit=limit, hits=self.counts[limit] - count)


HITS: Final = Hits()
"""The refusals of this process."""


def connections_limit() -> int:
    """Return how many connections of clients this process may have open, by its limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else max(FEWEST_CONNECTIONS, soft - RESERVED_FILES)


class Place:
    """A place that a stream, a waiting request or an arriving body has taken."""

    def __init__(self, places: Places, owners: tuple[str, ...]) -> None:
        self._places = places
        self._owners = owners

    def free(self) -> None:
        """Give the place back. A second call does nothing."""
        owners, self._owners = self._owners, ()
        self._places.taken.subtract(owners)
        for owner in owners:
            if not self._places.taken[owner]:
                del self._places.taken[owner]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.free()


class Places:
    """The places of a process for what holds a connection: event streams, requests that wait for a task, and arriving bodies.

    Streams and waiting requests take one of the process's places. An API key gets `max_streams_per_key` of them, and as many places for
    bodies, apart, so that open streams never refuse a submit. The signed URLs of one task or project get `max_streams_per_url`, and those
    of a key together half of the process's places, since browsers use them.
    """

    def __init__(self, settings: Settings) -> None:
        most = int(connections_limit() * STREAMS_SHARE)
        self._most = min(most, settings.max_streams or most)
        self._per_key = settings.max_streams_per_key or self._most
        self._per_url = settings.max_streams_per_url or self._most
        self.taken: Counter[str] = Counter()
        """Number of taken places of each owner; "streams" is the process."""

    def take_for_key(self, key_id: str) -> Place:
        """Take a place for a stream or a waiting request with this API key. Raises RateLimited."""
        return self._take(self._of_process(), _Owner("streams_of_key", key_id, self._per_key, "max_streams_per_key", "An API key"))

    def take_for_url(self, subject: str, key_id: str) -> Place:
        """Take a place for a stream by a signed URL of the task or project `subject`, issued to this API key. Raises RateLimited."""
        return self._take(
            self._of_process(),
            _Owner("streams_of_url", f"{subject} {key_id}", self._per_url, "max_streams_per_url", "The signed URLs of one task or project"),
            _Owner("streams_of_urls", key_id, max(1, self._most // 2), "max_streams", "The signed URLs of one API key"),
        )

    def take_for_body(self, key_id: str) -> Place:
        """Take a place for the arriving body of a request with this API key; an upload keeps it until it is stored. Raises RateLimited."""
        return self._take(_Owner("bodies_of_key", key_id, self._per_key, "max_streams_per_key", "An API key"))

    def _of_process(self) -> _Owner:
        return _Owner("streams", "", self._most, "max_streams", "This server")

    def _take(self, *owners: _Owner) -> Place:
        for owner in owners:
            if self.taken[owner.name] >= owner.most:
                HITS.add(owner.limit)
                what = "arriving bodies" if owner.limit == "bodies_of_key" else "streams and waiting requests"
                raise RateLimited(
                    f"{owner.who} may have {owner.most} {what} open ({variable(owner.setting)}): close one, or try again later",
                    retry_after_s=PLACES_RETRY_S,
                )
        names = tuple(owner.name for owner in owners)
        self.taken.update(names)
        return Place(self, names)


class _Owner(msgspec.Struct, frozen=True):
    """A client, url or process that a place counts for: at most `most` places are taken for the same `limit` and `id`."""

    limit: str
    id: str
    most: int
    setting: str
    who: str

    @property
    def name(self) -> str:
        return f"{self.limit} {self.id}".rstrip()


class Allowance(msgspec.Struct):
    """What is left of the requests of a key: `limit` at once, `remaining` now, and `limit` again after `reset_s`."""

    limit: int
    remaining: int
    reset_s: int

    def headers(self) -> dict[str, str]:
        """Return the X-RateLimit headers."""
        return {
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(self.reset_s),
        }


class AllowanceHeaders:
    """Middleware that adds the X-RateLimit headers to the responses of requests with an API key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app and add the headers to its response."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and (allowance := scope.get(ALLOWANCE)) is not None:
                added = [(name.lower().encode(), value.encode()) for name, value in allowance.headers().items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Rates:
    """Token buckets, one for each API key and each signed URL, shared by the API processes through Redis.

    A process takes tokens in blocks, so that most requests need no round trip to Redis. Tokens of a block that are not spent at once stay
    with the process, so a client can exceed its limit by one block for each process.
    """

    def __init__(self, settings: Settings, api_keys: ApiKeys) -> None:
        self._per_s = settings.requests_per_s
        self._burst = settings.request_burst
        self._block = max(1, min(self._burst // 10, int(self._per_s * BLOCK_S)))
        self._api_keys = api_keys
        self._held: dict[str, tuple[int, int]] = {}
        """Tokens in hand, and tokens that were left in Redis."""
        self._empty_until_s: dict[str, float] = {}
        """When a client's next token is there: until then its requests are refused without asking Redis."""
        self._unlimited_until_s = 0.0
        """While Redis refuses writes, there is no limit: reading must still work, and a refusal by a replica costs the connection."""

    async def spend(self, client: str) -> Allowance | None:
        """Spend a token of a client. Return what is left; None without a limit. Raises RateLimited."""
        if not self._per_s or time.monotonic() < self._unlimited_until_s:
            return None
        held, left = self._held.get(client, (0, 0))
        if not held:
            wait_s = self._empty_until_s.get(client, 0.0) - time.monotonic()
            if wait_s <= 0:
                try:
                    held, left, wait_ms = await self._api_keys.take_tokens(client, self._per_s, self._burst, self._block)
                except ResponseError as error:
                    if is_fault(error):
                        raise
                    self._unlimited_until_s = time.monotonic() + REFUSED_S
                    return None
                wait_s = wait_ms / 1000
            if not held:
                if len(self._empty_until_s) >= BUCKETS:
                    self._empty_until_s.clear()
                self._empty_until_s[client] = time.monotonic() + wait_s
                HITS.add("requests")
                raise RateLimited(
                    f"too many requests: at most {self._per_s:g} a second after {self._burst} at once are allowed "
                    f"({variable('requests_per_s')}, {variable('request_burst')}); try again after the seconds in Retry-After",
                    retry_after_s=max(1, math.ceil(wait_s)),
                    headers=Allowance(self._burst, 0, math.ceil(self._burst / self._per_s)).headers(),
                )
            held += self._held.get(client, (0, 0))[0]  # another request of this client may have taken a block meanwhile
        if len(self._held) >= BUCKETS:
            self._held.clear()
        self._held[client] = held - 1, left
        remaining = held - 1 + left
        return Allowance(self._burst, remaining, math.ceil(max(0, self._burst - remaining) / self._per_s))
