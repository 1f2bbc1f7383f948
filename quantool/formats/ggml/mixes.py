"""Which block type each tensor of a file gets: the mixes of llama.cpp (Q4_K_M, ...), tensor by tensor.

A mix is a base type and exceptions. What costs most when it is coarse gets more bits: the output matrix, the values of
attention, and what leads back into the residual stream, in the first and last eighth of the blocks and every third
between them (`_more_bits`):

    Q4_K_M of 8 blocks            blk.0  1  2  3  4  5  6  7
      attn_v, ffn_down              6    4  4  6  4  4  6  6     (Q6_K, Q4_K)
      the other linears             4    4  4  4  4  4  4  4
      output, or token_embd where both are one: Q6_K; norms, biases and the router: F32

The order is that of llama.cpp, by block and then by name, because some rules count the tensors in front. A row that is
not whole blocks of the wanted type gets another: 256 weights per block fall back to 32, and these to F16.
Source: src/llama-quant.cpp of https://github.com/ggml-org/llama.cpp, whose own decisions the tests compare.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Mix:
    """`base` is the type of what no rule names; `file_type` is LLAMA_FTYPE, stored as general.file_type."""

    name: str
    base: str
    file_type: int


_MIXES = (
    Mix("f32", "F32", 0),
    Mix("f16", "F16", 1),
    Mix("bf16", "BF16", 32),
    Mix("q8_0", "Q8_0", 7),
    Mix("q6_k", "Q6_K", 18),
    Mix("q5_k_m", "Q5_K", 17),
    Mix("q5_k_s", "Q5_K", 16),
    Mix("q5_1", "Q5_1", 9),
    Mix("q5_0", "Q5_0", 8),
    Mix("q4_k_m", "Q4_K", 15),
    Mix("q4_k_s", "Q4_K", 14),
    Mix("iq4_nl", "IQ4_NL", 25),
    Mix("iq4_xs", "IQ4_XS", 30),
    Mix("q4_1", "Q4_1", 3),
    Mix("q4_0", "Q4_0", 2),
    Mix("q3_k_l", "Q3_K", 13),
    Mix("q3_k_m", "Q3_K", 12),
    Mix("q3_k_s", "Q3_K", 11),
    Mix("q2_k", "Q2_K", 10),
    Mix("q2_k_s", "Q2_K", 21),
)
MIXES: dict[str, Mix] = {mix.name: mix for mix in _MIXES}
MIXES |= {name: MIXES[f"{name}_m"] for name in ("q3_k", "q4_k", "q5_k")}  # llama-quantize's short names

FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
FLOATS = ("F32", "F16", "BF16")
TYPES = (*FLOATS, "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", *FALLBACKS)
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")
VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
EIGHT_EXPERTS_Q5_K = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules ask of a model, in the words of its metadata."""

    architecture: str
    block_count: int
    head_count: int
    head_count_kv: int
    expert_count: int = 0

    @property
    def gqa(self) -> int:
        """Query heads per key-value head."""
        return self.head_count // self.head_count_kv if self.head_count_kv else 0

    @property
    def is_70b(self) -> bool:
        """What llama.cpp takes for the 70B model."""
        grouped = self.architecture == "llama" and self.head_count != self.head_count_kv
        return self.block_count == 80 and (grouped or self.architecture in ("qwen2", "olmo"))


@dataclass(frozen=True, slots=True)
class TypeChoice:
    """The type of a tensor, and the one its mix wants: another where that one's blocks do not divide its rows."""

    type: str
    wanted: str


def facts_of(metadata: Mapping[str, Any]) -> Facts:
    """The facts from a file's metadata; a number given per block is that of the first."""
    architecture = str(metadata["general.architecture"])

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        return int(value[0] if isinstance(value, Sequence) else value)

    heads = number("attention.head_count", 0)
    return Facts(
        architecture=architecture,
        block_count=number("block_count", 0),
        head_count=heads,
        head_count_kv=number("attention.head_count_kv", heads),
        expert_count=number("expert_count", 0),
    )


