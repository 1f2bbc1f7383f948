"""The table: every architecture that is written as GGUF and read from it, one row each (row.py says what a row says).

Facts: src/models/*.cpp and conversion/*.py of llama.cpp, configuration_*.py of transformers 5.23.
"""

from collections.abc import Mapping
from typing import Any

from quantool.errors import QuantoolError
from quantool.io.gguf import hooks
from quantool.io.gguf.families import FAMILY_ROWS
from quantool.io.gguf.file import short
from quantool.io.gguf.row import (
    ALL_SPARSE,
    ATTENTION,
    COMMON,
    EXPERT_COUNTS,
    EXPERTS,
    FFN_NORM,
    GATED,
    HEAD_DIM,
    OUTSIDE,
    PAIRS,
    QK_NORM,
    QKV,
    RMS,
    ROPE,
    SILU,
    STACKS,
    Architecture,
    Family,
    Key,
)

MISTRAL = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "sliding_window": 4096}
QWEN = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "use_sliding_window": False}
SMOLLM3 = {"rope_theta": 2e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}

ROWS = (
    Architecture(
        name="llama",
        families=(
            Family("LlamaForCausalLM", "llama", {"rope_theta": 10000.0, "rms_norm_eps": 1e-6}),
            Family("MistralForCausalLM", "mistral", MISTRAL),
            Family("MixtralForCausalLM", "mixtral", {"rope_theta": 1e6, "rms_norm_eps": 1e-5}),
        ),
        keys=(
            *COMMON,
            *HEAD_DIM,
            *RMS,
            *ROPE,
            Key("expert_count", "num_local_experts", optional=True),
            Key("expert_used_count", "num_experts_per_tok", optional=True),
        ),
        outside=OUTSIDE,
        block={**ATTENTION, **FFN_NORM, **GATED, "ffn_gate_inp": "block_sparse_moe.gate"},
        stacks={
            "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
            "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
            "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        },
        counts=EXPERT_COUNTS,
        optional=frozenset({*GATED, "ffn_gate_inp", *STACKS}),
        biases=frozenset({*QKV, "attn_output", *GATED}),
        biased={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
        orders=PAIRS,
        fixed={"hidden_act": SILU},
        rope=frozenset({"linear", "yarn", "llama3"}),
        read_config=hooks.read_llama,
        generated=hooks.llama3_factors,
        generated_names=frozenset({"rope_freqs.weight"}),
    ),
    Architecture(
        name="smollm3",
        families=(Family("SmolLM3ForCausalLM", "smollm3", SMOLLM3),),
        keys=(*COMMON, *HEAD_DIM, *RMS, *ROPE),
        outside=OUTSIDE,
        block={**ATTENTION, **FFN_NORM, **GATED},
        biases=QKV,
        orders=PAIRS,
        fixed={"hidden_act": SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        write_keys=hooks.nope_every_fourth,
    ),
    Architecture(
        name="qwen2",
        families=(Family("Qwen2ForCausalLM", "qwen2", QWEN),),
        keys=(*COMMON, *RMS, *ROPE),
        outside=OUTSIDE,
        block={**ATTENTION, **FFN_NORM, **GATED},
        biases=QKV,
        fixed={"hidden_act": SILU},
    ),
    Architecture(
        name="qwen3",
        families=(Family("Qwen3ForCausalLM", "qwen3", QWEN | {"head_dim": 128}),),
        keys=(*COMMON, *HEAD_DIM, *RMS, *ROPE),
        outside=OUTSIDE,
        block={**ATTENTION, **QK_NORM, **FFN_NORM, **GATED},
        fixed={"hidden_act": SILU, "attention_bias": (False,)},
    ),
    Architecture(
        name="qwen2moe",
        families=(Family("Qwen2MoeForCausalLM", "qwen2_moe", QWEN),),
        keys=(
            *COMMON,
            *RMS,
            *ROPE,
            *EXPERTS,
            Key("expert_feed_forward_length", "moe_intermediate_size"),
            Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
        outside=OUTSIDE,
        block={
            **ATTENTION,
            **FFN_NORM,
            "ffn_gate_inp": "mlp.gate",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        stacks=STACKS,
        counts=EXPERT_COUNTS,
        biases=QKV,
        vectors=frozenset({"ffn_gate_inp_shexp"}),
        fixed={"hidden_act": SILU, "norm_topk_prob": (False,), **ALL_SPARSE},
        head_required=True,
    ),
    Architecture(
        name="qwen3moe",
        families=(Family("Qwen3MoeForCausalLM", "qwen3_moe", QWEN | {"norm_topk_prob": False}),),
        keys=(
            *COMMON,
            *HEAD_DIM,
            *RMS,
            *ROPE,
            *EXPERTS,
            Key("expert_feed_forward_length", "moe_intermediate_size"),
        ),
        outside=OUTSIDE,
        block={**ATTENTION, **QK_NORM, **FFN_NORM, "ffn_gate_inp": "mlp.gate"},
        stacks=STACKS,
        counts=EXPERT_COUNTS,
        fixed={"hidden_act": SILU, "attention_bias": (False,), "norm_topk_prob": (True,), **ALL_SPARSE},
    ),
    Architecture(
        name="olmoe",
        families=(Family("OlmoeForCausalLM", "olmoe", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}),),
        keys=(*COMMON, *RMS, *ROPE, *EXPERTS),
        outside=OUTSIDE,
        block={**ATTENTION, **QK_NORM, **FFN_NORM, "ffn_gate_inp": "mlp.gate"},
        stacks=STACKS,
        counts=EXPERT_COUNTS,
        fixed={"hidden_act": SILU, "attention_bias": (False,), "norm_topk_prob": (False,), "clip_qkv": (None,)},
        head_required=True,
        write_keys=hooks.check_all_heads,
    ),
)
ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in (*ROWS, *FAMILY_ROWS)}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json. Raises QuantoolError naming the class and what is known."""
    return _find(config)[0]


def find_family(config: Mapping[str, Any]) -> Family:
    """The class of transformers of a config.json."""
    return _find(config)[1]


def _find(config: Mapping[str, Any]) -> tuple[Architecture, Family]:
    classes = config.get("architectures")
    given = classes[0] if isinstance(classes, list) and classes else None
    for architecture in ARCHITECTURES.values():
        for family in architecture.families:
            if family.name == given or (given is None and family.model_type == config.get("model_type")):
                return architecture, family
    names = sorted(family.name for architecture in ARCHITECTURES.values() for family in architecture.families)
    raise QuantoolError(
        f"{short(given or config.get('model_type'))} is not an architecture that can be written as GGUF, "
        f"expected one of {', '.join(names)}"
    )
