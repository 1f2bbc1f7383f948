"""compressed-tensors: golden words, the library as the oracle in both directions, its config, and what is refused."""

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError
from quantool.formats import compressed_tensors
from quantool.io import TensorInfo
from quantool.io.safetensors import dtype_name
from quantool.quant import QuantizedTensor, dequantize_affine
from quantool.scheme import QuantScheme

ARGS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = TOKEN | {"strategy": "tensor", "dynamic": False}
CHANNEL8 = {"num_bits": 8, "strategy": "channel", "group_size": None}


def words(*values: int) -> list[int]:
    """uint32 -> int32, as tensors hold them."""
    return [value - (1 << 32) if value >= 1 << 31 else value for value in values]


def random_tensor(
    scheme: QuantScheme, rows: int = 24, columns: int = 96, dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    random = torch.Generator().manual_seed(scheme.bits)
    grid = (rows, scheme.groups(columns))
    return QuantizedTensor(
        torch.randint(0, scheme.max_code + 1, (rows, columns), generator=random, dtype=torch.uint8),
        (torch.rand(grid, generator=random) + 0.01).to(dtype),
        None if scheme.sym else torch.randint(0, scheme.max_code + 1, grid, generator=random, dtype=torch.uint8),
        scheme,
    )


def config_of(
    weights: dict[str, Any],
    *,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    format_: str | None = "pack-quantized",
    activations: Any = None,
    **keys: Any,
) -> dict[str, Any]:
    group = {"targets": list(targets), "format": format_, "weights": ARGS | weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}} | {
        "ignore": list(ignore),
        **keys,
    }


def infos_of(tensors: dict[str, torch.Tensor], module: str = "X") -> dict[str, TensorInfo]:
    return {
        f"{module}.{s}": TensorInfo(f"{module}.{s}", tuple(t.shape), dtype_name(t.dtype), t.nbytes, Path("a/shard"))
        for s, t in tensors.items()
    }


