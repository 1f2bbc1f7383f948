"""convert-gguf on every architecture and to every type, in the real llama.cpp and read back."""

from pathlib import Path

import llamacpp
import pytest
import torch
from gguf_families import FIRST, reference, save_case, tokens, wide

from quantool.formats.ggml.mixes import MIXES
from quantool.io import open_checkpoint
from quantool.model.skeleton import materialise, open_network
from quantool.model.views import as_linears
from quantool.scheme import GgufOptions
from quantool.stages import convert_gguf

# Root mean square over the logits of a token, which are about 1, and the middle of all tokens (one that goes to another
# expert is off by more). llama.cpp rounds what it multiplies with a quantized matrix to 8 bits as well.
INPUT_NOISE = 0.05


def noise(difference: torch.Tensor) -> float:
    return float(difference.square().mean(-1).sqrt().median())


def logits(path: Path) -> torch.Tensor:
    """By transformers, from the weights that we read in the file."""
    network = open_network(open_checkpoint(path))
    materialise(network, list(network.names))
    return reference(network.model, tokens())


@pytest.mark.parametrize("name", FIRST.values())
def test_every_architecture_runs_in_q4_k_m(name: str, tmp_path: Path) -> None:
    model = save_case(name, tmp_path / "hf", **wide(name))
    result = convert_gguf.run(str(tmp_path / "hf"), tmp_path / "m.gguf", GgufOptions(outtype="q4_k_m"))
    assert set(result.types) - {"F32"} == {"Q4_K", "Q6_K"}
    found = logits(tmp_path / "m.gguf")
    assert noise(torch.from_numpy(llamacpp.logits(tmp_path / "m.gguf", tokens())) - found) < INPUT_NOISE
    assert INPUT_NOISE < noise(reference(model, tokens()) - found) < 0.6  # the weights are random, and 4 bits coarse


@pytest.mark.parametrize("outtype", sorted(set(MIXES) - {"q2_k_s"}))  # which needs an importance matrix
def test_every_type_runs(outtype: str, tmp_path: Path) -> None:
    save_case("llama-llama-plain", tmp_path / "hf", **wide("llama-llama-plain"))
    convert_gguf.run(str(tmp_path / "hf"), tmp_path / "m.gguf", GgufOptions(outtype=outtype))
    difference = logits(tmp_path / "m.gguf") - torch.from_numpy(llamacpp.logits(tmp_path / "m.gguf", tokens()))
    assert noise(difference) < {"f32": 1e-5, "f16": 0.002, "bf16": 0.01}.get(outtype, INPUT_NOISE)


@pytest.mark.parametrize("name", FIRST.values())
def test_blocks_are_read_in_the_order_of_hugging_face(name: str, tmp_path: Path) -> None:
    """Within the rounding of Q8_0 every weight is what it was: rows, slices of stacks and columns are in place."""
    save_case(name, tmp_path / "hf")
    convert_gguf.run(str(tmp_path / "hf"), tmp_path / "m.gguf", GgufOptions(outtype="q8_0"))
    original, checkpoint = (as_linears(open_checkpoint(tmp_path / place)) for place in ("hf", "m.gguf"))
    stored = {tensor for tensor, info in checkpoint.infos.items() if info.dtype == "Q8_0"}
    assert len(stored) > 8
    for tensor in stored:
        wanted = original.read(tensor)
        torch.testing.assert_close(checkpoint.read(tensor), wanted, rtol=0, atol=float(wanted.abs().max()) / 127)
