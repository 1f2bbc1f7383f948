"""Rebuilds tokenizer.json, tokenizer_config.json and generation_config.json from GGUF metadata.

Two kinds of vocabulary are known. `gpt2`: byte-level BPE, tokens and merges as in tokenizer.json; what is lost
is the pre-tokenizer, of which only a name is left (`tokenizer.ggml.pre`). `llama`: a SentencePiece BPE model,
tokens and scores; SentencePiece joins the neighbours whose joined piece has the highest score, so the merges
are every way to cut a piece in two, best score first.
Patterns: the models' own tokenizer.json, as listed in llama.cpp src/llama-vocab.cpp.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import QuantoolError
from quantool.io.gguf.file import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {  # each pattern splits what the ones before it left together
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (WORDS % "{1,3}",),
    "llama3": (WORDS % "{1,3}",),
    "llama-v3": (WORDS % "{1,3}",),
    "qwen2": (WORDS % "",),
    "deepseek-r1-qwen": (WORDS % "",),
}
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # whole words that are tokens are not built from merges; BOS is added


def token_ids(file: GgufFile) -> dict[str, int]:
    """bos_token_id, eos_token_id, pad_token_id: those that the file gives."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: file.fields.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: value for name, value in ids.items() if type(value) is int}


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write the three files; a GGUF without a tokenizer gives generation_config.json only.

    Raises QuantoolError when the vocabulary is of a kind that cannot be rebuilt, or inconsistent.
    """
    ids: dict[str, Any] = dict(token_ids(file))
    turn_end = file.fields.get("tokenizer.ggml.eot_token_id")
    if type(turn_end) is int and "eos_token_id" in ids and turn_end != ids["eos_token_id"]:
        ids["eos_token_id"] = [ids["eos_token_id"], turn_end]
    _write_json(directory / "generation_config.json", ids)
    if file.fields.get("tokenizer.ggml.model", "none") == "none":
        return
    try:
        build_tokenizer(file).save(str(directory / "tokenizer.json"))
    except QuantoolError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a merge that is not in the vocabulary
        raise QuantoolError(f"{file.path}: the tokenizer cannot be rebuilt: {error}") from error
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(file))


def build_tokenizer(file: GgufFile) -> "Tokenizer":
    """The tokenizer of the `tokenizers` library that the metadata describes."""
    from tokenizers import AddedToken

    kind = file.fields["tokenizer.ggml.model"]
    tokens: list[str] = file.values("tokenizer.ggml.tokens")
    types: list[int] = file.values("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise QuantoolError(
            f"{file.path}: the vocabulary has {len(tokens)} tokens, {len(set(tokens))} of them different"
        )
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, tokens, types)
    else:
        raise QuantoolError(f"{file.path}: tokenizer {kind!r} is not known, expected gpt2 or llama")
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=role == CONTROL)
            for token, role in zip(tokens, types, strict=True)
            if role in (CONTROL, USER_DEFINED)
        ]
    )
    _add_template(file, tokenizer, tokens)
    return tokenizer


def _byte_level(file: GgufFile, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = file.fields.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise QuantoolError(
            f"{file.path}: pre-tokenizer {pre!r} is not known, expected one of {', '.join(PRE_TOKENIZERS)}",
            hint="use the Hugging Face checkpoint of this model",
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.values("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in LLAMA3))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores: list[float] = file.values("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise QuantoolError(f"{file.path}: the vocabulary has {len(tokens)} tokens and {len(scores)} scores")
    unknown = file.fields.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(tokens, types, scores),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(file.fields.get("tokenizer.ggml.add_space_prefix", True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every cut of a normal piece into two normal pieces, best score first."""
    pieces = {token: index for index, token in enumerate(tokens) if types[index] == NORMAL}
    ranked = sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece]))
    cuts = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in pieces and right in pieces]


def _add_template(file: GgufFile, tokenizer: "Tokenizer", tokens: list[str]) -> None:
    """BOS and EOS around a text where the file asks for them, else as its kind of vocabulary does."""
    from tokenizers import processors

    default = file.fields["tokenizer.ggml.model"] == "llama" or file.fields.get("tokenizer.ggml.pre") in LLAMA3
    asked = {
        "bos_token_id": file.fields.get("tokenizer.ggml.add_bos_token", default),
        "eos_token_id": file.fields.get("tokenizer.ggml.add_eos_token", False),
    }
    ids = {name: index for name, index in token_ids(file).items() if asked.get(name)}
    if not ids:
        return
    first, last = ([tokens[ids[name]]] if name in ids else [] for name in ("bos_token_id", "eos_token_id"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in [*first, "$B", *last])],
        special_tokens=[(tokens[index], index) for index in ids.values()],
    )


def _tokenizer_config(file: GgufFile) -> dict[str, Any]:
    tokens = file.values("tokenizer.ggml.tokens")
    ids = {**token_ids(file), "unk_token_id": file.fields.get("tokenizer.ggml.unknown_token_id")}
    names = {
        key.removesuffix("_id"): tokens[index]
        for key, index in ids.items()
        if type(index) is int and 0 <= index < len(tokens)
    }
    template = file.fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": file.fields.get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if isinstance(template, str) else {}),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise QuantoolError(f"{path}: cannot be written: {error.strerror or error}") from error
