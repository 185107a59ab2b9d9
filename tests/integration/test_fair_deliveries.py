"""Deliveries share the places of a worker fairly, and a receiver that does not answer costs nobody else a place."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from aiohttp import web
from arq import Retry
from arq.constants import in_progress_key_prefix
from structlog.testing import capture_logs

from movieq.delivery import webhooks
from movieq.queue.keys import KEYS
from movieq.queue.outbox import Admission, Admitted, Outbox
from movieq.queue.store import Store
from movieq.storage.folder import FolderStorage
from movieq.tasks.entities import Delivery, DeliveryState
from movieq.tasks.states import TaskId
from tests.arrange import delivery_parts, new_task, now_ms, raw, result, running
from tests.fleet import Fleet, eventually
from tests.programs import program
from tests.service import receiver, serving
from workers.delivery import DEPOSITS, GIVE_UP_S, HELD_S, JITTER, WEBHOOKS, DeliveryParts, deliver

HELD_MS: Final = int(HELD_S * 1000)
HALF: Final = WEBHOOKS // 2
_tries = itertools.count(1)


@pytest.fixture
def outbox(store: Store) -> Outbox:
    """Return the outbox."""
    return Outbox(store.redis)


@pytest.fixture
async def parts(store: Store, folder: Path) -> AsyncIterator[DeliveryParts]:
    """Yield the parts that deliveries share."""
    async with aiohttp.ClientSession() as session:
        yield delivery_parts(store, FolderStorage(folder, "http://127.0.0.1:1", (b"signs media",)), session)


async def webhook(store: Store, project: str, host: str = "a.test") -> str:
    """End a task; return the id of its webhook to this host."""
    task = new_task(project, callback_url=f"http://{host}/hook")
    await store.submit(task)
    await store.cancel(task.task_id)
    return f"{task.task_id}-1"


async def deposit(store: Store, project: str) -> str:
    """Complete a task; return the id of its CMS delivery."""
    task_id, run = await running(store, project=project)
    await store.complete(task_id, run, result(), "http://cms.test/api/media")
    return f"{task_id}-1"


async def admit(outbox: Outbox, in_flight: Iterable[Admitted] = ()) -> Admission:
    """Admit deliveries to a worker that runs these."""
    running = list(in_flight)
    webhooks = sum(each.is_webhook for each in running)
    return await outbox.admit("w1", f"nonce{next(_tries)}", WEBHOOKS - webhooks, DEPOSITS - (len(running) - webhooks), running, HELD_MS)


async def ended(outbox: Outbox, store: Store, each: Admitted) -> None:
    """End the job of a delivery, as arq does."""
    await raw(store).zrem(KEYS["deliveries"], each.job)
    await raw(store).delete(in_progress_key_prefix + each.job.decode())


def ids(admission: Admission) -> list[str]:
    """Return the ids of the admitted deliveries."""
    return [each.job.decode() for each in admission.admitted]


def by_project(admitted: Iterable[Admitted]) -> Counter[str]:
    """Return how many places each project has."""
    return Counter(each.queue.partition(":")[2] for each in admitted)


# Places


@pytest.mark.parametrize("hosts", [1, 150])
async def test_a_project_with_many_webhooks_leaves_places_to_the_next(store: Store, outbox: Outbox, hosts: int) -> None:
    for number in range(150):
        await webhook(store, "dead", f"{number % hosts}.test")
    first = await admit(outbox)
    assert (len(first.admitted), first.left, first.more) == (HALF, True, False)
    healthy = await webhook(store, "healthy", "b.test")
    second = await admit(outbox, first.admitted)
    assert ids(second) == [healthy]
    assert (await admit(outbox, first.admitted)).admitted == []  # none is admitted twice, and the project gets no more


async def test_a_host_of_many_projects_leaves_places_to_other_hosts(store: Store, outbox: Outbox) -> None:
    for number in range(150):
        await webhook(store, f"project{number}", "DEAD.test" if number % 2 else "dead.test")
    first = await admit(outbox)
    assert len(first.admitted) == HALF
    healthy = await webhook(store, "project0", "healthy.test")
    calls = [ids(await admit(outbox, first.admitted)) for _ in range(3)]  # each looks at a hundred projects
    assert [each for each in calls if each] == [[healthy]]


async def test_projects_with_many_webhooks_end_up_with_equal_shares_and_one_stays_free(store: Store, outbox: Outbox) -> None:
    projects = ("a", "b", "c")
    for project in projects:
        for number in range(90):
            await webhook(store, project, f"{project}{number}.test")
    flying: list[Admitted] = []
    for _ in range(150):
        flying += (await admit(outbox, flying)).admitted
        await ended(outbox, store, flying.pop(0))
    flying += (await admit(outbox, flying)).admitted
    assert by_project(flying) == dict.fromkeys(projects, WEBHOOKS // (len(projects) + 1))


async def test_a_host_that_two_projects_share_is_not_taken_by_the_one_with_more(store: Store, outbox: Outbox) -> None:
    for _ in range(100):
        await webhook(store, "many")
    first = await admit(outbox)
    assert len(first.admitted) == HALF
    one = await webhook(store, "one")
    assert ids(await admit(outbox, first.admitted)) == []  # the host has its share
    await ended(outbox, store, first.admitted[0])
    assert ids(await admit(outbox, first.admitted[1:])) == [one]


async def test_every_project_gets_its_turn_however_many_there_are(store: Store, outbox: Outbox) -> None:
    waiting = {await webhook(store, f"project{number}", f"{number}.test") for number in range(250)}
    flying: list[Admitted] = []
    for _ in range(20):
        flying += (await admit(outbox, flying)).admitted
        waiting -= {each.job.decode() for each in flying}
        for each in flying[: len(flying) // 2]:
            await ended(outbox, store, each)
        flying = flying[len(flying) // 2 :]
    assert waiting == set()


async def test_cms_deliveries_and_webhooks_do_not_wait_for_each_others_places(store: Store, outbox: Outbox) -> None:
    for _ in range(DEPOSITS + 2):
        await deposit(store, "film")
    webhooks = [await webhook(store, "film") for _ in range(3)]
    first = await admit(outbox)
    assert Counter(each.is_webhook for each in first.admitted) == {True: 3, False: DEPOSITS}
    assert sorted(id for id in ids(first) if id in webhooks) == sorted(webhooks)
    places = [each for each in first.admitted if each.is_webhook][:1] * WEBHOOKS
    assert [each.is_webhook for each in (await admit(outbox, places)).admitted] == [False] * 2


async def test_the_cms_is_shared_by_projects(store: Store, outbox: Outbox) -> None:
    for _ in range(2 * DEPOSITS):
        await deposit(store, "many")
    first = await admit(outbox)
    one = await deposit(store, "one")
    await ended(outbox, store, first.admitted[0])
    assert ids(await admit(outbox, first.admitted[1:])) == [one]


# Nothing is lost


async def test_a_delivery_whose_worker_died_is_admitted_again(store: Store, outbox: Outbox) -> None:
    delivery_id = await webhook(store, "film")
    (first,) = (await admit(outbox)).admitted
    assert 0 < await raw(store).pttl(in_progress_key_prefix + delivery_id) <= HELD_MS
    assert first.score == await raw(store).zscore(KEYS["deliveries"], delivery_id) <= await now_ms(store) + HELD_MS
    await raw(store).delete(in_progress_key_prefix + delivery_id)  # it has expired
    await raw(store).zadd(KEYS["deliveries"], {delivery_id: 1})
    assert ids(await admit(outbox)) == [delivery_id]


async def test_a_delivery_that_takes_longer_than_its_hold_is_not_admitted_again(store: Store, outbox: Outbox) -> None:
    delivery_id = await webhook(store, "film")
    await admit(outbox)
    await raw(store).zadd(KEYS["deliveries"], {delivery_id: 1})
    assert ids(await admit(outbox)) == []
    assert await raw(store).zscore(KEYS["deliveries"], delivery_id) == 1


@pytest.mark.parametrize(("name", "damage"), [("due_deliveries", "lost"), ("due_deliveries", "another type"), ("due_queues", "lost")])
async def test_deliveries_that_wait_for_a_place_are_found_though_their_lists_are_lost(
    store: Store, outbox: Outbox, name: str, damage: str
) -> None:
    delivery_ids = [await webhook(store, "film") for _ in range(3)]
    await outbox.admit("w1", f"nonce{next(_tries)}", 0, 0, [], HELD_MS)
    key = KEYS[name] + ("webhook:film" if name == "due_deliveries" else "")
    assert await raw(store).delete(key)
    if damage == "another type":
        await raw(store).set(key, "no list")
    for delivery_id in delivery_ids:
        assert 0 < await raw(store).zscore(KEYS["deliveries"], delivery_id) - await now_ms(store) <= 60_000
        await raw(store).zadd(KEYS["deliveries"], {delivery_id: 1})
    assert sorted(ids(await admit(outbox))) == sorted(delivery_ids)
    assert await raw(store).keys(KEYS["due_queues"] + "*") == []


async def test_a_damaged_record_holds_up_no_other_delivery(store: Store, outbox: Outbox) -> None:
    damaged, gone, whole = [await webhook(store, "film") for _ in range(3)]
    await raw(store).delete(KEYS["delivery"] + damaged, KEYS["delivery"] + gone)
    await raw(store).set(KEYS["delivery"] + damaged, "no record")
    assert sorted(ids(await admit(outbox))) == sorted([damaged, gone, whole])


async def test_what_has_ended_meanwhile_is_not_admitted_and_leaves_no_list(store: Store, outbox: Outbox) -> None:
    await webhook(store, "film")
    await outbox.admit("w1", f"nonce{next(_tries)}", 0, 0, [], HELD_MS)
    await raw(store).delete(KEYS["deliveries"])
    assert await admit(outbox) == Admission([], False, False)
    assert await raw(store).keys(KEYS["due_queues"] + "*") == []


async def test_thousands_that_are_due_together_are_sorted_in_several_calls(store: Store, outbox: Outbox) -> None:
    await raw(store).zadd(KEYS["deliveries"], {f"gone{number}-1": 1 for number in range(1200)})
    answers = [await outbox.admit("w1", f"nonce{next(_tries)}", 0, 0, [], HELD_MS) for _ in range(3)]
    assert [answer.more for answer in answers] == [True, True, False]
    assert await raw(store).zcard(KEYS["due_deliveries"] + "webhook:") == 1200


# Hosts that do not answer


async def timed_out(outbox: Outbox, delivery_id: str, times: int = 3) -> int:
    """Record timeouts of the delivery's host, each of another try; return what the last one said."""
    wait_ms = 0
    for _ in range(times):
        await outbox.delivered(delivery_id, DeliveryState.PENDING, next(_tries), None, "no answer")
        wait_ms = await outbox.record_answer(delivery_id, answered=False)
    return wait_ms


