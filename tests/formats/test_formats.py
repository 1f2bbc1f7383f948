"""What every format must do; the cases come from FORMATS, so a new format is tested here by being listed."""

import functools
import itertools
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError
from quantool.formats import FORMATS, Format, detect, exact_scales
from quantool.io import TensorInfo
from quantool.io.safetensors import DTYPES, SafetensorsCheckpoint
from quantool.quant import DoubleQuant, QuantizedTensor, dequantize_affine
from quantool.scheme import DTYPE_NAMES, FORMAT_NAMES, QuantScheme

FLOAT_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LIMIT = settings(deadline=None, max_examples=150)
MODULE = "model.layers.0.up_proj"

BOOLS = (True, False)
SIZES = (-1, 0, 1, 3, 8, 16, 20, 32)
SCHEMES = [
    *(QuantScheme(bits, size, sym) for bits in range(2, 9) for size in SIZES for sym in BOOLS),
    *(
        QuantScheme(bits, size, sym, act_bits=8, act_dynamic=dynamic, act_sym=act_sym)
        for bits, size in itertools.product((4, 8), SIZES)
        for sym, dynamic, act_sym in itertools.product(BOOLS, repeat=3)
    ),
    QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0),
    QuantScheme(8, -1, act_bits=8, outlier_threshold=0.0),
    *(
        QuantScheme(4, size, dtype=dtype, double_quant=double)
        for dtype in DTYPE_NAMES
        if dtype != "int"
        for size in (64, 128, 4096)
        for double in BOOLS
    ),
]


@functools.cache
def accepted(word: str) -> list[QuantScheme]:
    return [scheme for scheme in SCHEMES if FORMATS[word].rejects(scheme, (64, 480)) is None]


