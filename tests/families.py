"""Tiny models of many families with random weights, made by transformers itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from quantool.io import TensorInfo
from quantool.io.safetensors import dtype_name

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
BLOCKS = {
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


def make_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of the family in which every weight, gain and bias is random."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(requires_grad=False)
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        # A gain or bias moves around what it starts from: one, zero, or zero for norms that multiply by 1 + weight.
        parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model


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
    """What `save_pretrained` would write: tied matrices once, under the embedding's name."""
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if not (tied and n == "lm_head.weight")}
    return MemoryCheckpoint({**model.config.to_dict(), "architectures": [type(model).__name__]}, tensors)
