"""nf4 and fp4 bit for bit against bitsandbytes on this machine, and against the nearest of 16 levels in float64."""

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, quantize_4bit, quantize_blockwise
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError
from quantool.kernels.ops import levels, pack_nibbles
from quantool.methods import nf4
from quantool.quant import QuantizedTensor
from quantool.scheme import MethodOptions, QuantScheme

LIMIT = settings(deadline=None, max_examples=150)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
NF4 = QuantScheme(4, 64, dtype="nf4")


def quantize(weight: torch.Tensor, scheme: QuantScheme) -> QuantizedTensor:
    return nf4.quantize_weight(weight, scheme, lambda scales: scales, options=MethodOptions())


def assert_bitsandbytes(weight: torch.Tensor, scheme: QuantScheme) -> None:
    packed, state = quantize_4bit(
        weight, blocksize=scheme.group_size, compress_statistics=scheme.double_quant, quant_type=scheme.dtype
    )
    q = quantize(weight, scheme)
    assert q.codes.shape == weight.shape
    assert q.scheme == scheme
    assert q.zeros is None
    assert q.weight_dtype == weight.dtype
    zero = levels(scheme.dtype).tolist().index(0)
    assert torch.equal(pack_nibbles(q.codes, fill=zero), packed.view(-1))
    assert q.scales.dtype == torch.float32
    if not scheme.double_quant:
        assert q.double is None
        assert torch.equal(q.scales, state.absmax)
        return
    assert q.double is not None
    assert torch.equal(q.double.codes, state.absmax)
    assert torch.equal(q.double.absmax, state.state2.absmax)
    assert torch.equal(q.double.quant_map, state.state2.code)
    assert torch.equal(q.double.offset, state.offset)
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(q.scales, scales)


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal, with some values of one of few magnitudes, so that exact midpoints and equal blocks occur."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 10 ** (torch.rand((), generator=random) * 6 - 4)
    grid = torch.randint(-8, 9, (rows, columns), generator=random) * float(weight.abs().max()) / 8
    return torch.where(torch.rand(rows, columns, generator=random) < 0.2, grid, weight).to(dtype)


@LIMIT
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from(DTYPES),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(BLOCK_SIZES),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_codes_and_scales_are_those_of_bitsandbytes(
    rows: int, columns: int, dtype: torch.dtype, kind: str, size: int, double: bool, seed: int
) -> None:
    """Rows that blocks do not divide, last blocks that are short, weights smaller than a block, odd numbers."""
    weight = random_weight(rows, columns, dtype, seed)
    assert_bitsandbytes(weight, QuantScheme(4, size, dtype=kind, double_quant=double))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_a_piece_and_more_than_a_block_of_scales(dtype: torch.dtype, kind: str, double: bool) -> None:
    weight = random_weight(515, 333, dtype, 3)  # 2680 scales, the last of 15 weights; 6 pieces
    weight[7] = 0
    assert_bitsandbytes(weight, QuantScheme(4, 64, dtype=kind, double_quant=double))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 64),
        torch.zeros(5, 13),  # the short last block has an absmax of 1e-38
        torch.cat([torch.zeros(3, 64), torch.ones(2, 64), torch.full((2, 64), -0.0)]),
        torch.full((4, 100), 0.03),
        torch.full((256, 64), -2.0),  # equal scales: nothing is left of them when the mean is taken away
        torch.full((3, 70), 1e-40),
        torch.full((2, 64), 1e38),
        torch.linspace(-1, 1, 6400).view(64, 100),
    ],
    ids=["zeros", "short-zeros", "blocks-of-zeros", "constant", "equal", "subnormal", "huge", "line"],
)
def test_weights_that_are_hardly_any(weight: torch.Tensor, kind: str, double: bool) -> None:
    assert_bitsandbytes(weight, QuantScheme(4, 64, dtype=kind, double_quant=double))


