"""Artifacts as runnable modules: against dequantize-and-matmul by hand, and transformers. Other tools': test_peers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from families import make_model, save, tokens

import quantool
from quantool.data import TextOptions
from quantool.errors import QuantoolError
from quantool.formats import FORMATS
from quantool.io import open_checkpoint
from quantool.kernels.ops import levels, packed_words
from quantool.methods.rtn import quantize_weight
from quantool.model.blocks import embed, open_head, stream_blocks
from quantool.quant import QuantizedTensor
from quantool.recipe import METHOD_DEFAULTS, Override, Recipe
from quantool.runtime import PackedCheckpoint, QuantLinear, load, open_model
from quantool.scheme import MethodOptions, QuantScheme
from quantool.stages import quantize

WINDOWS = tokens(2, 24)


GROUPS = {"rtn": -1, "nf4": 64, "llm-int8": -1}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def logits(model: Any, ids: torch.Tensor = WINDOWS) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


def float_model(directory: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return save(make_model(family, **{**sizes, **changes}).to(dtype), directory)


def make(model: Path, recipe: Recipe) -> Path:
    """The artifact of a model, beside it; AWQ calibrates on the tokens of a file, for there is no tokenizer."""
    calibration = model.parent / f"{model.name}-calibration.safetensors"
    safetensors.torch.save_file({"input_ids": tokens(4, 24, seed=1).to(torch.int32)}, calibration)
    out = model.parent / f"{model.name}-{recipe.method}-{recipe.format}-{recipe.bits}"
    quantize.run(str(model), out, recipe, calibration=calibration, text=TextOptions())
    return out


def dequantized(q: QuantizedTensor) -> torch.Tensor:
    if q.scheme.flat:
        scales = q.scales.double().repeat_interleave(q.scheme.group_size)[: q.codes.numel()]
        return levels(q.scheme.dtype).double()[q.codes.long()] * scales.view(q.codes.shape)
    columns = q.codes.shape[1]
    group = torch.arange(columns) // (columns // q.scales.shape[1]) if q.g_idx is None else q.g_idx.long()
    zeros = torch.full(q.scales.shape, q.scheme.zero) if q.zeros is None else q.zeros
    return (q.codes.double() - zeros.double()[:, group]) * q.scales.double()[:, group]


def by_hand(artifact: Path, source: Path) -> Any:
    """The transformers model of the float source with every packed weight of the artifact dequantized into it."""
    config = json.loads((artifact / "config.json").read_text())
    tensors = safetensors.torch.load_file(artifact / "model.safetensors")
    format_ = FORMATS[config["quantization_config"]["quant_method"]]
    checkpoint = open_checkpoint(artifact)
    schemes = format_.module_schemes(config["quantization_config"], checkpoint.infos)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = {}
    for module, scheme in schemes.items():
        parts = {s: tensors.pop(f"{module}.{s}") for s in format_.SUFFIXES if f"{module}.{s}" in tensors}
        state[f"{module}.weight"] = dequantized(format_.unpack(parts, scheme))
    state.update(tensors)
    if "embed_out.weight" in state:  # as transformers renames it
        state["lm_head.weight"] = state.pop("embed_out.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.pop(name).reshape(parameter.shape))
    assert not state
    return model


RECIPES = [
    Recipe(bits=4, group_size=32, sym=True),
    Recipe(bits=4, group_size=32, sym=False),
    Recipe(bits=2, group_size=16, sym=False),
    Recipe(bits=3, group_size=32, sym=True),
    Recipe(bits=5, group_size=-1, sym=False),
    Recipe(bits=8, group_size=-1, sym=True),
    Recipe(bits=4, group_size=32, sym=False, format="awq"),
    Recipe(bits=4, group_size=32, sym=False, ignore=()),
    Recipe(method="awq", bits=4, group_size=32, sym=False),
    Recipe(method="awq", bits=4, group_size=32, sym=False, format="awq"),
    Recipe(
        bits=4,
        group_size=32,
        overrides=(Override("mlp.down_proj", bits=8, group_size=-1), Override("re:.*[qkv]_proj", ignore=True)),
    ),
    Recipe(bits=4, group_size=32, sym=True, format="gptq"),
    Recipe(bits=8, group_size=-1, sym=True, format="gptq"),
    *(Recipe(method=method, **METHOD_DEFAULTS[method]) for method in ("nf4", "fp4")),
    Recipe(method="nf4", **{**METHOD_DEFAULTS["nf4"], "double_quant": False, "group_size": 256}, ignore=()),
]


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda r: f"{r.method}-{r.format}-{r.bits}-{r.group_size}-{r.sym}-{r.double_quant}"
)
def test_an_artifact_computes_what_its_packed_weights_say(recipe: Recipe, tmp_path: Path) -> None:
    source = float_model(tmp_path / "model")
    artifact = make(source, recipe)
    found = logits(load(artifact))
    assert relative(found, logits(by_hand(artifact, source))) < 1e-6
    assert relative(found, logits(load(source))) > 1e-3  # it is not the float model


@pytest.mark.parametrize("format_name", ["compressed-tensors", "awq"])
@pytest.mark.parametrize("family", ["gemma", "phi3", "qwen2", "cohere", "opt", "gpt_neox", "falcon"])
def test_artifacts_of_other_families(family: str, format_name: str, tmp_path: Path) -> None:
    """Tied heads, fused linears, biases."""
    changes = {"word_embed_proj_dim": 64, "ffn_dim": 96} if family == "opt" else {}
    source = float_model(tmp_path / "model", family, **changes)
    artifact = make(source, Recipe(method="awq", bits=4, group_size=32, sym=False, format=format_name))
    assert relative(logits(load(artifact)), logits(by_hand(artifact, source))) < 1e-6


@pytest.mark.parametrize("method", ["rtn", "nf4", "llm-int8"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_artifacts_whose_float_weights_lie_otherwise(family: str, method: str, tmp_path: Path) -> None:
    """Conv1D, and experts that transformers fuses: each is a packed linear of its own."""
    source = float_model(tmp_path / "model", family, **({} if family == "gpt2" else {"moe_intermediate_size": 32}))
    ignore = ("lm_head",) if method == "rtn" or family == "gpt2" else ("lm_head", "re:.*experts.*")
    artifact = make(
        source, Recipe(method=method, **{**METHOD_DEFAULTS[method], "group_size": GROUPS[method]}, ignore=ignore)
    )
    opened, model = open_model(artifact), load(source)
    packed = opened.checkpoint.stored
    assert isinstance(packed, PackedCheckpoint)
    found = {name for name, module in opened.model.named_modules() if isinstance(module, QuantLinear)}
    assert len(found) == len(packed.schemes)
    assert any("experts" in name for name in found) == (method == "rtn" and family != "gpt2")
    for name in found:
        stored = opened.names[f"{name}.qweight"].removesuffix(".qweight")
        model.get_submodule(name).weight.data = packed.dequantized(stored)
    assert relative(logits(load(artifact)), logits(model)) < (1e-1 if method == "llm-int8" else 1e-6)


def test_a_quantized_head_under_its_older_name(tmp_path: Path) -> None:
    source = float_model(tmp_path / "model", "gpt_neox")
    artifact = make(source, Recipe(bits=4, group_size=32, ignore=()))
    assert "embed_out.weight_packed" in open_checkpoint(artifact).infos
    model = load(artifact)
    assert isinstance(model.lm_head, QuantLinear)
    assert relative(logits(model), logits(by_hand(artifact, source))) < 1e-6


def test_every_quantized_linear_stays_packed(tmp_path: Path) -> None:
    """Memory of the module is what the file has, not what the float weights had."""
    changes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    source = float_model(tmp_path / "model", dtype=torch.bfloat16, **changes)
    artifact = make(source, Recipe(bits=4, group_size=64, sym=False))
    model = load(artifact, dtype="bfloat16")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(linears) == 14
    assert not any(isinstance(m, torch.nn.Linear) for n, m in model.named_modules() if n != "lm_head")
    for linear in linears.values():
        n, k = linear.out_features, linear.in_features
        assert linear.qweight.dtype == torch.int32
        assert linear.qweight.shape == (n, packed_words(k, 4)) == (n, k // 8)
        assert linear.scales.dtype == torch.bfloat16
        assert linear.scales.shape == (n, k // 64)
        assert linear.zeros is not None
        assert linear.zeros.shape == (n, k // 64)
        assert not list(linear.parameters())
    stored = (artifact / "model.safetensors").stat().st_size
    held = sum(t.nbytes for t in model.state_dict().values())
    assert 0.98 * stored < held < 1.03 * stored
    assert held < 0.5 * (source / "model.safetensors").stat().st_size


def test_generate_works_and_is_greedy_on_the_same_logits(tmp_path: Path) -> None:
    source = float_model(tmp_path / "model")
    model = load(make(source, Recipe(bits=8, group_size=32)))
    prompt = WINDOWS[:1, :8]
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    ids = prompt
    for _ in range(out.shape[1] - 8):
        ids = torch.cat([ids, logits(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert out.shape[1] > 8
    assert torch.equal(out, ids)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "falcon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_float_checkpoint_is_transformers_bit_for_bit(family: str, dtype: str, tmp_path: Path) -> None:
    directory = save(make_model(family).to(torch.bfloat16), tmp_path)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    found = load(directory, dtype=dtype)
    assert type(found) is type(wanted)
    assert {p.dtype for p in found.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(logits(found), logits(wanted))


def test_quantool_load_is_load(tmp_path: Path) -> None:
    directory = save(make_model("llama"), tmp_path)
    assert torch.equal(logits(quantool.load(directory)), logits(load(str(directory))))


def test_loaded_weights_are_no_views_of_the_file(tmp_path: Path) -> None:
    directory = save(make_model("llama"), tmp_path)
    first = load(directory)
    for tensor in first.parameters():
        tensor.data.zero_()
    assert logits(load(directory)).abs().max() > 0.1


@pytest.mark.parametrize("sym", [True, False])
def test_groups_in_activation_order(sym: bool, tmp_path: Path) -> None:
    """As GPTQ leaves them with desc_act: the columns of a group lie apart, g_idx tells which group each is of."""
    source = float_model(tmp_path / "model")
    artifact = make(source, Recipe(bits=4, group_size=32, sym=sym, format="gptq"))
    format_, checkpoint = FORMATS["gptq"], open_checkpoint(artifact)
    schemes = format_.module_schemes(checkpoint.config["quantization_config"], checkpoint.infos)
    tensors = safetensors.torch.load_file(artifact / "model.safetensors")
    for i, (module, scheme) in enumerate(schemes.items()):
        q = format_.unpack({suffix: tensors[f"{module}.{suffix}"] for suffix in format_.SUFFIXES}, scheme)
        order = torch.randperm(q.codes.shape[1], generator=torch.Generator().manual_seed(i))
        ordered = replace(q, g_idx=(order // 32).to(torch.int32))
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in format_.pack(ordered).items()}
    before = logits(load(artifact))
    rewrite(artifact, tensors)
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"] = format_.quantization_config(schemes, ["lm_head"], act_order=True)
    (artifact / "config.json").write_text(json.dumps(config))
    model = load(artifact)
    assert all(m.perm is not None for m in model.modules() if isinstance(m, QuantLinear))
    assert relative(logits(model), logits(by_hand(artifact, source))) < 1e-6
    assert relative(logits(model), before) > 0.01


@pytest.mark.parametrize("recipe", [RECIPES[1], RECIPES[6], RECIPES[-3]], ids=["compressed-tensors", "awq", "nf4"])
def test_the_stream_of_an_artifact_is_the_loaded_artifact(recipe: Recipe, tmp_path: Path) -> None:
    """`open_model` shows packed buffers as a checkpoint's tensors: read, released and read again."""
    artifact = make(float_model(tmp_path / "model"), recipe)
    opened = open_model(artifact)
    assert all(t.is_meta for t in opened.model.state_dict().values())
    with torch.inference_mode():
        for _ in range(2):
            states = embed(opened, WINDOWS, batch_size=2)
            for block in stream_blocks(opened, states):
                assert not any(t.is_meta for t in block.module.state_dict().values())
            assert all(t.is_meta for t in opened.model.state_dict().values())
            with open_head(opened, states) as head:
                found = torch.stack([head(row[None]) for row in states.hidden[0]])
    torch.testing.assert_close(found, logits(load(artifact)), rtol=0, atol=1e-5)


