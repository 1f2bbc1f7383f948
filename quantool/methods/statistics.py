"""What reaches the linears of a block, collected by replaying the calibration tokens.

    moment = mean of x x^T over tokens, float32 [K, K]      GPTQ's Hessian up to a factor, AWQ's magnitudes
    amax   = max |x| per channel, float32 [K]               SmoothQuant's migration
    sample = some of the inputs x themselves, [T, K]        to try a rounding of activations on

A linear deep in the block needs only what runs before it: the replay of a batch ends at the last linear asked for.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from quantool.model.blocks import Block
from quantool.model.experts import expert_of
from quantool.model.folds import Source

STRIP = 384  # channels
SAMPLE = 512  # tokens kept of each linear's input, at least, when so many reach it


class Factor(NamedTuple):
    """What GPTQ makes of a second moment."""

    order: torch.Tensor  # int64 [K], the columns in the order in which they are rounded
    U: torch.Tensor  # float32 [K, K], upper triangular: the Cholesky factor of H^-1 in that order
    cost: torch.Tensor  # float32 [K], the damped diagonal of H as stored: what an error of a column costs by itself


@dataclass(slots=True)
class Inputs:
    """Statistics of what reaches one linear, or several that share their input. Mutable while it is collected."""

    moment: torch.Tensor
    amax: torch.Tensor
    tokens: int = 0
    pieces: list[torch.Tensor] = field(default_factory=list)
    every: int = 1  # which tokens `pieces` has: 0, every, 2 every, ...
    factor: Factor | None = None  # what GPTQ makes of the moment, once for all linears

    @property
    def sample(self) -> torch.Tensor:
        """Inputs [T, K], float32."""
        return torch.cat(self.pieces)

    def scaled(self, scale: torch.Tensor) -> "Inputs":
        """The statistics of x / scale [K]."""
        pieces = [piece / scale for piece in self.pieces]
        return Inputs(self.moment / scale.outer(scale), self.amax / scale, self.tokens, pieces, self.every)


def _nothing(linear: torch.nn.Linear) -> Inputs:
    """Before the first token."""
    zeros = torch.zeros(linear.in_features, device=linear.weight.device)
    return Inputs(zeros.new_zeros(len(zeros), len(zeros)), zeros)


def shared_by_source(values: torch.Tensor, source: Source | None, how: str) -> torch.Tensor:
    """`values` [K] made equal over the input channels that one row of the source feeds, as with shared key-value heads.

    `how` is "mean" or "amax".
    """
    if source is None or source.kind != "linear":
        return values
    rows = source.rows.to(values.device)
    per_row = values.new_zeros(int(rows.max()) + 1)
    return per_row.scatter_reduce(0, rows, values, how, include_self=False)[rows]


class _Done(Exception):
    """Every linear asked for has run."""


def collect(block: Block, linears: Iterable[str], *, samples: bool) -> dict[str, Inputs]:
    """Inputs of each of `linears`, given in the order in which they run.

    One that no token reaches has `tokens` 0 and a moment of zeros.
    """
    wanted = list(linears)
    found = {name: _nothing(block.linears[name]) for name in wanted}

    def add(name: str, x: torch.Tensor) -> None:
        _add(found[name], x.reshape(-1, x.shape[-1]).float(), samples)
        if name == wanted[-1] and expert_of(name) is None:  # the last to run, and it has run
            raise _Done

    _replay(block, wanted, add)
    for inputs in found.values():
        upper = inputs.moment.triu_().div_(max(1, inputs.tokens))
        inputs.moment = upper + upper.triu(1).T
    return found


def _add(inputs: Inputs, x: torch.Tensor, samples: bool) -> None:
    if not x.shape[0]:
        return
    for start in range(0, x.shape[1], STRIP):  # x^T x is symmetric: only what lies right of the diagonal blocks
        end = start + STRIP
        inputs.moment[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
    torch.maximum(inputs.amax, x.abs().amax(0), out=inputs.amax)
    if samples:
        inputs.pieces.append(x[(-inputs.tokens) % inputs.every :: inputs.every].clone())
        while sum(map(len, inputs.pieces)) >= 2 * SAMPLE:
            inputs.pieces = [inputs.sample[::2].clone()]
            inputs.every *= 2
    inputs.tokens += x.shape[0]


def input_ranges(block: Block, linears: Sequence[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Least (at most 0) and greatest (at least 0) value that reaches each of `linears`: float32 scalars."""
    zero = torch.zeros((), device=block.states.hidden[0].device)
    ranges = dict.fromkeys(linears, (zero, zero))

    def widen(name: str, x: torch.Tensor) -> None:
        if x.numel():
            low, high = ranges[name]
            least, greatest = torch.aminmax(x.float())
            ranges[name] = torch.minimum(low, least), torch.maximum(high, greatest)

    _replay(block, linears, widen)
    return ranges


def _replay(block: Block, linears: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> None:
    """Run the block on every batch and show `see` what reaches each of `linears`; it may end a batch by _Done."""
    hooks = [
        block.linears[name].register_forward_pre_hook(lambda _m, args, name=name: see(name, args[0]))
        for name in linears
    ]
    try:
        for hidden in block.states.hidden:
            with suppress(_Done):
                block.run(hidden)
    finally:
        for hook in hooks:
            hook.remove()
