"""What one run writes: every tensor accounted for, sizes as planned, and refusals that come before any work."""

import filecmp
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import save_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from quantool.cli.options import CALIBRATED
from quantool.data import TextOptions
from quantool.errors import QuantoolError, UsageError
from quantool.formats import FORMATS
from quantool.io import open_checkpoint
from quantool.quant import dequantize_affine
from quantool.recipe import METHOD_DEFAULTS, Override, Recipe
from quantool.runtime import PackedCheckpoint, load
from quantool.scheme import METHOD_NAMES, MethodOptions
from quantool.stages import calibrate
from quantool.stages.quantize import QuantizeResult, run

ROOT = Path(__file__).resolve().parents[2]
TEXT = TextOptions(num_samples=4, seq_len=64)
RTN, AWQ, GPTQ = Recipe(method="rtn"), Recipe(method="awq", sym=False), Recipe(method="gptq")
BY_DEFAULT = {method: Recipe(method=method, **METHOD_DEFAULTS[method]) for method in METHOD_NAMES}
SMOOTHQUANT, NF4 = BY_DEFAULT["smoothquant"], BY_DEFAULT["nf4"]
FOLDING = ("awq", "awq+gptq", "smoothquant")
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
SUFFIXES = tuple(f".{suffix}" for format_ in FORMATS.values() for suffix in format_.SUFFIXES if suffix != "weight")


def quantize(model: Path, output: Path | None, recipe: Recipe = RTN, **options: Any) -> QuantizeResult:
    return run(str(model), output, recipe, **{"text": TEXT, **options})


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the safetensors library."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def identical(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    same = names == sorted(path.name for path in right.iterdir())
    return same and filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def packed(directory: Path) -> PackedCheckpoint:
    from quantool.formats import detect

    checkpoint = open_checkpoint(directory)
    format_ = detect(checkpoint.config)
    assert format_ is not None
    return PackedCheckpoint(checkpoint, format_)


def refuses(error: type[QuantoolError], *args: Any, **options: Any) -> QuantoolError:
    with pytest.raises(error) as caught:
        quantize(*args, **options)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.fixture
def editable(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "editable"))


# --- what is written


