"""Each shipped model is pulled from a repository like its real one, loaded by the real engine process, and makes a result."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import av
import msgspec
import pytest
from PIL import Image

import movieq
from movieq.errors import OutOfMemory
from movieq.models import table
from movieq.models.table import Engine, Images, Model
from tests.engines import recorded
from tests.engines.hub import hub
from tests.engines.test_served import body
from tests.engines.test_weights import models
from tests.service import Service, service
from workers.child.diffusion import placement
from workers.child.diffusion.placement import Placement

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SHIPPED: Final = {name: model for name, model in table.load().items() if model.engine == Engine.DIFFUSERS}
TASKS: Final[dict[str, dict[str, Any]]] = {
    "generate_image": {"prompt": "a lighthouse in a storm", "resolution": "128x64", "format": "png"},
    "generate_video": {"prompt": "a lighthouse in a storm", "duration": 1, "resolution": "128x64", "fps": 24},
    "process_audio": {"prompt": "rain on a roof", "duration": 1, "output_format": "wav"},
}
STEPS: Final = 2


def small(model: Model) -> dict[str, Any]:
    """Return the entry as the table of a file has it, for small results: real sizes take a GPU."""
    found: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(model, loras={}))  # the shipped table has them
    found["limits"] |= {"pixels": [1, 128 * 64], "frames": min(model.limits.frames, 25)}
    if not model.languages:
        found["defaults"]["steps"] = STEPS
    return found


def toml(value: Any) -> str:
    """Return a value in TOML."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case list() | tuple():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return f"{{ {', '.join(f'{name} = {toml(each)}' for name, each in value.items() if each is not None)} }}"
    return str(value)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service whose models have been pulled from hubs with their recorded repositories."""
    folder = tmp_path_factory.mktemp("records")
    entries = {name: small(SHIPPED[name]) for name in recorded.LISTED}
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in entry.items() if value is not None)
        for name, entry in entries.items()
    ]
    (folder / "models.toml").write_text("\n".join(lines))
    for name in recorded.LISTED:
        recorded.build(name, folder / "repositories" / name)
        asyncio.run(pull(folder, name))
    with service(folder, MOVIEQ_MODELS=str(folder / "models.toml"), HF_HOME=str(folder / "hf")) as started:
        yield started


async def pull(folder: Path, name: str) -> None:
    """Run `movieq models pull` against a hub that serves the model's repository at its revision."""
    source = SHIPPED[name].weights
    assert source is not None
    assert source.revision is not None
    async with hub(folder / "repositories" / name, source.repository, source.revision) as served:
        for lora in SHIPPED[name].loras.values():
            recorded.build_lora(folder / "repositories" / name, lora, folder / "loras" / name)
            assert lora.weights.revision is not None
            served.add(folder / "loras" / name, lora.weights.repository, lora.weights.revision)
        code, _, error = await models(served, folder, "pull", name)
        assert code == 0, error


@pytest.mark.parametrize("name", recorded.LISTED)
def test_an_entry_has_the_repository_and_the_commit_of_its_record(name: str) -> None:
    found, entry = recorded.record(name), SHIPPED[name]
    assert entry.weights is not None
    assert (entry.weights.repository, entry.weights.revision) == (found["repository"], found["revision"])
    licence = found["licence"]
    assert bool(entry.forbids) == bool(licence["forbids"] or licence["territories_excluded"]), "it says what the licence forbids"


@pytest.mark.parametrize("name", recorded.LISTED)
async def test_a_shipped_model_makes_a_result(running: Service, name: str) -> None:
    model = SHIPPED[name]
    task_type = next(each for each in TASKS if each in model.tasks)
    task = {**TASKS[task_type], "model": name, "seed": 3}
    if model.languages:
        task = {"text": "Light the lamp.", "output_format": "wav", "model": name, "seed": 3}
    stills = [await running.upload(still(colour)) for colour in ("#806040", "#204080")]
    field = {"generate_image": "reference_images", "generate_video": "storyboard_images"}.get(task_type)
    results = []
    for images in [[], stills[:1], stills]:
        if (images and (field is None or model.images is None)) or (not images and model.pipeline is None):
            continue
        ended = await running.ended(await running.submit(task_type, {**task, **({field: images} if field and images else {})}))
        assert ended["status"] == "completed", ended["error"]
        metadata = ended["result"]["metadata"]
        assert (metadata["model"], metadata["revision"]) == (name, model.weights and model.weights.revision)
        assert metadata.get("steps") == (None if model.languages else STEPS)
        results.append(await body(ended["result"]["media_url"]))
    if field is not None:
        assert all(measured(each) == (128, 64) for each in results)
    if model.sound:
        cued = await running.ended(await running.submit(task_type, {**task, "audio_cues": ["thunder"]}))
        assert cued["status"] == "completed", cued["error"]
        assert "warnings" not in cued["result"]["metadata"]
        assert encoded(results[0], "audio") != encoded(await body(cued["result"]["media_url"]), "audio"), "the cues are in its prompt"
    if model.images not in (None, Images.REDRAW):
        assert encoded(results[-1]) != encoded(results[-2]), "the second image changes the result"