def read(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> QuantizedTensor:
    """The one module X, through config.json and tensor shapes as a reader comes to it."""
    schemes = compressed_tensors.module_schemes(config, infos_of(tensors))
    assert list(schemes) == ["X"]
    return compressed_tensors.unpack(tensors, schemes["X"])


@pytest.mark.parametrize(
    ("bits", "q", "expected"),
    [
        (4, [-8, -7, -6, -5, 0, 1, 6, 7], [0xFE983210]),
        (3, [i % 8 - 4 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (8, [-128, 0, 1, 127], [0xFF818000]),
    ],
)
def test_golden_words(bits: int, q: list[int], expected: list[int]) -> None:
    scheme = QuantScheme(bits, -1)
    codes = (torch.tensor([q]) + scheme.zero).to(torch.uint8)
    packed = compressed_tensors.pack(QuantizedTensor(codes, torch.ones(1, 1), None, scheme))
    assert packed["weight_packed"].tolist() == [words(*expected)]
    assert packed["weight_shape"].tolist() == [1, len(q)]
    assert packed["weight_shape"].dtype == torch.int64
    assert "weight_zero_point" not in packed


def test_golden_zero_points_are_packed_down_the_rows() -> None:
    scheme = QuantScheme(4, -1, sym=False)
    zeros = torch.arange(8, dtype=torch.uint8).view(8, 1)
    packed = compressed_tensors.pack(QuantizedTensor(zeros.repeat(1, 8), torch.ones(8, 1), zeros, scheme))
    assert packed["weight_zero_point"].tolist() == [[0x76543210]]


ALL = [QuantScheme(bits, size, sym) for bits in range(2, 9) for size in (32, -1) for sym in (True, False)]


@pytest.mark.parametrize("scheme", ALL, ids=str)
@pytest.mark.parametrize("shape", [(24, 96), (13, 32)])
def test_the_library_and_quantool_read_each_other(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    library = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    q = random_tensor(scheme, *shape)
    config = compressed_tensors.quantization_config({"X": scheme}, [])
    group = quantization.QuantizationConfig.model_validate(copy.deepcopy(config)).config_groups["group_0"]

    # theirs of ours
    packed = compressed_tensors.pack(q)
    decompressed = library.PackedQuantizationCompressor.decompress(packed, group)["weight"]
    assert decompressed.dtype == torch.bfloat16
    assert torch.equal(decompressed, dequantize_affine(q).to(torch.bfloat16))

    # ours of theirs: from float weights that lie on the grid, so that their rounding is not in question
    weight = dequantize_affine(q)
    state = {"weight": weight, "weight_scale": q.scales.float()}
    if q.zeros is not None:
        state["weight_zero_point"] = (q.zeros.int() - scheme.zero).to(torch.int8)
    theirs = library.PackedQuantizationCompressor.compress(state, group)
    assert torch.equal(theirs["weight_packed"], packed["weight_packed"])
    assert scheme.sym or torch.equal(theirs["weight_zero_point"], packed["weight_zero_point"])
    assert torch.equal(dequantize_affine(read(config, theirs)), weight)


def names(layers: Iterable[int], *linears: str) -> list[str]:
    return [f"model.layers.{i}.{linear}" for i in layers for linear in linears]


MIXED = dict.fromkeys(names(range(12), "mlp.up_proj", "self_attn.q_proj"), QuantScheme(4, 64)) | dict.fromkeys(
    names(range(12), "mlp.down_proj"), QuantScheme(8, -1)
)
KEPT = ["lm_head", "model.layers.3.mlp.gate_proj"]


def test_config_of_one_scheme() -> None:
    config = compressed_tensors.quantization_config(dict.fromkeys(MIXED, QuantScheme(4, 64, sym=False)), KEPT)
    assert config == {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 64,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": KEPT,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        # without it transformers 5.23 refuses packed zero points
        "dequantize": True,
    }
    symmetric = compressed_tensors.quantization_config(dict.fromkeys(MIXED, QuantScheme(4, 64, sym=True)), KEPT)
    assert "dequantize" not in symmetric
    assert "dequantize" not in compressed_tensors.quantization_config(MIXED, KEPT)


def test_config_of_several_schemes_names_every_module() -> None:
    config = compressed_tensors.quantization_config(MIXED, KEPT)
    groups = config["config_groups"]
    assert config["format"] == "pack-quantized"
    assert [len(group["targets"]) for group in groups.values()] == [2, 1]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    assert groups["group_1"]["targets"] == [r"re:model\.layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\.mlp\.down_proj$"]


def test_per_tensor_is_written_as_per_channel() -> None:
    schemes = {"a": QuantScheme(8, 0), "b": QuantScheme(8, -1)}
    groups = compressed_tensors.quantization_config(schemes, [])["config_groups"]
    assert [group["weights"]["strategy"] for group in groups.values()] == ["channel"]


linear_names = st.builds(
    lambda layer, middle, expert, leaf: f"model.layers.{layer}.{middle}{expert}{leaf}",
    st.integers(0, 12),
    st.sampled_from(["mlp.", "mlp.experts."]),
    st.sampled_from(["", "0.", "1.", "10."]),
    st.sampled_from(["up_proj", "up+proj", "up", "1"]),
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(linear_names, st.sampled_from([4, 8]), min_size=2, max_size=30), st.sets(linear_names))
def test_targets_match_their_modules_and_nothing_else(bits: dict[str, int], others: set[str]) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match").match_name
    schemes = {name: QuantScheme(width, 32) for name, width in bits.items()}
    groups = compressed_tensors.quantization_config(schemes, [])["config_groups"].values()
    if len(groups) == 1:
        return
    for name in {*schemes, *others}:
        found = [g["weights"]["num_bits"] for g in groups if any(match(name, target) for target in g["targets"])]
        assert found == ([schemes[name].bits] if name in schemes else [])


def test_the_library_gives_every_linear_its_scheme() -> None:
    """The real thing on a model of ours: what is a target, what is ignored, and nothing else."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = torch.nn.Module()
    for name in [*MIXED, *KEPT]:
        model.register_module(name.replace(".", "/"), torch.nn.Linear(64, 64))
    model.named_modules = lambda *_a, **_k: [(n.replace("/", "."), m) for n, m in model._modules.items()]
    config = quantization.QuantizationConfig.model_validate(compressed_tensors.quantization_config(MIXED, KEPT))
    quantization.apply_quantization_config(model, config, show_progress=False)
    applied = {
        name: (m.quantization_scheme.weights.num_bits, m.quantization_scheme.weights.group_size)
        for name, m in model.named_modules()
        if hasattr(m, "quantization_scheme")
    }
    assert applied == {name: (s.bits, s.group_size if s.group_size > 0 else None) for name, s in MIXED.items()}


def test_mixed_schemes_are_read_back() -> None:
    infos = {}
    for name, scheme in MIXED.items():
        infos |= infos_of(compressed_tensors.pack(random_tensor(scheme, 8, 128)), name)
    for name in KEPT:
        infos |= infos_of({"weight": torch.zeros(8, 8)}, name)
    assert compressed_tensors.module_schemes(compressed_tensors.quantization_config(MIXED, KEPT), infos) == MIXED


def test_names_come_before_regexes_before_classes_and_ignore_before_all() -> None:
    packed = compressed_tensors.pack(random_tensor(QuantScheme(4, 32)))
    infos = {}
    for name in ("a.q_proj", "a.k_proj", "a.o_proj", "a.head"):
        infos |= infos_of(packed, name)

    def group(size: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": ARGS | {"group_size": size}}

    config = config_of({}) | {
        "config_groups": {
            "group_0": group(1, "Linear"),
            "group_1": group(2, r"re:.*[qk]_proj"),
            "group_2": group(32, "a.q_proj", "a.k_proj", "a.o_proj", "a.head"),
        },
    }
    assert {scheme.group_size for scheme in compressed_tensors.module_schemes(config, infos).values()} == {32}
    for ignored in ("a.o_proj", r"re:.*o_proj", r"re:a\.o"):
        with pytest.raises(
            QuantoolError, match=r"shard: module 'a\.o_proj' has quantized weights, but no config group"
        ):
            compressed_tensors.module_schemes(config | {"ignore": [ignored]}, infos)
    assert len(compressed_tensors.module_schemes(config | {"ignore": ["o_proj", "re:o_proj"]}, infos)) == 4
    config["config_groups"] = {"group_0": group(32, "re:.*_proj", "head", "Embedding")}
    with pytest.raises(QuantoolError, match=r"'a\.head' has quantized weights"):
        compressed_tensors.module_schemes(config, infos)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("sym", [True, False])
def test_padded_words_of_older_releases(bits: int, sym: bool) -> None:
    q = random_tensor(QuantScheme(bits, 32, sym=sym), rows=200)

    def padded(codes: torch.Tensor) -> torch.Tensor:
        """Each word holds the lowest bits of 32 // bits codes: as released before 0.20."""
        per_word = 32 // bits
        rows = [[row[i : i + per_word] for i in range(0, len(row), per_word)] for row in codes.tolist()]
        stored = [words(*(sum(c << (bits * i) for i, c in enumerate(part)) for part in row)) for row in rows]
        return torch.tensor(stored, dtype=torch.int32)

    tensors = compressed_tensors.pack(q) | {"weight_packed": padded(q.codes)}
    if not sym:
        tensors["weight_zero_point"] = padded(q.zeros.t()).t().contiguous()
    tensors["weight_shape"] = tensors["weight_shape"].to(torch.int32)
    again = read(config_of({"num_bits": bits, "symmetric": sym}), tensors)
    assert torch.equal(again.codes, q.codes)
    assert sym or torch.equal(again.zeros, q.zeros)


def test_zero_points_of_older_releases_are_not_packed() -> None:
    q = random_tensor(QuantScheme(4, 32, sym=False))
    tensors = compressed_tensors.pack(q) | {"weight_zero_point": (q.zeros.int() - 8).to(torch.int8)}
    assert torch.equal(read(config_of({"symmetric": False}), tensors).zeros, q.zeros)
    # a symmetric weight may carry them too, all zero
    tensors["weight_zero_point"].zero_()
    assert read(config_of({}), tensors).zeros is None
    tensors["weight_zero_point"][3, 1] = 1
    with pytest.raises(QuantoolError, match="'weight_zero_point': expected zeros"):
        read(config_of({}), tensors)


@pytest.mark.parametrize("format_", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("activations", [None, TOKEN, STATIC])
def test_int8_weights_that_are_not_packed(format_: str | None, activations: Any) -> None:
    tensors = {"weight": torch.arange(-128, 128, dtype=torch.int8).view(8, 32), "weight_scale": torch.rand(8, 1)}
    if activations is STATIC:
        tensors["input_scale"] = torch.tensor([0.25], dtype=torch.bfloat16)
    q = read(config_of(CHANNEL8, format_=format_, activations=activations), tensors)
    assert torch.equal(q.codes.flatten(), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(dequantize_affine(q), tensors["weight"].float() * tensors["weight_scale"])
    assert q.scheme == QuantScheme(8, -1, act_bits=8 if activations else 16, act_dynamic=activations is not STATIC)
    assert (q.input_scale is None) == (activations is not STATIC)
    if activations is STATIC:
        assert q.input_scale.dtype == torch.float32
        assert q.input_scale.tolist() == [0.25]


def test_naive_weights_with_groups_and_zero_points() -> None:
    scheme = QuantScheme(4, 32, sym=False)
    q = random_tensor(scheme)
    tensors = {
        "weight": (q.codes.int() - 8).to(torch.int8),
        "weight_scale": q.scales,
        "weight_zero_point": (q.zeros.int() - 8).to(torch.int8),
    }
    config = config_of({"symmetric": False}, format_="naive-quantized")
    assert torch.equal(dequantize_affine(read(config, tensors)), dequantize_affine(q))
    tensors["weight"][0, 0] = 8
    with pytest.raises(QuantoolError, match="'weight': values out of the range of 4 bits"):
        read(config, tensors)


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)])
def test_per_tensor_scales_are_repeated(scale_shape: tuple[int, ...]) -> None:
    tensors = {"weight": torch.ones(8, 32, dtype=torch.int8), "weight_scale": torch.full(scale_shape, 0.5)}
    q = read(config_of(CHANNEL8 | {"strategy": "tensor"}, format_="int-quantized", activations=TOKEN), tensors)
    assert q.scheme.group_size == 0
    assert q.scales.tolist() == [[0.5]] * 8
    config = config_of({"num_bits": 4, "strategy": None, "group_size": None, "symmetric": False})
    packed = compressed_tensors.pack(random_tensor(QuantScheme(4, -1)))
    packed |= {"weight_scale": torch.full(scale_shape, 0.5), "weight_zero_point": torch.full(scale_shape, -3).char()}
    q = read(config, packed)
    assert q.scales.tolist() == [[0.5]] * 24
    assert q.zeros.tolist() == [[5]] * 24


def test_modules_in_float_have_no_scheme() -> None:
    infos = infos_of({"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})
    assert compressed_tensors.module_schemes(config_of({}), infos) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of({}, format_="float-quantized"), "format 'float-quantized'"),
        (config_of({}, format_="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (config_of({}, format_="marlin-24"), "format 'marlin-24'"),
        (config_of({}, format_=None), "format 'None'"),
        (config_of({"type": "float"}), "float4 weights"),
        (config_of({"num_bits": 1}), "int1 weights"),
        (config_of({"num_bits": "4"}), "int4 weights"),
        (config_of({"dynamic": True}), "dynamic int4 weights"),
        (config_of({"strategy": "block"}), "weight strategy 'block'"),
        (config_of({"strategy": "tensor_group"}), "weight strategy 'tensor_group'"),
        (config_of({"group_size": 0}), "group_size is 0"),
        (config_of({"group_size": "32"}), "group_size is '32'"),
        (config_of({}, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity format 'sparse-24-bitmask'"),
        (config_of({}, sparsity_config=3), "sparsity_config is not an object"),
        (config_of({}, kv_cache_scheme=STATIC), "kv cache"),
        (config_of({}, transform_config={"config_groups": {"u": {}}}), "rotations"),
        (config_of({}, activations=TOKEN), "quantized activations with W4A16 sym g32 weights"),
        (config_of(CHANNEL8 | {"symmetric": False}, activations=TOKEN), "quantized activations with W8A16 asym"),
        (config_of(CHANNEL8, activations=TOKEN | {"symmetric": False}), "dynamic token asymmetric int8"),
        (config_of(CHANNEL8, activations=TOKEN | {"type": "float"}), "dynamic token symmetric float8"),
        (config_of(CHANNEL8, activations=TOKEN | {"dynamic": False}), "static token symmetric int8"),
        (config_of(CHANNEL8, activations=[1]), "input_activations is not an object"),
        (config_of({}, targets=["re:(["]), r"'re:\(\[' is not a regular expression"),
        (config_of({}, targets=[3]), "targets is not a list of names"),
        (config_of({}, config_groups=None), "config_groups is not an object"),
        (config_of({}, config_groups={"W4A16": ["Linear"]}), "W4A16 is not an object"),
        (config_of({}, ignore=["re:*"]), "not a regular expression"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantoolError, match=message) as caught:
        compressed_tensors.module_schemes(config, {})
    assert "quantization_config" in caught.value.message
    assert "\n" not in caught.value.message


def test_output_activations_are_named() -> None:
    config = config_of({})
    config["config_groups"]["group_0"]["output_activations"] = STATIC
    with pytest.raises(QuantoolError, match="output activations"):
        compressed_tensors.module_schemes(config, {})


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Tensors of a good W4A16 asym g32 [24, 96] module with some replaced, and None removed."""
    packed = compressed_tensors.pack(random_tensor(QuantScheme(4, 32, sym=False))) | tensors
    return {suffix: tensor for suffix, tensor in packed.items() if tensor is not None}


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(weight_scale=None), "tensor 'X.weight_scale' is missing"),
        (changed(weight_shape=None), "tensor 'X.weight_shape' is missing"),
        (changed(weight_zero_point=None), "tensor 'X.weight_zero_point' is missing"),
        (changed(weight_scale=torch.ones(24, 2)), "'X.weight_packed': expected rows of 2 groups of 32 4-bit weights"),
        (
            changed(weight_scale=torch.ones(23, 3)),
            "'X.weight_scale': expected [24, 3] F32 or F16 or BF16, found [23, 3]",
        ),
        (
            changed(weight_scale=int32(24, 3)),
            "'X.weight_scale': expected [24, 3] F32 or F16 or BF16, found [24, 3] I32",
        ),
        (changed(weight_scale=torch.ones(())), "'X.weight_packed': expected rows of 0 groups"),
        (changed(weight_packed=int32(24, 11)), "'X.weight_packed': expected rows of 3 groups"),
        (changed(weight_packed=int32(24, 12, 1)), "'X.weight_packed': expected a matrix of I32, found [24, 12, 1] I32"),
        (changed(weight_packed=int32(24, 12).char()), "'X.weight_packed': expected a matrix of I32"),
        (changed(weight_packed=int32(0, 12)), "'X.weight_packed': expected a matrix of I32"),
        (changed(weight_zero_point=int32(4, 3)), "'X.weight_zero_point': expected [3, 3] or [3, 3] I32, found [4, 3]"),
        (changed(weight_zero_point=torch.ones(24, 3)), "'X.weight_zero_point': expected [24, 3] I8, found [24, 3] F32"),
        (changed(weight_shape=int32(3)), "'X.weight_shape': expected [2] I64 or I32, found [3] I32"),
        (changed(weight_g_idx=int32(96)), "module 'X' has weight_g_idx: activation ordering cannot be read yet"),
    ],
)
def test_tensors_that_contradict_the_config(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(QuantoolError, match=re.escape(message)) as caught:
        read(config_of({"symmetric": False}), tensors)
    assert "missing" in message or "g_idx" in message or caught.value.message.startswith("shard: ")


def test_a_static_scale_must_be_there() -> None:
    tensors = {"weight": int32(8, 32).char(), "weight_scale": torch.ones(8, 1)}
    config = config_of(CHANNEL8, format_="int-quantized", activations=STATIC)
    with pytest.raises(QuantoolError, match=r"'X\.input_scale' is missing"):
        read(config, tensors)
    tensors |= {"input_scale": torch.ones(1), "input_zero_point": torch.ones(1, dtype=torch.int8)}
    with pytest.raises(QuantoolError, match="'input_zero_point': expected zeros"):
        read(config, tensors)
    tensors["input_zero_point"].zero_()
    assert read(config, tensors).input_scale.tolist() == [1]


@pytest.mark.parametrize("shape", [[24, 95], [23, 96], [24, 0], [24, -96], [24, 10**12], [0, 0]])
def test_a_weight_shape_that_contradicts(shape: list[int]) -> None:
    tensors = changed(weight_shape=torch.tensor(shape))
    with pytest.raises(QuantoolError, match=re.escape("'weight_shape': expected the shape of W4A16 asym g32 weights")):
        read(config_of({"symmetric": False}), tensors)


def test_what_it_rejects() -> None:
    assert all(compressed_tensors.rejects(scheme, (13, 96)) is None for scheme in ALL)
    assert "W8A8" in compressed_tensors.rejects(QuantScheme(8, -1, act_bits=8), (8, 8))


def test_small_scales_of_float16_models_are_kept() -> None:
    scale = torch.tensor([[1.3e-5]])  # a row of 8-bit weights up to 1.6e-3
    assert float(compressed_tensors.round_scales(scale, torch.float16)) == pytest.approx(1.3e-5, rel=0.005)
    assert compressed_tensors.round_scales(scale, torch.float64).dtype == torch.float32
