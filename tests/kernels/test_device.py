"""What csrc/cuda/device.cuh means, by one set of tests: in the emulator, and on a GPU where there is one."""

import ctypes
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import emulated as emulation
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from quantool.kernels import build, cuda

FORMATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
SOURCES = [emulation.CUDA / "runtime.cu", emulation.EMULATOR / "probes.cu"]


def nvcc_library(directory: Path) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    home, _ = build._toolkit()
    made = directory / "probes.so"
    options = [*build.NVCC_FLAGS, "-arch=native", "-shared", "-Xcompiler", "-fPIC", f"-I{emulation.CUDA}"]
    subprocess.run([home / "bin/nvcc", *options, *SOURCES, "-o", made], check=True)
    return made


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ctypes.CDLL]:
    if request.param == "cpu" and (reason := emulation.why_not()):
        pytest.skip(reason)
    on_gpu = request.param == "cuda"
    made = nvcc_library(tmp_path_factory.mktemp("probes")) if on_gpu else emulation.build(SOURCES)
    return request.param, ctypes.CDLL(str(made))


Probe = Callable[..., None]


@pytest.fixture
def probe(library: tuple[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> Probe:
    """probe(name, *arguments): tensors of the CPU go to the device and come back."""
    device, loaded = library
    monkeypatch.setattr(cuda, "library", lambda: loaded)

    def call(name: str, *arguments: torch.Tensor | int) -> None:
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        cuda.call(name, *there)
        for mine, its in zip(arguments, there, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(its)

    return call


def floats_of_every_size(dtype: torch.dtype) -> torch.Tensor:
    """All values of the format, what lies in the middle between neighbours, a bit beside it, and random bits."""
    values = torch.arange(1 << 15, dtype=torch.int16).view(dtype).float()
    finite = values[values.isfinite()]
    middle = (finite[1:].double() + finite[:-1].double()).div(2).float()
    beside = [torch.nextafter(middle, torch.tensor(towards)) for towards in (0.0, float("inf"))]
    overflow = torch.finfo(dtype).max * torch.tensor([1.001, 1.0019, 1.00195, 1.002, 1.0039, 1.00395]).double()
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 32, 30000, dtype=np.uint32).view(np.float32))
    found = torch.cat([values, middle, *beside, overflow.float(), noise.clone()])
    return torch.cat([found, -found])


@FORMATS
def test_pair_rounds_to_nearest_even(probe: Probe, dtype: torch.dtype) -> None:
    x = floats_of_every_size(dtype)
    x = x[: len(x) // 2 * 2].view(-1, 2)
    packed = torch.empty(len(x), dtype=torch.int32)
    probe("probe_pair", x, packed, len(x), int(dtype is torch.float16))
    assert_close(packed.view(dtype).view(-1, 2), x.to(dtype), rtol=0, atol=0, equal_nan=True)


@FORMATS
def test_low_and_high_are_exact(probe: Probe, dtype: torch.dtype) -> None:
    packed = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(-1, 2)
    found = torch.empty(packed.shape)
    probe("probe_floats", packed.view(torch.int32).view(-1), found, len(packed), int(dtype is torch.float16))
    assert_close(found, packed.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@FORMATS
def test_fma_rounds_once(probe: Probe, dtype: torch.dtype) -> None:
    """Against fractions."""
    rng = np.random.default_rng(1)
    bits, smallest = (7, -126) if dtype is torch.bfloat16 else (10, -14)
    mantissas = 1 + rng.integers(0, 1 << bits, (4000, 3)) / 2.0**bits
    x = torch.from_numpy(mantissas * 2.0 ** rng.integers(-5, 6, (4000, 3)) * rng.choice([-1, 1], (4000, 3))).to(dtype)
    x[:1000, 2] = x[:1000, 0] * x[:1000, 1] * -1  # cancels
    if dtype is torch.bfloat16:  # 7/4 * 37/32 lies in the middle of two values, and c is lost in a sum in double
        x[1000:1002] = torch.tensor([[1.75, 1.15625, 2.0**-60], [1.75, 1.15625, -(2.0**-60)]], dtype=dtype)
    packed = x.view(-1, 2, 3).transpose(1, 2).contiguous().view(torch.int32)  # a, b, c: each a pair
    found = torch.empty(len(packed), dtype=torch.int32)
    probe("probe_fma", packed, found, len(packed), int(dtype is torch.float16))
    expected = [nearest(Fraction(a) * Fraction(b) + Fraction(c), bits, smallest) for a, b, c in x.double().tolist()]
    assert found.view(dtype).double().tolist() == expected


def nearest(x: Fraction, bits: int, smallest: int) -> float:
    """The nearest to x of the values with `bits` bits after the first and exponents from `smallest` on; even of two."""
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - bits)
    return float(round(x / unit) * unit)  # Python rounds fractions half to even


def a_fragment(a: torch.Tensor, per_register: int) -> torch.Tensor:
    """[32, 4 registers, values] of A [16, K], as PTX numbers the values i of a thread's fragment."""
    lanes = []
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        values = []
        for i in range(4 * per_register):
            row = group if (i // per_register) % 2 == 0 else group + 8
            column = thread * per_register + i % per_register + (4 * per_register if i >= 2 * per_register else 0)
            values.append(a[row, column])
        lanes.append(torch.stack(values))
    return torch.stack(lanes)


def b_fragment(b: torch.Tensor, per_register: int) -> torch.Tensor:
    lanes = []
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        rows = [
            thread * per_register + i % per_register + (4 * per_register) * (i // per_register)
            for i in range(2 * per_register)
        ]
        lanes.append(b[rows, group])
    return torch.stack(lanes)


def d_fragment(d: torch.Tensor) -> torch.Tensor:
    """[32, 4] of D [16, 8]: c0, c1 in the row of the group, c2, c3 eight rows below."""
    return torch.stack(
        [torch.stack([d[lane // 4 + 8 * (i >= 2), lane % 4 * 2 + (i & 1)] for i in range(4)]) for lane in range(32)]
    )


@FORMATS
def test_mma(probe: Probe, dtype: torch.dtype) -> None:
    """Small integers, of which every order of adding gives the same."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (16, 8), generator=generator).to(dtype)
    d = torch.randint(-99, 99, (16, 8), generator=generator).float()
    found = d_fragment(d)
    probe(
        "probe_mma",
        a_fragment(a, 2).view(torch.int32),
        b_fragment(b, 2).view(torch.int32),
        found,
        int(dtype is torch.float16),
    )
    assert torch.equal(found, d_fragment(d + a.float() @ b.float()))


@FORMATS
def test_mma_carries_nan_and_infinity_where_they_belong(probe: Probe, dtype: torch.dtype) -> None:
    a, b, d = torch.ones(16, 16, dtype=dtype), torch.ones(16, 8, dtype=dtype), torch.zeros(16, 8)
    a[3, 5], b[7, 2] = float("nan"), float("inf")
    found = d_fragment(d)
    probe(
        "probe_mma",
        a_fragment(a, 2).view(torch.int32),
        b_fragment(b, 2).view(torch.int32),
        found,
        int(dtype is torch.float16),
    )
    assert_close(found, d_fragment(a.float() @ b.float()), rtol=0, atol=0, equal_nan=True)


def test_mma_s8(probe: Probe) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (16, 32), generator=generator).to(torch.int8)
    b = torch.randint(-128, 128, (32, 8), generator=generator).to(torch.int8)
    a[0], b[:, 0] = -128, -128
    d = torch.randint(-(10**9), 10**9, (16, 8), generator=generator).int()
    found = d_fragment(d)
    probe("probe_mma_s8", a_fragment(a, 4).view(torch.int32), b_fragment(b, 4).view(torch.int32), found)
    assert torch.equal(found, d_fragment(d + (a.int() @ b.int())))


def test_words(probe: Probe) -> None:
    rng = np.random.default_rng(2)
    x = rng.integers(0, 1 << 32, (32, 3), dtype=np.uint32)
    found = torch.empty(32, 6, dtype=torch.int32)
    probe("probe_words", torch.from_numpy(x.view(np.int32)), found)
    a, b, c = x.T
    lanes = np.arange(32)
    eight = np.stack([a, b], 1).copy().view(np.uint8)
    permuted = np.zeros((32, 4), np.uint8)
    for i in range(4):
        permuted[:, i] = eight[lanes, c >> (4 * i) & 7]
    expected = [
        a[b % 32],
        a[lanes ^ 5],
        np.where(lanes + 3 < 32, a[np.minimum(lanes + 3, 31)], a),
        np.full(32, sum(int(a[i] & 1) << i for i in range(32)), np.uint32),
        permuted.view(np.uint32)[:, 0],
        (a & b) | c,
    ]
    assert np.array_equal(found.numpy().view(np.uint32), np.stack(expected, 1))


@pytest.mark.parametrize("valid", [0, 20, 32])
def test_copies(probe: Probe, valid: int) -> None:
    x = torch.arange(1, 129, dtype=torch.int32).view(32, 4)
    found = torch.empty(64, 4, dtype=torch.int32)
    probe("probe_copies", x, found, valid)
    copied = torch.where(torch.arange(32)[:, None] < valid, x, 0)
    assert torch.equal(found, torch.cat([copied.flip(0), x]))


def test_load_matrices(probe: Probe) -> None:
    """Lane l gets word l % 4 of row l / 4 of each of the four matrices."""
    x = torch.arange(128, dtype=torch.int32).view(32, 4)
    found = torch.empty(32, 4, dtype=torch.int32)
    probe("probe_matrices", x, found)
    assert torch.equal(found, x.view(4, 8, 4).permute(1, 2, 0).reshape(32, 4))
