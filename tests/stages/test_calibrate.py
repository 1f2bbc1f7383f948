"""The calibration file: what it holds, against hooks on the whole transformers model."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from quantool import __version__
from quantool.data import TextOptions
from quantool.errors import QuantoolError, UsageError
from quantool.recipe import Recipe
from quantool.stages import quantize
from quantool.stages.calibrate import CalibrateResult, run

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
