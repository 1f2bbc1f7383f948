import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quantool.errors import QuantoolError
from quantool.io import model_dtype, open_checkpoint
from quantool.io.gguf.file import GgufFile
from quantool.io.gguf.tokenizer import PRE_TOKENIZERS

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 2, 64, 4, 2, 16, 96, 300
SMOLLM2 = Path(__file__).resolve().parents[2] / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"  # of `make demo`
TEXT = "Hello there, 1234 worlds!\n\n  It's 3½ o'clock — naïve\tcafé 日本語 ١٢٣ 'LL don't   \n x"

Edit = Callable[[gguf.GGUFWriter], Any]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What convert_hf_to_gguf.py does to q and k."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def hf_weights(*, head: bool = False, bias: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    weights = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "model.norm.weight": normal(HIDDEN)}
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        weights[p + "input_layernorm.weight"] = normal(HIDDEN)
        weights[p + "post_attention_layernorm.weight"] = normal(HIDDEN)
        for key, count in rows.items():
            weights[f"{p}self_attn.{key}_proj.weight"] = normal(count, HIDDEN)
            if bias:
                weights[f"{p}self_attn.{key}_proj.bias"] = normal(count)
        weights[p + "self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * HEAD_DIM)
        weights[p + "mlp.gate_proj.weight"] = normal(FFN, HIDDEN)
        weights[p + "mlp.up_proj.weight"] = normal(FFN, HIDDEN)
        weights[p + "mlp.down_proj.weight"] = normal(HIDDEN, FFN)
    if head:
        weights["lm_head.weight"] = normal(VOCAB, HIDDEN)
    return weights


def make(
    path: Path,
    weights: dict[str, np.ndarray],
    *,
    kind: Q = Q.Q8_0,
    edit: Edit | None = None,
    arch: str = "llama",
    **keys: Any,
) -> Path:
    """A GGUF written by the gguf package, with its own name map."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(keys.get("blocks", LAYERS))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    if edit:
        edit(writer)
    for name, weight in weights.items():
        stem, suffix = name.rsplit(".", 1)
        if ".q_proj" in name or ".k_proj" in name:
            weight = permute(weight, HEADS if "q_proj" in name else KV_HEADS)  # noqa: PLW2901
        full = f"{names.get_name(stem)}.{suffix}"
        if weight.ndim == 1 or kind is Q.F32:
            writer.add_tensor(full, weight)
        else:
            writer.add_tensor(full, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refuses(path: Path) -> str:
    with pytest.raises(QuantoolError) as caught:
        open_checkpoint(path)
    assert "\n" not in caught.value.message
    return caught.value.message


# --- tensors


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1])
def test_every_tensor_comes_back_in_hugging_face_order(tmp_path: Path, kind: Q) -> None:
    weights = hf_weights(head=True, bias=True)
    checkpoint = open_checkpoint(make(tmp_path / "m.gguf", weights, kind=kind))
    own = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}
    assert set(checkpoint.infos) == set(weights)
    for name, weight in weights.items():
        info, tensor = checkpoint.infos[name], checkpoint.read(name)
        assert (info.shape, tuple(tensor.shape)) == (weight.shape, weight.shape)
        if weight.ndim == 1:
            expected = torch.from_numpy(weight)
            assert info.dtype == "F32"
        elif kind in own:
            expected = torch.from_numpy(weight).to(own[kind])
        else:  # rows are blocks of their own, so rounding commutes with reordering rows
            expected = torch.from_numpy(dequantize(quantize(weight, kind), kind))
            assert info.dtype == kind.name
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name
        checkpoint.drop(name)
        assert torch.equal(checkpoint.read(name), expected)


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_XS, Q.IQ4_NL, Q.MXFP4])
def test_block_types_the_package_decodes(tmp_path: Path, kind: Q) -> None:
    """Random bytes as blocks: the package is the oracle, in one call where we go chunk by chunk."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 60, (500, 8192 // block * size), dtype=np.uint8)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output.weight", raw, raw_dtype=kind)

    checkpoint = open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=add))
    assert checkpoint.infos["lm_head.weight"].shape == (500, 8192)
    expected = torch.from_numpy(dequantize(raw, kind))
    assert torch.equal(checkpoint.read("lm_head.weight").view(torch.int32), expected.view(torch.int32))


