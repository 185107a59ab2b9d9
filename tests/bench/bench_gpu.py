"""What serving costs on a GPU, what batches and compiling bring, how long a model takes to come: models of real size, of random weights.

And what the engine does where memory is short or a run is disturbed: weights in 8 bits and streamed, another LoRA, takes, two models in
turn, a cancel, an injected lack of memory.

SDXL's and FLUX.1's sizes for pictures, LTX-Video's for a clip. Weights are random, so what comes out is noise; the arithmetic is the same.
`--tiny` walks the same way with models that a CPU can run, and measures nothing worth keeping: a test holds that it does not rot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from movieq import gpus
from movieq.models.table import Model
from movieq.tasks.states import Kind
from tests.arrange import ran
from tests.bench.report import report
from tests.engines import tiny
from workers import model_bench
from workers.child import takes
from workers.child.diffusion import engine as diffusion
from workers.child.diffusion import eviction, model_cache
from workers.child.diffusion.eviction import Budget
from workers.child.diffusion.placement import Placement
from workers.child.job import Flag, Job, JobCancelled
from workers.protocol import FromChild, Run, Step
from workers.supervisor import Child

PROMPT = "a lighthouse in a storm"
ROWS = (1, 2, 4, 8, 16)
DTYPE = torch.bfloat16


class Size(NamedTuple):
    """A model to measure: how it is built, the entry's fields, and the sizes of its pictures."""

    build: Callable[[Path], None]
    fields: dict[str, Any]
    sides: tuple[int, ...]


def sdxl(path: Path) -> None:
    """Of the sizes in stable-diffusion-xl-base-1.0's configs."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer, _ = tiny.clip_tokenizer()
    words = {"vocab_size": 49408, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 1}
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, scaling_factor=0.13025, force_upcast=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768, **words
            )
        ),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, **words
            )
        ),
        tokenizer=tokenizer,
        tokenizer_2=tiny.clip_tokenizer()[0],
        unet=UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"),
    ).save_pretrained(path)  # fmt: skip


def flux(path: Path) -> None:
    """Of FLUX.1-schnell's: 19 double and 38 single blocks, T5-XXL."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer, _ = tiny.clip_tokenizer()
    t5, _ = tiny.t5_tokenizer()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
                eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=1,
            )
        ),
        tokenizer=tokenizer,
        text_encoder_2=t5_xxl(),
        tokenizer_2=t5,
        vae=AutoencoderKL(
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
            scaling_factor=0.3611, shift_factor=0.1159, force_upcast=False,
        ),
        transformer=FluxTransformer2DModel(),
    ).save_pretrained(path)  # fmt: skip


def ltx(path: Path) -> None:
    """Of LTX-Video's 2B."""
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=AutoencoderKLLTXVideo(),
        text_encoder=t5_xxl(),
        tokenizer=tiny.t5_tokenizer()[0],
        transformer=LTXVideoTransformer3DModel(),
    ).save_pretrained(path)


