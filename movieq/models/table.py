"""The model table: which models and LoRAs there are, which task types each model renders, and in which queue their tasks wait.

Imports no torch.
"""

from __future__ import annotations

import tomllib
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from movieq.errors import SettingsError
from movieq.tasks import faults
from movieq.tasks.params import LoraUse
from movieq.tasks.registry import REGISTRY, SPEAKS
from movieq.tasks.states import GENERATE_IMAGE, Kind, TaskType

T = TypeVar("T")
ANIMATIC: Final = "animatic"
USABLE: Final = 0.95
"""What a GPU must have free of the memory that an entry names: cards have a little less than their name says."""
LORAS: Final = "loras"
"""The name under which a file lists LoRAs. No model has it."""
PREVIEW_VAE: Final = "preview_vae"
"""Name of the component that only decodes previews, an AutoencoderTiny: sharper than the colour map that is fitted to every VAE."""


NAMEABLE: Final = frozenset({"guidance_scale", "seconds"})
"""The arguments that an entry may list in `names`."""
ATTENTION: Final = frozenset(
    {
        "native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "flash", "_flash_3", "sage", "xformers"
    }
)  # fmt: skip
"""The attention kernels that an entry may name, as diffusers calls them: those that are not downloaded when they are first used."""
IGNORABLE: Final = frozenset({"guidance_scale", "negative_prompt", "steps"})
"""The parameters that an entry may list in `ignores`."""


class Engine(StrEnum):
    """The engines of movieq."""

    ANIMATIC = "animatic"
    DIFFUSERS = "diffusers"


class Images(StrEnum):
    """How a model uses the images of a task."""

    REDRAW = "redraw"
    """The picture is drawn over the image, and resembles it as `strength` allows."""
    REFERENCES = "references"
    """What the images show appears in the picture: up to `limits.references` of them."""
    START = "start"
    """A clip, or each shot of it, begins with an image."""
    ENDS = "ends"
    """A clip begins with one image and leads to another."""
    FRAMES = "frames"
    """A clip passes through images at any of its frames."""


class Dtype(StrEnum):
    """Number formats of weights. On a CPU it is always float32: half precision is slower there, and some operations lack it."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source of weights: a repository of the hub at a commit, or a folder of this machine (its path, without a revision)."""

    repository: Annotated[str, Meta(min_length=1)]
    revision: Annotated[str, Meta(pattern="^[0-9a-f]{40}$")] | None = None
    subfolder: str = ""
    cls: str = ""
    """Class that loads a component. A pipeline uses the `pipeline` of its entry."""
    variant: str | None = None


class LoraFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a LoRA: in a repository of the hub at a commit, or in a folder of this machine (its path, without a revision)."""

    repository: Annotated[str, Meta(min_length=1)]
    file: Annotated[str, Meta(pattern=r"^[^/].*\.safetensors$")]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    """Its hash. Without one, that which the hub has for it at the commit."""
    revision: Annotated[str, Meta(pattern="^[0-9a-f]{40}$")] | None = None


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA: small weights that are added to those of a model, for a character or a style."""

    bases: Annotated[list[str], Meta(min_length=1)]
    """The models that it was trained for. Others may have layers of the same shape, so that only this tells them apart."""
    weights: LoraFile
    second: LoraFile | None = None
    """What it adds to the second network of models that have two, as Wan 2.2 has for little noise."""
    projects: list[str] = []
    """The projects that may use it; without any, all may."""
    licence: str = ""

    def allows(self, project: str) -> bool:
        """Whether tasks of the project may use it."""
        return not self.projects or project in self.projects


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values for parameters that a task leaves out."""

    steps: Annotated[int, Meta(ge=1)] | None = None
    guidance: Annotated[float, Meta(ge=0)] | None = None
    strength: Annotated[float, Meta(gt=0, le=1)] | None = None
    """How far the result may differ from a reference image."""
    negative_prompt: str | None = None
    """Its own negative prompt, where its training or its authors expect one."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model can render. Widths and heights are multiples of `sides`; frame counts are n * `frame_step` + `frame_first`."""

    sides: Annotated[int, Meta(ge=1)] = 8
    pixels: tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]] = (1, 4_000_000)
    """Fewest and most pixels of a picture that give good results."""
    frame_step: Annotated[int, Meta(ge=1)] = 1
    frame_first: Annotated[int, Meta(ge=0)] = 0
    frames: Annotated[int, Meta(ge=1)] = 1
    """Most frames of one window."""
    fps: Annotated[float, Meta(gt=0)] = 24.0
    """Frame rate of its training."""
    seconds: Annotated[float, Meta(gt=0)] | None = None
    """Longest sound."""
    least_seconds: Annotated[float, Meta(ge=0)] = 0.0
    """Shortest sound; a shorter one is the beginning of one as long as this."""
    references: Annotated[int, Meta(ge=1, le=10)] = 1
    """Most images of a model that takes references."""
    batch: list[tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=2, le=16)]]] = []
    """Largest batch by picture size, as [pixels, pictures]: [[262144, 8], [589824, 4]]."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the table. `tasks` maps the task types that it renders to their default estimates, in seconds.

    For models with weights, `pipeline` is the class for tasks without images and `image_pipeline` the one for tasks with images; both
    share their weights. `call` holds further arguments of every pipeline call.
    """

    engine: str
    """`animatic`, `diffusers`, or an engine of a plug-in."""
    kind: Kind
    tasks: dict[TaskType, Annotated[float, Meta(gt=0)]]
    weights: Weights | None = None
    components: dict[str, Weights] = {}
    adapter: str = "diffusers"
    """What knows how it is called: `diffusers`, `ltx`, `ltx2`, `qwen-edit`, `vace`, for speech `csm` or `vits`, or one of a plug-in."""
    pipeline: str | None = None
    image_pipeline: str | None = None
    images: Images | None = None
    """How it uses images. An entry with an `image_pipeline` that does not say so redraws pictures, and starts clips with an image."""
    dtype: Dtype = Dtype.FLOAT32
    dtypes: dict[str, Dtype] = {}
    """Components with a dtype of their own: {"vae": "float32"}."""
    fp8: list[str] = []
    """Components of diffusers that may be held as 8 bit floats where the device has no room for them otherwise, if that is good enough."""
    scheduler: dict[str, Any] = {}
    """`cls` is the class, the rest overrides its configuration."""
    flow_shift: list[tuple[Annotated[int, Meta(ge=1)], Annotated[float, Meta(gt=0)]]] = []
    """Shift of the noise schedule by picture size, as [pixels, shift]: [[399360, 3.0], [921600, 5.0]]. Above the last, the last counts."""
    call: dict[str, Any] = {}
    names: dict[str, str] = {}
    """What its pipeline calls an argument of movieq's: {"guidance_scale": "true_cfg_scale"}, {"seconds": "duration"}."""
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    ignores: list[str] = []
    """Parameters of tasks that change nothing, such as the guidance of a distilled model."""
    first_block_cache: Annotated[float, Meta(gt=0)] | None = None
    """Threshold: steps whose first block changes less than this are skipped. That is faster and changes the picture."""
    attention: str | None = None
    """The attention kernel (`ATTENTION`). None stands for the fastest that `movieq models bench` found on the machine, else for torch's."""
    compile: bool | None = None
    """Whether its repeated blocks are compiled. None stands for what `movieq models bench` found on the machine, else for no."""
    preferred: bool = False
    """Whether it is the default of its task types before those without this: for the models of plug-ins and of an operator's own file."""
    on_request: bool = False
    """Whether it renders only tasks that name it: it is never a default."""
    sound: bool = False
    """Whether its clips have sound."""
    languages: list[str] = []
    """Languages of a speech model, as first subtags of BCP 47."""
    voices: bool = False
    """Whether it can imitate the voice of a sample."""
    with_loras: list[LoraUse] = []
    """LoRAs that it always has, such as one that makes a few steps do."""
    loras: dict[str, Lora] = {}
    """The LoRAs for it by name. Not in an entry: `load` adds those that name it as a base."""
    gpu_memory_gb: Annotated[float, Meta(ge=0)] = 0.0
    licence: str = ""
    forbids: list[str] = []
    """What the licence forbids, or where it grants no rights."""
    verified: bool = False
    """Whether it has been loaded on a GPU."""

    def __post_init__(self) -> None:
        if self.image_pipeline is not None and self.images is None:
            msgspec.structs.force_setattr(self, "images", Images.REDRAW if GENERATE_IMAGE in self.tasks else Images.START)


def load(path: str = "") -> dict[str, Model]:
    """Return the table: shipped entries, those of plug-ins, and those of the file at `path`; later ones replace earlier ones.

    Raises SettingsError, which names the faulty entry.
    """
    shipped = Path(__file__).with_name("models.toml")
    own = f"MOVIEQ_MODELS: {path}"
    sources = {str(shipped): _read(str(shipped), shipped), **REGISTRY.models, **({own: _read(own, Path(path))} if path else {})}
    table: dict[str, Model] = {}
    loras: dict[str, Lora] = {}
    for source, entries in sources.items():
        table |= _models(source, {name: entry for name, entry in entries.items() if name != LORAS})
        loras |= _loras(source, entries.get(LORAS, {}), table)
    if taken := sorted(loras.keys() & table.keys()):
        raise SettingsError(f"{own}: {LORAS}.{taken[0]}: a model has this name too; give the LoRA another one")
    of_base = {name: {each: lora for each, lora in loras.items() if name in lora.bases} for name in table}
    for name, model in table.items():
        if lacking := [each.name for each in model.with_loras if each.name not in of_base[name]]:
            raise SettingsError(f"{own}: {name}: with_loras: no [{LORAS}.{lacking[0]}] has {name} as a base")
    return {name: msgspec.structs.replace(model, loras=of_base[name]) if of_base[name] else model for name, model in table.items()}


