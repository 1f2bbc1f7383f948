import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from quantool.errors import QuantoolError, UsageError
from quantool.io import open_checkpoint
from quantool.io.safetensors import DTYPES, MappedFile, dtype_name
from quantool.io.writer import CheckpointWriter, PlannedTensor, write_file

CONFIG = {"model_type": "llama", "quantization_config": {"bits": 4}}
ROOT = Path(__file__).resolve().parents[2]


def plan_of(tensors: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, generator=generator, dtype=torch.float32).bfloat16(),
        "b.weight_packed": torch.randint(-100, 100, (6, 4), generator=generator, dtype=torch.int32),
        "b.weight_shape": torch.tensor([6, 32]),
        "c.mask": torch.tensor([True, False, True]),
        "d.scalar": torch.tensor(2.5, dtype=torch.float16),
        "e.empty": torch.empty(0, 4),
        "f.weight": torch.randn(16, 16, generator=generator),
    }


def write(output: Path, tensors: dict[str, torch.Tensor], *, size: int = 1 << 40, overwrite: bool = False) -> int:
    plan = plan_of(tensors)
    with CheckpointWriter(output, plan, config=CONFIG, max_shard_size=size, overwrite=overwrite) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()
    return writer.nbytes


def listing(path: Path) -> list[str]:
    return sorted(str(item.relative_to(path)) for item in path.rglob("*"))


# --- what is written


def test_one_file_loads_in_the_safetensors_library(tmp_path: Path) -> None:
    tensors = model()
    size = write(tmp_path / "out", tensors)
    path = tmp_path / "out" / "model.safetensors"
    assert listing(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]
    assert path.stat().st_size == size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
    for name, tensor in load_file(path).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG


def test_golden_bytes(tmp_path: Path) -> None:
    write(
        tmp_path / "out", {"h": torch.tensor([1.0], dtype=torch.float16), "w": torch.tensor([1, -1], dtype=torch.int32)}
    )
    header = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
        b'"h":{"dtype":"F16","shape":[1],"data_offsets":[8,10]}}'
    )
    header += b" " * (-len(header) % 8)
    data = b"\x01\x00\x00\x00\xff\xff\xff\xff\x00\x3c"
    expected = len(header).to_bytes(8, "little") + header + data
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    tensors["large"] = torch.zeros(100)
    tensors["last"] = torch.ones(1)
    size = write(tmp_path / "out", tensors, size=80)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert index["metadata"]["total_size"] == 5 * 40 + 400 + 4
    expected = ["w0 w1", "w2 w3", "w4", "large", "last"]
    assert index["weight_map"] == {
        name: file for file, names in zip(files, expected, strict=True) for name in names.split()
    }
    assert size == sum((tmp_path / "out" / file).stat().st_size for file in files)
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)


PLANNED = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PLANNED, min_size=1, max_size=12), st.integers(1, 300), st.randoms(use_true_random=False))
def test_what_is_written_equals_the_plan(
    tmp_path: Path, shapes: list[tuple[str, tuple[int, ...]]], size: int, order: random.Random
) -> None:
    plan = [PlannedTensor(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(shapes)]
    data = {tensor.name: order.randbytes(tensor.nbytes) for tensor in plan}
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with CheckpointWriter(tmp_path / "out", plan, config={}, max_shard_size=size) as writer:
        for tensor in order.sample(plan, len(plan)):
            raw = torch.frombuffer(bytearray(data[tensor.name] or b"\0"), dtype=torch.uint8)[: tensor.nbytes]
            writer.write(tensor.name, raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape))
        writer.commit()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert writer.nbytes == sum(file.stat().st_size for file in files)
    found = {}
    for file in files:
        content, mapped = file.read_bytes(), MappedFile(file)
        assert int.from_bytes(content[:8], "little") % 8 == 0
        total = sum(info.nbytes for info in mapped.infos.values())
        assert total <= size or len(mapped.infos) == 1 or all(i.nbytes in (0, total) for i in mapped.infos.values())
        position = len(content) - total
        for info in mapped.infos.values():
            assert position % DTYPES[info.dtype].itemsize == 0  # every tensor is aligned
            found[info.name] = (info.dtype, info.shape, content[position : position + info.nbytes])
            position += info.nbytes
    assert found == {tensor.name: (tensor.dtype, tensor.shape, data[tensor.name]) for tensor in plan}


def test_non_contiguous_and_grad_tensors(tmp_path: Path) -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    write(tmp_path / "out", {"w": weight.t(), "s": weight[:, ::2]})
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded["w"], weight.detach().t())
    assert torch.equal(loaded["s"], weight.detach()[:, ::2])


