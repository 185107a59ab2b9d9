"""The script that a page imports to follow tasks, and its types."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response

_FOLDER: Final = Path(__file__).parent.parent / "web"
_HEADERS: Final = {
    "Access-Control-Allow-Origin": "*",  # a module is fetched with CORS, also by a page of another origin
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Cache-Control": "public, max-age=3600",
    "X-Content-Type-Options": "nosniff",
}


async def script(request: Request) -> Response:
    """`GET /movieq.js`. Needs no key: it holds no secret."""
    return FileResponse(_FOLDER / "movieq.js", headers=_HEADERS, media_type="text/javascript")


async def script_types(request: Request) -> Response:
    """`GET /movieq.d.ts`: the type declarations of the script."""
    return FileResponse(_FOLDER / "movieq.d.ts", headers=_HEADERS, media_type="text/plain")
