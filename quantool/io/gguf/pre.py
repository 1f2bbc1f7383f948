r"""The pre-tokenizers of byte-level BPE that llama.cpp knows, and which of them a tokenizer.json asks for.

A pre-tokenizer cuts the text into words before any merge; merges never cross a cut. tokenizer.json spells it out as a
list of steps; a GGUF has only a name (`tokenizer.ggml.pre`), for which llama.cpp has the regular expressions built in.

    tokenizer.json  Digits(individual) + ByteLevel(use_regex)  --steps-->  (\p{N}, GPT2)  --table-->  "smollm"
    "It's 12 o'clock"                                          --cuts-->   It 's _ 1 2 _o 'clock

Each regex cuts what the ones in front of it left together; what it does not match stays a piece of its own. Many names
are one and the same row, the name of the family that first had it is written for all of them.
Source: the names and expressions in llama.cpp src/llama-vocab.cpp; tests/io/gguf/test_pre.py compares every row with
llama.cpp itself.
"""

# ruff: noqa: RUF001 - letters and punctuation of all scripts are the matter here
import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import LONGEST, QuantoolError, UsageError, one_line

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One row: what llama.cpp does under any of `names`.

    `published` holds the steps of the models' own tokenizer.json where llama.cpp's expressions only come near them:
    equal on `TORTURE`, but not on combining marks, case or spaces outside ASCII (`ROUGH`).
    `ignore_merges`: a word that is a token is not built from merges. `add_bos`: unless the file says otherwise.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    published: tuple[str, ...] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES
MARKS = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
NOT_LOWER, NOT_UPPER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"  # how llama.cpp says these two
CASED = r"[^\r\n\p{{L}}\p{{N}}]?{0}*{1}+{2}|[^\r\n\p{{L}}\p{{N}}]?{0}+{1}*{2}|\p{{N}}{3}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
HAN_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
CJK = "[一-龥ࠀ-一가-\ud7ff%s]+"
ASCII_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + SPACES
)
# Letters with case, as DeepSeek's tokenizer.json lists them.
CASED_WORD = (
    r"\s?["
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
PUNCTUATION = "\\s?[!-/:-~！-／：-～‘-‟\u3000-。%s]+"
NO_SPACE = r"&&[^\s]"  # llama.cpp hides spaces outside ASCII from a class that is written as ranges
ROWS = (
    PreTokenizer(("default",), (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    PreTokenizer(
        (
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4"),
            *("trillion", "granite-docling", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de"),
        ),
        (GPT2,),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", GPT2),
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        (WORDS % "{1,3}",),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), (WORDS % "{1,3}",)),
    PreTokenizer(
        (
            *("qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "f2llmv2", "hunyuan", "megrez", "grok-2"),
            *("solar-open", "bailingmoe", "bailingmoe2", "llada-moe"),
        ),
        (WORDS % "",),
    ),
    PreTokenizer(("qwen35",), (MARKS,)),
    PreTokenizer(
        ("deepseek-llm",),
        (r"[\r\n]", CASED_WORD, PUNCTUATION % NO_SPACE, r"\s+$", CJK % NO_SPACE, r"\p{N}+"),
        published=(r"[\r\n]", CASED_WORD, PUNCTUATION % "", r"\s+$", CJK % "", r"\p{N}+"),
    ),
    PreTokenizer(
        ("deepseek-coder",),
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK % NO_SPACE, r"\p{N}"),
        published=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK % "", r"\p{N}"),
    ),
    PreTokenizer(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), (r"\p{N}{1,3}", HAN_KANA, ASCII_WORDS)),
    PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer(
        ("tekken",),
        (CASED.format(NOT_LOWER, NOT_UPPER, "", "") + SPACES,),
        published=(CASED.format(UPPER, LOWER, "", "") + SPACES,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        (CASED.format(NOT_LOWER, NOT_UPPER, CONTRACTION + "?", "{1,3}") + SPACES,),
        published=(CASED.format(UPPER, LOWER, CONTRACTION + "?", "{1,3}") + SPACES,),
    ),
    PreTokenizer(("bloom", "poro-chat", "gpt3-finnish"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    PreTokenizer(("viking",), (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    PreTokenizer(
        ("seed-coder",),
        (CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + SPACES,),
    ),
    PreTokenizer(
        ("exaone-moe",),
        (
            CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer(("minicpm5",), (r"\p{N}{1,3}", WORDS % "+"), ignore_merges=True),
    PreTokenizer(("ufakzeka",), (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES,)),
)
PRE_TOKENIZERS = {name: row for row in ROWS for name in row.names}
KNOWN = ", ".join(row.names[0] for row in ROWS)
# Text on which two pre-tokenizers that differ are seen to differ. It is in NFC: llama.cpp does not normalize.
TORTURE = (
    "Hello there, 1234 worlds! It's 3½ o'clock and I'LL won't they'RE we've I'm he'd Don't 's'S 'T 'llama 'sure I'mx",
    "\n  x  y   z    \t\tq\t r \n\n\n  \r\n\r\n end  12   345   ",
    "日本語テスト 中文字符，测试。한국어 カタカナ ひらがな 😀😃👍🏽👨‍👩‍👧 ☂ ½¼ ²³ ₁ Ⅷ ①",
    "1 12 123 1234 12345 1234567 3.14 1,000,000 ٣٤٥٦ a1b22c333d4444 x² 5th 3D",
    "café naïve Ünïcode ЙЦУ йцу ΑΒΓ αβγ iPhone McDonald XMLHttp fooBar FOObar fOO",
    "!!! ??? ... --- === <<>> ([{}]) \"quoted\" 'single' `tick` $100 €50 +1-2*3/4=5 a_b c-d e.f@g.h #tag ~^|\\ //x",
    "    def f(x):\n        return x + 1\n\n\tif a:\n\t\tb()\n    # comment\n",
    "\u00a0nbsp zero\u200bwidth a  b   c    ¿¡§ «» “” — … 。，、！ \n \n  \n",
)
ROUGH = (
    "हिन्दी नमस्ते ก็ได้ ภาษาไทย বাংলা עִבְרִית",
    "ñÑ ÀÉÎé ßSS Éa éA ÇA ДaЯя ǅaǅ",
    "\u2003em\u3000wide\u2028line\u0085next",
)
FOLDED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPELLINGS = (  # of one and the same thing, the second is compared
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("?+", "?"),  # possessive: nothing is given back here anyway
    ("++", "+"),
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
    (CONTRACTION, FOLDED),
    ("'(?i:[sdmt]|ll|ve|re)", FOLDED),
)


def named(name: str) -> PreTokenizer:
    """The row of a name given with --pre; UsageError when there is none."""
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    near = difflib.get_close_matches(name, PRE_TOKENIZERS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"give one of {KNOWN}"
    raise UsageError(f"--pre {name}: is no pre-tokenizer that quantool knows", hint=hint)


def recognise(content: Mapping[str, Any], path: Path) -> PreTokenizer:
    """The row that a byte-level tokenizer.json (its JSON object) asks for, by its structure alone.

    Raises QuantoolError when the normalizer changes the text in a way that llama.cpp cannot, or when the steps are
    those of no row; the hint then names the row that cuts `TORTURE` alike, if there is one.
    """
    normalizer = content.get("normalizer")
    if not _only_nfc(normalizer):
        raise QuantoolError(
            f"{path}: the normalizer is {short(normalizer)}, expected none or NFC: llama.cpp does not normalize",
            hint="--pre NAME writes the vocabulary without it",
        )
    steps = _steps(content.get("pre_tokenizer"))
    rows = [row for row in ROWS if steps == tuple(map(_spelled, row.published or row.patterns))]
    if not rows:
        near = _alike(content)
        hint = f"it cuts a test text as {near} does: --pre {near}" if near else f"--pre NAME, one of {KNOWN}"
        raise QuantoolError(
            f"{path}: the pre_tokenizer is {short(content.get('pre_tokenizer'))}, expected one of {KNOWN}", hint=hint
        )
    ignore = _member(content.get("model"), "ignore_merges") is True
    return next((row for row in rows if row.ignore_merges == ignore), rows[0])


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises becomes a QuantoolError; its panics are no subclass of Exception."""
    try:
        yield
    except QuantoolError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise QuantoolError(f"{what}: {one_line(error)}") from error
        raise


def splitter(row: PreTokenizer) -> "pre_tokenizers.PreTokenizer":
    """The row as a pre-tokenizer of the `tokenizers` library, bytes written as GPT-2's characters at the end."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in row.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _only_nfc(normalizer: Any) -> bool:
    if normalizer is None or _member(normalizer, "type") == "NFC":
        return True
    inner = _member(normalizer, "normalizers")
    return isinstance(inner, list) and all(map(_only_nfc, inner))


def _steps(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The regexes of a pre_tokenizer one after the other; None when a step is no regex."""
    inner = _member(pre_tokenizer, "pretokenizers")
    if isinstance(inner, list):
        parts = [_steps(step) for step in inner]
        return None if None in parts else tuple(pattern for part in parts for pattern in part or ())
    step: Mapping[str, Any] = pre_tokenizer if isinstance(pre_tokenizer, Mapping) else {}
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return (_spelled(GPT2),) if step.get("use_regex", True) else ()
        case "Digits":
            return (r"\p{N}",) if step.get("individual_digits") else (r"\p{N}+",)
        case "Split":
            pattern = _member(step.get("pattern"), "Regex")
            kept = (step.get("behavior"), bool(step.get("invert")))  # removing what is no match keeps the matches
            if isinstance(pattern, str) and kept in (("Isolated", False), ("Removed", True)):
                return (_spelled(pattern),)
    return None


def _spelled(pattern: str) -> str:
    for spelling, other in SPELLINGS:
        pattern = pattern.replace(spelling, other)
    return pattern.removesuffix(r"|\s+")  # what matches nothing stays a piece, so that this one changes none


def _alike(content: Mapping[str, Any]) -> str | None:
    """The name of the first row that cuts the test text as this tokenizer.json does."""
    from tokenizers import Tokenizer

    texts = TORTURE + ROUGH
    try:
        with library_errors("pre_tokenizer"):
            theirs = Tokenizer.from_str(json.dumps(content)).pre_tokenizer
            wanted = [theirs.pre_tokenize_str(text) for text in texts] if theirs else None
    except QuantoolError:
        return None  # this only looks for a hint
    return next(
        (row.names[0] for row in ROWS if [splitter(row).pre_tokenize_str(text) for text in texts] == wanted), None
    )


def _member(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def short(value: Any) -> str:
    """JSON of anything, of at most 300 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
