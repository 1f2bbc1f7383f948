"""Configs of every architecture as metadata: what is said, what is refused, and that no setting is lost."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MemoryCheckpoint, in_memory, stored_config
from gguf_families import CASES, FIRST, LINEAR, LONGROPE, UNTIED, YARN, make, rope
from transformers import AutoConfig

from quantool.errors import QuantoolError
from quantool.io import TensorInfo
from quantool.io.gguf.architectures import ARCHITECTURES, find_architecture, find_family
from quantool.io.gguf.keys import metadata_of, settings_of
from quantool.io.gguf.row import Family
from quantool.io.gguf.tensors import targets
from quantool.model.views import as_linears

# Keys of a config that say nothing of the network, or only of its training.
IDLE = frozenset(
    {
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "id2label", "label2id"),
        *("problem_type", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "vocab_size",
            "use_cache",
            "is_decoder",
            "is_encoder_decoder",
        ),
        *("chunk_size_feed_forward", "pretraining_tp", "reorder_and_upcast_attn"),
        *("initializer_range", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout"),
        *("embedding_dropout", "hidden_dropout", "residual_dropout", "router_aux_loss_coef", "router_jitter_noise"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    }
)
# Keys that the tensors tell, and those that functions read and not the table.
ELSEWHERE = frozenset(
    {
        *("qk_layernorm", "qkv_bias", "tie_word_embeddings"),
        *("rope_parameters", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
        *("_sliding_window_pattern", "original_max_position_embeddings", "query_pre_attn_scalar"),
        *("no_rope_layers", "no_rope_layer_interval"),
    }
)


@pytest.mark.parametrize("name", CASES)
def test_every_key_of_the_config_is_accounted_for(name: str) -> None:
    """A setting that neither the table nor a list above knows would be lost in silence."""
    config = stored_config(make(name))
    architecture = find_architecture(config)
    known = {word for key in architecture.keys for word in (key.config, *key.aliases)}
    known |= {*architecture.fixed, *architecture.biased, *find_family(config).defaults}
    assert set(config) <= IDLE | ELSEWHERE | known | {architecture.partial}


@pytest.mark.parametrize("family", [f for row in ARCHITECTURES.values() for f in row.families], ids=lambda f: f.name)
def test_defaults_are_those_of_transformers(family: Family) -> None:
    found = AutoConfig.for_model(family.model_type).to_dict()
    rotary = found.get("rope_parameters") or {}
    rotary = rotary.get("full_attention", rotary)
    found |= {"rope_theta": rotary.get("rope_theta"), "partial_rotary_factor": rotary.get("partial_rotary_factor")}
    found |= {"rotary_pct": found["partial_rotary_factor"]}
    unused = {"sliding_window"} if found.get("use_sliding_window") is False else set()
    assert {key: found[key] for key in family.defaults.keys() - unused}.items() <= family.defaults.items()


JUNK = [None, -1, 0, 1, 2.5, "x", [], {}, [1], ["x"], True, 1e40, float("nan"), 1 << 70, {"a": 1}]


@pytest.mark.parametrize("name", FIRST.values())
def test_odd_values_in_a_config_are_no_traceback(name: str) -> None:
    stored = in_memory(make(name))
    infos = as_linears(stored).infos
    found = 0
    keys = [*(set(stored.config) - IDLE), "rope_scaling", "sliding_window_pattern", "rope_local_base_freq"]
    for key, value in itertools.product(keys, JUNK):
        config = {**stored.config, key: value}
        try:
            architecture = find_architecture(config)
            metadata_of(architecture, config, infos)
            targets(architecture, {}, config)
        except QuantoolError as error:
            found += "config.json" in str(error)
    assert found > 50


LOCAL = {"rope_type": "default", "rope_theta": 500.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama-llama-plain", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama-llama-plain", {"attention_bias": True}, "attention_bias"),
    ("llama-llama-plain", rope(rope_type="dynamic", rope_theta=1e4, factor=2.0), "dynamic"),
    ("llama-llama-plain", rope(**YARN, attention_factor=1.5), "attention_factor"),
    ("llama-llama-plain", rope(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5), "partial_rotary"),
    ("smollm3-smollm3-plain", {"no_rope_layers": [0, 1, 1, 1]}, "no_rope_layers"),
    ("gemma-gemma-plain", {"hidden_act": "silu"}, "hidden_act"),
    ("gemma-gemma-plain", {"attention_bias": True}, "attention_bias"),
    ("gemma-gemma-plain", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2-gemma2-plain", {"hidden_activation": "silu"}, "hidden_activation"),
    ("gemma2-gemma2-plain", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ("gemma2-gemma2-plain", {"final_logit_softcapping": None}, "final_logit_softcapping"),
    ("gemma2-gemma2-plain", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
    ("gemma2-gemma2-plain", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
    ("gemma2-gemma2-plain", {"layer_types": ["full_attention"]}, "layer_types"),
    ("gemma3-gemma3_text-plain", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3-gemma3_text-plain", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
    ("gemma3-gemma3_text-plain", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("gemma3-gemma3_text-plain", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3-gemma3_text-plain", rope(full_attention=YARN, sliding_attention=LOCAL), "yarn"),
    ("gemma3-gemma3_text-plain", rope(full_attention=LOCAL, sliding_attention=LINEAR), "sliding_attention"),
    ("phi3-phi3-plain", {"hidden_act": "gelu"}, "hidden_act"),
    ("phi3-phi3-plain", rope(**YARN), "yarn"),
    ("phi3-phi3-plain", rope(**{**LONGROPE, "long_factor": [1.0]}), "long_factor"),
    ("gpt2-gpt2-plain", {"activation_function": "relu"}, "activation_function"),
    ("gpt2-gpt2-plain", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2-gpt2-plain", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2-gpt2-plain", {"add_cross_attention": True}, "add_cross_attention"),
    ("gptneox-gpt_neox-parallel", {"hidden_act": "relu"}, "hidden_act"),
    ("gptneox-gpt_neox-parallel", {"attention_bias": False}, "attention_bias"),
    ("olmo-olmo-plain", {"attention_bias": True}, "attention_bias"),
    ("olmo-olmo-plain", {"hidden_act": "gelu"}, "hidden_act"),
    ("olmo2-olmo2-plain", {"attention_bias": True}, "attention_bias"),
    ("stablelm-stablelm-plain", {"hidden_act": "gelu"}, "hidden_act"),
    ("stablelm-stablelm-plain", {"use_qkv_bias": True}, "use_qkv_bias"),
    ("starcoder2-starcoder2-tied", {"use_bias": False}, "use_bias"),
    ("starcoder2-starcoder2-tied", {"hidden_act": "relu"}, "hidden_act"),
    ("starcoder2-starcoder2-tied", {"norm_type": "rms_norm"}, "norm_type"),
]


@pytest.mark.parametrize(("name", "changes", "word"), REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(name: str, changes: dict[str, Any], word: str) -> None:
    stored = in_memory(make(name))
    checkpoint = as_linears(MemoryCheckpoint({**stored.config, **changes}, stored.tensors))
    architecture = find_architecture(checkpoint.config)
    metadata_of(architecture, stored.config, checkpoint.infos)  # it is the change that is refused
    with pytest.raises(QuantoolError, match=word):
        metadata_of(architecture, checkpoint.config, checkpoint.infos)


OLD_WORDS: list[tuple[str, set[str], dict[str, Any]]] = [
    ("llama-llama-plain", {"rope_parameters"}, {"rope_theta": 5000.0}),
    ("llama-llama-linear", {"rope_parameters"}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("gemma2-gemma2-plain", {"layer_types", "rope_parameters"}, {"rope_theta": 5000.0}),
    (
        "gemma3-gemma3_text-linear",
        {"layer_types", "rope_parameters"},
        {
            "rope_theta": 10000.0,
            "rope_local_base_freq": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "sliding_window_pattern": 2,
        },
    ),
    (
        "phi3-phi3-short",
        {"rope_parameters"},
        {"rope_theta": 10000.0, "rope_scaling": {**LONGROPE, "type": "su", "rope_type": None}},
    ),
    ("gptneox-gpt_neox-parallel", {"rope_parameters"}, {}),
    ("gptneox-gpt_neox-tied-full-rotary", {"rope_parameters"}, {"rotary_pct": 1.0, "rotary_emb_base": 5000}),
    ("stablelm-stablelm-plain", {"rope_parameters"}, {}),
    ("stablelm-stablelm-tied", {"rope_parameters"}, {"partial_rotary_factor": 0.5, "rope_theta": 5000}),
]


@pytest.mark.parametrize(("name", "without", "words"), OLD_WORDS)
def test_configs_of_older_transformers_say_the_same(name: str, without: set[str], words: dict[str, Any]) -> None:
    stored = in_memory(make(name))
    infos = as_linears(stored).infos
    old = {**{key: value for key, value in stored.config.items() if key not in without}, **words}
    architecture = find_architecture(old)
    assert metadata_of(architecture, old, infos) == metadata_of(architecture, stored.config, infos)
    new, found = (
        architecture.generated(c, settings_of(architecture, c)) if architecture.generated else {}
        for c in (stored.config, old)
    )
    assert new.keys() == found.keys()
    assert all(torch.equal(new[key], found[key]) for key in new)


# What each says of the network, as far as it matters here; the tables of LongRoPE are not the real ones.
PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
SETTINGS = {
    "EleutherAI/pythia-70m": {"rope.dimension_count": 16, "use_parallel_residual": True},
    "google/gemma-3-1b-it": {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 512},
    "microsoft/Phi-4-mini-instruct": {
        "rope.dimension_count": 96,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.attn_factor": pytest.approx(1.1902380714238083),  # as transformers and the official converter
    },
    "mistralai/Mistral-7B-v0.1": {"context_length": 4096},
    "mistralai/Mistral-7B-v0.3": {"context_length": 32768},
    "openai-community/gpt2": {"feed_forward_length": 3072},
    "stabilityai/stablelm-2-1_6b": {"rope.dimension_count": 16, "attention.layer_norm_epsilon": 1e-5},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_released_models_are_accepted(name: str) -> None:
    config = PUBLISHED[name]
    architecture = find_architecture(config)
    shapes = {f"{architecture.outside['token_embd']}.weight": (config["vocab_size"], 8)}
    shapes |= {"model.layers.0.self_attn.q_proj.bias": (8,)} if config.get("use_qkv_bias") else {}
    infos = {tensor: TensorInfo(tensor, shape, "F16", 0, Path("m")) for tensor, shape in shapes.items()}
    metadata = metadata_of(architecture, config, infos)
    settings = SETTINGS.get(name, {})
    assert {key: metadata[f"{architecture.name}.{key}"] for key in settings} == settings


def test_a_head_of_its_own_has_no_place_in_gemma() -> None:
    checkpoint = as_linears(in_memory(make("gemma-gemma-plain", **UNTIED)))
    with pytest.raises(QuantoolError, match=r"lm_head\.weight"):
        targets(find_architecture(checkpoint.config), checkpoint.infos, checkpoint.config)


def test_the_largest_gemma_scales_its_scores_otherwise() -> None:
    """llama.cpp knows the 27B models by their depth: there the scalar is hidden_size / num_attention_heads."""
    for name, depth in (("gemma2-gemma2-plain", 46), ("gemma3-gemma3_text-plain", 62)):
        checkpoint = as_linears(in_memory(make(name)))
        config = {**checkpoint.config, "num_hidden_layers": depth, "layer_types": None, "query_pre_attn_scalar": 16}
        architecture = find_architecture(config)
        assert metadata_of(architecture, config, checkpoint.infos)[f"{architecture.name}.block_count"] == depth
        with pytest.raises(QuantoolError, match="query_pre_attn_scalar"):
            metadata_of(architecture, {**config, "query_pre_attn_scalar": 32}, checkpoint.infos)


@pytest.mark.parametrize(
    ("name", "context"),
    [("gemma2-gemma2-plain", 128), ("gemma3-gemma3_text-plain", 128), ("phi3-phi3-tied-partial", 64)],
)
def test_a_window_that_llama_cpp_does_not_apply_is_the_context(name: str, context: int) -> None:
    """Beyond the window transformers would look away, llama.cpp would not."""
    checkpoint = as_linears(in_memory(make(name)))
    architecture = find_architecture(checkpoint.config)
    metadata = metadata_of(architecture, checkpoint.config, checkpoint.infos)
    assert metadata[f"{architecture.name}.context_length"] == context
