"""Our queue beside arq, SAQ, Taskiq, Celery and BullMQ, on one Valkey in one run: `python -m tests.bench.bench_queue [--quick]`.

Each peer runs in an environment of its own (made under .cache/bench), as fast as its documentation says, with one worker process; what
it is set to stands in its file in `peers/`. Tasks do nothing and carry 300 bytes. Rates are medians of runs of three seconds or more,
taken in turn, from a queue that was filled before; processor time a task says the same on a busy machine. Prints tables and, as its last
line, one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import redis
import uvloop

from movieq.local.embedded import Valkey, valkey
from tests.bench import environments
from tests.bench.peers import backlog
from tests.bench.peers.backlog import Backlog
from tests.bench.report import machine, percentile, report

FSYNC = ("everysec", "always")
CONCURRENCY = (32, 1)
SPARE = 50
"""Tasks beyond those that are counted, so that the last ones meet a queue that is not yet empty."""
WORKER_S = 120.0
OUR_OWN = {"cmdstat_config|resetstat", "cmdstat_info"}
END = "the end of what is watched"


class Peer(NamedTuple):
    """One that is measured. `rates`: tasks a second at 32 and at 1, for the size of the first run.

    `lanes`: how many idle workers, each with a queue of its own, share the wait where a pickup takes half a second.
    """

    name: str
    poll: str
    packages: tuple[str, ...]
    rates: tuple[int, int]
    lanes: int = 1
    pause_s: float = 0.002


PEERS = (
    Peer("arq", "polls every 0.5 s", ("arq==0.28.0", "redis==5.3.1", "hiredis==3.5.0", "uvloop==0.23.0"), (320, 2), 8, 0.5),
    Peer(
        "saq",
        "blocks",
        ("saq[redis,hiredis]==0.26.4", "redis==7.4.1", "hiredis==3.5.0", "uvloop==0.23.0", "typing_extensions"),
        (1800, 1300),
    ),
    Peer(
        "taskiq",
        "blocks",
        ("taskiq==0.13.0", "taskiq-redis==1.2.4", "redis==8.1.0", "hiredis==3.5.0", "uvloop==0.23.0", "orjson==3.13.0"),
        (5000, 4500),
    ),
    Peer("celery", "blocks", ("celery[redis]==5.7.0", "redis==8.1.0", "hiredis==3.5.0"), (1800, 2000)),
    Peer("bullmq", "blocks", ("bullmq==3.4.4", "redis==8.1.0", "hiredis==3.5.0", "uvloop==0.23.0"), (3200, 3800)),
    Peer("ours", "woken by pub/sub", (), (5500, 2200)),
)


class Size(NamedTuple):
    """How much is measured."""

    seconds: float
    rounds: int
    picks: int
    counted: int
    waiting: int
    claims: int
    finished: int
    child: int


FULL = Size(3.0, 3, 300, 2000, 1_000_000, 1000, 2000, 300)
QUICK = Size(0.5, 1, 50, 300, 20_000, 100, 200, 50)


class Rate(NamedTuple):
    """One run. `cpu_us` and `server_us`: processor time a task of the worker and of the server."""

    per_s: float
    seconds: float
    gap_p50_ms: float
    gap_p99_ms: float
    cpu_us: float
    server_us: float
    queued_bytes: float


class Bench:
    """The server, and the processes that use it."""

    def __init__(self, server: Valkey, folder: Path) -> None:
        self.server = server
        self.redis: Any = redis.Redis(unix_socket_path=str(server.socket), decode_responses=True)
        self._folder = folder
        self._queues = 0

    def rate(self, peer: Peer, concurrency: int, tasks: int) -> Rate:
        """Tasks a second from a queue that holds them all."""
        self.empty()
        place = self._place(tasks=tasks, concurrency=concurrency)
        before_bytes = self._held_bytes()
        self._run(peer, "enqueue", {**place, "BENCH_TASKS": str(tasks + SPARE)})
        queued_bytes = (self._held_bytes() - before_bytes) / (tasks + SPARE)
        before_s = self._server_cpu_s()
        told = self._work(peer, place)
        return Rate(
            (tasks - 1) / told["seconds"],
            told["seconds"],
            told["gap_p50_ms"],
            told["gap_p99_ms"],
            told["cpu_s"] / tasks * 1e6,
            (self._server_cpu_s() - before_s) / tasks * 1e6,
            queued_bytes,
        )

    def picked_ms(self, peer: Peer, count: int) -> list[float]:
        """Milliseconds from the call that enqueues to the begin of the task, on an idle worker, one task at a time."""
        self.empty()
        places = [self._place(tasks=1, concurrency=1) for _ in range(peer.lanes)]
        asked = {"BENCH_TASKS": str(-(-count // peer.lanes)), "BENCH_PAUSE_S": str(peer.pause_s)}
        with (
            self._workers(peer, places),
            _ended([self._start(peer, "pick", {**place, **asked}, subprocess.PIPE) for place in places]) as clients,
        ):
            answers = [client.communicate(timeout=WORKER_S)[0] for client in clients]
        return [latency_ms for answer in answers for latency_ms in json.loads(answer)]

    def counted(self, peer: Peer, tasks: int) -> dict[str, float]:
        """Commands a task, by INFO commandstats; those not called by scripts, by MONITOR."""
        self.empty()
        place = self._place(tasks=tasks, concurrency=32)
        with self._watched() as putting:
            self._run(peer, "enqueue", {**place, "BENCH_TASKS": str(tasks + SPARE)})
        with self._watched() as working:
            self._work(peer, place)
        return {
            "put": putting["direct"] / (tasks + SPARE),
            "put_scripted": putting["scripted"] / (tasks + SPARE),
            "work": working["direct"] / tasks,
            "work_scripted": working["scripted"] / tasks,
        }

    def through_child(self, tasks: int) -> dict[str, float]:
        """What `ours.through_child` measures."""
        self.empty()
        answer: dict[str, float] = json.loads(self._run(PEERS[-1], "through_child", self._place(tasks=tasks, concurrency=1)))
        return answer

    def empty(self) -> None:
        """The server holds nothing; `FLUSHALL` by itself would go on in the background."""
        self.redis.execute_command("FLUSHALL", "SYNC")

    def _held_bytes(self) -> int:
        memory = self.redis.info("memory")
        return int(memory["used_memory"] - memory["mem_clients_normal"] - memory["mem_aof_buffer"])

    def _place(self, *, tasks: int, concurrency: int) -> dict[str, str]:
        self._queues += 1
        return {
            "BENCH_URL": self.server.url,
            "BENCH_QUEUE": f"bench{self._queues}",
            "BENCH_SOCKET": str(self._folder / f"{self._queues}.sock"),
            "BENCH_TASKS": str(tasks),
            "BENCH_CONCURRENCY": str(concurrency),
        }

    def _work(self, peer: Peer, place: dict[str, str]) -> dict[str, float]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
            heard.bind(place["BENCH_SOCKET"])
            heard.settimeout(WORKER_S)
            with self._workers(peer, [place]):
                told: dict[str, float] = json.loads(heard.recv(4096))
                return told

    @contextmanager
    def _workers(self, peer: Peer, places: list[dict[str, str]]) -> Iterator[None]:
        with _ended([self._start(peer, "work", place, subprocess.DEVNULL) for place in places]):
            yield

    def _run(self, peer: Peer, role: str, place: dict[str, str]) -> str:
        with _ended([self._start(peer, role, place, subprocess.PIPE)]) as (process,):
            answer: str = process.communicate(timeout=WORKER_S)[0]
            if process.returncode:
                raise RuntimeError(f"{peer.name} {role} ended with {process.returncode}: {self._log(peer).read_text()[-2000:]}")
            return answer

    def _start(self, peer: Peer, role: str, place: dict[str, str], stdout: int) -> subprocess.Popen[str]:
        with self._log(peer).open("w") as log:
            return subprocess.Popen(
                [_python(peer), "-m", f"tests.bench.peers.{peer.name}", role],
                cwd=environments.ROOT, env={**os.environ, **place}, stdout=stdout, stderr=log, text=True,
            )  # fmt: skip

    def _log(self, peer: Peer) -> Path:
        return self._folder / f"{peer.name}.log"

    def _server_cpu_s(self) -> float:
        times = psutil.Process(self.server.pid).cpu_times()
        return times.user + times.system

    @contextmanager
    def _watched(self) -> Iterator[dict[str, int]]:
        """Afterwards: how many commands came from clients, and how many from scripts."""
        found: dict[str, int] = {}
        self.redis.config_resetstat()
        with socket.socket(socket.AF_UNIX) as seen, seen.makefile("rb") as lines:
            seen.connect(str(self.server.socket))
            seen.settimeout(WORKER_S)
            seen.sendall(b"MONITOR\r\n")
            lines.readline()
            yield found
            called = sum(stat["calls"] for name, stat in self.redis.info("commandstats").items() if name not in OUR_OWN)
            self.redis.echo(END)
            found["direct"] = 0
            while END.encode() not in (line := lines.readline()):
                found["direct"] += b" lua] " not in line
            found["scripted"] = called - found["direct"]


def _python(peer: Peer) -> str:
    return environments.python(peer.name) if peer.packages else sys.executable


@contextmanager
def _ended(processes: list[subprocess.Popen[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """They have ended after the block, by SIGTERM or else by SIGKILL."""
    try:
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def make_environments() -> None:
    """Every peer has its environment with just these packages."""
    for peer in PEERS:
        if peer.packages:
            environments.make(peer.name, peer.packages)


def rates(bench: Bench, size: Size) -> dict[tuple[str, int], list[Rate]]:
    """Of every peer and concurrency, in turn; the first run of each says how many tasks the others need."""
    found: dict[tuple[str, int], list[Rate]] = {}
    tasks = {(peer.name, CONCURRENCY[which]): int(peer.rates[which] * size.seconds * 1.1) + 1 for peer in PEERS for which in (0, 1)}
    for _ in range(size.rounds):
        for peer in PEERS:
            for concurrency in CONCURRENCY:
                key = peer.name, concurrency
                while (rate := bench.rate(peer, concurrency, tasks[key])).seconds < size.seconds:
                    tasks[key] = int(tasks[key] * 1.15 * size.seconds / rate.seconds) + 1
                found.setdefault(key, []).append(rate)
    return found


def main() -> None:
    """Prints everything."""
    size = QUICK if "--quick" in sys.argv[1:] else FULL
    make_environments()
    begun_s, load_before, busy_before_s = time.monotonic(), os.getloadavg()[0], _busy_s()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, valkey(Path(name) / "valkey", appendfsync=FSYNC[0]) as server:
        bench = Bench(server, Path(name))
        version = bench.redis.info("server")["valkey_version"]
        print(
            ", ".join(f"{key} {value}" for key, value in machine().items()),
            f"valkey {bench.redis.info('server')['valkey_version']}",
            sep=", ",
        )
        for peer in PEERS:
            print(f"  {peer.name:8} {peer.poll}; {', '.join(peer.packages) or 'this commit'}")
        found: dict[str, Any] = {}
        for fsync in FSYNC:
            bench.redis.config_set("appendfsync", fsync)
            picked = {peer.name: bench.picked_ms(peer, size.picks) for peer in PEERS}
            measured = rates(bench, size)
            found[fsync] = {peer.name: _row(picked[peer.name], measured, peer.name) for peer in PEERS}
            _print_rates(fsync, found[fsync])
        bench.redis.config_set("appendfsync", FSYNC[0])
        found["commands"] = {peer.name: bench.counted(peer, size.counted) for peer in PEERS}
        _print_commands(found["commands"])
        found["child"] = bench.through_child(size.child)
        found["backlog"] = _backlogs(bench, size)
    report(
        "queue",
        {
            **_aims(found),
            "valkey": version,
            "seconds": time.monotonic() - begun_s,
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "cpu_share_of_others": 1 - _own_cpu_s() / (_busy_s() - busy_before_s),
        },
        found,
    )


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _own_cpu_s() -> float:
    """Of this process and of all that it started; they have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _row(picked_ms: list[float], measured: dict[tuple[str, int], list[Rate]], name: str) -> dict[str, float]:
    row: dict[str, float] = {"picks": len(picked_ms)}
    row |= {f"pickup_p{share}_ms": percentile(picked_ms, share / 100) for share in (50, 95, 99)}
    for concurrency in CONCURRENCY:
        runs = measured[name, concurrency]
        row |= {
            f"per_s_{concurrency}": statistics.median(run.per_s for run in runs),
            f"per_s_{concurrency}_least": min(run.per_s for run in runs),
            f"per_s_{concurrency}_most": max(run.per_s for run in runs),
            f"cpu_us_{concurrency}": statistics.median(run.cpu_us for run in runs),
            f"server_us_{concurrency}": statistics.median(run.server_us for run in runs),
        }
    row |= {f"gap_{p}_ms": statistics.median(getattr(run, f"gap_{p}_ms") for run in measured[name, 1]) for p in ("p50", "p99")}
    return row | {"queued_bytes": statistics.median(run.queued_bytes for run in measured[name, 32])}


