"""Matrices [N, K] in tensors that are stored transposed or fused, and those tensors put together again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MemoryCheckpoint, in_memory, make_model, save
from hypothesis import given
from hypothesis import strategies as st

from quantool.io import open_checkpoint
from quantool.model.views import LinearsCheckpoint, as_linears

GPT2 = {"model_type": "gpt2", "n_layer": 1}
QKV = "transformer.h.0.attn.c_attn.weight"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def numbered(*shape: int) -> torch.Tensor:
    """Every value another one."""
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def fused(experts: int, rows: int, columns: int, owner: str = "model.layers.0.mlp.experts") -> MemoryCheckpoint:
    tensors = {
        f"{owner}.gate_up_proj": numbered(experts, 2 * rows, columns),
        f"{owner}.down_proj": -numbered(experts, columns, rows),
        "model.norm.weight": numbered(columns),
    }
    return MemoryCheckpoint({"model_type": "qwen3_moe"}, tensors)


def check(found: LinearsCheckpoint) -> None:
    """What holds for every checkpoint: parts partition it, infos are of what is read, and parts make the whole."""
    assert list(found.parts) == list(found.stored.infos)
    assert [part for parts in found.parts.values() for part in parts] == list(found.infos)
    for name, parts in found.parts.items():
        stored = found.stored.infos[name]
        assert sum(found.infos[part].nbytes for part in parts) == stored.nbytes
        for part in parts:
            info, tensor = found.infos[part], found.read(part)
            assert (info.name, info.shape, info.dtype) == (part, tuple(tensor.shape), stored.dtype)
            assert tensor.is_contiguous()
        whole = found.assemble(name, {part: found.read(part).clone() for part in parts})
        assert torch.equal(whole, found.stored.read(name))
        assert whole.is_contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_put_together_again(family: str, tmp_path: Path) -> None:
    found = as_linears(open_checkpoint(save(make_model(family), tmp_path)))
    check(found)
    changed = [name for name, info in found.infos.items() if info != found.stored.infos.get(name)]
    assert len(changed) == (6 if family == "gpt2" else 0)  # and two that are square
    assert found.transposed == (family == "gpt2")


def test_conv1d_is_transposed() -> None:
    found = as_linears(in_memory(make_model("gpt2")))
    stored = found.stored.read(QKV)
    assert found.infos[QKV].shape == (96, 32)
    assert torch.equal(found.read(QKV), stored.T)
    assert stored.shape == (32, 96)
    for same in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight", QKV[:-6] + "bias"):
        assert found.read(same) is found.stored.read(same)
    square = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(found.read(square), found.stored.read(square).T)


@pytest.mark.parametrize(
    ("model_type", "name", "transposed"),
    [
        ("gpt2", "h.0.mlp.c_fc.weight", True),
        ("gpt2", "transformer.h.11.attn.c_proj.weight", True),
        ("openai-gpt", "h.0.attn.c_attn.weight", True),
        ("gpt2", "wte.weight", False),
        ("gpt2", "lm_head.weight", False),
        ("gpt2", "transformer.h.0.attn.c_attn.qweight", False),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.weight", False),
        (None, "transformer.h.0.attn.c_attn.weight", False),
    ],
)
def test_which_weights_are_transposed(model_type: Any, name: str, transposed: bool) -> None:
    found = as_linears(MemoryCheckpoint({"model_type": model_type}, {name: random(3, 5)}))
    assert found.infos[name].shape == ((5, 3) if transposed else (3, 5))
    check(found)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_codes_are_not_transposed(dtype: torch.dtype) -> None:
    """A quantized Conv1D has codes [N, K] under the same name: int8 W8A8, LLM.int8() and NF4 do."""
    found = as_linears(MemoryCheckpoint(GPT2, {QKV: torch.ones(3, 5, dtype=dtype)}))
    assert found.infos[QKV].shape == (3, 5)
    assert found.read(QKV) is found.stored.read(QKV)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_transposed_weight_may_be_of_any_float(dtype: torch.dtype) -> None:
    found = as_linears(MemoryCheckpoint(GPT2, {QKV: random(3, 5).to(dtype)}))
    assert found.read(QKV).dtype == dtype
    check(found)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_fused_experts_are_their_slices(experts: int, rows: int, columns: int) -> None:
    checkpoint = fused(experts, rows, columns)
    found = as_linears(checkpoint)
    check(found)
    assert not found.transposed
    owner = "model.layers.0.mlp.experts"
    gate_up, down = checkpoint.tensors[f"{owner}.gate_up_proj"], checkpoint.tensors[f"{owner}.down_proj"]
    assert len(found.infos) == 3 * experts + 1
    for i in range(experts):
        assert torch.equal(found.read(f"{owner}.{i}.gate_proj.weight"), gate_up[i, :rows])
        assert torch.equal(found.read(f"{owner}.{i}.up_proj.weight"), gate_up[i, rows:])
        assert torch.equal(found.read(f"{owner}.{i}.down_proj.weight"), down[i])
        found.drop(f"{owner}.{i}.up_proj.weight")
    found.drop("model.norm.weight")


def test_parts_are_changed_one_by_one() -> None:
    found = as_linears(fused(3, 2, 4))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {part: found.read(part).clone() for part in found.parts[name]}
    parts["model.layers.0.mlp.experts.1.up_proj.weight"] *= -1
    wanted = found.stored.read(name).clone()
    wanted[1, 2:] *= -1
    assert torch.equal(found.assemble(name, parts), wanted)


@pytest.mark.parametrize(
    "shapes",
    [
        {"gate_up_proj": (2, 4, 10), "down_proj": (2, 5, 4)},  # transposed: [E, K, 2I]
        {"gate_up_proj": (2, 10, 4)},  # no sibling
        {"down_proj": (2, 4, 5)},
        {"gate_up_proj": (2, 10, 4), "down_proj": (3, 4, 5)},
        {"gate_up_proj": (2, 9, 4), "down_proj": (2, 4, 4)},
        {"gate_up_proj": (10, 4), "down_proj": (4, 5)},
        {"gate_up_proj_blocks": (2, 10, 4), "down_proj_blocks": (2, 4, 5)},
    ],
)
def test_another_layout_is_left_as_it_is(shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {f"model.layers.0.mlp.experts.{leaf}": torch.zeros(shape) for leaf, shape in shapes.items()}
    found = as_linears(MemoryCheckpoint({"model_type": "llama4"}, tensors))
    assert found.infos == found.stored.infos


def test_packed_experts_are_left_as_they_are() -> None:
    """gpt_oss stores blocks of four bits under the names of the fused parameters."""
    checkpoint = fused(2, 2, 4)
    checkpoint.tensors = {name: tensor.to(torch.uint8) for name, tensor in checkpoint.tensors.items()}
    assert as_linears(checkpoint).infos == checkpoint.infos


def test_a_view_of_a_view_is_itself(tmp_path: Path) -> None:
    found = as_linears(open_checkpoint(save(make_model("gpt2"), tmp_path)))
    assert as_linears(found) is found
    assert (found.path, found.config, found.metadata) == (tmp_path, found.stored.config, found.stored.metadata)
    out = tmp_path / "out"
    out.mkdir()
    found.write_aux(out)
    assert (out / "generation_config.json").is_file()
