"""Perplexity over token windows, block by block in bounded memory; with a reference, the divergence from it.

Protocol `hf`: independent windows of `seq_len` tokens, every next token of a window is a target. With a stride the
windows overlap and only the targets not scored before count. With a reference model P and this model Q, over the
same targets:  KL(P || Q) = sum p (log p - log q), and top-1 agreement: how often both have the same best token.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain

import torch

from quantool.data import Progress, TextOptions, no_progress
from quantool.errors import UsageError
from quantool.model.blocks import Head, States, embed, open_head, stream_blocks
from quantool.model.skeleton import Network
from quantool.runtime import open_model
from quantool.stages.calibrate import require_vocabulary, sample_windows
from quantool.stages.resources import Stopwatch, peak_memory_bytes

LOGITS = 1 << 24  # values of one piece of logits: 64 MB in float32


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Errors are standard errors of the mean over targets; the reference fields are None without one."""

    model: str
    perplexity: float
    perplexity_error: float
    tokens: int
    num_samples: int
    seq_len: int
    dataset: str
    seconds: float
    peak_memory_bytes: int
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    kl_divergence_error: float | None = None
    top1_agreement: float | None = None


@dataclass(slots=True)
class _Scores:
    """Per target, in pieces: negative log likelihood, that of the reference, divergence, agreement."""

    nll: list[torch.Tensor] = field(default_factory=list)
    reference_nll: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)
    agreement: list[torch.Tensor] = field(default_factory=list)


@torch.inference_mode()
def run(
    model: str,
    *,
    text: TextOptions,
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
    networks = [open_model(m, dtype=dtype, device=device) for m in (model, reference) if m is not None]
    windows = sample_windows(networks[0], text)
    fresh = windows.shape[1] - 1
    if stride is not None:
        windows, fresh = _overlapping(windows, stride)
    _require_same_vocabulary(networks, windows)
    total = sum(len(n.block_names) for n in networks) + len(windows)
    states = []
    for i, one in enumerate(networks):
        done = sum(len(n.block_names) for n in networks[:i])
        states.append(_hidden_states(one, windows, batch_size=batch_size, done=done, total=total, progress=progress))
    scores = _score(networks, states, windows, fresh=fresh, total=total, progress=progress)
    return _result(model, text, windows, scores, watch)


def _hidden_states(
    network: Network, windows: torch.Tensor, *, batch_size: int | None, done: int, total: int, progress: Progress
) -> States:
    """What the last block puts out."""
    progress(done, total, "running")
    states = embed(network, windows, batch_size=batch_size)
    for block in stream_blocks(network, states):
        progress(done + block.index + 1, total, "running")
    return states


def _score(
    networks: list[Network],
    states: list[States],
    windows: torch.Tensor,
    *,
    fresh: int,
    total: int,
    progress: Progress,
) -> _Scores:
    scores = _Scores()
    with ExitStack() as stack:
        heads = [stack.enter_context(open_head(network, s)) for network, s in zip(networks, states, strict=True)]
        outputs = zip(*(chain.from_iterable(s.hidden) for s in states), strict=True)
        for i, (window, hidden) in enumerate(zip(windows, outputs, strict=True)):
            # The first window of a text scores all its targets, a later overlapping one only its new ones.
            start = 0 if i == 0 else window.shape[0] - 1 - fresh
            _score_window(heads, list(hidden), window, start, scores)
            progress(total - len(windows) + i + 1, total, "scoring")
    return scores


def _score_window(
    heads: list[Head], hidden: list[torch.Tensor], window: torch.Tensor, start: int, scores: _Scores
) -> None:
    targets = window[1:].to(hidden[0].device)
    vocabulary = heads[0](hidden[0][None, :1]).shape[-1]
    step = max(1, LOGITS // vocabulary)
    for begin in range(start, len(targets), step):
        end = min(begin + step, len(targets))
        log_q = heads[0](hidden[0][None, begin:end]).float().log_softmax(-1)
        wanted = targets[begin:end, None]
        scores.nll.append(-log_q.gather(1, wanted).squeeze(1).double())
        if len(heads) > 1:
            log_p = heads[1](hidden[1][None, begin:end]).float().log_softmax(-1)
            scores.reference_nll.append(-log_p.gather(1, wanted).squeeze(1).double())
            scores.agreement.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
            scores.divergence.append((log_p.exp() * (log_p - log_q)).sum(-1).double())


def _overlapping(windows: torch.Tensor, stride: int) -> tuple[torch.Tensor, int]:
    """The same tokens in windows that start every `stride`, and how many targets of each are new."""
    seq_len = windows.shape[1]
    if not 1 <= stride < seq_len:
        raise UsageError(f"stride is {stride}, expected 1 to {seq_len - 1}", hint=f"use --stride {seq_len // 2}")
    return windows.flatten().unfold(0, seq_len, stride).clone(), stride


def _require_same_vocabulary(networks: list[Network], windows: torch.Tensor) -> None:
    for one in networks[1:]:
        sizes = [n.model.config.vocab_size for n in networks]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"--reference {one.checkpoint.path} has a vocabulary of {sizes[1]}, the model one of {sizes[0]}",
                hint="compare with the checkpoint that the model was made from",
            )
        require_vocabulary(windows, one, f"{networks[0].checkpoint.path}: its tokenizer")


def _result(model: str, text: TextOptions, windows: torch.Tensor, scores: _Scores, watch: Stopwatch) -> EvalResult:
    nll = torch.cat(scores.nll)
    perplexity = _exp(nll.mean().item())
    reference = kl = kl_error = top1 = None
    if scores.divergence:
        divergence = torch.cat(scores.divergence)
        reference = _exp(torch.cat(scores.reference_nll).mean().item())
        kl, kl_error = divergence.mean().item(), _standard_error(divergence)
        top1 = torch.cat(scores.agreement).mean().item()
    return EvalResult(
        model=model,
        perplexity=perplexity,
        perplexity_error=perplexity * _standard_error(nll),
        tokens=nll.numel(),
        num_samples=windows.shape[0],
        seq_len=windows.shape[1],
        dataset=text.dataset,
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        reference_perplexity=reference,
        kl_divergence=kl,
        kl_divergence_error=kl_error,
        top1_agreement=top1,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _standard_error(values: torch.Tensor) -> float:
    if values.numel() < 2:
        return math.nan
    return (values.std() / math.sqrt(values.numel())).item()
