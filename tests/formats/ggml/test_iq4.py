"""IQ4_NL and IQ4_XS against ggml itself: its bytes, and blocks that are better than its own."""

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
from quantool.formats.ggml.iq4 import IQ4_NL, IQ4_XS, Iq4Type, quantize_reference

TYPES = (IQ4_NL, IQ4_XS)
# Error of the default search over ggml's on Gaussian rows, without and with importance: a little above what it reaches.
RATIOS = {"IQ4_NL": (0.97, 0.96), "IQ4_XS": (0.96, 0.95)}
OVERFLOW = 11  # of `edges`: sums of squares that float32 cannot hold, where ggml's IQ4_NL has d = NaN and ours 0

each_type = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
with_and_without = pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
Quantize = Callable[..., torch.Tensor]


def quantize_compiled(
    kind: Iq4Type, weight: torch.Tensor, weighing: torch.Tensor | None, *, exact: bool
) -> torch.Tensor:
    if not kernels.is_available():
        pytest.skip(f"no compiled kernels: {kernels.why_not()}")
    return kind.quantize(weight, weighing, exact=exact)


both_implementations = pytest.mark.parametrize("quantize", [quantize_reference, quantize_compiled])


def some_importance(columns: int) -> torch.Tensor:
    """Where ggml's IQ4_NL makes NaN of a block without any, a little."""
    return importance(columns).clamp(min=1e-3)


def objective(kind: Iq4Type, weight: torch.Tensor, weighing: torch.Tensor | None) -> torch.Tensor:
    """What ggml minimises."""
    square = weight.double() ** 2
    if weighing is None:
        return square
    of_block = square.view(len(weight), -1, kind.block_size).mean(-1).repeat_interleave(kind.block_size, 1)
    return weighing * (2 * of_block + square).sqrt()


@each_type
@with_and_without
@both_implementations
def test_the_exact_search_gives_the_bytes_of_ggml(kind: Iq4Type, weighed: bool, quantize: Quantize) -> None:
    weight = torch.cat([edges(512), rows(512)])
    weighing = some_importance(512) if weighed else None
    expected = ggml.quantize(kind.name, weight, weighing)
    differ = (quantize(kind, weight, weighing, exact=True) != expected).any(-1).nonzero().flatten().tolist()
    assert differ in ([], [OVERFLOW])


@each_type
@with_and_without
@both_implementations
def test_golden_blocks(kind: Iq4Type, weighed: bool, quantize: Quantize, shared: Path) -> None:
    golden = np.load(shared / "golden/ggml-blocks.npz")
    weighing = torch.from_numpy(golden["importance"]) if weighed else None
    expected = torch.from_numpy(golden[kind.name + ".imatrix" * weighed])
    assert torch.equal(quantize(kind, torch.from_numpy(golden["x"]), weighing, exact=True), expected)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(TYPES), st.booleans(), st.booleans(), st.integers(1, 21), st.integers(1, 3), st.integers(0, 99))
def test_compiled_equals_torch(kind: Iq4Type, weighed: bool, exact: bool, count: int, blocks: int, seed: int) -> None:
    """Any number of rows and blocks: lanes that are left over, blocks of several rows in one vector."""
    columns = kind.block_size * blocks
    weight = torch.cat([rows(columns, count, seed), edges(columns)[seed % 17 :]])
    weighing = importance(columns, seed) if weighed else None
    expected = quantize_reference(kind, weight, weighing, exact=exact)
    assert torch.equal(quantize_compiled(kind, weight, weighing, exact=exact), expected)


@each_type
@with_and_without
def test_no_block_is_worse_than_that_of_ggml(kind: Iq4Type, weighed: bool) -> None:
    weight = torch.cat([rows(512), edges(512)])
    weighing = importance(512) if weighed else None
    ours, theirs = kind.quantize(weight, weighing), ggml.quantize(kind.name, weight, weighing)
    assert_no_worse(kind, weight, weighing, ours, theirs)
    assert_no_worse(kind, weight, objective(kind, weight, weighing), ours, theirs)


@each_type
@with_and_without
def test_the_default_search_lowers_the_error(kind: Iq4Type, weighed: bool) -> None:
    weight = torch.randn(32, 1024, generator=torch.Generator().manual_seed(0))
    weighing = torch.rand(1024, generator=torch.Generator().manual_seed(1)) ** 2 if weighed else None
    ours = block_errors(kind, weight, weighing, kind.quantize(weight, weighing)).sum()
    theirs = block_errors(kind, weight, weighing, ggml.quantize(kind.name, weight, weighing)).sum()
    assert ours / theirs < RATIOS[kind.name][weighed]


@each_type
@pytest.mark.parametrize("exact", [True, False])
def test_importance_of_zero_gives_no_nan(kind: Iq4Type, exact: bool) -> None:
    weight = rows(256)
    assert torch.isfinite(dequantize(kind, kind.quantize(weight, torch.zeros(256), exact=exact))).all()


@each_type
def test_blocks_are_read_as_ggml_reads_them(kind: Iq4Type) -> None:
    blocks = ggml.quantize(kind.name, rows(512))
    assert torch.equal(dequantize(kind, blocks), ggml.dequantize(kind.name, blocks))
    assert torch.equal(kind.pack(*kind.unpack(blocks)), blocks)


@each_type
def test_every_code_and_scale_survives_packing(kind: Iq4Type) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (9, 1024 // kind.block_size * kind.block_bytes), generator=generator).to(torch.uint8)
    blocks = noise.view(9, -1, kind.block_bytes)
    blocks[..., 1] &= 0x3B  # d below 2: no Inf, no NaN
    assert torch.equal(kind.pack(*kind.unpack(noise)), noise)
    assert torch.equal(dequantize(kind, noise), ggml.dequantize(kind.name, noise))
