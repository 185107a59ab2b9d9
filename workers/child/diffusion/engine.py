"""The engine of real models: diffusers for pictures, clips and sound, transformers for speech, by the entries of the model table.

One way for all classes: the table says what to load, the signature of a pipeline's call says what it takes, hooks say how far it is
(`watch`). A model makes the nearest size and the next number of frames that it can; the result is scaled, cut and re-timed to exactly what
was asked for, and says what was made. What a model cannot do at all is refused by name; nothing is left out in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from PIL import Image

from movieq.errors import InternalFault, ModelUnavailable, UnsupportedParameter
from movieq.models.table import Model
from movieq.tasks import params as parameters
from movieq.tasks.params import AnimationParams, AudioParams, ImageFormat, ImageParams, VideoParams
from workers.child.diffusion import model_cache, oom, prompts, sizing, tts
from workers.child.diffusion.hooks import Watch
from workers.child.diffusion.loaded import Loaded
from workers.child.job import Finish, Made, Take, TakeCancelled, Together, broken
from workers.child.media import ambience, encode, loudness
from workers.child.media import images as stills
from workers.child.media import metadata as about
from workers.child.media.encode import Clip, Format, Samples
from workers.faults import said
from workers.protocol import Produced, Stage

SOUND_LUFS: Final = -18.0
BED_LUFS: Final = -24.0
"""Of sound that is the whole result, and of sound under a picture."""

_SHARES: Final = {"load": 4.0, "encode": 0.5, "denoise": 10.0, "decode": 1.5, "sound": 2.0, "mux": 1.0}
"""Of the time, until a task of the model was measured."""
_SAID: Final = {
    "load": "loading_models",
    "encode": "reading_prompt",
    "decode": "decoding",
    "sound": "synthesizing_sound",
    "mux": "encoding",
}


def make(take: Take) -> Finish:
    """What a task of any type becomes: all that needs the device is done. Raises a TaskFault that names what the model cannot do."""
    entry = _entry(take)
    match take.params:
        case ImageParams() as params:
            return _image(take, entry, params)
        case VideoParams() as params:
            return _clip(take, entry, params, params.storyboard_images)
        case AnimationParams() as params:
            return _clip(take, entry, params, params.reference_images)
        case AudioParams() as params:
            return _speech(take, entry, params) if params.text is not None else _sound(take, entry, params)
    raise InternalFault(f"no model makes {take.run.task_type}")


def make_batch(takes: Sequence[Take]) -> list[Made | Finish | Exception]:
    """Pictures of one batch key, each with the noise of its own seed, by one call. What fails for one is tried for each alone."""
    whole, entry = Together(takes), _entry(takes[0])
    params = [cast(ImageParams, take.params) for take in takes]
    size = sizing.size(entry.limits, parameters.size(params[0].resolution))
    loaded = _load(whole, entry, "generating_image", "mux")
    failed: dict[str, Exception] = {}
    try:
        made = _rows(takes, loaded, size)
    except Exception as error:
        if broken(error):
            raise
        whole.note(f"the batch failed, each of its {len(takes)} tasks is tried alone: {said(error)}"[:500])
        made = {}
        for take in takes:
            try:
                made |= {} if take.cancelled else _rows([take], loaded, size)
            except Exception as own:
                if broken(own):
                    raise
                failed[take.run.run] = own
    return [failed.get(take.run.run) or _picture(take, loaded, each, size, made) for take, each in zip(takes, params, strict=True)]


def _entry(take: Take) -> Model:
    if take.run.entry is None:
        raise ModelUnavailable(f"{take.run.model} is not in this worker's table of models (MOVIEQ_MODELS)")
    return take.run.entry


# ── Pictures ──


def _image(take: Take, entry: Model, params: ImageParams) -> Finish:
    size = sizing.size(entry.limits, parameters.size(params.resolution))
    images = _images(take, entry, params.reference_images[:1], size)
    if len(params.reference_images) > 1:
        take.warnings.append(f"{take.run.model} takes one reference image: the first")
    if params.style_guide:
        take.warnings.append(f"style_guide is not used: {take.run.model} takes no style from an image")
    loaded = _load(take, entry, "generating_image", "mux")
    if not images:
        return _picture(take, loaded, params, size, _rows([take], loaded, size))
    given = _arguments(take, entry) | {"width": size[0], "height": size[1]}
    given |= {"image": images[0], "strength": entry.defaults.strength or 0.6}
    return _picture(take, loaded, params, size, {take.run.run: (_called(take, loaded, True, given)[0], 1)})


def _rows(takes: Sequence[Take], loaded: Loaded, size: tuple[int, int]) -> dict[str, tuple[Image.Image, int]]:
    """The picture of each run that is not cancelled, and how many were made at once; in halves, where the memory does not suffice."""
    takes = [take for take in takes if not take.cancelled] or takes[:1]
    whole = Together(takes) if len(takes) > 1 else takes[0]
    given = _arguments(takes[0], loaded.entry) | {"width": size[0], "height": size[1]}
    if len(takes) > 1:
        each = [_arguments(take, loaded.entry) for take in takes]
        given |= {name: [one[name] for one in each] for name in ("prompt", "generator", "negative_prompt") if name in given}

    def halves() -> dict[str, tuple[Image.Image, int]]:
        middle = len(takes) // 2
        whole.halved(middle)
        return _rows(takes[:middle], loaded, size) | _rows(takes[middle:], loaded, size)

    found = _called(whole, loaded, False, given, halves=halves if len(takes) > 1 else None)
    if isinstance(found, dict):
        return found
    return {take.run.run: (picture, len(takes)) for take, picture in zip(takes, found, strict=True)}


def _picture(take: Take, loaded: Loaded, params: ImageParams, size: tuple[int, int], made: dict[str, tuple[Image.Image, int]]) -> Finish:
    """What is left to do for a picture."""
    if take.run.run not in made:
        return _cancelled
    picture, rows = made[take.run.run]
    wanted = parameters.size(params.resolution)
    metadata = _metadata(take, loaded, str(params.format), wanted)
    metadata |= {"generated": {"resolution": f"{size[0]}x{size[1]}", "frames": 1, "fps": None}, "batch_size": rows}
    tags = about.tags(take, "Image")

    def finish() -> Made:
        take.begin("mux")
        extension = "jpg" if params.format is ImageFormat.JPEG else str(params.format)
        path = take.out_dir / f"output.{extension}"
        content_type = encode.write_image(path, sizing.scaled(picture.convert("RGB"), wanted), params.format, tags)
        take.step("mux", 1, 1)
        return Made((Produced(str(path), "output", content_type, *wanted),), metadata)

    return finish


def _cancelled() -> Made:
    raise TakeCancelled


def _clip(take: Take, entry: Model, params: VideoParams | AnimationParams, references: list[str]) -> Finish:
    form = Format(parameters.size(params.resolution), parameters.frame_rate(params.fps), parameters.frames(params))
    made = sizing.size(entry.limits, form.size)
    images = _images(take, entry, references, made)
    windows = sizing.windows(entry.limits, form.seconds)
    if len(windows) > 1 and entry.image_pipeline is None:
        most = entry.limits.frames / entry.limits.fps
        raise UnsupportedParameter(
            f"task_data.duration: {take.run.model} makes at most {most:.1f} s at a time, and takes no image to go on from; "
            f"ask for {most:.1f} s, or for a model that takes images"
        )
    cues = params.audio_cues if isinstance(params, VideoParams) else []
    if isinstance(params, AnimationParams) and params.loop:
        take.warnings.append(f"loop is not used: {take.run.model} makes no loops")
    loaded = _load(take, entry, "generating_video", *(["sound"] if cues else []), "mux")
    pictures: list[Image.Image] = []
    at = dict(zip(sizing.moments(len(images), windows[-1].first + windows[-1].frames, entry.limits.frame_step), images, strict=True))
    if len(at) < len(images):
        take.warnings.append(f"{len(images)} images do not fit into the clip: {len(at)} are used")
    if images and "frame_index" not in inspect.signature(loaded.image_pipe.__call__).parameters:
        windows = sizing.windows(entry.limits, form.seconds, list(at))  # so that each image is at an end of one
    generator = _generator(take.seed)
    for number, window in enumerate(windows):
        here = {moment - window.first: image for moment, image in at.items() if window.first <= moment < window.first + window.frames}
        goes_on = bool(pictures) and 0 not in here
        if goes_on:
            here = {0: pictures[window.first], **here}
        given = _arguments(take, entry) | {"width": made[0], "height": made[1], "num_frames": window.frames, "generator": generator}
        given |= _conditions(take, _pipe(take, loaded, bool(here)), here, window.frames)
        found = _called(take, loaded, bool(here), given, (number, len(windows)))[0]
        pictures[window.first + goes_on :] = found[goes_on:]
    track = _sound_track(take, cues, form) if cues else None
    metadata = _metadata(take, loaded, "mp4", form.size) | {"duration": round(form.seconds, 3), "fps": about.plain(form.rate)}
    metadata["generated"] = {
        "resolution": f"{made[0]}x{made[1]}",
        "frames": len(pictures),
        "fps": entry.limits.fps,
        "windows": len(windows),
    }
    if track is not None:
        metadata["sample_rate"] = encode.CLIP_SAMPLE_RATE
    return lambda: Made(_encoded(take, pictures, entry.limits.fps, form, track), metadata)


def _encoded(take: Take, pictures: list[Image.Image], fps: float, form: Format, track: Samples | None) -> tuple[Produced, ...]:
    """The pictures as an mp4 with its poster, each at its moment."""
    take.begin("mux")
    path, poster_path = take.out_dir / "output.mp4", take.out_dir / "poster.jpg"
    tags = about.tags(take, "Clip")
    order = sizing.picked(len(pictures), fps, form.frames, form.rate)
    with Clip(path, form, tags, track) as clip:
        planes, last = None, -1
        for frame, number in enumerate(order):
            if planes is None or number != last:
                planes, last = encode.planes(sizing.scaled(pictures[number].convert("RGB"), form.size)), number
            clip.add(planes)
            if frame == form.frames // 3:
                encode.write_image(poster_path, encode.picture(planes), ImageFormat.JPEG, tags)
            take.step("mux", frame + 1, form.frames)
    return (
        Produced(str(path), "output", "video/mp4", *form.size, form.seconds),
        Produced(str(poster_path), "poster", "image/jpeg", *form.size),
    )


def _images(take: Take, entry: Model, references: list[str], size: tuple[int, int]) -> list[Image.Image]:
    """The images of the task at the model's size. Raises UnsupportedParameter where the model takes none, or cannot do without."""
    if references and entry.image_pipeline is None:
        raise UnsupportedParameter(f"task_data: {take.run.model} takes no images; leave them out, or ask for a model that does")
    if not references and entry.pipeline is None:
        raise UnsupportedParameter(f"task_data: {take.run.model} needs an image to begin with; give one, or ask for another model")
    return [sizing.scaled(stills.load(each, take.input(each), size), size) for each in references]


