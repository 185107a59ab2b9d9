"""Submits a second of one API process, beside a bare Starlette echo of the same body in the same run. Aim: a quarter of the echo.

Both are served by uvicorn with uvloop and httptools; the two are measured in turn, several times, and the medians are compared.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import psutil
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from movieq.local.embedded import valkey
from tests.bench import load
from tests.bench.report import percentile, report
from tests.service import UNLIMITED

KEY = "bench-key-0123456789"
ROUNDS, SECONDS, CONNECTIONS = 5, 3.0, 32
BODY = msgspec.json.encode(
    {
        "project_id": "bench",
        "task_type": "generate_video",
        "task_data": {
            "scene_description": "A lighthouse keeper climbs the last stairs and lights the lamp while the storm comes in.",
            "storyboard_images": [f"https://cms.example/media/frame{number}.jpg" for number in range(3)],
            "camera_angle": "dolly in",
            "lighting": "moonlight",
            "audio_cues": ["wind", "sea"],
        },
        "callback_url": "https://cms.example/api/movieq",
        "metadata": {"scene_id": "scene-12"},
    }
)


async def echo(request: Request) -> Response:
    """What comes in goes out, decoded and encoded once."""
    return Response(msgspec.json.encode(msgspec.json.decode(await request.body())), media_type="application/json")


def serve_echo(port_file: str) -> None:
    """The bare echo, in a process of its own."""
    config = uvicorn.Config(
        Starlette(routes=[Route("/", echo, methods=["POST"])]), port=0, http="httptools", loop="uvloop", log_level="error", access_log=False
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        Path(port_file).write_text(str(server.servers[0].sockets[0].getsockname()[1]))
        await serving

    uvloop.run(run())


def cpu_s(process: psutil.Process) -> float:
    """Processor seconds that the process has used."""
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    """Prints requests a second of both."""
    with tempfile.TemporaryDirectory() as folder, valkey(Path(folder) / "valkey", appendfsync="everysec") as server:
        environment = {
            **os.environ,
            "MOVIEQ_REDIS_URL": server.url,
            "MOVIEQ_API_KEYS": KEY,
            **UNLIMITED,
            "MOVIEQ_STORAGE": f"{folder}/media",
            "MOVIEQ_LOG_LEVEL": "info",
            "MOVIEQ_MAX_QUEUED_PER_PROJECT": "0",
        }
        api = subprocess.Popen(
            [sys.executable, "-m", "movieq.cli", "api", "--port", "0"], env=environment, stdout=subprocess.PIPE, text=True
        )
        port_file = Path(folder) / "port"
        bare = subprocess.Popen([sys.executable, "-c", f"from tests.bench.bench_submit import serve_echo; serve_echo({str(port_file)!r})"])
        try:
            assert api.stdout is not None
            api_port = int(api.stdout.readline().rpartition(":")[2])
            while not port_file.exists() or not port_file.read_text():
                pass
            submit = load.post("/api/v1/tasks/submit", BODY, {"X-API-Key": KEY})
            plain = load.post("/", BODY, {})
            echoes, submits, latencies = [], [], []
            echo_cpu, api_cpu = psutil.Process(bare.pid), psutil.Process(api.pid)
            before = cpu_s(echo_cpu), cpu_s(api_cpu)
            echoed = 0
            for _ in range(ROUNDS):
                rate, found = uvloop.run(load.run(int(port_file.read_text()), plain, CONNECTIONS, SECONDS))
                echoes.append(rate)
                echoed += len(found)
                rate, found = uvloop.run(load.run(api_port, submit, CONNECTIONS, SECONDS))
                submits.append(rate)
                latencies += found
            echo_us = (cpu_s(echo_cpu) - before[0]) / echoed * 1e6
            submit_us = (cpu_s(api_cpu) - before[1]) / len(latencies) * 1e6
        finally:
            for process in (api, bare):
                process.send_signal(signal.SIGTERM)
                process.wait(15)
    report(
        "submit",
        {
            "connections": CONNECTIONS,
            "submits": len(latencies),
            "submits_per_s": statistics.median(submits),
            "echoes_per_s": statistics.median(echoes),
            "ratio": statistics.median(submits) / statistics.median(echoes),
            "cpu_us_per_submit": submit_us,
            "cpu_us_per_echo": echo_us,
            "submit_p50_ms": percentile(latencies, 0.5) * 1000,
            "submit_p99_ms": percentile(latencies, 0.99) * 1000,
        },
    )


if __name__ == "__main__":
    main()
