"""The encoders of ggml's blocks of 32 weights in the emulator: the bytes of the CPU kernels, and of ggml itself."""

from pathlib import Path

import ggml_rows
import numpy as np
import pytest
import torch
from emulated import Emulated

from quantool import kernels
from quantool.formats.ggml import BlockType
from quantool.formats.ggml.iq4 import IQ4_NL, IQ4_XS
from quantool.formats.ggml.legacy import LEGACY
from quantool.kernels import ggml

each_type = pytest.mark.parametrize("kind", [*LEGACY, IQ4_NL, IQ4_XS], ids=lambda kind: kind.name)
with_and_without = pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
exact_or_better = pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])


@pytest.fixture(autouse=True)
def compiled(emulated: Emulated) -> Emulated:
    if not kernels.is_available():
        pytest.skip(f"no kernels of the CPU to compare with: {kernels.why_not()}")
    return emulated


def encode(kind: BlockType, weight: torch.Tensor, weighing: torch.Tensor | None, *, exact: bool) -> torch.Tensor:
    row_bytes = weight.shape[1] // kind.block_size * kind.block_bytes
    return ggml.ggml_blocks_cuda(weight, weighing, kind.name, row_bytes, exact)


def assert_same(kind: BlockType, weight: torch.Tensor, weighing: torch.Tensor | None, *, exact: bool) -> None:
    """Equal in every byte to what the CPU makes, with the numbers of the rows that are not."""
    expected = kind.quantize(weight, weighing, exact=exact)
    differ = (encode(kind, weight, weighing, exact=exact) != expected).any(-1)
    assert differ.nonzero().flatten().tolist() == []


@each_type
@with_and_without
@exact_or_better
def test_bytes_are_those_of_the_cpu(kind: BlockType, weighed: bool, exact: bool) -> None:
    """Heavy tails, zeros, constants, denormals, what overflows float16 or float32 when squared, ties, -0."""
    weight = torch.cat([ggml_rows.rows(512), ggml_rows.edges(512)])
    assert_same(kind, weight, ggml_rows.importance(512) if weighed else None, exact=exact)


@each_type
@with_and_without
@exact_or_better
@pytest.mark.parametrize("exponent", [-149, -140, -126, -100, -64, -50, -24, -14, 15, 16, 50, 63, 64, 100, 126, 127])
def test_any_magnitude(kind: BlockType, weighed: bool, exact: bool, exponent: int) -> None:
    """From the smallest number of float32 to the largest: where sums overflow, NaN goes the same way."""
    values = torch.randn(3, 256, generator=torch.Generator().manual_seed(exponent))
    weight = torch.ldexp(values.clamp(-1.99, 1.99), torch.tensor(exponent))
    assert weight.isfinite().all()
    assert_same(kind, weight, ggml_rows.importance(256) if weighed else None, exact=exact)


@each_type
@with_and_without
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (1, 3), (3, 5), (2, 16), (5, 7), (33, 1), (129, 1), (2, 129)])
def test_any_number_of_blocks(kind: BlockType, weighed: bool, rows: int, blocks: int) -> None:
    """Threads and warps that are left over, rows that end within a warp; nothing is written past the end."""
    columns = blocks * kind.block_size
    weight = ggml_rows.rows(columns, rows, seed=rows)
    weighing = torch.rand(columns, generator=torch.Generator().manual_seed(blocks)) if weighed else None
    assert_same(kind, weight, weighing, exact=True)
    if rows * columns <= 2048:
        assert_same(kind, weight, weighing, exact=False)


@each_type
@exact_or_better
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, float("inf")])
def test_importance_that_says_nothing(kind: BlockType, exact: bool, value: float) -> None:
    assert_same(kind, ggml_rows.rows(256, 2), torch.full((256,), value), exact=exact)


@each_type
@with_and_without
def test_golden_blocks(kind: BlockType, weighed: bool, shared: Path) -> None:
    golden = np.load(shared / "golden/ggml-blocks.npz")
    weighing = torch.from_numpy(golden["importance"]) if weighed else None
    expected = torch.from_numpy(golden[kind.name + ".imatrix" * weighed])
    assert torch.equal(encode(kind, torch.from_numpy(golden["x"]), weighing, exact=True), expected)


@each_type
def test_the_order_of_threads_changes_nothing(kind: BlockType, compiled: Emulated) -> None:
    weight, weighing = ggml_rows.rows(768, 3), ggml_rows.importance(768)
    compiled.seed(1)
    first = encode(kind, weight, weighing, exact=False)
    compiled.seed(2)
    assert torch.equal(encode(kind, weight, weighing, exact=False), first)


@each_type
def test_numbers_without_a_kernel(kind: BlockType) -> None:
    with pytest.raises(RuntimeError, match="no kernel is compiled for these numbers"):
        encode(kind, torch.zeros(1, 48), None, exact=True)