def _conditions(take: Take, pipe: Any, at: dict[int, Image.Image], frames: int) -> dict[str, Any]:
    """The images of a window as the pipeline takes them: each at its picture, or at both ends, or the first, and the rest follows."""
    if not at:
        return {}
    takes = inspect.signature(pipe.__call__).parameters
    if "frame_index" in takes:
        return {"image": list(at.values()), "frame_index": list(at)}
    if "last_image" in takes and frames - 1 in at and len(at) > 1:
        return {"image": at[0], "last_image": at[frames - 1]}
    return {"image": at[0]}


# ── Sound ──


def _sound(take: Take, entry: Model, params: AudioParams) -> Finish:
    if entry.limits.seconds is not None and params.duration > entry.limits.seconds:
        raise UnsupportedParameter(
            f"task_data.duration: {take.run.model} makes at most {entry.limits.seconds:g} s, got {params.duration:g}"
        )
    loaded = _load(take, entry, "synthesizing_sound", "mux")
    samples, rate = _heard(take, loaded, _arguments(take, entry), params.duration)
    return _audio_file(take, loaded, params, samples, rate, SOUND_LUFS)


def _heard(take: Take, loaded: Loaded, given: dict[str, Any], seconds: float) -> tuple[Samples, int]:
    """What a sound model makes of the arguments: samples and their rate."""
    takes = inspect.signature(loaded.pipe.__call__).parameters
    length = next(name for name in ("audio_end_in_s", "audio_length_in_s") if name in takes)
    found = _called(take, loaded, False, given | {length: seconds, "output_type": "pt"})[0]
    samples = found.float().cpu().numpy().reshape(-1, found.shape[-1]).T
    rate = int(getattr(loaded.pipe.vae, "sampling_rate", None) or loaded.pipe.vocoder.config.sampling_rate)
    return np.ascontiguousarray(samples[: round(seconds * rate), :2], np.float32), rate


