"""Open a checkpoint for computing: float weights as they are, packed ones behind `QuantLinear`.

A quantized artifact is given the look of a checkpoint whose tensors are the buffers of `QuantLinear`, so that the
same block stream and the same names serve float models, GGUF files and every quantized format.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantool.errors import QuantoolError
from quantool.formats import Format, detect
from quantool.io import Checkpoint, TensorInfo, open_checkpoint
from quantool.io.safetensors import DTYPES, dtype_name
from quantool.kernels.ops import dequantize_levels, levels, pack_nibbles
from quantool.model.skeleton import (
    Network,
    attach,
    build_model,
    materialise,
    resolve_device,
    resolve_dtype,
    stored_names,
    tensors_of,
)
from quantool.quant import QuantizedTensor, dequantize_affine
from quantool.runtime.linear import QuantLinear, packed_shapes, runtime_tensors, takes_tiles

SCALES = ("weight_scale", "scales", "SCB")


def open_model(model: str | Path, *, dtype: str = "auto", device: str = "auto") -> Network:
    """Open MODEL (float, quantized or GGUF) without reading a weight.

    Raises QuantoolError when it cannot be read, or is no decoder that transformers builds.
    """
    checkpoint = open_checkpoint(model)
    format_ = format_of(checkpoint)
    built = build_model(checkpoint)
    if format_ is not None:
        checkpoint = packed = PackedCheckpoint(checkpoint, format_)
        where = resolve_device(device)
        _replace_linears(built, packed, where, resolve_dtype(dtype, where, packed))
    return attach(built, checkpoint, dtype=dtype, device=device)


def format_of(checkpoint: Checkpoint) -> Format | None:
    """The format of a checkpoint, None of a float one; QuantoolError for packed weights that no config describes."""
    format_ = detect(checkpoint.config)
    packed_name = next((name for name in checkpoint.infos if name.endswith(".qweight")), None)
    if format_ is None and packed_name is not None:
        raise QuantoolError(
            f"{checkpoint.path}: '{packed_name}' is a packed weight, but config.json has no quantization_config",
            hint='put what quantize_config.json holds into config.json as "quantization_config", '
            'with "quant_method": "gptq"',
        )
    return format_


def load(path: str | Path, *, dtype: str = "auto", device: str = "auto") -> Any:
    """The transformers model of `path`, ready for `model(input_ids=...)` and `generate`.

    Linears of a quantized artifact stay packed in memory. Raises QuantoolError as `open_model` does.
    """
    network = open_model(path, dtype=dtype, device=device)
    materialise(network, [name for name, _ in tensors_of(network.model)])
    return network.model


def _replace_linears(model: Any, packed: "PackedCheckpoint", device: torch.device, compute: torch.dtype) -> None:
    weights = [f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "weight")]
    found = stored_names(model, weights, {f"{module}.weight" for module in packed.schemes})
    for weight, stored_weight in found.items():
        name, stored = weight.removesuffix(".weight"), stored_weight.removesuffix(".weight")
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise QuantoolError(f"{packed.path}: '{stored}' is quantized, but {type(module).__name__} is no linear")
        shape = module.out_features, module.in_features
        _check_module(packed, stored, shape)
        scheme, scale_dtype = packed.schemes[stored], packed.scale_dtype(stored)
        tiled = takes_tiles(scheme, shape, scale_dtype, compute, device)
        shapes = packed_shapes(scheme, shape, scale_dtype, ordered=packed.ordered(stored), tiled=tiled)
        packed.place(stored, shapes, device if tiled else None)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, QuantLinear(module, scheme, shapes))
    missing = set(packed.schemes) - {stored.removesuffix(".weight") for stored in found.values()}
    if missing:
        raise QuantoolError(
            f"{packed.path}: {len(missing)} quantized modules are not in {type(model).__name__}, "
            f"the first is '{min(missing)}'"
        )


def _check_module(packed: "PackedCheckpoint", stored: str, shape: tuple[int, int]) -> None:
    """Raise QuantoolError when a module has another shape than config.json gives it, or cannot be computed."""
    scheme, found = packed.schemes[stored], packed.weight_shape(stored)
    if found != shape:
        raise QuantoolError(
            f"{packed.path}: '{stored}' holds a weight {list(found)}, config.json expects {list(shape)}",
            hint="config.json and the weights are of different models",
        )
    if not scheme.divides(shape[1]):
        raise QuantoolError(
            f"{packed.path}: '{stored}' has rows of {shape[1]}, which groups of {scheme.group_size} do not divide"
        )
    if scheme.act_bits == 8 and not scheme.sym:
        raise QuantoolError(
            f"{packed.path}: '{stored}' has asymmetric weights and {scheme.act_bits}-bit activations, "
            "which cannot be computed"
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
        self._placed: dict[str, str] = {}  # "X.qweight" -> "X"
        self._tiled: dict[str, torch.device] = {}  # "X", if its buffers are in tiles, and where they are made

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def quantized(self, module: str, device: torch.device | None = None) -> QuantizedTensor:
        """Codes and scales of a quantized module, unpacked on `device`."""
        with self._named(module):
            tensors = {suffix: tensor.to(device) for suffix, tensor in self._stored_tensors(module).items()}
            return self._format.unpack(tensors, self.schemes[module])

    def dequantized(self, module: str) -> torch.Tensor:
        """The float32 [N, K] that a runtime sees in place of a quantized module's weight."""
        q = self.quantized(module)
        if not q.scheme.flat:
            return dequantize_affine(q)
        shape = q.codes.shape[0], q.codes.shape[1]
        return dequantize_levels(pack_nibbles(q.codes), q.scales, levels(q.scheme.dtype), shape, q.scheme.group_size)

    def weight_shape(self, module: str) -> tuple[int, int]:
        """[N, K] of a quantized module."""
        with self._named(module):
            return self._format.weight_shape(self._stored_tensors(module))

    @contextmanager
    def _named(self, module: str) -> Iterator[None]:
        """Complete the message of a format, which knows the suffix only."""
        try:
            yield
        except QuantoolError as error:
            raise QuantoolError(f"{self.path}: module '{module}': {error.message}", hint=error.hint) from error

    def packed_bytes(self, module: str) -> int:
        """What the packed tensors of a module take."""
        return sum(self._stored.infos[name].nbytes for name in self.packed_names(module))

    def _stored_tensors(self, module: str) -> dict[str, torch.Tensor]:
        names = self.packed_names(module)
        return {name.removeprefix(f"{module}."): self._stored.read(name) for name in names}

    def scale_dtype(self, module: str) -> torch.dtype:
        """What the scales of a module are stored in."""
        scale = self._scale_name(module)
        return torch.float32 if scale is None else DTYPES[self._stored.infos[scale].dtype]

    def scales(self, module: str) -> tuple[str, torch.Tensor] | None:
        """Name and values of the stored scales of a module, if it has its own tensor for them."""
        name = self._scale_name(module)
        return None if name is None else (name, self._stored.read(name))

    def _scale_name(self, module: str) -> str | None:
        return next((name for name in self.packed_names(module) if name.rpartition(".")[2] in SCALES), None)

    def ordered(self, module: str) -> bool:
        """Whether the columns of a group lie apart, as GPTQ's act-order leaves them."""
        name = next((name for name in self.packed_names(module) if name.endswith("g_idx")), None)
        if name is None:
            return False
        g_idx = self._stored.read(name).view(-1)
        return bool((g_idx[1:] < g_idx[:-1]).any())

    def place(
        self, module: str, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tiled: torch.device | None = None
    ) -> None:
        """Present the packed tensors of `module` as buffers of these shapes: as tiles, made on `tiled`, or as rows."""
        if tiled is not None:
            self._tiled[module] = tiled
        for leaf, (shape, dtype) in shapes.items():
            name = f"{module}.{leaf}"
            self._infos[name] = TensorInfo(name, shape, dtype_name(dtype), 0, self._stored.path)
            self._placed[name] = module

    def packed_names(self, module: str) -> list[str]:
        """The stored tensors of a quantized module."""
        names = (f"{module}.{suffix}" for suffix in self._format.SUFFIXES)
        return [name for name in names if name in self._stored.infos]

    def read(self, name: str) -> torch.Tensor:
        module = self._placed.get(name)
        if module is None:
            return self._stored.read(name)
        # A linear is asked for its two to five buffers in a row: unpack once.
        if self._last[0] != module:
            device = self._tiled.get(module)
            self._last = (module, runtime_tensors(self.quantized(module, device), tiled=device is not None))
        return self._last[1][name.rpartition(".")[2]]

    def drop(self, name: str) -> None:
        if name in self._stored.infos:
            self._stored.drop(name)

    def write_aux(self, directory: Path) -> None:
        self._stored.write_aux(directory)