def rewrite(artifact: Path, added: dict[str, torch.Tensor], removed: str | None = None) -> None:
    path = artifact / "model.safetensors"
    tensors = {**safetensors.torch.load_file(path), **added}
    if removed:
        del tensors[removed]
    path.unlink()
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("model.layers.1.mlp.up_proj.weight_scale", None, "up_proj"),
        ("model.layers.1.mlp.up_proj.weight_packed", None, "up_proj"),
        ("model.layers.1.mlp.up_proj.weight_zero_point", None, "up_proj"),
        ("model.layers.1.mlp.up_proj.weight_packed", torch.zeros(96, 7, dtype=torch.int32), "up_proj"),
        ("model.layers.1.mlp.up_proj.weight_scale", torch.zeros(95, 2, dtype=torch.bfloat16), "up_proj"),
        ("model.layers.1.mlp.up_proj.weight_shape", torch.tensor([96, 10**12]), "up_proj"),
        ("model.layers.7.mlp.up_proj.weight", torch.zeros(4, 4), ""),
        ("model.norm.weight", None, "model.norm.weight"),
        ("model.norm.weight", torch.zeros(3), "model.norm.weight"),
    ],
)
def test_an_artifact_that_contradicts_itself_is_one_line(
    name: str, tensor: torch.Tensor | None, expected: str, tmp_path: Path
) -> None:
    artifact = make(float_model(tmp_path / "model"), Recipe(bits=4, group_size=32, sym=False))
    rewrite(artifact, {})
    load(artifact)
    rewrite(artifact, {} if tensor is None else {name: tensor}, name if tensor is None else None)
    if not expected:  # more than is needed does no harm
        load(artifact)
        return
    with pytest.raises(QuantoolError, match=expected) as caught:
        load(artifact)
    assert "\n" not in caught.value.message


