"""Rebuilds tokenizer.json, tokenizer_config.json and generation_config.json from GGUF metadata.

    tokenizer.ggml.model   kept                           rebuilt
    "gpt2"                 tokens, merges, `pre`          BPE over bytes, cut by the row of pre.py
    "llama"                tokens, scores                 BPE over characters, spaces written as U+2581, bytes as <0x0A>

SentencePiece joins the neighbours whose joined piece has the highest score, so the merges of a "llama" vocabulary are
every way to cut a piece in two, best score first. What llama.cpp assumes where a key is missing, and what it decides by
the text of a token, is done here too (src/llama-vocab.cpp, llama_vocab::impl::load), so that a text becomes the same
tokens. The same function checks what vocab.py is about to write.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import QuantoolError
from quantool.io.gguf.file import Array, GgufFile, short
from quantool.io.gguf.pre import PRE_TOKENIZERS, library_errors, splitter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPECIAL_KEYS = {  # word of Hugging Face -> key
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "padding_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # llama.cpp's own spelling
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
END_KEYS = ("eot_token_id", "eom_token_id")  # end of turn, end of message: generation stops there as well
# Tokens that llama.cpp takes for an end of generation by their text, whatever their type.
ENDS = frozenset(
    [
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~[", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    ]
)
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {"bos": 11, "eos": 11}}  # llama.cpp's, without a key


def tokenizer_fields(file: GgufFile) -> dict[str, Any]:
    """The tokenizer.* keys of a file, arrays decoded."""
    return {
        key: file.values(key) if isinstance(value, Array) else value
        for key, value in file.fields.items()
        if key.startswith("tokenizer.")
    }


def token_ids(file: GgufFile) -> dict[str, int]:
    """bos_token_id, eos_token_id, pad_token_id: those that the file gives."""
    ids = {
        f"{word}_token_id": file.fields.get(f"tokenizer.ggml.{SPECIAL_KEYS[word]}") for word in ("bos", "eos", "pad")
    }
    return {name: value for name, value in ids.items() if type(value) is int}


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write the three files; a GGUF without a tokenizer gives generation_config.json only.

    Raises QuantoolError when the vocabulary is of a kind that cannot be rebuilt, or inconsistent.
    """
    ids: dict[str, Any] = dict(token_ids(file))
    ends = [file.fields.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    others = [end for end in ends if type(end) is int and end != ids.get("eos_token_id")]
    if others and "eos_token_id" in ids:
        ids["eos_token_id"] = [ids["eos_token_id"], *dict.fromkeys(others)]
    _write_json(directory / "generation_config.json", ids)
    if file.fields.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return
    fields = tokenizer_fields(file)
    tokenizer = build_tokenizer(fields, file.path, name=str(file.fields.get("general.name", "")))
    tokenizer.save(str(directory / "tokenizer.json"))
    context = file.fields.get(f"{file.fields.get('general.architecture')}.context_length")
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(fields, context))


def build_tokenizer(fields: Mapping[str, Any], path: Path, *, name: str = "") -> "Tokenizer":
    """The tokenizer of the `tokenizers` library that tokenizer.* keys describe; `name` is general.name.

    Raises QuantoolError when the vocabulary is of another kind than gpt2 and llama, or inconsistent.
    """
    kind = fields.get("tokenizer.ggml.model")
    tokens: list[str] = fields.get("tokenizer.ggml.tokens") or []
    types: list[int] = fields.get("tokenizer.ggml.token_type") or []
    for key, items, wanted in (("tokens", tokens, str), ("token_type", types, int)):
        if not isinstance(items, list) or any(type(item) is not wanted for item in items):
            raise QuantoolError(f"{path}: tokenizer.ggml.{key} is {short(items)}, expected a list of {wanted.__name__}")
    types = types or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise QuantoolError(
            f"{path}: the vocabulary has {len(tokens)} tokens, {len(set(tokens))} of them different, "
            f"and {len(types)} types"
        )
    if kind not in ("gpt2", "llama"):
        raise QuantoolError(f"{path}: tokenizer {short(kind)} is not known, expected gpt2 or llama")
    with library_errors(f"{path}: the tokenizer cannot be rebuilt"):
        tokenizer = (_byte_level if kind == "gpt2" else _sentencepiece)(fields, path, tokens, types)
        _add_special(tokenizer, tokens, types, strip="phi-3" in name.lower() or "phi3" in name.lower())
        _add_template(fields, tokenizer, tokens)
    return tokenizer


