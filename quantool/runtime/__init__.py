"""Artifact -> runnable torch module whose linears compute from the packed weights."""

from quantool.runtime.linear import QuantLinear
from quantool.runtime.load import PackedCheckpoint, load, open_model

__all__ = ["PackedCheckpoint", "QuantLinear", "load", "open_model"]
