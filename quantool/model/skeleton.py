"""A network without weights: transformers builds it on the meta device, structure tells its parts apart.

The decoder blocks are the longest module list whose members are of one class; embeddings and head are what
transformers itself names as input and output embeddings. No list of class names is kept here, so any plain
decoder of transformers works. Every linear is an nn.Linear: Conv1D is replaced by one, fused experts by one per
projection of each expert. `Network.names` says where a checkpoint, seen `as_linears`, has a tensor; where transformers
itself renames tensors or merges experts on loading, its own table is asked.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from quantool.errors import QuantoolError, UsageError, one_line
from quantool.io import FLOATS, Checkpoint, model_dtype
from quantool.model.experts import PARTS, expert_of, separate_experts
from quantool.model.names import HEADS, check_depth, require_decoder
from quantool.model.views import LinearsCheckpoint, as_linears

NOT_ARCHITECTURE = frozenset({"quantization_config", "auto_map"})  # auto_map names code of the checkpoint's own
MERGED = ["MergeModulelist"], ["MergeModulelist", "Concatenate"]  # how transformers fuses experts
INCOMPLETE = "the checkpoint is incomplete, or of a family whose tensors have other names"
OLD_GPTQ = (
    'put what is in quantize_config.json into config.json as "quantization_config", with "quant_method": "gptq" added'
)
Place = tuple[nn.Module, str]  # a module and the name of one of its parameters


@dataclass(frozen=True, slots=True)
class Network:
    """A transformers model whose parameters are on the meta device, and where `materialise` reads them from."""

    model: Any  # transformers.PreTrainedModel; that class is untyped
    checkpoint: LinearsCheckpoint
    names: Mapping[str, str]  # the model's tensor name -> the checkpoint's
    block_names: tuple[str, ...]  # "model.layers.0", ...
    dtype: torch.dtype  # of the computation: parameters are cast to it when they are read
    device: torch.device
    tied: Mapping[str, tuple[Place, ...]]  # a parameter that is in several modules -> all its places

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.block_names]

    def outside(self) -> list[str]:
        """Names of the parameters and persistent buffers that text needs beside the blocks, tied ones once."""
        inside = tuple(f"{name}." for name in self.block_names)
        outside = [name for name, _ in tensors_of(self.model) if not name.startswith(inside)]
        text = text_prefix(self.model)
        towers = f"{self.model.base_model_prefix}."
        return [name for name in outside if not text or name.startswith(text) or not name.startswith(towers)]


def tensors_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, each once: what a checkpoint must provide."""
    yield from module.named_parameters(prefix=prefix)
    for owner_name, owner in module.named_modules(prefix=prefix):
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{owner_name}.{name}" if owner_name else name, buffer


def text_prefix(model: Any) -> str:
    """Where the names of a multi-modal model's decoder begin, "model.language_model."; of other models "" is enough."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next(f"{name}." for name, module in model.named_modules() if module is decoder)


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
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config with odd values fails anywhere inside a family's code
        raise QuantoolError(
            f"{checkpoint.path}: transformers {transformers.__version__} cannot build it: {one_line(error)}",
            hint="check config.json, or upgrade: pip install -U transformers",
        ) from error
    separate_experts(model)
    _replace_conv1d(model)
    return model


def _replace_conv1d(model: Any) -> None:
    """GPT-2's projections compute x W + b with W [K, N]: nn.Linear with the transposed weight does the same."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            columns, rows = module.weight.shape
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Linear(columns, rows, device="meta"))


def open_network(checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "auto") -> Network:
    """The network of a float checkpoint: `build_model`, then `attach`."""
    return attach(build_model(checkpoint), checkpoint, dtype=dtype, device=device)


def attach(model: Any, checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "auto") -> Network:
    """A model of `build_model` with every tensor it needs found in the checkpoint, and its computed buffers in place.

    `dtype` auto computes in float32 on a CPU and in the checkpoint's own dtype elsewhere. Raises QuantoolError when
    a tensor is missing or misshapen, or no list of blocks can be found.
    """
    where = resolve_device(device)
    linears = as_linears(checkpoint)
    names = _checkpoint_names(model, linears)
    block_names = _block_names(model, linears)
    # After the shapes: an absurd size in config.json must not be allocated.
    _compute_buffers(model, where)
    compute = resolve_dtype(dtype, where, linears)
    return Network(model.eval().requires_grad_(False), linears, names, block_names, compute, where, _tied(model))


def resolve_device(device: str) -> torch.device:
    """Auto is CUDA where there is one. Raises UsageError for a device that torch does not know or reach."""
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' cannot be used: {one_line(error)}", hint="use --device cpu") from error
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
            f"{transformers.__version__} reads: {one_line(error)}",
            hint="check config.json, or upgrade: pip install -U transformers",
        ) from error
    # Weights are cast when they are read, so the class must not pick a dtype of its own.
    config.dtype = torch.float32
    return config


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
        if name.startswith(text_prefix(model))
    ]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in lists if len(module) == depth] or lists
    if not lists:
        raise QuantoolError(
            f"{checkpoint.path}: no list of decoder blocks in {type(model).__name__}",
            hint="quantool handles decoders built of equal blocks",
        )
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return tuple(f"{name}.{i}" for i in range(len(blocks)))