def test_threads(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((1000 + i,), float(i)) for i in range(64)}
    with CheckpointWriter(tmp_path / "out", plan_of(tensors), config={}, max_shard_size=50_000) as writer:
        names = [list(tensors)[i::8] for i in range(8)]
        threads = [
            threading.Thread(target=lambda part: [writer.write(n, tensors[n]) for n in part], args=(p,)) for p in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.commit()
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_auxiliary_files_and_missing_parents(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "a" / "b", plan_of(model()), config=CONFIG, max_shard_size=1 << 30) as writer:
        assert writer.directory == tmp_path / "a" / f".b.tmp-{os.getpid()}"
        (writer.directory / "tokenizer.json").write_text("{}")
        for name, tensor in model().items():
            writer.write(name, tensor)
        assert not (tmp_path / "a" / "b").exists()
        writer.commit()
    assert listing(tmp_path / "a") == ["b", "b/config.json", "b/model.safetensors", "b/tokenizer.json"]


# --- against the plan


def test_every_planned_tensor_is_written_once(tmp_path: Path) -> None:
    tensors = model()
    with CheckpointWriter(tmp_path / "out", plan_of(tensors), config=CONFIG, max_shard_size=1 << 30) as writer:
        writer.write("a.weight", tensors["a.weight"])
        with pytest.raises(QuantoolError, match=r"'a\.weight' is written twice"):
            writer.write("a.weight", tensors["a.weight"])
        with pytest.raises(QuantoolError, match="'zzz' is not in the plan"):
            writer.write("zzz", tensors["a.weight"])
        with pytest.raises(QuantoolError, match=r"'f.weight': planned F32 \[16, 16\], got F32 \[256\]"):
            writer.write("f.weight", tensors["f.weight"].reshape(-1))
        with pytest.raises(QuantoolError, match=r"'f.weight': planned F32 \[16, 16\], got F64 \[16, 16\]"):
            writer.write("f.weight", tensors["f.weight"].double())
        with pytest.raises(QuantoolError, match=r"6 planned tensors were not written, first 'b\.weight_packed'"):
            writer.commit()
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["w", "__metadata__"])
def test_plan_names_are_unique(tmp_path: Path, name: str) -> None:
    plan = [PlannedTensor("w", "F32", (1,)), PlannedTensor(name, "F32", (1,))]
    with pytest.raises(QuantoolError, match="planned twice"):
        CheckpointWriter(tmp_path / "out", plan, config={}, max_shard_size=1)
    assert listing(tmp_path) == []


# --- existing outputs


def test_existing_output_is_refused_before_work(tmp_path: Path) -> None:
    write(tmp_path / "out", model())
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in listing(tmp_path)}
    with pytest.raises(UsageError, match="already exists") as caught:
        write(tmp_path / "out", model())
    assert caught.value.exit_code == 2
    assert "--overwrite" in str(caught.value.hint)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in listing(tmp_path)} == before


def test_overwrite_replaces_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "out", model(), size=100)
    write(tmp_path / "out", {"w": torch.ones(3)}, overwrite=True)
    assert listing(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]
    assert list(open_checkpoint(tmp_path / "out").infos) == ["w"]


def test_overwrite_may_read_what_it_replaces(tmp_path: Path) -> None:
    write(tmp_path / "out", {"w": torch.arange(5000.0)})
    checkpoint = open_checkpoint(tmp_path / "out")
    with CheckpointWriter(
        tmp_path / "out", [PlannedTensor("w", "F32", (5000,))], config={}, max_shard_size=1 << 30, overwrite=True
    ) as writer:
        writer.write("w", checkpoint.read("w") * 2)
        writer.commit()
    assert torch.equal(checkpoint.read("w"), torch.arange(5000.0))
    assert torch.equal(open_checkpoint(tmp_path / "out").read("w"), torch.arange(5000.0) * 2)


def test_failure_keeps_what_would_be_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", {"w": torch.ones(3)})
    writer = CheckpointWriter(tmp_path / "out", plan_of(model()), config={}, max_shard_size=1 << 30, overwrite=True)
    with pytest.raises(QuantoolError, match="not written"), writer:
        writer.commit()
    assert listing(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]
    assert open_checkpoint(tmp_path / "out").read("w").tolist() == [1, 1, 1]


