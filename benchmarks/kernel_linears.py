"""What benchmarks/kernels.py measures: the linears of every kernel, with random weights.

A kernel is a function that makes a Linear and a line in PASSES. The products have no bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from kernel_figures import BF16, BITSANDBYTES, HUMMING, INT4PACK, INT_MM, LLM_INT8, MARLIN, NF4, W4A16, W8A8
from quantool.kernels import ops
from quantool.kernels.int8 import linear_llm_int8, linear_w8a8
from quantool.kernels.nf4 import linear_nf4
from quantool.kernels.tiles import pack_tiles, tile_rows
from quantool.kernels.wna16 import linear_tiles

GROUP, BLOCK = 128, 64  # weights of 4 bits, and of nf4, that share a scale
THRESHOLD, OUTLIER, EVERY = 6.0, 30.0, 512  # of LLM.int8(); about what one in so many columns of x is
SAMPLED = 64  # outputs that are compared with float64
GPU = torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Linear:
    """One random weight of a kernel: its product, the bytes it keeps, and SAMPLED of its rows as float64."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    nbytes: int
    sample: torch.Tensor


def normal(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns, dtype=torch.bfloat16, device=GPU)


def with_outliers(tokens: int, columns: int) -> torch.Tensor:
    """One column in 512 is one; in the models of LLM.int8() (Dettmers et al. 2022) fewer than one in 1000."""
    x = normal(tokens, columns)
    x[:, ::EVERY] += OUTLIER
    return x


def int8_codes(tokens: int, columns: int) -> torch.Tensor:
    return torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device=GPU)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A name, what makes a random weight of [rows, columns] for it, and x [tokens, columns]."""

    name: str
    make: Callable[[int, int], Linear]
    beside: tuple[str, ...] = ()  # what ours is compared with; others are compared with nothing
    tolerance: float = 1e-2  # of the relative error
    least: int = 1  # tokens that it takes
    activations: Callable[[int, int], torch.Tensor] = normal


# --- ours


def w4a16(rows: int, columns: int) -> Linear:
    codes, scales, sample = four_bits(rows, columns)
    tiles, spread = pack_tiles(codes, "codes", 4, rows, columns), tile_rows(scales)
    return Linear(lambda x: linear_tiles(x, tiles, spread, None, None, 4), tiles.nbytes + spread.nbytes, sample)


def w8a8(rows: int, columns: int) -> Linear:
    """Each token gets its own step: x is rounded to int8 in the time that is measured."""
    codes, scales, sample = eight_bits(rows, columns)
    nbytes = codes.nbytes + scales.nbytes
    return Linear(lambda x: linear_w8a8(x, codes, scales, None, None, None, True), nbytes, sample)


def llm_int8(rows: int, columns: int) -> Linear:
    codes, scales, sample = eight_bits(rows, columns)
    return Linear(lambda x: linear_llm_int8(x, codes, scales, None, THRESHOLD), codes.nbytes + scales.nbytes, sample)


def nf4(rows: int, columns: int) -> Linear:
    packed, absmax, table, sample = four_bit_levels(rows, columns)
    nbytes = packed.nbytes + absmax.nbytes
    return Linear(lambda x: linear_nf4(x, packed, absmax, table, None, rows, BLOCK), nbytes, sample)


# --- others


def bf16(rows: int, columns: int) -> Linear:
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=GPU)
    sample = weight[sampled(rows)].double()
    return Linear(lambda x: torch.nn.functional.linear(x, weight), weight.nbytes, sample)


def int4pack(rows: int, columns: int) -> Linear:
    """torch's own (tinygemm): W = scale * (code - 8) + zero, two codes to a byte, the first in the high half."""
    codes, scales, sample = four_bits(rows, columns)
    nibbles = ops.pack_nibbles(codes).view(rows, columns // 2)
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    pairs = torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1).contiguous()
    product = torch.ops.aten._weight_int4pack_mm
    return Linear(lambda x: product(x, packed, GROUP, pairs), packed.nbytes + pairs.nbytes, sample)


def int_mm(rows: int, columns: int) -> Linear:
    """cuBLAS on what W8A8 multiplies: x is int8 already, y stays int32, and there are no scales."""
    codes = int8_codes(rows, columns)
    return Linear(lambda x: torch._int_mm(x, codes.T), codes.nbytes, codes[sampled(rows)].double())


