"""What eval-ppl keeps of every target, four numbers each, and the figures that are computed from them.

    nll         a = -log q      of the right token t, q the model's probabilities
    reference   b = -log p      the same of the reference model
    divergence  d = sum p (log p - log q)       over the vocabulary
    agreement   whether both have the same best token

Every error is the standard error of a mean over n targets, SE(x) = sqrt((E[x^2] - E[x]^2) / (n - 1)), carried through
what is done to the mean: perplexity exp(E[a]) has exp(E[a]) SE(a); the ratio of two perplexities r = exp(E[a - b]) has
r SE(a - b), which is small because a and b go together; delta p = e^-a - e^-b has a root mean square m with the error
SE(delta p^2) / 2m. A percentile f is the value at f (n - 1) of the sorted ones, interpolated between its neighbours.
These are llama-perplexity's figures under its names: tools/perplexity of https://github.com/ggml-org/llama.cpp
"""

import math
from dataclasses import dataclass, field, replace

import torch

PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


@dataclass(slots=True)
class Scores:
    """Per target, in pieces: see the top of the module. Without a reference only `nll` is filled."""

    nll: list[torch.Tensor] = field(default_factory=list)
    reference_nll: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)
    agreement: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Errors are standard errors of the mean over targets, probabilities fractions of 1.

    What compares with the reference is None without one. The percentiles are named "maximum", "99.9", ..., "50" (the
    median), ..., "0.1", "minimum".
    """

    model: str
    protocol: str
    perplexity: float
    perplexity_error: float
    tokens: int
    num_samples: int
    seq_len: int
    dataset: str
    seconds: float
    peak_memory_bytes: int
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    kl_divergence: float | None = None
    kl_divergence_error: float | None = None
    kl_divergence_percentiles: dict[str, float] | None = None
    top1_agreement: float | None = None
    top1_agreement_error: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    perplexity_difference: float | None = None
    perplexity_difference_error: float | None = None
    ln_perplexity_ratio: float | None = None
    ln_perplexity_ratio_error: float | None = None
    ln_perplexity_correlation: float | None = None
    delta_p: float | None = None
    delta_p_error: float | None = None
    delta_p_rms: float | None = None
    delta_p_rms_error: float | None = None
    delta_p_percentiles: dict[str, float] | None = None


def perplexity(nll: torch.Tensor) -> tuple[float, float]:
    """exp of the mean, and its error, of negative log likelihoods float64 [n]."""
    value = _exp(nll.mean().item())
    return value, value * standard_error(nll)


def compared(result: EvalResult, scores: Scores) -> EvalResult:
    """The result with the figures of scores that have a reference."""
    nll, reference = torch.cat(scores.nll), torch.cat(scores.reference_nll)
    divergence, agreement = torch.cat(scores.divergence), torch.cat(scores.agreement)
    (ours, _), (theirs, theirs_error) = perplexity(nll), perplexity(reference)
    longer, change = nll - reference, (-nll).exp() - (-reference).exp()
    ratio, rms = _exp(longer.mean().item()), change.square().mean().sqrt().item()
    return replace(
        result,
        reference_perplexity=theirs,
        reference_perplexity_error=theirs_error,
        perplexity_ratio=ratio,
        perplexity_ratio_error=ratio * standard_error(longer),
        perplexity_difference=ours - theirs,
        perplexity_difference_error=standard_error(ours * nll - theirs * reference),
        ln_perplexity_ratio=longer.mean().item(),
        ln_perplexity_ratio_error=standard_error(longer),
        ln_perplexity_correlation=_correlation(nll, reference),
        kl_divergence=divergence.mean().item(),
        kl_divergence_error=standard_error(divergence),
        kl_divergence_percentiles=percentiles(divergence),
        delta_p=change.mean().item(),
        delta_p_error=standard_error(change),
        delta_p_rms=rms,
        delta_p_rms_error=standard_error(change.square()) / (2 * rms) if rms else 0.0,
        delta_p_percentiles=percentiles(change),
        top1_agreement=agreement.mean().item(),
        top1_agreement_error=standard_error(agreement),
    )


def percentiles(values: torch.Tensor) -> dict[str, float]:
    """Maximum, PERCENTILES and minimum of values [n], n at least 1."""
    ordered = values.sort().values  # torch.quantile has a limit of 16 million
    found = {f"{percent:g}": _at(ordered, percent / 100) for percent in PERCENTILES}
    return {"maximum": ordered[-1].item(), **found, "minimum": ordered[0].item()}


def _at(ordered: torch.Tensor, fraction: float) -> float:
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below].lerp(ordered[above], place - below))


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of values [n]; NaN for a single one."""
    if values.numel() < 2:
        return math.nan
    return (values.std() / math.sqrt(values.numel())).item()


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    length = (a.norm() * b.norm()).item()
    return (a @ b).item() / length if length else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
