"""From a checkpoint to a GGUF file: what was planned is written, the real llama.cpp computes with it what we do."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_families
import llamacpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantool.data import TextOptions
from quantool.errors import QuantoolError, UsageError
from quantool.formats.ggml import GGML_TYPES
from quantool.io import open_checkpoint
from quantool.recipe import METHOD_DEFAULTS, Recipe
from quantool.runtime import load
from quantool.scheme import OUTTYPES, GgufOptions, MethodOptions
from quantool.stages import calibrate, convert_gguf, eval_ppl, quantize
from quantool.stages.convert_gguf import ConvertResult
from quantool.stages.gguf_importance import read_importance

ROOT = Path(__file__).resolve().parents[2]
TEXT = TextOptions(num_samples=6, seq_len=64)
IDS = [3, 70, 11, 200, 45, 9, 31, 31, 150, 77, 2, 90]
# llama.cpp rounds activations to the float type of the weights, or to 8 bits: what that costs in KL divergence here.
ROUNDED_ACTIVATIONS = 2e-3
FLOATS = {"f32": 1e-9, "auto": 1e-9, "f16": 1e-5, "bf16": 1e-4}


def convert(model: Path, output: Path, outtype: str = "auto", **options: Any) -> ConvertResult:
    names = {name: options.pop(name) for name in list(options) if name in GgufOptions.__dataclass_fields__}
    return convert_gguf.run(str(model), output, GgufOptions(outtype, **names), **{"text": TEXT, **options})


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def blocks_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def our_logits(model: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load(model, dtype="float32")(input_ids=torch.tensor([IDS])).logits[0]
    return found


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL divergence of two rows of logits [T, V]."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole K-quant blocks."""
    path = tmp_path_factory.mktemp("wide") / "wide-llama"
    gguf_families.save_case("llama-llama-plain", path, hidden_size=256, intermediate_size=512)
    return path


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    calibrate.run(str(tiny_llama), path, text=TEXT)
    return path


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_every_type_is_what_llama_cpp_computes_with(outtype: str, wide_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    imatrix = None
    if outtype == "q2_k_s":
        imatrix = tmp_path / "calibration.safetensors"
        calibrate.run(str(wide_llama), imatrix, text=TEXT)
    planned = convert(wide_llama, out, outtype, imatrix=imatrix, dry_run=True)
    assert not out.exists()
    made = convert(wide_llama, out, outtype, imatrix=imatrix)
    assert (made.bytes, made.types) == (planned.bytes, planned.types)
    assert made.bytes == out.stat().st_size
    assert made.fallbacks == 0
    assert {row.name: row.type for row in planned.plan} == types_of(out)
    assert made.quantized + made.copied + made.folded + made.dropped == len(open_checkpoint(wide_llama).infos)
    theirs = torch.from_numpy(llamacpp.logits(out, IDS))
    assert divergence(our_logits(out), theirs) < FLOATS.get(outtype, ROUNDED_ACTIVATIONS)


def test_a_better_type_is_nearer(wide_llama: Path, tmp_path: Path) -> None:
    original = our_logits(wide_llama)
    found = []
    for outtype in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"):
        convert(wide_llama, tmp_path / outtype, outtype)
        found.append(
            divergence(original, our_logits(Path(shutil.move(tmp_path / outtype, tmp_path / f"{outtype}.gguf"))))
        )
    assert found == sorted(found)
    assert found[0] < 1e-3


def test_rows_that_are_no_whole_blocks_are_announced(tiny_llama: Path, tmp_path: Path) -> None:
    planned = convert(tiny_llama, tmp_path / "m.gguf", "q4_k_m", dry_run=True)
    replaced = {row.name: (row.wanted, row.type) for row in planned.plan if row.wanted}
    assert replaced["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert planned.fallbacks == len(replaced)
    [note] = [note for note in planned.notes if "fallback" in note]
    assert "Q4_K -> Q5_0" in note
    assert "bits per weight instead of" in note
    with pytest.raises(UsageError, match=r"no whole blocks of their type: .*rows of 128") as caught:
        convert(tiny_llama, tmp_path / "m.gguf", "q4_k_m", fallback=False)
    assert "--no-fallback" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_types_by_name(wide_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    rules = (("blk.1.*attn_v", "Q8_0"), ("attn_", "Q5_1"))
    convert(wide_llama, out, "q4_k_m", tensor_types=rules, token_embedding_type="q3_k", output_tensor_type="bf16")
    found = types_of(out)
    assert found["blk.1.attn_v.weight"] == "Q8_0"
    assert found["blk.0.attn_v.weight"] == found["blk.1.attn_q.weight"] == "Q5_1"
    assert found["token_embd.weight"] == "Q3_K"
    assert found.get("output.weight", "BF16") == "BF16"
    convert(wide_llama, out, "q4_k_m", pure=True, overwrite=True)
    assert {kind for name, kind in types_of(out).items() if "norm" not in name} == {"Q4_K"}


def test_importance_from_either_kind_of_file_gives_the_same(tiny_llama: Path, recorded: Path, tmp_path: Path) -> None:
    calibrate.run(str(tiny_llama), tmp_path / "imatrix.gguf", text=TEXT, format_name="imatrix")
    outputs = [tmp_path / name for name in ("ours.gguf", "theirs.gguf", "without.gguf")]
    for out, imatrix in zip(outputs, (recorded, tmp_path / "imatrix.gguf", None), strict=True):
        convert(tiny_llama, out, "q4_0", imatrix=imatrix)
    ours, theirs, without = map(blocks_of, outputs)
    same = [name for name in ours if np.array_equal(ours[name], theirs[name])]
    assert len(same) == len(ours)
    assert not np.array_equal(ours["blk.0.attn_q.weight"], without["blk.0.attn_q.weight"])
    fields = gguf.GGUFReader(outputs[1]).fields
    assert {"quantize.imatrix.file", "quantize.imatrix.entries_count", "quantize.imatrix.dataset"} <= set(fields)


def test_importance_of_another_model_is_refused(wide_llama: Path, recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantoolError, match=r"calibration\.safetensors: .*128 channels.*rows of 256"):
        convert(wide_llama, tmp_path / "m.gguf", "q4_0", imatrix=recorded)
    tensors = {f"other.{name}": tensor for name, tensor in load_file(recorded).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(QuantoolError, match="holds no"):
        convert(wide_llama, tmp_path / "m.gguf", "q4_0", imatrix=tmp_path / "other.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors"]


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
@pytest.mark.parametrize("outtype", ["q4_0", "q3_k_m"])
def test_calibrated_blocks_lose_less(
    method: str, outtype: str, tiny_llama: Path, recorded: Path, tmp_path: Path
) -> None:
    plain, better = tmp_path / "plain.gguf", tmp_path / "better.gguf"
    before = convert(tiny_llama, plain, outtype, imatrix=recorded)
    after = convert(tiny_llama, better, outtype, method=method, calibration=recorded)
    assert types_of(plain) == types_of(better)
    assert (after.folded > 0) == ("awq" in method)
    assert after.quantized == before.quantized
    text = TextOptions(split="test", num_samples=20, seq_len=64)
    losses = [eval_ppl.run(str(path), text=text, reference=str(tiny_llama)).kl_divergence for path in (plain, better)]
    assert losses[1] is not None
    assert losses[0] is not None
    assert losses[1] < 0.95 * losses[0]
    theirs = torch.from_numpy(llamacpp.logits(better, IDS))
    assert divergence(our_logits(better), theirs) < ROUNDED_ACTIVATIONS


@pytest.mark.parametrize("name", [*gguf_families.FIRST.values(), "llama-mixtral-plain"])
def test_every_architecture_is_calibrated(name: str, tmp_path: Path) -> None:
    """Scales folded and rows in the order of the file: llama.cpp computes what we do, and it is near the original."""
    gguf_families.save_case(name, tmp_path / "model")
    options = {"method": "awq+gptq", "method_options": MethodOptions(min_expert_tokens=1)}
    made = convert(tmp_path / "model", tmp_path / "m.gguf", "q5_0", **options)
    plain = convert(tmp_path / "model", tmp_path / "plain.gguf", "q5_0")
    assert made.quantized == plain.quantized
    theirs = torch.from_numpy(llamacpp.logits(tmp_path / "m.gguf", IDS))
    # Where a rounded activation sends a token to another expert, more than its rounding is different.
    limit = 10 * ROUNDED_ACTIVATIONS if "moe" in name or "mixtral" in name else ROUNDED_ACTIVATIONS
    assert divergence(our_logits(tmp_path / "m.gguf"), theirs) < limit
    text = {"text": TEXT, "reference": str(tmp_path / "model")}
    losses = [eval_ppl.run(str(tmp_path / f"{file}.gguf"), **text).kl_divergence for file in ("m", "plain")]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0] < losses[1]


def test_a_calibrated_file_has_the_mix_of_an_imatrix(wide_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an importance matrix"):
        convert(wide_llama, tmp_path / "m.gguf", "q2_k_s", dry_run=True)
    made = convert(wide_llama, tmp_path / "m.gguf", "q2_k_s", method="gptq")
    assert made.types["Q2_K"] > 0
    assert types_of(tmp_path / "m.gguf")["blk.0.attn_q.weight"] == "Q2_K"


def test_what_gptq_has_no_grid_for_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    notes = convert(tiny_llama, tmp_path / "m.gguf", "iq4_nl", method="gptq", dry_run=True).notes
    assert any("14 tensors in IQ4_NL are rounded by importance alone" in note for note in notes)
    assert not any(
        "importance alone" in note for note in convert(tiny_llama, tmp_path / "m", "q4_0", dry_run=True).notes
    )


def test_a_gguf_is_copied_and_not_rounded_twice(wide_llama: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    convert(wide_llama, first, "q4_k_m")
    copied = convert(first, second)
    assert copied.quantized == 0
    left, right = blocks_of(first), blocks_of(second)
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)
    with pytest.raises(UsageError, match=r"quantized already and would be rounded a second time.*Q4_K") as caught:
        convert(first, tmp_path / "third.gguf", "q3_k_m")
    assert "--allow-requantize" in str(caught.value.hint)
    convert(first, tmp_path / "third.gguf", "q3_k_m", allow_requantize=True)
    assert types_of(tmp_path / "third.gguf")["blk.0.attn_q.weight"] == "Q3_K"


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_calibrated_method_does_not_round_blocks_twice_unasked(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "m.gguf", "q4_0")
    with pytest.raises(UsageError, match=r"blk\.0\..*Q4_0.*a second time") as caught:
        convert(tmp_path / "m.gguf", tmp_path / "twice.gguf", "q4_0", method=method)
    assert "--allow-requantize" in str(caught.value.hint)
    convert(tmp_path / "m.gguf", tmp_path / "twice.gguf", "q4_0", method=method, allow_requantize=True)


@pytest.mark.parametrize("name", [*gguf_families.FIRST.values(), "llama-mixtral-plain"])
def test_every_architecture_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    """Written in Q8_0, read as MODEL and written again: the same tensors, byte for byte."""
    gguf_families.save_case(name, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "first.gguf", "q8_0")
    convert(tmp_path / "first.gguf", tmp_path / "second.gguf")
    left, right = blocks_of(tmp_path / "first.gguf"), blocks_of(tmp_path / "second.gguf")
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[tensor], right[tensor]) for tensor in left)
    theirs = torch.from_numpy(llamacpp.logits(tmp_path / "second.gguf", IDS))
    assert divergence(our_logits(tmp_path / "second.gguf"), theirs) < ROUNDED_ACTIVATIONS


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe("rtn", group_size=32), "Q4_0"),
        (Recipe("gptq", group_size=64, format="gptq"), "Q4_0"),
        (Recipe("rtn", group_size=32, sym=False), "Q4_1"),
        (Recipe("rtn", bits=8, group_size=-1), "Q8_0"),
    ],
    ids=["rtn", "gptq", "asym", "int8"],
)
def test_codes_of_other_formats_are_taken_over(recipe: Recipe, expected: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "float16"
    shutil.copytree(tiny_llama, model)
    save_file(
        {k: v.half() for k, v in load_file(model / "model.safetensors").items()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    quantize.run(str(model), tmp_path / "quantized", recipe, text=TEXT)
    result = convert(tmp_path / "quantized", tmp_path / "m.gguf")
    kinds = types_of(tmp_path / "m.gguf")
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_down.weight"] == expected
    assert result.quantized == 0
    assert any("keep their codes" in note for note in result.notes)
    close = torch.testing.assert_close
    tolerance = {"rtol": 1e-3, "atol": 1e-2} if expected == "Q4_1" else {"rtol": 0.0, "atol": 1e-5}
    close(our_logits(tmp_path / "m.gguf"), our_logits(tmp_path / "quantized"), **tolerance)


def test_what_cannot_be_taken_over_is_not_rounded_twice_unasked(tiny_llama: Path, tmp_path: Path) -> None:
    quantize.run(str(tiny_llama), tmp_path / "nf4", Recipe(method="nf4", **METHOD_DEFAULTS["nf4"]), text=TEXT)
    with pytest.raises(UsageError, match="quantized already"):
        convert(tmp_path / "nf4", tmp_path / "m.gguf", "q4_0")
    made = convert(tmp_path / "nf4", tmp_path / "m.gguf", "q4_0", allow_requantize=True)
    assert made.quantized > 0


@pytest.mark.parametrize("outtype", ["q4_0", "q8_0"])
def test_blocks_become_codes_of_compressed_tensors(outtype: str, tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "m.gguf", outtype, output_tensor_type="f16", token_embedding_type="f16")
    made = quantize.run(str(tmp_path / "m.gguf"), tmp_path / "ct", Recipe(), text=TEXT, repack_to="compressed-tensors")
    assert made.method == "repack"
    torch.testing.assert_close(our_logits(tmp_path / "ct"), our_logits(tmp_path / "m.gguf"), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", gguf_families.FIRST.values())
def test_a_gguf_of_every_architecture_is_quantized_as_its_checkpoint_is(name: str, tmp_path: Path) -> None:
    gguf_families.save_case(name, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "m.gguf", "f32")
    for model, out in (("model", "a"), ("m.gguf", "b")):
        quantize.run(str(tmp_path / model), tmp_path / out, Recipe(group_size=32), text=TEXT)
    torch.testing.assert_close(our_logits(tmp_path / "a"), our_logits(tmp_path / "b"), rtol=0, atol=1e-4)


def test_a_value_beyond_float16_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 3] = 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantoolError, match=r"o_proj.*beyond float16's 65504"):
        convert(model, tmp_path / "m.gguf", "f16")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantoolError, match=r"o_proj.*1 of .* NaN or Inf"):
        convert(model, tmp_path / "m.gguf", "q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_in_parts(wide_llama: Path, tmp_path: Path) -> None:
    convert(wide_llama, tmp_path / "whole.gguf", "q4_k_m")
    made = convert(wide_llama, tmp_path / "m.gguf", "q4_k_m", split_max_size=300_000)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    assert made.bytes == sum(path.stat().st_size for path in parts)
    assert torch.equal(our_logits(parts[0]), our_logits(tmp_path / "whole.gguf"))
    assert np.array_equal(llamacpp.logits(parts[0], IDS), llamacpp.logits(tmp_path / "whole.gguf", IDS))


def test_experts_that_saw_nothing_are_reported(tmp_path: Path) -> None:
    model = tmp_path / "model"
    gguf_families.save_case("llama-mixtral-plain", model)
    path = tmp_path / "calibration.safetensors"
    calibrate.run(str(model), path, text=TEXT)
    tensors = load_file(path)
    expert = next(name for name in tensors if ".experts.1." in name and name.endswith(".tokens"))
    tensors[expert].zero_()
    save_file(tensors, path)
    made = convert(model, tmp_path / "m.gguf", "q4_0", imatrix=path)
    assert any("1 experts saw no calibration token" in note for note in made.notes)
    theirs = torch.from_numpy(llamacpp.logits(tmp_path / "m.gguf", IDS))
    assert divergence(our_logits(tmp_path / "m.gguf"), theirs) < ROUNDED_ACTIVATIONS


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_nothing(signal: str, tiny_llama: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from quantool.io.gguf.writer import GgufWriter\n"
        "write, calls = GgufWriter.write, []\n"
        "def interrupt(self, *args, **kwargs):\n"
        "    calls.append(args)\n"
        f"    if len(calls) == 5: os.kill(os.getpid(), signal.{signal})\n"
        "    return write(self, *args, **kwargs)\n"
        "GgufWriter.write = interrupt\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from quantool.cli import main; main()\n"
    )
    command = [sys.executable, "-c", script, "convert-gguf", str(tiny_llama), "-o", "m.gguf", "--outtype", "q4_0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == {"SIGINT": 130, "SIGTERM": 143}[signal], done.stderr
    assert not list(tmp_path.iterdir())


def test_importance_is_by_gguf_name(tiny_llama: Path, recorded: Path) -> None:
    from quantool.io.gguf.architectures import find_architecture
    from quantool.io.gguf.tensors import targets

    checkpoint = open_checkpoint(tiny_llama)
    found, _ = targets(find_architecture(checkpoint.config), checkpoint.infos, checkpoint.config)
    importance, notes, _ = read_importance(recorded, found)
    assert not notes
    assert torch.equal(
        importance["blk.1.ffn_down.weight"][0], load_file(recorded)["model.layers.1.mlp.down_proj.act_mean_sq"]
    )
    assert "token_embd.weight" not in importance
    assert set(GGML_TYPES) >= {"Q4_K", "Q4_0", "IQ4_XS"}
    assert replace(GgufOptions(), outtype="q4_0").outtype == "q4_0"
