"""The bitsandbytes layout: golden bytes, what transformers and bitsandbytes themselves save and load, damaged files."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import safetensors.torch
import torch
from bitsandbytes.functional import QuantState
from families import make_model, save, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quantool
from quantool.errors import QuantoolError
from quantool.formats import bitsandbytes as layout_of
from quantool.formats import detect
from quantool.io import TensorInfo, model_dtype, open_checkpoint
from quantool.io.safetensors import DTYPES, dtype_name
from quantool.methods import WEIGHT_METHODS
from quantool.model.names import find_linears
from quantool.quant import QuantizedTensor
from quantool.scheme import MethodOptions, QuantScheme

LIMIT = settings(deadline=None, max_examples=200)
NF4 = QuantScheme(4, 64, dtype="nf4")
NF4_DOUBLE = replace(NF4, double_quant=True)
FP4 = replace(NF4, dtype="fp4")
INT8 = QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0)
PEERS = ("bnb-int8", "bnb-nf4", "bnb-nf4-dq")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
WHOLE_BLOCKS = {**SIZES, "intermediate_size": 128}
WINDOWS = tokens(2, 24)


def quantize(weight: torch.Tensor, scheme: QuantScheme) -> QuantizedTensor:
    method = scheme.dtype if scheme.flat else "llm-int8"
    return WEIGHT_METHODS[method](weight, scheme, lambda scales: scales, options=MethodOptions())


def packed(scheme: QuantScheme, rows: int = 5, columns: int = 70, seed: int = 0) -> dict[str, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return layout_of.pack(quantize(weight.to(torch.bfloat16), scheme))


def state_of(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    """Suffix and text of the JSON."""
    suffix = next(suffix for suffix in tensors if "quant_state" in suffix)
    return suffix, bytes(tensors[suffix].numpy()).decode()


def infos_of(tensors: dict[str, torch.Tensor], module: str = "m") -> dict[str, TensorInfo]:
    return {
        f"{module}.{suffix}": TensorInfo(f"{module}.{suffix}", tuple(t.shape), dtype_name(t.dtype), t.nbytes, Path("f"))
        for suffix, t in tensors.items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, padded: bool = False) -> None:
    """Names, dtypes, shapes and bytes; `padded`: spaces after the JSON aside."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        other = found[name]
        if padded and "quant_state" in name:
            assert bytes(other.numpy()).rstrip(b" ") == bytes(tensor.numpy())
            continue
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(other.view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_golden_bytes_of_4_bits() -> None:
    weight = torch.tensor([[0.5, -0.25, 0], [1, -1, 0.1]], dtype=torch.float16)
    tensors = layout_of.pack(quantize(weight, NF4))
    assert list(tensors) == ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"]
    assert tensors["weight"].tolist() == [[0xC4], [0x7F], [0x08]]
    assert tensors["weight.absmax"].tolist() == [1.0]
    assert state_of(tensors)[1] == '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 3]}'


def test_golden_bytes_of_double_quantization() -> None:
    tensors = layout_of.pack(quantize(torch.full((2, 128), 0.75, dtype=torch.bfloat16), NF4_DOUBLE))
    assert tensors["weight.absmax"].tolist() == [0, 0, 0, 0]
    assert tensors["weight.nested_absmax"].tolist() == [0.0]
    suffix, text = state_of(tensors)
    assert suffix == "weight.quant_state.bitsandbytes__nf4"
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 128], '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.75}' + 20 * " "
    )


def test_golden_bytes_of_8_bits() -> None:
    tensors = layout_of.pack(quantize(torch.tensor([[127.0, -127, 1, 0.4], [0, 0, 0, 0]]), INT8))
    assert list(tensors) == ["weight", "SCB", "weight_format"]
    assert tensors["weight"].tolist() == [[127, -127, 1, 0], [0, 0, 0, 0]]
    assert tensors["SCB"].tolist() == [127.0, 0.0]
    assert (tensors["weight_format"].shape, int(tensors["weight_format"])) == ((), 0)


