"""Builds the repository of a shipped model from its record, with every dimension shrunk and everything else as it is.

A record (`records/*.json`) says what lies in the real repository: classes, configs, schedulers, tokenizers, files. Weights are random. So a
class, a library or an argument that the real one needs is needed here too.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Final

import torch

from movieq.models.table import Dtype, Lora, Model
from tests.engines import tiny
from workers.child.diffusion.adapters import NETWORK
from workers.child.diffusion.placement import Component, component

RECORDS: Final = Path(__file__).parent / "records"
TEXT: Final = 32
"""Width of every text encoder."""
_TEXT_ENCODER: Final = {
    "hidden_size": TEXT, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2,
    "max_position_embeddings": 512, "layer_types": None, "max_window_layers": 2,
}  # fmt: skip
_T5: Final = {"d_model": TEXT, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
SHRUNK: Final[dict[str, dict[str, Any]]] = {
    "ZImageTransformer2DModel": {"dim": 64, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "axes_dims": [8, 12, 12], "cap_feat_dim": TEXT},
    "FluxTransformer2DModel": {
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": TEXT,
        "pooled_projection_dim": TEXT, "axes_dims_rope": [4, 4, 8],
    },
    "Flux2Transformer2DModel": {
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 3 * TEXT,
        "axes_dims_rope": [4, 4, 4, 4], "timestep_guidance_channels": 16,
    },
    "LTX2VideoTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": TEXT,
    },
    "LTX2TextConnectors": {
        "caption_channels": TEXT, "text_proj_in_factor": 3,
        "video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 16,
        "video_hidden_dim": 32, "audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 8, "audio_hidden_dim": 16,
        "video_connector_num_layers": 1, "audio_connector_num_layers": 1,
    },
    "AutoencoderKLLTX2Video": {
        "block_out_channels": [8, 16, 32, 32], "decoder_block_out_channels": [8, 16, 16, 32], "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1] * 5,
    },
    "AutoencoderKLLTX2Audio": {"ch_mult": [1, 1, 1], "num_res_blocks": 1},  # its packed latents have as many channels as its base
    "LTX2VocoderWithBWE": {"hidden_channels": 64, "bwe_hidden_channels": 32},
    "Gemma3ForConditionalGeneration": {
        "text_config": {
            "hidden_size": TEXT, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8,
        },
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "QwenImageTransformer2DModel": {
        "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": TEXT, "axes_dims_rope": [4, 6, 6],
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "text_dim": TEXT, "freq_dim": 16,
    },
    "WanVACETransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "text_dim": TEXT, "freq_dim": 16,
        "vace_layers": [0, 1],
    },
    "LTXVideoTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 2, "caption_channels": TEXT,
    },
    "StableAudioDiTModel": {
        "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "num_key_value_attention_heads": 1, "cross_attention_dim": TEXT,
        "cross_attention_input_dim": TEXT, "global_states_input_dim": 2 * TEXT, "time_proj_dim": 16,
    },
    "StableAudioProjectionModel": {"text_encoder_dim": TEXT, "conditioning_dim": TEXT},
    "AutoencoderKL": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1},
    "AutoencoderKLFlux2": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1},
    "AutoencoderKLQwenImage": {"base_dim": 4, "num_res_blocks": 1},
    "AutoencoderKLWan": {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1},
    "AutoencoderKLLTXVideo": {
        "block_out_channels": [4, 8, 16, 32, 64], "decoder_block_out_channels": [8, 16, 32], "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1] * 4,
    },
    "AutoencoderOobleck": {"encoder_hidden_size": 2, "decoder_channels": 2},
    "CsmForConditionalGeneration": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "depth_decoder_config": {
            "backbone_hidden_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "codec_config": {
            "hidden_size": 32, "num_filters": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
            "intermediate_size": 32, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "upsample_groups": 32,
            "codebook_size": 4096,  # random weights also choose the three tokens that stand for no code
        },
        **{f"{each}_token_id": number for number, each in enumerate(("pad", "bos", "eos", "audio", "audio_eos"))},
    },
    "Qwen3Model": _TEXT_ENCODER,
    "AceStepTransformer1DModel": {
        "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "encoder_hidden_size": 32, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
    },
    "AceStepConditionEncoder": {
        "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "text_hidden_dim": TEXT, "num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1,
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {
            "hidden_size": TEXT, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
            "max_position_embeddings": 2048, "max_window_layers": 2, "layer_types": None,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": TEXT, "fullatt_block_indexes": [1],
        },
    },
    "Qwen3ForCausalLM": {**_TEXT_ENCODER, "num_hidden_layers": 28},  # klein reads its layers 9, 18 and 27
    "UMT5EncoderModel": _T5,
    "T5EncoderModel": _T5,
    "CLIPTextModel": {
        "hidden_size": TEXT, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2, "projection_dim": TEXT,
    },
}  # fmt: skip
"""Class -> its dimensions. Numbers that other components must match (channels of latents, sample rates) are the real ones."""
BYTES: Final = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2, Dtype.BFLOAT16: 2}
LISTED: Final = (
    "z-image-turbo",
    "flux2-klein-4b",
    "qwen-image-2512",
    "qwen-image-edit-2511",
    "flux-schnell",
    "ltx-video",
    "ltx23-distilled",
    "wan22-ti2v-5b",
    "wan22-i2v",
    "wan22-t2v",
    "wan22-i2v-lightning",
    "wan22-t2v-lightning",
    "wan-vace-14b",
    "stable-audio-open",
    "ace-step-xl-turbo",
    "csm",
)
"""The records that are complete enough to build."""


def record(name: str) -> dict[str, Any]:
    """Return the record of a model's repository, which several models may share."""
    found: dict[str, Any] = json.loads((RECORDS / f"{name.removesuffix('-lightning')}.json").read_text("utf-8"))
    return found