async def begun(outbox: Outbox, delivery_id: str) -> Delivery:
    """Begin a try; return the delivery."""
    delivery = await outbox.begin(delivery_id, HELD_MS)
    assert isinstance(delivery, Delivery)
    return delivery


async def over(store: Store, host: str = "a.test") -> None:
    """Let the time be over in which nothing is sent to this host."""
    await raw(store).hset(KEYS["unresponsive"] + host + " film", "until_ms", 1)


async def due(store: Store, delivery_id: str) -> bool:
    """Whether the delivery is due."""
    return bool(await raw(store).zscore(KEYS["deliveries"], delivery_id) <= await now_ms(store))


async def tried(parts: DeliveryParts, delivery_id: str) -> float | None:
    """Try a delivery; return the seconds until its next try, or None if there is none."""
    try:
        await deliver({"delivery_parts": parts, "job_id": delivery_id, "job_try": 1}, delivery_id)
    except Retry as again:
        return (again.defer_score or 0) / 1000
    return None


async def facts(outbox: Outbox, delivery_id: str) -> Delivery:
    """Return the state of a delivery."""
    ((_, delivery, _),) = await outbox.deliveries(TaskId(delivery_id.rpartition("-")[0]))
    return delivery


async def test_after_three_timeouts_in_a_row_a_host_gets_no_more_webhooks_of_the_project(store: Store, outbox: Outbox) -> None:
    delivery_id, others = await webhook(store, "film"), [await webhook(store, "film", "a.test:8080"), await webhook(store, "other")]
    assert await timed_out(outbox, delivery_id, 2) == 0
    await outbox.record_answer(delivery_id, answered=True)
    assert await timed_out(outbox, delivery_id, 2) == 0
    assert (await begun(outbox, delivery_id)).held_back_ms == 0
    assert await timed_out(outbox, delivery_id, 1) == 30_000
    assert 0 < (await begun(outbox, delivery_id)).held_back_ms <= 30_000
    assert [(await begun(outbox, each)).held_back_ms for each in others] == [0, 0]


