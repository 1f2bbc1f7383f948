"""The block stream against the whole model of transformers: same logits, one block in memory at a time."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, SIZES, in_memory, make_model, multi_modal, save, tokens

from quantool.io import open_checkpoint
from quantool.model.blocks import Block, States, embed, open_head, stream_blocks
from quantool.model.skeleton import Network, open_network
from quantool.runtime import open_model

WINDOWS = tokens(5, 21)  # longer than what the blocks are probed with, and than the sliding windows


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def opened(model: Any, directory: Path) -> Network:
    return open_model(save(model, directory))


def start(model: Network, windows: torch.Tensor = WINDOWS, batch_size: int = 2) -> States:
    return embed(model, windows, batch_size=batch_size)


def stream(model: Network, states: States) -> Iterator[Block]:
    return stream_blocks(model, states)


def finish(model: Network, states: States, chunk: int = 1000) -> torch.Tensor:
    """Logits of every window, the head applied to `chunk` tokens at a time."""
    with open_head(model, states) as head:
        rows = [
            torch.cat([head(part) for part in row[None].split(chunk, dim=1)])
            for batch in states.hidden
            for row in batch
        ]
    return torch.stack(rows)


def live(model: Network) -> set[str]:
    """Parameters with memory."""
    return {name for name, parameter in model.model.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    found = opened(model, tmp_path)
    states = start(found)
    assert [hidden.shape[0] for hidden in states.hidden] == [2, 2, 1]
    assert live(found) == set()
    for block in stream(found, states):
        assert block.name == found.block_names[block.index]
        assert live(found) == {f"{block.name}.{name}" for name, _ in block.module.named_parameters()}
    assert live(found) == set()
    wanted = model(input_ids=WINDOWS).logits
    assert wanted.abs().max() > 1
    torch.testing.assert_close(finish(found, states), wanted, rtol=0, atol=1e-5)
    assert live(found) == set()


def test_a_multi_modal_model_is_streamed_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vision tower is not even read."""
    model = multi_modal()
    found = opened(model, tmp_path)
    seen = []
    read = found.checkpoint.read
    monkeypatch.setattr(found.checkpoint, "read", lambda name: seen.append(name) or read(name))
    states = start(found)
    assert [block.name for block in stream(found, states)] == [f"model.language_model.layers.{i}" for i in range(2)]
    torch.testing.assert_close(finish(found, states), model(input_ids=WINDOWS).logits, rtol=0, atol=1e-5)
    assert len(seen) > 20
    assert all(name.startswith("language_model.") for name in seen)


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "cohere"])
@pytest.mark.parametrize("chunk", [1, 8, 21])
def test_the_head_takes_any_number_of_tokens(family: str, chunk: int, tmp_path: Path) -> None:
    model = make_model(family)
    found = opened(model, tmp_path)
    states = start(found)
    for _ in stream(found, states):
        pass
    torch.testing.assert_close(finish(found, states, chunk), model(input_ids=WINDOWS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [2, 16, 17, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_any_window_length_and_batch_size(length: int, batch_size: int, tmp_path: Path) -> None:
    """Also windows shorter than the probe, and of exactly its length; mistral's mask depends on the length."""
    model = make_model("mistral")
    found = opened(model, tmp_path)
    windows = tokens(3, length)
    states = start(found, windows, batch_size)
    for _ in stream(found, states):
        pass
    torch.testing.assert_close(finish(found, states), model(input_ids=windows).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3"])
def test_every_block_is_called_as_its_own_kind(family: str, tmp_path: Path) -> None:
    """Sliding and full attention, with and without rotary inputs: per layer, not per model."""
    found = opened(make_model(family), tmp_path)
    states = start(found)
    same = states.hidden[0].clone()
    outputs = [block.run(same) for block in stream(found, states)]
    assert len(outputs) == len(found.block_names)
    calls = states.calls[same.shape]
    assert len(calls) == len(outputs)
    if family == "gemma3_text":
        masks = [kwargs["attention_mask"] for _, kwargs in calls]
        assert masks[0] is not None  # window 8 of 21 tokens
        assert masks[1] is None or not torch.equal(masks[0], masks[1])


def test_parameters_in_memory_are_those_of_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a block is swapped for the next one: counted at every read."""
    found = opened(make_model("llama"), tmp_path)
    states = start(found)
    largest = 0
    read = found.checkpoint.read

    def count(name: str) -> torch.Tensor:
        nonlocal largest
        parameters = found.model.parameters()
        largest = max(largest, sum(p.numel() for p in parameters if not p.is_meta))
        return read(name)

    monkeypatch.setattr(type(found.checkpoint), "read", lambda _self, name: count(name))
    for _ in stream(found, states):
        pass
    one_block = sum(p.numel() for p in found.blocks[0].parameters())
    assert 0 < largest < one_block


def test_embedding_does_not_read_the_head_nor_other_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(make_model("llama", tie_word_embeddings=False), tmp_path)
    seen = []
    read = found.checkpoint.read
    monkeypatch.setattr(type(found.checkpoint), "read", lambda _self, name: seen.append(name) or read(name))
    start(found)
    assert "model.embed_tokens.weight" in seen
    assert "lm_head.weight" not in seen
    assert not [name for name in seen if name.startswith(("model.layers.1.", "model.layers.2."))]


def test_what_the_consumer_does_to_the_weights_is_what_the_next_block_sees(tmp_path: Path) -> None:
    model = make_model("llama")
    found = opened(model, tmp_path)
    states = start(found)
    for block in stream(found, states):
        if block.index == 0:
            block.linears["model.layers.0.mlp.down_proj"].weight.mul_(-2)
        if block.index == 2:
            block.module.input_layernorm.weight.zero_()
    wanted = make_model("llama")
    wanted.model.layers[0].mlp.down_proj.weight.mul_(-2)
    wanted.model.layers[2].input_layernorm.weight.zero_()
    logits = wanted(input_ids=WINDOWS).logits
    torch.testing.assert_close(finish(found, states), logits, rtol=0, atol=1e-5)
    assert not torch.allclose(logits, model(input_ids=WINDOWS).logits, atol=0.1)


def test_the_mapped_file_is_never_changed(tmp_path: Path) -> None:
    """Weights that need no cast would be views of the mapping, if they were not copied."""
    found = opened(make_model("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    for block in stream(found, start(found)):
        for parameter in block.module.parameters():
            parameter.zero_()
            parameter.add_(7)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    again = open_checkpoint(tmp_path)
    assert not any((found.checkpoint.read(name) == 7).all() for name in found.checkpoint.infos)
    assert all(torch.equal(found.checkpoint.read(name), again.read(name)) for name in again.infos)


def test_the_windows_are_not_changed_and_streams_are_independent(tmp_path: Path) -> None:
    found = opened(make_model("llama"), tmp_path)
    windows = WINDOWS.clone()
    results = []
    for _ in range(2):
        states = start(found, windows)
        for _ in stream(found, states):
            pass
        results.append(finish(found, states))
    assert torch.equal(windows, WINDOWS)
    assert torch.equal(results[0], results[1])


def test_linears_have_their_full_names_and_replay_passes_every_batch(tmp_path: Path) -> None:
    found = opened(make_model("llama"), tmp_path)
    states = start(found)
    for block in stream(found, states):
        attention = {f"self_attn.{x}_proj" for x in "qkvo"}
        names = attention | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
        assert set(block.linears) == {f"model.layers.{block.index}.{name}" for name in names}
        seen: list[torch.Tensor] = []
        name = f"{block.name}.self_attn.q_proj"
        hook = block.linears[name].register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        before = [hidden.clone() for hidden in states.hidden]
        outputs = [output.clone() for output in block.replay()]
        hook.remove()
        assert [tuple(x.shape) for x in seen] == [(2, 21, 32), (2, 21, 32), (1, 21, 32)]
        assert all(map(torch.equal, before, states.hidden))
        assert torch.equal(outputs[0], block.run(states.hidden[0]))
        assert torch.equal(block.probe(), states.hidden[0][:1, :16])
        assert block.run(block.probe()).shape == (1, 16, 32)
        # Causal: a prefix gives the prefix of the output.
        torch.testing.assert_close(block.run(block.probe()), outputs[0][:1, :16], rtol=0, atol=1e-5)


def test_the_forward_of_every_block_is_its_own_again_after_a_failure(tmp_path: Path) -> None:
    found = opened(make_model("llama"), tmp_path)
    with pytest.raises(IndexError):
        start(found, torch.full((1, 8), SIZES["vocab_size"] + 5))
    assert not any("forward" in vars(block) for block in found.blocks)
    states = start(found)
    for _ in stream(found, states):
        pass
    assert finish(found, states).isfinite().all()
    assert not any("forward" in vars(block) for block in found.blocks)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.15)])
def test_a_checkpoint_in_half_precision(dtype: str, tolerance: float, tmp_path: Path) -> None:
    found = open_model(save(make_model("gemma2").to(torch.bfloat16), tmp_path), dtype=dtype)
    wanted = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted)
    states = start(found)
    for block in stream(found, states):
        assert {parameter.dtype for parameter in block.module.parameters()} == {wanted}
    logits = finish(found, states)
    assert logits.dtype == wanted
    torch.testing.assert_close(logits, model(input_ids=WINDOWS).logits, rtol=0, atol=tolerance)


def test_a_checkpoint_needs_no_file() -> None:
    """The stream takes any Checkpoint; tied and in memory here."""
    model = make_model("gemma")
    checkpoint = in_memory(model)
    network = open_network(checkpoint)
    found = network
    states = start(found)
    for _ in stream(found, states):
        pass
    torch.testing.assert_close(finish(found, states), model(input_ids=WINDOWS).logits, rtol=0, atol=1e-5)