def test_modules_that_the_network_does_not_have_are_named(tmp_path: Path) -> None:
    artifact = make(float_model(tmp_path / "model"), Recipe(bits=4, group_size=32, sym=False))
    tensors = safetensors.torch.load_file(artifact / "model.safetensors")
    extra = {n.replace("layers.1.mlp", "layers.1.extra"): t.clone() for n, t in tensors.items() if "layers.1.mlp" in n}
    rewrite(artifact, extra)
    with pytest.raises(QuantoolError, match=r"3 quantized modules are not in LlamaForCausalLM.*extra.down_proj"):
        load(artifact)


def test_a_quantized_module_that_is_no_linear_is_named(tmp_path: Path) -> None:
    artifact = make(float_model(tmp_path / "model"), Recipe(bits=4, group_size=32))
    format_ = FORMATS["compressed-tensors"]
    config = json.loads((artifact / "config.json").read_text())
    schemes = format_.module_schemes(config["quantization_config"], open_checkpoint(artifact).infos)
    schemes["model.embed_tokens"] = QuantScheme(8, 32)
    config["quantization_config"] = format_.quantization_config(schemes, ["lm_head"])
    (artifact / "config.json").write_text(json.dumps(config))
    weight = open_checkpoint(artifact).read("model.embed_tokens.weight").clone()
    q = quantize_weight(
        weight, schemes["model.embed_tokens"], lambda scales: scales.to(torch.bfloat16), options=MethodOptions()
    )
    packed = {f"model.embed_tokens.{suffix}": tensor for suffix, tensor in format_.pack(q).items()}
    rewrite(artifact, packed, "model.embed_tokens.weight")
    with pytest.raises(QuantoolError, match=r"'model.embed_tokens' is quantized, but Embedding is no linear"):
        load(artifact)


