"""The K-quants against ggml itself: the same bytes when asked for, a lower error when not."""

from collections.abc import Callable
from pathlib import Path

import ggml
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from quantool import kernels
from quantool.formats.ggml import dequantize, kquants
from quantool.formats.ggml.kquants import KQUANTS, KQuant

Search = Callable[..., torch.Tensor]
kinds = pytest.mark.parametrize("kind", KQUANTS, ids=lambda kind: kind.name)
both = pytest.mark.parametrize("search", ["compiled", "reference"])
weighted = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])


def searcher(kind: KQuant, search: str) -> Search:
    if search == "reference":
        return kind.reference
    if not kernels.is_available():
        pytest.skip(f"no compiled kernels: {kernels.why_not()}")
    return kind.quantize


def gaussian(rows: int = 24, columns: int = 1024, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(rows: int = 24, columns: int = 1024) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(4, rows, columns, generator=generator)
    return 0.02 * normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t with three degrees of freedom


def edges() -> torch.Tensor:
    """One super-block per row, whatever rows of weights can be."""
    base = gaussian(1, 256, seed=2)[0]
    spike, one = base.clone(), torch.zeros(256)
    spike[17], one[3] = 1000.0, 1.0
    half, faint, loud = base.clone(), base.clone(), base.clone()
    half[:128] = 0
    faint[:32] *= 1e-20
    loud[64:80] *= 1e6
    rows = [torch.zeros(256), -torch.zeros(256), torch.full((256,), 0.37), torch.full((256,), -0.37)]
    rows += [spike, -spike, one, -one, half, faint, loud, base.abs(), -base.abs(), base.sign() * 65504]
    rows += [torch.where(base > 0, 0.5, -0.25), base * torch.logspace(-20, 5, 256)]
    rows += [base / base.abs().max() * 1.5e-15]  # above ggml's epsilon, its scales below
    rows += [base * 10.0**power for power in (-38, -36, -30, -14, -13, -9, -8, -7, -6, -5, 4, 6, 8, 10, 14)]
    return torch.stack(rows)


def importances(columns: int) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    squares = torch.randn(columns, generator=generator) ** 2
    return {
        "none": None,
        "squares": squares + 0.01,
        "zeros": torch.zeros(columns),
        "some": squares * (torch.arange(columns) % 100 < 40),
        "tiny": squares * 1e-38,
    }


def error(weight: torch.Tensor, data: torch.Tensor, kind: KQuant, importance: torch.Tensor | None) -> torch.Tensor:
    """sum importance (x - x')^2 of each super-block."""
    squares = (ggml.dequantize(kind.name, data).double() - weight) ** 2
    if importance is not None:
        squares *= importance.double()
    return squares.view(-1, 256).sum(1)


def own_error(weight: torch.Tensor, data: torch.Tensor, kind: KQuant, importance: torch.Tensor | None) -> torch.Tensor:
    """ggml's objective, from the description of its search."""
    x = weight.double().view(-1, 256)
    e = ggml.dequantize(kind.name, data).double().view(-1, 256) - x
    if kind.name == "Q6_K" or (kind.name == "Q3_K" and importance is None):
        w = x**2 if importance is None else importance.double().expand(weight.shape).reshape(-1, 256)
        return (w * e**2).sum(1)
    if importance is None:
        if kind.name == "Q2_K":
            return (x.abs() * e.abs()).sum(1)
        mean = (x.view(-1, 8, 32) ** 2).mean(2, keepdim=True).sqrt().expand(-1, -1, 32).reshape(x.shape)
        return ((mean + x.abs()) * e**2).sum(1)
    variance = (x**2).mean(1, keepdim=True) * (1 if kind.name == "Q2_K" else 2)
    w = importance.double().expand(weight.shape).reshape(-1, 256) * (variance + x**2).sqrt()
    return (w * e**2).sum(1)


@kinds
@both
def test_exact_search_gives_the_bytes_of_ggml(kind: KQuant, search: str) -> None:
    quantize = searcher(kind, search)
    for weight in (gaussian(), heavy_tailed(), edges()):
        for name, importance in importances(weight.shape[1]).items():
            expected = ggml.quantize(kind.name, weight, importance)
            rows = (quantize(weight, importance, exact=True) != expected).any(1).nonzero()
            assert rows.numel() == 0, f"importance {name}: rows {rows[:, 0].tolist()}"


@kinds
@both
def test_golden_bytes(kind: KQuant, search: str, shared: Path) -> None:
    golden = np.load(shared / "golden/ggml-blocks.npz")
    weight, importance = torch.from_numpy(golden["x"]), torch.from_numpy(golden["importance"])
    quantize = searcher(kind, search)
    assert quantize(weight, exact=True).equal(torch.from_numpy(golden[kind.name]))
    assert quantize(weight, importance, exact=True).equal(torch.from_numpy(golden[f"{kind.name}.imatrix"]))


@kinds
def test_every_block_unpacks_as_in_ggml_and_packs_again(kind: KQuant) -> None:
    data = torch.randint(0, 256, (9, 4 * kind.block_bytes), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    blocks = data.view(-1, kind.block_bytes)
    for at in {"Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,)}.get(kind.name, (1, 3)):
        blocks[:, at] &= 0xBF  # the upper byte of a float16: neither infinite nor NaN
    grid, codes = kind.unpack(data)
    assert codes.max() == kind.max_code
    assert (codes.shape, grid.step.shape) == ((9, 1024), (9, 1024 // kind.group_size))
    ours, theirs = dequantize(kind, data), ggml.dequantize(kind.name, data)
    assert ours.view(torch.int32).equal(theirs.view(torch.int32))  # also the sign of zero
    assert kind.pack(grid, codes).equal(data)


@kinds
@pytest.mark.parametrize("name", list(importances(256)))
def test_default_search_is_nowhere_worse_than_ggml(kind: KQuant, name: str) -> None:
    for weight in (gaussian(), heavy_tailed(), edges()):
        importance = importances(weight.shape[1])[name]
        ours, theirs = kind.quantize(weight, importance), ggml.quantize(kind.name, weight, importance)
        for measure in (error, own_error):
            before, after = (measure(weight, data, kind, importance) for data in (theirs, ours))
            assert (after <= before * (1 + 1e-9)).logical_or(before.isnan()).all()


# With an importance E1 is minimised, which costs Q2_K a hundredth of E2 and wins 2 % of the KL divergence of a model.
GAINS = {"Q2_K": (0.88, 0.945), "Q3_K": (0.98, 0.98), "Q4_K": (0.97, 0.965), "Q5_K": (0.93, 0.89), "Q6_K": (0.93, 0.89)}


@kinds
@weighted
def test_default_search_loses_less_than_ggml(kind: KQuant, weighted: bool) -> None:
    weight = gaussian()
    importance = importances(weight.shape[1])["squares"] if weighted else None
    ours, theirs = kind.quantize(weight, importance), ggml.quantize(kind.name, weight, importance)
    gain = error(weight, ours, kind, importance).sum() / error(weight, theirs, kind, importance).sum()
    assert gain < GAINS[kind.name][weighted]


@kinds
@weighted
def test_default_search_loses_less_on_a_real_model(kind: KQuant, weighted: bool, shared: Path) -> None:
    with safe_open(shared / "models/stories-4m/model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.1.mlp.gate_proj.weight").float()
    importance = importances(weight.shape[1])["squares"] if weighted else None
    ours, theirs = kind.quantize(weight, importance), ggml.quantize(kind.name, weight, importance)
    assert error(weight, ours, kind, importance).sum() < 0.985 * error(weight, theirs, kind, importance).sum()


@kinds
def test_values_stay_finite_where_ggml_overflows(kind: KQuant) -> None:
    huge = torch.stack([gaussian(1, 256)[0] * 10.0**power for power in (10, 20, 30, 38)])
    for importance in importances(256).values():
        for weight in (huge, edges()):
            assert dequantize(kind, kind.quantize(weight, importance)).isfinite().all()
    weight = huge[:1]
    overflowed = ggml.dequantize(kind.name, ggml.quantize(kind.name, weight))
    assert not overflowed.isfinite().all()
    assert (dequantize(kind, kind.quantize(weight)) - weight).abs().max() < weight.abs().max()


@kinds
def test_codes_that_importance_ignores_are_still_rounded(kind: KQuant) -> None:
    weight, importance = gaussian(4, 256), torch.ones(256)
    importance[:128] = 0
    ours = dequantize(kind, kind.quantize(weight, importance)) - weight
    theirs = ggml.dequantize(kind.name, ggml.quantize(kind.name, weight, importance)) - weight
    assert ours[:, 128:].norm() <= theirs[:, 128:].norm()
    assert ours[:, :128].norm() < 1.1 * theirs[:, :128].norm()


@both
def test_a_negative_scale_spoils_no_block(search: str) -> None:
    """Where few weights of a group count, ggml's search can end below zero, and its byte then reads as the largest."""
    [kind] = [kind for kind in KQUANTS if kind.name == "Q4_K"]
    weight, importance = heavy_tailed(), importances(1024)["some"]
    ours, theirs = searcher(kind, search)(weight, importance), ggml.quantize("Q4_K", weight, importance)
    ratio = error(weight, ours, kind, importance) / error(weight, theirs, kind, importance)
    assert ratio.min() < 0.01


@kinds
@settings(max_examples=12, deadline=None, database=None)
@given(
    rows=st.integers(1, 37),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([1e-30, 1e-7, 1e-3, 1.0, 1e6]),
    tail=st.floats(0, 3),
    importance=st.sampled_from(["none", "squares", "some"]),
    exact=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_compiled_equals_reference(
    kind: KQuant, rows: int, blocks: int, scale: float, tail: float, importance: str, exact: bool, seed: int
) -> None:
    quantize = searcher(kind, "compiled")
    normal = gaussian(rows, 256 * blocks, seed)
    weight = scale * normal * (normal.abs() * 50).exp().pow(tail / 3)
    weighing = importances(256 * blocks)[importance]
    assert quantize(weight, weighing, exact=exact).equal(kind.reference(weight, weighing, exact=exact))


@kinds
def test_reference_does_not_depend_on_its_chunks(kind: KQuant, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = gaussian(5, 512), importances(512)["squares"]
    whole = kind.reference(weight, importance)
    monkeypatch.setattr(kquants, "CHUNK", 3)
    assert kind.reference(weight, importance).equal(whole)


@kinds
def test_no_rows_give_no_blocks(kind: KQuant) -> None:
    for quantize in (kind.quantize, kind.reference):
        assert quantize(torch.zeros(0, 512)).shape == (0, 2 * kind.block_bytes)


@kinds
def test_without_a_compiler_the_reference_works(kind: KQuant, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(3, 256)
    compiled = kind.quantize(weight)
    monkeypatch.setenv("QUANTOOL_KERNELS", "0")
    assert kind.quantize(weight).equal(compiled)
