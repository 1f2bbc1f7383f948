"""Text -> token windows [num_samples, seq_len].

A dataset is `builtin` (text that every Python carries, so nothing needs the network), a text, jsonl or parquet
file, or the name of a hub dataset. Documents are joined by a blank line, tokenized once, and cut into windows
that do not overlap. Only as much text is read as the windows asked for need.

`chunks` cuts as llama-perplexity does, so that figures can be compared with its own: a text file is one string, byte
for byte, less one line break at its end; special tokens spelled out in the text are plain text; where the model begins
a text with BOS, BOS is in front of the first window and replaces the first token of every window.
Source: common/arg.cpp (--file) and tools/perplexity/perplexity.cpp of https://github.com/ggml-org/llama.cpp
"""

import ast
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantool.errors import QuantoolError, UsageError, one_line

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, label) while a stage works."""

DEFAULT_SEQ_LEN = 2048
CHARS_PER_TOKEN = 8  # of text read per token asked for: twice what is usual, so that one read is nearly always enough
JOIN = "\n\n"
TABLES = frozenset({".jsonl", ".json", ".parquet"})  # files of rows; every other file is text
# Of the standard library: what is installed beside it, and text about tests.
NOT_DOCUMENTATION = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Which text, and how much of it. `seed` 0 takes the first windows in order, any other draws them at random."""

    dataset: str = "builtin"
    split: str = "train"
    text_column: str = "text"
    num_samples: int | None = 128  # None: all there are
    seq_len: int | None = None  # None: 2048, or the model's own limit when that is smaller
    seed: int = 0


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, *, verbose: bool) -> Any: ...


class SpecialTokenizer(Protocol):
    """The part that `chunks` uses: who puts BOS in front, and whether "</s>" in a text is a token, is the caller's."""

    @property
    def bos_token_id(self) -> int | None: ...

    def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool, verbose: bool) -> Any: ...


def no_progress(done: int, total: int, label: str) -> None:
    """Progress for a caller that does not watch."""


def resolve_seq_len(options: TextOptions, max_positions: int | None) -> int:
    """The window length in tokens: as asked, or 2048 capped by what the model was built for."""
    if options.seq_len is not None:
        return options.seq_len
    return min(DEFAULT_SEQ_LEN, max_positions or DEFAULT_SEQ_LEN)


