"""compressed-tensors: what llm-compressor writes and vLLM and transformers load, 2 to 8 bits.

Weights of float activations are `pack-quantized`. W [N, K] of a linear X becomes, with G = K / group_size groups (1 per
channel):

    X.weight_packed      int32        [N, ceil(K * bits / 32)]   dense bit stream per row, see kernels/ops.py
    X.weight_scale       model dtype  [N, G]
    X.weight_shape       int64        [2]                        N, K
    X.weight_zero_point  int32        [ceil(N * bits / 32), G]   asymmetric only, packed down the rows

The library speaks of signed q = code - 2**(bits-1) and stores the code: q = -8, -7, -6, -5, 0, 1, 6, 7 is the
word 0xFE983210, and eight zero points -8, ..., -1 of one group are 0x76543210.

Those of 8-bit activations are `int-quantized`, symmetric and per channel or tensor:

    X.weight             int8         [N, K]                     q
    X.weight_scale       model dtype  [N, 1], or [1] per tensor
    X.input_scale        float32      [1]                        static activations: x ~ input_scale * (q - zero)
    X.input_zero_point   int8         [1]                        static asymmetric activations

Read are also `naive-quantized`, which is the same with a zero point, int8, for weights of any grouping; and what older
releases wrote: 3, 5, 6 and 7 bits padded to 32 // bits codes a word, zero points not packed, and groups in activation
order, X.weight_g_idx int32 [K]. No current runtime loads the last (0.20 refuses actorder "group"): it is not written.
Layout: compressed-tensors 0.20, compressors/. The config is in compressed_tensors_config.py.
"""

from collections.abc import Mapping

import torch

from quantool.errors import QuantoolError
from quantool.formats.compressed_tensors_config import (
    NAME,
    VERSION,
    module_schemes,
    padded_words,
    quantization_config,
)
from quantool.formats.shared import EXPORT_AGAIN, require_contiguous_groups, transposed, unpack_g_idx
from quantool.kernels.ops import WORD_BITS, packed_words
from quantool.quant import QuantizedTensor, pack_bits, unpack_bits
from quantool.scheme import PER_TENSOR, QuantScheme

__all__ = [
    "NAME",
    "SUFFIXES",
    "layout",
    "module_schemes",
    "pack",
    "quantization_config",
    "rejects",
    "round_scales",
    "unpack",
    "weight_shape",
]

SUFFIXES: tuple[str, ...] = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight",
    "input_scale",
    "input_zero_point",
)
SCALE_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# bfloat16 and float32 stay in their normal range. float16's begins at 6e-5, more than the scales of many 8-bit
# rows, and its subnormals are computed with at full speed on GPUs.
MIN_SCALE = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


def rejects(scheme: QuantScheme, shape: tuple[int, int], *, act_order: bool = False) -> str | None:
    """Why this format cannot hold W [N, K] with `scheme`, in one line; None when it can."""
    if scheme.flat or scheme.outlier_threshold is not None:
        return f"format {NAME} holds integer weights without float outliers, not {scheme}"
    if act_order:
        return f"{NAME} {VERSION} refuses groups in activation order"
    if scheme.act_bits == 8 and not (scheme.bits == 8 and scheme.sym and scheme.group_size <= 0):
        return f"format {NAME} needs symmetric 8-bit weights per channel or tensor with 8-bit activations, not {scheme}"
    return None


def round_scales(scales: torch.Tensor, model_dtype: torch.dtype) -> torch.Tensor:
    """float32 scales -> the model's dtype (float32 when that is not a usual one), positive and finite."""
    dtype = model_dtype if model_dtype in SCALE_DTYPES else torch.float32
    return scales.clamp(MIN_SCALE[dtype], torch.finfo(dtype).max).to(dtype)


