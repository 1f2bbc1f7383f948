"""tokenizer.json and tokenizer.model -> GGUF -> llama.cpp: the same tokens; and back again.

Oracles: the tokenizers library and AutoTokenizer on the directory, SentencePiece on its own model, llama.cpp on the
file that is written, and gguf.SpecialVocab and gguf.SentencePieceVocab on what they get right.
"""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from llamacpp import tokenize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from quantool.data import builtin_documents
from quantool.errors import QuantoolError, UsageError
from quantool.io import Checkpoint
from quantool.io.gguf.file import GgufFile
from quantool.io.gguf.pre import GPT2, TORTURE, WORDS
from quantool.io.gguf.tokenizer import write_tokenizer
from quantool.io.gguf.vocab import general_metadata, tokenizer_metadata
from quantool.io.gguf.writer import GgufWriter

SIZE = 600
TEXTS = [
    *TORTURE,
    "<s>user\nHi 12</s> and<tool> x",
    "The quick brown fox, 3 times.",
    "</s>",
    "",
    " lead",
    "a\u00a0b  ",
]


def checkpoint(directory: Path, config: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> Checkpoint:
    infos = {name.replace("__", "."): SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    return SimpleNamespace(path=directory, config=config or {}, infos=infos)  # type: ignore[return-value]


def write(path: Path, fields: dict[str, Any], arch: str = "llama") -> Path:
    with GgufWriter(path, [], metadata={"general.architecture": arch, **fields}, overwrite=True) as writer:
        writer.commit()
    return path


@functools.cache
def corpus() -> list[str]:
    return [*itertools.islice(builtin_documents("train"), 6), *TORTURE]


def byte_level(directory: Path, *, pre: str = "gpt-2", size: int = SIZE, bos: bool = False) -> Tokenizer:
    """A trained byte-level BPE with <s>, </s> and a token that is not special, saved with its config."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = WORDS % ("{1,3}" if pre == "llama-bpe" else "")
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, plain])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    save(directory, tokenizer)
    return tokenizer


def save(directory: Path, tokenizer: Tokenizer, **config: Any) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config},
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    changed = edit(value)
    write_json(path, value if changed is None else changed)


def train_spm(directory: Path, *, prefix: bool = True, **options: Any) -> sentencepiece.SentencePieceProcessor:
    settings = {
        "vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "character_coverage": 0.98,
    }  # fmt: skip
    lines = [line for text in corpus() for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(directory / "tokenizer"), add_dummy_prefix=prefix,
        minloglevel=2, num_threads=1, **{**settings, **options},
    )  # fmt: skip
    (directory / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def hf_of_spm(spm: sentencepiece.SentencePieceProcessor, *, prefix: bool) -> Tokenizer:
    """The tokenizer.json of a Llama 2, by the merges that transformers generates."""
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {spm.id_to_piece(i): i for i in range(spm.get_piece_size())}
    merges = [(a, b) for a, b in generate_merges(vocabulary) if a not in SPECIALS and b not in SPECIALS]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


SPECIALS = ("<unk>", "<s>", "</s>")


def check_both_ways(directory: Path, fields: dict[str, Any], original: Tokenizer) -> None:
    """llama.cpp on the file, and the directory rebuilt from the file, make the tokens of the original."""
    file = write(directory / "v.gguf", fields)
    back = directory / "back"
    back.mkdir()
    write_tokenizer(GgufFile(file), back)
    rebuilt = Tokenizer.from_file(str(back / "tokenizer.json"))
    for text in TEXTS:
        expected = original.encode(text).ids
        assert tokenize(file, text, add_special=True, parse_special=True) == expected, text
        assert rebuilt.encode(text).ids == expected, text
        assert rebuilt.decode(expected) == original.decode(expected)


# --- byte-level BPE


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level(tmp_path: Path, pre: str, bos: bool) -> None:
    original = byte_level(tmp_path, pre=pre, bos=bos)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", pre)
    assert fields["tokenizer.ggml.tokens"] == [original.id_to_token(i) for i in range(SIZE)]
    assert fields["tokenizer.ggml.token_type"] == [3, 3, *[1] * (SIZE - 3), 4]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (bos, False)
    check_both_ways(tmp_path, fields, original)


def test_stories(shared: Path, tmp_path: Path) -> None:
    directory = shared / "models/stories-4m"
    fields: Any = tokenizer_metadata(checkpoint(directory), vocab_size=2048)
    special = gguf.SpecialVocab(directory, load_merges=True)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.merges"] == special.merges
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 0)
    check_both_ways(tmp_path, fields, Tokenizer.from_file(str(directory / "tokenizer.json")))


def test_rows_without_a_token_are_padding(tmp_path: Path) -> None:
    byte_level(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda value: value["added_tokens"].append(
        {**value["added_tokens"][-1], "id": SIZE + 2, "content": "[PAD600]"}
    ))  # fmt: skip
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE + 8)
    expected = ["[PAD600][]", "[PAD601]", "[PAD600]", *(f"[PAD{i}]" for i in range(603, 608))]
    assert fields["tokenizer.ggml.tokens"][SIZE:] == expected
    assert fields["tokenizer.ggml.token_type"][SIZE:] == [5, 5, 4, 5, 5, 5, 5, 5]
    assert tokenize(write(tmp_path / "v.gguf", fields), "x", add_special=False, parse_special=False)


def test_markers_of_a_dialogue_are_control(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    tokenizer.add_tokens(["<|im_end|>", "<think>", "<unused3>", "<unused>"])
    save(tmp_path, tokenizer)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE + 4)
    assert fields["tokenizer.ggml.token_type"][SIZE:] == [3, 4, 3, 4]


def test_old_and_new_spelling_of_merges(tmp_path: Path) -> None:
    byte_level(tmp_path)
    new = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    edit_json(
        tmp_path / "tokenizer.json",
        lambda value: value["model"].update(merges=[" ".join(pair) for pair in value["model"]["merges"]]),
    )
    assert tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE) == new


def test_a_pair_that_stands_twice_counts_where_it_stands_last(tmp_path: Path) -> None:
    byte_level(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda value: value["model"]["merges"].append(value["model"]["merges"][0]))
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    original = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    check_both_ways(tmp_path, fields, original)


@pytest.mark.parametrize("reachable", [True, False])
def test_ignore_merges_where_no_name_has_it(tmp_path: Path, reachable: bool) -> None:
    """Qwen's pattern with ignore_merges: no difference unless a token is a word that no merges make."""
    byte_level(tmp_path, pre="qwen2")

    def edit(value: Any) -> None:
        value["model"]["ignore_merges"] = True
        if not reachable:
            value["model"]["vocab"]["zzyzx"] = SIZE - 1
            value["added_tokens"][-1]["id"] = SIZE

    edit_json(tmp_path / "tokenizer.json", edit)
    if reachable:
        assert tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)["tokenizer.ggml.pre"] == "qwen2"
        return
    with pytest.raises(QuantoolError, match=r"would cut 'zzyzx' into \['z', 'z', 'y'\] where .* \['zzyzx'\]"):
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE + 1)