async def test_an_unresponsive_host_gets_one_probe_at_a_time(store: Store, outbox: Outbox) -> None:
    probe, *others = [await webhook(store, "film") for _ in range(3)]
    await timed_out(outbox, probe)
    await over(store)
    assert (await begun(outbox, probe)).held_back_ms == 0
    for each in others:
        assert 0 < (await begun(outbox, each)).held_back_ms <= HELD_MS
    await raw(store).hset(KEYS["unresponsive"] + "a.test film", "probe_ms", 1)  # its worker died
    assert (await begun(outbox, others[0])).held_back_ms == 0


async def test_the_time_between_probes_doubles_up_to_ten_minutes(store: Store, outbox: Outbox) -> None:
    delivery_id = await webhook(store, "film")
    await timed_out(outbox, delivery_id, 2)
    waits = []
    for _ in range(7):
        waits.append(await timed_out(outbox, delivery_id, 1))
        assert await timed_out(outbox, delivery_id, 1) == 0  # of a try that began before
        await over(store)
        await raw(store).delete(KEYS["host_logged"] + "a.test")
    assert waits == [30_000, 60_000, 120_000, 240_000, 480_000, 600_000, 600_000]


async def test_times_from_before_the_clock_was_set_back_hold_nothing_back(store: Store, outbox: Outbox) -> None:
    probe, other = [await webhook(store, "film") for _ in range(2)]
    await timed_out(outbox, probe)
    ahead_ms = await now_ms(store) + 86_400_000
    await raw(store).hset(KEYS["unresponsive"] + "a.test film", mapping={"until_ms": ahead_ms, "probe": probe, "probe_ms": ahead_ms})
    assert (await begun(outbox, other)).held_back_ms == 0
    assert 0 < (await begun(outbox, probe)).held_back_ms <= HELD_MS
    await timed_out(outbox, other, 1)
    assert HELD_MS < (await begun(outbox, probe)).held_back_ms <= 60_000, "the timeout counts: the time doubles"


