"""Structured logging: one line per event, ids bound once, one format for movieq, uvicorn and arq.

    log = logs.get()
    with logs.bound(task_id=..., project_id=...):
        log.info("completed", seconds=4.2)

Never pass a secret to a logger; pass URLs through `without_query`.
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
    """Return a logger. Log fixed event names; put everything else into fields."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


@contextmanager
def bound(**fields: str) -> Iterator[None]:
    """Add these fields to every log line of the block and of asyncio tasks started in it."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def without_query(url: str) -> str:
    """Return the URL without the parts that may be secret: user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class _Unfailing:
    """A stream that drops text it cannot write, for example on a full disk: a failed log line must not stop the work that it reports."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write the text, ignoring errors."""
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        """Flush, ignoring errors."""
        with suppress(OSError, ValueError):
            self._stream.flush()


def _json(line: Any) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=repr).decode()
    except (ValueError, OverflowError, RecursionError):  # for example a lone surrogate from a file name
        return json.dumps(line, default=repr)


def configure(level: LogLevel, log_format: LogFormat) -> None:
    """Send all logging of this process to stderr in one format. Each command calls this once, at its start."""
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
                exception_formatter=structlog.dev.plain_traceback,  # the default shows local variables, which include keys and signatures
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
    for name in ("aiobotocore", "botocore"):  # at debug level they log the signatures of requests
        logging.getLogger(name).setLevel(logging.WARNING)
    if level is not LogLevel.DEBUG:  # movieq logs each start and job itself
        for name in ("arq", "uvicorn"):
            logging.getLogger(name).setLevel(logging.WARNING)
