"""The name of every key and channel in Redis, and how long what they hold is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

KEYS: Final[Mapping[str, str]] = {
    # tasks
    "job": "arq:job:",  # + task or delivery: string, arq's definition (msgpack)
    "task": "movieq:task:",  # + task: hash, the fields of Task
    "log": "movieq:log:",  # + task, or project:PROJECT: stream of {type, data}
    "index": "movieq:index:",  # + project|status|type, either empty: zset task -> created
    "projects": "movieq:projects",  # zset project -> first task's time
    "idempotency": "movieq:idempotency:",  # + hash of caller, project and key: string "body hash task"
    "made": "movieq:made:",  # + fingerprint: string, the task that made this last
    "durations": "movieq:durations:",  # + shape: list of the last run times, ms
    "sums": "movieq:sums",  # hash "task_type tasks" and "task_type ms" -> over every completed task
    "gpu_ms": "movieq:gpu_ms",  # hash project, and '' for all -> what runs that ended had of GPUs, ms
    "totals": "movieq:totals",  # hash state -> how many tasks are in it
    "dropped": "movieq:dropped",  # list of "LIST TASK", latest first: entries that scripts dropped in the last day
    "ended": "movieq:ended",  # zset task -> when it ended
    "dead": "movieq:dead",  # zset task -> when it was given up, the dead letters
    "media": "movieq:media",  # zset storage prefix of a result -> when it was committed
    # the queue
    "kinds": "movieq:kinds",  # set of kinds that ever had a task
    "waiting": "movieq:waiting:",  # + kind: zset task -> created; + kind:project: an arq queue, zset task -> created - bias
    "lanes": "movieq:lanes:",  # + kind: set of lanes, kind/type/model, of tasks that some worker cannot run
    "virtual_times": "movieq:flows:",  # + kind: zset project -> virtual time, of projects with waiting tasks
    "idle_virtual_times": "movieq:spent:",  # + kind: hash project -> virtual time when it last went idle
    "claimed_virtual_time": "movieq:clock:",  # + kind: string, virtual time of the last claim
    "claims": "movieq:claims:",  # + kind: counter; every eighth claim takes the oldest
    "running": "movieq:running:",  # + kind: zset task -> end of lease
    "offered": "movieq:offered:",  # + host: zset task whose finished files lie there -> from when it may be had
    "delayed": "movieq:delayed",  # zset task -> due
    "deadlines": "movieq:deadlines",  # zset task -> when it fails
    "priorities": "movieq:priorities:",  # + kind: hash priority -> how many wait
    "claim_times": "movieq:pace:",  # + kind: list of the times of the last hundred claims
    "idle": "movieq:idle:",  # + kind: set of workers that wait for one
    # workers
    "claimed": "movieq:claimed:",  # + worker: list, the last claim's nonce and its "task run"s
    "worker_tasks": "movieq:held:",  # + worker: set of tasks that it runs
    "workers": "movieq:workers",  # hash worker -> its heartbeat (JSON)
    "abilities": "movieq:able",  # hash worker -> Able (JSON); a worker without an entry can run everything
    "heartbeat_times": "movieq:beats",  # zset worker -> time of its last heartbeat
    "last_tidy": "movieq:heard",  # string, when tidy last ran
    "leases_paused": "movieq:quiet",  # string, there while no lease expires
    "gpu": "movieq:gpu",  # string, there while a GPU worker was seen in the last 30 days
    # the way out
    "deliveries": "movieq:deliveries",  # an arq queue
    "delivery": "movieq:delivery:",  # + delivery: hash, the facts frozen when the task ended
    "orphans": "movieq:orphans",  # zset storage prefix -> when to delete it
    "sweeper": "movieq:sweeper",  # string, the worker that now deletes what is over
    # the rest
    "upload": "movieq:upload:",  # + upload: string, Upload (msgpack)
    "secret": "movieq:secret:signing",  # string, made once where MOVIEQ_SIGNING_SECRET is unset
    "write_check": "movieq:write_check",  # string, written by health checks
    "keys": "movieq:keys",  # hash sha256 of an API key -> what it may (msgpack)
    "installation": "movieq:installation",  # hash "salt", "api", "worker" -> Started (JSON) of the last of each
    "check": "movieq:check:",  # + random: string, written by a check at start or by doctor, for ten seconds
    # pub/sub channels
    "events": "movieq:events:",  # + task, or project:PROJECT: "id\ntype\ndata"; ">" and a time in ms for id where it is in no log
    "control": "movieq:control:",  # + worker: "wake" or "cancel TASK RUN"
}
"""Every key and channel of an installation that sets no MOVIEQ_KEY_PREFIX, by the name that the scripts use.

None holds a hash tag: movieq needs one Redis, not a cluster. A key whose text differs from its name has it from earlier versions,
which run beside this one during an upgrade.
"""
CHANNELS: Final = ("events", "control")


def keys(prefix: str = "movieq", db: int = 0) -> Mapping[str, str]:
    """Return the keys and channels of an installation: those of `KEYS` under its prefix.

    Pub/sub knows no database numbers, so the channels of every database but 0 carry its number. arq's own keys have no prefix: what follows
    `arq:job:` is unique.
    """
    named = {name: text.replace("movieq:", f"{prefix}:") for name, text in KEYS.items()}
    return named if db == 0 else {**named, **{name: f"{named[name]}{db}:" for name in CHANNELS}}


DELIVERY_KEPT_S: Final = 30 * 24 * 3600
"""How long what came of a delivery can be looked up, unless its task is swept before."""
LOG_KEPT_S: Final = 24 * 3600
"""How long the log of a finished task stays."""
RECEIPT_KEPT_S: Final = 24 * 3600
"""How long an idempotency key is remembered."""
UPLOAD_KEPT_S: Final = 7 * 24 * 3600
