"""Sizes, windows and frames that a model can render, and scaling back to what was asked for."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from movieq.models.table import Limits
from workers.child.diffusion import sizing

SIDES = st.integers(32, 1920).map(lambda half: half * 2)
LIMITS = st.builds(
    lambda sides, fewest, more: Limits(sides=sides, pixels=(fewest, fewest + more)),
    st.sampled_from([1, 8, 16, 32, 64]),
    st.integers(65_536, 400_000),
    st.integers(200_000, 2_000_000),
)


@given(LIMITS, SIDES, SIDES)
def test_a_size_is_one_that_the_model_supports_and_near_the_aspect(limits: Limits, width: int, height: int) -> None:
    across, down = sizing.model_size(limits, (width, height))
    assert across % limits.sides == down % limits.sides == 0
    assert across * down <= limits.pixels[1]
    # a step of either side is the coarsest that the aspect can be off, and twice that where sides are small
    off = max(across / down / (width / height), width / height / (across / down))
    assert off <= (1 + limits.sides / across) * (1 + limits.sides / down) * 1.1


@pytest.mark.parametrize(
    ("wanted", "sides", "pixels", "model"),
    [
        ((1920, 1080), 32, (147_456, 921_600), (1280, 704)),
        ((1024, 1024), 16, (262_144, 2_097_152), (1024, 1024)),
        ((64, 64), 8, (262_144, 1_048_576), (512, 512)),
        ((1080, 1920), 16, (230_400, 921_600), (720, 1280)),
        ((640, 360), 8, (1, 2_000_000), (640, 360)),
    ],
)
def test_sizes_that_people_ask_for(wanted: tuple[int, int], sides: int, pixels: tuple[int, int], model: tuple[int, int]) -> None:
    assert sizing.model_size(Limits(sides=sides, pixels=pixels), wanted) == model


@given(st.integers(1, 8), st.integers(0, 1), st.integers(9, 257), st.integers(0, 500), st.integers(1, 900), st.sampled_from([1, 9, 17]))
def test_windows_cover_a_shot_and_share_frames(step: int, first: int, most: int, start: int, length: int, overlap: int) -> None:
    limits = Limits(frame_step=step, frame_first=first, frames=most)
    windows = sizing.windows(limits, start, start + length, overlap)
    for window in windows:
        assert window.frames <= most
        assert (window.frames - first) % step == 0
    assert (windows[0].first, windows[0].overlap) == (start, 0)
    for before, after in itertools.pairwise(windows):
        assert after.first == before.first + before.frames - after.overlap, "its first pictures are the last ones of the window before"
        assert after.overlap in (1, overlap)
        assert after.frames > after.overlap
        assert before.first + before.frames < start + length, "no window too many"
    assert windows[-1].first + windows[-1].frames >= start + length


def test_seven_seconds_as_two_models_make_them() -> None:
    ltx, wan = Limits(frame_step=8, frame_first=1, frames=121, fps=24), Limits(frame_step=4, frame_first=1, frames=81, fps=16)
    assert sizing.frame_count(ltx, 7) == 168
    assert sizing.windows(ltx, 0, 168, 9) == [(0, 121, 0), (112, 57, 9)]
    assert sizing.windows(wan, 0, sizing.frame_count(wan, 7)) == [(0, 81, 0), (80, 33, 1)]


def test_a_model_whose_windows_are_no_longer_than_the_overlap_shares_one_frame() -> None:
    assert sizing.windows(Limits(frame_step=8, frame_first=1, frames=9), 0, 17, 9) == [(0, 9, 0), (8, 9, 1)]


@given(st.integers(1, 32), st.integers(1, 300), st.integers(1, 8))
def test_images_stand_in_order_within_the_clip_and_the_first_at_its_begin(count: int, frames: int, step: int) -> None:
    frames_of_images = sizing.image_frames(count, frames, step)
    assert frames_of_images == sorted(frames_of_images)
    assert frames_of_images[0] == 0
    assert all(frame < frames and frame % step == 0 for frame in frames_of_images)


def test_a_picture_is_cut_evenly_to_the_aspect_and_never_stretched() -> None:
    picture = Image.new("RGB", (80, 40), "red")
    picture.paste("blue", (30, 0, 50, 40))
    cropped = sizing.scale_and_crop(picture, (40, 40))
    assert cropped.size == (40, 40)
    assert [cropped.getpixel((x, 20)) for x in (2, 20, 37)] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
