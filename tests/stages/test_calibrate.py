"""The calibration file: what it holds, against hooks on the whole transformers model."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import Command, save_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from quantool import __version__
from quantool.data import TextOptions
from quantool.errors import QuantoolError, UsageError
from quantool.recipe import Recipe
from quantool.stages import quantize
from quantool.stages.calibrate import CalibrateResult, recorder, run

LINEARS = [
    f"model.layers.{i}.{name}_proj"
    for i in (0, 1)
    for name in [f"self_attn.{x}" for x in "qkvo"] + [f"mlp.{x}" for x in ("gate", "up", "down")]
]


@pytest.fixture
def text(text_file: Path) -> TextOptions:
    return TextOptions(dataset=str(text_file), num_samples=5, seq_len=48)


def calibrate(model: Path, output: Path, text: TextOptions, **options: Any) -> CalibrateResult:
    return run(str(model), output, text=text, **options)


def windows_of(tokenizer: Tokenizer, text: TextOptions) -> torch.Tensor:
    assert text.num_samples is not None
    assert text.seq_len is not None
    ids = tokenizer.encode(Path(text.dataset).read_text(encoding="utf-8")).ids
    return torch.tensor(ids[: text.num_samples * text.seq_len]).view(text.num_samples, text.seq_len)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        metadata: dict[str, str] = opened.metadata()
    return metadata


def test_names_dtypes_shapes_and_metadata(
    tiny_llama: Path, tokenizer: Tokenizer, text: TextOptions, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "calibration.safetensors"
    result = calibrate(tiny_llama, path, text)
    tensors = load_file(path)
    kinds = ("act_amax", "act_mean_sq", "tokens")
    assert set(tensors) == {"input_ids"} | {f"{name}.{kind}" for name in LINEARS for kind in kinds}
    for name in LINEARS:
        width = 384 if "down_proj" in name else 128
        for kind in kinds[:2]:
            assert (tensors[f"{name}.{kind}"].dtype, tensors[f"{name}.{kind}"].shape) == (torch.float32, (width,))
        assert tensors[f"{name}.tokens"].dtype == torch.int64
        assert tensors[f"{name}.tokens"].tolist() == [5 * 48]
    windows = windows_of(tokenizer, text)
    assert tensors["input_ids"].dtype == torch.int32
    assert torch.equal(tensors["input_ids"], windows)

    metadata = metadata_of(path)
    assert len(metadata.pop("source_sha256")) == 64
    assert metadata == {
        "format": "pt",
        "quantool_version": __version__,
        "dataset": text.dataset,
        "split": "train",
        "seed": "0",
        "num_samples": "5",
        "seq_len": "48",
        "input_ids_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    }
    values = asdict(result)
    assert values.pop("seconds") > 0
    assert values.pop("peak_memory_bytes") > 50_000_000
    assert values == {
        "output": str(path),
        "linears": 14,
        "tokens": 240,
        "num_samples": 5,
        "seq_len": 48,
        "dataset": text.dataset,
        "seed": 0,
        "bytes": path.stat().st_size,
        "starved_experts": 0,
        "least_expert": None,
        "least_tokens": None,
    }
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_statistics_are_those_of_the_whole_model(
    tiny_llama: Path, tokenizer: Tokenizer, text: TextOptions, tmp_path: Path, batch_size: int
) -> None:
    """Batches of 3 and 2: the mean is over tokens, not over batches."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    for name in LINEARS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1).double())
        )
    with torch.inference_mode():
        model(input_ids=windows_of(tokenizer, text))
    calibrate(tiny_llama, tmp_path / "c.safetensors", text, batch_size=batch_size)
    tensors = load_file(tmp_path / "c.safetensors")
    for name in LINEARS:
        torch.testing.assert_close(
            tensors[f"{name}.act_amax"].double(), inputs[name].abs().amax(0), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            tensors[f"{name}.act_mean_sq"].double(), inputs[name].square().mean(0), rtol=1e-4, atol=1e-8
        )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Two blocks of 16 experts, 2 to a token."""
    directory = tmp_path_factory.mktemp("mixture") / "qwen3-moe"
    families.save(families.make_model("qwen3_moe", vocab_size=320, num_experts=16, seed=1), directory)
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.mark.parametrize("length", [4, 48])
def test_experts_see_the_tokens_routed_to_them(
    mixture: Path, tokenizer: Tokenizer, text: TextOptions, tmp_path: Path, length: int
) -> None:
    """Against what reaches the fused experts of transformers; of 16 experts 4 tokens leave at least 8 out."""
    from transformers import AutoModelForCausalLM

    text = replace(text, num_samples=1 if length == 4 else 5, seq_len=length)
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    calls: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args, i=i: calls.__setitem__(i, args[:2]))
    with torch.inference_mode():
        model(input_ids=windows_of(tokenizer, text))
    result = calibrate(mixture, tmp_path / "c.safetensors", text, batch_size=2)
    tensors = load_file(tmp_path / "c.safetensors")

    counts = {}
    for i, (hidden, chosen) in calls.items():
        for expert in range(16):
            name = f"model.layers.{i}.mlp.experts.{expert}"
            rows = hidden[(chosen == expert).any(-1)].double()
            counts[name] = len(rows)
            assert {int(tensors[f"{name}.{x}_proj.tokens"]) for x in ("gate", "up", "down")} == {len(rows)}
            for x in ("gate", "up"):
                amax, mean_sq = (tensors[f"{name}.{x}_proj.act_{kind}"] for kind in ("amax", "mean_sq"))
                expected = (rows.abs().amax(0), rows.square().mean(0)) if len(rows) else (torch.zeros(32).double(),) * 2
                torch.testing.assert_close(amax.double(), expected[0], rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(mean_sq.double(), expected[1], rtol=1e-4, atol=1e-6)
            assert (tensors[f"{name}.down_proj.act_amax"].max() > 0) == (len(rows) > 0)
            assert tensors[f"{name}.down_proj.act_amax"].shape == (24,)
    assert set(tensors) == {"input_ids"} | {
        f"{name}.{kind}" for name in (*linears_of(counts),) for kind in ("act_amax", "act_mean_sq", "tokens")
    }
    assert result.linears == 2 * (16 * 3 + 4)
    assert result.starved_experts == sum(count < length for count in counts.values())
    assert result.least_tokens == min(counts.values())
    assert counts[str(result.least_expert)] == result.least_tokens
    assert (result.least_tokens == 0) == (length == 4)


def linears_of(experts: Iterable[str]) -> list[str]:
    attention = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"]
    return attention + [f"{expert}.{x}_proj" for expert in experts for x in ("gate", "up", "down")]


def test_a_batch_without_tokens_changes_nothing() -> None:
    """Families that loop over all their experts call one without a token with an empty batch."""
    tensors = {"X.act_amax": torch.zeros(4), "X.act_mean_sq": torch.zeros(4), "X.tokens": torch.zeros(1).long()}
    x = torch.randn(2, 3, 4)
    linear = torch.nn.Linear(4, 2)
    linear.register_forward_pre_hook(recorder(tensors, "X"))
    for part in (x[:, :0], x[:1], x[:0], x[1:]):
        linear(part)
    assert tensors["X.tokens"].tolist() == [6]
    assert torch.equal(tensors["X.act_amax"], x.abs().amax((0, 1)))
    torch.testing.assert_close(tensors["X.act_mean_sq"], x.square().mean((0, 1)))


def test_a_dry_run_knows_the_experts(mixture: Path, text: TextOptions, tmp_path: Path) -> None:
    dry = calibrate(mixture, tmp_path / "c.safetensors", text, dry_run=True)
    done = calibrate(mixture, tmp_path / "c.safetensors", text)
    assert (dry.linears, dry.bytes) == (done.linears, done.bytes)
    assert (dry.starved_experts, dry.least_expert, dry.least_tokens) == (0, None, None)


def test_the_table_names_starved_experts(command: Command, mixture: Path, text: TextOptions, tmp_path: Path) -> None:
    args = ("calibrate", mixture, "-o", tmp_path / "c", "--dataset", text.dataset, "--num-samples", 2, "--overwrite")
    outcome = command(*args, "--seq-len", 4)
    record = json.loads(command(*args, "--seq-len", 4, "--json").out)
    assert record["starved_experts"] > 0
    line = next(line for line in outcome.out.splitlines() if line.startswith("experts"))
    assert line.split("  ")[-1].strip() == (
        f"{record['starved_experts']} saw fewer than one window of 4 tokens; "
        f"the least, {record['least_tokens']}: {record['least_expert']}"
    )


def test_an_existing_file_is_kept(tiny_llama: Path, text: TextOptions, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_text("mine")
    unread = replace(text, dataset="/nowhere.txt")  # the refusal comes before any work
    with pytest.raises(UsageError, match="already exists"):
        calibrate(tiny_llama, path, unread)
    assert path.read_text() == "mine"
    calibrate(tiny_llama, path, text, overwrite=True)
    assert "input_ids" in load_file(path)
    with pytest.raises(UsageError, match="is not a file"):
        calibrate(tiny_llama, tmp_path, unread, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]


def test_dry_run_writes_nothing(tiny_llama: Path, text: TextOptions, tmp_path: Path) -> None:
    dry = calibrate(tiny_llama, tmp_path / "c.safetensors", text, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = calibrate(tiny_llama, tmp_path / "c.safetensors", text)
    same = ("output", "linears", "tokens", "num_samples", "seq_len", "dataset", "seed", "bytes")
    assert [getattr(dry, name) for name in same] == [getattr(done, name) for name in same]


def test_same_run_same_bytes_and_a_seed_draws_others(tiny_llama: Path, text: TextOptions, tmp_path: Path) -> None:
    contents = []
    for i, seed in enumerate((7, 7, 8)):
        calibrate(tiny_llama, tmp_path / str(i), replace(text, seed=seed))
        contents.append((tmp_path / str(i)).read_bytes())
    assert contents[0] == contents[1]
    assert metadata_of(tmp_path / "0")["input_ids_sha256"] != metadata_of(tmp_path / "2")["input_ids_sha256"]
    everything = load_file(tmp_path / "0")["input_ids"]
    calibrate(tiny_llama, tmp_path / "all", replace(text, num_samples=None))
    available = {tuple(row) for row in load_file(tmp_path / "all")["input_ids"].tolist()}
    assert {tuple(row) for row in everything.tolist()} <= available


def test_the_source_is_told_apart(tiny_llama: Path, tiny_tied: Path, text: TextOptions, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    hashes = []
    for i, model in enumerate((tiny_llama, copy, tiny_tied)):
        calibrate(model, tmp_path / str(i), text)
        hashes.append(metadata_of(tmp_path / str(i))["source_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_gguf_gives_the_same_file_but_for_its_rounding(
    tiny_llama: Path, tiny_gguf: Path, text: TextOptions, tmp_path: Path
) -> None:
    for name, model in (("hf", tiny_llama), ("gguf", tiny_gguf)):
        calibrate(model, tmp_path / name, text)
    hf, gguf = load_file(tmp_path / "hf"), load_file(tmp_path / "gguf")
    assert hf.keys() == gguf.keys()
    assert torch.equal(hf["input_ids"], gguf["input_ids"])
    for name in LINEARS:
        ours, theirs = gguf[f"{name}.act_mean_sq"], hf[f"{name}.act_mean_sq"]
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_an_artifact_has_statistics_too(tiny_llama: Path, text: TextOptions, tmp_path: Path) -> None:
    """MODEL may be quantized already; its linears are no nn.Linear then."""
    quantize.run(str(tiny_llama), tmp_path / "out", Recipe(bits=8), text=text)
    result = calibrate(tmp_path / "out", tmp_path / "artifact", text)
    calibrate(tiny_llama, tmp_path / "source", text)
    artifact, source = load_file(tmp_path / "artifact"), load_file(tmp_path / "source")
    assert result.linears == 14
    assert artifact.keys() == source.keys()
    for name in LINEARS:
        ours, theirs = artifact[f"{name}.act_mean_sq"], source[f"{name}.act_mean_sq"]
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_names_are_those_of_the_checkpoint(tiny_llama: Path, text: TextOptions, tmp_path: Path) -> None:
    """A checkpoint of the base model has no "model." in front; the file is for that checkpoint."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = {name.removeprefix("model."): value for name, value in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")
    calibrate(model, tmp_path / "c", text)
    assert "layers.0.self_attn.q_proj.act_amax" in load_file(tmp_path / "c")


