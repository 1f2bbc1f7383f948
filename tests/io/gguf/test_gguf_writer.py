import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import gguf
import llamacpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError, UsageError
from quantool.io import open_checkpoint
from quantool.io.gguf import writer as gguf_writer
from quantool.io.gguf.file import Array, GgufFile, _Part
from quantool.io.gguf.writer import GgufWriter, PlannedGguf, Value, planned_bytes

ROOT = Path(__file__).resolve().parents[3]
METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.name": "Ünïcode \U0001f642",
    "llama.block_count": 2,
    "llama.rope.freq_base": 1e6,
    "llama.negative": -3,
    "tokenizer.ggml.add_bos_token": True,
    "u8": np.uint8(255),
    "i8": np.int8(-1),
    "u16": np.uint16(65535),
    "i16": np.int16(-2),
    "u32": np.uint32(1 << 31),
    "i64": np.int64(-(1 << 40)),
    "u64": np.uint64(1 << 63),
    "f64": np.float64(0.1),
    "f32": np.float32(0.1),
    "bool": np.bool_(True),
    "tokens": ["a", "", "\u0120b"],
    "scores": [0.5, -1000.0],
    "types": [1, 3, -6],
    "flags": [True, False],
    "bytes": [np.uint8(1), np.uint8(2)],
}


def model() -> dict[str, tuple[str, torch.Tensor]]:
    """Tensors by name: ggml's type, and data in torch order, blocks as bytes [rows, row_bytes]."""
    generator = torch.Generator().manual_seed(0)
    return {
        "token_embd.weight": ("Q4_K", torch.randint(0, 256, (7, 144), generator=generator, dtype=torch.uint8)),
        "output_norm.weight": ("F32", torch.randn(5, generator=generator)),
        "blk.0.ffn_up_exps.weight": ("Q8_0", torch.randint(0, 256, (2, 3, 68), generator=generator, dtype=torch.uint8)),
        "blk.0.attn_q.weight": ("BF16", torch.randn(3, 4, generator=generator).bfloat16()),
        "blk.0.attn_k.weight": ("F16", torch.randn(3, 3, generator=generator).half()),
        "ids": ("I32", torch.arange(3, dtype=torch.int32)),
    }


def plan_of(tensors: Mapping[str, tuple[str, torch.Tensor]]) -> list[PlannedGguf]:
    plan = []
    for name, (dtype, data) in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[Q[dtype]]
        columns = data.shape[-1] // size * block if data.dtype == torch.uint8 else data.shape[-1]
        plan.append(PlannedGguf(name, dtype, (*data.shape[:-1], columns)))
    return plan


def write(
    output: Path,
    tensors: Mapping[str, tuple[str, torch.Tensor]],
    *,
    metadata: Mapping[str, Value] = METADATA,
    size: int | None = None,
    overwrite: bool = False,
) -> GgufWriter:
    plan = plan_of(tensors)
    with GgufWriter(output, plan, metadata=metadata, split_max_size=size, overwrite=overwrite) as writer:
        for name, (_, data) in reversed(tensors.items()):
            writer.write(name, data)
        writer.commit()
    return writer


def listing(path: Path) -> list[str]:
    return sorted(str(item.relative_to(path)) for item in path.rglob("*"))


# --- what is written


def test_bytes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    kinds = {kind: gguf.GGUFValueType[kind.upper()] for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int64")}
    kinds |= {"uint64": gguf.GGUFValueType.UINT64, "float64": gguf.GGUFValueType.FLOAT64}
    kinds |= {"float32": gguf.GGUFValueType.FLOAT32, "bool": gguf.GGUFValueType.BOOL}
    reference = gguf.GGUFWriter(tmp_path / "reference.gguf", "llama")
    for key, value in list(METADATA.items())[1:]:
        if isinstance(value, list):
            sub = gguf.GGUFValueType.UINT8 if key == "bytes" else None
            reference.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=sub)
        elif isinstance(value, np.generic):
            reference.add_key_value(key, value.item(), kinds[value.dtype.name])
        else:
            adders = {str: reference.add_string, bool: reference.add_bool, float: reference.add_float32}
            adders.get(type(value), reference.add_int32 if value == -3 else reference.add_uint32)(key, value)
    for name, (dtype, data) in model().items():
        raw = data.view(torch.uint8) if dtype == "BF16" else data
        reference.add_tensor(name, raw.numpy(), raw_dtype=Q[dtype])
    reference.write_header_to_file()
    reference.write_kv_data_to_file()
    reference.write_tensors_to_file()
    reference.close()
    writer = write(tmp_path / "out.gguf", model())
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "reference.gguf").read_bytes()
    assert writer.paths == [tmp_path / "out.gguf"]
    assert writer.nbytes == (tmp_path / "out.gguf").stat().st_size
    assert planned_bytes(plan_of(model()), metadata=METADATA) == writer.nbytes


