"""Following and stopping any pipeline, without knowing its class: hooks on its networks, and its own progress bar.

A network is known by its component name in the pipeline, as diffusers names them. Before each forward pass of a network, and of each block
in it, the hook checks for a cancel and reports the stage; so a run stops within a block, also in the middle of a decode. On exit, however
the call ended, the hooks are removed and so is everything that caching and offloading hooks of diffusers stored during the call; else the
next task would start from what this one left.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workers.child.diffusion import previews
from workers.child.diffusion.loaded import Loaded, networks, stage_of
from workers.child.diffusion.oom import Fallback
from workers.child.diffusion.placement import Placement
from workers.child.diffusion.prompt_cache import PromptCache
from workers.child.job import Job

STAGES = ("", "encode", "denoise", "decode")


class PipelineHooks:
    """Report the progress of a pipeline's calls inside a `with` block, and stop it on a cancel.

    `stage_seconds` holds afterwards how long each stage took.
    """

    def __init__(
        self,
        job: Job,
        pipe: Any,
        part: tuple[int, int] = (0, 1),
        loaded: Loaded | None = None,
        arguments: Mapping[str, Any] | None = None,
        fallback: Fallback | None = None,
    ) -> None:
        """`part` is the number of this call and how many calls the run makes.

        Only the first call has the stage "encode", only the last "decode". With the `loaded` model and the call's `arguments`, cached
        prompts are not encoded again, and previews are sent. With a `fallback`, a decode for which memory does not suffice is repeated
        with the same latents.
        """
        self.stage_seconds: dict[str, float] = {}
        self._loaded = loaded
        self._fallback = fallback
        arguments = arguments or {}
        self._size = previews.CallSize(arguments.get("width"), arguments.get("height"), arguments.get("num_frames"))
        self._pending: list[tuple[Job, previews.PendingPreview]] = []
        self._prompt_was_cached = False
        self._patches = ExitStack()
        self._call, self._calls = part
        self._job = job
        self._pipe = pipe
        self._stage = ""
        self._stage_began_s = 0.0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in networks(self._pipe):
            for role, each in _hooked(name, module, self._loaded.compiled if self._loaded else []):
                self._handles.append(each.register_forward_pre_hook(self._hook(role)))
        self._pipe.progress_bar = lambda iterable=None, total=None: _ProgressBar(self, iterable, total)
        if self._loaded is not None and hasattr(self._pipe, "encode_prompt"):
            self._pipe.encode_prompt = self._caching(self._pipe.encode_prompt, self._loaded.prompt_cache)
            self._patches.callback(delattr, self._pipe, "encode_prompt")
        if self._fallback is not None:
            for decoder in _decoders(self._pipe):
                decoder.decode = self._repeating(decoder.decode, self._fallback)
                self._patches.callback(delattr, decoder, "decode")
        scheduler = getattr(self._pipe, "scheduler", None)
        if self._loaded is not None and self._loaded.previewer is not None and hasattr(scheduler, "step"):
            receive = partial(self._decode_previews, self._loaded.previewer)
            self._patches.enter_context(previews.latent_estimates(scheduler, self._send_previews, receive))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_stage("")
        if self._prompt_was_cached:
            self.stage_seconds.pop("encode", None)  # the time of a cache hit says nothing about a new prompt
        for handle in self._handles:
            handle.remove()
        self._patches.close()
        del self._pipe.progress_bar
        reset(self._pipe)
        if error is not None and self._loaded is not None and self._loaded.place is Placement.GROUPS:
            self._loaded.stop_streaming()  # groups that were on their way are where the error left them
            self._loaded.stream_groups(self._job.device)

    def step(self, step: int, steps: int) -> None:
        """Report a finished denoising step."""
        self._begin_stage("denoise")
        self._job.step("denoise", self._call * steps + step, self._calls * steps)

    def _caching(self, encode: Callable[..., Any], cache: PromptCache) -> Callable[..., Any]:
        """Wrap the pipeline's `encode_prompt` with the prompt cache."""

        @functools.wraps(encode)
        def cached_encode(*args: Any, **kwargs: Any) -> Any:
            self._job.check()
            self._begin_stage("encode")
            answer, self._prompt_was_cached = cache.call(encode, args, kwargs)
            return answer

        return cached_encode

    def _repeating(self, decode: Callable[..., Any], fallback: Fallback) -> Callable[..., Any]:
        """Wrap a decoder's `decode` with the OOM fallback."""

        @functools.wraps(decode)
        def repeated(*args: Any, **kwargs: Any) -> Any:
            return fallback.call(lambda: decode(*args, **kwargs), decodes=True)

        return repeated

    def _send_previews(self) -> bool:
        """Send the previews of earlier steps, and return whether the next step is to be previewed.

        They were copied to the host meanwhile, so the GPU never waits for a preview.
        """
        pending, self._pending = self._pending, []
        for job, preview in pending:
            preview.wait()
            job.preview(partial(previews.encode_strip, preview.pictures))
        return any(job.preview_due for job in self._job.jobs)

    def _decode_previews(self, previewer: previews.Previewer, latents: Tensor) -> None:
        """Decode the latents of each job whose preview is due; on a GPU they are sent at the next step, else at once."""
        for row, job in enumerate(self._job.jobs):
            if job.preview_due and (pictures := previewer.decode(latents, self._size, row)) is not None:
                self._pending.append((job, previews.PendingPreview(pictures)))
        if self._pending and not latents.is_cuda:
            self._send_previews()

    def _hook(self, stage: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._job.check()
            self._begin_stage(stage)

        return before

    def _begin_stage(self, stage: str) -> None:
        """Report a stage, unless it has begun already or belongs to another call of the run."""
        first, last = self._call == 0, self._call + 1 == self._calls
        if STAGES.index(stage) <= STAGES.index(self._stage) or (stage == "encode" and not first) or (stage == "decode" and not last):
            return  # stages only advance
        self._end_stage(stage)
        if stage != "denoise" or first:  # the later calls go on with it
            self._job.begin(stage)

    def _end_stage(self, stage: str) -> None:
        now_s = time.perf_counter()
        if self._stage:
            self.stage_seconds[self._stage] = self.stage_seconds.get(self._stage, 0.0) + now_s - self._stage_began_s
        self._stage, self._stage_began_s = stage, now_s


class _ProgressBar:
    """Stands in for the pipeline's tqdm bar and reports each step."""

    def __init__(self, hooks: PipelineHooks, iterable: Iterable[Any] | None, total: int | None) -> None:
        self._hooks = hooks
        self._iterable = iterable
        self._total = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else 1  # type: ignore[arg-type]
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for each in () if self._iterable is None else self._iterable:
            yield each
            self.update()

    def update(self, steps: int = 1) -> None:
        self._done += steps
        self._hooks.step(min(self._done, self._total), self._total)

    def set_postfix(self, *_: object, **__: object) -> None:
        pass

    set_description = close = set_postfix


def _decoders(pipe: Any) -> Iterator[Any]:
    """Yield the networks of a pipeline that have a method `decode`."""
    for name, network in networks(pipe):
        if stage_of(name) == "decode" and callable(getattr(network, "decode", None)):
            yield network


def _hooked(name: str, module: nn.Module, compiled: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the network and each of its blocks, with their stage. A decoder network also encodes, where an image is given.

    Of a compiled block nothing within is yielded: its hooks would become part of the compiled code.
    """
    stage = stage_of(name)
    if stage != "decode":
        yield stage, module
    within = {id(each) for block in compiled for each in block.modules() if each is not block}
    for path, each in module.named_modules():
        if id(each) in within:
            continue
        if stage == "decode":
            role = "encode" if path.partition(".")[0] in ("encoder", "quant_conv") else "decode"
            if path in ("encoder", "decoder") or _block(path):
                yield role, each
        elif _block(path):
            yield stage, each


def _block(path: str) -> bool:
    """Whether a module is an item of a list, as layers and blocks are."""
    return path.rpartition(".")[2].isdigit()


def reset(pipe: Any) -> None:
    """Remove what the last call left in a pipeline: networks that offloading hooks left on the device, and the state of a step cache."""
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()
    for _, network in networks(pipe):
        if callable(reset_cache := getattr(network, "_reset_stateful_cache", None)):
            reset_cache()
