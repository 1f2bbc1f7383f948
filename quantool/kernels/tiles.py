"""Tiles: the layout in which CUDA linears keep codes, and its operators from and to the forms of artifacts.

A tile is 16 rows by 64 columns of W [N, K], contiguous in memory: the A operands of four mma.m16n8k16 steps, as the
32 lanes of a warp hold them. Lane l (g = l // 4, t = l % 4) owns rows g and g + 8, and in each half h of the columns
the eight from 32 h + 8 t on, so that a group of 32 never straddles a step and 16 bytes of x serve both steps of a half:

    column of a half     0 ..... 7   8 .... 15   16 ... 23   24 ... 31
    lane of row g           4g         4g + 1      4g + 2      4g + 3        the same for row g + 8

The columns of one lane and half are 4 e + 2 q + i (e the step, q the register pair, i the half of a register), its
rows g + 8 r. Codes lie in the order of these indices, the last one fastest, in words that `pack_bits` makes:

    4 bits    int32 [N / 16, K / 64, 128]    g t | h e | i q r     so (word >> 4 j) & 0x000F000F is register j = 2 q + r
    8 bits    int32 [N / 16, K / 64, 256]    h | g t | e q | r i   bytes, 16 per lane and half

Scales and zeros [N, G] become [N / 16, G, 8, 2], rows g and g + 8 side by side: one 32-bit load of two scales.

Artifacts hold codes in one of these forms, all little-endian, a word's first code lowest:

    codes   uint8 [N, K]                    one per byte
    rows    int32 [N, K * bits / 32]        compressed-tensors, and ours
    gptq    int32 [K * bits / 32, N]        the words of "rows", transposed
    awq     int32 [K, N / 8]                4 bits; nibble i of a word is of row NIBBLES[i] of its eight
"""

import torch

from quantool.kernels import cuda
from quantool.kernels.ops import WORD_BITS, operator, pack_bits, unpack_bits

ROWS, COLUMNS = 16, 64  # of a tile
FORMS = ("codes", "rows", "gptq", "awq")  # the launchers know them by their place
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
# Of the indices of W.view(N / 16, r, g, K / 64, h, t, e, q, i), their order in tiles.
ORDERS = {4: (0, 3, 2, 5, 4, 6, 8, 7, 1), 8: (0, 3, 4, 2, 5, 6, 7, 1, 8)}


def fits(rows: int, columns: int, bits: int, group: int) -> str | None:
    """Why W [N, K] in groups of `group` columns cannot be tiled, in one line; None when it can."""
    if bits not in ORDERS:
        return f"tiles hold 4 or 8 bits, not {bits}"
    if rows < ROWS or rows % ROWS or columns < COLUMNS or columns % COLUMNS:
        return f"tiles are {ROWS} rows by {COLUMNS} columns, and [{rows}, {columns}] is no multiple of that"
    if group != columns and (group < 32 or group % 32 or columns % group):
        return f"tiles have groups of a multiple of 32 that divides {columns} columns, not {group}"
    return None


def tile_rows(parameters: torch.Tensor) -> torch.Tensor:
    """Scales or zeros [N, G] -> [N / 16, G, 8, 2]."""
    tiled: torch.Tensor = parameters.unflatten(0, (-1, 2, 8)).permute(0, 3, 2, 1).contiguous()
    return tiled


def untile_rows(parameters: torch.Tensor) -> torch.Tensor:
    """Inverse of `tile_rows`."""
    return parameters.permute(0, 3, 2, 1).flatten(0, 2).contiguous()


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] below 16 -> int32 [K, N / 8], eight rows to a word. Packed first: fewer bytes to transpose."""
    eight = codes.unflatten(0, (-1, 8))
    octets = [eight[:, low] | (eight[:, high] << 4) for low, high in zip(NIBBLES[::2], NIBBLES[1::2], strict=True)]
    return _transposed(torch.stack(octets, dim=-1).view(torch.int32).squeeze(-1))


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_awq`: int32 [K, N / 8] -> uint8 [N, K]."""
    columns, words_per_column = words.shape
    octets = _transposed(words).view(torch.uint8).unflatten(-1, (columns, 4))
    codes = torch.empty(words_per_column, 8, columns, dtype=torch.uint8, device=words.device)
    for i, (low, high) in enumerate(zip(NIBBLES[::2], NIBBLES[1::2], strict=True)):
        codes[:, low] = octets[..., i] & 0xF
        codes[:, high] = octets[..., i] >> 4
    return codes.flatten(0, 1)


