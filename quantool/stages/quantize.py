"""Quantize the linears of a checkpoint and write an artifact that runtimes load as it is.

A method that needs only weights streams them one by one: no network is built, transformers is not imported. One
that needs activations replays the calibration tokens block by block through the blocks already quantized. Tensors
are written into planned places as they come, under a temporary name that is renamed when all are there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantool.data import Progress, TextOptions, no_progress
from quantool.errors import QuantoolError
from quantool.formats import FORMATS, detect
from quantool.io import Checkpoint, open_checkpoint
from quantool.io.safetensors import DTYPES, MappedFile
from quantool.io.writer import CheckpointWriter, planned_bytes
from quantool.methods import BLOCK_METHODS, WEIGHT_METHODS, WeightMethod, quantize_block, starved_error
from quantool.model.blocks import Block, embed, stream_blocks
from quantool.model.experts import expert_of
from quantool.model.memory import explained
from quantool.model.names import require_decoder
from quantool.model.skeleton import Network, open_network, resolve_device, tensors_of
from quantool.model.views import LinearsCheckpoint, as_linears
from quantool.quant import QuantizedTensor, dequantize_affine, require_finite
from quantool.recipe import INTEGER_METHODS, Recipe
from quantool.scheme import MethodOptions, QuantScheme
from quantool.stages import repack
from quantool.stages.calibrate import made_of_another, read_windows, sample_windows, tokens_of_experts
from quantool.stages.plan import Plan, PlanRow, QuantizeResult, check_output, describe, make_plan, needs_g_idx, stem
from quantool.stages.resources import Stopwatch, peak_memory_bytes
from quantool.stages.streaming import Flow

__all__ = ["PlanRow", "QuantizeResult", "run"]


@torch.inference_mode()
@explained()
def run(
    model: str,
    output: Path | None,
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    text: TextOptions,
    batch_size: int | None = None,
    max_shard_size: int = 5_000_000_000,
    dtype: str = "auto",
    device: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
    repack_to: str | None = None,
    progress: Progress = no_progress,
) -> QuantizeResult:
    """Quantize MODEL by `recipe` into the directory `output`; with `dry_run` only plan.

    `calibration` is a file of `calibrate`, whose token ids are replayed; without one `text` is sampled. A MODEL that is
    quantized already is written in the format `repack_to`, code for code, and refused without one.
    Raises UsageError for what the recipe asks and cannot be, QuantoolError for inputs that cannot be used.
    """
    watch = Stopwatch()
    opened = open_checkpoint(model)
    require_decoder(opened)
    if detect(opened.config) is not None or (repack_to is not None and repack.holds_codes(opened)):
        format_name = _repack_format(opened, repack_to)
        return repack.run(
            opened,
            output or Path(f"{stem(model)}-{format_name}"),
            format_name,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            overwrite=overwrite,
            progress=progress,
        )
    checkpoint = as_linears(opened)
    plan = make_plan(checkpoint, recipe)
    target = output or _default_output(model, recipe, plan.group_size)
    if not dry_run:
        check_output(checkpoint, target, overwrite)
    config = _artifact_config(checkpoint, recipe, plan)
    network = windows = None
    if any(method not in WEIGHT_METHODS for method in plan.methods.values()):
        network = open_network(checkpoint, dtype=dtype, device=device)
        windows = read_windows(calibration, network) if calibration else sample_windows(network, text)
    notes, folded = list(plan.notes), 0
    if calibration and windows is not None:
        notes += _check_recorded(calibration, checkpoint, plan, recipe.options, window=windows.shape[1])
    size = planned_bytes(plan.tensors, max_shard_size)
    flow = Flow(resolve_device(device) if network is None else torch.device("cpu"))
    if not dry_run:
        with CheckpointWriter(
            target, plan.tensors, config=config, max_shard_size=max_shard_size, overwrite=overwrite
        ) as writer:
            # Small and first: a tokenizer that cannot be written fails before hours of work.
            checkpoint.write_aux(writer.directory)
            job = _Job(checkpoint, recipe, plan, writer, flow, progress)
            folded = _fill(job, network, windows, batch_size)
            notes += job.notes
            with flow.busy.at("writing"):
                writer.commit()
    return QuantizeResult(
        output=str(target),
        method=recipe.method,
        format=recipe.format,
        scheme=describe(plan.schemes),
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
        **flow.cost(),
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What both paths need."""

    checkpoint: LinearsCheckpoint
    recipe: Recipe
    plan: Plan
    writer: CheckpointWriter
    flow: Flow
    progress: Progress
    notes: list[str] = field(default_factory=list)

    def round_scales(self, scales: torch.Tensor) -> torch.Tensor:
        return FORMATS[self.recipe.format].round_scales(scales, self.plan.model_dtype)

    def write_packed(self, module: str, q: QuantizedTensor) -> None:
        for suffix, tensor in FORMATS[self.recipe.format].pack(q).items():
            self.flow.write(self.writer.write, f"{module}.{suffix}", tensor)

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor of the checkpoint, as linears, is a weight to quantize."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self.plan.schemes

    def copy(self, name: str) -> None:
        """Write a stored tensor as it is; of a GGUF block type, in the model's dtype."""
        tensor = self.checkpoint.stored.read(name)
        if tensor.is_floating_point():
            require_finite(name, tensor)
        self.write_stored(name, tensor)
        self.checkpoint.stored.drop(name)

    def write_stored(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor under its stored name, in the dtype that was planned for it."""
        dtype = DTYPES.get(self.checkpoint.stored.infos[name].dtype)
        self.writer.write(name, tensor.to(dtype or self.plan.model_dtype).cpu())


def _check_recorded(
    calibration: Path, checkpoint: Checkpoint, plan: Plan, options: MethodOptions, *, window: int
) -> list[str]:
    """Refuse, before any work, experts that saw too few tokens when the file was recorded; returns notes."""
    notes = made_of_another(calibration, checkpoint)
    if notes or options.starved_experts != "error":
        return notes
    file = MappedFile(calibration)
    seen = tokens_of_experts({name: file.read(name) for name in file.infos if name.endswith(".tokens")})
    wanted = {expert_of(name) for name, method in plan.methods.items() if BLOCK_METHODS[method].round is not None}
    least = options.least_tokens(window)
    starved = {expert: tokens for expert, tokens in seen.items() if expert in wanted and tokens < least}
    if starved:
        raise starved_error(str(calibration), starved, least)
    return []


def _fill(job: _Job, network: Network | None, windows: torch.Tensor | None, batch_size: int | None) -> int:
    """Write every tensor; returns into how many a scale was folded."""
    if network is None or windows is None:
        with job.flow:
            _quantize_weights(job)
        return 0
    folded = _quantize_blocks(job, network, windows, batch_size)
    job.notes.extend(_unscaled(job.plan, network))
    return folded


def _quantize_weights(job: _Job) -> None:
    """Tensor by tensor, in stored order: weights go by the device of the flow, the others as they are."""
    linears = job.checkpoint
    names = [
        name for stored, parts in linears.parts.items() for name in (parts if job.is_quantized(parts[0]) else (stored,))
    ]

    def read(name: str) -> torch.Tensor | None:
        return linears.read(name) if job.is_quantized(name) else None

    done = 0
    for name, weight in job.flow.read(names, read, linears.drop):
        if weight is None:
            job.flow.copy(job.copy, name)
        else:
            _quantize_weight(job, name, weight, WEIGHT_METHODS[job.recipe.method], job.recipe.options)
        del weight  # before the next is read
        done += 1  # noqa: SIM113 - enumerate would hold the weight while the next is read
        job.progress(done, len(names), "quantizing")


def _quantize_weight(job: _Job, name: str, weight: torch.Tensor, method: WeightMethod, options: MethodOptions) -> None:
    module = name.removesuffix(".weight")
    require_finite(name, weight)
    if job.recipe.method not in INTEGER_METHODS:  # bitsandbytes sees weights as transformers would load them
        weight = weight.to(job.plan.model_dtype)
    try:
        q = method(weight, job.plan.schemes[module], job.round_scales, options=options)
    except QuantoolError as error:
        raise QuantoolError(f"'{module}': {error.message}", hint=error.hint) from error
    job.write_packed(module, q)


def _quantize_blocks(job: _Job, network: Network, windows: torch.Tensor, batch_size: int | None) -> int:
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
        for name, q in _codes(job, block, schemes, modules).items():
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


def _codes(
    job: _Job, block: Block, schemes: dict[str, QuantScheme], modules: dict[str, str]
) -> dict[str, QuantizedTensor]:
    methods = {name: BLOCK_METHODS[job.plan.methods[modules[name]]] for name in schemes}
    codes, notes = quantize_block(
        block, schemes, methods, job.round_scales, stored=job.plan.model_dtype, options=job.recipe.options
    )
    job.notes.extend(notes)
    return codes


def _block_linears(network: Network) -> Iterable[str]:
    for block_name, block in zip(network.block_names, network.blocks, strict=True):
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, torch.nn.Linear):
                yield name


def _write_rest(job: _Job, block: Block, names: dict[str, str], written: set[str]) -> int:
    """Write the block's tensors that are not quantized: bit for bit as they were unless a scale was folded in."""
    tensors = {names[name]: tensor for name, tensor in tensors_of(block.module, block.name)}
    folded = 0
    for stored, parts in job.checkpoint.parts.items():
        if parts[0] not in tensors or parts[0] in written:
            continue
        if all(_unchanged(tensors[part], job.checkpoint.read(part)) for part in parts):
            job.copy(stored)
        else:
            job.write_stored(stored, job.checkpoint.assemble(stored, tensors))
            folded += 1
    return folded


def _unchanged(tensor: torch.Tensor, original: torch.Tensor) -> bool:
    return torch.equal(tensor, original.to(tensor.device, tensor.dtype))


def _write_outside(job: _Job, written: set[str]) -> None:
    """Everything that is in no block; a head that is to be quantized has no group to scale and is rounded."""
    for stored, parts in job.checkpoint.parts.items():
        if parts[0] in written:
            continue
        if job.is_quantized(parts[0]):
            for part in parts:
                _quantize_weight(job, part, job.checkpoint.read(part), WEIGHT_METHODS["rtn"], MethodOptions(mse=True))
                job.checkpoint.drop(part)
        else:
            job.copy(stored)


def _repack_format(checkpoint: Checkpoint, repack_to: str | None) -> str:
    if repack_to is not None:
        return repack_to
    method = checkpoint.config["quantization_config"].get("quant_method")
    raise QuantoolError(
        f"{checkpoint.path}: is already quantized ({method}), expected a float checkpoint",
        hint="quantize the one it was made from, or repack this one: --format NAME and no option that changes codes",
    )


def _artifact_config(checkpoint: LinearsCheckpoint, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The source's config.json, key for key, with the quantization added."""
    section = FORMATS[recipe.format].quantization_config(
        plan.schemes, plan.kept, act_order=needs_g_idx(recipe, plan.schemes)
    )
    if checkpoint.transposed and recipe.format == "compressed-tensors":
        # transformers knows no quantized Conv1D and would make up its weights; told to dequantize, it stops instead.
        section["dequantize"] = True
    return {**checkpoint.config, "quantization_config": section}


def _default_output(model: str, recipe: Recipe, group_size: int) -> Path:
    group = {-1: "channel", 0: "tensor"}.get(group_size, f"g{group_size}")
    return Path(f"{stem(model)}-{recipe.method}-w{recipe.bits}-{group}")
