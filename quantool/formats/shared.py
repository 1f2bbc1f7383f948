"""What the formats share: stored tensors checked against a config before any is read, and a transpose."""

from collections.abc import Mapping

import torch

from quantool.errors import QuantoolError
from quantool.io import TensorInfo

FLOATS = ("F32", "F16", "BF16")
FLOAT_CHECKPOINT = "use the float checkpoint that it was made from"
EXPORT_AGAIN = "the config and the tensors disagree: download or export the checkpoint again"


def expect(infos: Mapping[str, TensorInfo], name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
    """Raise QuantoolError unless tensor `name` exists with one of `dtypes` and, when any is given, one of `shapes`."""
    info = infos.get(name)
    if info is None:
        raise QuantoolError(f"tensor '{name}' is missing, the other tensors of its module are there", hint=EXPORT_AGAIN)
    if info.dtype in dtypes and (not shapes or info.shape in shapes):
        return
    wanted = " or ".join(dtypes)
    if shapes:
        wanted = f"{' or '.join(str(list(shape)) for shape in shapes)} {wanted}"
    raise QuantoolError(
        f"{info.path.name}: tensor '{name}': expected {wanted}, found {list(info.shape)} {info.dtype}",
        hint=EXPORT_AGAIN,
    )


def expect_matrix(info: TensorInfo, dtype: str) -> tuple[int, int]:
    """Shape of a tensor that must be two-dimensional and not empty; raises QuantoolError."""
    if info.dtype == dtype and len(info.shape) == 2 and 0 not in info.shape:
        return info.shape[0], info.shape[1]
    raise QuantoolError(
        f"{info.path.name}: tensor '{info.name}': expected a matrix of {dtype}, found {list(info.shape)} {info.dtype}",
        hint=EXPORT_AGAIN,
    )


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose in memory of its own. `contiguous()` alone keeps odd strides of length-1 dimensions.

    Such strides would stop a later view as bytes.
    """
    rows, columns = matrix.shape
    return matrix.t().reshape(-1).view(columns, rows)
