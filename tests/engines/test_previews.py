"""A preview resembles the finished picture, is small and rare, and does not change the result; it is sent on request or if watched."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests.engines import tiny
from tests.engines.conftest import ENTRIES, IMAGES, SOUNDS, Result, Studio
from workers.child import job
from workers.child.diffusion import engine as diffusion
from workers.child.diffusion import loading, model_cache, previews
from workers.child.diffusion.previews import CallSize, ColourMap, Previewer
from workers.protocol import FromChild, Preview, Step

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PREVIEWED = [name for name in ENTRIES if name not in SOUNDS]
FIRST = "https://a.example/0.png"
WIDE = {"resolution": "128x64", "prompt": "a lighthouse"}


def asked(studio: Studio, name: str, **changes: Any) -> dict[str, Any]:
    """Return the parameters of a small task whose result shows everything that the model renders, uncropped."""
    limits = ENTRIES[name]["limits"]
    if name in IMAGES:
        return {"entry": studio.entry(name, limits={**limits, "pixels": [1, 2048]}, **changes), **WIDE, "format": "png"}
    frames = limits["frames"]
    entry = studio.entry(name, limits={**limits, "pixels": [1, 2048], "fps": frames}, **changes)
    given = {} if "pipeline" in ENTRIES[name] else {"storyboard_images": [FIRST]}
    return {"entry": entry, **WIDE, "duration": 1, "fps": frames, **given}


def shown(result: Result) -> list[Image.Image]:
    """Return the previews of a run."""
    return [Image.open(io.BytesIO(each.jpeg)) for each in result.sent if isinstance(each, Preview)]


def likeness(result: Result, stride: int) -> float:
    """Return the correlation of the last preview with the finished pictures, both scaled down."""
    output, last = result.decoded, shown(result)[-1]
    count = last.width * output.shape[1] // (last.height * output.shape[2])
    cells = (len(output) - 1) // stride
    pictures = [Image.fromarray((output[round(at) * stride] * 255).astype(np.uint8)) for at in np.linspace(0, cells, count)]
    strip = Image.new("RGB", (128 * count, 64))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (128 * number, 0))
    left, right = (np.asarray(each.resize((16 * count, 8), Image.Resampling.BOX), np.float64).ravel() for each in (strip, last))
    return float(np.corrcoef(left, right)[0, 1])


class Lens(nn.Module):
    """A decoder with colours linear in the latents, as in trained VAEs nearly; those of random weights are not."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        clips = any(isinstance(part, nn.Conv3d) for part in vae.modules())
        with torch.no_grad():
            probe = vae.encode(torch.zeros(1, 3, *((9,) if clips else ()), 64, 64)).latent_dist.mode()
        spread = float((previews.vae_latents(vae, torch.ones_like(probe)) - previews.vae_latents(vae, torch.zeros_like(probe))).mean())
        self.ratio, self.stride = 64 // probe.shape[-1], 8 // (probe.shape[2] - 1) if clips else 1
        chance = torch.Generator().manual_seed(3)
        self.colours = nn.Parameter(torch.randn(3, probe.shape[1], generator=chance) * 0.4 / spread / probe.shape[1] ** 0.5)

    def forward(self, latents: Tensor, *_: Any, feat_cache: Any = None, first_chunk: bool = False, **__: Any) -> Tensor:
        rgb = torch.einsum("kc,bc...->bk...", self.colours, latents)
        if rgb.ndim == 4:
            return F.interpolate(rgb, scale_factor=self.ratio)
        rgb = F.interpolate(rgb, scale_factor=(self.stride, self.ratio, self.ratio))
        return rgb if feat_cache is not None and not first_chunk else rgb[:, :, self.stride - 1 :]


