"""Tiny pipelines with random weights, saved like real ones, and the diffusion engine in the process of the test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw

from movieq.models.table import Model
from tests.engines import tiny
from workers.child.diffusion import engine as diffusion
from workers.child.diffusion import model_cache
from workers.child.job import Flag, Job, Output
from workers.protocol import FromChild, Run, Step

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start; threads slow down models this small
torch.set_num_threads(1)

PICTURE = {"sides": 16, "pixels": [1, 4096]}
CLIP = {"sides": 32, "pixels": [1, 4096], "frame_step": 8, "frame_first": 1, "frames": 17, "fps": 12}
WAN = {**CLIP, "sides": 16, "frame_step": 4, "frames": 13}

ENTRIES: dict[str, dict[str, Any]] = {
    "sd": {"pipeline": "StableDiffusionPipeline", "image_pipeline": "StableDiffusionImg2ImgPipeline", "limits": PICTURE},
    "sd3": {"pipeline": "StableDiffusion3Pipeline", "image_pipeline": "StableDiffusion3Img2ImgPipeline", "limits": PICTURE},
    "flux": {
        "pipeline": "FluxPipeline",
        "image_pipeline": "FluxImg2ImgPipeline",
        "limits": PICTURE,
        "ignores": ["guidance_scale"],
    },
    "z_image": {"pipeline": "ZImagePipeline", "image_pipeline": "ZImageImg2ImgPipeline", "limits": PICTURE},
    "ltx": {"pipeline": "LTXPipeline", "limits": CLIP},
    "ltx_condition": {
        "adapter": "ltx",
        "pipeline": "LTXConditionPipeline",
        "image_pipeline": "LTXConditionPipeline",
        "images": "frames",
        "limits": CLIP,
    },
    "wan": {"pipeline": "WanPipeline", "limits": WAN},
    "wan_i2v": {"image_pipeline": "WanImageToVideoPipeline", "images": "ends", "limits": WAN, "defaults": {"steps": 4, "guidance": 20}},
    "stable_audio": {"pipeline": "StableAudioPipeline", "limits": {"seconds": 10}, "defaults": {"steps": 4, "guidance": 100}},
    "vits": {"adapter": "vits", "pipeline": "VitsModel", "languages": ["en"]},
    "csm": {"adapter": "csm", "pipeline": "CsmForConditionalGeneration", "languages": ["en"], "voices": True},
}
"""Name -> entry in the model table, for every model of `tiny`."""

IMAGES = {"sd", "sd3", "flux", "z_image"}
ANIMATIONS = {"wan"}
SPEAKERS = {"vits", "csm"}
SOUNDS = {"stable_audio", *SPEAKERS}


def task_of(name: str) -> str:
    """Return the task type of the model."""
    return (
        "generate_image"
        if name in IMAGES
        else "render_animation"
        if name in ANIMATIONS
        else "process_audio"
        if name in SOUNDS
        else "generate_video"
    )


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the user's cache folder with the colour maps of models in folders, each of which is fitted once a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a tiny model, built on first use."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            tiny.BUILDERS[name](root / name)
        return root / name

    return folder


class Result(NamedTuple):
    """The output of a task, and the messages sent while it was rendered."""

    output: Output
    sent: list[FromChild]

    @property
    def path(self) -> Path:
        return Path(self.output.files[0].path)

    @property
    def stages(self) -> list[str]:
        """The stages in the order in which they began."""
        return [stage for stage, _ in itertools.groupby(each.stage for each in self.sent if isinstance(each, Step))]

    @property
    def decoded(self) -> npt.NDArray[np.float32]:
        """Return the pictures of the file, 0 to 1, or its samples, -1 to 1."""
        return decoded(self.path)


class Studio:
    """Renders tasks with tiny models."""

    def __init__(self, folders: Callable[[str], Path], folder: Path) -> None:
        self._folders = folders
        self._folder = folder
        self._count = itertools.count()
        self.flag = Flag()

    def entry(self, name: str, **changes: Any) -> Model:
        """Return the model's table entry with changed fields."""
        fields = {
            "engine": "diffusers",
            "kind": "gpu_heavy",
            "tasks": {task_of(name): 1.0},
            "weights": {"repository": str(self._folders(name))},
            "defaults": {"steps": 4, "strength": 0.75},
            **ENTRIES[name],
            **changes,
        }
        return msgspec.convert(fields, Model)

    def job(self, name: str, send: Callable[[FromChild], None], inputs: dict[str, Path] | None = None, **given: Any) -> Job:
        """Return a job for the model; `entry`, `seed` and `sound` stand beside its parameters."""
        name_of_run = f"run{next(self._count)}"
        out = self._folder / name_of_run
        out.mkdir()
        self.flag = Flag()
        entry, seed, sound = given.pop("entry", None) or self.entry(name), given.pop("seed", 1), given.pop("sound", None)
        paths = {reference: str(path) for reference, path in (inputs or {}).items()}
        run = Run(name_of_run, "task", "film", task_of(name), "diffusers", name, given, {}, paths, seed, str(out), entry, sound)
        return Job(run, send, self.flag)

    def render(self, name: str, inputs: dict[str, Path] | None = None, **given: Any) -> Result:
        """Render a task to its end."""
        sent: list[FromChild] = []
        return Result(diffusion.render(self.job(name, sent.append, inputs, **given))(), sent)


@pytest.fixture
def studio(folders: Callable[[str], Path], folder: Path) -> Iterator[Studio]:
    """Yield an engine without loaded models."""
    model_cache.clear()
    yield Studio(folders, folder)
    model_cache.clear()


@pytest.fixture
def stills(folder: Path) -> dict[str, Path]:
    """Return two references and their files: a light disc on dark, and a dark one on light."""
    found = {}
    for number, (ground, ink) in enumerate([("#202028", "#f0e0c0"), ("#e8e0d0", "#302018")]):
        still = Image.new("RGB", (320, 180), ground)
        ImageDraw.Draw(still).ellipse((90 + 40 * number, 30, 210, 150), fill=ink)
        still.save(folder / f"still{number}.png")
        found[f"https://a.example/{number}.png"] = folder / f"still{number}.png"
    return found


def run_out_of_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next forward pass of a tiny FLUX.1 fail as CUDA does without memory."""
    from diffusers import FluxTransformer2DModel

    forward, faults = FluxTransformer2DModel.forward, iter(range(1))

    def faulty(self: Any, *args: Any, **options: Any) -> Any:
        for _ in faults:
            raise RuntimeError("CUDA error: out of memory")
        return forward(self, *args, **options)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", faulty)


def decoded(path: Path) -> npt.NDArray[np.float32]:
    """Return the pictures of a file, (n, h, w, 3), 0 to 1, or its samples, (n, channels)."""
    if path.suffix in (".jpg", ".png", ".webp"):
        return _unit([np.asarray(Image.open(path).convert("RGB"))])
    with av.open(str(path)) as container:
        if container.streams.video:
            return _unit([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        plain = av.AudioResampler("fltp")
        frames = [each for frame in (*container.decode(audio=0), None) for each in plain.resample(frame)]
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1).T.astype(np.float32)


def _unit(pictures: list[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = np.stack(pictures).astype(np.float32)
    found /= 255
    return found


def difference(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    """Return the mean absolute difference of two results of one shape."""
    n = min(len(left), len(right))
    return float(np.abs(left[:n] - right[:n]).mean())
