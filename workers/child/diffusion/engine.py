"""The engine of neural models: diffusers for pictures, clips and sound, transformers for speech.

It treats all pipeline classes alike: the model table says what to load, the signature of a pipeline's call says which arguments it
accepts, and hooks report its progress (`hooks`). A model renders the nearest size and the next larger frame count that it supports; the
result is scaled, cropped and retimed to exactly what was asked for, and its metadata says what was rendered. What a model cannot do is
refused by name or listed in `warnings`; nothing is ignored silently.
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
from workers.child.diffusion.hooks import PipelineHooks
from workers.child.diffusion.loaded import Loaded
from workers.child.job import BatchJob, Finish, Job, JobCancelled, Output, device_is_broken
from workers.child.media import ambience, encode, images, loudness
from workers.child.media.encode import ClipFormat, ClipWriter, Samples
from workers.child.media.metadata import display_rate, file_tags, result_metadata
from workers.faults import public_message
from workers.protocol import Produced, Stage

SOUND_LUFS: Final = -18.0
"""Loudness of sound that is the whole result."""
BED_LUFS: Final = -24.0
"""Loudness of sound under a picture."""

_STAGE_WEIGHTS: Final = {"load": 4.0, "encode": 0.5, "denoise": 10.0, "decode": 1.5, "sound": 2.0, "mux": 1.0}
"""Relative durations of the stages, until a run of the model was measured."""
_STEP_NAMES: Final = {
    "load": "loading_models",
    "encode": "reading_prompt",
    "decode": "decoding",
    "sound": "synthesizing_sound",
    "mux": "encoding",
}
"""What `current_step` shows during each stage; that of "denoise" depends on the task."""


def render(job: Job) -> Finish:
    """Render a task of any type; return the rest that needs no device. Raises a TaskFault that names what the model cannot do."""
    entry = _entry(job)
    match job.params:
        case ImageParams() as params:
            return _render_image(job, entry, params)
        case VideoParams() as params:
            return _render_clip(job, entry, params, params.storyboard_images)
        case AnimationParams() as params:
            return _render_clip(job, entry, params, params.reference_images)
        case AudioParams() as params:
            return _render_speech(job, entry, params) if params.text is not None else _render_ambience(job, entry, params)
    raise InternalFault(f"no model makes {job.run.task_type}")


def render_batch(jobs: Sequence[Job]) -> list[Output | Finish | Exception]:
    """Render pictures of one batch key in one call, each from the noise of its own seed. If the call fails, render each alone.

    Returns for each job the rest that needs no device, or the error of that job.
    """
    batch, entry = BatchJob(jobs), _entry(jobs[0])
    params = [cast(ImageParams, job.params) for job in jobs]
    size = sizing.model_size(entry.limits, parameters.size(params[0].resolution))
    loaded = _load(batch, entry, "generating_image", "mux")
    failed: dict[str, Exception] = {}
    try:
        pictures = _render_pictures(jobs, loaded, size)
    except Exception as error:
        if device_is_broken(error):
            raise
        batch.note(f"the batch failed, each of its {len(jobs)} tasks is tried alone: {public_message(error)}"[:500])
        pictures = {}
        for job in jobs:
            try:
                pictures |= {} if job.cancelled else _render_pictures([job], loaded, size)
            except Exception as error_alone:
                if device_is_broken(error_alone):
                    raise
                failed[job.run.run] = error_alone
    return [failed.get(job.run.run) or _picture_finish(job, loaded, each, size, pictures) for job, each in zip(jobs, params, strict=True)]


def _entry(job: Job) -> Model:
    if job.run.entry is None:
        raise ModelUnavailable(f"{job.run.model} is not in this worker's table of models (MOVIEQ_MODELS)")
    return job.run.entry


# ── Pictures ──


def _render_image(job: Job, entry: Model, params: ImageParams) -> Finish:
    size = sizing.model_size(entry.limits, parameters.size(params.resolution))
    references = _load_images(job, entry, params.reference_images[:1], size)
    if len(params.reference_images) > 1:
        job.warnings.append(f"{job.run.model} takes one reference image: the first")
    if params.style_guide:
        job.warnings.append(f"style_guide is not used: {job.run.model} takes no style from an image")
    loaded = _load(job, entry, "generating_image", "mux")
    if not references:
        return _picture_finish(job, loaded, params, size, _render_pictures([job], loaded, size))
    arguments = _arguments(job, entry) | {"width": size[0], "height": size[1]}
    arguments |= {"image": references[0], "strength": entry.defaults.strength or 0.6}
    return _picture_finish(job, loaded, params, size, {job.run.run: (_call(job, loaded, True, arguments)[0], 1)})


def _render_pictures(jobs: Sequence[Job], loaded: Loaded, size: tuple[int, int]) -> dict[str, tuple[Image.Image, int]]:
    """Return, by run, the picture of each job that is not cancelled and how many were rendered in the same call.

    A batch that runs out of memory is rendered in halves.
    """
    jobs = [job for job in jobs if not job.cancelled] or jobs[:1]
    batch = BatchJob(jobs) if len(jobs) > 1 else jobs[0]
    arguments = _arguments(jobs[0], loaded.entry) | {"width": size[0], "height": size[1]}
    if len(jobs) > 1:
        each = [_arguments(job, loaded.entry) for job in jobs]
        arguments |= {name: [one[name] for one in each] for name in ("prompt", "generator", "negative_prompt") if name in arguments}

    def in_halves() -> dict[str, tuple[Image.Image, int]]:
        middle = len(jobs) // 2
        batch.report_batch_limit(middle)
        return _render_pictures(jobs[:middle], loaded, size) | _render_pictures(jobs[middle:], loaded, size)

    pictures = _call(batch, loaded, False, arguments, in_halves=in_halves if len(jobs) > 1 else None)
    if isinstance(pictures, dict):  # of the two halves
        return pictures
    return {job.run.run: (picture, len(jobs)) for job, picture in zip(jobs, pictures, strict=True)}


def _picture_finish(
    job: Job, loaded: Loaded, params: ImageParams, size: tuple[int, int], pictures: dict[str, tuple[Image.Image, int]]
) -> Finish:
    """Return the rest of the work on a picture of `size`: scaling and encoding. A job without a picture was cancelled."""
    if job.run.run not in pictures:
        return _raise_cancelled
    picture, batch_size = pictures[job.run.run]
    wanted = parameters.size(params.resolution)
    metadata = _metadata(job, loaded, str(params.format), wanted)
    metadata |= {"generated": {"resolution": f"{size[0]}x{size[1]}", "frames": 1, "fps": None}, "batch_size": batch_size}
    tags = file_tags(job, "Image")

    def finish() -> Output:
        job.begin("mux")
        extension = "jpg" if params.format is ImageFormat.JPEG else str(params.format)
        path = job.out_dir / f"output.{extension}"
        content_type = encode.write_image(path, sizing.scale_and_crop(picture.convert("RGB"), wanted), params.format, tags)
        job.step("mux", 1, 1)
        return Output((Produced(str(path), "output", content_type, *wanted),), metadata)

    return finish


def _raise_cancelled() -> Output:
    raise JobCancelled


def _render_clip(job: Job, entry: Model, params: VideoParams | AnimationParams, references: list[str]) -> Finish:
    clip = ClipFormat(parameters.size(params.resolution), parameters.frame_rate(params.fps), parameters.frames(params))
    size = sizing.model_size(entry.limits, clip.size)
    stills = _load_images(job, entry, references, size)
    windows = sizing.windows(entry.limits, clip.seconds)
    if len(windows) > 1 and entry.image_pipeline is None:
        max_s = entry.limits.frames / entry.limits.fps
        raise UnsupportedParameter(
            f"task_data.duration: {job.run.model} makes at most {max_s:.1f} s at a time, and takes no image to go on from; "
            f"ask for {max_s:.1f} s, or for a model that takes images"
        )
    cues = params.audio_cues if isinstance(params, VideoParams) else []
    if isinstance(params, AnimationParams) and params.loop:
        job.warnings.append(f"loop is not used: {job.run.model} makes no loops")
    loaded = _load(job, entry, "generating_video", *(["sound"] if cues else []), "mux")
    still_at = _stills_by_frame(stills, windows, entry)
    if len(still_at) < len(stills):
        job.warnings.append(f"{len(stills)} images do not fit into the clip: {len(still_at)} are used")
    if stills and "frame_index" not in inspect.signature(loaded.image_pipe.__call__).parameters:
        windows = sizing.windows(entry.limits, clip.seconds, list(still_at))  # so that each still is at the start or end of a window
    pictures: list[Image.Image] = []
    generator = _generator(job.seed)
    for number, window in enumerate(windows):
        here = {frame - window.first: still for frame, still in still_at.items() if window.first <= frame < window.first + window.frames}
        continues = bool(pictures) and 0 not in here
        if continues:
            here = {0: pictures[window.first], **here}
        arguments = _arguments(job, entry) | {"width": size[0], "height": size[1], "num_frames": window.frames, "generator": generator}
        arguments |= _image_arguments(_pipe(job, loaded, bool(here)), here, window.frames)
        rendered = _call(job, loaded, bool(here), arguments, (number, len(windows)))[0]
        pictures[window.first + continues :] = rendered[continues:]
    track = _sound_track(job, cues, clip) if cues else None
    metadata = _metadata(job, loaded, "mp4", clip.size) | {"duration": round(clip.seconds, 3), "fps": display_rate(clip.rate)}
    metadata["generated"] = {
        "resolution": f"{size[0]}x{size[1]}",
        "frames": len(pictures),
        "fps": entry.limits.fps,
        "windows": len(windows),
    }
    if track is not None:
        metadata["sample_rate"] = encode.CLIP_SAMPLE_RATE
    return lambda: Output(_encode_clip(job, pictures, entry.limits.fps, clip, track), metadata)


def _stills_by_frame(stills: list[Image.Image], windows: list[sizing.Window], entry: Model) -> dict[int, Image.Image]:
    """Return the stills by the frame of the clip at which each appears; of several for one frame, the last."""
    frames = windows[-1].first + windows[-1].frames
    return dict(zip(sizing.image_frames(len(stills), frames, entry.limits.frame_step), stills, strict=True))


def _encode_clip(job: Job, pictures: list[Image.Image], fps: float, clip: ClipFormat, track: Samples | None) -> tuple[Produced, ...]:
    """Write the pictures, rendered at `fps`, as an mp4 of the clip's frame rate with a poster."""
    job.begin("mux")
    path, poster_path = job.out_dir / "output.mp4", job.out_dir / "poster.jpg"
    tags = file_tags(job, "Clip")
    sources = sizing.source_frames(len(pictures), fps, clip.frames, clip.rate)
    with ClipWriter(path, clip, tags, track) as writer:
        planes, last = None, -1
        for frame, number in enumerate(sources):
            if planes is None or number != last:
                planes, last = encode.to_planes(sizing.scale_and_crop(pictures[number].convert("RGB"), clip.size)), number
            writer.add(planes)
            if frame == clip.frames // 3:
                encode.write_image(poster_path, encode.to_image(planes), ImageFormat.JPEG, tags)
            job.step("mux", frame + 1, clip.frames)
    return (
        Produced(str(path), "output", "video/mp4", *clip.size, clip.seconds),
        Produced(str(poster_path), "poster", "image/jpeg", *clip.size),
    )


