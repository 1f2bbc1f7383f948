"""Every architecture both ways: transformers' model -> GGUF in F32 -> the real llama.cpp, and read back.

The oracle of the file is llama.cpp, the oracle of reading is the model that the file was made of.
"""

import itertools
import shutil
from pathlib import Path
from typing import Any

import llamacpp
import pytest
import torch
from gguf_families import (
    CASES,
    FIRST,
    reference,
    save_case,
    tokenizer,
    tokens,
    with_table_gelu,
)
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from quantool.errors import QuantoolError
from quantool.io import open_checkpoint
from quantool.io.gguf.architectures import ARCHITECTURES
from quantool.io.gguf.file import Array, GgufFile
from quantool.io.gguf.keys import config_of
from quantool.io.gguf.vocab import tokenizer_metadata
from quantool.model.skeleton import materialise, open_network

# Largest difference of a logit; their standard deviation is about 1. llama.cpp adds in another order: 6e-6 was seen.
# GELU comes from a table of float16 values, as in `with_table_gelu`, where the last bit of an argument can decide
# between two entries: 6e-4 was seen. llama.cpp is 2e-3 from transformers' own GELU, exact or not.
NOISE, GELU_NOISE = 2e-5, 1e-3
GELU = {"gemma", "gemma2", "gemma3", "gpt2", "gptneox", "starcoder2"}


def convert(model: Path, output: Path, **changes: Any) -> dict[str, str]:
    """Write it as GGUF in F32, with `changes` to the metadata (None: without that key); gives what was dropped."""
    checkpoint = open_checkpoint(model)
    vocabulary = tokenizer_metadata(checkpoint, vocab_size=checkpoint.config["vocab_size"])
    return write_gguf(output, checkpoint, **{**vocabulary, **changes})


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file, in no order."""
    file = GgufFile(path)
    fields = {key: file.values(key) if isinstance(value, Array) else value for key, value in file.fields.items()}
    return fields, {name: (t.dtype, t.shape, file.rows(t).tobytes()) for name, t in file.tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_does_and_it_reads_back(name: str, tmp_path: Path) -> None:
    model = save_case(name, tmp_path / "hf")
    output = tmp_path / "m.gguf"
    convert(tmp_path / "hf", output)
    wanted = reference(model, tokens())
    assert wanted.std() > 0.5
    found = torch.from_numpy(llamacpp.logits(output, tokens()))
    noise = GELU_NOISE if CASES[name].architecture in GELU else NOISE
    torch.testing.assert_close(found, reference(with_table_gelu(model), tokens()), rtol=0, atol=noise)

    convert(output, tmp_path / "again.gguf")
    assert contents(tmp_path / "again.gguf") == contents(output)
    checkpoint = open_checkpoint(output)
    written = "LlamaForCausalLM" if name.startswith("llama-mistral") else type(model).__name__
    assert checkpoint.config["architectures"] == [written]
    network = open_network(checkpoint)
    assert sorted(network.names.values()) == sorted(network.checkpoint.infos)
    materialise(network, list(network.names))
    torch.testing.assert_close(reference(network.model, tokens()), wanted, rtol=0, atol=1e-5)


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == set(ARCHITECTURES)


JUNK = [None, -1, 0, 1, 2.5, "x", True, 1e40, float("nan"), 1 << 70]


@pytest.mark.parametrize("name", FIRST.values())
def test_odd_values_in_a_file_are_no_traceback(name: str, tmp_path: Path) -> None:
    save_case(name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    prefix = f"{CASES[name].architecture}."
    found = 0
    for key, value in itertools.product([key for key in file.fields if key.startswith(prefix)], JUNK):
        fields = dict(file.fields)
        file.fields[key] = value
        try:
            config_of(file, checkpoint.infos)
        except QuantoolError as error:
            found += key in str(error)
        file.fields.update(fields)
    assert found > 50


SLIDING, FULL = ["sliding_attention"], ["full_attention"]


def test_names_and_buffers_of_the_first_gpt2(tmp_path: Path) -> None:
    """The hub's own gpt2: no "transformer." before the names, and the causal mask stored in every block."""
    save_case("gpt2-gpt2-plain", tmp_path / "new")
    convert(tmp_path / "new", tmp_path / "new.gguf")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "new/model.safetensors").items()}
    mask = torch.ones(1, 1, 128, 128).tril()
    masks = {f"h.{i}.attn.bias": mask.clone() for i in range(2)}
    save_file({**tensors, **masks}, tmp_path / "old/model.safetensors", {"format": "pt"})
    assert set(convert(tmp_path / "old", tmp_path / "old.gguf")) == set(masks)
    assert contents(tmp_path / "old.gguf") == contents(tmp_path / "new.gguf")


