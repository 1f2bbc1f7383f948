"""Memory and speed of `quantool quantize --method rtn` on a 4 GB checkpoint, of 8 large blocks and of 32 smaller ones.

Usage: memory.py [--folder DIR]      (about 5 minutes; needs 8 GB of free disk in DIR, by default build/)

Makes a sharded bf16 llama checkpoint of random weights, one tensor in memory at a time, drops it from the page cache
and quantizes it in a process of its own. Peak memory counts what the process allocated, not the pages of mapped files:
it may not grow with the number of blocks. The same disk's plain speed says whether the disk is the bound.
Writes results/memory.json and leaves no other file behind.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from measure import QUANTOOL, ROOT, machine, measure, print_table, save

SHARD_BYTES = 1_000_000_000
NEEDED_BYTES = 8_000_000_000
CHUNK = 16 * 2**20
SCHEME = ("--method", "rtn", "--bits", "4", "--group-size", "128")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a llama; both below come to 4.0 GB in bf16."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int = 32_000


SHAPES = (Shape(8, 4096, 13_568, heads=32), Shape(32, 2048, 7_168, heads=16))


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file; the head is tied to the embeddings."""
    h, i = shape.hidden, shape.intermediate
    yield "model.embed_tokens.weight", (shape.vocab, h)
    for block in range(shape.blocks):
        prefix = f"model.layers.{block}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}self_attn.{name}.weight", (h, h)
        yield f"{prefix}mlp.gate_proj.weight", (i, h)
        yield f"{prefix}mlp.up_proj.weight", (i, h)
        yield f"{prefix}mlp.down_proj.weight", (h, i)
        yield f"{prefix}input_layernorm.weight", (h,)
        yield f"{prefix}post_attention_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()


def shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """Consecutive tensors in files of at most SHARD_BYTES."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in tensors(shape):
        if files[-1] and sum(map(nbytes, files[-1].values())) + nbytes(size) > SHARD_BYTES:
            files.append({})
        files[-1][name] = size
    return files


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """A complete Hugging Face checkpoint; returns the bytes of its safetensors files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    files = shards(shape)
    weight_map = {}
    for number, planned in enumerate(files, 1):
        path = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        write_shard(path, planned, generator)
        weight_map |= dict.fromkeys(planned, path.name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": sum(nbytes(s) for _, s in tensors(shape))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2))
    write_tokenizer(folder)
    return size


def write_shard(path: Path, planned: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    """One safetensors file: length of the header, header, tensors; one tensor in memory at a time."""
    header, offset = {}, 0
    for name, size in planned.items():
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": (offset, offset := offset + nbytes(size))}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in planned.values():
            tensor = torch.empty(size, dtype=torch.bfloat16)
            if len(size) == 1:
                tensor.fill_(1)
            else:
                tensor.normal_(std=0.02, generator=generator)
            file.write(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
        sync_and_forget(file.fileno())


def sync_and_forget(descriptor: int) -> None:
    """To the disk and out of the page cache, so that the next reader reads the disk."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(folder: Path) -> None:
    """Byte level, no merges: 256 tokens."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def disk_speed(folder: Path) -> dict[str, float]:
    """Bytes per second of writing (fsync included) and of reading 1 GB in chunks of 16 MiB."""
    path, chunk, count = folder / "plain", os.urandom(CHUNK), SHARD_BYTES // CHUNK
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(chunk)
        os.fsync(file.fileno())
        write = count * CHUNK / (time.perf_counter() - start)
        sync_and_forget(file.fileno())
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK):
            pass
    read = count * CHUNK / (time.perf_counter() - start)
    path.unlink()
    return {"disk_write_bytes_per_second": write, "disk_read_bytes_per_second": read}


def quantize(folder: Path, shape: Shape) -> dict[str, Any]:
    """Make the checkpoint, quantize it, remove both; what it cost."""
    model, output = folder / "model", folder / "quantized"
    print(f"{shape.blocks} blocks: writing the checkpoint", file=sys.stderr, flush=True)
    size = write_checkpoint(model, shape)
    speed = disk_speed(folder)
    run = measure((*QUANTOOL, "quantize", str(model), "-o", str(output), *SCHEME, "--json"))
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    shutil.rmtree(model)
    shutil.rmtree(output)
    cost = {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "peak_bytes": run.peak_bytes}
    rate = {"max_rss_bytes": run.max_rss_bytes, "input_bytes_per_second": size / run.seconds}
    return {"shape": asdict(shape), "input_bytes": size, "output_bytes": written, **cost, **rate, **speed}


def report(rows: list[dict[str, Any]]) -> None:
    header = ("blocks", "input GB", "seconds", "input MB/s", "peak MB", "cores busy", "disk alone s")
    table = []
    for r in rows:
        disk = r["input_bytes"] / r["disk_read_bytes_per_second"] + r["output_bytes"] / r["disk_write_bytes_per_second"]
        speed = (f"{r['seconds']:.1f}", f"{r['input_bytes_per_second'] / 1e6:.0f}", f"{r['peak_bytes'] / 1e6:.0f}")
        busy = f"{r['cpu_seconds'] / r['seconds']:.2f}"
        table.append((str(r["shape"]["blocks"]), f"{r['input_bytes'] / 1e9:.2f}", *speed, busy, f"{disk:.1f}"))
    print_table(header, table)
    for r in rows:
        read, write = r["disk_read_bytes_per_second"] / 1e6, r["disk_write_bytes_per_second"] / 1e6
        print(f"disk during the run of {r['shape']['blocks']} blocks: reads {read:.0f} MB/s, writes {write:.0f} MB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the files are made (default: build)")
    parent = parser.parse_args().folder
    parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(parent).free) < NEEDED_BYTES:
        raise SystemExit(f"error: {parent}: {free / 1e9:.1f} GB free, 8 needed\nhint: use --folder DIR on another disk")
    before = machine()
    with tempfile.TemporaryDirectory(dir=parent, prefix="memory-") as folder:
        rows = [quantize(Path(folder), shape) for shape in SHAPES]
    report(rows)
    path = save("memory", {"machine": before, "rows": rows})
    print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
