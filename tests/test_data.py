"""Texts of every kind to token windows, with a tokenizer of one token per byte so that every id is known."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.data import TextOptions, builtin_documents, documents_of, resolve_seq_len, token_windows
from quantool.errors import QuantoolError, UsageError

LIMIT = settings(deadline=None, max_examples=30)
DOCUMENTS = [f"Document {i}: äöü 漢字 " + " ".join(str(i * 1000 + j) for j in range(20 + i)) for i in range(30)]
TEXT = "\n\n".join(DOCUMENTS)


@cache
def builtin(split: str) -> str:
    """The whole text; reading it takes seconds."""
    return "\n\n".join(builtin_documents(split))


def by_bytes(text: str, *, verbose: bool) -> Any:
    """A token per byte."""
    assert not verbose
    return {"input_ids": list(text.encode())}


def by_words(text: str, *, verbose: bool) -> Any:
    """A token per word: where the text is cut changes the last one."""
    return {"input_ids": [sum(word.encode()) for word in text.split()]}


def windows(options: TextOptions, seq_len: int = 16, tokenizer: Any = by_bytes) -> list[list[int]]:
    found = token_windows(options, tokenizer, seq_len)
    assert found.dtype == torch.int64
    assert found.dim() == 2
    result: list[list[int]] = found.tolist()
    return result


def cut(ids: list[int], seq_len: int = 16) -> list[list[int]]:
    return [ids[i : i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)]


@pytest.fixture(params=["txt", "md", "jsonl", "json", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same documents in every kind of file; with a column that is not text."""
    path = tmp_path / f"text.{request.param}"
    rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    if request.param in {"txt", "md"}:
        path.write_text(TEXT, encoding="utf-8")
    elif request.param == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def refused(options: TextOptions, seq_len: int = 16) -> QuantoolError:
    with pytest.raises(QuantoolError) as caught:
        token_windows(options, by_bytes, seq_len)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500
    return caught.value