def t5_xxl() -> Any:
    """The text encoder of both, most of what they weigh beside the transformer."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    )


FULL = {
    "sdxl": Size(sdxl, {"pipeline": "StableDiffusionXLPipeline", "defaults": {"steps": 4, "guidance": 0.0}}, (512, 1024)),
    "flux": Size(flux, {"pipeline": "FluxPipeline", "defaults": {"steps": 4, "guidance": 0.0}}, (512, 1024)),
}
TINY = {
    "sdxl": Size(tiny.sd, {"pipeline": "StableDiffusionPipeline", "defaults": {"steps": 2}}, (32,)),
    "flux": Size(tiny.flux, {"pipeline": "FluxPipeline", "defaults": {"steps": 2}}, (32,)),
}
CLIPS = {
    False: Size(ltx, {"pipeline": "LTXPipeline", "defaults": {"steps": 30, "guidance": 3.0}}, (768, 512, 121)),
    True: Size(tiny.ltx, {"pipeline": "LTXPipeline", "defaults": {"steps": 2}}, (64, 64, 9)),
}


class Bench:
    """A model on a device, called bare and through the engine."""

    def __init__(self, folder: Path, name: str, size: Size, device: str, calls: int) -> None:
        self.folder, self.name, self.size, self.device, self.calls = folder, name, size, device, calls
        self._count = 0
        built_on = torch.device(device)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if device == "cpu" else DTYPE)
        with built_on:  # a model of ten billion weights is not initialised by a CPU in any time worth waiting for
            size.build(folder / name)
        torch.set_default_dtype(before)
        limits = {"sides": 16, "pixels": [1, 4_000_000], "batch": [[4_000_000, 16]]}
        fields = {
            "engine": "diffusers", "kind": "gpu_heavy", "tasks": {"generate_image": 1.0}, "dtype": "bfloat16",
            "weights": {"repository": str(folder / name)}, "limits": limits, **size.fields,
        }  # fmt: skip
        self.entry = msgspec.convert(fields, Model)

    def run(self, side: int) -> Run:
        """A picture."""
        self._count += 1
        out = self.folder / f"{self.name}-out{self._count}"
        out.mkdir()
        params = {"prompt": PROMPT, "resolution": f"{max(side, 64)}x{max(side, 64)}", "format": "jpeg"}
        run = f"{self.name}{self._count}"
        return Run(run, "task", "bench", "generate_image", "diffusers", self.name, params, {}, {}, self._count, str(out), self.entry)

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of so many calls, after one that warms up."""
        found = []
        for _ in range(self.calls + 1):
            self._wait()
            begun = time.perf_counter()
            work()
            self._wait()
            found.append(time.perf_counter() - begun)
        return statistics.median(found[1:])

    def bare(self, pipe: Any, side: int) -> None:
        """A plain loop's call, with the picture on the host."""
        steps, guidance = self.entry.defaults.steps, self.entry.defaults.guidance
        options = {"guidance_scale": guidance} if guidance is not None else {}
        pipe(prompt=PROMPT, width=side, height=side, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(1), **options)

    def batch(self, side: int, rows: int) -> None:
        """So many pictures in one call."""
        jobs = [Job(self.run(side), lambda message: None, Flag(), self.device) for _ in range(rows)]
        parts = diffusion.render_batch(jobs) if rows > 1 else [diffusion.render(jobs[0])]
        failed = [part for part in parts if isinstance(part, Exception)]
        if failed:
            raise failed[0]

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def pictures(bench: Bench) -> dict[str, Any]:
    """Of one model: bare, in batches, compiled, and how it comes from disk and from the host's memory."""
    found: dict[str, Any] = {}

    def anew() -> None:
        model_cache.evict_others("")
        bench.batch(bench.size.sides[0], 1)

    load = bench.seconds(anew)
    warm = bench.seconds(lambda: bench.batch(bench.size.sides[0], 1))
    found["from_disk_s"] = load - warm
    job = Job(bench.run(64), lambda message: None, Flag(), bench.device)
    pipe = model_cache.get(job, bench.name, bench.entry, bench.device).pipe
    found["from_host_s"] = bench.seconds(lambda: (pipe.to("cpu"), pipe.to(bench.device)))
    for side in bench.size.sides:
        bare = bench.seconds(lambda side=side: bench.bare(pipe, side))  # type: ignore[misc]
        found[f"bare_{side}_s"] = bare
        alone = None
        for rows in ROWS:
            try:
                each = bench.seconds(lambda side=side, rows=rows: bench.batch(side, rows)) / rows  # type: ignore[misc]
            except Exception as error:  # of its memory, most likely: the others are worth having
                found[f"batch_{rows}_{side}"] = str(error)[:100]
                break
            alone = alone or each
            found[f"batch_{rows}_{side}_s"] = each
            found[f"batch_{rows}_{side}_gain"] = alone / each
    return found


def in_each_way(bench: Bench) -> dict[str, Any]:
    """Of one model: a picture with each attention kernel, and with compiled blocks."""
    found: dict[str, Any] = {}
    own, side = bench.entry, bench.size.sides[-1]
    for way in model_bench.ways(own):
        bench.entry = way.entry(own)
        name = way.name.replace(" ", "_")
        try:
            begun = time.perf_counter()
            bench.batch(side, 1)
            found[f"{name}_first_s"] = time.perf_counter() - begun
            found[f"{name}_s"] = bench.seconds(lambda: bench.batch(side, 1))
        except Exception as error:  # many kernels work on some devices alone
            found[name] = str(error)[:100]
        model_cache.clear()
    bench.entry = own
    return found


