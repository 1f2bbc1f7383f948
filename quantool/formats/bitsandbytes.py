"""bitsandbytes' serialized form, which transformers and vLLM load: NF4 and FP4, and LLM.int8().

4 bits. W [N, K] of a linear X is flattened row by row, n = N * K weights in B = ceil(n / block size) blocks:

    X.weight                                uint8    [ceil(n / 2), 1]   two codes a byte, the first in the high half
    X.weight.absmax                         float32  [B]                uint8 when quantized themselves
    X.weight.quant_map                      float32  [16]               the levels that codes stand for
    X.weight.nested_absmax                  float32  [ceil(B / 256)]    double quantization only
    X.weight.nested_quant_map               float32  [256]              double quantization only
    X.weight.quant_state.bitsandbytes__nf4  uint8    [length]           a JSON text; or ..._fp4

    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0466}    nested: double quantization only

The text of nested_offset has as many digits as it takes, which no plan of a file can know. So it is padded with
spaces at the end of the JSON, up to the longest float32: no loader minds, and all else is byte for byte what
transformers and bitsandbytes save. They compress with the byte after the last of an odd n set to the code of 0.

8 bits: X.weight int8 [N, K] is code - 128, X.SCB float32 [N] the largest magnitude of each row, so that
W = SCB / 127 * weight, and X.weight_format uint8 [] is 0, for rows.

Layout: bitsandbytes 0.50, functional.py (QuantState.as_dict) and nn/modules.py. Config: transformers 5.23,
utils/quantization_config.py (BitsAndBytesConfig).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantool.errors import QuantoolError
from quantool.formats.config_keys import refuse_unknown
from quantool.formats.shared import (
    EXPERT,
    EXPORT_AGAIN,
    FLOAT_CHECKPOINT,
    expect,
    expect_matrix,
    require_contiguous_groups,
)
from quantool.io import TensorInfo
from quantool.kernels.ops import ABSMAX_BLOCK, LEVELS, dequantize_absmax, levels, pack_nibbles, unpack_nibbles
from quantool.quant import DoubleQuant, QuantizedTensor, divide
from quantool.scheme import PER_CHANNEL, QuantScheme

NAME = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"
SUFFIXES: tuple[str, ...] = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(f"{STATE}{dtype}" for dtype in LEVELS),
    "SCB",
    "weight_format",
)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 32)  # of several that fit, the first is assumed
STEPS = 127
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LONGEST_OFFSET = 24  # characters of the longest repr of a float32
LONGEST_STATE = 4096  # bytes; bitsandbytes writes less than 200
THRESHOLD = 6.0  # transformers' default


def rejects(scheme: QuantScheme, shape: tuple[int, int], *, act_order: bool = False) -> str | None:
    """Why this format cannot hold W [N, K] with `scheme`, in one line; None when it can."""
    if act_order:
        return "format bitsandbytes has no g_idx, its columns are in their own order"
    if scheme.flat and scheme.group_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, sorted(BLOCK_SIZES)))
        return f"format bitsandbytes has blocks of {sizes} weights, not {scheme.group_size}"
    int8 = QuantScheme(8, PER_CHANNEL, act_bits=8, outlier_threshold=scheme.outlier_threshold)
    if not scheme.flat and (scheme != int8 or scheme.outlier_threshold is None):
        return f"format bitsandbytes holds weights of the methods nf4, fp4 and llm-int8 only, not {scheme}"
    return None


def round_scales(scales: torch.Tensor, model_dtype: torch.dtype) -> torch.Tensor:
    """float32 scales -> those that SCB / 127 can be, positive and finite. The methods of this format need none."""
    return scales.clamp(2.0**-126, 2.0**120) * STEPS / STEPS


def layout(
    scheme: QuantScheme, shape: tuple[int, int], model_dtype: torch.dtype
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of what `pack` returns for W [N, K]."""
    if not scheme.flat:
        return {"weight": ("I8", shape), "SCB": ("F32", (shape[0],)), "weight_format": ("U8", ())}
    count = math.prod(shape)
    blocks = -(-count // scheme.group_size)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("U8", (-(-count // 2), 1)),
        "weight.absmax": ("U8" if scheme.double_quant else "F32", (blocks,)),
        "weight.quant_map": ("F32", (len(LEVELS[scheme.dtype]),)),
    }
    if scheme.double_quant:
        tensors["weight.nested_absmax"] = ("F32", (-(-blocks // ABSMAX_BLOCK),))
        tensors["weight.nested_quant_map"] = ("F32", (256,))
    text = _state_text(scheme, shape, model_dtype, 0.0 if scheme.double_quant else None)
    tensors[STATE + scheme.dtype] = ("U8", (len(text),))
    return tensors


def pack(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of a weight that `rejects` accepts; raises QuantoolError when it has a g_idx."""
    require_contiguous_groups(q, NAME)
    if not q.scheme.flat:
        return {
            "weight": (q.codes.to(torch.int16) - q.scheme.zero).to(torch.int8),
            "SCB": _absmax(q.scales.reshape(-1)),
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }
    dtype, double = q.scheme.dtype, q.double
    tensors = {
        "weight": pack_nibbles(q.codes, fill=LEVELS[dtype].index(0)).unsqueeze(-1),
        "weight.absmax": q.scales if double is None else double.codes,
        "weight.quant_map": levels(dtype),
    }
    if double is not None:
        tensors["weight.nested_absmax"] = double.absmax
        tensors["weight.nested_quant_map"] = double.quant_map
    rows, columns = q.codes.shape
    offset = None if double is None else double.offset.item()
    text = _state_text(q.scheme, (rows, columns), q.weight_dtype, offset)
    tensors[STATE + dtype] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return tensors


def _state_text(scheme: QuantScheme, shape: tuple[int, int], dtype: torch.dtype | None, offset: float | None) -> str:
    """The JSON of a 4-bit weight; with an `offset` (of double quantization) padded to a length that all have."""
    state = {
        "quant_type": scheme.dtype,
        "blocksize": scheme.group_size,
        "dtype": DTYPE_NAMES.get(dtype or torch.float32, "float32"),
        "shape": list(shape),
    }
    if offset is None:
        return json.dumps(state)
    text = json.dumps(
        {
            **state,
            "nested_blocksize": ABSMAX_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    )
    return text + " " * (LONGEST_OFFSET - len(repr(offset)))


def _absmax(scales: torch.Tensor) -> torch.Tensor:
    """SCB float32 of scales = SCB / 127: the product gives every quotient again.

    Of two numbers that have the same quotient it may be the other: bitsandbytes' are float16, as its weights were.
    """
    product = scales.to(torch.float32) * STEPS
    half = product.to(torch.float16).to(torch.float32)
    return torch.where(divide(half, STEPS) == scales, half, product)


def unpack(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Inverse of `pack`. Raises QuantoolError on a JSON, levels or a storage order that contradict or are not read."""
    if not scheme.flat:
        if bool(tensors.get("weight_format", torch.zeros(())) != 0):
            raise QuantoolError(
                "tensor 'weight_format': expected 0 (rows), found the order of a GPU kernel", hint=FLOAT_CHECKPOINT
            )
        codes = (tensors["weight"].to(torch.int16) + scheme.zero).to(torch.uint8)
        return QuantizedTensor(codes, divide(tensors["SCB"].reshape(-1, 1), STEPS), None, scheme)
    state = _read_state(tensors, scheme)
    if not torch.equal(tensors["weight.quant_map"].cpu(), levels(scheme.dtype)):
        raise QuantoolError(
            f"tensor 'weight.quant_map': expected the 16 levels of {scheme.dtype}, found others",
            hint=FLOAT_CHECKPOINT,
        )
    codes = unpack_nibbles(tensors["weight"].reshape(-1), math.prod(state.shape)).view(state.shape)
    absmax, double = tensors["weight.absmax"], None
    if state.offset is not None:
        quant_map, top = tensors["weight.nested_quant_map"], tensors["weight.nested_absmax"]
        double = DoubleQuant(absmax, quant_map, top, torch.tensor(state.offset, dtype=torch.float32))
        absmax = dequantize_absmax(double.codes, double.quant_map, double.absmax, double.offset)
    return QuantizedTensor(codes, absmax, None, scheme, double=double, weight_dtype=state.dtype)


def weight_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """[N, K] of a packed module, from its mapped tensors without unpacking them."""
    if "SCB" in tensors:
        return tensors["weight"].shape[0], tensors["weight"].shape[1]
    return _read_state(tensors, None).shape


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON of a 4-bit weight says beside what its scheme does; `offset` is that of double quantization."""

    shape: tuple[int, int]
    dtype: torch.dtype
    offset: float | None


def _read_state(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme | None) -> _State:
    """The JSON, checked against the other tensors, and against `scheme` when there is one.

    Raises QuantoolError naming the key.
    """
    suffix = next(suffix for suffix in tensors if suffix.startswith(STATE))
    try:
        state = json.loads(bytes(tensors[suffix].cpu().numpy()).decode())
    except (ValueError, RecursionError) as error:
        raise QuantoolError(f"tensor '{suffix}': is not JSON: {error}", hint=EXPORT_AGAIN) from error
    nested = "weight.nested_absmax" in tensors
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    expected: dict[str, tuple[Any, ...]] = {
        "quant_type": (suffix.removeprefix(STATE),),
        "blocksize": BLOCK_SIZES,
        "dtype": tuple(dtypes),
        "shape": (),
    }
    if nested:
        expected |= {"nested_blocksize": (ABSMAX_BLOCK,), "nested_dtype": ("float32",), "nested_offset": ()}
    if not isinstance(state, dict) or set(state) != set(expected):
        found = ", ".join(sorted(state)) if isinstance(state, dict) else repr(state)
        raise QuantoolError(
            f"tensor '{suffix}': expected the keys {', '.join(expected)}, found {found}",
            hint=f"it may be of a newer bitsandbytes: {FLOAT_CHECKPOINT}",
        )
    for key, values in expected.items():
        if values and not any(type(state[key]) is type(value) and state[key] == value for value in values):
            raise _contradiction(suffix, key, state[key], " or ".join(map(str, values)))
    shape, offset = state["shape"], state["nested_offset"] if nested else None
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise _contradiction(suffix, "shape", shape, "two positive numbers")
    if nested and not (isinstance(offset, float) and math.isfinite(offset)):
        raise _contradiction(suffix, "nested_offset", offset, "a finite number")
    count, block, blocks = shape[0] * shape[1], state["blocksize"], tensors["weight.absmax"].numel()
    if -(-count // 2) != tensors["weight"].numel():
        raise _contradiction(suffix, "shape", shape, f"{tensors['weight'].numel()} bytes of two weights")
    if -(-count // block) != blocks or (scheme and scheme.group_size != block and blocks > 1):
        raise _contradiction(suffix, "blocksize", block, f"{blocks} blocks of {count} weights")
    return _State((shape[0], shape[1]), dtypes[state["dtype"]], offset)


def _contradiction(suffix: str, key: str, found: Any, expected: str) -> QuantoolError:
    return QuantoolError(f"tensor '{suffix}': {key} is {found!r:.80}, expected {expected}", hint=EXPORT_AGAIN)


def quantization_config(
    schemes: Mapping[str, QuantScheme], kept: Sequence[str], *, act_order: bool = False
) -> dict[str, Any]:
    """The keys and values that transformers writes; `kept` linears are `llm_int8_skip_modules`.

    Raises QuantoolError when schemes differ, when an expert is quantized (transformers keeps all experts of a block in
    one tensor, which bitsandbytes does not take), and when transformers would take a quantized linear for a kept one.
    """
    if len(set(schemes.values())) > 1:
        words = ", ".join(sorted({str(scheme) for scheme in schemes.values()}))
        raise QuantoolError(
            f"format bitsandbytes has one scheme for all modules, found {words}",
            hint="use --format compressed-tensors, or leave modules in float",
        )
    expert = next((name for name in schemes if EXPERT.search(name)), None)
    if expert is not None:
        raise QuantoolError(
            f"format bitsandbytes cannot hold '{expert}': transformers loads experts as one tensor, in float",
            hint="leave the experts in float: --ignore lm_head --ignore 're:.*experts.*'",
        )
    scheme = next(iter(schemes.values()), QuantScheme(4, 64, dtype="nf4"))
    skipped = list(kept)
    _check_skipped(schemes, skipped)
    return {
        "_load_in_4bit": scheme.flat,
        "_load_in_8bit": not scheme.flat,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.dtype if scheme.flat else "fp4",
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": THRESHOLD if scheme.outlier_threshold is None else float(scheme.outlier_threshold),
        "load_in_4bit": scheme.flat,
        "load_in_8bit": not scheme.flat,
        "quant_method": NAME,
    }


def _check_skipped(schemes: Mapping[str, QuantScheme], kept: Sequence[str]) -> None:
    """transformers leaves in float what is, ends in, or is inside of a skipped module."""
    for name in kept:
        clash = next((module for module in schemes if module.endswith(name) or module.startswith(f"{name}.")), None)
        if clash is not None:
            raise QuantoolError(
                f"format bitsandbytes cannot keep '{name}' in float, transformers would keep '{clash}' too",
                hint="use --format compressed-tensors",
            )


def module_schemes(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, QuantScheme]:
    """Module -> scheme for exactly the modules with a 4-bit state or an SCB.

    The block size is only in each module's JSON: it is told by the number of blocks; of a weight in one block, which
    any larger size fits too, it is the least that does. Raises QuantoolError on what cannot be read, and when config
    and tensors disagree.
    """
    refuse_unknown(config, quantization_config({}, ()))
    schemes = {}
    for name, info in infos.items():
        module, _, suffix = name.rpartition(".")
        if suffix != "weight":
            continue
        kinds = [dtype for dtype in LEVELS if f"{module}.{STATE}{dtype}" in infos]
        if kinds or info.dtype == "U8":
            schemes[module] = _read_levels(config, module, kinds, infos)
        elif f"{module}.SCB" in infos or info.dtype == "I8":
            schemes[module] = _read_int8(config, module, infos)
    return schemes


def _read_int8(config: Mapping[str, Any], module: str, infos: Mapping[str, TensorInfo]) -> QuantScheme:
    _expect_key(config, "load_in_8bit", (True,), module)
    threshold = config.get("llm_int8_threshold", THRESHOLD)
    if type(threshold) not in {int, float} or not 0 <= threshold < math.inf:
        raise QuantoolError(
            f"quantization_config: llm_int8_threshold is {threshold!r:.80}, expected a number of at least 0",
            hint='set "llm_int8_threshold": 6.0 in quantization_config of config.json',
        )
    rows, _ = expect_matrix(infos[f"{module}.weight"], "I8")
    expect(infos, f"{module}.SCB", ("F32",), (rows,))
    if f"{module}.weight_format" in infos:
        expect(infos, f"{module}.weight_format", ("U8",), ())
    return QuantScheme(8, PER_CHANNEL, act_bits=8, outlier_threshold=float(threshold))


def _read_levels(
    config: Mapping[str, Any], module: str, kinds: Sequence[str], infos: Mapping[str, TensorInfo]
) -> QuantScheme:
    _expect_key(config, "load_in_4bit", (True,), module)
    _expect_key(config, "bnb_4bit_quant_storage", ("uint8", None), module)
    dtype = config.get("bnb_4bit_quant_type", "fp4")
    _expect_key(config, "bnb_4bit_quant_type", tuple(kinds or LEVELS), module)
    weight, absmax = infos[f"{module}.weight"], infos.get(f"{module}.weight.absmax")
    half = weight.shape[0] if weight.shape else 0
    blocks = absmax.shape[0] if absmax and absmax.shape else 0
    double = f"{module}.weight.nested_absmax" in infos
    expect(infos, weight.name, ("U8",), (max(half, 1), 1))
    expect(infos, f"{module}.weight.absmax", ("U8" if double else "F32",), (max(blocks, 1),))
    expect(infos, f"{module}.weight.quant_map", ("F32",), (len(LEVELS[dtype]),))
    expect(infos, f"{module}.{STATE}{dtype}", ("U8",))
    state = infos[f"{module}.{STATE}{dtype}"]
    if len(state.shape) != 1 or state.shape[0] > LONGEST_STATE:
        raise QuantoolError(
            f"{state.path.name}: tensor '{state.name}': expected a text of at most {LONGEST_STATE} bytes, "
            f"found {list(state.shape)}",
            hint=EXPORT_AGAIN,
        )
    if double:
        expect(infos, f"{module}.weight.nested_absmax", ("F32",), (-(-blocks // ABSMAX_BLOCK),))
        expect(infos, f"{module}.weight.nested_quant_map", ("F32",), (256,))
    size = next((size for size in BLOCK_SIZES if -(-2 * half // size) == blocks), None)
    if size is None:
        raise QuantoolError(
            f"{weight.path.name}: tensor '{module}.weight.absmax': found {blocks} blocks for {2 * half} weights, "
            f"expected blocks of {', '.join(map(str, sorted(BLOCK_SIZES)))}",
            hint=EXPORT_AGAIN,
        )
    return QuantScheme(4, size, dtype=dtype, double_quant=double)


def _expect_key(config: Mapping[str, Any], key: str, values: tuple[Any, ...], module: str) -> None:
    """Raise QuantoolError unless the config says what the tensors of a module do."""
    found = config.get(key)
    if found in values:
        return
    raise QuantoolError(
        f"quantization_config: {key} is {found!r:.80}, the tensors of '{module}' need "
        f"{' or '.join(repr(value) for value in values if value is not None)}",
        hint=EXPORT_AGAIN if key != "bnb_4bit_quant_storage" else FLOAT_CHECKPOINT,
    )