def test_an_empty_list_and_a_model_without_tensors_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "out.gguf", {}, metadata={"empty": [], "text": "x"})
    file = GgufFile(tmp_path / "out.gguf")
    assert file.values("empty") == []
    assert file.fields["text"] == "x"
    assert len(gguf.GGUFReader(tmp_path / "out.gguf").fields) == 5


PLANNED = st.tuples(
    st.sampled_from(["F32", "F16", "Q4_0", "Q4_K", "I8"]), st.lists(st.integers(1, 4), min_size=1, max_size=4)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PLANNED, max_size=8), st.integers(1, 900), st.randoms(use_true_random=False))
def test_rows_in_any_order_give_the_planned_bytes(
    tmp_path: Path, shapes: list[tuple[str, list[int]]], size: int, order: random.Random
) -> None:
    blocks = {dtype: gguf.GGML_QUANT_SIZES[Q[dtype]][0] for dtype, _ in shapes}
    plan = [
        PlannedGguf(f"t{i}", kind, (*shape[:-1], shape[-1] * blocks[kind])) for i, (kind, shape) in enumerate(shapes)
    ]
    data = {tensor.name: order.randbytes(tensor.nbytes) for tensor in plan}
    work = []
    for tensor in plan:
        first = 0
        while first < tensor.rows:
            count = order.randint(1, tensor.rows - first)
            piece = data[tensor.name][first * tensor.row_bytes : (first + count) * tensor.row_bytes]
            rows = torch.frombuffer(bytearray(piece), dtype=torch.uint8).view(count, -1)
            work.append((tensor.name, rows, first))
            first += count
    for path in tmp_path.iterdir():
        path.unlink()
    with GgufWriter(tmp_path / "m.gguf", plan, metadata=METADATA, split_max_size=size) as writer:
        for name, rows, first in order.sample(work, len(work)):
            writer.write(name, rows, first_row=first)
        writer.commit()
    assert sorted(tmp_path.iterdir()) == writer.paths
    assert sum(path.stat().st_size for path in writer.paths) == writer.nbytes
    assert planned_bytes(plan, metadata=METADATA, split_max_size=size) == writer.nbytes
    file = GgufFile(order.choice(writer.paths))
    assert list(file.tensors) == [tensor.name for tensor in plan]
    for tensor in plan:
        stored = file.tensors[tensor.name]
        assert (stored.dtype, stored.shape, stored.start % 32) == (tensor.dtype, tensor.shape, 0)
        assert file.rows(stored).tobytes() == data[tensor.name]


def test_threads(tmp_path: Path) -> None:
    weight = torch.randn(400, 32)
    with GgufWriter(tmp_path / "m.gguf", [PlannedGguf("w", "F32", (4, 100, 32))], metadata={}) as writer:

        def work(start: int) -> None:
            for row in range(start, 400, 8):
                writer.write("w", weight[row : row + 1], first_row=row)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.commit()
    file = GgufFile(tmp_path / "m.gguf")
    assert np.array_equal(file.rows(file.tensors["w"]).reshape(-1).view(np.float32), weight.numpy().reshape(-1))


def test_a_large_vocabulary(tmp_path: Path) -> None:
    tokens = [f"token {i}" for i in range(150_000)]
    write(tmp_path / "m.gguf", {}, metadata={"tokens": tokens, "types": [1] * 150_000})
    assert GgufFile(tmp_path / "m.gguf").values("tokens") == tokens


# --- several parts


