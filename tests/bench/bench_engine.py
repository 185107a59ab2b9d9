"""What serving costs beside a bare pipeline, on the CPU with tiny weights: `python -m tests.bench.bench_engine`.

The same calls in turn, bare in this process and served by a child: the same class, weights, steps, size and threads. Then served with
previews and without them, in turn, and what a preview of large latents takes by itself; the lag of the worker's event loop while the child
works, how soon a cancel takes effect in each stage, how long another LoRA takes, how soon after its last step the first picture of a clip
is encoded, how soon a killed child is back, and the child's memory after twenty and after two hundred tasks. Prints a table and, as its
last line, one JSON object.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil
import torch
from PIL import Image

from movieq.models.table import Model
from movieq.tasks.states import Kind
from tests.arrange import ran
from tests.bench.report import percentile, report
from tests.engines import tiny
from workers.child.diffusion import loading, previews
from workers.child.diffusion.previews import CallSize, ColourMap, Previewer
from workers.child.media import encode
from workers.child.media.encode import Tags
from workers.protocol import Run, Step
from workers.supervisor import Child, Progress

CALLS: Final = 30
STEPS: Final = 20
SIDE: Final = 64
TASKS: Final = 20, 200
PREVIEW_CALLS: Final = 15
PREVIEW_STEPS: Final = 100
"""Two seconds or three, so that there are some."""


class Bench:
    """A child, a bare pipeline, and runs for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        torch.manual_seed(0)
        tiny.sd(folder / "model")
        fields = {
            "engine": "diffusers", "kind": "cpu_intensive", "tasks": {"generate_image": 1.0},
            "pipeline": "StableDiffusionPipeline",
            "weights": {"repository": str(folder / "model")},
            "defaults": {"steps": STEPS}, "limits": {"sides": 8, "pixels": [1, SIDE * SIDE]},
        }  # fmt: skip
        loras = {name: {"bases": ["tiny"], "weights": tiny.lora(folder / "model" / "unet", folder / name)} for name in ("one", "two")}
        self.entry = msgspec.convert({**fields, "loras": loras}, Model)
        tiny.ltx(folder / "clips")
        clips = {
            "kind": "cpu_intensive", "tasks": {"generate_video": 1.0}, "pipeline": "LTXPipeline",
            "weights": {"repository": str(folder / "clips")}, "defaults": {"steps": 4},
            "limits": {"sides": 32, "pixels": [1, 4096], "frame_step": 8, "frame_first": 1, "frames": 17, "fps": 12},
        }  # fmt: skip
        self.clips = msgspec.convert({"engine": "diffusers", **clips}, Model)
        self.child = Child("cpu0", (Kind.CPU_INTENSIVE,), step_timeout_s=120)
        self.ready = asyncio.Event()
        self._count = 0

    def run(self, **given: Any) -> Run:
        """A picture of `SIDE` x `SIDE`."""
        self._count += 1
        out = self._folder / f"out{self._count}"
        out.mkdir()
        params = {"prompt": "a lighthouse in a storm", "resolution": f"{SIDE}x{SIDE}", **given}
        return Run(f"run{self._count}", "task", "bench", "generate_image", "diffusers", "tiny", params, {}, {}, 1, str(out), self.entry)

    async def served(self, **given: Any) -> float:
        """Seconds from the order to the file."""
        begun = time.perf_counter()
        await ran(self.child, self.run(**given))
        return time.perf_counter() - begun

    async def lora_switch(self, name: str) -> float:
        """Seconds that a task takes longer if it has another LoRA than the one before."""
        first = await self.served(loras=[{"name": name}])
        return first - await self.served(loras=[{"name": name}])

    async def first_frame(self) -> float:
        """Seconds from the last step of a clip until its first picture is encoded."""
        run = msgspec.structs.replace(self.run(), task_type="generate_video", model="clips", entry=self.clips)
        run = msgspec.structs.replace(run, params={"prompt": "a storm", "resolution": "64x64", "duration": 1, "fps": 12})
        times: dict[str, float] = {}

        def hear(message: Progress) -> None:
            if isinstance(message, Step) and message.stage == "denoise":
                times["denoised"] = time.perf_counter()
            if isinstance(message, Step) and message.stage == "mux" and message.step:
                times.setdefault("encoded", time.perf_counter())

        await ran(self.child, run, hear)
        return times["encoded"] - times["denoised"]

    async def worked(self, preview: bool) -> float:
        """Seconds of the processor that the child spends on a picture of many steps."""
        process = psutil.Process(self.child.pid)
        before = process.cpu_times()
        await self.served(steps=PREVIEW_STEPS, preview=preview)
        after = process.cpu_times()
        return after.user + after.system - before.user - before.system

    def bare(self, pipe: Any) -> float:
        """Seconds of the same call and the same file, without anything of ours around it."""
        begun = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(1)
        call = pipe(prompt="a lighthouse in a storm.", width=SIDE, height=SIDE, num_inference_steps=STEPS, generator=generator)
        picture: Image.Image = call.images[0]
        tags = Tags(title="Image", prompt="", seed=1, engine="", model="", version="", task="")
        encode.write_image(self._folder / "bare.jpg", picture, "jpeg", tags)  # type: ignore[arg-type]
        return time.perf_counter() - begun

    async def cancelled(self, stage: str) -> float:
        """Seconds from the cancel, said as soon as a stage is heard of, until the child is free."""
        entered = asyncio.Event()

        def hear(message: Progress) -> None:
            if isinstance(message, Step) and message.stage == stage:
                entered.set()

        running = asyncio.create_task(ran(self.child, self.run(steps=100), hear))
        await entered.wait()
        begun = time.perf_counter()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return time.perf_counter() - begun