def test_name_given(tmp_path: Path) -> None:
    byte_level(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda value: value.update(pre_tokenizer={"type": "Whitespace"}))
    with pytest.raises(QuantoolError, match="the pre_tokenizer is"):
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    fields = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE, pre="starcoder")
    assert fields["tokenizer.ggml.pre"] == "starcoder"
    with pytest.raises(UsageError, match=r"--pre starcodr"):
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE, pre="starcodr")


def test_structure_that_lies_is_found(tmp_path: Path) -> None:
    """A step that follows the bytes is structure the table has, but it cuts inside characters."""
    byte_level(tmp_path)
    digits = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    swapped = {"type": "Sequence", "pretokenizers": [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}, digits,
        {"type": "Split", "pattern": {"Regex": GPT2}, "behavior": "Isolated", "invert": False},
    ]}  # fmt: skip
    edit_json(tmp_path / "tokenizer.json", lambda value: value.update(pre_tokenizer=swapped))
    with pytest.raises(QuantoolError, match=r"llama.cpp would cut") as caught:
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    assert "--pre NAME, one of default, gpt-2" in str(caught.value.hint)


# --- SentencePiece


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_model(tmp_path: Path, prefix: bool) -> None:
    spm = train_spm(tmp_path, prefix=prefix)
    write_json(tmp_path / "added_tokens.json", {"<tool>": 500})
    fields: Any = tokenizer_metadata(checkpoint(tmp_path, {"eos_token_id": 2}), vocab_size=502)
    reference = gguf.SentencePieceVocab(tmp_path)
    tokens, scores, types = zip(*reference.all_tokens(), strict=True)
    assert fields["tokenizer.ggml.tokens"] == [*(token.decode() for token in tokens), "[PAD501]"]
    assert fields["tokenizer.ggml.scores"] == pytest.approx([*scores, -10000.0])
    assert fields["tokenizer.ggml.token_type"] == [*(int(kind) for kind in types), 5]
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    file = write(tmp_path / "v.gguf", fields)
    for text in [*TORTURE, *itertools.islice(builtin_documents("test"), 2), "", "  "]:
        assert tokenize(file, text, add_special=True, parse_special=True) == [1, *spm.encode(text)], text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_as_json(tmp_path: Path, prefix: bool) -> None:
    """The scores come back from the order of the merges."""
    spm = train_spm(tmp_path, prefix=prefix)
    original = hf_of_spm(spm, prefix=prefix)
    original.add_tokens([AddedToken("<tool>", normalized=False)])
    (tmp_path / "tokenizer.model").unlink()
    save(tmp_path, original)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=501)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("llama", "default")
    assert fields["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, *[1] * 241, 4]
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    pieces = [i for i in range(259, 500) if len(spm.id_to_piece(i)) > 1]
    ranked = sorted(pieces, key=lambda i: -fields["tokenizer.ggml.scores"][i])
    assert ranked == sorted(pieces, key=lambda i: -spm.get_score(i))
    check_both_ways(tmp_path, fields, original)


def test_metaspace(tmp_path: Path) -> None:
    """The newer spelling of Llama 2: spaces are written by the pre_tokenizer, with a prefix for the first word only."""
    original = hf_of_spm(train_spm(tmp_path), prefix=True)
    original.normalizer = normalizers.Sequence([])
    original.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    save(tmp_path, original)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=500)
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    file = write(tmp_path / "v.gguf", fields)
    for text in map(str.lstrip, TORTURE):
        assert tokenize(file, text, add_special=True, parse_special=True) == original.encode(text).ids


