from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, MemoryCheckpoint, in_memory, make_model
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError
from quantool.io import open_checkpoint
from quantool.io.gguf.architectures import ARCHITECTURES, find_architecture
from quantool.io.gguf.keys import metadata_of, notes
from quantool.io.gguf.tensors import targets
from quantool.model.views import as_linears

# The first list of architectures; tests of the second are in test_families_gguf.py.
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "smollm3": {"no_rope_layer_interval": 4},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {"num_key_value_heads": 4},
}
checkpoints: dict[str, MemoryCheckpoint] = {}


def tiny(family: str, **config: Any) -> MemoryCheckpoint:
    """A checkpoint of the family whose config.json, not whose tensors, is changed."""
    made = checkpoints.setdefault(family, in_memory(make_model(family, **MODELS[family])))
    return MemoryCheckpoint({**made.config, **config}, dict(made.tensors))


def metadata(checkpoint: MemoryCheckpoint) -> dict[str, Any]:
    return metadata_of(find_architecture(checkpoint.config), checkpoint.config, checkpoint.infos)


def refused(checkpoint: MemoryCheckpoint) -> str:
    """The message for a config that llama.cpp would not compute."""
    architecture = find_architecture(checkpoint.config)

    def convert() -> None:
        metadata_of(architecture, checkpoint.config, checkpoint.infos)
        targets(architecture, as_linears(checkpoint).infos, checkpoint.config)

    with pytest.raises(QuantoolError) as caught:
        convert()
    assert "\n" not in caught.value.message
    return caught.value.message


# --- writing


def test_every_key_of_a_llama() -> None:
    assert metadata(tiny("llama")) == {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 3,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 96,
    }


def test_the_keys_of_experts() -> None:
    found = metadata(tiny("qwen2_moe"))
    words = ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length")
    assert [found[f"qwen2moe.{word}"] for word in words] == [5, 2, 24, 40]
    found = metadata(tiny("mixtral"))
    assert [found[f"llama.{word}"] for word in words[:2]] == [4, 2]


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts(key: str) -> None:
    checkpoint = tiny("qwen3_moe")
    for name in ("num_experts", "num_local_experts"):
        checkpoint.config.pop(name, None)
    checkpoint.config[key] = 4
    assert metadata(checkpoint)["qwen3moe.expert_count"] == 4


OLD: dict[str, Any] = {"rope_parameters": None, "rope_theta": 5e5}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "old": (OLD, {"freq_base": 5e5}),
    "new": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"freq_base": 5e5}),
    "linear": (
        {**OLD, "rope_scaling": {"type": "linear", "factor": 4}},
        {"freq_base": 5e5, "scaling.type": "linear", "scaling.factor": 4.0},
    ),
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "beta_fast": 32, "truncate": True}},
        {"freq_base": 5e5, "scaling.type": "yarn", "scaling.factor": 2.0, "scaling.original_context_length": 64},
    ),
    "nothing said": ({"rope_parameters": None}, {"freq_base": 1e4}),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rotary_settings_old_and_new(case: str) -> None:
    config, expected = SCALINGS[case]
    found = metadata(tiny("llama", **config))
    rope = {key.removeprefix("llama.rope."): value for key, value in found.items() if ".rope." in key}
    assert rope == {**expected, "dimension_count": 8}


def test_a_config_without_a_class_is_known_by_its_model_type() -> None:
    for config in ({"model_type": "qwen3_moe"}, {"model_type": "qwen3_moe", "architectures": None}):
        assert find_architecture(config).name == "qwen3moe"


WINDOWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "none": ("mistral", {"sliding_window": None}, 64),
    "shorter": ("mistral", {"sliding_window": 16}, 16),
    "longer": ("mistral", {"sliding_window": 4096}, 64),
    "off": ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "layer_types": None}, 64),
    "nowhere": ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, 64),
    "late": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": None, "max_window_layers": 2},
        64,
    ),
    "second": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": None, "max_window_layers": 1},
        16,
    ),
    "some": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        16,
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_context_ends_with_a_window_that_llama_cpp_has_not(case: str) -> None:
    family, config, expected = WINDOWS[case]
    checkpoint = tiny(family, **config)
    row = find_architecture(checkpoint.config)
    assert metadata(checkpoint)[f"{row.name}.context_length"] == expected
    words = f"context_length is the window, {expected} instead of 64 tokens"
    assert [words in note for note in notes(row, checkpoint.config)] == ([True] if expected < 64 else [])


