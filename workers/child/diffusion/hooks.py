"""One way to follow and to stop any pipeline: hooks on its parts, and its own progress bar. Nothing here knows a pipeline's class.

A part is known by the name under which the pipeline holds it, as diffusers names them. Before each forward of a part, and of each block in
it, the hook says which stage this is and whether the run is cancelled; so a run stops within a block, also in the middle of a decode. When
the watch ends, its hooks are gone, and so is what caches and offloading hooks of diffusers kept of the call, however it ended: else the
next task would begin with what this one left.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workers.child.diffusion import previews
from workers.child.diffusion.loaded import Loaded
from workers.child.diffusion.prompt_cache import Embeddings
from workers.child.job import Take

STAGES = ("", "encode", "denoise", "decode")
_DENOISERS = ("transformer", "unet", "prior", "decoder_pipe")
_DECODERS = ("vae", "vqvae", "vocoder", "audio_vae")


def stage_of(name: str) -> str:
    """The stage in which a part of this name works: "denoise", "decode", or "encode" for whatever prepares."""
    if name.startswith(_DENOISERS):
        return "denoise"
    return "decode" if name.startswith(_DECODERS) else "encode"


class Watch:
    """Follows the calls of a pipeline inside a block. `seconds` tells afterwards what each stage took."""

    def __init__(
        self, take: Take, pipe: Any, part: tuple[int, int] = (0, 1), loaded: Loaded | None = None, given: Mapping[str, Any] | None = None
    ) -> None:
        """`part`: which call this is, of how many: the stage "encode" is the first's alone, "decode" the last's.

        With the `loaded` model and what the pipeline is `given`, prompts that it knows are not encoded again, and there are previews.
        """
        self.seconds: dict[str, float] = {}
        self._loaded = loaded
        given = given or {}
        self._asked = previews.Call(given.get("width"), given.get("height"), given.get("num_frames"))
        self._shots: list[tuple[Take, previews.Shot]] = []
        self._knew = False
        self._inside = ExitStack()
        self._call, self._calls = part
        self._take = take
        self._pipe = pipe
        self._stage = ""
        self._since_s = 0.0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in parts(self._pipe):
            for role, each in _watched(name, module):
                self._handles.append(each.register_forward_pre_hook(self._hook(role)))
        self._pipe.progress_bar = lambda iterable=None, total=None: _Bar(self, iterable, total)
        if self._loaded is not None and hasattr(self._pipe, "encode_prompt"):
            self._pipe.encode_prompt = self._encoding(self._pipe.encode_prompt, self._loaded.embeddings)
            self._inside.callback(delattr, self._pipe, "encode_prompt")
        scheduler = getattr(self._pipe, "scheduler", None)
        if self._loaded is not None and self._loaded.eye is not None and hasattr(scheduler, "step"):
            self._inside.enter_context(previews.followed(scheduler, self._due, partial(self._see, self._loaded.eye)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave("")
        if self._knew:
            self.seconds.pop("encode", None)  # how long it takes where a prompt is new, the task before has told
        for handle in self._handles:
            handle.remove()
        self._inside.close()
        del self._pipe.progress_bar
        forget(self._pipe)

    def step(self, step: int, steps: int) -> None:
        """A step of the denoising is done."""
        self._enter("denoise")
        self._take.step("denoise", self._call * steps + step, self._calls * steps)

    def _encoding(self, encode: Callable[..., Any], known: Embeddings) -> Callable[..., Any]:
        @functools.wraps(encode)
        def encoded(*args: Any, **given: Any) -> Any:
            self._take.check()
            self._enter("encode")
            answer, self._knew = known.of(encode, args, given)
            return answer

        return encoded

    def _due(self) -> bool:
        """Whether the next step is to be seen. What an earlier one showed has arrived since, and is sent: no GPU waits for a picture."""
        shots, self._shots = self._shots, []
        for take, shot in shots:
            shot.arrived()
            take.preview(partial(previews.drawn, shot.pictures))
        return any(take.preview_due for take in self._take.rows)

    def _see(self, eye: previews.Eye, latents: Tensor) -> None:
        for row, take in enumerate(self._take.rows):
            if take.preview_due and (pictures := eye.look(latents, self._asked, row)) is not None:
                self._shots.append((take, previews.Shot(pictures)))
        if self._shots and not latents.is_cuda:
            self._due()

    def _hook(self, stage: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._take.check()
            self._enter(stage)

        return before

    def _enter(self, stage: str) -> None:
        first, last = self._call == 0, self._call + 1 == self._calls
        if STAGES.index(stage) <= STAGES.index(self._stage) or (stage == "encode" and not first) or (stage == "decode" and not last):
            return  # a stage is only ever left for a later one
        self._leave(stage)
        self._take.begin(stage)

    def _leave(self, stage: str) -> None:
        now_s = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now_s - self._since_s
        self._stage, self._since_s = stage, now_s


class _Bar:
    """What a pipeline takes for its tqdm."""

    def __init__(self, watch: Watch, iterable: Iterable[Any] | None, total: int | None) -> None:
        self._watch = watch
        self._iterable = iterable
        self._total = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else 1  # type: ignore[arg-type]
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for each in self._iterable or ():
            yield each
            self.update()

    def update(self, steps: int = 1) -> None:
        self._done += steps
        self._watch.step(min(self._done, self._total), self._total)

    def set_postfix(self, *_: object, **__: object) -> None:
        pass

    set_description = close = set_postfix


def parts(pipe: Any) -> list[tuple[str, nn.Module]]:
    """The networks of a pipeline by name; a bare model is its own denoiser."""
    if isinstance(pipe, nn.Module):
        return [("transformer", pipe)]
    return [(name, part) for name, part in pipe.components.items() if isinstance(part, nn.Module)]


def _watched(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The part and each of its blocks, with their stage: a decoder encodes too, where a picture is given."""
    stage = stage_of(name)
    if stage != "decode":
        yield stage, module
    for path, each in module.named_modules():
        if stage == "decode":
            role = "encode" if path.partition(".")[0] in ("encoder", "quant_conv") else "decode"
            if path in ("encoder", "decoder") or _block(path):
                yield role, each
        elif _block(path):
            yield stage, each


def _block(path: str) -> bool:
    """Whether a module is one of a list: a layer, a block."""
    return path.rpartition(".")[2].isdigit()


def forget(pipe: Any) -> None:
    """Nothing of the last call is left in a pipeline: neither what offloading hooks hold on the device, nor what a step cache kept."""
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()
    for _, part in parts(pipe):
        if callable(reset := getattr(part, "_reset_stateful_cache", None)):
            reset()
