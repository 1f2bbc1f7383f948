"""Run a model on sample text and record what reaches each linear.

The file holds `input_ids` int32 [num_samples, seq_len] and per linear X: `X.act_amax` and `X.act_mean_sq` float32
[K] over all tokens that reached it (the square root of the latter is AWQ's magnitude, the latter itself an importance
matrix), and `X.tokens` int64 [1], how many these were. A linear of an expert that no token was routed to has tokens 0
and zeros. Metadata: what was run on which text. Works block by block.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quantool import __version__
from quantool.data import Progress, TextOptions, no_progress, resolve_seq_len, token_windows
from quantool.errors import QuantoolError, UsageError
from quantool.io import Checkpoint
from quantool.io.imatrix import imatrix_bytes, write_imatrix
from quantool.io.safetensors import MappedFile
from quantool.io.writer import check_output_file, file_bytes, write_file
from quantool.model.blocks import embed, is_linear, stream_blocks
from quantool.model.experts import expert_of
from quantool.model.memory import explained
from quantool.model.skeleton import Network, load_tokenizer
from quantool.runtime import open_model
from quantool.stages.gguf_importance import imatrix_of
from quantool.stages.resources import Stopwatch, peak_memory_bytes

DEFAULT_OUTPUTS = {"safetensors": "calibration.safetensors", "imatrix": "imatrix.gguf"}


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """What was recorded; `linears` is how many modules have statistics.

    Experts see only the tokens routed to them: `starved_experts` counts those that saw fewer than one window has, and
    `least_expert` saw the fewest, `least_tokens`. None without experts, and in a dry run.
    """

    output: str
    linears: int
    tokens: int
    num_samples: int
    seq_len: int
    dataset: str
    seed: int
    bytes: int
    seconds: float
    peak_memory_bytes: int
    starved_experts: int = 0
    least_expert: str | None = None
    least_tokens: int | None = None


@torch.inference_mode()
@explained()
def run(
    model: str,
    output: Path | None,
    *,
    text: TextOptions,
    format_name: str = "safetensors",
    batch_size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> CalibrateResult:
    """Write the calibration file of MODEL; with `dry_run` only say what it would hold.

    With `format_name` "imatrix" it is an importance matrix of llama.cpp: GGUF names, sums of squares and counts.
    Raises QuantoolError when the model or the text cannot be used, UsageError when `output` exists.
    """
    watch = Stopwatch()
    output = output or Path(DEFAULT_OUTPUTS[format_name])
    check_output_file(output, overwrite)
    network = open_model(model, dtype=dtype, device=device)
    windows = sample_windows(network, text)
    tensors = _planned(network)
    if format_name == "imatrix":  # small, and first: an architecture that llama.cpp does not know fails before the work
        imatrix_of(network.checkpoint, tensors, text.dataset, windows)
    if not dry_run:
        tensors = record(network, windows, batch_size, progress)
    routed = {} if dry_run else tokens_of_experts(tensors)
    if format_name == "imatrix":
        made = imatrix_of(network.checkpoint, tensors, text.dataset, windows)
        size = imatrix_bytes(made) if dry_run else write_imatrix(output, made, overwrite=overwrite)
    else:
        tensors = {"input_ids": windows.to(torch.int32), **tensors}
        metadata = _metadata(network.checkpoint, text, windows)
        size = file_bytes(tensors, metadata)
        if not dry_run:
            write_file(output, tensors, metadata, overwrite=overwrite)
    least = min(routed, key=lambda name: routed[name], default=None)
    return CalibrateResult(
        output=str(output),
        linears=sum(name.endswith(".tokens") for name in tensors),
        tokens=windows.numel(),
        num_samples=windows.shape[0],
        seq_len=windows.shape[1],
        dataset=text.dataset,
        seed=text.seed,
        bytes=size,
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        starved_experts=sum(tokens < windows.shape[1] for tokens in routed.values()),
        least_expert=least,
        least_tokens=None if least is None else routed[least],
    )


def tokens_of_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Expert -> the fewest tokens that one of its linears saw."""
    found: dict[str, int] = {}
    for name, tokens in tensors.items():
        if name.endswith(".tokens") and (expert := expert_of(name)):
            found[expert] = min(int(tokens), found.get(expert, int(tokens)))
    return found


def _planned(network: Network) -> dict[str, torch.Tensor]:
    """What `record` would return, on the meta device."""
    tensors: dict[str, torch.Tensor] = {}
    for block, module in zip(network.block_names, network.blocks, strict=True):
        for name, linear in module.named_modules(prefix=block):
            if is_linear(linear):
                tensors |= _nothing_seen(_stored_name(network, name), linear.in_features, "meta")
    return tensors


def _stored_name(network: Network, linear: str) -> str:
    """What the checkpoint calls a linear of the network."""
    weight = f"{linear}.weight" if f"{linear}.weight" in network.names else f"{linear}.qweight"
    return network.names[weight].rpartition(".")[0]


