"""The driver of all calibrated methods: what it composes, what it falls back to, and what it leaves as it was."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from families import in_memory, make_model, tokens

from quantool.errors import QuantoolError
from quantool.formats import FORMATS
from quantool.methods import BLOCK_METHODS, gptq, quantize_block
from quantool.methods import block as driver
from quantool.methods.awq import search_scale
from quantool.methods.block import BlockMethod
from quantool.methods.rtn import quantize_weight
from quantool.methods.statistics import Inputs, collect
from quantool.model.blocks import Block, embed, stream_blocks
from quantool.model.experts import expert_of
from quantool.model.folds import find_groups, fold
from quantool.model.skeleton import open_network
from quantool.quant import QuantizedTensor, dequantize_affine
from quantool.scheme import PER_CHANNEL, MethodOptions, QuantScheme

WINDOW = 32
WINDOWS = tokens(8, WINDOW)
ASYM_4 = QuantScheme(4, 16, sym=False)
W8A8 = QuantScheme(8, PER_CHANNEL, act_bits=8)
STATIC = QuantScheme(8, PER_CHANNEL, act_bits=8, act_dynamic=False)
OPTIONS = MethodOptions()
CALIBRATED = {name: W8A8 if name == "smoothquant" else ASYM_4 for name in BLOCK_METHODS if name != "rtn"}
HALF_STEP = 1.01 * 2**-8  # what rounding to bfloat16 changes at most
SIZES = {"hidden_size": 64, "intermediate_size": 96}
Codes = dict[str, QuantizedTensor]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def round_scales(scales: torch.Tensor) -> torch.Tensor:
    return FORMATS["compressed-tensors"].round_scales(scales, torch.bfloat16)


def uneven(family: str = "llama", **changes: Any) -> Any:
    """Gains of the norms that differ as those of real models do, so that scaling pays."""
    model = make_model(family, **{**SIZES, **changes})
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("layernorm.weight"):
            parameter.mul_(torch.exp(torch.randn(parameter.shape, generator=random)))
    return model


def block_of(model: Any, *, index: int = 0, windows: torch.Tensor = WINDOWS, dtype: str = "auto") -> Block:
    network = open_network(in_memory(model), dtype=dtype)
    blocks = stream_blocks(network, embed(network, windows, batch_size=3))
    return next(block for block in blocks if block.index == index)


def quantize(
    block: Block,
    method: str | Mapping[str, str],
    scheme: QuantScheme = ASYM_4,
    *,
    options: MethodOptions = OPTIONS,
) -> tuple[Codes, list[str]]:
    """All linears of a block but the router's, by one method or each by its own."""
    names = [name for name in block.linears if not name.endswith("_gate")]
    methods = {name: BLOCK_METHODS[method if isinstance(method, str) else method[name]] for name in names}
    schemes = dict.fromkeys(names, scheme)
    return quantize_block(block, schemes, methods, round_scales, stored=torch.bfloat16, options=options)


def nearest(block: Block, name: str, scheme: QuantScheme = ASYM_4) -> QuantizedTensor:
    return quantize_weight(block.linears[name].weight, scheme, round_scales, options=OPTIONS)


def by_gptq(block: Block, name: str, moment: torch.Tensor) -> QuantizedTensor:
    inputs = Inputs(moment, moment.diagonal().sqrt(), tokens=1)
    q = gptq.quantize_weight(block.linears[name].weight, ASYM_4, round_scales, inputs=inputs, options=OPTIONS)
    assert q is not None
    return q


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    zeros = a.zeros is b.zeros or (a.zeros is not None and b.zeros is not None and torch.equal(a.zeros, b.zeros))
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and zeros


def agreement(a: QuantizedTensor, b: QuantizedTensor) -> float:
    """Share of equal codes: a sum in another order may move a weight that lies between two."""
    return float((a.codes == b.codes).float().mean())


def parameters(block: Block) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in block.module.named_parameters()}


def changed(block: Block, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in block.module.named_parameters() if not torch.equal(parameter, before[name])}


def outputs(block: Block) -> torch.Tensor:
    return torch.cat([block.run(hidden) - hidden for hidden in block.states.hidden])


