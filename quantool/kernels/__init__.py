"""Operators that compute from packed weights. `ops.py` holds their schemas and torch references."""
