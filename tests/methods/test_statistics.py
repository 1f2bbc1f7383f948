"""Statistics of what reaches the linears, against sums in float64 over the inputs themselves."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import in_memory, make_model, tokens

from quantool.methods import statistics
from quantool.methods.statistics import Inputs, collect, input_ranges, shared_by_source
from quantool.model.blocks import Block, embed, stream_blocks
from quantool.model.experts import all_tokens, expert_of, experts_of
from quantool.model.folds import Source, find_groups
from quantool.model.skeleton import open_network

WINDOWS = tokens(5, 20)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def block_of(model: Any, *, index: int = 1, batch_size: int = 2) -> Block:
    network = open_network(in_memory(model))
    blocks = stream_blocks(network, embed(network, WINDOWS, batch_size=batch_size))
    return next(block for block in blocks if block.index == index)


def literal(block: Block) -> dict[str, np.ndarray]:
    """Every input [T, K] of every linear, in float64."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in block.linears}
    hooks = [
        linear.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].flatten(0, -2).clone()))
        for name, linear in block.linears.items()
    ]
    for _ in block.replay():
        pass
    for hook in hooks:
        hook.remove()
    empty = {name: torch.zeros(0, linear.in_features) for name, linear in block.linears.items()}
    return {name: torch.cat([empty[name], *parts]).double().numpy() for name, parts in seen.items()}


def in_order(block: Block) -> list[str]:
    """By group; of a group, later ones may run after the next group's first."""
    return [name for group in find_groups(block) for name in group.linears]


def check_equal(a: Inputs, b: Inputs) -> None:
    """Not bit for bit: a product depends on where its factors lie in memory."""
    assert a.tokens == b.tokens
    torch.testing.assert_close((a.moment, a.amax, a.sample), (b.moment, b.amax, b.sample), rtol=1e-5, atol=1e-6)


# Strips of the second moment are 384 channels wide.
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"intermediate_size": 800}),
        ("gpt2", {}),
        ("phi3", {}),
        ("qwen2_moe", {"moe_intermediate_size": 400}),
        ("deepseek_v3", {}),
    ],
)
def test_moments_and_maxima_are_those_of_all_tokens(family: str, changes: dict[str, Any]) -> None:
    block = block_of(make_model(family, **changes))
    inputs = literal(block)
    found = collect(block, in_order(block), samples=False)
    assert set(found) == set(block.linears)
    assert not all(expert_of(name) is None for name in found) or family in {"llama", "gpt2", "phi3"}
    for name, statistic in found.items():
        x = inputs[name]
        assert statistic.tokens == len(x)
        assert len(x) == 100 or expert_of(name) is not None
        moment = x.T @ x / max(1, len(x))
        np.testing.assert_allclose(statistic.moment.numpy(), moment, rtol=0, atol=2e-6 * np.abs(moment).max())
        assert torch.equal(statistic.moment, statistic.moment.T)
        np.testing.assert_allclose(statistic.amax.numpy(), np.abs(x).max(0, initial=0), rtol=1e-5)
        assert statistic.pieces == []


def test_a_linear_that_no_token_reaches() -> None:
    """A correction bias of the router keeps expert 2 from ever being chosen."""
    model = make_model("deepseek_v3", n_group=1)
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -100
    block = block_of(model)
    order = in_order(block)
    found = collect(block, order, samples=True)
    for name in order:
        unused = expert_of(name) == "model.layers.1.mlp.experts.2"
        assert (found[name].tokens == 0) == unused
        assert bool((found[name].moment == 0).all()) == unused
    with all_tokens(block, experts_of(block)):
        everywhere = collect(block, order, samples=True)
    assert {inputs.tokens for inputs in everywhere.values()} == {100}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "deepseek_v3"])
def test_the_replay_ends_at_the_last_linear_asked_for(family: str) -> None:
    """What is collected so far is what a full replay collects; what comes later does not run."""
    block = block_of(make_model(family))
    order = [group.linears[0] for group in find_groups(block)]
    everything = collect(block, order, samples=True)
    order = [name for name in order if expert_of(name) is None]
    ran: list[str] = []
    hooks = [
        linear.register_forward_pre_hook(lambda _m, _a, name=name: ran.append(name))
        for name, linear in block.linears.items()
    ]
    for end in range(1, len(order) + 1):
        ran.clear()
        found = collect(block, order[:end], samples=True)
        for name in order[:end]:
            check_equal(found[name], everything[name])
        assert ran.count(order[0]) == len(block.states.hidden)
        assert not set(ran) & set(order[end:])
    for hook in hooks:
        hook.remove()


