"""`movieq doctor` about the CMS and callbacks: what is wrong has a line that names the cure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from movieq.checks import Finding, Mark
from movieq.local.doctor import examine
from movieq.settings import PayloadMode, Settings
from tests.payload.server import PayloadServer, payload_server
from tests.service import serving

MARKS = {Mark.GOOD: "good", Mark.NOTE: "note", Mark.BROKEN: "broken"}


async def findings(folder: Path, callback: str | None = None, **settings: Any) -> dict[str, tuple[str, str]]:
    """Mark and text of each finding about the CMS and callbacks, by its subject."""
    found: list[Finding] = []
    await examine(lambda: Settings(**settings), folder, "http://127.0.0.1:9", found.append, callback)
    return {each.subject: (MARKS[each.mark], each.text) for each in found if each.subject.startswith(("CMS", "callbacks"))}


@pytest.fixture(scope="module")
def narrow() -> Iterator[PayloadServer]:
    """A CMS with Payload's own limits."""
    with payload_server(own_limits=True) as server:
        yield server


async def test_a_cms_that_fits_is_good_in_every_line(cms: PayloadServer, folder: Path) -> None:
    found = await findings(folder, payload_url=cms.url, payload_api_key=cms.key)
    assert {subject: mark for subject, (mark, _) in found.items()} == dict.fromkeys(
        ("CMS", "CMS media", "CMS fields", "CMS writable", "CMS limits", "callbacks"), "good"
    )
    assert cms.key not in str(found)
    assert cms.call("GET", "/media?where[filename][contains]=doctor")["docs"] == []


@pytest.mark.parametrize(
    ("settings", "subject", "mark", "words"),
    [
        ({"payload_api_key": "wrong"}, "CMS", "broken", ["Enable API Key", "MOVIEQ_PAYLOAD_API_KEY"]),
        ({"payload_api_key": ""}, "CMS", "broken", ["MOVIEQ_PAYLOAD_API_KEY"]),
        ({"payload_users": "nobody"}, "CMS", "broken", ["404"]),
        ({"payload_url": "http://127.0.0.1:9/api"}, "CMS", "broken", ["cannot be reached"]),
        ({"payload_media": "pictures"}, "CMS", "broken", ["404"]),
        ({"payload_fields": "technicalData=technical"}, "CMS fields", "note", ["technical.fps", "MOVIEQ_PAYLOAD_FIELDS"]),
        ({"payload_media": "clips", "payload_mode": PayloadMode.REFERENCE}, "CMS fields", "broken", ["generationMetadata.taskId", "url"]),
    ],
)
async def test_what_is_wrong_with_the_cms_is_named_with_its_cure(
    cms: PayloadServer, folder: Path, settings: dict[str, Any], subject: str, mark: str, words: list[str]
) -> None:
    found = await findings(folder, **{"payload_url": cms.url, "payload_api_key": cms.key, **settings})
    assert found[subject][0] == mark
    assert [word for word in words if word not in found[subject][1]] == []


async def test_the_limits_of_payload_are_worth_a_note(narrow: PayloadServer, folder: Path) -> None:
    mark, text = (await findings(folder, payload_url=narrow.url, payload_api_key=narrow.key))["CMS limits"]
    assert mark == "note"
    assert "20 MiB" in text
    assert "upload.limits.fileSize" in text
    assert "upload.requestSizeLimit" in text


async def test_a_callback_is_tried_under_the_guard(folder: Path) -> None:
    async def hook(_: web.Request) -> web.Response:
        return web.Response(status=405)

    async def moved(_: web.Request) -> web.Response:
        raise web.HTTPFound("/elsewhere")

    async with serving({"/hook": hook, "/moved": moved}, "HEAD") as url:
        for callback, settings, mark, words in [
            (f"{url}/hook", {}, "good", "405"),
            (f"{url}/hook?token=hush", {"redis_url": "redis://127.0.0.1:9"}, "broken", "MOVIEQ_ALLOW_PRIVATE_URLS"),
            (f"{url}/hook", {"redis_url": "redis://127.0.0.1:9", "payload_url": f"{url}/api", "payload_api_key": "k"}, "good", "405"),
            (f"{url}/moved", {}, "broken", "redirects are not followed"),
            ("http://127.0.0.1:9/hook", {}, "broken", "cannot be reached"),
        ]:
            found = (await findings(folder, callback, **settings))["callbacks"]
            assert (found[0], words in found[1], "hush" in found[1]) == (mark, True, False), found