def _load_images(job: Job, entry: Model, references: list[str], size: tuple[int, int]) -> list[Image.Image]:
    """Return the references as images of `size`. Raises UnsupportedParameter if the model accepts none, or needs one."""
    if references and entry.image_pipeline is None:
        raise UnsupportedParameter(f"task_data: {job.run.model} takes no images; leave them out, or ask for a model that does")
    if not references and entry.pipeline is None:
        raise UnsupportedParameter(f"task_data: {job.run.model} needs an image to begin with; give one, or ask for another model")
    return [sizing.scale_and_crop(images.load(each, job.input(each), size), size) for each in references]


def _image_arguments(pipe: Any, at: dict[int, Image.Image], frames: int) -> dict[str, Any]:
    """Return the image arguments of one window of `frames` frames; `at` maps frames of the window to images.

    Depending on what the pipeline accepts: an image at any frame, or at the first and last frame, or at the first alone.
    """
    if not at:
        return {}
    accepted = inspect.signature(pipe.__call__).parameters
    if "frame_index" in accepted:
        return {"image": list(at.values()), "frame_index": list(at)}
    if "last_image" in accepted and frames - 1 in at and len(at) > 1:
        return {"image": at[0], "last_image": at[frames - 1]}
    return {"image": at[0]}


# ── Sound ──


