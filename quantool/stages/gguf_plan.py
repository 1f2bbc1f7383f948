"""What `convert-gguf` will write, from names and shapes alone: every tensor, its type, every byte, and the metadata.

A block type needs rows of whole blocks. Where the mix asks for one whose blocks do not divide a row, the type that
replaces it is in the plan, with what that does to the size; `--no-fallback` makes it an error.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantool.errors import UsageError
from quantool.formats.ggml.mixes import TypeChoice, assign, facts_of, file_type
from quantool.io import model_dtype
from quantool.io.gguf.architectures import find_architecture
from quantool.io.gguf.keys import metadata_of
from quantool.io.gguf.keys import notes as key_notes
from quantool.io.gguf.tensors import Target, targets
from quantool.io.gguf.vocab import general_metadata, tokenizer_metadata
from quantool.io.gguf.writer import PlannedGguf, Value
from quantool.scheme import GgufOptions
from quantool.stages.gguf_importance import ByTensor, read_importance
from quantool.stages.gguf_source import Source

FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AUTO = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
REPACKABLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # outtypes whose codes another tool may have made
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True, slots=True)
class GgufRow:
    """One tensor of the file: how it is stored, what it becomes, and the type the mix wanted if that is another."""

    name: str
    shape: list[int]
    dtype: str
    action: str
    type: str
    wanted: str | None
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """`copied` are the targets whose blocks or codes are taken over as they are, `dropped` says why of each source."""

    outtype: str
    targets: list[Target]
    types: dict[str, str]
    copied: frozenset[str]
    importance: ByTensor
    tensors: list[PlannedGguf]
    rows: list[GgufRow]
    metadata: dict[str, Value]
    dropped: dict[str, str]
    notes: list[str]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def parameters(self) -> int:
        return sum(math.prod(target.shape) for target in self.targets if target.sources)


def make_plan(source: Source, options: GgufOptions, imatrix: Path | None, *, calibrated: bool = False) -> GgufPlan:
    """Decide everything that can be decided without reading a weight.

    `calibrated` says that the weights will be rounded by what reaches them: the mix is that of an imatrix.
    Raises UsageError for types that cannot be, QuantoolError for a model, tokenizer or imatrix that cannot be used.
    """
    architecture = find_architecture(source.config)
    found, dropped = targets(architecture, source.infos, source.config)
    outtype = AUTO[model_dtype(source.checkpoint)] if options.outtype == "auto" else options.outtype
    embedding = next(target for target in found if target.name == "token_embd.weight")
    metadata: dict[str, Value] = {
        **general_metadata(source.checkpoint),
        **metadata_of(architecture, source.config, source.infos),
        **tokenizer_metadata(source.checkpoint, vocab_size=embedding.shape[0], pre=options.pre),
        "general.file_type": file_type(outtype),
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    importance: ByTensor = {}
    notes = key_notes(architecture, source.config)
    if imatrix is not None:
        importance, about, described = read_importance(imatrix, found)
        metadata |= described
        notes += about
    choices = assign(
        [(target.name, target.shape) for target in found],
        outtype,
        facts=facts_of(metadata),
        imatrix=bool(importance) or calibrated,
        tensor_types=options.tensor_types,
        token_embedding_type=options.token_embedding_type,
        output_tensor_type=options.output_tensor_type,
        pure=options.pure,
    )
    kept, about = _kept_as_they_are(source, found, choices, options)
    types = {**{name: choice.type for name, choice in choices.items()}, **kept}
    tensors = [PlannedGguf(target.name, types[target.name], target.shape) for target in found]
    rows = [_row(source, target, tensor, choices, kept) for target, tensor in zip(found, tensors, strict=True)]
    _check_requantized(source, rows, options, about)
    notes += [*_fallback_notes(rows, options), *_unweighted(importance, rows), *about]
    return GgufPlan(outtype, found, types, frozenset(kept), importance, tensors, rows, metadata, dict(dropped), notes)


def _kept_as_they_are(
    source: Source, found: Sequence[Target], choices: Mapping[str, TypeChoice], options: GgufOptions
) -> tuple[dict[str, str], list[str]]:
    """Target -> type, of those that need no rounding: blocks of a GGUF file, codes that a legacy type holds; and notes.

    No mix of K-quants can hold the codes of another tool: with one, all weights are rounded again.
    """
    if source.gguf is not None:
        stored = {target.name: source.stored_type(target.name) for target in found}
        same = {name: kind for name, kind in stored.items() if options.outtype == "auto" or kind == choices[name].type}
        return {name: kind for name, kind in same.items() if kind is not None}, []
    kept: dict[str, str] = {}
    rounded, reasons = 0, Counter[str]()
    for target in found if options.outtype in ("auto", *REPACKABLE) else ():
        if not target.sources or not all(map(source.is_packed, target.sources)):
            continue
        repacked = [source.repacked(name) for name in target.sources]
        for name in target.sources:
            source.drop(name)
        able = [one for one in repacked if not isinstance(one, str)]
        reasons.update({one for one in repacked if isinstance(one, str)})
        if len({one.type for one in able}) == 1 and len(able) == len(repacked):
            kept[target.name] = able[0].type
            rounded += not all(one.exact for one in able)
    return kept, _repack_notes(kept, rounded, reasons)


def _repack_notes(kept: Mapping[str, str], rounded: int, reasons: Mapping[str, int]) -> list[str]:
    notes = [f"{count} tensors cannot keep their codes: {reason}" for reason, count in reasons.items()]
    if kept:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in Counter(kept.values()).most_common())
        notes.append(f"{len(kept)} tensors keep their codes as they are, nothing is rounded again: {kinds}")
    if rounded:
        notes.append(f"of {rounded} of these the offset, scale * zero point, is rounded to float16")
    return notes


def _row(
    source: Source,
    target: Target,
    tensor: PlannedGguf,
    choices: Mapping[str, TypeChoice],
    kept: Mapping[str, str],
) -> GgufRow:
    choice = choices[target.name]
    dtypes = Counter(source.infos[name].dtype for name in target.sources)
    action = "quantized" if tensor.dtype not in FLOAT_TYPES and target.name not in kept else "copied"
    wanted = choice.wanted if target.name not in kept and choice.wanted != choice.type else None
    return GgufRow(
        name=target.name,
        shape=list(target.shape),
        dtype=dtypes.most_common(1)[0][0] if dtypes else "-",
        action=action if target.sources else "generated",
        type=tensor.dtype,
        wanted=wanted,
        bytes=tensor.nbytes,
    )


def _check_requantized(source: Source, rows: Sequence[GgufRow], options: GgufOptions, notes: Sequence[str]) -> None:
    """Refuse to round what is rounded already, unless it is asked for."""
    if options.allow_requantize:
        return
    twice = [row for row in rows if row.action == "quantized" and source.is_quantized(row.name, row.dtype)]
    if not twice:
        return
    why = f" ({notes[0]})" if notes and "cannot keep" in notes[0] else ""
    tried = options.outtype in ("auto", *REPACKABLE) or source.gguf is not None
    raise UsageError(
        f"{source.path}: {len(twice)} tensors are quantized already and would be rounded a second time to reach "
        f"{options.outtype}, first '{twice[0].name}' from {source.described(twice[0].name, twice[0].dtype)}{why}",
        hint="convert the float checkpoint that it was made from, or add --allow-requantize"
        if tried
        else "use --outtype auto, which takes codes over as they are where it can, or add --allow-requantize",
    )


def _fallback_notes(rows: Sequence[GgufRow], options: GgufOptions) -> list[str]:
    """What replaced the types of the mix, and the bits it cost; raises UsageError where that is not wanted."""
    replaced = [row for row in rows if row.wanted is not None]
    if not replaced:
        return []
    kinds = Counter((row.shape[-1], str(row.wanted), row.type) for row in replaced)
    each = ", ".join(f"{wanted} -> {kind} ({count}, rows of {k})" for (k, wanted, kind), count in kinds.most_common(4))
    more = f" and {len(kinds) - 4} more" if len(kinds) > 4 else ""
    if not options.fallback:
        raise UsageError(
            f"{len(replaced)} of {len(rows)} tensors have rows that are no whole blocks of their type: {each}{more}",
            hint="leave --no-fallback out, or choose an outtype of blocks of 32, such as q4_0, q5_0 or iq4_nl",
        )
    parameters = sum(math.prod(row.shape) for row in rows)
    bits = 8 * sum(row.bytes for row in rows) / parameters
    wanted = 8 * sum(row.bytes if row.wanted is None else _bytes_as(row.wanted, row.shape) for row in rows) / parameters
    cost = f"{bits:.3f} bits per weight instead of {wanted:.3f}"
    return [f"fallback of {len(replaced)} tensors, {cost}: {each}{more}"]


def _bytes_as(kind: str, shape: Sequence[int]) -> float:
    """What a tensor would take in a type whose blocks need not divide its rows."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) * size / block


def _unweighted(importance: ByTensor, rows: Sequence[GgufRow]) -> list[str]:
    """Tensors of the blocks that are quantized and have no importance, when others have."""
    missing = [row.name for row in rows if row.action == "quantized" and row.name not in importance]
    missing = [name for name in missing if name.startswith("blk.")]
    if not importance or not missing:
        return []
    return [f"{len(missing)} tensors are not in the importance matrix, their channels count alike: '{missing[0]}', ..."]
