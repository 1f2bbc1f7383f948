"""convert-gguf and eval-ppl beside llama.cpp, in one run on one machine with the same number of threads.

Usage: gguf_vs_llamacpp.py [--only speed|end|quality] [--model stories-4m|smollm2] [--mix MIX] [--threads N] [--json]

speed    million weights per second into each block type, quantool's search and ggml's on the same Gaussian rows with
         and without importance, and the error of both, weighted by the importance where there is one
end      a synthetic llama of 0.5 billion weights from safetensors to Q4_K_M: `quantool convert-gguf` in one step, and a
         BF16 file by convert_hf_to_gguf.py followed by llama-quantize; wall seconds and peak memory of the processes,
         mapped files not counted (llama-quantize runs inside a Python process of some 90 MB, 230 with an imatrix)
quality  files of every mix by llama-quantize and by quantool with the same importance matrix, and by quantool with
         --method gptq on the same text; all judged by llama.cpp's own logits as llama-perplexity does, and the
         perplexity of the first of them by eval-ppl too

llama.cpp is the one in the wheel xllamacpp; what the wheel lacks is built from its source distribution or, with
--llama-cpp DIR, from that tree. With --json the parts that were run are put into results/gguf_vs_llamacpp.json.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import llamacpp_peer as peer
import memory
from measure import QUANTOOL, RESULTS, ROOT, SHARED, Run, machine, measure, print_table, save, version
from methods_vs_peers import build_model, without_folders
from quantool.formats.ggml import GGML_TYPES

PEER = (sys.executable, str(Path(peer.__file__)))
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
ROWS, COLUMNS, REPEATS = 1024, 4096, 3
SYNTHETIC = memory.Shape(8, 2048, 5632, heads=32, vocab=49_152)
MIXES = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s"),
)
FEW_MIXES = ("q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "q3_k_m", "q2_k")
WAYS = ("llama_quantize", "quantool", "quantool_gptq")
EVALUATED = ("q4_k_m",)  # and the float model: by eval-ppl too
SEQ_LEN, WINDOWS = 512, 64  # of the importance matrix and of GPTQ


@dataclass(frozen=True, slots=True)
class Setting:
    """A text is a file, its first byte and the byte after its last."""

    model: Callable[[], str]
    calibration: tuple[str, int, int]
    evaluation: tuple[str, int, int]
    chunks: int
    mixes: Sequence[str]


# As in ../shared/golden/llamacpp-*.json, whose figures come from llama-perplexity itself.
SETTINGS = {
    "stories-4m": Setting(
        lambda: str(SHARED / "models" / "stories-4m"),
        ("stories.txt", 0, 600_000),
        ("stories.txt", 600_000, 1_000_000),
        100,
        MIXES,
    ),
    "smollm2": Setting(build_model, ("c4.utf8", 0, 400_000), ("wiki.test.raw", 0, 1 << 30), 24, FEW_MIXES),
}


# --- speed


def best_rate(encode: Callable[[], Any]) -> float:
    """Million weights per second, the best of some runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        encode()
        seconds.append(time.perf_counter() - start)
    return ROWS * COLUMNS / min(seconds) / 1e6


def weighted_error(name: str, blocks: np.ndarray, weight: np.ndarray, importance: np.ndarray | None) -> float:
    """Root of sum w (x - y)^2 / sum w x^2; w is 1 without importance."""
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]).astype(np.float64)
    weights = np.ones(COLUMNS) if importance is None else importance.astype(np.float64)
    return float(np.sqrt((weights * (weight - values) ** 2).sum() / (weights * weight.astype(np.float64) ** 2).sum()))


