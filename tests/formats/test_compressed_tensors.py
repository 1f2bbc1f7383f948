"""compressed-tensors: golden words, the library as the oracle in both directions, its config, and what is refused."""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantool.errors import QuantoolError
from quantool.formats import compressed_tensors
from quantool.io import TensorInfo
from quantool.io.safetensors import dtype_name
from quantool.quant import QuantizedTensor, choose_qparams, dequantize_affine, quantize_affine, round_activations
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
    kept = sorted(others - schemes.keys())
    config = compressed_tensors.quantization_config(schemes, kept)
    groups = config["config_groups"].values()
    if len(groups) == 1:
        return
    for name in {*schemes, *others}:
        found = [g["weights"]["num_bits"] for g in groups if any(match(name, target) for target in g["targets"])]
        if name in schemes:
            assert found == [schemes[name].bits]
        elif ".experts." in name:  # one regex may stand for all experts, and ignore beats it
            assert name in config["ignore"]
            assert len(found) <= 1
        else:
            assert found == []


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


INT8 = [
    QuantScheme(8, size, act_bits=8, act_dynamic=dynamic, act_sym=sym)
    for size in (-1, 0)
    for dynamic in (True, False)
    for sym in (True, False)
]


def int8_tensor(scheme: QuantScheme) -> QuantizedTensor:
    """With every code, and a zero point that is not zero."""
    q = random_tensor(scheme, 24, 96)
    static = not scheme.act_dynamic
    return replace(
        q,
        scales=q.scales[:1].repeat(24, 1) if scheme.group_size == 0 else q.scales,
        input_scale=torch.tensor([0.0625]) if static else None,
        input_zero=torch.tensor([-7], dtype=torch.int8) if static and not scheme.act_sym else None,
    )


def test_int8_activations_golden() -> None:
    codes = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    scheme = QuantScheme(8, -1, act_bits=8, act_dynamic=False, act_sym=False)
    zero = torch.tensor([-3], dtype=torch.int8)
    q = QuantizedTensor(codes, torch.ones(1, 1), None, scheme, input_scale=torch.tensor([0.5]), input_zero=zero)
    packed = compressed_tensors.pack(q)
    assert packed["weight"].tolist() == [[-128, -1, 0, 127]]
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in packed.items()} == {
        "weight": (torch.int8, (1, 4)),
        "weight_scale": (torch.float32, (1, 1)),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int8, (1,)),
    }


@pytest.mark.parametrize("scheme", INT8, ids=str)
def test_the_library_and_quantool_read_each_others_int8(scheme: QuantScheme) -> None:
    library = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    q = int8_tensor(scheme)
    config = compressed_tensors.quantization_config({"X": scheme}, [])
    assert config["format"] == "int-quantized"
    group = quantization.QuantizationConfig.model_validate(copy.deepcopy(config)).config_groups["group_0"]
    assert library.IntQuantizationCompressor.can_compress(torch.nn.Linear, group)
    activations = group.input_activations
    assert (activations.dynamic, activations.symmetric) == (scheme.act_dynamic, scheme.act_sym)
    assert activations.strategy == ("token" if scheme.act_dynamic else "tensor")

    packed = compressed_tensors.pack(q)
    weight = library.IntQuantizationCompressor.decompress(packed, group)["weight"]
    assert torch.equal(weight, dequantize_affine(q).to(torch.bfloat16))
    state = packed | {"weight": dequantize_affine(q), "weight_scale": packed["weight_scale"].float()}
    theirs = library.IntQuantizationCompressor.compress(state, group)
    assert torch.equal(theirs["weight"], packed["weight"])
    again = read(config, packed)
    assert again.scheme == scheme
    assert torch.equal(again.codes, q.codes)


