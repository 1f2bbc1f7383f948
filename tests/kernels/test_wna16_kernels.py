"""The kernels of csrc/cuda/wna16*.cu, launched in the emulator, against the formula in float64.

Tiles are packed here from the picture of tiles.cuh, one code after the other, and by nothing of the package.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from emulated import Emulated

from quantool.kernels import cuda, ops

DTYPES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
COLUMNS = 768  # which groups of 32, 64, 96, 128, 256 and 768 divide


@dataclass(frozen=True)
class Case:
    """The tensors of one linear as launchers take them, and W and y in float64."""

    x: torch.Tensor
    tiles: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    group: int
    codes: torch.Tensor
    weight: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        y: np.ndarray = self.x.double().numpy() @ self.weight.T
        return y if self.bias is None else y + self.bias.double().numpy()

    @property
    def parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.tiles, self.scales, self.zeros

    @property
    def numbers(self) -> tuple[int, int, int]:
        rows, columns = self.weight.shape
        return rows, columns, self.group

    @property
    def kinds(self) -> tuple[int, int, int]:
        return self.bits, DTYPES.index(self.x.dtype), DTYPES.index(self.scales.dtype)

    def run(self, kernel: str, splits: int = 1, tokens: int | None = None) -> torch.Tensor:
        return self.run_with_partials(kernel, splits, tokens)[0]

    def run_with_partials(
        self, kernel: str, splits: int = 1, tokens: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.x[:tokens].clone()
        y = torch.empty(len(x), len(self.weight), dtype=x.dtype)
        partials = torch.empty(splits, *y.shape) if splits > 1 else None
        workspace = () if kernel == "simt" else (partials,)
        numbers = (len(x), *self.numbers) if kernel == "simt" else (len(x), *self.numbers, splits)
        cuda.call(f"quantool_wna16_{kernel}", x, *self.parameters, self.bias, y, *workspace, *numbers, *self.kinds)
        return y, partials


def make(
    tokens: int = 3,
    rows: int = 48,
    columns: int = COLUMNS,
    group: int = 128,
    *,
    bits: int = 4,
    sym: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.bfloat16,
    biased: bool = True,
) -> Case:
    random = np.random.default_rng([tokens, rows, columns, group, bits, sym])
    codes = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = torch.from_numpy(random.uniform(0.01, 0.06, (rows, columns // group))).to(scale_dtype)
    zeros = random.integers(0, min(1 << bits, 255) + 1, scales.shape, dtype=np.uint8)  # 16 is a zero of GPTQ
    zero = np.full_like(zeros, 1 << (bits - 1)) if sym else zeros
    weight = (codes - np.repeat(zero, group, 1).astype(np.float64)) * np.repeat(scales.double().numpy(), group, 1)
    return Case(
        torch.from_numpy(random.standard_normal((tokens, columns))).to(dtype),
        torch.from_numpy(tiles_of(codes, bits).view(np.int32)),
        rows_of_tiles(scales),
        None if sym else rows_of_tiles(torch.from_numpy(zeros)),
        torch.from_numpy(random.standard_normal(rows)).to(dtype) if biased else None,
        bits,
        group,
        torch.from_numpy(codes),
        weight,
    )


def tiles_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [N / 16, K / 64, 32 * bits]."""
    rows, columns = codes.shape
    tiles = np.zeros((rows // 16, columns // 64, 32 * bits), np.uint32)
    blocks = codes.reshape(rows // 16, 16, columns // 64, 64).astype(np.uint32)
    for lane, half, e, j, i in itertools.product(range(32), range(2), range(2), range(4), range(2)):
        g, t, upper, pair = lane // 4, lane % 4, j % 2, j // 2
        code = blocks[:, g + 8 * upper, :, 32 * half + 8 * t + 4 * e + 2 * pair + i]
        if bits == 4:
            tiles[:, :, 4 * lane + 2 * half + e] |= code << (4 * j + 16 * i)
        else:
            tiles[:, :, 128 * half + 4 * lane + 2 * e + pair] |= code << (8 * (2 * upper + i))
    return tiles


def rows_of_tiles(parameters: torch.Tensor) -> torch.Tensor:
    """[N, G] -> [N / 16, G, 8, 2]: rows g and g + 8 side by side."""
    return parameters.view(len(parameters) // 16, 2, 8, -1).permute(0, 3, 2, 1).contiguous()


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, COLUMNS])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_format(
    emulated: Emulated, bits: int, dtype: torch.dtype, scale_dtype: torch.dtype, group: int, sym: bool
) -> None:
    draw = np.random.default_rng([bits, DTYPES.index(dtype), DTYPES.index(scale_dtype), group, sym])
    tokens = int(draw.choice([33, 63, 64] if group in {64, 96} else [65, 100, 128]))
    case = make(tokens, 48, group=group, bits=bits, sym=sym, dtype=dtype, scale_dtype=scale_dtype)
    few = [("gemv", draw.integers(1, 9)), ("simt", draw.integers(1, 5)), ("gemm", draw.integers(1, 17))]
    for kernel, count in [*few, ("gemm", draw.integers(17, 33)), ("gemm", tokens)]:
        y = case.run(kernel, tokens=int(count))
        assert error(y, case.expected[:count]) < TOLERANCE[dtype], (kernel, count)


@pytest.mark.parametrize("splits", [1, 2, 3, 40])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (16, 192), (48, 320), (144, 1024)])
def test_every_shape(emulated: Emulated, rows: int, columns: int, splits: int) -> None:
    group = 32 if columns == 192 else 64
    for bits, sym, biased in [(4, True, True), (8, False, False)]:
        case = make(17, rows, columns, group, bits=bits, sym=sym, biased=biased)
        for kernel, count in [("gemv", 1), ("gemv", 5), ("gemv", 8), ("gemm", 9), ("gemm", 16), ("gemm", 17)]:
            y = case.run(kernel, splits, count)
            assert error(y, case.expected[:count]) < TOLERANCE[torch.bfloat16], (bits, kernel, count)