def test_overwrite_never_deletes_what_is_no_checkpoint(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="is not a checkpoint"):
        write(home, model(), overwrite=True)
    (home / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a checkpoint"):
        write(home, model(), overwrite=True)
    with pytest.raises(UsageError, match="is not a directory"):
        write(home / "thesis.txt", model(), overwrite=True)
    assert listing(tmp_path) == ["home", "home/config.json", "home/thesis.txt"]


def test_overwrite_fills_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", model(), overwrite=True)
    assert listing(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(3)}
    with CheckpointWriter(tmp_path / "out", plan_of(tensors), config={}, max_shard_size=1 << 30) as writer:
        writer.write("w", tensors["w"])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        with pytest.raises(QuantoolError, match="cannot be written"):
            writer.commit()
    assert listing(tmp_path) == ["out", "out/precious"]


# --- nothing is left behind


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    output = tmp_path / "a" / "b" / "out"

    def interrupted() -> None:
        with CheckpointWriter(output, plan_of(model()), config={}, max_shard_size=50) as writer:
            writer.write("a.weight", model()["a.weight"])
            assert len(listing(tmp_path)) > 3
            raise error

    with pytest.raises(error):
        interrupted()
    assert listing(tmp_path) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from quantool.io.writer import CheckpointWriter, PlannedTensor
plan = [PlannedTensor("w", "F32", (1000, 1000))]
with CheckpointWriter(Path({str(tmp_path / "x" / "out")!r}), plan, config={{}}, max_shard_size=10) as writer:
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "ready\n"
        assert len(listing(tmp_path)) == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
    assert listing(tmp_path) == []


def test_disk_too_small_for_the_plan(tmp_path: Path) -> None:
    plan = [PlannedTensor("w", "F32", (1 << 30, 1 << 20))]
    with pytest.raises(QuantoolError, match=r"out: needs 4503599627\d+ bytes, the file system has \d+ free") as caught:
        CheckpointWriter(tmp_path / "deep" / "out", plan, config={}, max_shard_size=1 << 60)
    assert caught.value.exit_code == 1
    assert caught.value.hint is not None
    assert listing(tmp_path) == []


def test_disk_that_fills_up(tmp_path: Path) -> None:
    """On a real 1 MB file system: the space is there for the check, and then it is not."""
    code = f"""
import shutil, sys
from collections import namedtuple
from pathlib import Path
import torch
from quantool.errors import QuantoolError
from quantool.io.writer import CheckpointWriter, PlannedTensor, write_file
disk = Path({str(tmp_path / "disk")!r})
def attempt(work):
    try:
        work()
    except QuantoolError as error:
        print(error.message, "|", error.hint, "|", sorted(p.name for p in disk.iterdir()))
plan = [PlannedTensor("w", "U8", (2 << 20,))]
attempt(lambda: CheckpointWriter(disk / "out", plan, config={{}}, max_shard_size=1 << 30))
shutil.disk_usage = lambda path: namedtuple("usage", "free")(1 << 40)
attempt(lambda: CheckpointWriter(disk / "out", plan, config={{}}, max_shard_size=1 << 30))
attempt(lambda: write_file(disk / "f", {{"w": torch.zeros(2 << 20)}}, {{}}, overwrite=False))
def late():
    small = [PlannedTensor("w", "U8", (9,))]
    with CheckpointWriter(disk / "out", small, config={{}}, max_shard_size=1 << 30) as writer:
        with open(writer.directory / "tokenizer.json", "wb") as file:
            try:
                file.write(bytes(2 << 20))
            except OSError:
                pass
        writer.write("w", torch.zeros(9, dtype=torch.uint8))
        writer._config = {{"large": "x" * (2 << 20)}}
        writer.commit()
attempt(late)
"""
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"', "sh"]
    mount.append(str(tmp_path / "disk"))
    probe = [*mount, "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    run = subprocess.run([*mount, sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    lines = run.stdout.splitlines()
    assert len(lines) == 4, run.stderr
    assert "bytes, the file system has 1048576 free" in lines[0]
    for line in lines[1:]:
        assert f"cannot be written: {os.strerror(errno.ENOSPC)} | free some space" in line
    assert all(line.endswith("| []") for line in lines)


def test_parent_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuantoolError, match="cannot be written"):
        write(tmp_path / "file" / "out", model())
    assert listing(tmp_path) == ["file"]


# --- write_file


def test_write_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "calibration.safetensors"
    size = write_file(path, model(), {"seed": "0"}, overwrite=False)
    assert path.stat().st_size == size
    assert listing(tmp_path) == ["new", "new/calibration.safetensors"]
    file = MappedFile(path)
    assert file.metadata == {"seed": "0"}
    for name, tensor in model().items():
        assert torch.equal(file.read(name), tensor)


def test_write_file_refuses_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_file(path, {"a": torch.ones(1)}, {}, overwrite=False)
    with pytest.raises(UsageError, match="already exists"):
        write_file(path, {"b": torch.ones(1)}, {}, overwrite=False)
    assert list(MappedFile(path).infos) == ["a"]
    write_file(path, {"b": torch.ones(1)}, {}, overwrite=True)
    assert list(MappedFile(path).infos) == ["b"]
    with pytest.raises(UsageError, match="is not a file"):
        write_file(tmp_path, {"b": torch.ones(1)}, {}, overwrite=True)
    with pytest.raises(QuantoolError, match="safetensors cannot store"):
        write_file(path, {"b": torch.ones(1, dtype=torch.complex128)}, {}, overwrite=True)
    assert listing(tmp_path) == ["f.safetensors"]
