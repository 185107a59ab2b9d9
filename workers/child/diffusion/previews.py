"""What a picture will be like, seen half way: the scheduler's own estimate of the finished latents, and an eye that reads colours off them.

One way for all classes of pipelines. Each step of the scheduler tells where the latents are going; packed ones are laid out again by the
size of the call; a linear map, fitted once to what the model's own VAE decodes, makes colours of them, or a tiny autoencoder where the
table names one (`preview_vae`). What cannot be read shows nothing, and harms nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgspec
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from workers.child.media import encode

PICTURES: Final = 16
"""That a map is fitted to."""
CELLS: Final = 16
"""Of latents along a side of such a picture, where that makes no more than `SIDE` pixels."""
SIDE: Final = 256
FRAMES: Final = 4
"""Of a clip that stand beside each other in its preview."""
FRAME_SIDE: Final = 160
TINY_CELLS: Final = 32
"""Of latents along the longer side that a tiny autoencoder decodes: a preview is small."""


class Call(NamedTuple):
    """What a pipeline was asked for: what packed latents do not say themselves."""

    width: int | None = None
    height: int | None = None
    frames: int | None = None


class Learnt(msgspec.Struct, frozen=True):
    """What is kept of a VAE: pixels of a cell along its side, its frames, and the map: R, G, B of each channel, and those to add."""

    ratio: int
    stride: int
    colours: list[tuple[float, float, float]]


class Eye:
    """Reads latents of one VAE, as the denoiser has them."""

    def __init__(self, learnt: Learnt, tiny: nn.Module | None = None) -> None:
        self._learnt = learnt
        self._channels = len(learnt.colours) - 1
        self._colours = torch.tensor(learnt.colours)
        self.tiny = tiny

    @torch.no_grad()
    def look(self, latents: Tensor, call: Call, row: int = 0) -> Tensor | None:
        """The pictures in a row of latents, uint8 (n, h, w, 3), on their device: one, or a few of a clip. None where it reads none."""
        grid = self._laid_out(latents[row], call)
        if grid is None or grid.shape[1] != self._channels:
            return None
        if len(grid) > FRAMES:
            grid = grid[[round(number * (len(grid) - 1) / (FRAMES - 1)) for number in range(FRAMES)]]
        rgb = self._by_map(grid.float()) if self.tiny is None else self._by_tiny(grid)
        return ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _by_map(self, grid: Tensor) -> Tensor:
        colours = self._colours.to(grid.device)
        return torch.einsum("nchw,ck->nhwk", grid, colours[:-1]) + colours[-1]

    def _by_tiny(self, grid: Tensor) -> Tensor:
        assert self.tiny is not None
        weight = next(self.tiny.parameters())
        shrink = max(grid.shape[-2:]) / TINY_CELLS
        if shrink > 1:
            grid = F.interpolate(grid.float(), scale_factor=1 / shrink, mode="area")
        found: Tensor = self.tiny.decode(_raw(self.tiny, grid.to(weight)), return_dict=False)[0]  # type: ignore[operator]  # of diffusers
        return found.float().movedim(1, -1)

    def _laid_out(self, latents: Tensor, call: Call) -> Tensor | None:
        """One row's latents as (frames, channels, h, w).

        Packed ones are (tokens, channels * p * p): row by row, p by p cells a token, its channels outermost; whatever else the denoiser was
        given stands before them.
        """
        if latents.ndim == 3:
            return latents[None]
        if latents.ndim == 4:
            return latents.movedim(1, 0) if latents.shape[0] == self._channels else latents
        if latents.ndim != 2 or call.width is None or call.height is None:
            return None
        p = math.isqrt(latents.shape[1] // self._channels)
        if p == 0 or p * p * self._channels != latents.shape[1]:
            return None
        h, w = (side // self._learnt.ratio // p for side in (call.height, call.width))
        frames = (call.frames - 1) // self._learnt.stride + 1 if call.frames else len(latents) // (h * w)
        tokens = latents[len(latents) - frames * h * w :]
        return tokens.reshape(frames, h, w, self._channels, p, p).permute(0, 3, 1, 4, 2, 5).reshape(frames, self._channels, h * p, w * p)


class Shot:
    """Pictures on their way to the host; once they have `arrived` they can be drawn."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures.to("cpu", non_blocking=True)
        self._event = torch.cuda.current_stream(pictures.device).record_event() if pictures.is_cuda else None

    def arrived(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def drawn(pictures: Tensor) -> bytes:
    """The pictures beside each other as a JPEG of at most 10 kB."""
    side = SIDE if len(pictures) == 1 else FRAME_SIDE
    scale = side / max(pictures.shape[1:3])
    size = max(1, round(pictures.shape[2] * scale)), max(1, round(pictures.shape[1] * scale))
    strip = Image.new("RGB", (size[0] * len(pictures), size[1]))
    for number, picture in enumerate(pictures.numpy()):
        strip.paste(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), (number * size[0], 0))
    return encode.preview(strip, max(strip.size))


