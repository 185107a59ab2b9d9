"""Where a model lies is decided from the sizes in its weight files, before anything is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from movieq.errors import ModelUnavailable, OutOfMemory
from movieq.models.table import Model
from workers.child.diffusion import placement
from workers.child.diffusion.placement import GIB, Component, Needs, Placement

ENTRY = msgspec.convert(
    {
        "engine": "diffusers",
        "kind": "gpu_heavy",
        "tasks": {"generate_video": 1},
        "weights": {"repository": "/weights"},
        "pipeline": "WanPipeline",
        "dtype": "bfloat16",
        "dtypes": {"vae": "float32"},
    },
    Model,
)


def weight_file(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> Path:
    """Write the header of a safetensors file, without its data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"__metadata__": {"format": "pt"}, **{name: {"dtype": d, "shape": s} for name, (d, s) in tensors.items()}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def test_sizes_are_those_after_the_cast_to_the_entrys_dtypes(tmp_path: Path) -> None:
    weight_file(
        tmp_path / "transformer" / "diffusion_pytorch_model.safetensors",
        {
            "blocks.0.a": ("F32", [100]),
            "blocks.0.b": ("F32", [50]),
            "blocks.1.a": ("F32", [120]),
            "head": ("BF16", [10]),
            "ids": ("I64", [3]),
        },
    )
    weight_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"conv": ("BF16", [8, 8])})
    folders = {name: tmp_path / name for name in ("transformer", "vae", "gone")}
    found = placement.components(ENTRY, folders, on_cpu=False)
    assert found == {"transformer": Component(2 * 280 + 24, 300), "vae": Component(4 * 64, 4 * 64)}
    assert placement.components(ENTRY, folders, on_cpu=True)["transformer"].weights == 4 * 280 + 24


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 8 + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}', b"PK\x03\x04" * 9]
)
def test_weights_that_are_no_safetensors_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"model.safetensors is not a safetensors file .*movieq models pull"):
        placement.components(ENTRY, {"unet": tmp_path}, on_cpu=False)


def needs(*components: tuple[str, float, float], activations: float) -> Needs:
    return Needs({name: Component(int(w * GIB), int(g * GIB)) for name, w, g in components}, int(activations * GIB))


LARGE = needs(("transformer", 30, 0.5), ("text_encoder", 10, 2), ("vae", 1, 1), activations=6)


@pytest.mark.parametrize(
    ("device_gib", "host_gib", "expected"),
    [(44.7, 0, Placement.WHOLE), (44.6, 41, Placement.GROUPS), (12.4, 41, Placement.GROUPS), (44.6, 40.9, None), (12.3, 100, None)],
)
def test_a_model_is_whole_or_streamed_in_groups_or_refused_with_what_would_fit(
    device_gib: float, host_gib: float, expected: Placement | None
) -> None:
    given: tuple[Any, ...] = ("wan", LARGE, int(device_gib * GIB), int(host_gib * GIB))
    if expected is not None:
        assert placement.choose(*given) is expected
        return
    with pytest.raises(OutOfMemory) as caught:
        placement.choose(*given)
    assert caught.value.message.startswith("wan needs 47.0 GiB of device memory, or 13.0 GiB and 41.0 GiB of host memory; this worker has")


@pytest.mark.parametrize(
    ("device_gib", "expected"), [(44.7, Placement.WHOLE), (44.6, Placement.FP8), (30.5, Placement.FP8), (30.3, Placement.GROUPS)]
)
def test_a_model_whose_entry_allows_8_bits_has_them_before_it_is_streamed(device_gib: float, expected: Placement) -> None:
    allowed = LARGE._replace(saved=15 * GIB)
    assert placement.choose("wan", allowed, int(device_gib * GIB), 100 * GIB) is expected
    with pytest.raises(OutOfMemory, match=r"^wan needs 32.0 GiB of device memory, or 13.0 GiB and 41.0 GiB"):
        placement.choose("wan", allowed, 12 * GIB, 100 * GIB)


def test_8_bits_save_what_the_dtype_of_the_component_takes_more() -> None:
    entry = msgspec.structs.replace(ENTRY, fp8=["transformer", "vae", "gone"])
    parts = {"transformer": Component(8 * GIB, GIB), "text_encoder": Component(4 * GIB, GIB), "vae": Component(4 * GIB, GIB)}
    assert placement.needs(ENTRY, parts, on_cpu=False).saved == 0
    share = placement.CASTABLE
    assert placement.needs(entry, parts, on_cpu=False).saved == pytest.approx(share * (4 + 3) * GIB), "the VAE is float32"
    assert placement.needs(entry, parts, on_cpu=True).saved == pytest.approx(share * (6 + 3) * GIB)


def test_the_table_says_what_weights_and_activations_take_together_if_it_says_more_than_the_weights() -> None:
    parts, large = {"transformer": Component(8 * GIB, GIB)}, msgspec.structs.replace(ENTRY, gpu_memory_gb=24)
    assert placement.needs(ENTRY, parts, on_cpu=False).whole == 10 * GIB
    assert placement.needs(large, parts, on_cpu=False).activations == 16 * GIB
    assert placement.needs(large, parts, on_cpu=True).activations == 2 * GIB, "it is a figure for GPUs"