def test_runs_of_spaces_and_lines_as_in_gemma(tmp_path: Path) -> None:
    """Runs of spaces and newlines are tokens of their own, with the best score and added as well."""
    runs = ["\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>"]
    spm = train_spm(tmp_path, prefix=False, user_defined_symbols=runs)
    original = hf_of_spm(spm, prefix=False)
    original.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    original.add_tokens([AddedToken(run, normalized=False) for run in runs])
    save(tmp_path, original)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=500)
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert [types[run] for run in runs] == [4, 4, 1, 1, 1, 4]
    check_both_ways(tmp_path, fields, original)


def test_spaces_that_merges_do_not_make(tmp_path: Path) -> None:
    """A token of spaces that was added is found in the text before they are written as U+2581."""
    spm = train_spm(tmp_path, prefix=False)
    original = hf_of_spm(spm, prefix=False)
    original.add_tokens([AddedToken("▁▁▁▁▁▁▁▁▁", normalized=True)])
    (tmp_path / "tokenizer.model").unlink()
    save(tmp_path, original)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=501)
    assert (fields["tokenizer.ggml.tokens"][500], fields["tokenizer.ggml.token_type"][500]) == (" " * 9, 4)
    text = "a" + " " * 9 + "b"
    file = write(tmp_path / "v.gguf", fields)
    assert tokenize(file, text, add_special=True, parse_special=True) == original.encode(text).ids


