import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import llamacpp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError, UsageError
from quantool.io.imatrix import Imatrix, Importance, imatrix_bytes, read_imatrix, write_imatrix

DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
Edit = Callable[[gguf.GGUFWriter], None]


def make(path: Path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray], edit: Edit | None = None) -> Path:
    """An imatrix as llama-imatrix lays it out (2026), with the sums and statistics that llama-quantize ignores."""
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()  # general.architecture is not in it
    writer.add_type("imatrix")
    if edit is None:
        writer.add_array("imatrix.datasets", ["c4.txt", "wiki.txt"])
        writer.add_uint32("imatrix.chunk_count", 3)
        writer.add_uint32("imatrix.chunk_size", 512)
    else:
        edit(writer)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values)
        if name in counts:
            writer.add_tensor(f"{name}.counts", counts[name])
        writer.add_tensor(f"{name}.in_sum", values)
        writer.add_tensor(f"{name}.stats", np.full(12, np.nan, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat(entries: list[tuple[bytes, int, list[float]]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        data += np.asarray(values, "<f4").tobytes()
    return data + tail


TAIL = struct.pack("<ii", 7, 6) + b"c4.txt"


def test_gguf_form_gives_means(tmp_path: Path) -> None:
    sums = np.asarray([[1, 2, 3, 4], [5, 6, 7, 9], [0, 0, 0, 0]], np.float32)
    counts = np.asarray([[4], [3], [0]], np.float32)
    dense = np.asarray([[0.5, 1.5]], np.float32)
    path = make(tmp_path / "i.gguf", {EXPERTS: sums, DENSE: dense}, {EXPERTS: counts, DENSE: np.ones((1, 1), "f4")})
    imatrix = read_imatrix(path)
    assert (imatrix.dataset, imatrix.chunks, imatrix.chunk_size) == ("c4.txt", 3, 512)
    assert list(imatrix.entries) == [EXPERTS, DENSE]
    experts = imatrix.entries[EXPERTS]
    assert experts.counts.tolist() == [4, 3, 0]
    assert experts.values.dtype == torch.float32
    assert torch.equal(experts.values[:2], torch.from_numpy(sums[:2] / counts[:2]))
    assert experts.values[2].tolist() == [1, 1, 1, 1]  # what llama-quantize takes for an expert without a token
    assert imatrix.entries[DENSE].values.tolist() == [[0.5, 1.5]]
    assert imatrix.entries[DENSE].counts.tolist() == [1]


def test_vectors_are_one_row(tmp_path: Path) -> None:
    """llama.cpp counts elements and does not look at the shape."""
    path = make(tmp_path / "i.gguf", {EXPERTS: np.arange(6, dtype="f4")}, {EXPERTS: np.asarray([1, 2], "f4")})
    assert read_imatrix(path).entries[EXPERTS].values.tolist() == [[0, 1, 2], [1.5, 2, 2.5]]


def test_legacy_form(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    entries = [(DENSE.encode(), 4, [4.0, 8.0, 1.0]), (b"output.weight", 0, [0.25])]
    path.write_bytes(dat(entries, TAIL))
    imatrix = read_imatrix(path)
    assert (imatrix.dataset, imatrix.chunks) == ("c4.txt", 7)
    assert imatrix.entries[DENSE].values.tolist() == [[1.0, 2.0, 0.25]]
    assert imatrix.entries[DENSE].counts.tolist() == [4]
    assert imatrix.entries["output.weight"].values.tolist() == [[0.25]]  # llama.cpp divides by no count of 0
    for tail, chunks in ((b"", 0), (TAIL[:4], 7)):
        path.write_bytes(dat(entries, tail))
        assert (read_imatrix(path).chunks, read_imatrix(path).dataset) == (chunks, "")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 1 << 24), st.integers(0, 99))
def test_what_is_written_is_read(tmp_path: Path, experts: int, columns: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(experts, columns, generator=generator) ** 8 * 100
    counts = torch.randint(1, 1 << 20, (experts,), generator=generator)
    values[0], counts[0] = (values[0], count) if count else (torch.ones(columns), 0)
    path = tmp_path / "i.gguf"
    written = Imatrix({EXPERTS: Importance(values, counts)}, "text", 9, 256)
    size = write_imatrix(path, written, overwrite=True)
    imatrix = read_imatrix(path)
    assert path.stat().st_size == size == imatrix_bytes(written)
    assert (imatrix.dataset, imatrix.chunks, imatrix.chunk_size) == ("text", 9, 256)
    found = imatrix.entries[EXPERTS]
    assert torch.equal(found.counts, counts)
    torch.testing.assert_close(found.values, values, rtol=3e-7, atol=1e-30)


def test_llama_cpp_reads_what_is_written(tmp_path: Path) -> None:
    """By ggml's own reader: the keys and types that common/imatrix-loader.cpp asks for, and its sums."""
    path = tmp_path / "i.gguf"
    entries = {
        EXPERTS: Importance(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]), torch.tensor([8, 0])),
        DENSE: Importance(torch.tensor([[0.5, 0.25]]), torch.tensor([1024])),
    }
    write_imatrix(path, Imatrix(entries, "c4.utf8", 2), overwrite=False)
    pointer, text, number, key = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_int64
    struct_ = type("InitParams", (ctypes.Structure,), {"_fields_": [("no_alloc", ctypes.c_bool), ("ctx", pointer)]})
    context = llamacpp.function("gguf_init_from_file", pointer, text, struct_)(str(path).encode(), struct_(True, None))
    find = llamacpp.function("gguf_find_key", key, pointer, text)
    value = llamacpp.function("gguf_get_val_u32", number, pointer, key)
    string = llamacpp.function("gguf_get_val_str", text, pointer, key)
    count = llamacpp.function("gguf_get_arr_n", ctypes.c_size_t, pointer, key)
    item = llamacpp.function("gguf_get_arr_str", text, pointer, key, ctypes.c_size_t)
    assert string(context, find(context, b"general.type")) == b"imatrix"
    assert value(context, find(context, b"imatrix.chunk_count")) == 2
    assert value(context, find(context, b"imatrix.chunk_size")) == 512
    datasets = find(context, b"imatrix.datasets")
    assert [item(context, datasets, i) for i in range(count(context, datasets))] == [b"c4.utf8"]
    llamacpp.function("gguf_free", None, pointer)(context)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(tensors) == [f"{name}.{part}" for name in (DENSE, EXPERTS) for part in ("in_sum2", "counts")]
    assert tensors[f"{EXPERTS}.in_sum2"].shape.tolist() == [3, 2]
    assert tensors[f"{EXPERTS}.counts"].shape.tolist() == [1, 2]
    assert tensors[f"{EXPERTS}.in_sum2"].data.tolist() == [[8, 16, 24], [0, 0, 0]]
    assert tensors[f"{EXPERTS}.counts"].data.tolist() == [[8], [0]]
    assert tensors[f"{DENSE}.in_sum2"].data.tolist() == [[512, 256]]


def test_existing_files_are_kept(tmp_path: Path) -> None:
    imatrix = Imatrix({DENSE: Importance(torch.ones(1, 2), torch.ones(1).long())}, "", 0)
    write_imatrix(tmp_path / "i.gguf", imatrix, overwrite=False)
    with pytest.raises(UsageError, match="already exists"):
        write_imatrix(tmp_path / "i.gguf", imatrix, overwrite=False)
    for value in (float("nan"), -1.0):
        entry = Importance(torch.tensor([[value, 1.0]]), torch.tensor([1]))
        with pytest.raises(QuantoolError, match=f"has the value {value}"):
            write_imatrix(tmp_path / "j.gguf", Imatrix({DENSE: entry}, "", 0), overwrite=False)
    with pytest.raises(QuantoolError, match="the name is too long"):
        write_imatrix(tmp_path / "j.gguf", Imatrix({"w" * 56: imatrix.entries[DENSE]}, "", 0), overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def refuses(path: Path) -> str:
    with pytest.raises(QuantoolError) as caught:
        read_imatrix(path)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 600
    return caught.value.message


ONE = np.ones((1, 1), np.float32)
BAD_GGUF: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray], Edit | None, str]] = {
    "nan": ({"w": ONE * np.nan}, {"w": ONE}, None, "'w' has the value nan, expected 0 or more"),
    "infinite": ({"w": ONE * np.inf}, {"w": ONE}, None, "'w' has the value inf"),
    "negative": ({"w": -ONE}, {"w": ONE}, None, "'w' has the value -1.0"),
    "negative count": ({"w": ONE}, {"w": -ONE}, None, "'w' has the count -1.0"),
    "huge count": ({"w": ONE}, {"w": ONE * 1e30}, None, "'w' has the count 1.0000000150474662e+30"),
    "no counts": ({"w": ONE}, {}, None, "'w' has only one of .in_sum2 and .counts"),
    "ragged": ({"w": np.ones((1, 5), "f4")}, {"w": np.ones((2, 1), "f4")}, None, "5 sums do not divide by 2 counts"),
    "type": ({"w": np.ones((1, 2), "f2")}, {"w": ONE}, None, "tensor 'w.in_sum2' is F16, expected F32"),
    "empty": ({}, {}, None, "is a GGUF file without '*.in_sum2', so it is no imatrix"),
    "chunks": ({"w": ONE}, {"w": ONE}, lambda w: w.add_string("imatrix.chunk_count", "3"), "chunk_count is '3'"),
    "negative chunks": ({"w": ONE}, {"w": ONE}, lambda w: w.add_int32("imatrix.chunk_size", -1), "chunk_size is -1"),
    "datasets": ({"w": ONE}, {"w": ONE}, lambda w: w.add_string("imatrix.datasets", "a"), "expected an array"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf_is_one_line(tmp_path: Path, case: str) -> None:
    sums, counts, edit, message = BAD_GGUF[case]
    assert message in refuses(make(tmp_path / "i.gguf", sums, counts, edit))


ENTRY = (b"w", 1, [1.0, 2.0])
BAD_DAT = {
    "short": (b"", "has 0 bytes"),
    "text": (b"#!/bin/sh\necho imatrix\n", "entries are announced in 23 bytes"),
    "no entries": (dat([]) + bytes(16), "0 entries are announced"),
    "negative entries": (struct.pack("<i", -1) + bytes(16), "-1 entries"),
    "too many entries": (struct.pack("<i", 1 << 30) + dat([ENTRY]), "1073741824 entries are announced"),
    "name beyond the end": (struct.pack("<ii", 1, 1 << 30) + bytes(16), "1073741824 bytes are expected at byte 8"),
    "negative name": (struct.pack("<ii", 1, -1) + bytes(16), "-1 bytes are expected at byte 8"),
    "no name": (dat([(b"", 1, [1.0])]), "the entry '' has 1 calls"),
    "long name": (dat([(b"n" * 99, 1, [1.0])]), "the entry 'nnn"),
    "not utf-8": (dat([(b"\xff\xfe", 1, [1.0])]), "can't decode byte 0xff"),
    "no values": (dat([(b"wwwwwww", 1, [])]), "the entry 'wwwwwww' has 1 calls and 0 values"),
    "negative calls": (dat([(b"w", -1, [1.0])]), "has -1 calls"),
    "values beyond the end": (dat([ENTRY])[:-8] + bytes(4), "8 bytes are expected at byte 17"),
    "huge values": (struct.pack("<ii1sii", 1, 1, b"w", 1, (1 << 31) - 1) + bytes(9), "8589934588 bytes are expected"),
    "twice": (dat([ENTRY, ENTRY], TAIL), "'w' appears twice"),
    "nan": (dat([(b"w", 1, [1.0, float("nan")])]), "'w' has the value nan"),
    "negative": (dat([(b"w", 1, [1.0, -2.0])]), "'w' has the value -2.0"),
    "more": (dat([ENTRY], TAIL + b"xyz"), "7 chunks and 3 bytes at the end"),
    "tail": (dat([ENTRY], TAIL[:-1]), "6 bytes are expected at byte"),
    "chunks": (dat([ENTRY], struct.pack("<i", -3)), "-3 chunks"),
}


@pytest.mark.parametrize("case", BAD_DAT)
def test_bad_dat_is_one_line(tmp_path: Path, case: str) -> None:
    data, message = BAD_DAT[case]
    (tmp_path / "i.dat").write_bytes(data)
    assert message in refuses(tmp_path / "i.dat")


def test_every_truncation_is_refused_or_complete(tmp_path: Path) -> None:
    """The older form may end after its entries, and after the number of chunks."""
    data = dat([ENTRY, (b"v", 2, [3.0])], TAIL)
    complete = {len(data), len(data) - len(TAIL), len(data) - len(TAIL) + 4}
    for size in range(len(data) + 1):
        (tmp_path / "i.dat").write_bytes(data[:size])
        if size in complete:
            assert list(read_imatrix(tmp_path / "i.dat").entries) == ["w", "v"]
        else:
            refuses(tmp_path / "i.dat")
    whole = make(tmp_path / "i.gguf", {"w": ONE}, {"w": ONE}).read_bytes()
    for size in range(0, len(whole) - 64, 7):
        (tmp_path / "i.gguf").write_bytes(whole[:size])
        refuses(tmp_path / "i.gguf")