def inputs_of(block: Block) -> dict[str, torch.Tensor]:
    """What reaches every linear [T, K]."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in block.linears}
    hooks = [
        linear.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, linear in block.linears.items()
    ]
    for _ in block.replay():
        pass
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([torch.zeros(0, block.linears[name].in_features), *x]) for name, x in seen.items()}


# --- what is composed of what


def test_awq_gptq_is_the_scaling_of_awq_and_then_the_rounding_of_gptq() -> None:
    block, hand = block_of(uneven()), block_of(uneven())
    codes, notes = quantize(block, "awq+gptq")
    assert not notes
    groups = find_groups(hand)
    found = collect(hand, [group.linears[0] for group in groups], samples=False)
    moments = {}
    for group in groups:
        inputs = found[group.linears[0]]
        schemes = dict.fromkeys(group.linears, ASYM_4)
        scale = search_scale(hand, group, inputs, schemes, round_scales=round_scales, options=OPTIONS)
        exact = fold(hand, group, scale, torch.bfloat16)
        assert exact.max() > 1.5 * exact.min()
        moments |= dict.fromkeys(group.linears, inputs.moment / exact.outer(exact))
    assert not changed(block, parameters(hand))
    assert set(codes) == set(moments)
    for name, q in codes.items():
        assert agreement(q, by_gptq(hand, name, moments[name])) > 0.999
        assert torch.equal(q.scales, by_gptq(hand, name, moments[name]).scales)


def test_the_parts_of_awq_gptq_are_those_of_the_methods_alone() -> None:
    model = uneven()
    both, awq, gptq = (block_of(model) for _ in range(3))
    before = parameters(gptq)
    codes = quantize(both, "awq+gptq")[0]
    by_awq = quantize(awq, "awq")[0]
    quantize(gptq, "gptq")
    assert not changed(both, parameters(awq))
    assert not changed(gptq, before)
    again = quantize(both, "gptq")[0]  # of the network that the scaling left
    for name, q in codes.items():
        assert agreement(q, again[name]) > 0.99
        assert agreement(q, by_awq[name]) < 0.9


@pytest.mark.parametrize("method", CALIBRATED)
def test_each_method_is_nearer_to_the_float_block_than_rtn(method: str) -> None:
    model = uneven()
    errors = {}
    for name in (method, "rtn"):
        block = block_of(model)
        wanted = outputs(block)
        codes, notes = quantize(block, name, CALIBRATED[method])
        assert not notes
        for linear, q in codes.items():
            block.linears[linear].weight.copy_(dequantize_affine(q))
        errors[name] = float((outputs(block) - wanted).norm() / wanted.norm())
    assert errors["rtn"] > 1e-4
    # Without rounded activations, of which smoothquant makes the most, its weights are only as good as rtn's.
    assert errors[method] < errors["rtn"] * (1.5 if method == "smoothquant" else 0.85)


# --- each linear by its own method


def test_a_group_is_scaled_only_if_all_its_linears_agree() -> None:
    block = block_of(uneven())
    before = parameters(block)
    own = {f"{block.name}.self_attn.v_proj": "rtn", f"{block.name}.mlp.down_proj": "gptq"}
    codes, notes = quantize(block, {name: own.get(name, "awq") for name in block.linears})
    assert not notes
    # q, k and v keep their norm, up its rows; o takes its scale from v, gate and up theirs from the norm.
    assert changed(block, before) == {
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    }
    v, down = own
    assert same(codes[v], nearest(block, v))
    moment = collect(block, [down], samples=False)[down].moment
    assert agreement(codes[down], by_gptq(block, down, moment)) > 0.999
    for name in set(codes) - set(own):
        assert not torch.equal(codes[name].codes, nearest(block, name).codes), "awq searches the range of a group"


def test_methods_that_scale_alike_scale_together() -> None:
    """k by awq+gptq is scaled with q and v, which awq rounds."""
    mixed, alone = block_of(uneven()), block_of(uneven())
    k = f"{mixed.name}.self_attn.k_proj"
    codes = quantize(mixed, {name: "awq+gptq" if name == k else "awq" for name in mixed.linears})[0]
    expected = quantize(alone, "awq")[0]
    assert not changed(mixed, parameters(alone))
    assert {name for name, q in codes.items() if not same(q, expected[name])} == {k}


def test_all_by_rtn_replays_nothing() -> None:
    block = block_of(uneven())
    before = parameters(block)
    ran: set[torch.Size] = set()
    hook = block.module.register_forward_pre_hook(lambda _m, args: ran.add(args[0].shape))
    codes, notes = quantize(block, "rtn")
    hook.remove()
    assert not notes
    assert not changed(block, before)
    assert all(same(q, nearest(block, name)) for name, q in codes.items())
    assert ran == {block.probe().shape}, "groups are looked for, on a few tokens"


def test_what_the_block_lacks_is_not_asked_for() -> None:
    block = block_of(uneven())
    assert quantize_block(block, {}, {}, round_scales, stored=torch.bfloat16, options=OPTIONS) == ({}, [])


# --- statistics that cannot be used


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", CALIBRATED)
def test_activations_that_are_not_finite(method: str, value: float) -> None:
    block = block_of(uneven())
    block.states.hidden[1][0, 20, 5] = value
    with pytest.raises(QuantoolError) as caught:
        quantize(block, method, CALIBRATED[method])
    assert "'model.layers.0.self_attn.q_proj'" in caught.value.message
    assert "NaN or Inf, expected finite" in caught.value.message
    assert caught.value.hint is not None
    assert "--dtype float32" in caught.value.hint


def test_activations_that_overflow_float16() -> None:
    model = uneven()
    model.model.layers[0].self_attn.v_proj.weight.mul_(3e4)
    model.model.layers[0].self_attn.o_proj.weight.div_(3e4)
    quantize(block_of(model), "gptq")
    with pytest.raises(QuantoolError, match=r"self_attn\.o_proj': what reaches it in calibration holds NaN or Inf"):
        quantize(block_of(model, dtype="float16"), "gptq")


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_a_hessian_that_cannot_be_damped(method: str) -> None:
    """Five tokens: the moment's rank is 5, and what float32 rounds makes some of its zeros negative."""
    block = block_of(uneven(), windows=WINDOWS[:1, :5])
    codes, notes = quantize(block, method, options=MethodOptions(damp_percent=1e-30))
    assert len(notes) == 7
    for name in block.linears:
        assert f"{name}: rounded to nearest: its Hessian is not positive definite, damped or not" in notes
        assert same(codes[name], nearest(block, name))
    codes, notes = quantize(block, method)
    assert not notes
    assert not any(same(q, nearest(block, name)) for name, q in codes.items())