def file_type(outtype: str) -> int:
    """general.file_type of a mix, LLAMA_FTYPE in llama.h. Raises UsageError for an unknown one."""
    return _mix(outtype).file_type


def assign(
    tensors: Iterable[tuple[str, Sequence[int]]],
    outtype: str,
    *,
    facts: Facts,
    imatrix: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
    pure: bool = False,
) -> dict[str, TypeChoice]:
    """The type of each tensor, given by its GGUF name and its shape in torch order; the result keeps their order.

    `imatrix` says whether there is one. `tensor_types` are (regex, type): the first that is found in a name decides.
    A type for the embedding or the output goes before these, and `pure` leaves only the base type besides them. With
    tied embeddings the token embedding is the output matrix, and follows its rules.

    Raises UsageError for an unknown mix, type or regex, and for q2_k_s without an imatrix, as llama.cpp refuses it.
    """
    mix, shapes = _mix(outtype), {name: tuple(shape) for name, shape in tensors}
    patterns = [(_regex(pattern), _type(kind)) for pattern, kind in tensor_types]
    fixed = {EMBEDDING: token_embedding_type, OUTPUT: output_tensor_type}
    tied = OUTPUT not in shapes
    rules = _Rules(mix, facts, imatrix, sum(_is_values(name) for name in shapes))
    wanted: dict[str, str] = {}
    for name in sorted(shapes, key=_order):
        given = fixed.get(name) or next((kind for pattern, kind in patterns if pattern.search(name)), None)
        if not _is_quantized(name, shapes[name]):
            wanted[name] = "F32"
        elif given is not None:
            wanted[name] = _type(given)
        elif pure or mix.base in FLOATS:
            wanted[name] = mix.base
        elif name == OUTPUT or (name == EMBEDDING and tied):
            wanted[name] = _type(output_tensor_type) if output_tensor_type else rules.output()
        else:
            wanted[name] = rules.type_of(name)
    choices = {name: TypeChoice(_fitting(wanted[name], shape[-1]), wanted[name]) for name, shape in shapes.items()}
    if mix.name == "q2_k_s" and not imatrix:
        _check_q2_k_s(choices)
    return choices