def _print_rates(fsync: str, rows: dict[str, dict[str, float]]) -> None:
    print(
        f"\nappendfsync {fsync}: from enqueue to start on an idle worker, ms | tasks/s at 32, least and most of the runs, us of a processor"
    )
    print("a task in the worker and in the server | the same at 1, and from one task to the next, ms | bytes a queued task")
    at = f"{'per s':>7} {'least':>6} {'most':>6} {'work':>4} {'serv':>4}"
    print(f"  {'':8} {'n':>4} {'p50':>7} {'p95':>7} {'p99':>7} | {at} | {at} {'p50':>7} {'p99':>7} | {'bytes':>5}")
    for name, row in rows.items():
        picked = " ".join(f"{row[f'pickup_p{share}_ms']:7.2f}" for share in (50, 95, 99))
        runs = [
            f"{row[f'per_s_{c}']:7,.0f} {row[f'per_s_{c}_least']:6,.0f} {row[f'per_s_{c}_most']:6,.0f}"
            f" {row[f'cpu_us_{c}']:4.0f} {row[f'server_us_{c}']:4.0f}"
            for c in CONCURRENCY
        ]
        gap = f"{row['gap_p50_ms']:7.2f} {row['gap_p99_ms']:7.2f}"
        print(f"  {name:8} {row['picks']:4} {picked} | {runs[0]} | {runs[1]} {gap} | {row['queued_bytes']:5.0f}", flush=True)


