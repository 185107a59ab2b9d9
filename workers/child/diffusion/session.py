"""One run, or batch of runs, on one model: loading it, the arguments of its calls, the calls, and what the result says of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch

from movieq.errors import InternalFault
from movieq.models import choice, speed
from movieq.models.table import Model
from workers.child.diffusion import acceleration, loras, model_cache, prompts
from workers.child.diffusion.adapters import adapter
from workers.child.diffusion.hooks import PipelineHooks
from workers.child.diffusion.loaded import Loaded
from workers.child.diffusion.oom import Fallback
from workers.child.job import Job
from workers.child.media.metadata import result_metadata
from workers.protocol import Stage

T = TypeVar("T")
_STAGE_WEIGHTS: Final = {"load": 4.0, "encode": 0.5, "denoise": 10.0, "decode": 1.5, "sound": 2.0, "mux": 1.0}
"""Relative durations of the stages, until a run of the model was measured."""
_STEP_NAMES: Final = {
    "load": "loading_models",
    "encode": "reading_prompt",
    "decode": "decoding",
    "sound": "synthesizing_sound",
    "mux": "encoding",
}
"""What `current_step` shows during each stage; that of "denoise" depends on the task."""


@contextmanager
def opened(job: Job, entry: Model, step_name: str, *later_stages: str) -> Iterator[Session]:
    """Announce the stages and yield a session on the model, loaded.

    `step_name` is what `current_step` shows while it denoises or speaks.
    """
    loaded = model_cache.is_loaded(job.run.model)
    stages = [*([] if loaded else ["load"]), *adapter(entry).stages, *later_stages]
    weights = _STAGE_WEIGHTS | model_cache.stage_seconds(job.run.model)
    job.plan(*(Stage(each, step_name if each == "denoise" else _STEP_NAMES[each], max(weights[each], 0.001)) for each in stages))
    if not loaded:
        job.begin("load")
    with on_model(job, job.run.model, entry) as session:
        yield session


@contextmanager
def on_model(job: Job, name: str, entry: Model) -> Iterator[Session]:
    """Yield a session on a model, whose stages belong to another one: the sound model of a clip."""
    loaded = model_cache.get(job, name, entry, job.device)
    with Fallback(job, name, loaded) as fallback:
        yield Session(job, name, loaded, fallback)


class Session:
    """A model that a run uses."""

    def __init__(self, job: Job, name: str, loaded: Loaded, fallback: Fallback) -> None:
        self.job = job
        self.name = name
        self.loaded = loaded
        self.entry = loaded.entry
        self.adapter = adapter(loaded.entry)
        self._loras = [*loaded.entry.with_loras, *(choice.loras(job.params) if name == job.run.model else [])]
        self._fallback = fallback
        self._warned: set[str] = set()

    def pipe(self, with_images: bool = False) -> Any:
        """Return the pipeline for tasks with or without images."""
        pipe = self.loaded.image_pipe if with_images else self.loaded.pipe
        if pipe is None:
            raise InternalFault(f"{self.name} has no pipeline {'with' if with_images else 'without'} images")
        return pipe

    def call(
        self,
        arguments: dict[str, Any],
        *,
        with_images: bool = False,
        part: tuple[int, int] = (0, 1),
        job: Job | None = None,
        in_halves: Callable[[], Any] | None = None,
    ) -> Any:
        """Return what the pipeline returns for these arguments, or what `in_halves` returns after running out of memory.

        `part` is the number of this call, and how many calls the run makes; `job` is another job than the session's, such as a batch of it.
        Arguments have movieq's names (`guidance_scale`, `seconds`), which the entry may translate. Raises OutOfMemory after the last step
        of the OOM fallback.
        """
        job, pipe = job or self.job, self.pipe(with_images)
        options = self._options(job, pipe, arguments)
        self._set_flow_shift(pipe, options)
        generators = options["generator"] if isinstance(options["generator"], list) else [options["generator"]]
        states = [each.get_state() for each in generators]

        def call() -> Any:
            loras.use(self.name, self.loaded, self._loras)  # again, if weights that are streamed had to start anew
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            return self._hooked(lambda: pipe(**options, return_dict=False), job, pipe, part, arguments)

        answer = self._fallback.call(call, in_halves)
        self._warn_of_unused(job, pipe, options)
        return answer

    def run(self, work: Callable[[], T], part: tuple[int, int]) -> T:
        """Return what `work` returns, which calls the networks of the pipeline by itself. `part` and errors are as in `call`."""
        return self._fallback.call(lambda: self._hooked(work, self.job, self.pipe(), part, {}))

    def _hooked(self, work: Callable[[], T], job: Job, pipe: Any, part: tuple[int, int], arguments: dict[str, Any]) -> T:
        with PipelineHooks(job, pipe, part, self.loaded, arguments, self._fallback) as hooks:
            answer = work()
        before = self.loaded.stage_seconds if part[0] else {}
        self.loaded.stage_seconds |= {stage: before.get(stage, 0.0) + seconds for stage, seconds in hooks.stage_seconds.items()}
        return answer

    def _options(self, job: Job, pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by the pipeline's own names. Raises InternalFault for one that it does not have."""
        accepted = inspect.signature(pipe.__call__).parameters
        options = {self.entry.names.get(name, name): value for name, value in arguments.items()}
        optional = {"negative_prompt", *(("width", "height") if "image" in options else ())}
        if unknown := sorted(options.keys() - accepted.keys() - optional):
            raise InternalFault(f"{type(pipe).__name__} takes no {', '.join(unknown)}: the entry of {self.name} is wrong")
        if "frame_rate" in accepted:
            options["frame_rate"] = self.entry.limits.fps
        options = {name: value for name, value in options.items() if name in accepted}
        if "output_type" in accepted:
            options.setdefault("output_type", "pt")  # tensors: PIL would cost a core 29 ms a frame while the GPU idles
        return options

    def _set_flow_shift(self, pipe: Any, options: dict[str, Any]) -> None:
        """Shift the noise schedule as the entry says for pictures of this size."""
        shifts = sorted(self.entry.flow_shift)
        if not shifts or "width" not in options:
            return
        pixels = options["width"] * options["height"]
        shift = next((shift for most, shift in shifts if pixels <= most), shifts[-1][1])
        if pipe.scheduler.config.flow_shift != shift:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=shift)

    def _warn_of_unused(self, job: Job, pipe: Any, options: dict[str, Any]) -> None:
        """Name the parameters of the task that changed nothing, once each."""
        params = self.job.params
        unused = {
            name: f"{name} is not used: {self.name} has no use for it" for name in self.entry.ignores if getattr(params, name) is not None
        }
        if params.negative_prompt and "negative_prompt" not in unused:
            if "negative_prompt" not in options:
                unused["negative_prompt"] = f"negative_prompt is not used: {self.name} takes none"
            elif not _is_guided(pipe, options, self.entry.names.get("guidance_scale", "guidance_scale")):
                unused["negative_prompt"] = f"negative_prompt is not used: {self.name} reads it only with a higher guidance_scale"
        for name in unused.keys() - self._warned:
            job.warn(unused[name])
            self._warned.add(name)

    def arguments(self, job: Job) -> dict[str, Any]:
        """Return the call arguments that all tasks have: prompt and generator, and the task's own values before the model's defaults."""
        params = job.params
        own = {
            "num_inference_steps": params.steps,
            "guidance_scale": params.guidance_scale,
            "negative_prompt": params.negative_prompt or None,
        }
        if "steps" in self.entry.ignores:
            own["num_inference_steps"] = None
        for name in self.entry.ignores:
            own.pop(name, None)
        return {
            "prompt": prompts.prompt(params, with_sound=self.entry.sound),
            "generator": generator(job.seed),
            **self.defaults(),
            **{name: value for name, value in own.items() if value is not None},
        }

    def defaults(self) -> dict[str, Any]:
        """Return the model's default call arguments."""
        own = self.entry.defaults
        found = {
            "num_inference_steps": own.steps, "guidance_scale": own.guidance, "negative_prompt": own.negative_prompt, **self.entry.call
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}

    def metadata(self, job: Job, file_format: str, size: tuple[int, int] | None) -> dict[str, Any]:
        """Return the result's metadata: the common fields, and which weights, device and libraries rendered it."""
        entry = self.entry
        found = result_metadata(job, file_format, size)
        found |= {
            "revision": entry.weights.revision if entry.weights else None,
            "licence": entry.licence,
            "device": job.device,
            "device_name": acceleration.device_name(job.device),
            "dtype": "float32" if job.device == "cpu" else str(entry.dtype),
            "batch_size": 1,
            "versions": acceleration.versions(),
        }
        if used := choice.loras(job.params):
            found["loras"] = [{"name": each.name, "weight": each.strength} for each in used]
        lossy = [] if entry.first_block_cache is None else [f"first_block_cache {entry.first_block_cache:g}"]
        lossy += [f"LoRA {each.name}" for each in entry.with_loras]
        if self.loaded.has_8_bits:
            lossy += [f"{each} in 8 bits" for each in entry.fp8]
        if self.loaded.speed.attention != speed.TORCHS:
            found["attention"] = self.loaded.speed.attention
        if self.loaded.speed.attention == speed.LOSSY:
            lossy.append(f"attention {speed.LOSSY}")
        if self.loaded.speed.compile:
            found["compiled"] = True
        if lossy:
            found["lossy"] = lossy
        if steps := self.arguments(job).get("num_inference_steps"):
            found["steps"] = steps
        return found


def _is_guided(pipe: Any, options: dict[str, Any], name: str) -> bool:
    """Whether the last call used its negative prompt: above a guidance of 1, unless the pipeline says of itself whether it did.

    `name` is what the entry calls the guidance. Pipelines that also have a `true_cfg_scale` read the negative prompt by that alone.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    if "true_cfg_scale" in accepted:
        return bool(options.get("true_cfg_scale", accepted["true_cfg_scale"].default) > 1)
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is not None:
        return bool(guided)
    guidance = options.get(name)
    return guidance is None or guidance > 1


def generator(seed: int) -> torch.Generator:
    """Return a generator on the CPU, whatever the device, so that a seed gives the same noise everywhere."""
    return torch.Generator("cpu").manual_seed(seed)
