"""What every format must do; the cases come from FORMATS, so a new format is tested here by being listed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError
from quantool.formats import FORMATS, detect
from quantool.io import TensorInfo
from quantool.io.safetensors import DTYPES, SafetensorsCheckpoint
from quantool.quant import QuantizedTensor, dequantize_affine
from quantool.scheme import FORMAT_NAMES, QuantScheme

SHARED = Path(__file__).resolve().parents[2] / "../shared"
FLOAT_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LIMIT = settings(deadline=None, max_examples=150)


@st.composite
def accepted_cases(draw: st.DrawFn, word: str) -> tuple[QuantScheme, tuple[int, int]]:
    """A scheme and a shape that the format does not reject; rows are multiples of what it takes at least."""
    rejects = FORMATS[word].rejects
    sizes = [-1, 0, 1, 3, 8, 16, 20, 32]
    every = [QuantScheme(bits, size, sym) for bits in range(2, 9) for size in sizes for sym in (True, False)]
    scheme = draw(st.sampled_from([scheme for scheme in every if rejects(scheme, (64, 480)) is None]))
    least = next(rows for rows in range(1, 65) if rejects(scheme, (rows, 480)) is None)
    columns = draw(st.integers(1, 70)) if scheme.group_size < 1 else scheme.group_size * draw(st.integers(1, 5))
    return scheme, (least * draw(st.integers(1, 40 // least)), columns)


def random_tensor(scheme: QuantScheme, shape: tuple[int, int], scale_dtype: torch.dtype, seed: int) -> QuantizedTensor:
    random = torch.Generator().manual_seed(seed)
    grid = (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(0, scheme.max_code + 1, shape, generator=random, dtype=torch.uint8)
    zeros = torch.randint(0, scheme.max_code + 1, grid, generator=random, dtype=torch.uint8)
    scales = torch.rand(grid, generator=random) * 0.1 + 1e-3
    return QuantizedTensor(codes, scales.to(scale_dtype), None if scheme.sym else zeros, scheme)


def infos_of(tensors: dict[str, torch.Tensor], module: str = "model.layers.0.up_proj") -> dict[str, TensorInfo]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        f"{module}.{suffix}": TensorInfo(f"{module}.{suffix}", tuple(t.shape), names[t.dtype], t.nbytes, Path("m"))
        for suffix, t in tensors.items()
    }


def assert_equal(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert a.codes.dtype == b.codes.dtype == torch.uint8
    assert torch.equal(a.codes, b.codes)
    assert a.scales.dtype == b.scales.dtype
    assert torch.equal(a.scales, b.scales)
    assert (a.zeros is None) == (b.zeros is None)
    assert a.zeros is None or torch.equal(a.zeros, b.zeros)


def test_the_table_holds_what_the_command_line_offers() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES
    assert all(word == module.NAME for word, module in FORMATS.items())


@pytest.mark.parametrize("word", FORMATS)
@LIMIT
@given(st.data(), st.sampled_from(FLOAT_DTYPES), st.integers(0, 2**32))
def test_unpack_inverts_pack_and_layout_is_what_pack_returns(
    word: str, data: st.DataObject, model_dtype: torch.dtype, seed: int
) -> None:
    scheme, shape = data.draw(accepted_cases(word))
    format_ = FORMATS[word]
    assert format_.rejects(scheme, shape) is None
    stored = format_.round_scales(torch.ones(1), model_dtype).dtype
    q = random_tensor(scheme, shape, stored, seed)
    packed = format_.pack(q)
    assert {s: (t.dtype, tuple(t.shape)) for s, t in packed.items()} == {
        s: (DTYPES[dtype], shape) for s, (dtype, shape) in format_.layout(scheme, shape, model_dtype).items()
    }
    # also the strides of dimensions of length 1, which a writer's view as bytes looks at
    assert all(t.stride() == torch.empty(t.shape).stride() for t in packed.values())
    assert set(packed) <= set(format_.SUFFIXES)
    assert_equal(format_.unpack(packed, scheme), q)

    # and the way a reader comes to it: config.json and tensor shapes
    config = json.loads(json.dumps(format_.quantization_config({"model.layers.0.up_proj": scheme}, ["lm_head"])))
    assert detect({"quantization_config": config}) is format_
    read = format_.module_schemes(config, infos_of(packed))
    assert list(read) == ["model.layers.0.up_proj"]
    again = format_.unpack(packed, read["model.layers.0.up_proj"])
    assert torch.equal(dequantize_affine(again), dequantize_affine(q))


@pytest.mark.parametrize("word", FORMATS)
def test_some_scheme_is_accepted_and_a_rejection_is_one_line(word: str) -> None:
    shapes = [(32, 64), (33, 64)]
    schemes = [QuantScheme(bits, 32, sym) for bits in range(2, 9) for sym in (True, False)]
    reasons = [FORMATS[word].rejects(scheme, shape) for scheme in schemes for shape in shapes]
    assert None in reasons
    assert FORMATS[word].rejects(QuantScheme(8, -1, act_bits=8), (32, 64))
    assert all(reason is None or "\n" not in reason for reason in reasons)


@pytest.mark.parametrize("word", FORMATS)
@pytest.mark.parametrize("model_dtype", FLOAT_DTYPES)
def test_rounded_scales_are_positive_finite_and_near(word: str, model_dtype: torch.dtype) -> None:
    round_scales = FORMATS[word].round_scales
    extremes = torch.tensor([[0.0, 1e-45, 1e-38, 1e-9, 7e4, 3e38, float("inf")]])
    rounded = round_scales(extremes, model_dtype)
    assert torch.isfinite(rounded).all()
    assert (rounded.to(torch.float32) > 0).all()
    usual = torch.logspace(-3, 3, 1000).view(10, 100)
    error = (round_scales(usual, model_dtype).to(torch.float32) - usual).abs() / usual
    assert error.max() <= (2**-8 if model_dtype == torch.bfloat16 else 2**-11)


@LIMIT
@given(st.integers(1, 5), st.sampled_from([-1, 8, 32]), st.booleans(), st.integers(0, 2**32))
def test_awq_and_compressed_tensors_hold_the_same_weights(eights: int, group_size: int, sym: bool, seed: int) -> None:
    scheme = QuantScheme(4, group_size, sym=sym)
    q = random_tensor(scheme, (8 * eights, 96), torch.float16, seed)
    weights = [dequantize_affine(f.unpack(f.pack(q), scheme)) for f in FORMATS.values()]
    assert all(torch.equal(w, dequantize_affine(q)) for w in weights)


def test_a_float_checkpoint_has_no_format() -> None:
    assert detect({"model_type": "llama"}) is None
    assert detect({"quantization_config": None}) is None


@pytest.mark.parametrize("section", [{"quant_method": "gptq"}, {"quant_method": ["awq"]}, {}, [], "awq", 4])
def test_an_unknown_quant_method_is_named(section: Any) -> None:
    with pytest.raises(QuantoolError, match="expected 'compressed-tensors' or 'awq'") as caught:
        detect({"quantization_config": section})
    if section == {"quant_method": "gptq"}:
        assert "'gptq'" in caught.value.message


# largest relative error of a module's weights against the float model, for peers that did not scale them
PEERS = {
    "ct-mixed-w4-w8": 0.14,
    "ct-w3a16-sym-g64": 0.3,
    "ct-w4a16-asym-g64-gptq": 0.16,
    "ct-w4a16-sym-g128": 0.14,
    "ct-w8a16-channel": 0.01,
    "ct-w8a8-smoothquant": None,
    "ct-w8a8-static": 0.01,
    "ar-auto_awq": 0.14,
}


@pytest.mark.parametrize("peer", PEERS)
def test_checkpoints_of_other_tools(peer: str) -> None:
    if not (SHARED / "peers" / peer).is_dir():
        pytest.skip("needs ../shared/peers")
    checkpoint = SafetensorsCheckpoint(SHARED / "peers" / peer)
    original = SafetensorsCheckpoint(SHARED / "models/tinystories-656k")
    format_ = detect(checkpoint.config)
    schemes = format_.module_schemes(checkpoint.config["quantization_config"], checkpoint.infos)
    assert set(schemes) == {name.removesuffix(".weight") for name in original.infos if name.endswith("_proj.weight")}
    for module, scheme in schemes.items():
        stored = {s: f"{module}.{s}" for s in format_.SUFFIXES if f"{module}.{s}" in checkpoint.infos}
        q = format_.unpack({s: checkpoint.read(name) for s, name in stored.items()}, scheme)
        assert q.codes.max() <= scheme.max_code
        weight = original.read(f"{module}.weight").to(torch.float32)
        error = (dequantize_affine(q) - weight).norm() / weight.norm()
        if PEERS[peer] is not None:
            assert error < (0.01 if scheme.bits == 8 else PEERS[peer]), module
        assert (q.input_scale is not None) == (peer == "ct-w8a8-static")


def test_schemes_of_other_tools_are_named() -> None:
    if not (SHARED / "peers").is_dir():
        pytest.skip("needs ../shared/peers")
    found = {}
    for peer in PEERS:
        checkpoint = SafetensorsCheckpoint(SHARED / "peers" / peer)
        schemes = detect(checkpoint.config).module_schemes(checkpoint.config["quantization_config"], checkpoint.infos)
        found[peer] = sorted({(str(scheme), scheme.act_dynamic) for scheme in schemes.values()})
    assert found == {
        "ct-mixed-w4-w8": [("W4A16 sym g64", True), ("W8A16 sym channel", True)],
        "ct-w3a16-sym-g64": [("W3A16 sym g64", True)],
        "ct-w4a16-asym-g64-gptq": [("W4A16 asym g64", True)],
        "ct-w4a16-sym-g128": [("W4A16 sym g128", True)],
        "ct-w8a16-channel": [("W8A16 sym channel", True)],
        "ct-w8a8-smoothquant": [("W8A8 sym channel", True)],
        "ct-w8a8-static": [("W8A8 sym channel", False)],
        "ar-auto_awq": [("W4A16 asym g64", True)],
    }