def test_gelu_that_is_not_quite_the_same_is_told() -> None:
    for activation, told in (("gelu", True), ("gelu_new", False)):
        checkpoint = in_memory(make_model("gpt_neox", hidden_act=activation))
        found = notes(find_architecture(checkpoint.config), checkpoint.config)
        assert any("tanh" in note for note in found) is told


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', llama.cpp computes 'silu' for llama"),
    "bias said": ("llama", {"attention_bias": True}, "'attention_bias' is True, but there are no such tensors"),
    "bias of qwen3": ("qwen3", {"attention_bias": True}, "'attention_bias' is True, llama.cpp computes False"),
    "bias of smollm3": ("smollm3", {"mlp_bias": True}, "'mlp_bias' is True, llama.cpp computes False"),
    "no rope": ("smollm3", {"no_rope_layers": [0, 1, 1]}, "no_rope_layers is [0, 1, 1], llama.cpp leaves out"),
    "no rope interval": (
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 2},
        "no_rope_layers is [1, 0, 1]",
    ),
    "gating on": ("qwen2_moe", {"norm_topk_prob": True}, "'norm_topk_prob' is True, llama.cpp computes False"),
    "gating off": ("qwen3_moe", {"norm_topk_prob": False}, "'norm_topk_prob' is False, llama.cpp computes True"),
    "gating of olmoe": ("olmoe", {"norm_topk_prob": True}, "'norm_topk_prob' is True, llama.cpp computes False"),
    "clip": ("olmoe", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0, llama.cpp computes None"),
    "dense blocks": ("qwen3_moe", {"mlp_only_layers": [1]}, "'mlp_only_layers' is [1], llama.cpp computes []"),
    "sparse step": ("qwen2_moe", {"decoder_sparse_step": 2}, "'decoder_sparse_step' is 2, llama.cpp computes 1"),
    "dynamic": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2}, "rope_parameters": None},
        "rope type 'dynamic' is not known to llama, expected default, linear, llama3, yarn",
    ),
    "llama3": (
        "qwen2",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        "'llama3' is not known to qwen2",
    ),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "attention_factor": 1.5}},
        "rope scaling 'yarn' with ['attention_factor'] is not supported",
    ),
    "beta": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "beta_fast": 16}},
        "rope scaling 'yarn' with ['beta_fast'] is not supported",
    ),
    "llama3 lacks": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2}},
        "rope scaling 'llama3' lacks high_freq_factor, low_freq_factor",
    ),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, llama rotates whole heads"),
    "head": ("qwen2", {"head_dim": 16}, "head_dim is 16, qwen2 has 32 / 4 in llama.cpp"),
    "missing": ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
    "theta": ("mixtral", {"rope_parameters": {"rope_theta": "x"}}, "'rope_theta' is 'x', expected a number above 0"),
    "kind": ("llama", {"num_hidden_layers": "3"}, "'num_hidden_layers' is '3', expected int"),
    "fraction": ("llama", {"num_hidden_layers": 2.5}, "'num_hidden_layers' is 2.5, expected int"),
    "infinite": ("llama", {"rms_norm_eps": float("inf")}, "'rms_norm_eps' is inf, expected float"),
    "deep": ("llama", {"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, llama.cpp has at most 512"),
    "experts": ("qwen3_moe", {"num_local_experts": 2000}, "is 2000, llama.cpp has at most 1024"),
    "experts used": ("olmoe", {"num_experts_per_tok": 5}, "5 of 4 experts are used"),
    "no experts used": ("mixtral", {"num_experts_per_tok": 0}, "0 of 4 experts are used"),
    "heads of olmoe": ("olmoe", {"num_key_value_heads": 2}, "'num_key_value_heads' is 2, llama.cpp has 4 as of q"),
    "heads": ("llama", {"num_key_value_heads": 3}, "4 heads do not divide by 3 key-value heads"),
    "per block": ("llama", {"num_key_value_heads": [2, 2, 2]}, "'num_key_value_heads' is [2, 2, 2], expected int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(case: str) -> None:
    family, config, words = REFUSED[case]
    metadata(tiny(family))
    assert words in refused(tiny(family, **config))


def test_a_window_of_unknown_length() -> None:
    checkpoint = tiny("qwen2", use_sliding_window=True)
    metadata(checkpoint)
    del checkpoint.config["sliding_window"]
    assert "'use_sliding_window' is true, but 'sliding_window' is missing" in refused(checkpoint)


def test_a_bias_that_the_config_denies() -> None:
    checkpoint = in_memory(make_model("llama", attention_bias=True))
    metadata(checkpoint)
    checkpoint.config["attention_bias"] = False
    assert "'attention_bias' is False, but there are such tensors" in refused(checkpoint)


ROPE_KEYS = st.sampled_from(["rope_type", "type", "factor", "rope_theta"])
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(ROPE_KEYS, st.integers() | st.text(max_size=4), max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(family=st.sampled_from(sorted(MODELS)), data=st.data())
def test_junk_in_a_config_is_one_line(family: str, data: st.DataObject) -> None:
    keys = sorted({*tiny(family).config, "rope_theta", "rope_scaling"} - {"architectures", "model_type"})
    checkpoint = tiny(family, **data.draw(st.dictionaries(st.sampled_from(keys), JUNK, min_size=1, max_size=3)))
    row = find_architecture(checkpoint.config)
    try:
        values = metadata_of(row, checkpoint.config, checkpoint.infos)
        targets(row, as_linears(checkpoint).infos, checkpoint.config)
        notes(row, checkpoint.config)
    except QuantoolError as error:
        assert "\n" not in error.message  # noqa: PT017 - both outcomes are right, a traceback is not
    else:
        assert all(isinstance(value, str | bool | int | float) for value in values.values())


# --- reading


def read_with(path: Path, family: str = "llama", **values: Any) -> Any:
    """The config of a file to whose metadata `values` are added, by suffix."""
    checkpoint = tiny(family)
    name = find_architecture(checkpoint.config).name
    write_gguf(path / "m.gguf", checkpoint, **{f"{name}.{key}": value for key, value in values.items()})
    return open_checkpoint(path / "m.gguf").config


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.finetuned": True}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
            {"rope_type": "yarn", "factor": 2.0},
        ),
    ],
)  # fmt: skip
def test_scalings_as_llama_cpp_reads_them(tmp_path: Path, values: dict[str, Any], scaling: Any) -> None:
    assert read_with(tmp_path, **values).get("rope_scaling") == scaling


