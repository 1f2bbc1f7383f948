"""A network without weights: transformers builds it on the meta device, structure tells its parts apart.

The decoder blocks are the longest module list whose members are of one class; embeddings and head are what
transformers itself names as input and output embeddings. No list of class names is kept here, so any plain
decoder of transformers works.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from quantool.errors import QuantoolError, UsageError
from quantool.io import FLOATS, Checkpoint, model_dtype
from quantool.model.names import HEADS, check_depth, require_decoder

NOT_ARCHITECTURE = frozenset({"quantization_config", "auto_map"})  # auto_map names code of the checkpoint's own
MESSAGE = 300  # characters of a library's message


@dataclass(frozen=True, slots=True)
class Network:
    """A transformers model whose parameters are on the meta device, and where `materialise` reads them from."""

    model: Any  # transformers.PreTrainedModel; that class is untyped
    checkpoint: Checkpoint
    names: Mapping[str, str]  # the model's tensor name -> the checkpoint's
    block_names: tuple[str, ...]  # "model.layers.0", ...
    dtype: torch.dtype  # of the computation: parameters are cast to it when they are read
    device: torch.device

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.block_names]

    def outside(self) -> list[str]:
        """Names of the parameters and persistent buffers that belong to no block, tied ones once."""
        inside = tuple(f"{name}." for name in self.block_names)
        return [name for name, _ in tensors_of(self.model) if not name.startswith(inside)]


def tensors_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, each once: what a checkpoint must provide."""
    yield from module.named_parameters(prefix=prefix)
    for owner_name, owner in module.named_modules(prefix=prefix):
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{owner_name}.{name}" if owner_name else name, buffer


def build_model(checkpoint: Checkpoint) -> Any:
    """The transformers model of a checkpoint, on the meta device.

    Raises QuantoolError when transformers has no such decoder.
    """
    import transformers

    require_decoder(checkpoint)
    config = _config(checkpoint)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise QuantoolError(
            f"{checkpoint.path}: {type(config).__name__} is no decoder language model that AutoModelForCausalLM builds",
            hint="quantool handles models that transformers' AutoModelForCausalLM loads",
        )
    check_depth(checkpoint, getattr(config, "num_hidden_layers", None))
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config with odd values fails anywhere inside a family's code
        raise QuantoolError(
            f"{checkpoint.path}: transformers {transformers.__version__} cannot build it: {_in_one_line(error)}",
            hint="check config.json, or upgrade: pip install -U transformers",
        ) from error


def open_network(checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "auto") -> Network:
    """The network of a float checkpoint: `build_model`, then `attach`."""
    return attach(build_model(checkpoint), checkpoint, dtype=dtype, device=device)


def attach(model: Any, checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "auto") -> Network:
    """A model of `build_model` with every tensor it needs found in the checkpoint, and its computed buffers in place.

    `dtype` auto computes in float32 on a CPU and in the checkpoint's own dtype elsewhere. Raises QuantoolError when
    a tensor is missing or misshapen, or no list of blocks can be found.
    """
    where = resolve_device(device)
    names = _checkpoint_names(model, checkpoint)
    block_names = _block_names(model, checkpoint)
    # After the shapes: an absurd size in config.json must not be allocated.
    _compute_buffers(model, where)
    compute = resolve_dtype(dtype, where, checkpoint)
    return Network(model.eval().requires_grad_(False), checkpoint, names, block_names, compute, where)


def resolve_device(device: str) -> torch.device:
    """Auto is CUDA where there is one. Raises UsageError for a device that torch does not know or reach."""
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' cannot be used: {_in_one_line(error)}", hint="use --device cpu") from error
    return where