def _byte_level(fields: Mapping[str, Any], path: Path, tokens: Sequence[str], types: Sequence[int]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models

    pre = fields.get("tokenizer.ggml.pre", "default")
    row = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if row is None:
        raise QuantoolError(
            f"{path}: pre-tokenizer {short(pre)} is not known, expected one of {', '.join(PRE_TOKENIZERS)}",
            hint="use the Hugging Face checkpoint of this model",
        )
    merges = [_pair(merge) for merge in fields.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for pair in merges:
        if not {*pair, "".join(pair)} <= vocabulary.keys():  # the library panics, with a backtrace, where it is long
            said = f"the merge {short(' '.join(pair))} is of tokens that the vocabulary has not"
            raise QuantoolError(f"{path}: the tokenizer cannot be rebuilt: {said}")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=row.ignore_merges))
    tokenizer.pre_tokenizer = splitter(row)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """Two tokens, cut at the first space that is not the first character."""
    at = merge.find(" ", 1)
    return (merge[:at], merge[at + 1 :]) if at > 0 else ("", "")


def _sentencepiece(fields: Mapping[str, Any], path: Path, tokens: Sequence[str], types: Sequence[int]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores: list[float] = fields.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise QuantoolError(f"{path}: the vocabulary has {len(tokens)} tokens and {len(scores)} scores")
    unknown = special_id(fields, "unk", len(tokens))
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(tokens, types, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every cut of a normal piece into two normal pieces, best score first."""
    pieces = {token: index for index, token in enumerate(tokens) if types[index] == NORMAL}
    ranked = sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece]))
    cuts = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in pieces and right in pieces]


def _add_special(tokenizer: "Tokenizer", tokens: Sequence[str], types: Sequence[int], *, strip: bool) -> None:
    """Tokens found in the text before anything else; `strip` as Phi-3 has it: they take the spaces behind them."""
    from tokenizers import AddedToken

    kept = ("<unk>", "<s>", "<|endoftext|>")
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                normalized=False,
                special=kind != USER_DEFINED or token in ENDS,
                rstrip=strip and token not in kept,
            )
            for token, kind in zip(tokens, types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) or token in ENDS
        ]
    )


def special_id(fields: Mapping[str, Any], word: str, size: int) -> int | None:
    """The token of a role ("bos"), as llama.cpp finds it: its key, else the default; None when outside `size`."""
    default = DEFAULT_IDS.get(str(fields.get("tokenizer.ggml.model")), {}).get(word)
    for index in (fields.get(f"tokenizer.ggml.{SPECIAL_KEYS[word]}"), default):
        if type(index) is int and 0 <= index < size:
            return index
    return None


def _add_template(fields: Mapping[str, Any], tokenizer: "Tokenizer", tokens: Sequence[str]) -> None:
    """BOS and EOS around a text where the file asks for them, else as its kind of vocabulary does."""
    from tokenizers import processors

    row = PRE_TOKENIZERS.get(fields.get("tokenizer.ggml.pre", "default"))
    default = fields.get("tokenizer.ggml.model") == "llama" or (row is not None and row.add_bos)
    asked = {
        "bos": fields.get("tokenizer.ggml.add_bos_token", default),
        "eos": fields.get("tokenizer.ggml.add_eos_token"),
    }
    found = {word: special_id(fields, word, len(tokens)) for word, wanted in asked.items() if wanted}
    ids = {word: index for word, index in found.items() if index is not None}
    first, last = ([tokens[ids[word]]] if word in ids else [] for word in ("bos", "eos"))
    if not first and not last:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in [*first, "$B", *last])],
        special_tokens=[(tokens[index], index) for index in ids.values()],
    )


def _tokenizer_config(fields: Mapping[str, Any], context: Any) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {word: fields.get(f"tokenizer.ggml.{key}") for word, key in SPECIAL_KEYS.items()}
    template: Any = fields.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    if named:
        every = {**({"default": template} if template else {}), **named}
        template = [{"name": name, "template": text} for name, text in every.items()]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{word}_token": tokens[i] for word, i in ids.items() if type(i) is int and 0 <= i < len(tokens)},
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if template else {}),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise QuantoolError(f"{path}: cannot be written: {error.strerror or error}") from error