@pytest.mark.parametrize("scheme", [*INT8, QuantScheme(4, 32)], ids=str)
def test_transformers_computes_what_the_scheme_says(scheme: QuantScheme, tmp_path: Path) -> None:
    """The real library, on a model of which every linear but the head, or only some, have this scheme."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(**shape, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    schemes = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        # with W4A16 two formats in one artifact
        own = QuantScheme(8, -1, act_bits=8) if scheme.act_bits == 16 and "down" in name else scheme
        weight, static = linear.weight.detach(), not own.act_dynamic
        scales, _ = choose_qparams(weight, own, lambda scales: scales)
        q = QuantizedTensor(
            quantize_affine(weight, scales, None, own),
            scales,
            None,
            own,
            input_scale=torch.tensor([0.03]) if static else None,
            input_zero=torch.tensor([-17], dtype=torch.int8) if static and not own.act_sym else None,
        )
        schemes[name] = own
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in compressed_tensors.pack(q).items()}
        linear.weight.data = dequantize_affine(q)
        linear.register_forward_pre_hook(lambda _, args, q=q: (rounded(args[0], q),))
    section = compressed_tensors.quantization_config(schemes, ["lm_head"])
    assert section["format"] == ("int-quantized" if scheme.act_bits == 8 else "mixed-precision")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = {**config.to_dict(), "dtype": "float32", "quantization_config": section}
    (tmp_path / "config.json").write_text(json.dumps(written | {"architectures": ["LlamaForCausalLM"]}))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(40).view(4, 10)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def rounded(x: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    if q.scheme.act_bits == 16 or q.input_scale is None:
        return round_activations(x, q.scheme)
    zero = 0.0 if q.input_zero is None else float(q.input_zero)
    return (((x / q.input_scale).round() + zero).clamp(-128, 127) - zero) * q.input_scale


def test_mixed_formats_are_read_back() -> None:
    schemes = {"a": QuantScheme(8, -1, act_bits=8), "b": QuantScheme(4, 32), "c": QuantScheme(4, 32)}
    config = compressed_tensors.quantization_config(schemes, [])
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    infos = {}
    for name, scheme in schemes.items():
        infos |= infos_of(compressed_tensors.pack(random_tensor(scheme)), name)
    assert compressed_tensors.module_schemes(config, infos) == schemes


def ordered(*, actorder: Any = "group", **tensors: torch.Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and tensors of a weight that was grouped in the order of activations, as written before 0.20."""
    packed = compressed_tensors.pack(random_tensor(QuantScheme(4, 32))) | tensors
    config = config_of({"actorder": actorder})
    return config, {suffix: tensor for suffix, tensor in packed.items() if tensor is not None}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("actorder", ["group", None])
def test_groups_in_activation_order_are_read(dtype: torch.dtype, actorder: str | None) -> None:
    g_idx = torch.randperm(96, generator=torch.Generator().manual_seed(0)) // 32
    q = read(*ordered(actorder=actorder, weight_g_idx=g_idx.to(dtype)))
    assert q.g_idx.dtype == torch.int32
    assert torch.equal(q.g_idx, g_idx.to(torch.int32))
    steps = q.scales.float().gather(1, g_idx.expand(24, 96))
    assert torch.equal(dequantize_affine(q), (q.codes.float() - 8) * steps)