def short_of_memory(bench: Bench) -> dict[str, Any]:
    """Of one model: a picture with its weights in each place."""
    found: dict[str, Any] = {}
    network = "unet" if (bench.folder / bench.name / "unet").exists() else "transformer"
    bench.entry = msgspec.structs.replace(bench.entry, fp8=[network])
    side, budget = bench.size.sides[-1], eviction.budget
    for place in Placement:
        model_cache.clear()
        job = Job(bench.run(64), lambda message: None, Flag(), bench.device)
        with contextlib.ExitStack() as undo:
            if place is not Placement.WHOLE:
                needs = model_cache.get(job, bench.name, bench.entry, bench.device).needs
                model_cache.clear()
                room = Budget(needs.of(place), needs.weights)
                eviction.budget = lambda device, copies_bytes, room=room: room  # type: ignore[misc]
                undo.callback(setattr, eviction, "budget", budget)
            found[f"{place}_s"] = bench.seconds(lambda: bench.batch(side, 1))
            loaded = model_cache.find(bench.name)
            assert loaded is not None
            found[f"{place}_device_gb"] = loaded.device_bytes / 1e9
    model_cache.clear()
    return found


def disturbed(bench: Bench) -> dict[str, Any]:
    """Of one model: another LoRA, four takes against four tasks, a cancel, and a lack of memory in a step."""
    found: dict[str, Any] = {}
    side = bench.size.sides[-1]
    network = "unet" if (bench.folder / bench.name / "unet").exists() else "transformer"
    files = {name: tiny.lora(bench.folder / bench.name / network, bench.folder / name, seed) for seed, name in enumerate(("one", "two"))}
    loras = {name: {"bases": [bench.name], "weights": weights} for name, weights in files.items()}
    bench.entry = msgspec.convert({**msgspec.to_builtins(bench.entry), "fp8": [], "loras": loras}, Model)

    def rendered(**given: Any) -> float:
        run = bench.run(side)
        job = Job(msgspec.structs.replace(run, params={**run.params, **given}), lambda message: None, Flag(), bench.device)
        begun = time.perf_counter()
        if job.params.takes > 1:
            takes.render(job, lambda function: getattr(diffusion, function))
        else:
            diffusion.render(job)
        return time.perf_counter() - begun

    rendered()
    plain = statistics.median(rendered() for _ in range(bench.calls))
    switched = [rendered(loras=[{"name": name}]) - rendered(loras=[{"name": name}]) for _ in range(bench.calls) for name in files]
    found["lora_switch_s"] = statistics.median(switched)
    found["lora_to_without"] = statistics.median(rendered(loras=[{"name": "two"}]) for _ in range(bench.calls)) / plain
    rendered()
    found["four_takes_to_four_tasks"] = rendered(takes=4) / (4 * plain)

    cancels = []
    for _ in range(bench.calls):
        flag, cancelled_s = Flag(), 0.0

        def cancel(message: FromChild, flag: Flag = flag) -> None:
            nonlocal cancelled_s
            if isinstance(message, Step) and message.stage == "denoise" and not flag.is_set():
                cancelled_s = time.perf_counter()
                flag.set()

        with contextlib.suppress(JobCancelled):
            diffusion.render(Job(bench.run(side), cancel, flag, bench.device))
        cancels.append(time.perf_counter() - cancelled_s)
    found["cancel_ms"] = statistics.median(cancels) * 1000

    loaded = model_cache.find(bench.name)
    assert loaded is not None
    denoiser = getattr(loaded.pipe, network)
    faults = iter([torch.OutOfMemoryError("CUDA out of memory (injected)")])
    handle = denoiser.register_forward_pre_hook(lambda *_: _raise(next(faults, None)))
    try:
        found["out_of_memory_s"] = rendered()
    finally:
        handle.remove()
    found["after_out_of_memory_to_before"] = statistics.median([rendered() for _ in range(bench.calls + 1)][1:]) / plain
    return found


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def in_turn(first: Bench, second: Bench) -> dict[str, Any]:
    """Two models of which the device holds one at a time: seconds for the other one to come from host memory."""
    model_cache.clear()
    budget, side = eviction.budget, 64
    for bench in (first, second):
        bench.batch(side, 1)
    held = [model_cache.find(bench.name) for bench in (first, second)]
    alone = [statistics.median(_timed(lambda bench=bench: bench.batch(side, 1)) for _ in range(3)) for bench in (first, second)]  # type: ignore[misc]
    room = Budget(max(each.required_bytes for each in held if each), sum(each.copy_bytes for each in held if each))
    eviction.budget = lambda device, copies_bytes: room
    try:
        turns = [_timed(lambda bench=bench: bench.batch(side, 1)) for _ in range(4) for bench in (first, second)]  # type: ignore[misc]
    finally:
        eviction.budget = budget
    loads = model_cache.swaps().loads
    model_cache.clear()
    return {"turn_s": statistics.median(turns[4:]), "alone_s": statistics.mean(alone), "loads": loads}


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