def test_parts_are_those_of_llama_gguf_split(tmp_path: Path) -> None:
    whole, parts = write(tmp_path / "whole.gguf", model()), write(tmp_path / "m.gguf", model(), size=480)
    assert [path.name for path in parts.paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    names = list(model())
    assert [list(_Part(path).tensors) for path in parts.paths] == [names[:1], names[1:4], names[4:]]
    for i, path in enumerate(parts.paths):
        reader = gguf.GGUFReader(path)
        own = [field for key, field in reader.fields.items() if not key.startswith("GGUF.")][-3:]
        assert [(field.name, field.types[0].name, field.contents()) for field in own] == [
            ("split.no", "UINT16", i),
            ("split.count", "UINT16", 3),
            ("split.tensors.count", "INT32", 6),
        ]
        assert len(reader.fields) == 3 + 3 + (0 if i else len(METADATA))
    single = GgufFile(whole.paths[0])
    for path in parts.paths:
        file = GgufFile(path)
        assert {key: v for key, v in file.fields.items() if not isinstance(v, Array)} == {
            key: v for key, v in single.fields.items() if not isinstance(v, Array)
        }
        assert file.values("tokens") == METADATA["tokens"]
        assert list(file.tensors) == list(single.tensors)
        for name, tensor in file.tensors.items():
            assert np.array_equal(file.rows(tensor), single.rows(single.tensors[name]))
            file.drop(tensor)
            assert np.array_equal(file.rows(tensor), single.rows(single.tensors[name]))


def test_what_fits_is_one_file(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model(), size=1 << 20)
    assert listing(tmp_path) == ["m.gguf"]


def test_llama_cpp_loads_the_parts(tmp_path: Path, tiny_gguf: Path) -> None:
    source = GgufFile(tiny_gguf)
    metadata: dict[str, Value] = {
        key: source.values(key) if isinstance(value, Array) else value for key, value in source.fields.items()
    }
    plan = [PlannedGguf(tensor.name, tensor.dtype, tensor.shape) for tensor in source.tensors.values()]
    with GgufWriter(tmp_path / "m.gguf", plan, metadata=metadata, split_max_size=40_000) as writer:
        for name, tensor in source.tensors.items():
            writer.write(name, torch.from_numpy(source.rows(tensor)))
        writer.commit()
    assert len(writer.paths) > 2
    expected = llamacpp.logits(tiny_gguf, [1, 2, 3, 4])
    assert np.array_equal(llamacpp.logits(writer.paths[0], [1, 2, 3, 4]), expected)
    whole, parts = open_checkpoint(tiny_gguf), open_checkpoint(writer.paths[1])
    assert parts.config == whole.config
    assert {info.path for info in parts.infos.values()} == set(writer.paths)
    for name in whole.infos:
        assert torch.equal(parts.read(name), whole.read(name))
        parts.drop(name)


def test_parts_are_checked_against_each_other(tmp_path: Path) -> None:
    parts = write(tmp_path / "m.gguf", model(), size=480).paths
    data = [path.read_bytes() for path in parts]

    def refuses(path: Path, match: str) -> None:
        with pytest.raises(QuantoolError, match=match) as caught:
            GgufFile(path)
        assert "\n" not in caught.value.message
        for other, content in zip(parts, data, strict=True):
            other.write_bytes(content)

    parts[1].unlink()
    refuses(parts[0], r"m-00001-of-00003\.gguf: part 2 of 3 is missing: m-00002-of-00003\.gguf")
    parts[1].write_bytes(data[2])
    refuses(parts[0], r"m-00002-of-00003\.gguf: is part 3 of 3, expected part 2 of 3")
    write(tmp_path / "other.gguf", {"zzz": ("F32", torch.ones(1))}, metadata={})
    shutil.copy(tmp_path / "other.gguf", parts[1])
    refuses(parts[2], r"is part 0 of 1, expected part 2 of 3")
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    refuses(tmp_path / "renamed.gguf", r"its name does not end in -00001-of-00003\.gguf")
    one, six = data[1].split(b"split.tensors.count")[0], (6).to_bytes(4, "little")
    parts[1].write_bytes(one + data[1][len(one) :].replace(six, (7).to_bytes(4, "little"), 1))
    refuses(parts[0], r"m-00002-of-00003\.gguf: 7 tensors are announced, the 3 parts have 6")
    write(tmp_path / "other.gguf", {}, metadata={"split.count": "three"}, overwrite=True)
    refuses(tmp_path / "other.gguf", r"other\.gguf: split\.count is 'three', expected an integer")
    assert len(GgufFile(parts[0]).tensors) == 6


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    place: dict[str, Value] = {"split.count": np.uint16(2)}
    for i in range(2):
        path = tmp_path / f"m-0000{i + 1}-of-00002.gguf"
        write(path, {"w": ("F32", torch.ones(1))}, metadata={**place, "split.no": np.uint16(i)})
    with pytest.raises(QuantoolError, match=r"00002-of-00002\.gguf: tensor 'w' is also in m-00001-of-00002\.gguf"):
        GgufFile(tmp_path / "m-00001-of-00002.gguf")


# --- against the plan


def test_every_row_is_written_once(tmp_path: Path) -> None:
    tensors = model()
    with GgufWriter(tmp_path / "m.gguf", plan_of(tensors), metadata=METADATA) as writer:
        data = tensors["token_embd.weight"][1]
        writer.write("token_embd.weight", data[2:4], first_row=2)
        writer.write("token_embd.weight", data[5:6], first_row=5)
        for first, end in ((3, 4), (0, 3), (1, 7), (5, 6), (2, 4)):
            message = rf"'token_embd\.weight': rows {first} to {end - 1} are written twice"
            with pytest.raises(QuantoolError, match=message):
                writer.write("token_embd.weight", data[first:end], first_row=first)
        with pytest.raises(QuantoolError, match="'zzz' is not in the plan"):
            writer.write("zzz", data)
        wrong = [(data[:, :143], 0), (data, 1), (data[:1], -1), (torch.zeros(7, 256), 0), (torch.tensor(1), 0)]
        for value, first in wrong:
            with pytest.raises(QuantoolError, match=r"planned Q4_K \[7, 256\] in 7 rows of 144 bytes, got "):
                writer.write("token_embd.weight", value, first_row=first)
        with pytest.raises(
            QuantoolError, match=r"planned F16 \[3, 3\] in 3 rows of 6 bytes, got bfloat16 \[3, 3\] for"
        ):
            writer.write("blk.0.attn_k.weight", torch.zeros(3, 3, dtype=torch.bfloat16))
        for name, (_, rows) in tensors.items():
            if name != "token_embd.weight":
                writer.write(name, rows)
        for first, end in ((0, 2), (6, 7)):
            writer.write("token_embd.weight", data[first:end], first_row=first)
        with pytest.raises(QuantoolError, match=r"1 planned tensors were not written completely, first 'token_embd"):
            writer.commit()
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("w", "Q9_K", (1,), "GGUF has no type 'Q9_K'"),
        ("w", "F32", (), r"shape \[\], GGUF holds 1 to 4 dimensions above 0"),
        ("w", "F32", (2, 0), r"shape \[2, 0\], GGUF holds"),
        ("w", "F32", (1, 1, 1, 1, 1), "1 to 4 dimensions"),
        ("w", "Q4_K", (3, 288), "rows of 288 are not whole Q4_K blocks of 256"),
        ("w" * 64, "F32", (1,), "the name is too long, llama.cpp reads at most 63 bytes"),
        ("\ud800", "F32", (1,), "cannot be written as UTF-8"),
    ],
)
def test_what_gguf_cannot_hold(name: str, dtype: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(QuantoolError, match=message):
        PlannedGguf(name, dtype, shape)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1 << 32, "a value does not fit"),
        (1e39, "a value does not fit"),
        ([1 << 31], "a value does not fit"),
        ([1, "a"], "items are of several types"),
        ("\ud800", "cannot be written as UTF-8"),
        (None, "NoneType cannot be written to GGUF"),
        (np.complex64(1), "complex64 cannot be written to GGUF"),
    ],
)
def test_metadata_that_cannot_be_written(tmp_path: Path, value: Value, message: str) -> None:
    with pytest.raises(QuantoolError, match=f"metadata 'key': .*{message}"):
        write(tmp_path / "m.gguf", model(), metadata={"key": value})
    assert listing(tmp_path) == []


