"""Bytes <-> named tensors; knows nothing of quantization.

`open_checkpoint` turns what a user calls MODEL (a Hugging Face directory, a hub name, a `.gguf` file) into a
`Checkpoint`: a config and named tensors that are mapped, not copied, until one is read.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from quantool.errors import QuantoolError, one_line

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
HUB_DUPLICATES = ["original/*", "onnx/*", "consolidated*"]  # the same weights in another layout
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOAT_NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. `dtype` is the file's own word ("BF16", "I32", "Q4_K"); `shape` is torch order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    path: Path


class Checkpoint(Protocol):
    """Something with named tensors and a config: a safetensors directory or a GGUF file."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json as a dict; for GGUF the same keys, rebuilt from its metadata."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's own metadata: `__metadata__` of safetensors, the scalar keys of GGUF."""
        ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor: a view of the mapped file where the stored dtype is torch's, else float32 dequantized."""
        ...

    def drop(self, name: str) -> None:
        """Forget the resident pages of a tensor that has been used; it can be read again."""
        ...

    def write_aux(self, directory: Path) -> None:
        """Write generation_config.json and every tokenizer file into `directory` (config.json is not among them)."""
        ...


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open MODEL: a Hugging Face directory, a `.gguf` file, or a hub name "org/name".

    Raises QuantoolError when there is no such model or its files are incomplete or inconsistent.
    """
    from quantool.io.gguf import GgufCheckpoint
    from quantool.io.safetensors import SafetensorsCheckpoint, pickle_error

    path = Path(model).expanduser()
    if os.path.isdir(path):
        return SafetensorsCheckpoint(path)
    if not os.path.lexists(path):
        return SafetensorsCheckpoint(_download(str(model)))
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        raise pickle_error(path, path.parent)
    hint = f"give the directory: '{path.parent}'" if path.suffix == ".safetensors" else "give one of these as MODEL"
    raise QuantoolError(f"{path}: is not a model, expected a directory, a .gguf file or a hub name", hint=hint)


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype the model computes in: that of most of its stored float matrices, else the config's, else bfloat16.

    Of most, not of the first: one float32 router in a bfloat16 model is stored first. A GGUF says it in its rebuilt
    config, because a block type is no dtype; so does a quantized artifact whose embeddings are quantized too.
    """
    config = checkpoint.config
    sizes: Counter[str] = Counter()
    if not checkpoint.path.is_file():
        for info in checkpoint.infos.values():
            if len(info.shape) >= 2 and info.dtype in FLOAT_NAMES and "scale" not in info.name.rpartition(".")[2]:
                sizes[info.dtype] += math.prod(info.shape)
    if sizes:
        return FLOAT_NAMES[sizes.most_common(1)[0][0]]
    return FLOATS.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)


def _download(name: str) -> Path:
    """The local snapshot of a hub name; a name that is rather a mistyped path is an error here."""
    first = name.partition("/")[0]
    if not HUB_NAME.fullmatch(name) or name.endswith((".gguf", ".safetensors")) or os.path.lexists(first):
        raise QuantoolError(
            f"{name}: no such file or directory", hint="give a directory, a .gguf file or a hub name like org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_DUPLICATES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = one_line(error)
        raise QuantoolError(
            f"{name}: no such directory, and the hub did not give it: {reason}",
            hint="give a local directory; with HF_HUB_OFFLINE=1 only the local cache is used",
        ) from error