def layout(
    scheme: QuantScheme, shape: tuple[int, int], model_dtype: torch.dtype
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of what `pack` returns for W [N, K]."""
    rows, columns = shape
    groups = scheme.groups(columns)
    scale_dtype = SCALE_DTYPES.get(model_dtype, "F32")
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    if scheme.act_bits == 8:
        per_tensor = scheme.group_size == PER_TENSOR
        tensors = {"weight": ("I8", shape), "weight_scale": (scale_dtype, (1,) if per_tensor else (rows, 1))}
        if not scheme.act_dynamic:
            tensors["input_scale"] = ("F32", (1,))
            if not scheme.act_sym:
                tensors["input_zero_point"] = ("I8", (1,))
        return tensors
    tensors = {
        "weight_packed": ("I32", (rows, packed_words(columns, scheme.bits))),
        "weight_scale": (scale_dtype, (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not scheme.sym:
        tensors["weight_zero_point"] = ("I32", (packed_words(rows, scheme.bits), groups))
    return tensors


def pack(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of a weight that `rejects` accepts; raises QuantoolError when it has a g_idx."""
    require_contiguous_groups(q, NAME)
    if q.scheme.act_bits == 8:
        inputs = {"input_scale": q.input_scale, "input_zero_point": q.input_zero}
        return {
            "weight": (q.codes - q.scheme.zero).view(torch.int8),  # modulo 256
            "weight_scale": q.scales[0].clone() if q.scheme.group_size == PER_TENSOR else q.scales.contiguous(),
            **{suffix: tensor for suffix, tensor in inputs.items() if tensor is not None},
        }
    tensors = {
        "weight_packed": pack_bits(q.codes, q.scheme.bits),
        "weight_scale": q.scales.contiguous(),
        "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
    }
    if q.zeros is not None:
        tensors["weight_zero_point"] = transposed(pack_bits(q.zeros.t(), q.scheme.bits))
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Inverse of `pack`, also for unpacked and older layouts. Per-tensor scales are repeated for every row.

    Raises QuantoolError when weight_shape contradicts weight_packed, a code is out of range, a zero point of a
    symmetric scheme is not zero, or weight_g_idx is none.
    """
    if "weight_packed" in tensors:
        rows, columns = _stored_shape(tensors, scheme)
        codes = _unpack_any(tensors["weight_packed"], scheme.bits, columns)
    else:
        rows, columns = tensors["weight"].shape
        codes = _from_signed(tensors["weight"], scheme, "weight")
    groups = scheme.groups(columns)
    input_scale, input_zero = (tensors.get(suffix) for suffix in ("input_scale", "input_zero_point"))
    if scheme.act_sym and input_zero is not None:
        if bool(input_zero.any()):
            raise QuantoolError("tensor 'input_zero_point': expected zeros, since activations are symmetric")
        input_zero = None
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None and bool((g_idx == -1).all()):  # made, and never set
        g_idx = None
    return QuantizedTensor(
        codes=codes,
        scales=_per_row(tensors["weight_scale"], rows, groups),
        zeros=_unpack_zeros(tensors.get("weight_zero_point"), scheme, rows, groups),
        scheme=scheme,
        input_scale=None if input_scale is None else input_scale.reshape(1).to(torch.float32),
        input_zero=None if input_zero is None else input_zero.reshape(1),
        g_idx=unpack_g_idx(g_idx, "weight_g_idx", scheme, columns),
    )


def weight_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """[N, K] of a packed module, from its mapped tensors without unpacking them."""
    if "weight_packed" in tensors:
        rows, columns = (int(size) for size in tensors["weight_shape"].tolist())
        return rows, columns
    return tensors["weight"].shape[0], tensors["weight"].shape[1]


def _stored_shape(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> tuple[int, int]:
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    rows, columns = (int(size) for size in tensors["weight_shape"].tolist())
    words = (packed_words(columns, scheme.bits), padded_words(columns, scheme.bits))
    fits = columns > 0 and scheme.divides(columns) and scale.numel() in {1, rows * scheme.groups(columns)}
    if rows == packed.shape[0] and packed.shape[1] in words and fits:
        return rows, columns
    raise QuantoolError(
        f"tensor 'weight_shape': expected the shape of {scheme} weights in {list(packed.shape)} words "
        f"with {scale.numel()} scales, found {[rows, columns]}",
        hint=EXPORT_AGAIN,
    )


def _unpack_any(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., W], dense or padded, -> codes uint8 [..., count].

    W says which it is. Where both have the same W (3, 5, 6 and 7 bits in a short row that is no multiple of 32)
    it is taken as dense.
    """
    if words.shape[-1] == packed_words(count, bits):
        return unpack_bits(words, bits, count)
    mask = (1 << bits) - 1
    codes = torch.stack([(words >> shift) & mask for shift in range(0, WORD_BITS - bits + 1, bits)], dim=-1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def _from_signed(q: torch.Tensor, scheme: QuantScheme, suffix: str) -> torch.Tensor:
    """Signed int8 -> codes uint8, by addition modulo 256."""
    codes = q.contiguous().view(torch.uint8) + scheme.zero
    if scheme.bits < 8 and bool((codes > scheme.max_code).any()):
        raise QuantoolError(f"tensor '{suffix}': values out of the range of {scheme.bits} bits", hint=EXPORT_AGAIN)
    return codes


def _per_row(tensor: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """[N, G] as it is; one value for the whole tensor repeated to [N, G]."""
    return tensor.reshape(1, 1).repeat(rows, groups) if tensor.numel() == 1 else tensor.reshape(rows, groups)


def _unpack_zeros(stored: torch.Tensor | None, scheme: QuantScheme, rows: int, groups: int) -> torch.Tensor | None:
    """Zero points uint8 [N, G] in the range of codes; None when symmetric."""
    if stored is None:
        return None
    if stored.dtype == torch.int8:
        zeros = _per_row(_from_signed(stored, scheme, "weight_zero_point"), rows, groups)
    else:
        zeros = transposed(_unpack_any(stored.t(), scheme.bits, rows))
    if not scheme.sym:
        return zeros
    if bool((zeros != scheme.zero).any()):
        raise QuantoolError("tensor 'weight_zero_point': expected zeros, since weights are symmetric")
    return None
