"""The network on the meta device: its parts, the names of its tensors in a checkpoint, and configs that are none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    MIXTURES,
    MemoryCheckpoint,
    fused_in_memory,
    in_memory,
    make_model,
    multi_modal,
    save,
    tokens,
)
from torch import nn

from quantool.errors import QuantoolError, UsageError
from quantool.io import open_checkpoint
from quantool.model.skeleton import (
    attach,
    build_model,
    load_tokenizer,
    materialise,
    open_network,
    release,
    resolve_device,
    resolve_dtype,
    stored_names,
    tensors_of,
)

MISSING_HINT = "the checkpoint is incomplete, or of a family whose tensors have other names"


def refused(config: dict[str, Any], capfd: pytest.CaptureFixture[str], **tensors: torch.Tensor) -> str:
    """The message of the error, which is one line that fits a screen, comes with a hint, and comes soon."""
    names = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(1, 1) for i in range(3)}
    with pytest.raises(QuantoolError) as caught:
        open_network(MemoryCheckpoint(config, {**names, **tensors}))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.hint
    assert "run the custom code" not in "".join(capfd.readouterr())
    return caught.value.message


def llama_config(**changes: Any) -> dict[str, Any]:
    return {**in_memory(make_model("llama")).config, **changes}


def read_all(checkpoint: Any) -> Any:
    """The network of a checkpoint with all its tensors."""
    network = open_network(checkpoint)
    names = network.names
    materialise(network, list(names))
    return network.model


def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=tokens(1, 9)).logits
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family_are_found(family: str) -> None:
    model = make_model(family)
    network = open_network(in_memory(model))
    count = model.config.num_hidden_layers
    assert network.block_names == tuple(f"{BLOCKS.get(family, 'model.layers')}.{i}" for i in range(count))
    assert len(network.blocks) == count
    assert not any(name.startswith(network.block_names) for name in network.outside())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_and_computed_buffers_are_in_place(family: str) -> None:
    model = make_model(family)
    network = open_network(in_memory(model))
    assert all(parameter.is_meta for parameter in network.model.parameters())
    assert not network.model.training
    wanted = dict(model.named_buffers())
    for name, buffer in network.model.named_buffers():
        if name not in network.names:
            assert torch.equal(buffer, wanted[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_saved_checkpoint_has_its_name(family: str, tmp_path: Path) -> None:
    """Each is read from where it was saved: the network computes what the model does, with the same tensors."""
    model = make_model(family)
    checkpoint = open_checkpoint(save(model, tmp_path))
    network = open_network(checkpoint)
    names = network.names
    assert set(names) == {name for name, _ in tensors_of(network.model)}
    assert sorted(names.values()) == sorted(checkpoint.infos)
    materialise(network, list(names))
    assert not any(tensor.is_meta for _, tensor in tensors_of(network.model))
    wanted = dict(tensors_of(model))
    found = dict(tensors_of(network.model))
    same = [name for name in found if name in wanted]  # all but experts, which are fused there
    assert len(same) == len(wanted) if family not in MIXTURES else len(same) > 10
    for name in same:
        transposed = family == "gpt2" and ".c_" in name and name.endswith(".weight")
        assert torch.equal(found[name], wanted[name].T if transposed else wanted[name]), name
    torch.testing.assert_close(logits(network.model), logits(model), rtol=0, atol=1e-5)
    assert logits(model).abs().max() > 1


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_may_be_stored_fused(family: str) -> None:
    """As the model holds them; mixtral's renaming of its blocks applies to them too."""
    model = make_model(family)
    checkpoint = fused_in_memory(model)
    fused = [name for name in checkpoint.tensors if name.endswith("experts.gate_up_proj")]
    assert fused
    assert torch.equal(logits(read_all(checkpoint)), logits(read_all(in_memory(model))))
    if family == "mixtral":
        renamed = {name.replace(".mlp.", ".block_sparse_moe."): t for name, t in checkpoint.tensors.items()}
        renamed_checkpoint = MemoryCheckpoint(checkpoint.config, renamed)
        assert torch.equal(logits(read_all(renamed_checkpoint)), logits(read_all(checkpoint)))


