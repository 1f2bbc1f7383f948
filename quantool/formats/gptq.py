"""GPTQ's layout, which AutoGPTQ and GPTQModel write: 2, 3, 4 and 8 bits, transposed, codes in their natural order.

W [N, K] of a linear X becomes, with G = K / group_size groups:

    X.qweight  int32  [K * bits / 32, N]     X.qzeros  int32    [G, N * bits / 32]
    X.g_idx    int32  [K]                    X.scales  float16  [G, N]

    bits of a word, 4 bits   31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    qweight: input channel    8j+7   8j+6   8j+5   8j+4   8j+3   8j+2  8j+1   8j     (qzeros: output channel)

so the codes 0, 1, ..., 7 are the word 0x76543210. 3 bits are dense: 32 codes in three words, two of them straddling.
W[n, k] = scales[g_idx[k], n] * (codes[n, k] - zeros[g_idx[k], n]), where g_idx[k] is k // group_size unless columns
were grouped in the order of their activations ("desc_act").

Two versions of qzeros. v1 stores zeros - 1, subtracted from the whole word: 4-bit zeros of 8 are 0x77777777, and
0, 8, 8, ... are 0x88888880 - 0x11111111 = 0x7777776F, with a borrow. v2 stores zeros: 0x88888888. Readers of v1 that
add one to each zero instead of to the word see others where a zero is 0; and older releases of GPTQModel subtract
something else of 3 bits. So v1 is written where none of this matters, symmetric 2, 4 and 8 bits, and v2 otherwise.
Read here are both of symmetric weights, whose zeros are known, and v2 of asymmetric ones; gptq_v1.py reads the rest.
Layout: GPTQModel 7.7, nn_modules/qlinear/__init__.py and utils/model.py.
"""

from collections.abc import Mapping

import torch

from quantool.errors import QuantoolError
from quantool.formats.gptq_config import BITS, NAME, V1, module_schemes, quantization_config, written_version
from quantool.formats.shared import round_scales, transposed, unpack_g_idx
from quantool.kernels.ops import WORD_BITS, packed_words
from quantool.quant import QuantizedTensor, pack_bits, unpack_bits
from quantool.scheme import QuantScheme

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

SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
CHANNELS = 32  # AutoGPTQ's buffers and the kernels of all runtimes come in multiples of it, in both directions
# What GPTQModel once subtracted from the three words of 32 3-bit zeros: ones, but the first and last word exchanged.
OLD_GPTQMODEL = (0x24924924, 0x92492492, 0x49249249)


def rejects(scheme: QuantScheme, shape: tuple[int, int], *, act_order: bool = False) -> str | None:
    """Why this format cannot hold W [N, K] with `scheme`, in one line; None when it can."""
    if scheme.flat or scheme.act_bits != 16 or scheme.bits not in BITS:
        return f"format gptq holds integer weights of {', '.join(map(str, BITS))} bits only, not {scheme}"
    if shape[0] % CHANNELS or shape[1] % CHANNELS:
        return f"format gptq packs {CHANNELS} channels at a time, and [{shape[0]}, {shape[1]}] are not multiples of it"
    return None


def layout(
    scheme: QuantScheme, shape: tuple[int, int], model_dtype: torch.dtype
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of what `pack` returns for W [N, K]."""
    rows, columns = shape
    groups = scheme.groups(columns)
    return {
        "qweight": ("I32", (packed_words(columns, scheme.bits), rows)),
        "qzeros": ("I32", (groups, packed_words(rows, scheme.bits))),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def pack(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of a weight that `rejects` accepts."""
    bits, columns = q.scheme.bits, q.codes.shape[1]
    zeros = torch.full_like(q.scales, q.scheme.zero, dtype=torch.uint8) if q.zeros is None else q.zeros
    minus = 1 if written_version(q.scheme) == V1 else 0
    in_order = torch.arange(columns, dtype=torch.int32, device=q.codes.device) // q.scheme.width(columns)
    return {
        "qweight": transposed(pack_bits(q.codes, bits)),
        "qzeros": pack_bits(zeros.t() - minus, bits),
        "scales": transposed(q.scales.to(torch.float16)),
        "g_idx": in_order if q.g_idx is None else q.g_idx,
    }


def unpack(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Inverse of `pack`; asymmetric zeros are taken as v2.

    Raises QuantoolError when the scheme is symmetric and a stored zero is another, and for a g_idx that is none.
    """
    words, rows = tensors["qweight"].shape
    columns = tensors["g_idx"].numel() if "g_idx" in tensors else words * WORD_BITS // scheme.bits
    zeros = None
    if scheme.sym:
        _check_symmetric(tensors["qzeros"], scheme, rows)
    else:
        zeros = transposed(unpack_bits(tensors["qzeros"], scheme.bits, rows))
    return QuantizedTensor(
        unpack_bits(transposed(tensors["qweight"]), scheme.bits, columns),
        transposed(tensors["scales"]),
        zeros,
        scheme,
        g_idx=unpack_g_idx(tensors.get("g_idx"), "g_idx", scheme, columns),
    )


def weight_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """[N, K] of a packed module, from its mapped tensors without unpacking them."""
    words, rows = tensors["qweight"].shape
    if "g_idx" in tensors:
        return rows, tensors["g_idx"].numel()
    bits = next(bits for bits in BITS if packed_words(rows, bits) == tensors["qzeros"].shape[1])
    return rows, words * WORD_BITS // bits


def _check_symmetric(words: torch.Tensor, scheme: QuantScheme, rows: int) -> None:
    """The zeros of symmetric weights are known: they may be stored in any way that says so."""
    zeros = unpack_bits(words, scheme.bits, rows)
    stored = [bool((zeros == zero).all()) for zero in (scheme.zero, scheme.zero - 1)]
    if any(stored) or (scheme.bits == 3 and _is_old_gptqmodel(words, scheme)):
        return
    raise QuantoolError(
        f"tensor 'qzeros': expected {scheme.zero} everywhere since sym is true, found other values",
        hint='set "sym": false in quantization_config of config.json',
    )


def _is_old_gptqmodel(words: torch.Tensor, scheme: QuantScheme) -> bool:
    """Whether 3-bit zeros are v1 as GPTQModel once made it of v2: zeros of 4 minus its constants."""
    minus = torch.tensor([OLD_GPTQMODEL[i % 3] for i in range(words.shape[1])], device=words.device)
    zeros = words.new_full((1, words.shape[1] * WORD_BITS // 3), scheme.zero, dtype=torch.uint8)
    v2 = pack_bits(zeros, 3).to(torch.int64)
    return bool(((words - (v2 - minus)) % (1 << WORD_BITS) == 0).all())