def test_a_type_that_cannot_be_decoded(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output.weight", np.zeros((2, 292), np.uint8), raw_dtype=Q.Q8_K)

    assert "'output.weight': the gguf package cannot decode Q8_K" in refuses(
        make(tmp_path / "m.gguf", hf_weights(), edit=add)
    )


# --- config


def test_config_is_what_transformers_needs(tmp_path: Path) -> None:
    from transformers import AutoConfig

    def ids(writer: gguf.GGUFWriter) -> None:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)

    checkpoint = open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=ids))
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.head_dim, config.rope_parameters["rope_theta"]) == (HEAD_DIM, 100000.0)
    assert checkpoint.metadata["general.architecture"] == "llama"


def test_logits_equal_the_model_it_was_made_from(tmp_path: Path) -> None:
    """The whole of it: names, permutation, config, head; against transformers on the original weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = {name: weight * 0.1 for name, weight in hf_weights(head=True).items()}
    checkpoint = open_checkpoint(make(tmp_path / "m.gguf", weights, kind=Q.F32))
    original = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    logits = []
    reference = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        max_position_embeddings=128,
    )
    rebuilt = LlamaConfig(**checkpoint.config)
    for config, tensors in ((reference, original), (rebuilt, {name: checkpoint.read(name) for name in weights})):
        model = LlamaForCausalLM(config).float()
        model.load_state_dict(tensors)
        with torch.inference_mode():
            logits.append(model(input_ids=torch.arange(20)[None]).logits)
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [(Q.F32, "float32", torch.float32), (Q.F16, "float16", torch.float16), (Q.BF16, "bfloat16", torch.bfloat16)],
)
def test_dtype(tmp_path: Path, kind: Q, name: str, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "m.gguf", hf_weights(head=True), kind=kind))
    assert (checkpoint.config["torch_dtype"], model_dtype(checkpoint)) == (name, dtype)
    assert checkpoint.config["tie_word_embeddings"] is False


def llama3_divisors(factor: float, theta: float = 100000.0) -> np.ndarray:
    """The loop of convert_hf_to_gguf.py, written out."""
    out = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / HEAD_DIM)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192 / 1:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_rope_scaling(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    def llama3(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", llama3_divisors(32.0))

    found = [open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=e)) for e in (linear, yarn, llama3)]
    assert [checkpoint.config["rope_scaling"] for checkpoint in found] == [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ]
    assert all("rope_freqs" not in name for name in found[2].infos)


def test_llama3_scaling_is_the_one_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def llama3(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", llama3_divisors(8.0))

    config = LlamaConfig(**open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=llama3)).config)
    plain = 100000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    torch.testing.assert_close(LlamaRotaryEmbedding(config).inv_freq, plain / torch.from_numpy(llama3_divisors(8.0)))


CONFIG_ERRORS: dict[str, tuple[dict[str, Any], Edit | None, str]] = {
    "architecture": (
        {"arch": "mamba"},
        None,
        "architecture 'mamba' is not known, expected one of llama, smollm3, qwen2",
    ),
    "unknown tensor": (
        {},
        lambda w: w.add_tensor("blk.0.ffn_gate_shexp.weight", np.ones((2, 2), np.float32)),
        "'blk.0.ffn_gate_shexp.weight' is not known in architecture 'llama'",
    ),
    "stack": (
        {},
        lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 2, 2), np.float32)),
        "llama.expert_count is 0, 'blk.0.ffn_gate_exps.weight' is a stack of 2",
    ),
    "no stack": (
        {},
        lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.ones(2, np.float32)),
        "'blk.0.ffn_gate_exps.weight': shape [2], expected a stack",
    ),
    "experts": ({}, lambda w: w.add_expert_count(8), "llama.expert_count is 8"),
    "split": ({}, lambda w: w.add_uint16("split.count", 3), "is one part of a split model"),
    "blocks": ({"blocks": 1 << 30}, None, "1073741824 blocks of width 64 are announced, 2 of width 64 are stored"),
    "heads": ({}, lambda w: w.add_key_length(24), "rotary dimension 16 of heads of 24"),
    "yarn": (
        {},
        lambda w: (
            w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            w.add_rope_scaling_factor(2.0),
            w.add_rope_scaling_attn_factors(1.5),
        ),
        "llama.rope.scaling.attn_factor is 1.5, which is not supported",
    ),
    "rope_freqs": (
        {},
        lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 2, 8, dtype=np.float32)),
        "rope_freqs.weight is not Llama 3 scaling",
    ),
    "rope_freqs shape": (
        {},
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(5, np.float32)),
        "rope_freqs.weight has shape [5], expected [8]",
    ),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_what_a_config_cannot_say_is_an_error(tmp_path: Path, case: str) -> None:
    keys, edit, words = CONFIG_ERRORS[case]
    if case == "heads":
        edit_both = edit

        def edit(writer: gguf.GGUFWriter) -> None:
            assert edit_both is not None
            edit_both(writer)
            writer.add_rope_dimension_count(16)

    assert words in refuses(make(tmp_path / "m.gguf", hf_weights(), edit=edit, **keys))


# --- damaged files


def test_truncations_are_refused(tmp_path: Path) -> None:
    data = make(tmp_path / "m.gguf", hf_weights()).read_bytes()
    damaged = tmp_path / "d.gguf"
    start = min(tensor.start for tensor in GgufFile(tmp_path / "m.gguf").tensors.values())
    for size in [*range(0, start, 97), len(data) // 2]:
        damaged.write_bytes(data[:size])
        assert str(damaged) in refuses(damaged)
    assert "truncated" in refuses(damaged)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=8))
@example(changes=[(1168, 0)])  # a q projection of rows of no columns
def test_damaged_bytes_never_crash(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    good = tmp_path / "good.gguf"
    if not good.exists():
        make(good, hf_weights())
    data = bytearray(good.read_bytes())
    for position, value in changes:
        data[position] = value
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.infos:
            checkpoint.read(name)
    except QuantoolError as error:
        assert "\n" not in error.message  # noqa: PT017 - both outcomes are right, a traceback is not


def header(version: int, tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "magic": (b"GGML" + bytes(60), "is not a GGUF file"),
    "version": (header(1, 0, 0), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is 50331648"),
    "key count": (header(3, 0, 1 << 60, bytes(64)), "1152921504606846976 items are expected"),
    "tensor count": (header(3, 1 << 60, 0, bytes(64)), "1152921504606846976 items are expected"),
    "string length": (
        header(3, 0, 1, struct.pack("<Q", 1 << 60) + bytes(64)),
        "1152921504606846976 bytes are expected",
    ),
    "array length": (
        header(3, 0, 1, string(b"k") + struct.pack("<IIQ", 9, 0, 1 << 60) + bytes(64)),
        "bytes are expected",
    ),
    "string array": (
        header(3, 0, 1, string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(64)),
        "items are expected",
    ),
    "nested array": (header(3, 0, 1, string(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)), "array of type 9"),
    "value type": (header(3, 0, 1, string(b"k") + struct.pack("<I", 77) + bytes(64)), "'k' has type 77"),
    "duplicate": (header(3, 0, 2, (string(b"k") + struct.pack("<II", 4, 7)) * 2), "'k' appears twice"),
    "not UTF-8": (header(3, 0, 1, string(b"\xff") + struct.pack("<II", 4, 7)), "utf-8"),
    "alignment": (header(3, 0, 1, string(b"general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0"),
    "dimensions": (header(3, 1, 0, string(b"t") + struct.pack("<I", 1 << 31) + bytes(64)), "2147483648 dimensions"),
    "tensor type": (header(3, 1, 0, string(b"t") + struct.pack("<IQIQ", 1, 32, 999, 0)), "unknown type 999"),
    "block": (
        header(3, 1, 0, string(b"t") + struct.pack("<IQIQ", 1, 31, 2, 0)),
        "rows of 31 are not whole Q4_0 blocks of 32",
    ),
    "huge": (header(3, 1, 0, string(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)), "larger than any file"),
    "beyond": (header(3, 1, 0, string(b"t") + struct.pack("<IQIQ", 1, 1 << 40, 0, 0)), "truncated"),
    "misaligned": (
        header(3, 1, 0, string(b"t") + struct.pack("<IQIQ", 1, 1, 0, 3) + bytes(64)),
        "expected a multiple of 32",
    ),
    "overlap": (
        header(
            3,
            2,
            0,
            string(b"a")
            + struct.pack("<IQIQ", 1, 16, 0, 0)
            + string(b"b")
            + struct.pack("<IQIQ", 1, 1, 0, 32)
            + bytes(128),
        ),
        "inside the tensor in front of it",
    ),
    "no architecture": (header(3, 0, 0, bytes(64)), "architecture None is not known"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_one_line_at_once(tmp_path: Path, case: str) -> None:
    data, words = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert words in refuses(path)


# --- tokenizers


def train(pre: str) -> Tokenizer:
    """A byte-level BPE with the pre-tokenizer written out as the tokenizer.json of its family has it."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    steps: list[Any] = [byte_level]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre != "gpt-2":
        from tokenizers import Regex

        count = "{1,3}" if pre == "llama-bpe" else ""
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + count + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        steps.insert(0, pre_tokenizers.Split(Regex(words), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def add_byte_level(tokenizer: Tokenizer, pre: str) -> Edit:
    content = json.loads(tokenizer.to_str())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(vocabulary)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
        writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages }}")

    return add


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizer(tmp_path: Path, pre: str) -> None:
    from transformers import AutoTokenizer

    original = train(pre)
    checkpoint = open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=add_byte_level(original, pre)))
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.write_aux(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 0}
    text = f"<|start|>{TEXT} {TEXT.upper()}<|end|>"
    expected = original.encode(text, add_special_tokens=False).ids
    rebuilt = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert rebuilt.encode(text, add_special_tokens=False).ids == expected
    assert len(expected) < len(text)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded(text, add_special_tokens=False).input_ids == expected
    assert loaded.decode(expected) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.chat_template) == ("<|start|>", "<|end|>", "{{ messages }}")
    assert loaded("hi").input_ids[0] == (
        1 if pre == "llama-bpe" else loaded("hi", add_special_tokens=False).input_ids[0]
    )


