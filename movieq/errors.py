"""The error tree: every way in which movieq says no.

    MovieqError
    ├── SettingsError            a setting is missing or wrong: the process does not start
    ├── RunLost                  a run writes after its task was cancelled, ended or given to another run
    ├── CmsFault                 the CMS does not take a result: now, or (`final`) ever
    ├── RequestError             the answer to a request: `code`, `status`, `retryable`
    │   ├── ValidationFailed     400  ├── InvalidState      400  ├── Unauthorized       401
    │   ├── Forbidden            403  ├── NotFound          404  ├── MethodNotAllowed   405
    │   ├── Conflict             409  ├── PayloadTooLarge   413  ├── IdempotencyMismatch 422
    │   ├── RangeRefused         416  ├── QueueFull         429  ├── RateLimited       429
    │   └── Internal             500  └── Unavailable       503
    └── TaskFault                the end of a run: `code` becomes the task's `error_code`
        ├── InputUnavailable  InvalidInput  UnsupportedParameter        the task's own fault: fails at once
        ├── EngineUnavailable  ModelUnavailable  Unsigned               this installation cannot do it: fails at once
        ├── OutOfMemory  StorageFault  NetworkFault  InternalFault      may pass: tried again
        └── WorkerLost  DeadlineExceeded                                given by the queue itself

The message of an error is text for the person who gets it: it names the field or thing, what was given and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar


class MovieqError(Exception):
    """Anything that movieq raises on purpose."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SettingsError(MovieqError):
    """A setting is missing or wrong; names the setting and what it takes."""


class RunLost(MovieqError):
    """The fence refused a write: the run is no longer the present one of its task."""


class CmsFault(MovieqError):
    """The CMS did not do what it was asked; says what to change.

    `final`: another try cannot help. `status` is that of its answer, None where none came; `retry_after` its header of that name.
    """

    def __init__(self, message: str, *, final: bool = False, status: int | None = None, retry_after: str = "") -> None:
        super().__init__(message)
        self.final = final
        self.status = status
        self.retry_after = retry_after


class RequestError(MovieqError):
    """The answer to a request is an error.

    `errors` lists (path, message) where several things are wrong; `retry_after_s` becomes `Retry-After`; `headers` go out as they are.
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
        super().__init__(message)
        self.errors = errors
        self.headers = headers or {}
        self.retry_after_s = retry_after_s


class ValidationFailed(RequestError):
    """The request does not say what the contract asks for."""

    code, status = "validation_failed", 400


class InvalidState(RequestError):
    """The task's state does not allow the verb."""

    code, status = "invalid_state", 400


class Unauthorized(RequestError):
    """No key, or a wrong one."""

    code, status = "unauthorized", 401


class Forbidden(RequestError):
    """The key, or the signed url, does not allow this."""

    code, status = "forbidden", 403


class NotFound(RequestError):
    """There is no such thing, or the key may not know of it."""

    code, status = "not_found", 404


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    code, status = "method_not_allowed", 405


class Conflict(RequestError):
    """The first request with this idempotency key is still in flight."""

    code, status, retryable = "conflict", 409, True


class PayloadTooLarge(RequestError):
    """The body is over its limit."""

    code, status = "payload_too_large", 413


class IdempotencyMismatch(RequestError):
    """The idempotency key was used with another body."""

    code, status = "idempotency_mismatch", 422


class RangeRefused(RequestError):
    """The file ends before the range that was asked for."""

    code, status = "range_not_satisfiable", 416


class QueueFull(RequestError):
    """The project, or the installation, has as many waiting tasks as it may."""

    code, status, retryable = "queue_full", 429, True


class RateLimited(RequestError):
    """Too many requests."""

    code, status, retryable = "rate_limited", 429, True


class Internal(RequestError):
    """A fault of movieq's own."""

    code, status, retryable = "internal", 500, True


class Unavailable(RequestError):
    """Redis is away."""

    code, status, retryable = "unavailable", 503, True


class TaskFault(MovieqError):
    """A run ends without a result. `retryable`: whether another try can mend it."""

    retryable: ClassVar[bool] = False


class InputUnavailable(TaskFault):
    """A reference cannot be had; names it."""

    code = "input_unavailable"


class InvalidInput(TaskFault):
    """A reference was had, but is not what it should be; names it."""

    code = "invalid_input"


class UnsupportedParameter(TaskFault):
    """The engine cannot honour a parameter; names one that can."""

    code = "unsupported_parameter"


class EngineUnavailable(TaskFault):
    """The engine, or a part of it, is not installed where the task ran."""

    code = "engine_unavailable"


class ModelUnavailable(TaskFault):
    """The model cannot be loaded."""

    code = "model_unavailable"


class Unsigned(TaskFault):
    """The result could not be signed, and nothing unsigned may be published."""

    code = "unsigned"


class OutOfMemory(TaskFault):
    """Memory ran out, on the device or in the host."""

    code, retryable = "out_of_memory", True


class WorkerLost(TaskFault):
    """The engine's process, or the worker, died with the task."""

    code, retryable = "worker_lost", True


class DeadlineExceeded(TaskFault):
    """The task's deadline, or the longest time of its type, is over."""

    code = "deadline_exceeded"


class StorageFault(TaskFault):
    """The result could not be stored. `passes`: it may be mended by itself; else the message says what the operator has to do."""

    code, retryable = "storage", True

    def __init__(self, message: str, *, passes: bool = True) -> None:
        super().__init__(message)
        self.passes = passes


class KeyTaken(StorageFault):
    """Other bytes are under this key already, and stay there."""


class NetworkFault(TaskFault):
    """A connection failed in a way that may pass."""

    code, retryable = "network", True


class InternalFault(TaskFault):
    """A fault of movieq's own, or of an engine."""

    code, retryable = "internal", True


TASK_FAULTS: dict[str, type[TaskFault]] = {fault.code: fault for fault in TaskFault.__subclasses__()}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and then what caused it, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def first_of(error: BaseException) -> BaseException:
    """Return the first error of a group, however deep it lies; an error that is no group is returned as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
