"""Which stored weights are linears to quantize, told from names and shapes alone: no network, no transformers.

Decoder blocks are the largest family of tensors numbered alike ("model.layers.0.", "transformer.h.0.") that lies beside
embeddings and has as many as config.json asks for; their matrices are linears, except routers of experts, whose
rounding would change which expert runs. What lies outside (vision towers, further prediction heads, blocks past the
last one) stays as it is.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantool.errors import QuantoolError
from quantool.io import Checkpoint, TensorInfo
from quantool.model.experts import expert_of
from quantool.model.views import as_linears

NUMBERED = re.compile(r"^(?P<family>(?:[^.]+\.)*?)(?P<index>\d+)\.(?P<rest>.+)\.weight$")
FIRST_NUMBER = re.compile(r"^(?P<family>(?:[^.]+\.)*?)(?P<index>\d+)\.")
DECODER_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
EMBEDDING = re.compile(r"embed(?!_out)|wte|wpe", re.IGNORECASE)
HEADS = ("lm_head", "embed_out")
MOST_LAYERS = 10_000
# Siblings that vLLM loads as one linear (`packed_modules_mapping` of its models), which has one scheme.
FUSED = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True, slots=True)
class Linears:
    """Modules whose weight [N, K] may be quantized, and the matrices that stay as they are, embeddings aside.

    `stacks` are tensors [E, ...] of decoder blocks that hold matrices in a layout that `as_linears` does not know.
    """

    candidates: dict[str, tuple[int, int]]
    others: tuple[str, ...]
    stacks: tuple[str, ...] = ()


def require_decoder(checkpoint: Checkpoint) -> None:
    """Raise QuantoolError unless config.json describes a decoder whose blocks the checkpoint holds."""
    config = checkpoint.config
    where = checkpoint.path / "config.json" if checkpoint.path.is_dir() else checkpoint.path
    if not isinstance(config.get("model_type"), str):
        raise QuantoolError(
            f"{where}: no 'model_type', expected the config of a decoder language model",
            hint="point MODEL at the directory that holds the model's own config.json",
        )
    classes = config.get("architectures") or ["ForCausalLM"]
    if not isinstance(classes, list) or not any(str(name).endswith(DECODER_CLASSES) for name in classes):
        raise QuantoolError(
            f"{where}: architectures {classes} is not a decoder language model, expected a class ending in ForCausalLM",
            hint="quantool handles models that transformers' AutoModelForCausalLM loads",
        )
    check_depth(checkpoint, config.get("num_hidden_layers"))
    _check_counts(config, str(where))


def _check_counts(config: Mapping[str, Any], where: str) -> None:
    """Refuse a number of layers or labels that would keep transformers building for hours."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, where)
        elif isinstance(value, int) and value > MOST_LAYERS and ("layer" in key or key == "num_labels"):
            raise QuantoolError(
                f"{where}: {key} is {value}, expected at most {MOST_LAYERS}",
                hint="point MODEL at the directory that holds the model's own config.json",
            )


def check_depth(checkpoint: Checkpoint, depth: Any) -> None:
    """Raise QuantoolError when config.json asks for more blocks than the checkpoint holds: before they are built."""
    where = checkpoint.path / "config.json" if checkpoint.path.is_dir() else checkpoint.path
    stored = _stored_depth(checkpoint)
    if isinstance(depth, int) and not 0 < depth <= stored:
        raise QuantoolError(
            f"{where}: num_hidden_layers is {depth}, the checkpoint holds {stored} blocks",
            hint="config.json and the weights are of different models, or shards are missing",
        )


def _stored_depth(checkpoint: Checkpoint) -> int:
    """Number of blocks in the largest numbered family of tensors."""
    indices: dict[str, set[int]] = {}
    for name in checkpoint.infos:
        if match := FIRST_NUMBER.match(name):
            indices.setdefault(match["family"], set()).add(int(match["index"]))
    return max((len(found) for found in indices.values()), default=0)


