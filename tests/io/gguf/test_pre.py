"""Every row of the table of pre-tokenizers against llama.cpp itself, and the recognition of tokenizer.json.

The vocabulary is trained without any pre-tokenizer, on the very text that is compared: merges run across words, spaces
and digits, so that every cut, and every missing cut, shows in the tokens.
"""

import ctypes
import functools
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from llamacpp import get_vocab, loaded, vocab_tokenize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from quantool.errors import QuantoolError, UsageError
from quantool.io.gguf.pre import GPT2, PRE_TOKENIZERS, ROUGH, ROWS, TORTURE, PreTokenizer, named, recognise, splitter

MORE = (
    "éA Éa ÀÉÎé ß ſ ŉ Ǆǅǆ 1️⃣ 👨‍👩‍👧 ❤️ ０１２ ١٢٣٤ x²",
    "\u00a0n\u2003e\u3000i\u200bz\u200dj\u2028l\u0085n\ufeffb \u00adsoft",
    " don't DON'T Don'T l'été d'Été O'Neil 's's 'S 's. rock'n'roll '12 'tis 'Twas 've'VE",
    "$+<=>^~|` ¿¡§¶ «» ‘’ – … ：；（）【】۔،",
    "कर्म नमस्ते বাংলা العربية עִבְרִית ภาษาไทย ก็ได้ 中文字符 한국어 조선 カタカナ ｶﾀｶﾅ ㄅㄆ ⼀ ꙀꙁẢả ᏣᏪ 𐐀𐐨 𞤀𞤢",
    " a  b   c     d      \n \n  \n   \n\t\n \r \r\n\t x\n\n\n1\n 2\t 3  4 \n",
)


@functools.cache
def vocabulary() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    text = "\f".join((*TORTURE, *ROUGH, *MORE))
    tokenizer.train_from_iterator([text[i : i + 13] for i in range(0, len(text), 5)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return tuple(sorted(model["vocab"], key=model["vocab"].get)), tuple((a, b) for a, b in model["merges"])


@functools.cache
def texts() -> tuple[str, ...]:
    pick = random.Random(0)
    letters = "".join((*TORTURE, *ROUGH, *MORE))
    return (*TORTURE, *ROUGH, *MORE, *("".join(pick.choices(letters, k=30)) for _ in range(80)))


def write(path: Path, pre: str) -> Path:
    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_llamacpp(path: Path) -> list[list[int]]:
    with loaded(path, vocab_only=True) as model:
        found = []
        for text in texts():
            data = text.encode()
            ids = (ctypes.c_int32 * (len(data) + 1))()
            found.append(list(ids[: vocab_tokenize(get_vocab(model), data, len(data), ids, len(ids), False, False)]))
        return found


def by_row(row: PreTokenizer) -> list[list[int]]:
    tokens, merges = vocabulary()
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges), ignore_merges=row.ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter(row)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts())]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[0])
def test_row_is_what_llama_cpp_does(tmp_path: Path, row: PreTokenizer) -> None:
    ours = by_row(row)
    for name in row.names:
        theirs = by_llamacpp(write(tmp_path / "v.gguf", name))
        wrong = [text for text, a, b in zip(texts(), ours, theirs, strict=True) if a != b]
        assert not wrong, f"{name}: {wrong[:3]}"


def test_rows_differ_and_the_comparison_shows_it() -> None:
    """Two rows are the same on TORTURE and ROUGH only where ignore_merges alone tells them apart."""
    cuts: dict[str, str] = {}
    for row in ROWS:
        found = repr([splitter(row).pre_tokenize_str(text) for text in TORTURE + ROUGH])
        other = cuts.setdefault(found, row.names[0])
        assert other == row.names[0] or (other, row.names[0]) == ("llama-bpe", "dbrx")
    assert len(PRE_TOKENIZERS) == sum(len(row.names) for row in ROWS)  # no name in two rows


def test_the_test_text_is_in_nfc() -> None:
    for text in TORTURE + ROUGH:
        assert unicodedata.normalize("NFC", text) == text


def test_published_is_equal_on_the_test_text_but_for_the_rough_part() -> None:
    rows = [row for row in ROWS if row.published]
    assert {row.names[0] for row in rows} == {"deepseek-llm", "deepseek-coder", "tekken", "gpt-4o"}
    for row in rows:
        published = splitter(PreTokenizer(row.names, row.published or ()))
        for text in TORTURE:
            assert published.pre_tokenize_str(text) == splitter(row).pre_tokenize_str(text)
        assert any(published.pre_tokenize_str(text) != splitter(row).pre_tokenize_str(text) for text in ROUGH)