@st.composite
def accepted_cases(draw: st.DrawFn, word: str) -> tuple[QuantScheme, tuple[int, int], bool]:
    """A scheme, a shape and whether groups are in activation order, that the format does not reject."""
    rejects = FORMATS[word].rejects
    scheme = draw(st.sampled_from(accepted(word)))
    rows = next(n for n in range(1, 65) if rejects(scheme, (n, 480)) is None)
    columns = next(k for k in range(1, 481) if scheme.divides(k) and rejects(scheme, (rows, k)) is None)
    shape = rows * draw(st.integers(1, max(2, 40 // rows))), columns * draw(st.integers(1, max(2, 70 // columns)))
    ordered = scheme.group_size > 0 and not scheme.flat and rejects(scheme, shape, act_order=True) is None
    return scheme, shape, ordered and draw(st.booleans())


def random_tensor(
    scheme: QuantScheme,
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
    seed: int,
    *,
    act_order: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    random = torch.Generator().manual_seed(seed)

    def below(limit: int, *size: int) -> torch.Tensor:
        return torch.randint(0, limit, size, generator=random, dtype=torch.uint8)

    def floats(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=random) * 0.1 + 1e-3

    codes = below(scheme.max_code + 1, *shape)
    if scheme.flat:
        blocks = -(-codes.numel() // scheme.group_size)
        double = DoubleQuant(below(256, blocks), floats(256).sort().values, floats(-(-blocks // 256)), floats(1)[0])
        scales = double.quant_map[double.codes.long()] * double.absmax.repeat_interleave(256)[:blocks] + double.offset
        known = double if scheme.double_quant else None
        return QuantizedTensor(codes, scales, None, scheme, double=known, weight_dtype=weight_dtype)
    grid = (shape[0], scheme.groups(shape[1]))
    if scheme.outlier_threshold is not None:  # what is stored is 127 times the scale
        return QuantizedTensor(codes.clamp(min=1), floats(*grid) / 127, None, scheme)
    scales = floats(*grid).to(scale_dtype)
    if scheme.group_size == 0:
        scales = scales[:1].repeat(shape[0], 1)
    static = scheme.act_bits == 8 and not scheme.act_dynamic
    order = torch.randperm(shape[1], generator=random)
    return QuantizedTensor(
        codes,
        scales,
        None if scheme.sym else below(scheme.max_code + 1, *grid),
        scheme,
        input_scale=floats(1) if static else None,
        input_zero=(below(255, 1) - 127).view(torch.int8) if static and not scheme.act_sym else None,
        g_idx=(order // scheme.group_size).to(torch.int32) if act_order and grid[1] > 1 else None,
    )


def infos_of(tensors: dict[str, torch.Tensor], module: str = MODULE) -> dict[str, TensorInfo]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        f"{module}.{suffix}": TensorInfo(f"{module}.{suffix}", tuple(t.shape), names[t.dtype], t.nbytes, Path("m"))
        for suffix, t in tensors.items()
    }


def assert_equal(a: Any, b: Any) -> None:
    """Field by field; tensors bit by bit."""
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, torch.Tensor):
            assert right is not None, field.name
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        elif isinstance(left, DoubleQuant):
            assert_equal(left, right)
        else:
            assert left == right, field.name


def read_back(format_: Format, q: QuantizedTensor, shape: tuple[int, int]) -> QuantizedTensor:
    """`q` written, and read the way a reader comes to it: by config.json and tensor shapes."""
    packed = format_.pack(q)
    section = format_.quantization_config({MODULE: q.scheme}, ["lm_head"], act_order=q.g_idx is not None)
    section = json.loads(json.dumps(section))
    found = detect({"quantization_config": section})
    assert found is format_
    schemes = found.module_schemes(section, infos_of(packed))
    assert list(schemes) == [MODULE]
    assert found.weight_shape(packed) == shape
    return found.unpack(packed, schemes[MODULE])


def test_the_table_holds_what_the_command_line_offers() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES
    assert all(word == module.NAME for word, module in FORMATS.items())


@pytest.mark.parametrize("word", FORMATS)
@LIMIT
@given(st.data(), st.sampled_from(FLOAT_DTYPES), st.integers(0, 2**32))
def test_unpack_inverts_pack_and_layout_is_what_pack_returns(
    word: str, data: st.DataObject, model_dtype: torch.dtype, seed: int
) -> None:
    scheme, shape, act_order = data.draw(accepted_cases(word))
    format_ = FORMATS[word]
    stored = format_.round_scales(torch.ones(1), model_dtype).dtype
    q = random_tensor(scheme, shape, stored, seed, act_order=act_order, weight_dtype=model_dtype)
    packed = format_.pack(q)
    assert {s: (t.dtype, tuple(t.shape)) for s, t in packed.items()} == {
        s: (DTYPES[dtype], shape) for s, (dtype, shape) in format_.layout(scheme, shape, model_dtype).items()
    }
    # also the strides of dimensions of length 1, which a writer's view as bytes looks at
    assert all(t.stride() == torch.empty(t.shape).stride() for t in packed.values())
    assert_equal(format_.unpack(packed, scheme), q)

    again = read_back(format_, q, shape)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.scales, q.scales)
    if scheme.flat:  # of a weight in one block, shapes do not tell how large a block may be
        assert again.scheme == scheme or q.scales.numel() == 1
        assert_equal(replace(again, scheme=scheme), q)
    elif scheme.act_bits == 8:
        assert_equal(again, q)
    else:
        assert torch.equal(dequantize_affine(again), dequantize_affine(q))


def test_every_kind_of_scheme_is_held_by_some_format() -> None:
    held = {scheme for word in FORMATS for scheme in accepted(word)}
    assert {scheme.bits for scheme in held if scheme.act_bits == 16 and not scheme.flat} == set(range(2, 9))
    assert {(s.act_dynamic, s.act_sym, s.group_size) for s in held if s.act_bits == 8} >= set(
        itertools.product(BOOLS, BOOLS, (-1, 0))
    )
    assert all(scheme in held for scheme in SCHEMES if "bitsandbytes" in FORMATS and scheme.flat)


@pytest.mark.parametrize("word", FORMATS)
def test_some_scheme_is_accepted_and_a_rejection_is_one_line(word: str) -> None:
    reasons = [FORMATS[word].rejects(scheme, shape) for scheme in SCHEMES for shape in ((32, 64), (33, 64))]
    assert None in reasons
    assert any(reasons)
    assert all(reason is None or ("\n" not in reason and word in reason) for reason in reasons)


@pytest.mark.parametrize("word", FORMATS)
def test_groups_in_activation_order_are_never_dropped(word: str) -> None:
    """A format that has no place for g_idx says so beforehand, and writes no other weights if asked all the same."""
    scheme = next((scheme for scheme in accepted(word) if scheme.group_size == 32), None)
    if scheme is None:
        assert all(scheme.flat or scheme.group_size == -1 for scheme in accepted(word))
        return
    q = random_tensor(scheme, (64, 480), torch.float32, 0, act_order=True)
    assert q.g_idx is not None
    if word == "gptq":
        assert FORMATS[word].rejects(scheme, (64, 480), act_order=True) is None
        return
    assert "\n" not in FORMATS[word].rejects(scheme, (64, 480), act_order=True)
    with pytest.raises(QuantoolError, match="activation order"):
        FORMATS[word].pack(q)


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


def path_of_formats() -> st.SearchStrategy[tuple[str, ...]]:
    return st.permutations(["awq", "compressed-tensors", "gptq"]).map(tuple)


@LIMIT
@given(path_of_formats(), st.integers(1, 3), st.sampled_from([-1, 16, 32]), st.booleans(), st.integers(0, 2**32))
def test_a_repack_holds_the_same_weights(
    path: tuple[str, ...], times: int, group_size: int, sym: bool, seed: int
) -> None:
    """From any of the three through any other and back, as a repack goes: what was read is what is written."""
    shape = (32 * times, 96)
    q = made = random_tensor(QuantScheme(4, group_size, sym=sym), shape, torch.float16, seed)
    for word in (*path, path[0]):
        q = read_back(FORMATS[word], exact_scales(q, FORMATS[word], torch.float16), shape)
        assert torch.equal(q.codes, made.codes)
        assert torch.equal(dequantize_affine(q), dequantize_affine(made))


@LIMIT
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 16, 32]), st.booleans(), st.integers(0, 2**32))
def test_compressed_tensors_and_gptq_hold_the_same_weights_of_any_width(
    bits: int, group_size: int, sym: bool, seed: int
) -> None:
    q = made = random_tensor(QuantScheme(bits, group_size, sym=sym), (32, 96), torch.float16, seed)
    for word in ("compressed-tensors", "gptq", "compressed-tensors"):
        q = read_back(FORMATS[word], exact_scales(q, FORMATS[word], torch.float16), (32, 96))
        assert_equal(q, made)


def test_scales_of_another_format_are_exact_or_refused() -> None:
    scheme = QuantScheme(4, 32)
    half = random_tensor(scheme, (32, 96), torch.float16, 0)
    for model_dtype in (torch.float16, torch.float32):
        cast = exact_scales(half, FORMATS["compressed-tensors"], model_dtype)
        assert cast.scales.dtype == model_dtype
        assert torch.equal(cast.scales.float(), half.scales.float())
    rounded = int((half.scales.to(torch.bfloat16).float() != half.scales.float()).sum())
    assert rounded
    with pytest.raises(
        QuantoolError, match=rf"{rounded} of 96 scales in float16 have no equal in bfloat16, .*compress"
    ):
        exact_scales(half, FORMATS["compressed-tensors"], torch.bfloat16)
    assert exact_scales(half, FORMATS["gptq"], torch.bfloat16).scales is half.scales
    coarse = replace(half, scales=half.scales.to(torch.bfloat16))
    for word in ("awq", "gptq", "compressed-tensors"):
        cast = exact_scales(coarse, FORMATS[word], torch.bfloat16)
        assert torch.equal(cast.scales.float(), coarse.scales.float())
    small = coarse.scales.clone()
    small[3, 1] = 1e-20
    with pytest.raises(QuantoolError, match="1 of 96 scales in bfloat16 have no equal in float16"):
        exact_scales(replace(coarse, scales=small), FORMATS["gptq"], torch.bfloat16)


def test_a_float_checkpoint_has_no_format() -> None:
    assert detect({"model_type": "llama"}) is None
    assert detect({"quantization_config": None}) is None


@pytest.mark.parametrize("section", [{"quant_method": "exl3"}, {"quant_method": ["awq"]}, {}, [], "awq", 4])
def test_an_unknown_quant_method_is_named(section: Any) -> None:
    with pytest.raises(QuantoolError, match=r"expected 'compressed-tensors' or .* or 'auto-round'") as caught:
        detect({"quantization_config": section})
    if section == {"quant_method": "exl3"}:
        assert "'exl3'" in caught.value.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def changed(config: Any, path: list[int], value: Any) -> Any:
    """`config` with one of its values, found by going down by `path`, replaced."""
    if not path or not isinstance(config, dict) or not config:
        return value
    key = list(config)[path[0] % len(config)]
    return {**config, key: changed(config[key], path[1:], value)}


@pytest.mark.parametrize("word", FORMATS)
@LIMIT
@given(st.data(), st.lists(st.integers(0, 99), min_size=1, max_size=5), json_values)
def test_no_config_is_worse_than_an_error(word: str, data: st.DataObject, path: list[int], value: Any) -> None:
    """Whatever stands in the place of any key's value: it is read, or named in one line."""
    scheme = data.draw(st.sampled_from(accepted(word)))
    packed = FORMATS[word].pack(random_tensor(scheme, (64, 480), torch.float16, 0, weight_dtype=torch.float16))
    config = changed(FORMATS[word].quantization_config({MODULE: scheme, "x": scheme}, ["first", "second"]), path, value)
    try:
        if (found := detect({"quantization_config": config})) is not None:
            for read_scheme in found.module_schemes(config, infos_of(packed)).values():
                found.unpack(packed, read_scheme)
    except QuantoolError as error:
        assert "\n" not in error.message  # noqa: PT017


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
    "ar-auto_gptq": 0.14,
    "ar-auto_round": 0.14,
}


class Peer:
    """An artifact of another tool."""

    def __init__(self, shared: Path, name: str) -> None:
        self.checkpoint = SafetensorsCheckpoint(shared / "peers" / name)
        self.format = detect(self.checkpoint.config)
        self.schemes = self.format.module_schemes(self.checkpoint.config["quantization_config"], self.checkpoint.infos)

    def stored(self, module: str) -> dict[str, torch.Tensor]:
        names = {s: f"{module}.{s}" for s in self.format.SUFFIXES if f"{module}.{s}" in self.checkpoint.infos}
        return {suffix: self.checkpoint.read(name) for suffix, name in names.items()}

    def read(self, module: str) -> QuantizedTensor:
        return self.format.unpack(self.stored(module), self.schemes[module])


@pytest.mark.parametrize("name", PEERS)
def test_checkpoints_of_other_tools(shared: Path, name: str) -> None:
    peer = Peer(shared, name)
    original = SafetensorsCheckpoint(shared / "models/tinystories-656k")
    linears = {name.removesuffix(".weight") for name in original.infos if name.endswith("_proj.weight")}
    assert set(peer.schemes) == linears
    for module, scheme in peer.schemes.items():
        stored, q = peer.stored(module), peer.read(module)
        assert q.codes.max() <= scheme.max_code
        weight = original.read(f"{module}.weight").to(torch.float32)
        error = (dequantize_affine(q) - weight).norm() / weight.norm()
        if PEERS[name] is not None:
            assert error < (0.01 if scheme.bits == 8 else PEERS[name]), module
        assert (q.input_scale is not None) == (name == "ct-w8a8-static")
        assert q.g_idx is None
        # and back to the very tensors; auto-round leaves out g_idx where it says nothing
        packed = peer.format.pack(q)
        assert set(packed) - set(stored) <= {"g_idx"}
        assert all(torch.equal(packed[suffix], tensor) for suffix, tensor in stored.items())


def test_schemes_of_other_tools_are_named(shared: Path) -> None:
    found = {name: sorted(set(map(str, Peer(shared, name).schemes.values()))) for name in PEERS}
    assert found == {
        "ct-mixed-w4-w8": ["W4A16 sym g64", "W8A16 sym channel"],
        "ct-w3a16-sym-g64": ["W3A16 sym g64"],
        "ct-w4a16-asym-g64-gptq": ["W4A16 asym g64"],
        "ct-w4a16-sym-g128": ["W4A16 sym g128"],
        "ct-w8a16-channel": ["W8A16 sym channel"],
        "ct-w8a8-smoothquant": ["W8A8 sym channel"],
        "ct-w8a8-static": ["W8A8 sym channel, activations static"],
        "ar-auto_awq": ["W4A16 asym g64"],
        "ar-auto_gptq": ["W4A16 sym g64"],
        "ar-auto_round": ["W4A16 sym g64"],
    }


def test_auto_rounds_own_artifact_is_the_one_it_made_for_gptq(shared: Path) -> None:
    """Same codes and scales in both; its zeros of 8 are stored as 7, so both are v1, which neither config says."""
    one, other = Peer(shared, "ar-auto_round"), Peer(shared, "ar-auto_gptq")
    assert one.format is other.format is FORMATS["gptq"]
    for module in one.schemes:
        assert_equal(one.read(module), other.read(module))
        assert set(other.stored(module)["qzeros"].flatten().tolist()) == {0x77777777}
