"""Repacking: the weights a runtime sees stay bit for bit the same, whatever the layout, or the format is refused."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantool.errors import QuantoolError, UsageError
from quantool.formats import FORMATS, detect
from quantool.io import Checkpoint, open_checkpoint
from quantool.io.safetensors import DTYPES
from quantool.kernels.ops import dequantize_absmax
from quantool.quant import DoubleQuant, QuantizedTensor
from quantool.runtime import PackedCheckpoint, load
from quantool.scheme import QuantScheme
from quantool.stages import repack
from quantool.stages.plan import QuantizeResult

ROOT = Path(__file__).resolve().parents[2]
CT, AWQ, GPTQ, BNB = "compressed-tensors", "awq", "gptq", "bitsandbytes"
SHAPES = {
    f"model.layers.{i}.{name}_proj": shape
    for i in range(2)
    for name, shape in {"self_attn.q": (64, 64), "mlp.up": (128, 64), "mlp.down": (64, 128)}.items()
}
KEPT = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "lm_head"]
# Which formats hold which codes: written down, not asked of the formats.
HOLDS = {
    QuantScheme(4, 32): {CT, AWQ, GPTQ},
    QuantScheme(4, -1): {CT, AWQ, GPTQ},
    QuantScheme(4, 64, sym=False): {CT, AWQ, GPTQ},
    QuantScheme(8, -1): {CT, GPTQ},
    QuantScheme(8, 32, sym=False): {CT, GPTQ},
    QuantScheme(2, 32): {CT, GPTQ},
    QuantScheme(3, 32): {CT, GPTQ},
    QuantScheme(5, 64, sym=False): {CT},
    QuantScheme(8, -1, act_bits=8): {CT},
    QuantScheme(8, -1, act_bits=8, act_dynamic=False, act_sym=False): {CT},
    QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0): {BNB},
    QuantScheme(4, 64, dtype="nf4"): {BNB},
    QuantScheme(4, 128, dtype="fp4", double_quant=True): {BNB},
}
CASES = [
    pytest.param(scheme, source, target, id=f"{scheme}: {source} to {target}".replace(" ", "-"))
    for scheme, formats in HOLDS.items()
    for source in sorted(formats)
    for target in sorted(FORMATS)
]


def random_weight(
    scheme: QuantScheme, shape: tuple[int, int], seed: int, scales: torch.dtype = torch.float16
) -> QuantizedTensor:
    random = torch.Generator().manual_seed(seed)
    if scheme.flat:
        return random_levels(scheme, shape, random)
    grid = (shape[0], scheme.groups(shape[1]))
    if scheme.outlier_threshold is not None:
        scales = torch.rand(grid, generator=random).to(torch.float16).to(torch.float32) / 127
        return QuantizedTensor(torch.randint(1, 256, shape, generator=random, dtype=torch.uint8), scales, None, scheme)
    static = scheme.act_bits == 8 and not scheme.act_dynamic
    return QuantizedTensor(
        torch.randint(0, scheme.max_code + 1, shape, generator=random, dtype=torch.uint8),
        (torch.rand(grid, generator=random) * 0.1 + 0.001).to(scales),
        None if scheme.sym else torch.randint(0, scheme.max_code + 1, grid, generator=random, dtype=torch.uint8),
        scheme,
        input_scale=torch.rand(1, generator=random) if static else None,
        input_zero=torch.tensor([-3], dtype=torch.int8) if static and not scheme.act_sym else None,
    )


def random_levels(scheme: QuantScheme, shape: tuple[int, int], random: torch.Generator) -> QuantizedTensor:
    """nf4 and fp4, of weights that were bfloat16."""
    codes = torch.randint(0, 16, shape, generator=random, dtype=torch.uint8)
    scales, double = torch.rand(math.prod(shape) // scheme.group_size, generator=random), None
    if scheme.double_quant:
        double = DoubleQuant(
            torch.randint(0, 256, scales.shape, generator=random, dtype=torch.uint8),
            torch.rand(256, generator=random),
            torch.rand(-(-len(scales) // 256), generator=random),
            torch.rand((), generator=random),
        )
        scales = dequantize_absmax(double.codes, double.quant_map, double.absmax, double.offset)
    return QuantizedTensor(codes, scales, None, scheme, double=double, weight_dtype=torch.bfloat16)


def write_artifact(
    directory: Path, format_: str, weights: dict[str, QuantizedTensor], dtype: torch.dtype = torch.float16
) -> Path:
    """A decoder's checkpoint with these modules quantized, two linears in float and some more."""
    random = torch.Generator().manual_seed(7)
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, 64, generator=random).to(dtype),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(64, generator=random).to(dtype),
        "model.norm.weight": torch.tensor([math.nan, -0.0, math.inf, 1.0]).repeat(16),
        "vision.position_ids": torch.arange(6).view(1, 2, 3),
    }
    tensors |= {f"{name}.weight": torch.randn(32, 64, generator=random).to(dtype) for name in KEPT if "k_proj" in name}
    for module, q in weights.items():
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in FORMATS[format_].pack(q).items()}
    act_order = any(q.g_idx is not None for q in weights.values())
    schemes = {module: q.scheme for module, q in weights.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "quantization_config": FORMATS[format_].quantization_config(schemes, KEPT, act_order=act_order),
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling.py").write_text("raise SystemExit")
    return directory


def same_scheme(scheme: QuantScheme) -> dict[str, QuantizedTensor]:
    return {name: random_weight(scheme, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def run(source: Path, output: Path, format_: str, **options: Any) -> QuantizeResult:
    return repack.run(open_checkpoint(source), output, format_, **options)


def packed(directory: Path) -> PackedCheckpoint:
    checkpoint = open_checkpoint(directory)
    format_ = detect(checkpoint.config)
    assert format_ is not None
    return PackedCheckpoint(checkpoint, format_)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def others(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that belong to no quantized module."""
    artifact = packed(directory)
    parts = {name for module in artifact.schemes for name in artifact.packed_names(module)}
    return {name: tensor for name, tensor in stored(directory).items() if name not in parts}


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))  # NaN equals NaN


def assert_same_weights(left: Path, right: Path) -> None:
    """Every weight and every other tensor, bit for bit."""
    ours, theirs = packed(left), packed(right)
    assert ours.schemes.keys() == theirs.schemes.keys()
    for module in ours.schemes:
        assert torch.equal(ours.dequantized(module), theirs.dequantized(module)), module
        a, b = ours.quantized(module), theirs.quantized(module)
        assert (a.input_scale, a.input_zero, a.weight_dtype) == (b.input_scale, b.input_zero, b.weight_dtype)
    ours_too, theirs_too = others(left), others(right)
    assert ours_too.keys() == theirs_too.keys()
    assert all(same_bytes(tensor, theirs_too[name]) for name, tensor in ours_too.items())


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def identical(left: Path, right: Path) -> bool:
    """The same tensors, bytes for bytes, and the same config."""
    a, b = stored(left), stored(right)
    return (
        a.keys() == b.keys() and all(same_bytes(a[name], b[name]) for name in a) and config_of(left) == config_of(right)
    )


def refusal(source: Path, output: Path, format_: str, error: type[QuantoolError] = UsageError, **options: Any) -> str:
    before = sorted(output.parent.iterdir())
    with pytest.raises(error) as caught:
        run(source, output, format_, **options)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert sorted(output.parent.iterdir()) == before, "nothing is written"
    return f"{caught.value.message} | {caught.value.hint}"


# --- every pair of formats


@pytest.mark.parametrize(("scheme", "source", "target"), CASES)
def test_weights_stay_the_same_or_the_format_is_refused(
    tmp_path: Path, scheme: QuantScheme, source: str, target: str
) -> None:
    first = write_artifact(tmp_path / "first", source, same_scheme(scheme))
    if target not in HOLDS[scheme]:
        assert f"cannot be repacked as {target} without requantizing" in refusal(first, tmp_path / "second", target)
        return
    done = run(first, tmp_path / "second", target)
    assert_same_weights(first, tmp_path / "second")
    assert detect(config_of(tmp_path / "second")) is FORMATS[target]
    assert (done.method, done.format, done.scheme, done.group_size) == (
        "repack",
        target,
        str(scheme),
        scheme.group_size,
    )
    run(tmp_path / "second", tmp_path / "third", source)
    assert identical(first, tmp_path / "third"), "there and back"


def test_what_is_counted_planned_and_kept(tmp_path: Path) -> None:
    first = write_artifact(tmp_path / "first", CT, same_scheme(QuantScheme(4, 32)))
    out = tmp_path / "second"
    dry = run(first, out, AWQ, dry_run=True)
    assert not out.exists()
    done = run(first, out, AWQ)
    assert (done.quantized, done.copied, done.folded, done.dropped) == (6, 6, 0, 0)
    assert done.bytes == dry.bytes == (out / "model.safetensors").stat().st_size
    rows = {row.name: row for row in dry.plan}
    assert rows.keys() == {f"{module}.weight" for module in SHAPES} | others(first).keys()
    written = stored(out)
    for module, shape in SHAPES.items():
        row = rows[f"{module}.weight"]
        size = sum(written[f"{module}.{suffix}"].nbytes for suffix in ("qweight", "qzeros", "scales"))
        assert (row.action, row.shape, row.bytes) == ("repacked", list(shape), size)
    assert {row.action for name, row in rows.items() if name in others(first)} == {"copied"}
    assert len(done.plan) == 0
    before, after = config_of(first), config_of(out)
    assert after.pop("quantization_config")["modules_to_not_convert"] == KEPT
    del before["quantization_config"]
    assert after == before
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    parameters = sum(a * b for a, b in SHAPES.values()) + sum(tensor.numel() for tensor in others(first).values())
    assert done.bits_per_weight == pytest.approx(done.bytes * 8 / parameters)


def test_shards(tmp_path: Path) -> None:
    first = write_artifact(tmp_path / "first", CT, same_scheme(QuantScheme(4, 32)))
    run(first, tmp_path / "many", AWQ, max_shard_size=10_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    run(tmp_path / "many", tmp_path / "one", CT)
    assert identical(first, tmp_path / "one")


# --- what is exact, and what is not


def test_zero_points_in_the_middle_are_no_zero_points(tmp_path: Path) -> None:
    """AWQ's layout has zero points for symmetric weights too; one that is off the middle makes all asymmetric."""
    scheme = QuantScheme(4, 32, sym=False)
    weights = {
        m: replace(q, zeros=torch.full_like(q.scales, 8, dtype=torch.uint8)) for m, q in same_scheme(scheme).items()
    }
    first = write_artifact(tmp_path / "first", AWQ, weights)
    done = run(first, tmp_path / "second", CT)
    assert (done.scheme, len(done.notes)) == ("W4A16 sym g32", 1)
    assert "symmetric" in done.notes[0]
    assert not any("zero_point" in name for name in stored(tmp_path / "second"))
    assert_same_weights(first, tmp_path / "second")

    weights["model.layers.1.mlp.down_proj"].zeros[63, 3] = 7  # type: ignore[index]
    first = write_artifact(tmp_path / "off", AWQ, weights)
    done = run(first, tmp_path / "third", CT)
    assert (done.scheme, done.notes) == ("W4A16 asym g32", [])
    assert_same_weights(first, tmp_path / "third")


@pytest.mark.parametrize("target", [AWQ, GPTQ])
def test_scales_that_the_format_does_not_hold(tmp_path: Path, target: str) -> None:
    weights = same_scheme(QuantScheme(4, 32))
    for dtype, value, fits in (
        (torch.float32, 0.1, False),
        (torch.float32, 0.125, True),
        (torch.bfloat16, 0.1, True),
        (torch.bfloat16, 2.0**-30, False),
        (torch.bfloat16, 70000, False),
        (torch.float16, 65504, True),
    ):
        weights = {m: replace(q, scales=torch.full_like(q.scales, 0.5, dtype=dtype)) for m, q in weights.items()}
        weights["model.layers.1.mlp.up_proj"].scales[127, 1] = value
        first = write_artifact(tmp_path / f"{dtype}-{value}", CT, weights)
        if fits:
            run(first, tmp_path / f"{dtype}-{value}-out", target)
            assert_same_weights(first, tmp_path / f"{dtype}-{value}-out")
            continue
        message = refusal(first, tmp_path / "out", target)
        name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        assert f"'model.layers.1.mlp.up_proj': its scales are {name} values that F16 does not hold exactly" in message
        assert "quantize the float checkpoint" in message


def test_scales_are_stored_in_the_models_dtype_if_it_holds_them(tmp_path: Path) -> None:
    weights = same_scheme(QuantScheme(4, 32))
    coarse = {m: replace(q, scales=q.scales.to(torch.bfloat16).to(torch.float16)) for m, q in weights.items()}
    for name, modules, dtype, word, notes in (
        ("fine in f16", weights, torch.float16, "F16", 0),
        ("fine in f32", weights, torch.float32, "F32", 0),
        ("fine in bf16", weights, torch.bfloat16, "F16", 1),
        ("coarse in bf16", coarse, torch.bfloat16, "BF16", 0),
    ):
        first = write_artifact(tmp_path / name, AWQ, modules, dtype)
        done = run(first, tmp_path / f"{name} out", CT)
        assert len(done.notes) == notes + 1, name  # AWQ's zero points are in the middle
        scales = stored(tmp_path / f"{name} out")["model.layers.0.mlp.up_proj.weight_scale"]
        assert scales.dtype == DTYPES[word]
        assert_same_weights(first, tmp_path / f"{name} out")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scales_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    weights = same_scheme(QuantScheme(4, 32))
    weights["model.layers.0.mlp.up_proj"].scales[3, 1] = bad
    first = write_artifact(tmp_path / "first", CT, weights)
    message = refusal(first, tmp_path / "out", AWQ, QuantoolError)
    assert re.search(r"'model\.layers\.0\.mlp\.up_proj\W.*: 1 of 256 values are NaN or Inf", message)


def in_activation_order(scheme: QuantScheme) -> dict[str, QuantizedTensor]:
    """Columns of a group anywhere in the row; of one module side by side, as if nothing had been ordered."""
    weights = same_scheme(scheme)
    random = torch.Generator().manual_seed(1)
    for module, q in list(weights.items())[1:]:
        columns = q.codes.shape[1]
        g_idx = (torch.randperm(columns, generator=random) // scheme.width(columns)).to(torch.int32)
        weights[module] = replace(q, g_idx=g_idx)
    return weights


def test_columns_in_activation_order(tmp_path: Path) -> None:
    first = write_artifact(tmp_path / "first", GPTQ, in_activation_order(QuantScheme(4, 32)))
    run(first, tmp_path / "second", GPTQ)
    assert identical(first, tmp_path / "second")
    assert config_of(first)["quantization_config"]["desc_act"] is True
    assert_same_weights(first, tmp_path / "second")
    for target in (CT, AWQ):
        message = refusal(first, tmp_path / "third", target, dry_run=True)
        assert "activation order" in message
        assert "'model.layers.0.self_attn.q_proj'" not in message, "that one has contiguous groups"


def test_activation_order_of_older_llm_compressors(tmp_path: Path) -> None:
    """compressed-tensors up to 0.19 had weight_g_idx, which no current runtime loads; GPTQ holds the same."""
    weights = in_activation_order(QuantScheme(4, 32))
    first = write_artifact(tmp_path / "first", CT, {m: replace(q, g_idx=None) for m, q in weights.items()})
    orders = {f"{m}.weight_g_idx": q.g_idx for m, q in weights.items() if q.g_idx is not None}
    save_file(stored(first) | orders, first / "model.safetensors")
    assert_same_weights(write_artifact(tmp_path / "gptq", GPTQ, weights), first)
    run(first, tmp_path / "second", GPTQ)
    assert identical(tmp_path / "second", tmp_path / "gptq")
    assert "activation order" in refusal(first, tmp_path / "third", CT)


def test_an_order_that_is_none_is_forgotten(tmp_path: Path) -> None:
    """`desc_act` true with contiguous groups, which vLLM refuses by the config alone."""
    first = write_artifact(tmp_path / "first", GPTQ, same_scheme(QuantScheme(4, 32)))
    config = config_of(first)
    config["quantization_config"]["desc_act"] = True
    (first / "config.json").write_text(json.dumps(config))
    run(first, tmp_path / "second", GPTQ)
    assert config_of(tmp_path / "second")["quantization_config"]["desc_act"] is False
    run(first, tmp_path / "third", CT)
    assert_same_weights(first, tmp_path / "third")


@pytest.mark.parametrize("target", [CT, AWQ, GPTQ])
def test_gptq_v1_with_zero_points(tmp_path: Path, target: str) -> None:
    """v1 stores each zero point less one, borrows included; GPTQ's own target is v2 then."""
    v2 = write_artifact(tmp_path / "v2", GPTQ, same_scheme(QuantScheme(4, 32, sym=False)))
    v1 = Path(shutil.copytree(v2, tmp_path / "v1"))
    tensors, config = stored(v2), config_of(v2)
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):
            tensors[name] = tensor - 0x11111111
    save_file(tensors, v1 / "model.safetensors")
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (v1 / "config.json").write_text(json.dumps(config))
    run(v1, tmp_path / "out", target)
    assert_same_weights(v2, tmp_path / "out")
    if target == GPTQ:
        assert identical(v2, tmp_path / "out")


def test_groups_that_the_config_of_the_format_does_not_say(tmp_path: Path) -> None:
    weights = same_scheme(QuantScheme(4, 32))
    module = "model.layers.1.mlp.down_proj"
    weights[module] = random_weight(QuantScheme(4, 64), SHAPES[module], 9)
    first = write_artifact(tmp_path / "first", CT, weights)
    assert "one group size for all modules" in refusal(first, tmp_path / "out", AWQ)
    for target in (CT, GPTQ):
        done = run(first, tmp_path / target, target)
        assert done.scheme == "W4A16 sym g32 (5), W4A16 sym g64 (1)"
        assert_same_weights(first, tmp_path / target)


def test_what_other_releases_wrote_becomes_what_is_written_now(tmp_path: Path) -> None:
    """Int8 codes that are not packed (naive-quantized), and int8 zero points."""
    weights = same_scheme(QuantScheme(8, 32, sym=False))
    first = write_artifact(tmp_path / "first", CT, weights)
    tensors, config = stored(first), config_of(first)
    for module, q in weights.items():
        for suffix in ("weight_packed", "weight_shape", "weight_zero_point"):
            del tensors[f"{module}.{suffix}"]
        assert q.zeros is not None
        tensors[f"{module}.weight"] = (q.codes.to(torch.int16) - 128).to(torch.int8)
        tensors[f"{module}.weight_zero_point"] = (q.zeros.to(torch.int16) - 128).to(torch.int8)
    config["quantization_config"]["format"] = "naive-quantized"
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "naive-quantized"
    naive = Path(shutil.copytree(first, tmp_path / "naive"))
    save_file(tensors, naive / "model.safetensors")
    (naive / "config.json").write_text(json.dumps(config))
    run(naive, tmp_path / "out", CT)
    assert {name: t.tolist() for name, t in stored(tmp_path / "out").items() if "_proj" in name} == {
        name: t.tolist() for name, t in stored(first).items() if "_proj" in name
    }
    assert config_of(tmp_path / "out") == config_of(first)


# --- refusals and failures


def test_a_float_checkpoint_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    assert "has no quantized weights" in refusal(tiny_llama, tmp_path / "out", AWQ, QuantoolError)


def test_the_output(tmp_path: Path) -> None:
    first = write_artifact(tmp_path / "first", CT, same_scheme(QuantScheme(4, 32)))
    assert "is the model itself" in refusal(first, first, AWQ, overwrite=True)
    other = write_artifact(tmp_path / "other", CT, same_scheme(QuantScheme(8, 32)))
    assert "already exists" in refusal(first, other, AWQ)
    run(first, other, AWQ, overwrite=True)
    assert_same_weights(first, other)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, QuantoolError])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    first = write_artifact(tmp_path / "first", CT, same_scheme(QuantScheme(4, 32)))
    seen = []

    def progress(done: int, total: int, label: str) -> None:
        seen.append((done, total, label))
        if done == 3:
            raise stop("enough")

    with pytest.raises(stop):
        run(first, tmp_path / "new" / "out", AWQ, progress=progress)
    assert seen == [(i, 12, "repacking") for i in (1, 2, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_damaged_module_is_named_and_nothing_stays(tmp_path: Path) -> None:
    first = write_artifact(tmp_path / "first", CT, same_scheme(QuantScheme(4, 32)))
    tensors = stored(first)
    tensors["model.layers.1.mlp.up_proj.weight_shape"][0] = 127
    save_file(tensors, first / "model.safetensors")
    message = refusal(first, tmp_path / "out", CT, QuantoolError)
    assert "'model.layers.1.mlp.up_proj'" in message


class _Recorder:
    """A checkpoint that remembers what was read and not dropped since."""

    def __init__(self, stored: Checkpoint) -> None:
        self.stored, self.path, self.config = stored, stored.path, stored.config
        self.metadata, self.infos = stored.metadata, stored.infos
        self.resident: set[str] = set()

    def read(self, name: str) -> torch.Tensor:
        self.resident.add(name)
        return self.stored.read(name)

    def drop(self, name: str) -> None:
        self.resident.discard(name)
        self.stored.drop(name)

    def write_aux(self, directory: Path) -> None:
        self.stored.write_aux(directory)


@pytest.mark.parametrize("middle", [True, False])
def test_what_was_read_is_forgotten(tmp_path: Path, middle: bool) -> None:
    """The pages of one module at a time, also while the zero points are looked at."""
    weights = same_scheme(QuantScheme(4, 32, sym=False))
    if middle:
        weights = {m: replace(q, zeros=torch.full_like(q.codes[:, : q.scales.shape[1]], 8)) for m, q in weights.items()}
    first = write_artifact(tmp_path / "first", AWQ, weights)
    checkpoint = _Recorder(open_checkpoint(first))
    modules = list(packed(first).schemes)

    def progress(done: int, total: int, label: str) -> None:
        waiting = {f"{module}.{suffix}" for module in modules[done:] for suffix in ("qweight", "qzeros", "scales")}
        assert checkpoint.resident <= (set() if middle else waiting), "shapes are asked of all, without touching a page"

    repack.run(checkpoint, tmp_path / "out", CT, progress=progress)


def test_no_network_is_built(tmp_path: Path) -> None:
    first = write_artifact(tmp_path / "first", CT, same_scheme(QuantScheme(4, 32)))
    code = f"""
import sys
from pathlib import Path
from quantool.io import open_checkpoint
from quantool.stages import repack
repack.run(open_checkpoint({str(first)!r}), Path({str(tmp_path / "out")!r}), "awq")
print([name for name in ("transformers", "datasets", "compressed_tensors") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_command_line(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = write_artifact(tmp_path / "first", CT, same_scheme(QuantScheme(4, 32)))
    outcome = command("quantize", "first", "--format", "awq", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads(outcome.out)
    assert (record["output"], record["method"], record["quantized"], record["copied"]) == ("first-awq", "repack", 6, 6)
    assert_same_weights(first, tmp_path / "first-awq")
    table = command("quantize", "first", "--format", "gptq", "--dry-run")
    assert table.out.count("repacked") == 6
    for more in ("--bits=4", "--method=rtn", "--group-size=32", "--sym"):
        refused = command("quantize", "first", "--format", "gptq", more)
        assert refused.code != 0
        assert "is already quantized" in refused.err
    assert "without requantizing" in command("quantize", "first", "--format", "bitsandbytes").err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "first-awq"]


# --- artifacts of other tools

# Scales of all ct-* here are float32, which GPTQ and AWQ do not store.
PEERS = {
    "ar-auto_awq": {CT, AWQ, GPTQ},
    "ar-auto_gptq": {CT, AWQ, GPTQ},
    "ar-auto_round": {CT, AWQ, GPTQ},
    "ct-mixed-w4-w8": {CT},
    "ct-w3a16-sym-g64": {CT},
    "ct-w4a16-asym-g64-gptq": {CT},
    "ct-w4a16-sym-g128": {CT},
    "ct-w8a16-channel": {CT},
    "ct-w8a8-smoothquant": {CT},
    "ct-w8a8-static": {CT},
    "bnb-int8": {BNB},
    "bnb-nf4": {BNB},
    "bnb-nf4-dq": {BNB},
}


def logits(directory: Path) -> torch.Tensor:
    ids = torch.arange(3, 67).view(2, 32)
    with torch.inference_mode():
        result: torch.Tensor = load(directory)(input_ids=ids).logits
    return result


@pytest.mark.parametrize("target", sorted(FORMATS))
@pytest.mark.parametrize("peer", sorted(PEERS))
def test_peers(shared: Path, tmp_path: Path, peer: str, target: str) -> None:
    source = shared / "peers" / peer
    if target not in PEERS[peer]:
        assert "without requantizing" in refusal(source, tmp_path / "out", target)
        return
    done = run(source, tmp_path / "out", target)
    assert (done.quantized, done.dropped) == (14, 0)
    assert_same_weights(source, tmp_path / "out")
    assert torch.equal(logits(source), logits(tmp_path / "out"))
    assert config_of(source) | {"quantization_config": 0} == config_of(tmp_path / "out") | {"quantization_config": 0}


def test_the_library_decompresses_what_was_awq(shared: Path, tmp_path: Path) -> None:
    """compressed-tensors' own code gives the weights of the AWQ file."""
    library = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    source = shared / "peers/ar-auto_awq"
    run(source, tmp_path / "out", CT)
    config = quantization.QuantizationConfig.model_validate(config_of(tmp_path / "out")["quantization_config"])
    awq, tensors = packed(source), stored(tmp_path / "out")
    for module in awq.schemes:
        parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        found = library.PackedQuantizationCompressor.decompress(parts, config.config_groups["group_0"])["weight"]
        assert found.dtype == torch.float32
        assert torch.equal(found, awq.dequantized(module))
