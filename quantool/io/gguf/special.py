"""Special tokens, BOS, EOS and the chat template of a Hugging Face directory as GGUF keys.

    bos_token "<s>"       tokenizer_config.json, special_tokens_map.json       -> tokenizer.ggml.bos_token_id
    eos_token_id [2, 7]   generation_config.json, config.json                  -> eos_, eot_ and eom_token_id
    post_processor        what the tokenizer really puts around a text         -> add_bos_token, add_eos_token
    added tokens          added_tokens.json, tokenizer_config.json             -> token_type

llama.cpp has one token for each of BOS and EOS, and adds no other: what the tokenizer puts in front of a text is
therefore the BOS of the file, whatever the config calls it. An end of generation that llama.cpp knows by its text
(ENDS) needs no key. As in transformers 5, the post_processor of tokenizer.json says what is added and not the switches
add_bos_token and add_eos_token, and chat_template.jinja goes before the template in tokenizer_config.json.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import QuantoolError
from quantool.io.gguf.pre import short
from quantool.io.gguf.tokenizer import CONTROL, END_KEYS, ENDS, SPECIAL_KEYS, USER_DEFINED
from quantool.io.gguf.writer import Value
from quantool.io.safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Around = tuple[list[int], list[int]]  # ids in front of a text and behind it


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    return read_json(path) if path.exists() else {}


def around_text(tokenizer: "Tokenizer") -> Around:
    """The special tokens that a tokenizer.json puts around a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    front = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), len(full))
    return full[:front], full[front + len(bare) :]


def check_template(path: Path, processor: Any) -> None:
    """An error where a template names a token it does not define, at which the tokenizers library prints a panic."""
    for inner in _list(_mapping(processor).get("processors")):
        if inner is not None:
            check_template(path, inner)
    defined = _mapping(_mapping(processor).get("special_tokens"))
    for piece in _list(_mapping(processor).get("single")):
        name = _mapping(_mapping(piece).get("SpecialToken")).get("id")
        if isinstance(name, str) and name not in defined:
            raise QuantoolError(f"{path}: post_processor names the token {short(name)}, which special_tokens lacks")


def added_around(directory: Path, bos: int, eos: int) -> Around:
    """The same of a tokenizer.model, which LlamaTokenizer puts BOS in front of unless tokenizer_config.json objects."""
    config = optional_json(directory / "tokenizer_config.json")
    added = config.get("add_bos_token", True) is True, config.get("add_eos_token", False) is True
    return [bos] if added[0] and bos >= 0 else [], [eos] if added[1] and eos >= 0 else []


def special_fields(path: Path, config: Mapping[str, Any], ids: Mapping[str, int], around: Around) -> dict[str, Value]:
    """Ids of the special tokens, add_bos_token and add_eos_token.

    `config` is config.json, `ids` has the id of every token, `around` what the tokenizer puts around a text.
    Raises QuantoolError when several tokens stand in front of a text or behind it.
    """
    texts = [optional_json(path / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    numbers = [optional_json(path / "generation_config.json"), config, _mapping(config.get("text_config"))]
    known = {word: _find(word, texts, numbers, ids) for word in SPECIAL_KEYS}
    ends = [end for file in numbers for end in _list(file.get("eos_token_id")) if type(end) is int]
    for word, tokens, where in (("bos", around[0], "in front of"), ("eos", around[1], "behind")):
        if len(tokens) > 1:
            raise QuantoolError(
                f"{path}: the tokenizer puts {len(tokens)} tokens {where} a text, a GGUF can say one",
                hint="take them out of post_processor in tokenizer.json and put them into the chat template",
            )
        if tokens and tokens[0] != known[word]:
            if word == "eos" and known["eos"] is not None:
                ends.append(known["eos"])
            known[word] = tokens[0]
    names = {index: token for token, index in ids.items()}
    more = [end for end in ends if end in names and end != known["eos"] and names[end] not in ENDS]
    return {
        **{f"tokenizer.ggml.{SPECIAL_KEYS[word]}": index for word, index in known.items() if index is not None},
        **{f"tokenizer.ggml.{key}": end for key, end in zip(END_KEYS, dict.fromkeys(more), strict=False)},
        "tokenizer.ggml.add_bos_token": bool(around[0]),
        "tokenizer.ggml.add_eos_token": bool(around[1]),
    }


def chat_templates(path: Path) -> dict[str, Value]:
    """tokenizer.chat_template, and tokenizer.chat_template.NAME with their list where there are several.

    Raises QuantoolError when a file is no UTF-8.
    """
    given: Any = optional_json(path / "tokenizer_config.json").get("chat_template")
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _text(file) for name, file in files.items() if file.is_file()}
    if not found and given is None:
        given = optional_json(path / "chat_template.json").get("chat_template")
    if not found:
        entries = given if isinstance(given, list) else [{"name": "default", "template": given}]
        pairs = [(_mapping(entry).get("name"), _mapping(entry).get("template")) for entry in entries]
        found = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    named = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in found.items() if name != "default"}
    return {
        **({"tokenizer.chat_template": found["default"]} if "default" in found else {}),
        **{f"tokenizer.chat_template.{name}": text for name, text in named.items()},
        **({"tokenizer.chat_templates": list(named)} if named else {}),
    }


def added_tokens(directory: Path) -> list[tuple[int, str, int]]:
    """Id, text and type of the tokens in added_tokens.json and tokenizer_config.json.

    Raises QuantoolError for an entry that is no number with a text.
    """
    path = directory / "tokenizer_config.json"
    decoder = optional_json(path).get("added_tokens_decoder")
    plain = optional_json(directory / "added_tokens.json")
    entries: list[tuple[Any, Any]] = [(index, {"content": token}) for token, index in plain.items()]
    entries += decoder.items() if isinstance(decoder, dict) else []
    found = []
    for index, entry in entries:
        token = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(token, str) or not re.fullmatch(r"\d{1,9}", str(index), re.ASCII):
            raise QuantoolError(f"{path}: added token {short(index)} is {short(entry)}, expected a number and a text")
        special = entry.get("special") is True or looks_special(token)
        found.append((int(index), token, CONTROL if special else USER_DEFINED))
    return found


def looks_special(token: str) -> bool:
    """Markers of a dialogue that their tokenizer.json does not call special: a reader should not print them."""
    marked = token.startswith(("<|", "<｜")) and token.endswith(("|>", "｜>"))  # noqa: RUF001
    return marked or token in ("<pad>", "<mask>") or bool(re.fullmatch(r"<unused\d+>", token, re.ASCII))


def _find(
    word: str, texts: Sequence[Mapping[str, Any]], numbers: Sequence[Mapping[str, Any]], ids: Mapping[str, int]
) -> int | None:
    """The id of a role: the token that a file names, else the id that a file gives."""
    for file in texts:
        entry = file.get(f"{word}_token")
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str) and token in ids:
            return ids[token]
    for file in numbers:
        for index in _list(file.get(f"{word}_token_id"))[:1]:
            if type(index) is int and 0 <= index < len(ids):
                return index
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise QuantoolError(f"{path}: is not a text in UTF-8: {error}") from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