def test_every_projection_of_every_expert_has_the_name_that_the_family_stores() -> None:
    names = open_network(in_memory(make_model("mixtral"))).names
    stored = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for module, short in stored.items():
        found = names[f"model.layers.1.mlp.experts.2.{module}.weight"]
        assert found == f"model.layers.1.block_sparse_moe.experts.2.{short}.weight"
    assert names["model.layers.1.mlp.gate.weight"] == "model.layers.1.block_sparse_moe.gate.weight"


def test_packed_tensors_have_the_names_of_their_weights() -> None:
    """A quantized artifact stores w1.qweight, or w1.weight_packed, where the family stores w1.weight."""
    checkpoint = in_memory(make_model("mixtral"))
    model = build_model(checkpoint)
    owner = "model.layers.1.block_sparse_moe.experts.2"
    stored = [f"{owner}.w1.qweight", f"{owner}.w3.scales", f"{owner}.w2.weight", "lm_head.qweight", "model.norm.weight"]
    experts = "model.layers.1.mlp.experts.2"
    wanted = [f"{experts}.gate_proj.qweight", f"{experts}.up_proj.scales", f"{experts}.down_proj.weight", *stored[3:]]
    assert stored_names(model, [*wanted, f"{experts}.up_proj.weight"], stored) == dict(zip(wanted, stored, strict=True))


def test_one_missing_expert_is_named() -> None:
    checkpoint = in_memory(make_model("mixtral"))
    del checkpoint.tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(QuantoolError) as caught:
        open_network(checkpoint)
    tensor = "'model.layers.1.mlp.experts.2.up_proj.weight' [48, 32]"
    assert caught.value.message == f"memory: tensor {tensor} of MixtralForCausalLM is missing"


def test_a_network_may_need_less_than_is_stored(tmp_path: Path) -> None:
    """Prediction heads past the last block, and blocks of other kinds, are nobody's tensors."""
    model = make_model("llama")
    checkpoint = in_memory(model)
    layer = {n: t for n, t in checkpoint.tensors.items() if n.startswith("model.layers.2.")}
    further = {n.replace(".2.", ".3."): t + 1 for n, t in layer.items()}
    further |= {n.replace("model.layers.2.", "mtp.layers.0."): t + 2 for n, t in layer.items()}
    further["mtp.embed_tokens.weight"] = torch.zeros(96, 32)
    found = MemoryCheckpoint(checkpoint.config, {**further, **checkpoint.tensors})
    network = open_network(found)
    assert not set(network.names.values()) & set(further)
    assert network.block_names == tuple(f"model.layers.{i}" for i in range(3))
    assert torch.equal(logits(read_all(found)), logits(model))


def test_a_multi_modal_model_is_its_decoder(tmp_path: Path) -> None:
    model = multi_modal()
    checkpoint = open_checkpoint(save(model, tmp_path))
    network = open_network(checkpoint)
    assert network.block_names == ("model.language_model.layers.0", "model.language_model.layers.1")
    assert sorted(network.outside()) == ["model.language_model.embed_tokens.weight", "model.language_model.norm.weight"]
    assert set(network.names.values()) == set(checkpoint.infos)
    assert torch.equal(logits(read_all(checkpoint)), logits(model))


