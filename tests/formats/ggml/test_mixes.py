"""The types that llama.cpp itself gave to tiny models: llamacpp_mixes.json.

The file was made by llama_model_quantize (src/llama-quant.cpp of llama.cpp, in the sdist of xllamacpp 2026.10.11549,
linked to the wheel's library) from F32 models whose tensors are those of MODELS. Per model and outtype, with "+" where
an imatrix changed something, it has the types of each tensor of a block: one letter of LETTERS per block, or for all.
"""

import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import pytest

from quantool.errors import UsageError
from quantool.formats.ggml.mixes import MIXES, TYPES, Facts, TypeChoice, assign, facts_of, file_type

GOLDEN = Path(__file__).with_name("llamacpp_mixes.json")
LETTERS = dict(zip(TYPES, "fhbz1504n234567x"[: len(TYPES)], strict=False))
ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED = ("ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
FUSED = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Model:
    """A model of tensors `parts` in each block; matrices have two rows of `width`, ffn_down of `inner`."""

    facts: Facts
    parts: tuple[str, ...] = (*ATTENTION, *DENSE)
    tied: bool = False
    width: int = 256
    inner: int = 512
    options: dict[str, object] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "token_embd.weight", (4, self.width)
        if self.facts.architecture == "gpt2":
            yield "position_embd.weight", (4, self.width)
        for block in range(self.facts.block_count):
            for part in self.parts:
                name = f"blk.{block}.{part}"
                if part.endswith("_norm"):
                    yield f"{name}.weight", (self.width,)
                elif part == "ffn_gate_inp_shexp":
                    yield f"{name}.weight", (1, self.width)
                else:
                    experts = (self.facts.expert_count,) if part.endswith("_exps") else ()
                    yield f"{name}.weight", (*experts, 2, self.inner if "ffn_down" in part else self.width)
                    if self.facts.architecture == "gpt2":
                        yield f"{name}.bias", (2,)
        yield "output_norm.weight", (self.width,)
        if not self.tied:
            yield "output.weight", (4, self.width)


def llama(blocks: int, heads: int, kv_heads: int, experts: int = 0) -> Facts:
    return Facts("llama", blocks, heads, kv_heads, experts)


MODELS = {
    "8 blocks": Model(llama(8, 8, 8)),
    "33 blocks, tied, gqa 4": Model(llama(33, 8, 2), tied=True),
    "70B": Model(llama(80, 8, 1)),
    "80 blocks without gqa": Model(llama(80, 8, 8)),
    "qwen2 of 80 blocks": Model(Facts("qwen2", 80, 8, 8)),
    "mixtral": Model(llama(16, 8, 2, 8), (*ATTENTION, *EXPERTS)),
    "16 experts": Model(Facts("qwen3moe", 12, 8, 4, 16), (*ATTENTION, *EXPERTS)),
    "shared expert": Model(Facts("qwen2moe", 12, 8, 8, 8), (*ATTENTION, *EXPERTS, *SHARED)),
    "gpt2": Model(Facts("gpt2", 12, 4, 4), FUSED, tied=True),
    "phi3": Model(Facts("phi3", 16, 8, 2), FUSED),
    "falcon": Model(Facts("falcon", 32, 8, 1), FUSED),
    "rows of 320": Model(llama(8, 8, 2), width=320, tied=True),
    "rows of 288, untied": Model(llama(8, 8, 8), width=288),
    "rows of 48": Model(llama(8, 8, 8), width=48, inner=80),
    "pure": Model(llama(8, 8, 8), options={"pure": True}),
    "pure, tied": Model(llama(8, 8, 8), tied=True, options={"pure": True, "output_tensor_type": "q5_k"}),
    "given": Model(
        llama(8, 8, 8),
        options={
            "tensor_types": (("blk.[02].*attn_v", "q3_k"), ("attn_v", "q8_0"), (r"\.1\.ffn_down|output\.", "q5_k")),
            "token_embedding_type": "q2_k",
        },
    ),
    "given, tied": Model(
        llama(8, 8, 8), tied=True, width=320, options={"output_tensor_type": "q4_1", "tensor_types": (("up", "q2_k"),)}
    ),
    "given embedding, tied": Model(
        llama(8, 8, 8), tied=True, options={"output_tensor_type": "q4_1", "token_embedding_type": "iq4_xs"}
    ),
}


def folded(model: Model, types: dict[str, str]) -> dict[str, str]:
    """Types per kind of tensor, a letter per block, one letter where all are equal; without what stays F32."""
    letters: dict[str, str] = defaultdict(str)
    for name, _ in model.tensors():
        part = name.split(".", 2)[-1] if name.startswith("blk.") else name
        letters[part] += LETTERS[types[name]]
    return {part: text[0] if len(set(text)) == 1 else text for part, text in letters.items() if set(text) != {"f"}}


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_cpp(name: str) -> None:
    model, golden = MODELS[name], json.loads(GOLDEN.read_text())[name]
    for outtype, imatrix in itertools.product(MIXES, (False, True)):
        if outtype == "q2_k_s" and not imatrix:
            continue
        key = MIXES[outtype].name
        expected = golden.get(f"{key}+", golden.get(key)) if imatrix else golden[key]
        options = dict(model.options)
        if MIXES[outtype].base in ("F32", "F16", "BF16"):
            options.pop("tensor_types", None)  # llama.cpp ignores them here
        tensors = random.Random(0).sample(list(model.tensors()), len(list(model.tensors())))
        choices = assign(tensors, outtype, facts=model.facts, imatrix=imatrix, **options)
        assert list(choices) == [tensor for tensor, _ in tensors]
        found = folded(model, {tensor: choice.type for tensor, choice in choices.items()})
        assert found == expected, (outtype, imatrix)


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def test_golden_covers_every_mix() -> None:
    for golden in json.loads(GOLDEN.read_text()).values():
        assert {run.rstrip("+") for run in golden} == {mix.name for mix in MIXES.values()}


@pytest.mark.parametrize(
    ("model", "blocks", "heads", "kv_heads", "hidden", "inner", "vocabulary"),
    [("smollm2", 30, 9, 3, 576, 1536, 49152), ("stories-4m", 4, 8, 4, 256, 768, 2048)],
)
def test_sizes_of_real_models(
    shared: Path, model: str, blocks: int, heads: int, kv_heads: int, hidden: int, inner: int, vocabulary: int
) -> None:
    """The files of llama-quantize differ by what their tensors take: the rest of each is the same header."""
    keys = hidden // heads * kv_heads
    linears = {"attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden)}
    linears |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    linears |= {"ffn_down": (hidden, inner), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    tensors = [(f"blk.{i}.{part}.weight", shape) for i in range(blocks) for part, shape in linears.items()]
    tensors += [("token_embd.weight", (vocabulary, hidden)), ("output_norm.weight", (hidden,))]
    golden = json.loads((shared / "golden" / f"llamacpp-{model}.json").read_text())
    headers = defaultdict(set)
    for outtype in (key for key in golden if key in MIXES):
        # of smollm2 only the files made with an imatrix were measured
        for key, imatrix in (("bytes", model == "smollm2"), ("bytes_imatrix", True)):
            if key in golden[outtype]:
                choices = assign(tensors, outtype, facts=llama(blocks, heads, kv_heads), imatrix=imatrix)
                sizes = [stored_bytes(choices[name].type, shape) for name, shape in tensors]
                headers[key].add(golden[outtype][key] - sum(-(-size // 32) * 32 for size in sizes))
    assert {key: len(sizes) for key, sizes in headers.items()} == dict.fromkeys(headers, 1)


def test_a_type_that_rows_cannot_hold_is_told() -> None:
    tensors = [("token_embd.weight", (9, 576)), ("blk.0.ffn_down.weight", (9, 1536)), ("blk.0.attn_q.weight", (9, 576))]
    tensors += [("blk.0.attn_k.weight", (9, 48)), ("blk.0.attn_norm.weight", (576,))]
    facts = llama(1, 9, 3)
    assert assign(tensors, "q4_k_m", facts=facts) == {
        "token_embd.weight": TypeChoice("Q8_0", "Q6_K"),
        "blk.0.ffn_down.weight": TypeChoice("Q6_K", "Q6_K"),
        "blk.0.attn_q.weight": TypeChoice("Q5_0", "Q4_K"),
        "blk.0.attn_k.weight": TypeChoice("F16", "Q4_K"),
        "blk.0.attn_norm.weight": TypeChoice("F32", "F32"),
    }
    assert assign([("w.weight", (2, 64))], "iq4_xs", facts=facts) == {"w.weight": TypeChoice("IQ4_NL", "IQ4_XS")}


def test_given_types_hold_for_float_files_too() -> None:
    tensors = [("blk.0.attn_q.weight", (2, 256)), ("blk.0.ffn_up.weight", (2, 256)), ("blk.0.ffn_up.bias", (2,))]
    choices = assign(tensors, "bf16", facts=llama(1, 1, 1), tensor_types=[("ffn_up", "Q4_k"), ("ffn", "q8_0")])
    assert [choice.type for choice in choices.values()] == ["BF16", "Q4_K", "F32"]


def test_q2_k_s_needs_an_imatrix() -> None:
    tensors = list(MODELS["8 blocks"].tensors())
    with pytest.raises(UsageError, match=r"q2_k_s: tensor 'blk\.0\.attn_q\.weight' in Q2_K needs an importance matrix"):
        assign(tensors, "q2_k_s", facts=llama(8, 8, 8))
    assign(tensors, "q2_k_s", facts=llama(8, 8, 8), tensor_types=[("blk", "q4_k")])  # llama.cpp takes this too
    assign(tensors, "q2_k_s", facts=llama(8, 8, 8), imatrix=True)


def test_names() -> None:
    assert [file_type(name) for name in ("f32", "f16", "q4_0", "q4_k_m", "iq4_xs", "bf16")] == [0, 1, 2, 15, 30, 32]
    for outtype, mix in MIXES.items():
        member = gguf.LlamaFileType(mix.file_type).name
        assert member in (f"ALL_{mix.name.upper()}", f"MOSTLY_{mix.name.upper()}")
        assert outtype in (mix.name, mix.name.removesuffix("_m"))
    for kind in TYPES:
        assert gguf.GGMLQuantizationType[kind].name == kind
    with pytest.raises(UsageError, match="unknown outtype 'q4_k_x', expected one of f32, f16, "):
        file_type("q4_k_x")
    with pytest.raises(UsageError, match="unknown tensor type 'q9', expected one of f32, "):
        assign([], "q8_0", facts=llama(1, 1, 1), tensor_types=[("x", "q9")])
    with pytest.raises(UsageError, match=r"tensor type '\(' is not a regular expression: missing \)"):
        assign([], "q8_0", facts=llama(1, 1, 1), tensor_types=[("(", "q8_0")])


def test_facts_of_metadata() -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 80,
        "llama.attention.head_count": [64, 64],
        "llama.attention.head_count_kv": 8,
    }
    facts = facts_of(metadata)
    assert facts == Facts("llama", 80, 64, 8, 0)
    assert (facts.gqa, facts.is_70b) == (8, True)
    del metadata["llama.attention.head_count_kv"]
    assert (facts_of(metadata).gqa, facts_of(metadata).is_70b) == (1, False)