def test_default_pre_tokenizer_splits_as_llama_cpp(tmp_path: Path) -> None:
    edit = add_byte_level(train("gpt-2"), "default")
    open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=edit)).write_aux(tmp_path)
    pre = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    assert pre is not None
    pieces = [piece for piece, _ in pre.pre_tokenize_str("a (b) 12345 x=y")]
    assert pieces == ["a", "Ġ", "(", "b", ")", "Ġ", "123", "45", "Ġx", "=", "y"]


def test_token_types_decide_what_is_special(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "c", "<ctl>", "ab c", "<unused>"])
        writer.add_token_types([1, 1, 1, 3, 4, 5])
        writer.add_token_merges([])

    open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=add)).write_aux(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert added == {"<ctl>": True, "ab c": False}
    assert tokenizer.encode("b<ctl>ab ca").ids == [1, 3, 4, 0]


def test_unknown_tokenizers_are_named(tmp_path: Path) -> None:
    def other(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("bert")
        writer.add_token_list(["a"])

    def broken(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b"])
        writer.add_token_merges(["a c"])

    cases = [
        (
            add_byte_level(train("gpt-2"), "jais-2"),
            "pre-tokenizer 'jais-2' is not known, expected one of default, gpt-2",
        ),
        (other, "tokenizer 'bert' is not known"),
        (broken, "the tokenizer cannot be rebuilt: "),
    ]
    for edit, words in cases:
        checkpoint = open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=edit))
        with pytest.raises(QuantoolError) as caught:
            checkpoint.write_aux(tmp_path)
        assert words in caught.value.message
        assert not (tmp_path / "tokenizer.json").exists()
    assert "smollm" in PRE_TOKENIZERS


def test_no_tokenizer_is_no_error(tmp_path: Path) -> None:
    open_checkpoint(make(tmp_path / "m.gguf", hf_weights())).write_aux(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation_config.json", "m.gguf"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer(tmp_path: Path, prefix: bool) -> None:
    """Against the SentencePiece library itself, on a model it trained."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for line in (Path(__file__).read_text().splitlines()) if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "spm"), vocab_size=700, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=prefix, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = spm.get_piece_size()

    def kind(i: int) -> int:
        return 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([spm.id_to_piece(i) for i in range(size)])
        writer.add_token_scores([spm.get_score(i) for i in range(size)])
        writer.add_token_types([kind(i) for i in range(size)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(prefix)

    out = tmp_path / "out"
    out.mkdir()
    open_checkpoint(make(tmp_path / "m.gguf", hf_weights(), edit=add)).write_aux(out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in [*lines, TEXT, "  two  spaces ", "日本語 ½"]:
        expected = spm.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text
        assert tokenizer.encode(text).ids == [1, *expected]
        assert tokenizer.decode(expected) == text


# --- the real thing


@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs the model that `make demo` downloads")
def test_smollm2(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SMOLLM2)
    assert len(checkpoint.infos) == 272
    reader = gguf.GGUFReader(SMOLLM2)
    raw = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    query = torch.from_numpy(raw["blk.7.attn_q.weight"]).view(9, 32, 2, -1).transpose(1, 2).reshape(576, -1)
    assert torch.equal(checkpoint.read("model.layers.7.self_attn.q_proj.weight"), query)
    down = torch.from_numpy(raw["blk.7.ffn_down.weight"])
    assert torch.equal(checkpoint.read("model.layers.7.mlp.down_proj.weight"), down)
    checkpoint.write_aux(tmp_path)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("<|im_start|>user\nHi 12<|im_end|>").ids
    assert ids == [1, 4093, 198, 26843, 216, 33, 34, 2]
