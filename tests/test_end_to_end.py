"""Our artifacts in the real thing: transformers with compressed-tensors or bitsandbytes, and decoders of our own.

The logits that others compute from an artifact are those that `quantool.load` computes from it.
"""

import functools
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantool import load
from quantool.cli.options import CALIBRATED
from quantool.data import TextOptions
from quantool.recipe import METHOD_DEFAULTS, Override, Recipe
from quantool.runtime import QuantLinear
from quantool.scheme import METHOD_NAMES, MethodOptions
from quantool.stages import eval_ppl, quantize

TEXT = TextOptions(num_samples=8, seq_len=96)
MIXED = (
    Override("mlp.down_proj", bits=8, group_size=-1, sym=True),
    Override(r"re:.*layers\.0\.self_attn\.[qkv]_proj", ignore=True),
    Override("o_proj", group_size=32),
)
BY_HAND = (Override("mlp.down_proj", bits=8, method="gptq"), Override(r"re:.*\.self_attn\.", bits=8, method="rtn"))


def smoothquant(**changes: Any) -> Recipe:
    return Recipe(method="smoothquant", **{**METHOD_DEFAULTS["smoothquant"], **changes})


CASES = {
    "w4-asym-g64": Recipe(group_size=64, sym=False),
    "w4-asym-g32": Recipe(group_size=32, sym=False),
    "w4-sym-auto": Recipe(),
    "w8-channel": Recipe(bits=8, group_size=-1),
    "w3-asym-g64": Recipe(bits=3, group_size=64, sym=False),
    "w4-sym-head": Recipe(ignore=()),
    "mixed": Recipe(sym=False, overrides=MIXED),
    "mixed-sym": Recipe(overrides=MIXED),
    "awq-w4-asym-g64": Recipe(method="awq", group_size=64, sym=False),
    "awq-w4-sym-g32": Recipe(method="awq", group_size=32),
    "awq-w3-asym-g128": Recipe(method="awq", bits=3, sym=False),
    "awq-mixed": Recipe(method="awq", sym=False, overrides=MIXED),
    "gptq-w4-sym-g64": Recipe(method="gptq", group_size=64),
    "gptq-w4-asym-g32": Recipe(method="gptq", group_size=32, sym=False),
    "gptq-w3-in-stored-order": Recipe(method="gptq", bits=3, group_size=64, options=MethodOptions(actorder="none")),
    "gptq-w8a8": Recipe(method="gptq", bits=8, group_size=-1, act_bits=8),
    "awq-gptq-w4-asym-g64": Recipe(method="awq+gptq", group_size=64, sym=False),
    "awq-gptq-w4-sym-g128": Recipe(method="awq+gptq", group_size=128),
    "by-hand": Recipe(method="awq", group_size=64, overrides=BY_HAND),
    "smoothquant": smoothquant(),
    "smoothquant-asym": smoothquant(act_sym=False),
    "smoothquant-tensor": smoothquant(group_size=0, options=MethodOptions(smoothing_strength=0.5)),
    "smoothquant-static": smoothquant(act_dynamic=False),
    "smoothquant-static-asym": smoothquant(act_dynamic=False, act_sym=False),
}

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("[!g]*.yaml"))  # gguf-*: of convert-gguf

Artifacts = Callable[..., Path]
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Artifacts:
    """Artifacts of `tiny_llama` by recipe, each made once."""
    made: dict[str, Path] = {}

    def make(recipe: Recipe) -> Path:
        key = str(recipe)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("artifact") / "out"
            quantize.run(str(tiny_llama), made[key], recipe, text=TEXT)
        return made[key]

    return make