def compare_speed(threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)
    given = (rng.standard_normal(COLUMNS) ** 2 + 0.01).astype(np.float32)
    rows = []
    for name in (name for name in TYPES if name in GGML_TYPES):
        print(name, file=sys.stderr, flush=True)
        GGML_TYPES[name].quantize(torch.from_numpy(weight[:1]))  # compiles what there is to compile
        for importance in (None, given):
            tensor = None if importance is None else torch.from_numpy(importance)
            row: dict[str, Any] = {"type": name, "importance": importance is not None}

            def ours(name: str = name, tensor: torch.Tensor | None = tensor) -> np.ndarray:
                return GGML_TYPES[name].quantize(torch.from_numpy(weight), tensor).numpy()

            def theirs(name: str = name, importance: np.ndarray | None = importance) -> np.ndarray:
                return peer.encode(name, weight, importance, threads)

            for who, encode in (("quantool", ours), ("ggml", theirs)):
                row[f"{who}_mweights_per_second"] = best_rate(encode)
                row[f"{who}_error"] = weighted_error(name, encode(), weight, importance)
            rows.append(row)
    return rows


def report_speed(rows: list[dict[str, Any]], threads: int) -> None:
    print(f"\nEncoding, million weights per second, {threads} threads\n")
    table = []
    for r in rows:
        ours, theirs = r["quantool_mweights_per_second"], r["ggml_mweights_per_second"]
        errors = (
            f"{r['quantool_error']:.5f}",
            f"{r['ggml_error']:.5f}",
            f"{r['quantool_error'] / r['ggml_error']:.4f}",
        )
        name = r["type"] + (" imatrix" if r["importance"] else "")
        table.append((name, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.1f}", *errors))
    print_table(("type", "quantool", "ggml", "ratio", "error", "of ggml", "ratio"), table)


# --- end to end


def compare_end_to_end(threads: int, llama_cpp: Path) -> list[dict[str, Any]]:
    """Both ways to Q4_K_M, without and with an importance matrix (random: it is the time that counts)."""
    environment = {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(dir=made("build"), prefix="gguf-") as temporary:
        folder = Path(temporary)
        model, bf16 = folder / "model", folder / "bf16.gguf"
        print("writing the checkpoint", file=sys.stderr, flush=True)
        size = memory.write_checkpoint(model, SYNTHETIC)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(build_model()) / file, model)
        ours = (*QUANTOOL, "convert-gguf", str(model), "-o", str(folder / "ours.gguf"), "--outtype", "q4_k_m", "--json")
        script = str(llama_cpp / "convert_hf_to_gguf.py")
        convert = (sys.executable, script, str(model), "--outfile", str(bf16), "--outtype", "bf16")
        first = measure(convert, env=environment, log=folder / "convert.log")
        imatrix = random_imatrix(bf16, folder / "imatrix.gguf")
        theirs = (*PEER, str(peer.build()), str(bf16), str(folder / "theirs.gguf"), "q4_k_m", "--threads", str(threads))
        rows = []
        for given in ((), ("--imatrix", str(imatrix))):
            one = measure((*ours, *given, "--overwrite"), env=environment, log=folder / "ours.log")
            second = measure((*theirs, *given), env=environment, log=folder / "theirs.log")
            rows.append(
                {
                    "imatrix": bool(given),
                    "input_bytes": size,
                    "quantool": {**cost(one), "bytes": (folder / "ours.gguf").stat().st_size},
                    "convert": {**cost(first), "bytes": bf16.stat().st_size},
                    "llama_quantize": {**cost(second), "bytes": (folder / "theirs.gguf").stat().st_size},
                }
            )
    return rows


def cost(run: Run) -> dict[str, Any]:
    """What a process cost, and its command without the folders of this run."""
    command = without_folders(run.command)
    figures = {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "peak_bytes": run.peak_bytes}
    return {"command": command, **figures, "max_rss_bytes": run.max_rss_bytes}


def random_imatrix(model: Path, output: Path) -> Path:
    from quantool.io.imatrix import Imatrix, Importance, write_imatrix

    generator = torch.Generator().manual_seed(0)
    entries = {
        tensor.name: Importance(
            torch.randn(1, int(tensor.shape[0]), generator=generator).square() + 0.01, torch.full((1,), 32_768)
        )
        for tensor in gguf.GGUFReader(model).tensors
        if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
    }
    write_imatrix(output, Imatrix(entries, "random", 64), overwrite=True)
    return output


def report_end_to_end(rows: list[dict[str, Any]]) -> None:
    print("\nSafetensors to Q4_K_M, a llama of 0.5 billion weights\n")
    table = []
    for r in rows:
        given = " with imatrix" if r["imatrix"] else ""
        seconds = r["convert"]["seconds"] + r["llama_quantize"]["seconds"]
        for name, run in (
            (f"quantool convert-gguf{given}", r["quantool"]),
            ("convert_hf_to_gguf.py, BF16", r["convert"]),
            (f"llama-quantize{given}", r["llama_quantize"]),
        ):
            table.append((name, f"{run['seconds']:.1f}", f"{run['peak_bytes'] / 1e6:.0f}", f"{run['bytes'] / 1e6:.1f}"))
        peak = max(r["convert"]["peak_bytes"], r["llama_quantize"]["peak_bytes"])
        ratio = f"{seconds / r['quantool']['seconds']:.2f}", f"{peak / r['quantool']['peak_bytes']:.2f}"
        table.append((f"llama.cpp's two steps / quantool{given}", *ratio, ""))
    print_table(("", "seconds", "peak MB", "file MB"), table)


# --- quality


def quantool(threads: int, folder: Path, *options: object) -> Run:
    return measure(
        (*QUANTOOL, *map(str, options)), env={"OMP_NUM_THREADS": str(threads)}, log=folder / f"{options[0]}.log"
    )


def compare_quality(name: str, threads: int, mixes: Sequence[str] | None) -> dict[str, Any]:
    """Every mix of one model, judged by llama.cpp; the mixes in EVALUATED by eval-ppl too."""
    setting = SETTINGS[name]
    model = setting.model()
    with tempfile.TemporaryDirectory(dir=made("build"), prefix="gguf-") as temporary:
        folder = Path(temporary)
        evaluation = cut(setting.evaluation, folder / "evaluation.txt")
        text = ("--dataset", cut(setting.calibration, folder / "text.txt"), "--num-samples", WINDOWS)
        for options in (("--format", "imatrix", "-o", folder / "imatrix.gguf"), ("-o", folder / "stats.safetensors")):
            quantool(threads, folder, "calibrate", model, *text, "--seq-len", SEQ_LEN, *options)
        base = folder / "base.gguf"
        quantool(threads, folder, "convert-gguf", model, "-o", base, "--outtype", "bf16")
        judge = peer.Judge(base, evaluation, folder, n_ctx=SEQ_LEN, chunks=setting.chunks, threads=threads)
        result: dict[str, Any] = {"model": name, "base": asdict(judge.base), "mixes": [], "eval_ppl": []}

        def evaluate(file: Path, judged: peer.Judged, what: str) -> None:
            options = ("--protocol", "llama.cpp", "--dataset", evaluation, "--num-samples", setting.chunks, "--json")
            found = quantool(threads, folder, "eval-ppl", file, "--reference", base, *options).json()
            figures = {key: found[key] for key in ("perplexity", "perplexity_error", "kl_divergence")}
            result["eval_ppl"].append({"file": what, "llama.cpp": asdict(judged), "eval-ppl": figures})

        evaluate(base, judge.base, "bf16")
        for mix in mixes or setting.mixes:
            row: dict[str, Any] = {"mix": mix}
            for who in WAYS:
                print(f"{name}: {mix}: {who}", file=sys.stderr, flush=True)
                seconds = make_file(who, mix, model, folder, threads)
                judged = judge.judge(folder / f"{who}.gguf")
                row[who] = {**asdict(judged), "bytes": (folder / f"{who}.gguf").stat().st_size, "seconds": seconds}
                if mix in EVALUATED and who != "quantool_gptq":
                    evaluate(folder / f"{who}.gguf", judged, f"{mix} by {who.replace('_', '-')}")
            result["mixes"].append(row)
    return result


def make_file(who: str, mix: str, model: str, folder: Path, threads: int) -> float:
    """Write WHO.gguf in one of the ways; returns the seconds of the process."""
    file, imatrix = folder / f"{who}.gguf", folder / "imatrix.gguf"
    if who == "llama_quantize":
        command = (*PEER, str(peer.build()), str(folder / "base.gguf"), str(file), mix, "--imatrix", str(imatrix))
        return measure((*command, "--threads", str(threads)), log=folder / "peer.log").seconds
    options = ("--method", "gptq", "--calibration", folder / "stats.safetensors")
    given = options if who == "quantool_gptq" else ("--imatrix", imatrix)
    return quantool(threads, folder, "convert-gguf", model, "-o", file, "--outtype", mix, *given, "--overwrite").seconds


def cut(text: tuple[str, int, int], output: Path) -> Path:
    """Some bytes of a file of ../shared/data."""
    name, first, last = text
    output.write_bytes((SHARED / "data" / name).read_bytes()[first:last])
    return output


def made(name: str) -> Path:
    """A folder of the repository, which is there afterwards."""
    (ROOT / name).mkdir(exist_ok=True)
    return ROOT / name


def report_quality(result: dict[str, Any]) -> None:
    base = result["base"]
    print(f"\n{result['model']}, judged by llama.cpp: perplexity {base['perplexity']:.4f} in BF16\n")
    table = []
    for row in result["mixes"]:
        theirs, ours, best = (row[who] for who in WAYS)
        kld = [f"{one['kl_divergence']:.6f}" for one in (theirs, ours, best)]
        ratios = [f"{one['kl_divergence'] / theirs['kl_divergence']:.3f}" for one in (ours, best)]
        sizes = [f"{theirs['bytes']:,}", f"{max(ours['bytes'], best['bytes']) - theirs['bytes']:+,}"]
        table.append((row["mix"], *sizes, *kld, f"{theirs['kl_divergence_error']:.6f}", *ratios))
    header = ("mix", "bytes", "ours", "KLD llama-quantize", "quantool", "gptq", "error", "quantool ratio", "gptq ratio")
    print_table(header, table)
    print("\nPerplexity by llama.cpp, and by eval-ppl --protocol llama.cpp in float32 on the same file\n")
    table = []
    for row in result["eval_ppl"]:
        theirs, ours = row["llama.cpp"], row["eval-ppl"]
        kld = "-" if theirs["kl_divergence"] is None else f"{theirs['kl_divergence']:.6f}"
        pair = (f"{theirs['perplexity']:.4f} ± {theirs['perplexity_error']:.4f}", f"{ours['perplexity']:.4f}")
        table.append((row["file"], *pair, kld, f"{ours['kl_divergence']:.6f}"))
    print_table(("", "llama.cpp", "eval-ppl", "KLD llama.cpp", "eval-ppl"), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "end", "quality"), help="run this part only")
    parser.add_argument("--model", choices=tuple(SETTINGS), action="append", help="of quality; repeatable")
    parser.add_argument("--mix", choices=tuple(peer.FTYPES), action="append", help="of quality; repeatable")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="a source tree with convert_hf_to_gguf.py")
    parser.add_argument("--json", action="store_true", help="write results/gguf_vs_llamacpp.json")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "threads": args.threads}
    found["machine"]["versions"]["xllamacpp"] = version("xllamacpp")
    tree = args.llama_cpp or (None if args.only == "speed" else peer.source())
    if args.only != "speed":
        peer.build(tree)
    if args.only in {None, "speed"}:
        found["speed"] = compare_speed(args.threads)
        report_speed(found["speed"], args.threads)
    if args.only in {None, "end"}:
        found["end"] = compare_end_to_end(args.threads, tree)
        report_end_to_end(found["end"])
    if args.only in {None, "quality"}:
        for name in args.model or SETTINGS:
            found[name] = compare_quality(name, args.threads, args.mix)
            report_quality(found[name])
    if args.json:
        path = RESULTS / "gguf_vs_llamacpp.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        print(f"wrote {save('gguf_vs_llamacpp', before | found).relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
