"""Weights on a GPU become the same bytes as on a CPU, by every rounding, in every format.

There is no GPU here (see elsewhere.py): what this finds is a tensor made on the wrong device, and arithmetic that only
one of the two ways does. Whether the kernels of CUDA agree with torch is what tests/kernels asks.
"""

import pytest
import torch
from elsewhere import DEVICE, elsewhere

from quantool.formats import FORMATS
from quantool.formats.ggml import GGML_TYPES, dequantize
from quantool.methods import WEIGHT_METHODS, gptq
from quantool.methods.statistics import Inputs
from quantool.quant import QuantizedTensor
from quantool.scheme import MethodOptions, QuantScheme
from quantool.stages.gguf_blocks import method_for, proxy_scheme, round_proxy

ROWS, COLUMNS = 64, 512
CASES = [
    ("rtn", "compressed-tensors", QuantScheme(4, 128)),
    ("rtn", "compressed-tensors", QuantScheme(3, 32, sym=False)),
    ("rtn", "compressed-tensors", QuantScheme(8, -1, act_bits=8)),
    ("rtn", "compressed-tensors", QuantScheme(8, 0, act_bits=8)),
    ("rtn", "awq", QuantScheme(4, 64)),
    ("rtn", "awq", QuantScheme(4, 64, sym=False)),
    ("rtn", "gptq", QuantScheme(4, 128)),
    ("rtn", "gptq", QuantScheme(3, 32)),
    ("rtn", "gptq", QuantScheme(8, -1, sym=False)),
    ("nf4", "bitsandbytes", QuantScheme(4, 64, dtype="nf4", double_quant=True)),
    ("fp4", "bitsandbytes", QuantScheme(4, 128, dtype="fp4")),
    ("llm-int8", "bitsandbytes", QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0)),
]


def weight(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """With rows of zeros and one of large values."""
    found = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    found[3], found[5] = 0, found[5] * 100
    return found.to(torch.bfloat16)


def quantized(method: str, format_name: str, scheme: QuantScheme, w: torch.Tensor, *, mse: bool) -> QuantizedTensor:
    def round_scales(scales: torch.Tensor) -> torch.Tensor:
        return FORMATS[format_name].round_scales(scales, torch.bfloat16)

    return WEIGHT_METHODS[method](w, scheme, round_scales, options=MethodOptions(mse=mse))


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize(("method", "format_name", "scheme"), CASES, ids=str)
def test_every_format_packs_weights_of_a_gpu(method: str, format_name: str, scheme: QuantScheme, mse: bool) -> None:
    format_ = FORMATS[format_name]
    here = quantized(method, format_name, scheme, weight(), mse=mse)
    expected = format_.pack(here)
    with elsewhere():
        q = quantized(method, format_name, scheme, weight().to(DEVICE), mse=mse)
        assert q.codes.device == q.scales.device == DEVICE
        packed = format_.pack(q)
        assert {suffix: tensor.dtype for suffix, tensor in packed.items()} == {k: t.dtype for k, t in expected.items()}
        assert all(torch.equal(packed[suffix].cpu(), tensor) for suffix, tensor in expected.items())
        read = format_.unpack({suffix: tensor.to(DEVICE) for suffix, tensor in packed.items()}, scheme)
        assert read.codes.device == DEVICE
        assert torch.equal(read.codes.cpu(), here.codes)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_every_block_type_packs_weights_of_a_gpu(name: str, weighted: bool) -> None:
    kind, w = GGML_TYPES[name], weight().float()
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) if weighted else None
    expected = kind.quantize(w, importance)
    with elsewhere():
        blocks = kind.quantize(w.to(DEVICE), None if importance is None else importance.to(DEVICE))
        assert blocks.device == DEVICE
        assert torch.equal(blocks.cpu(), expected)
        assert torch.equal(kind.pack(*kind.unpack(blocks)).cpu(), expected)
        assert torch.equal(dequantize(kind, blocks).cpu(), dequantize(kind, expected))


def inputs(device: torch.device | str) -> Inputs:
    x = torch.randn(600, COLUMNS, generator=torch.Generator().manual_seed(2))
    return Inputs((x.T @ x / len(x)).to(device), x.abs().amax(0).to(device), len(x))


@pytest.mark.parametrize("actorder", ["static", "group", "none"])
def test_gptq_rounds_weights_of_a_gpu(actorder: str) -> None:
    format_, scheme = FORMATS["gptq"], QuantScheme(4, 128, sym=False)

    def packed(device: torch.device | str) -> dict[str, torch.Tensor]:
        def round_scales(scales: torch.Tensor) -> torch.Tensor:
            return format_.round_scales(scales, torch.bfloat16)

        w, options = weight().float().to(device), MethodOptions(actorder=actorder)
        q = gptq.quantize_weight(w, scheme, round_scales, inputs=inputs(device), options=options)
        assert q is not None
        return format_.pack(q)

    expected = packed("cpu")
    with elsewhere():
        found = packed(DEVICE)
        assert all(torch.equal(found[suffix].cpu(), tensor) for suffix, tensor in expected.items())


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_blocks_on_the_grid_of_a_type_are_rounded_on_a_gpu(name: str, method: str) -> None:
    def blocks(device: torch.device | str) -> torch.Tensor:
        rounding = method_for(method, name).round
        assert rounding is not None
        scheme, w = proxy_scheme(GGML_TYPES[name]), weight().float().to(device)
        q = rounding(w, scheme, round_proxy, inputs=inputs(device), options=MethodOptions())
        assert q is not None
        assert q.blocks is not None
        return q.blocks

    expected = blocks("cpu")
    with elsewhere():
        found = blocks(DEVICE)
        assert found.device == DEVICE
        assert torch.equal(found.cpu(), expected)


def test_the_check_sees_a_tensor_on_the_wrong_device() -> None:
    with elsewhere():
        there = torch.ones(4, device=DEVICE)
        assert (there + torch.tensor(1.0)).device == DEVICE
        assert torch.equal(there.cpu() + torch.ones(4), torch.full((4,), 2.0))
        with pytest.raises(RuntimeError, match="several devices"):
            there + torch.ones(4)
        with pytest.raises(RuntimeError, match="several devices"):
            torch.ones(4)[torch.zeros(4, dtype=torch.int64, device=DEVICE)]