def marlin(rows: int, columns: int) -> Linear:
    """vLLM's, or GPTQModel's copy of it (compiled at its first use)."""
    try:
        utils = import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
        repack, types = import_module("vllm._custom_ops").gptq_marlin_repack, import_module("vllm.scalar_type")
    except ImportError:
        utils, types = import_module("gptqmodel.utils.marlin"), import_module("gptqmodel.utils.marlin_scalar_type")
        repack = utils.gptq_marlin_repack
    codes, scales, sample = four_bits(rows, columns)
    nothing, workspace = utils.marlin_make_empty_g_idx(GPU), utils.marlin_make_workspace_new(GPU)
    weight = repack(words_by_columns(codes), nothing, size_k=columns, size_n=rows, num_bits=4)
    permuted = utils.marlin_permute_scales(scales.T.contiguous(), size_k=columns, size_n=rows, group_size=GROUP)

    def apply(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = utils.apply_gptq_marlin_linear(
            input=x,
            weight=weight,
            weight_scale=permuted,
            weight_zp=nothing,
            g_idx=nothing,
            g_idx_sort_indices=nothing,
            workspace=workspace,
            wtype=types.scalar_types.uint4b8,
            output_size_per_partition=rows,
            input_size_per_partition=columns,
            is_k_full=True,
        )
        return result

    return Linear(apply, weight.nbytes + permuted.nbytes, sample)


def humming(rows: int, columns: int) -> Linear:
    """humming-kernels: compiles a kernel for every shape and band of tokens."""
    layer_class = import_module("humming.layer").HummingLayer
    codes, scales, sample = four_bits(rows, columns)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
    layer = layer_class(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=torch.bfloat16).to(GPU)
    layer.load_from_tensors({"qweight": words_by_columns(codes), "scales": scales.T.contiguous()})
    layer.transform()
    return Linear(layer, sum(parameter.nbytes for parameter in layer.parameters()), sample)


def bitsandbytes(rows: int, columns: int) -> Linear:
    """Its nf4. Its LLM.int8() asks the GPU for the outliers and waits, which no graph can record."""
    module = import_module("bitsandbytes")
    packed, absmax, table, sample = four_bit_levels(rows, columns)
    state = module.functional.QuantState(
        absmax=absmax,
        shape=torch.Size((rows, columns)),
        code=table,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    nbytes = packed.nbytes + absmax.nbytes
    return Linear(lambda x: module.matmul_4bit(x, packed.view(-1, 1), state), nbytes, sample)


# Each goes through all shapes before the next begins; the most telling first, and last what may not be installed.
PASSES = (
    (
        Kernel(BF16, bf16),
        Kernel(W4A16, w4a16, beside=(BF16, INT4PACK, MARLIN, HUMMING), tolerance=4e-3),
        Kernel(INT4PACK, int4pack),
    ),
    (  # to round x to 8 bits is an error of about 1%
        Kernel(W8A8, w8a8, beside=(BF16, INT_MM), tolerance=2e-2),
        Kernel(INT_MM, int_mm, least=17, activations=int8_codes),
        Kernel(LLM_INT8, llm_int8, beside=(BF16,), tolerance=2e-2, activations=with_outliers),
        Kernel(NF4, nf4, beside=(BF16, BITSANDBYTES), tolerance=4e-3),
    ),
    (Kernel(MARLIN, marlin), Kernel(HUMMING, humming), Kernel(BITSANDBYTES, bitsandbytes)),
)
KERNELS = {kernel.name: kernel for kernels in PASSES for kernel in kernels}


# --- random weights


def four_bits(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K], scales bf16 [N, G] for W = scale * (code - 8), and the sample of W."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=GPU)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.bfloat16, device=GPU).uniform_(0.005, 0.02)
    chosen = sampled(rows)
    return codes, scales, ops.dequantize(codes[chosen], scales[chosen], None, 4).double()


def eight_bits(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 [N, K], scales float32 [N, 1] for W = scale * code, and the sample of W."""
    codes = int8_codes(rows, columns)
    scales = torch.empty(rows, 1, device=GPU).uniform_(5e-4, 2e-3)
    chosen = sampled(rows)
    return codes, scales, codes[chosen].double() * scales[chosen].double()


def four_bit_levels(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [NK / 2], absmax float32 [NK / 64], the 16 levels of nf4, and the sample of W."""
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=GPU)
    absmax = torch.empty(rows, columns // BLOCK, device=GPU).uniform_(0.05, 0.2)
    table, chosen = ops.levels("nf4").to(GPU), sampled(rows)
    shape = (SAMPLED, columns)
    sample = ops.dequantize_levels(packed[chosen].flatten(), absmax[chosen].flatten(), table, shape, BLOCK)
    return packed.flatten(), absmax.flatten(), table, sample.double()


def words_by_columns(codes: torch.Tensor) -> torch.Tensor:
    """GPTQ's layout: int32 [K / 8, N], eight codes of a row in a word."""
    return ops.pack_bits(codes, 4).T.contiguous()


def sampled(rows: int) -> torch.Tensor:
    return torch.linspace(0, rows - 1, SAMPLED, device=GPU).long()