def test_names_are_unique_and_the_alignment_is_ours(tmp_path: Path) -> None:
    plan = [PlannedGguf("w", "F32", (1,))]
    with pytest.raises(QuantoolError, match="'w' is planned twice"):
        GgufWriter(tmp_path / "m.gguf", plan * 2, metadata={})
    with pytest.raises(QuantoolError, match=r"general\.alignment is 64, expected 32"):
        GgufWriter(tmp_path / "m.gguf", plan, metadata={"general.alignment": 64})
    assert listing(tmp_path) == []


# --- existing outputs


def test_existing_output_is_refused_before_work(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model(), size=480)
    for size in (480, None):
        (tmp_path / "m.gguf").write_text("mine")
        with pytest.raises(UsageError, match="already exists") as caught:
            write(tmp_path / "m.gguf", {}, size=size) if size is None else write(
                tmp_path / "m.gguf", model(), size=size
            )
        assert "--overwrite" in str(caught.value.hint)
    assert (tmp_path / "m.gguf").read_text() == "mine"
    assert len(listing(tmp_path)) == 4
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(UsageError, match="exists and is not a file"):
        write(tmp_path / "d.gguf", model(), overwrite=True)


def test_overwrite_may_read_what_it_replaces(tmp_path: Path) -> None:
    for size in (None, 4096):
        tensors = {f"w{i}": ("F32", torch.full((900,), float(i))) for i in range(3)}
        path = write(tmp_path / "m.gguf", tensors, size=size).paths[0]
        old = GgufFile(path)
        with GgufWriter(
            tmp_path / "m.gguf", plan_of(tensors), metadata=METADATA, split_max_size=size, overwrite=True
        ) as writer:
            for name, tensor in old.tensors.items():
                writer.write(name, torch.from_numpy(old.rows(tensor)).view(torch.float32) + 1)
            writer.commit()
        new = GgufFile(path)
        for i, (name, tensor) in enumerate(new.tensors.items()):
            assert set(new.rows(tensor).view(np.float32).reshape(-1)) == {i + 1.0}
            assert set(old.rows(old.tensors[name]).view(np.float32).reshape(-1)) == {float(i)}
    assert listing(tmp_path) == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf", "m.gguf"]