@pytest.mark.parametrize("tie", [True, False])
def test_tied_parameters_are_known_by_their_places(tie: bool) -> None:
    network = open_network(in_memory(make_model("llama", tie_word_embeddings=tie)))
    head, embeddings = network.model.lm_head, network.model.model.embed_tokens
    wanted = {"model.embed_tokens.weight": ((embeddings, "weight"), (head, "weight"))} if tie else {}
    assert network.tied == wanted


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model.")])
def test_a_checkpoint_saved_from_the_base_model_lacks_its_prefix(family: str, prefix: str) -> None:
    model = make_model(family, tie_word_embeddings=True)
    checkpoint = in_memory(model)
    checkpoint.tensors = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items()}
    assert not any(name.startswith(prefix) for name in checkpoint.tensors)
    assert torch.equal(logits(read_all(checkpoint)), logits(model))


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox"])
@pytest.mark.parametrize("stored", ["embeddings", "head", "both"])
def test_of_two_tied_matrices_either_may_be_stored(family: str, stored: str) -> None:
    model = make_model(family, tie_word_embeddings=True)
    checkpoint = in_memory(model)
    embeddings = next(n for n, m in model.named_modules() if m is model.get_input_embeddings()) + ".weight"
    if stored != "embeddings":
        checkpoint.tensors["lm_head.weight"] = checkpoint.tensors[embeddings]
    if stored == "head":
        del checkpoint.tensors[embeddings]
    network = open_network(checkpoint)
    names = network.names
    assert names[embeddings] == ("lm_head.weight" if stored == "head" else embeddings)
    assert "lm_head.weight" not in names  # one tensor of the network, read once
    materialise(network, list(names))
    assert network.model.lm_head.weight is network.model.get_input_embeddings().weight
    assert torch.equal(logits(network.model), logits(model))
    release(network, list(names))
    assert network.model.lm_head.weight.is_meta
    assert network.model.lm_head.weight is network.model.get_input_embeddings().weight


def test_untied_matrices_are_read_each_from_its_own(tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    found = read_all(open_checkpoint(save(model, tmp_path)))
    assert not torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)
    assert torch.equal(logits(found), logits(model))


def test_an_older_name_of_the_head(tmp_path: Path) -> None:
    """Every Pythia stores embed_out.weight, which transformers 5 calls lm_head; save_pretrained still writes it so."""
    model = make_model("gpt_neox")
    checkpoint = open_checkpoint(save(model, tmp_path))
    assert "embed_out.weight" in checkpoint.infos
    assert torch.equal(logits(read_all(checkpoint)), logits(model))


def test_a_real_checkpoint_that_stores_only_the_head(shared: Path) -> None:
    checkpoint = open_checkpoint(shared / "models/tinystories-656k")
    names = open_network(checkpoint).names
    assert names["model.embed_tokens.weight"] == "lm_head.weight"


def test_a_missing_tensor_is_named_with_its_shape() -> None:
    checkpoint = in_memory(make_model("llama"))
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(QuantoolError) as caught:
        open_network(checkpoint)
    expected = "memory: tensor 'model.layers.1.mlp.up_proj.weight' [48, 32] of LlamaForCausalLM is missing"
    assert caught.value.message == expected
    assert caught.value.hint == MISSING_HINT


