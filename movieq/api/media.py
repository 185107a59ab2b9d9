"""Files of the folder storage, under signed urls: with Range, the right type, and nothing for a browser to guess."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import FileResponse, MalformedRangeHeader, RangeNotSatisfiable, Response

from movieq.api.state import api
from movieq.errors import Forbidden, NotFound, RangeRefused
from movieq.storage.base import content_type
from movieq.storage.folder import FolderStorage
from movieq.tasks.results import MEDIA_URL_S

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Access-Control-Allow-Origin": "*",
    "Cache-Control": f"private, max-age={MEDIA_URL_S}, immutable",
    "Content-Security-Policy": "sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
}


async def media(request: Request) -> Response:
    """`GET /media/{key}?expires=...&signature=...`: return a stored file. Raises Forbidden, NotFound."""
    storage = api(request).storage
    key, query = str(request.path_params["key"]), request.query_params
    if not isinstance(storage, FolderStorage):
        raise NotFound("files are not served here: take a fresh address from the status of the task")
    if "signature" not in query:
        raise Forbidden("this address is not signed: take it from the status of the task")
    storage.verify(key, query.get("expires", ""), query["signature"], time.time())
    if await storage.size(key) is None:
        raise NotFound("this file is not there any more")
    return _File(storage.local_path(key), headers=_HEADERS, media_type=content_type(key))


class _File(FileResponse):
    """Starlette's file response, with refusals in the form of every error."""

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []  # the whole file: a range that is not understood counts as none (RFC 9110, 14.2)
        except RangeNotSatisfiable:
            headers = {"Content-Range": f"bytes */{file_size}", "Access-Control-Allow-Origin": "*"}
            raise RangeRefused(f"Range: the file has {file_size} bytes, got {http_range[:80]!r}", headers=headers) from None