def test_what_llama_cpp_takes_where_a_key_is_missing(tmp_path: Path) -> None:
    missing = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size")
    config = read_with(tmp_path, **dict.fromkeys(missing))
    assert (config["head_dim"], config["rope_theta"], config["vocab_size"]) == (8, 10000.0, 96)


def test_an_array_of_one_number_is_the_number(tmp_path: Path) -> None:
    assert read_with(tmp_path, **{"attention.head_count_kv": [2, 2, 2]})["num_key_value_heads"] == 2


DENIED: dict[str, tuple[str, dict[str, Any], str]] = {
    "scale": ("llama", {"attention.scale": 0.5}, "llama.attention.scale is 0.5, which is not supported"),
    "logit scale": ("llama", {"logit_scale": 2.0}, "llama.logit_scale is 2.0"),
    "window": ("llama", {"attention.sliding_window": 8}, "llama.attention.sliding_window is 8"),
    "array": ("llama", {"attention.sliding_window_pattern": [True, False]}, "sliding_window_pattern is an array"),
    "not causal": ("llama", {"attention.causal": False}, "llama.attention.causal is False"),
    "per block": ("llama", {"attention.head_count_kv": [2, 1, 2]}, "head_count_kv differs from block to block"),
    "heads": ("llama", {"attention.head_count_kv": 3}, "4 heads do not divide by 3 key-value heads"),
    "value": ("llama", {"attention.value_length": 4}, "llama.attention.value_length is 4, expected 8"),
    "key": ("qwen2", {"attention.key_length": 4}, "qwen2.attention.key_length is 4, expected 32 / 4"),
    "rotary": ("qwen3", {"rope.dimension_count": 4}, "rotary dimension 4 of heads of 8"),
    "longrope": ("llama", {"rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope', expected one of"),
    "no factor": (
        "llama",
        {"rope.scaling.type": "linear"},
        "llama.rope.scaling.factor is 0.0, expected a number above",
    ),
    "attention factor": ("llama", {"rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor is 2.0"),
    "blocks": ("llama", {"block_count": 2}, "2 blocks of width 32 are announced, 3 of width 32 are stored"),
    "missing": ("llama", {"block_count": None}, "llama.block_count is missing"),
    "text": ("llama", {"block_count": "3"}, "llama.block_count is '3', expected a number"),
    "experts": (
        "qwen3_moe",
        {"expert_count": 3},
        "qwen3moe.expert_count is 3, 'blk.0.ffn_gate_exps.weight' is a stack of 4",
    ),
    "no experts": (
        "mixtral",
        {"expert_count": None},
        "llama.expert_count is 0, 'blk.0.ffn_gate_exps.weight' is a stack of 4",
    ),
    "experts used": ("mixtral", {"expert_used_count": 5}, "5 of 4 experts are used"),
    "experts of none": (
        "llama",
        {"expert_count": 8},
        "llama.expert_count is 8, 'blk.0.ffn_gate_exps.weight' is a stack of 0",
    ),
    "shared": ("mixtral", {"expert_shared_feed_forward_length": 8}, "llama.expert_shared_feed_forward_length is 8"),
    "gating": ("qwen2_moe", {"expert_weights_norm": True}, "qwen2moe.expert_weights_norm is True"),
}


@pytest.mark.parametrize("case", DENIED)
def test_metadata_that_a_config_cannot_say_is_refused(tmp_path: Path, case: str) -> None:
    family, values, words = DENIED[case]
    with pytest.raises(QuantoolError) as caught:
        read_with(tmp_path, family, **values)
    assert words in caught.value.message
    assert str(tmp_path / "m.gguf") in caught.value.message


@pytest.mark.parametrize("value", [False, np.uint32(0), 0.0, "", np.float32(0)])
def test_metadata_that_says_nothing_is_no_matter(tmp_path: Path, value: Any) -> None:
    assert read_with(tmp_path, **{"attention.scale": value}) == read_with(tmp_path)


def test_every_architecture_of_the_first_list_is_here() -> None:
    names = {find_architecture(tiny(family).config).name for family in MODELS}
    assert names == set(list(ARCHITECTURES)[:7])
    assert set(MODELS) <= set(FAMILIES)
