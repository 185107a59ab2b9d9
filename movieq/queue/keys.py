"""The names of all Redis keys and pub/sub channels, and how long some of them are stored."""

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
    "reusable": "movieq:made:",  # + fingerprint: string, the latest task with this result
    "durations": "movieq:durations:",  # + shape: list of the latest durations, ms
    "sums": "movieq:sums",  # hash "task_type tasks" and "task_type ms" -> sum over all completed tasks; also some counters
    "gpu_ms": "movieq:gpu_ms",  # hash project, and '' for all -> GPU time of ended runs, ms
    "record_bytes": "movieq:record_bytes",  # hash project -> bytes of its tasks' records
    "totals": "movieq:totals",  # hash state -> number of tasks
    "dropped": "movieq:dropped",  # list of "LIST TASK", latest first: entries that scripts dropped in the last day
    "ended": "movieq:ended",  # zset task -> when it ended
    "dead": "movieq:dead",  # zset task -> when it became a dead letter
    "media": "movieq:media",  # zset storage prefix of a result -> when it was committed
    # the queue
    "kinds": "movieq:kinds",  # set of kinds that ever had a task
    # "+ scope": a lane, in which flows share, or lane:@KEY, the flow of a key, in which projects share
    "waiting": "movieq:waiting:",  # + lane: zset task -> created; + scope:project: an arq queue, zset task -> created - bias
    "lanes": "movieq:lanes:",  # + kind: set of lanes (kind/type/model) for tasks that some workers cannot run
    "virtual_times": "movieq:flows:",  # + scope: zset project or @KEY -> virtual time, of those with waiting tasks
    "idle_virtual_times": "movieq:spent:",  # + lane: hash project or @KEY -> virtual time while idle; + lane:project: hash @KEY -> the same
    "claimed_virtual_time": "movieq:clock:",  # + scope: string, virtual time of the last claim
    "claims": "movieq:claims:",  # + lane: counter; every eighth claim gets the oldest task
    "running": "movieq:running:",  # + kind: zset task -> end of lease
    "offered": "movieq:offered:",  # + host: zset task with finished files on this host -> when it can be claimed
    "delayed": "movieq:delayed",  # zset task -> due
    "deadlines": "movieq:deadlines",  # zset task -> when it fails
    "priorities": "movieq:priorities:",  # + kind: hash priority -> number of waiting tasks
    "claim_times": "movieq:pace:",  # + kind: list of the times of the last hundred claims
    "idle": "movieq:idle:",  # + kind: set of workers that wait for a task
    # workers
    "claimed": "movieq:claimed:",  # + worker: list, the last claim's nonce and its "task run"s
    "worker_tasks": "movieq:held:",  # + worker: set of tasks that it runs
    "workers": "movieq:workers",  # hash worker -> its heartbeat (JSON)
    "abilities": "movieq:able",  # hash worker -> Able (JSON); a worker without an entry can run everything
    "heartbeat_times": "movieq:beats",  # zset worker -> time of its last heartbeat
    "last_tidy": "movieq:heard",  # string, when tidy last ran
    "leases_paused": "movieq:quiet",  # string; while it exists, no lease expires
    "gpu": "movieq:gpu",  # string: memory of the largest GPU that a worker had in the last 30 days, bytes
    # deliveries and clean-up
    "deliveries": "movieq:deliveries",  # an arq queue
    "delivery": "movieq:delivery:",  # + delivery: hash, its state and the facts of the task when it ended
    "in_progress": "arq:in-progress:",  # + job of a delivery: string, arq's; it exists while a worker runs the job
    "due_deliveries": "movieq:due:",  # + webhook:PROJECT or payload:PROJECT: zset job that waits for a place -> when it was due
    "due_queues": "movieq:due",  # zset webhook:PROJECT or payload:PROJECT -> when a worker last looked at its due deliveries
    "admitted": "movieq:admitted:",  # + worker: string, the nonce and the answer (msgpack) of the last call of admit
    "unresponsive": "movieq:unresponsive:",  # + "host project": hash, timeouts in a row; from three on, when the next probe is due
    "held_back": "movieq:held_back:",  # + "host project": set of webhooks that wait until it answers
    "host_logged": "movieq:host_logged:",  # + host: string, exists for a minute after it was logged as unresponsive
    "orphans": "movieq:orphans",  # zset storage prefix -> when to delete it
    "sweeper": "movieq:sweeper",  # string, the worker whose turn it is to sweep
    # the rest
    "upload": "movieq:upload:",  # + upload: string, Upload (msgpack)
    "uploads": "movieq:uploads:",  # + project: zset "bytes upload" -> when it expires
    "upload_bytes": "movieq:upload_bytes:",  # + project: string, the sum of these bytes
    "secret": "movieq:secret:signing",  # string, generated once if MOVIEQ_SIGNING_SECRET is unset
    "write_check": "movieq:write_check",  # string, written by health checks
    "keys": "movieq:keys",  # hash sha256 of an API key -> its rights (msgpack)
    "tokens": "movieq:tokens:",  # + hash of an API key or subject of a signed URL: string, ms since 1970 when its token bucket is full
    "installation": "movieq:installation",  # hash "salt"; "api" and "worker" -> Started (JSON) of the latest process of each
    "check": "movieq:check:",  # + random: string, written by a check at start or by doctor, for ten seconds
    # pub/sub channels
    "events": "movieq:events:",  # + task, or project:PROJECT: "id\ntype\ndata"; the id is ">" and a time in ms for events in no log
    "control": "movieq:control:",  # + worker: "wake" or "cancel TASK RUN"
}
"""Every key and channel with the default MOVIEQ_KEY_PREFIX, by the name that the scripts use.

The keys have no hash tags, since movieq needs a single Redis, not a cluster. Where a key's text differs from its name, earlier versions
use the text; they run beside this version during an upgrade.
"""
CHANNELS: Final = ("events", "control")


def keys(prefix: str = "movieq", db: int = 0) -> Mapping[str, str]:
    """Return the keys and channels of an installation: `KEYS` with its prefix.

    Pub/sub ignores database numbers, so the channels of every database but 0 contain its number. arq's own keys have no prefix, since the
    ids after `arq:job:` are unique.
    """
    named = {name: text.replace("movieq:", f"{prefix}:") for name, text in KEYS.items()}
    return named if db == 0 else {**named, **{name: f"{named[name]}{db}:" for name in CHANNELS}}


DELIVERY_KEPT_S: Final = 30 * 24 * 3600
"""How long a delivery is stored, unless its task is swept earlier."""
LOG_KEPT_S: Final = 24 * 3600
"""How long the log of an ended task is stored."""
RECEIPT_KEPT_S: Final = 24 * 3600
"""How long an idempotency key is stored."""
UPLOAD_KEPT_S: Final = 7 * 24 * 3600
