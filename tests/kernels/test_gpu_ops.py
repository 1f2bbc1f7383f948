"""The other operators on a GPU: packing and rounding are the CPU's to the bit, int8 linears within float32's rounding.

Needs neither gguf nor datasets, nor a network: `make test-gpu`.
"""

from typing import Any

import pytest
import torch

from quantool.kernels import cuda, int8, nf4, rtn
from quantool.kernels.ops import levels
from quantool.kernels.tiles import FORMS, pack_tiles, unpack_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a machine of its own, with other versions


@pytest.fixture(autouse=True)
def kernels() -> None:
    assert cuda.is_available(), cuda.why_not()


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (48, 192), (272, 1088), (4096, 4096)])
@pytest.mark.parametrize(
    ("form", "bits"), [(form, bits) for form in FORMS for bits in (4, 8) if (form, bits) != ("awq", 8)]
)
def test_packing_is_that_of_the_cpu(form: str, bits: int, rows: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=random(), dtype=torch.uint8)
    tiles = pack_tiles(codes, "codes", bits, rows, columns)
    packed, perm = unpack_tiles(tiles, form, bits), torch.randperm(columns, generator=random()).int()
    assert torch.equal(pack_tiles(packed.cuda(), form, bits, rows, columns).cpu(), tiles)
    assert torch.equal(unpack_tiles(tiles.cuda(), form, bits).cpu(), packed)
    ordered = pack_tiles(packed.cuda(), form, bits, rows, columns, perm.cuda())
    assert torch.equal(unpack_tiles(ordered, "codes", bits).cpu(), codes[:, perm.long()])
    if rows < 100:
        torch.library.opcheck(pack_tiles, (packed.cuda(), form, bits, rows, columns, perm.cuda()))
        torch.library.opcheck(unpack_tiles, (tiles.cuda(), form, bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [8, 32, 128, 1056, 12])
@pytest.mark.parametrize("sym", [True, False])
def test_rounding_is_that_of_the_cpu(sym: bool, group: int, dtype: torch.dtype) -> None:
    columns = 1056 if group != 128 else 1024
    weight = torch.randn(72, columns, generator=random()).to(dtype)
    weight[3], weight[5, :7], weight[9, 40] = 0, torch.inf, torch.nan
    weight[11] *= torch.finfo(dtype).tiny / 4  # subnormal
    low, high = rtn.group_range_op(weight, columns // group)
    on_gpu = rtn.group_range_op(weight.cuda(), columns // group)
    for found, wanted in zip(on_gpu, (low, high), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    scales = (torch.maximum(high, -low) / 7.5).to(torch.bfloat16)
    zeros = None if sym else torch.randint(0, 16, scales.shape, generator=random(1), dtype=torch.uint8)
    codes = rtn.quantize_affine_op(weight, scales, zeros, 4)
    found = rtn.quantize_affine_op(weight.cuda(), scales.cuda(), None if zeros is None else zeros.cuda(), 4)
    assert torch.equal(found.cpu(), codes)


def linear_arguments(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    weight = torch.randint(-128, 128, (rows, columns), generator=random(), dtype=torch.int8)
    scales = (torch.rand(rows, 1, generator=random()) * 0.01 + 0.001).to(dtype)
    x = torch.randn(tokens, columns, generator=random(1)).to(dtype)
    x[..., 17] *= 20  # a channel of outliers
    return x, weight, scales, torch.randn(rows, generator=random(2)).to(dtype)


def on_gpu(*arguments: Any) -> list[Any]:
    return [argument.cuda() if isinstance(argument, torch.Tensor) else argument for argument in arguments]


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.dtype == wanted.dtype
    error = (found.cpu().double() - wanted.double()).norm() / wanted.double().norm()
    assert float(error) < tolerance


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 129, 600])
@pytest.mark.parametrize(("rows", "columns"), [(48, 192), (264, 1040), (1024, 4096), (50, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_linears_are_those_of_the_cpu(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, scales, bias = linear_arguments(tokens, rows, columns, dtype)
    scale, zero = torch.tensor([0.05]), torch.tensor([9], dtype=torch.int8)
    for input_scale, input_zero, sym in (
        (None, None, True),
        (None, None, False),
        (scale, None, True),
        (scale, zero, False),
    ):
        arguments = (x, weight, scales, input_scale, input_zero, bias, sym)
        y = int8.linear_w8a8(*on_gpu(*arguments))
        assert_near(y, int8.linear_w8a8(*arguments), 1e-2)
        assert torch.equal(int8.linear_w8a8(*on_gpu(*arguments)), y)
    for threshold in (0.0, 6.0):
        y = int8.linear_llm_int8(*on_gpu(x, weight, scales, bias, threshold))
        assert_near(y, int8.linear_llm_int8(x, weight, scales, bias, threshold), 1e-2)
        assert torch.equal(int8.linear_llm_int8(*on_gpu(x, weight, scales, bias, threshold)), y)


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 200])
@pytest.mark.parametrize(("rows", "columns"), [(48, 192), (1024, 4096), (50, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linears_of_levels_are_those_of_the_cpu(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    qweight = torch.randint(0, 256, (-(-rows * columns // 2),), generator=random(), dtype=torch.uint8)
    x, bias = (torch.randn(*shape, generator=random(1)).to(dtype) for shape in ((tokens, columns), (rows,)))
    for block_size in (64, 128, 4096):
        absmax = torch.rand(-(-rows * columns // block_size), generator=random(2)) + 0.1
        arguments = (x, qweight, absmax, levels("nf4"), bias, rows, block_size)
        y = nf4.linear_nf4(*on_gpu(*arguments))
        assert_near(y, nf4.linear_nf4(*arguments), 1e-2)
        assert torch.equal(nf4.linear_nf4(*on_gpu(*arguments)), y)
    if rows == 48:
        torch.library.opcheck(nf4.linear_nf4, tuple(on_gpu(*arguments)))


def test_torch_finds_them_sound() -> None:
    x, weight, scales, bias = on_gpu(*linear_arguments(5, 48, 192, torch.bfloat16))
    torch.library.opcheck(int8.linear_w8a8, (x, weight, scales, None, None, bias, True))
    torch.library.opcheck(int8.linear_llm_int8, (x, weight, scales, bias, 6.0))
    torch.library.opcheck(rtn.group_range_op, (x, 6))