async def test_an_animation_shows_what_its_references_show(running: Service) -> None:
    task = {**TASKS["generate_video"], "model": "wan-vace-14b", "seed": 3}
    images = [await running.upload(still(colour)) for colour in ("#806040", "#204080")]
    made = []
    for references in ([], images[:1], images):
        ended = await running.ended(await running.submit("render_animation", {**task, "reference_images": references}))
        assert ended["status"] == "completed", ended["error"]
        assert ended["result"]["metadata"]["generated"]["windows"] == 1
        made.append(encoded(await body(ended["result"]["media_url"])))
    assert len(set(made)) == 3


PARAMETERS: Final[dict[str, Any]] = {"negative_prompt": "fog and rain", "steps": 3, "guidance_scale": 9.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recorded.LISTED if not SHIPPED[name].languages])
async def test_a_parameter_changes_what_a_shipped_model_makes_or_is_named_in_a_warning(running: Service, name: str) -> None:
    model = SHIPPED[name]
    task_type = next(each for each in TASKS if each in model.tasks)
    task = {**TASKS[task_type], "model": name, "seed": 3}
    if model.pipeline is None:
        field = {"generate_image": "reference_images", "generate_video": "storyboard_images"}[task_type]
        task[field] = [await running.upload(still("#806040"))]
    made, warned = {}, {}
    for parameter, value in {"": None, **PARAMETERS}.items():
        ended = await running.ended(await running.submit(task_type, {**task, **({parameter: value} if parameter else {})}))
        assert ended["status"] == "completed", ended["error"]
        made[parameter] = encoded(await body(ended["result"]["media_url"]), "audio" if task_type == "process_audio" else "video")
        warned[parameter] = " ".join(ended["result"]["metadata"].get("warnings", []))
    for parameter in PARAMETERS:
        assert (made[parameter] == made[""]) == (f"{parameter} is not used" in warned[parameter]), (parameter, warned[parameter])


def still(colour: str) -> bytes:
    picture = io.BytesIO()
    Image.effect_mandelbrot((320, 160), (-2, -1, 1, 1), 20).convert("RGB").point(lambda value: value // 2).save(picture, "PNG")
    ground = Image.new("RGB", (320, 160), colour)
    ground.paste(Image.open(picture), (0, 0), Image.open(picture).convert("L"))
    found = io.BytesIO()
    ground.save(found, "PNG")
    return found.getvalue()


def encoded(content: bytes, kind: str = "video") -> bytes:
    """Return the pictures or the sound of a file, without its tags, which differ from task to task."""
    if content.startswith(b"\x89PNG"):
        return Image.open(io.BytesIO(content)).tobytes()
    with av.open(io.BytesIO(content), "r") as container:
        return b"".join(bytes(packet) for packet in container.demux(**{kind: 0}))


def measured(content: bytes) -> tuple[int, int]:
    """Return the width and height of a picture or a clip."""
    if content.startswith(b"\x89PNG"):
        return Image.open(io.BytesIO(content)).size
    with av.open(io.BytesIO(content)) as container:
        return container.streams.video[0].width, container.streams.video[0].height


PLACED: Final = {
    "z-image-turbo": "GGWWWW",
    "flux2-klein-4b": "GGWWWW",
    "qwen-image-2512": "GGG8WW",
    "qwen-image-edit-2511": "--GGWW",
    "flux-schnell": "GGGWWW",
    "ltx-video": "GGWWWW",
    "ltx23-distilled": "--GGWW",
    "wan22-ti2v-5b": "--GWWW",
    "wan22-i2v": "--GGWW",
    "wan22-t2v": "--GGWW",
    "wan22-i2v-lightning": "--GGWW",
    "wan22-t2v-lightning": "--GGWW",
    "wan-vace-14b": "--G8WW",
    "stable-audio-open": "WWWWWW",
    "ace-step-xl-turbo": "GWWWWW",
    "csm": "WWWWWW",
}
"""Where each model lies on GPUs of 12, 16, 24, 48, 80 and 141 GiB, with 256 GiB of host memory.

Whole, in 8 bits, in Groups, or nowhere (-).
"""


@pytest.mark.parametrize("name", recorded.LISTED)
def test_a_model_of_real_size_is_placed_on_a_gpu_of_any_size_as_the_guide_says(name: str) -> None:
    needs = placement.needs(SHIPPED[name], recorded.sizes(name, SHIPPED[name]), on_cpu=False)
    found = ""
    for device_gib in (12, 16, 24, 48, 80, 141):
        try:
            place = placement.choose(name, needs, device_gib * placement.GIB, 256 * placement.GIB)
        except OutOfMemory:
            found += "-"
        else:
            found += {Placement.WHOLE: "W", Placement.FP8: "8", Placement.GROUPS: "G"}[place]
    assert found == PLACED[name]
    whole, groups, host = (math.ceil(each / placement.GIB) for each in (needs.whole, needs.groups, needs.weights))
    guide = (Path(movieq.__file__).parent / "web" / "docs" / "models.md").read_text("utf-8")
    (row,) = [line for line in guide.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"| {whole} GiB | {groups} and {host} GiB |" in row
