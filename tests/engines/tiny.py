"""Tiny pipelines with random weights for the tests, built from configs without a network and saved like real ones.

Sizes are the smallest that the classes accept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHARS = [chr(c) for c in range(33, 127)]


# ── tokenizers: all local, one piece per printable character ──
def clip_tokenizer() -> tuple[Any, int]:
    from transformers import CLIPTokenizer

    vocab = {c: i for i, c in enumerate(CHARS)}
    vocab |= {c + "</w>": len(CHARS) + i for i, c in enumerate(CHARS)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    # model_max_length is a must: without it the pipelines pad to 1e30 (OverflowError)
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77), len(vocab)


def t5_tokenizer() -> tuple[Any, int]:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(c, -3.0) for c in CHARS if c != "▁"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=128), len(pieces)


def sentencepiece(folder: Path) -> None:
    """Replace the files of a T5 tokenizer by a spiece.model alone."""
    import sentencepiece as library

    for file in folder.iterdir():
        file.unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "model_max_length": 128, "extra_ids": 0}')
    with (folder / "spiece.model").open("wb") as model:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(["a lighthouse in a storm", "zebras jump; waltz quiz"] * 20),
            model_writer=model,
            vocab_size=60,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )


def gemma_tokenizer() -> tuple[Any, int]:
    from transformers import GemmaTokenizer

    vocab = {piece: number for number, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *CHARS])}
    return GemmaTokenizer(vocab=vocab, merges=[], model_max_length=1024), len(vocab)


def qwen_tokenizer() -> tuple[Any, int]:
    """A byte-level BPE without merges; ZImage, Flux.2 and Qwen-Image call apply_chat_template on theirs."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    specials = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    for special in ("<|endoftext|>", *specials):
        vocab[special] = len(vocab)
    tok = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(specials),
        model_max_length=512,
    )
    tok.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tok, len(vocab)


# ── text encoders ──
def t5_encoder(vocab_size: int, dim: int = 32, umt5: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    kw: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": dim,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return UMT5EncoderModel(UMT5Config(**kw)) if umt5 else T5EncoderModel(T5Config(**kw))


def clip_text(vocab_size: int, dim: int = 32, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # bos/eos must be the tokenizer's own ids: the pooled embedding is read at eos
    cfg = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=dim,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(cfg)


# ── pipelines ──
def sd(path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tok, v = clip_tokenizer()
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
        ),
        text_encoder=clip_text(v),
        tokenizer=tok,
        unet=UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=32,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)


def sd3(path: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tok, v = clip_tokenizer()
    t5, tv = t5_tokenizer()
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
        ),
        text_encoder=clip_text(v, projection=True),
        tokenizer=tok,
        text_encoder_2=clip_text(v, projection=True),
        tokenizer_2=clip_tokenizer()[0],
        text_encoder_3=t5_encoder(tv),
        tokenizer_3=t5,
    ).save_pretrained(path)


def flux(path: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tok, v = clip_tokenizer()
    t5, tv = t5_tokenizer()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip_text(v),
        tokenizer=tok,
        text_encoder_2=t5_encoder(tv),
        tokenizer_2=t5,
        vae=AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
        ),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
    ).save_pretrained(path)


def z_image(path: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tok, v = qwen_tokenizer()
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=v,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # x_pad_token and cap_pad_token are torch.empty: whatever was in memory, NaN now and then
        transformer.x_pad_token.zero_()
        transformer.cap_pad_token.zero_()
    ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=text,
        tokenizer=tok,
        vae=AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=16,
            norm_num_groups=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
    ).save_pretrained(path)


def _ltx_parts(shifting: bool = True) -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel

    t5, tv = t5_tokenizer()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return {
        "transformer": LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifting, base_shift=0.95, max_shift=2.05),
        "text_encoder": t5_encoder(tv),
        "tokenizer": t5,
    }


def ltx(path: Path) -> None:
    from diffusers import LTXPipeline

    LTXPipeline(**_ltx_parts()).save_pretrained(path)


def ltx_condition(path: Path) -> None:
    """Build LTX with text, or images at given frames. It computes its own sigmas: with dynamic shifting it fails, asking for `mu`."""
    from diffusers import LTXConditionPipeline

    LTXConditionPipeline(**_ltx_parts(shifting=False)).save_pretrained(path)


