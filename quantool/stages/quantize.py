"""Quantize the linears of a checkpoint and write an artifact that runtimes load as it is.

A method that needs only weights streams them one by one: no network is built, transformers is not imported. One
that needs activations replays the calibration tokens block by block through the blocks already quantized. Tensors
are written into planned places as they come, under a temporary name that is renamed when all are there.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantool.data import Progress, TextOptions, no_progress
from quantool.errors import UsageError
from quantool.formats import FORMATS
from quantool.io import Checkpoint, open_checkpoint
from quantool.io.safetensors import DTYPES
from quantool.io.writer import CheckpointWriter, check_output_directory, planned_bytes
from quantool.methods import BLOCK_METHODS, WEIGHT_METHODS
from quantool.model.blocks import Block, embed, stream_blocks
from quantool.model.names import require_decoder
from quantool.model.skeleton import Network, open_network, tensors_of
from quantool.quant import QuantizedTensor, dequantize_affine, require_finite
from quantool.recipe import Recipe
from quantool.stages.calibrate import made_of_another, read_windows, sample_windows
from quantool.stages.plan import Plan, PlanRow, make_plan
from quantool.stages.resources import Stopwatch, peak_memory_bytes

__all__ = ["PlanRow", "QuantizeResult", "run"]


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """Every source tensor is counted once: quantized, copied, folded (changed by a scale) or dropped."""

    output: str
    method: str
    format: str
    scheme: str
    group_size: int
    bytes: int
    bits_per_weight: float
    quantized: int
    copied: int
    folded: int
    dropped: int
    seconds: float
    peak_memory_bytes: int
    plan: list[PlanRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@torch.inference_mode()
def run(
    model: str,
    output: Path | None,
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    text: TextOptions,
    batch_size: int = 1,
    max_shard_size: int = 5_000_000_000,
    dtype: str = "auto",
    device: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> QuantizeResult:
    """Quantize MODEL by `recipe` into the directory `output`; with `dry_run` only plan.

    `calibration` is a file of `calibrate`, whose token ids are replayed; without one `text` is sampled.
    Raises UsageError for what the recipe asks and cannot be, QuantoolError for inputs that cannot be used.
    """
    watch = Stopwatch()
    checkpoint = open_checkpoint(model)
    require_decoder(checkpoint)
    plan = make_plan(checkpoint, recipe)
    target = output or _default_output(model, recipe, plan.group_size)
    if not dry_run:
        _check_output(checkpoint, target, overwrite)
    config = _artifact_config(checkpoint, recipe, plan)
    network = windows = None
    if recipe.method in BLOCK_METHODS:
        network = open_network(checkpoint, dtype=dtype, device=device)
        windows = read_windows(calibration, network) if calibration else sample_windows(network, text)
    notes = [*plan.notes, *(made_of_another(calibration, checkpoint) if calibration else ())]
    folded = 0
    size = planned_bytes(plan.tensors, max_shard_size)
    if not dry_run:
        with CheckpointWriter(
            target, plan.tensors, config=config, max_shard_size=max_shard_size, overwrite=overwrite
        ) as writer:
            # Small and first: a tokenizer that cannot be written fails before hours of work.
            checkpoint.write_aux(writer.directory)
            job = _Job(checkpoint, recipe, plan, writer, progress)
            if network is None or windows is None:
                _quantize_weights(job)
            else:
                folded = _quantize_blocks(job, network, windows, batch_size)
                notes += _unscaled(plan, network)
            writer.commit()
    return QuantizeResult(
        output=str(target),
        method=recipe.method,
        format=recipe.format,
        scheme=_describe(plan),
        group_size=plan.group_size,
        bytes=size,
        bits_per_weight=size * 8 / plan.parameters,
        quantized=len(plan.schemes),
        copied=len(plan.rows) - len(plan.schemes) - folded,
        folded=folded,
        dropped=0,
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        plan=plan.rows if dry_run else [],
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What both paths need."""

    checkpoint: Checkpoint
    recipe: Recipe
    plan: Plan
    writer: CheckpointWriter
    progress: Progress

    def round_scales(self, scales: torch.Tensor) -> torch.Tensor:
        return FORMATS[self.recipe.format].round_scales(scales, self.plan.model_dtype)

    def write_packed(self, module: str, q: QuantizedTensor) -> None:
        for suffix, tensor in FORMATS[self.recipe.format].pack(q).items():
            self.writer.write(f"{module}.{suffix}", tensor)

    def copy(self, name: str) -> None:
        """Write a source tensor as it is; of a GGUF block type, in the model's dtype."""
        info = self.checkpoint.infos[name]
        tensor = self.checkpoint.read(name)
        if tensor.is_floating_point():
            require_finite(name, tensor)
        self.writer.write(name, tensor if info.dtype in DTYPES else tensor.to(self.plan.model_dtype))
        self.checkpoint.drop(name)


