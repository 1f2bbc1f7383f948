"""Tensor names and row order, Hugging Face <-> GGUF, from the rows of architectures.py.

    write   model.layers.3.self_attn.q_proj.weight      -> blk.3.attn_q.weight, rows[i] of it is row i there
            model.layers.3.mlp.experts.0 ... 7.up_proj  -> blk.3.ffn_up_exps.weight [8, N, K]
    read    blk.3.ffn_up_exps.weight                    -> eight `Piece`s, each rows of the stored tensor

When writing, every name that the hub uses for a module is known, through the name map of the gguf package.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantool.errors import QuantoolError
from quantool.io import Checkpoint, TensorInfo
from quantool.io.gguf.file import short
from quantool.io.gguf.keys import is_tied, settings_of
from quantool.io.gguf.row import Architecture

NUMBERED = re.compile(r"\.(\d{1,9})\.")  # the first number of a name is the block's
PART = re.compile(r"(?P<before>.*\.\d+\..*)\.(?P<number>\d{1,9})(?P<after>(\.\w+)?)")  # the second number of a name
BLOCK_TENSOR = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<stem>\w+)\.(?P<leaf>weight|bias)", re.ASCII)
# Buffers that old versions of transformers stored: masks, and frequencies that follow from the config.
BUFFERS = re.compile(r"\.(attn|attention)\.(masked_bias|bias)$|\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
MOST_PARTS = 1 << 14
COMPUTED = "a buffer that is computed"
TIED = "the head is the embedding, which is written once"


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor to write: `sources` as they are presented by model/views.py, put together in this order.

    shape    in torch order; [E, N, K] when E sources [N, K] are stacked, [K] for one source [1, K]
    rows     int64 [N]: row i of the target is row rows[i] of each source; None: the same order
    add      a number added to every element
    value    the tensor itself where there is no source
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    rows: torch.Tensor | None = None
    add: float = 0.0
    value: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A Hugging Face tensor within a stored one: slice `part` of it or all, its rows in `rows`, `add` taken off.

    `shape` is what Hugging Face has; with `transposed` that is [K, N] of a stored [N, K].
    """

    stored: str
    shape: tuple[int, ...]
    part: int | None = None
    rows: torch.Tensor | None = None
    add: float = 0.0
    transposed: bool = False


