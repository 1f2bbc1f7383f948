"""GPTQ's column loops on a GPU: the CPU's to the bit.

Needs neither gguf nor datasets, nor a network: `make test-gpu`.
"""

import pytest
import torch
from gptq_blocks import Case, require_same

from quantool.kernels import cuda, gptq_ops
from quantool.methods import gptq
from quantool.methods.statistics import Inputs
from quantool.scheme import MethodOptions, QuantScheme

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a machine of its own, with other versions

CASES = [
    Case(4096, 128, 1, 4),
    Case(1000, 128, 3, 4, sym=False, strided=True),
    Case(333, 121, 9, 8, scattered=True, seed=1),
    Case(1, 1, 1, 2),
    *(Case(200, 100, 2, 4, values=values) for values in ("zeros", "large", "small", "ties", "inf", "nan")),
]


@pytest.fixture(autouse=True)
def kernels() -> None:
    assert cuda.is_available(), cuda.why_not()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["gptq_columns", "descend_columns"])
def test_the_loop_is_that_of_the_cpu(name: str, case: Case) -> None:
    operator = getattr(gptq_ops, name)
    *tensors, max_code = case.arguments() if name == "gptq_columns" else case.descent()
    found = operator(*(tensor.cuda() for tensor in tensors), max_code)
    require_same(tuple(tensor.cpu() for tensor in found), operator(*tensors, max_code))


@pytest.mark.parametrize("name", ["gptq_columns", "descend_columns"])
def test_torch_accepts_it(name: str) -> None:
    *tensors, max_code = getattr(Case(20, 12, 3, 4), "arguments" if name == "gptq_columns" else "descent")()
    torch.library.opcheck(getattr(gptq_ops, name), (*(tensor.cuda() for tensor in tensors), max_code))


@pytest.mark.parametrize("actorder", ["static", "group", "none"])
def test_a_linear_is_rounded_as_on_the_cpu(actorder: str) -> None:
    """To the error of the output: sums of matrix products differ in the last bit, and then a code beside a tie."""
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 512, generator=random), torch.randn(2048, 512, generator=random)
    x *= torch.exp(torch.randn(512, generator=random))
    moment, errors = x.T @ x / len(x), []
    for device in ("cpu", "cuda"):
        q = gptq.quantize_weight(
            weight.to(device),
            QuantScheme(4, 64, sym=False),
            lambda scales: scales.to(torch.bfloat16),
            inputs=Inputs(moment.to(device), x.abs().amax(0).to(device), len(x)),
            options=MethodOptions(actorder=actorder),
        )
        assert q is not None
        assert q.codes.device.type == device
        groups = torch.arange(512) // 64 if q.g_idx is None else q.g_idx.cpu().long()
        scales, zeros = q.scales.cpu().double(), q.zeros.cpu().double()
        difference = scales[:, groups] * (q.codes.cpu() - zeros[:, groups]) - weight
        errors.append(float(((difference @ moment.double()) * difference).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)