async def served(bench: Bench) -> dict[str, Any]:
    """Through a child, a picture after another and the next waiting: how that compares to a plain loop in this process."""
    job = Job(bench.run(64), lambda message: None, Flag(), bench.device)
    pipe = model_cache.get(job, bench.name, bench.entry, bench.device).pipe
    side = bench.size.sides[-1]
    bare = bench.seconds(lambda: bench.bare(pipe, max(side, 64)))
    model_cache.evict_others("")
    gpu = None if bench.device == "cpu" else gpus.devices("auto")[0]
    child = Child("gpu0", (Kind.GPU_HEAVY,), gpu, step_timeout_s=600)
    ready = asyncio.Event()
    keeping = asyncio.create_task(child.supervise(ready.set))
    await ready.wait()
    await ran(child, bench.run(side))  # loads it
    begun = time.perf_counter()
    await asyncio.gather(*(ran(child, bench.run(side)) for _ in range(bench.calls * 4)))
    each = (time.perf_counter() - begun) / (bench.calls * 4)
    idle = statistics.median(child.idle_s) if child.idle_s else None
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    return {"loop_s": bare, "served_s": each, "loop_to_served": bare / each, "loop_to_served_aim": 0.99, "idle_gap_ms": (idle or 0) * 1000}


def clip(folder: Path, size: Size, device: str) -> dict[str, Any]:
    """A clip by a bare pipeline."""
    bench = Bench(folder, "ltx", size, device, 1)
    width, height, frames = size.sides
    job = Job(bench.run(64), lambda message: None, Flag(), device)
    pipe = model_cache.get(job, "ltx", bench.entry, device).pipe
    options = {"prompt": PROMPT, "width": width, "height": height, "num_frames": frames, "num_inference_steps": bench.entry.defaults.steps}
    return {"clip_s": bench.seconds(lambda: pipe(**options, generator=torch.Generator("cpu").manual_seed(1)))}


def measure(folder: Path, *, small: bool) -> dict[str, Any]:
    """Everything, model by model: two of them do not fit into the memory of a card beside each other."""
    device, calls = ("cpu", 1) if small else ("cuda", 5)
    if small:  # a CPU has no other memory to which weights could move
        eviction.budget = lambda device, copies_bytes: Budget(2**40, 2**40)
    found: dict[str, Any] = {}
    benches = []
    for name, size in (TINY if small else FULL).items():
        bench = Bench(folder, name, size, device, calls)
        benches.append(bench)
        for part in (pictures(bench), asyncio.run(served(bench)), in_each_way(bench), short_of_memory(bench), disturbed(bench)):
            found |= {f"{name}_{key}": value for key, value in part.items()}
        model_cache.clear()
    for key, value in in_turn(*benches).items():
        found[f"in_turn_{key}"] = value
    for key, value in clip(folder, CLIPS[small], device).items():
        found[f"ltx_{key}"] = value
    model_cache.evict_others("")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="walk through it with tiny models on the CPU")
    small: bool = parser.parse_args().tiny
    if not small and not torch.cuda.is_available():
        parser.exit(78, "there is no GPU here: `--tiny` walks through it without one\n")
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(Path(temporary), small=small)
    card = "cpu" if small else torch.cuda.get_device_name(0)
    report("gpu", results, {"device": card, "torch": str(torch.__version__)})
