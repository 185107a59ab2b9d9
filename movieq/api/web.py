"""The endpoints that serve movieq.js, the script with which a web page follows tasks, and its type declarations."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response

_FOLDER: Final = Path(__file__).parent.parent / "web"
_HEADERS: Final = {
    "Access-Control-Allow-Origin": "*",  # browsers load modules from other origins with CORS
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Cache-Control": "public, max-age=3600",
    "X-Content-Type-Options": "nosniff",
}


async def script(request: Request) -> Response:
    """`GET /movieq.js`: return the script. Needs no key."""
    return FileResponse(_FOLDER / "movieq.js", headers=_HEADERS, media_type="text/javascript")


async def script_types(request: Request) -> Response:
    """`GET /movieq.d.ts`: return the script's type declarations. Needs no key."""
    return FileResponse(_FOLDER / "movieq.d.ts", headers=_HEADERS, media_type="text/plain")
