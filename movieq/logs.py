"""Structured logging: one line an event, ids bound once, the same format for movieq, uvicorn and arq.

    log = logs.get()
    with logs.bound(task_id=..., project_id=...):
        log.info("completed", seconds=4.2)

Secrets are never passed to a logger; urls go through `without_query`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import structlog

from movieq.settings import LogFormat, LogLevel


def get() -> structlog.stdlib.BoundLogger:
    """A logger; its events are fixed names, everything else goes into fields."""
    return structlog.stdlib.get_logger("movieq")


@contextmanager
def bound(**fields: str) -> Iterator[None]:
    """Within the block, and the tasks begun in it, every line has these fields."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def without_query(url: str) -> str:
    """The url without what may be secret in it: user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def configure(level: LogLevel, log_format: LogFormat) -> None:
    """Everything that this process logs goes to stderr in one format. Called once, by a command."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(allow=[]),  # uvicorn repeats its messages in colour
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    console = log_format is LogFormat.CONSOLE or (log_format is LogFormat.AUTO and sys.stderr.isatty())
    if console:
        last: list[structlog.typing.Processor] = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=22,
                exception_formatter=structlog.dev.plain_traceback,  # the default shows local variables, and so keys and signatures
            )
        ]
    else:
        last = [structlog.processors.format_exc_info, structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "arq"):
        logger: Any = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    if level is not LogLevel.DEBUG:  # what they say of every start and every job, we say in our own words
        for name in ("arq", "uvicorn"):
            logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