def _read(name: str, file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except UnicodeDecodeError:
        raise SettingsError(f"{name} is not text in UTF-8: save it as UTF-8") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{name}: {error}") from None


def _models(source: str, entries: dict[str, Any]) -> dict[str, Model]:
    found = _converted(source, entries, dict[str, Model])
    for name, model in found.items():
        if problem := _problem(model):
            raise SettingsError(f"{source}: {name}: {problem}")
    return found


def _loras(source: str, entries: Any, table: dict[str, Model]) -> dict[str, Lora]:
    found = _converted(source, entries, dict[str, Lora], LORAS)
    for name, lora in found.items():
        place = f"{source}: {LORAS}.{name}"
        if wrong := [base for base in lora.bases if base not in table or table[base].engine != Engine.DIFFUSERS]:
            raise SettingsError(f"{place}: bases: {wrong[0]!r} is no diffusion model of this table")
        for file in (lora.weights, lora.second):
            if file is not None and file.revision is None and not (Path(file.repository).is_absolute() and file.sha256):
                raise SettingsError(
                    f"{place}: {file.repository}: set revision to a commit of 40 hex digits, or repository to the absolute path of a "
                    "folder and sha256 to the hash of the file"
                )
    return found


def _converted(source: str, entries: Any, kind: type[T], path: str = "") -> T:
    try:
        return msgspec.convert(entries, kind)
    except msgspec.ValidationError as error:
        wrong = "; ".join(f"{where}: {message}" for where, message in islice(faults.of(kind, entries, path), faults.MOST))
        raise SettingsError(f"{source}: {wrong or error}") from None


def speech_problem(model: Model, *, speaks: bool) -> str | None:
    """Return what is wrong with an entry whose adapter speaks or does not; None if nothing is."""
    if model.languages and not speaks:
        return (
            f"languages: the adapter {model.adapter!r} does not speak; set adapter to 'csm' for CsmForConditionalGeneration, "
            "to 'vits' for VitsModel, or to the speech adapter of a plug-in"
        )
    if speaks and not model.languages:
        return f"languages: the adapter {model.adapter!r} speaks; set languages to those of the model, such as ['en']"
    return None


def _problem(model: Model) -> str | None:
    """Return what is wrong with an entry whose fields are each valid; None if nothing is."""
    if unknown := sorted(model.tasks.keys() - REGISTRY.tasks.keys()):
        return f"tasks: unknown task type {unknown[0]}; known: {', '.join(REGISTRY.tasks)}"
    if model.engine not in REGISTRY.engines:
        return f"unknown engine {model.engine!r}; known: {', '.join(REGISTRY.engines)}"
    if model.loras:
        return f"loras: describe each as [{LORAS}.NAME] with bases = [...]"
    if model.engine != Engine.DIFFUSERS:
        return None
    if model.weights is None:
        return "weights = { repository = ..., revision = ... } is needed"
    if model.adapter not in REGISTRY.adapters:
        return f"unknown adapter {model.adapter!r}; known: {', '.join(REGISTRY.adapters)}"
    if model.adapter in SPEAKS and (problem := speech_problem(model, speaks=SPEAKS[model.adapter])):
        return problem
    if model.pipeline is None and model.image_pipeline is None:
        return "pipeline or image_pipeline is needed: a class of diffusers or transformers"
    if model.images is not None and model.image_pipeline is None:
        return "images: only together with image_pipeline"
    if unnameable := sorted(model.names.keys() - NAMEABLE):
        return f"names: unknown argument {unnameable[0]!r}; known: {', '.join(sorted(NAMEABLE))}"
    if read := sorted(set(model.ignores) - IGNORABLE):
        return f"ignores: unknown parameter {read[0]!r}; known: {', '.join(sorted(IGNORABLE))}"
    for weights in (model.weights, *model.components.values()):
        if weights.revision is None and not Path(weights.repository).is_absolute():
            return f"{weights.repository}: set revision to a commit of 40 hex digits, or repository to the absolute path of a folder"
    if model.attention is not None and model.attention not in ATTENTION:
        return f"attention: unknown kernel {model.attention!r}; known: {', '.join(sorted(ATTENTION))}"
    if model.compile and model.first_block_cache is not None:
        return "compile: not together with first_block_cache, which works on the blocks too"
    if model.limits.batch and model.first_block_cache is not None:
        return "limits.batch: not together with first_block_cache, which decides over a whole batch"
    if model.limits.pixels[0] > model.limits.pixels[1]:
        return f"limits.pixels: [fewest, most] is expected, got {list(model.limits.pixels)}"
    return None
