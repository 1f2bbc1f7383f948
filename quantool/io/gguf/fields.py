"""Single values of a file's metadata, checked."""

from typing import Any

import numpy as np

from quantool.errors import QuantoolError
from quantool.io.gguf.file import Array, GgufFile, short

MOST = 1e38  # below the largest float32


def number(file: GgufFile, key: str, default: float | None = None) -> float:
    """A number from the metadata; float32 values become the decimal they were written as (1e-05).

    An array of one repeated number is that number: some files give a value per block.
    Raises QuantoolError when it is missing and has no default, negative, or no number.
    """
    value = file.fields.get(key, default)
    if isinstance(value, Array):
        value = _repeated(file, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MOST:
        found = "is missing" if value is None else f"is {short(value)}"
        raise QuantoolError(f"{file.path}: {key} {found}, expected a number")
    return float(str(np.float32(value))) if isinstance(value, float) else int(value)


def flag(file: GgufFile, key: str, default: bool = False) -> bool:
    """A boolean from the metadata."""
    value = file.fields.get(key, default)
    if not isinstance(value, bool):
        raise QuantoolError(f"{file.path}: {key} is {short(value)}, expected true or false")
    return value


def _repeated(file: GgufFile, key: str) -> Any:
    values = file.values(key)
    if len(set(values)) != 1:
        raise QuantoolError(f"{file.path}: {key} differs from block to block, which is not supported")
    return values[0]