def _render_ambience(job: Job, entry: Model, params: AudioParams) -> Finish:
    if entry.limits.seconds is not None and params.duration > entry.limits.seconds:
        raise UnsupportedParameter(f"task_data.duration: {job.run.model} makes at most {entry.limits.seconds:g} s, got {params.duration:g}")
    loaded = _load(job, entry, "synthesizing_sound", "mux")
    samples, rate = _render_samples(job, loaded, _arguments(job, entry), params.duration)
    return _audio_finish(job, loaded, params, samples, rate, SOUND_LUFS)


def _render_samples(job: Job, loaded: Loaded, arguments: dict[str, Any], seconds: float) -> tuple[Samples, int]:
    """Return `seconds` of sound by a sound model, (n, channels), and the sample rate."""
    accepted = inspect.signature(loaded.pipe.__call__).parameters
    length = next(name for name in ("audio_end_in_s", "audio_length_in_s") if name in accepted)
    rendered = _call(job, loaded, False, arguments | {length: seconds, "output_type": "pt"})[0]  # (channels, n)
    samples = rendered.float().cpu().numpy().reshape(-1, rendered.shape[-1]).T
    rate = int(getattr(loaded.pipe.vae, "sampling_rate", None) or loaded.pipe.vocoder.config.sampling_rate)
    return np.ascontiguousarray(samples[: round(seconds * rate), :2], np.float32), rate


