"""The encoder of 4-bit levels on a GPU: codes and scales of the CPU to the bit. `make test-gpu`."""

import pytest
import torch

from quantool.kernels import cuda, nf4, ops

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a machine of its own, with other versions


@pytest.fixture(autouse=True)
def kernels() -> None:
    assert cuda.is_available(), cuda.why_not()


def at_every_edge(kind: str) -> torch.Tensor:
    """Midpoints between levels times all powers of two of float32, their neighbours, zeros, Inf and NaN: [N, 64]."""
    table = ops.levels(kind).sort().values
    middles = (table[:-1] + table[1:]) / 2
    line = torch.cat([middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))])
    line = torch.cat([torch.ones(1), line, line[:18]])
    random = torch.rand(277, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    weight = torch.ldexp(
        torch.cat([line * random, line.expand(277, -1)]), torch.arange(-149, 128).repeat(2).view(-1, 1)
    )
    odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")]).view(-1, 1).repeat(1, 64)
    odd[1:, 3] = 1
    return torch.cat([weight, odd])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("block_size", "count"), [(64, None), (4096, None), (64, 20_001), (32, 7)])
def test_codes_and_scales_are_those_of_the_cpu(
    dtype: torch.dtype, kind: str, block_size: int, count: int | None
) -> None:
    weight = at_every_edge(kind).to(dtype).flatten()[:count]
    expected = nf4.quantize_levels(weight, kind, block_size)
    found = [tensor.cpu() for tensor in nf4.quantize_levels(weight.cuda(), kind, block_size)]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].nan_to_num(-1), expected[1].nan_to_num(-1))