def test_sentencepiece_that_llama_cpp_cannot(tmp_path: Path) -> None:
    for name, options, words in (
        ("unigram", {"model_type": "unigram"}, "llama.cpp would cut"),
        ("nfkc", {"normalization_rule_name": "nfkc"}, "llama.cpp would cut"),
        ("bytes", {"byte_fallback": False}, "256 of the 256 byte tokens"),
    ):
        directory = tmp_path / name
        directory.mkdir()
        train_spm(directory, **options)
        with pytest.raises(QuantoolError, match=words) as caught:
            tokenizer_metadata(checkpoint(directory), vocab_size=500)
        assert caught.value.hint == "--pre default writes it all the same"


def test_tinystories_has_no_bytes(shared: Path, tmp_path: Path) -> None:
    directory = shared / "models/tinystories-656k"
    with pytest.raises(QuantoolError, match="256 of the 256 byte tokens"):
        tokenizer_metadata(checkpoint(directory), vocab_size=2048)
    fields: Any = tokenizer_metadata(checkpoint(directory), vocab_size=2048, pre="default")
    file = write(tmp_path / "v.gguf", fields)
    original = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in (shared / "data/stories.txt").read_text().splitlines()[:20]:
        expected = original.encode(text).ids
        if 0 not in expected and "<|" not in text:
            assert tokenize(file, text, add_special=True, parse_special=True) == expected


# --- special tokens and templates


def special(directory: Path, config: dict[str, Any] | None = None, size: int = SIZE) -> dict[str, Any]:
    fields = tokenizer_metadata(checkpoint(directory, config), vocab_size=size)
    return {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in fields.items()
        if not isinstance(value, list) and ("token" in key.rpartition(".")[2])
    }


@pytest.mark.parametrize("switch", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
@pytest.mark.parametrize("bos", [True, False])
def test_bos_and_eos_are_those_of_transformers(tmp_path: Path, switch: dict[str, bool], bos: bool) -> None:
    """With a tokenizer.json, transformers does not look at the switches."""
    from transformers import AutoTokenizer

    save(tmp_path, byte_level(tmp_path, bos=bos), **switch)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    file = write(tmp_path / "v.gguf", fields)
    expected = AutoTokenizer.from_pretrained(tmp_path)("Hello").input_ids
    assert tokenize(file, "Hello", add_special=True, parse_special=False) == expected


def test_switches_of_a_sentencepiece_model(tmp_path: Path) -> None:
    spm = train_spm(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": True})
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=500)
    file = write(tmp_path / "v.gguf", fields)
    assert tokenize(file, "Hello", add_special=True, parse_special=False) == [*spm.encode("Hello"), 2]


def test_what_stands_in_front_is_the_bos(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    pairs = [("<s>", 0), ("</s>", 1), ("<tool>", SIZE - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<tool> $A <s>", special_tokens=pairs)
    save(tmp_path, tokenizer)
    assert special(tmp_path) == {
        "bos_token_id": SIZE - 1, "eos_token_id": 0, "add_bos_token": True, "add_eos_token": True,
    }  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> <tool> $A", special_tokens=pairs)
    save(tmp_path, tokenizer)
    with pytest.raises(QuantoolError, match=r"puts 2 tokens in front of a text, a GGUF can say one"):
        special(tmp_path)


def test_every_role(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    roles = ["pad", "unk", "sep", "cls", "mask"]
    tokenizer.add_special_tokens([f"<{role}>" for role in roles])
    save(tmp_path, tokenizer, **{f"{role}_token": {"content": f"<{role}>"} for role in roles})
    found = special(tmp_path, size=SIZE + 5)
    reference = gguf.SpecialVocab(tmp_path).special_token_ids
    names = {"pad": "padding", "unk": "unknown", "sep": "seperator"}
    assert {key: found[f"{names.get(key, key)}_token_id"] for key in reference} == reference
    assert len(reference) == 7


def test_ids_from_other_files(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert special(tmp_path, {"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": SIZE}) == {
        "bos_token_id": 5, "eos_token_id": 7, "eot_token_id": 8, "add_bos_token": False, "add_eos_token": False,
    }  # fmt: skip
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "x": 1})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 9, 10, 11], "pad_token_id": 6})
    found = special(tmp_path, {"bos_token_id": True, "eos_token_id": 9})
    assert found == {
        "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 6, "eot_token_id": 9, "eom_token_id": 10,
        "add_bos_token": False, "add_eos_token": False,
    }  # fmt: skip


def test_ends_that_llama_cpp_knows_need_no_key(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    tokenizer.add_special_tokens(["<|eot_id|>", "<end of my turn>"])
    save(tmp_path, tokenizer)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, SIZE, SIZE + 1]})
    assert special(tmp_path, size=SIZE + 2)["eot_token_id"] == SIZE + 1
    fields = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE + 2)
    write_tokenizer(GgufFile(write(tmp_path / "v.gguf", fields)), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, SIZE + 1]


