"""What inspect says of a GGUF file beside its tensors: what it is, its mix and tokenizer, and whether it is whole.

A model of an architecture that quantool knows is listed under Hugging Face names. Everything else that is GGUF (another
architecture, an importance matrix, an adapter) is listed under the file's own names, and a note says why.

`verify` decodes every block: a block whose scale is NaN or Inf decodes to NaN or Inf, whatever its codes, because a
code of 0 times Inf is NaN. That sizes and offsets fit the file was checked when it was opened.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantool.data import Progress
from quantool.errors import CheckFailed, QuantoolError
from quantool.io import Checkpoint, TensorInfo
from quantool.io.gguf import GgufCheckpoint
from quantool.io.gguf.file import CHUNK_ELEMENTS, Array, GgufFile, Tensor, check_decodable, decode
from quantool.io.gguf.keys import architecture_of
from quantool.model.views import as_linears

SHOWN = 8  # values of a metadata array that are shown
TOKEN_IDS = ("bos", "eos", "eot", "unknown", "padding")
FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """`kind` is what the file is ("model", "imatrix", "adapter"); `file_type` the mix it says it is, "Q4_K_M".

    `tokenizer` holds what there is of model, pre, tokens, merges, bos, eos, eot, unknown, padding (the tokens
    themselves), add_bos_token, add_eos_token, add_space_prefix, chat_template.
    """

    kind: str
    architecture: str | None
    file_type: str | None
    parts: int
    tokenizer: dict[str, str | int | bool]


class GgufTensors:
    """The tensors of a GGUF file: under Hugging Face names where `checkpoint` gives them, else under their own."""

    def __init__(self, file: GgufFile, checkpoint: GgufCheckpoint | None, *, linears: bool) -> None:
        self.file, self.path = file, file.path
        self._own = dict(file.tensors)
        self._checkpoint: Checkpoint | None = as_linears(checkpoint) if checkpoint and linears else checkpoint
        infos: dict[str, TensorInfo] = {}
        if checkpoint is not None and self._checkpoint is not None:
            infos |= self._checkpoint.infos
            # What the converter computed from the config is in no checkpoint, but in the file.
            self._own = {n: t for n, t in self._own.items() if n in checkpoint.architecture.generated_names}
        own = {n: TensorInfo(n, t.shape, t.dtype, t.nbytes, t.path) for n, t in self._own.items()}
        self.infos = infos | own

    def read(self, name: str) -> torch.Tensor:
        tensor = self._own.get(name)
        if tensor is None and self._checkpoint is not None:
            return self._checkpoint.read(name)
        if tensor is None:
            raise QuantoolError(f"{self.path}: there is no tensor {name!r}")
        check_decodable(self.path, {tensor.dtype: name})
        return decode(self.file.rows(tensor), tensor)


def open_gguf(path: Path, *, linears: bool) -> tuple[GgufTensors, dict[str, str], list[str]]:
    """Tensors, metadata as text, and notes. Raises QuantoolError when the file is damaged or contradicts itself."""
    notes = []
    checkpoint: GgufCheckpoint | None
    try:
        checkpoint = GgufCheckpoint(path)
        file = checkpoint.file
    except QuantoolError:
        checkpoint, file = None, GgufFile(path)
        note = _why_own_names(file)
        if note is None:
            raise
        notes.append(note)
    return GgufTensors(file, checkpoint, linears=linears), _metadata(file), notes


def _why_own_names(file: GgufFile) -> str | None:
    """Why an intact file is no checkpoint; None when it should be one."""
    kind = _kind(file)
    if kind != "model":
        return f"this is no model, its general.type is {kind!r}: tensors have the names of the file"
    try:
        architecture_of(file)
        check_decodable(file.path, {tensor.dtype: tensor.name for tensor in file.tensors.values()})
    except QuantoolError as error:
        return f"{error.message.removeprefix(f'{file.path}: ')}: tensors have the names of the file"
    return None


def facts_of(file: GgufFile) -> GgufFacts:
    """What the metadata says in the first place; a value of the wrong type is shown as it is."""
    architecture, stored = file.fields.get("general.architecture"), file.fields.get("general.file_type")
    parts = {tensor.path for tensor in file.tensors.values()}
    return GgufFacts(
        kind=_kind(file),
        architecture=None if architecture is None else str(architecture),
        file_type=None if stored is None else _file_type(stored),
        parts=max(1, len(parts)),
        tokenizer=_tokenizer(file),
    )


def _kind(file: GgufFile) -> str:
    return str(file.fields.get("general.type", "model"))


def _file_type(value: Any) -> str:
    from gguf.constants import LlamaFileType

    try:
        return LlamaFileType(value).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return str(value)


def _tokenizer(file: GgufFile) -> dict[str, str | int | bool]:
    fields, prefix = file.fields, "tokenizer.ggml."
    found: dict[str, str | int | bool] = {}
    for key in ("model", "pre"):
        if f"{prefix}{key}" in fields:
            found[key] = str(fields[f"{prefix}{key}"])
    for key in ("tokens", "merges"):
        array = fields.get(f"{prefix}{key}")
        if isinstance(array, Array):
            found[key] = array.count
    tokens = file.values(f"{prefix}tokens") if "tokens" in found else []
    for key in TOKEN_IDS:
        index = fields.get(f"{prefix}{key}_token_id")
        if type(index) is int:
            found[key] = str(tokens[index]) if 0 <= index < len(tokens) else f"{index}, which is no token"
    found |= {key: value for key in FLAGS if isinstance(value := fields.get(f"{prefix}{key}"), bool)}
    if "tokens" in found:
        found["chat_template"] = "tokenizer.chat_template" in fields
    return found


def _metadata(file: GgufFile) -> dict[str, str]:
    return {key: _shown(file, key, value) for key, value in file.fields.items()}


def _shown(file: GgufFile, key: str, value: Any) -> str:
    if not isinstance(value, Array):
        return str(value)
    return str(file.values(key)) if value.count <= SHOWN else f"{value.count} values"


def verify(file: GgufFile, progress: Progress) -> None:
    """Raise CheckFailed naming the first block that is not finite, or a vocabulary without embeddings."""
    embedding, tokens = file.tensors.get("token_embd.weight"), file.fields.get("tokenizer.ggml.tokens")
    if embedding is not None and isinstance(tokens, Array) and tokens.count != embedding.shape[0]:
        raise CheckFailed(
            f"{file.path}: the vocabulary has {tokens.count} tokens, 'token_embd.weight' {embedding.shape[0]} rows"
        )
    for i, tensor in enumerate(file.tensors.values()):
        check_decodable(file.path, {tensor.dtype: tensor.name})
        _verify_tensor(file, tensor)
        file.drop(tensor)
        progress(i + 1, len(file.tensors), "verifying")


def _verify_tensor(file: GgufFile, tensor: Tensor) -> None:
    """In pieces of whole rows, so that no tensor is decoded at once."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if not tensor.nbytes:
        return
    columns, block = tensor.shape[-1], GGML_QUANT_SIZES[GGMLQuantizationType[tensor.dtype]][0]
    rows = file.rows(replace(tensor, shape=(torch.Size(tensor.shape[:-1]).numel(), columns)))
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, len(rows), step):
        piece = rows[first : first + step]
        values = decode(piece, replace(tensor, shape=(len(piece), columns)))
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            row, column = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise CheckFailed(
                f"{file.path}: tensor '{tensor.name}' ({tensor.dtype}): row {first + row}, block {column // block} "
                f"(of {block} weights) holds NaN or Inf, expected finite values"
            )