# --- recognition

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NO_REGEX = {**BYTE_LEVEL, "use_regex": False}


def split(pattern: str, behavior: str = "Isolated", *, invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def digits(*, individual: bool = True) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": individual}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


FOLDED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
CJK = split("[一-龥ࠀ-一가-\ud7ff]+")
# The pre_tokenizer of released models, as their tokenizer.json has it -> the name.
RELEASED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "GPT-2, OLMo, Pythia": (BYTE_LEVEL, False, "gpt-2"),
    "GPT-2 spelled out": (sequence(split(GPT2.removesuffix(r"|\s+")), NO_REGEX), False, "gpt-2"),
    "SmolLM, StarCoder": (sequence(digits(), BYTE_LEVEL), False, "smollm"),
    "Llama 3": (sequence(split(FOLDED + r"\p{L}+|\p{N}{1,3}" + TAIL), NO_REGEX), True, "llama-bpe"),
    "DBRX": (sequence(split(CL100K, "Removed", invert=True), NO_REGEX), False, "dbrx"),
    "cl100k, words merged": (sequence(split(FOLDED + r"\p{L}+|\p{N}{1,3}" + TAIL), NO_REGEX), False, "dbrx"),
    "Qwen 2": (sequence(split(FOLDED + r"\p{L}+|\p{N}" + TAIL), NO_REGEX), False, "qwen2"),
    "DeepSeek Coder": (
        sequence(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), CJK, digits(), NO_REGEX),
        False,
        "deepseek-coder",
    ),
    "Mistral Nemo": (sequence(split(TEKKEN), NO_REGEX), True, "tekken"),
    "Llama 4": (sequence(split(O200K), NO_REGEX), False, "gpt-4o"),
}


def content(pre_tokenizer: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "ignore_merges": ignore_merges}
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "added_tokens": [], "model": model}


@pytest.mark.parametrize("model", RELEASED)
def test_structure_is_recognised(model: str) -> None:
    steps, ignore, name = RELEASED[model]
    assert recognise(content(steps, ignore_merges=ignore), Path("tokenizer.json")).names[0] == name


def test_every_row_is_recognised_by_its_own_patterns() -> None:
    for row in ROWS:
        steps = sequence(*map(split, row.published or row.patterns), NO_REGEX)
        assert recognise(content(steps, ignore_merges=row.ignore_merges), Path("x")) is row


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}])
def test_nfc_is_no_obstacle(normalizer: Any) -> None:
    assert recognise(content(BYTE_LEVEL, normalizer=normalizer), Path("x")).names[0] == "gpt-2"


UNKNOWN: dict[str, tuple[Any, Any, str]] = {
    "another regex": (sequence(split(r"\p{L}+|\p{N}{1,2}|\s"), NO_REGEX), None, "--pre NAME, one of default, gpt-2"),
    "cuts the same": (sequence(split(GPT2 + r"|\p{L}{99}"), NO_REGEX), None, "as gpt-2 does: --pre gpt-2"),
    "prefix space": ({**BYTE_LEVEL, "add_prefix_space": True}, None, "--pre NAME"),
    "words": ({"type": "Whitespace"}, None, "--pre NAME"),
    "merged": (split(r"\p{N}", "MergedWithNext"), None, "--pre NAME"),
    "lower case": (BYTE_LEVEL, {"type": "Lowercase"}, "--pre NAME"),
    "nfkc": (BYTE_LEVEL, {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}, "--pre NAME"),
    "none": (None, None, "--pre NAME"),
    "a list": ([1], None, "--pre NAME"),
    "steps of numbers": ({"type": "Sequence", "pretokenizers": [1, None]}, None, "--pre NAME"),
    "pattern of a number": (split(3), None, "--pre NAME"),  # type: ignore[arg-type]
    "normalizer of a number": (BYTE_LEVEL, 7, "--pre NAME"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_structure_is_one_line(case: str) -> None:
    steps, normalizer, hint = UNKNOWN[case]
    with pytest.raises(QuantoolError) as caught:
        recognise(content(steps, normalizer=normalizer), Path("dir/tokenizer.json"))
    assert caught.value.message.startswith("dir/tokenizer.json: the ")
    assert "\n" not in caught.value.message
    assert hint in str(caught.value.hint)


def test_name_with_a_slip() -> None:
    assert named("starcoder") is named("smollm")
    with pytest.raises(UsageError, match="--pre qwen") as caught:
        named("qwen")
    assert caught.value.hint == "did you mean qwen2?"
    with pytest.raises(UsageError) as caught:
        named("zzzzzz")
    assert "default, gpt-2, smollm" in str(caught.value.hint)