def _sound_track(take: Take, cues: list[str], form: Format) -> Samples:
    """The cues under a picture, one after another; by the sound model where this machine has one, else as the animatic makes them."""
    take.begin("sound")
    length = round(form.frames * encode.CLIP_SAMPLE_RATE / form.rate)
    made = _modelled(take, cues, form.seconds / len(cues)) if take.run.sound else None
    if made is None:
        take.warnings.append("the sound is the animatic's: no model for sound is on this worker's machine")
        scenes = [ambience.cues(cue) or ("room",) for cue in cues]
        made = ambience.bed(scenes, length, encode.CLIP_SAMPLE_RATE, np.random.default_rng([take.seed, 1]))
    bed = np.zeros((length, 2), np.float32)
    bed[: len(made)] = made[:length]
    take.step("sound", 1, 1)
    return loudness.at(bed, encode.CLIP_SAMPLE_RATE, BED_LUFS)


def _modelled(take: Take, cues: list[str], seconds: float) -> Samples | None:
    assert take.run.sound is not None
    name, entry = take.run.sound
    try:
        loaded = model_cache.get(take, name, entry, take.device)
    except ModelUnavailable:
        return None
    parts = []
    for number, cue in enumerate(cues):
        given = _defaults(entry) | {"prompt": cue, "generator": _generator(take.seed + number)}  # steps and the like are the picture's
        samples, rate = _heard(take, loaded, given, min(seconds, entry.limits.seconds or seconds))
        parts.append(encode.resampled(np.repeat(samples, 2, axis=1) if samples.shape[1] == 1 else samples, rate, encode.CLIP_SAMPLE_RATE))
    return np.concatenate(parts)