@pytest.mark.parametrize("method", ["rtn", "nf4", "llm-int8"])
def test_a_config_of_another_model_is_named(method: str, tmp_path: Path) -> None:
    """Also where the packed tensor would have the same size: rows and columns exchanged."""
    source = float_model(tmp_path / "model")
    artifact = make(source, Recipe(method=method, **METHOD_DEFAULTS[method]))
    config = json.loads((artifact / "config.json").read_text())
    config |= {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16}
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantoolError, match=r"holds a weight \[.*\], config.json expects \[") as caught:
        load(artifact)
    assert "different models" in str(caught.value.hint)


def test_a_damaged_state_is_named_with_its_module(tmp_path: Path) -> None:
    artifact = make(float_model(tmp_path / "model"), Recipe(method="nf4", **METHOD_DEFAULTS["nf4"]))
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    rewrite(artifact, {name: torch.zeros_like(safetensors.torch.load_file(artifact / "model.safetensors")[name])})
    with pytest.raises(QuantoolError, match=r"module 'model.layers.1.mlp.up_proj': tensor '.*__nf4': is not JSON"):
        load(artifact)


def test_packed_weights_without_a_config_are_named(tmp_path: Path) -> None:
    """Older GPTQ tools wrote quantize_config.json beside a config.json that says nothing."""
    artifact = make(float_model(tmp_path / "model"), Recipe(bits=4, group_size=32, format="gptq"))
    config = json.loads((artifact / "config.json").read_text())
    section = config.pop("quantization_config")
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantoolError, match=r"qweight' is a packed weight, but config.json has no quant") as caught:
        load(artifact)
    assert "quantize_config.json" in str(caught.value.hint)
    (artifact / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    load(artifact)
