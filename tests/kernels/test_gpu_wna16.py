"""linear_tiles on a GPU: against float64, on streams, in CUDA graphs, compiled, and what it refuses.

Needs neither gguf nor datasets, nor a network: `make test-gpu`.
"""

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiled_linears import BAD, BF16, FP16, Case, assert_close, make

from quantool.kernels import cuda, wna16
from quantool.kernels.ops import linear_wna16, pack_bits
from quantool.kernels.tiles import unpack_tiles, untile_rows
from quantool.kernels.wna16 import linear_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a machine of its own, with other versions
EVERY_KERNEL = [1, 3, 8, 9, 16, 33, 64, 127, 128, 129, 1024]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty makes is NaN, and kernels of ours do the work."""
    assert cuda.is_available(), cuda.why_not()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("tokens", EVERY_KERNEL)
@pytest.mark.parametrize("group", [32, 64, 128, 512])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_formula(bits: int, sym: bool, group: int, tokens: int) -> None:
    for dtype, scale_dtype in ((BF16, BF16), (FP16, FP16), (BF16, FP16), (FP16, BF16)):
        case = make(tokens, 272, 512, group, bits=bits, sym=sym, dtype=dtype, scale_dtype=scale_dtype, device="cuda")
        assert_close(linear_tiles(*case.arguments), case)


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed: int) -> None:
    """Rows, columns, groups and tokens of all remainders."""
    draw = random.Random(seed)
    columns = 64 * draw.randint(1, 80)
    groups = [g for g in range(32, columns + 1, 32) if columns % g == 0]
    case = make(
        draw.choice([draw.randint(1, 9), draw.randint(9, 130), draw.randint(129, 300)]),
        16 * draw.randint(1, 200),
        columns,
        draw.choice(groups),
        bits=draw.choice([4, 4, 8]),
        sym=draw.random() < 0.5,
        dtype=draw.choice([BF16, FP16]),
        biased=draw.random() < 0.5,
        device="cuda",
    )
    y = linear_tiles(*case.arguments)
    assert_close(y, case)
    assert torch.equal(linear_tiles(*case.arguments), y)


@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)])
def test_shapes_of_large_models_always_give_the_same_bits(rows: int, columns: int) -> None:
    whole = make(1024, rows, columns, 128, device="cuda")
    for tokens in (1, 8, 16, 128, 1024):
        case = replace(whole, x=whole.x[:tokens])
        y = linear_tiles(*case.arguments)
        assert_close(y, case)
        for _ in range(5):
            assert torch.equal(linear_tiles(*case.arguments), y)


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_tokens_alone_are_tokens_in_a_batch(tokens: int) -> None:
    """A token's result does not depend on who stands beside it, to within the rounding of the output."""
    case = make(tokens, 512, 1024, 128, dtype=FP16, device="cuda")
    alone = torch.cat([linear_tiles(row[None], *case.arguments[1:]) for row in case.x])
    torch.testing.assert_close(alone, linear_tiles(*case.arguments), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("tokens", [3, 20, 200])
def test_the_loop_of_older_cards(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(tokens, 272, 512, 64, sym=False, dtype=FP16, device="cuda")
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(40, (7, 5)))
    assert_close(linear_tiles(*case.arguments), case)


def test_rows_are_computed_here_too() -> None:
    """The layout of what does not fit: torch's operations."""
    case = make(5, 48, 192, 32, sym=False, device="cuda")
    assert case.zeros is not None
    rows = pack_bits(unpack_tiles(case.tiles, "codes", 4), 4)
    found = linear_wna16(case.x, rows, untile_rows(case.scales), untile_rows(case.zeros), case.bias, 4)
    assert_close(found, case, 5e-3)


@pytest.mark.parametrize("tokens", [2, 20, 200])
def test_on_a_side_stream(tokens: int) -> None:
    """x is made on that stream, by work that takes its time; a kernel on another stream would read it too early."""
    case, slow = make(tokens, 4096, 4096, 128, device="cuda"), torch.randn(8192, 8192, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.full_like(case.x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow = (slow @ slow).clamp_(-1, 1)
        late.copy_(case.x)
        y = linear_tiles(late, *case.arguments[1:])
    torch.cuda.synchronize()
    assert_close(y, case)


@pytest.mark.parametrize("tokens", [1, 8, 16, 128, 200])
def test_a_recorded_call_computes_from_what_is_there_when_it_is_replayed(tokens: int) -> None:
    case = make(tokens, 1024, 4096, 128, sym=False, device="cuda")
    static = torch.zeros_like(case.x)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        linear_tiles(static, *case.arguments[1:])
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_tiles(static, *case.arguments[1:])
    for sign in (1, -1):
        other = replace(case, x=case.x * sign)
        static.copy_(other.x)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(y, other)
        assert torch.equal(y, linear_tiles(*other.arguments))


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_nothing_waits_for_the_device(tokens: int) -> None:
    case = make(tokens, device="cuda")
    linear_tiles(*case.arguments)  # loads the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_tiles(*case.arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_torch_finds_the_op_sound(tokens: int) -> None:
    torch.library.opcheck(linear_tiles, make((2, tokens), sym=False, device="cuda").arguments)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_without_a_break(dynamic: bool) -> None:
    def function(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.nn.functional.silu(linear_tiles(x * 2, *rest))

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for tokens in (2, 20, 200):
        case = make(tokens, 512, 1024, 128, device="cuda")
        torch.testing.assert_close(compiled(*case.arguments), function(*case.arguments), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lead", [(), (2, 1, 3), (0,), (5, 0)])
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    case = make(lead, device="cuda")
    y = linear_tiles(*case.arguments)
    assert y.shape == (*lead, 48)
    if y.numel():
        assert_close(y, case)


@pytest.mark.parametrize("tokens", [3, 20, 200])
def test_tokens_may_lie_anywhere_in_memory(tokens: int) -> None:
    case = make(tokens, device="cuda")
    shifted = torch.cat([case.x.new_zeros(1), case.x.flatten()])[1:].view_as(case.x)
    for x in (case.x.T.contiguous().T, shifted):
        assert_close(linear_tiles(x, *case.arguments[1:]), case)


def refused(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_tiles(*case.arguments)


@pytest.mark.parametrize("bad", [name for name in BAD if name != "device"])
def test_bad_input_leaves_the_device_alive(bad: str) -> None:
    change, message = BAD[bad]
    good = make(device="cuda")
    refused(change(good), message)
    assert_close(linear_tiles(*good.arguments), good)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["x", "tiles", "scales", "zeros", "bias"])
def test_a_tensor_on_another_device_is_refused(name: str) -> None:
    good = make(sym=False, device="cuda")
    refused(replace(good, **{name: getattr(good, name).cpu()}), "is on (cpu|cuda:0), x on (cuda:0|cpu)")
    assert_close(linear_tiles(*good.arguments), good)
    torch.cuda.synchronize()


@pytest.mark.parametrize("tokens", [3, 20, 200])
def test_a_device_that_is_not_the_current_one(tokens: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make(tokens, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(linear_tiles(*case.arguments), case)
    assert torch.cuda.current_device() == 0


CHECKED = """
import sys
sys.path += ["tests"]
import torch
from tiled_linears import assert_close, make
from quantool.kernels.wna16 import linear_tiles
for bits in (4, 8):
    for tokens in (1, 8, 20, 128, 130):
        case = make(tokens, 272, 2112, 32, bits=bits, sym=False, device="cuda")
        assert_close(linear_tiles(*case.arguments), case)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_under_the_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", CHECKED],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
