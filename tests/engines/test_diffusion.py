"""Every kind of pipeline renders the request: the same result for a seed, another for another prompt; a cancel leaves no trace."""

from __future__ import annotations

import functools
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from movieq.errors import InvalidInput, ModelUnavailable, OutOfMemory, UnsupportedParameter
from movieq.tasks.params import AudioFormat
from tests.engines.conftest import ENTRIES, IMAGES, SOUNDS, SPEAKERS, Result, Studio, difference, task_of
from workers import protocol
from workers.child.diffusion import engine as diffusion
from workers.child.diffusion import loading, model_cache, sounds
from workers.child.job import JobCancelled
from workers.child.media import encode, loudness
from workers.protocol import Done, FromChild, Note, Step

pytestmark = [
    # warnings of the libraries about each other
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SECOND = "https://a.example/1.png"
FIRST = "https://a.example/0.png"


def asked(name: str, prompt: str = "a lighthouse in a storm") -> dict[str, Any]:
    """Return the parameters of a small task for the model."""
    match task_of(name):
        case "generate_image":
            return {"prompt": prompt, "resolution": "96x64", "format": "png"}
        case "process_audio":
            return {"text": f"{prompt}. All hands!", "output_format": "wav"} if name in SPEAKERS else {
                "prompt": prompt, "duration": 2, "output_format": "wav"
            }  # fmt: skip
        case _:
            return {"prompt": prompt, "duration": 1, "resolution": "96x64", "fps": 24}


def with_images(name: str) -> dict[str, Any]:
    """Return the parameters with the image that the model needs, if it needs one."""
    return {"storyboard_images": [FIRST]} if "pipeline" not in ENTRIES[name] else {}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_file_is_what_was_asked_for_and_its_metadata_says_what_was_rendered(studio: Studio, stills: dict[str, Path], name: str) -> None:
    result = studio.render(name, stills, **asked(name), **with_images(name))
    metadata = result.output.metadata
    assert (metadata["engine"], metadata["model"], metadata["seed"], metadata["device"]) == ("diffusers", name, 1, "cpu")
    assert metadata["versions"]["torch"] == torch.__version__
    done = Done("run", result.output.files, metadata)
    assert protocol.from_child_decoder.decode(protocol.frame(done)[protocol.HEADER.size :]) == done, "plain data crosses the pipe"
    if name in SOUNDS:
        assert metadata["sample_rate"] == 44100
        assert abs(len(result.decoded) / 44100 - metadata["duration"]) < 0.01
        if name == "stable_audio":
            assert metadata["duration"] == 2
        return
    if name in IMAGES:
        assert result.decoded.shape == (1, 64, 96, 3)
        assert metadata["generated"] == {"resolution": "80x48", "frames": 1, "fps": None}
        return
    with av.open(str(result.path)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height, stream.frames) == (Fraction(24), 96, 64, 24)
        assert stream.codec_context.pix_fmt == "yuv420p"
    generated = metadata["generated"]
    width, height = map(int, generated["resolution"].split("x"))
    limits = studio.entry(name).limits
    assert width % limits.sides == height % limits.sides == 0
    assert width * height <= 4096
    assert generated["frames"] >= limits.fps
    assert generated["fps"] == limits.fps


@pytest.mark.parametrize("name", ENTRIES)
def test_a_seed_gives_the_same_bytes_and_another_prompt_another_result(studio: Studio, stills: dict[str, Path], name: str) -> None:
    first, again, other, seeded = (
        studio.render(name, stills, **asked(name, prompt), **with_images(name), seed=seed)
        for prompt, seed in [
            ("a lighthouse", 1),
            ("a lighthouse", 1),
            ("12 ZEBRAS JUMP; QUIZ! (90%) & more xylophones, jazz, waltz", 1),
            ("a lighthouse", 2),
        ]
    )
    assert first.path.read_bytes() == again.path.read_bytes()
    assert difference(first.decoded, other.decoded) >= 2 / 255
    assert difference(first.decoded, seeded.decoded) >= 2 / 255


@pytest.mark.parametrize("name", ENTRIES)
def test_stages_come_in_their_order_and_steps_never_fall(studio: Studio, stills: dict[str, Path], name: str) -> None:
    result = studio.render(name, stills, **asked(name), **with_images(name))
    stages = ["load", "denoise", "mux"] if name in SPEAKERS else ["load", "encode", "denoise", "decode", "mux"]
    assert result.stages == stages
    again = studio.render(name, stills, **asked(name), **with_images(name))
    assert again.stages == stages[1:], "it is in memory already"
    for stage in stages:
        steps = [each.step / each.steps for each in result.sent if isinstance(each, Step) and each.stage == stage]
        assert steps == sorted(steps)
    assert [each.step == each.steps for each in result.sent if isinstance(each, Step) and each.stage == "denoise"][-1]


@pytest.mark.parametrize("name", ["sd", "flux", "ltx_condition", "wan", "stable_audio"])
@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_run_that_is_cancelled_in_any_stage_stops_there_and_the_next_is_clean(studio: Studio, name: str, stage: str) -> None:
    fresh = studio.render(name, **asked(name))
    sent: list[FromChild] = []

    def receive(message: FromChild) -> None:
        sent.append(message)
        if isinstance(message, Step) and message.stage == stage:
            studio.flag.set()

    with pytest.raises(JobCancelled):
        diffusion.render(studio.job(name, receive, **asked(name, "something else")))
    stages = [each.stage for each in sent if isinstance(each, Step)]
    assert stages[-1] == stage
    assert stages.count(stage) == 1, "it stopped before the next step"
    assert studio.render(name, **asked(name)).path.read_bytes() == fresh.path.read_bytes()


@pytest.mark.parametrize("cleaned", [True, False])
def test_the_step_cache_of_a_cancelled_run_does_not_reach_the_next(studio: Studio, monkeypatch: pytest.MonkeyPatch, cleaned: bool) -> None:
    entry = studio.entry("flux", first_block_cache=1e9)
    fresh = studio.render("flux", entry=entry, **asked("flux"))
    if not cleaned:  # the check can fail
        monkeypatch.setattr("workers.child.diffusion.hooks.reset", lambda pipe: None)

    def cancel(message: FromChild) -> None:
        if isinstance(message, Step) and message.stage == "denoise" and message.step:
            studio.flag.set()

    with pytest.raises(JobCancelled):
        diffusion.render(studio.job("flux", cancel, entry=entry, **asked("flux", "something else"), seed=9))
    after = studio.render("flux", entry=entry, **asked("flux"))
    assert (after.path.read_bytes() == fresh.path.read_bytes()) is cleaned
    assert after.output.metadata["lossy"] == ["first_block_cache 1e+09"]


# ── Images, windows, sound ──


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "z_image"])
def test_a_reference_image_shows_in_the_result(studio: Studio, stills: dict[str, Path], name: str) -> None:
    without = studio.render(name, **asked(name))
    first, second = (studio.render(name, stills, **asked(name), reference_images=[each]) for each in (FIRST, SECOND))
    assert difference(first.decoded, without.decoded) >= 2 / 255
    assert difference(first.decoded, second.decoded) >= 0.5 / 255


