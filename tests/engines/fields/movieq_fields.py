"""A plug-in with a model of its own."""

import os

from movieq.plugins import Plugin

plugin = Plugin(
    models={
        "fields": {
            "engine": "diffusers",
            "kind": "gpu_medium",
            "tasks": {"generate_image": 2},
            "weights": {"repository": os.environ.get("FIELDS_WEIGHTS", "/models/fields")},
            "pipeline": "movieq_fields_model:FieldPipeline",
            "preferred": True,
            "defaults": {"steps": 8},
            "limits": {"sides": 16, "pixels": [4096, 1048576]},
            "ignores": ["guidance_scale", "negative_prompt"],
            "licence": "mit",
        }
    }
)
