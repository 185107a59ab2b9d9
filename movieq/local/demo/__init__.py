"""`movieq demo`: a storyboard becomes a clip, a description a picture, a line a voice; a contact sheet shows the three.

Everything runs in a `movieq up` of the demo's own, on a free port, which knows none of your settings; at the end nothing of it is left
but the files.
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

TITLE: Final = "The Keeper’s Light"  # noqa: RUF001  # an apostrophe, as it is set
SCENE: Final = (
    "Night, a headland above the sea. The beam sweeps out over the water and finds a small boat. "
    "In the lantern room the keeper lifts his lamp to the window; a match, and the great light burns again."
)
LINE: Final = "There is a boat out there. Hold on. I am lighting the lamp."

T = TypeVar("T")


class Piece(msgspec.Struct, frozen=True):
    """One of the things that the demo makes."""

    name: str
    task_type: TaskType
    task_data: dict[str, Any]


class Made(msgspec.Struct, frozen=True):
    """A piece, its file, and where it was served."""

    piece: Piece
    path: Path
    result: Result


def pieces(storyboard: list[str]) -> list[Piece]:
    """What is submitted; `storyboard` refers to the uploaded frames."""
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
    """The files and the contact sheet lie in `out`, and what was started has ended. Raises MovieqError that says what failed.

    `data` is the folder of the `movieq up`; None: one of its own, gone afterwards. On failure its log lies in `out` as movieq-up.log.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out} cannot be used: {error.strerror}; name another folder with --out") from None
    here = asyncio.current_task()
    assert here is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.cancel)  # so that all is stopped also then
    with _folder(data) as folder, _logged(folder / "demo.log", out / "movieq-up.log") as log:
        console.print(f"starting movieq {__version__}: a queue, the API and a worker ...", highlight=False)
        async with _up(folder, log) as (url, process):
            key = (folder / "api-key").read_text().strip()
            async with Client(url, key) as client:
                made, missing = await _unless_it_ends(process, _make(client, url, out, console))
                sheet = out / "contact-sheet.png"
                await asyncio.to_thread(_draw, made, missing, sheet)
            console.print("stopping it ...", highlight=False)
    _tell(made, missing, sheet, console)


async def _make(client: Client, url: str, out: Path, console: Console) -> tuple[list[Made], str]:
    """The files lie in `out`. The second value says why there is no voice; it is empty where there is one."""
    uploads = [await client.upload(PROJECT, frame) for frame in FRAMES]
    console.print(f"it runs at {url}; the storyboard is uploaded: {len(uploads)} frames", highlight=False, soft_wrap=True)
    wanted = pieces([upload.url for upload in uploads])
    receipts: list[Receipt] = [
        await client.submit(PROJECT, piece.task_type, piece.task_data, metadata={"scene_id": "12"}) for piece in wanted
    ]
    ends = await follow(client, {receipt.task_id: f"{piece.name:8}" for receipt, piece in zip(receipts, wanted, strict=True)}, console)
    made, missing = [], ""
    for receipt, piece in zip(receipts, wanted, strict=True):
        end = ends[receipt.task_id]
        if piece.task_type is PROCESS_AUDIO and end.error_code == EngineUnavailable.code:
            missing = end.error or end.error_code
        else:
            result = _result(piece, end)
            path = out / f"{piece.name}{_suffix(result)}"
            await client.download(result.media_url, path)
            made.append(Made(piece, path, result))
    return made, missing


def _result(piece: Piece, end: End) -> Result:
    if end.status is not TaskStatus.COMPLETED or end.result is None:
        raise MovieqError(f"the {piece.name} ({piece.task_type}) is {end.status}: {end.error or 'without a word'} ({end.error_code})")
    return end.result


def _suffix(result: Result) -> str:
    return Path(result.media_url.partition("?")[0]).suffix


def _draw(made: list[Made], missing: str, dest: Path) -> None:
    from movieq.local.demo import sheet

    paths = {each.piece.name: each for each in made}
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


def _tell(made: list[Made], missing: str, sheet: Path, console: Console) -> None:
    console.print()
    for each in made:
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
    _line(console, "sheet", sheet, "all of it on one page")
    console.print(
        "\nThe addresses were good while the demo ran; `movieq up` serves such for as long as it runs.", highlight=False, soft_wrap=True
    )


def _line(console: Console, name: str, path: Path, facts: str) -> None:
    console.print(f" [green]✓[/] [bold]{name:8}[/] ", end="", highlight=False)
    console.print(f"{path}  ({facts})", markup=False, highlight=False, soft_wrap=True)


# ── The `movieq up` of the demo ───────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def _up(folder: Path, log: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A `movieq up` for the length of a block: its address and its process. Raises SettingsError where it does not start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment[variable("drain_s")] = "0"  # at the end nothing runs, and who stops the demo early wants it stopped
    environment[variable("cpu_slots")] = str(min(2, os.cpu_count() or 1))
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "movieq.cli", "up", "--port", "0", "--data", str(folder),
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
        reading = asyncio.ensure_future(process.stdout.read())  # a full pipe would stop it
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
    raise SettingsError(f"`movieq up` does not start: {_last_words(log)}")


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
    """What the work returns. Raises Unavailable as soon as the process has ended: no answer can come any more."""
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Unavailable(f"`movieq up` ended by itself with {ending.result()}")
    finally:
        working.cancel()
        ending.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else "it said nothing"


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
    """Where the log goes; it is kept where the block fails."""
    try:
        yield log
    except (MovieqError, OSError) as error:
        problem = error if isinstance(error, MovieqError) else MovieqError(f"{error.filename or kept.parent}: {error.strerror}")
        with suppress(OSError):
            shutil.copyfile(log, kept)
            problem.add_note(f"the log of `movieq up` is in {kept}")
        raise problem from None
