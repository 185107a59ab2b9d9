"""Structured logging: one line an event, ids bound once, the same format for movieq, uvicorn and arq.

    log = logs.get()
    with logs.bound(task_id=..., project_id=...):
        log.info("completed", seconds=4.2)

Secrets are never passed to a logger; urls go through `without_query`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TextIO, cast
from urllib.parse import urlsplit, urlunsplit

import msgspec
import structlog

from movieq.settings import LogFormat, LogLevel

WORKER_READY: Final = "movieq worker ready"
"""The line that a worker prints, as the API prints its ready line, when the first of its engines serves."""


def get() -> structlog.typing.FilteringBoundLogger:
    """A logger; its events are fixed names, everything else goes into fields."""
    made: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return made


@contextmanager
def bound(**fields: str) -> Iterator[None]:
    """Within the block, and the tasks begun in it, every line has these fields."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def without_query(url: str) -> str:
    """The url without what may be secret in it: user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class _Unfailing:
    """A stream that drops what it cannot write, on a full disk, say: a log line must not end the work that it reports."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write the text where that is possible."""
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        """Flush where that is possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()


def _json(line: Any) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=repr).decode()
    except (ValueError, OverflowError, RecursionError):  # a lone surrogate, from a file name, say
        return json.dumps(line, default=repr)


def configure(level: LogLevel, log_format: LogFormat) -> None:
    """Everything that this process logs goes to stderr in one format. Called once, by a command."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if log_format is LogFormat.CONSOLE or (log_format is LogFormat.AUTO and sys.stderr.isatty()):
        last: list[structlog.typing.Processor] = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR")),  # `movieq up` passes it on to a terminal
                pad_event_to=22,
                exception_formatter=structlog.dev.plain_traceback,  # the default shows local variables, and so keys and signatures
            )
        ]
    else:
        last = [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(serializer=lambda line, **_: _json(line)),
        ]
    severity = getattr(logging, level.upper())
    structlog.configure(
        processors=[*shared, *last],
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", _Unfailing(sys.stderr))),
        wrapper_class=structlog.make_filtering_bound_logger(severity),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_log_level, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=severity, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "arq"):
        logger: Any = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in ("aiobotocore", "botocore"):  # at debug they write down the signatures of requests
        logging.getLogger(name).setLevel(logging.WARNING)
    if level is not LogLevel.DEBUG:  # what they say of every start and every job, we say in our own words
        for name in ("arq", "uvicorn"):
            logging.getLogger(name).setLevel(logging.WARNING)