@pytest.mark.parametrize("scheme", [NF4, FP4], ids=str)
def test_beside_the_last_of_an_odd_number_is_the_code_of_zero(scheme: QuantScheme) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected, _ = bitsandbytes.functional.quantize_4bit(weight, quant_type=scheme.dtype)
    found = layout_of.pack(quantize(weight, scheme))
    assert torch.equal(found["weight"], expected)
    assert int(found["weight"][-1]) & 0xF == {"nf4": 7, "fp4": 0}[scheme.dtype]
    assert_same(layout_of.pack(layout_of.unpack(found, scheme)), found)


@LIMIT
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_json_has_one_length_whatever_the_offset(offset: float) -> None:
    q = quantize(torch.ones(2, 64), NF4_DOUBLE)
    assert q.double is not None
    tensors = layout_of.pack(replace(q, double=replace(q.double, offset=torch.tensor(offset))))
    suffix, text = state_of(tensors)
    expected = layout_of.layout(NF4_DOUBLE, (2, 64), torch.float32)[suffix]
    assert expected == ("U8", (len(text),))
    assert json.loads(text)["nested_offset"] == offset
    again = layout_of.unpack(tensors, NF4_DOUBLE)
    assert again.double is not None
    assert float(again.double.offset) == offset


def test_the_scale_of_every_float16_is_stored_as_that_float16() -> None:
    absmax = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    tensors = {"weight": torch.zeros(len(absmax), 1, dtype=torch.int8), "SCB": absmax}
    assert torch.equal(layout_of.pack(layout_of.unpack(tensors, INT8))["SCB"], absmax)


@LIMIT
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_rounded_scale_is_stored_exactly(scale: float) -> None:
    scales = layout_of.round_scales(torch.tensor([[scale]]), torch.bfloat16)
    assert float(scales) == pytest.approx(scale, rel=2e-7)
    q = QuantizedTensor(torch.zeros(1, 4, dtype=torch.uint8), scales, None, INT8)
    assert torch.equal(layout_of.unpack(layout_of.pack(q), INT8).scales, scales)


@pytest.mark.parametrize("scheme", [NF4, NF4_DOUBLE, FP4, replace(FP4, double_quant=True, group_size=32)], ids=str)
def test_the_state_of_bitsandbytes_reads_what_is_packed(scheme: QuantScheme) -> None:
    tensors = packed(scheme, 40, 96)
    parts = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "weight"}
    state = QuantState.from_dict(dict(parts), device=torch.device("cpu"))
    assert (state.blocksize, state.dtype, state.shape) == (scheme.group_size, torch.bfloat16, (40, 96))
    q = layout_of.unpack(tensors, scheme)
    if scheme.double_quant:
        scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(q.scales, scales)
    again = {f"weight.{suffix}": tensor for suffix, tensor in state.as_dict(packed=True).items()}
    assert_same(parts, again, padded=scheme.double_quant)


# What transformers and bitsandbytes save and load.


def artifact(source: Path, directory: Path, scheme: QuantScheme, keep: tuple[str, ...] = ("lm_head",)) -> Path:
    """The linears of a float checkpoint by method and format, without the stage."""
    checkpoint = open_checkpoint(source)
    linears = find_linears(checkpoint)
    schemes = {name: scheme for name in linears.candidates if not name.endswith(keep)}
    kept = [name for name in (*linears.candidates, *linears.others) if name not in schemes]
    tensors = {}
    for name in checkpoint.infos:
        module = name.removesuffix(".weight")
        if module not in schemes:
            tensors[name] = checkpoint.read(name).clone()
            continue
        weight = checkpoint.read(name)
        found = layout_of.pack(quantize(weight, scheme))
        planned = layout_of.layout(scheme, linears.candidates[module], model_dtype(checkpoint))
        assert {suffix: (dtype_name(t.dtype), tuple(t.shape)) for suffix, t in found.items()} == planned
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}
    directory.mkdir()
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**checkpoint.config, "quantization_config": layout_of.quantization_config(schemes, kept)}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


