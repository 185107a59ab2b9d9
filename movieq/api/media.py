"""The endpoint that serves files of the folder storage under signed URLs. It supports Range requests."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import FileResponse, MalformedRangeHeader, RangeNotSatisfiable, Response

from movieq.api.state import api
from movieq.errors import InvalidSignature, NotFound, RangeRefused
from movieq.storage.base import content_type
from movieq.storage.folder import FolderStorage
from movieq.tasks.faults import given
from movieq.tasks.results import MEDIA_URL_S

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "Accept-Ranges, Content-Length, Content-Range, ETag, Last-Modified",
    "Cache-Control": f"private, max-age={MEDIA_URL_S}, immutable",
    "Content-Security-Policy": "sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
}


_PREFLIGHT = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, HEAD",
    "Access-Control-Allow-Headers": "Range, If-Range, If-None-Match, If-Modified-Since",
    "Access-Control-Max-Age": "86400",
    "Allow": "GET, HEAD, OPTIONS",
}


async def media(request: Request) -> Response:
    """`GET /media/{key}?expires=...&signature=...`: return a stored file. Raises InvalidSignature, Expired, NotFound.

    OPTIONS answers a browser that asks whether a script may read a range.
    """
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=_PREFLIGHT)
    storage = api(request).storage
    key, query = str(request.path_params["key"]), request.query_params
    if not isinstance(storage, FolderStorage):
        raise NotFound("this server does not serve files: get a new URL from the task's status")
    if "signature" not in query:
        raise InvalidSignature("missing signature: use the URL from the task's status exactly as issued")
    storage.verify(key, query.get("expires", ""), query["signature"], time.time())
    if await storage.size(key) is None:
        raise NotFound("the file no longer exists")
    return _File(storage.local_path(key), headers=_HEADERS, media_type=content_type(key))


class _File(FileResponse):
    """Starlette's file response, with errors in the JSON format of the API."""

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []  # the whole file: a malformed range is ignored (RFC 9110, 14.2)
        except RangeNotSatisfiable:
            headers = {"Content-Range": f"bytes */{file_size}"}
            raise RangeRefused(f"Range: {given(http_range)} is outside the file, which has {file_size} bytes", headers=headers) from None
