"""A plug-in with a speech model of its own, whose codec comes from a second folder."""

import os

from movieq.plugins import Plugin

FOLDER = os.environ.get("TONES_WEIGHTS", "/models/tones")

plugin = Plugin(
    adapters={"tones": "movieq_tones_model:Tones"},
    models={
        "tones": {
            "engine": "diffusers",
            "kind": "gpu_medium",
            "tasks": {"process_audio": 2},
            "weights": {"repository": f"{FOLDER}/network"},
            "components": {"codec": {"repository": f"{FOLDER}/codec", "cls": "movieq_tones_model:ToneCodec"}},
            "adapter": "tones",
            "pipeline": "movieq_tones_model:ToneNetwork",
            "languages": ["en"],
            "preferred": True,
            "licence": "mit",
        }
    },
)
