"""Weight-only conversion with the encoders of CUDA, in the emulator: the files are those of a CPU, byte for byte."""

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_files
from emulated import Emulated

from quantool.data import TextOptions
from quantool.kernels import cuda, ggml, nf4, rtn
from quantool.methods import nf4 as nf4_method
from quantool.recipe import METHOD_DEFAULTS, Recipe
from quantool.scheme import GgufOptions
from quantool.stages import convert_gguf, quantize

Launched = set[str]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The emulator runs one launch at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def launched(one_thread: None, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """The launchers that ran, instead of what a CPU would compute."""
    names: Launched = set()
    call = cuda.call

    def recorded(name: str, *arguments: Any) -> None:
        names.add(name)
        call(name, *arguments)

    monkeypatch.setattr(cuda, "call", recorded)
    monkeypatch.setattr(rtn, "group_range", rtn.group_range_cuda)
    monkeypatch.setattr(rtn, "quantize_affine", rtn.quantize_affine_cuda)
    monkeypatch.setattr(nf4_method, "quantize_levels", nf4.quantize_levels_cuda)
    monkeypatch.setattr(ggml, "ggml_blocks", ggml.ggml_blocks_cuda)
    return names


@pytest.mark.parametrize(
    ("recipe", "kernels"),
    [
        (Recipe(method="rtn", group_size=32), {"quantool_group_range", "quantool_quantize_affine"}),
        (Recipe(method="rtn", group_size=64, sym=False), {"quantool_group_range", "quantool_quantize_affine"}),
        (Recipe(method="rtn", bits=8, group_size=-1), {"quantool_group_range", "quantool_quantize_affine"}),
        (Recipe(method="nf4", **METHOD_DEFAULTS["nf4"]), {"quantool_nf4_encode"}),
    ],
    ids=["sym", "asym", "channel", "nf4"],
)
def test_every_method_writes_the_same_bytes(
    recipe: Recipe, kernels: Launched, tiny_llama: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def run(output: Path) -> None:
        quantize.run(str(tiny_llama), output, recipe, text=TextOptions(), device="cpu")

    run(tmp_path / "cpu")
    names: Launched = request.getfixturevalue("launched")
    run(tmp_path / "emulated")
    assert names == kernels
    assert same_files(tmp_path / "cpu", tmp_path / "emulated")


@pytest.mark.parametrize("outtype", ["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q4_0", "q5_1", "q8_0", "iq4_xs"])
def test_every_mix_writes_the_same_bytes(
    outtype: str, tiny_llama: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def run(output: Path) -> None:
        convert_gguf.run(str(tiny_llama), output, GgufOptions(outtype), device="cpu")

    run(tmp_path / "cpu.gguf")
    names: Launched = request.getfixturevalue("launched")
    run(tmp_path / "emulated.gguf")
    assert names
    assert filecmp.cmp(tmp_path / "cpu.gguf", tmp_path / "emulated.gguf", shallow=False)
