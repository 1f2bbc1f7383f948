import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import MemoryCheckpoint, in_memory, make_model
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_families import CASES, make
from gguf_files import assembled, write_gguf

from quantool.errors import QuantoolError
from quantool.io import open_checkpoint
from quantool.io.gguf import GgufCheckpoint
from quantool.io.gguf import checkpoint as checkpoint_module
from quantool.io.gguf.architectures import ARCHITECTURES, find_architecture
from quantool.io.gguf.file import GgufFile
from quantool.io.gguf.keys import settings_of
from quantool.io.gguf.tensors import check_tied, targets
from quantool.model.skeleton import open_network
from quantool.model.views import as_linears

ROWS = list(ARCHITECTURES.values())
TIED = {"tie_word_embeddings": True}


def tiny(family: str, **changes: Any) -> MemoryCheckpoint:
    return in_memory(make_model(family, **changes))


def wanted(checkpoint: MemoryCheckpoint) -> tuple[dict[str, Any], dict[str, str]]:
    """Targets by name, and what is dropped."""
    linears = as_linears(checkpoint)
    found, dropped = targets(find_architecture(linears.config), linears.infos, linears.config)
    assert len({target.name for target in found}) == len(found)
    return {target.name: target for target in found}, dropped


def refused(checkpoint: MemoryCheckpoint) -> str:
    with pytest.raises(QuantoolError) as caught:
        wanted(checkpoint)
    assert "\n" not in caught.value.message
    return caught.value.message


# --- the table


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_names_are_those_of_the_gguf_package(row: Any) -> None:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[row.name], 3)
    for stem, module in row.outside.items():
        assert names.get_name(module) == stem
    inside = {**row.block, **{stem: re.sub(r"(\.norms)?\.\{\}", "", module) for stem, module in row.stacks.items()}}
    for stem, module in inside.items():
        assert names.get_name(f"{row.blocks}.2.{module}") == f"blk.2.{stem}"
    stems = {*row.outside, *inside}
    known = {gguf.TENSOR_NAMES[kind].removeprefix("blk.{bid}.") for kind in gguf.MODEL_TENSORS[kinds[row.name]]}
    assert stems <= known
    words = row.optional | row.biases | set(row.orders) | row.plus_one | row.transposed | row.vectors | set(row.counts)
    assert words <= stems
    assert set(row.counts) == set(row.stacks)
    assert {suffix for _, suffix in row.orders.values()} <= {key.gguf for key in row.keys}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """Names, shapes and bits; only where 1 is added to a gain, and taken off again, is there rounding."""
    original = in_memory(make(name))
    path = tmp_path / "m.gguf"
    dropped = write_gguf(path, original)
    assert not dropped
    back, linears = as_linears(open_checkpoint(path)), as_linears(original)
    row = ARCHITECTURES[CASES[name].architecture]
    # A head that llama.cpp wants beside the embedding it is tied to is read as one of its own.
    twice = (
        {f"{row.outside.get('output')}.weight"}
        if row.head_required and original.config.get("tie_word_embeddings")
        else set()
    )
    assert set(back.infos) == set(linears.infos) | twice
    written = {key.removeprefix(f"{row.name}."): value for key, value in GgufFile(path).fields.items()}
    settings = settings_of(row, back.config)
    for key in settings_of(row, original.config):
        assert not written.get(key) or settings[key] == pytest.approx(written[key])
    rounding = 2e-7 if row.plus_one else 0
    for tensor in linears.infos:
        assert back.infos[tensor].shape == linears.infos[tensor].shape
        torch.testing.assert_close(back.read(tensor), linears.read(tensor), rtol=0, atol=rounding)
        back.drop(tensor)


