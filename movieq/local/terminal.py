"""Progress of tasks in a terminal: one live bar per task; without a terminal, one line per change."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Final

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from movieq.client import Client
from movieq.errors import MovieqError, Unavailable
from movieq.streams.sse import pair
from movieq.tasks.entities import ProcessingProgress
from movieq.tasks.results import Result
from movieq.tasks.states import TaskStatus
from movieq.tasks.wire import Snapshot

LINE_SHARE: Final = 0.25
"""Share of progress after which a task gets a new line when the output is not a terminal."""
BAR_CELLS: Final = 30
AWAY: Final = "the server is unavailable, trying again"

_MARKS: Final = {TaskStatus.COMPLETED: "[green]✓[/]", TaskStatus.FAILED: "[red]✗[/]", TaskStatus.CANCELLED: "[yellow]■[/]"}


class End(msgspec.Struct, frozen=True):
    """The end of a task."""

    status: TaskStatus
    result: Result | None
    error: str | None
    error_code: str | None


async def follow(client: Client, tasks: Mapping[str, str], console: Console) -> dict[str, End]:
    """Show the tasks, given as id -> name, until all have ended; return their ends. Raises the first MovieqError of following one."""
    board = _Bars(tasks, console) if console.is_terminal else _Lines(tasks, console)
    try:
        with board:
            async with asyncio.TaskGroup() as group:
                following = {task_id: group.create_task(_follow(client, task_id, board)) for task_id in tasks}
    except* MovieqError as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        problem = first
    else:
        return {task_id: task.result() for task_id, task in following.items()}
    raise problem from None


async def _follow(client: Client, task_id: str, board: _Bars | _Lines) -> End:
    end: End | None = None
    told_up_to = (0, 0)
    async with aclosing(client.events(task_id, on_fault=lambda _: board.wait(task_id))) as events:
        async for event in events:
            if not isinstance(event.data, ProcessingProgress | Snapshot):
                continue
            if isinstance(event.data, Snapshot) and event.data.last_event_id is not None:
                told_up_to = pair(event.data.last_event_id)
            if event.id is None or pair(event.id) > told_up_to:  # older events follow the snapshot, which has shown more
                board.show(task_id, event.data)
            ended = event.data.status.ended
            end = End(event.data.status, event.data.result, event.data.error, event.data.error_code) if ended else None
    if end is None:  # the stream was exhausted
        state = await client.status(task_id)
        if not state.status.ended:
            raise Unavailable(f"the stream of task {task_id} ended, but the task has not: try again")
        end = End(state.status, state.result, state.error, state.error_code)
    return end


class _Bars:
    """A live bar for each task."""

    def __init__(self, tasks: Mapping[str, str], console: Console) -> None:
        self._progress = Progress(
            TextColumn(" {task.fields[mark]} [bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(BAR_CELLS, style="grey23", complete_style="yellow3", finished_style="green"),
            TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[step]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            TextColumn("[dim]{task.fields[left]}", table_column=Column(no_wrap=True, justify="right", min_width=10)),
            console=console,
            expand=True,
            refresh_per_second=10,
        )
        self._rows: dict[str, TaskID] = {
            task_id: self._progress.add_task(escape(name), total=1.0, mark=" ", step="", left="") for task_id, name in tasks.items()
        }

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, task_id: str, state: ProcessingProgress | Snapshot) -> None:
        """Set the bar to the task's state."""
        self._progress.update(
            self._rows[task_id],
            completed=state.progress,
            mark=_MARKS.get(state.status, " "),
            step=escape(_step(state)),
            left=_left(state),
            refresh=state.status.ended,
        )

    def wait(self, task_id: str) -> None:
        """Show on the bar that the server is unavailable."""
        self._progress.update(self._rows[task_id], step=f"[yellow]{AWAY}", left="")


class _Lines:
    """A line when a task enters another step, passes another quarter of its progress, or ends."""

    def __init__(self, tasks: Mapping[str, str], console: Console) -> None:
        self._console = console
        self._names = tasks
        self._width = max(map(len, tasks.values()))
        self._shown: dict[str, tuple[object, ...]] = {}

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, task_id: str, state: ProcessingProgress | Snapshot) -> None:
        """Print a line if something has changed."""
        shown = (state.status, state.attempt, state.current_step, int(state.progress / LINE_SHARE))
        if self._shown.get(task_id) == shown:
            return
        self._shown[task_id] = shown
        line = f"{self._names[task_id]:{self._width}}  {state.progress:4.0%}  {_step(state)}"
        left = _left(state)
        self._console.print(f"{line}, {left}" if left else line, markup=False, highlight=False, soft_wrap=True)

    def wait(self, task_id: str) -> None:
        """Print, once, that the server is unavailable."""
        if self._shown.get(task_id) != (AWAY,):
            self._shown[task_id] = (AWAY,)
            self._console.print(f"{self._names[task_id]:{self._width}}        {AWAY}", markup=False, highlight=False, soft_wrap=True)


def _step(state: ProcessingProgress | Snapshot) -> str:
    match state.status:
        case TaskStatus.COMPLETED | TaskStatus.CANCELLED:
            return str(state.status)
        case TaskStatus.FAILED:
            return f"failed: {state.error_code}"
        case TaskStatus.QUEUED if isinstance(state, ProcessingProgress) and state.error:
            return f"waiting for another try: {state.error}"
        case TaskStatus.QUEUED:
            place = state.queue_position if isinstance(state, Snapshot) else None
            return "waiting in queue" + (f", position {place}" if place else "")
    words = state.current_step.replace("_", " ")
    if isinstance(state, ProcessingProgress) and state.stage and state.step is not None and state.steps and state.steps > 1:
        words += f" · {state.stage.replace('_', ' ')} {state.step}/{state.steps}"
    return words + (f" · attempt {state.attempt}" if state.attempt > 1 else "")


def _left(state: ProcessingProgress | Snapshot) -> str:
    """Return the estimated remaining time of a running task; empty otherwise."""
    if state.status is not TaskStatus.PROCESSING or state.estimated_remaining is None:
        return ""
    return f"{clock(state.estimated_remaining)} left"


def clock(seconds: float) -> str:
    """Return seconds in a readable form: 8 s, 1:20, 2:05:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
