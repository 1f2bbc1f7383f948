"""Perplexity over token windows, block by block in bounded memory; with a reference, the divergence from it.

Protocol `hf`: independent windows of `seq_len` tokens, every next token of a window is a target. With a stride the
windows overlap and only the targets not scored before count. With a reference model P and this model Q, over the
same targets:  KL(P || Q) = sum p (log p - log q), and top-1 agreement: how often both have the same best token.

Protocol `llama.cpp`: what llama-perplexity measures, so that figures can be compared with its own. Windows of 512 as
`data.chunks` cuts them, and of each only the second half counts: with n = seq_len the tokens n/2 + 1 .. n - 1 are
targets, 255 of 512, so that every one has context. Tokens that P gives less than e^-16 are left out of KL.

    window   | BOS  t1  t2  ...  t255  t256 | t257  ...  t511 |
                    context                   targets

llama-perplexity keeps P's logits in a file of 16 bits per token of the vocabulary (37 GB for WikiText-2 and Llama 3).
Here both models run side by side over GROUP_BYTES of hidden states at a time, in float32, and nothing is kept but the
scores of the targets (scores.py).
Source: tools/perplexity/perplexity.cpp of https://github.com/ggml-org/llama.cpp
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch

from quantool.data import Progress, TextOptions, chunks, no_progress
from quantool.errors import UsageError
from quantool.model.blocks import Head, States, embed, open_head, stream_blocks
from quantool.model.memory import explained
from quantool.model.skeleton import Network, load_tokenizer
from quantool.runtime import open_model
from quantool.stages.calibrate import require_vocabulary, sample_windows
from quantool.stages.resources import Stopwatch, peak_memory_bytes
from quantool.stages.scores import EvalResult, Scores, compared, perplexity

LOGITS = 1 << 24  # values of one piece of logits: 64 MB in float32
GROUP_BYTES = 1 << 28  # of hidden states of one model
LLAMACPP_SEQ_LEN = 512
LLAMACPP_FLOOR = -16.0  # log p below which a token does not count in KL, as in llama-perplexity
Protocol = Literal["hf", "llama.cpp"]
Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Windows:
    """Tokens int64 [num_samples, seq_len], and which of them count; target i of a window is its token i + 1."""

    tokens: torch.Tensor
    first: int  # the first target of the first window
    later: int  # and that of every later one
    floor: float  # log p of the reference from which on a token counts in the divergence


@torch.inference_mode()
@explained()
def run(
    model: str,
    *,
    text: TextOptions,
    protocol: Protocol = "hf",
    stride: int | None = None,
    reference: str | None = None,
    batch_size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = no_progress,
) -> EvalResult:
    """Perplexity of MODEL on `text`, and with `reference` how far it is from that model.

    Raises QuantoolError when a model or the text cannot be used, or the two models differ in vocabulary.
    """
    watch = Stopwatch()
    if protocol == "llama.cpp" and stride is not None:
        raise UsageError(
            f"stride is {stride}, but the windows of protocol llama.cpp do not overlap",
            hint="leave --stride out, or use --protocol hf",
        )
    networks = [open_model(m, dtype=dtype, device=device) for m in (model, reference) if m is not None]
    windows = _llamacpp_windows(networks[0], text) if protocol == "llama.cpp" else _windows(networks[0], text, stride)
    _require_same_vocabulary(networks, windows.tokens)
    scores = _score(networks, windows, batch_size=batch_size, progress=progress)
    nll = torch.cat(scores.nll)
    value, error = perplexity(nll)
    result = EvalResult(
        model=model,
        protocol=protocol,
        perplexity=value,
        perplexity_error=error,
        tokens=nll.numel(),
        num_samples=windows.tokens.shape[0],
        seq_len=windows.tokens.shape[1],
        dataset=text.dataset,
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )
    return compared(result, scores) if reference is not None else result


def _windows(network: Network, text: TextOptions, stride: int | None) -> _Windows:
    """Those of protocol hf: with a stride, the same tokens in windows that start every `stride` of them."""
    tokens = sample_windows(network, text)
    seq_len = tokens.shape[1]
    if stride is None:
        return _Windows(tokens, 0, 0, -math.inf)
    if not 1 <= stride < seq_len:
        raise UsageError(f"stride is {stride}, expected 1 to {seq_len - 1}", hint=f"use --stride {seq_len // 2}")
    # The first window of a text scores all its targets, a later one, which overlaps it, only its new ones.
    return _Windows(tokens.flatten().unfold(0, seq_len, stride).clone(), 0, seq_len - 1 - stride, -math.inf)


def _llamacpp_windows(network: Network, text: TextOptions) -> _Windows:
    seq_len = text.seq_len or LLAMACPP_SEQ_LEN
    if seq_len < 3:
        raise UsageError(f"seq_len is {seq_len}, protocol llama.cpp needs at least 3", hint="use --seq-len 512")
    tokens = chunks(text, load_tokenizer(network.checkpoint), seq_len)
    require_vocabulary(tokens, network, f"{network.checkpoint.path}: its tokenizer")
    return _Windows(tokens, seq_len // 2, seq_len // 2, LLAMACPP_FLOOR)


def _score(networks: list[Network], windows: _Windows, *, batch_size: int | None, progress: Progress) -> Scores:
    """The scores of all targets, a group of windows at a time: its hidden states are what is in memory."""
    width = max(network.model.config.get_text_config().hidden_size * network.dtype.itemsize for network in networks)
    groups = windows.tokens.split(max(1, GROUP_BYTES // (windows.tokens.shape[1] * width)))
    total = len(groups) * sum(len(network.block_names) for network in networks) + len(windows.tokens)
    done = 0

    def step(label: str) -> None:
        nonlocal done
        done += 1
        progress(done, total, label)

    progress(0, total, "running")
    scores, first = Scores(), windows.first
    for group in groups:
        states = [_hidden_states(network, group, batch_size=batch_size, step=step) for network in networks]
        with ExitStack() as stack:
            heads = [stack.enter_context(open_head(network, s)) for network, s in zip(networks, states, strict=True)]
            outputs = zip(*(chain.from_iterable(s.hidden) for s in states), strict=True)
            for window, hidden in zip(group, outputs, strict=True):
                _score_window(heads, list(hidden), window, first=first, floor=windows.floor, scores=scores)
                first = windows.later
                step("scoring")
    return scores


def _hidden_states(network: Network, windows: torch.Tensor, *, batch_size: int | None, step: Step) -> States:
    """What the last block puts out."""
    states = embed(network, windows, batch_size=batch_size)
    for _ in stream_blocks(network, states):
        step("running")
    return states


def _score_window(
    heads: list[Head], hidden: list[torch.Tensor], window: torch.Tensor, *, first: int, floor: float, scores: Scores
) -> None:
    targets = window[1:].to(hidden[0].device)
    vocabulary = heads[0](hidden[0][None, :1]).shape[-1]
    piece = max(1, LOGITS // vocabulary)
    for begin in range(first, len(targets), piece):
        end = min(begin + piece, len(targets))
        log_q = heads[0](hidden[0][None, begin:end]).float().log_softmax(-1)
        wanted = targets[begin:end, None]
        scores.nll.append(-log_q.gather(1, wanted).squeeze(1).double())
        if len(heads) > 1:
            log_p = heads[1](hidden[1][None, begin:end]).float().log_softmax(-1)
            scores.reference_nll.append(-log_p.gather(1, wanted).squeeze(1).double())
            scores.agreement.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
            lost = (log_p.exp() * (log_p - log_q)).masked_fill_(log_p <= floor, 0)
            scores.divergence.append(lost.sum(-1).double())


def _require_same_vocabulary(networks: list[Network], windows: torch.Tensor) -> None:
    for one in networks[1:]:
        sizes = [n.model.config.vocab_size for n in networks]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"--reference {one.checkpoint.path} has a vocabulary of {sizes[1]}, the model one of {sizes[0]}",
                hint="compare with the checkpoint that the model was made from",
            )
        require_vocabulary(windows, one, f"{networks[0].checkpoint.path}: its tokenizer")
