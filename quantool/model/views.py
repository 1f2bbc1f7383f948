"""A checkpoint in which every linear is a matrix [N, K] of its own, however it is stored.

    stored                                     presented as
    h.0.attn.c_attn.weight      [K, N]         the same name                      [N, K]   Conv1D of GPT and GPT-2
    X.experts.gate_up_proj      [E, 2I, K]     X.experts.3.gate_proj.weight       [I, K]   rows 0 to I of slice 3
                                               X.experts.3.up_proj.weight         [I, K]   rows I to 2I
    X.experts.down_proj         [E, N, I]      X.experts.3.down_proj.weight       [N, I]   slice 3

All other tensors are as they are stored. What is only copied is written as stored: `parts` says which matrices a
stored tensor holds, and `assemble` puts changed ones together again. Quantized tensors of an artifact are left alone:
their codes are [N, K] already, also where the float weight was not.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantool.io import FLOAT_NAMES, Checkpoint, TensorInfo
from quantool.model.experts import DOWN, GATE_UP, PARTS, fused_shapes

TRANSPOSED = frozenset({"gpt2", "openai-gpt"})  # model types whose blocks are made of Conv1D
IN_BLOCK = re.compile(r"(^|\.)\d+\..+\.weight$")
FUSED = re.compile(rf"(?P<owner>(^|.+\.)experts)\.(?P<leaf>{GATE_UP}|{DOWN})$")


@dataclass(frozen=True, slots=True)
class _View:
    """Where a matrix lies: `rows` from `first` on of slice `expert` of a fused tensor; expert None: all, transposed."""

    stored: str
    expert: int | None = None
    first: int = 0
    rows: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix [N, K] in the stored tensor."""
        if self.expert is None:
            return tensor.t().contiguous()
        return tensor[self.expert, self.first : self.first + self.rows]


class LinearsCheckpoint:
    """`stored` with every linear as a matrix [N, K] of its own (see Checkpoint)."""

    def __init__(self, stored: Checkpoint) -> None:
        self.stored = stored
        self.path, self.config, self.metadata = stored.path, stored.config, stored.metadata
        self.infos: dict[str, TensorInfo] = {}
        self.parts: dict[str, tuple[str, ...]] = {}  # stored name -> names here
        self._views: dict[str, _View] = {}
        for name, info in stored.infos.items():
            found = _infos(stored, info) or {name: (info, None)}
            self.parts[name] = tuple(found)
            self.infos |= {part: entry for part, (entry, _) in found.items()}
            self._views |= {part: view for part, (_, view) in found.items() if view}

    @property
    def transposed(self) -> bool:
        """Whether linears are stored as Conv1D, which stays [K, N] in transformers where it is not quantized."""
        return any(view.expert is None for view in self._views.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor; a transposed one is a copy, a slice of a fused one a view."""
        view = self._views.get(name)
        return self.stored.read(name) if view is None else view.of(self.stored.read(view.stored))

    def drop(self, name: str) -> None:
        self.stored.drop(self._views[name].stored if name in self._views else name)

    def write_aux(self, directory: Path) -> None:
        self.stored.write_aux(directory)

    def assemble(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The stored tensor `name` from all its parts: the inverse of reading them."""
        first = self.parts[name][0]
        if first not in self._views:
            return tensors[first]
        if self._views[first].expert is None:
            return tensors[first].t().contiguous()
        return torch.cat([tensors[part] for part in self.parts[name]]).view(self.stored.infos[name].shape)


def as_linears(checkpoint: Checkpoint) -> LinearsCheckpoint:
    """`checkpoint` with every linear as a matrix [N, K] of its own; of one that is so already, itself."""
    return checkpoint if isinstance(checkpoint, LinearsCheckpoint) else LinearsCheckpoint(checkpoint)


def _infos(checkpoint: Checkpoint, info: TensorInfo) -> dict[str, tuple[TensorInfo, _View | None]] | None:
    """The matrices that a stored tensor holds, when it is not one of its own."""
    # Of a GGUF file every tensor is a float one as it is read; elsewhere another dtype is that of packed codes.
    if info.dtype not in FLOAT_NAMES and not checkpoint.path.is_file():
        return None
    if len(info.shape) == 2 and _is_transposed(checkpoint.config, info.name):
        return {info.name: (replace(info, shape=info.shape[::-1]), _View(info.name))}
    match = FUSED.match(info.name)
    shapes = [getattr(checkpoint.infos.get(f"{match['owner']}.{leaf}"), "shape", ()) for leaf in PARTS] if match else []
    if match is None or not fused_shapes(shapes[0], shapes[1]):
        return None
    leaves = PARTS[match["leaf"]]
    count, rows, columns = info.shape[0], info.shape[1] // len(leaves), info.shape[2]
    nbytes = info.nbytes // math.prod((count, len(leaves)))
    return {
        name: (replace(info, name=name, shape=(rows, columns), nbytes=nbytes), view)
        for expert in range(count)
        for i, leaf in enumerate(leaves)
        for name in [f"{match['owner']}.{expert}.{leaf}.weight"]
        for view in [_View(info.name, expert, i * rows, rows)]
    }


def _is_transposed(config: Mapping[str, Any], name: str) -> bool:
    return config.get("model_type") in TRANSPOSED and IN_BLOCK.search(name) is not None
