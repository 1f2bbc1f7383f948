"""The five legacy types against ggml itself: its bytes, and blocks that are better than its own."""

from collections.abc import Callable
from pathlib import Path

import ggml
import numpy as np
import pytest
import torch
from ggml_rows import assert_no_worse, block_errors, edges, importance, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool import kernels
from quantool.formats.ggml import dequantize
from quantool.formats.ggml.legacy import (
    LEGACY,
    LegacyType,
    from_affine,
    quantize_reference,
    to_affine,
    why_not_affine,
)
from quantool.quant import QuantizedTensor, dequantize_affine
from quantool.scheme import QuantScheme

BY_NAME = {kind.name: kind for kind in LEGACY}
# Error of the default search over ggml's on Gaussian rows, without and with importance: a little above what it reaches.
RATIOS = {
    "Q4_0": (0.90, 0.99),
    "Q4_1": (0.825, 0.98),
    "Q5_0": (0.885, 0.975),
    "Q5_1": (0.835, 0.985),
    "Q8_0": (0.80, 0.72),
}

each_type = pytest.mark.parametrize("kind", LEGACY, ids=lambda kind: kind.name)
with_and_without = pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
Quantize = Callable[..., torch.Tensor]


def quantize_compiled(
    kind: LegacyType, weight: torch.Tensor, weighing: torch.Tensor | None, *, exact: bool
) -> torch.Tensor:
    if not kernels.is_available():
        pytest.skip(f"no compiled kernels: {kernels.why_not()}")
    return kind.quantize(weight, weighing, exact=exact)


both_implementations = pytest.mark.parametrize("quantize", [quantize_reference, quantize_compiled])


def objective(weight: torch.Tensor, weighing: torch.Tensor) -> torch.Tensor:
    """What ggml minimises with importance."""
    square = weight.double() ** 2
    return weighing * (square.mean(-1, keepdim=True) + square).sqrt()


@each_type
@with_and_without
@both_implementations
def test_the_exact_search_gives_the_bytes_of_ggml(kind: LegacyType, weighed: bool, quantize: Quantize) -> None:
    weight = torch.cat([rows(256), edges(256)])
    weighing = importance(256) if weighed else None
    expected = ggml.quantize(kind.name, weight, weighing)
    differ = (quantize(kind, weight, weighing, exact=True) != expected).any(-1)
    assert differ.nonzero().flatten().tolist() == []


@each_type
@with_and_without
@both_implementations
def test_golden_blocks(kind: LegacyType, weighed: bool, quantize: Quantize, shared: Path) -> None:
    golden = np.load(shared / "golden/ggml-blocks.npz")
    weighing = torch.from_numpy(golden["importance"]) if weighed else None
    expected = torch.from_numpy(golden[kind.name + ".imatrix" * weighed])
    assert torch.equal(quantize(kind, torch.from_numpy(golden["x"]), weighing, exact=True), expected)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(LEGACY), st.booleans(), st.booleans(), st.integers(1, 37), st.integers(1, 5), st.integers(0, 99))
def test_compiled_equals_torch(
    kind: LegacyType, weighed: bool, exact: bool, count: int, blocks: int, seed: int
) -> None:
    """Any number of rows and blocks: lanes that are left over, blocks of several rows in one vector."""
    columns = 32 * blocks
    weight = torch.cat([rows(columns, count, seed), edges(columns)[seed % 17 :]])
    weighing = importance(columns, seed) if weighed else None
    expected = quantize_reference(kind, weight, weighing, exact=exact)
    assert torch.equal(quantize_compiled(kind, weight, weighing, exact=exact), expected)


@each_type
@with_and_without
def test_no_block_is_worse_than_that_of_ggml(kind: LegacyType, weighed: bool) -> None:
    weight = torch.cat([rows(512), edges(512)])
    weighing = importance(512) if weighed else None
    ours, theirs = kind.quantize(weight, weighing), ggml.quantize(kind.name, weight, weighing)
    assert_no_worse(kind, weight, weighing, ours, theirs)
    if weighing is not None and kind.bits < 8:
        assert_no_worse(kind, weight, objective(weight, weighing), ours, theirs)


@each_type
@with_and_without
def test_the_default_search_lowers_the_error(kind: LegacyType, weighed: bool) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    weighing = torch.rand(1024, generator=torch.Generator().manual_seed(1)) ** 2 if weighed else None
    ours = block_errors(kind, weight, weighing, kind.quantize(weight, weighing)).sum()
    theirs = block_errors(kind, weight, weighing, ggml.quantize(kind.name, weight, weighing)).sum()
    assert ours / theirs < RATIOS[kind.name][weighed]


@each_type
def test_importance_of_zero_everywhere_counts_as_none(kind: LegacyType) -> None:
    weight = rows(64)
    nothing = kind.quantize(weight, torch.zeros(64))
    ratio = (
        block_errors(kind, weight, None, nothing).sum() / block_errors(kind, weight, None, kind.quantize(weight)).sum()
    )
    assert ratio < 1.1


@each_type
def test_blocks_are_read_as_ggml_reads_them(kind: LegacyType) -> None:
    blocks = ggml.quantize(kind.name, rows(256))
    assert torch.equal(dequantize(kind, blocks), ggml.dequantize(kind.name, blocks))
    assert torch.equal(kind.pack(*kind.unpack(blocks)), blocks)


