"""A real PayloadCMS on a free port of this machine: started, stopped, killed and started again over the same database."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.request import Request, urlopen

from movieq.pdeathsig import end_with_parent
from tests.programs import node

HERE: Final = Path(__file__).parent


class PayloadServer:
    """The CMS: `url` is what MOVIEQ_PAYLOAD_URL is set to, `key` an API key, `project` the id of a project of it."""

    def __init__(self, folder: Path, own_limits: bool = False) -> None:
        node(HERE)
        self.key = str(uuid.uuid4())  # whoever makes a user chooses its key
        self._environment = {"NODE_ENV": "test", "PAYLOAD_FOLDER": str(folder), "PORT": "0", "PATH": os.environ["PATH"]}
        if own_limits:
            self._environment["PAYLOAD_OWN_LIMITS"] = "1"
        self.start()
        token = self.call("POST", "/users/first-register", {"email": "head@cms.test", "password": uuid.uuid4().hex}, "")["token"]
        user = {"email": "movieq@cms.test", "password": uuid.uuid4().hex, "enableAPIKey": True, "apiKey": self.key}
        self.call("POST", "/users", user, f"JWT {token}")
        self.project: int = self.call("POST", "/projects", {"title": "The lighthouse"})["doc"]["id"]

    def start(self) -> None:
        """It takes requests, at the same port as before."""
        self.process = subprocess.Popen(
            ["node", "server.mjs"], cwd=HERE, env=self._environment, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"ready"'):
                self._environment["PORT"] = str(json.loads(line)["ready"])
                self.url = f"http://127.0.0.1:{self._environment['PORT']}/api"
                return
        raise RuntimeError("Payload did not start")

    def freeze(self) -> None:
        """It hangs: connections are taken, nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """It is gone, in the middle of whatever it did."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def call(self, method: str, path: str, body: Any = None, authorization: str | None = None) -> Any:
        """The JSON of an answer, asked for with the API key unless another authorization is given."""
        headers = {"Content-Type": "application/json"}
        headers["Authorization"] = f"users API-Key {self.key}" if authorization is None else authorization
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(self.url + path, data, headers, method=method), timeout=60) as answer:
            return json.load(answer)

    def documents(self, task_id: str, collection: str = "media", path: str = "generationMetadata.taskId") -> list[dict[str, Any]]:
        """The documents of a task."""
        found: list[dict[str, Any]] = self.call("GET", f"/{collection}?where[{path}][equals]={task_id}&depth=0")["docs"]
        return found

    def file(self, document: dict[str, Any]) -> bytes:
        """The file of a document of media."""
        url = self.url.removesuffix("/api") + document["url"]
        with urlopen(Request(url, headers={"Authorization": f"users API-Key {self.key}"}), timeout=60) as answer:
            return bytes(answer.read())


@contextmanager
def payload_server(own_limits: bool = False) -> Iterator[PayloadServer]:
    """A CMS for the length of a block."""
    folder = Path(tempfile.mkdtemp(prefix="movieq-payload-"))
    server = PayloadServer(folder, own_limits)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
        shutil.rmtree(folder)