def _print_commands(rows: dict[str, dict[str, float]]) -> None:
    print("\ncommands a task: to enqueue it, + those that scripts call; to run it at 32, + those that scripts call")
    for name, row in rows.items():
        print(f"  {name:8} {row['put']:6.1f} + {row['put_scripted']:5.1f} {row['work']:6.1f} + {row['work_scripted']:5.1f}")


def _backlogs(bench: Bench, size: Size) -> dict[str, Any]:
    url = bench.server.url
    bench.empty()
    uvloop.run(backlog.compare(url))
    bench.empty()
    bench.redis.config_set("appendonly", "no")  # a million tasks need not be written to disk to be counted
    finished_bytes, entries, log_bytes = uvloop.run(backlog.finished_bytes(url, size.finished))
    bench.empty()
    backlogs = [Backlog(10, 1, 10), Backlog(10_000, 1), Backlog(10_000, 10_000), Backlog(size.waiting, 1)]
    claims, filled = uvloop.run(backlog.claims(url, backlogs, size.claims))
    print("\na claim of ours with one free slot, us: p50, p99; the server's part, p50")
    for name, row in claims.items():
        print(f"  {name:32} {row['p50_us']:6.0f} {row['p99_us']:6.0f} {row['server_p50_us']:6.0f}")
    print(f"  filled by the submit script itself, in a loop: {size.waiting:,} tasks in {filled['seconds']:.0f} s")
    print(f"memory a task of ours: {filled['bytes']:,.0f} bytes queued (of {size.waiting:,});", end=" ")
    print(f"{finished_bytes:,.0f} completed, of them {log_bytes:,.0f} for a log of {entries} entries", flush=True)
    return {
        "claims": claims,
        "queued_bytes": filled["bytes"],
        "fill_s": filled["seconds"],
        "finished_bytes": finished_bytes,
        "log_entries": entries,
        "log_bytes": log_bytes,
    }