def test_chat_templates(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = byte_level(tmp_path)

    def templates() -> dict[str, Any]:
        fields = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
        return {key: value for key, value in fields.items() if "chat_template" in key}

    assert templates() == {}
    write_json(tmp_path / "chat_template.json", {"chat_template": "{{ json }}"})
    assert templates() == {"tokenizer.chat_template": "{{ json }}"}
    save(tmp_path, tokenizer, chat_template="{{ config }}")
    assert templates() == {"tokenizer.chat_template": "{{ config }}"}
    named = [{"name": "default", "template": "{{ a }}"}, {"name": "tool use", "template": "{{ b }}"}, {"name": 3}]
    save(tmp_path, tokenizer, chat_template=named)
    expected = {
        "tokenizer.chat_template": "{{ a }}",
        "tokenizer.chat_template.tool_use": "{{ b }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    assert templates() == expected
    back = tmp_path / "back"
    back.mkdir()
    fields = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    write_tokenizer(GgufFile(write(tmp_path / "v.gguf", fields)), back)
    assert AutoTokenizer.from_pretrained(back).chat_template == {"default": "{{ a }}", "tool_use": "{{ b }}"}
    (tmp_path / "chat_template.jinja").write_text("{{ file ü }}", encoding="utf-8")
    assert templates() == {"tokenizer.chat_template": "{{ file ü }}"}  # transformers: the file goes first
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ file ü }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(QuantoolError, match=r"chat_template.jinja: is not a text in UTF-8"):
        templates()


# --- GGUF as it is


def test_own_keys_of_a_gguf(tmp_path: Path) -> None:
    byte_level(tmp_path)
    fields = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    general: dict[str, Any] = {"general.name": "Me", "general.tags": ["a", "b"], "general.file_type": 7}
    file = write(tmp_path / "v.gguf", {**fields, **general, "tokenizer.ggml.fim_pre_token_id": 4})
    assert tokenizer_metadata(checkpoint(file), vocab_size=SIZE) == {**fields, "tokenizer.ggml.fim_pre_token_id": 4}
    assert tokenizer_metadata(checkpoint(file), vocab_size=SIZE, pre="olmo")["tokenizer.ggml.pre"] == "olmo"
    with pytest.raises(QuantoolError, match="does not match the embedding: 600 tokens, 601 rows"):
        tokenizer_metadata(checkpoint(file), vocab_size=SIZE + 1)
    assert general_metadata(checkpoint(file)) == {"general.name": "Me", "general.tags": ["a", "b"]}
    with pytest.raises(QuantoolError, match="there is no tokenizer"):
        tokenizer_metadata(checkpoint(write(tmp_path / "n.gguf", {})), vocab_size=SIZE)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_what_llama_cpp_assumes_where_a_key_is_missing(tmp_path: Path, pre: str) -> None:
    byte_level(tmp_path, pre=pre)
    keys = ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    fields = {key: value for key, value in fields.items() if key.rpartition(".")[2] not in keys}
    fields["tokenizer.ggml.token_type"] = [1] * SIZE  # "</s>" ends a text all the same
    check_rebuilt(tmp_path, fields)


def test_missing_keys_of_sentencepiece(tmp_path: Path) -> None:
    train_spm(tmp_path)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=500)
    kept = ("model", "tokens", "scores", "token_type")
    check_rebuilt(tmp_path, {key: value for key, value in fields.items() if key.rpartition(".")[2] in kept})


