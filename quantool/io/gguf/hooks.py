"""What the table of architectures cannot say: settings that depend on each other or on tensors, and generated tensors.

    write_...    (config, settings) -> suffixes and values to add to the metadata
    read_...     (file, config)     -> keys for config.json, and the suffixes of the metadata that it has read
    ..._factors  (config, settings) -> tensors that only GGUF has

Facts: conversion/*.py, src/llama-model.cpp and src/models/*.cpp of llama.cpp, configuration_*.py of transformers 5.23.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from quantool.errors import QuantoolError
from quantool.io.gguf.fields import flag, number
from quantool.io.gguf.file import Array, GgufFile, decode, short
from quantool.io.gguf.rope import FULL, llama3_divisors, real, rope_of
from quantool.io.gguf.writer import Value

Config = Mapping[str, Any]
Settings = Mapping[str, Any]
SLIDING = "sliding_attention"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
ORIGINAL, MIN_ORIGINAL = "original_max_position_embeddings", 2
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
OLMO_EPS = 1e-5  # OlmoLayerNorm of transformers has no setting for it
LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


# --- Llama, SmolLM3


def llama3_factors(config: Config, settings: Settings) -> dict[str, torch.Tensor]:
    """rope_freqs.weight of Llama 3 scaling, by which ggml divides each frequency; {} for other scalings."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return {}
    rope.setdefault("original_max_position_embeddings", settings["context_length"])
    if missing := LLAMA3 - set(rope):
        raise QuantoolError(f"config.json: rope scaling 'llama3' lacks {', '.join(sorted(missing))}")
    numbers = {key: real(key, rope[key]) for key in sorted(LLAMA3)}
    if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise QuantoolError(f"config.json: rope scaling 'llama3' of {numbers}, expected low below high")
    half = settings["rope.dimension_count"] // 2
    return {"rope_freqs.weight": llama3_divisors(half, settings["rope.freq_base"], **numbers).float()}