def find_linears(checkpoint: Checkpoint) -> Linears:
    """The linears of a float checkpoint, in stored order; the head is among them unless it is tied.

    Names and shapes are those of `as_linears`. Raises QuantoolError when there are none.
    """
    config = checkpoint.config
    infos = as_linears(checkpoint).infos
    matrices = {
        info.name.removesuffix(".weight"): info
        for info in infos.values()
        if info.name.endswith(".weight") and len(info.shape) == 2
    }
    depth = _depth(config)
    family = _block_family(matrices, depth)
    candidates: dict[str, tuple[int, int]] = {}
    others = []
    for name, info in matrices.items():
        match = NUMBERED.match(info.name)
        in_block = match is not None and match["family"] == family and not _beyond(match["index"], depth)
        head = name in HEADS and not config.get("tie_word_embeddings", False)
        if (in_block and not ROUTER.search(name)) or head:
            candidates[name] = (info.shape[0], info.shape[1])
        elif not EMBEDDING.search(name):
            others.append(name)
    if not candidates or family is None:
        raise QuantoolError(
            f"{checkpoint.path}: no linear weights in numbered decoder blocks",
            hint="run 'quantool inspect --tensors' on it to see what it holds",
        )
    if HEADS[0] not in candidates and HEADS[0] not in others:
        # Tied and not stored, or stored under an older name: runtimes know the module by this one.
        others.append(HEADS[0])
    inside = [(info, FIRST_NUMBER.match(info.name)) for info in infos.values() if len(info.shape) == 3]
    stacks = [info.name for info, match in inside if match and match["family"] == family and min(info.shape) > 1]
    return Linears(candidates, tuple(others), tuple(stacks))


def _depth(config: Mapping[str, Any]) -> int | None:
    """Blocks of the decoder; of a multi-modal model, those of its text model."""
    text = config.get("text_config")
    depths = [part.get("num_hidden_layers") for part in (config, text) if isinstance(part, Mapping)]
    return next((depth for depth in depths if isinstance(depth, int)), None)


def _block_family(matrices: Mapping[str, TensorInfo], depth: int | None) -> str | None:
    """The numbered family that is the decoder: beside embeddings rather than not, deep enough, and the largest."""
    sizes: dict[str, int] = {}
    indices: dict[str, set[str]] = {}
    for info in matrices.values():
        if match := NUMBERED.match(info.name):
            sizes[match["family"]] = sizes.get(match["family"], 0) + info.shape[0] * info.shape[1]
            indices.setdefault(match["family"], set()).add(match["index"])
    beside = {name.rpartition(".")[0] for name in matrices if EMBEDDING.search(name)}

    def rank(family: str) -> tuple[bool, bool, int]:
        owner = family.rstrip(".").rpartition(".")[0]
        return owner in beside, len(indices[family]) >= (depth or 0), sizes[family]

    return max(sizes, key=rank, default=None)


def _beyond(index: str, depth: int | None) -> bool:
    """Numbered past the network's last block: an extra prediction head stored as one more layer."""
    return depth is not None and int(index) >= depth


def fused_sets(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The linears among `names` that runtimes fuse into one, and so need one scheme for; sets of at least two.

    q, k and v, gate and up; and all linears of all routed experts of a block, down too: vLLM refuses a FusedMoE whose
    projections differ ("All MoE projections need to have same quantization scheme").
    """
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if expert := expert_of(name):
            sets.setdefault((expert.rpartition(".")[0], 0), []).append(name)
        else:
            for i, leaves in enumerate(FUSED):
                if leaf in leaves:
                    sets.setdefault((owner, i), []).append(name)
    return [tuple(found) for found in sets.values() if len(found) > 1]


def module_kind(name: str) -> str:
    """attention, mlp, embedding, head, norm or other: what a reader of a size table wants to know."""
    for kind, pattern in KINDS:
        if pattern.search(name):
            return kind
    return "other"


KINDS = (
    ("norm", re.compile(r"norm|(^|\.)ln_|layernorm", re.IGNORECASE)),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output)\.")),
    ("embedding", EMBEDDING),
    ("attention", re.compile(r"attn|attention", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|experts|(^|\.)fc[12]\.")),
)
