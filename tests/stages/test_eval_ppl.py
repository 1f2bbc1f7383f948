"""Perplexity and divergence against the same numbers computed from whole transformers models."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from quantool import load
from quantool.data import TextOptions
from quantool.errors import QuantoolError
from quantool.recipe import Recipe
from quantool.stages import eval_ppl as stage
from quantool.stages import quantize
from quantool.stages.eval_ppl import EvalResult, run

SAMPLES, LENGTH = 7, 64


@pytest.fixture
def text(text_file: Path) -> TextOptions:
    return TextOptions(dataset=str(text_file), num_samples=SAMPLES, seq_len=LENGTH)


@pytest.fixture(scope="module")
def tokens(text_file: Path, tokenizer: Tokenizer) -> torch.Tensor:
    ids = tokenizer.encode(text_file.read_text(encoding="utf-8")).ids
    return torch.tensor(ids[: SAMPLES * LENGTH])


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "w3"
    quantize.run(str(tiny_llama), out, Recipe(bits=3, group_size=64, sym=False), text=TextOptions())
    return out


def evaluate(model: Path, text: TextOptions, **options: Any) -> EvalResult:
    reference = options.pop("reference", None)
    return run(str(model), text=text, reference=reference and str(reference), **options)


def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """log p float64 [SAMPLES * (LENGTH - 1), vocab] at every target of every window."""
    with torch.inference_mode():
        logits = model(input_ids=tokens.view(SAMPLES, LENGTH)).logits[:, :-1]
    return logits.double().log_softmax(-1).flatten(0, 1)


def negative_log_likelihood(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -log_p.gather(1, tokens.view(SAMPLES, LENGTH)[:, 1:].reshape(-1, 1)).squeeze(1)


def whole(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


# --- perplexity


@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_of_a_float_model(
    tiny_llama: Path, text: TextOptions, tokens: torch.Tensor, batch_size: int
) -> None:
    nll = negative_log_likelihood(log_probabilities(whole(tiny_llama), tokens), tokens)
    result = evaluate(tiny_llama, text, batch_size=batch_size)
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert result.perplexity < 50, "trained, where chance is 320"
    error = float(nll.std()) / math.sqrt(len(nll)) * math.exp(nll.mean())
    assert result.perplexity_error == pytest.approx(error, rel=1e-3)
    assert (result.tokens, result.num_samples, result.seq_len) == (SAMPLES * (LENGTH - 1), SAMPLES, LENGTH)
    assert (result.model, result.dataset) == (str(tiny_llama), text.dataset)
    assert result.seconds > 0
    assert result.peak_memory_bytes > 50_000_000
    assert result.reference_perplexity is result.kl_divergence is result.top1_agreement is None


def test_perplexity_of_a_gguf_and_of_artifacts(
    tiny_gguf: Path, tiny_llama: Path, artifact: Path, text: TextOptions, tokens: torch.Tensor, tmp_path: Path
) -> None:
    quantize.run(str(tiny_llama), tmp_path / "awq", Recipe(format="awq"), text=TextOptions())
    for model in (tiny_gguf, artifact, tmp_path / "awq"):
        nll = negative_log_likelihood(log_probabilities(load(model), tokens), tokens)
        assert evaluate(model, text).perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)


def test_perplexity_of_the_gguf_through_transformers(
    tiny_gguf: Path, tiny_llama: Path, text: TextOptions, tokens: torch.Tensor
) -> None:
    """The network of transformers with the weights that the gguf package decodes, put back in place by hand."""
    import gguf
    from gguf.quants import dequantize

    model = whole(tiny_llama)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    for name, parameter in model.named_parameters():
        tensor = stored[f"{names.get_name(name.removesuffix('.weight'))}.weight"]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                weight = weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        parameter.data.copy_(weight)
    nll = negative_log_likelihood(log_probabilities(model, tokens), tokens)
    assert evaluate(tiny_gguf, text).perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)


def test_perplexity_of_an_artifact_through_transformers(
    tiny_llama: Path, text: TextOptions, tokens: torch.Tensor, tmp_path: Path
) -> None:
    quantize.run(str(tiny_llama), tmp_path / "out", Recipe(bits=3), text=TextOptions())
    nll = negative_log_likelihood(log_probabilities(whole(tmp_path / "out"), tokens), tokens)
    assert evaluate(tmp_path / "out", text).perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)


def test_all_windows_by_default_and_the_test_split(tiny_llama: Path, text: TextOptions, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(Path(text.dataset).read_text(encoding="utf-8")).ids
    result = evaluate(tiny_llama, replace(text, num_samples=None))
    assert result.num_samples == len(ids) // LENGTH
    assert result.tokens == len(ids) // LENGTH * (LENGTH - 1)


@pytest.mark.parametrize("stride", [1, 20, 63])
def test_stride(tiny_llama: Path, text: TextOptions, tokens: torch.Tensor, stride: int) -> None:
    """Windows start every `stride` tokens; a target is scored once, in the first window that reaches it."""
    few = tokens[: 3 * LENGTH]
    model = whole(tiny_llama)
    scored: dict[int, float] = {}
    for start in range(0, len(few) - LENGTH + 1, stride):
        with torch.inference_mode():
            log_p = model(input_ids=few[None, start : start + LENGTH]).logits[0].double().log_softmax(-1)
        for offset in range(1, LENGTH):
            if start + offset not in scored:
                scored[start + offset] = -float(log_p[offset - 1, few[start + offset]])
    result = evaluate(tiny_llama, replace(text, num_samples=3), stride=stride)
    assert result.tokens == len(scored)
    assert result.perplexity == pytest.approx(math.exp(sum(scored.values()) / len(scored)), rel=1e-4)


@pytest.mark.parametrize("stride", [0, LENGTH, -1])
def test_a_stride_that_leaves_gaps_is_refused(tiny_llama: Path, text: TextOptions, stride: int) -> None:
    with pytest.raises(QuantoolError, match=f"stride is {stride}, expected 1 to 63"):
        evaluate(tiny_llama, text, stride=stride)


def test_a_single_target(tiny_llama: Path, text: TextOptions) -> None:
    """One target has no standard error: no warning, no crash."""
    result = evaluate(tiny_llama, replace(text, num_samples=1, seq_len=2), reference=tiny_llama)
    assert result.tokens == 1
    assert result.perplexity > 1
    assert math.isnan(result.perplexity_error)
    assert result.kl_divergence == 0


def test_logits_in_pieces(tiny_llama: Path, artifact: Path, text: TextOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window whose logits do not fit into one piece is scored in several, to the same numbers."""
    at_once = evaluate(artifact, text, reference=tiny_llama)
    monkeypatch.setattr(stage, "LOGITS", 320 * 10)
    pieces = evaluate(artifact, text, reference=tiny_llama)
    for name in ("perplexity", "kl_divergence", "kl_divergence_error", "top1_agreement", "tokens"):
        assert getattr(pieces, name) == pytest.approx(getattr(at_once, name), rel=1e-5)


