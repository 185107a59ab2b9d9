"""The nginx of this machine, with the configuration of deploy/, in front of one or more API processes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.programs import program

SITE: Final = Path(__file__).parents[1] / "deploy" / "nginx.conf"


class Nginx:
    """An nginx with the configuration of deploy/, on free ports; `url` is its address."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._folder = folder

    @property
    def log(self) -> str:
        """Return its access log."""
        return (self._folder / "access.log").read_text()

    @property
    def errors(self) -> str:
        """Return its error log."""
        return "".join((self._folder / name).read_text() for name in ("error.log", "site-error.log"))


def command(folder: Path, port: int, *api_ports: int) -> list[str]:
    """Return the command that starts an nginx on a port, in front of APIs on other ports; its files are written to the folder."""
    folder.mkdir()
    site = SITE.read_text()
    for written, here in [
        (r"listen 80;", f"listen 127.0.0.1:{port};"),
        (r"(?<!# )server 127\.0\.0\.1:8001([^;]*);", " ".join(rf"server 127.0.0.1:{api_port}\1;" for api_port in api_ports)),
        (r"/var/log/nginx/movieq\.log", str(folder / "access.log")),
        (r"/var/log/nginx/movieq-error\.log", str(folder / "site-error.log")),
    ]:
        site, found = re.subn(written, here, site)
        assert found == 1, written
    kept = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "site.conf").write_text(site)
    (folder / "nginx.conf").write_text(f"pid {folder}/pid; events {{}} http {{ {kept} include {folder}/site.conf; }}")
    return [program("nginx", "nginx-light"), "-p", str(folder), "-c", "nginx.conf", "-e", str(folder / "error.log"), "-g", "daemon off;"]


@contextmanager
def nginx(folder: Path, port: int, *api_ports: int) -> Iterator[Nginx]:
    """Yield an nginx on a port, in front of the APIs on other ports."""
    process = subprocess.Popen(command(folder, port, *api_ports), start_new_session=True)
    try:
        yield Nginx(f"http://127.0.0.1:{port}", folder)
    finally:
        process.terminate()
        process.wait(60)
