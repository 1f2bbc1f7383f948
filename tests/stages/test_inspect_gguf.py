"""inspect on GGUF files written by the gguf package, with blocks of the gguf package and of ggml itself."""

import ctypes
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_blocks
from safetensors.torch import load_file

from quantool.errors import CheckFailed, QuantoolError
from quantool.stages import inspect_gguf as stage
from quantool.stages.inspect import InspectResult, run

PACKAGE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
GGML = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
ROWS, COLUMNS = 6, 512
quantize_chunk = llamacpp.function(
    "ggml_quantize_chunk",
    ctypes.c_size_t,
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
)


def inspect(path: Path, **options: Any) -> InspectResult:
    return run(str(path), **options)


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32) / 50


def blocks_of(name: str, weight: np.ndarray) -> np.ndarray:
    if name not in GGML:
        return gguf_blocks(weight, Q[name])
    block, size = GGML_QUANT_SIZES[Q[name]]
    blocks = np.zeros((len(weight), weight.shape[1] // block * size), np.uint8)
    assert quantize_chunk(Q[name], weight.ctypes.data, blocks.ctypes.data, 0, *weight.shape, None) == blocks.nbytes
    return blocks


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]], *, architecture: str = "unheard-of") -> Path:
    """Blocks [rows, bytes] by tensor name, and a few keys."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("many.strings", [str(i) for i in range(1000)])
    for name, (kind, blocks) in tensors.items():
        writer.add_tensor(name, blocks, raw_dtype=Q[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {f"blk.{i}.weight": (kind, blocks_of(kind, weights())) for i, kind in enumerate(PACKAGE + GGML)}
    return write(tmp_path_factory.mktemp("gguf") / "types.gguf", tensors)


# --- what there is


def test_every_block_type(every_type: Path) -> None:
    """Of an architecture that quantool does not know: under the names of the file, with a note."""
    result = inspect(every_type, tensors=True, verify=True)
    assert [row.dtype for row in result.tensors] == list(PACKAGE + GGML)
    for i, row in enumerate(result.tensors):
        block, size = GGML_QUANT_SIZES[Q[row.dtype]]
        assert (row.name, row.shape) == (f"blk.{i}.weight", [ROWS, COLUMNS])
        assert row.bytes == ROWS * COLUMNS // block * size
        assert row.bits_per_weight == size * 8 / block
        assert result.by_dtype[row.dtype] == {"tensors": 1, "parameters": ROWS * COLUMNS, "bytes": row.bytes}
    assert result.parameters == ROWS * COLUMNS * len(PACKAGE + GGML)
    assert result.bytes == sum(row.bytes for row in result.tensors)
    assert result.bits_per_weight == result.bytes * 8 / result.parameters
    [note] = result.notes
    assert "'unheard-of' is not known" in note
    assert "names of the file" in note


def test_the_values_of_every_type(every_type: Path) -> None:
    for row in inspect(every_type, stats=True).tensors:
        values = dequantize(blocks_of(row.dtype, weights()), Q[row.dtype]).astype(np.float64)
        assert (row.min, row.max) == (values.min(), values.max())
        assert row.mean == pytest.approx(values.mean(), abs=1e-7)


def test_metadata_and_facts(every_type: Path) -> None:
    result = inspect(every_type)
    assert result.gguf is not None
    assert (result.gguf.kind, result.gguf.architecture, result.gguf.file_type) == ("model", "unheard-of", "Q4_K_M")
    assert (result.gguf.parts, result.gguf.tokenizer) == (1, {})
    assert result.metadata["general.name"] == "A model"
    assert result.metadata["some.numbers"] == "[1, 2, 3]"
    assert result.metadata["many.strings"] == "1000 values"


def test_a_model_under_hugging_face_names(tiny_gguf: Path) -> None:
    reader = gguf.GGUFReader(tiny_gguf)
    result = inspect(tiny_gguf, tensors=True)
    assert result.notes == []
    assert {row.name.partition(".")[0] for row in result.tensors} == {"model", "lm_head"}
    assert result.bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert result.gguf is not None
    assert (result.gguf.architecture, result.gguf.file_type) == ("llama", None)
    assert result.gguf.tokenizer == {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": 320,
        "merges": len(reader.fields["tokenizer.ggml.merges"].data),
        "bos": "<s>",
        "eos": "</s>",
        "chat_template": False,
    }


def test_an_importance_matrix_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "llama")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.ones((1, 64), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = inspect(tmp_path / "imatrix.gguf", tensors=True, verify=True)
    assert result.gguf is not None
    assert result.gguf.kind == "imatrix"
    assert (result.parameters, result.bits_per_weight) == (0, None)
    assert [row.name for row in result.tensors] == ["blk.0.ffn_up.weight.in_sum2", "blk.0.ffn_up.weight.counts"]


def test_a_type_that_nobody_decodes_is_listed_not_read(tmp_path: Path) -> None:
    size = GGML_QUANT_SIZES[Q.Q8_1][1]
    path = write(tmp_path / "m.gguf", {"a.weight": ("Q8_1", np.zeros((2, size), np.uint8))}, architecture="llama")
    result = inspect(path, tensors=True)
    assert [(row.dtype, row.bytes, row.shape) for row in result.tensors] == [("Q8_1", 2 * size, [2, 32])]
    assert "cannot decode Q8_1" in result.notes[0]
    for options in ({"stats": True}, {"verify": True}):
        with pytest.raises(QuantoolError, match=r"'a.weight': .* cannot decode Q8_1"):
            inspect(path, **options)


# --- errors against a reference


def test_errors_against_the_checkpoint_and_another_gguf(tiny_gguf: Path, tiny_llama: Path) -> None:
    """q and k are in another order in the file; the error is that of the blocks, by the gguf package."""
    source = load_file(tiny_llama / "model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    rows = {row.name: row for row in inspect(tiny_gguf, against=str(tiny_llama)).tensors}
    for gguf_name, name in (("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
        tensor = stored[f"blk.1.{gguf_name}.weight"]
        exact = source[f"model.layers.1.{name}.weight"].double().numpy()
        lost = dequantize(tensor.data, tensor.tensor_type).astype(np.float64) - exact
        expected = np.linalg.norm(lost) / np.linalg.norm(exact)
        assert rows[f"model.layers.1.{name}.weight"].relative_error == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert rows["model.layers.0.self_attn.q_proj.weight"].relative_error < 1e-3
    assert {row.relative_error for row in inspect(tiny_gguf, against=str(tiny_gguf)).tensors} == {0}


def test_what_has_no_hugging_face_names_compares_with_its_like(every_type: Path, tmp_path: Path) -> None:
    floats = {f"blk.{i}.weight": ("F32", weights()) for i in range(len(PACKAGE + GGML))}
    other = write(tmp_path / "f32.gguf", floats)
    rows = inspect(every_type, against=str(other)).tensors
    exact = np.linalg.norm(weights().astype(np.float64))
    for row in rows:
        lost = dequantize(blocks_of(row.dtype, weights()), Q[row.dtype]).astype(np.float64) - weights()
        assert row.relative_error == pytest.approx(np.linalg.norm(lost) / exact, rel=1e-5, abs=1e-12)
    errors = {row.dtype: row.relative_error for row in rows}
    assert errors["F32"] == 0 < errors["Q6_K"] < errors["Q5_K"] < errors["Q4_K"] < errors["Q3_K"] < errors["Q2_K"]


# --- verify


@pytest.mark.parametrize("kind", [kind for kind in PACKAGE + GGML if kind not in {"F32", "MXFP4"}])
def test_verify_finds_a_scale_that_is_not_finite(
    command: Callable[..., Any], every_type: Path, tmp_path: Path, kind: str
) -> None:
    """Every two bytes of one block in turn become a float16 infinity; some of them are a scale."""
    block, size = GGML_QUANT_SIZES[Q[kind]]
    index = (PACKAGE + GGML).index(kind)
    tensor = gguf.GGUFReader(every_type).tensors[index]
    row, column = 4, 512 // block // 2
    start = int(tensor.data_offset) + row * 512 // block * size + column * size
    infinity = struct.pack("<H", 0x7F80 if kind == "BF16" else 0x7C00)
    path = tmp_path / "bad.gguf"
    failures: dict[int, str] = {}
    for at in range(0, size - 1, 2):
        data = bytearray(every_type.read_bytes())
        data[start + at : start + at + 2] = infinity
        path.write_bytes(data)
        try:
            inspect(path, verify=True)
        except CheckFailed as error:
            failures[at] = error.message
    assert len(failures) == {"Q4_1": 2, "Q5_1": 2, "Q2_K": 2, "Q4_K": 2, "Q5_K": 2}.get(kind, 1)
    words = f"'blk.{index}.weight' ({kind}): row {row}, block {column} (of {block} weights)"
    assert all(words in message for message in failures.values())
    data = bytearray(every_type.read_bytes())
    data[start + min(failures) : start + min(failures) + 2] = infinity
    path.write_bytes(data)
    outcome = command("inspect", path, "--verify")
    assert outcome.code == 3
    assert outcome.err.startswith("error: ")
    assert command("inspect", path).code == 0


def test_verify_in_pieces(every_type: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than a piece is read in pieces of whole rows, and the row that is named counts from the first."""
    decoded: list[int] = []
    original = stage.decode

    def decode(rows: np.ndarray, tensor: Any) -> torch.Tensor:
        decoded.append(len(rows))
        return original(rows, tensor)

    monkeypatch.setattr(stage, "decode", decode)
    monkeypatch.setattr(stage, "CHUNK_ELEMENTS", 2 * COLUMNS)
    inspect(every_type, verify=True)
    assert decoded == [2, 2, 2] * len(PACKAGE + GGML)


