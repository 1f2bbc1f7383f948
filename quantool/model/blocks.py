"""One decoder block in memory at a time, with the hidden states that reach it.

    states = embed(...)                 hidden states before block 0, one tensor per batch
    for block in stream_blocks(...):    block.module holds real weights, block.states what reaches it
        ...                             look, replay, change the weights in place
                                        on resumption the block runs, states move on, weights are released
    logits(...)                         final norm and head over any hidden states

The network's own forward drives everything outside the blocks, so masks, rotary inputs, embedding scales,
final norms and logit caps are the family's own: during `embed` and `logits` each block's forward is replaced
by a stub that records what the block was called with and passes the hidden states on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn

from quantool.model.memory import halving
from quantool.model.skeleton import Network, materialise, release, tensors_of

PROBE_TOKENS = 16
BATCH_TOKENS = 1024  # on two cores a tenth faster than 512; 2048 gain nothing more and take a third more memory
Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [1, T, hidden] after the last block -> logits [T, vocab], any T."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True)
class States:
    """Hidden states [batch, seq_len, hidden] per batch, and how each block is called for each batch shape."""

    hidden: list[torch.Tensor]
    calls: dict[torch.Size, list[Call]] = field(default_factory=dict)
    tuples: bool = False  # this family's blocks return (hidden, ...) instead of hidden


@dataclass(slots=True)
class Block:
    """One decoder layer with its weights in memory. Methods change them in place; nothing else is loaded."""

    name: str  # "model.layers.0"
    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]  # by full name: "model.layers.0.self_attn.q_proj"
    states: States

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states of a batch shape that `embed` saw, or of `probe`'s."""
        args, kwargs = self.states.calls[hidden.shape][self.index]
        return _hidden(self.module(hidden, *args, **kwargs))

    def probe(self) -> torch.Tensor:
        """A few real tokens [1, PROBE_TOKENS, hidden] to try things on: a prefix of what reaches the block."""
        return self.states.hidden[0][:1, :PROBE_TOKENS]

    def replay(self) -> Iterator[torch.Tensor]:
        """Run every batch of calibration states; the caller's hooks on the linears see their inputs."""
        for hidden in self.states.hidden:
            yield self.run(hidden)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A projection [out_features, in_features], float or packed."""
    return all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))


def _hidden(output: Any) -> torch.Tensor:
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, torch.Tensor)  # noqa: S101 - narrows the type of an untyped library
    return value


Stub = Callable[..., Any]


@contextmanager
def _stubs(network: Network, make: Callable[[int, nn.Module], Stub]) -> Iterator[None]:
    """Replace the forward of every block while the network's own forward runs."""
    blocks = network.blocks
    for i, block in enumerate(blocks):
        block.forward = make(i, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def embed(network: Network, windows: torch.Tensor, *, batch_size: int | None) -> States:
    """Hidden states before block 0 of token windows int64 [num_samples, seq_len], and the call of every block.

    `batch_size` None is as many windows as BATCH_TOKENS hold, at least one; it is halved until such a batch has room
    in the first block.
    """
    head = network.model.get_output_embeddings()
    tied = getattr(head, "weight", None) is network.model.get_input_embeddings().weight
    head_name = next((n for n, m in network.model.named_modules() if m is head), None)
    outside = [n for n in network.outside() if tied or head_name is None or not n.startswith(f"{head_name}.")]
    first = [name for name, _ in tensors_of(network.blocks[0], network.block_names[0])]
    base = getattr(network.model, network.model.base_model_prefix)
    materialise(network, outside + first)
    states, trying = States(hidden=[]), True

    def make(index: int, module: nn.Module) -> Stub:
        original = module.forward

        def stub(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls = states.calls.setdefault(hidden.shape, [])
            if len(calls) == index:
                calls.append((args, kwargs))
            if index == 0:
                if trying:  # for real, to learn what this family's blocks return and whether a batch has room
                    states.tuples = isinstance(original(hidden, *args, **kwargs), tuple)
                states.hidden.append(hidden)
            return (hidden,) if states.tuples else hidden

        return stub

    def run(batch: torch.Tensor) -> None:
        base(input_ids=batch.to(network.device), use_cache=False)

    with _stubs(network, make):
        run(windows[:1, :PROBE_TOKENS])
        size = batch_size or max(1, BATCH_TOKENS // windows.shape[1])
        size, _ = halving("windows", min(size, len(windows)), lambda count: run(windows[:count]))
        trying = False
        run(windows[:1])
        states.hidden.clear()
        for batch in windows.split(size):
            run(batch)
    release(network, outside + first)
    return states


def stream_blocks(network: Network, states: States) -> Iterator[Block]:
    """Yield each block with its weights in memory; on resumption run it over `states` and release it.

    Whatever the consumer did to the weights is what the next block's inputs come from.
    """
    for index, name in enumerate(network.block_names):
        module = network.model.get_submodule(name)
        which = [tensor for tensor, _ in tensors_of(module, name)]
        materialise(network, which)
        linears: dict[str, nn.Linear] = {p: m for p, m in module.named_modules(prefix=name) if is_linear(m)}
        block = Block(name, index, module, linears, states)
        yield block
        for i, output in enumerate(block.replay()):
            states.hidden[i] = output
        release(network, which)


@contextmanager
def open_head(network: Network, states: States) -> Iterator[Head]:
    """The final norm and the head, with their weights in memory inside the `with`."""
    outside = network.outside()
    materialise(network, outside)
    current: list[torch.Tensor] = []

    def make(_index: int, _module: nn.Module) -> Stub:
        return lambda *_args, **_kwargs: (current[0],) if states.tuples else current[0]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        current[:] = [hidden]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = network.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    with _stubs(network, make):
        try:
            yield run
        finally:
            release(network, outside)
