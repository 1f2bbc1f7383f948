"""Quantize the linears of one decoder block: scale groups of them where the method asks for it, then round each.

A block method is two steps, either of which can be shared with another method (awq+gptq is AWQ's first and GPTQ's
second):

    scale    a factor per input channel of a group of linears, folded into what produces that channel: the float
             network stays the same function
    round    W and what reaches it -> codes

All linears of a block see their inputs as the float block gives them, of hidden states that come out of the rounded
blocks before it. Taking the inputs again after each linear is rounded was measured and is worse for GPTQ: it then fits
the errors of its own block as if they were the signal.

Experts see the tokens that are routed to them. One that saw too few for its statistics to mean anything is an error,
unless the options choose: it runs on all tokens for its statistics, or is rounded to nearest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from quantool.errors import QuantoolError
from quantool.methods import rtn
from quantool.methods.statistics import Inputs, collect, input_ranges
from quantool.model.blocks import Block
from quantool.model.experts import all_tokens, expert_of
from quantool.model.folds import Group, find_groups, fold
from quantool.quant import QuantizedTensor, RoundScales, choose_input_qparams
from quantool.scheme import MethodOptions, QuantScheme

MOMENT_BYTES = 1 << 30  # of second moments held at once: hundreds of experts are taken in several replays


class ScaleSearch(Protocol):
    """The scale [K] of a group of linears that share their input, given its statistics."""

    def __call__(
        self,
        block: Block,
        group: Group,
        inputs: Inputs,
        schemes: Mapping[str, QuantScheme],
        *,
        round_scales: RoundScales,
        options: MethodOptions,
    ) -> torch.Tensor: ...


class Rounding(Protocol):
    """Codes of W float32 [N, K] given what reaches it; None when the statistics do not allow it."""

    def __call__(
        self,
        weight: torch.Tensor,
        scheme: QuantScheme,
        round_scales: RoundScales,
        *,
        inputs: Inputs,
        options: MethodOptions,
    ) -> QuantizedTensor | None: ...


@dataclass(frozen=True, slots=True)
class BlockMethod:
    """The two steps of a method; without a `round` it rounds to nearest. `samples`: it looks at single tokens."""

    scale: ScaleSearch | None
    round: Rounding | None
    samples: bool = False


@dataclass(slots=True)
class _Job:
    """One block's work. Mutable: codes and notes are filled in as linears are rounded."""

    block: Block
    schemes: Mapping[str, QuantScheme]
    methods: Mapping[str, BlockMethod]
    round_scales: RoundScales
    options: MethodOptions
    codes: dict[str, QuantizedTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    starved: dict[str, int] = field(default_factory=dict)  # expert -> the tokens that were routed to it, too few

    @property
    def least_tokens(self) -> int:
        """What an expert must have seen."""
        return self.options.least_tokens(self.block.states.hidden[0].shape[1])

    def is_calibrated(self, name: str, inputs: Inputs) -> bool:
        """Whether the statistics of a linear are to be used."""
        by_rtn = self.options.starved_experts == "rtn" and expert_of(name) in self.starved
        return inputs.tokens > 0 and not by_rtn


def quantize_block(
    block: Block,
    schemes: Mapping[str, QuantScheme],
    methods: Mapping[str, BlockMethod],
    round_scales: RoundScales,
    *,
    stored: torch.dtype,
    options: MethodOptions,
) -> tuple[dict[str, QuantizedTensor], list[str]]:
    """Codes of the linears in `schemes`, each by its method, and notes for the user.

    The block stays the same function: scales are folded into it in place, norms rounded to the dtype `stored`; the
    codes are the caller's to put in. Raises QuantoolError on activations that are not finite, and on experts that
    calibration starves.
    """
    job = _Job(block, schemes, methods, round_scales, options)
    groups = [group for group in find_groups(block) if any(name in schemes for name in group.linears)]
    batches = list(_batches(job, groups))
    known: dict[str, Inputs] = {}
    for batch in batches:
        known.clear()  # two batches of moments do not fit
        known |= _scale_batch(job, batch, stored)
    # Only now: folding into v_proj or up_proj changes weights that an earlier group holds.
    for batch in batches:
        if len(batches) > 1:
            known.clear()
            known |= _collect(job, batch)
        _round_batch(job, batch, known)
    _add_input_scales(job, stored)
    if job.starved:
        job.notes.append(_starved_note(job))
    return job.codes, job.notes


def _scale_batch(job: _Job, batch: Sequence[Group], stored: torch.dtype) -> dict[str, Inputs]:
    """Fold scales where the method asks for it; returns the statistics that this leaves."""
    known = _collect(job, batch)
    for group in batch:
        first, search = group.linears[0], _scaling(job, group)
        if search is not None and job.is_calibrated(first, known[first]):
            scale = search(
                job.block, group, known[first], job.schemes, round_scales=job.round_scales, options=job.options
            )
            known[first] = known[first].scaled(fold(job.block, group, scale, stored))
    return known


def _scaling(job: _Job, group: Group) -> ScaleSearch | None:
    """The scale search that all linears of a group agree on, if something can absorb the scale."""
    searches = {job.methods[name].scale if name in job.methods else None for name in group.linears}
    return searches.pop() if len(searches) == 1 and group.source is not None else None


def _wanted(job: _Job, group: Group) -> list[str]:
    return [name for name in group.linears if name in job.schemes]


def _batches(job: _Job, groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups whose second moments fit into MOMENT_BYTES at once; at least one."""
    batch: list[Group] = []
    size = 0
    for group in groups:
        nbytes = 4 * job.block.linears[group.linears[0]].in_features ** 2
        if batch and size + nbytes > MOMENT_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += nbytes
    if batch:
        yield batch


def _collect(job: _Job, groups: Sequence[Group]) -> dict[str, Inputs]:
    """Statistics of each group under the name of its first linear; those of a starved expert as the options say."""
    wanted = {group.linears[0]: [job.methods[name] for name in _wanted(job, group)] for group in groups}
    first = [name for name, methods in wanted.items() if any(method.round is not None for method in methods)]
    if not first:
        return {}
    samples = any(method.samples for name in first for method in wanted[name])
    found = collect(job.block, first, samples=samples)
    for name in first:
        expert = expert_of(name)
        if expert is not None and found[name].tokens < job.least_tokens:
            job.starved.setdefault(expert, found[name].tokens)
    starved = [name for name in first if expert_of(name) in job.starved]
    if starved and job.options.starved_experts == "error":
        raise starved_error(job.block.name, job.starved, job.least_tokens)
    if starved and job.options.starved_experts == "all-tokens":
        with all_tokens(job.block, job.starved):
            found |= collect(job.block, starved, samples=samples)
    for name, inputs in found.items():
        _require_finite(name, inputs.moment)
    return found


def _require_finite(name: str, *statistics: torch.Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in statistics):
        raise QuantoolError(
            f"'{name}': what reaches it in calibration holds NaN or Inf, expected finite activations",
            hint="use --dtype float32; if they stay, a weight of the checkpoint is not finite",
        )


def starved_error(where: str, starved: Mapping[str, int], least: int) -> QuantoolError:
    """The error for experts of `where` with the number of tokens each saw, fewer than `least`."""
    return QuantoolError(
        f"{_starved_list(where, starved)}, expected at least {least} of each expert",
        hint="use a larger --num-samples, a smaller --min-expert-tokens, or --starved-experts all-tokens or rtn",
    )


def _starved_list(where: str, starved: Mapping[str, int]) -> str:
    some = ", ".join(f"'{expert}' ({tokens})" for expert, tokens in list(starved.items())[:4])
    more = f" and {len(starved) - 4} more" if len(starved) > 4 else ""
    experts = "1 expert" if len(starved) == 1 else f"{len(starved)} experts"
    return f"{experts} of {where} saw too few calibration tokens: {some}{more}"


def _starved_note(job: _Job) -> str:
    done = "rounded to nearest" if job.options.starved_experts == "rtn" else "calibrated with all tokens"
    return f"{_starved_list(job.block.name, job.starved)}: {done}"


def _round_batch(job: _Job, groups: Sequence[Group], known: dict[str, Inputs]) -> None:
    """Codes of the linears of some groups; their statistics are taken out of `known`."""
    for group in groups:
        inputs = known.pop(group.linears[0], None)
        for name in _wanted(job, group):
            scheme, rounding = job.schemes[name], job.methods[name].round
            weight = job.block.linears[name].weight.detach().float()
            q = None
            if rounding is not None and inputs is not None and job.is_calibrated(name, inputs):
                q = rounding(weight, scheme, job.round_scales, inputs=inputs, options=job.options)
                if q is None:
                    job.notes.append(f"{name}: rounded to nearest: its Hessian is not positive definite, damped or not")
            elif rounding is not None and expert_of(name) not in job.starved:
                job.notes.append(f"{name}: rounded to nearest: no calibration token reaches it")
            job.codes[name] = q or rtn.quantize_weight(weight, scheme, job.round_scales, options=job.options)


def _add_input_scales(job: _Job, stored: torch.dtype) -> None:
    """The one scale of all tokens that a static scheme stores, from the range of what reaches each linear.

    Of those that `stored` holds: transformers casts it to the model's dtype, vLLM does not.
    """
    static = [name for name, scheme in job.schemes.items() if scheme.act_bits == 8 and not scheme.act_dynamic]
    if not static:
        return
    ranges = input_ranges(job.block, static)
    # What few tokens or none reach has no range of its own: its inputs would all saturate.
    starved = [name for name in static if expert_of(name) in job.starved or ranges[name][0] == ranges[name][1]]
    if starved:
        with all_tokens(job.block, map(expert_of, starved)):
            ranges |= input_ranges(job.block, starved)
    for name, (low, high) in ranges.items():
        _require_finite(name, low, high)
        scale, zero = choose_input_qparams(low, high, stored, sym=job.schemes[name].act_sym)
        job.codes[name] = replace(job.codes[name], input_scale=scale, input_zero=zero)
