"""The encoders of ggml's blocks on a GPU: the bytes of the CPU kernels, for weights at every edge of float32.

Needs neither gguf nor datasets, nor a network: `make test-gpu`.
"""

import ggml_rows
import pytest
import torch

from quantool.formats.ggml import GGML_TYPES, BlockType
from quantool.kernels import cuda, ggml, why_not

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a machine of its own, with other versions

each_type = pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=list(GGML_TYPES))
with_and_without = pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
exact_or_better = pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])


@pytest.fixture(autouse=True)
def kernels() -> None:
    assert cuda.is_available(), cuda.why_not()
    assert why_not() is None, why_not()


def differing_rows(kind: BlockType, weight: torch.Tensor, weighing: torch.Tensor | None, *, exact: bool) -> list[int]:
    expected = kind.quantize(weight, weighing, exact=exact)
    on_gpu = None if weighing is None else weighing.cuda()
    found = ggml.ggml_blocks_cuda(weight.cuda(), on_gpu, kind.name, expected.shape[1], exact)
    return (found.cpu() != expected).any(-1).nonzero().flatten().tolist()


@each_type
@with_and_without
@exact_or_better
def test_bytes_are_those_of_the_cpu(kind: BlockType, weighed: bool, exact: bool) -> None:
    weight = torch.cat([ggml_rows.rows(1280, 331), ggml_rows.edges(1280)])
    weighing = ggml_rows.importance(1280) if weighed else None
    assert differing_rows(kind, weight, weighing, exact=exact) == []


@each_type
@with_and_without
@exact_or_better
def test_any_magnitude(kind: BlockType, weighed: bool, exact: bool) -> None:
    """From the smallest number of float32 to the largest, one row each: where sums overflow, NaN goes the same way."""
    values = torch.randn(277, 256, generator=torch.Generator().manual_seed(0)).clamp(-1.99, 1.99)
    weight = torch.ldexp(values, torch.arange(-149, 128).view(-1, 1))
    weighing = ggml_rows.importance(256) if weighed else None
    assert weight.isfinite().all()
    assert differing_rows(kind, weight, weighing, exact=exact) == []


@each_type
def test_a_cuda_weight_is_encoded_where_it_is(kind: BlockType) -> None:
    weight, weighing = ggml_rows.rows(512, 3).cuda(), ggml_rows.importance(512)
    blocks = kind.quantize(weight, weighing)
    assert blocks.is_cuda
    assert blocks.cpu().equal(kind.quantize(weight.cpu(), weighing))