def test_rows_of_q_and_k_are_as_the_converter_has_them() -> None:
    """Two heads of four channels: a0 a1 b0 b1 c0 c1 d0 d1 -> a0 b0 a1 b1 c0 d0 c1 d1."""
    found, _ = wanted(tiny("llama", head_dim=4, num_attention_heads=2, num_key_value_heads=1))
    assert found["blk.1.attn_q.weight"].rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert found["blk.1.attn_k.weight"].rows.tolist() == [0, 2, 1, 3]
    assert found["blk.1.attn_v.weight"].rows is None
    assert [name for name in found if "blk" not in name] == ["token_embd.weight", "output_norm.weight", "output.weight"]


def test_order_is_embedding_blocks_norm_head() -> None:
    found, _ = targets(
        ARCHITECTURES["qwen2"], tiny("qwen2", num_hidden_layers=12).infos, tiny("qwen2", num_hidden_layers=12).config
    )
    blocks = [int(match[1]) for target in found if (match := re.match(r"blk\.(\d+)\.", target.name))]
    assert blocks == sorted(blocks)
    assert [found[0].name, *(target.name for target in found[-2:])] == [
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    ]


# --- names that the hub uses


def renamed(checkpoint: MemoryCheckpoint, *changes: tuple[str, str]) -> MemoryCheckpoint:
    tensors = checkpoint.tensors
    for old, new in changes:
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    assert set(tensors) != set(checkpoint.tensors)
    return replace(checkpoint, tensors=tensors)


ALIASES = {
    "mixtral": [
        (r"block_sparse_moe", "mlp"),
        (r"(experts\.\d+)\.w1", r"\1.gate_proj"),
        (r"(experts\.\d+)\.w2", r"\1.down_proj"),
        (r"(experts\.\d+)\.w3", r"\1.up_proj"),
    ],
    "llama": [(r"^model\.", "")],
    "gpt2": [(r"^transformer\.", "")],
    "olmoe": [(r"^model\.", "")],
    "gpt_neox": [(r"^gpt_neox\.", "")],
}


@pytest.mark.parametrize("family", ALIASES)
def test_other_names_of_the_same_tensors(family: str) -> None:
    original = tiny(family)
    other = renamed(original, *ALIASES[family])
    expected, _ = wanted(original)
    found, _ = wanted(other)
    assert list(found) == list(expected)
    for name, target in found.items():
        data = assembled(target, as_linears(other))
        assert torch.equal(data, assembled(expected[name], as_linears(original))), name


def test_buffers_of_old_checkpoints_are_dropped() -> None:
    checkpoint = tiny("llama")
    checkpoint.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    _, dropped = wanted(checkpoint)
    assert dropped == {"model.layers.1.self_attn.rotary_emb.inv_freq": "a buffer that is computed"}


# --- the head


def test_a_head_that_is_the_embedding_is_written_once(tmp_path: Path) -> None:
    checkpoint = tiny("llama", **TIED)
    assert "lm_head.weight" not in checkpoint.tensors
    alone, dropped = wanted(checkpoint)
    assert not dropped
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"].clone()
    found, dropped = wanted(checkpoint)
    assert list(found) == list(alone)
    assert list(dropped) == ["lm_head.weight"]
    check_tied(checkpoint, dropped)
    checkpoint.tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(QuantoolError, match=r"'lm_head.weight' is not the embedding"):
        check_tied(checkpoint, dropped)
    write_gguf(tmp_path / "m.gguf", checkpoint)
    assert open_checkpoint(tmp_path / "m.gguf").config["tie_word_embeddings"] is True


def test_either_of_two_tied_matrices_may_be_the_one_that_is_stored() -> None:
    checkpoint = tiny("llama", **TIED)
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors.pop("model.embed_tokens.weight")
    found, dropped = wanted(checkpoint)
    assert (found["token_embd.weight"].sources, dropped) == (("lm_head.weight",), {})


def test_an_architecture_that_wants_its_head_gets_it_twice() -> None:
    found, _ = wanted(tiny("olmoe", num_key_value_heads=4, **TIED))
    assert found["output.weight"].sources == found["token_embd.weight"].sources == ("model.embed_tokens.weight",)


