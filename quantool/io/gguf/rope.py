"""Rotary embedding: the order of the rows of q and k, and the settings of a config.json.

Rotary embedding turns pairs of channels; a pair is (i, i + d/2) in Hugging Face and (2i, 2i + 1) in ggml's "NORM"
order, so for heads of d = 4 channels

    Hugging Face   a0 a1 b0 b1      ->      GGUF   a0 b0 a1 b1

Each order function gives, for every row of the GGUF tensor, the row of the Hugging Face tensor that goes there.
Facts: conversion/llama.py of llama.cpp, modeling_rope_utils.py of transformers 5.23.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from quantool.errors import QuantoolError
from quantool.io.gguf.fields import MOST
from quantool.io.gguf.file import short

FULL = "full_attention"


def pairs(rows: int, heads: int) -> torch.Tensor:
    """Order of the rows of q or k: halves of each head -> pairs side by side."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def real(key: str, value: Any) -> float:
    """A positive number of a config.json."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
        raise QuantoolError(f"config.json: '{key}' is {short(value)}, expected a number above 0")
    return float(value)


def rope_of(config: Mapping[str, Any], layer_type: str = FULL) -> dict[str, Any]:
    """The rotary settings of a config.json, old (rope_theta, rope_scaling) or new (rope_parameters).

    Always holds "rope_type"; "rope_theta" and "partial_rotary_factor" where the config says so anywhere.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(given, dict):
        given = given.get(layer_type, given)  # some families have parameters for each kind of layer
    if not isinstance(given, dict):
        raise QuantoolError(f"config.json: rope parameters are {short(given)}, expected an object")
    rope = {key: value for key, value in given.items() if value is not None}
    old = rope.pop("type", "default")
    rope.setdefault("rope_type", old)
    if not isinstance(rope["rope_type"], str):
        raise QuantoolError(f"config.json: rope type is {short(rope['rope_type'])}, expected a name")
    for key, other in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        value = next((config[name] for name in (key, other) if config.get(name) is not None), None)
        if value is not None:
            rope.setdefault(key, value)
        if key in rope:
            rope[key] = real(key, rope[key])
    return rope


def llama3_divisors(
    half: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> torch.Tensor:
    """Divisors float64 [half]: 1 where a frequency turns often within the original context, `factor` where rarely.

    Source: ROPE_INIT_FUNCTIONS["llama3"] of transformers; the divisor is old / new frequency.
    """
    plain = torch.pow(theta, -(torch.arange(half, dtype=torch.float64) / half))
    turns = original_max_position_embeddings / (2 * math.pi) * plain
    smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