def _speech(take: Take, entry: Model, params: AudioParams) -> Finish:
    tts.check(take, entry, params)
    loaded = _load(take, entry, "synthesizing_speech", "mux")
    samples, rate = tts.speak(take, loaded, params)
    return _audio_file(take, loaded, params, samples, rate, tts.LUFS)


def _audio_file(take: Take, loaded: Loaded, params: AudioParams, made: Samples, made_rate: int, lufs: float) -> Finish:
    """What is left to do for a sound."""
    rate, metadata, tags = params.sample_rate, _metadata(take, loaded, str(params.output_format), None), about.tags(take, "Sound")

    def finish() -> Made:
        take.begin("mux")
        path = take.out_dir / f"output.{params.output_format}"
        samples = loudness.at(encode.resampled(made, made_rate, rate), rate, lufs)
        content_type = encode.write_sound(path, samples, rate, params.output_format, tags, lambda done, of: take.step("mux", done, of))
        seconds = len(samples) / rate
        known = {"duration": round(seconds, 3), "sample_rate": rate, "channels": samples.shape[1]}
        return Made((Produced(str(path), "output", content_type, duration_s=seconds),), metadata | known)

    return finish


# ── What all of them share ──


def _load(take: Take, entry: Model, said: str, *after: str) -> Loaded:
    """The stages are announced, and the model is in memory."""
    loaded = model_cache.ready(take.run.model)
    stages = [*([] if loaded else ["load"]), *(["denoise"] if entry.languages else ["encode", "denoise", "decode"]), *after]
    shares = _SHARES | model_cache.seconds(take.run.model)
    take.plan(*(Stage(each, said if each == "denoise" else _SAID[each], max(shares[each], 0.001)) for each in stages))
    if not loaded:
        take.begin("load")
    return model_cache.get(take, take.run.model, entry, take.device)


