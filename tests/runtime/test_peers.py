"""Every artifact of another tool: its logits are those of the tool's own library, loaded whole and block by block."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import safetensors.torch
import torch
import transformers

from quantool.data import TextOptions
from quantool.io import open_checkpoint
from quantool.model.blocks import embed, open_head, stream_blocks
from quantool.runtime import PackedCheckpoint, QuantLinear, load, open_model
from quantool.stages import eval_ppl
from quantool.stages.calibrate import sample_windows

# Largest relative difference of logits. Rounding activations makes steps of what differs between machines in the last
# bit; auto-round computes in float16.
PEERS = {
    "ar-auto_awq": 1e-5,
    "ar-auto_gptq": 1e-5,
    "ar-auto_round": 2e-3,
    "bnb-int8": 5e-3,
    "bnb-nf4": 1e-5,
    "bnb-nf4-dq": 1e-5,
    "ct-mixed-w4-w8": 1e-5,
    "ct-w3a16-sym-g64": 1e-5,
    "ct-w4a16-asym-g64-gptq": 1e-5,
    "ct-w4a16-sym-g128": 1e-5,
    "ct-w8a16-channel": 1e-5,
    "ct-w8a8-smoothquant": 2e-3,
    "ct-w8a8-static": 2e-3,
}


@cache
def golden(shared: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(shared / "golden/peer-logits.safetensors")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_these_are_all(shared: Path) -> None:
    assert {path.name for path in (shared / "peers").iterdir()} == set(PEERS)
    assert set(golden(shared)) == {*PEERS, "input_ids", "tinystories-656k"}


@pytest.mark.parametrize("peer", PEERS)
def test_logits_are_those_of_the_tool(peer: str, shared: Path) -> None:
    tensors, model = golden(shared), load(shared / "peers" / peer)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    assert relative(logits(model, tensors["input_ids"]), tensors[peer]) < PEERS[peer]


@pytest.mark.parametrize("peer", PEERS)
def test_block_by_block_is_the_same(peer: str, shared: Path) -> None:
    ids, opened = golden(shared)["input_ids"], open_model(shared / "peers" / peer)
    with torch.inference_mode():
        states = embed(opened, ids, batch_size=len(ids))
        for _ in stream_blocks(opened, states):
            pass
        with open_head(opened, states) as head:
            found = torch.stack([head(row[None]) for row in states.hidden[0]])
    assert all(tensor.is_meta for tensor in opened.model.state_dict().values())
    assert relative(found, logits(load(shared / "peers" / peer), ids)) < 1e-6


@pytest.mark.parametrize("peer", PEERS)
def test_the_perplexity_is_that_of_its_logits(peer: str, shared: Path, tmp_path: Path) -> None:
    directory, sample = shared / "peers" / peer, tmp_path / "text.txt"
    sample.write_text((shared / "data/stories.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    text = TextOptions(dataset=str(sample), num_samples=3, seq_len=48)
    found = eval_ppl.run(str(directory), text=text, batch_size=1)  # outlier channels of LLM.int8() are those of a batch
    windows, model = sample_windows(open_model(directory), text), load(directory)
    losses = [
        torch.nn.functional.cross_entropy(logits(model, window[None])[0, :-1].double(), window[1:].long())
        for window in windows
    ]
    assert found.tokens == 3 * 47
    assert found.perplexity == pytest.approx(math.exp(sum(map(float, losses)) / 3), rel=1e-5)


@pytest.mark.parametrize("peer", PEERS)
def test_its_weights_are_near_those_it_was_made_from(peer: str, shared: Path) -> None:
    """Not those of smoothquant and AWQ, whose scales lie elsewhere in part."""
    opened = open_model(shared / "peers" / peer).checkpoint.stored
    assert isinstance(opened, PackedCheckpoint)
    source = open_checkpoint(shared / "models/tinystories-656k")
    assert len(opened.schemes) == 14
    for module, scheme in opened.schemes.items():
        weight = source.read(f"{module}.weight").float()
        found = opened.dequantized(module)
        assert opened.weight_shape(module) == found.shape == weight.shape
        if "smoothquant" not in peer:
            assert relative(found, weight) < {3: 0.25, 4: 0.15, 8: 0.02}[scheme.bits]


@pytest.mark.parametrize("peer", [peer for peer in PEERS if not peer.startswith("ar-")])
def test_logits_are_those_of_its_library_here(peer: str, shared: Path) -> None:
    """On one machine activations are rounded alike, and little is left."""
    ids = golden(shared)["input_ids"]
    config = transformers.AutoConfig.from_pretrained(shared / "peers" / peer)
    if "asym" in peer:  # transformers 5.23 expects unpacked zero points unless it dequantizes
        config.quantization_config["dequantize"] = True
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        shared / "peers" / peer, config=config, dtype=torch.float32
    )
    for module in wanted.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # or else it computes in bfloat16
    assert relative(logits(load(shared / "peers" / peer), ids), logits(wanted, ids)) < 1e-5


def test_the_float_model(shared: Path) -> None:
    tensors = golden(shared)
    found = logits(load(shared / "models/tinystories-656k"), tensors["input_ids"])
    assert relative(found, tensors["tinystories-656k"]) < 1e-4
