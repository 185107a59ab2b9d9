"""How fast a model renders on a device of this machine, in each way in which it could compute: what `movieq models bench` runs.

Each way loads the model in an engine process as the worker would, and renders two equal tasks: the first also compiles, the second counts.
"""

from __future__ import annotations

import importlib.util
import math
import time
import wave
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from movieq.errors import MovieqError, UnsupportedParameter
from movieq.gpus import Gpu
from movieq.models.speed import LOSSY, TORCHS, Measured, Speed
from movieq.models.table import ATTENTION, Engine, Model
from movieq.tasks.states import GENERATE_IMAGE, PROCESS_AUDIO, Kind, TaskId
from workers.concurrency import beside
from workers.protocol import Done, Run, Step
from workers.supervisor import Child, Progress

STEPS: Final = 8
"""Most steps of a task: enough to tell the ways apart."""
SAME_DB: Final = 20.0
"""Least PSNR of a result against torch's own way, in dB, for it to count as the same but for rounding, which grows with each step."""
GAIN: Final = 0.97
"""Share of the seconds of torch's own way that another one may take at most to be worth it."""
STEP_TIMEOUT_S: Final = 1800.0
"""Longest silence of the engine, in seconds: compiling takes minutes."""
_NEEDS: Final = {"flash": "flash_attn", "_flash_3": "flash_attn_interface", "sage": "sageattention", "xformers": "xformers"}
"""The packages that attention kernels need."""
_TASK: Final = "bench"


class Way(NamedTuple):
    """A way in which a model could compute, as fields of its entry. `exact`: it changes results by rounding alone."""

    name: str
    attention: str = TORCHS
    compile: bool = False
    first_block_cache: float | None = None

    @property
    def exact(self) -> bool:
        return self.attention != LOSSY and self.first_block_cache is None

    def entry(self, model: Model) -> Model:
        """Return the model's entry with this way."""
        return msgspec.structs.replace(model, attention=self.attention, compile=self.compile, first_block_cache=self.first_block_cache)


class Timing(NamedTuple):
    """What was measured of a way. `problem` says why it could not be measured; then the rest is unknown."""

    way: Way
    first_s: float = math.nan
    """The first task, with loading and compiling."""
    task_s: float = math.nan
    step_s: float = math.nan
    psnr: float = math.nan
    """How close the result is to that of torch's own way, in dB; infinite if it is equal."""
    problem: str = ""

    @property
    def pace_s(self) -> float:
        """What ways are compared by: the seconds of a step, else of the task, where that has only one."""
        return self.task_s if math.isnan(self.step_s) else self.step_s


class _Rendered(NamedTuple):
    done: Done
    task_s: float
    step_s: float


def ways(model: Model) -> Iterator[Way]:
    """Yield the ways to measure, torch's own first."""
    yield Way("as torch does")
    for kernel in sorted(ATTENTION - {TORCHS, "_native_math"}):  # the last is a reference, slow on every device
        if kernel not in _NEEDS or importlib.util.find_spec(_NEEDS[kernel]):
            yield Way(f"attention {kernel}", kernel)
    yield Way("compiled", compile=True)
    yield Way("first_block_cache 0.08", first_block_cache=model.first_block_cache or 0.08)


async def measure(name: str, model: Model, gpu: Gpu | None, folder: Path) -> AsyncIterator[Timing | Measured]:
    """Yield the timing of each way, and at the end the fastest of those that leave results as they are.

    `folder` is for files. Raises a MovieqError if the model cannot be rendered in torch's own way.
    """
    if model.engine != Engine.DIFFUSERS or model.languages:
        raise UnsupportedParameter(f"{name} is no model of diffusers for pictures, clips or sound: others compute in one way only")
    request = _request(name, model, folder)
    async with _child(gpu) as child:
        own, *others = ways(model)
        first, reference = await _timed(child, request, own.entry(model))
        plain = Timing(own, first.task_s, reference.task_s, reference.step_s, math.inf)
        yield plain
        timings = [plain]
        for way in others:
            timings.append(await _timing(child, request, model, way, reference.done))
            yield timings[-1]
        attention = fastest([each for each in timings if not each.way.compile], plain)
        compiled = fastest([each for each in timings if each.way.compile], plain)
        if attention.attention != TORCHS and compiled.compile:
            both = Way(f"{attention.name}, compiled", attention.attention, compile=True)
            timings.append(await _timing(child, request, model, both, reference.done))
            yield timings[-1]
    best = fastest(timings, plain)
    metadata = reference.done.metadata
    yield Measured(metadata["device_name"], metadata["versions"], Speed(best.attention, best.compile))


