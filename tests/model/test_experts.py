"""Experts as modules against the fused classes of transformers: same sums, each linear with its own tokens."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from families import MIXTURES, MemoryCheckpoint, fused_in_memory, in_memory, make_model, tokens
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from quantool.model.blocks import Block, embed, stream_blocks
from quantool.model.experts import (
    Experts,
    all_tokens,
    expert_of,
    experts_of,
    fused_shapes,
    is_fused,
    same_routing,
    separate_experts,
)
from quantool.model.skeleton import open_network

E, K, HIDDEN, TOKENS, TOP = 5, 8, 12, 23, 2  # rows of 16 bytes, as grouped_mm wants them


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Config:
    _experts_implementation = "eager"
    num_experts, hidden_size, moe_intermediate_size = E, K, HIDDEN


class Fused(nn.Module):
    """What the families have, without its loop: random weights in the layout of `use_experts_implementation`."""

    def __init__(self, config: Config, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.num_experts = E
        sizes = {"gate_up_proj": (E, 2 * HIDDEN, K), "down_proj": (E, K, HIDDEN), **shapes}
        random = torch.Generator().manual_seed(0)
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(size, generator=random) / 3, requires_grad=False))
        self.act_fn = ACT2FN["silu"]


Plain = use_experts_implementation(type("Plain", (Fused,), {}))


class Clamped(Fused):
    """Gating of its own, as deepseek_v4 and gpt_oss have it."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.sigmoid(1.7 * gate.clamp(max=1)) * gate * (up.clamp(-1, 1) + 1)


Clamped = use_experts_implementation(Clamped)