# --- moments that do not fit


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", CALIBRATED)
def test_moments_that_do_not_fit_are_taken_in_several_replays(
    monkeypatch: pytest.MonkeyPatch, family: str, method: str
) -> None:
    model = uneven(family)
    whole, parts = block_of(model), block_of(model)
    expected, _ = quantize(whole, method, CALIBRATED[method])
    limit = 2 * 4 * 64 * 64
    monkeypatch.setattr(driver, "MOMENT_BYTES", limit)
    together: list[int] = []
    collect_all = driver.collect

    def counted(block: Block, linears: Any, *, samples: bool) -> Any:
        names = list(linears)
        together.append(sum(4 * block.linears[name].in_features ** 2 for name in names))
        return collect_all(block, names, samples=samples)

    monkeypatch.setattr(driver, "collect", counted)
    codes, _ = quantize(parts, method, CALIBRATED[method])
    assert len(together) >= 6
    assert max(together) <= max(limit, 4 * 96 * 96)
    assert set(codes) == set(expected)
    for name, parameter in parts.module.named_parameters():
        torch.testing.assert_close(parameter, whole.module.get_parameter(name), rtol=1e-4, atol=1e-6)
    for name, q in codes.items():
        assert agreement(q, expected[name]) > 0.995


# --- static activations


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("method", ["smoothquant", "gptq", "rtn"])
def test_a_static_scale_is_of_the_range_that_reaches_the_linear(method: str, sym: bool) -> None:
    block = block_of(uneven())
    scheme = QuantScheme(8, PER_CHANNEL, act_bits=8, act_dynamic=False, act_sym=sym)
    codes, _ = quantize(block, method, scheme)
    for name, x in inputs_of(block).items():  # the scales are folded, the codes not yet put in
        low, high = float(x.min()), float(x.max())
        scale, zero = codes[name].input_scale, codes[name].input_zero
        assert scale is not None
        assert scale.shape == (1,)
        assert torch.equal(scale, scale.bfloat16().float())
        if sym:
            assert zero is None
            assert scale.item() == pytest.approx(max(-low, high) / 127.5, rel=HALF_STEP)
        else:
            assert zero is not None
            assert zero.dtype == torch.int8
            assert scale.item() == pytest.approx((high - low) / 255, rel=HALF_STEP)
            assert abs(zero.item() - (-128 - low / scale.item())) <= 0.51
    if method == "smoothquant":
        assert float(inputs_of(block_of(uneven()))[name].abs().max()) != pytest.approx(max(-low, high), rel=1e-2)


def test_dynamic_activations_store_none() -> None:
    codes, _ = quantize(block_of(uneven()), "smoothquant", W8A8)
    assert all(q.input_scale is None and q.input_zero is None for q in codes.values())