def build_lora(repository: Path, lora: Lora, folder: Path) -> None:
    """Write a LoRA for the networks of a repository that was built, under the names of its real files."""
    for part, file in (("transformer", lora.weights), ("transformer_2", lora.second)):
        if file is not None:
            path = folder / file.file
            path.parent.mkdir(parents=True, exist_ok=True)
            tiny.lora(repository / part, path, prefix="transformer")


def build(name: str, folder: Path) -> None:
    """Write the model's repository: model_index.json, and each component with its config and its kind of files."""
    torch.manual_seed(0)
    found = record(name)
    if found["model_index"] is None:
        _speech(found["components"]["transformer"], folder)
        return
    index = dict(found["model_index"])
    folder.mkdir(parents=True)
    if "processor" not in found["components"]:  # for a service that movieq does not use: better prompts
        index.pop("processor", None)
    (folder / "model_index.json").write_text(json.dumps(index))
    vocabulary: dict[str, Any] = {}
    for part in sorted(index, key=lambda part: not part.startswith("tokenizer")):
        if not isinstance(index[part], list) or index[part][0] is None:
            continue
        listed = found["components"][part]
        if part.startswith("tokenizer"):
            vocabulary[part.replace("tokenizer", "text_encoder")] = _tokenizer(index[part][1], listed.get("files") or [], folder / part)
        elif part == "processor":
            _processor(folder / part)
        elif part == "scheduler":
            _scheduler(listed["config"], folder / part)
        else:
            _weights(index[part], listed, vocabulary.get(part), folder / part)


def sizes(name: str, entry: Model) -> dict[str, Component]:
    """Return the sizes of the real model's components as they are loaded on a GPU, from their configs and without any memory."""
    from accelerate import init_empty_weights

    found = record(name)
    components = {}
    index = found["model_index"] or {NETWORK: ["transformers", found["pipeline"]]}
    for part, listed in index.items():
        if not isinstance(listed, list) or listed[0] is None or part.startswith(("scheduler", "tokenizer", "processor")):
            continue
        cls, config = _class(listed), _config(found["components"][part])
        with init_empty_weights():
            model = cls(cls.config_class(**config)) if listed[0] == "transformers" else cls.from_config(config)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        width = BYTES[entry.dtypes.get(part, entry.dtype)]
        components[part] = component([(name, each.numel() * width) for name, each in model.named_parameters()])
    return components