def _sound_track(job: Job, cues: list[str], clip: ClipFormat) -> Samples:
    """Return the cues' sound as long as the clip, one cue after another: by the sound model if its weights are here, else synthesized."""
    job.begin("sound")
    length = round(clip.frames * encode.CLIP_SAMPLE_RATE / clip.rate)
    sound = _model_sound(job, cues, clip.seconds / len(cues)) if job.run.sound else None
    if sound is None:
        job.warnings.append("the sound is the animatic's: no model for sound is on this worker's machine")
        scenes = [ambience.named_sounds(cue) or ("room",) for cue in cues]
        sound = ambience.bed(scenes, length, encode.CLIP_SAMPLE_RATE, np.random.default_rng([job.seed, 1]))
    bed = np.zeros((length, 2), np.float32)
    bed[: len(sound)] = sound[:length]
    job.step("sound", 1, 1)
    return loudness.normalize(bed, encode.CLIP_SAMPLE_RATE, BED_LUFS)


def _model_sound(job: Job, cues: list[str], seconds: float) -> Samples | None:
    """Return `seconds` of stereo sound for each cue by the run's sound model; None if the model's weights are missing."""
    assert job.run.sound is not None
    name, entry = job.run.sound
    try:
        loaded = model_cache.get(job, name, entry, job.device)
    except ModelUnavailable:
        return None
    parts = []
    for number, cue in enumerate(cues):
        # the task's own steps and guidance are those of the picture
        arguments = _defaults(entry) | {"prompt": cue, "generator": _generator(job.seed + number)}
        samples, rate = _render_samples(job, loaded, arguments, min(seconds, entry.limits.seconds or seconds))
        parts.append(encode.resample(np.repeat(samples, 2, axis=1) if samples.shape[1] == 1 else samples, rate, encode.CLIP_SAMPLE_RATE))
    return np.concatenate(parts)


def _render_speech(job: Job, entry: Model, params: AudioParams) -> Finish:
    tts.check(job, entry, params)
    loaded = _load(job, entry, "synthesizing_speech", "mux")
    samples, rate = tts.synthesize(job, loaded, params)
    return _audio_finish(job, loaded, params, samples, rate, tts.LUFS)


def _audio_finish(job: Job, loaded: Loaded, params: AudioParams, rendered: Samples, rendered_rate: int, lufs: float) -> Finish:
    """Return the rest of the work on a sound: resampling, setting the loudness, encoding."""
    rate, metadata, tags = params.sample_rate, _metadata(job, loaded, str(params.output_format), None), file_tags(job, "Sound")

    def finish() -> Output:
        job.begin("mux")
        path = job.out_dir / f"output.{params.output_format}"
        samples = loudness.normalize(encode.resample(rendered, rendered_rate, rate), rate, lufs)
        content_type = encode.write_sound(path, samples, rate, params.output_format, tags, lambda done, of: job.step("mux", done, of))
        seconds = len(samples) / rate
        measured = {"duration": round(seconds, 3), "sample_rate": rate, "channels": samples.shape[1]}
        return Output((Produced(str(path), "output", content_type, duration_s=seconds),), metadata | measured)

    return finish


# ── Loading and calling a model ──