def _checkpoint_names(model: Any, checkpoint: LinearsCheckpoint) -> dict[str, str]:
    """Module tensor name -> checkpoint tensor name, for every tensor that the network needs.

    Raises QuantoolError naming what is missing or misshapen.
    """
    names = stored_names(model, (name for name, _ in tensors_of(model)), checkpoint.infos)
    for name, tensor in tensors_of(model):
        found = names.get(name)
        if found is None:
            raise QuantoolError(
                f"{checkpoint.path}: tensor '{name}' {list(tensor.shape)} of {type(model).__name__} is missing",
                hint=OLD_GPTQ if any(other.endswith(".qweight") for other in checkpoint.infos) else INCOMPLETE,
            )
        shape = checkpoint.infos[found].shape
        if tuple(tensor.shape) != shape:
            raise QuantoolError(
                f"{checkpoint.path}: tensor '{found}': shape {list(shape)}, config.json expects {list(tensor.shape)}",
                hint="config.json and the weights are of different models",
            )
    return names


def stored_names(model: Any, names: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """Where a checkpoint that holds `stored` has each tensor of the network; of `names`, those that it has.

    A checkpoint saved from the base model lacks its prefix ("h.0..." for "transformer.h.0..."), of two tied matrices
    either may be the one that is stored, and some names are what transformers makes of others on loading: mixtral
    stores "model.layers.0.block_sparse_moe.experts.3.w1.weight" for "model.layers.0.mlp.experts.3.gate_proj.weight".
    """
    prefix = f"{model.base_model_prefix}."
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(head, "weight", None) is embeddings.weight
    renamed = _as_loaded(model, stored)
    found: dict[str, str] = {}
    for name in names:
        choices = [name, name.removeprefix(prefix)]
        owner, _, leaf = name.rpartition(".")
        if owner in HEADS or (tied and leaf == "weight" and model.get_submodule(owner) is embeddings):
            choices += [f"{other}.{leaf}" for other in HEADS]
        places = [choice for choice in choices if choice in stored]
        places += [renamed[choice] for choice in choices if choice in renamed]
        if places:
            found[name] = places[0]
    return found


def _as_loaded(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """What transformers would call each stored tensor on loading -> its stored name, where it changes the name.

    Tensors of experts, which it would merge, get the names that they have in `Experts`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if not hasattr(transform, "operations")]
    merges = [
        transform
        for transform in transforms
        if [type(operation).__name__ for operation in getattr(transform, "operations", ())] in MERGED
    ]
    found: dict[str, str] = {}
    for name in stored:
        new = name
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        if expert := expert_of(new):
            new = _of_expert(new, expert, merges)
        if new != name:
            found[new] = name
    return found


def _of_expert(name: str, expert: str, merges: list[Any]) -> str:
    """A tensor of `expert` under its name in `Experts`, if transformers merges it: its w1 may be the gate_proj."""
    module, _, leaf = name.rpartition(".")
    for merge in merges:
        target, pattern = merge.rename_source_key(f"{module}.weight")  # packed tensors of it go the same way
        owner, _, fused = target.rpartition(".")
        if pattern is not None and fused in PARTS and expert.rpartition(".")[0] == owner:
            # The sources are in the order in which their rows are concatenated.
            return f"{expert}.{PARTS[fused][merge.source_patterns.index(pattern)]}.{leaf}"
    return name


def materialise(network: Network, which: list[str]) -> None:
    """Read the tensors named in `which` into the network; parameters are cast, packed buffers stay as stored."""
    for name in which:
        owner_name, _, leaf = name.rpartition(".")
        owner = network.model.get_submodule(owner_name)
        tensor = network.checkpoint.read(network.names[name])
        if leaf in owner._parameters:
            # A copy even when the dtype is right: methods change weights in place, a mapped file must not.
            value = nn.Parameter(tensor.to(network.device, network.dtype, copy=True), requires_grad=False)
            for module, alias in network.tied.get(name, ((owner, leaf),)):
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
            empty = nn.Parameter(torch.empty_like(owner._parameters[leaf], device="meta"), requires_grad=False)
            for module, alias in network.tied.get(name, ((owner, leaf),)):
                module._parameters[alias] = empty
        else:
            owner._buffers[leaf] = torch.empty_like(owner._buffers[leaf], device="meta")


def _tied(model: Any) -> dict[str, tuple[Place, ...]]:
    """Parameters that several modules share, by the first of their names: embeddings and head, if tied."""
    places: dict[int, list[Place]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    found = {name: tuple(places[id(parameter)]) for name, parameter in model.named_parameters()}
    return {name: shared for name, shared in found.items() if len(shared) > 1}


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint through transformers; raises QuantoolError when there is none."""
    import transformers

    def load(directory: Path) -> Any:
        try:
            return transformers.AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as error:  # transformers raises many classes here, none of its own
            raise QuantoolError(
                f"{checkpoint.path}: no usable tokenizer: {one_line(error)}",
                hint="copy tokenizer.json and tokenizer_config.json of the original model beside its config.json",
            ) from error

    if checkpoint.path.is_dir():
        return load(checkpoint.path)
    with TemporaryDirectory() as directory:
        checkpoint.write_aux(Path(directory))
        return load(Path(directory))