@pytest.fixture(scope="module")
def ids(tiny_llama: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    text = "The for statement is used to iterate over the elements of a sequence (such as a string, tuple or list)."
    return torch.tensor([AutoTokenizer.from_pretrained(tiny_llama)(text * 2).input_ids[:64]])


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        values: torch.Tensor = model(input_ids=ids).logits.float()
    return values


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the spread of the logits: a constant added to all of them means nothing."""
    return float((a - b).norm() / (b - b.mean(-1, keepdim=True)).norm())


def transformers_loads(directory: Path) -> Any:
    """The artifact as transformers and compressed-tensors load it, in float32.

    compressed-tensors 0.19 and 0.20 give packed zero points the shape of unpacked ones before they load them, so that
    asymmetric weights, also llm-compressor's own, load only with `dequantize`, which our config says. That takes one
    scheme for all modules: several with zero points load in neither way.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    section = getattr(AutoConfig.from_pretrained(directory), "quantization_config", {"config_groups": {}})
    if section.get("quant_method") == "bitsandbytes":
        return bitsandbytes_computes(directory)
    groups = section["config_groups"].values()
    if len(groups) > 1 and not all(group["weights"]["symmetric"] for group in groups):
        return compressed_tensors_decompresses(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def bitsandbytes_computes(directory: Path) -> Any:
    """In float32: where a processor has instructions for bfloat16, bitsandbytes rounds what reaches a linear to it."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    linears = [module for module in model.modules() if isinstance(module, kinds)]
    assert len(linears) == 14
    for linear in linears:
        linear.support_avx512bf16_for_cpu = False
    return model


def compressed_tensors_decompresses(directory: Path) -> Any:
    """A float model whose weights the library decompressed, each by the scheme that the library finds for it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    section = config.quantization_config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    apply_quantization_config(model, QuantizationConfig(**section))
    weights = load_file(directory / "model.safetensors")
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            stored = {key.rpartition(".")[2]: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
            compressor = BaseCompressor.get_value_from_registry(scheme.format or section["format"])
            weights[f"{name}.weight"] = compressor.decompress(stored, scheme)["weight"]
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(weights)
    return plain.eval()


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_logits(
    artifacts: Artifacts, tiny_llama: Path, ids: torch.Tensor, case: str
) -> None:
    directory = artifacts(CASES[case])
    ours, theirs = logits(load(directory), ids), logits(transformers_loads(directory), ids)
    assert distance(ours, theirs) < 1e-3
    source = logits(load(tiny_llama), ids)
    assert 0.001 < distance(ours, source) < 0.5, "the source's own logits would prove nothing"


# The most that a method with its defaults may lose on `tiny_llama`: some two and a half times what it does lose.
MOST_LOST = {
    "rtn": 0.012,
    "gptq": 0.0006,
    "awq": 0.0016,
    "awq+gptq": 0.0003,
    "smoothquant": 8e-5,
    "nf4": 0.005,
    "fp4": 0.009,
    "llm-int8": 1e-4,
}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_through_the_command_line(
    command: Command, tiny_llama: Path, tmp_path: Path, ids: torch.Tensor, method: str
) -> None:
    out, text = tmp_path / "out", ("--num-samples", 8, "--seq-len", 96)
    done = command(
        "quantize", tiny_llama, "-o", out, "--method", method, *(text if method in CALIBRATED else ()), "--json"
    )
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["method"], result["format"]) == (method, METHOD_DEFAULTS[method]["format"])
    assert (result["quantized"], result["dropped"]) == (14, 0)
    lost = command("eval-ppl", out, "--reference", tiny_llama, *text, "--max-kld", MOST_LOST[method], "--json")
    assert lost.code == 0, lost.err
    assert json.loads(lost.out)["kl_divergence"] > MOST_LOST[method] / 10, "the source's own would prove nothing"
    assert distance(logits(load(out), ids), logits(transformers_loads(out), ids)) < 1e-3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_recipes_plan(command: Command, tiny_llama: Path, text_file: Path, path: Path) -> None:
    method = re.search(r"^  method: (\S+)$", path.read_text(), re.MULTILINE)
    assert method
    text = ("--dataset", text_file, "--num-samples", 2, "--seq-len", 16) if method[1] in CALIBRATED else ()
    done = command("quantize", tiny_llama, "-c", path, "--dry-run", "--json", *text)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["method"] == method[1]
    assert result["quantized"] == (14 if "by-hand" not in path.stem else 11)
    assert result["group_size"] in {128, 64, -1}


def test_transformers_loads_shards(tiny_llama: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    quantize.run(str(tiny_llama), tmp_path / "out", Recipe(), text=TEXT, max_shard_size=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert distance(logits(load(tmp_path / "out"), ids), logits(transformers_loads(tmp_path / "out"), ids)) < 1e-3


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_transformers_loads_what_was_a_gguf(tiny_gguf: Path, tmp_path: Path, ids: torch.Tensor, method: str) -> None:
    quantize.run(str(tiny_gguf), tmp_path / "out", Recipe(method=method, sym=False), text=TEXT)
    assert distance(logits(load(tmp_path / "out"), ids), logits(transformers_loads(tmp_path / "out"), ids)) < 1e-3


def test_generate_takes_the_best_token_of_transformers(artifacts: Artifacts, ids: torch.Tensor) -> None:
    directory = artifacts(CASES["awq-w4-asym-g64"])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    text = load(directory).generate(ids[:, :20], attention_mask=torch.ones(1, 20, dtype=torch.int64), **options)
    assert text.shape == (1, 32)
    theirs = logits(transformers_loads(directory), text)[0, 19:-1]
    chosen = theirs.gather(1, text[0, 20:, None]).squeeze(1)
    assert (theirs.amax(1) - chosen).max() < 0.02, "no more than a tie"


def test_linears_stay_packed_in_memory(artifacts: Artifacts) -> None:
    model = load(artifacts(CASES["w4-asym-g64"]))
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14
    packed = sum(buffer.nbytes for module in linears for buffer in module.buffers())
    assert packed < 0.6 * sum(module.in_features * module.out_features for module in linears)
    assert {type(module).__name__ for module in model.modules()} >= {"QuantLinear", "LlamaRMSNorm"}


# --- the awq and gptq formats


def decode_awq(tensors: dict[str, torch.Tensor], module: str, group_size: int) -> torch.Tensor:
    """W float32 [N, K] of an AutoAWQ GEMM module, nibble by nibble. Order: reference/formats.md's golden word."""
    qweight, qzeros, scales = (tensors[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales"))
    columns, words = qweight.shape
    weight = torch.zeros(words * 8, columns)
    shift_of_channel = (0, 16, 4, 20, 8, 24, 12, 28)  # 0x75316420: channel 1 is in bits 19..16
    for word in range(words):
        for channel, shift in enumerate(shift_of_channel):
            row = word * 8 + channel
            codes = (qweight[:, word].long() >> shift) & 15
            zeros = (qzeros[:, word].long() >> shift) & 15
            for group in range(columns // group_size):
                span = slice(group * group_size, (group + 1) * group_size)
                weight[row, span] = scales[group, row].float() * (codes[span] - zeros[group])
    return weight


def decode_gptq(tensors: dict[str, torch.Tensor], module: str, bits: int, minus: int) -> torch.Tensor:
    """W float32 [N, K] of an AutoGPTQ module, column by column; its zeros were stored less `minus`."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")
    )
    rows = qweight.shape[1]
    weight, mask = torch.zeros(rows, len(g_idx)), (1 << bits) - 1
    bit_of_row = torch.arange(rows) * bits
    for column, group in enumerate(g_idx.tolist()):
        codes = (qweight[column * bits // 32].long() >> (column * bits % 32)) & mask
        zeros = (qzeros[group][bit_of_row // 32].long() >> (bit_of_row % 32)) & mask
        weight[:, column] = scales[group].float() * (codes - zeros - minus)
    return weight


def dense(directory: Path, out: Path, decode: Callable[[dict[str, torch.Tensor], str], torch.Tensor]) -> Path:
    """An artifact as a float checkpoint."""
    from safetensors.torch import save_file

    shutil.copytree(directory, out)
    tensors = load_file(out / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    weights = {f"{module}.weight": decode(tensors, module) for module in modules}
    packed = ("qweight", "qzeros", "scales", "g_idx")
    kept = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[2] not in packed}
    save_file({**kept, **weights}, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    assert len(modules) == 14
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    "recipe",
    [Recipe(format="awq", group_size=64), Recipe(method="awq", format="awq", group_size=128, sym=False)],
    ids=lambda recipe: recipe.method,
)
def test_the_awq_format_through_a_decoder_of_our_own(
    artifacts: Artifacts, tiny_llama: Path, tmp_path: Path, ids: torch.Tensor, recipe: Recipe
) -> None:
    directory = artifacts(recipe)
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["bits"], section["group_size"]) == ("awq", 4, recipe.group_size)
    assert (section["version"], section["zero_point"]) == ("gemm", True)
    decode = functools.partial(decode_awq, group_size=section["group_size"])
    theirs = logits(transformers_loads(dense(directory, tmp_path / "dense", decode)), ids)
    ours = logits(load(directory), ids)
    assert distance(ours, theirs) < 1e-3
    assert 0.001 < distance(ours, logits(load(tiny_llama), ids)) < 0.5


ACT_ORDER = MethodOptions(actorder="group")


@pytest.mark.parametrize(
    ("recipe", "version"),
    [
        (Recipe(method="gptq", format="gptq", group_size=64), "gptq"),
        (Recipe(method="gptq", format="gptq", group_size=64, options=ACT_ORDER), "gptq"),
        (Recipe(method="gptq", format="gptq", bits=8, group_size=-1), "gptq"),
        (Recipe(method="awq+gptq", format="gptq", group_size=32, sym=False, options=ACT_ORDER), "gptq_v2"),
        (Recipe(format="gptq", bits=2, group_size=32), "gptq"),
    ],
    ids=["sym", "act-order", "8 bits", "awq+gptq", "rtn"],
)
def test_the_gptq_format_through_a_decoder_of_our_own(
    artifacts: Artifacts, tiny_llama: Path, tmp_path: Path, ids: torch.Tensor, recipe: Recipe, version: str
) -> None:
    directory, ordered = artifacts(recipe), recipe.options.actorder == "group"
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["bits"], section["group_size"]) == ("gptq", recipe.bits, recipe.group_size)
    assert (section["checkpoint_format"], section["sym"], section["desc_act"]) == (version, recipe.sym, ordered)
    tensors = load_file(directory / "model.safetensors")
    widths = {name: tensor for name, tensor in tensors.items() if name.endswith("g_idx")}
    in_order = [torch.equal(g_idx, g_idx.sort().values) for g_idx in widths.values()]
    assert len(in_order) == 14
    assert any(in_order) == all(in_order) == (not ordered)
    decode = functools.partial(decode_gptq, bits=recipe.bits, minus=1 if version == "gptq" else 0)
    theirs = logits(transformers_loads(dense(directory, tmp_path / "dense", decode)), ids)
    ours = logits(load(directory), ids)
    assert distance(ours, theirs) < 1e-4
    assert 2e-4 < distance(ours, logits(load(tiny_llama), ids)) < 0.7


def test_both_formats_hold_the_same_model(artifacts: Artifacts, ids: torch.Tensor) -> None:
    both = [Recipe(method="awq", format=name, group_size=64, sym=False) for name in ("compressed-tensors", "awq")]
    a, b = (logits(load(artifacts(recipe)), ids) for recipe in both)
    assert distance(a, b) < 1e-3


@pytest.mark.parametrize(
    ("recipe", "chain"),
    [
        (Recipe(method="awq", group_size=64, sym=False), ("awq", "gptq", "compressed-tensors")),
        (Recipe(method="gptq", format="gptq", group_size=64), ("compressed-tensors", "awq", "gptq")),
    ],
    ids=["asym", "sym"],
)
def test_repacking_through_the_command_line(
    artifacts: Artifacts,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ids: torch.Tensor,
    recipe: Recipe,
    chain: tuple[str, ...],
) -> None:
    """From format to format and back to the first: the same tensors at the end."""
    monkeypatch.chdir(tmp_path)
    source = artifacts(recipe)
    name, wanted = str(source), logits(load(source), ids)
    for format_ in chain:
        plan = command("quantize", name, "--format", format_, "--dry-run", "--json")
        done = command("quantize", name, "--format", format_, "--json")
        assert done.code == 0, done.err
        result = json.loads(done.out)
        assert (result["method"], result["format"], result["quantized"]) == ("repack", format_, 14)
        assert result["output"] == f"{Path(name).name}-{format_}", "the name by default"
        assert result["bytes"] == json.loads(plan.out)["bytes"]
        name = result["output"]
        assert distance(logits(load(tmp_path / name), ids), wanted) < 1e-5
    first, last = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / name))
    assert first.keys() == last.keys()
    assert all(torch.equal(last[key], tensor) and last[key].dtype == tensor.dtype for key, tensor in first.items())
    for option in (("--bits", 4), ("--method", "rtn"), ("--ignore", "lm_head")):
        refused = command("quantize", name, "--format", "awq", *option, "-o", "again")
        assert refused.code == 1
        assert "is already quantized" in refused.err
        assert "--format NAME and no option that changes codes" in refused.err
    assert not (tmp_path / "again").exists()


# --- what was lost


@pytest.mark.parametrize("better", ["gptq", "awq", "awq+gptq"])
def test_a_calibrated_method_loses_less_than_rtn(artifacts: Artifacts, tiny_llama: Path, better: str) -> None:
    text = TextOptions(split="test", num_samples=24, seq_len=96)
    results = {}
    for method in ("rtn", better):
        directory = artifacts(Recipe(method=method, bits=3, group_size=128, sym=False))
        results[method] = eval_ppl.run(str(directory), text=text, reference=str(tiny_llama))
    source = results["rtn"].reference_perplexity
    assert source is not None
    assert source < 40, "far below the 320 of chance"
    assert abs(results[better].perplexity / source - 1) < 0.02
    kld = {method: result.kl_divergence for method, result in results.items()}
    assert kld["rtn"] is not None
    assert kld[better] is not None
    assert 0 < kld[better] < 0.5 * kld["rtn"]
    assert (results[better].top1_agreement or 0) > (results["rtn"].top1_agreement or 1)


def test_more_bits_lose_less(artifacts: Artifacts, tiny_llama: Path) -> None:
    text = TextOptions(split="test", num_samples=8, seq_len=96)
    divergence = []
    for bits in (2, 3, 4, 6, 8):
        directory = artifacts(Recipe(bits=bits, group_size=64, sym=False))
        divergence.append(eval_ppl.run(str(directory), text=text, reference=str(tiny_llama)).kl_divergence)
    assert all(fewer > 1.3 * more for fewer, more in itertools.pairwise(divergence)), divergence


def test_a_real_model(shared: Path, tmp_path: Path) -> None:
    """TinyStories-656K stores its tied matrix as lm_head.weight only."""
    model = shared / "models/tinystories-656k"
    text = TextOptions(dataset=str(shared / "data/stories.txt"), num_samples=8, seq_len=128)
    divergence = {}
    for method in ("rtn", "awq"):
        out = tmp_path / method
        quantize.run(str(model), out, Recipe(method=method, group_size=64, sym=False), text=text)
        ids = torch.arange(100, 164)[None]
        assert distance(logits(load(out), ids), logits(transformers_loads(out), ids)) < 1e-3
        divergence[method] = eval_ppl.run(str(out), text=text, reference=str(model)).kl_divergence
    assert divergence["awq"] < 0.8 * divergence["rtn"]