@pytest.fixture
def linear_vae(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Decode with a `Lens` in every loaded model, and send a preview of every step."""
    fit = previews.colour_map

    def with_lens(vae: Any, stored: Path | None) -> ColourMap | None:
        if hasattr(vae.config, "latents_mean") | ("scaling_factor" in vae.config):
            vae.decoder = Lens(vae)
        return fit(vae, stored)

    monkeypatch.setattr(previews, "colour_map", with_lens)
    monkeypatch.setattr(job, "PREVIEW_INTERVAL_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.mark.parametrize("name", PREVIEWED)
@pytest.mark.usefixtures("linear_vae")
def test_the_last_preview_resembles_the_result_and_one_with_a_random_map_does_not(
    studio: Studio, stills: dict[str, Path], name: str
) -> None:
    task = asked(studio, name)
    result = studio.render(name, stills, **task, preview=True)
    steps = sum(isinstance(each, Step) and each.stage == "denoise" and each.step > 0 for each in result.sent)
    assert len(shown(result)) >= steps > 0
    loaded = model_cache.find(name)
    assert loaded
    assert loaded.previewer
    colours = loaded.previewer.map
    assert likeness(result, colours.stride) > 0.9
    plain = studio.render(name, stills, **task)
    assert not shown(plain)
    assert plain.path.read_bytes() == result.path.read_bytes()
    chance = torch.Generator().manual_seed(5)
    random = torch.randn(len(colours.colours), 3, generator=chance).tolist()
    loaded.previewer = Previewer(msgspec.structs.replace(colours, colours=random))
    assert likeness(studio.render(name, stills, **task, preview=True), colours.stride) < 0.6


def test_a_map_shows_the_colours_of_a_picture_that_it_was_not_fitted_to() -> None:
    vae = trained()
    fitted = previews.colour_map(vae, None)
    assert fitted is not None
    chance = torch.Generator().manual_seed(9)
    picture = F.interpolate(torch.rand(1, 3, 4, 6, generator=chance), size=(64, 96), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        latents = previews.encode_pictures(vae, picture * 2 - 1) * vae.config.scaling_factor
    unfitted = msgspec.structs.replace(fitted, colours=torch.randn(5, 3, generator=chance).tolist())
    alike = []
    for each in (fitted, unfitted):
        seen = Previewer(each).decode(latents, CallSize())
        assert seen is not None
        small = F.interpolate(picture, size=seen.shape[1:3], mode="area")[0].movedim(0, -1).numpy()
        alike.append(np.corrcoef(seen.numpy().ravel(), small.ravel())[0, 1])
    assert alike[0] > 0.5 > alike[1] + 0.2


def trained() -> Any:
    """Return a small VAE with a little training."""
    torch.manual_seed(0)
    vae = loading.library_class("AutoencoderKL")(
        block_out_channels=[8, 16],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    )
    pictures = torch.stack([*previews.training_pictures(32)])
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        F.mse_loss(vae.decode(previews.encode_pictures(vae, pictures), return_dict=False)[0], pictures).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return vae


# ── When previews are sent ──


def test_previews_are_small_and_wait_for_their_interval(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.PREVIEW_INTERVAL_S == 0.5
    monkeypatch.setattr(job, "PREVIEW_INTERVAL_S", 3600.0)
    result = studio.render("ltx", **asked(studio, "ltx"), preview=True)
    assert len(shown(result)) == 1
    assert all(len(each.jpeg) <= 10_000 for each in result.sent if isinstance(each, Preview))
    assert shown(result)[0].size == (160 * 4, 80), "pictures of the clip beside each other"


def test_a_run_sends_previews_while_it_is_watched(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "PREVIEW_INTERVAL_S", 0.0)
    sent: list[FromChild] = []

    def receive(message: FromChild) -> None:
        sent.append(message)
        if isinstance(message, Step) and message.stage == "denoise":
            studio.flag.watched = 4 <= message.step < 8

    run = studio.job("sd", receive, **asked(studio, "sd"), steps=12)
    monkeypatch.setattr(job, "STEP_INTERVAL_S", 0.0)
    diffusion.render(run)
    place = {at: sum(isinstance(each, Step) and each.stage == "denoise" and each.step > 0 for each in sent[:at]) for at in range(len(sent))}
    assert [place[at] for at, each in enumerate(sent) if isinstance(each, Preview)] == [4, 5, 6, 7]


def test_sound_has_no_previews(studio: Studio) -> None:
    result = studio.render("stable_audio", prompt="rain", duration=2, output_format="wav", preview=True)
    assert not shown(result)
    sound = ("stable_audio", studio.entry("stable_audio"))
    given = asked(studio, "ltx")
    with_sound = studio.render("ltx", **given, audio_cues=["sea"], sound=sound, preview=True)
    stages = [each.stage for each in with_sound.sent if isinstance(each, Step)]
    assert "sound" in stages
    assert not any(isinstance(each, Preview) for each in with_sound.sent[-len(stages[stages.index("sound") :]) :])


# ── The colour map ──


def test_a_map_is_fitted_at_the_first_load_and_read_at_the_next(studio: Studio, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cache = folder / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    home = folder / "model"
    tiny.BUILDERS["flux"](home)

    def load() -> ColourMap:
        model_cache.clear()
        given = {**asked(studio, "flux"), "entry": studio.entry("flux", weights={"repository": str(home)})}
        previewer = model_cache.get(studio.job("flux", print, **given), "flux", given["entry"], "cpu").previewer
        assert previewer
        return previewer.map

    fitted = load()
    (stored,) = (cache / "movieq").iterdir()
    marked = msgspec.structs.replace(fitted, ratio=fitted.ratio + 1)
    stored.write_bytes(msgspec.json.encode(marked))
    assert load() == marked, "it was read"
    stored.write_text("{")
    assert load() == fitted, "it could not be read, and was fitted again"
    assert msgspec.json.decode(stored.read_bytes(), type=ColourMap) == fitted
    tiny.BUILDERS["flux"](home)
    load()
    assert len([*(cache / "movieq").iterdir()]) == 2, "these are other weights"


@pytest.mark.parametrize("broken", ["no estimate", "a fault"])
def test_a_scheduler_without_estimates_has_no_previews_and_renders_as_ever(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    monkeypatch.setattr(job, "PREVIEW_INTERVAL_S", 0.0)
    task = asked(studio, "sd", scheduler={"cls": "IPNDMScheduler"} if broken == "no estimate" else {})
    plain = studio.render("sd", **task)
    if broken == "a fault":
        monkeypatch.setattr(Previewer, "decode", lambda *_: 1 / 0)
    previewed = studio.render("sd", **task, preview=True)
    assert not shown(previewed)
    assert previewed.path.read_bytes() == plain.path.read_bytes()
    assert capsys.readouterr().err.count("no more previews") == (broken == "a fault"), "logged once, and not at each step"


def test_a_tiny_autoencoder_of_the_table_makes_the_previews(studio: Studio, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(job, "PREVIEW_INTERVAL_S", 0.0)
    kind = loading.library_class("AutoencoderTiny")
    kind(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    ).save_pretrained(folder / "tiny")
    mapped, decoded = (
        studio.render("sd", **asked(studio, "sd", components=components), preview=True)
        for components in ({}, {"preview_vae": {"repository": str(folder / "tiny"), "cls": "AutoencoderTiny"}})
    )
    assert len(shown(decoded)) == len(shown(mapped)) > 0
    assert shown(decoded)[-1].tobytes() != shown(mapped)[-1].tobytes()
    assert decoded.path.read_bytes() == mapped.path.read_bytes()


# ── The estimate after a step ──

NOISE = ["DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "PNDM", "LCM"]
SCHEDULERS = [
    *[(name, {"prediction_type": "epsilon"}) for name in [*NOISE, "HeunDiscrete"]],
    *[(name, {"prediction_type": "v_prediction"}) for name in NOISE],
    ("DPMSolverMultistep", {"prediction_type": "epsilon", "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ("UniPCMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchHeunDiscrete", {}),
]


@pytest.mark.parametrize(
    ("name", "config"), SCHEDULERS, ids=lambda each: each if isinstance(each, str) else "-".join(map(str, each.values()))
)
def test_with_a_perfect_model_each_step_estimates_the_finished_latents(name: str, config: dict[str, Any]) -> None:
    scheduler: Any = loading.library_class(f"{name}Scheduler")(**config)
    scheduler.set_timesteps(8)
    chance = torch.Generator().manual_seed(1)
    wanted, noise = torch.randn(2, 1, 4, 6, 6, generator=chance)
    wanted = wanted.tanh()  # some clip what is beyond 1
    kind = config.get("prediction_type", "flow_prediction")
    estimates: list[Tensor] = []
    with previews.latent_estimates(scheduler, lambda: True, estimates.append):
        for number, at in enumerate(scheduler.timesteps):
            if scheduler.step_index is None if hasattr(scheduler, "step_index") else False:
                scheduler._init_step_index(at)
            if kind == "flow_prediction":
                sigma = scheduler.sigmas[number]
                sample, output = (1 - sigma) * wanted + sigma * noise, noise - wanted
            else:
                sample, alpha, sigma = noisy(scheduler, wanted, noise, at, number)
                output = noise if kind == "epsilon" else alpha * noise - sigma * wanted
            scheduler.step(output, at, sample, return_dict=False)
    assert len(estimates) == len(scheduler.timesteps)
    assert max(float((each - wanted).abs().max()) for each in estimates) < 1e-3
    assert type(scheduler) is loading.library_class(f"{name}Scheduler")


def noisy(scheduler: Any, wanted: Tensor, noise: Tensor, at: Any, number: int) -> tuple[Tensor, Any, Any]:
    """Return the latents of a step as the scheduler has them, and the shares of picture and noise in them."""
    if not hasattr(scheduler, "sigmas"):
        alpha, sigma = scheduler.alphas_cumprod[int(at)] ** 0.5, (1 - scheduler.alphas_cumprod[int(at)]) ** 0.5
        return alpha * wanted + sigma * noise, alpha, sigma
    sigma = scheduler.sigmas[number]
    alpha = 1 / (1 + sigma**2) ** 0.5
    own = hasattr(scheduler, "_sigma_to_alpha_sigma_t")
    return (wanted + sigma * noise) * (alpha if own else 1), alpha, sigma * alpha


def test_a_copy_of_a_scheduler_steps_by_itself() -> None:
    scheduler: Any = loading.library_class("FlowMatchEulerDiscreteScheduler")()
    scheduler.set_timesteps(4)
    estimates: list[Tensor] = []
    with previews.latent_estimates(scheduler, lambda: True, estimates.append):
        other = copy.deepcopy(scheduler)
        other.step(torch.ones(1, 2), scheduler.timesteps[0], torch.ones(1, 2))
        assert (scheduler.step_index, other.step_index, estimates) == (None, 1, [])
        assert "generator" in inspect.signature(scheduler.step).parameters, "pipelines read its signature"
