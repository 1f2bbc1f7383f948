"""GPTQ's layout: golden words, both versions against a literal decoder and GPTQModel, the config, the refusals."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError
from quantool.formats import FORMATS, Format, detect, gptq, gptq_v1
from quantool.io import TensorInfo
from quantool.io.safetensors import dtype_name
from quantool.quant import QuantizedTensor, dequantize_affine
from quantool.scheme import QuantScheme

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
ASYM = CONFIG | {"sym": False, "checkpoint_format": "gptq_v2"}
BITS = (2, 3, 4, 8)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def random_tensor(
    scheme: QuantScheme, rows: int = 64, columns: int = 96, *, act_order: bool = False, seed: int = 0
) -> QuantizedTensor:
    random = torch.Generator().manual_seed(seed)
    grid = (rows, scheme.groups(columns))
    order = torch.randperm(columns, generator=random) // scheme.width(columns)
    return QuantizedTensor(
        torch.randint(0, scheme.max_code + 1, (rows, columns), generator=random, dtype=torch.uint8),
        (torch.rand(grid, generator=random) + 0.01).to(torch.float16),
        None if scheme.sym else torch.randint(0, scheme.max_code + 1, grid, generator=random, dtype=torch.uint8),
        scheme,
        g_idx=order.to(torch.int32) if act_order else None,
    )


def infos_of(tensors: dict[str, torch.Tensor], module: str = "X") -> dict[str, TensorInfo]:
    return {
        f"{module}.{s}": TensorInfo(f"{module}.{s}", tuple(t.shape), dtype_name(t.dtype), t.nbytes, Path("a/shard"))
        for s, t in tensors.items()
    }


def open_as(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[Format, QuantizedTensor]:
    """What reads this config, and the one module X as it reads it."""
    found = detect({"quantization_config": config})
    schemes = found.module_schemes(config, infos_of(tensors))
    assert list(schemes) == ["X"]
    return found, found.unpack(tensors, schemes["X"])


def read(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> QuantizedTensor:
    return open_as(config, tensors)[1]


def int32(values: Any) -> torch.Tensor:
    """Numbers below 2**32 as the int32 that tensors hold."""
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32))


def stream(words: np.ndarray, bits: int, count: int) -> list[int]:
    """`count` numbers of `bits` bits from one little-endian stream of words."""
    whole = sum(int(word) % 2**32 << (32 * i) for i, word in enumerate(words))
    return [(whole >> (bits * i)) % 2**bits for i in range(count)]


def literal(tensors: dict[str, torch.Tensor], bits: int, *, v1: bool) -> np.ndarray:
    """W float64 [N, K], number by number."""
    qweight, qzeros = (tensors[name].numpy().astype(np.int64) for name in ("qweight", "qzeros"))
    scales, g_idx = tensors["scales"].numpy().astype(np.float64), tensors["g_idx"].numpy()
    rows, columns = scales.shape[1], len(g_idx)
    if v1:
        qzeros += ONES[bits]
    zeros = np.array([stream(line, bits, rows) for line in qzeros])
    codes = np.array([stream(line, bits, columns) for line in qweight.T])
    return (scales[g_idx] * (codes.T - zeros[g_idx])).T


def test_golden_words() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(8).repeat(32, 1)
    scales = torch.ones(32, 1, dtype=torch.float16)
    packed = gptq.pack(QuantizedTensor(codes, scales, None, QuantScheme(4, -1)))
    assert packed["qweight"].tolist() == [[0x76543210] * 32] * 4
    assert packed["qzeros"].tolist() == [[0x77777777] * 4]
    assert packed["g_idx"].tolist() == [0] * 32
    packed = gptq.pack(QuantizedTensor(codes, scales, torch.full((32, 1), 8).byte(), QuantScheme(4, -1, sym=False)))
    assert packed["qzeros"].tolist() == [[-2004318072] * 4]  # 0x88888888
    packed = gptq.pack(QuantizedTensor(codes, scales, None, QuantScheme(3, -1)))
    assert torch.equal(packed["qweight"], int32([[0x88FAC688] * 32, [0xC688FAC6] * 32, [0xFAC688FA] * 32]))
    packed = gptq.pack(QuantizedTensor(codes, scales, None, QuantScheme(8, -1)))
    assert packed["qzeros"].tolist() == [[0x7F7F7F7F] * 8]


def test_v1_zeros_borrow_across_nibbles() -> None:
    """0x88888880, zeros 0, 8, 8, ..., was stored as 0x7777776F; adding one to each nibble would read two others."""
    packed = gptq.pack(random_tensor(QuantScheme(4, 32, sym=False), 32, 32))
    packed["qzeros"] = int32([[0x7777776F, 0x77777777, 0x66666666, 0xEEEEEEEE]])
    config = CONFIG | {"sym": False}
    zeros = read(config, packed).zeros.flatten().tolist()
    assert zeros == [0, *[8] * 7, *[8] * 8, *[7] * 8, *[15] * 8]
    assert np.array_equal(literal(packed, 4, v1=True), dequantize_affine(read(config, packed)).numpy())
    packed["qzeros"] = int32([[0x88888880] * 4])
    assert read(ASYM, packed).zeros.flatten().tolist() == [0, *[8] * 7] * 4


VERSIONS = list(itertools.product(BITS, (True, False), (32, -1), (True, False)))


@pytest.mark.parametrize(("bits", "sym", "group_size", "act_order"), VERSIONS)
def test_what_is_written_is_what_a_literal_decoder_reads(
    bits: int, sym: bool, group_size: int, act_order: bool
) -> None:
    q = random_tensor(QuantScheme(bits, group_size, sym=sym), act_order=act_order and group_size > 0)
    section = gptq.quantization_config({"X": q.scheme}, [])
    assert section["checkpoint_format"] == ("gptq" if sym and bits != 3 else "gptq_v2")
    packed = gptq.pack(q)
    weight = literal(packed, bits, v1=section["checkpoint_format"] == "gptq")
    assert np.array_equal(weight, dequantize_affine(q).numpy())


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_asymmetric_v1_is_read_as_the_literal_decoder_does(bits: int, seed: int) -> None:
    """Also where a zero is 0: the words are those of v2 less one in every place, borrows and all."""
    q = random_tensor(QuantScheme(bits, 32, sym=False), seed=seed)
    q.zeros[::9] = 0
    packed = gptq.pack(q)
    packed["qzeros"] = int32((packed["qzeros"].numpy().astype(np.int64) - ONES[bits]) % 2**32)
    for word in ({}, {"checkpoint_format": "gptq"}, {"format": "gptq"}):
        found, again = open_as({**CONFIG, "bits": bits, "sym": False, **word}, packed)
        assert found is gptq_v1
        assert found.NAME == "gptq"
        assert torch.equal(again.zeros, q.zeros)
    assert np.array_equal(literal(packed, bits, v1=True), dequantize_affine(again).numpy())
    # the same words under the other name are other zeros
    assert not torch.equal(read(ASYM | {"bits": bits}, packed).zeros, q.zeros)


@pytest.mark.filterwarnings("ignore")  # the library's temporary directory
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("sym", [True, False])
def test_gptqmodel_reads_what_is_written(bits: int, sym: bool, act_order: bool) -> None:
    """The library itself, where it is installed."""
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    model = pytest.importorskip("gptqmodel.utils.model")
    config = pytest.importorskip("gptqmodel.quantization.config")
    backend = pytest.importorskip("gptqmodel.utils.backend").BACKEND.GPTQ_TORCH
    q = random_tensor(QuantScheme(bits, 32, sym=sym), act_order=act_order)
    section = gptq.quantization_config({"X": q.scheme}, ["lm_head"], act_order=act_order)
    known = config.QuantizeConfig.from_quant_config(json.loads(json.dumps(section)))
    assert (known.bits, known.group_size, known.sym, known.desc_act) == (bits, 32, sym, act_order)
    linear = qlinear.TorchLinear(
        bits=bits,
        group_size=32,
        desc_act=act_order,
        sym=sym,
        in_features=96,
        out_features=64,
        bias=False,
        pack_dtype=torch.int32,
        backend=backend,
        adapter=None,
        register_buffers=True,
    )
    linear.load_state_dict(gptq.pack(q), strict=True)
    if known.format == "gptq":
        model.convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
    linear.post_init()
    assert torch.equal(linear.dequantize_weight().T, dequantize_affine(q).to(torch.float16))


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_zeros_are_known_however_they_are_stored(bits: int) -> None:
    """v1, v2, and of 3 bits what older releases of GPTQModel subtracted."""
    q = random_tensor(QuantScheme(bits, 32))
    packed, zero = gptq.pack(q), q.scheme.zero
    v2 = gptq.pack(random_tensor(QuantScheme(bits, 32, sym=False)))
    columns = packed["qzeros"].shape[1]
    v2_words = [sum(zero << (bits * i) for i in range(32)) >> (32 * j) & 0xFFFFFFFF for j in range(bits)]
    spellings = [int32([v2_words * (columns // bits)] * 3)]
    if bits == 3:
        old = [(w - c) % 2**32 for w, c in zip(v2_words, (0x24924924, 0x92492492, 0x49249249), strict=True)]
        spellings += [int32([old * 2] * 3), int32([[0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D] * 2] * 3)]
    for qzeros in [packed["qzeros"], *spellings]:
        again = read(CONFIG | {"bits": bits}, packed | {"qzeros": qzeros})
        assert again.zeros is None
        assert torch.equal(dequantize_affine(again), dequantize_affine(q))
    with pytest.raises(QuantoolError, match=rf"'qzeros': expected {zero} everywhere since sym is true") as caught:
        read(CONFIG | {"bits": bits}, packed | {"qzeros": v2["qzeros"]})
    assert '"sym": false' in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_read_in_the_dtype_they_have(dtype: torch.dtype) -> None:
    q = random_tensor(QuantScheme(4, 32))
    packed = gptq.pack(q)
    packed["scales"] = packed["scales"].to(dtype)
    again = read(CONFIG, packed)
    assert again.scales.dtype == dtype
    assert torch.equal(again.scales, q.scales.to(dtype))


def test_g_idx() -> None:
    q = random_tensor(QuantScheme(4, 32, sym=False), act_order=True)
    packed = gptq.pack(q)
    assert packed["g_idx"].dtype == torch.int32
    again = read(ASYM | {"desc_act": True}, packed)
    assert torch.equal(again.g_idx, q.g_idx)
    assert again.g_idx.dtype == torch.int32
    assert torch.equal(read(ASYM, packed).g_idx, q.g_idx)  # it counts, whatever desc_act says
    assert torch.equal(read(ASYM, packed | {"g_idx": q.g_idx.long()}).g_idx, q.g_idx)

    trivial = gptq.pack(random_tensor(QuantScheme(4, 32, sym=False)))
    assert trivial["g_idx"].tolist() == [k // 32 for k in range(96)]
    assert read(ASYM, trivial).g_idx is None
    without = {suffix: tensor for suffix, tensor in trivial.items() if suffix != "g_idx"}
    assert read(ASYM, without).g_idx is None
    assert gptq.weight_shape(without) == gptq.weight_shape(trivial) == (64, 96)
    with pytest.raises(QuantoolError, match=r"'X\.g_idx' is missing"):
        read(ASYM | {"desc_act": True}, without)
    assert read(ASYM | {"desc_act": True, "group_size": -1}, gptq.pack(random_tensor(QuantScheme(4, -1, sym=False))))


@pytest.mark.parametrize("change", [lambda g: g + 1, lambda g: -g, lambda g: g * 0, lambda g: g % 2 + 1])
def test_a_g_idx_that_is_none(change: Any) -> None:
    packed = gptq.pack(random_tensor(QuantScheme(4, 32), act_order=True))
    packed["g_idx"] = change(packed["g_idx"])
    with pytest.raises(QuantoolError, match="'g_idx': expected 96 entries, 32 of each of 3 groups"):
        read(CONFIG, packed)


@pytest.mark.parametrize("bits", BITS)
def test_shapes_without_g_idx_tell_the_width(bits: int) -> None:
    for rows, columns in ((32, 64), (96, 32), (640, 96)):
        packed = gptq.pack(random_tensor(QuantScheme(bits, -1), rows, columns))
        del packed["g_idx"]
        assert gptq.weight_shape(packed) == (rows, columns)
        assert read(CONFIG | {"bits": bits, "group_size": -1}, packed).codes.shape == (rows, columns)


def test_what_it_rejects() -> None:
    assert gptq.rejects(QuantScheme(8, 128), (64, 256), act_order=True) is None
    assert "2, 3, 4, 8 bits only, not W5A16" in gptq.rejects(QuantScheme(5, 128), (64, 256))
    assert "not W8A8" in gptq.rejects(QuantScheme(8, -1, act_bits=8), (64, 256))
    assert "not NF4" in gptq.rejects(QuantScheme(4, 64, dtype="nf4"), (64, 256))
    for shape in ((48, 64), (64, 48)):
        assert f"{list(shape)} are not multiples" in gptq.rejects(QuantScheme(4, 16), shape)


def names(layers: int, *linears: str) -> list[str]:
    return [f"model.layers.{i}.{linear}" for i in range(layers) for linear in linears]


def test_config_of_one_scheme() -> None:
    schemes = dict.fromkeys(names(12, "mlp.up_proj", "mlp.down_proj"), QuantScheme(4, 64))
    section = gptq.quantization_config(schemes, ["lm_head"])
    assert section.pop("meta")["quantizer"][0].startswith("quantool:")
    assert section == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    schemes = {"lm_head": QuantScheme(2, 0, sym=False)}
    section = gptq.quantization_config(schemes, [], act_order=True)
    assert (section["lm_head"], section["desc_act"], section["group_size"]) == (True, True, -1)
    assert section["checkpoint_format"] == "gptq_v2"


MIXED = dict.fromkeys(
    names(12, "mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj"), QuantScheme(4, 32)
) | dict.fromkeys([*names(12, "mlp.down_proj"), "model.layers.3.self_attn.o_proj"], QuantScheme(8, -1))
KEPT = ["lm_head", "model.layers.1.mlp.gate", "model.layers.11.mlp.gate"]


def test_config_of_several_schemes_and_kept_linears() -> None:
    section = gptq.quantization_config(MIXED, KEPT)
    layers = "|".join(map(str, range(12)))
    assert section["dynamic"] == {
        r"-:model\.layers\.(1|11)\.mlp\.gate$": {},
        rf"+:model\.layers\.({layers})\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"+:model\.layers\.3\.self_attn\.o_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }
    infos = {}
    for name, scheme in MIXED.items():
        infos |= infos_of(gptq.pack(random_tensor(scheme, 32, 32)), name)
    assert gptq.module_schemes(json.loads(json.dumps(section)), infos) == MIXED
    with pytest.raises(QuantoolError, match=r"'model\.layers\.11\.mlp\.gate' has quantized .* leaves it in float"):
        gptq.module_schemes(section, infos_of(gptq.pack(random_tensor(QuantScheme(4, 32), 32, 32)), KEPT[2]))


linear_names = st.builds(
    lambda layer, middle, leaf: f"model.layers.{layer}.{middle}{leaf}",
    st.integers(0, 12),
    st.sampled_from(["mlp.", "mlp.experts.0.", "mlp.experts.10."]),
    st.sampled_from(["up_proj", "up+proj", "up", "1"]),
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(linear_names, st.sampled_from([4, 8]), min_size=2, max_size=30), st.sets(linear_names))
def test_dynamic_matches_its_modules_and_nothing_else(bits: dict[str, int], others: set[str]) -> None:
    kept = sorted(others - set(bits))
    section = gptq.quantization_config({name: QuantScheme(width, 32) for name, width in bits.items()}, kept)
    dynamic = section.get("dynamic", {})
    for name in {*bits, *kept}:
        found = [(key[:2], own) for key, own in dynamic.items() if re.match(key[2:], name)]
        if name in kept:
            assert found == [("-:", {})]
        else:
            assert [own["bits"] for sign, own in found if sign == "+:"] == [bits[name]] * (
                bits[name] != section["bits"]
            )
            assert len(found) <= 1


def test_gptqmodel_gives_every_linear_its_scheme() -> None:
    dynamic_get = pytest.importorskip("gptqmodel.quantization.config").dynamic_get
    section = gptq.quantization_config(MIXED, KEPT)
    for name, scheme in MIXED.items():
        assert dynamic_get(section["dynamic"], name, "bits", section["bits"]) == scheme.bits
        assert dynamic_get(section["dynamic"], name, "group_size", section["group_size"]) == scheme.group_size
    assert all(dynamic_get(section["dynamic"], name) is False for name in KEPT if name != "lm_head")


@pytest.mark.parametrize("other", [QuantScheme(4, 64, sym=False), QuantScheme(3, 64)])
def test_config_refuses_two_versions_in_one(other: QuantScheme) -> None:
    with pytest.raises(QuantoolError, match="not both in one checkpoint") as caught:
        gptq.quantization_config({"a": QuantScheme(4, 64), "b": other}, [])
    assert caught.value.hint == "use --format compressed-tensors"
    assert gptq.quantization_config({"a": QuantScheme(4, 64, sym=False), "b": QuantScheme(3, 64)}, [])


def test_dynamic_of_gptqmodel() -> None:
    """The first pattern that matches from the beginning counts, with or without its "+:"."""
    config = CONFIG | {
        "dynamic": {
            r"-:.*\.gate$": {},
            r".*\.down": {"bits": 8, "group_size": -1, "mse": 2.4},
            r"+:model\.layers\.1\.": {"sym": False, "desc_act": False},
            r"layers": {"bits": 2},
        },
        "checkpoint_format": "gptq_v2",
    }
    expected = {
        "model.layers.0.up": QuantScheme(4, 32),
        "model.layers.0.down": QuantScheme(8, -1),
        "model.layers.1.up": QuantScheme(4, 32, sym=False),
        "model.layers.1.down": QuantScheme(8, -1),
    }
    infos = {}
    for name, scheme in expected.items():
        infos |= infos_of(gptq.pack(random_tensor(scheme)), name)
    infos |= infos_of({"weight": torch.zeros(4, 4)}, "model.layers.1.gate")
    assert gptq.module_schemes(config, infos) == expected
    assert detect({"quantization_config": config}) is gptq
    assert detect({"quantization_config": config | {"checkpoint_format": "gptq"}}) is gptq_v1


AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "iters": 200,
    "autoround_version": "0.15.1",
    "block_name_to_quantize": "model.layers",
}


@pytest.mark.parametrize(
    ("packing_format", "sym", "expected"),
    [
        ("auto_round:auto_gptq", True, gptq),
        ("auto_round:gptq", True, gptq),
        ("auto_round:auto_gptq", False, gptq_v1),
        ("auto_round", False, gptq),
        ("auto_round:gptqmodel", False, gptq),
        ("auto_round:auto_awq", False, FORMATS["awq"]),
        ("auto_round:awq", True, FORMATS["awq"]),
    ],
)
def test_auto_rounds_layouts(packing_format: str, sym: bool, expected: Format) -> None:
    config = AUTO_ROUND | {"packing_format": packing_format, "sym": sym}
    q = random_tensor(QuantScheme(4, 32, sym=sym))
    tensors = expected.pack(q)
    if expected is gptq_v1:
        tensors["qzeros"] = int32((tensors["qzeros"].numpy().astype(np.int64) - ONES[4]) % 2**32)
    tensors.pop("g_idx", None)
    found, again = open_as(config, tensors)
    assert found is expected
    assert torch.equal(dequantize_affine(again), dequantize_affine(q))


def test_extra_config_of_auto_round() -> None:
    """Names before patterns, which are searched; more than 8 bits is float."""
    config = AUTO_ROUND | {
        "extra_config": {
            "model.layers.0.gate": {"bits": 16, "data_type": "float"},
            "model.layers.0.down": {"bits": 8},
            r"layers\.\d+\.(down|up)": {"bits": 2, "group_size": -1},
            r".*": {},
            "lm_head": {"bits": 8, "group_size": 16, "sym": True, "data_type": "int"},
        }
    }
    expected = {
        "model.layers.0.gate_proj": QuantScheme(4, 32),
        "model.layers.0.down": QuantScheme(8, 32),
        "model.layers.0.up": QuantScheme(2, -1),
        "lm_head": QuantScheme(8, 16),
    }
    infos = {}
    for name, scheme in expected.items():
        infos |= infos_of(gptq.pack(random_tensor(scheme)), name)
    infos |= infos_of({"weight": torch.zeros(4, 4)}, "model.layers.0.gate")
    assert gptq.module_schemes(config, infos) == expected
    infos |= infos_of(gptq.pack(random_tensor(QuantScheme(4, 32))), "model.layers.0.gate")
    with pytest.raises(QuantoolError, match=r"'model\.layers\.0\.gate' has quantized weights"):
        gptq.module_schemes(config, infos)


GOOD = gptq.pack(random_tensor(QuantScheme(4, 32)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"checkpoint_format": "marlin"}, "gptq with checkpoint_format 'marlin' cannot be read, expected 'gptq' or"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p' cannot be read"),
        ({"format": ["gptq"]}, "checkpoint_format ['gptq'] cannot be read"),
        ({"pack_dtype": "int64"}, "gptq with pack_dtype 'int64' cannot be read, expected 'int32'"),
        ({"bits": 5}, "gptq with bits 5 and sym True cannot be read, expected 2, 3, 4, 8"),
        ({"bits": True}, "gptq with bits True"),
        ({"bits": 4.0}, "gptq with bits 4.0"),
        ({"method": "qqq"}, "gptq with method 'qqq' cannot be read, expected 'gptq'"),
        ({"bits": None}, "gptq with bits None"),
        ({"bits": [4]}, "gptq with bits [4]"),
        ({"sym": "yes"}, "sym 'yes'"),
        ({"bits": 3, "sym": False}, "releases of AutoGPTQ and GPTQModel read different zeros"),
        ({"group_size": 0}, "group_size is 0, expected a positive number or -1"),
        ({"group_size": "32"}, "group_size is '32'"),
        ({"data_type": "mx_fp"}, "gptq with data_type 'mx_fp' cannot be read, expected 'int'"),
        ({"act_bits": 8}, "gptq with act_bits 8 cannot be read, expected 16"),
        ({"rotation": "hadamard"}, "'rotation' is not a key that is known here"),
        ({"is_marlin_format": True}, "'is_marlin_format' is not a key that is known here"),
        ({"adapter": {"rank": 8}}, "'adapter' is not a key that is known here"),
        ({"dynamic": {"X": {"adapter": {}, "method": "awq"}}}, "'method' of dynamic 'X' is not a key that is known"),
        ({"dynamic": ["X"]}, "dynamic is not an object of objects"),
        ({"dynamic": {"X": 4}}, "dynamic is not an object of objects"),
        ({"dynamic": {"+:(": {}}}, "'(' is not a regular expression"),
        ({"dynamic": {"-:X": {}}}, "module 'X' has quantized weights, but config.json leaves it in float"),
        ({"extra_config": {"X": {"bits": 16}}}, "module 'X' has quantized weights, but config.json leaves it"),
        ({"quant_method": "auto-round"}, "packing_format None cannot be read, expected 'auto_round:auto_awq'"),
        (AUTO_ROUND | {"packing_format": "auto_round:fp8"}, "packing_format 'auto_round:fp8' cannot be read"),
        (AUTO_ROUND | {"packing_format": ["auto_round"]}, "packing_format ['auto_round'] cannot be read"),
    ],
)
def test_a_config_that_cannot_be_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantoolError) as caught:
        read(CONFIG | config, GOOD)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint or "regular expression" in message


def test_keys_that_say_nothing_of_the_weights_are_passed_over() -> None:
    harmless = {
        "damp_percent": 0.01,
        "static_groups": True,
        "true_sequential": True,
        "model_name_or_path": "somewhere",
        "modules_in_block_to_quantize": [["self_attn.q_proj"]],
        "meta": {"quantizer": ["gptqmodel:7.7.0"], "act_group_aware": True},
        "dynamic": None,
        "adapter": None,
        "is_marlin_format": False,
        "lm_head": False,
        "act_bits": None,
        "method": "gptq",
        "a key of tomorrow": {},
    }
    assert torch.equal(dequantize_affine(read(CONFIG | harmless, GOOD)), dequantize_affine(read(CONFIG, GOOD)))


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_a_config_is_read_also_when_nothing_is_quantized() -> None:
    assert gptq.module_schemes(CONFIG, {}) == {}
    with pytest.raises(QuantoolError, match="gptq with bits None"):
        gptq.module_schemes({"quant_method": "gptq"}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scales": zeros(3, 63, dtype=torch.float16)},
            "shard: tensor 'X.scales': expected [3, 64] F32 or F16 or BF16",
        ),
        ({"scales": zeros(3, 64)}, "'X.scales': expected [3, 64] F32 or F16 or BF16, found [3, 64] I32"),
        ({"scales": None}, "'X.scales' is missing"),
        ({"qzeros": None}, "'X.qzeros' is missing"),
        ({"qzeros": zeros(3, 7)}, "'X.qzeros': expected [3, 8] I32, found [3, 7] I32"),
        ({"qweight": zeros(12, 64, dtype=torch.int16)}, "'X.qweight': expected a matrix of I32"),
        ({"qweight": zeros(0, 64)}, "'X.qweight': expected a matrix of I32"),
        ({"qweight": zeros(12, 64, 1)}, "'X.qweight': expected a matrix of I32"),
        ({"qweight": zeros(11, 64)}, "'X.qweight': expected the words of 4-bit weights for 96 input channels"),
        ({"qweight": zeros(11, 64), "g_idx": None}, "for 88 input channels in groups of 32, found [11, 64] I32"),
        ({"g_idx": zeros(2, 48)}, "'X.g_idx': expected [96] I32 or I64, found [2, 48] I32"),
        ({"g_idx": zeros(96, dtype=torch.float32)}, "'X.g_idx': expected [96] I32 or I64, found [96] F32"),
        ({"g_idx": zeros(0)}, "'X.qweight': expected the words of 4-bit weights for 0 input channels"),
    ],
)
def test_tensors_that_contradict_the_config(change: dict[str, Any], message: str) -> None:
    tensors = {suffix: tensor for suffix, tensor in (GOOD | change).items() if tensor is not None}
    with pytest.raises(QuantoolError) as caught:
        read(CONFIG, tensors)
    assert message in caught.value.message