def test_special_tokens_of_phi_3_take_the_spaces_behind_them(tmp_path: Path) -> None:
    tokenizer = hf_of_spm(train_spm(tmp_path), prefix=True)
    tokenizer.add_special_tokens(["<|end|>", "<|endoftext|>"])
    save(tmp_path, tokenizer)
    fields: Any = tokenizer_metadata(checkpoint(tmp_path), vocab_size=502)
    check_rebuilt(tmp_path, {**fields, "general.name": "Phi-3 mini"})


def check_rebuilt(directory: Path, fields: dict[str, Any]) -> None:
    file = write(directory / "v.gguf", fields)
    write_tokenizer(GgufFile(file), directory)
    rebuilt = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in [*TEXTS, "a<|end|>  b </s>  c<s>  d<|endoftext|>\n e"]:
        assert rebuilt.encode(text).ids == tokenize(file, text, add_special=True, parse_special=True), text


# --- bad input


def change(*path: Any) -> Callable[[Any], None]:
    """An edit that puts the last of `path` where the others lead."""

    def edit(value: Any) -> None:
        for step in path[:-2]:
            value = value[step]
        value[path[-2]] = path[-1]

    return edit


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda value: [value], "is not a JSON object"),
    "wordpiece": (change("model", "type", "WordPiece"), 'the model is "WordPiece", expected "BPE"'),
    "unigram": (change("model", {"type": "Unigram", "vocab": [["a", 0]]}), 'the model is "Unigram", expected "BPE"'),
    "no model": (change("model", None), "the model is null"),
    "vocab a list": (change("model", "vocab", ["a"]), "has the wrong type"),
    "added an object": (change("added_tokens", {"a": 1}), "has the wrong type"),
    "added a number": (change("added_tokens", [3]), "added token 3 has no text"),
    "added elsewhere": (change("added_tokens", 0, "id", 7), "or another id than model.vocab gives it"),
    "id of text": (change("model", "vocab", "x", "1"), 'token "x" has id "1", expected a whole number'),
    "id of true": (change("model", "vocab", "x", True), 'token "x" has id true, expected a whole number'),
    "negative id": (change("model", "vocab", "x", -1), 'token "x" has id -1'),
    "huge id": (change("model", "vocab", "x", 1 << 62), f"{(1 << 62) + 1} tokens, 600 rows"),
    "two of one id": (change("model", "vocab", "!", 5), "have the same id 5"),
    "merge of three": (change("model", "merges", 3, "a b c"), 'merge "a b c" is no pair of tokens'),
    "merge of numbers": (change("model", "merges", 3, [1, 2]), "merge [1, 2] is no pair of tokens"),
    "merge of nothing": (change("model", "merges", 3, ["qq", "zz"]), "does not join two tokens to a third"),
    "merges of text": (change("model", "merges", "a b"), "the tokenizers library cannot read it"),
    "suffix": (change("model", "end_of_word_suffix", "</w>"), 'end_of_word_suffix is "</w>", expected none'),
    "dropout": (change("model", "dropout", 0.5), "dropout is 0.5, expected none"),
    "prefix space": (change("pre_tokenizer", "add_prefix_space", True), "the pre_tokenizer is"),
    "token of a template": (
        change(
            "post_processor",
            {
                "type": "Sequence",
                "processors": [
                    {
                        "type": "TemplateProcessing",
                        "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}],
                        "pair": [],
                        "special_tokens": {},
                    },
                ],
            },
        ),
        'post_processor names the token "<q>", which special_tokens lacks',
    ),
    "post_processor": (change("post_processor", {"type": "Nonsense"}), "the tokenizers library cannot read it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tokenizer_json(tmp_path: Path, case: str) -> None:
    edit, words = HOSTILE[case]
    byte_level(tmp_path)
    edit_json(tmp_path / "tokenizer.json", edit)
    with pytest.raises(QuantoolError) as caught:
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xff", b'{"model": {"vocab": {"a": 0, "a": 1}}}', b"[" * 100000])
def test_tokenizer_json_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(QuantoolError, match=r"tokenizer.json: is not a JSON object"):
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)


def test_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    byte_level(tmp_path)
    with pytest.raises(QuantoolError, match="does not match the embedding: 600 tokens, 599 rows"):
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE - 1)
    directory = tmp_path / "spm"
    directory.mkdir()
    train_spm(directory)
    with pytest.raises(QuantoolError, match="does not match the embedding: 500 tokens, 499 rows"):
        tokenizer_metadata(checkpoint(directory), vocab_size=499)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(QuantoolError, match=r"there is no tokenizer, expected tokenizer.json or") as caught:
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    assert "tokenizer_config.json" in str(caught.value.hint)


