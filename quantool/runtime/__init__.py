"""Artifact -> runnable torch module whose linears compute from the packed weights."""

from quantool.runtime.load import Opened, load, open_model
from quantool.runtime.linear import QuantLinear

__all__ = ["Opened", "QuantLinear", "load", "open_model"]
