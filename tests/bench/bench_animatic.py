"""Seconds and peak memory of the animatic, in the real child, one fresh process a run: `python -m tests.bench.bench_animatic [RUNS]`.

Prints a table and, as its last line, one JSON object. Stills are the demo's storyboard frames; memory is the process's high-water mark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import av

import movieq
from tests.bench.report import machine, percentile
from workers import protocol
from workers.protocol import Done, Ready, Run

DEMO = Path(movieq.__file__).parent / "local" / "demo"
TEXT = "Night, storm. The keeper climbs to the lamp. Far out on the water, a boat is waiting for his light."


class Case(NamedTuple):
    """What is rendered."""

    name: str
    task_type: str
    params: dict[str, Any]
    stills: int = 0


VIDEO = {"scene_description": TEXT, "lighting": "candlelight", "audio_cues": ["sea and wind", "rain", "fire"]}
CASES = (
    Case("7 s 1080p24, 1 still", "generate_video", VIDEO, 1),
    Case("7 s 1080p24, 3 stills", "generate_video", VIDEO, 3),
    Case("7 s 1080p24, 32 stills", "generate_video", VIDEO, 32),
    Case("7 s 1080p24, no still", "generate_video", VIDEO),
    Case("7 s 1080p24, 3 stills, dutch", "generate_video", VIDEO | {"camera_angle": "dutch"}, 3),
    Case("30 s 2160p16, 3 stills", "generate_video", VIDEO | {"duration": 30, "resolution": "3840x2160", "fps": 16}, 3),
    Case("card 1024x1024 jpeg", "generate_image", {"prompt": TEXT}),
    Case("card 1024x1024 png", "generate_image", {"prompt": TEXT, "format": "png"}),
    Case("card 3840x3840 jpeg", "generate_image", {"prompt": TEXT, "resolution": "3840x3840"}),
    Case("60 s of sea and wind, mp3", "process_audio", {"prompt": "sea and wind", "duration": 60}),
    Case("a line over rain, mp3", "process_audio", {"text": TEXT, "background_noise": "rain"}),
    Case("5,000 characters, mp3", "process_audio", {"text": (TEXT + " ") * 50}),
    Case("3 s 720p24 animation", "render_animation", {"prompt": "A courier walks through the city", "motion": "walk", "loop": True}),
)


class Sample(NamedTuple):
    """One run: seconds from `Run` to `Done`, peak memory in MiB, size of the output in bytes."""

    seconds: float
    peak_mib: float
    size_bytes: int


def sample(case: Case) -> Sample:
    """The case in a process of its own; the start of the process is not counted."""
    inputs = {f"still{number}": str(DEMO / f"frame{number % 3 + 1}.jpg") for number in range(case.stills)}
    params = case.params | ({"storyboard_images": list(inputs)} if inputs else {})
    command = [sys.executable, "-m", "workers.child", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as out_dir, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        source, sink = cast(BinaryIO, child.stdout), cast(BinaryIO, child.stdin)
        assert isinstance(_next(source), Ready)
        run = Run("run", "task", "bench", case.task_type, "animatic", "animatic", params, {}, inputs, 1, out_dir)
        began_s = time.perf_counter()
        sink.write(protocol.frame(run))
        sink.flush()
        while not isinstance(answer := _next(source), Done):
            if isinstance(answer, protocol.Failed):
                raise RuntimeError(answer.message)
        seconds = time.perf_counter() - began_s
        peak_kib = next(
            int(line.split()[1]) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if line.startswith("VmHWM")
        )
        size_bytes = Path(answer.files[0].path).stat().st_size
        sink.close()
        child.wait(5)
    return Sample(seconds, peak_kib / 1024, size_bytes)


def _next(stream: BinaryIO) -> protocol.FromChild:
    body = protocol.read_frame(stream)
    if body is None:
        raise RuntimeError("the child ended")
    return protocol.from_child_decoder.decode(body)


def main(runs: int) -> None:
    where = machine() | {"av": av.__version__, "load": round(os.getloadavg()[0], 1)}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{'case':32} {'n':>3} {'p50 s':>7} {'p99 s':>7} {'peak MiB':>9} {'kB':>7}")
    rows = []
    for case in CASES:
        samples = [sample(case) for _ in range(runs)]
        seconds = [one.seconds for one in samples]
        row = {
            "case": case.name,
            "n": runs,
            "p50_s": round(percentile(seconds, 0.5), 3),
            "p99_s": round(percentile(seconds, 0.99), 3),
            "peak_mib": round(max(one.peak_mib for one in samples)),
            "size_bytes": samples[0].size_bytes,
        }
        rows.append(row)
        print(
            f"{case.name:32} {runs:3} {row['p50_s']:7.2f} {row['p99_s']:7.2f} {row['peak_mib']:9} {samples[0].size_bytes // 1000:7}",
            flush=True,
        )
    print(json.dumps({"bench": "animatic", "rows": rows, **where}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
