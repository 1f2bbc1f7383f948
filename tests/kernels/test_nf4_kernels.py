"""The kernels of 4-bit levels in the emulator: weights bit for bit those of bitsandbytes, products against float64."""

import bitsandbytes
import pytest
import torch
from emulated import Emulated

from quantool.kernels import cuda, nf4, ops, wna16

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def card(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(4, (9, 0)))


def case(
    tokens: int,
    rows: int,
    columns: int,
    block_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    levels: str = "nf4",
    biased: bool = True,
) -> tuple[torch.Tensor | int | None, ...]:
    """The arguments of linear_nf4."""
    random = torch.Generator().manual_seed(rows * columns + tokens)
    count = rows * columns
    x = torch.randn(tokens, columns, generator=random).to(dtype)
    codes = torch.randint(0, 16, (count,), generator=random, dtype=torch.uint8)
    absmax = torch.rand(-(-count // block_size), generator=random) * 0.1 + 0.01
    bias = torch.randn(rows, generator=random).to(dtype) if biased else None
    return x, ops.pack_nibbles(codes), absmax, ops.levels(levels), bias, rows, block_size


def expected(*arguments: torch.Tensor | int | None) -> torch.Tensor:
    """In float64, from the numbers as they are stored."""
    x, qweight, absmax, table, bias, rows, block_size = arguments
    count = rows * x.shape[-1]
    scales = absmax.double().repeat_interleave(block_size)[:count]
    weight = (table.double()[ops.unpack_nibbles(qweight, count).long()] * scales).view(rows, -1)
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()


def assert_close(y: torch.Tensor, exact: torch.Tensor) -> None:
    assert float((y.double() - exact).norm() / exact.norm()) < TOLERANCE[y.dtype]


@pytest.mark.parametrize("levels", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (33, 95), (1, 7), (64, 520)])
def test_weights_are_those_of_bitsandbytes(levels: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    _, qweight, absmax, table, *_ = case(1, rows, columns, 64, levels=levels)
    weight = torch.empty(rows, columns, dtype=dtype)
    cuda.call("quantool_nf4_dequantize", qweight, absmax, table, weight, rows * columns, 64, nf4.FLOATS.index(dtype))
    theirs = bitsandbytes.functional.dequantize_4bit(
        qweight.view(-1, 1),
        bitsandbytes.functional.QuantState(
            absmax, shape=torch.Size((rows, columns)), code=table, blocksize=64, quant_type=levels, dtype=torch.float32
        ),
    )
    assert torch.equal(weight, theirs.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gemv_looks_up_all_sixteen_levels_exactly(dtype: torch.dtype) -> None:
    """Row n has the code n at column n alone, beside zeros (code 7), and token m the value 1 at columns 8 + m and m."""
    codes = torch.full((16, 64), 7, dtype=torch.uint8)
    codes.fill_diagonal_(0).view(-1)[:: 64 + 1] = torch.arange(16, dtype=torch.uint8)
    x = torch.zeros(8, 64, dtype=dtype)
    for m in range(8):
        x[m, m] = x[m, 8 + m] = 1
    y = nf4.linear_nf4_cuda(x, ops.pack_nibbles(codes), torch.ones(16), ops.levels("nf4"), None, 16, 64)
    wanted = torch.zeros(8, 16)
    for m in range(8):
        wanted[m, m], wanted[m, 8 + m] = ops.levels("nf4")[m], ops.levels("nf4")[8 + m]
    assert torch.equal(y, wanted.to(dtype))


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(16, 64, 64), (42, 2304, 128), (48, 4096, 64), (2, 512, 512)]
)
def test_linear_nf4_is_the_formula(tokens: int, dtype: torch.dtype, rows: int, columns: int, block_size: int) -> None:
    arguments = case(tokens, rows, columns, block_size, dtype=dtype, biased=tokens % 2 == 0)
    y = nf4.linear_nf4_cuda(*arguments)
    assert y.shape == (tokens, rows)
    assert y.dtype == dtype
    assert_close(y, expected(*arguments))


@pytest.mark.parametrize("tokens", [1, 8])
def test_up_to_eight_tokens_no_weight_is_written(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called, call = [], cuda.call
    monkeypatch.setattr(cuda, "call", lambda name, *arguments: called.append(name) or call(name, *arguments))
    nf4.linear_nf4_cuda(*case(tokens, 16, 128, 64))
    assert called == ["quantool_nf4_gemv"]


@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(7, 64, 64), (16, 96, 64), (16, 64, 32), (16, 192, 192), (5, 33, 64)]
)
def test_blocks_that_rows_cut_are_dequantized(rows: int, columns: int, block_size: int) -> None:
    arguments = case(3, rows, columns, block_size)
    y = nf4.linear_nf4_cuda(*arguments)
    assert torch.equal(y, ops.linear_nf4(*arguments))
    assert_close(y, expected(*arguments))


def test_results_do_not_depend_on_the_order_of_threads(emulated: Emulated) -> None:
    arguments, results = case(5, 48, 2304, 64), []
    for seed in (1, 2):
        emulated.seed(seed)
        results.append(nf4.linear_nf4_cuda(*arguments))
    assert torch.equal(*results)


def test_torch_computes_what_fits_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    in_float32, odd_blocks, usual = case(2, 4, 64, 64, dtype=torch.float32), case(2, 4, 60, 12), case(2, 4, 64, 64)
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    for arguments in (in_float32, odd_blocks):
        assert torch.equal(nf4.linear_nf4_cuda(*arguments), ops.linear_nf4(*arguments))
    monkeypatch.setattr(cuda, "library", lambda: None)
    assert torch.equal(nf4.linear_nf4_cuda(*usual), ops.linear_nf4(*usual))


def test_any_memory_layout_of_x_computes_the_same() -> None:
    x, *rest = case(6, 16, 128, 64)
    shifted = torch.cat([torch.zeros(3, dtype=x.dtype), x.flatten()])[3:].view(6, 128)
    for other in (shifted, x.t().contiguous().t(), x.view(2, 3, 128)):
        assert torch.equal(nf4.linear_nf4_cuda(other, *rest).view(6, 16), nf4.linear_nf4_cuda(x, *rest))
    assert nf4.linear_nf4_cuda(x[:0], *rest).shape == (0, 16)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.zeros(511, dtype=torch.uint8), r"qweight is uint8 \[511\], expected uint8 \[512\] for 16 rows of 64"),
        (2, torch.zeros(15), r"absmax is float32 \[15\], expected float32 \[16\]"),
        (3, torch.zeros(8), r"table is float32 \[8\], expected float32 \[16\]"),
        (4, torch.zeros(8), r"bias is float32 \[8\], expected \[16\]"),
        (6, 0, "16 rows and blocks of 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_a_launch(
    position: int, value: torch.Tensor | int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    arguments = list(case(2, 16, 64, 64))
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        nf4.linear_nf4_cuda(*arguments)


def test_torch_accepts_the_cuda_function_as_operator() -> None:
    """Here it gets CPU tensors, so it is registered under another name, with the shape function of the real one."""
    op = torch.library.custom_op("quantool_test::linear_nf4", nf4.linear_nf4_cuda, mutates_args=())
    op.register_fake(ops.linear_nf4)
    torch.library.opcheck(op, case(5, 16, 128, 64))
    torch.library.opcheck(op, case(9, 7, 96, 64, biased=False))
    assert torch._C._dispatch_has_kernel_for_dispatch_key("quantool::linear_nf4", "CUDA")
