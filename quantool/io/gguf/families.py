"""Rows of the table for Gemma, Phi-3, GPT-2, GPT-NeoX, OLMo, StableLM and StarCoder2 (see architectures.py).

Each is a decoder that differs from Llama in names and in some of these, which llama.cpp knows by the architecture:

    gemma      gains are stored as 1 + weight; the embedding is the head
    gemma2, 3  windows in some blocks, soft caps, queries scaled by their own number
    phi3       q, k, v in one matrix, gate and up in one; frequencies divided by one of two tables (LongRoPE)
    gptneox    q, k, v in one matrix, head by head:   q0 k0 v0 q1 k1 v1  ->  q0 q1 k0 k1 v0 v1
    stablelm   one norm per head, [heads, head_dim] in GGUF

Facts: src/models/{gemma*,phi3,gpt2,gptneox,olmo*,stablelm,starcoder2}.cpp and conversion/*.py of llama.cpp,
configuration_*.py of transformers 5.23.
"""

from dataclasses import replace

from quantool.io.gguf import hooks
from quantool.io.gguf.hooks import LONG, SHORT, WINDOW
from quantool.io.gguf.row import (
    ATTENTION,
    COMMON,
    FFN_NORM,
    GATED,
    GELU_TANH,
    OUTSIDE,
    PAIRS,
    QK_NORM,
    QKV,
    RMS,
    ROPE,
    SILU,
    Architecture,
    Family,
    Key,
)