def _wan_parts(in_channels: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    t5, tv = t5_tokenizer()

    def transformer() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=in_channels,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    return {
        "transformer": transformer(),
        "transformer_2": transformer(),
        "boundary_ratio": 0.9,
        "vae": AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "text_encoder": t5_encoder(tv, umt5=True),
        "tokenizer": t5,
    }


def wan(path: Path) -> None:
    from diffusers import WanPipeline

    WanPipeline(**_wan_parts(16)).save_pretrained(path)


def wan_i2v(path: Path) -> None:
    """Build one like Wan 2.2 A14B: two experts, 36 channels (16 noise, 4 mask, 16 image), no image encoder. ftfy cleans its prompts."""
    from diffusers import WanImageToVideoPipeline

    WanImageToVideoPipeline(image_encoder=None, image_processor=None, **_wan_parts(36)).save_pretrained(path)


def stable_audio(path: Path) -> None:
    from diffusers import AutoencoderOobleck, CosineDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    t5, tv = t5_tokenizer()
    StableAudioPipeline(
        transformer=StableAudioDiTModel(
            sample_size=4096,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            time_proj_dim=8,
            cross_attention_input_dim=4,
            global_states_input_dim=8,
            cross_attention_dim=4,
        ),
        scheduler=CosineDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
        ),  # that of the real one; it needs torchsde
        vae=AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[4, 4, 8],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 2, 4],
            sampling_rate=8000,
        ),  # 4096 latents * 128 / 8000: windows up to 65 s
        text_encoder=t5_encoder(tv, dim=4),
        tokenizer=t5,
        projection_model=StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32),
    ).save_pretrained(path)


def vits(path: Path) -> None:
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    path.mkdir(parents=True, exist_ok=True)
    letters = ["<pad>", "<unk>", "|", " ", "'", "-", *"abcdefghijklmnopqrstuvwxyz"]
    (path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    # phonemize=False as in MMS-TTS: the default asks for the phonemizer package and Debian's espeak
    tok = VitsTokenizer(str(path / "vocab.json"), phonemize=False, language="eng", pad_token="<pad>", unk_token="<unk>")
    cfg = VitsConfig(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        flow_size=16,
        spectrogram_bins=9,
        posterior_encoder_num_wavenet_layers=2,
        prior_encoder_num_flows=2,
        duration_predictor_num_flows=2,
        duration_predictor_filter_channels=32,
        depth_separable_num_layers=2,
        upsample_initial_channel=32,
        upsample_rates=[8, 8],
        upsample_kernel_sizes=[16, 16],
        prior_encoder_num_wavenet_layers=2,
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3, 5]],
        sampling_rate=16000,
    )
    VitsModel(cfg).save_pretrained(path)
    tok.save_pretrained(path)


CSM_SPECIALS = ["<pad>", "<bos>", "<eos>", "<|AUDIO|>", "<|audio_eos|>"]


def csm_processor() -> tuple[Any, int]:
    """Return the processor of a CSM, and the size of its vocabulary; `CSM_SPECIALS` have the numbers from 0 on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CsmProcessor, EncodecFeatureExtractor, PreTrainedTokenizerFast

    vocab = {each: number for number, each in enumerate([*CSM_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    words = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", additional_special_tokens=CSM_SPECIALS[3:]
    )
    template = (
        "{% for m in messages %}<bos>[{{ m.role }}]{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}<eos>"
        "{% else %}<|AUDIO|><|audio_eos|>{% endif %}{% endfor %}{% endfor %}"
    )
    return CsmProcessor(EncodecFeatureExtractor(sampling_rate=24000), tokenizer, chat_template=template), len(vocab)


def csm(path: Path) -> None:
    """Build a speech model that goes on in the voice that it hears."""
    from transformers import CsmConfig

    processor, size = csm_processor()
    config = CsmConfig(
        num_codebooks=4,
        vocab_size=64,
        text_vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        codebook_pad_token_id=63,
        codebook_eos_token_id=0,
        bos_token_id=1,
        audio_token_id=3,
        audio_eos_token_id=4,
        depth_decoder_config={
            "num_codebooks": 4,
            "backbone_hidden_size": 16,
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 5,
        },
        codec_config={
            "model_type": "mimi",
            "sampling_rate": 24000,
            "hidden_size": 32,
            "num_filters": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "codebook_size": 64,
            "codebook_dim": 8,
            "vector_quantization_hidden_dimension": 8,
            "num_quantizers": 4,
            "upsample_groups": 32,
            "head_dim": 16,
        },
    )
    csm_model(config).save_pretrained(path)
    processor.save_pretrained(path)


def csm_model(config: Any) -> Any:
    """Return a CSM with random weights, whose codec can encode."""
    from transformers import CsmForConditionalGeneration

    model = CsmForConditionalGeneration(config)
    for name, buffer in model.codec_model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    model.generation_config.update(do_sample=True, temperature=0.9, max_new_tokens=25)
    return model


def lora(part: Path, path: Path, seed: int = 1, width: int | None = None, prefix: str | None = None) -> dict[str, str]:
    """Write a LoRA for the attention layers of a network, whose folder is `part`; return the `weights` of its entry."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    random, tensors, rank = torch.Generator().manual_seed(seed), {}, 4
    for file in sorted(part.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # it is no mapping
                if key.endswith((".to_q.weight", ".to_v.weight")):
                    outputs, inputs = opened.get_slice(key).get_shape()
                    layer = f"{prefix or part.name}.{key.removesuffix('.weight')}"
                    tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, width or inputs, generator=random)
                    tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=random)
    path = path.with_suffix(".safetensors")
    save_file(tensors, path)
    return {"repository": str(path.parent), "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


BUILDERS: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (sd, sd3, flux, z_image, ltx, ltx_condition, wan, wan_i2v, stable_audio, vits, csm)
}