def read_llama(file: GgufFile, config: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The class that has experts, and Llama 3 scaling from its baked divisors: the released constants and the factor.

    One file does not say whether it was Llama or Mistral: they compute the same.
    """
    found: dict[str, Any] = {}
    if config.get("num_local_experts"):
        found |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return found, set()
    if config.get("rope_scaling"):
        kind = config["rope_scaling"]["rope_type"]
        raise QuantoolError(f"{file.path}: rope scaling {kind!r} with rope_freqs.weight is not supported")
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    stored = decode(file.rows(tensor), tensor).double()
    half = config["head_dim"] // 2
    if not half or stored.shape != (half,):
        raise QuantoolError(f"{file.path}: rope_freqs.weight has shape {list(stored.shape)}, expected [{half}]")
    factor = round(float(stored.max()), 4)
    if not torch.allclose(stored, llama3_divisors(half, config["rope_theta"], factor=factor, **scaling), rtol=1e-4):
        raise QuantoolError(f"{file.path}: rope_freqs.weight is not Llama 3 scaling, the only kind supported")
    return found | {"rope_scaling": {"rope_type": "llama3", "factor": factor, **scaling}}, set()


def check_all_heads(config: Config, settings: Settings) -> dict[str, Value]:
    """Refuse an OLMoE with fewer key-value heads: llama.cpp norms as many channels of k as of q."""
    heads, kv_heads = settings["attention.head_count"], settings["attention.head_count_kv"]
    if heads != kv_heads:
        raise QuantoolError(
            f"config.json: 'num_key_value_heads' is {kv_heads}, llama.cpp has {heads} as of q for olmoe"
        )
    return {}


def nope_every_fourth(config: Config, settings: Settings) -> dict[str, Value]:
    """Refuse a SmolLM3 whose blocks without rotary embedding are not every fourth, as llama.cpp has them."""
    blocks = range(1, settings["block_count"] + 1)
    step = int(real("no_rope_layer_interval", config.get("no_rope_layer_interval") or 4))
    given = config.get("no_rope_layers") or [int(i % step != 0) for i in blocks]
    if given != [int(i % 4 != 0) for i in blocks]:
        raise QuantoolError(f"config.json: no_rope_layers is {short(given)}, llama.cpp leaves out every fourth block")
    return {}


# --- Gemma


def _refuse(key: str, value: Any, computed: Any, name: str) -> QuantoolError:
    return QuantoolError(
        f"config.json: '{key}' is {value!r}, llama.cpp computes {computed!r} for {name}",
        hint="this model cannot be written as GGUF",
    )


def _layer_types(config: Config, blocks: int, period: int) -> list[str]:
    """The kind of each block; by default every `period`th looks at everything."""
    given = config.get("layer_types") or [SLIDING if (i + 1) % period else FULL for i in range(blocks)]
    if not isinstance(given, list) or len(given) != blocks or not all(kind in (SLIDING, FULL) for kind in given):
        raise QuantoolError(f"config.json: layer_types is {given}, expected {blocks} of {SLIDING} or {FULL}")
    return given


def _query_scalar(settings: Settings, deep: int) -> int:
    """What llama.cpp divides attention scores by the root of: the head's width, except in the largest model."""
    if settings["block_count"] == deep:  # 27B, which llama.cpp knows by its depth
        return int(settings["embedding_length"] // settings["attention.head_count"])
    return int(settings["attention.key_length"])


def write_gemma2(config: Config, settings: Settings) -> dict[str, Value]:
    """Which blocks have a window; refuses scores that are scaled otherwise than llama.cpp scales them."""
    _check_scalar(config, settings, "gemma2", 46)
    return _pattern(_layer_types(config, settings["block_count"], 2), 2)


def _check_scalar(config: Config, settings: Settings, name: str, deep: int) -> None:
    key, computed = "query_pre_attn_scalar", _query_scalar(settings, deep)
    if config.get(key, 256) != computed:
        raise _refuse(key, config.get(key, 256), computed, name)


def _pattern(kinds: list[str], period: int) -> dict[str, Value]:
    """Which blocks have a window, where that is not what the architecture has anyway."""
    windowed = [kind == SLIDING for kind in kinds]
    usual = [(i + 1) % period != 0 for i in range(len(kinds))]
    return {} if windowed == usual else {PATTERN: windowed}


def read_gemma2(file: GgufFile, config: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The kinds of blocks, and the scale of the scores."""
    kinds = _read_pattern(file, "gemma2", config["num_hidden_layers"], 2)
    return {**_read_scalar(config, 46), "layer_types": kinds}, {PATTERN}


def _read_scalar(config: Config, deep: int) -> dict[str, Any]:
    settings = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.key_length": config["head_dim"],
    }
    return {"query_pre_attn_scalar": _query_scalar(settings, deep)}


def _read_pattern(file: GgufFile, name: str, blocks: int, period: int) -> list[str]:
    """The kind of each block from the pattern of the file: a period, one flag per block, or what is usual."""
    key = f"{name}.{PATTERN}"
    if isinstance(file.fields.get(key), Array):
        windowed = [bool(value) for value in file.values(key)]
    else:
        period = int(number(file, key, period))
        windowed = [not period or i % period < period - 1 for i in range(blocks)]
    if len(windowed) != blocks:
        raise QuantoolError(f"{file.path}: {key} has {len(windowed)} values for {blocks} blocks")
    return [SLIDING if value else FULL for value in windowed]


def write_gemma3(config: Config, settings: Settings) -> dict[str, Value]:
    """As `write_gemma2`, and the base of the rotary embedding in blocks with a window."""
    _check_scalar(config, settings, "gemma3", 62)
    if SLIDING in (config.get("rope_parameters") or {}):
        local = rope_of({"rope_parameters": config["rope_parameters"]}, SLIDING)
    else:
        local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq")}
    if local["rope_type"] != "default":
        raise _refuse("rope_type", local["rope_type"], "default", f"gemma3 in {SLIDING}")
    period = int(real("sliding_window_pattern", config.get("sliding_window_pattern") or 6))
    kinds = _layer_types(config, settings["block_count"], max(period, 1))
    if SLIDING not in kinds:
        return {WINDOW: 0}  # none, and one base for all blocks
    if not settings.get(WINDOW):
        raise QuantoolError(f"config.json: 'sliding_window' is missing, which {SLIDING} needs")
    return {"rope.freq_base_swa": real("rope_theta", local.get("rope_theta") or 10000.0), **_pattern(kinds, 6)}


def read_gemma3(file: GgufFile, config: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """As `read_gemma2`, and rotary settings for both kinds of blocks."""
    blocks = config["num_hidden_layers"]
    kinds = _read_pattern(file, "gemma3", blocks, 6) if config.get("sliding_window") else [FULL] * blocks
    local = number(file, "gemma3.rope.freq_base_swa", 10000.0)
    full = {"rope_type": "default", **(config.pop("rope_scaling", None) or {}), "rope_theta": config.pop("rope_theta")}
    found: dict[str, Any] = {
        **_read_scalar(config, 62),
        "layer_types": kinds,
        "rope_parameters": {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": local}},
    }
    return found, {PATTERN, "rope.freq_base_swa"}


# --- Phi-3


def _longrope(config: Config, settings: Settings) -> dict[str, Any] | None:
    """The rotary settings of a Phi-3 with two tables of factors, with the original context in it; None: it has none."""
    rope = rope_of(config)
    if rope["rope_type"] == "default":
        return None
    half = settings["rope.dimension_count"] // 2
    for key in ("long_factor", "short_factor"):
        if not isinstance(rope.get(key), list) or len(rope[key]) != half:
            raise QuantoolError(f"config.json: {key} of rope scaling {rope['rope_type']!r} has not {half} numbers")
        rope[key] = [real(key, value) for value in rope[key]]
    original = real(ORIGINAL, config.get(ORIGINAL) or rope.get(ORIGINAL))  # in this order in transformers
    if original < MIN_ORIGINAL:
        raise QuantoolError(f"config.json: {ORIGINAL} is {original}, expected at least {MIN_ORIGINAL}")
    return {**rope, ORIGINAL: original}


def write_phi3(config: Config, settings: Settings) -> dict[str, Value]:
    """The original context and the factor on attention of LongRoPE, as transformers computes it.

    A window of 0 says that there is none: older versions of llama.cpp took a file without the key for an older one.
    """
    window: dict[str, Value] = {WINDOW: settings.get(WINDOW, 0)}
    rope = _longrope(config, settings)
    if rope is None:
        return window
    stretch = real("factor", rope.get("factor") or config["max_position_embeddings"] / rope[ORIGINAL])
    attention = math.sqrt(1 + math.log(stretch) / math.log(rope[ORIGINAL])) if stretch > 1 else 1.0
    return {
        **window,
        "rope.scaling.original_context_length": int(rope[ORIGINAL]),
        "rope.scaling.attn_factor": real("attention_factor", rope.get("attention_factor", attention)),
    }


def longrope_factors(config: Config, settings: Settings) -> dict[str, torch.Tensor]:
    """The two tables of divisors: llama.cpp takes the long one when its context exceeds the original."""
    rope = _longrope(config, settings)
    if rope is None:
        return {}
    return {LONG: torch.tensor(rope["long_factor"]), SHORT: torch.tensor(rope["short_factor"])}


def read_phi3(file: GgufFile, config: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The rotary settings from the tables in the file."""
    read = {"rope.scaling." + key for key in ("type", "original_context_length", "attn_factor")}
    original = int(number(file, "phi3.rope.scaling.original_context_length", config["max_position_embeddings"]))
    found: dict[str, Any] = {ORIGINAL: original}
    tables = [file.tensors.get(name) for name in (LONG, SHORT)]
    if all(table is None for table in tables):
        return found, read
    if any(table is None for table in tables):
        raise QuantoolError(f"{file.path}: one of {LONG} and {SHORT} is missing")
    long, short = (decode(file.rows(table), table).flatten().tolist() for table in tables if table is not None)
    scaling = {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "attention_factor": number(file, "phi3.rope.scaling.attn_factor", 1.0),
        ORIGINAL: original,
    }
    return found | {"rope_scaling": scaling}, read


# --- GPT-2, GPT-NeoX, OLMo, StableLM


def thirds(rows: int, heads: int) -> torch.Tensor:
    """Order of the rows of GPT-NeoX's attention: q, k, v of each head -> all q, all k, all v."""
    return torch.arange(rows).view(heads, 3, -1).transpose(0, 1).reshape(-1)


def write_gpt2(config: Config, settings: Settings) -> dict[str, Value]:
    """An inner width of null is four times the outer."""
    return {"feed_forward_length": settings.get("feed_forward_length", 4 * settings["embedding_length"])}


def write_olmo(config: Config, settings: Settings) -> dict[str, Value]:
    """The epsilon, which no config says."""
    return {"attention.layer_norm_epsilon": OLMO_EPS}


def read_olmo(file: GgufFile, config: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Nothing but a check: transformers has one epsilon."""
    key = "attention.layer_norm_epsilon"
    if (eps := number(file, f"olmo.{key}")) != OLMO_EPS:
        raise QuantoolError(f"{file.path}: olmo.{key} is {eps}, OLMo of transformers computes {OLMO_EPS}")
    return {}, {key}


def read_stablelm(file: GgufFile, config: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """llama.cpp goes by the tensors and not by the key, which converters have set wrong for old configs."""
    flag(file, "stablelm.use_parallel_residual")
    return {
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in file.tensors,
    }, {"use_parallel_residual"}
