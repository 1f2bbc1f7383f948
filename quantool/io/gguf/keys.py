"""config.json <-> metadata, from the rows of architectures.py.

    config.json                     settings, by suffix                      the file
    "num_attention_heads": 9   <->  "attention.head_count": 9           <->  llama.attention.head_count = 9
    "rope_theta": 10000.0      <->  "rope.freq_base": 10000.0           <->  llama.rope.freq_base = 10000.0

What one side says and the other cannot is an error, never dropped: llama.cpp and transformers would compute different
numbers from the same file.
"""

import copy
from collections.abc import Mapping
from typing import Any

from quantool.errors import QuantoolError
from quantool.io import TensorInfo
from quantool.io.gguf.architectures import ARCHITECTURES, find_family
from quantool.io.gguf.fields import flag, number
from quantool.io.gguf.file import Array, GgufFile, short
from quantool.io.gguf.rope import real, rope_of
from quantool.io.gguf.row import GELU_TANH, Architecture, Key
from quantool.io.gguf.tokenizer import token_ids
from quantool.io.gguf.writer import Value

# Metadata that changes nothing: the vocabulary is counted, the rest llama.cpp does not read for these architectures.
IGNORED = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
    | {f"rope.scaling.yarn_{word}" for word in ("beta_fast", "beta_slow", "ext_factor", "attn_factor")}
)
HEADS = {"attention.head_count_kv", "attention.key_length", "attention.value_length"}  # read for every architecture
SCALING, OLD_FACTOR = "rope.scaling.", "rope.scale_linear"  # the latter of 2023
MOST = {"block_count": 512, "expert_count": 1024}  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # of transformers and of llama.cpp alike