def test_an_untied_head_is_not_taken_from_the_embeddings() -> None:
    checkpoint = in_memory(make_model("llama", tie_word_embeddings=False))
    del checkpoint.tensors["lm_head.weight"]
    with pytest.raises(QuantoolError, match=r"tensor 'lm_head.weight' \[96, 32\] of LlamaForCausalLM is missing"):
        open_network(checkpoint)


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_wrong_shape_is_named_with_both_shapes(name: str) -> None:
    checkpoint = in_memory(make_model("llama"))
    shape = list(checkpoint.tensors[name].shape)
    checkpoint.tensors[name] = torch.zeros(shape[0], *shape[1:], 1)
    with pytest.raises(QuantoolError) as caught:
        open_network(checkpoint)
    assert caught.value.message == f"memory: tensor '{name}': shape {[*shape, 1]}, config.json expects {shape}"
    assert caught.value.hint == "config.json and the weights are of different models"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "no 'model_type'"),
        ({"model_type": 3}, "no 'model_type'"),
        ({"model_type": "nosuch"}, "model_type 'nosuch'"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "CLIPModel"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5Config"),
        ({"model_type": "llama", "architectures": 7}, "architectures 7"),
        (llama_config(hidden_size="abc"), "expected int, got str"),
        (llama_config(num_attention_heads=5), "multiple of the number of attention heads"),
        (llama_config(num_attention_heads=0), "zero"),
        (llama_config(hidden_act="nosuch"), "nosuch"),
        (llama_config(rope_parameters={"rope_type": "nosuch"}), "nosuch"),
        (llama_config(rope_scaling={"type": "yarn"}, rope_parameters=None), "factor"),
        (llama_config(num_hidden_layers=10**7), "num_hidden_layers is 10000000, the checkpoint holds 3 blocks"),
        (llama_config(num_hidden_layers=0), "num_hidden_layers is 0"),
        ({"model_type": "gpt2", "n_layer": 3000}, "3000"),
    ],
)
def test_what_is_no_decoder_is_one_line(
    config: dict[str, Any], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(config, capfd)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_code_that_a_checkpoint_brings_is_never_run(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model = make_model("llama")
    config = {"model_type": "t5", "architectures": ["EvilForCausalLM"]} if family == "t5" else llama_config()
    config["auto_map"] = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    if family == "t5":
        refused(config, capfd)
    else:
        found = read_all(MemoryCheckpoint(config, in_memory(model).tensors, tmp_path))
        assert torch.equal(logits(found), logits(model))
    assert not (tmp_path / "ran").exists()


def test_the_config_is_left_as_it_was() -> None:
    checkpoint = in_memory(make_model("gemma3_text"))
    before = repr(checkpoint.config)
    open_network(checkpoint)
    assert repr(checkpoint.config) == before


def test_parameters_are_cast_to_the_asked_dtype_and_buffers_are_not() -> None:
    checkpoint = in_memory(make_model("llama"))
    network = open_network(checkpoint, dtype="bfloat16")
    names = network.names
    materialise(network, list(names))
    assert {parameter.dtype for parameter in network.model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in network.model.buffers()} == {torch.float32}


def test_auto_dtype_is_float32_on_a_cpu_and_the_checkpoints_own_elsewhere() -> None:
    checkpoint = in_memory(make_model("llama").to(torch.bfloat16))
    assert resolve_dtype("auto", torch.device("cpu"), checkpoint) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda"), checkpoint) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu"), checkpoint) == torch.float16
    with pytest.raises(UsageError, match="dtype 'float99' is unknown, expected auto, float32, float16, bfloat16"):
        resolve_dtype("float99", torch.device("cpu"), checkpoint)


@pytest.mark.parametrize("device", ["nosuch", "cuda:99", ""])
def test_a_device_that_is_not_there_is_one_line(device: str) -> None:
    with pytest.raises(UsageError, match=f"device '{device}' cannot be used") as caught:
        resolve_device(device)
    assert "\n" not in caught.value.message
    assert caught.value.hint == "use --device cpu"


def test_buffers_that_a_checkpoint_stores_are_read_and_released() -> None:
    """No family of ours has one, a packed linear has: an integer buffer is copied and keeps its dtype."""
    name = "model.layers.0.mlp.packed"
    checkpoint = in_memory(make_model("llama"))
    checkpoint = MemoryCheckpoint(
        checkpoint.config, {**checkpoint.tensors, name: torch.tensor([1, -2, 3], dtype=torch.int32)}
    )
    model = build_model(checkpoint)
    owner: nn.Module = model.model.layers[0].mlp
    owner.register_buffer("packed", torch.empty(3, dtype=torch.int32, device="meta"))
    network = attach(model, checkpoint)
    assert name in {tensor for tensor, _ in tensors_of(network.model)}
    materialise(network, [name])
    assert owner.packed.tolist() == [1, -2, 3]
    owner.packed.zero_()
    assert checkpoint.tensors[name].tolist() == [1, -2, 3]
    release(network, [name])
    assert owner.packed.is_meta


def test_a_checkpoint_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(make_model("llama"), tmp_path))
    with pytest.raises(QuantoolError, match="no usable tokenizer") as caught:
        load_tokenizer(checkpoint)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500
    assert "tokenizer.json" in str(caught.value.hint)