# --- what is left as it was


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_hidden_states_and_hooks_are_as_before(method: str, family: str) -> None:
    block = block_of(uneven(family))
    before = [hidden.clone() for hidden in block.states.hidden]
    wanted = outputs(block)
    quantize(block, method, CALIBRATED.get(method, ASYM_4))
    assert all(map(torch.equal, before, block.states.hidden))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.module.modules())
    assert float((outputs(block) - wanted).norm() / wanted.norm()) < 0.01  # norms are rounded to bfloat16


def test_after_an_error_too() -> None:
    block = block_of(uneven("mixtral"))
    block.states.hidden[-1][0, -1] = float("nan")
    with pytest.raises(QuantoolError):
        quantize(block, "awq")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.module.modules())
    assert not any(getattr(module, "everywhere", None) for module in block.module.modules())


# --- experts and the tokens that are routed to them


def skewed(bias: float = -0.5) -> Block:
    """A block of four experts, two of which each token takes, and number 3 least often."""
    changes = {"n_group": 1, "kv_lora_rank": 16, "moe_intermediate_size": 32}
    model = uneven("deepseek_v3", **changes)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([0, 0, 0, bias]))
    return block_of(model, index=1)


def before_routing(block: Block) -> torch.Tensor:
    """All tokens [T, K] that the router and the experts read."""
    seen: list[torch.Tensor] = []
    hook = block.module.get_submodule("mlp").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for _ in block.replay():
        pass
    hook.remove()
    return torch.cat([hidden.flatten(0, 1) for hidden in seen])


def routed(block: Block) -> list[torch.Tensor]:
    """The tokens [T, K] of each expert: where sigmoid(x G^T) + bias is one of the two largest."""
    gate = block.module.get_submodule("mlp.gate")
    x = before_routing(block)
    chosen = (torch.sigmoid(x @ gate.weight.T) + gate.get_buffer("e_score_correction_bias")).topk(2).indices
    return [x[(chosen == expert).any(1)] for expert in range(4)]


def names_of(block: Block, expert: int) -> list[str]:
    return [name for name in block.linears if expert_of(name) == f"{block.name}.mlp.experts.{expert}"]


def mostly(codes: Codes, name: str, wanted: QuantizedTensor) -> bool:
    return agreement(codes[name], wanted) > 0.995 and torch.equal(codes[name].scales, wanted.scales)


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_starved_expert_is_an_error_that_names_it_and_its_tokens(method: str) -> None:
    block = skewed()
    counts = [len(x) for x in routed(block)]
    assert sum(counts) == 2 * WINDOWS.numel()
    assert counts[3] < min(counts[:3])
    least = min(counts[:3])
    with pytest.raises(QuantoolError) as caught:
        quantize(block, method, CALIBRATED[method], options=MethodOptions(min_expert_tokens=least))
    assert caught.value.message == (
        "1 expert of model.layers.1 saw too few calibration tokens: "
        f"'model.layers.1.mlp.experts.3' ({counts[3]}), expected at least {least} of each expert"
    )
    assert caught.value.hint is not None
    for flag in ("--num-samples", "--min-expert-tokens", "--starved-experts all-tokens or rtn"):
        assert flag in caught.value.hint
    enough = MethodOptions(min_expert_tokens=counts[3])
    assert not quantize(block, method, CALIBRATED[method], options=enough)[1]
    with pytest.raises(QuantoolError, match=rf"^4 experts.*experts\.0' \({counts[0]}\).*experts\.3' \({counts[3]}\)"):
        quantize(block, method, CALIBRATED[method], options=MethodOptions(min_expert_tokens=10_000))


def test_by_default_an_expert_needs_as_many_tokens_as_one_window_has() -> None:
    block = skewed()
    counts = [len(x) for x in routed(block)]
    assert min(counts) >= WINDOW
    quantize(block, "gptq")
    block.states.hidden[:] = block.states.hidden[:1]  # three windows
    counts = [len(x) for x in routed(block)]
    assert counts[3] < WINDOW < min(counts[:3])
    with pytest.raises(QuantoolError, match=rf"experts\.3' \({counts[3]}\), expected at least {WINDOW} of each"):
        quantize(block, "gptq")


def test_none_at_all_is_too_few_whatever_is_asked_for() -> None:
    with pytest.raises(QuantoolError, match=r"^1 expert .*experts\.3' \(0\), expected at least 1 of each"):
        quantize(skewed(-100), "gptq", options=MethodOptions(min_expert_tokens=1))