def targets(
    architecture: Architecture, infos: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[list[Target], dict[str, str]]:
    """What to write for the tensors of a checkpoint (embeddings, blocks in order, norm, head), and what is dropped.

    `infos` is of a checkpoint in which every linear is a matrix [N, K] of its own (model/views.py). The dict gives each
    source that is not written and why. A tied head is dropped unread: `check_tied` reads it.
    Raises QuantoolError naming a tensor that llama.cpp has no place for, that does not fit, or is missing.
    """
    settings = settings_of(architecture, config)
    places = _Names(architecture, settings["block_count"])
    sources: dict[str, dict[int | None, str]] = {}
    dropped: dict[str, str] = {}
    for name, info in infos.items():
        if BUFFERS.search(name):
            dropped[name] = COMPUTED
            continue
        place, part = places.find(info)
        if part in sources.setdefault(place, {}):
            raise QuantoolError(f"{info.path}: {name!r} and {sources[place][part]!r} are both {place!r}")
        sources[place][part] = name
    if tied := is_tied(architecture, config):
        head = sources.pop("output.weight", {})
        if sources.setdefault("token_embd.weight", head) is not head:  # either of the two may be the one that is stored
            dropped |= dict.fromkeys(head.values(), TIED)
        if architecture.head_required:
            sources["output.weight"] = sources["token_embd.weight"]
    _check_complete(architecture, settings, sources, infos, tied=tied)
    generated = architecture.generated(config, settings) if architecture.generated else {}
    found = [_target(architecture, settings, place, sources[place], infos) for place in sources]
    _check_shapes(architecture, settings, found, infos)
    found += [Target(name, tuple(value.shape), value=value) for name, value in generated.items()]
    return sorted(found, key=lambda target: _order(architecture, target.name)), dropped


def check_tied(checkpoint: Checkpoint, dropped: Mapping[str, str]) -> None:
    """Raise QuantoolError if a head that `targets` dropped as tied is not the embedding: llama.cpp would use that."""
    for name in (name for name, reason in dropped.items() if reason == TIED and name in checkpoint.infos):
        shape, head = checkpoint.infos[name].shape, checkpoint.read(name)
        outside = (n for n, i in checkpoint.infos.items() if i.shape == shape and n != name and not NUMBERED.search(n))
        if not any(torch.equal(head, checkpoint.read(other)) for other in outside):
            raise QuantoolError(
                f"{checkpoint.path}: tensor {name!r} is not the embedding, but tie_word_embeddings is true",
                hint='set "tie_word_embeddings": false in config.json if the stored head is meant',
            )


class _Names:
    """Hugging Face name -> (GGUF name, number in its stack): the table's own names first, then the hub's others."""

    def __init__(self, architecture: Architecture, blocks: int) -> None:
        import gguf

        self.architecture, self.blocks = architecture, blocks
        own = {module: stem for stem, module in architecture.outside.items()}
        inside = architecture.block.items() | {(s, m.replace(".{}", "")) for s, m in architecture.stacks.items()}
        own |= {f"{architecture.blocks}.#.{module}": stem for stem, module in inside}
        base = f"{architecture.blocks.partition('.')[0]}."  # a checkpoint saved from the base model lacks it
        self.own = own | {module.removeprefix(base): stem for module, stem in own.items()}
        kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        self.others = gguf.get_tensor_name_map(kinds[architecture.name], blocks)
        self.known = {*architecture.outside, *architecture.block, *architecture.stacks}

    def find(self, info: TensorInfo) -> tuple[str, int | None]:
        module, _, leaf = info.name.rpartition(".")
        part = None
        if match := PART.fullmatch(module):
            module, part = match["before"] + match["after"], int(match["number"])
        stem = self.own.get(NUMBERED.sub(".#.", module, count=1))
        if stem is not None:
            number = NUMBERED.search(module)
            name = f"blk.{number[1]}.{stem}" if number and stem not in self.architecture.outside else stem
        else:
            name = self.others.get_name(module) or ""
            stem = name.rpartition(".")[2]
        known = stem in self.known and (part is not None) == (stem in self.architecture.stacks)
        if not known or (leaf != "weight" and (leaf != "bias" or stem not in self.architecture.biases)):
            raise QuantoolError(
                f"{info.path}: tensor {info.name!r} has no place in a GGUF of architecture {self.architecture.name!r}"
            )
        block = re.match(r"blk\.(\d{1,9})\.", name)
        if block and int(block[1]) >= self.blocks:
            raise QuantoolError(f"{info.path}: tensor {info.name!r} is beyond the {self.blocks} blocks of config.json")
        return f"{name}.{leaf}", part


def _order(architecture: Architecture, name: str) -> tuple[int, int, int]:
    """Embeddings, blocks by number and in the table's order, then norm and head."""
    match = BLOCK_TENSOR.fullmatch(name)
    if match is None:  # no tensor of the table has such a name
        return 0, 0, 0
    if match["block"]:
        return 1, int(match["block"]), [*architecture.block, *architecture.stacks].index(match["stem"])
    place = list(architecture.outside).index(match["stem"]) if match["stem"] in architecture.outside else 0
    return (2 if match["stem"].startswith("output") else 0), 0, place


def _target(
    architecture: Architecture,
    settings: Mapping[str, Any],
    place: str,
    sources: Mapping[int | None, str],
    infos: Mapping[str, TensorInfo],
) -> Target:
    """The target of the sources of one place, checked against each other and the settings."""
    stem, leaf = place.split(".")[-2:]
    names = tuple(name for _, name in sorted(sources.items(), key=lambda item: item[0] or 0))
    info = infos[names[0]]
    where = f"{info.path}: tensor {info.name!r}: shape {list(info.shape)}"
    if None not in sources:
        count = settings.get(architecture.counts[stem])
        if set(sources) != set(range(len(sources))) or len(sources) != count:
            raise QuantoolError(f"{where} is one of {len(sources)}, config.json announces {count}")
        if other := next((infos[name] for name in names if infos[name].shape != info.shape), None):
            raise QuantoolError(f"{where}, but {other.name!r} has {list(other.shape)}")
        return Target(place, (len(names), *info.shape), names)
    shape = info.shape
    if stem in architecture.vectors:
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
            raise QuantoolError(f"{where}, expected one row")
        shape = shape[-1:]
    rows = None
    if stem in architecture.orders:
        rows = row_order(architecture, settings, stem, shape, dimensions=2 if leaf == "weight" else 1, where=where)
    add = 1.0 if stem in architecture.plus_one and leaf == "weight" else 0.0
    return Target(place, shape, names, rows, add)


def row_order(
    architecture: Architecture,
    settings: Mapping[str, Any],
    stem: str,
    shape: tuple[int, ...],
    *,
    dimensions: int,
    where: str,
) -> torch.Tensor:
    """int64 [N]: the Hugging Face row of each GGUF row. Raises QuantoolError when the rows are not whole heads."""
    function, key = architecture.orders[stem]
    heads = settings[key]
    if len(shape) != dimensions or min(shape) < 1:
        raise QuantoolError(f"{where}, expected {dimensions} dimensions above 0")
    try:
        return function(shape[0], heads)
    except RuntimeError as error:  # a view whose sizes do not divide
        raise QuantoolError(f"{where}: {shape[0]} rows do not divide by {heads} heads") from error


def _check_complete(
    architecture: Architecture,
    settings: Mapping[str, Any],
    sources: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    *,
    tied: bool,
) -> None:
    """Every block has all that the table asks for, and the same as the first one."""
    where = next((str(info.path) for info in infos.values()), "the checkpoint")
    skipped = architecture.optional | ({"output"} if tied and not architecture.head_required else set())
    wanted = [f"{stem}.weight" for stem in architecture.outside if stem not in skipped]
    inside = [*architecture.block, *architecture.stacks]
    first = {place.removeprefix("blk.0.") for place in sources if place.startswith("blk.0.")}
    leaves = {f"{stem}.weight" for stem in inside if stem not in architecture.optional} | first
    wanted += [f"blk.{i}.{leaf}" for i in range(settings["block_count"]) for leaf in sorted(leaves)]
    if missing := next((place for place in wanted if place not in sources), None):
        raise QuantoolError(f"{where}: there is no tensor for {missing!r}, the checkpoint is incomplete")


def _check_shapes(
    architecture: Architecture, settings: Mapping[str, Any], found: Iterable[Target], infos: Mapping[str, TensorInfo]
) -> None:
    """Matrices have the sizes that the config announces, without which llama.cpp does not load the file."""
    width, inner = settings["embedding_length"], settings.get("feed_forward_length")
    q = settings["attention.head_count"] * settings["attention.key_length"]
    kv = settings["attention.head_count_kv"] * settings["attention.key_length"]
    experts, expert = settings.get("expert_count"), settings.get("expert_feed_forward_length", inner)
    vocabulary = next(target.shape[0] for target in found if target.name == "token_embd.weight")
    expected: dict[str, tuple[int | None, ...]] = {
        "token_embd": (vocabulary, width),
        "output": (vocabulary, width),
        "attn_q": (q, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_qkv": (q + 2 * kv, width),
        "attn_output": (width, q),
        "ffn_gate": (inner, width),
        "ffn_down": (width, inner),
        "ffn_gate_inp": (experts, width),
        "ffn_gate_exps": (experts, expert, width),
        "ffn_up_exps": (experts, expert, width),
        "ffn_down_exps": (experts, width, expert),
        **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), (width,)),
    }
    if "ffn_gate" in architecture.block:  # else it may be both in one
        expected["ffn_up"] = expected["ffn_gate"]
    for target in found:
        stem, leaf = target.name.split(".")[-2:]
        shape = expected.get(stem, target.shape)
        shape = shape if leaf == "weight" else shape[:1]
        if target.sources and None not in shape and target.shape != shape:
            info = infos[target.sources[0]]
            place = f" in {target.name!r}" if len(target.sources) > 1 else ""
            raise QuantoolError(
                f"{info.path}: tensor {info.name!r}: shape {list(target.shape)}{place}, "
                f"config.json announces {list(shape)}"
            )