def settings_of(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.json by their suffix in GGUF, with what transformers takes where it says nothing.

    Always holds attention.head_count_kv, attention.key_length and, where there is rotary embedding, rope.freq_base and
    rope.dimension_count. Raises QuantoolError when one is missing or of the wrong kind.
    """
    full = _with_defaults(architecture, config)
    found: dict[str, Any] = {}
    for key in architecture.keys:
        value = next((full[name] for name in (key.config, *key.aliases) if full.get(name) is not None), None)
        if value is None and isinstance(key.default, str):
            value = found[key.default]
        if value is None and not key.optional:
            raise QuantoolError(f"config.json: '{key.config}' is missing, which {architecture.name} needs")
        if value is not None:
            found[key.gguf] = _checked(key, value)
    _check_counts("config.json", found)
    heads, width = found["attention.head_count"], found["embedding_length"]
    found.setdefault("attention.head_count_kv", heads)
    head_dim = found.setdefault("attention.key_length", width // heads)
    if (full.get("head_dim") or head_dim) != head_dim:
        raise QuantoolError(
            f"config.json: head_dim is {full['head_dim']}, {architecture.name} has {width} / {heads} in llama.cpp"
        )
    if architecture.rope is not None:
        partial = rope_of(full).get("partial_rotary_factor", 1.0)
        if partial != 1.0 and architecture.partial is None:
            raise QuantoolError(
                f"config.json: partial_rotary_factor is {partial}, {architecture.name} rotates whole heads"
            )
        found["rope.dimension_count"] = int(found["attention.key_length"] * partial)
    return found


def metadata_of(
    architecture: Architecture, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> dict[str, Value]:
    """general.architecture and every "ARCH." key that llama.cpp needs.

    Raises QuantoolError when the config asks for what llama.cpp would not compute.
    """
    full = _with_defaults(architecture, config)
    settings = settings_of(architecture, config)
    _check_fixed(architecture, full)
    for key, leaf in architecture.biased.items():
        stored = _stores(architecture, infos, leaf)
        if key in full and bool(full[key]) != stored:
            raise QuantoolError(
                f"config.json: '{key}' is {short(full[key])}, but there are {'' if stored else 'no '}such tensors"
            )
    values: dict[str, Value] = {**settings, "vocab_size": _vocabulary(architecture, infos)}
    values["attention.value_length"] = settings["attention.key_length"]
    if not architecture.windowed and (window := _window(full, settings["block_count"])):
        # llama.cpp looks at everything here: within one window that is the same.
        values["context_length"] = min(settings["context_length"], window)
    if architecture.rope is not None:
        values |= _write_scaling(architecture, rope_of(full), settings)
    if architecture.key("attention.head_count_kv") is None:
        del values["attention.head_count_kv"]
    if architecture.write_keys:
        values |= architecture.write_keys(full, settings)
    return {"general.architecture": architecture.name, **{f"{architecture.name}.{k}": v for k, v in values.items()}}


def notes(architecture: Architecture, config: Mapping[str, Any]) -> list[str]:
    """What a user should know of the file: differences that are not errors."""
    full, settings = _with_defaults(architecture, config), settings_of(architecture, config)
    window, context = _window(full, settings["block_count"]), settings["context_length"]
    found = []
    if window and window < context and not architecture.windowed:
        cut = f"context_length is the window, {window} instead of {context} tokens"
        found.append(f"llama.cpp has no sliding window in {architecture.name}: {cut}")
    if any(GELU_TANH[0] in allowed and full.get(key) == "gelu" for key, allowed in architecture.fixed.items()):
        found.append("llama.cpp computes GELU by its tanh approximation, which differs by less than 0.001")
    return found


def config_of(file: GgufFile, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """config.json from the metadata and the tensors, which are given under their Hugging Face names.

    Raises QuantoolError when they contradict each other or say what a config cannot.
    """
    architecture = architecture_of(file)
    prefix = f"{architecture.name}."
    found: dict[str, Any] = {}
    for key in architecture.keys:
        default = found.get(key.default) if isinstance(key.default, str) else key.default
        if key.optional and not file.fields.get(prefix + key.gguf):
            continue
        if key.kind is bool:
            found[key.gguf] = flag(file, prefix + key.gguf, bool(default))
        else:
            found[key.gguf] = key.kind(number(file, prefix + key.gguf, default))
    rows = _check_shapes(file, architecture, infos, found)
    _check_counts(str(file.path), found)
    rotary = _read_heads(file, architecture, found)
    family = architecture.families[0]
    config: dict[str, Any] = {
        "architectures": [family.name],
        "model_type": family.model_type,
        **{key.config: found[key.gguf] for key in architecture.keys if key.gguf in found},
        "vocab_size": rows,
        **{key: copy.copy(allowed[0]) for key, allowed in architecture.fixed.items()},
        "tie_word_embeddings": f"{architecture.outside.get('output')}.weight" not in infos,
        **{key: _stores(architecture, infos, leaf) for key, leaf in architecture.biased.items()},
        "torch_dtype": _dtype(infos),
        **rotary,
    }
    read = {key.gguf for key in architecture.keys} | HEADS
    if architecture.rope is not None:
        scaling, more = _read_scaling(file, architecture)
        config |= {"rope_scaling": scaling} if scaling else {}
        read |= more | {"rope.dimension_count"}
    if architecture.read_config:
        special, more = architecture.read_config(file, config)
        config |= special
        read |= more
    _refuse_others(file, prefix, read)
    # transformers has pad_token_id defaults of its own, which small vocabularies do not have.
    return {**config, "pad_token_id": None, **token_ids(file)}


def architecture_of(file: GgufFile) -> Architecture:
    """The row of a file. Raises QuantoolError naming the architecture and what is known."""
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise QuantoolError(
            f"{file.path}: architecture {short(name)} is not known, expected one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def is_tied(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the head of a config.json is its embedding."""
    return bool(_with_defaults(architecture, config).get("tie_word_embeddings", False))


# --- config.json


def _with_defaults(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what transformers takes where it says nothing, and its rope_theta wherever it stood."""
    full = {**find_family(config).defaults, **config}
    theta = rope_of(config).get("rope_theta") if architecture.rope is not None else None
    return full if theta is None else {**full, "rope_theta": theta}


def _checked(key: Key, value: Any) -> int | float | bool:
    most = 1 << 31 if key.kind is int else 1e38
    wrong = isinstance(value, bool) != (key.kind is bool) or not isinstance(value, int | float)
    if wrong or not 0 <= value < most or (key.kind is int and value != int(value)):
        raise QuantoolError(f"config.json: '{key.config}' is {short(value)}, expected {key.kind.__name__}")
    if value > MOST.get(key.gguf, value):
        raise QuantoolError(f"config.json: '{key.config}' is {value}, llama.cpp has at most {MOST[key.gguf]}")
    return key.kind(value)


def _check_fixed(architecture: Architecture, full: Mapping[str, Any]) -> None:
    for key, allowed in architecture.fixed.items():
        value = full.get(key)
        if value is not None and value not in allowed:
            raise QuantoolError(
                f"config.json: '{key}' is {short(value)}, llama.cpp computes {allowed[0]!r} for {architecture.name}",
                hint="this model cannot be written as GGUF",
            )


def _window(full: Mapping[str, Any], blocks: int) -> int | None:
    """The sliding window that some block has."""
    window, kinds = full.get("sliding_window"), full.get("layer_types")
    if "sliding_window" not in full and full.get("use_sliding_window") is True:
        raise QuantoolError("config.json: 'use_sliding_window' is true, but 'sliding_window' is missing")
    if not window or full.get("use_sliding_window") is False:
        return None
    if isinstance(kinds, list):
        nowhere = "sliding_attention" not in kinds
    else:
        first = full.get("max_window_layers")  # Qwen 2: the blocks from this one on have windows
        nowhere = bool(first) and real("max_window_layers", first) >= blocks
    return None if nowhere else int(real("sliding_window", window))


def _vocabulary(architecture: Architecture, infos: Mapping[str, TensorInfo]) -> int:
    module = architecture.outside["token_embd"]
    names = [f"{module}.weight", f"{module.partition('.')[2]}.weight", f"{architecture.outside.get('output')}.weight"]
    embedding = next((infos[name] for name in names if name in infos), None)
    if embedding is None or len(embedding.shape) != 2:
        where = next((str(info.path) for info in infos.values()), "the checkpoint")
        raise QuantoolError(f"{where}: there is no tensor '{module}.weight' of two dimensions")
    return embedding.shape[0]


def _stores(architecture: Architecture, infos: Mapping[str, TensorInfo], leaf: str) -> bool:
    """Whether there is a tensor "blk.0.attn_q.bias", by its Hugging Face name."""
    _, _, rest = leaf.partition(".0.")
    stem, _, suffix = rest.rpartition(".")
    name = f"{architecture.blocks}.0.{architecture.block[stem]}.{suffix}"
    return name in infos or name.partition(".")[2] in infos


def _write_scaling(
    architecture: Architecture, rope: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Value]:
    """rope.scaling.* of a config's scaling; tensors that belong to it are in `generated`."""
    kind = rope["rope_type"]
    if kind == "default":
        return {}
    if kind not in (architecture.rope or ()):
        known = ", ".join(["default", *sorted(architecture.rope or ())])
        raise QuantoolError(
            f"config.json: rope type {short(kind)} is not known to {architecture.name}, expected {known}"
        )
    if kind not in ("linear", "yarn"):
        return {}  # said by tensors, and by `write_keys`
    used = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
    if kind == "yarn":
        used |= {"original_max_position_embeddings"} | {key for key, value in YARN.items() if rope.get(key) == value}
    if "factor" not in rope or set(rope) - used:
        raise QuantoolError(
            f"config.json: rope scaling {kind!r} with {short(sorted(set(rope) - used))} is not supported"
        )
    values: dict[str, Value] = {SCALING + "type": kind, SCALING + "factor": real("factor", rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings", settings["context_length"])
        values[SCALING + "original_context_length"] = int(real("original_max_position_embeddings", original))
    return values


# --- metadata


def _check_shapes(
    file: GgufFile, architecture: Architecture, infos: Mapping[str, TensorInfo], found: Mapping[str, Any]
) -> int:
    """Rows of the embedding; its width and the number of blocks must be what the metadata announces."""
    embedding = infos.get(f"{architecture.outside['token_embd']}.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise QuantoolError(f"{file.path}: there is no tensor 'token_embd.weight' of two dimensions")
    depth = architecture.blocks.count(".") + 1
    stored = {name.split(".")[depth] for name in infos if name.startswith(f"{architecture.blocks}.")}
    prefix = f"{architecture.name}."
    blocks, width = found["block_count"], found["embedding_length"]
    if width != embedding.shape[1] or blocks != len(stored):
        raise QuantoolError(
            f"{file.path}: {blocks} blocks of width {width} are announced, "
            f"{len(stored)} of width {embedding.shape[1]} are stored"
        )
    for stem, suffix in architecture.counts.items():
        start, end = f"{architecture.blocks}.0.{architecture.stacks[stem]}.weight".split("{}")
        count = sum(name.startswith(start) and name.endswith(end) for name in infos)
        key = architecture.key(suffix)
        lacks = stem in architecture.optional and not (key and key.optional)  # such a number says whether there are any
        if count != found.get(suffix, 0) and (count or not lacks):
            raise QuantoolError(
                f"{file.path}: {prefix}{suffix} is {found.get(suffix, 0)}, 'blk.0.{stem}.weight' is a stack of {count}"
            )
    return embedding.shape[0]


def _check_counts(where: str, found: Mapping[str, Any]) -> None:
    heads = found["attention.head_count"]
    kv_heads = found.get("attention.head_count_kv", heads)
    if not heads or not kv_heads or heads % kv_heads:
        raise QuantoolError(f"{where}: {heads} heads do not divide by {kv_heads} key-value heads")
    experts, used = found.get("expert_count"), found.get("expert_used_count")
    if (experts is None) != (used is None) or (used is not None and not 0 < used <= experts):
        raise QuantoolError(f"{where}: {used} of {experts} experts are used")


def _read_heads(file: GgufFile, architecture: Architecture, found: Mapping[str, Any]) -> dict[str, Any]:
    """head_dim and the rotary part of it, as far as config.json has words for them."""
    prefix = f"{architecture.name}."
    width, heads = found["embedding_length"], found["attention.head_count"]
    head_dim = int(number(file, prefix + "attention.key_length", width // heads))
    value_dim = int(number(file, prefix + "attention.value_length", head_dim))
    key = architecture.key("attention.key_length")
    if architecture.key("attention.head_count_kv") is None and (
        heads != number(file, prefix + "attention.head_count_kv", heads)
    ):
        raise QuantoolError(f"{file.path}: {prefix}attention.head_count_kv is not attention.head_count, {heads}")
    if key is None and head_dim != width // heads:
        raise QuantoolError(f"{file.path}: {prefix}attention.key_length is {head_dim}, expected {width} / {heads}")
    if value_dim != head_dim:
        raise QuantoolError(
            f"{file.path}: {prefix}attention.value_length is {value_dim}, expected {head_dim} as of keys"
        )
    config: dict[str, Any] = {} if key is None else {key.config: head_dim}
    if architecture.rope is None:
        return config
    rotary = int(number(file, prefix + "rope.dimension_count", head_dim))
    if rotary != head_dim and architecture.partial is None:
        raise QuantoolError(f"{file.path}: rotary dimension {rotary} of heads of {head_dim} is not supported")
    if architecture.partial is not None:
        config[architecture.partial] = rotary / head_dim if head_dim else 1.0
    return config


def _read_scaling(file: GgufFile, architecture: Architecture) -> tuple[dict[str, Any] | None, set[str]]:
    """rope_scaling of the config, and the suffixes read; scalings of one architecture are for its `read_config`."""
    prefix = f"{architecture.name}.{SCALING}"
    named = prefix + "factor" if prefix + "factor" in file.fields else f"{architecture.name}.{OLD_FACTOR}"
    factor = number(file, named, 0.0)
    # llama.cpp takes a factor without a type for linear scaling, and no notice of it with type none.
    kind = file.fields.get(prefix + "type", "linear" if factor not in (0, 1) else "none")
    supported = {"none", *(architecture.rope or ())}
    if kind not in supported:
        raise QuantoolError(
            f"{file.path}: {prefix}type is {short(kind)}, expected one of {', '.join(sorted(supported))}"
        )
    if kind not in ("none", "linear", "yarn"):
        return None, set()  # for `read_config`
    # Keys that are not among these are refused with all others that nobody reads.
    read = {SCALING + key for key in ("type", "factor")} | {OLD_FACTOR}
    read |= set() if kind == "linear" else {SCALING + "original_context_length"}
    if kind == "none":
        return None, read
    if factor <= 0:
        raise QuantoolError(f"{file.path}: {prefix}factor is {factor}, expected a number above 0")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn" and prefix + "original_context_length" in file.fields:
        scaling["original_max_position_embeddings"] = int(number(file, prefix + "original_context_length"))
    return scaling, read


def _refuse_others(file: GgufFile, prefix: str, read: set[str]) -> None:
    for key, value in file.fields.items():
        suffix = key.removeprefix(prefix)
        if not key.startswith(prefix) or suffix in read or suffix in IGNORED:
            continue
        if isinstance(value, Array) or bool(value) != (suffix == "attention.causal"):
            shown = "an array" if isinstance(value, Array) else short(value)
            raise QuantoolError(f"{file.path}: {key[:80]} is {shown}, which is not supported")


def _dtype(infos: Mapping[str, TensorInfo]) -> str:
    matrices = {info.dtype for info in infos.values() if len(info.shape) == 2}
    if matrices == {"F32"}:
        return "float32"
    return "float16" if matrices == {"F16"} else "bfloat16"