@each_type
def test_every_code_survives_packing(kind: LegacyType) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(kind.max_code + 1, (7, 96), generator=generator).to(torch.uint8)
    grid, _ = kind.unpack(kind.quantize(rows(96, 7)))
    blocks = kind.pack(grid, codes)
    assert blocks.shape == (7, 3 * kind.block_bytes)
    assert torch.equal(kind.unpack(blocks)[1], codes)
    assert torch.equal(dequantize(kind, blocks), ggml.dequantize(kind.name, blocks))


# --- codes that exist already ---


def quantized(bits: int, group_size: int, sym: bool, dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    """Random codes on scales that float16 holds, in whatever type they are stored."""
    generator = torch.Generator().manual_seed(bits)
    scheme = QuantScheme(bits=bits, group_size=group_size, sym=sym)
    groups = scheme.groups(256)
    codes = torch.randint(1 << bits, (6, 256), generator=generator).to(torch.uint8)
    scales = (torch.rand(6, groups, generator=generator) / 64 + 1e-3).to(torch.float16).to(dtype)
    zeros = None if sym else torch.randint(1 << bits, (6, groups), generator=generator).to(torch.uint8)
    return QuantizedTensor(codes, scales, zeros, scheme)


@pytest.mark.parametrize(
    ("bits", "group_size", "name"),
    [(4, 32, "Q4_0"), (4, 128, "Q4_0"), (4, -1, "Q4_0"), (5, 64, "Q5_0"), (8, -1, "Q8_0"), (8, 64, "Q8_0")],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_symmetric_codes_become_blocks_of_the_same_values(
    bits: int, group_size: int, name: str, dtype: torch.dtype
) -> None:
    q = quantized(bits, group_size, True, dtype)
    repacked = from_affine(q)
    assert repacked is not None
    assert (repacked.type, repacked.exact) == (name, True)
    assert torch.equal(BY_NAME[name].unpack(repacked.blocks)[1], q.codes)
    assert torch.equal(ggml.dequantize(name, repacked.blocks), dequantize_affine(q))


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_1"), (5, "Q5_1")])
def test_asymmetric_codes_stay_and_their_minimum_is_rounded(bits: int, name: str) -> None:
    q = quantized(bits, 64, False)
    repacked = from_affine(q)
    assert repacked is not None
    assert (repacked.type, repacked.exact) == (name, False)
    assert torch.equal(BY_NAME[name].unpack(repacked.blocks)[1], q.codes)
    torch.testing.assert_close(ggml.dequantize(name, repacked.blocks), dequantize_affine(q), rtol=0, atol=2e-4)


def test_a_minimum_that_float16_holds_is_exact() -> None:
    q = quantized(4, 64, False)
    q.scales.copy_((q.scales * 1024).round() / 1024)  # few bits, so that scale * zero has no more than 11
    repacked = from_affine(q)
    assert repacked is not None
    assert repacked.exact
    assert torch.equal(ggml.dequantize("Q4_1", repacked.blocks), dequantize_affine(q))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheme": QuantScheme(bits=3, group_size=64)}, "no blocks for W3A16"),
        ({"scheme": QuantScheme(bits=8, group_size=64, sym=False)}, "no blocks for W8A16 asym"),
        ({"scheme": QuantScheme(dtype="nf4", group_size=64)}, "no blocks for NF4"),
        ({"g_idx": torch.zeros(256, dtype=torch.int32)}, "act-order"),
        ({"scales": torch.ones(6, 16)}, "groups of 16"),
        ({"scales": torch.full((6, 4), 1 / 3)}, "float32.* not exact in float16"),
        ({"scales": torch.full((6, 4), 1e6)}, "not exact in float16"),
        ({"scales": torch.full((6, 4), 2.0**-30, dtype=torch.bfloat16)}, "bfloat16.* not exact in float16"),
    ],
)
def test_codes_that_no_type_can_hold(changes: dict[str, object], reason: str) -> None:
    q = quantized(4, 64, True)
    fields = {"codes": q.codes, "scales": q.scales, "zeros": None, "scheme": q.scheme, **changes}
    bad = QuantizedTensor(**fields)  # type: ignore[arg-type]
    assert from_affine(bad) is None
    why = why_not_affine(bad)
    assert why is not None
    assert pytest.importorskip("re").search(reason, why)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_blocks_become_codes_and_blocks_again(name: str) -> None:
    blocks = ggml.quantize(name, rows(96))
    q = to_affine(name, blocks)
    assert q is not None
    assert (q.scheme.group_size, q.scales.dtype) == (32, torch.float16)
    assert torch.equal(dequantize_affine(q), ggml.dequantize(name, blocks))
    repacked = from_affine(q)
    assert repacked is not None
    assert torch.equal(repacked.blocks, blocks)


def test_blocks_that_no_integer_scheme_describes() -> None:
    assert to_affine("Q4_1", ggml.quantize("Q4_1", rows(96))) is None
    assert to_affine("Q4_K", torch.zeros(1, 144, dtype=torch.uint8)) is None
    infinite = ggml.quantize("Q8_0", torch.full((1, 32), 1e9))
    assert to_affine("Q8_0", infinite) is None