def _aims(found: dict[str, Any]) -> dict[str, float | str]:
    """The figures that have an aim, each with it."""
    rows, claims = found[FSYNC[0]], list(found["backlog"]["claims"].values())
    ours = rows["ours"]
    peers = {name: row for name, row in rows.items() if name != "ours"}
    fastest = max(peers, key=lambda name: peers[name]["per_s_32"])
    soonest = min(peers, key=lambda name: peers[name]["pickup_p50_ms"])
    return {
        "pickup_p50_ms": ours["pickup_p50_ms"],
        "pickup_p50_ms_aim": peers[soonest]["pickup_p50_ms"],
        "pickup_p50_best_peer": soonest,
        "pickup_p99_ms": ours["pickup_p99_ms"],
        "pickup_p99_ms_aim": 5.0,
        "per_s_32_to_the_best_peer": ours["per_s_32"] / peers[fastest]["per_s_32"],
        "per_s_32_to_the_best_peer_aim": 1.5,
        "per_s_32_best_peer": fastest,
        "gap_ms": ours["gap_p50_ms"],
        "gap_ms_aim": 2.0,
        "gap_through_child_ms": found["child"]["gap_p50_ms"],
        "gap_through_child_ms_aim": 5.0,
        "claim_most_waiting_to_10_waiting": claims[-1]["p50_us"] / claims[0]["p50_us"],
        "claim_most_waiting_to_10_waiting_aim": 1.3,
        "claim_10000_running_to_1_running": claims[2]["p50_us"] / claims[1]["p50_us"],
        "queued_bytes": found["backlog"]["queued_bytes"],
        "queued_bytes_aim": 3000.0,
    }


if __name__ == "__main__":
    main()
