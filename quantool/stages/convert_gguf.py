"""Write a checkpoint as one GGUF file of its final types: no float file in between, bounded memory.

plan       every tensor, its type and its bytes; the tokenizer; all refusals         gguf_plan.py
stream     tensor by tensor, rows piece by piece: read -> order -> quantize -> write            streaming.py
or blocks  awq, gptq: block by block, replaying the calibration tokens               gguf_blocks.py
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from quantool.data import Progress, TextOptions, no_progress
from quantool.errors import QuantoolError, UsageError
from quantool.formats.ggml import GGML_TYPES, dequantize
from quantool.io.gguf.tensors import Target, check_tied
from quantool.io.gguf.writer import GgufWriter, planned_bytes
from quantool.io.writer import check_output_file
from quantool.methods import quantize_block
from quantool.methods.rtn import piece_of
from quantool.model.blocks import Block, embed, stream_blocks
from quantool.model.memory import explained, in_pieces
from quantool.model.names import require_decoder
from quantool.model.skeleton import Network, open_network, resolve_device, tensors_of
from quantool.quant import require_finite
from quantool.scheme import GgufOptions, MethodOptions
from quantool.stages.calibrate import read_windows, sample_windows
from quantool.stages.gguf_blocks import method_for, proxy_scheme, round_proxy
from quantool.stages.gguf_plan import FLOAT_TYPES, GgufPlan, GgufRow, make_plan
from quantool.stages.gguf_source import Source, open_source
from quantool.stages.plan import stem
from quantool.stages.resources import Stopwatch, peak_memory_bytes
from quantool.stages.streaming import Flow

__all__ = ["ConvertResult", "GgufRow", "run"]

PIECE = 1 << 22  # weights that are in memory at once, in float32


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """Every source tensor is counted once: quantized, copied (as it is, or as another float), folded or dropped.

    `fallbacks` tensors have rows that the type of the mix does not divide. `bound` and `busy_seconds` (streaming.py)
    are of weights that went through a GPU.
    """

    output: str
    architecture: str
    outtype: str
    method: str
    bytes: int
    bits_per_weight: float
    quantized: int
    copied: int
    folded: int
    dropped: int
    fallbacks: int
    types: dict[str, int]
    seconds: float
    peak_memory_bytes: int
    plan: list[GgufRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bound: str | None = None
    busy_seconds: dict[str, float] = field(default_factory=dict)


_Item = tuple[Target, int, str]  # a target, and the number and name of one of its sources


@dataclass(frozen=True, slots=True)
class _Job:
    """What both paths need."""

    source: Source
    plan: GgufPlan
    writer: GgufWriter
    flow: Flow
    progress: Progress
    notes: list[str] = field(default_factory=list)


@torch.inference_mode()
@explained()
def run(
    model: str,
    output: Path | None,
    options: GgufOptions,
    *,
    imatrix: Path | None = None,
    method: str = "rtn",
    method_options: MethodOptions | None = None,
    calibration: Path | None = None,
    text: TextOptions | None = None,
    batch_size: int | None = None,
    split_max_size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ConvertResult:
    """Convert MODEL to the file `output`; with `dry_run` only plan.

    Raises UsageError for types that cannot be, QuantoolError for inputs that cannot be used.
    """
    watch = Stopwatch()
    source = open_source(model)
    require_decoder(source.checkpoint)
    plan = make_plan(source, options, imatrix, calibrated=method != "rtn")
    target = output or Path(f"{stem(model)}-{plan.outtype.upper()}.gguf")
    _check_output(source, target, overwrite, dry_run=dry_run)
    check_tied(source.linears, plan.dropped)
    network = windows = None
    if method != "rtn":
        _check_calibrated(source, plan, method, allow_requantize=options.allow_requantize)
        network = open_network(source.linears, dtype=dtype, device=device)
        windows = read_windows(calibration, network) if calibration else sample_windows(network, text or TextOptions())
    notes, folded = [*plan.notes, *_method_notes(plan, method)], 0
    flow = Flow(resolve_device(device) if network is None else torch.device("cpu"))
    if dry_run:
        size = planned_bytes(plan.tensors, metadata=plan.metadata, split_max_size=split_max_size)
    else:
        with GgufWriter(
            target, plan.tensors, metadata=plan.metadata, split_max_size=split_max_size, overwrite=overwrite
        ) as writer:
            size = writer.nbytes
            job = _Job(source, plan, writer, flow, progress)
            if network is None or windows is None:
                with flow:
                    _stream(job, plan.targets)
            else:
                folded = _convert_blocks(
                    job, network, windows, batch_size, method=method, options=method_options or MethodOptions()
                )
                notes += job.notes
            with flow.busy.at("writing"):
                writer.commit()
    return replace(
        _result(target, plan, method, size, folded, watch=watch, notes=notes, dry_run=dry_run), **flow.cost()
    )


def _result(
    target: Path,
    plan: GgufPlan,
    method: str,
    size: int,
    folded: int,
    *,
    watch: Stopwatch,
    notes: list[str],
    dry_run: bool,
) -> ConvertResult:
    rounded = {row.name for row in plan.rows if row.action == "quantized"}
    sources = {name for target in plan.targets for name in target.sources}  # a tied matrix may be written twice
    quantized = len({name for target in plan.targets if target.name in rounded for name in target.sources})
    return ConvertResult(
        output=str(target),
        architecture=plan.architecture,
        outtype=plan.outtype,
        method=method,
        bytes=size,
        bits_per_weight=size * 8 / plan.parameters,
        quantized=quantized,
        copied=len(sources) - quantized - folded,
        folded=folded,
        dropped=len(plan.dropped),
        fallbacks=sum(row.wanted is not None for row in plan.rows),
        types=dict(Counter(row.type for row in plan.rows)),
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        plan=plan.rows if dry_run else [],
        notes=notes,
    )


def _check_output(source: Source, target: Path, overwrite: bool, *, dry_run: bool) -> None:
    """Before any work; the model itself is never replaced by what is made of it."""
    if target.expanduser().resolve() == source.path.resolve():
        raise UsageError(f"{target}: is the model itself", hint="choose another -o")
    if not dry_run:
        check_output_file(target, overwrite)


def _method_notes(plan: GgufPlan, method: str) -> list[str]:
    """What GPTQ cannot round, whose grids have a step between neighbours."""
    tables = {name for name, kind in GGML_TYPES.items() if kind.levels is not None}
    left = [kind for name, kind in plan.types.items() if kind in tables and name.startswith("blk.")]
    if "gptq" not in method or not left:
        return []
    kinds = " and ".join(sorted(set(left)))
    return [
        f"{len(left)} tensors in {kinds} are rounded by importance alone: their levels are a table, no grid for GPTQ"
    ]


def _check_calibrated(source: Source, plan: GgufPlan, method: str, *, allow_requantize: bool) -> None:
    """Refuse a source whose weights are codes already: a method of blocks rounds all, also what could be copied."""
    if source.packed is not None:
        raise UsageError(
            f"{source.path}: is already quantized, method {method} needs a float checkpoint",
            hint="convert the checkpoint that it was made from, or leave --method out",
        )
    in_blocks = (row for row in plan.rows if row.name.startswith("blk.") and row.type in GGML_TYPES)
    twice = next((row for row in in_blocks if source.is_quantized(row.name, row.dtype)), None)
    if twice is not None and not allow_requantize:
        raise UsageError(
            f"{source.path}: '{twice.name}' is {source.described(twice.name, twice.dtype)}, "
            f"which method {method} would round a second time",
            hint="convert the float checkpoint that it was made from, or add --allow-requantize",
        )
    if not any(kind in GGML_TYPES for kind in plan.types.values()):
        raise UsageError(
            f"method {method} has nothing to round in a file of type {plan.outtype}", hint="use --outtype q4_k_m"
        )


def _stream(job: _Job, wanted: list[Target]) -> None:
    """Tensor by tensor, in the order of the file."""
    total = sum(math.prod(target.shape) for target in wanted)
    done = 0
    items = [(target, i, name) for target in wanted for i, name in enumerate(target.sources or ("",))]

    def read(item: _Item) -> torch.Tensor | None:
        target, _, name = item
        if name and target.name in job.plan.copied:
            return None
        return job.source.read(name) if name else target.value

    def drop(item: _Item) -> None:
        if item[2]:
            job.source.drop(item[2])

    for (target, index, name), tensor in job.flow.read(items, read, drop):
        if tensor is None:
            job.flow.copy(_write_copied, job, target, index, name)
        else:
            write_values(job, target, index, tensor)
        del tensor  # before the next is read
        done += math.prod(target.shape) // max(1, len(target.sources))
        job.progress(done, total, "converting")


def _write_copied(job: _Job, target: Target, index: int, name: str) -> None:
    """One source of a target, whose blocks are as they are."""
    if job.source.gguf is not None:
        if index == 0:
            job.writer.write(target.name, job.source.stored(target.name))
        return
    found = job.source.repacked(name)
    if isinstance(found, str):
        raise QuantoolError(f"'{name}': its codes have changed since the plan was made: {found}")
    blocks = found.blocks if target.rows is None else found.blocks[target.rows]
    job.writer.write(target.name, blocks, first_row=index * blocks.shape[0])
    job.source.drop(name)


def write_values(job: _Job, target: Target, index: int, tensor: torch.Tensor) -> None:
    """Write source `index` of a target from its values [N, K] or [K], in the order and type of the file."""
    name = target.sources[index] if target.sources else target.name
    importance = job.plan.importance.get(target.name)
    weights = None if importance is None else importance[index].to(tensor.device)
    if tensor.dim() < 2 and target.rows is not None:
        tensor = tensor[target.rows]
    order = target.rows if tensor.dim() > 1 else None
    matrix = tensor.reshape(-1, tensor.shape[-1])

    def encode(rows: slice) -> torch.Tensor:
        values = (matrix[rows] if order is None else matrix[order[rows]]).to(torch.float32)
        require_finite(name, values)
        return _encode(name, values + target.add if target.add else values, job.plan.types[target.name], weights)

    step = max(1, max(PIECE, piece_of(matrix)) // max(1, matrix.shape[1]))
    for first, encoded in in_pieces("rows", len(matrix), step, encode):
        job.flow.write(job.writer.write, target.name, encoded, first_row=index * len(matrix) + first)


def _encode(name: str, values: torch.Tensor, kind: str, importance: torch.Tensor | None) -> torch.Tensor:
    """float32 [N, K] as stored: a float tensor, or blocks uint8 [N, bytes]."""
    if kind in GGML_TYPES:
        return GGML_TYPES[kind].quantize(values, importance)
    stored = values.to(FLOAT_TYPES[kind])
    if kind == "F16" and not bool(torch.isfinite(stored).all()):
        raise QuantoolError(
            f"tensor '{name}': {float(values.abs().max()):.6g} is beyond float16's 65504", hint="use --outtype bf16"
        )
    return stored


def _convert_blocks(
    job: _Job, network: Network, windows: torch.Tensor, batch_size: int | None, *, method: str, options: MethodOptions
) -> int:
    """Block by block; returns how many source tensors a scale was folded into."""
    where = {name: (target, i) for target in job.plan.targets for i, name in enumerate(target.sources)}
    blocks = len(network.block_names)
    job.progress(0, blocks, "embedding")
    states = embed(network, windows, batch_size=batch_size)
    written: set[str] = set()
    folded = 0
    for block in stream_blocks(network, states):
        written |= _round_block(job, network, block, where, method=method, options=options)
        for name, tensor in tensors_of(block.module, block.name):
            stored = network.names[name]
            if stored in written or stored not in where:
                continue
            original = job.source.read(stored)
            changed = not torch.equal(tensor, original.to(tensor.device, tensor.dtype))
            write_values(job, *where[stored], tensor if changed else original)
            folded += changed
            written.add(stored)
            job.source.drop(stored)
        job.progress(block.index + 1, blocks, "quantizing")
    _stream(job, [target for target in job.plan.targets if not written & set(target.sources)])
    return folded


def _round_block(
    job: _Job,
    network: Network,
    block: Block,
    where: dict[str, tuple[Target, int]],
    *,
    method: str,
    options: MethodOptions,
) -> set[str]:
    """Round the linears of a block, write them, and put what a runtime will see in their place."""
    stored = {name: network.names[f"{name}.weight"] for name in block.linears}
    kinds = {name: job.plan.types[where[source][0].name] for name, source in stored.items() if source in where}
    kinds = {name: kind for name, kind in kinds.items() if kind in GGML_TYPES}
    for name in kinds:
        require_finite(stored[name], block.linears[name].weight)
    codes, notes = quantize_block(
        block,
        {name: proxy_scheme(GGML_TYPES[kind]) for name, kind in kinds.items()},
        {name: method_for(method, kind) for name, kind in kinds.items()},
        round_proxy,
        stored=torch.float32,  # of norms, in every GGUF
        options=options,
    )
    job.notes.extend(notes)
    for name, q in codes.items():
        (target, index), kind, linear = where[stored[name]], GGML_TYPES[kinds[name]], block.linears[name]
        data = q.blocks if q.blocks is not None else kind.quantize(linear.weight.float())
        linear.weight.copy_(dequantize(kind, data))
        ordered = data if target.rows is None else data[target.rows]
        job.writer.write(target.name, ordered, first_row=index * len(data))
        job.source.drop(stored[name])
    return {stored[name] for name in codes}