def pieces(architecture: Architecture, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, Piece]]:
    """Hugging Face names of stored tensors (GGUF name, shape), without row order: that needs the config.

    Raises ValueError naming a tensor that the table does not know, or a stack that is none.
    """
    for name, shape in shapes:
        if name in architecture.generated_names:
            continue
        match = BLOCK_TENSOR.fullmatch(name)
        stem, leaf = (match["stem"], match["leaf"]) if match else ("", "")
        table = architecture.outside if not match or match["block"] is None else architecture.block
        prefix = f"{architecture.blocks}.{match['block']}." if match and match["block"] else ""
        if match and prefix and stem in architecture.stacks and leaf == "weight":
            if len(shape) not in (2, 3) or not 0 < shape[0] <= MOST_PARTS or min(shape) < 1:
                raise ValueError(f"tensor {short(name)}: shape {list(shape)}, expected a stack")
            for part in range(shape[0]):
                yield f"{prefix}{architecture.stacks[stem].format(part)}.weight", Piece(name, shape[1:], part)
        elif stem in table and (leaf == "weight" or stem in architecture.biases):
            yield f"{prefix}{table[stem]}.{leaf}", _piece(architecture, name, stem, leaf, shape)
        else:
            raise ValueError(f"tensor {short(name)} is not known in architecture {architecture.name!r}")


def _piece(architecture: Architecture, name: str, stem: str, leaf: str, shape: tuple[int, ...]) -> Piece:
    if leaf != "weight":
        return Piece(name, shape)
    if stem in architecture.vectors and len(shape) == 1:
        shape = (1, *shape)
    transposed = stem in architecture.transposed and len(shape) == 2
    add = 1.0 if stem in architecture.plus_one else 0.0
    return Piece(name, shape[::-1] if transposed else shape, add=add, transposed=transposed)
