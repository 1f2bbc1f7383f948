"""Tiny random models of every architecture that GGUF files are written for, with what makes each one different.

Sizes are what llama.cpp needs: even heads, a vocabulary that a byte-level tokenizer fills, windows shorter than the
tokens of a test. `hidden_size` 64 leaves rows that only blocks of 32 divide; with `wide` they have whole blocks of 256,
as K-quants need them.
"""

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quantool.model.skeleton import tensors_of

VOCABULARY = 320
TOKENS = 40  # more than a window, and more than the original context of the scaled rotary embeddings
SPECIAL = ("<pad>", "<s>", "</s>")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Sizes at which every row holds whole blocks of 256, for `wide`.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "n_inner": 512,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
}
HEAD = {"head_dim": 32}  # not hidden_size / num_attention_heads
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}
STRETCHED = {"max_position_embeddings": 1024}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
GEMMA = {**HEAD, "query_pre_attn_scalar": 32, "sliding_window": 8}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


@dataclass(frozen=True)
class Case:
    """A family of transformers, the architecture that its files name, and changes to its config."""

    family: str
    architecture: str
    changes: dict[str, Any]


def _cases(family: str, architecture: str, variants: dict[str, dict[str, Any]]) -> dict[str, Case]:
    return {
        f"{architecture}-{family}-{name}": Case(family, architecture, changes) for name, changes in variants.items()
    }


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": parameters}


def layers(*kinds: str) -> dict[str, Any]:
    words = {"s": "sliding_attention", "f": "full_attention"}
    return {"num_hidden_layers": len(kinds), "layer_types": [words[kind] for kind in kinds]}


CASES: dict[str, Case] = {
    **_cases(
        "llama",
        "llama",
        {
            "plain": {**UNTIED, **THETA},
            "tied": TIED,
            "biases": {"attention_bias": True, "mlp_bias": True},
            "head-dim": HEAD,
            "all-heads": {"num_key_value_heads": 4},
            "llama3": rope(**LLAMA3),
            "linear": rope(**LINEAR),
            "yarn": rope(**YARN),
        },
    ),
    **_cases("mistral", "llama", {"plain": {**HEAD, "sliding_window": None}}),
    **_cases("mixtral", "llama", {"plain": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}}),
    **_cases(
        "smollm3",
        "smollm3",
        {
            "plain": {"num_hidden_layers": 4, "no_rope_layer_interval": 4, **TIED},
            "untied": {**THETA, **UNTIED},
        },
    ),
    **_cases("qwen2", "qwen2", {"plain": {**UNTIED, **THETA}, "tied": TIED, "yarn": rope(**YARN)}),
    **_cases("qwen3", "qwen3", {"plain": {**HEAD, **UNTIED, **THETA}, "tied": {**HEAD, **TIED}}),
    **_cases(
        "qwen2_moe",
        "qwen2moe",
        {
            "plain": {**EXPERTS, **THETA, "num_experts": 5, "shared_expert_intermediate_size": 64},
            "tied": {**EXPERTS, **TIED, "num_experts": 4, "shared_expert_intermediate_size": 96},
        },
    ),
    **_cases(
        "qwen3_moe", "qwen3moe", {"plain": {**EXPERTS, **HEAD, **THETA, "num_experts": 4, "norm_topk_prob": True}}
    ),
    **_cases("gemma", "gemma", {"plain": {**HEAD, **THETA}}),
    **_cases(
        "gemma2",
        "gemma2",
        {
            "plain": {
                **GEMMA,
                **THETA,
                "num_hidden_layers": 3,
                "final_logit_softcapping": 3.0,
                "attn_logit_softcapping": 2.0,
            },
            "pattern": {**GEMMA, **layers(*"fss")},
        },
    ),
    **_cases(
        "gemma3_text",
        "gemma3",
        {
            "plain": {**GEMMA, **layers(*"sfs")},
            "usual": {**GEMMA, **layers(*"sssssf")},
            "untied": {**GEMMA, **layers(*"fs"), **UNTIED},
            "soft-cap": {**GEMMA, **layers(*"ss"), "final_logit_softcapping": 3.0},
            "full": {**GEMMA, **layers(*"ff")},
            "linear": {
                **GEMMA,
                **layers(*"sf"),
                **rope(full_attention=LINEAR, sliding_attention={"rope_type": "default", "rope_theta": 500.0}),
            },
        },
    ),
    **_cases(
        "phi3",
        "phi3",
        {
            "plain": UNTIED,
            "tied-partial": {
                **TIED,
                **rope(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.5),
                "sliding_window": 64,
            },
            # llama.cpp chooses the factors by the context it is given, at least 256 tokens; transformers by the tokens.
            "short": {**rope(**LONGROPE), **STRETCHED, "original_max_position_embeddings": 512},
            "long": {**rope(**LONGROPE), **STRETCHED, "original_max_position_embeddings": 16},
        },
    ),
    **_cases("gpt2", "gpt2", {"plain": {"n_inner": 96}, "four-times": {}, "untied": UNTIED}),
    **_cases(
        "gpt_neox",
        "gptneox",
        {
            "parallel": UNTIED,
            "sequential": {"use_parallel_residual": False},
            "tied-full-rotary": {**TIED, **rope(rope_type="default", rope_theta=5000.0, partial_rotary_factor=1.0)},
        },
    ),
    **_cases("olmo", "olmo", {"plain": {**UNTIED, **THETA}, "tied": TIED, "clip": {"clip_qkv": 0.5}}),
    **_cases("olmo2", "olmo2", {"plain": {**UNTIED, **THETA}, "tied": TIED, "yarn": rope(**YARN)}),
    **_cases("olmoe", "olmoe", {"plain": {**OLMOE, **THETA}, "tied": {**OLMOE, **TIED}}),
    **_cases(
        "stablelm",
        "stablelm",
        {
            "plain": UNTIED,
            "biases": {"use_qkv_bias": True},
            "parallel": {"use_parallel_residual": True},
            "qk-norms": {"qk_layernorm": True, "use_parallel_residual": True},
            "tied": {**TIED, **rope(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.5)},
        },
    ),
    **_cases("starcoder2", "starcoder2", {"tied": {**TIED, **THETA, "sliding_window": None}, "untied": UNTIED}),
}