@pytest.mark.parametrize("tokens", [*range(1, 10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128])
def test_every_number_of_tokens(emulated: Emulated, tokens: int) -> None:
    case = make(tokens, 144, 192, 96, dtype=torch.float16, sym=False)
    kernels = ["gemm", "simt", *(["gemv"] if tokens <= 8 else [])]
    for kernel in kernels:
        assert error(case.run(kernel), case.expected) < TOLERANCE[torch.float16], kernel


@pytest.mark.parametrize("bits", [4, 8])
def test_gemv_refills_its_ring(emulated: Emulated, bits: int) -> None:
    case = make(2, 16, 64 * 205, 64 * 41, bits=bits)
    assert error(case.run("gemv"), case.expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("tokens", "rows"), [(2, 16384), (8, 4096)])
def test_gemv_of_two_row_tiles(emulated: Emulated, tokens: int, rows: int) -> None:
    """What many rows take: 32 of them to a block, and every warp fills its ring again."""
    case = make(tokens, rows, 64 * 35, 64 * 35, sym=False)
    assert error(case.run("gemv"), case.expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [64, 80])
def test_gemv_of_many_splits(emulated: Emulated, rows: int) -> None:
    case = make(3, rows, 1024)
    assert error(case.run("gemv", 256), case.expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_are_float32(emulated: Emulated, bits: int, dtype: torch.dtype, kernel: str) -> None:
    case = make(8, 48, 1024, 32, bits=bits, sym=False, dtype=dtype, biased=False)
    _, partials = case.run_with_partials(kernel, 3)
    assert partials is not None
    assert error(partials.double().sum(0), case.expected) < 1e-6


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("kernel", "tokens"), [("gemv", 3), ("gemm", 16), ("gemm", 100)])
def test_order_of_threads_changes_no_bit(emulated: Emulated, kernel: str, tokens: int, splits: int) -> None:
    case = make(tokens, 144, 1024, dtype=torch.float16, sym=False)
    found = []
    for seed in (1, 2):
        emulated.seed(seed)
        found.append(case.run(kernel, splits))
    assert torch.equal(found[0], found[1])
    assert error(found[0], case.expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("kernel", ["gemv", "gemm", "simt"])
def test_what_is_not_finite_stays_in_its_token_and_its_row(emulated: Emulated, kernel: str) -> None:
    case = make(3, 48, 320, 64)
    x, scales = case.x.clone(), case.scales.clone()
    x[1, 7] = torch.inf
    scales[0, 0, 2, 1] = torch.nan  # row 2 + 8
    y = replace(case, x=x, scales=scales).run(kernel)
    assert y[:, 10].isnan().all()
    assert not y[1].isfinite().any()
    y[:, 10], expected = 0, case.expected
    expected[:, 10] = 0
    assert error(y[::2], expected[::2]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("group", [32, 64, 96, COLUMNS])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_is_the_reference_rounded_once(
    emulated: Emulated, bits: int, dtype: torch.dtype, scale_dtype: torch.dtype, sym: bool, group: int
) -> None:
    case = make(1, 48, COLUMNS, group, bits=bits, sym=sym, dtype=dtype, scale_dtype=scale_dtype)
    w = torch.empty(48, COLUMNS, dtype=dtype)
    cuda.call("quantool_wna16_dequantize", *case.parameters, w, *case.numbers, *case.kinds)
    scales, zeros = (None if p is None else p.permute(0, 3, 2, 1).reshape(48, -1) for p in case.parameters[1:])
    assert scales is not None
    assert torch.equal(w, ops.dequantize(case.codes, scales, zeros, bits).to(dtype))


@pytest.mark.parametrize(
    "wrong", [{"tokens": 9}, {"tokens": 0}, {"rows": 40}, {"columns": 96}, {"group": 48}, {"group": 40}, {"bits": 5}]
)
def test_refuses_what_no_kernel_is_compiled_for(emulated: Emulated, wrong: dict[str, int]) -> None:
    numbers = {"tokens": 3, "rows": 48, "columns": 192, "group": 64, "splits": 1, "bits": 4} | wrong
    case = make(3, 48, 192, 64)
    y = torch.empty(3, 48, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="quantool_wna16_gemv"):
        cuda.call("quantool_wna16_gemv", case.x, *case.parameters, case.bias, y, None, *numbers.values(), 0, 0)