@pytest.mark.parametrize(
    "recipe",
    [
        RTN,
        replace(RTN, bits=3, group_size=32, sym=False),
        replace(RTN, bits=8, group_size=-1, ignore=()),
        replace(RTN, format="awq", group_size=64),
        AWQ,
        replace(AWQ, format="awq"),
        replace(AWQ, overrides=(Override("mlp.down_proj", bits=8, group_size=32), Override("o_proj", ignore=True))),
        replace(GPTQ, format="gptq", group_size=32, options=MethodOptions(actorder="group")),
        replace(GPTQ, bits=8, group_size=0, act_bits=8),
        BY_DEFAULT["awq+gptq"],
        SMOOTHQUANT,
        replace(SMOOTHQUANT, act_dynamic=False, act_sym=False),
        NF4,
        replace(NF4, double_quant=False, group_size=128, ignore=()),
        BY_DEFAULT["fp4"],
        BY_DEFAULT["llm-int8"],
    ],
    ids=lambda recipe: f"{recipe.method}-{recipe.format}-{recipe.bits}",
)
def test_every_tensor_is_planned_counted_and_written(tiny_llama: Path, tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    dry = quantize(tiny_llama, out, recipe, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = quantize(tiny_llama, out, recipe)
    source, written = stored(tiny_llama), stored(out)

    assert sorted(row.name for row in dry.plan) == sorted(source)
    assert done.quantized + done.copied + done.folded + done.dropped == len(source)
    by_source: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in written.items():
        module = next((name.removesuffix(s) + ".weight" for s in SUFFIXES if name.endswith(s)), name)
        by_source.setdefault(module, {})[name] = tensor
    for row in dry.plan:
        parts = by_source.pop(row.name)
        assert row.bytes == sum(tensor.nbytes for tensor in parts.values()), row.name
        assert row.shape == list(source[row.name].shape)
        assert row.dtype == "BF16"
        as_it_was = row.name in parts and parts[row.name].dtype == source[row.name].dtype
        assert (row.action == "quantized") == (not as_it_was) == bool(row.scheme)
    assert not by_source
    assert done.quantized == sum(row.action == "quantized" for row in dry.plan)
    copied = [row.name for row in dry.plan if row.action == "copied"]
    assert done.folded == sum(not torch.equal(source[name], written[name]) for name in copied)
    assert (done.folded > 0) == (recipe.method in FOLDING)

    files = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert done.bytes == files
    assert dry.bytes == files, "the dry run predicts the size"


def test_the_result_says_what_was_done(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = quantize(tiny_llama, out, AWQ)
    assert (done.output, done.method, done.format) == (str(out), "awq", "compressed-tensors")
    assert (done.scheme, done.group_size) == ("W4A16 asym g128", 128)
    assert (done.quantized, done.dropped, done.plan) == (14, 0, [])
    assert done.folded == 4, "both norms of both blocks; v_proj and up_proj are quantized"
    parameters = sum(math.prod(tensor.shape) for tensor in stored(tiny_llama).values())
    assert done.bits_per_weight == pytest.approx(done.bytes * 8 / parameters)
    assert done.seconds > 0
    assert done.peak_memory_bytes > 50_000_000


def test_the_result_names_every_scheme(tiny_llama: Path) -> None:
    mixed = replace(RTN, bits=4, group_size=64, overrides=(Override("mlp.down_proj", bits=8),))
    assert quantize(tiny_llama, None, mixed, dry_run=True).scheme == "W4A16 sym g64 (12), W8A16 sym g64 (2)"


def test_only_norms_and_quantized_weights_change(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_llama, out, AWQ)
    source, written = stored(tiny_llama), stored(out)
    for name in written.keys() & source.keys():
        assert torch.equal(source[name], written[name]) == ("layernorm" not in name), name
        assert source[name].dtype == written[name].dtype


def test_the_quantized_weights_are_near_the_source(tiny_llama: Path, tmp_path: Path) -> None:
    """Half a step of 8 bits is 0.2 percent of the range, so that any mistake of layout or order shows."""
    for format_, bits, bound in (("compressed-tensors", 8, 0.01), ("awq", 4, 0.12)):
        out = tmp_path / format_
        quantize(tiny_llama, out, replace(RTN, bits=bits, format=format_, group_size=32))
        artifact, source = packed(out), stored(tiny_llama)
        assert len(artifact.schemes) == 14
        for module in artifact.schemes:
            lost = dequantize_affine(artifact.quantized(module)) - source[f"{module}.weight"].float()
            assert lost.norm() < bound * source[f"{module}.weight"].float().norm()


def test_mse_lowers_the_error_of_every_weight(tiny_llama: Path, tmp_path: Path) -> None:
    errors: list[dict[str, float]] = []
    for mse in (False, True):
        quantize(tiny_llama, tmp_path / str(mse), replace(RTN, bits=3, options=MethodOptions(mse=mse)))
        artifact, source = packed(tmp_path / str(mse)), stored(tiny_llama)
        lost = {m: dequantize_affine(artifact.quantized(m)) - source[f"{m}.weight"].float() for m in artifact.schemes}
        errors.append({module: float(difference.square().sum()) for module, difference in lost.items()})
    assert all(errors[1][module] < 0.95 * errors[0][module] for module in errors[0])


def test_config_and_tokenizer_are_kept(editable: Path, tmp_path: Path) -> None:
    config = {**config_of(editable), "a_key_of_the_future": {"x": [1, None]}, "dtype": "bfloat16"}
    (editable / "config.json").write_text(json.dumps(config))
    (editable / "chat_template.jinja").write_text("{{ messages }}")
    (editable / "modeling_evil.py").write_text("raise SystemExit")
    (editable / "generation_config.json").write_text('{"top_k": 7, "unknown": 1}')
    quantize(editable, tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == config
    assert list(written) == list(config)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    copied = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {"config.json", "model.safetensors", *copied}
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (editable / name).read_bytes()


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_tied_head_is_never_quantized(tiny_tied: Path, tmp_path: Path, method: str) -> None:
    done = quantize(tiny_tied, tmp_path / "out", Recipe(method=method, ignore=()))
    assert done.quantized == 14
    written, source = stored(tmp_path / "out"), stored(tiny_tied)
    assert not [name for name in written if "lm_head" in name]
    assert torch.equal(written["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_tied_weights_that_are_stored_as_the_head(tiny_tied: Path, tmp_path: Path, method: str) -> None:
    model = Path(shutil.copytree(tiny_tied, tmp_path / "model"))
    tensors = stored(model)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors")
    quantize(model, tmp_path / "out", Recipe(method=method, ignore=()))
    assert torch.equal(stored(tmp_path / "out")["lm_head.weight"], tensors["lm_head.weight"])
    quantize(tiny_tied, tmp_path / "other", Recipe(method=method, ignore=()))
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "out")(ids).logits, load(tmp_path / "other")(ids).logits)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_an_untied_head_is_quantized_when_it_is_not_ignored(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    done = quantize(tiny_llama, tmp_path / "out", Recipe(method=method, ignore=()))
    assert done.quantized == 15
    assert "lm_head.weight_packed" in stored(tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == []


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_gguf_in_artifact_out(tiny_gguf: Path, tiny_llama: Path, tmp_path: Path, method: str) -> None:
    done = quantize(tiny_gguf, tmp_path / "out", Recipe(method=method, bits=8))
    assert done.quantized == 14
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    written = stored(tmp_path / "out")
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        logits, source = (load(model)(ids).logits for model in (tmp_path / "out", tiny_gguf))
    assert (logits - source).norm() < 0.02 * source.norm()

    from transformers import AutoTokenizer

    text = "Hello, wörld!  1234\n"
    ours, theirs = (AutoTokenizer.from_pretrained(path)(text).input_ids for path in (tmp_path / "out", tiny_llama))
    assert ours == theirs


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_shards_hold_the_same_tensors(tiny_llama: Path, tiny_sharded: Path, tmp_path: Path, method: str) -> None:
    recipe = Recipe(method=method)
    quantize(tiny_llama, tmp_path / "one", recipe)
    done = quantize(tiny_sharded, tmp_path / "many", recipe, max_shard_size=60_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert done.bytes == sum(file.stat().st_size for file in files)
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 60_000 or len(tensors) == 1
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "many" / shard, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - safe_open is no dict


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_same_run_same_bytes(tiny_llama: Path, text_file: Path, tmp_path: Path, method: str) -> None:
    text = replace(TEXT, dataset=str(text_file))
    recipe = BY_DEFAULT[method]
    for name in ("a", "b"):
        quantize(tiny_llama, tmp_path / name, recipe, text=text)
    assert identical(tmp_path / "a", tmp_path / "b")
    quantize(tiny_llama, tmp_path / "c", recipe, text=replace(text, seed=1))
    assert identical(tmp_path / "a", tmp_path / "c") == (method not in CALIBRATED), "these depend on their text"


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_calibration_file_is_its_text(tiny_llama: Path, text_file: Path, tmp_path: Path, method: str) -> None:
    text = replace(TEXT, dataset=str(text_file), seed=3)
    file, recipe = tmp_path / "calibration.safetensors", BY_DEFAULT[method]
    calibrate.run(str(tiny_llama), file, text=text)
    quantize(tiny_llama, tmp_path / "inline", recipe, text=text)
    quantize(tiny_llama, tmp_path / "file", recipe, calibration=file, text=TextOptions(dataset="/nowhere.txt"))
    assert len(list((tmp_path / "file").iterdir())) == 5
    assert identical(tmp_path / "inline", tmp_path / "file")


def test_batches_change_nothing_of_note(tiny_llama: Path, tmp_path: Path) -> None:
    for size in (1, 3):
        quantize(tiny_llama, tmp_path / str(size), AWQ, batch_size=size)
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        one, three, source = (load(model)(ids).logits for model in (tmp_path / "1", tmp_path / "3", tiny_llama))
    assert (one - three).norm() < 0.2 * (one - source).norm()


# --- which modules


def schemes(directory: Path) -> dict[str, str]:
    return {module: str(scheme) for module, scheme in packed(directory).schemes.items()}


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_ignore(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    ignore = ("lm_head", "mlp.down_proj", "model.layers.1.self_attn.o_proj", r"re:.*layers\.0\.self_attn\.[qkv]_proj$")
    done = quantize(tiny_llama, tmp_path / "out", Recipe(method=method, ignore=ignore))
    kept = {"model.layers.1.self_attn.o_proj", *(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")}
    kept |= {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    everything = {f"model.layers.{i}.{linear}" for i in (0, 1) for linear in LINEARS}
    assert set(schemes(tmp_path / "out")) == everything - kept
    assert done.quantized == 14 - 6
    assert set(config_of(tmp_path / "out")["quantization_config"]["ignore"]) == kept | {"lm_head"}
    written, source = stored(tmp_path / "out"), stored(tiny_llama)
    for module in kept:
        assert f"{module}.weight" in written
        if method == "rtn":
            assert torch.equal(written[f"{module}.weight"], source[f"{module}.weight"])


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_overrides(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    overrides = (
        Override("mlp.down_proj", bits=8, group_size=-1, sym=True),
        Override(r"re:.*layers\.1\.", bits=3),
        Override("model.layers.0.self_attn.o_proj", ignore=True),
        Override("mlp.gate_proj", sym=False),
        Override("mlp.up_proj", sym=False),
    )
    quantize(tiny_llama, tmp_path / "out", Recipe(method=method, group_size=64, overrides=overrides))
    found = schemes(tmp_path / "out")
    expected = dict.fromkeys([f"model.layers.0.{linear}" for linear in LINEARS], "W4A16 sym g64")
    expected |= dict.fromkeys([f"model.layers.1.{linear}" for linear in LINEARS], "W3A16 sym g64")
    expected |= dict.fromkeys([f"model.layers.{i}.mlp.down_proj" for i in (0, 1)], "W8A16 sym channel")
    expected |= dict.fromkeys([f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")], "W4A16 asym g64")
    del expected["model.layers.0.self_attn.o_proj"]
    assert found == expected
    section = config_of(tmp_path / "out")["quantization_config"]
    assert len(section["config_groups"]) == 4
    assert set(section["ignore"]) == {"model.layers.0.self_attn.o_proj", "lm_head"}


def test_each_module_by_the_method_of_its_override(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """One by rtn has the codes of an rtn run. Without a scale in block 1, its first linears see what gptq's see."""
    text = replace(TEXT, dataset=str(text_file))
    overrides = (Override("down_proj", method="rtn"), Override(r"re:.*layers\.0\.", method="awq"))
    quantize(tiny_llama, tmp_path / "mixed", replace(GPTQ, overrides=overrides), text=text)
    found = {"mixed": stored(tmp_path / "mixed")}
    for method in ("rtn", "gptq", "awq"):
        quantize(tiny_llama, tmp_path / method, Recipe(method=method), text=text)
        found[method] = stored(tmp_path / method)

    def same(method: str, name: str) -> bool:
        return torch.equal(found["mixed"][name], found[method][name])

    for block, linear in ((0, "down_proj"), (1, "down_proj")):
        assert same("rtn", f"model.layers.{block}.mlp.{linear}.weight_packed")
        assert not same("gptq", f"model.layers.{block}.mlp.{linear}.weight_packed")
    assert same("awq", "model.layers.0.input_layernorm.weight")
    assert same("awq", "model.layers.0.self_attn.q_proj.weight_packed")
    assert same("rtn", "model.layers.1.input_layernorm.weight"), "gptq folds nothing"
    assert not same("rtn", "model.layers.1.self_attn.q_proj.weight_packed")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((Override("q_proj", bits=8),), "q_proj' is W8A16 sym g64: runtimes fuse them into one linear, which has one"),
        ((Override("v_proj", group_size=32),), "v_proj' is W4A16 sym g32: runtimes fuse them into one linear"),
        ((Override("k_proj", ignore=True),), "k_proj' is float, 'model.layers.0.self_attn.q_proj' is W4A16 sym g64"),
        ((Override("layers.1.mlp.up_proj", sym=False),), "'model.layers.1.mlp.up_proj' is W4A16 asym g64: runtimes"),
        (
            (Override("mlp.gate_proj", method="rtn"),),
            "'model.layers.0.mlp.gate_proj' is rtn, 'model.layers.0.mlp.up_proj",
        ),
    ],
    ids=["bits", "group size", "float", "sym", "method"],
)
def test_what_runtimes_fuse_has_to_agree(
    tiny_llama: Path, tmp_path: Path, overrides: tuple[Override, ...], words: str
) -> None:
    error = refuses(UsageError, tiny_llama, tmp_path / "out", replace(GPTQ, group_size=64, overrides=overrides))
    assert words in error.message
    assert error.hint is not None
    assert "give both the same" in error.hint
    assert list(tmp_path.iterdir()) == []


def test_patterns_that_match_nothing_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for recipe in (replace(RTN, ignore=("mlp.donw_proj",)), replace(RTN, overrides=(Override("q_porj", bits=8),))):
        error = refuses(UsageError, tiny_llama, tmp_path / "out", recipe)
        assert re.search("'(mlp.donw_proj|q_porj)' matches no linear", error.message)
        assert error.hint is not None
    error = refuses(UsageError, tiny_llama, tmp_path / "out", replace(RTN, ignore=("re:.*",)))
    assert "nothing to quantize" in error.message
    assert list(tmp_path.iterdir()) == []


# --- group size


def model_of_widths(directory: Path, hidden: int, inner: int) -> Path:
    """Just enough of a checkpoint for rtn, which builds no network: one block of two linears."""
    directory.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, hidden, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(inner, hidden, generator=generator),
        "model.layers.0.mlp.down_proj.weight": torch.randn(hidden, inner, generator=generator),
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("hidden", "inner", "group", "scheme"),
    [
        (128, 384, 128, "W4A16 sym g128"),
        (128, 320, 64, "W4A16 sym g64"),
        (96, 128, 32, "W4A16 sym g32"),
        (96, 100, -1, "W4A16 sym channel"),
    ],
)
def test_auto_group_size(tmp_path: Path, hidden: int, inner: int, group: int, scheme: str) -> None:
    done = quantize(model_of_widths(tmp_path / "m", hidden, inner), tmp_path / "out")
    assert (done.group_size, done.scheme) == (group, scheme)
    assert set(schemes(tmp_path / "out").values()) == {scheme}
    assert len(done.notes) == 1
    assert (f"group size {group}: the largest of 128, 64, 32" if group > 0 else "per channel") in done.notes[0]


def test_auto_looks_only_at_what_takes_it(tmp_path: Path) -> None:
    model = model_of_widths(tmp_path / "m", 128, 100)
    recipe = replace(RTN, overrides=(Override("down_proj", group_size=20),))
    assert quantize(model, tmp_path / "a", recipe).group_size == 128
    assert schemes(tmp_path / "a")["model.layers.0.mlp.down_proj"] == "W4A16 sym g20"
    assert quantize(model, tmp_path / "b", replace(RTN, ignore=("down_proj",))).group_size == 128
    assert quantize(model, tmp_path / "c", replace(RTN, group_size=4)).notes == []


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_group_size_that_does_not_divide(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    def worked(done: int, total: int, label: str) -> None:
        raise AssertionError("no work before the refusal")

    recipe = Recipe(method=method, group_size=96)
    error = refuses(UsageError, tiny_llama, tmp_path / "out", recipe, progress=worked)
    assert error.exit_code == 2
    assert "group size 96 does not divide" in error.message
    assert "'model.layers.0.self_attn.k_proj' (128)" in error.message
    assert "9 more" in error.message
    assert "down_proj" not in error.message, "384 is four times 96"
    assert "sizes that fit all: 128, 64, 32, 16" in error.message
    assert error.hint is not None
    assert "--group-size 128" in error.hint
    assert list(tmp_path.iterdir()) == []


def test_only_the_override_that_does_not_divide_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = replace(RTN, overrides=(Override("layers.1.mlp.down_proj", group_size=256),))
    error = refuses(UsageError, tiny_llama, tmp_path / "out", recipe)
    assert "group size 256 does not divide the rows of 'model.layers.1.mlp.down_proj' (384)" in error.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group_size", [-1, 0])
def test_act_order_without_groups_needs_no_g_idx(tiny_llama: Path, tmp_path: Path, group_size: int) -> None:
    own = MethodOptions(actorder="group")
    done = quantize(tiny_llama, tmp_path / "out", replace(GPTQ, group_size=group_size, options=own))
    assert (done.format, done.quantized) == ("compressed-tensors", 14)
    assert not [name for name in stored(tmp_path / "out") if name.endswith("g_idx")]


# --- refusals


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize("format_", ["compressed-tensors", "awq"])
def test_an_artifact_is_not_quantized_again(tiny_llama: Path, tmp_path: Path, format_: str, method: str) -> None:
    quantize(tiny_llama, tmp_path / "out", replace(RTN, format=format_))
    error = refuses(QuantoolError, tmp_path / "out", tmp_path / "again", Recipe(method=method))
    assert f"already quantized ({format_})" in error.message
    assert error.exit_code == 1
    assert error.hint is not None
    assert not (tmp_path / "again").exists()


def test_a_calibration_file_of_another_vocabulary(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.safetensors"
    calibrate.run(str(tiny_llama), file, text=TEXT)
    tensors = load_file(file)
    for value in (320, -1):
        tensors["input_ids"][2, 5] = value
        save_file(tensors, file)
        error = refuses(QuantoolError, tiny_llama, tmp_path / "out", AWQ, calibration=file)
        assert str(file) in error.message
        assert "320 embeddings" in error.message
    assert not (tmp_path / "out").exists()


def test_a_calibration_file_that_is_none(tiny_llama: Path, tmp_path: Path) -> None:
    error = refuses(QuantoolError, tiny_llama, tmp_path / "out", AWQ, calibration=tiny_llama / "model.safetensors")
    assert "no 'input_ids'" in error.message
    assert error.hint is not None
    assert "quantool calibrate" in error.hint
    for shape in ((0, 64), (4, 0)):
        save_file({"input_ids": torch.zeros(shape, dtype=torch.int32)}, tmp_path / "empty.safetensors")
        refuses(QuantoolError, tiny_llama, tmp_path / "out", AWQ, calibration=tmp_path / "empty.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_the_awq_format_refuses_other_widths(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    error = refuses(UsageError, tiny_llama, tmp_path / "out", Recipe(method=method, format="awq", bits=3))
    assert "format 'awq' cannot hold 'model.layers.0." in error.message
    assert "W4A16" in error.message
    assert error.hint is not None
    assert "compressed-tensors" in error.hint
    mixed = Recipe(method=method, format="awq", group_size=64, overrides=(Override("o_proj", group_size=32),))
    error = refuses(UsageError, tiny_llama, tmp_path / "out", mixed)
    assert "one group size for all modules" in error.message
    assert list(tmp_path.iterdir()) == []


def test_overwrite(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_llama, out)
    before = (out / "model.safetensors").read_bytes()
    error = refuses(UsageError, tiny_llama, out, replace(RTN, bits=8))
    assert "already exists" in error.message
    assert (out / "model.safetensors").read_bytes() == before
    quantize(tiny_llama, out, replace(RTN, bits=8), overwrite=True)
    assert len((out / "model.safetensors").read_bytes()) > len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_an_existing_output_is_refused_before_any_work(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    def worked(done: int, total: int, label: str) -> None:
        raise AssertionError("no work before the refusal")

    quantize(tiny_llama, tmp_path / "out")
    unread = TextOptions(dataset="/nowhere.txt")
    error = refuses(UsageError, tiny_llama, tmp_path / "out", Recipe(method=method), progress=worked, text=unread)
    assert "already exists" in error.message


def test_the_output_has_a_name_by_default(
    tiny_llama: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert quantize(tiny_llama, None).output == "tiny-llama-rtn-w4-g128"
    assert quantize(tiny_gguf, None, replace(RTN, bits=8, group_size=-1)).output == "tiny-llama-rtn-w8-channel"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-llama-rtn-w4-g128", "tiny-llama-rtn-w8-channel"]


def test_rtn_imports_no_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    code = f"""
import sys
import torch
built = []
original = torch.nn.Module.__init__
torch.nn.Module.__init__ = lambda self, *args, **kwargs: (built.append(type(self)), original(self, *args, **kwargs))[1]
from quantool.cli import main
try:
    main(["quantize", {str(tiny_llama)!r}, "-o", {str(tmp_path / "out")!r}, "-q"])
finally:
    heavy = [name for name in ("transformers", "datasets", "gguf") if name in sys.modules]
    print(heavy, built, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, "[] []\n")
    assert (tmp_path / "out" / "model.safetensors").exists()


# --- experts


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Two blocks of 8 experts, 2 to a token, in a width that groups divide."""
    directory = tmp_path_factory.mktemp("mixture") / "qwen3-moe"
    sizes = families.wide("qwen3_moe", vocab_size=320, num_experts=8)
    families.save(families.make_model("qwen3_moe", seed=1, **sizes), directory)
    save_tokenizer(tokenizer, directory)
    return directory


FEW = TextOptions(num_samples=1, seq_len=6)


@pytest.mark.parametrize("method", CALIBRATED)
def test_starved_experts(mixture: Path, tmp_path: Path, method: str) -> None:
    """Six tokens go to twelve places among eight experts: most get fewer than one window's worth."""
    recipe, out = BY_DEFAULT[method], tmp_path / "out"
    if method != "smoothquant":
        recipe = replace(recipe, group_size=32)
    error = refuses(QuantoolError, mixture, out, recipe, text=FEW)
    assert re.search(
        r"experts of model.layers.0 saw too few calibration tokens: 'model\.layers\.0\.mlp\.", error.message
    )
    assert "expected at least 6 of each expert" in error.message
    assert error.hint is not None
    assert "--starved-experts all-tokens or rtn" in error.hint
    assert list(tmp_path.iterdir()) == []
    written = []
    for choice, words in (("all-tokens", "calibrated with all tokens"), ("rtn", "rounded to nearest")):
        options = MethodOptions(starved_experts=choice)
        done = quantize(mixture, tmp_path / choice, replace(recipe, options=options), text=FEW)
        notes = [note for note in done.notes if "too few calibration tokens" in note]
        assert len(notes) == 2, "one for each block"
        assert all(note.endswith(words) for note in notes)
        written.append(stored(tmp_path / choice))
    assert any(not torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


def test_a_calibration_file_that_starves_experts(mixture: Path, tmp_path: Path) -> None:
    """Known from the file, so said before any work."""

    def worked(done: int, total: int, label: str) -> None:
        raise AssertionError("no work before the refusal")

    file = tmp_path / "calibration.safetensors"
    calibrate.run(str(mixture), file, text=TextOptions(num_samples=4, seq_len=12))
    seen = {name: int(count) for name, count in load_file(file).items() if name.endswith("up_proj.tokens")}
    starved = [name.removesuffix(".up_proj.tokens") for name, count in seen.items() if count < 12]
    assert len(starved) > 4, "no more than four are named"
    assert min(seen.values()) >= 1
    recipe = replace(GPTQ, group_size=32)
    error = refuses(QuantoolError, mixture, tmp_path / "out", recipe, calibration=file, progress=worked)
    words = f"{len(starved)} experts of {file} saw too few calibration tokens: "
    assert error.message.startswith(words)
    named = dict(re.findall(r"'(\S+)' \((\d+)\)", error.message))
    assert len(named) == 4
    assert all(seen[f"{name}.up_proj.tokens"] == int(count) for name, count in named.items())
    assert error.message.endswith(f"and {len(starved) - 4} more, expected at least 12 of each expert")

    by_rtn = replace(recipe, overrides=(Override(r"re:.*\.experts\.", method="rtn"),))
    chosen = [MethodOptions(starved_experts="rtn"), MethodOptions(min_expert_tokens=1)]
    for own in (by_rtn, *(replace(recipe, options=options) for options in chosen)):
        with pytest.raises(AssertionError, match="no work"):
            quantize(mixture, tmp_path / "out", own, calibration=file, progress=worked)
    floats = (*recipe.ignore, r"re:.*\.experts\.")
    assert quantize(mixture, tmp_path / "out", replace(recipe, ignore=floats), calibration=file).quantized == 8