def pack_tiles_reference(
    packed: torch.Tensor, form: str, bits: int, rows: int, columns: int, perm: torch.Tensor | None = None
) -> torch.Tensor:
    """Tiles int32 [N / 16, K / 64, 32 * bits] of W [N, K] in one of FORMS; its column k is column perm[k] of `packed`.

    `perm` is int32 [K]: the order that puts the groups of an activation order side by side.
    """
    _require_packed(packed, form, bits, rows, columns, perm)
    codes = _to_codes(packed, form, bits, columns)
    if perm is not None:
        codes = codes.index_select(1, perm)
    tiled = codes.view(_indices(rows, columns)).permute(ORDERS[bits])
    return pack_bits(tiled.reshape(rows // ROWS, columns // COLUMNS, ROWS * COLUMNS), bits)


def unpack_tiles_reference(tiles: torch.Tensor, form: str, bits: int) -> torch.Tensor:
    """Inverse of `pack_tiles` without a permutation."""
    rows, columns = _require_tiles(tiles, form, bits)
    order, sizes = ORDERS[bits], _indices(rows, columns)
    tiled = unpack_bits(tiles, bits, ROWS * COLUMNS).view([sizes[index] for index in order])
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=tiles.device)
    codes.view(sizes).permute(order).copy_(tiled)
    return codes if form == "codes" else _from_codes(codes, form, bits)


def pack_tiles_cuda(
    packed: torch.Tensor, form: str, bits: int, rows: int, columns: int, perm: torch.Tensor | None = None
) -> torch.Tensor:
    """`pack_tiles` by the compiled kernel (csrc/cuda/pack.cuh)."""
    if not cuda.is_available():
        return pack_tiles_reference(packed, form, bits, rows, columns, perm)
    _require_packed(packed, form, bits, rows, columns, perm)
    tiles = packed.new_empty(rows // ROWS, columns // COLUMNS, WORD_BITS * bits, dtype=torch.int32)
    cuda.call("quantool_pack_tiles", packed, perm, tiles, rows, columns, FORMS.index(form), bits)
    return tiles


def unpack_tiles_cuda(tiles: torch.Tensor, form: str, bits: int) -> torch.Tensor:
    """`unpack_tiles` by the compiled kernel (csrc/cuda/pack.cuh)."""
    if not cuda.is_available():
        return unpack_tiles_reference(tiles, form, bits)
    rows, columns = _require_tiles(tiles, form, bits)
    packed = _empty(tiles, form, bits, rows, columns)
    cuda.call("quantool_unpack_tiles", tiles, packed, rows, columns, FORMS.index(form), bits)
    return packed


def _pack_tiles_fake(
    packed: torch.Tensor, form: str, bits: int, rows: int, columns: int, perm: torch.Tensor | None = None
) -> torch.Tensor:
    return packed.new_empty(rows // ROWS, columns // COLUMNS, WORD_BITS * bits, dtype=torch.int32)


pack_tiles = operator("pack_tiles", pack_tiles_reference, _pack_tiles_fake, cuda=pack_tiles_cuda)


def _unpack_tiles_fake(tiles: torch.Tensor, form: str, bits: int) -> torch.Tensor:
    return _empty(tiles, form, bits, tiles.shape[0] * ROWS, tiles.shape[1] * COLUMNS)


unpack_tiles = operator("unpack_tiles", unpack_tiles_reference, _unpack_tiles_fake, cuda=unpack_tiles_cuda)


def _empty(like: torch.Tensor, form: str, bits: int, rows: int, columns: int) -> torch.Tensor:
    dtype = torch.uint8 if form == "codes" else torch.int32
    return like.new_empty(_shape(form, bits, rows, columns), dtype=dtype)


def _shape(form: str, bits: int, rows: int, columns: int) -> tuple[int, int]:
    """The shape of W [N, K] in a form."""
    words = columns * bits // WORD_BITS
    return {"codes": (rows, columns), "rows": (rows, words), "gptq": (words, rows), "awq": (columns, rows // 8)}[form]


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose in memory of its own, without odd strides of dimensions of length 1."""
    return matrix.t().clone(memory_format=torch.contiguous_format)


def _indices(rows: int, columns: int) -> tuple[int, ...]:
    return rows // ROWS, 2, 8, columns // COLUMNS, 2, 4, 2, 2, 2


def _to_codes(packed: torch.Tensor, form: str, bits: int, columns: int) -> torch.Tensor:
    if form == "codes":
        return packed
    if form == "awq":
        return unpack_awq(packed)
    return unpack_bits(packed if form == "rows" else _transposed(packed), bits, columns)


def _from_codes(codes: torch.Tensor, form: str, bits: int) -> torch.Tensor:
    if form == "awq":
        return pack_awq(codes)
    words = pack_bits(codes, bits)
    return words if form == "rows" else _transposed(words)


def _require_packed(
    packed: torch.Tensor, form: str, bits: int, rows: int, columns: int, perm: torch.Tensor | None
) -> None:
    """Raise ValueError when the arguments of `pack_tiles` do not fit: compiled code would read past their ends."""
    _require_form(form, bits)
    if reason := fits(rows, columns, bits, columns):
        raise ValueError(f"pack_tiles: {reason}")
    dtype = torch.uint8 if form == "codes" else torch.int32
    _require("pack_tiles", form, packed, dtype, _shape(form, bits, rows, columns))
    if perm is None:
        return
    _require("pack_tiles", "perm", perm, torch.int32, (columns,))
    if perm.device != packed.device:
        raise ValueError(f"pack_tiles: perm is on {perm.device}, the codes on {packed.device}")
    first, last = int(perm.min()), int(perm.max())
    if first < 0 or last >= columns:
        raise ValueError(f"pack_tiles: perm is {first} to {last}, expected 0 to {columns - 1}")


def _require_tiles(tiles: torch.Tensor, form: str, bits: int) -> tuple[int, int]:
    """N and K of tiles; raises ValueError when the arguments of `unpack_tiles` do not fit."""
    _require_form(form, bits)
    shape = (*tiles.shape[:2], WORD_BITS * bits) if tiles.dim() == 3 else (0, 0, WORD_BITS * bits)
    _require("unpack_tiles", "tiles", tiles, torch.int32, shape)
    rows, columns = shape[0] * ROWS, shape[1] * COLUMNS
    if reason := fits(rows, columns, bits, columns):
        raise ValueError(f"unpack_tiles: {reason}")
    return rows, columns


def _require_form(form: str, bits: int) -> None:
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    if bits not in ORDERS or (form == "awq" and bits != 4):
        raise ValueError(f"bits is {bits}, expected {'4' if form == 'awq' else '4 or 8'} of form {form}")


def _require(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        found = f"{'' if tensor.is_contiguous() else 'non-contiguous '}{cuda.described(tensor)}"
        raise ValueError(f"{op}: {name} is {found}, expected {str(dtype).removeprefix('torch.')} {list(shape)}")