def test_experts_are_followed_to_the_end() -> None:
    """The last expert may not run in one batch and run in the next."""
    block = block_of(make_model("mixtral"), batch_size=1)
    experts = [name for name in in_order(block) if expert_of(name) is not None]
    inputs = literal(block)
    for last in experts[-2:]:
        found = collect(block, [*experts[:2], last], samples=False)
        assert {name: statistic.tokens for name, statistic in found.items()} == {
            name: len(inputs[name]) for name in found
        }


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_samples_are_taken_evenly(monkeypatch: pytest.MonkeyPatch, family: str, batch_size: int) -> None:
    """Of 100 tokens every 8th when 12 are wanted; of an expert's, as many of fewer; whatever the batches are."""
    monkeypatch.setattr(statistics, "SAMPLE", 12)
    block = block_of(make_model(family), batch_size=batch_size)
    inputs = literal(block)
    strides = set()
    for name, statistic in collect(block, in_order(block), samples=True).items():
        x = inputs[name]
        every = 1
        while -(-len(x) // every) >= 24:
            every *= 2
        strides.add(every)
        np.testing.assert_allclose(statistic.sample.numpy(), x[::every], rtol=1e-5, atol=1e-6)
        assert 12 <= len(statistic.sample) < 24
    assert (strides == {8}) == (family == "llama")


def test_what_a_division_leaves_of_them() -> None:
    """x / s has the statistics that `scaled` gives without a replay."""
    block = block_of(make_model("llama"))
    name = "model.layers.1.self_attn.q_proj"
    before = collect(block, [name], samples=True)[name]
    scale = torch.exp(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    block.module.get_submodule("input_layernorm").weight.div_(scale)
    after, scaled = collect(block, [name], samples=True)[name], before.scaled(scale)
    check_equal(scaled, after)
    assert scaled.tokens == 100
    assert not torch.allclose(before.moment, after.moment, rtol=0.1)


def test_values_of_channels_that_share_a_row() -> None:
    """Four heads of two channels on two heads of values: channels 0 and 2 are row 0, 1 and 3 row 1, and so on."""
    rows = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    values = torch.tensor([1.0, 2.0, 5.0, 4.0, 0.0, 7.0, 8.0, 9.0])
    linear = Source("v_proj", "linear", rows)
    assert shared_by_source(values, linear, "mean").tolist() == [3, 3, 3, 3, 4, 8, 4, 8]
    assert shared_by_source(values, linear, "amax").tolist() == [5, 4, 5, 4, 8, 9, 8, 9]
    fused = Source("qkv_proj", "linear", rows + 16)  # values are the last rows of it
    assert shared_by_source(values, fused, "amax").tolist() == [5, 4, 5, 4, 8, 9, 8, 9]
    for source in (None, Source("norm", "norm", torch.arange(8)), Source("norm", "norm_plus_one", torch.arange(8))):
        assert shared_by_source(values, source, "mean") is values


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_ranges_always_hold_zero(family: str) -> None:
    model = make_model(family)
    block = block_of(model)
    inputs = literal(block)
    found = input_ranges(block, list(block.linears))
    for name, (low, high) in found.items():
        assert low.item() == pytest.approx(min(0, inputs[name].min(initial=0)), rel=1e-5)
        assert high.item() == pytest.approx(max(0, inputs[name].max(initial=0)), rel=1e-5)
    block.module.get_submodule("input_layernorm").weight.zero_()
    name = f"{block.name}.self_attn.q_proj"
    assert input_ranges(block, [name])[name] == (0, 0)


def test_nothing_is_left_behind() -> None:
    block = block_of(make_model("qwen2_moe"))
    before = [hidden.clone() for hidden in block.states.hidden]
    weights = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    names = in_order(block)
    collect(block, names, samples=True)
    collect(block, names[:1], samples=True)
    input_ranges(block, names)
    assert all(map(torch.equal, before, block.states.hidden))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in block.module.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.module.modules())
