"""A checkpoint as a GGUF file, for tests that do not go through `convert-gguf`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from quantool.io import Checkpoint
from quantool.io.gguf.architectures import find_architecture
from quantool.io.gguf.keys import metadata_of
from quantool.io.gguf.tensors import Target, targets
from quantool.io.gguf.writer import GgufWriter, PlannedGguf
from quantool.model.views import LinearsCheckpoint, as_linears


def assembled(target: Target, checkpoint: LinearsCheckpoint) -> torch.Tensor:
    """What is written for a target, in float32."""
    if target.value is not None:
        return target.value
    parts = [checkpoint.read(name).float() for name in target.sources]
    parts = [part if target.rows is None else part[target.rows] for part in parts]
    data = (parts[0] if len(parts) == 1 else torch.stack(parts)).reshape(target.shape)
    return (data + target.add if target.add else data).contiguous()


def write_gguf(
    path: Path, checkpoint: Checkpoint, *, kinds: Mapping[str, str] | None = None, **metadata: Any
) -> dict[str, str]:
    """Write a float checkpoint in float32, tensors in `kinds` in the block type given there by the gguf package.

    `metadata` is added, None takes a key out. Gives what was dropped.
    """
    linears, types = as_linears(checkpoint), kinds or {}
    architecture = find_architecture(linears.config)
    wanted, dropped = targets(architecture, linears.infos, linears.config)
    values = {**metadata_of(architecture, linears.config, linears.infos), **metadata}
    plan = [PlannedGguf(target.name, types.get(target.name, "F32"), target.shape) for target in wanted]
    present = {key: value for key, value in values.items() if value is not None}
    with GgufWriter(path, plan, metadata=present, overwrite=True) as writer:
        for target in wanted:
            data = assembled(target, linears)
            if target.name in types:
                blocks = quantize(data.numpy(), GGMLQuantizationType[types[target.name]])
                data = torch.from_numpy(blocks.reshape(-1, blocks.shape[-1]))
            writer.write(target.name, data)
        writer.commit()
    return dropped
