"""A webhook as a receiver in Node gets it: the official library of Standard Webhooks takes it for genuine."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import aiohttp

from movieq.queue.store import Store
from movieq.storage.folder import FolderStorage
from tests.arrange import delivery_parts, running
from tests.browser.conftest import NODE
from tests.programs import node
from tests.service import receiver
from workers.delivery import deliver

OLD, NEW, OTHER = ("whsec_" + base64.b64encode(secret).decode() for secret in (b"old" * 8, b"new" * 8, b"other" * 8))


async def test_the_official_npm_package_accepts_a_webhook_under_both_secrets_of_a_rotation_and_no_other(store: Store, folder: Path) -> None:
    async with receiver() as hook, aiohttp.ClientSession() as session:
        parts = delivery_parts(store, FolderStorage(folder, "http://127.0.0.1:1", (b"signs media",)), session, (NEW, OLD))
        task_id, run = await running(store, callback_url=hook.url, metadata='{"title": "Škoda 🎬"}'.encode())
        await store.fail(task_id, run, "it broke", "internal")
        await deliver({"delivery_parts": parts, "job_id": f"{task_id}-1", "job_try": 1}, f"{task_id}-1")
    ((headers, raw),) = hook.requests
    sent, body = {name.lower(): value for name, value in headers.items()}, raw.decode()
    given = [{"secret": secret, "headers": sent, "body": body} for secret in (OLD, NEW, OTHER)]
    given.append({"secret": NEW, "headers": sent, "body": body.replace("broke", "works")})
    given.append({"secret": NEW, "headers": {**sent, "webhook-timestamp": "1"}, "body": body})
    command = [node(NODE), str(NODE / "verify.js")]
    answered = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=True)
    assert json.loads(answered.stdout) == [True, True, False, False, False]
