"""The animatic engine in the process of the test: what it renders for every task type. The engine process is in test_engine_process.py."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from PIL import Image, ImageDraw

from movieq.errors import EngineUnavailable, InputUnavailable, InvalidInput, UnsupportedParameter
from tests.bench import bench_animatic
from workers.child.animatic import cutout
from workers.child.animatic import engine as animatic
from workers.child.job import Flag, Job, JobCancelled, Output
from workers.child.media import images, loudness
from workers.protocol import FromChild, Plan, Run, Step

Pixels = npt.NDArray[np.uint8]
Render = Callable[..., Output]

speaks = pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="the extra `speech` is not installed")


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """Render a task with the animatic in a folder of its own; small unless the test says otherwise."""
    count = 0

    def render(
        task_type: str, *, seed: int = 7, inputs: dict[str, Path] | None = None, metadata: dict[str, Any] | None = None, **params: Any
    ) -> Output:
        nonlocal count
        count += 1
        out_dir = tmp_path / f"out{count}"
        out_dir.mkdir()
        if task_type in ("generate_video", "render_animation"):
            params = {"duration": 1, "resolution": "320x180"} | params
        paths = {reference: str(path) for reference, path in (inputs or {}).items()}
        run = Run("run", "task-1", "project", task_type, "animatic", "animatic", params, metadata or {}, paths, seed, str(out_dir))
        return animatic.render(Job(run, lambda message: None, Flag()))

    return render


def output_path(output: Output) -> Path:
    return next(Path(file.path) for file in output.files if file.role == "output")


def frames(output: Output) -> list[Pixels]:
    """Return the clip's frames as grey, (h, w)."""
    with av.open(str(output_path(output))) as container:
        return [np.asarray(frame.to_ndarray(format="gray"), np.uint8) for frame in container.decode(video=0)]


def samples(path: Path) -> tuple[npt.NDArray[np.float32], int]:
    """Return the samples, (n, channels), and their rate."""
    with av.open(str(path)) as container:
        decoded = list(container.decode(audio=0))
        resampler = av.AudioResampler("fltp")
        parts = [out.to_ndarray() for frame in decoded for out in resampler.resample(frame)]
    return np.asarray(np.concatenate(parts, axis=1).T, np.float32), decoded[0].sample_rate