def token_windows(options: TextOptions, tokenizer: Tokenizer, seq_len: int) -> "torch.Tensor":
    """Token ids int64 [num_samples, seq_len].

    Raises QuantoolError when the text holds fewer windows than asked for: never silently fewer.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    return _cut(options, _token_ids(options, documents_of(options), encode, seq_len), seq_len)


def chunks(options: TextOptions, tokenizer: SpecialTokenizer, seq_len: int) -> "torch.Tensor":
    """Token ids int64 [num_samples, seq_len] as llama-perplexity cuts them: see the top of the module.

    Raises QuantoolError as `token_windows` does.
    """
    begun: list[int] = tokenizer("", add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
    bos = begun[:1] if begun[:1] == [tokenizer.bos_token_id] else []

    def encode(text: str) -> list[int]:
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [*bos, *found["input_ids"]]

    windows = _cut(options, _token_ids(options, documents_of(options, raw=True), encode, seq_len), seq_len)
    if bos:
        windows[:, 0] = bos[0]
    return windows


def _cut(options: TextOptions, token_ids: list[int], seq_len: int) -> "torch.Tensor":
    import torch

    ids = torch.tensor(token_ids, dtype=torch.int64)
    available = len(ids) // seq_len
    wanted = available if options.num_samples is None else options.num_samples
    if wanted > available or not available:
        raise QuantoolError(
            f"dataset '{options.dataset}' ({options.split}): {wanted or 1} windows of {seq_len} tokens asked for, "
            f"the text has {available} ({len(ids)} tokens)",
            hint=f"use --num-samples {available}" if available else "use a shorter --seq-len or a longer text",
        )
    windows = ids[: available * seq_len].view(available, seq_len)
    if options.seed:
        generator = torch.Generator().manual_seed(options.seed)
        windows = windows[torch.randperm(available, generator=generator)]
    return windows[:wanted].clone()


def _token_ids(
    options: TextOptions, documents: Iterator[str], encode: Callable[[str], list[int]], seq_len: int
) -> list[int]:
    """Ids of the whole text, or of as long a beginning of it as the first `num_samples` windows need."""
    in_order = options.num_samples is not None and not options.seed
    needed = (options.num_samples or 0) * seq_len
    parts: list[str] = []
    limit = needed * CHARS_PER_TOKEN if in_order else None
    while True:
        complete = _read(documents, parts, limit)
        # The last tokens before a cut are not those of the longer text: never use them.
        ids = encode(JOIN.join(parts))
        if complete or len(ids) > needed + 64:
            return ids
        limit = (limit or 1) * 2


def _read(documents: Iterator[str], parts: list[str], limit: int | None) -> bool:
    """Append documents to `parts` up to `limit` characters in all; True when there are no more."""
    size = sum(map(len, parts))
    for document in documents:
        parts.append(document)
        size += len(document)
        if limit is not None and size >= limit:
            return False
    return True


def documents_of(options: TextOptions, *, raw: bool = False) -> Iterator[str]:
    """The documents of a dataset, in order; nothing is read before the first is asked for.

    With `raw` a text file keeps its line breaks of any kind, but for the last of all.
    """
    if options.dataset == "builtin":
        return builtin_documents(options.split)
    path = Path(options.dataset)
    if path.is_file():
        return _file_documents(path, options, raw)
    if path.exists() or path.suffix or options.dataset.count("/") > 1:
        raise QuantoolError(
            f"dataset '{options.dataset}': no such file",
            hint="use a text, jsonl or parquet file, a hub dataset name, or --dataset builtin",
        )
    return _hub_documents(options)


def _file_documents(path: Path, options: TextOptions, raw: bool) -> Iterator[str]:
    if path.suffix in TABLES:
        if not path.stat().st_size:
            raise QuantoolError(f"dataset '{options.dataset}': the file is empty", hint="use a file that has text")
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return _column(_load_dataset(kind, options, data_files=str(path), split="train"), options)
    return _text_file(path, raw)


def _text_file(path: Path, raw: bool) -> Iterator[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise QuantoolError(f"{path}: cannot be read: {error.strerror}", hint="check the file's permissions") from error
    if raw:  # llama.cpp reads each byte that is not UTF-8 as one replacement character, Python some of them together
        yield re.sub("[\udc80-\udcff]", "\ufffd", data.decode("utf-8", "surrogateescape")).removesuffix("\n")
    else:
        yield re.sub("\r\n?", "\n", data.decode("utf-8", "replace"))


def _hub_documents(options: TextOptions) -> Iterator[str]:
    return _column(_load_dataset(options.dataset, options, data_files=None, split=options.split), options)


def _load_dataset(name: str, options: TextOptions, *, data_files: str | None, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, data_files=data_files, split=split, streaming=True)
    except Exception as error:  # the library raises many classes for a missing, private or offline dataset
        raise QuantoolError(
            f"dataset '{options.dataset}' ({split}) cannot be opened: {one_line(error)}",
            hint="use a local text, jsonl or parquet file, or --dataset builtin",
        ) from error
    return rows


def _column(rows: Iterable[dict[str, Any]], options: TextOptions) -> Iterator[str]:
    try:
        for row in rows:
            if options.text_column not in row:
                raise UsageError(
                    f"dataset '{options.dataset}': no column '{options.text_column}', it has {', '.join(sorted(row))}",
                    hint=_column_hint(row),
                )
            text = row[options.text_column]
            if not isinstance(text, str | None):
                raise UsageError(
                    f"dataset '{options.dataset}': column '{options.text_column}' holds {type(text).__name__}, "
                    "expected text",
                    hint=_column_hint(row),
                )
            if text:
                yield text
    except QuantoolError:
        raise
    except Exception as error:  # a damaged file surfaces as one of many classes of pyarrow and datasets
        raise QuantoolError(
            f"dataset '{options.dataset}' cannot be read: {one_line(error)}", hint="check the file"
        ) from error


def _column_hint(row: dict[str, Any]) -> str:
    named = [name for name, value in row.items() if isinstance(value, str)]
    return f"use --text-column {named[0]}" if named else "use a dataset that has a column of text"


def builtin_documents(split: str) -> Iterator[str]:
    """The interpreter's own documentation: every fourth document is test, the rest train. Same Python, same text."""
    if split not in ("train", "test"):
        raise UsageError(f"dataset 'builtin' has no split '{split}', it has train and test", hint="use --split test")
    for i, document in enumerate(_documentation()):
        if (i % 4 == 3) == (split == "test"):
            yield document


def _documentation() -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        yield from _unseen(topics[name], seen)
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py")):
        if NOT_DOCUMENTATION.isdisjoint(source.relative_to(library).parts) and (text := JOIN.join(_docstrings(source))):
            yield from _unseen(text, seen)


def _unseen(document: str, seen: set[str]) -> Iterator[str]:
    """The document without paragraphs that an earlier one has: topics repeat each other, train must not hold test."""
    paragraphs = [text for part in re.split(r"\n\s*\n", document) if (text := part.strip()) not in seen]
    seen.update(paragraphs)
    if paragraphs:
        yield JOIN.join(paragraphs)


def _docstrings(source: Path) -> Iterator[str]:
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) and len(text) > 60:
            yield text