def _load(job: Job, entry: Model, step_name: str, *later_stages: str) -> Loaded:
    """Announce the stages and return the model, loaded. `step_name` is what `current_step` shows while it denoises or speaks."""
    loaded = model_cache.is_loaded(job.run.model)
    stages = [*([] if loaded else ["load"]), *(["denoise"] if entry.languages else ["encode", "denoise", "decode"]), *later_stages]
    weights = _STAGE_WEIGHTS | model_cache.stage_seconds(job.run.model)
    job.plan(*(Stage(each, step_name if each == "denoise" else _STEP_NAMES[each], max(weights[each], 0.001)) for each in stages))
    if not loaded:
        job.begin("load")
    return model_cache.get(job, job.run.model, entry, job.device)


def _pipe(job: Job, loaded: Loaded, with_images: bool) -> Any:
    pipe = loaded.image_pipe if with_images else loaded.pipe
    if pipe is None:
        raise InternalFault(f"{job.run.model} has no pipeline {'with' if with_images else 'without'} images")
    return pipe


def _arguments(job: Job, entry: Model) -> dict[str, Any]:
    """Return the call arguments that all tasks have: prompt and generator, and the task's own values before the model's defaults."""
    params = job.params
    own = {"num_inference_steps": params.steps, "guidance_scale": params.guidance_scale, "negative_prompt": params.negative_prompt or None}
    return {
        "prompt": prompts.prompt(params),
        "generator": _generator(job.seed),
        **_defaults(entry),
        **{name: value for name, value in own.items() if value is not None},
    }


def _defaults(entry: Model) -> dict[str, Any]:
    """Return the model's default call arguments."""
    defaults = {"num_inference_steps": entry.defaults.steps, "guidance_scale": entry.defaults.guidance, **entry.call}
    return {name: value for name, value in defaults.items() if value is not None}


def _generator(seed: int) -> torch.Generator:
    """Return a generator on the CPU, whatever the device, so that a seed gives the same noise everywhere."""
    return torch.Generator("cpu").manual_seed(seed)


def _call(
    job: Job,
    loaded: Loaded,
    with_images: bool,
    arguments: dict[str, Any],
    part: tuple[int, int] = (0, 1),
    in_halves: Callable[[], Any] | None = None,
) -> Any:
    """Return what the pipeline returns for the arguments that it accepts, or what `in_halves` returns after running out of memory.

    `part` is the number of this call, and how many calls the run makes. Raises OutOfMemory after the last step of the OOM fallback.
    """
    pipe = _pipe(job, loaded, with_images)
    accepted = inspect.signature(pipe.__call__).parameters
    unknown = sorted(arguments.keys() - accepted.keys() - {"negative_prompt", *(("width", "height") if "image" in arguments else ())})
    if unknown:
        raise InternalFault(f"{type(pipe).__name__} takes no {', '.join(unknown)}: the entry of {job.run.model} is wrong")
    if "negative_prompt" in arguments and "negative_prompt" not in accepted:
        job.warn(f"negative_prompt is not used: {job.run.model} takes none")
    if "frame_rate" in accepted:
        arguments["frame_rate"] = loaded.entry.limits.fps
    options = {name: value for name, value in arguments.items() if name in accepted}
    if "output_type" in accepted and "output_type" not in options:
        options["output_type"] = "pil"
    generators = options["generator"] if isinstance(options["generator"], list) else [options["generator"]]
    states = [each.get_state() for each in generators]

    def call() -> Any:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        with PipelineHooks(job, pipe, part, loaded, arguments) as hooks:
            answer = pipe(**options, return_dict=False)
        loaded.stage_seconds |= hooks.stage_seconds
        return answer[0]

    return oom.with_fallback(job, job.run.model, pipe, call, in_halves)


def _metadata(job: Job, loaded: Loaded, file_format: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the result's metadata: the common fields, and which weights, device and libraries rendered it."""
    import diffusers
    import transformers

    entry = loaded.entry
    found = result_metadata(job, file_format, size)
    found |= {
        "revision": entry.weights.revision if entry.weights else None,
        "licence": entry.licence,
        "device": job.device,
        "dtype": "float32" if job.device == "cpu" else str(entry.dtype),
        "batch_size": 1,
        "versions": {"torch": str(torch.__version__), "diffusers": diffusers.__version__, "transformers": transformers.__version__},
    }
    if entry.first_block_cache is not None:
        found["lossy"] = [f"first_block_cache {entry.first_block_cache:g}"]
    if steps := _arguments(job, entry).get("num_inference_steps"):
        found["steps"] = steps
    return found