def test_in_a_continuous_shot_storyboard_images_appear_at_their_times(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded_calls(monkeypatch, "LTXConditionPipeline", "WanImageToVideoPipeline")
    given = {"storyboard_images": [FIRST, SECOND], "continuous": True}
    studio.render("ltx_condition", stills, **asked("ltx_condition"), **given)
    assert [[each.frame_index for each in call["conditions"]] for call in calls] == [[0, 8]]
    calls.clear()
    studio.render("ltx_condition", stills, **{**asked("ltx_condition"), "duration": 2}, **given)
    assert [[each.frame_index for each in call["conditions"]] for call in calls] == [[0, 16], [0]], (
        "the second is in the frames that both windows share"
    )
    calls.clear()
    result = studio.render("wan_i2v", stills, **asked("wan_i2v"), **given)
    assert [(call["num_frames"], sorted(call.keys() & {"image", "last_image"})) for call in calls] == [
        (9, ["image", "last_image"]),
        (5, ["image"]),
    ]
    assert calls[0]["last_image"].tobytes() == calls[1]["image"].tobytes(), "from the first to the second, and on from there"
    assert result.output.metadata["generated"]["frames"] == 13


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("name", ["ltx_condition", "wan_i2v"])
def test_each_image_of_a_storyboard_changes_the_clip(studio: Studio, stills: dict[str, Path], name: str, continuous: bool) -> None:
    """Not read off the arguments: a pipeline may take an image and ignore it."""
    task = {**asked(name), "duration": 2, "continuous": continuous}
    one, two, other = (studio.render(name, stills, **task, storyboard_images=each) for each in ([FIRST], [FIRST, SECOND], [FIRST, FIRST]))
    assert difference(one.decoded, two.decoded) >= 1 / 255
    assert difference(other.decoded, two.decoded) >= 1 / 255


@pytest.mark.parametrize("name", ["ltx_condition", "wan_i2v"])
def test_each_image_begins_a_shot_with_an_equal_share_of_the_time(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = recorded_calls(monkeypatch, ENTRIES[name]["image_pipeline"])
    task = {**asked(name), "duration": 3}
    result = studio.render(name, stills, **task, storyboard_images=[FIRST, SECOND, FIRST])
    assert len(calls) == 3
    for call in calls:
        assert "last_image" not in call
        assert [each.frame_index for each in call.get("conditions", [])] in ([], [0])
    assert result.output.metadata["generated"]["frames"] >= 36
    assert result.decoded.shape[0] == 72
    assert "warnings" not in result.output.metadata
    first = [(call["conditions"][0].image if "conditions" in call else call["image"]).tobytes() for call in calls]
    assert first[0] == first[2] != first[1], "no shot begins with the last picture of the one before"


def test_a_model_that_leads_to_no_image_says_that_it_cannot_make_one_shot(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = studio.entry("wan_i2v", images="start")
    calls = recorded_calls(monkeypatch, "WanImageToVideoPipeline")
    given = {"storyboard_images": [FIRST, SECOND], "continuous": True}
    result = studio.render("wan_i2v", stills, entry=entry, **asked("wan_i2v"), **given)
    assert [sorted(call.keys() & {"image", "last_image"}) for call in calls] == [["image"], ["image"]]
    assert any("each image begins a shot of its own" in each for each in result.output.metadata["warnings"])


def recorded_calls(monkeypatch: pytest.MonkeyPatch, *pipelines: str) -> list[dict[str, Any]]:
    """Record the arguments of every call of these pipeline classes."""
    calls: list[dict[str, Any]] = []
    for name in pipelines:
        cls = loading.library_class(name)

        @functools.wraps(cls.__call__)  # the engine reads its signature
        def recorded(self: Any, *args: Any, call: Any = cls.__call__, **options: Any) -> Any:
            calls.append(options)
            return call(self, *args, **options)

        monkeypatch.setattr(cls, "__call__", recorded)
    return calls


@pytest.mark.parametrize("name", ["ltx_condition", "wan_i2v"])
def test_a_clip_longer_than_a_window_continues_from_its_last_frame(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = recorded_calls(monkeypatch, ENTRIES[name]["image_pipeline"])
    task = {**asked(name), "duration": 3, "storyboard_images": [FIRST]}
    result = studio.render(name, stills, **task)
    generated = result.output.metadata["generated"]
    assert generated["windows"] == len(calls) == (4 if name == "ltx_condition" else 3)
    assert generated["frames"] >= 36
    assert result.decoded.shape[0] == 72
    assert all("conditions" in call or "image" in call for call in calls)
    if name == "ltx_condition":
        assert [len(call["conditions"][0].video or []) for call in calls] == [0, 9, 9, 9]
    assert result.stages == ["load", "encode", "denoise", "decode", "mux"]
    assert result.path.read_bytes() == studio.render(name, stills, **task).path.read_bytes()


def test_sound_cues_are_rendered_by_the_sound_model_and_mixed_under_the_picture(studio: Studio, folder: Path) -> None:
    sound = ("stable_audio", studio.entry("stable_audio"))
    modelled, other = (
        studio.render("ltx", **asked("ltx"), audio_cues=cues, sound=sound) for cues in (["sea", "gulls"], ["a train", "bells"])
    )
    assert "warnings" not in modelled.output.metadata
    assert modelled.stages[-2:] == ["sound", "mux"]
    for result in (modelled, other):
        with av.open(str(result.path)) as container:
            (audio,) = container.streams.audio
            samples = np.concatenate([frame.to_ndarray() for frame in container.decode(audio)], axis=1)
        assert abs(samples.shape[1] / 48_000 - 1) < 0.05
        assert abs(loudness.lufs(samples.T, 48_000) - sounds.BED_LUFS) < 3
    absent = studio.entry("stable_audio", weights={"repository": "team/never-pulled", "revision": "0" * 40})
    synthesized = studio.render("ltx", **asked("ltx"), audio_cues=["sea"], sound=("absent", absent))
    assert synthesized.output.metadata["warnings"] == ["the sound is the animatic's: no model for sound is on this worker's machine"]


def test_a_line_is_spoken_in_the_voice_of_a_sample_else_of_its_own_first_sentence(
    studio: Studio, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CsmProcessor

    contexts: list[Any] = []
    apply = CsmProcessor.apply_chat_template

    def recorded(self: Any, turns: Any, **options: Any) -> Any:
        contexts.append(turns)
        return apply(self, turns, **options)

    monkeypatch.setattr(CsmProcessor, "apply_chat_template", recorded)
    tones = {f"https://a.example/{hertz}.wav": tone(folder / f"{hertz}.wav", hertz) for hertz in (110, 880)}
    low, high = (studio.render("csm", tones, **asked("csm"), character_voice_profile=each) for each in tones)
    assert difference(low.decoded, high.decoded) >= 2 / 255
    samples = [turns[0]["content"][1]["audio"] for turns in contexts]
    assert len(samples) == 4, "two sentences each"
    assert all(len(each) == 20 * 24_000 for each in samples)
    assert samples[0] is samples[1]
    assert "of character_voice_profile the first 20 s are used" in low.output.metadata["warnings"]
    contexts.clear()
    studio.render("csm", **asked("csm"))
    assert [len(turns) for turns in contexts] == [1, 2]
    assert contexts[1][0]["content"][0]["text"] == "a lighthouse in a storm."


def tone(path: Path, hertz: int) -> Path:
    """Write a sound file with 21 seconds of a tone; return its path."""
    samples = np.sin(np.arange(21 * 16_000) * 2 * np.pi * hertz / 16_000).astype(np.float32)[:, None]
    encode.write_sound(
        path,
        samples,
        16_000,
        AudioFormat.WAV,
        encode.Tags(title="", prompt="", seed=0, engine="", model="", version="", task=""),
        lambda *_: None,
    )
    return path


def test_a_voice_sample_without_sound_is_refused(studio: Studio, folder: Path) -> None:
    (folder / "broken.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")
    with pytest.raises(InvalidInput, match=r"https://a.example/v.wav: .*sound"):
        studio.render(
            "csm", {"https://a.example/v.wav": folder / "broken.wav"}, **asked("csm"), character_voice_profile="https://a.example/v.wav"
        )


# ── What is refused or ignored ──


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("ltx", {"storyboard_images": [FIRST]}, "ltx takes no images"),
        ("wan", {"reference_images": [FIRST]}, "wan takes no images"),
        ("wan_i2v", {}, "wan_i2v begins with an image"),
        ("ltx", {"duration": 3}, "makes at most 1.4 s, and takes no image to go on from"),
        ("stable_audio", {"duration": 11}, "at most 10 s"),
        ("vits", {"character_voice_profile": FIRST}, "cannot take on that of a sample"),
        ("vits", {"language": "de"}, 'speaks en, got "de"'),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name_before_anything_is_loaded(
    studio: Studio, stills: dict[str, Path], name: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedParameter, match=said):
        studio.render(name, stills, **{**asked(name), **given})
    assert not model_cache.is_loaded(name)


def test_parameters_that_a_model_ignores_are_named_in_the_warnings(
    studio: Studio, stills: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(name: str, **given: Any) -> list[str]:
        return list(studio.render(name, stills, **asked(name), **given).output.metadata["warnings"])

    assert warned("wan", loop=True) == ["loop is not used: wan makes no loops"]
    assert len(warned("vits", emotion="sad", pace="slow", background_noise="rain")) == 3
    assert warned("ltx_condition", storyboard_images=[FIRST, SECOND, FIRST], continuous=True) == [
        "3 images do not fit into the clip: 2 are used"
    ]
    calls = recorded_calls(monkeypatch, "LTXPipeline", "StableAudioPipeline")
    sound = ("stable_audio", studio.entry("stable_audio"))
    studio.render("ltx", **asked("ltx"), audio_cues=["sea"], sound=sound, steps=1, negative_prompt="fog")
    assert [call["num_inference_steps"] for call in calls] == [1, 4], "the task's steps are for the picture, not for the sound"
    assert "negative_prompt" not in calls[-1]


TRUE_CFG: dict[str, Any] = {"names": {"guidance_scale": "true_cfg_scale"}, "ignores": []}


@pytest.mark.parametrize(
    ("name", "changes", "given", "warned"),
    [
        ("sd", {}, {"guidance_scale": 1.0, "negative_prompt": "fog"}, "negative_prompt is not used: sd reads it only with"),
        ("sd", {}, {"guidance_scale": 6.0, "negative_prompt": "fog"}, None),
        ("z_image", {}, {"guidance_scale": 0.0, "negative_prompt": "fog"}, "negative_prompt is not used"),
        ("z_image", {}, {"guidance_scale": 4.0, "negative_prompt": "fog"}, None),
        ("flux", TRUE_CFG, {"guidance_scale": 1.0, "negative_prompt": "fog"}, "negative_prompt is not used"),
        ("flux", TRUE_CFG, {"guidance_scale": 4.0, "negative_prompt": "fog"}, None),
        ("flux", {}, {"guidance_scale": 4.0}, "guidance_scale is not used: flux has no use for it"),
    ],
)  # fmt: skip
def test_a_parameter_changes_the_result_or_is_named_in_the_warnings(
    studio: Studio, name: str, changes: dict[str, Any], given: dict[str, Any], warned: str | None
) -> None:
    """Each is rendered with the last parameter and without it."""
    entry = studio.entry(name, **changes)
    last = list(given)[-1]
    with_it = studio.render(name, entry=entry, **asked(name), **given)
    without = studio.render(name, entry=entry, **asked(name), **{key: value for key, value in given.items() if key != last})
    warnings = with_it.output.metadata.get("warnings", [])
    if warned is None:
        assert not warnings
        assert difference(with_it.decoded, without.decoded) > 1 / 255
    else:
        assert any(each.startswith(warned) for each in warnings)
        assert with_it.path.read_bytes() == without.path.read_bytes()


def test_a_models_own_negative_prompt_is_used_where_the_task_gives_none(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_calls(monkeypatch, "StableDiffusionPipeline")
    entry = studio.entry("sd", defaults={"steps": 2, "negative_prompt": "blurred"})
    for own in (None, "fog"):
        assert "warnings" not in studio.render("sd", entry=entry, **asked("sd"), negative_prompt=own).output.metadata
    assert [call["negative_prompt"] for call in calls] == ["blurred", "fog"]


def test_a_voice_sample_for_a_model_that_has_one_voice_is_refused_whatever_its_entry_says(studio: Studio, folder: Path) -> None:
    sample = {FIRST: tone(folder / "tone.wav", 110)}
    with pytest.raises(ModelUnavailable, match="voices: a model of VITS cannot imitate a voice"):
        studio.render("vits", sample, entry=studio.entry("vits", voices=True), **asked("vits"), character_voice_profile=FIRST)


def test_a_line_without_a_letter_that_the_model_knows_is_refused(studio: Studio) -> None:
    with pytest.raises(InvalidInput, match="knows none of its letters"):
        studio.render("vits", text="\u4f60\u597d", output_format="wav")


@pytest.mark.parametrize("change", [{"weights": {"repository": "/nowhere"}}, {"pipeline": "NoSuchPipeline"}, {"pipeline": "FluxPipeline"}])
def test_a_model_that_cannot_be_loaded_says_why(studio: Studio, change: dict[str, Any]) -> None:
    with pytest.raises(ModelUnavailable):
        studio.render("sd", entry=studio.entry("sd", image_pipeline=None, **change), **asked("sd"))


def test_weights_that_are_not_safetensors_are_refused(studio: Studio, folder: Path, folders: Any) -> None:
    import shutil

    shutil.copytree(folders("sd"), folder / "pickled")
    for file in (folder / "pickled" / "unet").glob("*.safetensors"):
        torch.save({}, file.with_name("diffusion_pytorch_model.bin"))
        file.unlink()
    with pytest.raises(ModelUnavailable, match="safetensors"):
        studio.render("sd", entry=studio.entry("sd", weights={"repository": str(folder / "pickled")}), **asked("sd"))


# ── Memory ──


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Make the decoder run out of memory this many times before it works."""
    from diffusers import AutoencoderKL

    left = [times]
    decode = AutoencoderKL.decode

    def decoded(self: Any, *args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return decode(self, *args, **options)

    monkeypatch.setattr(AutoencoderKL, "decode", decoded)
    return left


def notes(result: Result) -> list[str]:
    return [each.text for each in result.sent if isinstance(each, Note)]


def test_out_of_memory_falls_back_step_by_step_and_renders_what_was_asked_for(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.render("ltx", **asked("ltx"))
    whole = studio.render("sd", **asked("sd"))
    failing(monkeypatch, 2)
    result = studio.render("sd", **asked("sd"))
    assert notes(result) == ["out of memory: other models were unloaded", "out of memory: pictures are decoded in tiles"]
    assert [each.step for each in result.sent if isinstance(each, Step) and each.stage == "denoise"].count(4) == 1, "it denoised once"
    assert not model_cache.is_loaded("ltx")
    assert result.decoded.shape == whole.decoded.shape
    assert difference(result.decoded, whole.decoded) < 0.02
    assert result.output.metadata["warnings"] == notes(result)


def test_when_no_fallback_suffices_the_task_fails_as_out_of_memory_and_the_next_one_can_be_rendered(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = studio.render("sd", **asked("sd"))
    left = failing(monkeypatch, 9)
    with pytest.raises(OutOfMemory, match="tried to allocate"):
        studio.render("sd", **asked("sd"))
    left[0] = 0
    assert studio.render("sd", **asked("sd")).path.read_bytes() == whole.path.read_bytes(), "nothing of the fallback is left"
