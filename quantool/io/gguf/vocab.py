"""The tokenizer and the names of a Hugging Face directory as GGUF metadata.

    tokenizer.json, BPE over bytes (GPT-2, Llama 3, Qwen)         -> "gpt2": tokens, types, merges, pre
    tokenizer.json, BPE over characters with byte tokens (Llama)  -> "llama": tokens, types, scores
    tokenizer.model alone                                         -> "llama": the scores are its own

One token per row of the embedding: an id that no token has becomes "[PADi]", unused. Before anything is returned, the
tokenizer that a reader rebuilds from these keys (tokenizer.py) and the one of the directory turn the same texts into
tokens; a difference is an error, so that no file is written that llama.cpp reads with other words than the model knows.
SentencePiece joins the best score first and tokenizer.json the first merge, and the score of a trained piece is minus
its rank: so the order in which pieces appear as merges gives their scores back. That holds for what SentencePiece
trained; where it does not, the comparison finds it.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; token types: llama.cpp include/llama.h.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantool.errors import QuantoolError, one_line
from quantool.io import Checkpoint
from quantool.io.gguf.file import Array, GgufFile
from quantool.io.gguf.pre import KNOWN, ROUGH, TORTURE, PreTokenizer, library_errors, named, recognise, short
from quantool.io.gguf.special import (
    Around,
    added_around,
    added_tokens,
    around_text,
    chat_templates,
    check_template,
    looks_special,
    special_fields,
)
from quantool.io.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_tokenizer,
    tokenizer_fields,
)
from quantool.io.gguf.writer import Value
from quantool.io.safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encode = Callable[[str], list[int]]
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
ADDED_SCORE, PAD_SCORE = -1000.0, -10000.0  # of what no merge makes, as llama.cpp's converter has them
MOST_COMPARED = 20_000  # tokens whose own text is compared as well
NOT_OURS = {f"general.{key}" for key in ("architecture", "file_type", "quantization_version", "alignment")}
NO_TOKENIZER = "from the model's page take tokenizer.json (or tokenizer.model) and tokenizer_config.json"


def tokenizer_metadata(checkpoint: Checkpoint, *, vocab_size: int, pre: str | None = None) -> dict[str, Value]:
    """All tokenizer.* keys of a checkpoint whose embedding has `vocab_size` rows; those of a GGUF as they are.

    `pre` names the pre-tokenizer whatever the tokenizer.json looks like; nothing is compared then.
    Raises QuantoolError when there is no tokenizer, a file is damaged, the vocabulary is larger than the embedding, or
    llama.cpp would cut texts differently; UsageError for a `pre` that does not exist.
    """
    row = None if pre is None else named(pre)
    path = checkpoint.path
    if path.is_file():
        return _own(path, vocab_size, pre)
    if (path / "tokenizer.json").exists():
        fields, encode, around, texts = _from_json(path / "tokenizer.json", vocab_size, row, pre)
    elif (path / "tokenizer.model").exists():
        fields, encode, around = _from_model(path, vocab_size)
        texts = [*TORTURE, *ROUGH]
    else:
        raise QuantoolError(
            f"{path}: there is no tokenizer, expected tokenizer.json or tokenizer.model", hint=NO_TOKENIZER
        )
    tokens: Any = fields["tokenizer.ggml.tokens"]
    fields |= special_fields(path, checkpoint.config, {token: i for i, token in enumerate(tokens)}, around)
    if pre is None:
        _compare(path, fields, encode, texts)
    return fields | chat_templates(path)


def _own(path: Path, vocab_size: int, pre: str | None) -> dict[str, Value]:
    """The tokenizer.* keys of a GGUF."""
    fields = tokenizer_fields(GgufFile(path))
    if fields.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise QuantoolError(f"{path}: there is no tokenizer", hint="convert the Hugging Face checkpoint of this model")
    if len(fields.get("tokenizer.ggml.tokens", [])) != vocab_size:
        raise _too_many(path, len(fields.get("tokenizer.ggml.tokens", [])), vocab_size)
    return fields if pre is None else {**fields, "tokenizer.ggml.pre": pre}


# --- tokenizer.json


def _from_json(
    path: Path, size: int, row: PreTokenizer | None, pre: str | None
) -> tuple[dict[str, Value], Encode, Around, list[str]]:
    """Keys of the vocabulary, the tokenizer itself, what it puts around a text, and the texts to compare."""
    from tokenizers import Tokenizer

    content = read_json(path)
    spm = _joins_characters(content)
    tokens, types = _vocabulary(path, content, size, spm=spm)
    merges = _merges(path, content["model"], tokens)
    if not spm:
        row = row or recognise(content, path)
    check_template(path, content.get("post_processor"))
    with library_errors(f"{path}: the tokenizers library cannot read it"):
        tokenizer = Tokenizer.from_file(str(path))
        around = around_text(tokenizer)
        first = tokenizer.encode("a", add_special_tokens=False).tokens
    texts = [*TORTURE, *([] if row and row.published else ROUGH)]
    fields: dict[str, Value] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if row and not spm:
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre or row.names[0]}
        fields["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
        if row.ignore_merges != (content["model"].get("ignore_merges") is True):
            texts += _own_texts(tokenizer, tokens, spm=False)  # the words that one of the two does not merge
    else:
        fields |= _scores(tokens, types, merges)
        fields["tokenizer.ggml.add_space_prefix"] = first[:1] != ["a"]
        texts += _own_texts(tokenizer, tokens, spm=True)
        if "Metaspace" in repr(
            content.get("pre_tokenizer")
        ):  # no second space before one; SentencePiece and GGUF add it
            texts = [text.lstrip(" ") for text in texts]

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return fields, encode, around, texts


def _joins_characters(content: Mapping[str, Any]) -> bool:
    """Whether the pieces are characters, spaces written as U+2581, and not bytes."""
    model = content.get("model")
    steps = repr([content.get("normalizer"), content.get("pre_tokenizer")])
    return "▁" in steps or (isinstance(model, dict) and model.get("byte_fallback") is True)


def _vocabulary(path: Path, content: Mapping[str, Any], size: int, *, spm: bool) -> tuple[list[str], list[int]]:
    """One token and its type per row of the embedding, every id and type checked."""
    model = content.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise QuantoolError(
            f'{path}: the model is {short(kind)}, expected "BPE"',
            hint="only vocabularies of byte-level BPE and of SentencePiece's BPE can be written",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise QuantoolError(f"{path}: {key} is {short(model[key])}, expected none: a GGUF cannot say it")
    ids, types = _ids(path, model.get("vocab"), content.get("added_tokens") or [])
    if len(ids) > size or max(ids.values(), default=0) >= size:
        raise _too_many(path, max(len(ids), 1 + max(ids.values())), size)
    names: dict[int, str] = {}
    for token, index in ids.items():
        if names.setdefault(index, token) != token:
            raise QuantoolError(f"{path}: tokens {short(names[index])} and {short(token)} have the same id {index}")
    if spm and isinstance(unknown := model.get("unk_token"), str):
        types[unknown] = UNKNOWN
    return _fill(names, types, size, spm=spm)


def _ids(path: Path, vocabulary: Any, added: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The id of every token, and the type of those that were added."""
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise QuantoolError(f"{path}: model.vocab or added_tokens has the wrong type, expected an object and a list")
    ids, types = dict(vocabulary), dict[str, int]()
    for entry in added:
        token = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(token, str) or ids.setdefault(token, entry.get("id")) != entry.get("id"):
            raise QuantoolError(
                f"{path}: added token {short(entry)} has no text, or another id than model.vocab gives it"
            )
        types[token] = CONTROL if entry.get("special") is True or looks_special(token) else USER_DEFINED
    for token, index in ids.items():
        if type(index) is not int or index < 0:
            raise QuantoolError(f"{path}: token {short(token)} has id {short(index)}, expected a whole number")
    return ids, types