def test_jsonl(tiny_llama: Path, text: TextOptions, tmp_path: Path) -> None:
    lines = Path(text.dataset).read_text(encoding="utf-8").split("\n\n")
    rows = [json.dumps({"body": line, "text": "x"}) for line in lines]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    calibrate(tiny_llama, tmp_path / "a", text)
    calibrate(tiny_llama, tmp_path / "b", replace(text, dataset=str(tmp_path / "text.jsonl"), text_column="body"))
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_never_silently_fewer(tiny_llama: Path, text: TextOptions, tmp_path: Path) -> None:
    with pytest.raises(QuantoolError, match=r"9999 windows of 48 tokens asked for, the text has \d+ ") as caught:
        calibrate(tiny_llama, tmp_path / "c", replace(text, num_samples=9999))
    assert caught.value.hint is not None
    assert "--num-samples" in caught.value.hint
    with pytest.raises(QuantoolError, match="the text has 0 "):
        calibrate(tiny_llama, tmp_path / "c", replace(text, num_samples=1, seq_len=100_000))
    assert list(tmp_path.iterdir()) == []


def test_the_window_is_the_models_by_default(tiny_llama: Path, text: TextOptions, tmp_path: Path) -> None:
    result = calibrate(tiny_llama, tmp_path / "c", replace(text, num_samples=2, seq_len=None), dry_run=True)
    assert result.seq_len == 256
