"""Artifacts as runnable modules: against dequantize-and-matmul by hand, transformers, and other tools' logits."""

import json
from functools import cache
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
from quantool.kernels.ops import packed_words
from quantool.methods.rtn import quantize_weight
from quantool.model.blocks import embed, open_head, stream_blocks
from quantool.recipe import Override, Recipe
from quantool.runtime import QuantLinear, load, open_model
from quantool.scheme import QuantScheme
from quantool.stages import quantize

WINDOWS = tokens(2, 24)
PEERS = (
    "ar-auto_awq",
    "ct-mixed-w4-w8",
    "ct-w3a16-sym-g64",
    "ct-w4a16-asym-g64-gptq",
    "ct-w4a16-sym-g128",
    "ct-w8a16-channel",
    "ct-w8a8-smoothquant",
    "ct-w8a8-static",
)


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
        q = format_.unpack(parts, scheme)
        zeros = torch.full(q.scales.shape, scheme.zero, dtype=torch.uint8) if q.zeros is None else q.zeros
        width = q.codes.shape[1] // q.scales.shape[1]
        steps = q.codes.double() - zeros.double().repeat_interleave(width, 1)
        state[f"{module}.weight"] = steps * q.scales.double().repeat_interleave(width, 1)
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
        overrides=(Override("mlp.down_proj", bits=8, group_size=-1), Override("v_proj", ignore=True)),
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.method}-{r.format}-{r.bits}-{r.group_size}-{r.sym}")
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


@pytest.mark.parametrize("recipe", [RECIPES[1], RECIPES[6]], ids=["compressed-tensors", "awq"])
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
    q = quantize_weight(weight, schemes["model.embed_tokens"], lambda scales: scales.to(torch.bfloat16), mse=False)
    packed = {f"model.embed_tokens.{suffix}": tensor for suffix, tensor in format_.pack(q).items()}
    rewrite(artifact, packed, "model.embed_tokens.weight")
    with pytest.raises(QuantoolError, match=r"'model.embed_tokens' is quantized, but Embedding is no linear"):
        load(artifact)


@cache
def golden(shared: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(shared / "golden/peer-logits.safetensors")


@pytest.mark.parametrize("peer", PEERS)
def test_artifacts_of_other_tools(peer: str, shared: Path) -> None:
    """Logits by each tool's own library. Dynamic 8-bit activations flip at ties, which differ between machines."""
    tensors = golden(shared)
    found = logits(load(shared / "peers" / peer), tensors["input_ids"])
    tolerance = 2e-3 if peer == "ct-w8a8-smoothquant" else 1e-3
    assert relative(found, tensors[peer]) < tolerance


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.startswith("ct-")])
def test_artifacts_of_other_tools_as_their_library_computes_them_here(peer: str, shared: Path) -> None:
    ids = golden(shared)["input_ids"]
    config = transformers.AutoConfig.from_pretrained(shared / "peers" / peer)
    if "asym" in peer:  # transformers 5.23 expects unpacked zero points unless it dequantizes
        config.quantization_config["dequantize"] = True
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        shared / "peers" / peer, config=config, dtype=torch.float32
    )
    assert relative(logits(load(shared / "peers" / peer), ids), logits(wanted, ids)) < 1e-5


def test_the_float_model_of_the_golden_logits(shared: Path) -> None:
    tensors = golden(shared)
    found = logits(load(shared / "models/tinystories-656k"), tensors["input_ids"])
    assert relative(found, tensors["tinystories-656k"]) < 1e-4