LIKE = {
    NF4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    NF4_DOUBLE: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    FP4: {"load_in_4bit": True},
    INT8: {"load_in_8bit": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", LIKE, ids=str)
def test_the_file_is_the_one_that_transformers_saves(scheme: QuantScheme, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save(make_model("llama", **SIZES).to(dtype), tmp_path / "model")
    config = BitsAndBytesConfig(**LIKE[scheme])
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path / "theirs")
    theirs = tmp_path / "theirs"
    ours = artifact(source, tmp_path / "ours", scheme)
    found, expected = (safetensors.torch.load_file(path / "model.safetensors") for path in (ours, theirs))
    assert len(expected) > 40
    assert_same(found, expected, padded=scheme.double_quant)
    if not scheme.double_quant:
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    sections = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (ours, theirs)]
    assert sections[0].pop("llm_int8_skip_modules") == ["lm_head"]
    assert sections[1].pop("llm_int8_skip_modules") is None  # which means the same
    assert sections[0] == sections[1]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=WINDOWS).logits
    return found


def by_transformers(directory: Path) -> Any:
    """Computed in float32, as by `quantool.load`.

    transformers leaves quantized models in the stored dtype, and where a processor has instructions for bfloat16,
    bitsandbytes rounds all that reaches a 4-bit linear to it. Where it has AVX-512, rows must be whole blocks: version
    0.50 takes the scales of others from wrong places (dequantize_4bit of 64 x 96 is not what it is elsewhere).
    """
    model = AutoModelForCausalLM.from_pretrained(directory)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(
    "keep", [("lm_head",), (), ("lm_head", "layers.0.mlp.down_proj")], ids=["head", "none", "more"]
)
@pytest.mark.parametrize("scheme", LIKE, ids=str)
def test_transformers_and_bitsandbytes_load_it(scheme: QuantScheme, keep: tuple[str, ...], tmp_path: Path) -> None:
    source = save(make_model("llama", **WHOLE_BLOCKS).to(torch.bfloat16), tmp_path / "model")
    directory = artifact(source, tmp_path / "ours", scheme, keep)
    theirs = by_transformers(directory)
    kinds = bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt
    assert sum(isinstance(module, kinds) for module in theirs.modules()) == 15 - len(keep)
    ours = quantool.load(directory)
    found, expected = logits(ours), logits(theirs)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((found - logits(quantool.load(source))).norm() / expected.norm()) > 1e-3


@pytest.mark.parametrize("family", ["qwen2", "gemma", "opt", "gpt2", "mixtral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Biases, tied heads, Conv1D; of experts, which transformers keeps in float, the rest."""
    own = {"gemma": {"head_dim": 16}, "gpt2": {"n_inner": 128}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}}
    source = save(make_model(family, **{**WHOLE_BLOCKS, **own.get(family, {})}).to(torch.bfloat16), tmp_path / "model")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path / "theirs")
    theirs = by_transformers(tmp_path / "theirs")
    expected = logits(theirs)
    found = logits(quantool.load(tmp_path / "theirs"))
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("peer", PEERS)
def test_peers_round_trip(peer: str, shared: Path) -> None:
    checkpoint = open_checkpoint(shared / "peers" / peer)
    assert detect(checkpoint.config) is layout_of
    schemes = layout_of.module_schemes(checkpoint.config["quantization_config"], checkpoint.infos)
    assert len(schemes) == 14
    expected = {"bnb-int8": INT8, "bnb-nf4": NF4, "bnb-nf4-dq": NF4_DOUBLE}[peer]
    assert set(schemes.values()) == {expected}
    for module in schemes:
        names = [f"{module}.{suffix}" for suffix in layout_of.SUFFIXES if f"{module}.{suffix}" in checkpoint.infos]
        tensors = {name.removeprefix(f"{module}."): checkpoint.read(name) for name in names}
        q = layout_of.unpack(tensors, expected)
        assert layout_of.weight_shape(tensors) == q.codes.shape
        found = layout_of.pack(q)
        assert_same(found, tensors, padded=expected.double_quant)
        assert_same(layout_of.pack(layout_of.unpack(found, expected)), found)
        weight = open_checkpoint(shared / "models/tinystories-656k").read(f"{module}.weight").float()
        assert_same(layout_of.pack(quantize(weight, expected)), tensors, padded=expected.double_quant)
    section = layout_of.quantization_config(schemes, ["lm_head"])
    theirs = dict(checkpoint.config["quantization_config"])
    assert {**section, "llm_int8_skip_modules": None} == theirs


