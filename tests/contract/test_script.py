"""`/movieq.js` and its types, as pages of any origin load them."""

from __future__ import annotations

import pytest

from tests.contract.client import Client


@pytest.mark.parametrize(("path", "content_type"), [("/movieq.js", "text/javascript"), ("/movieq.d.ts", "text/plain")])
async def test_the_script_and_its_types_are_open_to_every_page_without_a_key(api: Client, path: str, content_type: str) -> None:
    answer = await api.get(path, key=None, headers={"Origin": "https://anywhere.example"})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == f"{content_type}; charset=utf-8"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Cache-Control"] == "public, max-age=3600"
    assert b"watchTask" in answer.body