def _fill(names: Mapping[int, str], types: Mapping[str, int], size: int, *, spm: bool) -> tuple[list[str], list[int]]:
    """Tokens and types of the ids 0 to size - 1; an id without a token is padding."""
    taken = set(names.values())
    tokens, kinds = [], []
    for index in range(size):
        token = names.get(index)
        if token is None:
            pad = f"[PAD{index}]"
            tokens.append(pad if pad not in taken else f"[PAD{index}][]")
            kinds.append(UNUSED)
        else:
            tokens.append(token)
            kinds.append(types.get(token, BYTE if spm and token in BYTES else NORMAL))
    return tokens, kinds


def _merges(path: Path, model: Mapping[str, Any], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The merges as pairs, in order; of a pair that stands twice the last counts, as in the tokenizers library."""
    known, pairs = set(tokens), dict[tuple[str, str], None]()
    merges = model.get("merges")
    for merge in reversed(merges if isinstance(merges, list) else []):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise QuantoolError(f"{path}: merge {short(merge)} is no pair of tokens")
        left, right = pair
        if not {left, right, left + right} <= known or " " in left + right:
            raise QuantoolError(f"{path}: merge {short(merge)} does not join two tokens to a third")
        pairs.setdefault((left, right))
    return list(reversed(pairs))


# --- SentencePiece


def _scores(tokens: list[str], types: list[int], merges: Sequence[tuple[str, str]]) -> dict[str, Value]:
    """Keys of a "llama" vocabulary: minus its rank for what a merge makes, in the order of the first merge of each."""
    made = {left + right: None for left, right in merges}
    ranks = {token: -float(rank) for rank, token in enumerate(made)}
    for index, token in enumerate(tokens):
        if types[index] == USER_DEFINED and "▁" in token:  # looked for before spaces are written as U+2581
            types[index] = NORMAL if token in made else USER_DEFINED
            tokens[index] = token if token in made else token.replace("▁", " ")
    return _spm_fields(tokens, types, [ranks.get(token, ADDED_SCORE) for token in tokens])


def _spm_fields(tokens: list[str], types: list[int], scores: list[float]) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [PAD_SCORE if kind == UNUSED else s for s, kind in zip(scores, types, strict=True)],
        "tokenizer.ggml.token_type": types,
    }


def _from_model(directory: Path, size: int) -> tuple[dict[str, Value], Encode, Around]:
    """Keys of the vocabulary of a tokenizer.model and of the tokens added to it, SentencePiece itself, and its BOS."""
    path = directory / "tokenizer.model"
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise QuantoolError(
            f"{path}: the sentencepiece library is needed to read it", hint="pip install sentencepiece"
        ) from error
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise QuantoolError(f"{path}: is no SentencePiece model: {one_line(error)}", hint=NO_TOKENIZER) from error
    count = model.get_piece_size()
    names = {index: model.id_to_piece(index) for index in range(count)}
    types = {name: _piece_type(model, index) for index, name in names.items()}
    for index, token, kind in added_tokens(directory):
        if names.setdefault(index, token) != token:
            raise QuantoolError(
                f"{path}: token {index} is {short(names[index])}, the added tokens call it {short(token)}"
            )
        types[token] = kind if index >= count or kind == CONTROL else types[token]
    if len(names) > size or max(names) >= size:
        raise _too_many(path, max(len(names), 1 + max(names)), size)
    tokens, kinds = _fill(names, types, size, spm=True)
    fields = _spm_fields(
        [name.replace("▁", " ") if kind == USER_DEFINED else name for name, kind in zip(tokens, kinds, strict=True)],
        kinds,
        [model.get_score(index) if index < count else ADDED_SCORE for index in range(size)],
    )
    fields["tokenizer.ggml.add_space_prefix"] = model.encode("a", out_type=str)[:1] != ["a"]
    return fields, lambda text: list(model.encode(text)), added_around(directory, model.bos_id(), model.eos_id())


def _piece_type(model: Any, index: int) -> int:
    tests = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED), (model.is_byte, BYTE))
    return next((kind for test, kind in tests if test(index)), NORMAL)


# --- the comparison


def _own_texts(tokenizer: "Tokenizer", tokens: Sequence[str], *, spm: bool) -> list[str]:
    """The text of the tokens themselves, of not too many: of every second, third ... one of a large vocabulary."""
    chosen = tokens[:: 1 + len(tokens) // MOST_COMPARED]
    if spm:
        return [token.replace("▁", " ") for token in chosen]
    decoder = tokenizer.decoder
    return [text for token in chosen if decoder and "\ufffd" not in (text := decoder.decode([token]))]


def _compare(path: Path, fields: Mapping[str, Value], encode: Encode, texts: Sequence[str]) -> None:
    """The tokenizer that these keys give and the one of the directory make the same tokens of every text."""
    kind, pre = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    tokens: Any = fields["tokenizer.ggml.tokens"]
    unchecked = f"--pre {pre} writes it all the same"
    if kind == "llama" and (missing := BYTES - set(tokens)):
        raise QuantoolError(
            f"{path}: {len(missing)} of the 256 byte tokens (<0x00> to <0xFF>) are missing from the vocabulary, "
            "llama.cpp ends at any character that has no token",
            hint=unchecked,
        )
    rebuilt = build_tokenizer(fields, path)
    for text in texts:
        with library_errors(f"{path}: the tokenizers library cannot read it"):
            theirs, ours = encode(text), rebuilt.encode(text, add_special_tokens=False).ids
        if theirs != ours:
            at = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), 0)
            raise QuantoolError(
                f"{path}: llama.cpp would cut {text[:40]!r} into {_words(tokens, ours, at)} where the model knows "
                f"{_words(tokens, theirs, at)} (tokenizer {kind}, pre-tokenizer {pre})",
                hint=f"--pre NAME, one of {KNOWN}" if kind == "gpt2" else unchecked,
            )


def _words(tokens: Sequence[str], ids: Sequence[int], at: int) -> list[str]:
    return [tokens[index] if index < len(tokens) else f"[{index}]" for index in ids[at : at + 3]]


def _too_many(path: Path, tokens: int, rows: int) -> QuantoolError:
    return QuantoolError(
        f"{path}: the vocabulary does not match the embedding: {tokens} tokens, {rows} rows",
        hint="take tokenizer and weights from the same checkpoint",
    )


# --- general.*


def general_metadata(checkpoint: Checkpoint) -> dict[str, Value]:
    """general.name, license, tags, base models ... of a checkpoint, from its model card, config and directory name.

    A model card that cannot be read is left out. Of a GGUF its own general.* keys. Not among them: architecture,
    file_type and quantization_version.
    """
    if checkpoint.path.is_file():
        file = GgufFile(checkpoint.path)
        own = {key: file.values(key) if isinstance(value, Array) else value for key, value in file.fields.items()}
        return {key: value for key, value in own.items() if key.startswith("general.") and key not in NOT_OURS}
    from gguf import Metadata, size_label

    path = checkpoint.path.resolve()  # so that the directory has a name
    total, experts, count = _parameters(checkpoint)
    log = logging.getLogger("metadata")
    before = log.disabled
    log.disabled = True
    try:
        found = _written(Metadata.load(None, path, None, total), path)
    except Exception:  # noqa: BLE001 - a model card and a config may hold anything
        found = _written(Metadata.apply_metadata_heuristic(Metadata(), {}, {}, path, total), path)
    finally:
        log.disabled = before
    if total:
        found["general.size_label"] = size_label(total, total - experts, experts // max(1, count), count)
    return found


def _written(metadata: Any, path: Path) -> dict[str, Value]:
    """What gguf.Metadata would write, less what has another type than its key says."""
    from gguf import GGUFWriter
    from gguf.constants import GGUFValueType as Kind

    metadata.name = metadata.name if isinstance(metadata.name, str) and metadata.name else path.name or "model"
    writer = GGUFWriter(None, "llama")
    metadata.set_gguf_meta_model(writer)
    fields: dict[str, Value] = {}
    for key, (value, kind) in ((key, (entry.value, entry.type)) for key, entry in writer.kv_data[0].items()):
        if key in NOT_OURS or not isinstance(key, str):
            continue
        if kind == Kind.STRING and isinstance(value, str):
            fields[key] = value.encode(errors="replace").decode()
        elif kind == Kind.ARRAY and isinstance(value, list):
            fields[key] = [text for text in value if isinstance(text, str)]
        elif kind == Kind.FLOAT32 and type(value) in (int, float) and abs(value) < 1e30:
            fields[key] = float(value)
        elif kind in (Kind.INT32, Kind.UINT32) and type(value) is int and abs(value) < 1 << 31:
            fields[key] = np.int32(value) if kind == Kind.INT32 else value
    return fields


def _parameters(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Parameters in all, those of experts, and how many experts a block has; 0 where codes are stored."""
    if "quantization_config" in checkpoint.config:
        return 0, 0, 0
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.infos.items()}
    of_experts = {name for name in sizes if ".experts." in name}
    numbers = [int(match[1]) + 1 for name in of_experts if (match := re.search(r"\.experts\.(\d{1,4})\.", name))]
    fused = [checkpoint.infos[name].shape[0] for name in of_experts if len(checkpoint.infos[name].shape) == 3]
    return sum(sizes.values()), sum(sizes[name] for name in of_experts), max([*numbers, *fused], default=0)
