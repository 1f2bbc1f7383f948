"""Groups and sources of real families, and folds that leave the function of a block unchanged."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, in_memory, make_model, tokens
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from quantool.model.blocks import Block, embed, stream_blocks
from quantool.model.experts import expert_of
from quantool.model.folds import Group, Source, find_groups, fold
from quantool.model.skeleton import open_network

# Without shrinking: an example runs whole blocks, and a failure should come soon.
LIMIT = settings(deadline=None, max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
ATTENTION, MLP = "self_attn.", "mlp."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
INPUT_NORM, POST_NORM = "input_layernorm", "post_attention_layernorm"
O_OF_V = (("self_attn.o_proj",), "self_attn.v_proj", "linear")
DOWN_OF_UP = (("mlp.down_proj",), "mlp.up_proj", "linear")


def ordinary(kind: str = "norm", second: str = POST_NORM) -> list[Any]:
    return [(QKV, INPUT_NORM, kind), O_OF_V, (GATE_UP, second, kind), DOWN_OF_UP]


def experts(count: int) -> list[Any]:
    """Of each expert: gate and up share its tokens, and up is what its down reads."""
    names = [f"mlp.experts.{i}" for i in range(count)]
    groups = [
        [((f"{e}.gate_proj", f"{e}.up_proj"), None, None), ((f"{e}.down_proj",), f"{e}.up_proj", "linear")]
        for e in names
    ]
    return [group for pair in groups for group in pair]


# Queries and keys through a bottleneck with a norm of its own; values are the last rows of each head of kv_b_proj.
MLA = [
    (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), INPUT_NORM, "norm"),
    (("self_attn.q_b_proj",), "self_attn.q_a_layernorm", "norm"),
    (("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm", "norm"),
    (("self_attn.o_proj",), "self_attn.kv_b_proj", "linear"),
]
SHARED_EXPERTS = [
    (("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"), None, None),
    (("mlp.shared_experts.down_proj",), "mlp.shared_experts.up_proj", "linear"),
]
GROUPS: dict[str, list[Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "stablelm", "smollm3", "granite"), ordinary()),
    "gemma": ordinary("norm_plus_one"),
    "gemma2": ordinary("norm_plus_one", "pre_feedforward_layernorm"),
    "gemma3_text": ordinary("norm_plus_one", "pre_feedforward_layernorm"),
    "phi3": [
        (("self_attn.qkv_proj",), INPUT_NORM, "norm"),
        (("self_attn.o_proj",), "self_attn.qkv_proj", "linear"),
        (("mlp.gate_up_proj",), POST_NORM, "norm"),
        (("mlp.down_proj",), "mlp.gate_up_proj", "linear"),
    ],
    # Attention and MLP read one norm.
    "phi": [
        ((*QKV, "mlp.fc1"), INPUT_NORM, "norm"),
        (("self_attn.dense",), "self_attn.v_proj", "linear"),
        (("mlp.fc2",), None, None),  # behind a GELU
    ],
    "cohere": [((*QKV, *GATE_UP), INPUT_NORM, "norm"), O_OF_V, DOWN_OF_UP],
    "falcon": [
        (("self_attention.query_key_value", "mlp.dense_h_to_4h"), INPUT_NORM, "norm"),
        (("self_attention.dense",), "self_attention.query_key_value", "linear"),
        (("mlp.dense_4h_to_h",), None, None),
    ],
    # Query, key and value interleaved by head: the last rows of each head are its values.
    "gpt_neox": [
        (("attention.query_key_value",), INPUT_NORM, "norm"),
        (("attention.dense",), "attention.query_key_value", "linear"),
        (("mlp.dense_h_to_4h",), POST_NORM, "norm"),
        (("mlp.dense_4h_to_h",), None, None),
    ],
    # Norms come after attention and MLP: the residual stream itself is what the linears read.
    "olmo2": [(QKV, None, None), O_OF_V, (GATE_UP, None, None), DOWN_OF_UP],
    "starcoder2": [
        (QKV, INPUT_NORM, "norm"),
        O_OF_V,
        (("mlp.c_fc",), POST_NORM, "norm"),
        (("mlp.c_proj",), None, None),
    ],
    # A ReLU lets a positive factor through.
    "opt": [
        (QKV, "self_attn_layer_norm", "norm"),
        (("self_attn.out_proj",), "self_attn.v_proj", "linear"),
        (("fc1",), "final_layer_norm", "norm"),
        (("fc2",), "fc1", "linear"),
    ],
    "gpt2": [
        (("attn.c_attn",), "ln_1", "norm"),
        (("attn.c_proj",), "attn.c_attn", "linear"),
        (("mlp.c_fc",), "ln_2", "norm"),
        (("mlp.c_proj",), None, None),
    ],
    **{family: [(QKV, INPUT_NORM, "norm"), O_OF_V, *experts(4)] for family in ("mixtral", "qwen3_moe", "olmoe")},
    # The router reads what the shared expert reads, so the norm can absorb nothing.
    "qwen2_moe": [
        (QKV, INPUT_NORM, "norm"),
        O_OF_V,
        (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"), None, None),
        (("mlp.shared_expert.down_proj",), "mlp.shared_expert.up_proj", "linear"),
        *experts(5),
    ],
    **{family: [*MLA, *experts(4), *SHARED_EXPERTS] for family in ("deepseek_v2", "deepseek_v3")},
}
DENSE_FIRST = [*MLA, (GATE_UP, POST_NORM, "norm"), DOWN_OF_UP]


def groups_of(family: str, index: int) -> list[Any]:
    """deepseek's first block has an ordinary MLP."""
    return DENSE_FIRST if family.startswith("deepseek") and index == 0 else GROUPS[family]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def block_of(model: Any, index: int = 0, dtype: str = "auto") -> Block:
    """One block with its weights and what reaches it; the stream behind it is abandoned."""
    checkpoint = in_memory(model)
    network = open_network(checkpoint, dtype=dtype)
    states = embed(network, tokens(3, 20), batch_size=2)
    return next(block for block in stream_blocks(network, states) if block.index == index)