def test_damaged_model_and_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model" * 9)
    with pytest.raises(QuantoolError, match=r"tokenizer.model: is no SentencePiece model"):
        tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)
    train_spm(tmp_path)
    for added, words in (
        ({"<x>": "a"}, 'added token "a" is'),
        ({"<x>": -1}, "added token -1 is"),
        ({"<x>": 300}, 'the added tokens call it "<x>"'),
        ({"<x>": 10**8}, "100000001 tokens, 600 rows"),
    ):
        write_json(tmp_path / "added_tokens.json", added)
        with pytest.raises(QuantoolError, match=words):
            tokenizer_metadata(checkpoint(tmp_path), vocab_size=SIZE)


# --- general.*

CARD = """---
license: apache-2.0
language:
- en
tags:
- tiny
base_model: acme/Big-7B
---
# A model
"""


def test_general_metadata(tmp_path: Path) -> None:
    directory = tmp_path / "Tiny-Llama-2.4M-Chat-v1.1"
    directory.mkdir()
    (directory / "README.md").write_text(CARD)
    write_json(directory / "generation_config.json", {"temperature": 1, "top_k": 20, "top_p": "x"})
    found = general_metadata(checkpoint(directory, None, embed=(1000, 100), lin=(100, 24000)))
    assert found == {
        "general.name": "Tiny Llama 2.4M Chat v1.1",
        "general.basename": "Tiny-Llama",
        "general.finetune": "Chat",
        "general.version": "v1.1",
        "general.size_label": "2.5M",
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Big 7B",
        "general.base_model.0.organization": "Acme",
        "general.base_model.0.repo_url": "https://huggingface.co/acme/Big-7B",
        "general.tags": ["tiny"],
        "general.languages": ["en"],
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 20,
    }
    assert isinstance(found["general.sampling.temp"], float)
    assert isinstance(found["general.sampling.top_k"], np.int32)  # its type in the file


def test_size_label_of_experts(tmp_path: Path) -> None:
    shapes = {f"layers__0__experts__{i}__w1": (2000, 1000) for i in range(8)}
    assert general_metadata(checkpoint(tmp_path, None, **shapes))["general.size_label"] == "8x2.0M"
    fused = general_metadata(checkpoint(tmp_path, None, layers__0__experts__w1=(8, 2000, 1000)))
    assert fused["general.size_label"] == "8x2.0M"
    packed = general_metadata(checkpoint(tmp_path, {"quantization_config": {}}, w=(9, 9)))
    assert "general.size_label" not in packed


@pytest.mark.parametrize(
    "card",
    [
        "", "# no header", "---\n- a\n- b\n---\n", "---\nlicense: [\n---\n", "---\nname: {a: 1}\nlicense: 3\n---\n",
        "---\nbase_model: {x: 1}\ntags: 5\nlanguage: {a: b}\ndatasets: [[1], 2]\n---\n", "---\nname: 3\n---\n",
        "---\nlicense: [a, 1]\n---\n", "---\n" + "a: [" * 5000,
        '---\nname: "\\ud800"\n---\n', "---\ntags: [1, ok]\n---\n",
    ],
)  # fmt: skip
def test_malformed_card_does_not_stop_a_conversion(tmp_path: Path, card: str, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "model-7b"
    directory.mkdir()
    (directory / "README.md").write_text(card)
    found = general_metadata(checkpoint(directory))
    assert isinstance(found["general.name"], str)
    assert not caplog.records
    write(tmp_path / "v.gguf", {key: value for key, value in found.items() if key != "general.architecture"})
    (directory / "README.md").write_bytes(b"---\nname: \xff\n---\n")
    (directory / "generation_config.json").write_text("[")
    assert general_metadata(checkpoint(directory))["general.name"] == "Model 7b"