def _quantize_weights(job: _Job) -> None:
    """Tensor by tensor, in stored order."""
    quantize_weight = WEIGHT_METHODS[job.recipe.method]
    names = list(job.checkpoint.infos)
    for i, name in enumerate(names):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in job.plan.schemes:
            weight = job.checkpoint.read(name)
            require_finite(name, weight)
            scheme = job.plan.schemes[module]
            job.write_packed(module, quantize_weight(weight, scheme, job.round_scales, mse=job.recipe.mse))
            job.checkpoint.drop(name)
        else:
            job.copy(name)
        job.progress(i + 1, len(names), "quantizing")


def _quantize_blocks(job: _Job, network: Network, windows: torch.Tensor, batch_size: int) -> int:
    """Block by block; returns how many tensors a scale was folded into."""
    names = network.names
    modules = {name: names[f"{name}.weight"].removesuffix(".weight") for name in _block_linears(network)}
    blocks = len(network.block_names)
    job.progress(0, blocks, "embedding")
    states = embed(network, windows, batch_size=batch_size)
    written: set[str] = set()
    folded = 0
    for block in stream_blocks(network, states):
        stored = {name: names[name] for name, _ in tensors_of(block.module, block.name)}
        for name, tensor in tensors_of(block.module, block.name):
            require_finite(names[name], tensor)
        schemes = {name: job.plan.schemes[modules[name]] for name in block.linears if modules[name] in job.plan.schemes}
        for name, q in _codes(job, block, schemes).items():
            job.write_packed(modules[name], q)
            block.linears[name].weight.copy_(dequantize_affine(q))
            written.add(f"{modules[name]}.weight")
        folded += _write_rest(job, block, stored, written)
        written.update(stored.values())
        job.progress(block.index + 1, blocks, "quantizing")
    _write_outside(job, written)
    return folded


def _unscaled(plan: Plan, network: Network) -> list[str]:
    """What a method of blocks could not reach, said in the result."""
    seen = {network.names[f"{name}.weight"] for name in _block_linears(network)}
    outside = [name for name in plan.schemes if f"{name}.weight" not in seen]
    return [f"rounded to nearest, being in no decoder block: {', '.join(outside)}"] if outside else []


def _codes(job: _Job, block: Block, schemes: dict[str, Any]) -> dict[str, QuantizedTensor]:
    method = BLOCK_METHODS[job.recipe.method]
    return method(block, schemes, job.round_scales, stored=job.plan.model_dtype, n_grid=job.recipe.n_grid)


def _block_linears(network: Network) -> Iterable[str]:
    for block_name, block in zip(network.block_names, network.blocks, strict=True):
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, torch.nn.Linear):
                yield name


def _write_rest(job: _Job, block: Block, stored: dict[str, str], written: set[str]) -> int:
    """Write the block's tensors that are not quantized: bit for bit as they were unless a scale was folded in."""
    folded = 0
    for name, tensor in tensors_of(block.module, block.name):
        source = stored[name]
        if source in written:
            continue
        original = job.checkpoint.read(source)
        if torch.equal(tensor, original.to(tensor.device, tensor.dtype)):
            job.copy(source)
            continue
        info = job.checkpoint.infos[source]
        job.writer.write(source, tensor.to(DTYPES.get(info.dtype, job.plan.model_dtype)).cpu())
        folded += 1
    return folded


def _write_outside(job: _Job, written: set[str]) -> None:
    """Everything that is in no block; a head that is to be quantized has no group to scale and is rounded."""
    round_weight = WEIGHT_METHODS["rtn"]
    for name in job.checkpoint.infos:
        module = name.removesuffix(".weight")
        if name in written:
            continue
        if module in job.plan.schemes and name.endswith(".weight"):
            weight = job.checkpoint.read(name)
            require_finite(name, weight)
            job.write_packed(module, round_weight(weight, job.plan.schemes[module], job.round_scales, mse=True))
        else:
            job.copy(name)


def _artifact_config(checkpoint: Checkpoint, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The source's config.json, key for key, with the quantization added."""
    section = FORMATS[recipe.format].quantization_config(plan.schemes, plan.kept)
    return {**checkpoint.config, "quantization_config": section}


def _describe(plan: Plan) -> str:
    """The scheme, or every scheme with its number of modules, the most common first."""
    counts = Counter(map(str, plan.schemes.values())).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{scheme} ({count})" for scheme, count in counts)


def _check_output(checkpoint: Checkpoint, target: Path, overwrite: bool) -> None:
    """Before any work; the model itself is never replaced by what is made of it."""
    where = target.expanduser().resolve()
    if where == checkpoint.path.resolve():
        raise UsageError(f"{target}: is the model itself", hint="choose another -o")
    check_output_directory(where, overwrite)


def _default_output(model: str, recipe: Recipe, group_size: int) -> Path:
    stem = Path(model).name.removesuffix(".gguf") or Path(model).resolve().name
    group = {-1: "channel", 0: "tensor"}.get(group_size, f"g{group_size}")
    return Path(f"{stem}-{recipe.method}-w{recipe.bits}-{group}")