def test_every_kind_of_file_gives_the_same_windows(file: Path) -> None:
    expected = cut(list(TEXT.encode()))
    assert windows(TextOptions(str(file), num_samples=None)) == expected
    assert windows(TextOptions(str(file), num_samples=5)) == expected[:5]
    assert (
        windows(TextOptions(str(file), num_samples=3, seed=7))
        == windows(TextOptions(str(file), num_samples=None, seed=7))[:3]
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_another_column(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"text.{kind}"
    rows = [{"text": "no", "body": text} for text in DOCUMENTS]
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    found = windows(TextOptions(str(path), text_column="body", num_samples=None))
    assert found == cut(list(TEXT.encode()))


@LIMIT
@given(st.integers(1, 40), st.integers(2, 50), st.sampled_from([by_bytes, by_words]))
def test_asking_for_few_windows_gives_the_first_of_all(count: int, seq_len: int, tokenizer: Any) -> None:
    """Only the beginning of the text is read for them; no token of a cut word gets in."""
    beginning = tokenizer(builtin("test")[: count * seq_len * 100], verbose=False)["input_ids"]
    expected = cut(beginning, seq_len)[:count]
    assert len(expected) == count
    assert windows(TextOptions(split="test", num_samples=count), seq_len, tokenizer) == expected


def test_the_token_before_a_cut_is_never_used(tmp_path: Path) -> None:
    """One token per document of eight characters, which is what is read per token; each depends on the next word."""

    def looking_ahead(text: str, *, verbose: bool) -> Any:
        words = [int(word) for word in text.split()]
        return {"input_ids": [a * 7 + b for a, b in zip(words, [*words[1:], 0], strict=True)]}

    path = tmp_path / "words.jsonl"
    words = [f"{10_000_000 + i}" for i in range(2000)]
    path.write_text("\n".join(json.dumps({"text": word}) for word in words))
    everything = cut(looking_ahead(" ".join(words), verbose=False)["input_ids"])
    for count in (1, 3, 10):
        assert windows(TextOptions(str(path), num_samples=count), 16, looking_ahead) == everything[:count]


def test_only_as_much_is_read_as_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def endless(_split: str) -> Iterator[str]:
        for i in range(10**6):
            read.append(i)
            yield f"{i:06d} " * 10
        raise AssertionError("the whole dataset was read")

    monkeypatch.setattr("quantool.data.builtin_documents", endless)
    assert len(windows(TextOptions(num_samples=10), 16)) == 10
    assert len(read) < 1000


def test_a_tokenizer_with_very_long_tokens_gets_more_text() -> None:
    """Far fewer tokens than one per eight characters: reading goes on until there are enough."""

    def sparse(text: str, *, verbose: bool) -> Any:
        return {"input_ids": list(range(len(text) // 500))}

    assert windows(TextOptions(num_samples=4), 20, sparse) == cut(list(range(80)), 20)


def test_builtin_splits_are_disjoint() -> None:
    """No paragraph is in both: the interpreter's topics repeat each other's sections."""
    paragraphs = {split: {p for p in builtin(split).split("\n\n") if len(p) > 100} for split in ("train", "test")}
    assert len(paragraphs["test"]) > 500
    assert not paragraphs["train"] & paragraphs["test"]


def test_builtin_text_is_large_enough() -> None:
    train, test = builtin("train"), builtin("test")
    assert len(train) > 128 * 2048 * 4
    assert len(test) > 32 * 2048 * 4
    assert 2 < len(train) / len(test) < 5
    options = TextOptions(num_samples=128)
    assert token_windows(options, lambda text, verbose: {"input_ids": [0] * (len(text) // 4)}, 2048).shape[0] == 128


def test_builtin_text_is_the_same_in_every_process() -> None:
    """Also with another hash seed, in another directory and another locale."""
    code = (
        "import hashlib\nfrom quantool.data import builtin_documents\n"
        "print(hashlib.sha256('\\n\\n'.join(builtin_documents('test')).encode()).hexdigest())\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(root), "LC_ALL": "C"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root / "tests", env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == hashlib.sha256(builtin("test").encode()).hexdigest()


def test_a_split_that_builtin_does_not_have() -> None:
    error = refused(TextOptions(split="validation"))
    assert isinstance(error, UsageError)
    assert error.message == "dataset 'builtin' has no split 'validation', it has train and test"
    assert error.hint == "use --split test"


@pytest.mark.parametrize("seed", [0, 5])
def test_too_many_windows_says_how_many_there_are(plain: Path, seed: int) -> None:
    tokens = len(TEXT.encode())
    available = tokens // 16
    error = refused(TextOptions(str(plain), num_samples=available + 1, seed=seed))
    assert (
        f"{available + 1} windows of 16 tokens asked for, the text has {available} ({tokens} tokens)" in error.message
    )
    assert str(plain) in error.message
    assert error.hint == f"use --num-samples {available}"
    assert len(windows(TextOptions(str(plain), num_samples=available, seed=seed))) == available


def test_a_text_shorter_than_one_window(plain: Path) -> None:
    for count in (None, 1, 128):
        error = refused(TextOptions(str(plain), num_samples=count), seq_len=10**6)
        assert "the text has 0" in error.message
        assert error.hint is not None
        assert "--seq-len" in error.hint


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.json"])
@pytest.mark.parametrize("count", [None, 4])
def test_an_empty_file(name: str, count: int | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    error = refused(TextOptions(str(tmp_path / name), num_samples=count))
    assert name in error.message
    assert "StopIteration" not in error.message
    assert error.hint


def test_an_empty_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([], schema=pa.schema([("text", pa.string())])), path)
    assert "empty.parquet" in refused(TextOptions(str(path))).message


def test_seed_0_is_in_order_and_others_are_drawn_without_repeating(plain: Path) -> None:
    everything = windows(TextOptions(str(plain), num_samples=None))
    drawn = {seed: windows(TextOptions(str(plain), num_samples=20, seed=seed)) for seed in (1, 2)}
    again = windows(TextOptions(str(plain), num_samples=20, seed=1))
    assert drawn[1] == again
    assert drawn[1] != drawn[2]
    for found in drawn.values():
        assert found != everything[:20]
        assert len({tuple(window) for window in found}) == 20
        assert all(window in everything for window in found)
    late = [window for window in drawn[1] if window not in everything[:20]]
    assert late  # from the whole text, not from its beginning
    full = windows(TextOptions(str(plain), num_samples=None, seed=1))
    assert sorted(full) == sorted(everything)


def test_a_missing_column_lists_the_columns(file: Path) -> None:
    if file.suffix in {".txt", ".md"}:
        assert windows(TextOptions(str(file), text_column="body", num_samples=1))  # has none, needs none
        return
    error = refused(TextOptions(str(file), text_column="body"))
    assert isinstance(error, UsageError)
    assert error.message == f"dataset '{file}': no column 'body', it has id, text"
    assert error.hint == "use --text-column text"


@pytest.mark.parametrize("name", ["nosuch.txt", "nosuch.jsonl", "nosuch.parquet", "no/such/folder/x"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    error = refused(TextOptions(str(tmp_path / name)))
    assert error.message == f"dataset '{tmp_path / name}': no such file"
    assert error.hint


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(TextOptions(str(tmp_path))).message


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.parquet"])
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('{"text": "x"}')
    path.chmod(0)
    assert name in refused(TextOptions(str(path))).message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """/proc/self/mem is a regular file whose first page cannot be read, also by root."""
    path = Path("/proc/self/mem")
    if not path.is_file():
        pytest.skip("needs /proc")
    error = refused(TextOptions(str(path)))
    assert error.message.startswith("/proc/self/mem: cannot be read: ")
    assert error.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("damaged.jsonl", b'{"text": "good"}\n{"text": "cut'),
        ("damaged.parquet", b"PAR1 this is no parquet file PAR1"),
        ("damaged.json", b"\xff\xfe\x00 no json"),
        ("truncated.parquet", None),
    ],
)
def test_a_damaged_file_is_one_line(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is None:
        pa.parquet.write_table(pa.Table.from_pylist([{"text": text} for text in DOCUMENTS]), path)
        content = path.read_bytes()[:-20]
    path.write_bytes(content)
    error = refused(TextOptions(str(path), num_samples=1))
    assert name in error.message
    assert error.hint


def test_bytes_that_are_no_utf8_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 100)
    assert "".join(documents_of(TextOptions(str(path)))) == "caf\ufffd " * 100


def test_rows_without_text_are_no_text(tmp_path: Path) -> None:
    """A null is not the word None."""
    path = tmp_path / "nulls.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("first", None, "last")))
    assert "None" not in "\n".join(documents_of(TextOptions(str(path))))


def test_a_hub_dataset_offline_is_one_line() -> None:
    """HF_HUB_OFFLINE=1 is set in conftest.py, before any library reads it."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    error = refused(TextOptions("nosuch-org/nosuch-dataset"))
    assert error.message.startswith("dataset 'nosuch-org/nosuch-dataset' (train) cannot be opened: ")
    assert error.hint is not None
    assert "--dataset builtin" in error.hint


def test_windows_are_not_views_of_the_whole_text(plain: Path) -> None:
    """A few windows must not hold the ids of a large text in memory."""
    found = token_windows(TextOptions(str(plain), num_samples=2, seed=3), by_bytes, 16)
    assert found.untyped_storage().nbytes() == found.nbytes


@pytest.mark.parametrize(
    ("asked", "limit", "length"),
    [(None, 256, 256), (None, 8192, 2048), (None, None, 2048), (512, 256, 512), (4096, 8192, 4096)],
)
def test_the_length_of_a_window(asked: int | None, limit: int | None, length: int) -> None:
    assert resolve_seq_len(TextOptions(seq_len=asked), limit) == length
