"""What the animatic reads out of a text: poses, motions, places and sides."""

from __future__ import annotations

import numpy as np
import pytest

from workers.child.animatic import backdrop, captions, cutout, mannequin


@pytest.mark.parametrize(
    ("text", "pose"),
    [
        ("He walks home", "walking"),
        ("she is running", "running"),
        ("seated at a desk", "sitting"),
        ("asleep", "lying"),
        ("hands up", "arms raised"),
        ("a drunk with a trunk", None),
        ("opposite the visitor", None),
        ("across the rainbow, with an elbow", None),
        ("a faction", None),
        ("a clean preacher", None),
        ("flying, against all belief", None),
        ("he does not sit", None),
        ("not standing but kneeling", "kneeling"),
    ],
)
def test_poses_are_whole_words_that_are_not_negated(text: str, pose: str | None) -> None:
    assert mannequin.pose_named(text) == pose


@pytest.mark.parametrize(
    ("text", "motion"),
    [
        ("walking slowly", "walk"),
        ("hops", "jump"),
        ("shaking", "shake"),
        ("a shop of hope", None),
        ("in the forest, a rocket returns", None),
        ("a butterfly at the center", None),
        ("prune", None),
        ("do not run", None),
    ],
)
def test_motions_are_whole_words_that_are_not_negated(text: str, motion: str | None) -> None:
    assert cutout.motion_named(text) == motion


@pytest.mark.parametrize("pose", mannequin.POSES)
def test_every_pose_is_found_by_its_own_name(pose: str) -> None:
    assert mannequin.pose_named(pose) == pose


@pytest.mark.parametrize("motion", cutout.MOTIONS)
def test_every_motion_is_found_by_its_own_name(motion: str) -> None:
    assert cutout.motion_named(motion) == motion


@pytest.mark.parametrize(
    ("text", "place"),
    [("a street", "city"), ("not the sea, the forest", "forest"), ("boats", "sea"), ("the forest, far from any city or street", "forest")],
)
def test_places_are_words_that_are_not_negated(text: str, place: str) -> None:
    assert backdrop.place(text, np.random.default_rng(1)) == place


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("right", "right"),
        ("centre", "middle"),
        ("camera left", "left"),
        ("upright", "left"),
        ("innocent", "left"),
        ("a bright recent one", "left"),
    ],
)
def test_sides_are_whole_words(text: str, side: str) -> None:
    assert captions._side(text) == side