GEMMA_FIXED = {"attention_bias": (False,), "use_bidirectional_attention": (False, None)}
GEMMA_HEAD = Key("attention.key_length", "head_dim")
AROUND = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA_DEFAULTS = {"head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True}
GEMMA = Architecture(
    name="gemma",
    families=(Family("GemmaForCausalLM", "gemma", GEMMA_DEFAULTS),),
    keys=(*COMMON, GEMMA_HEAD, *RMS, *ROPE),
    outside={"token_embd": "model.embed_tokens", "output_norm": "model.norm"},
    block={**ATTENTION, **FFN_NORM, **GATED},
    plus_one=frozenset({"attn_norm", "ffn_norm", "output_norm"}),
    fixed={"hidden_act": GELU_TANH, **GEMMA_FIXED},
)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    families=(Family("Gemma2ForCausalLM", "gemma2", {**GEMMA_DEFAULTS, "sliding_window": 4096}),),
    keys=(
        *GEMMA.keys,
        Key(WINDOW, "sliding_window", default=4096),
        Key("attn_logit_softcapping", "attn_logit_softcapping", float, default=50.0),
        Key("final_logit_softcapping", "final_logit_softcapping", float, default=30.0),
    ),
    block={**GEMMA.block, **AROUND},
    plus_one=frozenset({*AROUND, "output_norm"}),
    fixed={"hidden_activation": GELU_TANH, **GEMMA_FIXED},
    windowed=True,
    write_keys=hooks.write_gemma2,
    read_config=hooks.read_gemma2,
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    families=(
        Family(
            "Gemma3ForCausalLM",
            "gemma3_text",
            {
                **GEMMA_DEFAULTS,
                "sliding_window": 4096,
                "rope_theta": 1e6,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": 131072,
            },
        ),
    ),
    keys=(
        *GEMMA.keys,
        Key(WINDOW, "sliding_window", optional=True),
        Key("final_logit_softcapping", "final_logit_softcapping", float, optional=True),
    ),
    outside=OUTSIDE,
    block={**GEMMA2.block, **QK_NORM},
    plus_one=frozenset({*GEMMA2.plus_one, *QK_NORM}),
    fixed={"hidden_activation": GELU_TANH, "attn_logit_softcapping": (None,), **GEMMA_FIXED},
    rope=frozenset({"linear"}),
    write_keys=hooks.write_gemma3,
    read_config=hooks.read_gemma3,
)
PHI3 = Architecture(
    name="phi3",
    families=(
        Family(
            "Phi3ForCausalLM",
            "phi3",
            {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        ),
    ),
    keys=(*COMMON, *RMS, *ROPE, Key(WINDOW, "sliding_window", optional=True)),
    outside=OUTSIDE,
    block={
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        **FFN_NORM,
        "ffn_up": "mlp.gate_up_proj",  # gate first, which is what llama.cpp takes
        "ffn_down": "mlp.down_proj",
    },
    fixed={"hidden_act": SILU},
    rope=frozenset({"longrope", "su"}),
    partial="partial_rotary_factor",
    write_keys=hooks.write_phi3,
    read_config=hooks.read_phi3,
    generated=hooks.longrope_factors,
    generated_names=frozenset({LONG, SHORT}),
)
LINEARS_2 = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
EPS = Key("attention.layer_norm_epsilon", "layer_norm_eps", float)
GPT2 = Architecture(
    name="gpt2",
    families=(Family("GPT2LMHeadModel", "gpt2", {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}),),
    keys=(
        Key("context_length", "n_positions", aliases=("max_position_embeddings", "n_ctx")),
        Key("embedding_length", "n_embd", aliases=("hidden_size",)),
        Key("block_count", "n_layer", aliases=("num_hidden_layers",)),
        Key("feed_forward_length", "n_inner", optional=True),
        Key("attention.head_count", "n_head", aliases=("num_attention_heads",)),
        replace(EPS, config="layer_norm_epsilon"),
    ),
    outside={
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    block={
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    blocks="transformer.h",
    biases=frozenset({*LINEARS_2, "attn_norm", "ffn_norm", "output_norm"}),
    transposed=frozenset(LINEARS_2),
    fixed={
        "activation_function": ("gelu_new", *GELU_TANH),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    rope=None,
    write_keys=hooks.write_gpt2,
)
GPTNEOX = Architecture(
    name="gptneox",
    families=(
        Family(
            "GPTNeoXForCausalLM",
            "gpt_neox",
            {"layer_norm_eps": 1e-5, "use_parallel_residual": True, "rotary_pct": 0.25, "rope_theta": 10000.0},
        ),
    ),
    keys=(
        *(key for key in COMMON if key.config != "num_key_value_heads"),
        EPS,
        Key("rope.freq_base", "rotary_emb_base", float, default=10000.0, aliases=("rope_theta",)),
        Key("use_parallel_residual", "use_parallel_residual", bool),
    ),
    outside={
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "embed_out",
    },
    block={
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    blocks="gpt_neox.layers",
    biases=frozenset({*LINEARS_2, "attn_norm", "ffn_norm", "output_norm"}),
    orders={"attn_qkv": (hooks.thirds, "attention.head_count")},
    fixed={"hidden_act": ("gelu", *GELU_TANH), "attention_bias": (True,)},
    partial="rotary_pct",
    head_required=True,
)
OLMO = Architecture(
    name="olmo",
    families=(Family("OlmoForCausalLM", "olmo", {"rope_theta": 10000.0}),),
    keys=(*COMMON, *ROPE, Key("attention.clamp_kqv", "clip_qkv", float, optional=True)),
    outside={"token_embd": "model.embed_tokens", "output": "lm_head"},
    block={stem: module for stem, module in {**ATTENTION, **GATED}.items() if stem != "attn_norm"},
    orders=PAIRS,
    fixed={"hidden_act": SILU, "attention_bias": (False,)},
    write_keys=hooks.write_olmo,
    read_config=hooks.read_olmo,
)
OLMO2 = Architecture(
    name="olmo2",
    families=(Family("Olmo2ForCausalLM", "olmo2", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}),),
    keys=(*COMMON, *RMS, *ROPE),
    outside=OUTSIDE,
    block={
        **OLMO.block,
        **QK_NORM,
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    fixed={"hidden_act": SILU, "attention_bias": (False,)},
    head_required=True,
)
STABLELM = Architecture(
    name="stablelm",
    families=(
        Family(
            "StableLmForCausalLM",
            "stablelm",
            {
                "layer_norm_eps": 1e-5,
                "use_parallel_residual": False,
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000.0,
            },
        ),
    ),
    keys=(
        *COMMON,
        replace(EPS, aliases=("norm_eps",)),
        *ROPE,
        Key("use_parallel_residual", "use_parallel_residual", bool, default=False),
    ),
    outside=OUTSIDE,
    block={**ATTENTION, **FFN_NORM, **GATED},
    stacks={"attn_q_norm": "self_attn.q_layernorm.norms.{}", "attn_k_norm": "self_attn.k_layernorm.norms.{}"},
    counts={"attn_q_norm": "attention.head_count", "attn_k_norm": "attention.head_count_kv"},
    optional=frozenset({"ffn_norm", "attn_q_norm", "attn_k_norm"}),
    biases=frozenset({*QKV, "attn_norm", "ffn_norm", "output_norm"}),
    biased={"use_qkv_bias": "blk.0.attn_q.bias"},
    fixed={"hidden_act": SILU},
    partial="partial_rotary_factor",
    head_required=True,
    read_config=hooks.read_stablelm,
)
STARCODER2 = Architecture(
    name="starcoder2",
    families=(
        Family(
            "Starcoder2ForCausalLM",
            "starcoder2",
            {"norm_epsilon": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True},
        ),
    ),
    keys=(*COMMON, replace(EPS, config="norm_epsilon"), *ROPE),
    outside=OUTSIDE,
    block={**ATTENTION, **FFN_NORM, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    biases=frozenset({*ATTENTION, *FFN_NORM, "ffn_up", "ffn_down", "output_norm"}),
    fixed={
        "hidden_act": GELU_TANH,
        "use_bias": (True,),
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
    },
)
FAMILY_ROWS = (GEMMA, GEMMA2, GEMMA3, PHI3, GPT2, GPTNEOX, OLMO, OLMO2, STABLELM, STARCODER2)