# ── What a step says ──


@contextmanager
def followed(scheduler: Any, due: Callable[[], bool], see: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, `see` gets the estimate of the finished latents after each step for which `due` was true, where there is one.

    The scheduler is of a class that differs from its own by this alone: so a copy of it, which a pipeline makes for sound, steps as ever.
    Whatever goes wrong with an estimate ends the previews, and nothing else.
    """
    plain = type(scheduler)
    own_step = plain.step
    form = inspect.signature(scheduler.step)
    blind = "return_dict" not in form.parameters

    def tried(call: Callable[[], Any]) -> Any:
        nonlocal blind
        try:
            return call()
        except Exception as error:  # of a scheduler or a VAE that nobody here has seen
            blind = True
            print(f"no more previews: {plain.__name__}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  # for the worker's log

    @functools.wraps(own_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler or blind or not tried(due):
            return own_step(self, *args, **kwargs)
        answer = own_step(self, *args, **{**kwargs, "return_dict": True})  # by name: what stands second in the tuples differs
        if (latents := tried(lambda: _estimate(self, answer, **form.bind(*args, **kwargs).arguments))) is not None:
            tried(lambda: see(latents))
        return answer if kwargs.get("return_dict", True) else answer.to_tuple()

    scheduler.__class__ = type(plain.__name__, (plain,), {"step": step})
    try:
        yield
    finally:
        scheduler.__class__ = plain


def _estimate(scheduler: Any, answer: Any, model_output: Tensor, timestep: Any, sample: Tensor, **given: Any) -> Tensor | None:
    """The finished latents as they look after this step: the scheduler's own, else by the noise that was left before it."""
    for name in ("pred_original_sample", "denoised"):
        if (found := getattr(answer, name, None)) is not None:
            return cast(Tensor, found)
    if model_output.shape != sample.shape:
        return None  # a variance too, or an order of its own
    if (levels := given.get("per_token_timesteps")) is not None:
        # flow matching with a level for each token: there the model's output points the other way
        sigma: Tensor = levels[..., None] / scheduler.config.num_train_timesteps
        return sample + sigma * model_output
    if not hasattr(scheduler, "sigmas"):
        if not hasattr(scheduler, "alphas_cumprod"):
            return None
        kept = scheduler.alphas_cumprod[int(timestep)]
        return _clean(scheduler.config.get("prediction_type"), sample, model_output, kept**0.5, (1 - kept) ** 0.5)
    sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device)  # the step has counted itself; true for both halves of order 2
    if hasattr(scheduler, "precondition_outputs"):
        return cast(Tensor, scheduler.precondition_outputs(sample, model_output, sigma))
    kind = scheduler.config.get("prediction_type")
    if kind == "flow_prediction" or (kind is None and hasattr(scheduler, "scale_noise")):
        return sample - sigma * model_output
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return _clean(kind, sample, model_output, *scheduler._sigma_to_alpha_sigma_t(sigma))
    return None


