"""Open a checkpoint for computing: float weights as they are, packed ones behind `QuantLinear`.

A quantized artifact is given the look of a checkpoint whose tensors are the buffers of `QuantLinear`, so that the
same block stream and the same names serve float models, GGUF files and every quantized format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantool.errors import QuantoolError
from quantool.formats import Format, detect
from quantool.io import Checkpoint, TensorInfo, open_checkpoint
from quantool.io.safetensors import DTYPES, dtype_name
from quantool.model.names import HEADS
from quantool.model.skeleton import Network, attach, build_model, materialise, tensors_of
from quantool.quant import QuantizedTensor
from quantool.runtime.linear import QuantLinear, packed_shapes, runtime_tensors

SCALES = ("weight_scale", "scales")


def open_model(model: str | Path, *, dtype: str = "auto", device: str = "auto") -> Network:
    """Open MODEL (float, quantized or GGUF) without reading a weight.

    Raises QuantoolError when it cannot be read, or is no decoder that transformers builds.
    """
    checkpoint = open_checkpoint(model)
    built = build_model(checkpoint)
    if (format_ := detect(checkpoint.config)) is not None:
        checkpoint = packed = PackedCheckpoint(checkpoint, format_)
        _replace_linears(built, packed)
    return attach(built, checkpoint, dtype=dtype, device=device)


def load(path: str | Path, *, dtype: str = "auto", device: str = "auto") -> Any:
    """The transformers model of `path`, ready for `model(input_ids=...)` and `generate`.

    Linears of a quantized artifact stay packed in memory. Raises QuantoolError as `open_model` does.
    """
    network = open_model(path, dtype=dtype, device=device)
    materialise(network, [name for name, _ in tensors_of(network.model)])
    return network.model


def _replace_linears(model: Any, packed: "PackedCheckpoint") -> None:
    prefix = f"{model.base_model_prefix}."
    missing = set(packed.schemes)
    for name, module in list(model.named_modules()):
        spellings = (name, name.removeprefix(prefix), *(HEADS if name in HEADS else ()))
        stored = next((n for n in spellings if n in packed.schemes), None)
        if stored is None:
            continue
        if not isinstance(module, nn.Linear):
            raise QuantoolError(f"{packed.path}: '{stored}' is quantized, but {type(module).__name__} is no linear")
        scheme = packed.schemes[stored]
        if not scheme.divides(module.in_features):
            raise QuantoolError(
                f"{packed.path}: '{stored}' has rows of {module.in_features}, which groups of {scheme.group_size} "
                "do not divide"
            )
        shapes = packed_shapes(scheme, (module.out_features, module.in_features), packed.scale_dtype(stored))
        packed.place(stored, shapes)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, QuantLinear(module, scheme, shapes))
        missing.discard(stored)
    if missing:
        raise QuantoolError(
            f"{packed.path}: {len(missing)} quantized modules are not in {type(model).__name__}, "
            f"the first is '{min(missing)}'"
        )


class PackedCheckpoint:
    """A quantized artifact seen as the buffers of `QuantLinear`: "X.qweight" instead of "X.weight_packed"."""

    def __init__(self, checkpoint: Checkpoint, format_: Format) -> None:
        self._stored, self._format = checkpoint, format_
        self.path, self.config, self.metadata = checkpoint.path, checkpoint.config, checkpoint.metadata
        self.schemes = format_.module_schemes(checkpoint.config["quantization_config"], checkpoint.infos)
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})
        packed = {name for module in self.schemes for name in self.packed_names(module)}
        self._infos = {name: info for name, info in checkpoint.infos.items() if name not in packed}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def quantized(self, module: str) -> QuantizedTensor:
        """Codes and scales of a quantized module."""
        try:
            return self._format.unpack(self._stored_tensors(module), self.schemes[module])
        except QuantoolError as error:  # a format knows the suffix only
            raise QuantoolError(f"{self.path}: module '{module}': {error.message}", hint=error.hint) from error

    def weight_shape(self, module: str) -> tuple[int, int]:
        """[N, K] of a quantized module."""
        return self._format.weight_shape(self._stored_tensors(module))

    def packed_bytes(self, module: str) -> int:
        """What the packed tensors of a module take."""
        return sum(self._stored.infos[name].nbytes for name in self.packed_names(module))

    def _stored_tensors(self, module: str) -> dict[str, torch.Tensor]:
        return {name.rpartition(".")[2]: self._stored.read(name) for name in self.packed_names(module)}

    def scale_dtype(self, module: str) -> torch.dtype:
        """What the scales of a module are stored in."""
        scale = next(name for name in self.packed_names(module) if name.rpartition(".")[2] in SCALES)
        return DTYPES[self._stored.infos[scale].dtype]

    def place(self, module: str, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Present the packed tensors of `module` as buffers of these shapes."""
        for leaf, (shape, dtype) in shapes.items():
            name = f"{module}.{leaf}"
            self._infos[name] = TensorInfo(name, shape, dtype_name(dtype), 0, self._stored.path)

    def packed_names(self, module: str) -> list[str]:
        """The stored tensors of a quantized module."""
        names = (f"{module}.{suffix}" for suffix in self._format.SUFFIXES)
        return [name for name in names if name in self._stored.infos]

    def read(self, name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        if module not in self.schemes or (name in self._stored.infos and leaf not in self._format.SUFFIXES):
            return self._stored.read(name)
        # A linear is asked for its two to four buffers in a row: unpack once.
        if self._last[0] != module:
            self._last = (module, runtime_tensors(self.quantized(module)))
        return self._last[1][leaf]

    def drop(self, name: str) -> None:
        if name in self._stored.infos:
            self._stored.drop(name)

    def write_aux(self, directory: Path) -> None:
        self._stored.write_aux(directory)
