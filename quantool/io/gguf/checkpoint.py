"""A GGUF file seen as a Hugging Face checkpoint: the same tensor names, row order and config keys."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantool.errors import QuantoolError
from quantool.io import TensorInfo
from quantool.io.gguf.file import Array, GgufFile, Tensor, check_decodable, decode
from quantool.io.gguf.keys import architecture_of, config_of, settings_of
from quantool.io.gguf.tensors import BLOCK_TENSOR, Piece, pieces, row_order
from quantool.io.gguf.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping


class GgufCheckpoint:
    """A GGUF file of a known architecture under Hugging Face names (see Checkpoint).

    `read` gives torch's own dtype where the block type is one (F32, F16, BF16), else float32. Rows that the converter
    reordered are put back, stacks of experts are matrices of their own, gains are without the 1 that was added.
    Raises QuantoolError when the file is damaged, its architecture unknown, or it says something that a config
    cannot.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.architecture = architecture_of(self.file)
        self.metadata = {key: str(value) for key, value in self.file.fields.items() if not isinstance(value, Array)}
        check_decodable(path, {tensor.dtype: tensor.name for tensor in self.file.tensors.values()})
        shapes = [(tensor.name, tensor.shape) for tensor in self.file.tensors.values()]
        try:
            self._pieces = dict(pieces(self.architecture, shapes))
        except ValueError as error:
            raise QuantoolError(f"{path}: {error}") from error
        self.infos: Mapping[str, TensorInfo] = {name: self._info(name, piece) for name, piece in self._pieces.items()}
        self.config: Mapping[str, Any] = config_of(self.file, self.infos)
        self._put_rows_back()

    def read(self, name: str) -> torch.Tensor:
        """The tensor in torch order; a view of the mapping unless its rows are reordered or decoded."""
        if name not in self._pieces:
            raise QuantoolError(f"{self.path}: there is no tensor {name!r}")
        piece = self._pieces[name]
        tensor, rows = self._stored(piece)
        found = decode(rows, tensor)
        if piece.rows is not None and len(tensor.shape) == 1:
            found = found[piece.rows]
        if piece.add:
            found = found.float() - piece.add
        return found.t().contiguous() if piece.transposed else found.reshape(piece.shape)

    def blocks(self, name: str) -> tuple[str, torch.Tensor]:
        """The stored type and bytes uint8 [N, bytes per row] of a matrix, in the row order of Hugging Face.

        [N, K] also where Hugging Face stores [K, N]; one row for a vector.
        """
        tensor, rows = self._stored(self._pieces[name])
        return tensor.dtype, torch.from_numpy(rows)

    def drop(self, name: str) -> None:
        self.file.drop(self._tensor(self._pieces[name]))

    def write_aux(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, rebuilt from the metadata."""
        write_tokenizer(self.file, directory)

    def _info(self, name: str, piece: Piece) -> TensorInfo:
        tensor = self._tensor(piece)
        return TensorInfo(name, piece.shape, tensor.dtype, tensor.nbytes, tensor.path)

    def _tensor(self, piece: Piece) -> Tensor:
        """Where a piece is stored: the part of its own of a stack."""
        tensor = self.file.tensors[piece.stored]
        if piece.part is None:
            return tensor
        nbytes = tensor.nbytes // tensor.shape[0]
        return replace(tensor, shape=piece.shape, start=tensor.start + piece.part * nbytes, nbytes=nbytes)

    def _stored(self, piece: Piece) -> tuple[Tensor, Any]:
        """The stored tensor of a piece, and its bytes [rows, bytes per row] with the rows of a matrix put back.

        Rows are decoded independently, so reordering their bytes is enough.
        """
        tensor = self._tensor(piece)
        rows = self.file.rows(tensor)
        return tensor, rows if piece.rows is None or len(tensor.shape) == 1 else rows[piece.rows.numpy()]

    def _put_rows_back(self) -> None:
        """Give each piece whose rows the converter reordered the order that undoes it."""
        settings = settings_of(self.architecture, self.config)
        for name, piece in self._pieces.items():
            match = BLOCK_TENSOR.fullmatch(piece.stored)
            if match and match["stem"] in self.architecture.orders:
                tensor = self.file.tensors[piece.stored]
                where = f"{self.path}: tensor {tensor.name!r}: shape {list(tensor.shape)}"
                dimensions = 2 if match["leaf"] == "weight" else 1
                rows = row_order(
                    self.architecture, settings, match["stem"], tensor.shape, dimensions=dimensions, where=where
                )
                self._pieces[name] = replace(piece, rows=rows.argsort())
