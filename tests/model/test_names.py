"""Which stored weights are linears, from names and shapes; checked against the linears that transformers builds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MemoryCheckpoint, in_memory, make_model, save
from torch import nn

from quantool.errors import QuantoolError
from quantool.io import open_checkpoint
from quantool.model.names import find_linears, module_kind

LLAMA = {"model_type": "llama", "num_hidden_layers": 2}


def checkpoint(shapes: dict[str, tuple[int, ...]], **config: Any) -> MemoryCheckpoint:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return MemoryCheckpoint({**LLAMA, **config}, tensors)


def block(index: int, *names: str, family: str = "model.layers.") -> dict[str, tuple[int, ...]]:
    return {f"{family}{index}.{name}.weight": (8, 4) for name in names or ("mlp.up_proj",)}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_candidates_are_the_linears_of_the_network(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    found = find_linears(open_checkpoint(save(model, tmp_path)))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    wanted = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = wanted.pop("lm_head")
    if not tied:
        wanted["embed_out" if family == "gpt_neox" else "lm_head"] = head
    assert found.candidates == {name: tuple(module.weight.shape) for name, module in wanted.items()}
    # What a runtime must not take for quantized is named, also a head that is stored under no or another name.
    assert ("lm_head" in found.others) == (tied or family == "gpt_neox")
    assert not any("embed_tokens" in name or "embed_in" in name for name in found.others)


def test_candidates_are_in_stored_order() -> None:
    names = [*block(1, "mlp.up_proj", "mlp.down_proj"), *block(0, "self_attn.q_proj"), "lm_head.weight"]
    found = find_linears(checkpoint(dict.fromkeys(names, (8, 4))))
    assert list(found.candidates) == [name.removesuffix(".weight") for name in names]


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_transposed_weights_are_refused(model_type: str) -> None:
    found = in_memory(make_model("gpt2"))
    found.config["model_type"] = model_type
    with pytest.raises(QuantoolError, match=f"model_type '{model_type}' stores its weights transposed"):
        find_linears(found)


def test_routers_and_embeddings_are_no_candidates() -> None:
    names = ("mlp.gate", "mlp.gate_proj", "block_sparse_moe.gate", "mlp.shared_expert_gate", "mlp.router")
    experts = ("mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj", "self_attn.q_proj")
    found = find_linears(
        checkpoint(
            {
                **block(0, *names, *experts),
                **block(1, *names, *experts),
                "model.embed_tokens.weight": (16, 4),
                "model.layers.0.input_layernorm.weight": (4,),
                "model.layers.0.conv.weight": (4, 1, 3),
                "lm_head.weight": (16, 4),
                "model.vision.projector.weight": (4, 4),
            }
        )
    )
    wanted = {f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.gate_proj", *experts)}
    assert set(found.candidates) == wanted | {"lm_head"}
    routers = {f"model.layers.{i}.{name}" for i in range(2) for name in names if name != "mlp.gate_proj"}
    assert set(found.others) == routers | {"model.vision.projector"}


def test_the_largest_numbered_family_is_the_decoder() -> None:
    vision = {name: (4, 4) for i in range(9) for name in block(i, family="vision.blocks.")}
    decoder = {name: (9, 9) for i in range(2) for name in block(i)}
    found = find_linears(checkpoint({**vision, **decoder}))
    assert set(found.candidates) == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert {f"vision.blocks.{i}.mlp.up_proj" for i in range(9)} <= set(found.others)


def test_blocks_past_the_last_one_are_left_alone() -> None:
    """An extra prediction head is stored as one more layer."""
    found = find_linears(checkpoint({**block(0), **block(1), **block(2), "lm_head.weight": (16, 4)}))
    assert set(found.candidates) == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"}
    assert found.others == ("model.layers.2.mlp.up_proj",)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_no_candidate_but_a_module_all_the_same(stored: bool) -> None:
    shapes = {**block(0), **block(1), "model.embed_tokens.weight": (16, 4)}
    if stored:
        shapes["lm_head.weight"] = (16, 4)
    found = find_linears(checkpoint(shapes, tie_word_embeddings=True))
    assert "lm_head" not in found.candidates
    assert found.others == ("lm_head",)


def test_nothing_to_quantize_is_one_line() -> None:
    with pytest.raises(QuantoolError, match="no linear weights in numbered decoder blocks") as caught:
        find_linears(checkpoint({"model.embed_tokens.weight": (16, 4), "lm_head.bias": (16,)}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("model.layers.0.mlp.down_proj.weight", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "mlp"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("model.norm.weight", "norm"),
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("embed_out.weight", "head"),
        ("lm_head.weight", "head"),
        ("lm_head.weight_packed", "head"),
        ("model.rotary.inv_freq", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert module_kind(name) == kind
