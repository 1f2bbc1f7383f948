"""Whole models on a GPU: quantized by the command line, loaded into tiles, measured, generating, recorded, compiled.

Needs neither gguf nor datasets, nor a network: `make test-gpu`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, llama, save
from tokenizers import Tokenizer

from quantool.kernels import cuda
from quantool.runtime import QuantLinear, load

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a machine of its own, with other versions
IN_TILES = {
    "w4-g32": ["--group-size", "32"],
    "w4-asym-g64": ["--group-size", "64", "--asym"],
    "w4-g128": ["--group-size", "128"],
    "w8-channel": ["--bits", "8", "--group-size", "-1"],
    "awq-format": ["--group-size", "64", "--asym", "--format", "awq"],
    "gptq-act-order": ["--method", "gptq", "--format", "gptq", "--actorder", "group", "--group-size", "32"],
}
IN_ROWS = {
    "w3": ["--bits", "3", "--group-size", "32"],
    "w8a8": ["--scheme", "W8A8"],
    "w8a8-static": ["--method", "smoothquant", "--scheme", "W8A8_STATIC", "--smoothing-strength", "0.5"],
    "nf4": ["--method", "nf4"],
    "llm-int8": ["--method", "llm-int8"],
}


@pytest.fixture
def quantized(command: Command, tiny_llama: Path, tmp_path: Path) -> Any:
    assert cuda.is_available(), cuda.why_not()

    def run(options: list[str]) -> Path:
        method = [] if "--method" in options else ["--method", "rtn"]
        samples = ["--num-samples", "8", "--seq-len", "64"] if {"gptq", "smoothquant"} & {*options} else []
        done = command("quantize", tiny_llama, "-o", tmp_path / "out", *method, *options, *samples)
        assert done.code == 0, done.err
        return tmp_path / "out"

    return run


def linears(model: Any) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def perplexity(command: Command, model: Path, text: Path, *options: object) -> float:
    done = command("eval-ppl", model, "--dataset", text, "--num-samples", 20, "--seq-len", 64, "--json", *options)
    assert done.code == 0, done.err
    return float(json.loads(done.out)["perplexity"])


@pytest.mark.parametrize("options", IN_TILES.values(), ids=IN_TILES)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_perplexity_is_that_of_the_cpu(
    options: list[str], batch_size: int, quantized: Any, command: Command, text_file: Path
) -> None:
    out = quantized(options)
    wanted = perplexity(command, out, text_file, "--device", "cpu")
    for dtype in ("float16", "bfloat16"):
        found = perplexity(command, out, text_file, "--device", "cuda", "--dtype", dtype, "--batch-size", batch_size)
        assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("options", [*IN_TILES.values(), *IN_ROWS.values()], ids=[*IN_TILES, *IN_ROWS])
def test_logits_are_those_of_the_cpu(options: list[str], quantized: Any) -> None:
    out, ids = quantized(options), torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = load(out, device="cpu")(ids).logits
        for dtype, tolerance in (("float32", 5e-3), ("float16", 2e-2), ("bfloat16", 5e-2)):
            model = load(out, device="cuda", dtype=dtype)
            assert {m.tiled for m in linears(model)} == {options in IN_TILES.values() and dtype != "float32"}
            found = model(ids.cuda()).logits.float().cpu()
            assert float((found - wanted).norm() / wanted.norm()) < tolerance


def test_a_loaded_model_may_be_moved(quantized: Any) -> None:
    ids = torch.arange(5, 25).view(1, 20)
    out = quantized(IN_TILES["w4-asym-g64"])
    with torch.inference_mode():
        on_gpu = load(out, device="cuda", dtype="bfloat16")
        wanted = on_gpu(ids.cuda()).logits.float().cpu()
        for found in (
            on_gpu.cpu()(ids).logits,
            on_gpu.cuda()(ids.cuda()).logits.cpu(),
            load(out, device="cpu", dtype="bfloat16").cuda()(ids.cuda()).logits.cpu(),
        ):
            assert float((found.float() - wanted).norm() / wanted.norm()) < 2e-2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["w4-g128", "gptq-act-order"])
def test_generation_is_greedy_on_the_same_logits(name: str, cache: str, quantized: Any) -> None:
    """With a static cache transformers compiles the model and records CUDA graphs."""
    model = load(quantized(IN_TILES[name]), device="cuda", dtype="float16")
    prompt = torch.arange(5, 15, device="cuda").view(1, 10)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    out = model.generate(prompt, **options, output_logits=True, return_dict_in_generate=True)
    assert out.sequences.shape == (1, 18)
    with torch.inference_mode():
        wanted = model(out.sequences).logits[0, 9:-1].float()
    found = torch.cat(out.logits).float()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


def test_a_block_compiles_without_a_break(quantized: Any) -> None:
    model = load(quantized(IN_TILES["gptq-act-order"]), device="cuda", dtype="bfloat16")
    mlp = model.model.layers[0].mlp
    compiled = torch.compile(mlp, fullgraph=True)
    with torch.inference_mode():
        for tokens in (1, 20, 200):
            x = torch.randn(1, tokens, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), mlp(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_a_block_in_a_cuda_graph(tokens: int, quantized: Any) -> None:
    model = load(quantized(IN_TILES["gptq-act-order"]), device="cuda", dtype="bfloat16")
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, tokens, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mlp(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mlp(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            torch.testing.assert_close(y, mlp(x), rtol=2e-2, atol=2e-2)


def test_a_model_holds_its_file(command: Command, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Nothing but what the artifact has, and while it is loaded little more."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128, "num_hidden_layers": 4}
    model = llama(**sizes, num_attention_heads=8, num_key_value_heads=2)
    (tmp_path / "model").mkdir()
    source, out = save(model, tmp_path / "model", tokenizer), tmp_path / "out"
    assert command("quantize", source, "-o", out, "--method", "rtn", "--asym").code == 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load(out, device="cuda")
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert len(linears(loaded)) == 28
    assert all(linear.tiled for linear in linears(loaded))
    assert 0.95 * stored < held < 1.1 * stored
    largest = max(linear.in_features * linear.out_features for linear in linears(loaded))
    assert peak < held + 24 * largest
    model.to("cuda", torch.bfloat16)
    assert held < 0.4 * sum(parameter.nbytes for parameter in model.parameters())