def fastest(timings: list[Timing], plain: Timing) -> Way:
    """Return the fastest way that is worth it and changes results by rounding alone; torch's own, `plain`, if there is none."""
    better = [each for each in timings if each.way.exact and each.psnr >= SAME_DB and each.pace_s <= GAIN * plain.pace_s]
    return min(better, key=lambda each: each.pace_s, default=plain).way


@asynccontextmanager
async def _child(gpu: Gpu | None) -> AsyncIterator[Child]:
    """Run an engine process for the block."""
    child = Child(_TASK, tuple(Kind), gpu, step_timeout_s=STEP_TIMEOUT_S)
    async with beside(child=child.supervise(lambda: None)):
        yield child


async def _timing(child: Child, request: Run, model: Model, way: Way, reference: Done) -> Timing:
    """Return the timing of a way, with its problem if it does not work here."""
    try:
        first, second = await _timed(child, request, way.entry(model))
    except MovieqError as error:
        return Timing(way, problem=str(error))
    return Timing(way, first.task_s, second.task_s, second.step_s, _psnr(_content(second.done), _content(reference)))


async def _timed(child: Child, request: Run, entry: Model) -> tuple[_Rendered, _Rendered]:
    """Render the task twice. Raises a MovieqError if that is not possible."""
    return await _rendered(child, request, entry), await _rendered(child, request, entry)


async def _rendered(child: Child, request: Run, entry: Model) -> _Rendered:
    number = len(list(Path(request.out_dir).iterdir()))
    out = Path(request.out_dir) / str(number)
    out.mkdir()
    steps: list[tuple[float, int]] = []

    def follow(message: Progress) -> None:
        if isinstance(message, Step) and message.stage == "denoise" and message.step:
            steps.append((time.perf_counter(), message.step))

    run = msgspec.structs.replace(request, run=f"{_TASK}{number}", out_dir=str(out), entry=entry)
    group = child.slots.reserve([TaskId(_TASK)])
    begun_s = time.perf_counter()
    try:
        done = await child.run(run, follow, group)
    finally:
        child.slots.leave(group, run.run)
    task_s = time.perf_counter() - begun_s
    if len(steps) < 2:
        return _Rendered(done, task_s, math.nan)
    (first_s, first), (last_s, last) = steps[0], steps[-1]
    return _Rendered(done, task_s, (last_s - first_s) / (last - first))


def _request(name: str, model: Model, folder: Path) -> Run:
    """Return a task that the model can render: one picture, one window of a clip or ten seconds of sound."""
    task_type = GENERATE_IMAGE if GENERATE_IMAGE in model.tasks else next(iter(model.tasks))
    params: dict[str, Any] = {"prompt": "a lighthouse on a cliff in a storm, waves, dusk"}
    if "steps" not in model.ignores:
        params["steps"] = min(model.defaults.steps or STEPS, STEPS)
    inputs = {}
    if task_type == PROCESS_AUDIO:
        params |= {"duration": 10, "output_format": "wav"}
    elif task_type == GENERATE_IMAGE:
        params |= {"format": "png"}
    else:
        limits = model.limits
        params |= {"duration": limits.frames / limits.fps, "fps": limits.fps, "resolution": "1280x720", "captions": False}
    if model.pipeline is None:
        still = folder / "still.png"
        Image.linear_gradient("L").resize((512, 512)).convert("RGB").save(still)
        inputs = {f"upload:{_TASK}": str(still)}
        params["reference_images" if task_type == GENERATE_IMAGE else "storyboard_images"] = list(inputs)
    out = folder / "out"
    out.mkdir()
    return Run(_TASK, _TASK, _TASK, task_type, str(model.engine), name, params, {}, inputs, 1, str(out), model)


def _content(done: Done) -> npt.NDArray[np.uint8] | npt.NDArray[np.int16]:
    """Return the picture of a result, or a picture of its clip, or its samples."""
    file = next((file for file in done.files if file.role == "poster"), done.files[0])
    if file.content_type.startswith("image/"):
        with Image.open(file.path) as image:
            return np.asarray(image.convert("RGB"))
    with wave.open(file.path) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), np.int16)


def _psnr(content: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Return how close two pictures or sounds are, in dB."""
    error = float(np.sqrt(np.mean((content.astype(np.float64) - other.astype(np.float64)) ** 2)))
    return math.inf if not error else 20 * math.log10(np.iinfo(content.dtype).max / error)
