"""What inspect says, against numbers taken from the files by the safetensors and gguf libraries."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantool.data import TextOptions
from quantool.errors import CheckFailed, QuantoolError
from quantool.recipe import Override, Recipe
from quantool.stages import calibrate, quantize
from quantool.stages.inspect import ActivationRow, InspectResult, TensorRow, run

TEXT = TextOptions(num_samples=2, seq_len=32)
MIXED = Recipe(group_size=64, overrides=(Override("down_proj", bits=8, group_size=-1), Override("o_proj", ignore=True)))
KINDS = {"attention", "mlp", "embedding", "head", "norm"}


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "mixed"
    quantize.run(str(tiny_llama), out, MIXED, text=TEXT)
    return out


def inspect(artifact: Path, **options: Any) -> InspectResult:
    against = options.pop("against", None)
    return run(str(artifact), against=against and str(against), **options)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def sums(result: InspectResult, table: str, key: str) -> float:
    return sum(entry[key] for entry in getattr(result, table).values())


# --- numbers


def test_a_float_checkpoint(tiny_llama: Path, tiny_sharded: Path) -> None:
    tensors = stored(tiny_llama)
    parameters, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    for model in (tiny_llama, tiny_sharded):
        result = inspect(model)
        assert (result.artifact, result.format) == (str(model), "safetensors")
        assert (result.parameters, result.bytes, result.bits_per_weight) == (parameters, size, 16)
        assert result.by_dtype == {"BF16": {"tensors": 21, "parameters": parameters, "bytes": size}}
        assert set(result.by_kind) == KINDS
        assert {entry["bits_per_weight"] for entry in result.by_kind.values()} == {16}
        for name, words in {"embedding": ["embed"], "head": ["lm_head"], "norm": ["norm"], "mlp": [".mlp."]}.items():
            expected = sum(t.nbytes for n, t in tensors.items() if any(word in n for word in words))
            assert result.by_kind[name]["bytes"] == expected
        assert sums(result, "by_kind", "bytes") == size
        assert (result.schemes, result.tensors) == ({}, [])
        assert result.metadata["model_type"] == "llama"


def test_an_artifact(tiny_llama: Path, artifact: Path) -> None:
    tensors, source = stored(artifact), stored(tiny_llama)
    result = inspect(artifact, tensors=True)
    parameters = sum(math.prod(t.shape) for t in source.values())
    size = sum(t.nbytes for t in tensors.values())
    assert result.format == "compressed-tensors pack-quantized"
    assert result.parameters == parameters, "packed codes count as the weights they stand for"
    assert result.bytes == size
    assert result.bits_per_weight == pytest.approx(size * 8 / parameters)
    assert result.schemes == {"W4A16 sym g64": 10, "W8A16 sym channel": 2}
    assert set(result.by_dtype) == {"BF16", "I32", "I64"}
    assert sums(result, "by_dtype", "bytes") == sums(result, "by_kind", "bytes") == size
    assert sums(result, "by_dtype", "tensors") == len(tensors)
    assert sums(result, "by_kind", "parameters") == parameters
    rows = {row.name: row for row in result.tensors}
    assert rows.keys() == source.keys()
    gate = rows["model.layers.1.mlp.gate_proj.weight"]
    # 4 bits, a bfloat16 scale for each 64 weights, and a shape of 16 bytes
    assert gate.bytes == 384 * 128 // 2 + 384 * 2 * 2 + 16
    assert gate.bits_per_weight == pytest.approx(gate.bytes * 8 / (384 * 128))
    assert (gate.dtype, gate.shape) == ("W4A16 sym g64", [384, 128])
    norm = rows["model.norm.weight"]
    assert (norm.dtype, norm.shape, norm.bytes, norm.bits_per_weight) == ("BF16", [128], 256, 16)
    assert (norm.relative_error, norm.min, norm.max, norm.mean) == (None, None, None, None)


def test_the_awq_format(tiny_llama: Path, tmp_path: Path) -> None:
    quantize.run(str(tiny_llama), tmp_path / "out", Recipe(format="awq", sym=False), text=TEXT)
    result = inspect(tmp_path / "out", against=tiny_llama)
    assert result.format == "awq gemm"
    assert result.schemes == {"W4A16 asym g128": 14}
    assert result.parameters == inspect(tiny_llama).parameters
    assert all(0.03 < row.relative_error < 0.2 for row in result.tensors if row.dtype == "W4A16 asym g128")


def test_a_gguf(tiny_gguf: Path) -> None:
    reader = gguf.GGUFReader(tiny_gguf)
    result = inspect(tiny_gguf, tensors=True)
    assert result.format == "gguf"
    assert result.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert result.bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    found = {dtype: entry["tensors"] for dtype, entry in result.by_dtype.items()}
    assert found == {"F32": 5, "F16": 8, "Q8_0": 6, "Q4_1": 2}
    assert result.by_kind["embedding"]["bits_per_weight"] == 8.5
    rows = {row.name: row for row in result.tensors}
    assert rows["model.layers.0.mlp.down_proj.weight"].bits_per_weight == 5
    assert result.metadata["general.architecture"] == "llama"


def test_one_safetensors_file(artifact: Path) -> None:
    result = inspect(artifact / "model.safetensors", filter="weight_packed")
    assert result.format == "safetensors"
    assert len(result.tensors) == 12
    with safe_open(artifact / "model.safetensors", "pt") as opened:
        names = set(opened.keys())
    assert {row.name for row in result.tensors} < names


# --- rows


def test_filter_limits_rows_not_sums(artifact: Path) -> None:
    result = inspect(artifact, filter=r"layers\.1\..*(gate|up)_proj")
    assert [row.name.split(".")[4] for row in result.tensors] == ["gate_proj", "up_proj"]
    everything = inspect(artifact)
    assert (result.bytes, result.by_kind) == (everything.bytes, everything.by_kind)
    assert inspect(artifact, filter="no such tensor").tensors == []


def test_stats(tiny_llama: Path) -> None:
    for row in inspect(tiny_llama, stats=True).tensors:
        values = stored(tiny_llama)[row.name].double()
        assert (row.min, row.max) == (float(values.min()), float(values.max()))
        assert row.mean == pytest.approx(float(values.mean()), abs=1e-9)


def test_error_against_the_source(tiny_llama: Path, artifact: Path) -> None:
    """8 bits per channel decode in one line: W = scale * (byte - 128)."""
    tensors, source = stored(artifact), stored(tiny_llama)
    rows = {row.name: row for row in inspect(artifact, against=tiny_llama).tensors}
    assert len(rows) == 21
    for name, row in rows.items():
        if "down_proj" in name:
            module = name.removesuffix(".weight")
            codes = tensors[f"{module}.weight_packed"].view(torch.uint8).double()
            lost = (codes - 128) * tensors[f"{module}.weight_scale"].double() - source[name].double()
            assert row.relative_error == pytest.approx(float(lost.norm() / source[name].double().norm()), rel=1e-4)
            assert row.relative_error is not None
            assert 0 < row.relative_error < 0.02
        elif "norm" in name or "embed" in name or "o_proj" in name or "lm_head" in name:
            assert row.relative_error == 0
        else:
            assert row.relative_error is not None
            assert 0.03 < row.relative_error < 0.2


def test_error_against_other_forms(tiny_llama: Path, tiny_gguf: Path, artifact: Path) -> None:
    of_gguf = {row.name: row.relative_error for row in inspect(tiny_gguf, against=tiny_llama).tensors}
    assert of_gguf["model.norm.weight"] == 0
    assert of_gguf["model.layers.0.self_attn.q_proj.weight"] < 1e-3, "q and k are in Hugging Face order"
    assert 0.01 < of_gguf["model.layers.0.mlp.down_proj.weight"] < 0.1
    assert all(row.relative_error == 0 for row in inspect(artifact, against=artifact).tensors)
    both = inspect(artifact, filter="up_proj", against=tiny_gguf).tensors
    assert len(both) == 2


def test_against_another_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tiny_llama / "config.json", other)
    save_file({"something.else": torch.ones(3)}, other / "model.safetensors")
    with pytest.raises(QuantoolError, match="has none of the tensors"):
        inspect(tiny_llama, against=other)
    save_file({"model.norm.weight": torch.ones(3)}, other / "model.safetensors")
    with pytest.raises(QuantoolError, match=r"'model.norm.weight': shape \[3\], .* has \[128\]"):
        inspect(tiny_llama, against=other)


# --- verify


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight_scale", "lm_head.weight"])
def test_verify_finds_what_is_not_finite(
    command: Callable[..., Any], artifact: Path, tmp_path: Path, name: str, bad: float
) -> None:
    assert command("inspect", artifact, "--verify").code == 0
    damaged = Path(shutil.copytree(artifact, tmp_path / "damaged"))
    tensors = stored(damaged)
    tensors[name].view(-1)[1] = bad
    save_file(tensors, damaged / "model.safetensors")
    assert command("inspect", damaged).code == 0
    outcome = command("inspect", damaged, "--verify", "--json")
    assert outcome.code == 3
    assert outcome.err.startswith("error: ")
    assert name.removesuffix("_scale") in outcome.err


def test_verify_finds_codes_that_contradict(artifact: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(artifact, tmp_path / "damaged"))
    tensors = stored(damaged)
    tensors["model.layers.0.mlp.up_proj.weight_shape"][1] = 127
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises((QuantoolError, CheckFailed), match=r"model\.layers\.0\.mlp\.up_proj"):
        inspect(damaged, verify=True)


def test_an_empty_tensor_is_no_failure(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    save_file({**stored(model), "empty": torch.zeros(0, 4)}, model / "model.safetensors")
    result = inspect(model, verify=True, stats=True, against=model)
    assert next(row for row in result.tensors if row.name == "empty").bits_per_weight is None


# --- calibration files


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    calibrate.run(str(tiny_llama), path, text=TEXT)
    return path


def test_a_calibration_file(calibration: Path) -> None:
    result = inspect(calibration, tensors=True)
    assert result.format == "calibration"
    assert (result.parameters, result.bits_per_weight, result.linears) == (0, None, 14)
    assert len(result.tensors) == 1 + 3 * 14
    assert result.bytes == sum(tensor.nbytes for tensor in load_file(calibration).values())
    assert result.metadata["num_samples"] == "2"
    assert (result.activations, inspect(calibration).tensors) == ([], [])
    assert len(inspect(calibration, filter="layers.0.mlp.up_proj").tensors) == 3
    inspect(calibration, verify=True, stats=True)


def test_outlier_channels(calibration: Path) -> None:
    """Against numpy in float64; the model has three hidden channels that are 16 times as large as the others."""
    tensors = {name: tensor.numpy().astype(np.float64) for name, tensor in load_file(calibration).items()}
    result = inspect(calibration, stats=True)
    assert result.tensors == [], "the statistics of the statistics are of no use"
    assert len(result.activations) == 14
    for row in result.activations:
        amax, energy = np.sort(tensors[f"{row.name}.act_amax"]), np.sort(tensors[f"{row.name}.act_mean_sq"])
        top = {128: 1, 384: 3}[row.channels]
        assert (row.channels, row.tokens, row.amax) == (len(amax), 64, amax[-1])
        assert row.outlier_share == pytest.approx(energy[-top:].sum() / energy.sum(), rel=1e-12)
        half = len(amax) // 2
        assert row.max_to_median == pytest.approx(amax[-1] / amax[half - 1 : half + 1].mean(), rel=1e-12)
    ratios = [row.max_to_median for row in result.activations]
    assert ratios == sorted(ratios, reverse=True), "the worst first"
    behind_norms = [row for row in result.activations if any(f".{x}_proj" in row.name for x in "qkv")]
    others = [row for row in result.activations if ".o_proj" in row.name]
    assert min(row.max_to_median for row in behind_norms) > 5 > max(row.max_to_median for row in others)
    assert min(row.outlier_share for row in behind_norms) > 0.2 > max(row.outlier_share for row in others)
    assert [row.name for row in inspect(calibration, stats=True, filter=r"0\..*q_proj").activations] == [
        "model.layers.0.self_attn.q_proj"
    ]


def test_a_linear_that_saw_no_token(tmp_path: Path) -> None:
    tensors = {"input_ids": torch.zeros(1, 4, dtype=torch.int32)}
    for name, amax, tokens in (("seen", [1.0, 3, 0, 1], 4), ("unseen", [0.0] * 4, 0), ("dead", [0.0, 0, 0, 5], 2)):
        tensors[f"{name}.act_amax"] = torch.tensor(amax)
        tensors[f"{name}.act_mean_sq"] = torch.tensor(amax).square()
        tensors[f"{name}.tokens"] = torch.tensor([tokens])
    save_file(tensors, tmp_path / "c.safetensors")
    found = {row.name: row for row in inspect(tmp_path / "c.safetensors", stats=True).activations}
    assert list(found) == ["dead", "seen", "unseen"]
    assert found["unseen"] == ActivationRow("unseen", 4, 0, None, None, None)
    assert found["seen"] == ActivationRow("seen", 4, 4, 3, 9 / 11, 3)
    assert found["dead"] == ActivationRow("dead", 4, 2, 5, 1, math.inf)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("act_amax", None),
        ("act_mean_sq", torch.ones(127)),
        ("act_mean_sq", torch.ones(128, dtype=torch.float16)),
        ("act_amax", torch.ones(1, 128)),
        ("tokens", torch.ones(1)),
        ("tokens", torch.ones(2, dtype=torch.int64)),
    ],
)
def test_statistics_that_are_none(calibration: Path, tmp_path: Path, name: str, replacement: torch.Tensor) -> None:
    tensors = load_file(calibration)
    linear = "model.layers.0.self_attn.q_proj"
    del tensors[f"{linear}.{name}"]
    save_file(tensors | ({} if replacement is None else {f"{linear}.{name}": replacement}), tmp_path / "c.safetensors")
    with pytest.raises(QuantoolError, match=f"statistics of '{linear}': expected act_amax and") as caught:
        inspect(tmp_path / "c.safetensors", stats=True)
    assert caught.value.hint is not None
    assert "\n" not in caught.value.message


def test_the_tables_of_a_calibration_file(command: Callable[..., Any], calibration: Path) -> None:
    outcome = command("inspect", calibration)
    assert (outcome.code, outcome.err) == (0, "")
    assert "builtin (train), 2 windows of 32 tokens" in outcome.out
    assert "14 linears" in outcome.out
    assert not any(words in outcome.out for words in ("nan", "parameters", "bits per weight", "max / median"))
    lines = command("inspect", calibration, "--stats").out.splitlines()
    rows = [line.split() for line in lines[lines.index("") + 1 :] if line.startswith("model.layers")]
    assert len(rows) == 14
    record = json.loads(command("inspect", calibration, "--stats", "--json").out)
    assert record["bits_per_weight"] is None
    worst = record["activations"][0]
    assert rows[0] == [
        *(worst["name"], str(worst["channels"]), "64", f"{worst['amax']:.4g}"),
        *(f"{100 * worst['outlier_share']:.1f}", "%", f"{worst['max_to_median']:.1f}"),
    ]


# --- the command line, and other tools' files


def test_json(command: Callable[..., Any], tiny_llama: Path, artifact: Path) -> None:
    outcome = command("inspect", artifact, "--tensors", "--against", tiny_llama, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    assert list(result) == [field.name for field in fields(InspectResult)]
    assert all(list(row) == [field.name for field in fields(TensorRow)] for row in result["tensors"])
    assert len(result["tensors"]) == 21
    assert "tensors" in json.loads(command("inspect", artifact, "--json").out)


def test_the_table(command: Callable[..., Any], tiny_llama: Path, artifact: Path) -> None:
    outcome = command("inspect", artifact, "--filter", "down_proj", "--against", tiny_llama)
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("compressed-tensors pack-quantized", "W8A16 sym channel", "model.layers.1.mlp.down_proj.weight"):
        assert words in outcome.out


# Format; bits of a code and its share of scales and zero points; bytes that a module of 128 x 384 has besides.
PEERS = {
    "ar-auto_awq": ("awq gemm", 4 + 20 / 64, 0),
    "ar-auto_gptq": ("gptq", 4 + 20 / 64, 384 * 4),
    "ar-auto_round": ("gptq auto_round:auto_gptq", 4 + 20 / 64, 0),
    "bnb-int8": ("bitsandbytes", 8, 128 * 4 + 1),
    "bnb-nf4": ("bitsandbytes", 4 + 32 / 64, 16 * 4 + 79),
    "bnb-nf4-dq": ("bitsandbytes", 4 + 8 / 64, 3 * 4 + 256 * 4 + 16 * 4 + 168),
    "ct-mixed-w4-w8": ("compressed-tensors pack-quantized", 4 + 32 / 64, 16),
    "ct-w3a16-sym-g64": ("compressed-tensors pack-quantized", 3 + 32 / 64, 16),
    "ct-w4a16-asym-g64-gptq": ("compressed-tensors pack-quantized", 4 + 36 / 64, 16),
    "ct-w4a16-sym-g128": ("compressed-tensors pack-quantized", 4 + 32 / 128, 16),
    "ct-w8a16-channel": ("compressed-tensors pack-quantized", 8, 128 * 4 + 16),
    "ct-w8a8-smoothquant": ("compressed-tensors int-quantized", 8, 128 * 4),
    "ct-w8a8-static": ("compressed-tensors int-quantized", 8, 128 * 4 + 4),
}


@pytest.mark.parametrize("peer", PEERS)
def test_artifacts_of_other_tools(shared: Path, peer: str) -> None:
    model = shared / "models/tinystories-656k"
    result = inspect(shared / "peers" / peer, against=model, verify=True)
    name, bits, more = PEERS[peer]
    assert result.format == name
    assert sum(result.schemes.values()) == 14
    assert len(result.tensors) == 20, "one row for each quantized module, five norms, the embeddings"
    rows = {row.name: row for row in result.tensors}
    assert rows["model.layers.0.mlp.down_proj.weight"].bits_per_weight == bits + more * 8 / (128 * 384)
    errors = [row.relative_error for row in result.tensors if "_proj" in row.name]
    assert len(errors) == 14
    if "smoothquant" not in peer:  # which moves scales between the weights
        assert all(error is not None and 0 < error < 0.35 for error in errors)
        assert min(errors) > 0.05 or "8" in peer
    assert result.parameters == inspect(model).parameters == 656_000
    assert result.bits_per_weight == sum(row.bytes for row in result.tensors) * 8 / 656_000


@pytest.mark.parametrize("method", ["hqq", "fp8", None, 4, ["gptq"]])
def test_formats_that_are_not_read_are_named(
    command: Callable[..., Any], artifact: Path, tmp_path: Path, method: object
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (copy / "config.json").write_text(json.dumps(config))
    outcome = command("inspect", copy)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: config.json: quant_method {method!r}")
    assert [line.partition(":")[0] for line in outcome.err.splitlines()] == ["error", "hint"]