def test_verify_finds_a_vocabulary_of_another_model(tiny_gguf: Path, tmp_path: Path) -> None:
    inspect(tiny_gguf, verify=True)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "unheard-of")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckFailed, match=r"the vocabulary has 3 tokens, 'token_embd.weight' 4 rows"):
        inspect(tmp_path / "m.gguf", verify=True)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_file_of_an_unknown_architecture(every_type: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "short.gguf").write_bytes(every_type.read_bytes()[:-cut])
    with pytest.raises(QuantoolError, match="truncated"):
        inspect(tmp_path / "short.gguf")


def test_a_known_architecture_that_contradicts_itself_is_an_error(tmp_path: Path) -> None:
    """Not one to be listed under the names of the file."""
    path = write(
        tmp_path / "m.gguf", {"token_embd.weight": ("F32", np.ones((4, 32), np.float32))}, architecture="llama"
    )
    with pytest.raises(QuantoolError, match=r"llama\.\w+"):
        inspect(path)


# --- the command line


def test_the_table(command: Callable[..., Any], tiny_gguf: Path, every_type: Path) -> None:
    out = command("inspect", tiny_gguf).out
    words = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["architecture", "llama"] in words
    tokenizer = next(rest for key, rest in (pair for pair in words if len(pair) == 2) if key == "tokenizer")
    assert tokenizer.startswith("gpt2 gpt-2, 320 tokens, ")
    assert "bos <s>, eos </s>, no chat template" in tokenizer
    out = command("inspect", every_type).out
    assert "file type        Q4_K_M" in out
    assert "note " in out
    record = json.loads(command("inspect", every_type, "--json").out)
    assert record["gguf"]["file_type"] == "Q4_K_M"
    assert math.isclose(record["by_dtype"]["IQ4_XS"]["bytes"], ROWS * COLUMNS * 4.25 / 8)
