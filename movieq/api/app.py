"""The ASGI application: its routes, its lifespan, and the handlers that turn errors into HTTP responses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from movieq import assembly, logs
from movieq.api import deliveries, health, media, openapi, projects, queues, tasks, web, workers
from movieq.api.events import ProjectEvents, TaskEvents, signed
from movieq.api.key_cache import KeyCache
from movieq.api.limits import HITS, AllowanceHeaders, Places, Rates
from movieq.api.readiness import Readiness
from movieq.api.state import Api, answered, now
from movieq.errors import (
    Internal,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    QuotaExceeded,
    RequestError,
    StorageFault,
    Unavailable,
    ValidationFailed,
)
from movieq.queue.refusals import is_fault, log_failure, refusal
from movieq.queue.store import TIDY_S, Store
from movieq.settings import Settings
from movieq.streams.hub import Hub
from movieq.tasks.wire import ErrorAnswer, FieldError

log = logs.get()

MEDIA: Final = "/media/"
_BY_STATUS: Final[dict[int, type[RequestError]]] = {404: NotFound, 405: MethodNotAllowed, 413: PayloadTooLarge}


def create(settings: Settings, public_url: str) -> Starlette:
    """Return the application for these settings. `public_url` is the address at which clients reach it."""
    routes = [
        *(Route(path, health.health) for path in ("/health", "/api/v1/health")),
        *(Route(path, health.live) for path in ("/health/live", "/api/v1/health/live")),
        *(Route(path, health.ready) for path in ("/health/ready", "/api/v1/health/ready")),
        _Fixed("/api/v1/tasks/submit", tasks.submit, methods=["POST"]),
        _Fixed("/api/v1/tasks/metrics", queues.metrics),
        _Fixed("/api/v1/tasks/health", queues.health),
        Route("/api/v1/queues", queues.queues),
        Route("/api/v1/dead-letters", queues.dead_letters),
        Route("/api/v1/dead-letters/{task_id}", queues.drop_dead_letter, methods=["DELETE"]),
        Route("/api/v1/tasks/{task_id}/status", tasks.status),
        Route("/api/v1/tasks/{task_id}/cancel", tasks.cancel, methods=["DELETE", "POST"]),
        Route("/api/v1/tasks/{task_id}/retry", tasks.retry, methods=["POST"]),
        Route("/api/v1/tasks/{task_id}/events", TaskEvents(), methods=["GET"]),
        Route("/api/v1/tasks/{task_id}/deliveries", deliveries.deliveries),
        Route("/api/v1/tasks/{task_id}/deliveries/{delivery_id}/resend", deliveries.resend, methods=["POST"]),
        Route("/api/v1/tasks/{task_id}", tasks.cancel, methods=["DELETE"]),
        Route("/api/v1/projects/{project_id}", projects.project),
        Route("/api/v1/projects/{project_id}/tasks", projects.tasks),
        Route("/api/v1/projects/{project_id}/events", ProjectEvents(), methods=["GET"]),
        Route("/api/v1/projects/{project_id}/uploads", projects.upload, methods=["POST"]),
        Route("/api/v1/workers/status", workers.status),
        Route("/api/v1/task-types", health.task_types),
        Route("/openapi.json", openapi.openapi),
        Route(f"{MEDIA}{{key:path}}", media.media, methods=["GET", "HEAD", "OPTIONS"]),
        Route("/movieq.js", web.script),
        Route("/movieq.d.ts", web.script_types),
    ]
    middleware = [Middleware(_Log), Middleware(AllowanceHeaders)]
    if settings.cors_origins:
        middleware.append(
            Middleware(
                _Cors,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["X-API-Key", "Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
                expose_headers=[
                    "Idempotent-Replayed",
                    "Retry-After",
                    "Location",
                    "X-RateLimit-Limit",
                    "X-RateLimit-Remaining",
                    "X-RateLimit-Reset",
                ],
                max_age=600,
            )
        )
    application = Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lambda app: _lifespan(app, settings, public_url),
        exception_handlers={
            RequestError: _refused,
            HTTPException: _framework_error,
            **dict.fromkeys((RedisError, ConnectionError, TimeoutError), _redis_away),
            **dict.fromkeys((StorageFault, OSError), _storage_away),  # for example a full disk
            ClientDisconnect: _client_gone,
            Exception: _broken,
        },
    )
    application.router.redirect_slashes = False  # the redirect would go to the host in the client's Host header
    return application


@asynccontextmanager
async def _lifespan(app: Starlette, settings: Settings, public_url: str) -> AsyncIterator[None]:
    async with assembly.opened(settings, public_url, patient=False) as found, asyncio.TaskGroup() as group:
        keys = KeyCache(settings.api_keys, found.api_keys)
        app.state.api = state = Api(
            **msgspec.structs.asdict(found),
            public_url=public_url,
            hub=Hub(found.queries, found.subscriber, lambda event_type, data: state.render(event_type, data), keys.may_read),
            keys=keys,
            places=Places(settings),
            rates=Rates(settings, found.api_keys),
            started_s=time.monotonic(),
            readiness=Readiness(found.store, found.queries, found.storage, group, allow_eviction=settings.allow_eviction),
        )
        works = (found.subscriber.run(), found.follow_signing_secret(), state.hub.run(), _tidy(found.store))
        running = [group.create_task(work) for work in works]
        yield
        state.hub.close()
        state.readiness.close()
        for task in running:
            task.cancel()


async def _tidy(store: Store) -> None:
    """Call `tidy` once a second, so that expired leases, due retries and deadlines are handled even when no worker is free."""
    away = False
    while True:
        try:
            done = await store.tidy()
            away = False
            if done:
                log.info("tidy", reaped=done.reaped, due=done.due, past_deadline=done.past_deadline)
        except Exception as error:  # no error may stop the API from answering
            if not away:
                log_failure("tidy_failed", error, away="redis_away")
            away = True
        await asyncio.sleep(TIDY_S)


def error_answer(error: RequestError) -> Response:
    """Return the HTTP response for an error."""
    body = ErrorAnswer(error.code, error.message, now(), error.retryable, [FieldError(path, message) for path, message in error.errors])
    retry = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return answered(body, error.status, {**error.headers, **retry})


def _response(request: Request, error: RequestError) -> Response:
    """Return the HTTP response for an error of this request. Pages of any origin may read that of a signed URL, as they may use it."""
    response = error_answer(error)
    if signed(request) or request.scope["path"].startswith(MEDIA):
        response.headers.update({"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "Retry-After"})
    return response


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    if isinstance(error, (PayloadTooLarge, QueueFull, QuotaExceeded)):
        HITS.add(error.code)
    return _response(request, error)


async def _framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _BY_STATUS.get(error.status_code, ValidationFailed)
    message = {
        404: f"unknown path: {request.scope['path'][:200]}",  # not request.url, which raises for a malformed Host header
        405: f"{request.method} is not allowed for this path; allowed: {(error.headers or {}).get('Allow', '')}",
    }.get(error.status_code, str(error.detail))
    response = _response(request, kind(message))
    response.headers.update(error.headers or {})
    return response


async def _redis_away(request: Request, error: Exception) -> Response:
    if is_fault(error):
        log.error("request_broke", method=request.method, path=request.scope["path"][:200], exc_info=error)
        return await _broken(request, error)
    log.warning("request_without_redis", problem=str(error) or type(error).__name__)
    if refused := refusal(error):
        why = f"Redis refused the request because {refused.reason}"
        return _response(request, Unavailable(f"{why}: nothing was changed; try again later", retry_after_s=2))
    # no promise that nothing changed: a Redis that hangs may still execute the command later
    return _response(request, Unavailable("Redis is unavailable: try again; an Idempotency-Key prevents duplicate tasks", retry_after_s=2))


async def _storage_away(request: Request, error: Exception) -> Response:
    log.error("storage_away", problem=str(error))
    return _response(request, Unavailable("the storage is unavailable: try again later", retry_after_s=10))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # never received: the client disconnected while sending the body


async def _broken(request: Request, error: Exception) -> Response:
    # when Starlette calls this as its last handler, it raises the error again, and uvicorn logs it
    return _response(request, Internal("internal error: see the log of the API"))


class _Fixed(Route):
    """A route whose path looks like that of a task. Other methods get 405 here, and do not go on to the routes of tasks."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether the path matches; starlette's `handle` then checks the method."""
        match, child = super().matches(scope)
        return (Match.FULL if match is Match.PARTIAL else match), child


class _Cors(CORSMiddleware):
    """Starlette's CORS middleware, with errors in the JSON format of the API. Files are open to scripts of any origin without it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        served = self.app if scope["type"] == "http" and scope["path"].startswith(MEDIA) else super().__call__
        await served(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer to a browser's OPTIONS request."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        refusal = error_answer(ValidationFailed(f"{bytes(response.body).decode()}; MOVIEQ_CORS_ORIGINS sets the allowed origins"))
        refusal.headers.update({name: value for name, value in response.headers.items() if not name.startswith("content-")})
        return refusal


class _Log:
    """Middleware that logs each request at debug level, without its query string, which may contain a signature."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not log.is_enabled_for(10):
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            fields: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "status": status}
            log.debug("request", **fields, ms=round((time.perf_counter() - begun) * 1000, 2))
