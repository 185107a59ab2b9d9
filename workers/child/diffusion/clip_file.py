"""The file of a clip, written while later windows of the clip are rendered."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from movieq.tasks.params import ImageFormat
from workers.child.diffusion import sizing
from workers.child.diffusion.frames import Pictures
from workers.child.job import Job, JobCancelled
from workers.child.media import encode, interpolation
from workers.child.media.encode import ClipFormat, ClipWriter, Samples
from workers.child.media.interpolation import Picture
from workers.child.media.metadata import file_tags
from workers.protocol import Produced


class ClipFile:
    """An mp4 of a clip with a poster. A thread of this object retimes, scales and encodes the pictures.

    A context for the rendering, after which `finish` must be called. If the block ends with an error, the thread ends and the files are
    deleted. Only an error of the thread itself ends the block quietly, and `finish` raises it: it counts as one after the rendering, since
    another run would render as much again and fail in the same way.
    """

    def __init__(self, job: Job, clip: ClipFormat, fps: float, cuts: Sequence[int] = ()) -> None:
        """`fps` is the rate of the pictures that `add` gets; `cuts` are the numbers of those with which another shot begins."""
        self.clip = clip
        self.count = 0
        """How many pictures were added."""
        self._job = job
        self._fps = Fraction(fps).limit_denominator(1001)
        self._cuts = cuts
        self._tags = file_tags(job, "Clip")
        self._path, self._silent, self._poster = (job.out_dir / name for name in ("output.mp4", "silent.mp4", "poster.jpg"))
        self._windows: queue.Queue[Pictures | None] = queue.Queue(1)
        self._abandoned = False
        self._finishing = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="clip")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        own = isinstance(error, Exception) and error is self._fault
        self._abandoned = error is not None
        self._windows.put(None)
        if error is not None:
            self._delete()
        return own

    def add(self, pictures: Pictures) -> None:
        """Append pictures; wait until those of the call before are encoded, so that those of at most two windows are in memory.

        Raises what the thread raised.
        """
        self._windows.join()
        if self._fault:
            raise self._fault
        self.count += len(pictures)
        self._windows.put(pictures)

    def finish(self, sound: Samples | None) -> tuple[Produced, ...]:
        """Wait until all pictures are encoded, add the sound, and return the files. Raises what the thread raised."""
        try:
            self._job.begin("mux")
            self._finishing = True
            self._thread.join()
            if self._fault:
                raise self._fault
            if sound is None:
                self._silent.rename(self._path)
            else:
                encode.add_sound(self._silent, self._path, self.clip, self._tags, sound, self._job.check)
                self._silent.unlink()
            self._job.step("mux", self.clip.frames, self.clip.frames)
        except BaseException:
            self._abandoned = True
            self._delete()
            raise
        return (
            Produced(str(self._path), "output", "video/mp4", *self.clip.size, self.clip.seconds),
            Produced(str(self._poster), "poster", "image/jpeg", *self.clip.size),
        )

    def _delete(self) -> None:
        """Delete the files, once the thread has ended."""
        self._thread.join()
        for path in (self._path, self._silent, self._poster):
            path.unlink(missing_ok=True)

    def _write(self) -> None:
        source = self._pictures()
        try:
            with ClipWriter(self._silent, self.clip, self._tags) as writer:
                for frame, picture in enumerate(self._retimed(source)):
                    self._report(frame)
                    planes = encode.to_planes(sizing.scale_and_crop(picture, self.clip.size))
                    writer.add(planes)
                    if frame == self.clip.frames // 3:
                        encode.write_image(self._poster, encode.to_image(planes), ImageFormat.JPEG, self._tags)
        except BaseException as fault:  # raised again by `add` or `finish`
            self._fault = fault
        with contextlib.suppress(JobCancelled):
            for _ in source:  # so that `add` does not wait for ever
                pass

    def _retimed(self, source: Iterator[Picture]) -> Iterator[Image.Image]:
        """Yield the pictures of the clip. Each shot is retimed by itself, so that no picture mixes two shots."""
        firsts = (0, *self._cuts)
        begins = [round(first * self.clip.rate / self._fps) for first in firsts]
        counts = [*(after - first for first, after in itertools.pairwise(firsts)), None]
        for count, (begin, end) in zip(counts, itertools.pairwise((*begins, self.clip.frames)), strict=True):
            shot = itertools.islice(source, count)
            yield from interpolation.retimed(shot, self._fps, self.clip.rate, end - begin)
            for _ in shot:  # what comes after its last moment
                pass

    def _pictures(self) -> Iterator[Picture]:
        """Yield the pictures of all windows as they come."""
        while (window := self._windows.get()) is not None:
            yield from map(np.copy, window)  # a view would keep the whole window in memory
            del window
            self._windows.task_done()
        if self._abandoned:
            raise JobCancelled

    def _report(self, frame: int) -> None:
        """Report the pictures that are encoded, in the stage for that. Raises JobCancelled if nobody needs more of them."""
        if self._abandoned:
            raise JobCancelled
        if self._finishing:
            self._job.step("mux", frame, self.clip.frames)
        else:
            self._job.check()
