"""What npm packs: what an app gets of the plugin, and its types."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import movieq
from tests.payload_plugin.conftest import HERE, PLUGIN


def test_the_package_has_the_compiled_plugin_its_types_and_the_script_that_movieq_serves(app: Path) -> None:
    package = app / "node_modules" / "movieq-payload"
    described = json.loads((package / "package.json").read_text())
    for entry in described["exports"].values():
        assert (package / entry["types"]).exists()
        assert (package / entry["default"]).exists()
    assert (package / "dist" / "movieq.js").read_bytes() == (Path(movieq.__file__).parent / "web" / "movieq.js").read_bytes()
    assert (package / "dist" / "panel.js").read_text().startswith("'use client'")
    assert described["version"] == movieq.__version__
    assert {path.name.partition(".")[2] for path in (package / "dist").iterdir()} == {"js", "d.ts"}


def test_an_app_in_typescript_gets_the_types_of_the_plugin(app: Path) -> None:
    shutil.copy(HERE / "app.ts", app)
    options = "--noEmit --strict --skipLibCheck --module nodenext --target es2022 --types node".split()
    compiler = PLUGIN / "node_modules" / "typescript" / "bin" / "tsc"
    done = subprocess.run(["node", compiler, *options, "app.ts"], cwd=app, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
