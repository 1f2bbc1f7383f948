"""What feeds what inside a block, found by running it: which linears share an input, and what can absorb a scale.

Multiplying input channel k of a linear by s[k] leaves the network unchanged if whatever produces that channel is
divided by s[k]. Who produces it is not read from names but tried: the block runs on a few tokens, linears that
receive the same tensor form a group, and a candidate source (the norm whose output that tensor is, or an
earlier linear such as v_proj for o_proj and up_proj for down_proj) is accepted when scaling by random factors
does not change the block's output. So a norm that multiplies by 1 + weight, grouped-query attention, a fused
qkv or gate_up, and an input that something else also reads are all settled by the same test.

Each expert of a mixture is such a world of its own: it runs on all the tokens here, whether they would be routed to it
or not, its gate and up are a group, and its up is what can absorb a scale of its down. What reaches all experts also
reaches the router, so the norm before them absorbs nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from quantool.model.blocks import Block
from quantool.model.experts import all_tokens, expert_of, experts_of, same_routing

FLOAT32_TOLERANCE = 1e-3  # of the block's own contribution; a wrong source moves it by tens of percent
HALF_TOLERANCE = 5e-2
HEAD_SIZES = ("head_dim", "head_size", "v_head_dim")  # what attention modules call the channels of a head's values


@dataclass(frozen=True, slots=True)
class Source:
    """What absorbs a scale: `rows[k]` is the output channel of `name` that feeds input channel k of the group."""

    name: str
    kind: Literal["norm", "norm_plus_one", "linear"]
    rows: torch.Tensor  # int64 [K]


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that receive the same tensor, in the order they run, and what can absorb a scale of it."""

    linears: tuple[str, ...]
    source: Source | None


@dataclass(frozen=True, slots=True)
class _Trace:
    inputs: dict[int, tuple[torch.Tensor, list[str]]]  # data pointer of an input -> it, the linears that read it
    norms: dict[int, str]  # data pointer of an output -> norm
    outputs: list[torch.Tensor]  # kept alive, so that no pointer is used twice


Run = Callable[[], torch.Tensor]
"""Runs what a source is tried on: the block, or one expert alone. Gives what it adds to the hidden states."""


def find_groups(block: Block) -> list[Group]:
    """Groups of a block whose weights are in memory, in execution order. Runs it on a few tokens, restores it.

    A linear that does not run is a group of its own without a source.
    """
    tokens = block.probe()
    groups: list[Group] = []
    experts = set(experts_of(block))
    runs: dict[str | None, Run] = {None: lambda: block.run(tokens) - tokens}
    seen: dict[str | None, list[str]] = {}
    with same_routing(block):
        trace = _trace(block, tokens)
        for pointer, (tensor, linears) in trace.inputs.items():
            expert = expert_of(linears[0])
            if expert not in experts:
                expert = None
            elif expert not in runs:  # the first of its linears reads what the expert does
                runs[expert] = partial(_module(block, expert), tensor)
            before = seen.setdefault(expert, [])
            candidates = _candidates(block, trace.norms.get(pointer), before, tensor.shape[-1])
            source = next((c for c in candidates if _absorbs(block, runs[expert], linears, c)), None)
            groups.append(Group(tuple(linears), source))
            before += linears
    found = {name for group in groups for name in group.linears}
    return groups + [Group((name,), None) for name in block.linears if name not in found]