def test_scales_without_a_mean_are_an_error() -> None:
    """bitsandbytes would store an offset of infinity."""
    weight = torch.full((2, 64), 3e38)
    assert_bitsandbytes(weight, NF4)
    with pytest.raises(QuantoolError, match="2 blocks have no mean in float32, up to 3e") as caught:
        quantize(weight, QuantScheme(4, 64, dtype="nf4", double_quant=True))
    assert "--ignore" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_an_exact_midpoint_is_the_lower_level(kind: str) -> None:
    table = levels(kind).sort().values
    middles = (table[:-1] + table[1:]) / 2
    weight = torch.cat([torch.ones(1), middles, torch.nextafter(middles, torch.tensor(9.0))]).view(1, -1)
    q = quantize(weight, QuantScheme(4, 32, dtype=kind))
    found = levels(kind)[q.codes.long()].flatten()
    assert torch.equal(found[1:16], table[:-1])
    assert torch.equal(found[16:], table[1:])
    assert_bitsandbytes(weight, q.scheme)


def test_the_worked_example() -> None:
    q = quantize(torch.tensor([[0.5, -0.25, 0, 1, -1, 0.1]]), NF4)
    assert q.codes.tolist() == [[12, 4, 7, 15, 0, 8]]
    assert q.scales.tolist() == [1.0]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_code_is_the_nearest_level(kind: str) -> None:
    """In float64 and by distance, so that a table or a boundary that is wrong in both libraries would show."""
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(0))
    q = quantize(weight, QuantScheme(4, 64, dtype=kind))
    blocks, table = weight.double().numpy().reshape(-1, 64), levels(kind).double().numpy()
    assert np.array_equal(q.scales.numpy(), np.abs(blocks).max(axis=1).astype(np.float32))
    relative = blocks / q.scales.double().numpy()[:, None]
    distance = np.abs(relative[:, :, None] - table)
    chosen = np.take_along_axis(distance, q.codes.numpy().reshape(-1, 64, 1).astype(int), axis=2)[:, :, 0]
    assert (chosen <= distance.min(axis=2) + 1e-7).all()


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    assert torch.equal(nf4.dynamic_map(), create_dynamic_map())


def near(edges: torch.Tensor, factor: float) -> torch.Tensor:
    """Numbers at `edges` times `factor`, where the last bit of a division decides, and their neighbours."""
    middle = edges * factor
    return torch.cat([middle, torch.nextafter(middle, torch.tensor(9e9)), torch.nextafter(middle, torch.tensor(-9e9))])


@pytest.mark.parametrize("rows", [64, 1, 0.5], ids=["blocks", "one-block", "short-block"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_last_bit_of_a_division(kind: str, rows: float) -> None:
    """Whole blocks are multiplied by a reciprocal, a short one is divided."""
    table = levels(kind).sort().values
    for seed in range(40):
        top = 1 + float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        block = torch.cat([torch.tensor([top]), near((table[:-1] + table[1:]) / 2, top)])
        weight = torch.nn.functional.pad(block, (0, 64 - len(block))).repeat(max(1, int(rows)))
        if rows < 1:
            weight = block
        assert_bitsandbytes(weight.view(1, -1), QuantScheme(4, 64, dtype=kind))


def assert_dynamic(values: torch.Tensor) -> None:
    codes, top = nf4.quantize_dynamic(values, nf4.dynamic_map())
    expected, state = quantize_blockwise(values, blocksize=256)
    assert torch.equal(codes, expected)
    assert torch.equal(top, state.absmax)


@LIMIT
@given(st.integers(1, 2000), st.floats(-30, 30), st.integers(0, 2**32))
def test_scales_are_quantized_as_in_bitsandbytes(count: int, exponent: float, seed: int) -> None:
    """Over many orders of magnitude: its search looks a value up at one of 65536 positions."""
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    assert_dynamic(absmax - absmax.mean())


def test_scales_between_two_positions() -> None:
    """At every edge between two codes, where a division and a product with the reciprocal differ."""
    codes = torch.bucketize(torch.arange(65536) / 32767.5 - 1, (nf4.dynamic_map()[:-1] + nf4.dynamic_map()[1:]) / 2)
    edges = ((codes[1:] != codes[:-1]).nonzero().view(-1) + 0.5) / 32767.5 - 1
    for seed in range(40):
        top = 1 + float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        for part in near(edges, top).split(255):
            assert_dynamic(torch.cat([torch.tensor([top]), part]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_stays_as_it_was_however_it_lies_in_memory(dtype: torch.dtype) -> None:
    weight = random_weight(64, 96, dtype, 0)
    before, expected = weight.clone(), quantize(weight, NF4)
    turned = quantize(weight.t().contiguous().t(), NF4)
    assert torch.equal(turned.codes, expected.codes)
    assert torch.equal(turned.scales, expected.scales)
    assert torch.equal(weight, before)