def _clean(kind: str | None, sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
    """The picture in `sample`, which is alpha of it and sigma of noise, by what the model says of it."""
    match kind:
        case "epsilon":
            return (sample - sigma * output) / alpha
        case "v_prediction":
            return alpha * sample - sigma * output
        case "sample":
            return output
    return None


# ── The map ──


def learnt(vae: Any, kept: Path | None) -> Learnt | None:
    """How to read the latents of this VAE: as it was learnt before, else learnt now, and kept. None where it is not a VAE of pictures."""
    if kept is not None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(kept.read_bytes(), type=Learnt)
    try:
        found = _fitted(vae)
    except Exception as error:  # it encodes something else, or in a way of its own
        print(f"no previews: {type(vae).__name__}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  # for the worker's log
        return None
    if kept is not None:
        with contextlib.suppress(OSError):  # a folder that nobody may write to: it is learnt again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            new = kept.with_name(f"{kept.name}.{os.getpid()}")
            new.write_bytes(msgspec.json.encode(found))
            new.replace(kept)
    return found


@torch.no_grad()
def _fitted(vae: Any) -> Learnt:
    """By least squares between the latents of pictures made here and what the VAE decodes them to.

    To what it decodes, and not to the pictures themselves: for a trained VAE that is the same, and it is what will be seen.
    """
    own = next(vae.parameters()).dtype
    if upcast := bool(vae.config.get("force_upcast")) and own == torch.float16:  # it overflows in half precision
        vae.float()
    try:
        with torch.random.fork_rng():  # some decoders draw from the common one
            return _fit(vae, next(vae.parameters()))
    finally:
        if upcast:
            vae.to(own)


def _fit(vae: Any, like: Tensor) -> Learnt:
    clips = any(isinstance(part, nn.Conv3d) for part in vae.modules())
    probe = _encoded(vae, torch.zeros(1, 3, *((9,) if clips else ()), 64, 64).to(like))
    ratio, stride = 64 // probe.shape[-1], 8 // (probe.shape[2] - 1) if clips else 1
    zero, one = (_raw(vae, torch.full((1, probe.shape[1], *[1] * (probe.ndim - 2)), value).to(probe)) for value in (0.0, 1.0))
    seen, meant = [], []
    for picture in _pictures(max(min(CELLS, SIDE // ratio), 2) * ratio):
        given = picture[None].to(like)
        latents = _encoded(vae, given[:, :, None] if clips else given)
        shown = _decoded(vae, latents)
        cells = ((latents - zero) / (one - zero)).float()
        small = F.interpolate((shown[:, :, 0] if clips else shown).float(), size=cells.shape[-2:], mode="area")
        seen.append(cells.movedim(1, -1).flatten(0, -2))
        meant.append(small.movedim(1, -1).flatten(0, -2))
    cells, wanted = torch.cat(seen).cpu().double(), torch.cat(meant).cpu().double()
    cells = torch.cat([cells, torch.ones(len(cells), 1, dtype=cells.dtype)], 1)
    colours = torch.linalg.lstsq(cells, wanted, driver="gelsd").solution
    if not colours.isfinite().all():
        raise ValueError("its latents are not finite")
    return Learnt(ratio, stride, [(r, g, b) for r, g, b in colours.tolist()])


def _encoded(vae: Any, pictures: Tensor) -> Tensor:
    answer = vae.encode(pictures)
    if hasattr(answer, "latent_dist"):
        return cast(Tensor, answer.latent_dist.mode())
    return cast(Tensor, answer.latents if hasattr(answer, "latents") else answer.latent)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """What the VAE decodes at the first try; a decoder that is told how noisy the latents are hears "not at all"."""
    told = {"temb": torch.zeros(len(latents)).to(latents)} if vae.config.get("timestep_conditioning") else {}
    return cast(Tensor, vae.decode(latents, return_dict=False, **told)[0])


def _raw(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the VAE has them, of those that the denoiser has: by the numbers of its configuration, as every pipeline does."""
    numbers = {**vae.config, **dict(vae.named_buffers(recurse=False))}
    scale = numbers.get("scaling_factor") or 1.0
    if (mean := numbers.get("latents_mean")) is None or (std := numbers.get("latents_std")) is None:
        return latents / scale + (numbers.get("shift_factor") or 0.0)
    mean, std = (torch.as_tensor(each).to(latents).view(1, -1, *[1] * (latents.ndim - 2)) for each in (mean, std))
    return latents * std / scale + mean


def _pictures(side: int) -> Iterator[Tensor]:
    """Pictures made here, (3, side, side), -1 to 1: fields of colour from one to a dozen across, some of them under noise."""
    chance = torch.Generator().manual_seed(0)
    for number in range(PICTURES):
        fields = torch.rand(1, 3, *[(1, 2, 3, 5, 8, 12)[number % 6]] * 2, generator=chance)
        picture = F.interpolate(fields, size=(side, side), mode="bilinear")
        noise = torch.randn(picture.shape, generator=chance) * (0.1 if number % 4 == 3 else 0.0)
        yield ((picture + noise).clamp(0, 1) * 2 - 1)[0]
