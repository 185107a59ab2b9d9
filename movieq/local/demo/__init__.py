"""`movieq demo`: render a clip from a storyboard, a picture from a description and a voice from a line, and show them on a contact sheet.

The demo starts its own `movieq up` on a free port and ignores your settings. At the end it stops all that it started; the files remain.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from rich.console import Console

from movieq import __version__
from movieq.api import server
from movieq.client import Client
from movieq.errors import EngineUnavailable, MovieqError, SettingsError, Unavailable
from movieq.local.terminal import End, follow
from movieq.pdeathsig import end_with_parent
from movieq.settings import PREFIX, variable
from movieq.tasks.results import Result
from movieq.tasks.states import GENERATE_IMAGE, GENERATE_VIDEO, PROCESS_AUDIO, TaskStatus, TaskType
from movieq.tasks.wire import Receipt

START_S: Final = 30.0
STOP_S: Final = 15.0
PROJECT: Final = "demo"
FRAMES: Final = tuple(Path(__file__).with_name(f"frame{number}.jpg") for number in (1, 2, 3))

TITLE: Final = "The Keeper’s Light"  # noqa: RUF001  # a typographic apostrophe
SCENE: Final = (
    "Night, a headland above the sea. The beam sweeps out over the water and finds a small boat. "
    "In the lantern room the keeper lifts his lamp to the window; a match, and the great light burns again."
)
LINE: Final = "There is a boat out there. Hold on. I am lighting the lamp."

T = TypeVar("T")


class Piece(msgspec.Struct, frozen=True):
    """One task of the demo."""

    name: str
    task_type: TaskType
    task_data: dict[str, Any]


class Rendered(msgspec.Struct, frozen=True):
    """A completed piece, with its file and its result."""

    piece: Piece
    path: Path
    result: Result


def pieces(storyboard: list[str]) -> list[Piece]:
    """Return the tasks to submit. `storyboard` holds the references of the uploaded frames."""
    clip = {
        "storyboard_images": storyboard,
        "scene_description": SCENE,
        "camera_angle": "slow push in",
        "lighting": "moonlight",
        "audio_cues": ["waves", "wind"],
        "duration": 7.0,
        "resolution": "1920x1080",
        "fps": 24,
    }
    picture = {
        "character_description": "The keeper: sixty, grey beard, dark cap, oilskin coat. He has not slept since the storm began.",
        "reference_images": storyboard[1:2],
        "lighting": "lantern light",
        "resolution": "1024x1024",
    }
    voice = {"text": LINE, "language": "en", "emotion": "calm", "pace": "measured"}
    return [
        Piece("clip", GENERATE_VIDEO, clip),
        Piece("picture", GENERATE_IMAGE, picture),
        Piece("voice", PROCESS_AUDIO, voice),
    ]


async def run(out: Path, data: Path | None, console: Console) -> None:
    """Run the demo: write the files and the contact sheet to `out`, and stop all that it started. Raises MovieqError naming what failed.

    `data` is the folder of the `movieq up`; None means a temporary one. After a failure its log is in `out` as movieq-up.log.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out} cannot be used: {error.strerror}; name another folder with --out") from None
    here = asyncio.current_task()
    assert here is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.cancel)  # SIGTERM, too, stops all that the demo started
    with _folder(data) as folder, _logged(folder / "demo.log", out / "movieq-up.log") as log:
        console.print(f"starting movieq {__version__}: a queue, the API and a worker ...", highlight=False)
        async with _up(folder, log) as (url, process):
            key = (folder / "api-key").read_text().strip()
            async with Client(url, key) as client:
                rendered, missing = await _unless_it_ends(process, _render(client, url, out, console))
                sheet = out / "contact-sheet.png"
                await asyncio.to_thread(_draw, rendered, missing, sheet)
            console.print("stopping movieq ...", highlight=False)
    _print_summary(rendered, missing, sheet, console)


async def _render(client: Client, url: str, out: Path, console: Console) -> tuple[list[Rendered], str]:
    """Submit the tasks and download their files to `out`. The second value says why there is no voice; it is empty if there is one."""
    uploads = [await client.upload(PROJECT, frame) for frame in FRAMES]
    console.print(f"movieq runs at {url}; uploaded the storyboard: {len(uploads)} frames", highlight=False, soft_wrap=True)
    wanted = pieces([upload.url for upload in uploads])
    receipts: list[Receipt] = [
        await client.submit(PROJECT, piece.task_type, piece.task_data, metadata={"scene_id": "12"}) for piece in wanted
    ]
    ends = await follow(client, {receipt.task_id: f"{piece.name:8}" for receipt, piece in zip(receipts, wanted, strict=True)}, console)
    rendered, missing = [], ""
    for receipt, piece in zip(receipts, wanted, strict=True):
        end = ends[receipt.task_id]
        if piece.task_type is PROCESS_AUDIO and end.error_code == EngineUnavailable.code:
            missing = end.error or end.error_code
        else:
            result = _result(piece, end)
            path = out / f"{piece.name}{_suffix(result)}"
            await client.download(result.media_url, path)
            rendered.append(Rendered(piece, path, result))
    return rendered, missing