async def test_when_the_host_answers_all_that_wait_are_due(store: Store, outbox: Outbox) -> None:
    probe, *others = [await webhook(store, "film") for _ in range(4)]
    await timed_out(outbox, probe)
    for each in others:
        assert (await begun(outbox, each)).held_back_ms > 0
        await raw(store).zincrby(KEYS["deliveries"], 600_000, each)
    await outbox.record_answer(probe, answered=True)
    assert [await due(store, each) for each in others] == [True] * 3
    assert [(await begun(outbox, each)).held_back_ms for each in others] == [0] * 3


async def test_an_unresponsive_host_is_logged_once_a_minute(store: Store, outbox: Outbox) -> None:
    delivery_id = await webhook(store, "film")
    logged = []
    for _ in range(5):
        logged.append(await timed_out(outbox, delivery_id))
        await outbox.record_answer(delivery_id, answered=True)
    assert logged == [30_000, 0, 0, 0, 0]


async def test_what_is_stored_of_hosts_expires(store: Store, outbox: Outbox) -> None:
    for number, times in enumerate([1, 2, 3, 4]):
        delivery_id = await webhook(store, "film", f"{number}.test")
        await timed_out(outbox, delivery_id, times)
        await begun(outbox, delivery_id)
        await over(store, f"{number}.test")
        await begun(outbox, delivery_id)
    answered = await webhook(store, "film", "answered.test")
    await timed_out(outbox, answered)
    await outbox.record_answer(answered, answered=True)
    keys = [key for name in ("unresponsive", "held_back", "host_logged") for key in await raw(store).keys(KEYS[name] + "*")]
    assert len(keys) == 4 + 2 + 3
    assert [key for key in keys if not 0 < await raw(store).pttl(key) <= 86_400_000] == []