# What cannot be written.


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (QuantScheme(4, 128), "methods nf4, fp4 and llm-int8 only, not W4A16 sym g128"),
        (QuantScheme(8, -1), "not W8A16 sym channel"),
        (QuantScheme(8, -1, act_bits=8), "not W8A8 sym channel"),
        (replace(INT8, group_size=64), "only, not W8A8"),
        (replace(INT8, sym=False), "only, not W8A8"),
        (replace(INT8, act_dynamic=False), "only, not W8A8"),
        (replace(NF4, group_size=48), "blocks of 32, 64, .*, 4096 weights, not 48"),
        (replace(NF4, group_size=-1), "not -1"),
    ],
)
def test_other_schemes_are_rejected(scheme: QuantScheme, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(layout_of.rejects(scheme, (64, 64)))


def test_its_own_schemes_are_not_rejected_unless_columns_are_ordered() -> None:
    for scheme in (NF4, NF4_DOUBLE, FP4, INT8, replace(NF4, group_size=4096), replace(INT8, outlier_threshold=0.0)):
        assert layout_of.rejects(scheme, (3, 5)) is None
        assert "g_idx" in str(layout_of.rejects(scheme, (3, 5), act_order=True))


@pytest.mark.parametrize(
    ("schemes", "kept", "message", "hint"),
    [
        ({"a": NF4, "b": FP4}, [], "one scheme for all modules, found FP4 g64, NF4 g64", "compressed-tensors"),
        ({"a": NF4, "b": NF4_DOUBLE}, [], "one scheme for all modules", "in float"),
        ({"h.0.experts.3.w1": NF4}, [], "'h.0.experts.3.w1': transformers loads experts as one tensor", "--ignore"),
        ({"h.0.fc1": NF4}, ["fc1"], "cannot keep 'fc1' in float, transformers would keep 'h.0.fc1' too", "compressed"),
        ({"head.proj": NF4}, ["head"], "would keep 'head.proj' too", "compressed"),
    ],
)
def test_what_the_config_cannot_say(schemes: dict[str, QuantScheme], kept: list[str], message: str, hint: str) -> None:
    with pytest.raises(QuantoolError, match=message) as caught:
        layout_of.quantization_config(schemes, kept)
    assert hint in str(caught.value.hint)


# What cannot be read.


def change_state(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change keys of the JSON; None removes one."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        suffix, text = state_of(tensors)
        state = {k: v for k, v in {**json.loads(text), **changes}.items() if v is not None}
        tensors[suffix] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def set_text(text: bytes) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[state_of(tensors)[0]] = torch.tensor(list(text), dtype=torch.uint8)

    return change


def set_tensor(suffix: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({suffix: tensor})


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (change_state(surprise=1), "expected the keys .*nested_offset, found .*surprise", "newer bitsandbytes"),
        (change_state(blocksize=None), "expected the keys", "newer bitsandbytes"),
        (change_state(nested_offset=None), "expected the keys", "newer bitsandbytes"),
        (change_state(quant_type="fp4"), "quant_type is 'fp4', expected nf4", "again"),
        (change_state(quant_type=["nf4"]), "quant_type is", "again"),
        (change_state(blocksize=63), "blocksize is 63, expected 64 or 128", "again"),
        (change_state(blocksize=128), "blocksize is 128, expected 6 blocks of 350 weights", "again"),
        (change_state(blocksize=64.0), "blocksize is 64.0", "again"),
        (change_state(dtype="int8"), "dtype is 'int8', expected float32 or float16 or bfloat16", "again"),
        (change_state(shape=[5, 71]), r"shape is \[5, 71\], expected 175 bytes", "again"),
        (change_state(shape=[5, 10**30]), "shape is", "again"),
        (change_state(shape=[-5, -70]), "shape is .*expected two positive numbers", "again"),
        (change_state(shape=[5.0, 70]), "shape is", "again"),
        (change_state(shape=[True, 350]), "shape is", "again"),
        (change_state(shape=[350]), "shape is", "again"),
        (change_state(shape={}), "shape is", "again"),
        (change_state(nested_blocksize=128), "nested_blocksize is 128, expected 256", "again"),
        (change_state(nested_dtype="float16"), "nested_dtype is 'float16'", "again"),
        (change_state(nested_offset="0"), "nested_offset is '0', expected a finite number", "again"),
        (change_state(nested_offset=float("nan")), "nested_offset is nan", "again"),
        (set_text(b""), f"'{STATE}': is not JSON", "again"),
        (set_text(b"\xff\xfe"), "is not JSON", "again"),
        (set_text(b"[" * 4000), "is not JSON", "again"),
        (set_text(b'"nf4"'), "expected the keys .* found 'nf4'", "newer"),
        (set_text(b"null"), "found None", "newer"),
        (
            set_tensor("weight.quant_map", torch.linspace(-1, 1, 16)),
            "expected the 16 levels of nf4",
            "float checkpoint",
        ),
    ],
)
def test_a_damaged_4_bit_weight_is_one_line(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, hint: str
) -> None:
    tensors = packed(NF4_DOUBLE)
    layout_of.unpack(tensors, NF4_DOUBLE)
    change(tensors)
    with pytest.raises(QuantoolError, match=message) as caught:
        layout_of.unpack(tensors, NF4_DOUBLE)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert hint in str(caught.value.hint)


@LIMIT
@given(st.data())
def test_any_bytes_in_the_json_are_read_or_refused(data: st.DataObject) -> None:
    tensors = packed(NF4_DOUBLE)
    suffix, text = state_of(tensors)
    damaged = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    tensors[suffix] = torch.tensor(list(damaged), dtype=torch.uint8)
    with suppress(QuantoolError):
        assert layout_of.unpack(tensors, NF4_DOUBLE).codes.numel() in {349, 350}


def test_the_order_of_a_gpu_kernel_is_refused() -> None:
    tensors = packed(INT8)
    tensors["weight_format"] += 1
    with pytest.raises(QuantoolError, match="weight_format"):
        layout_of.unpack(tensors, INT8)
    del tensors["weight_format"]  # which older releases do not have
    layout_of.unpack(tensors, INT8)


def shaped(suffix: str, dtype: str, *shape: int) -> Callable[[dict[str, TensorInfo], dict[str, Any]], None]:
    def change(infos: dict[str, TensorInfo], config: dict[str, Any]) -> None:
        name = f"m.{suffix}"
        infos[name] = TensorInfo(name, shape, dtype, 0, Path("f"))

    return change


def without(suffix: str) -> Callable[[dict[str, TensorInfo], dict[str, Any]], None]:
    return lambda infos, config: infos.pop(f"m.{suffix}") and None


def configured(**changes: Any) -> Callable[[dict[str, TensorInfo], dict[str, Any]], None]:
    return lambda infos, config: config.update(changes)


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (NF4_DOUBLE, without("weight.absmax"), "'m.weight.absmax' is missing"),
        (NF4_DOUBLE, without("weight.quant_map"), "'m.weight.quant_map' is missing"),
        (NF4_DOUBLE, without("weight.nested_quant_map"), "'m.weight.nested_quant_map' is missing"),
        (NF4_DOUBLE, without("weight.nested_absmax"), "'m.weight.absmax': expected .* F32, found .* U8"),
        (NF4, without(STATE), f"'m.{STATE}' is missing"),
        (NF4, shaped("weight", "U8", 175), r"expected \[175, 1\] U8, found \[175\]"),
        (NF4, shaped("weight", "U8", 175, 2), r"expected \[175, 1\] U8"),
        (NF4, shaped("weight", "U8", 0, 1), r"expected \[1, 1\] U8"),
        (NF4, shaped("weight", "U8"), r"expected \[1, 1\] U8"),
        (NF4, shaped("weight", "BF16", 88, 1), "expected .* U8, found .* BF16"),
        (NF4, shaped("weight.absmax", "F32", 7), "found 7 blocks for 350 weights, expected blocks of 32, 64"),
        (NF4, shaped("weight.absmax", "F32", 0), "'m.weight.absmax'"),
        (NF4, shaped("weight.absmax", "F32"), "'m.weight.absmax'"),
        (NF4, shaped("weight.absmax", "F16", 6), "'m.weight.absmax': expected .* F32"),
        (NF4, shaped("weight.quant_map", "F32", 15), "'m.weight.quant_map'"),
        (NF4_DOUBLE, shaped("weight.nested_absmax", "F32", 2), "'m.weight.nested_absmax'"),
        (NF4_DOUBLE, shaped("weight.nested_quant_map", "F32", 16), "'m.weight.nested_quant_map'"),
        (NF4, shaped(STATE, "U8", 10**9), "expected a text of at most 4096 bytes"),
        (NF4, shaped(STATE, "U8"), "expected a text"),
        (NF4, configured(load_in_4bit=False), "load_in_4bit is False, the tensors of 'm' need True"),
        (NF4, configured(bnb_4bit_quant_type="fp4"), "bnb_4bit_quant_type is 'fp4', the tensors of 'm' need 'nf4'"),
        (NF4, configured(bnb_4bit_quant_type=["nf4"]), "bnb_4bit_quant_type"),
        (NF4, configured(bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage is 'bfloat16'"),
        (NF4, configured(bnb_4bit_rotation=True), "'bnb_4bit_rotation' is not a key that is known"),
        (INT8, configured(load_in_8bit=None), "load_in_8bit is None"),
        (INT8, configured(llm_int8_threshold=-1), "llm_int8_threshold is -1, expected"),
        (INT8, configured(llm_int8_threshold="6"), "llm_int8_threshold is '6', expected"),
        (INT8, without("SCB"), "'m.SCB' is missing"),
        (INT8, shaped("SCB", "F32", 4), "'m.SCB'"),
        (INT8, shaped("weight", "I8", 350), "expected a matrix of I8"),
        (INT8, shaped("weight_format", "U8", 1), "'m.weight_format'"),
    ],
)
def test_config_and_tensors_that_contradict_are_one_line(
    scheme: QuantScheme, change: Callable[[dict[str, TensorInfo], dict[str, Any]], None], message: str
) -> None:
    infos, config = infos_of(packed(scheme)), layout_of.quantization_config({"m": scheme}, ["lm_head"])
    assert layout_of.module_schemes(config, infos) == {"m": scheme}
    change(infos, config)
    with pytest.raises(QuantoolError, match=message) as caught:
        layout_of.module_schemes(config, infos)
    assert "\n" not in caught.value.message
    assert caught.value.hint


@LIMIT
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(layout_of.BLOCK_SIZES), st.booleans())
def test_the_block_size_is_told_by_the_number_of_blocks(rows: int, columns: int, size: int, double: bool) -> None:
    scheme = replace(NF4, group_size=size, double_quant=double)
    tensors = {
        suffix: torch.zeros(shape, dtype=DTYPES[dtype])
        for suffix, (dtype, shape) in layout_of.layout(scheme, (rows, columns), torch.bfloat16).items()
    }
    config = layout_of.quantization_config({"m": scheme}, [])
    found = layout_of.module_schemes(config, infos_of(tensors))["m"]
    one_block = rows * columns <= min(size, found.group_size)
    assert found == scheme or (one_block and found == replace(scheme, group_size=found.group_size))


@pytest.mark.parametrize("size", [32, 128, 4096])
def test_a_weight_in_one_block_is_read_whatever_its_block_size(size: int) -> None:
    tensors = packed(replace(NF4, group_size=size), 3, 7)
    assumed = layout_of.module_schemes(layout_of.quantization_config({"m": NF4}, []), infos_of(tensors))["m"]
    assert assumed == NF4
    q = layout_of.unpack(tensors, assumed)
    assert q.scheme == NF4
    assert torch.equal(q.codes, layout_of.unpack(tensors, replace(NF4, group_size=size)).codes)


def test_float_and_other_tensors_are_no_modules() -> None:
    infos = {
        name: TensorInfo(name, shape, dtype, 0, Path("f"))
        for name, shape, dtype in [("a.weight", (4, 4), "BF16"), ("b.bias", (4,), "U8"), ("c", (4,), "I8")]
    }
    assert layout_of.module_schemes(layout_of.quantization_config({"m": NF4}, []), infos) == {}
