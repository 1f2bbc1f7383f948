"""SmoothQuant: move the difficulty of rounding from the activations, where it is, to the weights, where it hurts less.

Some channels of X are a hundred times larger than others, and a token has one scale for all of them. For linears that
share X, a scale s > 0 per channel is divided out of X (folded into what produces it) and multiplied into W:

    s = amax(|X|)**a / amax(|W|)**(1 - a)            a = smoothing_strength
    loss(a) = sum over the linears of  || q(X / s) Q(W s)^T  -  X W^T ||^2

With no strength given, every group of linears takes the one of a grid of [0, 1] with the least loss over a sample of
its calibration tokens, where q rounds each token to int8 and Q the weight, as the runtime will; no smoothing at all
is one of the choices. The weights are then rounded by GPTQ (gptq.py) for the smoothed inputs.

Xiao et al. 2022, SmoothQuant: Accurate and Efficient Post-Training Quantization for LLMs, section 4.
The search is ours.
"""

from collections.abc import Mapping

import torch

from quantool.methods.statistics import Inputs, shared_by_source
from quantool.model.blocks import Block
from quantool.model.folds import Group
from quantool.quant import RoundScales, round_activations, round_affine
from quantool.scheme import MethodOptions, QuantScheme

STRENGTHS = tuple(i / 20 for i in range(21))


def search_scale(
    block: Block,
    group: Group,
    inputs: Inputs,
    schemes: Mapping[str, QuantScheme],
    *,
    round_scales: RoundScales,
    options: MethodOptions,
) -> torch.Tensor:
    """The scale [K] by which the group's input is to be divided."""
    weights = [block.linears[name].weight.detach().float() for name in group.linears]
    weight_amax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    amax = shared_by_source(inputs.amax, group.source, "amax")
    weight_amax = shared_by_source(weight_amax, group.source, "amax")
    if options.smoothing_strength is not None:
        return smoothing_scale(amax, weight_amax, options.smoothing_strength)
    sample = inputs.sample
    candidates = [torch.ones_like(amax), *(smoothing_scale(amax, weight_amax, a) for a in STRENGTHS)]
    losses = torch.zeros(len(candidates), dtype=torch.float64)
    for name, weight in zip(group.linears, weights, strict=True):
        wanted = sample @ weight.T
        for i, scale in enumerate(candidates):
            rounded = round_affine(weight * scale, schemes[name], round_scales)
            found = round_activations(sample / scale, schemes[name]) @ rounded.T
            losses[i] += float((found - wanted).square().sum())
    return candidates[int(losses.argmin())]


def smoothing_scale(amax: torch.Tensor, weight_amax: torch.Tensor, strength: float) -> torch.Tensor:
    """s [K] of the formula, up to a factor common to all channels; those without input or weights keep 1."""
    used = (amax > 0) & (weight_amax > 0)
    if not bool(used.any()):
        return torch.ones_like(amax)
    scale = amax[used].clamp(min=1e-5) ** strength / weight_amax[used].clamp(min=1e-5) ** (1 - strength)
    scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
    return torch.ones_like(amax).masked_scatter_(used, scale)