def _result(piece: Piece, end: End) -> Result:
    if end.status is not TaskStatus.COMPLETED or end.result is None:
        raise MovieqError(f"{piece.name} ({piece.task_type}) {end.status}: {end.error or 'no reason given'} ({end.error_code})")
    return end.result


def _suffix(result: Result) -> str:
    return Path(result.media_url.partition("?")[0]).suffix


def _draw(rendered: list[Rendered], missing: str, dest: Path) -> None:
    from movieq.local.demo import sheet

    paths = {each.piece.name: each for each in rendered}
    metadata = paths["clip"].result.metadata
    contents = sheet.Contents(
        title=TITLE,
        scene=SCENE,
        clip=paths["clip"].path,
        picture=paths["picture"].path,
        picture_text="The keeper",
        voice=paths["voice"].path if "voice" in paths else None,
        voice_text=LINE,
        voice_missing=missing,
        made_by=f"movieq {__version__}   engine {metadata.get('engine')}   seed {metadata.get('seed')}",
    )
    sheet.draw(contents, dest)


def _print_summary(rendered: list[Rendered], missing: str, sheet: Path, console: Console) -> None:
    console.print()
    for each in rendered:
        facts = [f"{each.path.stat().st_size / 1e6:.1f} MB"]
        metadata = each.result.metadata
        if (seconds := metadata.get("duration")) is not None:
            facts.insert(0, f"{float(seconds):.1f} s")
        if (resolution := metadata.get("resolution")) is not None:
            facts.insert(0, str(resolution))
        _line(console, each.piece.name, each.path, ", ".join(facts))
        console.print(f"           {each.result.media_url}", style="dim", highlight=False, soft_wrap=True, markup=False)
    if missing:
        console.print(" [yellow]![/] [bold]voice[/]    none: ", end="", highlight=False)
        console.print(missing, markup=False, highlight=False, soft_wrap=True)
    _line(console, "sheet", sheet, "all results on one page")
    console.print("\nThese urls worked while the demo ran. To render more, start `movieq up`.", highlight=False, soft_wrap=True)


def _line(console: Console, name: str, path: Path, facts: str) -> None:
    console.print(f" [green]✓[/] [bold]{name:8}[/] ", end="", highlight=False)
    console.print(f"{path}  ({facts})", markup=False, highlight=False, soft_wrap=True)


# ── The `movieq up` of the demo ───────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def _up(folder: Path, log: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Start a `movieq up` for the duration of a block, and yield its url and its process. Raises SettingsError if it does not start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment[variable("drain_s")] = "0"  # at the end no task runs, and a demo that is interrupted stops at once
    environment[variable("spool")] = str(folder / "spool")  # else what an interrupted task leaves to its next run would stay behind
    environment[variable("cpu_slots")] = str(min(2, os.cpu_count() or 1))
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "movieq.cli", "up", "--port", "0", "--data", str(folder),
            cwd=folder,  # so that it reads no .env
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # a Ctrl-C is for the demo, which then stops it
            preexec_fn=end_with_parent,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        url = await _ready(process.stdout, log)
        reading = asyncio.ensure_future(process.stdout.read())  # a full pipe would block it
        try:
            yield url, process
        finally:
            reading.cancel()
            await asyncio.wait({reading})
    finally:
        await _ended(process)


async def _ready(output: asyncio.StreamReader, log: Path) -> str:
    try:
        async with asyncio.timeout(START_S):
            while line := (await output.readline()).decode():
                if line.startswith(server.READY):
                    return line.removeprefix(server.READY).strip()
    except TimeoutError:
        raise SettingsError(f"`movieq up` was not ready within {START_S:g} s: {_last_words(log)}") from None
    raise SettingsError(f"`movieq up` did not start: {_last_words(log)}")


async def _ended(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _unless_it_ends(process: asyncio.subprocess.Process, work: Awaitable[T]) -> T:
    """Return the result of the work. Raises Unavailable as soon as the process ends, since no answer can come then."""
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Unavailable(f"`movieq up` ended unexpectedly with exit code {ending.result()}")
    finally:
        working.cancel()
        ending.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else "its log is empty"


@contextmanager
def _folder(data: Path | None) -> Iterator[Path]:
    if data is None:
        with tempfile.TemporaryDirectory(prefix="movieq-demo-") as folder:
            yield Path(folder)
        return
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{data} cannot be used: {error.strerror}; name another folder with --data") from None
    yield data.resolve()


@contextmanager
def _logged(log: Path, kept: Path) -> Iterator[Path]:
    """Yield the path of the log, and copy the log to `kept` if the block fails."""
    try:
        yield log
    except (MovieqError, OSError) as error:
        problem = error if isinstance(error, MovieqError) else MovieqError(f"{error.filename or kept.parent}: {error.strerror}")
        with suppress(OSError):
            shutil.copyfile(log, kept)
            problem.add_note(f"the log of `movieq up` is in {kept}")
        raise problem from None