def test_groups_that_are_in_order_after_all() -> None:
    for stored in (torch.arange(96) // 32, torch.full((96,), -1)):  # -1: the library made it, and never set it
        assert read(*ordered(weight_g_idx=stored.int())).g_idx is None
    assert read(*ordered(actorder="static")).g_idx is None
    for g_idx, message in (
        (None, r"'X\.weight_g_idx' is missing"),
        (torch.zeros(96), r"'X\.weight_g_idx': expected I32 or I64, found \[96\] F32"),
        (torch.zeros(96).int(), "'weight_g_idx': expected 96 entries, 32 of each of 3 groups"),
        (torch.zeros(95).int(), "'weight_g_idx': expected 96 entries"),
    ):
        with pytest.raises(QuantoolError, match=message):
            read(*ordered(weight_g_idx=g_idx))


def test_the_library_no_longer_reads_groups_in_activation_order() -> None:
    """Why they are not written."""
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs
    with pytest.raises(ValueError, match="actorder='group' has been removed"):
        arguments(**ARGS, actorder="group")
    assert "activation order" in compressed_tensors.rejects(QuantScheme(4, 32), (8, 64), act_order=True)


def test_unknown_keys_are_named() -> None:
    """What a later version adds may change the weights; the library refuses it in a group and in arguments."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    tensors = compressed_tensors.pack(random_tensor(QuantScheme(4, 32)))
    good = config_of({"observer": "mse", "actorder": "static", "scale_dtype": None}, version="0.99.0")
    assert torch.equal(read(good, tensors).codes, read(config_of({}), tensors).codes)
    group = good["config_groups"]["group_0"]
    cases = [
        (good | {"mirror": {"axis": 1}}, "'mirror' (compressed-tensors '0.99.0') is not a key"),
        (with_group(good, group | {"mirror": True}), "'mirror' of 'group_0' (compressed-tensors '0.99.0')"),
        (with_group(good, group | {"weights": group["weights"] | {"mirror": 2}}), "'mirror' of weights"),
        (with_group(good, group | {"input_activations": TOKEN | {"mirror": 2}}), "'mirror' of input_activations"),
    ]
    for config, message in cases:
        with pytest.raises(QuantoolError, match=re.escape(message)) as caught:
            read(config, tensors)
        assert "remove it from config.json" in caught.value.hint
        if "mirror" not in config:
            with pytest.raises(ValueError, match="mirror"):
                quantization.QuantizationConfig.model_validate(config)
    assert read(good | {"mirror": None, "dequantize": True}, tensors).codes is not None


def with_group(config: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    return config | {"config_groups": {"group_0": group}}


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
        (config_of(CHANNEL8, activations=STATIC | {"dynamic": True}), "dynamic tensor symmetric int8"),
        (config_of(CHANNEL8, activations=TOKEN | {"dynamic": "local"}), "dynamic token symmetric int8"),
        (config_of(CHANNEL8, activations=STATIC | {"strategy": ["tensor"], "symmetric": False}), "asymmetric int8"),
        (config_of(CHANNEL8, activations=TOKEN | {"type": "float"}), "dynamic token symmetric float8"),
        (config_of(CHANNEL8, activations=TOKEN | {"dynamic": False}), "static token symmetric int8"),
        (config_of(CHANNEL8, activations=[1]), "input_activations is not an object"),
        (config_of({}, targets=["re:(["]), r"'re:\(\[' is not a regular expression"),
        (config_of({}, targets=[3]), "targets is not a list of names"),
        (config_of({}, config_groups=None), "config_groups is not an object"),
        (config_of({}, config_groups={"W4A16": ["Linear"]}), "'W4A16' is not an object"),
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
    ],
)
def test_tensors_that_contradict_the_config(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(QuantoolError, match=re.escape(message)) as caught:
        read(config_of({"symmetric": False}), tensors)
    assert "missing" in message or caught.value.message.startswith("shard: ")


def test_a_static_scale_must_be_there() -> None:
    tensors = {"weight": int32(8, 32).char(), "weight_scale": torch.ones(8, 1)}
    config = config_of(CHANNEL8, format_="int-quantized", activations=STATIC)
    with pytest.raises(QuantoolError, match=r"'X\.input_scale' is missing"):
        read(config, tensors)
    tensors |= {"input_scale": torch.ones(1), "input_zero_point": torch.ones(1, dtype=torch.int8)}
    with pytest.raises(QuantoolError, match="'input_zero_point': expected zeros"):
        read(config, tensors)
    asymmetric = config_of(CHANNEL8, format_="int-quantized", activations=STATIC | {"symmetric": False})
    assert read(asymmetric, tensors).input_zero.tolist() == [1]
    tensors["input_zero_point"].zero_()
    assert read(config, tensors).input_scale.tolist() == [1]
    assert read(config, tensors).input_zero is None
    assert read(asymmetric, tensors | {"input_zero_point": torch.tensor(5).char()}).input_zero.tolist() == [5]
    for bad, message in ((None, "is missing"), (torch.ones(1), "expected .* I8, found .* F32"), (int32(2).char(), "2")):
        changed_ = {suffix: t for suffix, t in (tensors | {"input_zero_point": bad}).items() if t is not None}
        with pytest.raises(QuantoolError, match=rf"'X\.input_zero_point'.*{message}"):
            read(asymmetric, changed_)


@pytest.mark.parametrize("shape", [[24, 95], [23, 96], [24, 0], [24, -96], [24, 10**12], [0, 0]])
def test_a_weight_shape_that_contradicts(shape: list[int]) -> None:
    tensors = changed(weight_shape=torch.tensor(shape))
    with pytest.raises(QuantoolError, match=re.escape("'weight_shape': expected the shape of W4A16 asym g32 weights")):
        read(config_of({"symmetric": False}), tensors)


def test_what_it_rejects() -> None:
    assert all(compressed_tensors.rejects(scheme, (13, 96)) is None for scheme in ALL)
    assert all(compressed_tensors.rejects(scheme, (8, 8)) is None for scheme in INT8)
    for scheme in (
        QuantScheme(8, 32, act_bits=8),
        QuantScheme(4, -1, act_bits=8),
        QuantScheme(8, -1, False, act_bits=8),
    ):
        assert str(scheme) in compressed_tensors.rejects(scheme, (8, 64))
    for scheme in (QuantScheme(4, 64, dtype="nf4"), QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0)):
        assert str(scheme) in compressed_tensors.rejects(scheme, (8, 64))


def test_small_scales_of_float16_models_are_kept() -> None:
    scale = torch.tensor([[1.3e-5]])  # a row of 8-bit weights up to 1.6e-3
    assert float(compressed_tensors.round_scales(scale, torch.float16)) == pytest.approx(1.3e-5, rel=0.005)
    assert compressed_tensors.round_scales(scale, torch.float64).dtype == torch.float32


def test_the_experts_of_a_mixed_artifact_are_one_regex() -> None:
    """transformers and vLLM ask for the experts' scheme by it, whatever the names on disk."""
    attention, experts = QuantScheme(8, -1, sym=True), QuantScheme(4, 32, sym=True)
    schemes = {f"model.layers.{i}.self_attn.q_proj": attention for i in range(2)}
    names = [
        f"model.layers.{i}.block_sparse_moe.experts.{e}.w{w}" for i in range(2) for e in range(4) for w in (1, 2, 3)
    ]
    schemes |= dict.fromkeys(names, experts)
    config = compressed_tensors.quantization_config(schemes, [])
    targets = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert targets[4] == [r"re:.*\.experts\.[0-9]+\..*"]
    assert not any(re.match(t.removeprefix("re:"), names[0]) for t in targets[8])
    # experts of two schemes keep their names: no regex could tell them apart
    schemes |= dict.fromkeys(names[:12], attention)
    config = compressed_tensors.quantization_config(schemes, [])
    assert all(r".*\.experts" not in t for group in config["config_groups"].values() for t in group["targets"])
