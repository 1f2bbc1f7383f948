"""LLM.int8(): a row of W in 255 steps of its largest magnitude; what else it does happens at run time.

    absmax[n] = max |W[n]|      codes - 128 = round(W[n] * (127 / absmax[n]))      W ~ absmax / 127 * (codes - 128)

W is rounded to float16 first, as bitsandbytes does; the rest is float32, and a row of zeros gets zeros. The outliers
that the method is known for are those of the activations: kernels/ops.py, linear_llm_int8.

Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, section 2; bitsandbytes 0.50,
backends/default/ops.py (int8_vectorwise_quant).
"""

import torch

from quantool.errors import QuantoolError
from quantool.methods.rtn import piece_of
from quantool.model.memory import in_pieces
from quantool.quant import QuantizedTensor, RoundScales, divide
from quantool.scheme import MethodOptions, QuantScheme

STEPS = 127


def quantize_weight(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, options: MethodOptions
) -> QuantizedTensor:
    """W float [N, K] in any dtype -> its codes, and scales float32 [N, 1].

    Raises QuantoolError for a value that float16 does not hold.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)

    def fill(rows: slice) -> None:
        wide = weight[rows].to(torch.float16).to(torch.float32)
        top = wide.abs().amax(1, keepdim=True)
        if not bool(torch.isfinite(top).all()):
            raise _beyond_float16(weight[rows], rows.start)
        steps = (wide * (STEPS / top)).round_().masked_fill_(top == 0, 0)
        codes[rows] = steps.add_(scheme.zero).to(torch.uint8)
        absmax[rows] = top

    for _ in in_pieces("rows", len(weight), max(1, piece_of(weight) // weight.shape[1]), fill):
        pass
    return QuantizedTensor(codes, divide(absmax, STEPS), None, scheme)


def _beyond_float16(piece: torch.Tensor, start: int) -> QuantoolError:
    wide = piece.to(torch.float32)
    row, column = divmod(int(wide.abs().argmax()), wide.shape[1])
    return QuantoolError(
        f"weight [{start + row}, {column}] is {float(wide[row, column]):g}, "
        "expected at most 65504: LLM.int8() rounds to float16 first",
        hint="use --method nf4, or leave this linear in float: --ignore NAME",
    )
