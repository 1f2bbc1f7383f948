"""A GGUF file seen as a Hugging Face checkpoint: the same tensor names, row order and config keys."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantool.errors import QuantoolError
from quantool.io import TensorInfo
from quantool.io.gguf.file import Array, GgufFile, Tensor, check_decodable, decode
from quantool.io.gguf.tokenizer import token_ids, write_tokenizer
from quantool.io.safetensors import drop_pages

# One row per architecture. "llama" is what the converter writes for Llama, Mistral and SmolLM alike.
NAMES = {
    "llama": {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
}
# Keys that change what the network computes and have no counterpart in LlamaConfig.
REFUSED = (
    "expert_count",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attention.scale",
    "attention.sliding_window",
)


class GgufCheckpoint:
    """A GGUF file of a known architecture under Hugging Face names (see Checkpoint).

    `read` gives torch's own dtype where the block type is one (F32, F16, BF16), else float32. Rows of q and k,
    which the converter permuted for ggml's rotary order, are put back.
    Raises QuantoolError when the file is damaged, its architecture unknown, or it says something that a config
    cannot.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        architecture = self._file.fields.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in NAMES:
            raise QuantoolError(
                f"{path}: architecture {architecture!r} is not known, expected one of {', '.join(NAMES)}"
            )
        self.metadata = {key: str(value) for key, value in self._file.fields.items() if not isinstance(value, Array)}
        self._tensors = {
            _hf_name(path, architecture, name): tensor
            for name, tensor in self._file.tensors.items()
            if name != "rope_freqs.weight"  # goes into the config
        }
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.shape, tensor.dtype, tensor.nbytes, path)
            for name, tensor in self._tensors.items()
        }
        self.config: Mapping[str, Any] = _llama_config(self._file, self.infos)
        self._heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        for name, tensor in self._tensors.items():
            heads = self._permuted_heads(name)
            dimensions = 2 if name.endswith(".weight") else 1
            if heads and (len(tensor.shape) != dimensions or not tensor.nbytes):
                raise QuantoolError(
                    f"{path}: tensor {tensor.name!r}: shape {list(tensor.shape)}, expected {dimensions} above 0"
                )
            if heads and tensor.shape[0] % (2 * heads):
                raise QuantoolError(
                    f"{path}: tensor {tensor.name!r}: {tensor.shape[0]} rows do not divide by {heads} heads"
                )
        check_decodable(path, {tensor.dtype: tensor.name for tensor in self._file.tensors.values()})

    def read(self, name: str) -> torch.Tensor:
        """The tensor in torch order; a view of the mapping unless its rows are reordered or decoded."""
        if name not in self._tensors:
            raise QuantoolError(f"{self.path}: there is no tensor {name!r}")
        tensor = self._tensors[name]
        rows, heads = self._file.rows(tensor), self._permuted_heads(name)
        if not heads:
            return decode(rows, tensor)
        order = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        if len(tensor.shape) == 1:
            return decode(rows, tensor)[torch.from_numpy(order)]
        return decode(rows[order], tensor)  # rows are decoded independently, so reordering their bytes is enough

    def drop(self, name: str) -> None:
        tensor = self._tensors[name]
        drop_pages(self._file.map, tensor.start, tensor.nbytes)

    def write_aux(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, rebuilt from the metadata."""
        write_tokenizer(self._file, directory)

    def _permuted_heads(self, name: str) -> int:
        """Heads of a q or k projection, 0 for every other tensor."""
        return int(self._heads.get(name.split(".")[-2], 0))


def _hf_name(path: Path, architecture: str, name: str) -> str:
    """blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    match = re.fullmatch(r"(?:(blk)\.(\d+)\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    module = NAMES[architecture].get(match[3]) if match else None
    if match is None or module is None:
        raise QuantoolError(f"{path}: tensor {name!r} is not known in architecture {architecture!r}")
    return f"model.layers.{match[2]}.{module}.{match[4]}" if match[1] else f"{module}.{match[4]}"


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    """A number from the metadata; float32 values become the decimal they were written as (1e-05)."""
    value = file.fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e38:
        found = "is missing" if value is None else f"is {value!r}"
        raise QuantoolError(f"{file.path}: {key} {found}, expected a number")
    return float(str(np.float32(value))) if isinstance(value, float) else int(value)


def _llama_config(file: GgufFile, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The keys of LlamaConfig from the metadata."""
    if int(_number(file, "split.count", 1)) > 1:
        hint = f"llama-gguf-split --merge '{file.path}' merged.gguf"
        raise QuantoolError(f"{file.path}: is one part of a split model", hint=hint)
    for key in REFUSED:
        if file.fields.get(f"llama.{key}"):
            raise QuantoolError(f"{file.path}: llama.{key} is {file.fields[f'llama.{key}']!r}, which is not supported")
    embedding = infos.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise QuantoolError(f"{file.path}: there is no tensor 'token_embd.weight' of two dimensions")
    hidden, layers = int(_number(file, "llama.embedding_length")), int(_number(file, "llama.block_count"))
    stored = {name.split(".")[2] for name in infos if name.startswith("model.layers.")}
    if hidden != embedding.shape[1] or layers != len(stored):
        raise QuantoolError(
            f"{file.path}: {layers} blocks of width {hidden} are announced, "
            f"{len(stored)} of width {embedding.shape[1]} are stored"
        )
    heads = int(_number(file, "llama.attention.head_count"))
    kv_heads = int(_number(file, "llama.attention.head_count_kv", heads))
    if not heads or not kv_heads or heads % kv_heads:
        raise QuantoolError(f"{file.path}: {heads} heads do not divide by {kv_heads} key-value heads")
    head_dim = int(_number(file, "llama.attention.key_length", hidden // heads))
    rotary = int(_number(file, "llama.rope.dimension_count", head_dim))
    if rotary != head_dim:
        raise QuantoolError(f"{file.path}: rotary dimension {rotary} of heads of {head_dim} is not supported")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(_number(file, "llama.feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": int(_number(file, "llama.context_length")),
        "rms_norm_eps": _number(file, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(file, "llama.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in infos,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in infos,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in infos,
        "torch_dtype": _dtype(infos),
    }
    scaling = _rope_scaling(file, config)
    return {**config, **({"rope_scaling": scaling} if scaling else {}), **token_ids(file)}


def _dtype(infos: Mapping[str, TensorInfo]) -> str:
    matrices = {info.dtype for info in infos.values() if len(info.shape) == 2}
    if matrices == {"F32"}:
        return "float32"
    return "float16" if matrices == {"F16"} else "bfloat16"


def _rope_scaling(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """rope_scaling of the config; every way of scaling that it cannot say is an error, never dropped."""
    prefix = "llama.rope.scaling."
    given = {key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)}
    kind = given.pop("type", "none")
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None and kind == "none":
        return _llama3_scaling(file, factors, config)
    known = {"none": set(given), "linear": {"factor"}, "yarn": {"factor", "original_context_length", "finetuned"}}
    if factors is not None or set(given) - known.get(kind, set()):
        raise QuantoolError(f"{file.path}: rope scaling {kind!r} with {sorted(given)} is not supported")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _number(file, prefix + "factor")}
    if "original_context_length" in given:
        scaling["original_max_position_embeddings"] = int(_number(file, prefix + "original_context_length"))
    return scaling


def _llama3_scaling(file: GgufFile, tensor: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3 scaling from its baked frequency divisors: the released constants, and the factor they show.

    Source: ROPE_INIT_FUNCTIONS["llama3"] of transformers; the converter stores old / new frequency.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": 1.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    stored = decode(file.rows(tensor), tensor).double()
    half = config["head_dim"] // 2
    if not half or stored.shape != (half,):
        raise QuantoolError(f"{file.path}: rope_freqs.weight has shape {list(stored.shape)}, expected [{half}]")
    factor = round(float(stored.max()), 4)
    turns = 8192 / (2 * math.pi) * config["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(stored, expected, rtol=1e-4):
        raise QuantoolError(f"{file.path}: rope_freqs.weight is not Llama 3 scaling, the only kind supported")
    return {**scaling, "factor": factor}