def preview_seconds(shape: tuple[int, ...]) -> float:
    """Of the processor for one preview, from the estimate to the JPEG: of a picture of 1024 px, or a clip of 257 frames of 1280 by 768."""
    previewer = Previewer(ColourMap(8, 8, torch.randn(shape[1] + 1, 3).div(shape[1]).tolist()))
    latents = torch.randn(shape)
    begun = time.process_time()
    pictures = previewer.decode(latents, CallSize())
    assert pictures is not None
    previews.encode_strip(pictures)
    return time.process_time() - begun


async def lag(over: asyncio.Event) -> list[float]:
    """By how many milliseconds the loop came late, again and again."""
    found = []
    while not over.is_set():
        begun = time.perf_counter()
        await asyncio.sleep(0.005)
        found.append((time.perf_counter() - begun - 0.005) * 1000)
    return found


async def measure(folder: Path) -> None:
    bench = Bench(folder)
    keeping = asyncio.create_task(bench.child.supervise(bench.ready.set))
    await bench.ready.wait()
    pipe = loading.library_class("StableDiffusionPipeline").from_pretrained(folder / "model", dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    pairs = [(bench.bare(pipe), await bench.served()) for _ in range(CALLS + 3)][3:]
    bare, served = (statistics.median(each) for each in zip(*pairs, strict=True))
    # of each pair by itself: the machine's speed drifts
    ratio = statistics.median(there / here for here, there in pairs)
    overhead = statistics.median(there - here for here, there in pairs)

    pairs = [(await bench.worked(preview=False), await bench.worked(preview=True)) for _ in range(PREVIEW_CALLS)]
    plain, shown = (sum(each) for each in zip(*pairs, strict=True))
    preview = [preview_seconds(shape) for shape in ((1, 16, 128, 128), (1, 128, 33, 24, 40)) for _ in range(CALLS)]

    over = asyncio.Event()
    lagging = asyncio.create_task(lag(over))
    for _ in range(10):
        await bench.served()
    over.set()
    lags = await lagging

    cancels = {stage: [await bench.cancelled(stage) for _ in range(10)] for stage in ("encode", "denoise", "decode")}

    switches = [await bench.lora_switch(name) for _ in range(5) for name in ("one", "two")]
    frames = [await bench.first_frame() for _ in range(10)][1:]

    memory = []
    for count in range(TASKS[1]):
        await bench.served(steps=2)
        if count + 1 in TASKS:
            memory.append(bench.child.memory_bytes())

    bench.ready.clear()
    begun = time.perf_counter()
    bench.child.kill()
    await bench.ready.wait()
    back = time.perf_counter() - begun
    first = await bench.served()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    report(
        "engine",
        {
            "bare_s": bare,
            "served_s": served,
            "served_to_bare": ratio,
            "served_to_bare_aim": 1.02,
            "overhead_ms": overhead * 1000,
            "overhead_ms_aim": 50.0,
            "with_previews_to_without": shown / plain,
            "preview_ms": statistics.median(preview) * 1000,
            "preview_share_at_two_a_second": statistics.median(preview) * 2,
            "preview_share_at_two_a_second_aim": 0.01,
            "loop_lag_p99_ms": percentile(lags, 0.99),
            "loop_lag_p99_ms_aim": 15.0,
            **{f"cancel_in_{stage}_p50_ms": statistics.median(each) * 1000 for stage, each in cancels.items()},
            **{f"cancel_in_{stage}_most_ms": max(each) * 1000 for stage, each in cancels.items()},
            "lora_switch_ms": statistics.median(switches) * 1000,
            "last_step_to_first_frame_ms": statistics.median(frames) * 1000,
            "respawn_s": back,
            "first_task_of_a_new_child_s": first,
            "memory_after_20_mb": memory[0] / 1e6,
            "memory_after_200_to_20": memory[1] / memory[0],
            "memory_after_200_to_20_aim": 1.05,
        },
        {"threads": torch.get_num_threads(), "torch": str(torch.__version__)},
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder)))