@pytest.mark.parametrize("least", [None, 10_000])
@pytest.mark.parametrize("method", CALIBRATED)
def test_starved_experts_by_rtn(method: str, least: int | None) -> None:
    block = skewed()
    block.states.hidden[:] = block.states.hidden[:1]
    counts = [len(x) for x in routed(block)]
    before = parameters(block)
    options = MethodOptions(min_expert_tokens=least, starved_experts="rtn")
    codes, notes = quantize(block, method, CALIBRATED[method], options=options)
    starved = [expert for expert in range(4) if counts[expert] < (least or WINDOW)]
    assert starved == ([3] if least is None else [0, 1, 2, 3])
    assert len(notes) == 1
    experts = "1 expert" if least is None else "4 experts"
    assert notes[0].startswith(f"{experts} of model.layers.1 saw too few calibration tokens: ")
    assert notes[0].endswith(": rounded to nearest")
    assert all(f"'model.layers.1.mlp.experts.{expert}' ({counts[expert]})" in notes[0] for expert in starved)
    for expert in range(4):
        for name in names_of(block, expert):
            assert same(codes[name], nearest(block, name, CALIBRATED[method])) == (expert in starved)
            if expert in starved:
                assert f"{name.removeprefix(f'{block.name}.')}.weight" not in changed(block, before)


@pytest.mark.parametrize("method", CALIBRATED)
def test_starved_experts_on_all_tokens(method: str) -> None:
    by_rtn, block = skewed(), skewed()
    for one in (by_rtn, block):
        one.states.hidden[:] = one.states.hidden[:1]
    wanted = outputs(block)
    plain, _ = quantize(by_rtn, method, CALIBRATED[method], options=MethodOptions(starved_experts="rtn"))
    codes, notes = quantize(block, method, CALIBRATED[method], options=MethodOptions(starved_experts="all-tokens"))
    assert len(notes) == 1
    assert notes[0].endswith(": calibrated with all tokens")
    assert "'model.layers.1.mlp.experts.3'" in notes[0]
    for name in names_of(block, 3):
        assert not same(codes[name], plain[name])
    for name in set(codes) - set(names_of(block, 3)):
        assert agreement(codes[name], plain[name]) > 0.995, "the others see their own"
    assert float((outputs(block) - wanted).norm() / wanted.norm()) < 0.01


def test_more_tokens_asked_for_than_there_are() -> None:
    options = MethodOptions(starved_experts="all-tokens", min_expert_tokens=10_000)
    block = skewed()
    codes, notes = quantize(block, "gptq", options=options)
    assert notes[0].startswith("4 experts")
    assert not any(same(q, nearest(block, name)) for name, q in codes.items())


def test_an_experts_codes_are_those_of_its_own_tokens() -> None:
    block = skewed()
    block.states.hidden[:] = block.states.hidden[:1]
    codes, _ = quantize(block, "gptq", options=MethodOptions(starved_experts="all-tokens"))
    own = routed(block)
    x_of_all = before_routing(block)
    for expert in range(4):
        x = x_of_all if expert == 3 else own[expert]
        moment = x.T @ x / len(x)
        for name in names_of(block, expert)[:2]:
            assert mostly(codes, name, by_gptq(block, name, moment))
            other = x_of_all if expert != 3 else own[0]
            assert not mostly(codes, name, by_gptq(block, name, other.T @ other / len(other)))


@pytest.mark.parametrize("choice", ["rtn", "all-tokens"])
def test_a_starved_expert_has_the_range_of_all_tokens(choice: str) -> None:
    """What reaches it at run time would saturate in the range of the few that it saw, or of none."""
    block = skewed()
    block.states.hidden[:] = block.states.hidden[:1]
    own = routed(block)
    codes, _ = quantize(block, "smoothquant", STATIC, options=MethodOptions(starved_experts=choice))
    x = before_routing(block)
    for expert in range(4):
        name = f"{block.name}.mlp.experts.{expert}.gate_proj"
        scale = codes[name].input_scale
        assert scale is not None
        reach = x if expert == 3 else own[expert]
        assert scale.item() == pytest.approx(float(reach.abs().max()) / 127.5, rel=HALF_STEP)
    assert own[3].abs().max() < 0.98 * x.abs().max()


def test_an_expert_that_nothing_reaches_has_a_range_without_calibration_too() -> None:
    codes, notes = quantize(skewed(-100), "rtn", STATIC)
    assert not notes
    assert all(q.input_scale is not None and q.input_scale > 1e-4 for q in codes.values())


def test_the_table_of_methods_is_made_of_two_steps() -> None:
    both = BLOCK_METHODS["awq+gptq"]
    assert both == BlockMethod(BLOCK_METHODS["awq"].scale, BLOCK_METHODS["gptq"].round)
