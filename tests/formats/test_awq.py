"""The AutoAWQ layout: golden words, another implementation's reader, and the config."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quantool.errors import QuantoolError
from quantool.formats import awq
from quantool.io import TensorInfo
from quantool.quant import QuantizedTensor, dequantize_affine
from quantool.scheme import QuantScheme

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def random_tensor(rows: int = 16, columns: int = 64, *, group_size: int = 32, sym: bool = False) -> QuantizedTensor:
    random = torch.Generator().manual_seed(0)
    scheme = QuantScheme(4, group_size, sym=sym)
    grid = (rows, scheme.groups(columns))
    return QuantizedTensor(
        torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8),
        (torch.rand(grid, generator=random) + 0.01).to(torch.float16),
        None if sym else torch.randint(0, 16, grid, generator=random, dtype=torch.uint8),
        scheme,
    )


def infos(**shapes: tuple[Any, ...] | None) -> dict[str, TensorInfo]:
    """X.suffix -> TensorInfo; a value is (dtype, *shape)."""
    tensors = {"qweight": ("I32", 64, 2), "qzeros": ("I32", 2, 2), "scales": ("F16", 2, 16)} | shapes
    return {
        f"X.{suffix}": TensorInfo(f"X.{suffix}", tuple(value[1:]), value[0], 0, Path("a/model.safetensors"))
        for suffix, value in tensors.items()
        if value
    }


def test_golden_word() -> None:
    codes = torch.arange(8, dtype=torch.uint8).view(8, 1)
    q = QuantizedTensor(codes, torch.ones(8, 1, dtype=torch.float16), codes.flip(0), QuantScheme(4, -1, sym=False))
    packed = awq.pack(q)
    assert packed["qweight"].tolist() == [[0x75316420]]
    assert packed["qzeros"].view(torch.uint8).flatten().tolist() == [0x57, 0x13, 0x46, 0x02]
    assert packed["scales"].shape == (1, 8)


def test_symmetric_weights_are_written_with_zeros_at_8() -> None:
    q = random_tensor(sym=True)
    packed = awq.pack(q)
    assert set(packed["qzeros"].flatten().tolist()) == {0x88888888 - (1 << 32)}
    read = awq.unpack(packed, QuantScheme(4, 32, sym=False))
    assert torch.equal(dequantize_affine(read), dequantize_affine(q))


def test_equals_the_converter_of_compressed_tensors() -> None:
    library = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    q = random_tensor()
    tensors = {f"X.{suffix}": tensor for suffix, tensor in awq.pack(q).items()}
    weight, scale, zero_point = library.AutoAWQConverter(group_size=32)._convert_gemm_module(
        tensors["X.qweight"], tensors["X.scales"], tensors["X.qzeros"]
    )
    assert torch.equal(weight.to(torch.int32) + 8, q.codes.to(torch.int32))
    assert torch.equal(zero_point.to(torch.int32) + 8, q.zeros.to(torch.int32))
    assert torch.equal(scale, q.scales)


def test_scales_of_a_bfloat16_model_are_exact_in_both_dtypes() -> None:
    scales = torch.cat([torch.logspace(-12, 6, 5000), torch.tensor([0.0, 2.0**-24, 6e-5, 65504.0, 1e38])])
    rounded = awq.round_scales(scales, torch.bfloat16)
    assert rounded.dtype == torch.float16
    assert torch.equal(rounded.to(torch.bfloat16).to(torch.float32), rounded.to(torch.float32))
    kept = (scales > 1e-3) & (scales < 6e4)
    assert torch.equal(rounded[kept].to(torch.float32), scales[kept].to(torch.bfloat16).to(torch.float32))
    # a float16 model keeps the 11 bits that it has
    assert torch.equal(awq.round_scales(scales[kept], torch.float16), scales[kept].to(torch.float16))


def test_what_it_rejects() -> None:
    assert awq.rejects(QuantScheme(4, 128, sym=False), (64, 256)) is None
    assert awq.rejects(QuantScheme(4, -1), (64, 256)) is None
    assert "W3A16" in awq.rejects(QuantScheme(3, 128), (64, 256))
    assert "60 is not a multiple of 8" in awq.rejects(QuantScheme(4, 128), (60, 256))
    assert "NF4" in awq.rejects(QuantScheme(4, 64, dtype="nf4"), (64, 256))
    assert "W4A8" in awq.rejects(QuantScheme(4, 64, act_bits=8), (64, 256))


def test_config_is_autoawqs() -> None:
    schemes = {"model.layers.0.up_proj": QuantScheme(4, 64, sym=False), "model.layers.0.down_proj": QuantScheme(4, 64)}
    assert awq.quantization_config(schemes, ["lm_head"]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert awq.quantization_config({"a": QuantScheme(4, 0), "b": QuantScheme(4, -1)}, [])["group_size"] == -1


def test_config_refuses_what_it_cannot_say() -> None:
    with pytest.raises(QuantoolError, match="one group size for all modules, found 32, 64") as caught:
        awq.quantization_config({"a": QuantScheme(4, 64), "b": QuantScheme(4, 32)}, [])
    assert caught.value.hint == "use --format compressed-tensors"
    # vLLM finds kept modules by substring: it would leave gate_proj in float too
    with pytest.raises(
        QuantoolError, match=r"'model\.mlp\.gate' in float, its name is part of 'model\.mlp\.gate_proj'"
    ):
        awq.quantization_config({"model.mlp.gate_proj": QuantScheme(4, 64)}, ["lm_head", "model.mlp.gate"])


def test_schemes_of_the_modules_that_are_packed() -> None:
    read = awq.module_schemes(CONFIG, infos() | {"Y.weight": TensorInfo("Y.weight", (4, 4), "F16", 32, Path("m"))})
    assert read == {"X": QuantScheme(4, 32, sym=False)}
    per_channel = infos(qzeros=("I32", 1, 2), scales=("F16", 1, 16))
    assert awq.module_schemes(CONFIG | {"group_size": -1}, per_channel) == {"X": QuantScheme(4, -1, sym=False)}


def test_modules_that_differ() -> None:
    """auto-round's and GPTQModel's own values of a module."""
    other = {name.replace("X", "Y"): info for name, info in infos(qzeros=("I32", 4, 2), scales=("F16", 4, 16)).items()}
    expected = {"X": QuantScheme(4, 32, sym=False), "Y": QuantScheme(4, 16, sym=False)}
    for changes in ({"extra_config": {"Y": {"group_size": 16}}}, {"dynamic": {"+:Y$": {"group_size": 16}}}):
        assert awq.module_schemes(CONFIG | changes, infos() | other) == expected


def test_a_config_without_zero_points_is_symmetric_if_the_zeros_agree() -> None:
    scheme = awq.module_schemes(CONFIG | {"zero_point": False}, infos(qzeros=None))["X"]
    assert scheme.sym
    packed = awq.pack(random_tensor(sym=True))
    assert awq.unpack(packed, scheme).zeros is None
    assert awq.unpack({k: v for k, v in packed.items() if k != "qzeros"}, scheme).zeros is None
    with pytest.raises(QuantoolError, match="'qzeros': expected 8 everywhere"):
        awq.unpack(awq.pack(random_tensor()), scheme)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": "gemv"}, "awq version 'gemv' cannot be read"),
        ({"version": 3}, "awq version 3 cannot be read"),
        ({"bits": 3}, "awq with bits 3 cannot be read"),
        ({"bits": None}, "bits None"),
        ({"version": None, "format": "gemv_fast"}, "awq version 'gemv_fast' cannot be read"),
        ({"data_type": "mx_fp"}, "awq with data_type 'mx_fp' cannot be read"),
        ({"rotation": True}, "'rotation' is not a key that is known here"),
        ({"dynamic": {"-:X": {}}}, "module 'X' has quantized weights, but config.json leaves it in float"),
        ({"extra_config": {"X": {"bits": 8}}}, "awq with bits 8 cannot be read"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "128"}, "group_size is '128'"),
        ({"group_size": True}, "group_size is True"),
    ],
)
def test_a_config_that_cannot_be_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantoolError, match=message):
        awq.module_schemes(CONFIG | config, infos())


def test_a_config_is_read_also_when_nothing_is_quantized() -> None:
    assert awq.module_schemes(CONFIG, {}) == {}
    with pytest.raises(QuantoolError, match="awq with bits None"):
        awq.module_schemes({"quant_method": "awq"}, {})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"scales": ("F16", 2, 8)}, r"model.safetensors: tensor 'X.scales': expected \[2, 16\] .*, found \[2, 8\] F16"),
        ({"scales": ("I32", 2, 16)}, r"'X.scales': expected .* found \[2, 16\] I32"),
        ({"scales": None}, "'X.scales' is missing"),
        ({"qzeros": None}, "'X.qzeros' is missing"),
        ({"qzeros": ("I32", 2, 3)}, r"'X.qzeros': expected \[2, 2\] I32, found \[2, 3\] I32"),
        ({"qweight": ("I16", 64, 2)}, "'X.qweight': expected a matrix of I32"),
        ({"qweight": ("I32", 64, 2, 1)}, "'X.qweight': expected a matrix of I32"),
        ({"qweight": ("I32", 0, 2)}, "'X.qweight': expected a matrix of I32"),
        ({"qweight": ("I32", 60, 2)}, "'X.qweight': expected rows in groups of 32, found 60"),
        ({"g_idx": ("I32", 64)}, "module 'X' has g_idx"),
    ],
)
def test_tensors_that_contradict_the_config(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantoolError, match=message):
        awq.module_schemes(CONFIG, infos(**shapes))
