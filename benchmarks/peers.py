"""The peers' half of methods_vs_peers.py, run by the interpreter of their own virtual environment.

Usage: peers.py quantize MODEL OUTPUT --method rtn|gptq|smoothquant|nf4 [--sym] --dataset FILE
       peers.py evaluate ARTIFACT --reference MODEL --dataset FILE

rtn, gptq and smoothquant are llm-compressor's `oneshot`: W4A16 in groups of 64, or W8A8 with dynamic activations after
SmoothQuant of strength 0.8 and GPTQ (the recipe of its documentation), `lm_head` left alone, defaults otherwise. The
model is loaded in float32, which serves the peer best (KLD of its RTN: 0.370; loaded in the checkpoint's bf16: 0.378).
nf4 is bitsandbytes through transformers, from the checkpoint's own bf16, with double quantization.

`evaluate` knows nothing of quantool either: transformers loads the artifact (through the package that wrote its format)
and the float model, both in float32, and compares their logits. Prints one JSON object.
"""

import argparse
import json
import math
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP_SIZE = 64
VERSIONS = ("llmcompressor", "compressed-tensors", "bitsandbytes", "transformers", "torch")


def token_windows(tokenizer_of: str, dataset: Path, num_samples: int, seq_len: int) -> torch.Tensor:
    """The first `num_samples` consecutive windows of the whole file's tokens, [num_samples, seq_len]."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    ids = tokenizer(dataset.read_text(encoding="utf-8", errors="ignore"), return_tensors="pt").input_ids[0]
    if len(ids) < num_samples * seq_len:
        raise SystemExit(f"error: {dataset}: {len(ids) // seq_len} windows of {seq_len} tokens, {num_samples} wanted")
    return ids[: num_samples * seq_len].view(num_samples, seq_len)


def quantize(args: argparse.Namespace) -> dict[str, object]:
    if args.method == "nf4":
        return quantize_nf4(args)
    from datasets import Dataset
    from llmcompressor import oneshot

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.method == "rtn":
        oneshot(model=model, recipe=modifiers(args))
    else:
        windows = token_windows(args.model, args.dataset, args.num_samples, args.seq_len)
        dataset = Dataset.from_dict(
            {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
        )
        oneshot(
            model=model,
            recipe=modifiers(args),
            dataset=dataset,
            max_seq_length=args.seq_len,
            num_calibration_samples=args.num_samples,
        )
    model.save_pretrained(args.output, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
    return {"output": args.output}


def modifiers(args: argparse.Namespace) -> list[object]:
    """llm-compressor's recipe for a method."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if args.method == "smoothquant":
        rounding = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
        return [SmoothQuantModifier(smoothing_strength=0.8), rounding]
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=args.sym, strategy="group", group_size=GROUP_SIZE)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifier = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[args.method]
    return [modifier(config_groups=groups, ignore=["lm_head"])]


def quantize_nf4(args: argparse.Namespace) -> dict[str, object]:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, device_map="cpu")
    model.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
    return {"output": args.output}


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> dict[str, object]:
    """Perplexity, mean KL divergence from the reference in nats and top-1 agreement, over all next-token targets."""
    windows = token_windows(args.reference, args.dataset, args.num_samples, args.seq_len)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_pretrained(args.reference, dtype=torch.float32).eval()
    nll = kld = agree = tokens = 0.0
    for window in windows:
        log_q = model(window[None]).logits[0, :-1].log_softmax(-1)
        log_p = reference(window[None]).logits[0, :-1].log_softmax(-1)
        nll -= log_q.gather(1, window[1:, None]).sum().item()
        kld += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        tokens += len(window) - 1
    quality = {"perplexity": math.exp(nll / tokens), "kl_divergence": kld / tokens, "top1_agreement": agree / tokens}
    return {**quality, "tokens": int(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function, samples in (("quantize", quantize, 32), ("evaluate", evaluate, 12)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("model")
        command.add_argument("--dataset", type=Path, required=True)
        command.add_argument("--num-samples", type=int, default=samples)
        command.add_argument("--seq-len", type=int, default=512)
        if function is quantize:
            command.add_argument("output")
            command.add_argument("--method", choices=("rtn", "gptq", "smoothquant", "nf4"), required=True)
            command.add_argument("--sym", action="store_true")
        else:
            command.add_argument("--reference", required=True)
    args = parser.parse_args()
    result = args.function(args)
    print(json.dumps({**result, "versions": {name: metadata.version(name) for name in VERSIONS}}))


if __name__ == "__main__":
    main()
