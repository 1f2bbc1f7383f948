"""Which stored weights are linears, from names and shapes; checked against the linears that transformers builds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, MemoryCheckpoint, in_memory, make_model, multi_modal, save, wide
from torch import nn

from quantool.errors import QuantoolError
from quantool.io import open_checkpoint
from quantool.model.names import find_linears, fused_sets, module_kind
from quantool.model.skeleton import open_network

LLAMA = {"model_type": "llama", "num_hidden_layers": 2}


def checkpoint(shapes: dict[str, tuple[int, ...]], **config: Any) -> MemoryCheckpoint:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return MemoryCheckpoint({**LLAMA, **config}, tensors)


def block(index: int, *names: str, family: str = "model.layers.") -> dict[str, tuple[int, ...]]:
    return {f"{family}{index}.{name}.weight": (8, 4) for name in names or ("mlp.up_proj",)}


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_the_linears_of_the_network(family: str, tmp_path: Path) -> None:
    """Under the names of the checkpoint, [N, K] also where that stores [K, N]; without routers."""
    checkpoint = open_checkpoint(save(make_model(family), tmp_path))
    found = find_linears(checkpoint)
    network = open_network(checkpoint)
    model, names = network.model, network.names
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if tied:
        del linears["lm_head"]
    wanted = {names[f"{name}.weight"].removesuffix(".weight"): tuple(m.weight.shape) for name, m in linears.items()}
    gates = {name for name in wanted if name.endswith("shared_expert_gate")}
    assert len(gates) == (2 if family == "qwen2_moe" else 0)
    assert found.candidates == {name: shape for name, shape in wanted.items() if name not in gates}
    routers = {
        names[f"{n}.weight"].removesuffix(".weight") for n, m in model.named_modules() if "Router" in str(type(m))
    }
    assert bool(routers) == (family in MIXTURES)
    assert gates | routers <= set(found.others)
    # What a runtime must not take for quantized is named, also a head that is stored under no or another name.
    assert ("lm_head" in found.others) == (tied or family == "gpt_neox")
    assert not any("embed_tokens" in name or "embed_in" in name for name in found.others)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_wide_families_divide_into_groups_of_32(family: str) -> None:
    """What tests that quantize rely on."""
    found = find_linears(in_memory(make_model(family, **wide(family))))
    assert {columns % 32 for _, columns in found.candidates.values()} == {0}


def test_candidates_are_in_stored_order() -> None:
    names = [*block(1, "mlp.up_proj", "mlp.down_proj"), *block(0, "self_attn.q_proj"), "lm_head.weight"]
    found = find_linears(checkpoint(dict.fromkeys(names, (8, 4))))
    assert list(found.candidates) == [name.removesuffix(".weight") for name in names]


@pytest.mark.parametrize(("model_type", "shape"), [("gpt2", (4, 8)), ("openai-gpt", (4, 8)), ("llama", (8, 4))])
def test_shapes_are_those_of_linears(model_type: str, shape: tuple[int, int]) -> None:
    """Conv1D stores [in_features, out_features]."""
    found = find_linears(checkpoint(block(0, "attn.c_attn", family="h."), model_type=model_type, num_hidden_layers=1))
    assert found.candidates == {"h.0.attn.c_attn": shape}


def test_fused_experts_are_a_linear_for_each_projection() -> None:
    shapes = {"model.layers.0.mlp.experts.gate_up_proj": (3, 10, 4), "model.layers.0.mlp.experts.down_proj": (3, 4, 5)}
    found = find_linears(checkpoint({**block(0, "mlp.gate"), **shapes}, num_hidden_layers=1))
    assert found.others == ("model.layers.0.mlp.gate", "lm_head")
    assert found.candidates == {
        f"model.layers.0.mlp.experts.{expert}.{leaf}": shape
        for leaves in ((("gate_proj", (5, 4)), ("up_proj", (5, 4))), (("down_proj", (4, 5)),))
        for expert in range(3)
        for leaf, shape in leaves
    }


def test_stacks_of_unknown_layout_are_said() -> None:
    """llama4 stores [E, K, 2I], granitemoe has other names; a convolution is no stack."""
    shapes = {
        "model.layers.0.feed_forward.experts.gate_up_proj": (3, 4, 10),
        "model.layers.0.feed_forward.experts.down_proj": (3, 5, 4),
        "model.layers.0.block_sparse_moe.input_linear.weight": (3, 10, 4),
        "model.layers.0.mixer.conv1d.weight": (8, 1, 4),
        "model.layers.0.mlp.experts.gate_up_proj": (3, 10, 4),
        "model.layers.0.mlp.experts.down_proj": (3, 4, 5),
        "visual.blocks.0.experts.down_proj": (3, 5, 4),
    }
    found = find_linears(checkpoint({**block(0, "self_attn.q_proj"), **shapes}, num_hidden_layers=1))
    assert found.stacks == tuple(list(shapes)[:3])
    assert len(found.candidates) == 10


def test_routers_and_embeddings_are_no_candidates() -> None:
    routers = (
        "mlp.gate",
        "block_sparse_moe.gate",
        "mlp.shared_expert_gate",
        "mlp.router",
        "mlp.gate.wg",
        "router.layer",
    )
    names = (*routers, "mlp.gate_proj")
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
    left = {f"model.layers.{i}.{name}" for i in range(2) for name in routers}
    assert set(found.others) == left | {"model.vision.projector"}


def test_the_largest_numbered_family_is_the_decoder() -> None:
    vision = {name: (4, 4) for i in range(9) for name in block(i, family="vision.blocks.")}
    decoder = {name: (9, 9) for i in range(2) for name in block(i)}
    found = find_linears(checkpoint({**vision, **decoder}))
    assert set(found.candidates) == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert {f"vision.blocks.{i}.mlp.up_proj" for i in range(9)} <= set(found.others)


def test_the_decoder_is_beside_embeddings() -> None:
    """A vision tower may be larger, and as deep."""
    vision = {name: (99, 99) for i in range(2) for name in block(i, family="model.visual.blocks.")}
    decoder = {name: (9, 9) for i in range(2) for name in block(i, family="model.language_model.layers.")}
    embeddings = {"model.language_model.embed_tokens.weight": (16, 9), "model.visual.pos.patch_embed.weight": (16, 9)}
    found = find_linears(checkpoint({**vision, **decoder, **embeddings}))
    assert set(found.candidates) == {name.removesuffix(".weight") for name in decoder}


@pytest.mark.parametrize("config", [{"num_hidden_layers": 3}, {"text_config": {"num_hidden_layers": 3}}])
def test_the_decoder_is_as_deep_as_the_config_says(config: dict[str, Any]) -> None:
    """One wide further prediction head, with linears of its own."""
    head = dict.fromkeys(block(0, family="mtp.layers."), (99, 99))
    decoder = {name: (9, 9) for i in range(3) for name in block(i)}
    found = find_linears(checkpoint({**head, **decoder}, **{"num_hidden_layers": None, **config}))
    assert set(found.candidates) == {name.removesuffix(".weight") for name in decoder}
    assert found.others == ("mtp.layers.0.mlp.up_proj", "lm_head")


def test_a_multi_modal_checkpoint(tmp_path: Path) -> None:
    found = find_linears(open_checkpoint(save(multi_modal(), tmp_path)))
    assert len(found.candidates) == 14
    assert all(name.startswith("language_model.model.layers.") for name in found.candidates)
    assert any(name.startswith("vision_tower.") for name in found.others)


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


@pytest.mark.parametrize(
    ("names", "sets"),
    [
        ([], []),
        (["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"], []),
        (
            [
                "self_attn.k_proj",
                "mlp.up_proj",
                "self_attn.v_proj",
                "self_attn.q_proj",
                "mlp.gate_proj",
                "mlp.down_proj",
            ],
            [("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), ("mlp.up_proj", "mlp.gate_proj")],
        ),
        (["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj", "self_attn.kv_b_proj"], [(0, 1)]),
        (["mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.7.down_proj", "mlp.gate"], [(0, 1, 2)]),
        (
            ["block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.1.w3", "block_sparse_moe.experts.1.w2"],
            [(0, 1, 2)],
        ),
        (["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"], [(0, 2)]),
        (
            [
                "mlp.experts.0.up_proj",
                "mlp.shared_experts.up_proj",
                "mlp.shared_experts.gate_proj",
                "mlp.experts.0.down_proj",
            ],
            [(0, 3), (1, 2)],
        ),
    ],
)
def test_what_runtimes_fuse(names: list[str], sets: list[Any]) -> None:
    """A set is of one block."""
    wanted = [tuple(names[i] if isinstance(i, int) else i for i in found) for found in sets]
    both = [f"{prefix}{name}" for name in names for prefix in ("model.layers.0.", "model.layers.1.")]
    found = fused_sets(both)
    assert found == [tuple(f"model.layers.{i}.{name}" for name in one) for one in wanted for i in range(2)]


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "deepseek_v3", "gpt2", "phi3"])
def test_fused_sets_of_families(family: str, tmp_path: Path) -> None:
    names = list(find_linears(open_checkpoint(save(make_model(family), tmp_path))).candidates)
    found = [one for one in fused_sets(names) if ".1." in one[0]]
    sizes = {
        "llama": [2, 3],
        "mixtral": [3, 12],
        "qwen2_moe": [2, 3, 15],
        "deepseek_v3": [2, 2, 12],
        "gpt2": [],
        "phi3": [],
    }
    assert sorted(map(len, found)) == sizes[family]
    assert len({name for one in found for name in one}) == sum(map(len, found))
