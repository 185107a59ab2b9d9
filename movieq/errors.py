"""The error tree: every error that movieq raises on purpose.

    MovieqError
    ├── SettingsError            a setting is missing or wrong: the process does not start
    ├── RunLost                  fencing refused a write: the task was cancelled, has ended or belongs to another run
    ├── CmsFault                 the CMS did not store a result; with `final`, another try cannot help
    ├── RequestError             the error answer to a request: `code`, `status`, `retryable`
    │   ├── ValidationFailed     400  ├── InvalidState      400  ├── Unauthorized       401
    │   ├── Forbidden            403  ├── InvalidSignature  403  ├── Expired            403
    │   ├── NotFound             404  ├── MethodNotAllowed  405  ├── Conflict           409
    │   ├── PayloadTooLarge      413  ├── IdempotencyMismatch 422
    │   │      also LineTooLong 414, HeadersTooLarge 431
    │   ├── RangeRefused         416  ├── QueueFull         429  ├── RateLimited       429
    │   ├── QuotaExceeded        429  ├── Internal          500  └── Unavailable       503
    └── TaskFault                a run failed: `code` becomes the task's `error_code`
        ├── InputUnavailable  InvalidInput  UnsupportedParameter        caused by the request: the task fails at once
        ├── EngineUnavailable  ModelUnavailable  Unsigned               caused by the installation: the task fails at once
        ├── OutOfMemory  StorageFault  NetworkFault  InternalFault      recoverable: the task is tried again
        └── WorkerLost  DeadlineExceeded                                raised by the queue

An error's message is written for the person who reads it: it names the field, the value and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

PATH_CHARS: Final = 200
MESSAGE_CHARS: Final = 500
"""Longest message of an error that quotes a request, in characters: it is stored, logged and sent more than once."""


class MovieqError(Exception):
    """An error that movieq raises on purpose."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def cut(text: str, most: int = MESSAGE_CHARS) -> str:
    """Return a text of at most `most` characters: a longer one is cut, and its length is named."""
    if len(text) <= most:
        return text
    tail = f"... ({len(text)} characters)"
    return text[: most - len(tail)] + tail


class SettingsError(MovieqError):
    """A setting is missing or wrong; the message names the setting and what is allowed."""


class RunLost(MovieqError):
    """Fencing refused a write: the task no longer belongs to this run."""


class CmsFault(MovieqError):
    """A request to the CMS failed; the message says what to change.

    `final`: another try cannot help. `status` is the HTTP status, None without an answer; `retry_after` is the Retry-After header.
    """

    def __init__(self, message: str, *, final: bool = False, status: int | None = None, retry_after: str = "") -> None:
        super().__init__(cut(message))
        self.final = final
        self.status = status
        self.retry_after = retry_after


class RequestError(MovieqError):
    """An error answer to a request.

    `errors` lists (path, message) for each fault; `retry_after_s` is sent as `Retry-After`; `headers` are sent unchanged.
    """

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        errors: tuple[tuple[str, str], ...] = (),
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(cut(message))
        self.errors = tuple((cut(path, PATH_CHARS), cut(text)) for path, text in errors)
        self.headers = headers or {}
        self.retry_after_s = retry_after_s


class ValidationFailed(RequestError):
    """The request does not match the API contract."""

    code, status = "validation_failed", 400


class InvalidState(RequestError):
    """The operation is not allowed in the task's state."""

    code, status = "invalid_state", 400


class Unauthorized(RequestError):
    """The API key is missing or invalid."""

    code, status = "unauthorized", 401


class Forbidden(RequestError):
    """The API key does not allow the request."""

    code, status = "forbidden", 403


class InvalidSignature(RequestError):
    """The URL has no valid signature."""

    code, status = "invalid_signature", 403


class Expired(RequestError):
    """The signed URL has expired; the task or project has a fresh one."""

    code, status = "expired", 403


class NotFound(RequestError):
    """The resource does not exist, or the API key may not see it."""

    code, status = "not_found", 404


class MethodNotAllowed(RequestError):
    """The path does not support the method."""

    code, status = "method_not_allowed", 405


class Conflict(RequestError):
    """The first request with this idempotency key is still in progress."""

    code, status, retryable = "conflict", 409, True


class PayloadTooLarge(RequestError):
    """The request body is over the size limit."""

    code, status = "payload_too_large", 413


class LineTooLong(PayloadTooLarge):
    """The request line is over the size limit."""

    status = 414


class HeadersTooLarge(PayloadTooLarge):
    """The request line and headers together are over the size limit."""

    status = 431


class IdempotencyMismatch(RequestError):
    """The idempotency key was already used with another body."""

    code, status = "idempotency_mismatch", 422


class RangeRefused(RequestError):
    """The requested range starts beyond the end of the file."""

    code, status = "range_not_satisfiable", 416


class QueueFull(RequestError):
    """The project or the installation has reached its limit of waiting tasks."""

    code, status, retryable = "queue_full", 429, True


class RateLimited(RequestError):
    """The client has sent too many requests."""

    code, status, retryable = "rate_limited", 429, True


class QuotaExceeded(RequestError):
    """The project's task records or uploads have reached their limit of bytes."""

    code, status, retryable = "quota_exceeded", 429, True


class Internal(RequestError):
    """An internal error of movieq."""

    code, status, retryable = "internal", 500, True


class Unavailable(RequestError):
    """Redis or the storage is unavailable."""

    code, status, retryable = "unavailable", 503, True


class TaskFault(MovieqError):
    """A run failed. `retryable`: another try may succeed."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(cut(message))


class InputUnavailable(TaskFault):
    """A reference cannot be fetched; the message names it."""

    code = "input_unavailable"


class InvalidInput(TaskFault):
    """A reference was fetched, but its content is not usable; the message names it."""

    code = "invalid_input"


class UnsupportedParameter(TaskFault):
    """The engine does not support a parameter; the message names one that does."""

    code = "unsupported_parameter"


class EngineUnavailable(TaskFault):
    """The engine, or a part of it, is not installed on the worker."""

    code = "engine_unavailable"


class ModelUnavailable(TaskFault):
    """The model cannot be loaded."""

    code = "model_unavailable"


class Unsigned(TaskFault):
    """The result could not be signed, and unsigned results are not allowed."""

    code = "unsigned"


class OutOfMemory(TaskFault):
    """Device or host memory ran out."""

    code, retryable = "out_of_memory", True


class WorkerLost(TaskFault):
    """The engine process or the worker died during the run."""

    code, retryable = "worker_lost", True


class DeadlineExceeded(TaskFault):
    """The task's deadline or its type's time limit has passed."""

    code = "deadline_exceeded"


class StorageFault(TaskFault):
    """The result could not be stored. `passes`: the fault may be temporary; else the message says what the operator has to do."""

    code, retryable = "storage", True

    def __init__(self, message: str, *, passes: bool = True) -> None:
        super().__init__(message)
        self.passes = passes


class KeyTaken(StorageFault):
    """The storage key already holds other content, which is left unchanged."""


class NetworkFault(TaskFault):
    """A connection failed; the fault may be temporary."""

    code, retryable = "network", True


class InternalFault(TaskFault):
    """An internal error of movieq or of an engine."""

    code, retryable = "internal", True


TASK_FAULTS: dict[str, type[TaskFault]] = {fault.code: fault for fault in TaskFault.__subclasses__()}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the chain of its causes, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def first_of(error: BaseException) -> BaseException:
    """Return the first error of a possibly nested group; return any other error unchanged."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
