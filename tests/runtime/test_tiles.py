"""Artifacts loaded as for a GPU, into tiles, and computed by the CUDA kernels in the emulator."""

import gc
import importlib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import Emulated

from quantool.data import TextOptions
from quantool.kernels import wna16
from quantool.recipe import Recipe
from quantool.runtime import QuantLinear, load
from quantool.runtime.linear import takes_tiles
from quantool.scheme import MethodOptions
from quantool.stages import eval_ppl, quantize

CUDA, BF16, FP16 = torch.device("cuda"), torch.bfloat16, torch.float16
TEXT = TextOptions(num_samples=8, seq_len=48)
loading = importlib.import_module("quantool.runtime.load")  # the package's `load` is the function


@pytest.fixture
def as_on_a_gpu(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The choice of a layout is a GPU's, and the operator its CUDA kernels. The list is of tokens per call."""
    tokens: list[int] = []

    def linear_tiles(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        tokens.append(x.numel() // x.shape[-1])
        return wna16.linear_cuda(x, *rest)

    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(4, (9, 0)))
    monkeypatch.setattr(wna16, "linear_tiles", linear_tiles)
    monkeypatch.setattr(loading, "takes_tiles", lambda *args: takes_tiles(*args[:-1], CUDA))
    return tokens


ARTIFACTS = {
    "w4-sym-g32": Recipe(bits=4, group_size=32),
    "w4-asym-g64": Recipe(bits=4, group_size=64, sym=False),
    "w4-sym-g128": Recipe(bits=4, group_size=128),
    "w4-asym-channel": Recipe(bits=4, group_size=-1, sym=False),
    "w8-asym-g32": Recipe(bits=8, group_size=32, sym=False),
    "w8-channel": Recipe(bits=8, group_size=-1),
    "awq-format": Recipe(bits=4, group_size=64, sym=False, format="awq"),
    "gptq-format-act-order": Recipe(
        method="gptq", bits=4, group_size=32, format="gptq", options=MethodOptions(actorder="group")
    ),
}


@pytest.fixture(scope="module", params=ARTIFACTS)
def artifact(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiles") / request.param
    quantize.run(str(tiny_llama), out, ARTIFACTS[request.param], text=TEXT)
    return out


def perplexity(model: Path, dtype: str, batch_size: int) -> float:
    return eval_ppl.run(str(model), text=TEXT, dtype=dtype, batch_size=batch_size).perplexity


@pytest.fixture(scope="module")
def reference(artifact: Path) -> float:
    """In rows, in float32, before anything is as on a GPU."""
    return perplexity(artifact, "float32", 4)


@pytest.mark.parametrize(("dtype", "batch_size"), [("float16", 1), ("float16", 4), ("bfloat16", 1)])
def test_the_perplexity_is_that_of_the_reference(
    artifact: Path, reference: float, dtype: str, batch_size: int, as_on_a_gpu: list[int]
) -> None:
    assert perplexity(artifact, dtype, batch_size) == pytest.approx(reference, rel=1e-3)
    assert max(as_on_a_gpu) == 48 * batch_size  # gemm, or dequantize and torch


@pytest.mark.parametrize("artifact", ["w4-asym-g64", "w8-channel", "gptq-format-act-order"], indirect=True)
def test_generation(artifact: Path, as_on_a_gpu: list[int]) -> None:
    """Token by token, with a cache."""
    model = load(artifact, dtype="float16")
    assert sum(m.tiled for m in model.modules() if isinstance(m, QuantLinear)) == 14
    prompt = torch.arange(5, 15).view(1, 10)
    out = model.generate(
        prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert set(as_on_a_gpu) == {10, 1}
    with torch.inference_mode():
        wanted = load_rows(artifact)(out.sequences).logits[0, 9:-1]
    found = torch.cat(out.logits).float()
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.parametrize("artifact", ["gptq-format-act-order"], indirect=True)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_nothing_is_held_but_the_buffers(artifact: Path) -> None:
    """Neither codes nor what was read of the file outlive `load`."""
    before = {id(tensor) for tensor in tensors_alive()}
    model = load(artifact, dtype="bfloat16")
    left = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_alive() if id(tensor) not in before}
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    assert {pointer for pointer, tensor in left.items() if tensor.numel() > 100} <= own


def tensors_alive() -> list[torch.Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def load_rows(artifact: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "takes_tiles", takes_tiles)
        model = load(artifact, dtype="float32")
    assert not any(m.tiled for m in model.modules() if isinstance(m, QuantLinear))
    return model