def drawing(size: tuple[int, int] = (640, 360), seed: int = 1) -> Image.Image:
    """Return a picture with detail everywhere, like a storyboard image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(30, 226, (18, 32, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(coarse)
    for _ in range(60):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        canvas.ellipse((x, y, x + size[0] / 12, y + size[0] / 12), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return coarse


@pytest.fixture
def board(tmp_path: Path) -> dict[str, Path]:
    """Three storyboard images."""
    paths = {f"https://cdn.example/{number}.jpg": tmp_path / f"board{number}.jpg" for number in range(3)}
    for seed, path in enumerate(paths.values()):
        drawing(seed=seed).save(path, quality=90)
    return paths


# -- generate_video


@pytest.mark.parametrize(
    ("fps", "rate", "duration"),
    [
        (24, Fraction(24), 2),
        (23.976, Fraction(24000, 1001), 3),
        ("30000/1001", Fraction(30000, 1001), 1.5),
        (60, Fraction(60), 1),
        (1, Fraction(1), 3),
    ],
)
def test_a_clip_has_exactly_the_length_and_frame_rate_asked_for(
    render: Render, board: dict[str, Path], fps: Any, rate: Fraction, duration: float
) -> None:
    output = render("generate_video", storyboard_images=list(board), inputs=board, fps=fps, duration=duration, audio_cues=["rain"])
    with av.open(str(output_path(output))) as container:
        video = container.streams.video[0]
        assert video.average_rate == rate
        assert video.duration is not None
        assert video.time_base is not None
        assert container.duration is not None
        assert abs(video.duration * video.time_base - Fraction(duration)) <= 1 / rate
        assert abs(container.duration / av.time_base - duration) <= 1 / rate
        assert sum(1 for _ in container.decode(video)) == output.metadata["generated"]["frames"] == round(Fraction(duration) * rate)


def test_a_clip_is_high_profile_bt709_with_stereo_aac_and_its_index_first(render: Render, board: dict[str, Path]) -> None:
    output = render("generate_video", storyboard_images=list(board), inputs=board, audio_cues=["rain"])
    raw = output_path(output).read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")
    with av.open(str(output_path(output))) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.profile, codec.pix_fmt) == ("h264", "High", "yuv420p")
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
        audio = container.streams.audio[0]
        assert (audio.codec_context.name, audio.rate, audio.layout.name) == ("aac", 48000, "stereo")


def test_without_cues_a_clip_has_no_sound(render: Render) -> None:
    with av.open(str(output_path(render("generate_video", prompt="A storm")))) as container:
        assert len(container.streams.audio) == 0


def test_every_storyboard_image_is_seen_in_its_turn(render: Render, tmp_path: Path) -> None:
    inputs = {}
    for name, grey in (("a", 60), ("b", 120), ("c", 190)):
        inputs[name] = tmp_path / f"{name}.png"
        Image.new("RGB", (320, 180), (grey, grey, grey)).save(inputs[name])
    output = render("generate_video", storyboard_images=["b", "a", "c"], inputs=inputs, duration=3, captions=False, camera_angle="static")
    middles = [float(frame[80:100, 150:170].mean()) for frame in frames(output)]
    assert [round(middles[i]) for i in (12, 36, 60)] == pytest.approx([120, 60, 190], abs=4)


def test_the_slate_says_animatic_even_without_captions(render: Render, board: dict[str, Path]) -> None:
    with_captions, without = (
        frames(render("generate_video", prompt="The keeper climbs", storyboard_images=list(board), inputs=board, captions=captions))[0]
        for captions in (True, False)
    )
    assert np.array_equal(with_captions[:8] > 120, without[:8] > 120)
    assert (without[:8] > 120).any()
    assert (np.abs(with_captions[140:175].astype(int) - without[140:175]) > 40).mean() > 0.05


def test_the_frame_counter_counts(render: Render) -> None:
    output = render("generate_video", prompt="x", camera_angle="static", resolution="640x360", captions=False)
    first, second = frames(output)[:2]
    changed = np.abs(first[:14].astype(int) - second[:14]) > 40
    assert changed.any()
    assert not changed[:, : 640 * 3 // 4].any()


def test_colours_are_those_of_the_still(render: Render, tmp_path: Path) -> None:
    path = tmp_path / "colours.png"
    own = [(200, 40, 30), (40, 180, 60), (40, 60, 200), (220, 200, 60), (128, 128, 128)]
    still = Image.new("RGB", (320, 180))
    for index, colour in enumerate(own):
        still.paste(colour, (index * 64, 0, index * 64 + 64, 180))
    still.save(path)
    output = render("generate_video", storyboard_images=["c"], inputs={"c": path}, camera_angle="static", captions=False)
    with av.open(str(output_path(output))) as container:
        frame = next(container.decode(video=0)).reformat(format="rgb24", src_colorspace="ITU709", dst_color_range="JPEG").to_ndarray()
    for index, colour in enumerate(own):
        shown = frame[85:95, index * 64 + 24 : index * 64 + 40].reshape(-1, 3).mean(axis=0)
        assert np.abs(shown - colour).max() < 5, (colour, shown)


def test_a_clip_without_stills_moves_a_painting(render: Render) -> None:
    shown = frames(render("generate_video", prompt="A city at night", captions=False))
    assert shown[0][20:].std() > 10
    assert np.abs(shown[0][20:].astype(int) - shown[-1][20:]).mean() > 2


def test_a_seed_gives_the_same_bytes_and_another_one_others(render: Render, board: dict[str, Path]) -> None:
    digests = [
        hashlib.sha256(
            output_path(
                render(
                    "generate_video",
                    seed=seed,
                    prompt="x",
                    storyboard_images=list(board),
                    inputs=board,
                    audio_cues=["rain"],
                    camera_angle="handheld",
                )
            ).read_bytes()
        ).hexdigest()
        for seed in (5, 5, 6)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_metadata_says_what_was_rendered_and_by_what(render: Render) -> None:
    output = render("generate_video", prompt="A storm", seed=99, fps="24000/1001", camera_angle="sideways somehow", lighting="plaid")
    metadata = output.metadata
    assert metadata["generated"] == {"resolution": "320x180", "frames": 24, "fps": 23.976}
    assert (metadata["engine"], metadata["model"], metadata["seed"], metadata["format"]) == ("animatic", "animatic", 99, "mp4")
    assert (metadata["resolution"], metadata["fps"], metadata["duration"]) == ("320x180", 23.976, 1.001)
    assert [warning.split()[0] for warning in metadata["warnings"]] == ["lighting", "camera_angle"]
    with av.open(str(output_path(output))) as container:
        assert container.metadata["title"] == "Animatic"
        said = msgspec.json.decode(container.metadata["comment"])
    assert (said["engine"], said["prompt"], said["seed"]) == ("animatic", "A storm", 99)


def test_there_is_a_poster_of_the_clips_size(render: Render) -> None:
    output = render("generate_video", prompt="A storm")
    poster = next(file for file in output.files if file.role == "poster")
    with Image.open(poster.path) as image:
        assert (image.format, image.size) == ("JPEG", (320, 180))


@pytest.mark.parametrize("resolution", ["64x64", "64x640", "640x64", "66x98", "360x640"])
@pytest.mark.parametrize("angle", ["dutch", "handheld", "close-up, pan left"])
def test_frames_of_any_shape_are_filled(render: Render, tmp_path: Path, resolution: str, angle: str) -> None:
    white = tmp_path / "white.png"
    Image.new("RGB", (300, 200), "white").save(white)
    output = render(
        "generate_video",
        storyboard_images=["w"],
        inputs={"w": white},
        resolution=resolution,
        camera_angle=angle,
        fps=6,
        character_positions=["A: left"],
        prompt="A",
    )
    last = frames(output)[-1]
    assert (last[len(last) // 3 : len(last) // 2] > 60).all()  # neither a black corner nor a hole; the blur beside a still is darker


@pytest.mark.slow  # the seconds that it takes are in tests/bench/bench_animatic.py
def test_seven_seconds_of_full_hd_take_less_than_400_mib() -> None:
    assert bench_animatic.sample(next(case for case in bench_animatic.CASES if case.name == "7 s 1080p24, 3 stills")).peak_mib <= 400


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_stills() -> None:
    few, many = (bench_animatic.sample(next(case for case in bench_animatic.CASES if f"{n} still" in case.name)) for n in (3, 32))
    assert many.peak_mib < few.peak_mib + 40


# -- stills of every kind


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cmyk() -> bytes:
    return encoded(drawing().convert("CMYK"), "JPEG")


def sixteen_bits() -> bytes:
    ramp = np.linspace(0, 65535, 320 * 180).reshape(180, 320).astype(np.uint16)
    return encoded(Image.fromarray(ramp), "PNG")


def floats() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 1, 320 * 180, dtype=np.float32).reshape(180, 320)), "TIFF")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(drawing((180, 320)), "JPEG", exif=exif)


STILLS: dict[str, Callable[[], bytes]] = {
    "portrait": lambda: encoded(drawing((300, 900)), "JPEG"),
    "panorama": lambda: encoded(drawing((2000, 100)), "PNG"),
    "a line": lambda: encoded(drawing((1, 10000)), "PNG"),
    "a point": lambda: encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
    "turned": turned,
    "alpha": lambda: encoded(Image.new("RGBA", (320, 180), (255, 0, 0, 128)), "PNG"),
    "palette with transparency": lambda: encoded(drawing().quantize(16), "PNG", transparency=3),
    "grey with alpha": lambda: encoded(Image.new("LA", (320, 180), (200, 100)), "PNG"),
    "one bit": lambda: encoded(drawing().convert("1"), "PNG"),
    "CMYK": cmyk,
    "16 bits": sixteen_bits,
    "floats": floats,
    "Lab": lambda: encoded(Image.new("LAB", (320, 180), (120, 130, 140)), "TIFF"),
    "animated": lambda: encoded(drawing(), "GIF", save_all=True, append_images=[drawing(seed=2)]),
    "webp": lambda: encoded(drawing(), "WEBP"),
    "bmp": lambda: encoded(drawing(), "BMP"),
    "damaged profile": lambda: encoded(drawing(), "JPEG", icc_profile=b"not a profile"),
}


@pytest.mark.parametrize("kind", STILLS)
def test_a_still_of_any_kind_becomes_a_clip(render: Render, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "still"
    path.write_bytes(STILLS[kind]())
    output = render("generate_video", storyboard_images=["s"], inputs={"s": path}, fps=4, resolution="160x90")
    assert len(frames(output)) == 4


def test_a_still_is_never_stretched(render: Render, tmp_path: Path) -> None:
    for name, size in (("tall", (200, 600)), ("flat", (1200, 200)), ("square", (400, 400))):
        path = tmp_path / f"{name}.png"
        still = Image.new("RGB", size, (20, 20, 20))
        side = min(size) // 2
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        ImageDraw.Draw(still).rectangle((left, top, left + side - 1, top + side - 1), fill="white")
        still.save(path)
        output = render(
            "generate_video",
            storyboard_images=["s"],
            inputs={"s": path},
            camera_angle="static",
            resolution="640x360",
            captions=False,
            fps=2,
        )
        bright = frames(output)[0] > 190
        rows, columns = np.flatnonzero(bright[20:].any(axis=1)), np.flatnonzero(bright[20:].any(axis=0))
        assert rows[-1] - rows[0] == pytest.approx(columns[-1] - columns[0], rel=0.04), name


def test_a_portrait_still_stands_on_its_own_blur(render: Render, tmp_path: Path) -> None:
    path = tmp_path / "tall.png"
    Image.new("RGB", (100, 300), (200, 200, 200)).save(path)
    output = render("generate_video", storyboard_images=["s"], inputs={"s": path}, camera_angle="static", captions=False, fps=2)
    frame = frames(output)[0]
    assert frame[90, 160] > 180
    assert 60 < frame[90, 20] < 140


def test_exif_turns_a_still_upright(render: Render, tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    still = Image.new("RGB", (180, 320), (20, 20, 20))
    ImageDraw.Draw(still).rectangle((0, 0, 90, 320), fill="white")  # left as stored; orientation 6 turns it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    still.save(path, exif=exif)
    frame = frames(render("generate_video", storyboard_images=["s"], inputs={"s": path}, camera_angle="static", captions=False, fps=2))[0]
    assert frame[30:80].mean() > 190
    assert frame[110:170].mean() < 60


def truncated() -> bytes:
    return encoded(drawing(), "JPEG")[:4000]


BROKEN: dict[str, Callable[[], bytes]] = {
    "truncated jpeg": truncated,
    "truncated png": lambda: encoded(drawing(), "PNG")[:6000],
    "html": lambda: b"<!doctype html><title>404</title>",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "empty": lambda: b"",
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "noise": lambda: np.random.default_rng(1).bytes(5000),
    "41 megapixels": lambda: encoded(Image.new("1", (8200, 5000)), "PNG"),
    "99 megapixels": lambda: encoded(Image.new("1", (9900, 10000)), "PNG"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("task_type", ["generate_video", "generate_image", "render_animation"])
def test_a_still_that_is_no_picture_is_named(render: Render, tmp_path: Path, kind: str, task_type: str) -> None:
    path = tmp_path / "still"
    path.write_bytes(BROKEN[kind]())
    field = "storyboard_images" if task_type == "generate_video" else "reference_images"
    with pytest.raises(InvalidInput, match=r"https://cdn\.example/broken\.jpg") as caught:
        render(task_type, inputs={"https://cdn.example/broken.jpg": path}, **{field: ["https://cdn.example/broken.jpg"]})
    assert str(tmp_path) not in caught.value.message


def test_a_still_of_forty_megapixels_is_welcome(render: Render, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (8000, 5000), 128).save(path, compress_level=1)
    assert frames(render("generate_video", storyboard_images=["s"], inputs={"s": path}, fps=1, resolution="160x90"))


def test_a_reference_that_was_not_fetched_is_unavailable(render: Render) -> None:
    with pytest.raises(InputUnavailable, match=r"https://cdn\.example/gone\.jpg"):
        render("generate_video", storyboard_images=["https://cdn.example/gone.jpg"])


# -- generate_image


@pytest.mark.parametrize(("kind", "suffix", "format_name"), [("jpeg", ".jpg", "JPEG"), ("png", ".png", "PNG"), ("webp", ".webp", "WEBP")])
def test_a_card_is_written_in_each_format_and_says_what_it_is(render: Render, kind: str, suffix: str, format_name: str) -> None:
    output = render("generate_image", prompt="A <weary> keeper & his lamp", format=kind, resolution="320x240", seed=11)
    path = output_path(output)
    with Image.open(path) as image:
        image.load()
        assert (path.suffix, image.format, image.size, image.mode) == (suffix, format_name, (320, 240), "RGB")
        fields = xmp(image)
    assert (fields["engine"], fields["seed"], fields["prompt"]) == ("animatic", "11", "A <weary> keeper & his lamp")
    assert output.files[0].content_type == f"image/{kind}"


@pytest.mark.parametrize("prompt", ["&" * 8000, "灯" * 8000, "a lamp\ufffe\uffff\x0b"], ids=["escaped", "wide", "forbidden"])
def test_any_prompt_makes_tags_that_are_well_formed_and_fit(render: Render, prompt: str) -> None:
    with Image.open(output_path(render("generate_image", prompt=prompt, format="jpeg", resolution="320x240", seed=11))) as image:
        found = xmp(image)["prompt"]
    assert found == prompt[:8000].rstrip("\ufffe\uffff\x0b")[: len(found)]
    assert len(found) >= 6


def xmp(image: Image.Image) -> dict[str, str]:
    """Return movieq's own fields of the image's XMP."""
    import xml.etree.ElementTree as ElementTree

    packet = image.info["xmp"]
    root = ElementTree.fromstring(packet.decode() if isinstance(packet, bytes) else packet)
    return {
        element.tag.removeprefix("{urn:movieq:tags}"): element.text or ""
        for element in root.iter()
        if element.tag.startswith("{urn:movieq:tags}")
    }


@pytest.mark.parametrize("resolution", ["64x64", "64x3840", "3840x64", "512x512", "960x540", "400x600"])
@pytest.mark.parametrize("letters", [1, 120, 1200])
def test_a_card_of_any_size_takes_a_text_of_any_length(render: Render, resolution: str, letters: int) -> None:
    text = ("Salt in his beard, one hand on the brass of the lamp, he waits. " * 20)[:letters]
    output = render("generate_image", prompt=text, resolution=resolution)
    with Image.open(output_path(output)) as image:
        assert f"{image.width}x{image.height}" == resolution


def test_another_prompt_makes_another_picture(render: Render) -> None:
    cards = []
    for prompt in ("A lighthouse keeper by the sea", "A courier in the city"):
        with Image.open(output_path(render("generate_image", prompt=prompt, resolution="512x512", format="png"))) as image:
            cards.append(np.asarray(image, np.int16))
    assert (np.abs(cards[0] - cards[1]).max(axis=2) > 24).mean() > 0.1


def test_a_reference_is_on_the_card(render: Render, tmp_path: Path) -> None:
    path = tmp_path / "reference.png"
    Image.new("RGB", (500, 500), (180, 30, 40)).save(path)
    output = render("generate_image", prompt="Red", reference_images=["r"], inputs={"r": path}, resolution="512x512", format="png")
    with Image.open(output_path(output)) as image:
        near = np.abs(np.asarray(image, np.int16) - (180, 30, 40)).max(axis=2) < 6
    assert near.mean() > 0.3


# -- process_audio


@speaks
@pytest.mark.parametrize(("kind", "codec", "rate"), [("mp3", "mp3float", 8000), ("wav", "pcm_s16le", 24000), ("flac", "flac", 48000)])
def test_dialogue_is_written_in_each_format(render: Render, kind: str, codec: str, rate: int) -> None:
    output = render("process_audio", text="Lit.", output_format=kind, sample_rate=rate, seed=3)
    with av.open(str(output_path(output))) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.rate) == (codec, rate)
        tags = {key.lower(): value for key, value in container.metadata.items()}
    assert msgspec.json.decode(tags["comment"])["engine"] == "animatic"
    spoken, heard_rate = samples(output_path(output))
    assert heard_rate == rate
    assert len(spoken) / rate == pytest.approx(output.metadata["duration"], abs=0.12)  # an MP3 is padded to whole frames
    assert np.abs(spoken).max() > 0.1


@speaks
def test_the_same_line_is_spoken_the_same_way_every_time(render: Render) -> None:
    one, two = (
        output_path(render("process_audio", text="We hold the light.", background_noise="rain", output_format="wav")).read_bytes()
        for _ in range(2)
    )
    assert one == two


@speaks
def test_a_line_is_as_loud_as_broadcast_wants_and_its_background_twenty_under(render: Render) -> None:
    alone, over = (
        samples(output_path(render("process_audio", text="We hold the light until morning.", output_format="wav", background_noise=noise)))
        for noise in (None, "rain")
    )
    (voice, rate), (mixed, _) = alone, over
    breath = int(animatic.BREATH_S * rate)
    assert loudness.lufs(voice, rate) == pytest.approx(-16, abs=2)
    assert loudness.lufs(mixed[:, :1], rate) == pytest.approx(-16, abs=2)
    assert len(mixed) == len(voice) + 2 * breath
    noise = mixed.copy()
    noise[breath:-breath] -= voice
    assert loudness.lufs(np.repeat(voice, 2, axis=1), rate) - loudness.lufs(noise, rate) == pytest.approx(20, abs=1.5)


@speaks
@pytest.mark.parametrize("text", ["...", " - ", "\u200b"])
def test_a_text_of_which_nothing_can_be_spoken_is_refused(render: Render, text: str) -> None:
    with pytest.raises(InvalidInput, match="can be spoken"):
        render("process_audio", text=text)


@speaks
def test_a_language_that_espeak_lacks_is_refused_and_never_spoken_in_another(render: Render) -> None:
    with pytest.raises(InvalidInput, match="'xx'"):
        render("process_audio", text="Hello", language="xx")


@speaks
def test_another_language_is_another_voice(render: Render) -> None:
    english, german = (
        samples(output_path(render("process_audio", text="Die Lampe brennt.", language=language, output_format="wav")))[0]
        for language in ("en", "de")
    )
    assert len(english) != len(german)


def test_a_voice_sample_cannot_be_honoured(render: Render) -> None:
    with pytest.raises(UnsupportedParameter, match="character_voice_profile"):
        render("process_audio", text="Hello", character_voice_profile="https://cdn.example/voice.wav")


def test_without_espeak_dialogue_says_what_to_install_and_leaves_no_file(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'movieq\[speech\]'"):
        render("process_audio", text="Hello")
    assert not any((tmp_path / "out1").iterdir())


def test_a_prompt_alone_is_ambience_of_the_duration_asked(render: Render) -> None:
    output = render("process_audio", prompt="rain on a window", duration=2.5, output_format="wav", sample_rate=24000)
    heard, rate = samples(output_path(output))
    assert heard.shape == (60000, 2)
    assert rate == 24000
    assert "warnings" not in output.metadata


def test_an_unknown_sound_is_a_quiet_room_and_says_so(render: Render) -> None:
    assert "'a theremin'" in render("process_audio", prompt="a theremin", duration=0.5).metadata["warnings"][0]


# -- render_animation


@pytest.mark.parametrize("motion", ["walk", "float", "turn", "jump", "idle"])
def test_a_loop_ends_where_it_starts(render: Render, motion: str) -> None:
    shown = [frame[12:].astype(int) for frame in frames(render("render_animation", prompt="A courier", motion=motion, loop=True))]
    steps = [np.abs(a - b).mean() for a, b in zip(shown, [*shown[1:], shown[0]], strict=True)]
    assert steps[-1] <= max(steps[:-1]) * 1.2
    assert max(np.abs(shown[0] - frame).mean() for frame in shown) > 0.5


def marked(size: tuple[int, int] = (320, 320)) -> Image.Image:
    """Return a white figure on a transparent background."""
    figure = Image.new("RGBA", size)
    ImageDraw.Draw(figure).ellipse((size[0] * 0.3, 10, size[0] * 0.7, size[1] - 10), fill=(255, 255, 255, 255))
    return figure


def place_of_white(frame: Pixels) -> float:
    """Return the middle column of the nearly white pixels below the slate."""
    return float(np.flatnonzero((frame[20:] > 235).any(axis=0)).mean())


def test_a_cutout_crosses_before_planes_that_move_less_and_more(render: Render, tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    marked().save(path)
    shown = frames(render("render_animation", reference_images=["r"], inputs={"r": path}, motion="walk", resolution="640x360"))
    assert place_of_white(shown[-1]) - place_of_white(shown[0]) == pytest.approx(640 * 0.28, rel=0.1)

    drawn = frames(render("render_animation", prompt="A courier in the city", motion="float", resolution="640x360"))
    far = moved(drawn[0][20:180, :], drawn[-1][20:180, :])
    assert 2 < abs(far) < 640 * 0.28 / 2


def moved(first: Pixels, last: Pixels) -> float:
    """Return how far right the second picture is of the first, in pixels: where their columns match best."""
    a, b = (np.diff(picture.astype(float), axis=1) for picture in (first, last))
    reach = 120
    costs = {dx: np.abs(a[:, reach:-reach] - b[:, reach + dx : b.shape[1] - reach + dx]).mean() for dx in range(-reach, reach)}
    return min(costs, key=lambda dx: costs[dx])


@pytest.mark.parametrize("kind", ["transparent", "on a plain ground", "a photograph"])
def test_the_reference_is_cut_out(render: Render, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "reference.png"
    if kind == "a photograph":
        drawing((400, 400)).save(path)
    else:
        figure = marked()
        ground = Image.new("RGB", figure.size, (40, 90, 200))
        ground.paste(figure, mask=figure.getchannel("A"))
        (figure if kind == "transparent" else ground).save(path)
    cut = cutout.extract(images.load_with_alpha("r", path, (640, 360)), 200)
    alpha = np.asarray(cut.getchannel("A"))
    assert cut.height == 200
    if kind == "a photograph":
        assert (alpha == 255).mean() > 0.95
    else:
        assert alpha[2, 2] < 30
        assert alpha[100, cut.width // 2] == 255
        assert abs((alpha > 128).mean() - np.pi / 4) < 0.03
    assert frames(render("render_animation", reference_images=["r"], inputs={"r": path}, fps=4))


@pytest.mark.parametrize("motion", [*cutout.MOTIONS, "somersault"])
def test_every_motion_moves(render: Render, motion: str) -> None:
    output = render("render_animation", prompt="A courier", motion=motion, fps=12)
    shown = frames(output)
    assert np.abs(shown[0][20:].astype(int) - shown[5][20:]).max() > 30
    assert ("warnings" in output.metadata) == (motion == "somersault")


# -- stopping


def test_a_cancelled_job_leaves_no_clip(tmp_path: Path) -> None:
    flag = Flag()
    sent: list[FromChild] = []

    def receive(message: FromChild) -> None:
        sent.append(message)
        if isinstance(message, Step) and message.stage == "frames":
            flag.set()

    run = Run(
        "run",
        "t",
        "p",
        "generate_video",
        "animatic",
        "animatic",
        {"prompt": "x", "resolution": "640x360", "duration": 30},
        {},
        {},
        1,
        str(tmp_path),
    )
    with pytest.raises(JobCancelled):
        animatic.render(Job(run, receive, flag))
    assert isinstance(sent[0], Plan)
    assert list(tmp_path.glob("*.mp4")) == []


@speaks
def test_espeak_is_killed_when_its_line_is_cancelled(tmp_path: Path) -> None:
    flag = Flag()
    flag.set()
    before = psutil.Process().children()
    run = Run("run", "t", "p", "process_audio", "animatic", "animatic", {"text": "word " * 900}, {}, {}, 1, str(tmp_path))
    with pytest.raises(JobCancelled):
        animatic.render(Job(run, lambda message: None, flag))
    assert list(tmp_path.iterdir()) == []
    assert set(psutil.Process().children()) <= set(before)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """The encoder's thread ends with its clip, whatever happened."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "encode"] == []