def described(block: Block, groups: list[Group]) -> list[Any]:
    prefix = f"{block.name}."
    return [
        (
            tuple(name.removeprefix(prefix) for name in group.linears),
            group.source.name.removeprefix(prefix) if group.source else None,
            group.source.kind if group.source else None,
        )
        for group in groups
    ]


def outputs(block: Block) -> torch.Tensor:
    """What the block adds to the hidden states, all tokens."""
    return torch.cat([block.run(hidden) - hidden for hidden in block.states.hidden])


def error(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


def scale_for(source: Source, seed: int, spread: float) -> torch.Tensor:
    """Random factors around one, equal where channels share a row of the source."""
    random = torch.Generator().manual_seed(seed)
    per_row = torch.exp((torch.rand(int(source.rows.max()) + 1, generator=random) * 2 - 1) * spread)
    return per_row[source.rows]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_every_family(family: str, index: int) -> None:
    block = block_of(make_model(family), index)
    assert described(block, find_groups(block)) == groups_of(family, index)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"intermediate_size": 32}),  # no row count tells gate, up, and values apart
        ("llama", {"head_dim": 16}),  # attention wider than the hidden states
        ("qwen3", {"num_key_value_heads": 4}),
        ("phi3", {"num_key_value_heads": 4}),
        ("gemma", {"num_key_value_heads": 1, "intermediate_size": 32}),
        ("stablelm", {"use_parallel_residual": False, "num_key_value_heads": 4}),
    ],
)
def test_groups_do_not_depend_on_sizes(family: str, changes: dict[str, Any]) -> None:
    block = block_of(make_model(family, **changes))
    assert described(block, find_groups(block)) == GROUPS[family]


def test_sequential_and_parallel_residual_of_one_family() -> None:
    block = block_of(make_model("gpt_neox", use_parallel_residual=False))
    assert described(block, find_groups(block)) == GROUPS["gpt_neox"]
    block = block_of(make_model("falcon", parallel_attn=False, multi_query=False, bias=True))
    assert described(block, find_groups(block)) == [
        (("self_attention.query_key_value",), INPUT_NORM, "norm"),
        (("self_attention.dense",), "self_attention.query_key_value", "linear"),
        (("mlp.dense_h_to_4h",), POST_NORM, "norm"),
        (("mlp.dense_4h_to_h",), None, None),
    ]