def resolve_dtype(dtype: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype to compute in."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else model_dtype(checkpoint)
    if dtype not in FLOATS:
        raise UsageError(f"dtype '{dtype}' is unknown, expected auto, {', '.join(FLOATS)}", hint="use --dtype auto")
    return FLOATS[dtype]


def _config(checkpoint: Checkpoint) -> Any:
    import transformers

    values = {k: v for k, v in copy.deepcopy(dict(checkpoint.config)).items() if k not in NOT_ARCHITECTURE}
    model_type = values.pop("model_type")
    try:
        config = transformers.AutoConfig.for_model(model_type, **values)
    except Exception as error:  # each family checks its config in its own way
        raise QuantoolError(
            f"{checkpoint.path}: config.json of model_type '{model_type}' is not one that transformers "
            f"{transformers.__version__} reads: {_in_one_line(error)}",
            hint="check config.json, or upgrade: pip install -U transformers",
        ) from error
    # Weights are cast when they are read, so the class must not pick a dtype of its own.
    config.dtype = torch.float32
    return config


def _in_one_line(error: Exception) -> str:
    """What a library says of a failure, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MESSAGE else f"{text[:MESSAGE]} ..."


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Rotary frequencies, embedding scales and the like are in no checkpoint: transformers recomputes them."""
    for module in model.modules():
        pending = {name for name in module._non_persistent_buffers_set if module._buffers[name] is not None}
        if pending:
            for name in pending:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            model._init_weights(module)
            for name in pending:
                module._buffers[name] = module._buffers[name].to(device)


def _block_names(model: Any, checkpoint: Checkpoint) -> tuple[str, ...]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [(name, module) for name, module in lists if len(module) == depth] or lists
    if not lists:
        raise QuantoolError(
            f"{checkpoint.path}: no list of decoder blocks in {type(model).__name__}",
            hint="quantool handles decoders built of equal blocks",
        )
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return tuple(f"{name}.{i}" for i in range(len(blocks)))


def _checkpoint_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Module tensor name -> checkpoint tensor name, for every tensor that the network needs.

    A checkpoint saved from the base model lacks its prefix ("h.0..." for "transformer.h.0..."), and of two tied
    matrices either may be the one that is stored. Raises QuantoolError naming what is missing or misshapen.
    """
    prefix = f"{model.base_model_prefix}."
    head = model.get_output_embeddings()
    names: dict[str, str] = {}
    for name, tensor in tensors_of(model):
        choices = [name, name.removeprefix(prefix)]
        owner, _, leaf = name.rpartition(".")
        if owner in HEADS or tensor is getattr(head, "weight", None):
            choices += [f"{other}.{leaf}" for other in HEADS]
        found = next((choice for choice in choices if choice in checkpoint.infos), None)
        if found is None:
            raise QuantoolError(
                f"{checkpoint.path}: tensor '{name}' {list(tensor.shape)} of {type(model).__name__} is missing",
                hint="the checkpoint is incomplete, or of a family whose tensors have other names",
            )
        shape = checkpoint.infos[found].shape
        if tuple(tensor.shape) != shape:
            raise QuantoolError(
                f"{checkpoint.path}: tensor '{found}': shape {list(shape)}, config.json expects {list(tensor.shape)}",
                hint="config.json and the weights are of different models",
            )
        names[name] = found
    return names


def materialise(network: Network, which: list[str]) -> None:
    """Read the tensors named in `which` into the network; parameters are cast, packed buffers stay as stored."""
    for name in which:
        owner_name, _, leaf = name.rpartition(".")
        owner = network.model.get_submodule(owner_name)
        tensor = network.checkpoint.read(network.names[name])
        if leaf in owner._parameters:
            # A copy even when the dtype is right: methods change weights in place, a mapped file must not.
            value = nn.Parameter(tensor.to(network.device, network.dtype, copy=True), requires_grad=False)
            for module, alias in _places(network.model, owner._parameters[leaf]):
                module._parameters[alias] = value
        else:
            owner._buffers[leaf] = tensor.to(network.device, copy=True)
        network.checkpoint.drop(network.names[name])


def release(network: Network, which: list[str]) -> None:
    """Put tensors back on the meta device, so that their memory is free."""
    for name in which:
        owner_name, _, leaf = name.rpartition(".")
        owner = network.model.get_submodule(owner_name)
        if leaf in owner._parameters:
            old = owner._parameters[leaf]
            empty = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=False)
            for module, alias in _places(network.model, old):
                module._parameters[alias] = empty
        else:
            owner._buffers[leaf] = torch.empty_like(owner._buffers[leaf], device="meta")


def _places(model: Any, parameter: torch.Tensor | None) -> list[tuple[nn.Module, str]]:
    """Every module attribute that is this parameter: two for tied embeddings."""
    return [
        (module, name) for module in model.modules() for name, value in module._parameters.items() if value is parameter
    ]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint through transformers; raises QuantoolError when there is none."""
    import transformers

    def load(directory: Path) -> Any:
        try:
            return transformers.AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as error:  # transformers raises many classes here, none of its own
            raise QuantoolError(
                f"{checkpoint.path}: no usable tokenizer: {_in_one_line(error)}",
                hint="copy tokenizer.json and tokenizer_config.json of the original model beside its config.json",
            ) from error

    if checkpoint.path.is_dir():
        return load(checkpoint.path)
    with TemporaryDirectory() as directory:
        checkpoint.write_aux(Path(directory))
        return load(Path(directory))
