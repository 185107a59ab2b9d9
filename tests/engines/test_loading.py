"""Loading: each component in its own dtype, as far as it has come; what is missing or broken is named."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from movieq.errors import ModelUnavailable
from tests.engines import tiny
from tests.engines.conftest import Studio, difference
from tests.engines.test_diffusion import asked
from workers.child.diffusion import frames, loading, model_cache
from workers.child.job import JobCancelled
from workers.protocol import FromChild, Step

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def dtypes(pipe: Any, component: str) -> set[torch.dtype]:
    return {each.dtype for each in getattr(pipe, component).parameters()}


def test_components_have_the_dtypes_of_the_entry_and_a_second_pipeline_changes_none(studio: Studio) -> None:
    """Wan keeps some layers in float32; diffusers' own `from_pipe` would cast them."""
    entry = studio.entry("wan", image_pipeline="WanImageToVideoPipeline", dtype="bfloat16", dtypes={"vae": "float32"})
    job = studio.job("wan", print, entry=entry, prompt="x")
    loaded = model_cache.get(job, "wan", entry, "cpu:0")  # "cpu" alone would be float32 throughout
    assert dtypes(loaded.pipe, "vae") == {torch.float32}
    assert dtypes(loaded.pipe, "text_encoder") == {torch.bfloat16}
    kept = {name for name, each in loaded.pipe.transformer.named_parameters() if each.dtype == torch.float32}
    assert any("scale_shift_table" in name for name in kept)
    assert dtypes(loaded.pipe, "transformer") == {torch.bfloat16, torch.float32}
    assert loaded.image_pipe.transformer is loaded.pipe.transformer
    assert loaded.image_pipe.config.boundary_ratio == loaded.pipe.config.boundary_ratio == 0.9


def test_the_text_encoder_of_wan_has_its_embeddings(studio: Studio) -> None:
    """They lie in the file once, under another name; some releases of transformers left them random, without an error."""
    loaded = model_cache.get(studio.job("wan", print, prompt="x"), "wan", studio.entry("wan"), "cpu")
    encoder = loaded.pipe.text_encoder
    assert torch.equal(encoder.encoder.embed_tokens.weight, encoder.shared.weight)


def test_loading_reports_each_component(studio: Studio) -> None:
    sent: list[FromChild] = []
    entry = studio.entry("flux")
    model_cache.get(studio.job("flux", sent.append, entry=entry, prompt="x"), "flux", entry, "cpu")
    steps = [(each.step, each.steps) for each in sent if isinstance(each, Step) and each.stage == "load"]
    assert steps[-1][0] == steps[-1][1] > 1
    assert steps == sorted(steps)


def test_a_component_reports_what_has_arrived_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LOOK_S", 0.001)
    arrived, reported = [1000], threading.Event()
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: type("Memory", (), {"rss": arrived[0]}))
    seen: list[int] = []

    def progress(done: int) -> None:
        seen.append(done)
        reported.set()

    with loading._watched(progress, 50, 300):
        for rss in (1100, 1200, 5000):
            reported.clear()
            arrived[0] = rss
            assert reported.wait(30)
    assert seen == [150, 250, 350], "never more than its size"


def test_a_library_that_is_missing_is_named(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    from diffusers.utils.import_utils import DummyObject

    entry = studio.entry("stable_audio")

    class CosineDPMSolverMultistepScheduler(metaclass=DummyObject):
        _backends = ["torch", "no_such_library"]  # noqa: RUF012

    monkeypatch.setattr(diffusers, "CosineDPMSolverMultistepScheduler", CosineDPMSolverMultistepScheduler)
    with pytest.raises(ModelUnavailable, match=r"needs no_such_library: run `pip install 'movieq\[gpu\]'`"):
        studio.render("stable_audio", entry=entry, **asked("stable_audio"))


def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_loaded(studio: Studio, folder: Path, folders: Callable[[str], Path]) -> None:
    """As that of LTX-Video, which has no tokenizer.json."""
    shutil.copytree(folders("ltx"), folder / "ltx")
    tiny.sentencepiece(folder / "ltx" / "tokenizer")
    entry = studio.entry("ltx", weights={"repository": str(folder / "ltx")})
    first, other = (studio.render("ltx", entry=entry, **asked("ltx", prompt)) for prompt in ("a lighthouse in a storm", "zebras waltz"))
    assert difference(first.decoded, other.decoded) > 1 / 255


def test_a_sound_model_that_is_here_and_does_not_load_fails_the_clip_with_its_name(
    studio: Studio, folder: Path, folders: Callable[[str], Path]
) -> None:
    shutil.copytree(folders("stable_audio"), folder / "audio")
    (folder / "audio" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    sound = ("stable-audio", studio.entry("stable_audio", weights={"repository": str(folder / "audio")}))
    with pytest.raises(ModelUnavailable, match="safetensors"):
        studio.render("ltx", **asked("ltx"), audio_cues=["sea"], sound=sound)


def test_a_model_folder_that_vanishes_is_named_and_the_next_model_renders(
    studio: Studio, folder: Path, folders: Callable[[str], Path]
) -> None:
    shutil.copytree(folders("sd"), folder / "model")
    entry = studio.entry("sd", weights={"repository": str(folder / "model")})
    shutil.rmtree(folder / "model" / "unet")
    with pytest.raises(ModelUnavailable, match="unet"):
        studio.render("sd", entry=entry, **asked("sd"))
    assert studio.render("flux", **asked("flux")).path.is_file()


def test_a_cancel_between_two_components_stops_the_load(studio: Studio) -> None:
    def cancel(message: FromChild) -> None:
        if isinstance(message, Step) and message.stage == "load" and message.step:
            studio.flag.set()

    entry = studio.entry("flux")
    with pytest.raises(JobCancelled):
        model_cache.get(studio.job("flux", cancel, entry=entry, prompt="x"), "flux", entry, "cpu")
    assert not model_cache.is_loaded("flux")


@pytest.mark.parametrize("shifts", [[[4096, 1.0]], [[1000, 9.0], [8192, 1.0]]])
def test_the_noise_schedule_is_shifted_by_the_size_of_the_picture(studio: Studio, shifts: list[list[float]]) -> None:
    plain = studio.render("wan", **asked("wan"))
    shifted = studio.render("wan", entry=studio.entry("wan", flow_shift=shifts), **asked("wan"))
    same = studio.render("wan", entry=studio.entry("wan", flow_shift=[[8192, 3.0]]), **asked("wan"))
    assert difference(plain.decoded, shifted.decoded) > 1 / 255
    assert plain.path.read_bytes() == same.path.read_bytes(), "3 is what its files say"


def test_pictures_reach_the_host_as_diffusers_would_bring_them() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pictures = torch.rand(37, 3, 16, 24)
    pil = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures))
    found = frames.to_host(pictures)
    assert found.shape == (37, 16, 24, 3)
    assert all(np.array_equal(np.asarray(each), array) for each, array in zip(pil, found, strict=True))
