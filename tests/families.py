"""Tiny models of many families with random weights, made by transformers itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from quantool.io import TensorInfo
from quantool.io.safetensors import dtype_name
from quantool.model.skeleton import tensors_of

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_8 = {"head_dim": 8}
LAYERS_3 = {"num_hidden_layers": 3}
# Each is made to differ: soft caps, windows, layers of two kinds, parallel attention, biases, fused linears.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LAYERS_3,
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": HEAD_8,
    "gemma": HEAD_8,
    "gemma2": {**HEAD_8, "sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        **HEAD_8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "phi3": {"sliding_window": 8},
    "phi": {},
    "gpt_neox": {},
    "olmo2": {},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": 8},
    "smollm3": {**LAYERS_3, "no_rope_layer_interval": 2},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "cohere": {"logit_scale": 0.5},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
}
# Experts: chosen by softmax or sigmoid, in groups, beside shared ones, after a dense block, behind MLA.
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
SHARED = {"n_shared_experts": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**HEAD_8, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4},
    "deepseek_v2": {**MLA, **SHARED, "n_routed_experts": 4, "topk_method": "group_limited_greedy", "topk_group": 1},
    "deepseek_v3": {**MLA, **SHARED, "n_routed_experts": 4, "topk_group": 1},
}
FAMILIES.update({family: {"num_experts_per_tok": 2, **sizes} for family, sizes in MIXTURES.items()})
BLOCKS = {
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


# Sizes at which every row of every linear divides into groups of 32, for tests that quantize.
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "n_inner": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
}


def wide(family: str, **changes: Any) -> dict[str, Any]:
    """The changes to `make_model` that make a family wide enough for groups of 32."""
    return {key: value for key, value in WIDE.items() if key in {**SIZES, **FAMILIES[family]}} | changes


def make_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of the family in which every weight, gain, bias and stored buffer is random."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(requires_grad=False)
    random = torch.Generator().manual_seed(seed)
    for _, tensor in tensors_of(model):
        noise = torch.randn(tensor.shape, generator=random)
        # A gain or bias moves around what it starts from: one, zero, or zero for norms that multiply by 1 + weight.
        tensor.copy_(noise * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else tensor + 0.2 * noise)
    return model


def multi_modal() -> Any:
    """Gemma 3 with a vision tower that is larger than its decoder, and as deep."""
    text = {**SIZES, **FAMILIES["gemma3_text"]}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    return model.requires_grad_(requires_grad=False)


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def tokens(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@dataclass
class MemoryCheckpoint:
    """A Checkpoint of tensors in memory, for names and configs that no file would have."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    path: Path = Path("memory")

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(name, tuple(tensor.shape), dtype_name(tensor.dtype), tensor.nbytes, self.path)
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def drop(self, name: str) -> None:
        assert name in self.tensors

    def write_aux(self, directory: Path) -> None:
        raise NotImplementedError


def in_memory(model: Any) -> MemoryCheckpoint:
    """What `save_pretrained` would write: tied matrices once, under the embedding's name; experts one by one."""
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if not (tied and n == "lm_head.weight")}
    return MemoryCheckpoint(stored_config(model), revert_weight_conversion(model, tensors))


def fused_in_memory(model: Any) -> MemoryCheckpoint:
    """The tensors that the model itself has: experts fused, as some checkpoints store them."""
    return MemoryCheckpoint(stored_config(model), dict(model.state_dict(keep_vars=True)))


def stored_config(model: Any) -> dict[str, Any]:
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}
