"""Weights that go through a real GPU: they arrive and come back bit for bit, and files are those of a CPU."""

import filecmp
from pathlib import Path

import pytest
import torch

from quantool.data import TextOptions
from quantool.model.memory import halving
from quantool.recipe import METHOD_DEFAULTS, Recipe
from quantool.stages import quantize, streaming
from quantool.stages.streaming import Flow

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a machine of its own, with other versions
GPU = torch.device("cuda")


@pytest.mark.parametrize("piece", [999, 1 << 20])
def test_tensors_arrive_and_come_back(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PIECE", piece)
    random = torch.Generator().manual_seed(0)
    shapes = ((), (0,), (7,), (64, 333), (1000, 500), (3, 1), (2048, 1024))
    tensors = {
        f"{dtype} {shape}": torch.randint(0, 100, shape, generator=random).to(dtype)
        for shape in shapes
        for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.int64)
    }
    tensors["transposed"] = tensors["torch.float32 (64, 333)"].t()
    came_back: dict[str, torch.Tensor] = {}

    def write(name: str, tensor: torch.Tensor) -> None:
        assert tensor.device.type == "cpu"
        came_back[name] = tensor.clone()

    with Flow(GPU) as flow:
        for name, tensor in flow.read(tensors, tensors.__getitem__, lambda _: None):
            assert tensor is not None
            assert tensor.is_cuda
            flow.write(write, name, tensor + 1)
    assert list(came_back) == list(tensors)
    assert all(torch.equal(came_back[name], tensor + 1) for name, tensor in tensors.items())
    seconds = flow.cost()["busy_seconds"]
    assert all(value >= 0 for value in seconds.values())
    assert seconds["copying"] > 0


@pytest.mark.parametrize("method", ["rtn", "nf4", "fp4", "llm-int8"])
def test_a_checkpoint_is_that_of_a_cpu(method: str, tiny_sharded: Path, tmp_path: Path) -> None:
    recipe = Recipe(method=method, **METHOD_DEFAULTS.get(method, {}))
    for device in ("cpu", "cuda"):
        result = quantize.run(str(tiny_sharded), tmp_path / device, recipe, text=TextOptions(), device=device)
        assert (result.bound is None) == (device == "cpu")
    names = sorted(path.name for path in (tmp_path / "cpu").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cuda").iterdir())
    assert filecmp.cmpfiles(tmp_path / "cpu", tmp_path / "cuda", names, shallow=False) == (names, [], [])


def test_too_much_is_halved() -> None:
    """What a GPU cannot hold is refused by torch's allocator at once; what is left works."""
    total = torch.cuda.get_device_properties(GPU).total_memory
    size, made = halving("bytes", 4 * total, lambda count: torch.empty(count, dtype=torch.uint8, device=GPU))
    assert size == len(made) <= total
