import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantool.errors import QuantoolError
from quantool.io import model_dtype, open_checkpoint
from quantool.io.safetensors import DTYPES, MappedFile, dtype_name, read_file

CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16"}


def raw_file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        data = torch.randint(0, 2, (6 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        tensors[f"t.{name}"] = data.view(dtype).reshape(2, 3)
    return tensors


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(flat(left), flat(right))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two shards, an index, a config and a tokenizer."""
    path = tmp_path / "model"
    path.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(5)},
        "model-00002-of-00002.safetensors": {"c.weight": torch.randn(2, 2)},
    }
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "tokenizer.json").write_text("{}")
    return path


def index_edit(directory: Path, **changes: Any) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weight_map = {**content["weight_map"], **changes}
    content["weight_map"] = {name: file for name, file in weight_map.items() if file is not None}
    index.write_text(json.dumps(content))


def refuses(model: Path | str) -> QuantoolError:
    with pytest.raises(QuantoolError) as caught:
        open_checkpoint(model)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 1
    return caught.value


# --- reading


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    tensors = {**every_dtype(), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 7, dtype=torch.float16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "who": "test"})
    file = MappedFile(tmp_path / "x.safetensors")
    assert set(file.infos) == set(tensors)
    assert file.metadata == {"format": "pt", "who": "test"}
    for name, tensor in tensors.items():
        assert same(file.read(name), tensor), name
        assert file.infos[name].shape == tuple(tensor.shape)
        assert file.infos[name].dtype == dtype_name(tensor.dtype)
        assert file.infos[name].nbytes == tensor.nbytes


def test_golden_bytes(tmp_path: Path) -> None:
    header = b'{"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}}      '
    path = raw_file(tmp_path / "g.safetensors", header, bytes(range(16)))
    infos, metadata = read_file(path)
    assert (infos["test"].shape, infos["test"].dtype, metadata) == ((2, 2), "I32", {})
    assert MappedFile(path).read("test").tolist() == [[0x03020100, 0x07060504], [0x0B0A0908, 0x0F0E0D0C]]


def test_reads_are_views_that_outlive_the_reader_and_never_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.arange(8, dtype=torch.float32)}, path)
    file = MappedFile(path)
    first, second = file.read("w"), file.read("w")
    assert first.data_ptr() == second.data_ptr()
    del file, second
    first += 1
    assert first.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert MappedFile(path).read("w").tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_unaligned_tensor_is_read(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    file = MappedFile(raw_file(tmp_path / "x.safetensors", header, data))
    assert file.read("a").tolist() == [7]
    assert file.read("b").tolist() == [1.5, -2.0]


def resident(tensor: torch.Tensor) -> int:
    """Resident bytes of the mapping that holds the tensor, from the kernel."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    inside = False
    for line in lines:
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            inside = begin <= tensor.data_ptr() < end
        elif inside and words[0] == "Rss:":
            return int(words[1]) * 1024
    raise AssertionError


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_drop_releases_pages_and_the_view_stays_valid(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight = torch.arange(1 << 20, dtype=torch.float32)
    save_file({"w": weight}, path)
    file = MappedFile(path)
    view = file.read("w")
    assert torch.equal(view, weight)
    before = resident(view)
    file.drop("w")
    assert before >= weight.nbytes
    assert resident(view) <= 1 << 16
    assert torch.equal(view, weight)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    size = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path = raw_file(tmp_path / "x.safetensors", {"w": entry("U8", [size], 0, size)}, b"\x07")
    os.truncate(path, path.stat().st_size - 1 + size)  # sparse: takes no space
    tensor = MappedFile(path).read("w")
    assert (tensor.shape, int(tensor[0]), int(tensor[-1])) == ((size,), 7, 0)


def test_opens_shards_single_file_and_other_name(directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    assert list(checkpoint.infos) == ["a.weight", "b.weight", "c.weight"]
    assert checkpoint.config == CONFIG
    assert checkpoint.read("c.weight").shape == (2, 2)
    assert checkpoint.infos["c.weight"].path.name == "model-00002-of-00002.safetensors"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, other / "weights.safetensors")
    assert open_checkpoint(str(other)).read("w").tolist() == [1, 1]


def test_write_aux_copies_tokenizers_and_no_code(directory: Path, tmp_path: Path) -> None:
    (directory / "modeling_x.py").write_text("raise SystemExit")
    (directory / "generation_config.json").write_text('{"a": 1}')
    (directory / "spiece.model").write_bytes(b"\x01\x02")
    templates = directory / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    open_checkpoint(directory).write_aux(out)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == ["additional_chat_templates/tool.jinja", "generation_config.json", "spiece.model", "tokenizer.json"]
    assert (out / "spiece.model").read_bytes() == b"\x01\x02"


def test_model_dtype(tmp_path: Path) -> None:
    def dtype_of(tensors: dict[str, torch.Tensor], config: dict[str, str]) -> torch.dtype:
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_dtype(open_checkpoint(tmp_path))

    norm, half = torch.ones(4), torch.ones(2, 2, dtype=torch.float16)
    assert dtype_of({"n": norm, "w": half}, CONFIG) == torch.float16
    packed = {"x.qweight": torch.ones(2, 2, dtype=torch.int32), "x.scales": half, "n": norm}
    assert dtype_of(packed, {"torch_dtype": "bfloat16"}) == torch.bfloat16
    assert dtype_of(packed, {"dtype": "float16"}) == torch.float16
    assert dtype_of(packed, {}) == torch.bfloat16


# --- bad headers: (header, data bytes, words of the message)

BAD_HEADERS: dict[str, tuple[Any, int, list[str]]] = {
    "size mismatch": (
        {"model.layers.3.mlp.up_proj.weight": entry("F16", [5, 7], 0, 64)},
        64,
        ["x.safetensors: tensor 'model.layers.3.mlp.up_proj.weight': shape [5, 7] F16 needs 70 bytes, the file has 64"],
    ),
    "unknown dtype": ({"w": entry("F17", [1], 0, 2)}, 2, ["'w'", "unknown dtype 'F17'", "BF16"]),
    "dtype not text": ({"w": entry([], [1], 0, 2)}, 2, ["unknown dtype []"]),  # type: ignore[arg-type]
    "negative shape": ({"w": entry("F32", [-1], 0, 4)}, 4, ["shape is [-1]"]),
    "float shape": ({"w": entry("F32", [1.0], 0, 4)}, 4, ["shape is [1.0]"]),
    "bool shape": ({"w": entry("F32", [True], 0, 4)}, 4, ["shape is [True]"]),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, ["shape is None"]),
    "too many dimensions": ({"w": entry("F32", [1] * 65, 0, 4)}, 4, ["shape is [1, 1"]),
    "huge and empty": ({"w": entry("F32", [0, 1 << 40, 1 << 40], 0, 0)}, 0, ["shape is [0, 1099511627776"]),
    "huge": (
        {"w": entry("U8", [1 << 50], 0, 1 << 50)},
        8,
        ["ends at byte 1125899906842624", "8 data bytes", "truncated"],
    ),
    "offsets reversed": ({"w": entry("F32", [1], 4, 0)}, 4, ["data_offsets is [4, 0]"]),
    "offsets beyond 63 bits": (
        {"w": entry("U8", [1], 1 << 63, (1 << 63) + 1)},
        4,
        ["data_offsets is [9223372036854775808"],
    ),
    "three offsets": ({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, 1, ["expected [begin, end]"]),
    "out of range": ({"w": entry("F32", [4], 0, 16)}, 12, ["ends at byte 16", "12 data bytes of 16", "truncated"]),
    "overlap": (
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)},
        6,
        ["'b'", "starts at byte 2", "ends at 4"],
    ),
    "hole": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, 6, ["'b'", "starts at byte 4", "expected 2"]),
    "hole at the start": ({"a": entry("U8", [2], 1, 3)}, 3, ["'a'", "expected 0"]),
    "bytes left over": ({"a": entry("U8", [2], 0, 2)}, 5, ["has 5 data bytes", "describes 2"]),
    "entry is no object": ({"w": [1, 2]}, 0, ["'w'", "list"]),
    "header is no object": (b"[1, 2]", 0, ["bad header", "expected an object"]),
    "header is no JSON": (b"{not json}", 0, ["bad header"]),
    "header is not UTF-8": (b'{"\xff": 1}', 0, ["bad header"]),
    "lone surrogate": (b'{"\\ud800": 1}', 0, ["bad header", "surrogates"]),
    "deep nesting": (b'{"a":' + b"[" * 100_000, 0, ["bad header"]),
    "duplicate key": (b'{"w":{},"w":{}}', 0, ["'w' appears twice"]),
    "metadata": ({"__metadata__": {"a": 1}}, 0, ["__metadata__"]),
    "terminal escape": ({"w\x1b[31m": entry("F32", [2], 0, 4)}, 4, [r"'w\x1b[31m'"]),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_one_line(tmp_path: Path, case: str) -> None:
    header, size, words = BAD_HEADERS[case]
    path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(QuantoolError) as caught:
        read_file(path)
    assert "x.safetensors" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400 + len(str(path))
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "has 0 bytes"),
        (b"\x01\x02", "has 2 bytes"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "claims 4611686018427387904 bytes"),
        ((50).to_bytes(8, "little") + b"{}", "the header needs 50 bytes, the file has 2"),
    ],
)
def test_bad_length(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(QuantoolError, match=word):
        read_file(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(QuantoolError):
            read_file(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_never_crash(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    data = bytearray(path.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path.write_bytes(data)
    try:
        file = MappedFile(path)
        for name in file.infos:
            file.read(name)
    except QuantoolError as error:
        assert "\n" not in error.message  # noqa: PT017 - both outcomes are right, a traceback is not


# --- bad directories


def truncate(directory: Path) -> None:
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def swap_for_pickle(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02")


def swap_for_directory(directory: Path) -> None:
    path = directory / "model-00002-of-00002.safetensors"
    path.unlink()
    path.mkdir()


def swap_for_pipe(directory: Path) -> None:
    path = directory / "model-00002-of-00002.safetensors"
    path.unlink()
    os.mkfifo(path)


def duplicate(directory: Path) -> None:
    save_file({"c.weight": torch.ones(1), "a.weight": torch.ones(1)}, directory / "model-00002-of-00002.safetensors")


def no_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def no_weights(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()


SHARD = "model-00002-of-00002.safetensors"
BAD_DIRECTORIES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing shard": (lambda d: (d / SHARD).unlink(), ["index.json", f"shard '{SHARD}' is missing"]),
    "truncated shard": (truncate, [SHARD, "'c.weight'", "ends at byte 16", "12 data bytes of 16"]),
    "outside, relative": (
        lambda d: index_edit(d, x="../x.safetensors"),
        ["'x'", "'../x.safetensors'", "beside the index"],
    ),
    "outside, absolute": (
        lambda d: index_edit(d, x="/etc/x.safetensors"),
        ["'/etc/x.safetensors'", "beside the index"],
    ),
    "not a shard": (lambda d: index_edit(d, x="config.json"), ["'config.json'"]),
    "null byte": (lambda d: index_edit(d, x="a\0.safetensors"), [r"'a\x00.safetensors' is missing"]),
    "shard name no text": (lambda d: index_edit(d, x=7), ["'x' is in 7"]),
    "tensor not in the shard": (lambda d: index_edit(d, x=SHARD), [SHARD, "no tensor 'x'"]),
    "tensor in another shard": (lambda d: index_edit(d, **{"a.weight": SHARD}), [SHARD, "no tensor 'a.weight'"]),
    "tensor not in the index": (lambda d: index_edit(d, **{"b.weight": None}), ["'b.weight' is not in the index"]),
    "tensor in two shards": (duplicate, [SHARD, "'a.weight' is also in model-00001"]),
    "index is no JSON": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        ["index.json", "not a JSON object"],
    ),
    "no weight_map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), ["weight_map is None"]),
    "no index": (no_index, ["2 .safetensors files and no index"]),
    "pickle": (swap_for_pickle, ["pytorch_model.bin", "is a pickle", "safetensors"]),
    "no weights": (no_weights, ["no model.safetensors"]),
    "directory for a shard": (swap_for_directory, [SHARD, "is a directory, expected a file"]),
    "pipe for a shard": (swap_for_pipe, [SHARD, "not a regular file"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["no config.json", "'model-00001"]),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{,}"), ["config.json", "not a JSON object"]),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), ["config.json", "found list"]),
    "config is binary": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"),
        ["config.json", "not a JSON object"],
    ),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_bad_directory_is_one_line(directory: Path, case: str) -> None:
    damage, words = BAD_DIRECTORIES[case]
    damage(directory)
    message = refuses(directory).message
    for word in words:
        assert word in message


def test_pickle_hint_can_be_pasted(directory: Path) -> None:
    swap_for_pickle(directory)
    hint = refuses(directory).hint
    assert hint is not None
    assert hint.startswith('python -c "')
    compile(hint.removeprefix('python -c "').removesuffix('"'), "hint", "exec")
    assert refuses(directory / "pytorch_model.bin").hint is not None


def test_empty_directory_and_wrong_files(tmp_path: Path) -> None:
    assert "empty" in refuses(tmp_path).message
    (tmp_path / "x.txt").write_text("x")
    assert "is not a model" in refuses(tmp_path / "x.txt").message
    (tmp_path / "x.safetensors").write_text("x")
    assert str(tmp_path) in str(refuses(tmp_path / "x.safetensors").hint)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
def test_unreadable_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0 if path.name == SHARD else 0o644)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # root reads everything
        error = refuses(Path())
    finally:
        if root:
            os.seteuid(0)
        (directory / SHARD).chmod(stat.S_IRUSR)
    assert error.message == f"{SHARD}: permission denied"


# --- names


@pytest.mark.parametrize("name", ["nope", "./org/name", "/nope/x", "org/name/x", "org/name.gguf", "-x/y", "org/", ""])
def test_missing_path_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    message = refuses(name).message
    assert message.endswith("no such file or directory") or "empty" in message


def test_mistyped_path_under_an_existing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refuses("models/llama").message == "models/llama: no such file or directory"


def test_hub_name_from_the_offline_cache(directory: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    directory.rename(repository / "snapshots" / ("0" * 40))
    code = """
import sys
from quantool.errors import QuantoolError
from quantool.io import open_checkpoint
print(sorted(open_checkpoint("org/name").infos))
try:
    open_checkpoint("org/other")
except QuantoolError as error:
    print(error.message, "|", error.hint)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, missing = run.stdout.splitlines()
    assert found == "['a.weight', 'b.weight', 'c.weight']"
    assert missing.startswith("org/other: no such directory, and the hub did not give it: ")
    assert "HF_HUB_OFFLINE" in missing