def record(
    network: Network, windows: torch.Tensor, batch_size: int | None, progress: Progress
) -> dict[str, torch.Tensor]:
    """Statistics of every linear's input, under the names that the checkpoint gives its weights."""
    tensors: dict[str, torch.Tensor] = {}
    total = len(network.block_names)
    progress(0, total, "calibrating")
    states = embed(network, windows, batch_size=batch_size)
    for block in stream_blocks(network, states):
        for name, linear in block.linears.items():
            stored = _stored_name(network, name)
            tensors.update(_nothing_seen(stored, linear.in_features))
            # Stays registered: the block runs when the stream resumes, once, and is released.
            linear.register_forward_pre_hook(recorder(tensors, stored))
        progress(block.index + 1, total, "calibrating")
    _require_finite(tensors)
    return tensors


def _nothing_seen(name: str, channels: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The statistics of a linear that no token has reached."""
    return {
        f"{name}.act_amax": torch.zeros(channels, device=device),
        f"{name}.act_mean_sq": torch.zeros(channels, device=device),
        f"{name}.tokens": torch.zeros(1, dtype=torch.int64, device=device),
    }


def recorder(tensors: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    """A hook that adds a batch of inputs [..., K] to the statistics of linear `name`."""

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        if x.shape[0] == 0:  # no token of this batch was routed here
            return
        seen = tensors[f"{name}.tokens"]
        count = seen + x.shape[0]
        share = (x.shape[0] / count).to(torch.float32)
        mean_sq = x.square().mean(0).cpu() * share + tensors[f"{name}.act_mean_sq"] * (1 - share)
        amax = torch.maximum(x.abs().amax(0).cpu(), tensors[f"{name}.act_amax"])
        tensors.update({f"{name}.act_amax": amax, f"{name}.act_mean_sq": mean_sq, f"{name}.tokens": count})

    return add


def _require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise QuantoolError(
                f"statistics '{name}' hold NaN or Inf, expected finite activations",
                hint="use --dtype float32; if they stay, a weight of the checkpoint is not finite",
            )


def sample_windows(network: Network, text: TextOptions) -> torch.Tensor:
    """Token windows int64 [num_samples, seq_len] of `text` in the words of the model's own tokenizer."""
    seq_len = resolve_seq_len(text, getattr(network.model.config, "max_position_embeddings", None))
    if seq_len < 2:
        raise UsageError(f"seq_len is {seq_len}, expected at least 2", hint="use --seq-len 512")
    windows = token_windows(text, load_tokenizer(network.checkpoint), seq_len)
    return require_vocabulary(windows, network, f"{network.checkpoint.path}: its tokenizer")


def require_vocabulary(windows: torch.Tensor, network: Network, whose: str) -> torch.Tensor:
    """The windows, if every token id has an embedding; QuantoolError otherwise."""
    rows = network.model.get_input_embeddings().weight.shape[0]
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise QuantoolError(
            f"{whose} gives {windows.shape[0]} windows of {windows.shape[1]} tokens, expected at least 1 of 2",
            hint="calibrate again: quantool calibrate MODEL --num-samples 128",
        )
    if int(windows.max()) >= rows or int(windows.min()) < 0:
        raise QuantoolError(
            f"{whose} gives token id {int(windows.max())}, the model has {rows} embeddings",
            hint="tokenizer and model are not of the same checkpoint",
        )
    return windows


def read_windows(path: Path, network: Network) -> torch.Tensor:
    """The token ids int64 [num_samples, seq_len] of a calibration file; QuantoolError when it is none."""
    file = MappedFile(path)
    info = file.infos.get("input_ids")
    if info is None or len(info.shape) != 2 or info.dtype not in ("I32", "I64"):
        raise QuantoolError(
            f"{path}: no 'input_ids' [num_samples, seq_len], expected a calibration file of quantool",
            hint="make one: quantool calibrate MODEL -o calibration.safetensors",
        )
    return require_vocabulary(file.read("input_ids").to(torch.int64), network, str(path))


def made_of_another(path: Path, checkpoint: Checkpoint) -> list[str]:
    """A note for the result when a calibration file was recorded on a model with other tensors or config."""
    recorded = MappedFile(path).metadata.get("source_sha256")
    if recorded in {None, source_hash(checkpoint)}:
        return []
    return [f"{path} was recorded on another model: its token ids are replayed, its statistics are not used"]


def source_hash(checkpoint: Checkpoint) -> str:
    """sha256 of the config and every tensor's name, shape and dtype: tells models apart, reads no weight."""
    described = [dict(checkpoint.config), sorted((i.name, i.shape, i.dtype) for i in checkpoint.infos.values())]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _metadata(checkpoint: Checkpoint, text: TextOptions, windows: torch.Tensor) -> dict[str, str]:
    return {
        "format": "pt",
        "quantool_version": __version__,
        "dataset": text.dataset,
        "split": text.split,
        "seed": str(text.seed),
        "num_samples": str(windows.shape[0]),
        "seq_len": str(windows.shape[1]),
        "source_sha256": source_hash(checkpoint),
        "input_ids_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    }
