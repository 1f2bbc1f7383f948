"""Tiny models in every form that quantool opens, made once per session. Tests read them; what a test changes it copies.

`tiny_llama` is trained for some seconds on the builtin text, so that its perplexity is far below that of chance and
rounding its weights costs something that can be measured.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may use the network
# MKL's matrix products differ in their last bit with the address of a matrix; on one code path they do not, and two
# networks with the same weights have the same logits.
os.environ["MKL_CBWR"] = "AVX2"
# Read at the first matrix product on a GPU and never again: without it torch refuses those of tests that ask for
# deterministic algorithms.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import filecmp
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quantool import cli, kernels
from quantool.data import builtin_documents
from quantool.io import open_checkpoint

pytest_plugins = ["emulated"]  # the fixture of CUDA kernels without a GPU
SPECIAL = ("<s>", "</s>")
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
STEPS, BATCH, LENGTH = 150, 8, 96
OUTLIERS = (3, 40, 77)  # hidden channels that get large activations, as every large language model has them


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """The kernels are compiled before a command could say on its stderr that it compiles them."""
    kernels.why_not()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and artifacts of other tools, which lie beside the repository on some machines."""
    path = Path(__file__).resolve().parents[1] / "../shared"
    if not path.is_dir():
        pytest.skip("needs ../shared")
    return path.resolve()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE: GPT-2's pre-tokenizer, every byte, some merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(itertools.islice(builtin_documents("train"), 20), trainer)
    return made


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def llama(seed: int = 0, **changes: Any) -> Any:
    """A random LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def save(model: Any, directory: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    model.to(torch.bfloat16).save_pretrained(directory, **options)
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """The trained one: bfloat16, untied, grouped-query attention, one file."""
    model = llama()
    ids = torch.tensor(tokenizer.encode("\n\n".join(itertools.islice(builtin_documents("train"), 40))).ids)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    add_outliers(model)
    return save(model, tmp_path_factory.mktemp("tiny") / "tiny-llama", tokenizer)


@torch.no_grad()
def add_outliers(model: Any) -> None:
    """Move a factor of 16 from weights into activations for a few channels: the function stays the same."""
    channels = list(OUTLIERS)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[channels] *= 16
            for linear in linears:
                linear.weight[:, channels] /= 16


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Random weights, head and embeddings one matrix."""
    return save(llama(1, tie_word_embeddings=True), tmp_path_factory.mktemp("tiny") / "tiny-tied", tokenizer)


@pytest.fixture(scope="session")
def tiny_sharded(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tokenizer: Tokenizer) -> Path:
    """`tiny_llama` in several files and an index."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    out = save(model, tmp_path_factory.mktemp("tiny") / "tiny-sharded", tokenizer, max_shard_size="300KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    return out


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tokenizer: Tokenizer) -> Path:
    """`tiny_llama` as llama.cpp's converter would lay it out, in F16, Q8_0 and Q4_1, with its tokenizer."""
    import gguf  # here and below only: a machine that runs the GPU tests may lack it

    path = tmp_path_factory.mktemp("tiny") / "tiny-llama.gguf"
    checkpoint = open_checkpoint(tiny_llama)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, tokenizer)
    for name in checkpoint.infos:
        stem, suffix = name.rsplit(".", 1)
        _add_tensor(writer, f"{names.get_name(stem)}.{suffix}", name, checkpoint.read(name).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: Any, tokenizer: Tokenizer) -> None:
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    content = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _add_tensor(writer: Any, stored: str, name: str, weight: np.ndarray) -> None:
    from gguf import GGMLQuantizationType as Q
    from gguf.quants import quantize as gguf_blocks

    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            weight = weight.reshape(SHAPE[heads], 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    kind = Q.F32 if weight.ndim == 1 else Q.Q4_1 if "down_proj" in name else Q.F16 if "self_attn" in name else Q.Q8_0
    writer.add_tensor(stored, gguf_blocks(weight, kind), raw_dtype=kind)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the tiny model has not seen, in a file: some 200 windows of 64 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(itertools.islice(builtin_documents("test"), 8)), encoding="utf-8")
    return path


def same_files(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = sorted(path.name for path in left.iterdir())
    same = names == sorted(path.name for path in right.iterdir())
    return same and filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command line in this process: `command("quantize", model, "-o", out)`."""
    for name in [name for name in os.environ if name.startswith("QUANTOOL_")]:
        monkeypatch.delenv(name)
    for name, value in cli.QUIET_LIBRARIES.items():  # so that what the command line sets is undone
        monkeypatch.setenv(name, os.environ.get(name, value))

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, *capsys.readouterr())

    return run
