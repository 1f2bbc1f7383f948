"""Protocol llama.cpp of eval-ppl against llama-perplexity's sums over the logits of the real llama.cpp.

Both models are float32 GGUF files, so that llama.cpp rounds no activations and every figure has to agree closely; the
sums are written out here in float64, as tools/perplexity has them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.data import TextOptions, chunks
from quantool.errors import UsageError
from quantool.io import open_checkpoint
from quantool.stages import eval_ppl as stage
from quantool.stages.eval_ppl import EvalResult, run
from quantool.stages.scores import Scores, percentiles

CHUNKS, N_CTX = 8, 64
TARGETS = CHUNKS * (N_CTX - 1 - N_CTX // 2)


def rewrite(source: Path, out: Path, through: Q | None) -> Path:
    """A copy in float32 that asks for BOS; with `through` every matrix is rounded to that type."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        array = field.types[0] is gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if array else None)
    writer.add_add_bos_token(True)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if through is not None and values.ndim == 2:
            values = dequantize(quantize(values, through), through).reshape(values.shape)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def base(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(tiny_gguf, tmp_path_factory.mktemp("gguf") / "base.gguf", None)


@pytest.fixture(scope="module")
def rounded(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(tiny_gguf, tmp_path_factory.mktemp("gguf") / "rounded.gguf", Q.Q4_0)


@pytest.fixture(scope="module")
def text(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TextOptions:
    """A file with every kind of line break, the name of a special token, and a line break at its end."""
    path = tmp_path_factory.mktemp("text") / "raw.txt"
    beginning = b"One\r\ntwo\rthree </s> four <s>\n\n\n"
    path.write_bytes(beginning + text_file.read_bytes()[:6000] + b"\n")
    return TextOptions(str(path), num_samples=CHUNKS, seq_len=N_CTX)


@pytest.fixture(scope="module")
def tokens(base: Path, text: TextOptions) -> list[int]:
    """As llama-perplexity tokenizes."""
    content = Path(text.dataset).read_bytes().decode().removesuffix("\n")
    return llamacpp.tokenize(base, content, add_special=True, parse_special=False)


@pytest.fixture(scope="module")
def logits(base: Path, rounded: Path, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of the model and of the base, float64 [TARGETS, V], from llama.cpp."""
    found: list[np.ndarray] = []
    for path in (rounded, base):
        rows = []
        for start in range(0, CHUNKS * N_CTX, N_CTX):
            window = [0, *tokens[start + 1 : start + N_CTX]]  # 0 is BOS
            rows.append(llamacpp.logits(path, window)[N_CTX // 2 : N_CTX - 1])
        found.append(np.concatenate(rows).astype(np.float64))
    return found[0], found[1]


def expected(logits: tuple[np.ndarray, np.ndarray], tokens: list[int]) -> dict[str, Any]:
    """What llama-perplexity prints."""
    log_q, log_p = (rows - np.log(np.exp(rows).sum(-1, keepdims=True)) for rows in logits)
    right = [tokens[c * N_CTX + i + 1] for c in range(CHUNKS) for i in range(N_CTX // 2, N_CTX - 1)]
    rows = np.arange(TARGETS)
    nll, nll_base = -log_q[rows, right], -log_p[rows, right]
    kld = np.where(log_p > -16, np.exp(log_p) * (log_p - log_q), 0).sum(-1)
    delta = np.exp(-nll) - np.exp(-nll_base)

    def mean_and_error(x: np.ndarray) -> tuple[float, float]:
        f = x.sum() / TARGETS
        return f, math.sqrt(((x * x).sum() / TARGETS - f * f) / (TARGETS - 1))

    (a, da), (b, db), (mse, dmse) = mean_and_error(nll), mean_and_error(nll_base), mean_and_error(delta**2)
    covariance = ((nll * nll_base).sum() / TARGETS - a * b) / (TARGETS - 1)
    ratio_error = math.sqrt(da * da + db * db - 2 * covariance)
    same = float((log_q.argmax(-1) == log_p.argmax(-1)).mean())
    ppl, ppl_base, rms = math.exp(a), math.exp(b), math.sqrt(mse)
    pairs = {
        "perplexity": (ppl, ppl * da),
        "reference_perplexity": (ppl_base, ppl_base * db),
        "ln_perplexity_ratio": (a - b, ratio_error),
        "perplexity_ratio": (math.exp(a - b), math.exp(a - b) * ratio_error),
        "perplexity_difference": (
            ppl - ppl_base,
            math.sqrt((ppl * da) ** 2 + (ppl_base * db) ** 2 - 2 * ppl * ppl_base * covariance),
        ),
        "kl_divergence": mean_and_error(kld),
        "delta_p": mean_and_error(delta),
        "delta_p_rms": (rms, 0.5 / rms * dmse),
        "top1_agreement": (same, math.sqrt(same * (1 - same) / (TARGETS - 1))),
    }
    values = {key: value for key, (value, _) in pairs.items()} | {f"{key}_error": e for key, (_, e) in pairs.items()}
    return values | {"ln_perplexity_correlation": covariance / (da * db), "kld": kld, "delta": delta}


@pytest.fixture(scope="module")
def result(base: Path, rounded: Path, text: TextOptions) -> EvalResult:
    return run(str(rounded), text=text, protocol="llama.cpp", reference=str(base))


def test_every_figure_of_llama_perplexity(
    result: EvalResult, logits: tuple[np.ndarray, np.ndarray], tokens: list[int]
) -> None:
    wanted = expected(logits, tokens)
    assert (result.tokens, result.num_samples, result.seq_len) == (TARGETS, CHUNKS, N_CTX)
    assert result.protocol == "llama.cpp"
    assert result.kl_divergence > 0.001, "there is something to measure"
    for key in [key for key in wanted if hasattr(result, key)]:
        assert getattr(result, key) == pytest.approx(wanted[key], rel=2e-3, abs=1e-5), key
    for found, values in ((result.kl_divergence_percentiles, "kld"), (result.delta_p_percentiles, "delta")):
        ordered = np.sort(wanted[values])
        assert found["maximum"] == pytest.approx(ordered[-1], rel=2e-3, abs=1e-5)
        assert found["minimum"] == pytest.approx(ordered[0], rel=2e-3, abs=1e-5)
        for name in ("99.9", "99", "95", "90", "50", "10", "5", "1", "0.1"):
            assert found[name] == pytest.approx(np.quantile(ordered, float(name) / 100), rel=2e-3, abs=1e-5)


def test_the_windows_are_llama_cpps(base: Path, text: TextOptions, tokens: list[int], monkeypatch: Any) -> None:
    """Token by token, with BOS in the place of the first of each."""
    seen: list[torch.Tensor] = []
    original = stage.embed

    def embed(network: Any, windows: torch.Tensor, **options: Any) -> Any:
        seen.append(windows)
        return original(network, windows, **options)

    monkeypatch.setattr(stage, "embed", embed)
    run(str(base), text=replace(text, num_samples=None), protocol="llama.cpp")
    windows = torch.cat(seen)
    assert len(windows) == len(tokens) // N_CTX, "what is left at the end is dropped"
    expected_windows = torch.tensor(tokens[: windows.numel()]).view(windows.shape)
    expected_windows[:, 0] = 0
    assert torch.equal(windows, expected_windows)
    plain = llamacpp.tokenize(base, "</s>", add_special=False, parse_special=False)
    assert len(plain) > 1, "the name of a special token in a text is text"
    assert 1 not in windows


@pytest.mark.parametrize("data", [b"a\xe2\x82 b\xff\xc3", b"\xf0\x9f\x98", "äöü".encode()])
def test_bytes_that_are_no_text(base: Path, tmp_path: Path, data: bytes) -> None:
    """One replacement character for each, as llama.cpp has it, where Python has one for several."""
    (tmp_path / "text.txt").write_bytes(data * 20)
    with llamacpp.loaded(base, vocab_only=True) as model:
        ids = (llamacpp.Int * 2000)()
        count = llamacpp.vocab_tokenize(llamacpp.get_vocab(model), data * 20, len(data) * 20, ids, 2000, True, False)
    tokenizer = stage.load_tokenizer(open_checkpoint(base))
    found = chunks(TextOptions(str(tmp_path / "text.txt"), num_samples=None), tokenizer, 5)
    expected = torch.tensor(ids[: count // 5 * 5]).view(-1, 5)
    expected[:, 0] = 0
    assert torch.equal(found, expected)


def test_a_model_that_adds_no_bos(tiny_gguf: Path, tiny_llama: Path, text: TextOptions, tokens: list[int]) -> None:
    """Of the same weights, and of the float checkpoint they were made from: the windows start one token later."""
    rows = [llamacpp.logits(tiny_gguf, tokens[s + 1 : s + N_CTX + 1]) for s in range(0, CHUNKS * N_CTX, N_CTX)]
    nll = []
    for c, row in enumerate(rows):
        scored = torch.tensor(row[N_CTX // 2 : N_CTX - 1]).double().log_softmax(-1)
        right = torch.tensor(tokens[c * N_CTX + 1 + N_CTX // 2 + 1 : (c + 1) * N_CTX + 1])
        nll.append(-scored.gather(1, right[:, None]))
    perplexity = math.exp(torch.cat(nll).mean())
    for model in (tiny_gguf, tiny_llama):
        found = run(str(model), text=text, protocol="llama.cpp")
        assert found.perplexity == pytest.approx(perplexity, rel=0.02), "llama.cpp rounds activations to 8 bits"
        assert abs(found.perplexity - perplexity) < found.perplexity_error / 4


def test_groups_of_windows_bound_the_memory(
    result: EvalResult, base: Path, rounded: Path, text: TextOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states of three windows at a time give the same figures as those of all."""
    groups: list[int] = []
    original = stage.embed

    def embed(network: Any, windows: torch.Tensor, **options: Any) -> Any:
        groups.append(len(windows))
        return original(network, windows, **options)

    monkeypatch.setattr(stage, "embed", embed)
    monkeypatch.setattr(stage, "GROUP_BYTES", 3 * N_CTX * 128 * 4)
    steps: list[tuple[int, int]] = []
    found = run(
        str(rounded),
        text=text,
        protocol="llama.cpp",
        reference=str(base),
        progress=lambda done, total, _label: steps.append((done, total)),
    )
    assert groups == [3, 3, 3, 3, 2, 2]
    assert found.perplexity == pytest.approx(result.perplexity, rel=1e-5)
    assert found.kl_divergence == pytest.approx(result.kl_divergence, rel=1e-3)
    total = 3 * 2 * 2 + CHUNKS
    assert steps == [(i, total) for i in range(total + 1)]


def test_tokens_below_the_floor_do_not_count() -> None:
    """p below e^-16 counts in protocol hf only; a logit of minus infinity counts in none."""
    torch.manual_seed(0)
    rows = torch.randn(2, 5, 50) * 6
    rows[1, :, :40] -= 25  # the base gives these less than e^-16
    log_q, log_p = (rows[i].double().log_softmax(-1) for i in (0, 1))
    parts = log_p.exp() * (log_p - log_q)
    heads = [lambda h, i=i: rows[i][: h.shape[1]] for i in (0, 1)]
    hidden = [torch.zeros(6, 1)] * 2
    for floor, wanted in ((-16.0, torch.where(log_p > -16, parts, 0)), (-math.inf, parts)):
        scores = Scores()
        stage._score_window(heads, hidden, torch.arange(6), first=0, floor=floor, scores=scores)
        assert torch.allclose(torch.cat(scores.divergence), wanted.sum(-1), rtol=1e-4, atol=0)
    assert float(parts[log_p <= -16].abs().max()) > 1e-7, "there is a difference to be seen"
    rows[:, :, 7] = -math.inf
    scores = Scores()
    stage._score_window(heads, hidden, torch.arange(6), first=0, floor=-math.inf, scores=scores)
    assert bool(torch.isfinite(torch.cat(scores.divergence)).all())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_percentiles_are_numpys(values: list[float]) -> None:
    found = percentiles(torch.tensor(values, dtype=torch.float64))
    assert (found["maximum"], found["minimum"]) == (max(values), min(values))
    for name in set(found) - {"maximum", "minimum"}:
        assert found[name] == pytest.approx(float(np.quantile(values, float(name) / 100)), rel=1e-9, abs=1e-9)


# --- real models


def test_the_perplexity_that_llama_perplexity_printed(shared: Path, tmp_path: Path) -> None:
    golden = json.loads((shared / "golden" / "llamacpp-stories-4m.json").read_text())
    with (shared / "data" / "stories.txt").open("rb") as file:
        file.seek(600_000)
        (tmp_path / "text.txt").write_bytes(file.read(400_000))
    text = TextOptions(str(tmp_path / "text.txt"), num_samples=100)
    found = run(str(shared / "models" / "stories-4m"), text=text, protocol="llama.cpp")
    assert (found.seq_len, found.tokens) == (512, 255 * 100), "512 though the model was trained on less"
    assert found.perplexity == pytest.approx(golden["base_ppl"], rel=1e-3)


# --- the command line


def test_the_table_and_the_json(command: Callable[..., Any], base: Path, rounded: Path, text: TextOptions) -> None:
    options = ["--dataset", text.dataset, "--num-samples", CHUNKS, "--seq-len", N_CTX, "--protocol", "llama.cpp"]
    outcome = command("eval-ppl", rounded, *options, "--reference", base)
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads(command("eval-ppl", rounded, *options, "--reference", base, "--json").out)
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["KL", "divergence", f"{record['kl_divergence']:.6f}", "±", f"{record['kl_divergence_error']:.6f}"] in lines
    percentiles_of = record["kl_divergence_percentiles"]
    median = ["median", f"{percentiles_of['50']:.6f}", f"{100 * record['delta_p_percentiles']['50']:.3f}", "%"]
    assert median in lines
    assert next(iter(percentiles_of)) == "maximum"
    assert next(line for line in lines if line[:1] == ["maximum"])[1] == f"{percentiles_of['maximum']:.6f}"
    alone = command("eval-ppl", rounded, *options)
    assert alone.code == 0
    assert "divergence" not in alone.out


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--stride", "4"], "stride is 4"), (["--seq-len", "2"], "seq_len is 2"), (["--num-samples", "99999"], "has ")],
)
def test_what_the_protocol_refuses(
    command: Callable[..., Any], base: Path, text: TextOptions, options: list[str], words: str
) -> None:
    outcome = command("eval-ppl", base, "--dataset", text.dataset, "--protocol", "llama.cpp", *options)
    assert outcome.code in (1, 2)
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert outcome.err.count("\n") == 2, "an error and a hint"


def test_a_stride_is_refused_before_the_model_is_opened(text: TextOptions) -> None:
    with pytest.raises(UsageError, match="stride is 4"):
        run("no-such-model", text=text, protocol="llama.cpp", stride=4)
