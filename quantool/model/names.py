"""Which stored weights are linears to quantize, told from names and shapes alone: no network, no transformers.

Decoder blocks are the largest family of tensors numbered alike ("model.layers.0.", "transformer.h.0."); their
matrices are linears, except routers of experts, whose rounding would change which expert runs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantool.errors import QuantoolError
from quantool.io import Checkpoint, TensorInfo

NUMBERED = re.compile(r"^(?P<family>(?:[^.]+\.)*?)(?P<index>\d+)\.(?P<rest>.+)\.weight$")
FIRST_NUMBER = re.compile(r"^(?P<family>(?:[^.]+\.)*?)(?P<index>\d+)\.")
DECODER_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
EMBEDDING = re.compile(r"embed(?!_out)|wte|wpe", re.IGNORECASE)
HEADS = ("lm_head", "embed_out")
MOST_LAYERS = 10_000
TRANSPOSED = frozenset({"gpt2", "openai-gpt"})  # Conv1D stores [in_features, out_features]


@dataclass(frozen=True, slots=True)
class Linears:
    """Modules whose weight [N, K] may be quantized, and the matrices that stay as they are, embeddings aside."""

    candidates: dict[str, tuple[int, int]]
    others: tuple[str, ...]


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

    Raises QuantoolError when there are none, or when the family stores its weights transposed.
    """
    config = checkpoint.config
    if config.get("model_type") in TRANSPOSED:
        raise QuantoolError(
            f"{checkpoint.path}: model_type '{config['model_type']}' stores its weights transposed (Conv1D)",
            hint="quantool quantizes families whose linears are stored as [out_features, in_features]",
        )
    matrices = {
        info.name.removesuffix(".weight"): info
        for info in checkpoint.infos.values()
        if info.name.endswith(".weight") and len(info.shape) == 2
    }
    family = _block_family(matrices)
    depth = config.get("num_hidden_layers")
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
    return Linears(candidates, tuple(others))


def _block_family(matrices: Mapping[str, TensorInfo]) -> str | None:
    sizes: dict[str, int] = {}
    for info in matrices.values():
        if match := NUMBERED.match(info.name):
            sizes[match["family"]] = sizes.get(match["family"], 0) + info.shape[0] * info.shape[1]
    return max(sizes, key=lambda family: sizes[family]) if sizes else None


def _beyond(index: str, depth: Any) -> bool:
    """Numbered past the network's last block: an extra prediction head stored as one more layer."""
    return isinstance(depth, int) and int(index) >= depth


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
