"""Data urls (RFC 2397), read as browsers do (https://fetch.spec.whatwg.org/#data-url-processor)."""

from __future__ import annotations

import base64
import re
from typing import Final
from urllib.parse import unquote_to_bytes

from movieq.errors import InvalidInput

_OUTER: Final = "".join(map(chr, range(0x21)))
"""The characters that browsers leave out at both ends of a url."""
_INNER: Final = str.maketrans("", "", "\t\r\n")
"""Those that they leave out anywhere in it."""
_BASE64: Final = re.compile(r"; *base64\s*$", re.IGNORECASE)
_MEDIA_TYPE: Final = re.compile(r"\s*[a-z]+/[\w.+-]{1,60}(?=\s*(?:[;,]|$))", re.IGNORECASE)


def is_data_url(reference: str) -> bool:
    """Whether browsers would read this as a data url."""
    return _cleaned(reference)[:5].lower() == "data:"


def shown_data_url(url: str) -> str:
    """Return a data url for a message: its media type and encoding, and nothing of its data."""
    declared, comma, _ = _cleaned(url)[5:].partition(",")
    media_type = _MEDIA_TYPE.match(declared)
    return f"data:{media_type[0].strip() if media_type else ''}{';base64' if comma and _BASE64.search(declared) else ''},..."


def decoded(url: str) -> bytes:
    """Return the bytes of a data url; base64 may contain blanks and lack its padding. Raises InvalidInput, without the data."""
    declared, comma, data = _cleaned(url)[5:].partition("#")[0].partition(",")
    if not comma:
        raise InvalidInput(f"{shown_data_url(url)} is not a valid data url: it has no comma")
    body = unquote_to_bytes(data.encode(errors="replace"))  # JSON may have half a surrogate pair
    if not _BASE64.search(declared):
        return body
    body = b"".join(body.split()).rstrip(b"=")
    try:
        return base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
    except ValueError as error:
        raise InvalidInput(f"{shown_data_url(url)} is not valid base64") from error


def _cleaned(url: str) -> str:
    return url.strip(_OUTER).translate(_INNER)