FIRST = {case.architecture: name for name, case in reversed(CASES.items())}  # one case of each architecture


def make(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """The float32 model of a case in which every weight, gain and bias is random."""
    case = CASES[name]
    sizes = {**SIZES, **case.changes, **changes}
    if case.family in ("gpt2", "gpt_neox"):
        del sizes["num_key_value_heads"]
    if case.family == "gpt2":
        del sizes["intermediate_size"]
    config = transformers.AutoConfig.for_model(case.family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(requires_grad=False)
    random = torch.Generator().manual_seed(seed)
    for _, tensor in tensors_of(model):
        noise = torch.randn(tensor.shape, generator=random)
        # A gain or bias moves around what it starts from: one, zero, or zero for norms that multiply by 1 + weight.
        tensor.copy_(noise * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else tensor + 0.2 * noise)
    return model


def wide(name: str) -> dict[str, Any]:
    """The changes to `make` that make a case wide enough for K-quants."""
    return {key: value for key, value in WIDE.items() if key in {**SIZES, **CASES[name].changes}}


def save_case(name: str, directory: Path, **changes: Any) -> Any:
    """Write model and tokenizer of a case as a Hugging Face directory; gives the model."""
    model = make(name, **changes)
    model.save_pretrained(directory)
    save_tokenizer(directory, model.config.vocab_size)
    return model


def save_tokenizer(directory: Path, vocab_size: int = VOCABULARY) -> None:
    tokenizer(vocab_size).save(str(directory / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@functools.cache
def tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer, trained on this file until the vocabulary is full."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    if made.get_vocab_size() != vocab_size:
        raise ValueError(f"the text gives {made.get_vocab_size()} tokens, not {vocab_size}")
    return made


def tokens(count: int = TOKENS, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (count,), generator=generator).tolist()


class TableGelu(torch.nn.Module):
    """GELU as ggml computes it on a CPU: float16 in, the tanh approximation, float16 out, and nothing of it beyond 10.

    Source: ggml_vec_gelu_f32 of ggml/src/ggml-cpu/vec.h.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0, torch.where(x >= 10, x, y))


def with_table_gelu(model: Any) -> Any:
    """A copy of a model that computes GELU from ggml's table; a model with SiLU is unchanged."""
    words = {key: value for key, value in model.config.to_dict().items() if "act" in key}
    if not any(str(value).startswith("gelu") for value in words.values()):
        return model
    model = copy.deepcopy(model)
    for mlp in [module for name, module in model.named_modules() if name.endswith(".mlp")]:
        (name,) = {"act", "act_fn"} & set(dict(mlp.named_children()))
        setattr(mlp, name, TableGelu())
    return model


@torch.no_grad()
def reference(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits float32 [T, V] by transformers itself."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits
