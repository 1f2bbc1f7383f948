"""The K-quants on CUDA, in the emulator: the bytes of the kernels for the processor, so ggml's when asked for."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import ggml_rows
import numpy as np
import pytest
import torch
from emulated import Emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantool import kernels
from quantool.errors import QuantoolError
from quantool.formats.ggml.kquants import KQUANTS, KQuant
from quantool.kernels import build
from quantool.kernels import ggml as compiled

Encoder = Callable[..., torch.Tensor]
kinds = pytest.mark.parametrize("kind", KQUANTS, ids=lambda kind: kind.name)
exactness = pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])


def on_cuda(kind: KQuant, weight: torch.Tensor, importance: torch.Tensor | None, *, exact: bool) -> torch.Tensor:
    row_bytes = weight.shape[1] // kind.block_size * kind.block_bytes
    return compiled.ggml_blocks_cuda(weight, importance, kind.name, row_bytes, exact)


@pytest.fixture(scope="module")
def on_processor() -> Encoder:
    if not kernels.is_available():
        pytest.skip(f"no compiled kernels: {kernels.why_not()}")
    return lambda kind, weight, importance, *, exact: kind.quantize(weight, importance, exact=exact)


def some_rows() -> torch.Tensor:
    """Of one super-block each: as networks have them, and at the edges of what floats and float16 hold."""
    plain, edges = ggml_rows.rows(256, 21), ggml_rows.edges(256)
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(4, 70, 256, generator=generator)
    tails = 0.02 * normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t with three degrees of freedom
    spread = torch.randn(5, 256, generator=generator) * torch.logspace(-20, 5, 256)
    half_empty = torch.randn(4, 256, generator=generator) * (torch.arange(256) < 136)
    epsilon = plain[:3] / plain[:3].abs().amax(1, keepdim=True) * 1.5e-15  # above ggml's epsilon, its scales below
    mantissas = torch.randn(31, 256, generator=generator).clamp(-1.99, 1.99)
    magnitudes = torch.ldexp(mantissas, torch.arange(-149, 128, 9).view(-1, 1))  # to where sums overflow
    return torch.cat([plain, edges, tails, spread, half_empty, epsilon, magnitudes])


def importances() -> dict[str, torch.Tensor | None]:
    """`few`: where few weights of a group count, ggml's search can end at a negative scale."""
    some = ggml_rows.importance(256)
    few = some * (torch.arange(256) % 100 < 40)
    return {"none": None, "some": some, "few": few, "tiny": some * 1e-38, "zeros": torch.zeros(256)}


@kinds
@exactness
@pytest.mark.parametrize("name", list(importances()))
def test_bytes_of_the_processor(
    kind: KQuant, exact: bool, name: str, emulated: Emulated, on_processor: Encoder
) -> None:
    weight, importance = some_rows(), importances()[name]
    expected = on_processor(kind, weight, importance, exact=exact)
    for seed in (1, 2):
        emulated.seed(seed)
        found = on_cuda(kind, weight, importance, exact=exact)
        assert (found != expected).any(1).nonzero()[:, 0].tolist() == []


@kinds
def test_golden_bytes(kind: KQuant, emulated: Emulated, shared: Path) -> None:
    with np.load(shared / "golden/ggml-blocks.npz") as golden:
        weight, importance = torch.from_numpy(golden["x"]), torch.from_numpy(golden["importance"])
        plain, weighted = (torch.from_numpy(golden[name]) for name in (kind.name, f"{kind.name}.imatrix"))
    assert on_cuda(kind, weight, None, exact=True).equal(plain)
    assert on_cuda(kind, weight, importance, exact=True).equal(weighted)


@kinds
@settings(max_examples=8, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 35),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([1e-30, 1e-7, 1e-3, 1.0, 1e6]),
    weighted=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_number_of_blocks(
    kind: KQuant, rows: int, blocks: int, scale: float, weighted: bool, exact: bool, seed: int, *,
    emulated: Emulated, on_processor: Encoder,
) -> None:  # fmt: skip
    """Blocks of threads that are not full, rows that end within one, and the importance of each column."""
    weight = scale * torch.randn(rows, 256 * blocks, generator=torch.Generator().manual_seed(seed))
    importance = ggml_rows.importance(256 * blocks, seed) if weighted else None
    emulated.seed(seed)
    found = on_cuda(kind, weight, importance, exact=exact)
    assert found.equal(on_processor(kind, weight, importance, exact=exact))


def test_what_is_not_float32_or_aligned(emulated: Emulated, on_processor: Encoder) -> None:
    [kind] = [kind for kind in KQUANTS if kind.name == "Q4_K"]
    weight, importance = ggml_rows.rows(512, 3), ggml_rows.importance(512)
    expected = on_processor(kind, weight.bfloat16(), importance.double(), exact=False)
    assert on_cuda(kind, weight.bfloat16(), importance.double(), exact=False).equal(expected)
    expected = on_processor(kind, weight, None, exact=False)
    assert on_cuda(kind, weight.T.contiguous().T, None, exact=False).equal(expected)
    shifted = torch.empty(3 * 512 + 1)[1:].view(3, 512).copy_(weight)
    assert on_cuda(kind, shifted, None, exact=False).equal(expected)


@kinds
def test_no_rows_give_no_blocks(kind: KQuant, emulated: Emulated) -> None:
    assert on_cuda(kind, torch.zeros(0, 512), None, exact=False).shape == (0, 2 * kind.block_bytes)


@pytest.mark.parametrize("importance", [None, torch.ones(512)], ids=["plain", "importance"])
def test_the_operator_keeps_its_promises(importance: torch.Tensor | None) -> None:
    torch.library.opcheck(compiled.ggml_blocks, (torch.randn(3, 512), importance, "Q4_K", 288, False))


def test_what_does_not_fit_is_refused_before_a_launch(emulated: Emulated) -> None:
    with pytest.raises(ValueError, match=r"importance is \[256\], expected \[512\]"):
        compiled.ggml_blocks_cuda(torch.zeros(1, 512), torch.ones(256), "Q4_K", 288, True)
    with pytest.raises(RuntimeError, match="no kernel is compiled for these numbers"):
        compiled.ggml_blocks_cuda(torch.zeros(1, 320), None, "Q4_K", 144, True)


@kinds
def test_nothing_is_contracted(kind: KQuant, tmp_path: Path) -> None:
    """A product joined to a sum rounds once less, on a GPU alone: the emulator cannot see it."""
    try:
        home, _ = build._toolkit()
    except QuantoolError as error:
        pytest.skip(str(error))
    source, ptx = build.SOURCES / f"cuda/kquants_{kind.name.lower()}.cu", tmp_path / "kernels.ptx"
    command = [home / "bin/nvcc", *build.NVCC_FLAGS, "-arch=compute_80", "-ptx", source, "-o", ptx]
    subprocess.run(command, check=True, capture_output=True)
    operations = {line.split()[0] for line in ptx.read_text().splitlines() if ".f32" in line.split(" ")[0]}
    assert {"add.rn.f32", "mul.rn.f32", "div.rn.f32"} <= operations
    assert not operations & {"fma.rn.f32", "add.f32", "mul.f32", "sub.f32", "div.full.f32", "div.approx.f32"}