FILES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # What llama.cpp takes where a key is missing.
    ("gemma2-gemma2-plain", {"gemma2.attn_logit_softcapping": None}, {"attn_logit_softcapping": 50.0}),
    ("gemma2-gemma2-plain", {"gemma2.final_logit_softcapping": None}, {"final_logit_softcapping": 30.0}),
    ("gemma2-gemma2-plain", {"gemma2.attention.sliding_window": None}, {"sliding_window": 4096}),
    ("gemma3-gemma3_text-plain", {"gemma3.attention.sliding_window": None}, {"layer_types": ["full_attention"] * 3}),
    ("gemma3-gemma3_text-plain", {"gemma3.attention.sliding_window_pattern": 3}, {"layer_types": SLIDING * 2 + FULL}),
    ("gptneox-gpt_neox-parallel", {"gptneox.rope.freq_base": None}, {"rotary_emb_base": 10000.0}),
    # What the official converter writes and llama.cpp does not go by.
    ("stablelm-stablelm-plain", {"stablelm.use_parallel_residual": True}, {"use_parallel_residual": False}),
    ("stablelm-stablelm-parallel", {"stablelm.use_parallel_residual": False}, {"use_parallel_residual": True}),
    ("phi3-phi3-plain", {"phi3.attention.sliding_window": 0}, {"sliding_window": None}),
    ("phi3-phi3-plain", {"phi3.rope.scaling.original_context_length": 64}, {"rope_scaling": None}),
]


@pytest.mark.parametrize(("name", "changes", "config"), FILES)
def test_files_of_other_writers(name: str, changes: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    save_case(name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf", **changes)
    found = open_checkpoint(tmp_path / "m.gguf").config
    assert {key: found.get(key) for key in config} == config
    open_network(open_checkpoint(tmp_path / "m.gguf"))


NOT_READ: list[tuple[str, dict[str, Any]]] = [
    ("gemma3-gemma3_text-plain", {"gemma3.attention.sliding_window_pattern": [True]}),
    ("gemma2-gemma2-plain", {"gemma2.attn_logit_softcapping": "much"}),
    ("olmo-olmo-plain", {"olmo.attention.layer_norm_epsilon": 1e-6}),
    ("olmo2-olmo2-plain", {"olmo2.attention.sliding_window": 8}),
    ("gptneox-gpt_neox-parallel", {"gptneox.attention.head_count_kv": 2}),
    ("gptneox-gpt_neox-parallel", {"gptneox.rope.scaling.type": "longrope"}),
    ("stablelm-stablelm-plain", {"stablelm.use_parallel_residual": 1}),
    ("starcoder2-starcoder2-tied", {"starcoder2.attention.value_length": 8}),
    ("phi3-phi3-short", {"phi3.rope.scaling.attn_factor": "2"}),
]


@pytest.mark.parametrize(("name", "changes"), NOT_READ)
def test_what_a_config_cannot_say_is_refused(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    save_case(name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf", **changes)
    (word,) = changes
    with pytest.raises(QuantoolError, match=word.rpartition(".")[2].removesuffix("_length").removesuffix("_kv")):
        open_checkpoint(tmp_path / "m.gguf")


def test_llama_cpp_says_why_it_refuses_a_file_and_loads_the_next(tmp_path: Path) -> None:
    save_case("llama-llama-plain", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "bad.gguf", **{"llama.attention.layer_norm_rms_epsilon": None})
    convert(tmp_path / "hf", tmp_path / "good.gguf")
    with pytest.raises(RuntimeError, match=r"bad\.gguf(.|\n)*layer_norm_rms_epsilon"):
        llamacpp.logits(tmp_path / "bad.gguf", tokens())
    assert llamacpp.logits(tmp_path / "good.gguf", tokens()).shape == (len(tokens()), 320)
    with pytest.raises(RuntimeError, match=r"no\.gguf"):
        llamacpp.tokenize(tmp_path / "no.gguf", "text", add_special=False, parse_special=False)
    text = "The three cases, and <s>what</s> makes them differ."
    found = llamacpp.tokenize(tmp_path / "good.gguf", text, add_special=False, parse_special=True)
    assert found == tokenizer(320).encode(text).ids
