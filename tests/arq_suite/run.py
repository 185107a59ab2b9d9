"""arq's own tests of its worker, run on ours: `python -m tests.arq_suite.run SDIST`, with arq's source distribution.

Its `tests/test_worker.py` and `tests/test_cron.py` run as they are, beside the conftest of this folder instead of arq's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SUITE = ("test_worker.py", "test_cron.py")


def main() -> None:
    """Exits as pytest does."""
    with tempfile.TemporaryDirectory(prefix="arq-suite-") as name, tarfile.open(sys.argv[1]) as sdist:
        folder = Path(name)
        for member in sdist.getmembers():
            if (path := Path(member.name)).parent.name == "tests" and path.name in SUITE:
                body = sdist.extractfile(member)
                assert body is not None
                (folder / path.name).write_bytes(body.read())
        (folder / "conftest.py").write_text((HERE / "suite_conftest.py").read_text())
        (folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\ntimeout = 60\n")
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-rxX", str(folder)]
        sys.exit(subprocess.run(command, cwd=folder, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