def literal(fused: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One token and one expert at a time, in float64."""
    output = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for place in range(index.shape[1]):
            expert = index[token, place]
            if expert < E:  # larger: no expert at all
                hidden = fused._apply_gate(fused.gate_up_proj[expert].double() @ x[token].double())
                output[token] += weights[token, place].double() * (fused.down_proj[expert].double() @ hidden)
    return output


def separated(fused: Any) -> Experts:
    """`Experts` with the weights of the fused module, which are put there by hand."""
    holder = nn.ModuleDict({"experts": fused})
    separate_experts(holder)
    found = holder["experts"]
    assert isinstance(found, Experts)
    assert len(found) == E
    assert all(parameter.is_meta for parameter in found.parameters())
    for number, expert in enumerate(found):
        gate, up = fused.gate_up_proj[number].chunk(2)
        for leaf, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", fused.down_proj[number])):
            getattr(expert, leaf).weight = nn.Parameter(weight.clone(), requires_grad=False)
    return found


def routing(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, two different experts each, and their weights."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, K, generator=random)
    weights, index = torch.rand(TOKENS, E, generator=random).topk(TOP)
    return x, index, weights


@pytest.mark.parametrize("kind", [Plain, Clamped])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_sum_is_that_of_the_fused_module(kind: Any, implementation: str) -> None:
    fused = kind(Config())
    fused.config._experts_implementation = implementation
    found = separated(fused)
    for seed in range(3):
        x, index, weights = routing(seed)
        result = found(x, index, weights)
        torch.testing.assert_close(result, literal(fused, x, index, weights).float(), rtol=0, atol=1e-5)
        if implementation != "eager":
            torch.testing.assert_close(result, fused(x, index, weights), rtol=0, atol=1e-5)
        assert torch.equal(found(hidden_states=x, top_k_index=index, top_k_weights=weights), result)


def test_weights_in_float32_on_half_tokens() -> None:
    """Routers of deepseek compute in float32 whatever the model's dtype."""
    fused = Plain(Config())
    found = separated(fused).to(torch.bfloat16)
    x, index, weights = routing()
    result = found(x.bfloat16(), index, weights)
    assert result.dtype == torch.bfloat16
    wanted = literal(fused, x, index, weights).float()
    assert (result.float() - wanted).norm() < 0.02 * wanted.norm()


def test_an_index_past_the_last_expert_is_no_expert() -> None:
    fused = Plain(Config())
    x, index, weights = routing()
    index[::3, 1] = E
    torch.testing.assert_close(
        separated(fused)(x, index, weights), literal(fused, x, index, weights).float(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ({"gate_up_proj": (E, K, 2 * HIDDEN), "down_proj": (E, HIDDEN, K)}, {"is_transposed": True}),
        ({"gate_up_proj": (E, K, 2 * HIDDEN), "down_proj": (E, HIDDEN, K)}, {}),
        ({}, {"is_transposed": True}),
        ({}, {"is_concatenated": False}),
        ({}, {"has_post_expert_norm": True}),
        ({}, {"has_gate": False}),
        ({}, {"has_bias": True}),
        ({"gate_up_proj_bias": (E, 2 * HIDDEN)}, {}),
        ({"gate_up_proj": (E, HIDDEN, K)}, {}),
        ({"down_proj": (E, K, HIDDEN, 1)}, {}),
        ({"gate_up_proj": (0, 2 * HIDDEN, K), "down_proj": (0, K, HIDDEN)}, {}),
    ],
)
def test_another_layout_is_left_as_it_is(shapes: dict[str, Any], options: dict[str, Any]) -> None:
    kind = use_experts_implementation(**options)(type("Other", (Fused,), {}))
    holder = nn.ModuleDict({"experts": kind(Config(), **shapes)})
    separate_experts(holder)
    assert type(holder["experts"]) is kind


def test_a_module_that_is_no_mixture_is_left_as_it_is() -> None:
    assert not is_fused(Fused(Config()))  # does not say how it gates
    assert not is_fused(nn.Linear(4, 4))


def test_shapes_of_the_transposed_layout_are_never_taken_for_ours() -> None:
    sizes = range(1, 9)
    for k in sizes:
        for i in sizes:
            assert fused_shapes((3, 2 * i, k), (3, k, i))
            assert not fused_shapes((3, k, 2 * i), (3, i, k))
    assert not fused_shapes((), ())
    assert not fused_shapes((2, 2, 1), (1, 1, 1))


# In the network


def block_of(model: Any, index: int = 1, stored: Callable[[Any], MemoryCheckpoint] = in_memory) -> Block:
    """One block with its weights and what reaches it."""
    network = open_network(stored(model))
    states = embed(network, tokens(3, 20), batch_size=2)
    return next(block for block in stream_blocks(network, states) if block.index == index)


def watch(block: Block) -> dict[str, list[torch.Tensor]]:
    """What reaches each linear from now on."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in block.linears}
    for name, linear in block.linears.items():
        linear.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].clone()))
    return seen


def watch_router(block: Block) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the router reads and the experts of each token [T, k], from now on."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        found.append((args[0].reshape(-1, args[0].shape[-1]).clone(), output[2].clone()))

    block.module.get_submodule("mlp.gate").register_forward_hook(add)
    return found


def rows(x: torch.Tensor) -> list[list[float]]:
    """Tokens in an order that does not depend on theirs."""
    return sorted(x.tolist())


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("stored", [in_memory, fused_in_memory])
def test_every_expert_is_named_linears_with_its_own_weights(family: str, stored: Any) -> None:
    """However they are stored: each half and each slice of the fused parameters in its place."""
    model = make_model(family)
    wanted = model.model.layers[1].mlp.experts
    block = block_of(model, stored=stored)
    experts = [f"model.layers.1.mlp.experts.{i}" for i in range(len(wanted.down_proj))]
    assert experts_of(block) == experts
    names = [name for name in block.linears if expert_of(name)]
    assert names == [f"{expert}.{leaf}" for expert in experts for leaf in ("gate_proj", "up_proj", "down_proj")]
    for number, expert in enumerate(experts):
        gate, up = wanted.gate_up_proj[number].chunk(2)
        assert torch.equal(block.linears[f"{expert}.gate_proj"].weight, gate)
        assert torch.equal(block.linears[f"{expert}.up_proj"].weight, up)
        assert torch.equal(block.linears[f"{expert}.down_proj"].weight, wanted.down_proj[number])


@pytest.mark.parametrize("family", MIXTURES)
def test_a_linear_sees_the_tokens_that_were_routed_to_its_expert(family: str) -> None:
    block = block_of(make_model(family))
    seen, router = watch(block), watch_router(block)
    for _ in block.replay():
        pass
    x, index = torch.cat([x for x, _ in router]), torch.cat([index for _, index in router])
    assert len(x) == 60
    for expert in experts_of(block):
        mine = x[(index == int(expert.rpartition(".")[2])).any(dim=1)]
        for leaf in ("gate_proj", "up_proj"):
            assert rows(torch.cat([mine[:0], *seen[f"{expert}.{leaf}"]])) == rows(mine)
        assert sum(map(len, seen[f"{expert}.down_proj"])) == len(mine)
    assert (
        sum(
            len(part)
            for name, parts in seen.items()
            if name.endswith("gate_proj") and expert_of(name)
            for part in parts
        )
        == 120
    )


def test_an_expert_without_tokens_does_not_run() -> None:
    block = block_of(make_model("qwen3_moe"))
    seen, router = watch(block), watch_router(block)
    few = block.probe()[:, :1]
    block.states.calls[few.shape] = block.states.calls[block.probe().shape]
    experts = block.module.get_submodule("mlp.experts")
    experts(few[0], torch.tensor([[1, 3]]), torch.ones(1, 2))
    assert not router
    ran = {expert_of(name) for name, parts in seen.items() if parts}
    assert ran == {"model.layers.1.mlp.experts.1", "model.layers.1.mlp.experts.3"}


@pytest.mark.parametrize("family", MIXTURES)
def test_all_tokens_reach_chosen_experts_and_the_output_stays_routed(family: str) -> None:
    block = block_of(make_model(family))
    hidden = block.states.hidden[0]
    before = block.run(hidden)
    router = watch_router(block)
    seen = watch(block)
    chosen = experts_of(block)[1:3]
    with all_tokens(block, [*chosen, None]):
        torch.testing.assert_close(block.run(hidden), before, rtol=0, atol=1e-5)
    x, index = router[0]
    for name, parts in seen.items():
        if (expert := expert_of(name)) is None:
            continue
        mine = (index == int(expert.rpartition(".")[2])).any(dim=1)
        got = parts[0] if parts else x[:0]
        assert len(got) == (40 if expert in chosen else int(mine.sum()))
        if expert in chosen and not name.endswith("down_proj"):
            assert torch.equal(got[: mine.sum()], x[mine])  # the routed ones first
            assert rows(got) == rows(x)
    for parts in seen.values():
        parts.clear()
    block.run(hidden)
    for name, parts in seen.items():
        if expert := expert_of(name):
            assert sum(map(len, parts)) == (index == int(expert.rpartition(".")[2])).sum()


def test_all_tokens_ends_with_an_error_too() -> None:
    block = block_of(make_model("mixtral"))
    experts = block.module.get_submodule("mlp.experts")
    assert isinstance(experts, Experts)
    with suppress(KeyError), all_tokens(block, experts_of(block)):
        assert experts.everywhere == {0, 1, 2, 3}
        raise KeyError
    assert experts.everywhere == set()
    names = ["model.layers.1.mlp.experts.0", "model.layers.1.self_attn.0"]
    with (
        pytest.raises(ValueError, match=r"'model\.layers\.1\.self_attn' is MixtralAttention, expected Experts"),
        all_tokens(block, names),
    ):
        pass
    assert experts.everywhere == set()


def test_the_routing_can_be_kept() -> None:
    block = block_of(make_model("mixtral"))
    hidden = block.states.hidden[0]
    before = block.run(hidden)
    gate = block.module.get_submodule("mlp.gate").weight
    with same_routing(block):
        assert torch.equal(block.run(hidden), before)
        kept = watch(block)
        saved = gate.clone()
        gate.copy_(saved.flip(0))  # every token would go elsewhere
        block.run(hidden)
        assert block.run(block.probe()).isfinite().all()  # another shape has a routing of its own
    router = watch_router(block)
    counts = [len(parts[0]) for name, parts in kept.items() if name.endswith("gate_proj")]
    moved = block.run(hidden)
    gate.copy_(saved)
    block.run(hidden)
    (_, elsewhere), (_, index) = router
    assert counts == [int((index == i).sum()) for i in range(4)]
    assert counts != [int((elsewhere == i).sum()) for i in range(4)]
    assert not torch.allclose(moved, before, atol=0.1)
    assert torch.equal(block.run(hidden), before)


def test_a_dense_block_has_no_experts() -> None:
    block = block_of(make_model("deepseek_v3"), 0)
    assert experts_of(block) == []
    with all_tokens(block, []), same_routing(block):
        assert block.run(block.probe()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("model.layers.0.mlp.experts.3.gate_proj", "model.layers.0.mlp.experts.3"),
        ("model.layers.0.mlp.experts.31.down_proj.weight", "model.layers.0.mlp.experts.31"),
        ("model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.block_sparse_moe.experts.3"),
        ("experts.0.w1", "experts.0"),
        ("model.layers.0.mlp.shared_experts.gate_proj", None),
        ("model.layers.0.mlp.shared_experts.0.gate_proj", None),
        ("model.layers.0.mlp.shared_expert.gate_proj", None),
        ("model.layers.0.mlp.experts.gate_up_proj", None),
        ("model.layers.0.mlp.experts.3", None),
        ("model.layers.0.self_attn.q_proj", None),
        ("", None),
    ],
)
def test_the_expert_of_a_linear_is_in_its_name(name: str, expert: str | None) -> None:
    assert expert_of(name) == expert