def test_shared_heads_are_mapped_to_the_rows_that_feed_them() -> None:
    """Four heads of eight channels on two key-value heads: heads 0 and 1 read rows 0 to 7, heads 2 and 3 the rest."""
    block = block_of(make_model("llama"))
    source = find_groups(block)[1].source
    assert source is not None
    assert source.rows.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    block = block_of(make_model("phi3"))  # rows of the fused matrix: 32 of q, 16 of k, 16 of v
    source = find_groups(block)[1].source
    assert source is not None
    assert source.rows.tolist() == [48 + row for row in (*range(8), *range(8), *range(8, 16), *range(8, 16))]
    source = find_groups(block)[3].source
    assert source is not None
    assert source.rows.tolist() == list(range(48, 96))  # up is the second half of gate_up


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_bit_for_bit_as_before(family: str, dtype: str) -> None:
    model = make_model(family)
    block = block_of(model.to(getattr(torch, dtype)), dtype=dtype)
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    states = [hidden.clone() for hidden in block.states.hidden]
    find_groups(block)
    after = dict(block.module.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(map(torch.equal, states, block.states.hidden))
    modules = list(block.module.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


HALF = ["llama", "gemma", "phi3", "cohere", "gpt_neox", "opt", "falcon", "olmo2", "gpt2", *MIXTURES]


@pytest.mark.parametrize("family", HALF)
def test_groups_are_found_in_bfloat16_too(family: str) -> None:
    """Rounding may move a token to another expert, which changes far more than a fold."""
    block = block_of(make_model(family).to(torch.bfloat16), 1, dtype="bfloat16")
    assert described(block, find_groups(block)) == GROUPS[family]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_folds_keep_the_blocks_output(family: str, stored: torch.dtype) -> None:
    block = block_of(make_model(family).to(stored), 1)  # weights are representable in the dtype they are stored in
    before = outputs(block)
    for i, group in enumerate(find_groups(block)):
        if group.source is None:
            continue
        untouched = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
        exact = fold(block, group, scale_for(group.source, i, 3.0), stored)
        assert error(before, outputs(block)) < 1e-4
        names = {f"{block.name}.{name}" for name, p in block.module.named_parameters() if p.ne(untouched[name]).any()}
        weights = {f"{name}.weight" for name in group.linears}
        bias = f"{group.source.name}.bias"
        assert names - {bias} == {f"{group.source.name}.weight", *weights}
        assert (bias in names) == (bias.removeprefix(f"{block.name}.") in untouched)
        for name in group.linears:  # what it returns is what the linears took
            was = untouched[f"{name.removeprefix(f'{block.name}.')}.weight"]
            assert torch.equal(block.linears[name].weight, was * exact)
        source = block.module.get_submodule(group.source.name.removeprefix(f"{block.name}."))
        if group.source.kind != "linear":
            assert torch.equal(source.weight, source.weight.to(stored).float())


@LIMIT
@given(
    st.sampled_from(["llama", "gemma", "opt", "phi3"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
    st.floats(0, 8),
    st.sampled_from([0.0, 1.0, 0.02, -1.0]),
)
def test_any_positive_scale_cancels(family: str, stored: torch.dtype, seed: int, spread: float, gain: float) -> None:
    """Scales up to e**8, one gain of a special value: zero must stay zero, a tiny one must not become it."""
    model = make_model(family, seed=seed % 5)
    layer = (model.model.decoder if family == "opt" else model.model).layers[0]
    norm = layer.self_attn_layer_norm if family == "opt" else layer.input_layernorm
    norm.weight[7] = gain - (family == "gemma")
    block = block_of(model.to(stored))
    before = outputs(block)
    for i, group in enumerate(find_groups(block)):
        if group.source is not None:
            exact = fold(block, group, scale_for(group.source, seed + i, spread), stored)
            assert exact.isfinite().all()
            assert (exact != 0).all()
    assert error(before, outputs(block)) < 5e-4


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_gain_of_zero_stays_zero_and_its_linears_keep_their_column(family: str) -> None:
    model = make_model(family)
    model.model.layers[0].input_layernorm.weight[7] = -1.0 if family == "gemma" else 0.0
    block = block_of(model)
    weight = block.linears["model.layers.0.self_attn.q_proj"].weight
    before, column = outputs(block), weight[:, 7].clone()
    group = find_groups(block)[0]
    exact = fold(block, group, torch.full((32,), 3.0), torch.float32)
    assert exact[7] == 1
    assert torch.equal(weight[:, 7], column)
    assert error(before, outputs(block)) < 1e-5


def test_a_large_scale_does_not_kill_a_channel_of_a_one_plus_weight_norm() -> None:
    """Stored as weight = gain / scale - 1, which rounds to -1, a gain of zero, in bfloat16."""
    block = block_of(make_model("gemma").to(torch.bfloat16))
    before = outputs(block)
    scale = torch.ones(32)
    scale[3] = 900
    fold(block, find_groups(block)[0], scale, torch.bfloat16)
    assert error(before, outputs(block)) < 1e-4


def test_a_source_is_not_accepted_because_its_group_matters_little() -> None:
    """The MLP of this block is five orders of magnitude above attention, as with massive activations."""
    model = make_model("gpt_neox")
    model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.mul_(1e5)
    block = block_of(model)
    assert described(block, find_groups(block)) == GROUPS["gpt_neox"]


def test_a_norm_that_something_else_reads_is_no_source() -> None:
    """A router or a skip that takes the norm's output would see it divided."""
    block = block_of(make_model("llama"))
    norm = block.module.input_layernorm
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _module, _args, output: seen.append(output))
    block.module.register_forward_hook(lambda _module, _args, output: output + 0.1 * seen[-1])
    assert described(block, find_groups(block)) == [(QKV, None, None), *GROUPS["llama"][1:]]


def test_experts_that_no_token_reaches_have_their_groups_too() -> None:
    """One expert is all that the router ever chooses."""
    model = make_model("mixtral", num_experts_per_tok=1)
    model.model.layers[0].mlp.gate.weight.zero_()
    block = block_of(model)
    ran: list[str] = []
    for name, linear in block.linears.items():
        linear.register_forward_hook(lambda *_args, name=name: ran.append(name))
    block.run(block.probe())
    assert len({expert_of(name) for name in ran} - {None}) == 1
    assert described(block, find_groups(block)) == GROUPS["mixtral"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_rounding_that_moves_tokens_to_other_experts_hides_no_source(family: str) -> None:
    """A router that can hardly tell the experts apart, in bfloat16."""
    model = make_model(family)
    gate = model.model.layers[1].mlp.gate.weight
    gate.copy_(8 * gate[:1] + 0.02 * gate)
    block = block_of(model.to(torch.bfloat16), 1, dtype="bfloat16")
    assert described(block, find_groups(block)) == GROUPS[family]


def test_a_linear_that_does_not_run_is_a_group_of_its_own() -> None:
    block = block_of(make_model("llama"))
    block.linears["model.layers.0.spare"] = torch.nn.Linear(32, 32)
    assert described(block, find_groups(block)) == [*GROUPS["llama"], (("spare",), None, None)]


def test_values_of_interleaved_heads_are_mapped_to_the_rows_that_feed_them() -> None:
    source = find_groups(block_of(make_model("gpt_neox")))[1].source  # four heads, of 8 rows of q, 8 of k, 8 of v
    assert source is not None
    assert source.rows.tolist() == [24 * head + 16 + row for head in range(4) for row in range(8)]
    source = find_groups(block_of(make_model("deepseek_v3")))[3].source  # four heads, of 8 rows of k, 8 of v
    assert source is not None
    assert source.rows.tolist() == [16 * head + 8 + row for head in range(4) for row in range(8)]


def test_a_group_without_a_source_cannot_take_a_scale() -> None:
    block = block_of(make_model("olmo2"))
    group = find_groups(block)[0]
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    with pytest.raises(ValueError, match="no source to fold into"):
        fold(block, group, torch.full((32,), 2.0), torch.float32)
    assert all(torch.equal(before[name], parameter) for name, parameter in block.module.named_parameters())


def test_biases_of_layer_norms_are_divided_with_their_gains() -> None:
    block = block_of(make_model("phi"))
    norm = block.module.input_layernorm
    gain, bias = norm.weight.clone(), norm.bias.clone()
    before = outputs(block)
    group = find_groups(block)[0]
    scale = scale_for(Source("", "norm", torch.arange(32)), 5, 2.0)
    exact = fold(block, group, scale, torch.float32)
    torch.testing.assert_close(norm.weight, gain / exact)
    torch.testing.assert_close(norm.bias, bias / exact)
    torch.testing.assert_close(exact, scale, rtol=1e-5, atol=0)
    assert error(before, outputs(block)) < 1e-5