def _pipe(take: Take, loaded: Loaded, with_images: bool) -> Any:
    pipe = loaded.image_pipe if with_images else loaded.pipe
    if pipe is None:
        raise InternalFault(f"{take.run.model} has no pipeline {'with' if with_images else 'without'} images")
    return pipe


def _arguments(take: Take, entry: Model) -> dict[str, Any]:
    """What a call is given whatever it makes: the task's own words first, then the model's defaults."""
    params = take.params
    own = {"num_inference_steps": params.steps, "guidance_scale": params.guidance_scale, "negative_prompt": params.negative_prompt or None}
    return {
        "prompt": prompts.prompt(params),
        "generator": _generator(take.seed),
        **_defaults(entry),
        **{name: value for name, value in own.items() if value is not None},
    }


def _defaults(entry: Model) -> dict[str, Any]:
    """What a call of the model is given where the task does not say."""
    found = {"num_inference_steps": entry.defaults.steps, "guidance_scale": entry.defaults.guidance, **entry.call}
    return {name: value for name, value in found.items() if value is not None}


def _generator(seed: int) -> torch.Generator:
    """On the CPU whatever the device: so that a seed means the same noise everywhere."""
    return torch.Generator("cpu").manual_seed(seed)


def _called(
    take: Take,
    loaded: Loaded,
    with_images: bool,
    given: dict[str, Any],
    part: tuple[int, int] = (0, 1),
    halves: Callable[[], Any] | None = None,
) -> Any:
    """What the pipeline makes, or `halves`, and nothing left behind in it. Raises OutOfMemory where no rung of the ladder held."""
    pipe = _pipe(take, loaded, with_images)
    takes = inspect.signature(pipe.__call__).parameters
    unknown = sorted(given.keys() - takes.keys() - {"negative_prompt", *(("width", "height") if "image" in given else ())})
    if unknown:
        raise InternalFault(f"{type(pipe).__name__} takes no {', '.join(unknown)}: the entry of {take.run.model} is wrong")
    if "negative_prompt" in given and "negative_prompt" not in takes:
        take.warn(f"negative_prompt is not used: {take.run.model} takes none")
    if "frame_rate" in takes:
        given["frame_rate"] = loaded.entry.limits.fps
    options = {name: value for name, value in given.items() if name in takes}
    if "output_type" in takes and "output_type" not in options:
        options["output_type"] = "pil"
    generators = options["generator"] if isinstance(options["generator"], list) else [options["generator"]]
    states = [each.get_state() for each in generators]

    def call() -> Any:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        with Watch(take, pipe, part, loaded, given) as watch:
            answer = pipe(**options, return_dict=False)
        loaded.seconds |= watch.seconds
        return answer[0]

    return oom.climb(take, take.run.model, pipe, call, halves)


def _metadata(take: Take, loaded: Loaded, kind: str, size: tuple[int, int] | None) -> dict[str, Any]:
    import diffusers
    import transformers

    entry = loaded.entry
    found = about.metadata(take, kind, size)
    found |= {
        "revision": entry.weights.revision if entry.weights else None,
        "licence": entry.licence,
        "device": take.device,
        "dtype": "float32" if take.device == "cpu" else str(entry.dtype),
        "batch_size": 1,
        "versions": {"torch": str(torch.__version__), "diffusers": diffusers.__version__, "transformers": transformers.__version__},
    }
    if entry.first_block_cache is not None:
        found["lossy"] = [f"first_block_cache {entry.first_block_cache:g}"]
    if steps := _arguments(take, entry).get("num_inference_steps"):
        found["steps"] = steps
    return found
