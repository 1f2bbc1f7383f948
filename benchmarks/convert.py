"""From a checkpoint of an 8B model to a quantized one, end to end: GB of it per second, and what bounds the run.

Usage: convert.py [--folder DIR] [--blocks N] [--devices D ...] [--outputs O ...] [--peer]
                                                 (8B, both devices: some minutes; 32 GB of free disk in DIR)

The checkpoint has the shapes of Llama 3.1 8B and random bf16 weights, 16 GB, written once; with fewer --blocks it is
smaller. Each run is `quantool quantize` or `convert-gguf` in a process of its own, once with the source out of the page
cache and once with all of it in there. Seconds are of the process, with the start of Python and of CUDA; the rate is of
the source's bytes in them. On a GPU the run says itself how long it read, copied, computed and wrote, all of which
overlap, and which of these bound it (stages/streaming.py). --peer adds llama-quantize (llamacpp_peer.py), which starts
from a bf16 GGUF of the same weights.

convert-gguf needs the package gguf: where it is missing its rows say so. Writes results/convert-CARD.json, or
convert-cpu.json, after every run.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from measure import QUANTOOL, ROOT, Run, machine, measure, print_table, save
from memory import SHARD_BYTES, disk_speed, nbytes, sync_and_forget, write_tokenizer

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB, BLOCKS = 4096, 14_336, 32, 8, 128_256, 32
POOL = 1 << 26  # random weights, of which every tensor takes a part: an encoder does not see that they repeat
OUTPUTS = {
    "rtn w4 g128": ("quantize", "--method", "rtn", "--bits", "4", "--group-size", "128"),
    "Q4_K_M": ("convert-gguf", "--outtype", "q4_k_m"),
}


def tensors(blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the files."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            yield f"{prefix}self_attn.{name}.weight", (heads * HIDDEN // HEADS, HIDDEN)
        yield f"{prefix}self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{prefix}input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_checkpoint(folder: Path, blocks: int) -> int:
    """A complete Hugging Face checkpoint; returns the bytes of its safetensors files."""
    folder.mkdir()
    pool = torch.empty(POOL, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors(blocks):
        if files[-1] and sum(map(nbytes, files[-1].values())) + nbytes(shape) > 5 * SHARD_BYTES:
            files.append({})
        files[-1][name] = shape
    weight_map = {}
    for number, planned in enumerate(files, 1):
        path = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        write_shard(path, planned, pool)
        weight_map |= dict.fromkeys(planned, path.name)
    index = {"metadata": {"total_size": sum(nbytes(s) for _, s in tensors(blocks))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config(blocks), indent=2))
    write_tokenizer(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_shard(path: Path, planned: dict[str, tuple[int, ...]], pool: torch.Tensor) -> None:
    header, offset = {}, 0
    for name, shape in planned.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, offset := offset + nbytes(shape))}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = memoryview(pool.view(torch.uint8).numpy()).cast("B")
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        at = 0
        for shape in planned.values():
            left = nbytes(shape)
            if len(shape) == 1:
                left -= file.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().data)
            while left:
                count = file.write(values[at : at + left])
                left, at = left - count, (at + count) % len(values)
        sync_and_forget(file.fileno())


def config(blocks: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def cached(folder: Path, wanted: bool) -> None:
    """Bring the files of a folder into the page cache, or out of it."""
    for path in folder.glob("*"):
        with path.open("rb", buffering=0) as file:
            if not wanted:
                sync_and_forget(file.fileno())
            while wanted and file.read(1 << 24):
                pass


def convert(command: tuple[str, ...], model: Path, output: Path, device: str) -> Run:
    """One run; what it wrote is removed."""
    try:
        return measure(
            (*QUANTOOL, command[0], str(model), "-o", str(output), *command[1:], "--device", device, "--json")
        )
    finally:
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)


def row(name: str, device: str, cache: str, size: int, run: Run) -> dict[str, Any]:
    result = run.json() if run.stdout.strip() else {}
    return {
        "output": name,
        "device": device,
        "source": cache,
        "input_bytes": size,
        "output_bytes": result.get("bytes"),
        "seconds": run.seconds,
        "input_bytes_per_second": size / run.seconds,
        "stage_seconds": result.get("seconds"),
        "bound": result.get("bound"),
        "busy_seconds": result.get("busy_seconds"),
        "peak_bytes": run.peak_bytes,
    }


def runs(folder: Path, model: Path, size: int, devices: list[str], outputs: list[str]) -> Iterator[dict[str, Any]]:
    """Every output on every device, with a cold and a warm source."""
    for name in outputs:
        for device in devices:
            if name == "Q4_K_M" and find_spec("gguf") is None:
                yield {"output": name, "device": device, "missing": "the package gguf is not installed"}
                continue
            for cache in ("disk", "page cache"):
                print(f"{name} on {device}, source in the {cache}", file=sys.stderr, flush=True)
                cached(model, cache == "page cache")
                yield row(name, device, cache, size, convert(OUTPUTS[name], model, folder / "out.gguf", device))


def peer(folder: Path, model: Path, size: int) -> Iterator[dict[str, Any]]:
    """llama-quantize of the same weights; what it starts from is not in its time."""
    import llamacpp_peer

    library, source, made = llamacpp_peer.build(), folder / "bf16.gguf", folder / "peer.gguf"
    measure((*QUANTOOL, "convert-gguf", str(model), "-o", str(source), "--outtype", "bf16", "-q"))
    script = (sys.executable, str(ROOT / "benchmarks" / "llamacpp_peer.py"), str(library), str(source), str(made))
    threads = ("--threads", str(len(os.sched_getaffinity(0))))
    run = measure((*script, "q4_k_m", *threads))
    yield {**row("Q4_K_M", "cpu", "page cache", size, run), "output": "Q4_K_M by llama-quantize"}


def report(rows: list[dict[str, Any]]) -> None:
    parts = ("reading", "copying", "computing", "writing")
    table = []
    for r in rows:
        if "missing" in r:
            table.append((r["output"], r["device"], r["missing"], *("-",) * (4 + len(parts))))
            continue
        busy = [f"{r['busy_seconds'][part]:.1f}" if r["busy_seconds"] else "-" for part in parts]
        rate, peak = f"{r['input_bytes_per_second'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.2f}"
        table.append(
            (r["output"], r["device"], r["source"], f"{r['seconds']:.1f}", rate, r["bound"] or "-", peak, *busy)
        )
    print_table(("output", "device", "source in", "seconds", "GB/s", "bound by", "peak GB", *parts), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the files are made (default: build)")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"decoder blocks (default: {BLOCKS}, an 8B model)")
    there = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", nargs="+", default=there, help=f"default here: {' '.join(there)}")
    parser.add_argument("--outputs", nargs="+", default=list(OUTPUTS), choices=list(OUTPUTS), metavar="O")
    parser.add_argument("--peer", action="store_true", help="llama-quantize too")
    args = parser.parse_args()
    needed = 2 * sum(nbytes(shape) for _, shape in tensors(args.blocks)) + SHARD_BYTES
    args.folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(args.folder).free) < needed:
        raise SystemExit(f"error: {args.folder}: {free} bytes free, {needed} needed\nhint: use --folder DIR")
    card = torch.cuda.get_device_name(0) if "cuda" in args.devices else "cpu"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert-") as name:
        folder, model = Path(name), Path(name) / "model"
        print("writing the checkpoint", file=sys.stderr, flush=True)
        size = write_checkpoint(model, args.blocks)
        setting = {"machine": machine(), "card": card, "blocks": args.blocks, **disk_speed(folder)}
        measure((*QUANTOOL, "-v", "--version"))  # compiles the kernels
        for r in (
            *runs(folder, model, size, args.devices, args.outputs),
            *(peer(folder, model, size) if args.peer else ()),
        ):
            rows.append(r)
            path = save(f"convert-{card.replace(' ', '-')}", {**setting, "rows": rows})
    report(rows)
    read, write = (setting[f"disk_{way}_bytes_per_second"] / 1e9 for way in ("read", "write"))
    print(f"the disk by itself reads {read:.2f} GB/s and writes {write:.2f} GB/s")
    print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