async def test_what_is_sent_again_is_tried_though_its_host_does_not_answer(store: Store, outbox: Outbox) -> None:
    delivery_id = await webhook(store, "film")
    await timed_out(outbox, delivery_id)
    assert (await begun(outbox, delivery_id)).held_back_ms > 0
    await outbox.resend(TaskId(delivery_id.rpartition("-")[0]), delivery_id)
    assert await due(store, delivery_id)
    assert (await begun(outbox, delivery_id)).held_back_ms == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a receiver answer within a tenth of a second, or not at all."""
    monkeypatch.setattr(webhooks, "send", partial(webhooks.send, timeout_s=0.1))


class Silent:
    """A receiver that reads each request, counts it, and answers none before it is told to."""

    def __init__(self) -> None:
        self.requests = 0
        self.answers = asyncio.Event()
        self.host = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.requests += 1
        await request.read()
        await self.answers.wait()
        return web.Response()


@pytest.fixture
async def silent() -> AsyncIterator[Silent]:
    """Yield a receiver that does not answer."""
    peer = Silent()
    async with serving({"/hook": peer.handle}, "POST") as url:
        peer.host = url.removeprefix("http://")
        yield peer
        peer.answers.set()


@pytest.mark.usefixtures("impatient")
async def test_a_webhook_that_waits_for_its_host_says_so_and_loses_no_try(
    store: Store, outbox: Outbox, parts: DeliveryParts, silent: Silent
) -> None:
    webhooks = [await webhook(store, "film", silent.host) for _ in range(4)]
    with capture_logs() as entries:
        for each in webhooks[:3]:
            assert await tried(parts, each) is not None
    logged: list[MutableMapping[str, Any]] = [entry for entry in entries if entry["event"] == "host_unresponsive"]
    assert [(entry["host"], entry["again_in_s"]) for entry in logged] == [(silent.host, 30)]
    wait = await tried(parts, webhooks[3])
    assert wait is not None
    assert 20 < wait <= 30 * (1 + JITTER)
    held_back = await facts(outbox, webhooks[3])
    assert (held_back.state, held_back.tries, silent.requests) == (DeliveryState.PENDING, 0, 3)
    assert "its host does not answer" in (held_back.last_problem or "")
    await over(store, silent.host)
    silent.answers.set()
    assert await tried(parts, webhooks[0]) is None
    assert await tried(parts, webhooks[3]) is None
    assert (await facts(outbox, webhooks[3])).state is DeliveryState.DELIVERED


@pytest.mark.parametrize("resent", [False, True])
async def test_a_webhook_whose_host_does_not_answer_for_two_days_is_given_up(
    store: Store, outbox: Outbox, parts: DeliveryParts, resent: bool
) -> None:
    delivery_id = await webhook(store, "film")
    await timed_out(outbox, await webhook(store, "film"))
    key = KEYS["delivery"] + delivery_id
    await raw(store).hset(key, "at_ms", await now_ms(store) - int(GIVE_UP_S * 1000) - 1)
    if resent:
        await raw(store).hset(key, "resent_at_ms", await now_ms(store))
    assert (await tried(parts, delivery_id) is None) is not resent
    delivery = await facts(outbox, delivery_id)
    assert delivery.state is (DeliveryState.PENDING if resent else DeliveryState.FAILED)
    assert delivery.tries == 0


@pytest.mark.usefixtures("impatient")
async def test_a_host_that_refuses_connections_is_no_unresponsive_one(store: Store, parts: DeliveryParts) -> None:
    for _ in range(4):
        assert await tried(parts, await webhook(store, "film", "127.0.0.1:9")) is not None
    assert await raw(store).keys(KEYS["unresponsive"] + "*") == []


# A worker


class Dead(asyncio.Protocol):
    """The connection of a receiver that accepts connections and never answers."""

    def __init__(self, came: list[Dead]) -> None:
        came.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport


@pytest.mark.parametrize("hosts", [1, 80])
async def test_dead_webhooks_of_one_project_do_not_hold_up_the_webhook_of_another(installation: Fleet, hosts: int) -> None:
    store, came = installation.store, list[Dead]()
    servers = [await asyncio.get_running_loop().create_server(partial(Dead, came), "127.0.0.1", 0) for _ in range(hosts)]
    addresses = [f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    for number in range(160):
        await webhook(store, "dead", addresses[number % hosts])
    await installation.worker()
    await eventually(lambda: came != [])
    async with receiver() as hook:
        healthy = await webhook(store, "healthy", hook.url.removeprefix("http://").removesuffix("/hook"))
        ((headers, _),) = await hook.wait_for(1)
    assert headers["webhook-id"] == healthy
    assert len(came) < 160  # it has overtaken dead ones that were due before it
    for each in came:
        each.transport.close()
    for server in servers:
        server.close()


LOOKUPS: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **res) {
  int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");
  if (node && strstr(node, ".dead.test")) { sleep(120); return EAI_AGAIN; }
  if (node && strstr(node, ".live.test")) node = "127.0.0.1";
  return real(node, service, hints, res);
}
"""
"""A library for a process in which names below dead.test have a name server that does not answer."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD")
async def test_names_whose_name_server_does_not_answer_do_not_hold_up_other_names(installation: Fleet) -> None:
    store, library = installation.store, installation.folder / "lookups.so"
    compiler = program("gcc", "gcc")
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"], input=LOOKUPS, text=True, check=True)
    dead = [await webhook(store, "dead", f"{number}.dead.test") for number in range(80)]
    await installation.worker(LD_PRELOAD=str(library))

    async def looks_up() -> bool:
        return bool(await raw(store).exists(*(in_progress_key_prefix + each for each in dead)) >= HALF)

    await eventually(looks_up)
    async with receiver() as hook:
        await webhook(store, "healthy", f"hook.live.test:{hook.url.split(':')[2].removesuffix('/hook')}")
        await hook.wait_for(1)


async def test_a_delivery_that_is_made_due_during_its_try_is_tried_again_at_once(installation: Fleet) -> None:
    store, came, go_on = installation.store, list[str](), asyncio.Event()

    async def busy(request: web.Request) -> web.Response:
        came.append(request.headers["webhook-id"])
        await go_on.wait()
        return web.Response(status=503 if len(came) == 1 else 200, headers={"Retry-After": "3600"})

    async with serving({"/hook": busy}, "POST") as url:
        delivery_id = await webhook(store, "film", url.removeprefix("http://"))
        await installation.worker()
        await eventually(lambda: len(came) == 1)
        await Outbox(store.redis).resend(TaskId(delivery_id.rpartition("-")[0]), delivery_id)
        go_on.set()
        await eventually(lambda: len(came) == 2)


async def test_an_interrupted_delivery_is_due_at_once(installation: Fleet, silent: Silent) -> None:
    store = installation.store
    delivery_id = await webhook(store, "film", silent.host)
    worker = await installation.worker(MOVIEQ_DRAIN_S="0")
    await eventually(lambda: silent.requests == 1)
    worker.send(signal.SIGTERM)
    await worker.ended()
    assert await due(store, delivery_id)
    assert not await raw(store).exists(in_progress_key_prefix + delivery_id)