def test_a_head_that_is_missing() -> None:
    checkpoint = tiny("llama")
    del checkpoint.tensors["lm_head.weight"]
    assert "there is no tensor for 'output.weight'" in refused(checkpoint)


# --- experts


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_are_stacked_in_order(family: str) -> None:
    checkpoint = tiny(family)
    found, _ = wanted(checkpoint)
    owner, words = (
        ("block_sparse_moe", ("w1", "w3", "w2"))
        if family == "mixtral"
        else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    for stem, word in zip(("gate", "up", "down"), words, strict=True):
        target = found[f"blk.1.ffn_{stem}_exps.weight"]
        names = [f"model.layers.1.{owner}.experts.{i}.{word}.weight" for i in range(len(target.sources))]
        assert list(target.sources) == names
        assert target.shape == (len(names), *checkpoint.tensors[names[0]].shape)


def rounded(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """What a block type makes of a tensor, by the gguf package."""
    return torch.from_numpy(
        dequantize(quantize(tensor.numpy(), GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
    )


def test_one_expert_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a stack are decoded for the slice that is asked for."""
    original = tiny("qwen3_moe", moe_intermediate_size=32)
    write_gguf(tmp_path / "m.gguf", original, kinds={"blk.1.ffn_down_exps.weight": "Q5_0"})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    decoded: list[tuple[int, ...]] = []
    real = checkpoint_module.decode
    monkeypatch.setattr(
        checkpoint_module, "decode", lambda rows, tensor: decoded.append(rows.shape) or real(rows, tensor)
    )
    for i in range(4):
        name = f"model.layers.1.mlp.experts.{i}.down_proj.weight"
        info = checkpoint.infos[name]
        assert (info.shape, info.dtype, info.nbytes) == ((32, 32), "Q5_0", 32 * 22)
        assert torch.equal(checkpoint.read(name), rounded(original.tensors[name], "Q5_0"))
        checkpoint.drop(name)
    assert decoded == [(32, 22)] * 4


# --- blocks


def test_conv1d_in_blocks_is_a_linear(tmp_path: Path) -> None:
    """GPT-2 stores [K, N], its GGUF [N, K]: what is presented is the former, what is quantized the latter."""
    original = tiny("gpt2", n_inner=64)
    kinds = {f"blk.1.{stem}.weight": "Q8_0" for stem in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}
    write_gguf(tmp_path / "m.gguf", original, kinds=kinds)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    name = "transformer.h.1.mlp.c_fc.weight"
    matrix = rounded(original.tensors[name].t().contiguous(), "Q8_0")
    assert checkpoint.infos[name].shape == original.tensors[name].shape == (32, 64)
    assert torch.equal(checkpoint.read(name), matrix.t())
    assert as_linears(checkpoint).infos[name].shape == (64, 32)
    assert torch.equal(as_linears(checkpoint).read(name), matrix)
    open_network(checkpoint)


def test_stored_blocks_are_in_hugging_face_order(tmp_path: Path) -> None:
    original = tiny("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    write_gguf(tmp_path / "m.gguf", original, kinds={"blk.1.attn_q.weight": "Q4_1"})
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    kind, blocks = checkpoint.blocks(name)
    assert (kind, blocks.dtype) == ("Q4_1", torch.uint8)
    assert np.array_equal(blocks.numpy(), quantize(original.tensors[name].numpy(), GGMLQuantizationType.Q4_1))
    assert torch.equal(checkpoint.read(name), rounded(original.tensors[name], "Q4_1"))


# --- what has no place


def remove(pattern: str) -> Any:
    def change(checkpoint: MemoryCheckpoint) -> None:
        for name in [name for name in checkpoint.tensors if re.search(pattern, name)]:
            del checkpoint.tensors[name]

    return change


def add(name: str, *shape: int) -> Any:
    def change(checkpoint: MemoryCheckpoint) -> None:
        checkpoint.tensors[name] = torch.zeros(shape)

    return change


PLACES: dict[str, tuple[str, Any, str]] = {
    "unknown": (
        "llama",
        add("model.layers.0.self_attn.q_norm.weight", 8),
        "q_norm.weight' has no place in a GGUF of architecture 'llama'",
    ),
    "vision": ("llama", add("model.vision_tower.weight", 8), "has no place"),
    "no bias": ("qwen3", add("model.layers.0.self_attn.o_proj.bias", 32), "has no place"),
    "scale": ("llama", add("model.layers.0.self_attn.q_proj.weight_scale", 8), "has no place"),
    "no expert": (
        "llama",
        add("model.layers.0.mlp.experts.0.gate_proj.weight", 8, 8),
        "no tensor for 'blk.1.ffn_gate_exps.weight'",
    ),
    "beyond": ("llama", add("model.layers.7.input_layernorm.weight", 32), "is beyond the 3 blocks of config.json"),
    "missing": ("llama", remove(r"layers\.2\.mlp\.up_proj"), "no tensor for 'blk.2.ffn_up.weight'"),
    "block": ("qwen3", remove(r"layers\.1\."), "no tensor for 'blk.1.attn_k.weight'"),
    "norm": ("llama", remove(r"^model\.norm"), "no tensor for 'output_norm.weight'"),
    "expert": ("mixtral", remove(r"layers\.0\..*experts\.1\.w1"), "is one of 3, config.json announces 4"),
    "last expert": ("olmoe", remove(r"experts\.3\."), "is one of 3, config.json announces 4"),
    "shape": ("mixtral", add("model.layers.0.block_sparse_moe.experts.1.w1.weight", 9, 9), "has [9, 9]"),
    "rows": ("llama", add("model.layers.0.self_attn.q_proj.weight", 31, 32), "31 rows do not divide by 4 heads"),
    "q": (
        "llama",
        add("model.layers.0.self_attn.q_proj.weight", 40, 32),
        "shape [40, 32], config.json announces [32, 32]",
    ),
    "ffn": (
        "llama",
        add("model.layers.0.mlp.down_proj.weight", 32, 40),
        "shape [32, 40], config.json announces [32, 48]",
    ),
    "qkv": (
        "gpt2",
        add("transformer.h.0.attn.c_attn.weight", 32, 90),
        "shape [90, 32], config.json announces [96, 32]",
    ),
    "vocabulary": ("llama", add("lm_head.weight", 95, 32), "shape [95, 32], config.json announces [96, 32]"),
    "experts": (
        "qwen3_moe",
        add(r"model.layers.0.mlp.gate.weight", 3, 32),
        "'model.layers.0.mlp.gate.weight': shape [3, 32], config.json announces [4, 32]",
    ),
    "bias": ("qwen2", add("model.layers.0.self_attn.k_proj.bias", 17), "shape [17], config.json announces [16]"),
    "vector": ("llama", add("model.layers.0.self_attn.q_proj.weight", 32), "expected 2 dimensions"),
    "gate": ("qwen2_moe", add("model.layers.0.mlp.shared_expert_gate.weight", 2, 32), "expected one row"),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_has_no_place_is_named(case: str) -> None:
    family, change, words = PLACES[case]
    checkpoint = tiny(family)
    change(checkpoint)
    assert words in refused(checkpoint)


def test_two_names_of_one_tensor() -> None:
    checkpoint = tiny("llama")
    checkpoint.tensors["norm.weight"] = checkpoint.tensors["model.norm.weight"]
    assert "are both 'output_norm.weight'" in refused(checkpoint)


def test_a_class_that_is_not_known() -> None:
    with pytest.raises(QuantoolError) as caught:
        find_architecture({"architectures": ["OPTForCausalLM"], "model_type": "opt"})
    assert "'OPTForCausalLM' is not an architecture that can be written" in caught.value.message
    assert "LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM" in caught.value.message