def fold(block: Block, group: Group, scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Multiply the group's input channels by `scale` [K] and divide its source, in place; returns the exact scale.

    A norm is rounded to the dtype it will be stored in, and the linears take the ratio that this leaves, so the
    pair still cancels. For a linear source `scale` must agree on channels that share a row.
    """
    if group.source is None:
        raise ValueError(f"group {group.linears} has no source to fold into")
    exact = _divide_source(_module(block, group.source.name), group.source, scale, stored)
    for name in group.linears:
        block.linears[name].weight.mul_(exact)
    return exact


def _divide_source(module: nn.Module, source: Source, scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    weight, bias = module.weight, getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{source.name} has no weight")
    if source.kind == "linear":
        rows = source.rows.to(weight.device)
        per_row = torch.ones_like(weight[:, 0]).index_copy_(0, rows, scale.to(weight.dtype))
        weight.div_(per_row.unsqueeze(1))
        exact = scale
    else:
        shift = 1.0 if source.kind == "norm_plus_one" else 0.0
        per_row = scale.to(weight.dtype)
        gain = weight + shift
        rounded = (gain / per_row - shift).to(stored).to(weight.dtype)
        # A gain that rounds to zero would lose its channel: that one keeps its weight and a scale of one.
        weight.copy_(torch.where(rounded + shift == 0, weight, rounded))
        new_gain = weight + shift
        exact = torch.where(new_gain == 0, torch.ones_like(gain), gain / new_gain)
        per_row = exact
    if isinstance(bias, torch.Tensor):
        bias.div_(per_row)
    return exact


def _module(block: Block, name: str) -> nn.Module:
    """A module of the block by its full name."""
    return block.module.get_submodule(name.removeprefix(f"{block.name}."))


def _trace(block: Block, tokens: torch.Tensor) -> _Trace:
    """What reads and what makes which tensor, with every expert on every token."""
    trace = _Trace({}, {}, [])

    def saw_input(name: str, args: tuple[torch.Tensor, ...]) -> None:
        trace.inputs.setdefault(args[0].data_ptr(), (args[0], []))[1].append(name)

    def saw_output(name: str, output: torch.Tensor) -> None:
        trace.outputs.append(output)
        trace.norms[output.data_ptr()] = name

    hooks = [
        linear.register_forward_pre_hook(lambda _m, args, name=name: saw_input(name, args))
        for name, linear in block.linears.items()
    ]
    for name, module in block.module.named_modules(prefix=block.name):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 1 and not any(module.children()):
            hooks.append(module.register_forward_hook(lambda _m, _a, out, name=name: saw_output(name, out)))
    try:
        with all_tokens(block, experts_of(block)):
            block.run(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def _candidates(block: Block, norm: str | None, seen: list[str], width: int) -> Iterator[Source]:
    if norm is not None:
        rows = torch.arange(width)
        yield Source(norm, "norm", rows)
        yield Source(norm, "norm_plus_one", rows)
        return
    for name in reversed(seen):
        rows_of_source = block.linears[name].out_features
        if rows_of_source >= width:
            # The last rows: up of a fused gate_up, or all rows when the sizes agree.
            yield Source(name, "linear", torch.arange(rows_of_source - width, rows_of_source))
        yield from _of_heads(block, name, rows_of_source, width)


def _of_heads(block: Block, name: str, rows_of_source: int, width: int) -> Iterator[Source]:
    """v_proj, or the values in a fused projection: its last rows, or the last rows of each head.

    Several query heads may share a head of values.
    """
    sizes = {getattr(module, attribute, None) for module in block.module.modules() for attribute in HEAD_SIZES}
    k = torch.arange(width)
    for size in sorted(size for size in sizes if isinstance(size, int) and size > 0 and width % size == 0):
        for values in {rows_of_source, (rows_of_source - width) // 2}:
            if 0 < values < width and width % values == 0 and values % size == 0:
                shared = k // size // (width // values) * size + k % size
                yield Source(name, "linear", rows_of_source - values + shared)
        heads = width // size
        if rows_of_source > width and rows_of_source % heads == 0:
            per_head = rows_of_source // heads
            yield Source(name, "linear", k // size * per_head + per_head - size + k % size)


def _absorbs(block: Block, run: Run, linears: list[str], source: Source) -> bool:
    """Do the outputs of the linears, and what `run` gives, survive a random scale folded into `source`?

    The latter alone would not show a wrong source of a small part of it, nor the linears' another reader.
    """
    module = _module(block, source.name)
    if source.kind != "linear" and getattr(module, "weight", source.rows).shape != source.rows.shape:
        return False
    touched = [*module.parameters(recurse=False), *(block.linears[name].weight for name in linears)]
    saved = [parameter.detach().clone() for parameter in touched]
    generator = torch.Generator().manual_seed(0)
    size = int(source.rows.max()) + 1
    per_row = torch.exp(torch.rand(size, generator=generator) * 1.4 - 0.7).to(saved[0].device, saved[0].dtype)
    wanted = _outputs(block, run, linears)
    fold(block, Group(tuple(linears), source), per_row[source.rows], saved[0].dtype)
    found = _outputs(block, run, linears)
    for parameter, value in zip(touched, saved, strict=True):
        parameter.copy_(value)
    tolerance = FLOAT32_TOLERANCE if wanted[0].dtype == torch.float32 else HALF_TOLERANCE
    pairs = zip(wanted, found, strict=True)
    return all(bool((b - a).float().norm() <= tolerance * a.float().norm()) for a, b in pairs)


def _outputs(block: Block, run: Run, linears: list[str]) -> list[torch.Tensor]:
    """The outputs of some linears, in the order they run, and what `run` gives."""
    outputs: list[torch.Tensor] = []
    hooks = [block.linears[name].register_forward_hook(lambda _m, _a, out: outputs.append(out)) for name in linears]
    try:
        added = run()
        return [*outputs, added]
    finally:
        for hook in hooks:
            hook.remove()
