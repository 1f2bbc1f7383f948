"""The experts of a mixture, each with linears of its own, whatever tensors transformers fuses them into.

transformers 5 keeps all experts of a block in two parameters; here they are modules again, with the same arithmetic:

    experts.gate_up_proj  [E, 2I, K]   ->   experts.3.gate_proj  [I, K]     h = act(G x) * (U x)
                                            experts.3.up_proj    [I, K]
    experts.down_proj     [E, K, I]    ->   experts.3.down_proj  [K, I]     y = D h

    output of a token = sum over its experts e of p[e] y[e], the weights p from the router

So a hook on a linear sees the tokens that the router sent to its expert, and nothing else: an expert that gets no
token does not run, and its hooks are not called. Inside `all_tokens` chosen experts run on every token, for statistics,
while the block's output stays the routed one. Activation and gating are the family's own `_apply_gate`; the layout and
the calls are those of `use_experts_implementation` in transformers/integrations/moe.py.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from quantool.model.blocks import Block

EXPERT = re.compile(r"^(?:.+\.)?experts\.\d+(?=\.)")
GATE_UP, DOWN = "gate_up_proj", "down_proj"
LAYOUT = {  # what `use_experts_implementation` calls the layout above
    "has_gate": True,
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
}
PARTS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}  # of one expert, in the order of the fused rows


def expert_of(name: str) -> str | None:
    """The expert that a linear belongs to, "model.layers.0.mlp.experts.3"; None for attention, shared experts, ..."""
    match = EXPERT.match(name)
    return match[0] if match else None


class _Linear(nn.Linear):
    """A linear whose weight comes from a checkpoint: making up thousands of random ones takes seconds."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class Expert(nn.Module):
    """One expert: x [T, K] -> [T, K], through I hidden channels."""

    def __init__(self, columns: int, hidden: int, gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_proj = _Linear(columns, hidden, bias=False, device="meta")
        self.up_proj = _Linear(columns, hidden, bias=False, device="meta")
        self.down_proj = _Linear(hidden, columns, bias=False, device="meta")
        self._gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self._gate(torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)))
        return y


class Experts(nn.ModuleList):
    """All experts of a block, in place of the fused module: same call, same result up to rounding.

    `everywhere` are the numbers of experts that run on every token; `held` is the routing that is kept, by its shape,
    or None.
    """

    def __init__(self, fused: nn.Module) -> None:
        count, columns, hidden = fused.get_parameter(DOWN).shape
        gate: Any = fused._apply_gate
        super().__init__(Expert(columns, hidden, gate) for _ in range(count))
        self.everywhere: set[int] = set()
        self.held: dict[torch.Size, torch.Tensor] | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [T, K], the experts of each token [T, k] and their weights [T, k] -> [T, K]."""
        if self.held is not None:
            top_k_index = self.held.setdefault(top_k_index.shape, top_k_index)
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, place = torch.where(top_k_index == number)
            rows = tokens
            if number in self.everywhere:
                others = torch.ones(len(hidden_states), dtype=torch.bool, device=tokens.device)
                others[tokens] = False
                rows = torch.cat((tokens, others.nonzero()[:, 0]))
            if len(rows):
                y = expert(hidden_states[rows])[: len(tokens)] * top_k_weights[tokens, place, None]
                output.index_add_(0, tokens, y.to(output.dtype))
        return output


def separate_experts(model: nn.Module) -> None:
    """Replace every fused module of experts in a model on the meta device; one of another layout stays as it is."""
    for name, module in list(model.named_modules()):
        if is_fused(module):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Experts(module))


def is_fused(module: nn.Module) -> bool:
    """Whether a module computes what `Experts` does: gate above up, rows are output channels, nothing else added."""
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    return (
        set(shapes) == {GATE_UP, DOWN}
        and hasattr(module, "_apply_gate")
        and all(getattr(module, key, value) == value for key, value in LAYOUT.items())
        and fused_shapes(shapes[GATE_UP], shapes[DOWN])
    )


def fused_shapes(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether these are [E, 2I, K] and [E, K, I]; the transposed layout, [E, K, 2I] and [E, I, K], never is."""
    return len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1]) and min(down) > 0


def experts_of(block: "Block") -> list[str]:
    """The names of a block's experts, in order."""
    lists = [(name, module) for name, module in block.module.named_modules(prefix=block.name)]
    return [f"{name}.{i}" for name, module in lists if isinstance(module, Experts) for i in range(len(module))]


@contextmanager
def all_tokens(block: "Block", experts: Iterable[str | None]) -> Iterator[None]:
    """Run the experts named ("model.layers.0.mlp.experts.3") on every token; what the block returns stays routed.

    Hooks on their linears see all tokens, the routed ones first. None, the `expert_of` of other linears, is skipped.
    Raises ValueError for a module that is not an expert of `Experts`.
    """
    changed: list[Experts] = []
    try:
        for name in filter(None, experts):
            owner, _, number = name.rpartition(".")
            module = block.module.get_submodule(owner.removeprefix(f"{block.name}."))
            if not isinstance(module, Experts):
                raise ValueError(f"'{owner}' is {type(module).__name__}, expected Experts")
            module.everywhere.add(int(number))
            changed.append(module)
        yield
    finally:
        for module in changed:
            module.everywhere.clear()


@contextmanager
def same_routing(block: "Block") -> Iterator[None]:
    """Send tokens where the first run inside sends them, so that rounding cannot move one to another expert."""
    modules = [module for module in block.module.modules() if isinstance(module, Experts)]
    for module in modules:
        module.held = {}
    try:
        yield
    finally:
        for module in modules:
            module.held = None
