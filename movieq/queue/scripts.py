"""The Lua scripts: assembled from the includes that they declare, and called with named arguments."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from redis.exceptions import NoScriptError

from movieq.queue.connection import Redis, SharedConnection

LUA: Final = Path(__file__).with_name("lua")
_ARGS: Final = re.compile(r"^-- args: (.+)$", re.MULTILINE)
_INCLUDES: Final = re.compile(r"^-- include: (.+)$", re.MULTILINE)
_REST: Final = "..."


class Script:
    """A Lua script that is called with named arguments, as its `-- args:` line declares them."""

    def __init__(self, connection: SharedConnection, path: Path, keys: Mapping[str, str]) -> None:
        source = path.read_text()
        shebang, _, body = source.partition("\n")
        declared = _ARGS.search(source)
        if not shebang.startswith("#!lua") or declared is None:
            raise ValueError(f"{path.name}: the first line must be `#!lua ...`, and one line must be `-- args: ...`")
        self.args = [name for name in declared[1].split() if name != _REST]
        names = ", ".join(self.args)
        included = includes(path)
        save = "save()\n" if "record" in included else ""
        # only the named arguments are unpacked: a long rest could overflow Lua's stack
        head = f"{shebang}\nlocal {names} = unpack(ARGV, 1, {len(self.args)})\n{''.join(included.values())}"
        whole = f"{head}local function main()\n{body}\nend\nlocal answer = main()\n{save}return answer\n"
        self._connection = connection
        self.source = re.sub(r"\bK\.(\w+)", lambda found: f"'{keys[found[1]]}'", whole)  # cheaper than a table built in every call
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, rest: Sequence[str | int], **args: str | int | float | bytes) -> Any:
        if args.keys() != set(self.args):
            raise TypeError(f"expected {self.args}, got {sorted(args)}")
        arguments = [*(args[name] for name in self.args), *rest]
        try:
            return await self._connection.call("EVALSHA", self.sha, 0, *arguments)
        except NoScriptError:  # the server is new or was restarted
            return await self._connection.call("EVAL", self.source, 0, *arguments)

    async def finish(self, rest: Sequence[str | int] = (), **args: str | int | float | bytes) -> Any:
        """Call the script. If the caller is cancelled, wait for the call to end before raising CancelledError."""
        call = asyncio.ensure_future(self(rest, **args))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait({call})  # bounded by the client's own time limits
            if not call.cancelled():
                call.exception()
            raise


def load(redis: Redis, *names: str) -> dict[str, Script]:
    """Return the scripts with these names, or all scripts if no name is given."""
    paths = sorted(Path(__file__).with_name("lua").glob("[a-z]*.lua"))
    return {path.stem: Script(redis.shared, path, redis.key_names) for path in paths if not names or path.stem in names}


def named_includes(source: str) -> list[str]:
    """Return the names in the `-- include:` lines of a Lua file."""
    return [name for line in _INCLUDES.findall(source) for name in line.split()]


def includes(path: Path) -> dict[str, str]:
    """Return the source of every include that the Lua file needs, by name; each include comes after its own includes.

    Raises ValueError for an unknown include and for a circular one.
    """
    found: dict[str, str] = {}
    _include(path, path.parent / "includes", found, ())
    return found


def _include(path: Path, folder: Path, found: dict[str, str], circle: tuple[str, ...]) -> None:
    for name in named_includes(path.read_text()):
        include = folder / f"{name}.lua"
        if name in circle:
            raise ValueError(f"{path.name}: circular includes {' -> '.join((*circle, name))}")
        if not include.is_file():
            raise ValueError(f"{path.name}: include {name!r} not found in {folder.name}/")
        if name not in found:
            _include(include, folder, found, (*circle, name))
            found[name] = include.read_text()
