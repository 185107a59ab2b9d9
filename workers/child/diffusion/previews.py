"""Previews of a picture half way through denoising: the scheduler's estimate of the finished latents, decoded cheaply.

It works alike for all pipeline classes. After each step, the scheduler's state gives an estimate of the finished latents. Packed latents
are unpacked by the size of the call. A linear map from latent channels to RGB, fitted once to what the model's own VAE decodes, gives the
colours; or a tiny autoencoder, where the table names one (`preview_vae`). A model whose latents cannot be read has no previews, and renders
as ever.
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

TRAINING_PICTURES: Final = 16
"""How many pictures a map is fitted to."""
TRAINING_CELLS: Final = 16
"""Latent cells along a side of a training picture, unless that makes more than `PREVIEW_SIDE` pixels."""
PREVIEW_SIDE: Final = 256
"""Pixels along the longer side of the preview of a picture."""
PREVIEW_FRAMES: Final = 4
"""How many frames of a clip stand side by side in its preview."""
PREVIEW_FRAME_SIDE: Final = 160
"""Pixels along the longer side of each of them."""
TINY_VAE_CELLS: Final = 32
"""Latent cells along the longer side that a tiny autoencoder decodes: a preview is small."""


class CallSize(NamedTuple):
    """The size that a pipeline was called with, in pixels and frames: packed latents do not carry it."""

    width: int | None = None
    height: int | None = None
    frames: int | None = None


class ColourMap(msgspec.Struct, frozen=True):
    """How to read the latents of a VAE, as stored on disk.

    `ratio` is the pixels along a side of a latent cell, `stride` the frames of a latent frame, `colours` the R, G, B weights of each latent
    channel and, last, the constant.
    """

    ratio: int
    stride: int
    colours: list[tuple[float, float, float]]


class Previewer:
    """Decodes latents of one VAE, as the denoiser has them, to small pictures."""

    def __init__(self, colour_map: ColourMap, tiny_vae: nn.Module | None = None) -> None:
        self.map = colour_map
        self._channels = len(colour_map.colours) - 1
        self._colours = torch.tensor(colour_map.colours)
        self.tiny_vae = tiny_vae

    @torch.no_grad()
    def decode(self, latents: Tensor, call: CallSize, row: int = 0) -> Tensor | None:
        """Return one row of a batch of latents as uint8 pictures (n, h, w, 3) on its device: one, or a few frames of a clip.

        None if the latents have a layout that is not known.
        """
        frames = self._unpacked(latents[row], call)
        if frames is None or frames.shape[1] != self._channels:
            return None
        if len(frames) > PREVIEW_FRAMES:
            frames = frames[[round(number * (len(frames) - 1) / (PREVIEW_FRAMES - 1)) for number in range(PREVIEW_FRAMES)]]
        rgb = self._decode_with_map(frames.float()) if self.tiny_vae is None else self._decode_with_tiny_vae(frames)
        return ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _decode_with_map(self, frames: Tensor) -> Tensor:
        colours = self._colours.to(frames.device)
        return torch.einsum("nchw,ck->nhwk", frames, colours[:-1]) + colours[-1]

    def _decode_with_tiny_vae(self, frames: Tensor) -> Tensor:
        assert self.tiny_vae is not None
        weight = next(self.tiny_vae.parameters())
        shrink = max(frames.shape[-2:]) / TINY_VAE_CELLS
        if shrink > 1:
            frames = F.interpolate(frames.float(), scale_factor=1 / shrink, mode="area")
        latents = vae_latents(self.tiny_vae, frames.to(weight))
        rgb: Tensor = self.tiny_vae.decode(latents, return_dict=False)[0]  # type: ignore[operator]  # a method of diffusers
        return rgb.float().movedim(1, -1)

    def _unpacked(self, latents: Tensor, call: CallSize) -> Tensor | None:
        """Return one row's latents as (frames, channels, h, w); None if the layout is not known.

        Packed latents are (tokens, channels * p * p), tokens in row-major order, each of p by p cells with the channels outermost.
        Conditioning tokens stand before them.
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
        h, w = (side // self.map.ratio // p for side in (call.height, call.width))
        frames = (call.frames - 1) // self.map.stride + 1 if call.frames else len(latents) // (h * w)
        tokens = latents[len(latents) - frames * h * w :]
        return tokens.reshape(frames, h, w, self._channels, p, p).permute(0, 3, 1, 4, 2, 5).reshape(frames, self._channels, h * p, w * p)


class PendingPreview:
    """Pictures that are being copied to the host; they can be read after `wait`."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures.to("cpu", non_blocking=True)
        self._event = torch.cuda.current_stream(pictures.device).record_event() if pictures.is_cuda else None

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def encode_strip(pictures: Tensor) -> bytes:
    """Return uint8 pictures (n, h, w, 3) side by side as a JPEG of at most 10 kB."""
    side = PREVIEW_SIDE if len(pictures) == 1 else PREVIEW_FRAME_SIDE
    scale = side / max(pictures.shape[1:3])
    size = max(1, round(pictures.shape[2] * scale)), max(1, round(pictures.shape[1] * scale))
    strip = Image.new("RGB", (size[0] * len(pictures), size[1]))
    for number, picture in enumerate(pictures.numpy()):
        strip.paste(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), (number * size[0], 0))
    return encode.preview_jpeg(strip, max(strip.size))


# ── The estimate after a step ──


@contextmanager
def latent_estimates(scheduler: Any, due: Callable[[], bool], receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block, call `receive` with the estimated finished latents after each step for which `due` returned true.

    The scheduler gets a subclass of its own class for the while, so that a copy of it, which a pipeline makes for sound, steps as usual.
    Any error in an estimate ends the previews of the run, and nothing else.
    """
    own_class = type(scheduler)
    own_step = own_class.step
    signature = inspect.signature(scheduler.step)
    stopped = "return_dict" not in signature.parameters

    def guarded(call: Callable[[], Any]) -> Any:
        nonlocal stopped
        try:
            return call()
        except Exception as error:  # any scheduler and VAE of any plug-in or model may come here
            stopped = True
            message = f"no more previews: {own_class.__name__}: {type(error).__name__}: {error}"
            print(message, file=sys.stderr)  # noqa: T201  # for the worker's log

    @functools.wraps(own_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler or stopped or not guarded(due):
            return own_step(self, *args, **kwargs)
        answer = own_step(self, *args, **{**kwargs, "return_dict": True})  # named fields: the order of the tuple differs between schedulers
        if (latents := guarded(lambda: _estimate(self, answer, **signature.bind(*args, **kwargs).arguments))) is not None:
            guarded(lambda: receive(latents))
        return answer if kwargs.get("return_dict", True) else answer.to_tuple()

    scheduler.__class__ = type(own_class.__name__, (own_class,), {"step": step})
    try:
        yield
    finally:
        scheduler.__class__ = own_class


def _estimate(scheduler: Any, answer: Any, model_output: Tensor, timestep: Any, sample: Tensor, **given: Any) -> Tensor | None:
    """Return the estimate of the finished latents after a step: the scheduler's own, else one from the noise level; None if unknown."""
    for name in ("pred_original_sample", "denoised"):
        if (found := getattr(answer, name, None)) is not None:
            return cast(Tensor, found)
    if model_output.shape != sample.shape:
        return None  # the model also predicts a variance, or uses another layout
    if (levels := given.get("per_token_timesteps")) is not None:
        # flow matching with a noise level for each token: there the sign of the model's output is reversed
        sigma: Tensor = levels[..., None] / scheduler.config.num_train_timesteps
        return sample + sigma * model_output
    if not hasattr(scheduler, "sigmas"):
        if not hasattr(scheduler, "alphas_cumprod"):
            return None
        alpha2 = scheduler.alphas_cumprod[int(timestep)]
        return _clean(scheduler.config.get("prediction_type"), sample, model_output, alpha2**0.5, (1 - alpha2) ** 0.5)
    # `step` has already increased its index, also in second-order schedulers
    sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device)
    if hasattr(scheduler, "precondition_outputs"):
        return cast(Tensor, scheduler.precondition_outputs(sample, model_output, sigma))
    kind = scheduler.config.get("prediction_type")
    if kind == "flow_prediction" or (kind is None and hasattr(scheduler, "scale_noise")):
        return sample - sigma * model_output
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return _clean(kind, sample, model_output, *scheduler._sigma_to_alpha_sigma_t(sigma))
    return None


def _clean(kind: str | None, sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
    """Return the picture in `sample` = alpha * picture + sigma * noise, given the model's output of that prediction type."""
    match kind:
        case "epsilon":
            return (sample - sigma * output) / alpha
        case "v_prediction":
            return alpha * sample - sigma * output
        case "sample":
            return output
    return None


# ── The colour map ──


def colour_map(vae: Any, stored: Path | None) -> ColourMap | None:
    """Return the map of this VAE: read from the file `stored`, else fitted and stored there. None if it is not a VAE of pictures."""
    if stored is not None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(stored.read_bytes(), type=ColourMap)
    try:
        fitted = _fit(vae)
    except Exception as error:  # it encodes something other than pictures, or has another interface
        print(f"no previews: {type(vae).__name__}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  # for the worker's log
        return None
    if stored is not None:
        with contextlib.suppress(OSError):  # a folder without write access: the map is fitted again next time
            stored.parent.mkdir(parents=True, exist_ok=True)
            new = stored.with_name(f"{stored.name}.{os.getpid()}")
            new.write_bytes(msgspec.json.encode(fitted))
            new.replace(stored)
    return fitted


@torch.no_grad()
def _fit(vae: Any) -> ColourMap:
    """Fit a map by least squares between the latents of generated pictures and what the VAE decodes them to.

    The target is the decoded picture and not the original: for a trained VAE they are nearly equal, and the decoded one is what will be
    seen.
    """
    own = next(vae.parameters()).dtype
    if upcast := bool(vae.config.get("force_upcast")) and own == torch.float16:  # this VAE overflows in half precision
        vae.float()
    try:
        with torch.random.fork_rng():  # some decoders draw from the global generator
            return _fit_linear(vae, next(vae.parameters()))
    finally:
        if upcast:
            vae.to(own)


def _fit_linear(vae: Any, like: Tensor) -> ColourMap:
    """Fit the map with pictures of the dtype and on the device of `like`."""
    clips = any(isinstance(part, nn.Conv3d) for part in vae.modules())
    probe = encode_pictures(vae, torch.zeros(1, 3, *((9,) if clips else ()), 64, 64).to(like))
    ratio, stride = 64 // probe.shape[-1], 8 // (probe.shape[2] - 1) if clips else 1
    zero, one = (vae_latents(vae, torch.full((1, probe.shape[1], *[1] * (probe.ndim - 2)), value).to(probe)) for value in (0.0, 1.0))
    inputs, targets = [], []
    for picture in training_pictures(max(min(TRAINING_CELLS, PREVIEW_SIDE // ratio), 2) * ratio):
        original = picture[None].to(like)
        latents = encode_pictures(vae, original[:, :, None] if clips else original)
        decoded = _decode_latents(vae, latents)
        cells = ((latents - zero) / (one - zero)).float()
        small = F.interpolate((decoded[:, :, 0] if clips else decoded).float(), size=cells.shape[-2:], mode="area")
        inputs.append(cells.movedim(1, -1).flatten(0, -2))  # (cells, channels)
        targets.append(small.movedim(1, -1).flatten(0, -2))  # (cells, 3)
    cells, rgb = torch.cat(inputs).cpu().double(), torch.cat(targets).cpu().double()
    cells = torch.cat([cells, torch.ones(len(cells), 1, dtype=cells.dtype)], 1)
    colours = torch.linalg.lstsq(cells, rgb, driver="gelsd").solution  # (channels + 1, 3)
    if not colours.isfinite().all():
        raise ValueError("its latents are not finite")
    return ColourMap(ratio, stride, [(r, g, b) for r, g, b in colours.tolist()])


def encode_pictures(vae: Any, pictures: Tensor) -> Tensor:
    """Return the VAE's latents of pictures (n, 3, h, w) or clips (n, 3, frames, h, w), values -1 to 1."""
    answer = vae.encode(pictures)
    if hasattr(answer, "latent_dist"):
        return cast(Tensor, answer.latent_dist.mode())
    return cast(Tensor, answer.latents if hasattr(answer, "latents") else answer.latent)


def _decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Return the pictures that the VAE decodes; a decoder with timestep conditioning is told that the latents have no noise."""
    extra = {"temb": torch.zeros(len(latents)).to(latents)} if vae.config.get("timestep_conditioning") else {}
    return cast(Tensor, vae.decode(latents, return_dict=False, **extra)[0])


def vae_latents(vae: Any, latents: Tensor) -> Tensor:
    """Convert latents of the denoiser to those of the VAE, by the constants of its configuration, as every pipeline does."""
    numbers = {**vae.config, **dict(vae.named_buffers(recurse=False))}
    scale = numbers.get("scaling_factor") or 1.0
    if (mean := numbers.get("latents_mean")) is None or (std := numbers.get("latents_std")) is None:
        return latents / scale + (numbers.get("shift_factor") or 0.0)
    mean, std = (torch.as_tensor(each).to(latents).view(1, -1, *[1] * (latents.ndim - 2)) for each in (mean, std))
    return latents * std / scale + mean


def training_pictures(side: int) -> Iterator[Tensor]:
    """Yield generated pictures (3, side, side), -1 to 1: colour gradients with one to a dozen cells across, some with noise."""
    chance = torch.Generator().manual_seed(0)
    for number in range(TRAINING_PICTURES):
        fields = torch.rand(1, 3, *[(1, 2, 3, 5, 8, 12)[number % 6]] * 2, generator=chance)
        picture = F.interpolate(fields, size=(side, side), mode="bilinear")
        noise = torch.randn(picture.shape, generator=chance) * (0.1 if number % 4 == 3 else 0.0)
        yield ((picture + noise).clamp(0, 1) * 2 - 1)[0]
