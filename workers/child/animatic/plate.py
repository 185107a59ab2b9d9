"""A plate: a still prepared for the camera, and the camera's view of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from workers.child.animatic import grade
from workers.child.animatic.camera import View, tightest
from workers.child.media.encode import Planes, to_planes
from workers.child.media.images import fill_frame

MAX_OVERSAMPLING = 1.5
"""How many times finer than the frame a plate is at most; more cannot be seen."""


class Plate:
    """A graded picture in the encoder's planes, and one view of it for each frame of its shot."""

    def __init__(self, still: Image.Image, size: tuple[int, int], look: str, views: Sequence[View]) -> None:
        """`still` is RGB of any shape, `size` that of the frame, `look` a key of `grade.GRADES`."""
        detail = max(still.width / size[0], still.height / size[1])
        scale = min(max(1.0, detail), tightest(views), MAX_OVERSAMPLING)
        self._rolls = any(view.roll for view in views)
        if self._rolls:
            scale = MAX_OVERSAMPLING  # sampled bilinearly, which is soft without oversampling
        width, height = (round(side * scale / 2) * 2 for side in size)
        self._size = size
        self._views = views
        self._planes = to_planes(grade.apply(fill_frame(still, (width, height)), look))

    def frame(self, number: int) -> Planes:
        """Return what the camera sees in the shot's frame `number`, as new images that may be drawn on."""
        view = self._views[number]
        width, height = self._size
        y, u, v = self._planes
        half = (width // 2, height // 2)
        if self._rolls:
            return Planes(_rotate(y, view, self._size), _rotate(u, view, half), _rotate(v, view, half))
        return Planes(_crop(y, view, self._size), _crop(u, view, half), _crop(v, view, half))


def _crop(plane: Image.Image, view: View, size: tuple[int, int]) -> Image.Image:
    """Return the view by bicubic resampling of a box with sub-pixel edges: even to 0.02 px, where a zoom filter jitters by a pixel."""
    width, height = plane.width / view.zoom, plane.height / view.zoom
    left = (0.5 + view.x) * plane.width - width / 2
    top = (0.5 + view.y) * plane.height - height / 2
    left, top = min(max(left, 0.0), plane.width - width), min(max(top, 0.0), plane.height - height)
    box = (left, top, min(left + width, plane.width), min(top + height, plane.height))
    return plane.resize(size, Image.Resampling.BICUBIC, box=box)


def _rotate(plane: Image.Image, view: View, size: tuple[int, int]) -> Image.Image:
    """Return the view of a rolled camera, by a bilinear affine transform."""
    scale_x, scale_y = plane.width / view.zoom / size[0], plane.height / view.zoom / size[1]
    cos, sin = math.cos(math.radians(view.roll)), math.sin(math.radians(view.roll))
    a, b, d, e = cos * scale_x, sin * scale_y, -sin * scale_x, cos * scale_y
    middle_x, middle_y = (0.5 + view.x) * plane.width, (0.5 + view.y) * plane.height
    matrix = (a, b, middle_x - a * size[0] / 2 - b * size[1] / 2, d, e, middle_y - d * size[0] / 2 - e * size[1] / 2)
    return plane.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def dissolve(under: Planes, over: Planes, share: float) -> Planes:
    """Return `over` blended onto `under` with the opacity `share`."""
    return Planes(*(Image.blend(a, b, share) for a, b in zip(under, over, strict=True)))
