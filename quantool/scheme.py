"""How a weight is represented, and the words the command line knows. No torch here: `--help` imports this.

A scheme maps a weight matrix W [N, K] (out_features, in_features) to integer codes with one scale, and when
asymmetric one zero point, per group of `group_size` consecutive input channels of a row:

    W[n, k] ~ scales[n, g] * (codes[n, k] - zeros[n, g]),   g = k // group_size,   0 <= codes < 2**bits

Symmetric schemes fix zeros at 2**(bits-1). `group_size` -1 is one group per row (per channel) and 0 is one
scale for the whole tensor, as in AutoRound.

`dtype` nf4 and fp4 look their 16 codes up in a table of levels instead:  W.flatten()[i] ~ scales[i // group_size] *
levels[codes[i]], where the blocks of `group_size` run over the flattened weight and may cross rows (bitsandbytes).
"""

import math
from dataclasses import dataclass

from quantool.errors import UsageError

METHOD_NAMES = ("rtn", "gptq", "awq", "awq+gptq", "smoothquant", "nf4", "fp4", "llm-int8")
FORMAT_NAMES = ("compressed-tensors", "gptq", "awq", "bitsandbytes")
CALIBRATION_FORMATS = ("safetensors", "imatrix")
OUTTYPES = (
    *("auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1"),
    *("q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s", "q3_k", "q4_k", "q5_k"),
)  # of convert-gguf: the file types of llama-quantize, and its short names
DTYPE_NAMES = ("int", "nf4", "fp4")
ACTORDERS = ("static", "group", "none")
STARVED_EXPERTS = ("error", "all-tokens", "rtn")
AUTO_GROUP_SIZES = (128, 64, 32)
PER_CHANNEL = -1
PER_TENSOR = 0


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Bits, grouping and symmetry of one weight; `act_bits` 16 leaves activations in float.

    With `act_bits` 8, `act_dynamic` says whether activations get one scale per token at run time or one stored scale,
    and `act_sym` whether they have no zero point. `outlier_threshold` marks LLM.int8(): input channels that hold a
    value of at least that much in a batch are multiplied in float; 0 is none.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_bits: int = 16
    act_dynamic: bool = True
    act_sym: bool = True
    dtype: str = "int"
    double_quant: bool = False
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits is {self.bits}, expected 2 to 8", hint="use --bits 4")
        if self.group_size < PER_CHANNEL:
            raise UsageError(
                f"group_size is {self.group_size}, expected a positive number, -1 (per channel) or 0 (per tensor)",
                hint="use --group-size 64",
            )
        if self.act_bits not in {8, 16}:
            raise UsageError(f"act_bits is {self.act_bits}, expected 8 or 16", hint="use --act-bits 8")
        if self.outlier_threshold is not None and not 0 <= self.outlier_threshold < math.inf:
            raise UsageError(
                f"outlier_threshold is {self.outlier_threshold:g}, expected a number of at least 0",
                hint="use --outlier-threshold 6",
            )

    @property
    def flat(self) -> bool:
        """Whether scales belong to blocks of the flattened weight instead of groups of a row."""
        return self.dtype != "int"

    @property
    def zero(self) -> int:
        """The fixed zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def width(self, in_features: int) -> int:
        """Number of input channels that share one scale, for rows of `in_features`."""
        return self.group_size if self.group_size > 0 else in_features

    def groups(self, in_features: int) -> int:
        """Number of scales per row as stored: per tensor is stored as equal scales per row."""
        return in_features // self.width(in_features)

    def divides(self, in_features: int) -> bool:
        """Whether rows of `in_features` can be grouped so; blocks of the flattened weight always can."""
        return self.flat or in_features % self.width(in_features) == 0

    def __str__(self) -> str:
        group = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(self.group_size, f"g{self.group_size}")
        if self.flat:
            return f"{self.dtype.upper()} {group}{' double' if self.double_quant else ''}"
        text = f"W{self.bits}A{self.act_bits} {'sym' if self.sym else 'asym'} {group}"
        if self.outlier_threshold is not None:
            outliers = f"outliers from {self.outlier_threshold:g}" if self.outlier_threshold else "no outliers"
            return f"{text}, {outliers}"
        if self.act_bits == 16:
            return text
        kind = ("" if self.act_dynamic else " static") + ("" if self.act_sym else " asym")
        return f"{text}, activations{kind}" if kind else text


PRESETS: dict[str, QuantScheme] = {
    "W2A16": QuantScheme(bits=2, group_size=32, sym=False),
    "W3A16": QuantScheme(bits=3, group_size=64, sym=False),
    "W4A16": QuantScheme(bits=4, group_size=128, sym=True),
    "W4A16_ASYM": QuantScheme(bits=4, group_size=128, sym=False),
    "W8A16": QuantScheme(bits=8, group_size=PER_CHANNEL, sym=True),
    "W8A8": QuantScheme(bits=8, group_size=PER_CHANNEL, sym=True, act_bits=8),
    "W8A8_STATIC": QuantScheme(bits=8, group_size=PER_CHANNEL, sym=True, act_bits=8, act_dynamic=False),
}


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What the methods can be told besides the scheme; each option belongs to the methods named.

    Raises UsageError for a value out of range.
    """

    mse: bool = False  # rtn
    n_grid: int = 20  # awq, awq+gptq
    damp_percent: float = 0.01  # gptq, awq+gptq: share of the Hessian's mean diagonal
    actorder: str = "static"  # gptq, awq+gptq
    smoothing_strength: float | None = None  # smoothquant; None is searched per group of linears
    min_expert_tokens: int | None = None  # all that look at activations; None is one window
    starved_experts: str = "error"

    def least_tokens(self, window: int) -> int:
        """What an expert must have seen, for calibration windows of so many tokens."""
        return window if self.min_expert_tokens is None else self.min_expert_tokens

    def __post_init__(self) -> None:
        if self.n_grid < 1:
            raise UsageError(f"n_grid is {self.n_grid}, expected at least 1", hint="use --n-grid 20")
        if not 0 < self.damp_percent <= 1:
            raise UsageError(
                f"damp_percent is {self.damp_percent:g}, expected more than 0 and at most 1",
                hint="use --damp-percent 0.01",
            )
        if self.smoothing_strength is not None and not 0 <= self.smoothing_strength <= 1:
            raise UsageError(
                f"smoothing_strength is {self.smoothing_strength:g}, expected 0 to 1",
                hint="use --smoothing-strength 0.5",
            )
        if self.min_expert_tokens is not None and self.min_expert_tokens < 1:
            raise UsageError(
                f"min_expert_tokens is {self.min_expert_tokens}, expected at least 1", hint="use --min-expert-tokens 1"
            )
        for name, words in (("actorder", ACTORDERS), ("starved_experts", STARVED_EXPERTS)):
            if getattr(self, name) not in words:
                raise UsageError(
                    f"{name} is '{getattr(self, name)}', expected {', '.join(words)}",
                    hint=f"use --{name.replace('_', '-')} {words[0]}",
                )


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """What decides the types in a GGUF file.

    `tensor_types` are pairs (regex, type), of which the first whose regex is found in a tensor's name decides.
    """

    outtype: str = "auto"
    tensor_types: tuple[tuple[str, str], ...] = ()
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    pure: bool = False
    fallback: bool = True
    pre: str | None = None
    allow_requantize: bool = False


def fitting_group_sizes(in_features: int) -> list[int]:
    """Group sizes of 16 to 256 that divide a row of `in_features`, largest first."""
    return [g for g in (256, 128, 64, 32, 16) if in_features % g == 0]
