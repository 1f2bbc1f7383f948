"""Keys of "quantization_config" that AutoGPTQ, GPTQModel, AutoAWQ and auto-round share.

They give one module values of its own, or say how codes were found but not what they mean.
GPTQModel's `dynamic` maps patterns, matched from the beginning of a module's name, to values of that module's own;
the first that matches counts, one that begins with "-:" leaves the module in float. auto-round's `extra_config` maps
names, or patterns searched anywhere in a name; more than 8 bits leave in float.
Source: GPTQModel, quantization/config.py dynamic_get; auto-round, inference/convert_model.py get_layer_config.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from quantool.errors import QuantoolError
from quantool.formats.shared import EXPORT_AGAIN, FLOAT_CHECKPOINT, compile_pattern
from quantool.io import TensorInfo
from quantool.scheme import PER_CHANNEL

AUTO_ROUND = "auto-round"
EXCLUDED = "-:"
MAX_BITS = 8  # more is float

# Keys that have no part in reading the codes. Everything in `meta` is of this kind, too.
_HOW_QUANTIZED = """
    act_data_type act_dynamic act_group_aware act_group_size act_sym amp autoround_version backend batch_size
    block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent dataset disable_exllama
    enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input enable_torch_compile exllama_config gptaq
    gradient_accumulate_steps hyb_act iters low_cpu_mem_usage low_gpu_mem_usage lr max_input_length meta minmax_lr
    model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize modules_to_not_convert mse nsamples pad_token_id provider quant_block_list
    scale_dtype seqlen static_attention_granularity static_groups static_kv_granularity to_quant_block_names
    tokenizer train_bs true_sequential use_cuda_fp16 use_exllama
"""
HOW_QUANTIZED = frozenset(_HOW_QUANTIZED.split())
PER_MODULE = frozenset({"bits", "group_size", "sym", "desc_act", "data_type", "act_bits", "pack_dtype"})
WHOLE = frozenset(
    {"quant_method", "method", "dynamic", "extra_config", "packing_format", "lm_head", "format", "checkpoint_format"}
)


def refuse_unknown(section: Mapping[str, Any], known: Collection[str], where: str = "") -> None:
    """Raise QuantoolError naming the first key that is not `known`, unless it says nothing: null, false, empty.

    A format grows by new keys, and one that is not known may change what the stored numbers mean.
    """
    for key, value in section.items():
        if value and key not in known:
            raise QuantoolError(
                f"quantization_config: {key!r:.80}{where} is not a key that is known here, it may change the weights",
                hint="if it only says how the codes were found, remove it from config.json",
            )


ModuleConfig = Callable[[str], Mapping[str, Any] | None]


def module_configs(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> ModuleConfig:
    """A function from the name of a module to `config` with its own values, None where it is left in float.

    `infos` tells which keys of `extra_config` are names. Raises QuantoolError when `dynamic` or `extra_config` is
    not of objects, or has keys that are no patterns or say something not known.
    """
    dynamic = [
        (compile_pattern(key.removeprefix(EXCLUDED).removeprefix("+:")), None if key.startswith(EXCLUDED) else values)
        for key, values in _overrides(config, "dynamic").items()
    ]
    extra = _overrides(config, "extra_config")
    modules = {name.rpartition(".")[0] for name in infos}
    searched = [(compile_pattern(key), values) for key, values in extra.items() if key not in modules and values]

    def find(module: str) -> Mapping[str, Any] | None:
        for pattern, values in dynamic:
            if pattern.match(module):
                return None if values is None else {**config, **values}
        own = extra.get(module)
        if own is None:
            own = next((values for pattern, values in searched if pattern.search(module)), {})
        bits = own.get("bits", config.get("bits"))
        return None if isinstance(bits, int) and bits > MAX_BITS else {**config, **own}

    return find


def own_config(find: ModuleConfig, module: str, info: TensorInfo) -> Mapping[str, Any]:
    """The config of a module with packed tensors; raises QuantoolError when the config leaves it in float."""
    own = find(module)
    if own is None:
        raise QuantoolError(
            f"{info.path.name}: module '{module}' has quantized weights, but config.json leaves it in float",
            hint=EXPORT_AGAIN,
        )
    return own


def read_group_size(config: Mapping[str, Any]) -> int:
    """`group_size`, a positive number or -1; raises QuantoolError for anything else."""
    size = config.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != PER_CHANNEL):
        raise QuantoolError(
            f"quantization_config: group_size is {size!r:.80}, expected a positive number or -1", hint=EXPORT_AGAIN
        )
    return size


def require_int_weights(config: Mapping[str, Any]) -> None:
    """Raise QuantoolError for what the same tensors can be made to hold: other types, words, quantized activations."""
    method = config.get("quant_method")
    found = {
        "method": config.get("method") or method,
        "data_type": config.get("data_type") or "int",
        "pack_dtype": str(config.get("pack_dtype") or "int32").removeprefix("torch."),
        "act_bits": config.get("act_bits") or 16,
    }
    readable = {"method": (method,), "data_type": ("int",), "pack_dtype": ("int32",), "act_bits": (16, 32)}
    for key, expected in readable.items():
        if found[key] not in expected:
            raise QuantoolError(
                f"quantization_config: {method} with {key} {found[key]!r:.80} cannot be read, expected {expected[0]!r}",
                hint=FLOAT_CHECKPOINT,
            )


def _overrides(config: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    section = config.get(key) or {}
    if not isinstance(section, Mapping) or not all(isinstance(values or {}, Mapping) for values in section.values()):
        raise QuantoolError(f"quantization_config: {key} is not an object of objects", hint=EXPORT_AGAIN)
    overrides = {pattern: values or {} for pattern, values in section.items()}
    for pattern, values in overrides.items():
        refuse_unknown(values, HOW_QUANTIZED | PER_MODULE, f" of {key} {pattern!r:.80}")
    return overrides