# --- against a reference


def test_a_model_is_itself(tiny_llama: Path, tiny_sharded: Path, text: TextOptions) -> None:
    for reference in (tiny_llama, tiny_sharded):
        result = evaluate(tiny_llama, text, reference=reference)
        assert result.kl_divergence == 0
        assert result.kl_divergence_error == 0
        assert result.top1_agreement == 1
        assert result.reference_perplexity == result.perplexity


def test_divergence_of_an_artifact(tiny_llama: Path, artifact: Path, text: TextOptions, tokens: torch.Tensor) -> None:
    log_p, log_q = (log_probabilities(model, tokens) for model in (whole(tiny_llama), load(artifact)))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    result = evaluate(artifact, text, reference=tiny_llama)
    assert result.kl_divergence == pytest.approx(float(divergence.mean()), rel=1e-3)
    expected = float(divergence.std()) / math.sqrt(len(divergence))
    assert result.kl_divergence_error == pytest.approx(expected, rel=1e-2)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agreement), abs=1.5 / len(divergence))
    assert 0.5 < float(agreement) < 1
    nll = negative_log_likelihood(log_p, tokens)
    assert result.reference_perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert result.perplexity != result.reference_perplexity
    backwards = evaluate(tiny_llama, text, reference=artifact)
    assert backwards.kl_divergence != pytest.approx(result.kl_divergence, rel=1e-3), "KL is not symmetric"


def smaller_vocabulary(model: Path, out: Path, rows: int) -> Path:
    """The model without the last tokens of its vocabulary, though its tokenizer may give them."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return out


@pytest.mark.parametrize("rows", [319, 200])
def test_another_vocabulary_is_refused_before_any_work(
    tiny_llama: Path, text: TextOptions, tmp_path: Path, rows: int
) -> None:
    def worked(done: int, total: int, label: str) -> None:
        raise AssertionError("no work before the refusal")

    other = smaller_vocabulary(tiny_llama, tmp_path / "other", rows)
    for model, reference in ((tiny_llama, other), (other, tiny_llama)):
        with pytest.raises(QuantoolError) as caught:
            evaluate(model, text, reference=reference, progress=worked)
        assert str(rows) in caught.value.message
        assert str(other) in caught.value.message or f"--reference {reference}" in caught.value.message
        assert caught.value.hint is not None


# --- the command line


@pytest.mark.parametrize(
    ("limits", "code", "words"),
    [
        (["--max-ppl", "1.5"], 3, "perplexity is "),
        (["--max-ppl", "1000"], 0, ""),
        (["--max-kld", "0.000001"], 3, "KL divergence is "),
        (["--max-kld", "1", "--max-ppl", "1000"], 0, ""),
        (["--max-kld", "1", "--max-ppl", "2"], 3, "perplexity is "),
    ],
)
def test_limits(
    command: Callable[..., Any],
    tiny_llama: Path,
    artifact: Path,
    text: TextOptions,
    limits: list[str],
    code: int,
    words: str,
) -> None:
    options = ["--dataset", text.dataset, "--num-samples", "3", "--seq-len", "64", "--reference", tiny_llama, "--json"]
    outcome = command("eval-ppl", artifact, *options, *limits)
    assert outcome.code == code
    result = json.loads(outcome.out)
    assert result["perplexity"] > 2
    assert result["kl_divergence"] > 1e-6
    assert {"perplexity_error", "reference_perplexity", "kl_divergence_error", "top1_agreement"} <= result.keys()
    if code:
        assert outcome.err.startswith(f"error: {words}")
        assert outcome.err.count("error:") == 1
    else:
        assert outcome.err == ""


def test_json_of_a_single_target_has_null(command: Callable[..., Any], tiny_llama: Path, text: TextOptions) -> None:
    options = ["--dataset", text.dataset, "--num-samples", "1", "--seq-len", "2", "--json"]
    outcome = command("eval-ppl", tiny_llama, *options)
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["perplexity_error"] is None