def test_parts_appear_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third rename fails: the parts that were there before are there again."""
    write(tmp_path / "m.gguf", model(), size=480)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    del before["m-00002-of-00003.gguf"]
    rename, fails = os.replace, {"m-00003-of-00003.gguf"}

    def replace(source: Path, target: Path) -> None:
        if Path(target).name in fails and ".tmp-" in Path(source).name:
            raise OSError(errno.EIO, "broken disk")
        rename(source, target)

    monkeypatch.setattr(gguf_writer.os, "replace", replace)
    with pytest.raises(QuantoolError, match="broken disk"):
        write(tmp_path / "m.gguf", model(), metadata={}, size=480, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_everything_is_durable_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is synchronized under its temporary name, the directory after the renames."""
    synchronized, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        synchronized.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".tmp-")[0])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write(tmp_path / "m.gguf", model(), size=480)
    assert synchronized == [*(f".m-0000{i}-of-00003.gguf" for i in (1, 2, 3)), tmp_path.name]


# --- nothing is left behind


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    output = tmp_path / "a" / "b" / "m.gguf"

    def interrupted() -> None:
        with GgufWriter(output, plan_of(model()), metadata={}, split_max_size=480) as writer:
            writer.write("ids", model()["ids"][1])
            assert len(listing(tmp_path)) == 5
            raise error

    with pytest.raises(error):
        interrupted()
    assert listing(tmp_path) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from quantool.io.gguf.writer import GgufWriter, PlannedGguf
with GgufWriter(Path({str(tmp_path / "x" / "m.gguf")!r}), [PlannedGguf("w", "Q4_K", (1000, 1024))], metadata={{}}):
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "ready\n"
        assert len(listing(tmp_path)) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
    assert listing(tmp_path) == []


def test_disk_too_small_for_the_plan(tmp_path: Path) -> None:
    plan = [PlannedGguf("w", "Q4_K", (1 << 30, 1 << 20))]
    with pytest.raises(QuantoolError, match=r"m\.gguf: needs 6333186\d+ bytes, the file system has \d+ free") as caught:
        GgufWriter(tmp_path / "deep" / "m.gguf", plan, metadata={})
    assert caught.value.hint is not None
    assert listing(tmp_path) == []


def test_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space is there for the check, and then it is not."""

    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf_writer, "preallocate", full)
    with pytest.raises(QuantoolError, match="cannot be written: No space left on device") as caught:
        write(tmp_path / "new" / "m.gguf", model())
    assert caught.value.hint is not None
    assert listing(tmp_path) == []


def test_parent_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuantoolError, match="cannot be written"):
        write(tmp_path / "file" / "m.gguf", model())
    assert listing(tmp_path) == ["file"]
