"""What one row of the table of architectures says: how Hugging Face and llama.cpp each name and order the same network.

    Hugging Face                                    GGUF
    model.layers.3.self_attn.q_proj.weight  [N, K]  blk.3.attn_q.weight, rows in `orders`
    model.layers.3.mlp.experts.7.up_proj.weight     blk.3.ffn_up_exps.weight  [E, N, K], slice 7
    config.json: num_attention_heads                llama.attention.head_count

Both directions read the same row: tensors.py the names, keys.py the keys. What a table cannot say is in hooks.py:
one small function each way.
Facts: src/models/*.cpp and conversion/*.py of llama.cpp, configuration_*.py of transformers 5.23.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantool.io.gguf.file import GgufFile
from quantool.io.gguf.rope import pairs
from quantool.io.gguf.writer import Value

SILU, GELU_TANH = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
# llama.cpp computes the tanh approximation for exact "gelu" as well; the two differ by less than 1e-3.


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: `gguf` is the key in the file after "ARCH.", `config` the key in config.json.

    `default` is what llama.cpp takes when the file lacks the key: a value, or the `gguf` of another Key; None: it must
    be there, unless it is `optional`: null in config.json and no key in the file.
    """

    gguf: str
    config: str
    kind: type[int] | type[float] | type[bool] = int
    default: int | float | bool | str | None = None
    optional: bool = False
    aliases: tuple[str, ...] = ()  # other names in config.json


@dataclass(frozen=True, slots=True)
class Family:
    """A class of transformers that llama.cpp runs as this architecture.

    `defaults` is what transformers takes where config.json lacks the key; old files lack many.
    """

    name: str  # config["architectures"][0]
    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of llama.cpp; stems are GGUF names without "blk.3." and ".weight"."""

    name: str  # general.architecture
    families: tuple[Family, ...]  # a file is read as the first, unless `read_config` says otherwise
    keys: tuple[Key, ...]
    outside: Mapping[str, str]  # stem -> module
    block: Mapping[str, str]  # stem -> module within a block
    blocks: str = "model.layers"
    stacks: Mapping[str, str] = field(default_factory=dict)  # stem of a stack -> module of its part {}, an expert
    counts: Mapping[str, str] = field(default_factory=dict)  # stem of a stack -> Key.gguf of the number of its parts
    optional: frozenset[str] = frozenset()  # stems that a checkpoint may lack
    biases: frozenset[str] = frozenset()  # stems that may have a bias beside the weight
    biased: Mapping[str, str] = field(default_factory=dict)  # config key -> "blk.0.attn_q.bias", true where that is
    # stem -> (an order function, the Key.gguf of its number of heads): the row order of the GGUF
    orders: Mapping[str, tuple[Callable[[int, int], torch.Tensor], str]] = field(default_factory=dict)
    plus_one: frozenset[str] = frozenset()  # stems of gains that GGUF stores as 1 + weight
    transposed: frozenset[str] = frozenset()  # stems whose weight Hugging Face stores as [K, N] (Conv1D)
    vectors: frozenset[str] = frozenset()  # stems that are [1, K] in Hugging Face and [K] in GGUF
    # config key -> what llama.cpp computes: the value, then other words for it. Anything else is refused.
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rope: frozenset[str] | None = frozenset({"linear", "yarn"})  # the scalings llama.cpp knows; None: no rotary at all
    partial: str | None = None  # config key of the part of a head that is rotary, where llama.cpp allows a part
    head_required: bool = False  # whether llama.cpp wants output.weight also when it is the embedding
    windowed: bool = False  # whether llama.cpp applies the sliding window; if not, the context is cut to it
    # What the table cannot say. Suffixes and values to add; refuses what llama.cpp would compute differently.
    write_keys: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Value]] | None = None
    # Keys for config.json from the file and the config so far, and the suffixes of the metadata that it has read.
    read_config: Callable[[GgufFile, dict[str, Any]], tuple[dict[str, Any], set[str]]] | None = None
    # Tensors that only GGUF has, from config and settings; when reading they are for `read_config`.
    generated: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, torch.Tensor]] | None = None
    generated_names: frozenset[str] = frozenset()

    def key(self, gguf: str) -> Key | None:
        """The Key of this suffix."""
        return next((key for key in self.keys if key.gguf == gguf), None)


COMMON = (
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("block_count", "num_hidden_layers"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.head_count_kv", "num_key_value_heads", default="attention.head_count"),
)
HEAD_DIM = (Key("attention.key_length", "head_dim", optional=True),)
RMS = (Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),)
ROPE = (Key("rope.freq_base", "rope_theta", float, default=10000.0),)
EXPERTS = (
    Key("expert_count", "num_experts", aliases=("num_local_experts",)),
    Key("expert_used_count", "num_experts_per_tok"),
)
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
STACKS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
EXPERT_COUNTS = dict.fromkeys(STACKS, "expert_count")
# Rows of q and k for the rotary order of ggml's "NORM": pairs side by side, where Hugging Face has halves.
PAIRS = {
    "attn_q": (pairs, "attention.head_count"),
    "attn_k": (pairs, "attention.head_count_kv"),
}
ALL_SPARSE: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}  # every block has experts
QKV = frozenset({"attn_q", "attn_k", "attn_v"})
