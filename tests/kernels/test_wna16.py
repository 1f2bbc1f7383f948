"""linear_tiles: its reference, its CUDA implementation in the emulator, against the formula in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated import Emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from tiled_linears import BAD, BF16, FP16, assert_close, make

from quantool.kernels import cuda, wna16
from quantool.kernels.wna16 import linear_cuda, linear_tiles

Launched = list[tuple[str, tuple[Any, ...]]]


@pytest.fixture
def launched(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """What is launched, on a card of 8 multiprocessors that runs in the emulator."""
    launches: Launched = []
    call = cuda.call

    def recorded(name: str, *arguments: Any) -> None:
        launches.append((name.removeprefix("quantool_wna16_"), arguments))
        call(name, *arguments)

    monkeypatch.setattr(cuda, "call", recorded)
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(8, (9, 0)))
    return launches


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, 64, 192])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_reference_is_the_formula(bits: int, group: int, sym: bool) -> None:
    assert_close(linear_tiles(*(case := make(group=group, bits=bits, sym=sym)).arguments), case)
    wide = replace(case, x=case.x.float(), bias=None)
    assert_close(linear_tiles(*wide.arguments), wide, 1e-6)


@pytest.mark.parametrize(
    ("tokens", "launcher"),
    [(1, "gemv"), (7, "gemv"), (8, "gemv"), (9, "gemm"), (128, "gemm"), (129, "dequantize"), (200, "dequantize")],
)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_the_kernel_of_every_number_of_tokens(
    tokens: int, launcher: str, bits: int, sym: bool, dtype: torch.dtype, launched: Launched
) -> None:
    case = make(tokens, bits=bits, sym=sym, dtype=dtype, scale_dtype=FP16 if sym else BF16, biased=sym)
    assert_close(linear_cuda(*case.arguments), case)
    assert [name for name, _ in launched] == [launcher]


@pytest.mark.parametrize(("tokens", "launcher"), [(1, "simt"), (8, "simt"), (9, "dequantize")])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_cards_without_tensor_cores_for_bfloat16(
    tokens: int, launcher: str, dtype: torch.dtype, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(8, (7, 5)))
    case = make(tokens, sym=False, dtype=dtype)
    assert_close(linear_cuda(*case.arguments), case)
    assert [name for name, _ in launched] == [launcher]


@pytest.mark.parametrize(
    ("tokens", "multiprocessors", "splits"),
    [(3, 1, 1), (3, 132, 2), (20, 1, 2), (20, 132, 8), (100, 1, 1), (100, 5, 5)],
)
def test_the_parts_of_a_split_add_up(
    tokens: int,
    multiprocessors: int,
    splits: int,
    launched: Launched,
    emulated: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a large card K is cut into several parts; the bits are the same in every order of threads."""
    case = make(tokens, 32, 4096, 128, sym=False)
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(multiprocessors, (9, 0)))
    y = linear_cuda(*case.arguments)
    assert_close(y, case)
    emulated.seed(1)
    assert torch.equal(linear_cuda(*case.arguments), y)
    partials = [a.shape for a in launched[0][1] if isinstance(a, torch.Tensor) and a.dtype == torch.float32]
    assert partials == ([] if splits == 1 else [(splits, tokens, 32)])


@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3), (2, 70)])
@pytest.mark.usefixtures("launched")
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    case = make(lead)
    assert_close(linear_cuda(*case.arguments), case)
    assert_close(linear_tiles(*case.arguments), case)


@pytest.mark.parametrize("lead", [(0,), (0, 5), (5, 0)])
def test_an_empty_batch_launches_nothing(lead: tuple[int, ...], launched: Launched) -> None:
    case = make(lead)
    assert linear_cuda(*case.arguments).shape == linear_tiles(*case.arguments).shape == (*lead, 48)
    assert not launched


@pytest.mark.usefixtures("launched")
def test_tokens_may_lie_anywhere_in_memory() -> None:
    case = make(4)
    transposed = replace(case, x=case.x.T.contiguous().T)
    shifted = replace(case, x=torch.cat([torch.zeros(1, dtype=BF16), case.x.flatten()])[1:].view_as(case.x))
    assert not transposed.x.is_contiguous()
    assert shifted.x.data_ptr() % 16 == 2
    for moved in (transposed, shifted):
        assert torch.equal(linear_cuda(*moved.arguments), linear_cuda(*case.arguments))


@pytest.mark.parametrize("tokens", [3, 20, 130])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.usefixtures("launched")
def test_bad_input_is_named_before_anything_is_launched(bad: str, tokens: int) -> None:
    change, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        linear_cuda(*change(make(tokens)).arguments)


def test_a_card_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(80, (7, 0)))
    with pytest.raises(ValueError, match=r"capability \(7, 0\), the kernels need \(7, 5\)"):
        linear_cuda(*make().arguments)


SIZES = st.integers(1, 2048).map(lambda n: 16 * n), st.integers(1, 512).map(lambda n: 64 * n)


@settings(deadline=None, max_examples=200)
@given(*SIZES, st.integers(1, 128), st.integers(1, 200))
def test_a_plan_gives_every_multiprocessor_work_where_there_is_enough(
    rows: int, columns: int, tokens: int, multiprocessors: int
) -> None:
    splits = wna16.plan(rows, columns, tokens, multiprocessors)
    blocks, least = (rows // 16, 2048) if tokens <= 8 else (-(-rows // 128), 512)
    wanted = multiprocessors * (2 if 8 < tokens <= 64 else 1)
    assert splits == 1 or (splits * blocks <= wanted and splits * least <= columns)
    assert (splits + 1) * blocks > wanted or (splits + 1) * least > columns


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_torch_finds_the_op_sound(sym: bool, biased: bool) -> None:
    torch.library.opcheck(linear_tiles, make((2, 3), sym=sym, biased=biased).arguments)


def test_on_meta_tensors() -> None:
    arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in make((2, 3), sym=False).arguments]
    found = linear_tiles(*arguments)
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 3, 48), BF16)


def test_compiled_without_a_break() -> None:
    case = make(3)
    compiled = torch.compile(lambda x: linear_tiles(x, *case.arguments[1:]) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.x), linear_tiles(*case.arguments) * 2)
