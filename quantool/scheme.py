"""How a weight is represented, and the words the command line knows. No torch here: `--help` imports this.

A scheme maps a weight matrix W [N, K] (out_features, in_features) to integer codes with one scale, and when
asymmetric one zero point, per group of `group_size` consecutive input channels of a row:

    W[n, k] ~ scales[n, g] * (codes[n, k] - zeros[n, g]),   g = k // group_size,   0 <= codes < 2**bits

Symmetric schemes fix zeros at 2**(bits-1). `group_size` -1 is one group per row (per channel) and 0 is one
scale for the whole tensor, as in AutoRound.
"""

from dataclasses import dataclass

from quantool.errors import UsageError

METHOD_NAMES = ("rtn", "awq")
FORMAT_NAMES = ("compressed-tensors", "awq")
AUTO_GROUP_SIZES = (128, 64, 32)
PER_CHANNEL = -1
PER_TENSOR = 0


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Bits, grouping and symmetry of one weight; `act_bits` 16 leaves activations in float.

    `act_dynamic` only matters with `act_bits` 8: one scale per token found at run time, or one stored scale.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_bits: int = 16
    act_dynamic: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits is {self.bits}, expected 2 to 8", hint="use --bits 4")
        if self.group_size < PER_CHANNEL:
            raise UsageError(
                f"group_size is {self.group_size}, expected a positive number, -1 (per channel) or 0 (per tensor)",
                hint="use --group-size 64",
            )

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
        return in_features % self.width(in_features) == 0

    def __str__(self) -> str:
        group = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(self.group_size, f"g{self.group_size}")
        return f"W{self.bits}A{self.act_bits} {'sym' if self.sym else 'asym'} {group}"


PRESETS: dict[str, QuantScheme] = {
    "W2A16": QuantScheme(bits=2, group_size=32, sym=False),
    "W3A16": QuantScheme(bits=3, group_size=64, sym=False),
    "W4A16": QuantScheme(bits=4, group_size=128, sym=True),
    "W4A16_ASYM": QuantScheme(bits=4, group_size=128, sym=False),
    "W8A16": QuantScheme(bits=8, group_size=PER_CHANNEL, sym=True),
}


def fitting_group_sizes(in_features: int) -> list[int]:
    """Group sizes of 16 to 256 that divide a row of `in_features`, largest first."""
    return [g for g in (256, 128, 64, 32, 16) if in_features % g == 0]