class _Rules:
    """The exceptions of one mix, asked for tensor after tensor in llama.cpp's order: two of them count."""

    def __init__(self, mix: Mix, facts: Facts, imatrix: bool, values: int) -> None:
        self.mix, self.base = mix.name, mix.base
        self.facts = facts
        self.imatrix = imatrix
        self.values = values  # tensors that hold the values of attention
        self.value = self.down = 0  # how many of these, and of ffn_down, were asked for

    def type_of(self, name: str) -> str:
        """The type of a tensor that is not the output matrix."""
        if name == EMBEDDING:
            return self.base
        if _is_values(name):
            self.value += 1
            return self._values(self.value - 1)
        if "attn_k.weight" in name and self.facts.expert_count == 8:
            return "Q8_0"
        if "attn_output.weight" in name:
            return self._attention_output()
        if "ffn_down" in name:
            self.down += 1
            # experts are not always stored one block after the other: then the name says which it is
            return self._ffn_down(_order(name)[0] if self.facts.expert_count > 1 else self.down - 1)
        return self.base

    def output(self) -> str:
        return "Q8_0" if self.base == "Q8_0" or self.facts.architecture == "falcon" else "Q6_K"

    def _values(self, i: int) -> str:
        """attn_v, and what holds the values in one matrix with others."""
        if self.facts.expert_count == 8:
            return "Q8_0"
        kind, grouped = self.base, self.facts.gqa >= 4
        if self.mix == "q2_k":
            kind = "Q4_K" if grouped else "Q3_K"
        elif self.mix == "q2_k_s" and grouped:
            kind = "Q4_K"
        elif self.mix == "q3_k_m":
            kind = "Q5_K" if i < 2 else "Q4_K"
        elif self.mix == "q3_k_l" or (self.mix in ("iq4_nl", "iq4_xs") and grouped) or (self.mix == "q4_k_s" and i < 4):
            kind = "Q5_K"
        elif self.mix in ("q4_k_m", "q5_k_m") and _more_bits(i, self.values):
            kind = "Q6_K"
        return "Q5_K" if self.facts.is_70b and kind in ("Q3_K", "Q4_K") else kind

    def _attention_output(self) -> str:
        falcon = self.facts.architecture == "falcon"
        if self.facts.expert_count == 8 and not falcon:
            return "Q5_K" if self.mix in EIGHT_EXPERTS_Q5_K else self.base
        if falcon:
            return "Q4_K" if self.mix == "q3_k_l" else self.base
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(self.mix, self.base)

    def _ffn_down(self, i: int) -> str:
        n, mix, kind, falcon = self.facts.block_count, self.mix, self.base, self.facts.architecture == "falcon"
        more, eighth = _more_bits(i, n), i < n // 8
        if mix == "q2_k":
            kind = "Q3_K"
        elif mix == "q2_k_s" and eighth:
            kind = "Q4_K"
        elif mix == "q3_k_m":
            kind = "Q5_K" if i < n // 16 else "Q4_K" if more or not falcon else "Q3_K"
        elif mix == "q3_k_l":
            kind = "Q4_K" if falcon else "Q5_K"
        elif mix == "q4_k_m" and falcon:
            kind = "Q6_K" if i < n // 16 else "Q5_K" if more else "Q4_K"
        elif mix in ("q4_k_m", "q5_k_m") and more:
            kind = "Q6_K"
        elif eighth and ((mix == "q4_k_s" and not falcon) or (mix in ("iq4_nl", "iq4_xs") and not self.imatrix)):
            kind = "Q5_K"
        elif eighth and mix in ("q4_0", "q5_0") and self.imatrix:
            kind = "Q4_1" if mix == "q4_0" else "Q5_1"
        return kind


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth of n, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _is_values(name: str) -> bool:
    return any(part in name for part in VALUES)


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may have a block type; ggml counts no leading dimensions of 1, so one row is a vector."""
    matrix = any(size > 1 for size in shape[:-1])
    return matrix and name.endswith("weight") and not any(part in name for part in KEPT)


def _fitting(kind: str, columns: int) -> str:
    """The type itself, or what replaces it where its blocks do not divide a row."""
    if kind in FLOATS:
        return kind
    if kind in FALLBACKS and columns % 256:
        kind = FALLBACKS[kind]
    return "F16" if columns % 32 else kind


def _order(name: str) -> tuple[int, str]:
    """The number of the block, -1 outside of the blocks, and the name."""
    match = re.match(r"blk\.(\d+)\.", name, re.ASCII)
    return (int(match[1]) if match else -1, name)


def _check_q2_k_s(choices: Mapping[str, TypeChoice]) -> None:
    name = next((n for n, c in choices.items() if c.type == "Q2_K" and n not in (EMBEDDING, OUTPUT)), None)
    if name is not None:
        hint = "add --imatrix FILE, or take --outtype q2_k"
        raise UsageError(f"q2_k_s: tensor {name!r} in Q2_K needs an importance matrix", hint=hint)


def _mix(outtype: str) -> Mix:
    if outtype not in MIXES:
        raise UsageError(f"unknown outtype {outtype!r}, expected one of {', '.join(MIXES)}")
    return MIXES[outtype]


def _type(name: str) -> str:
    if name.upper() not in TYPES:
        raise UsageError(f"unknown tensor type {name!r}, expected one of {', '.join(TYPES).lower()}")
    return name.upper()


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"tensor type {pattern!r} is not a regular expression: {error}") from error