def _class(listed: list[str]) -> Any:
    library, name = listed
    return getattr(importlib.import_module(library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"), name)


def _config(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the component's config without what is about the file itself."""
    return {key: value for key, value in (recorded["config"] or {}).items() if not key.startswith("_") and value is not None}


def _merged(config: dict[str, Any], shrunk: dict[str, Any]) -> dict[str, Any]:
    """Return the config with shrunk dimensions, also those of configs within it; None takes a value out."""
    found = dict(config)
    for key, value in shrunk.items():
        found[key] = _merged(config.get(key, {}), value) if isinstance(value, dict) else value
    return {key: value for key, value in found.items() if value is not None}


def _weights(listed: list[str], recorded: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    library, name = listed
    cls = _class(listed)
    config = _merged(_config(recorded), SHRUNK[name])
    if library == "transformers":
        size, special = tokenizer
        for each in (config, config.get("text_config")):
            if each is not None:
                each |= {
                    "vocab_size": size,
                    **{key: value for key, value in special.items() if key in each or key.startswith(("bos", "eos", "pad"))},
                }
        model = cls(cls.config_class(**config))
    else:
        model = cls.from_config(config)
    with torch.no_grad():
        for each in model.parameters():
            if not each.isfinite().all() or each.abs().max() > 1e3:  # left as they were in memory
                each.zero_()
    shards = len(recorded.get("shards") or [1])
    size = sum(each.nbytes for each in model.state_dict().values())
    model.save_pretrained(folder, **({"max_shard_size": size // shards + 1} if shards > 1 else {}))


def _processor(folder: Path) -> None:
    """Write the processor of Qwen2-VL: its tokenizer, and how it cuts pictures into patches."""
    tokenizer, _ = tiny.qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    pictures = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": "Qwen2VLVideoProcessor"}))


def _speech(recorded: dict[str, Any], folder: Path) -> None:
    """Write a CSM, whose weights have names of their own, beside weights in another layout under the usual name."""
    from transformers import CsmConfig

    processor, size = tiny.csm_processor()
    config = _merged(_config(recorded), SHRUNK["CsmForConditionalGeneration"]) | {"text_vocab_size": size}
    model = tiny.csm_model(CsmConfig(**config))
    shards = len(recorded["shards"])
    model.save_pretrained(folder, max_shard_size=sum(each.nbytes for each in model.state_dict().values()) // shards + 1)
    index = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "transformers.safetensors.index.json").write_text(index.replace('"model-', '"transformers-'))
    for shard in folder.glob("model-*.safetensors"):
        shard.rename(shard.with_name(shard.name.replace("model-", "transformers-", 1)))
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"transformers_weights": recorded["config"]["transformers_weights"]}))
    (folder / "model.safetensors").write_bytes(b"another layout")
    processor.save_pretrained(folder)


def _scheduler(config: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    (folder / "scheduler_config.json").write_text(json.dumps(config))


def _tokenizer(name: str, files: list[str], folder: Path) -> tuple[int, dict[str, Any]]:
    """Write a tokenizer of this class with a vocabulary of single characters; return its size and its special tokens."""
    if name.startswith("CLIP"):
        tokenizer, size = tiny.clip_tokenizer()
        special = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    elif name.startswith("Gemma"):
        tokenizer, size = tiny.gemma_tokenizer()
        special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    elif name.startswith("Qwen2"):
        tokenizer, size = tiny.qwen_tokenizer()
        special = {"bos_token_id": size - 6, "eos_token_id": size - 4}
        vision = ("vision_start_token_id", "vision_end_token_id", "image_token_id")
        special |= {each: size - 3 + number for number, each in enumerate(vision)}
    else:
        tokenizer, size = tiny.t5_tokenizer()
        special = {"pad_token_id": 0, "eos_token_id": 1}
    tokenizer.save_pretrained(folder)
    if files and "tokenizer.json" not in files and "spiece.model" in files:
        tiny.sentencepiece(folder)
    return size, special
