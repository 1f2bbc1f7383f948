"""Tiles against the layout spelled out lane by lane; forms against what the formats write; kernels in the emulator.

The torch reference is compared with the layout, and the kernels with the reference to the bit.
"""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from emulated import Emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantool.formats import awq, compressed_tensors, gptq
from quantool.kernels import tiles
from quantool.quant import QuantizedTensor
from quantool.scheme import QuantScheme

LIMIT = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(st.integers(1, 4).map(lambda n: 16 * n), st.integers(1, 5).map(lambda n: 64 * n))
FORMS_OF_BITS = [(form, bits) for bits in (4, 8) for form in tiles.FORMS if (form, bits) != ("awq", 8)]


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def in_form(codes: torch.Tensor, form: str, bits: int) -> torch.Tensor:
    """As the formats write it."""
    rows, columns = codes.shape
    scales = torch.ones(rows, columns // 32, dtype=torch.float16)
    zeros = torch.zeros(scales.shape, dtype=torch.uint8)
    q = QuantizedTensor(codes, scales, zeros, QuantScheme(bits=bits, group_size=32, sym=False))
    packed = {
        "codes": lambda: codes,
        "rows": lambda: compressed_tensors.pack(q)["weight_packed"],
        "gptq": lambda: gptq.pack(q)["qweight"],
        "awq": lambda: awq.pack(q)["qweight"],
    }
    return packed[form]()


def places(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Of every code of a tile: row, column, word and its lowest bit, from the fragments of mma.m16n8k16."""
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for h in range(2):
            for e in range(2):
                for j in range(4):
                    for i in range(2):
                        row, column = g + 8 * (j % 2), 32 * h + 8 * t + 4 * e + 2 * (j // 2) + i
                        if bits == 4:
                            yield row, column, 4 * lane + 2 * h + e, 4 * j + 16 * i
                        else:
                            yield row, column, 128 * h + 4 * lane + 2 * e + j // 2, 8 * (2 * (j % 2) + i)


def tiled_by_lanes(codes: np.ndarray, bits: int) -> np.ndarray:
    rows, columns = codes.shape
    words = np.zeros((rows // 16, columns // 64, 32 * bits), dtype=np.uint32)
    for row, column, word, bit in places(bits):
        words[:, :, word] |= codes[row::16, column::64].astype(np.uint32) << np.uint32(bit)
    return words.view(np.int32)


@pytest.mark.parametrize(("form", "bits"), FORMS_OF_BITS)
@LIMIT
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_the_reference_is_the_layout_of_the_fragments(form: str, bits: int, shape: tuple[int, int], seed: int) -> None:
    rows, columns = 2 * shape[0], shape[1]  # AutoGPTQ's words come in multiples of 32 rows
    codes = random_codes(bits, rows, columns, seed=seed)
    packed = in_form(codes, form, bits)
    expected = torch.from_numpy(tiled_by_lanes(codes.numpy(), bits))
    assert torch.equal(tiles.pack_tiles(packed, form, bits, rows, columns), expected)
    unpacked = tiles.unpack_tiles(expected, form, bits)
    assert unpacked.dtype == packed.dtype
    assert torch.equal(unpacked, packed)


def test_one_code_is_where_the_mask_finds_it() -> None:
    codes = torch.zeros(32, 128, dtype=torch.uint8)
    codes[16 + 3 + 8, 64 + 32 + 8 * 2 + 4 + 2 + 1] = 0xD  # tile (1, 1), lane 14, half 1, step 3, register 3, high half
    packed = tiles.pack_tiles(codes, "codes", 4, 32, 128)
    [[i, k, place]] = packed.nonzero().tolist()
    assert (i, k, place) == (1, 1, 14 * 4 + 3)
    assert packed[i, k, place].item() >> 12 & 0x000F000F == 0x000D0000


@pytest.mark.parametrize(("form", "bits"), FORMS_OF_BITS)
@LIMIT
@given(shape=SHAPES, permuted=st.booleans(), seed=st.integers(0, 99))
def test_kernels_are_the_reference_to_the_bit(
    emulated: Emulated, form: str, bits: int, shape: tuple[int, int], permuted: bool, seed: int
) -> None:
    rows, columns = shape
    codes = random_codes(bits, rows, columns, seed=seed)
    packed = tiles.unpack_tiles(tiles.pack_tiles(codes, "codes", bits, rows, columns), form, bits)
    perm = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)).to(torch.int32) if permuted else None
    emulated.seed(seed)
    found = tiles.pack_tiles_cuda(packed, form, bits, rows, columns, perm)
    assert torch.equal(found, tiles.pack_tiles(packed, form, bits, rows, columns, perm))
    expected = codes if perm is None else codes[:, perm]
    assert torch.equal(tiles.unpack_tiles_cuda(found, "codes", bits), expected)
    unpacked = tiles.unpack_tiles_cuda(found, form, bits)
    assert torch.equal(unpacked, tiles.unpack_tiles(found, form, bits))


@pytest.mark.parametrize(("form", "bits"), FORMS_OF_BITS)
def test_a_permutation_moves_columns(form: str, bits: int) -> None:
    codes = random_codes(bits, 32, 192)
    perm = torch.randperm(192, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    moved = tiles.pack_tiles(in_form(codes, form, bits), form, bits, 32, 192, perm)
    assert torch.equal(moved, tiles.pack_tiles(codes[:, perm].contiguous(), "codes", bits, 32, 192))


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_parameters_of_rows_g_and_g_plus_8_are_side_by_side(dtype: torch.dtype) -> None:
    parameters = torch.arange(48 * 5).view(48, 5).to(dtype)
    tiled = tiles.tile_rows(parameters)
    assert tiled.shape == (3, 5, 8, 2)
    assert tiled.is_contiguous()
    for row in range(48):
        assert torch.equal(tiled[row // 16, :, row % 8, row % 16 // 8], parameters[row])
    assert torch.equal(tiles.untile_rows(tiled), parameters)
    assert tiles.untile_rows(tiled).is_contiguous()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((16, 64, 4, 32), None),
        ((4096, 14336, 8, 14336), None),
        ((16, 192, 4, 96), None),
        ((24, 64, 4, 32), r"tiles are 16 rows by 64 columns, and \[24, 64\]"),
        ((16, 96, 4, 32), r"\[16, 96\]"),
        ((0, 64, 4, 32), r"\[0, 64\]"),
        ((16, 64, 3, 32), "4 or 8 bits, not 3"),
        ((16, 64, 4, 16), "not 16"),
        ((16, 192, 4, 128), "divides 192 columns, not 128"),
        ((16, 64, 4, 0), "not 0"),
    ],
)
def test_what_can_be_tiled(arguments: tuple[int, int, int, int], reason: str | None) -> None:
    found = tiles.fits(*arguments)
    assert found is None if reason is None else found is not None and re.search(reason, found)


@pytest.mark.parametrize("op", [tiles.pack_tiles, tiles.pack_tiles_cuda])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(32, 17, dtype=torch.int32)}, r"\[32, 17\], expected int32 \[32, 16\]"),
        ({"packed": torch.zeros(32, 16)}, r"float32 \[32, 16\], expected int32"),
        ({"packed": torch.zeros(16, 32, dtype=torch.int32).t()}, "non-contiguous"),
        ({"form": "marlin"}, "'marlin', expected one of codes, rows"),
        ({"bits": 3}, "bits is 3, expected 4 or 8"),
        ({"form": "awq", "bits": 8}, "bits is 8, expected 4 of form awq"),
        ({"rows": 24}, r"\[24, 128\]"),
        ({"columns": 96}, r"\[32, 96\]"),
        ({"perm": torch.arange(127, dtype=torch.int32)}, r"perm is int32 \[127\], expected int32 \[128\]"),
        ({"perm": torch.arange(128)}, "perm is int64"),
        ({"perm": torch.arange(1, 129, dtype=torch.int32)}, "perm is 1 to 128, expected 0 to 127"),
        ({"perm": torch.arange(-1, 127, dtype=torch.int32)}, "perm is -1 to 126"),
    ],
)
@pytest.mark.usefixtures("emulated")
def test_arguments_that_do_not_fit_are_refused(op: object, change: dict[str, object], message: str) -> None:
    arguments = {"packed": torch.zeros(32, 16, dtype=torch.int32), "form": "rows", "bits": 4, "rows": 32}
    arguments |= {"columns": 128, "perm": None}
    with pytest.raises(ValueError, match=message):
        op(*(arguments | change).values())


@pytest.mark.usefixtures("emulated")
def test_memory_that_16_byte_loads_cannot_read_is_refused() -> None:
    shifted = torch.zeros(4 + 32 * 16, dtype=torch.int32)[1:-3].view(32, 16)
    with pytest.raises(ValueError, match="4 bytes after a multiple of 16"):
        tiles.pack_tiles_cuda(shifted, "rows", 4, 32, 128)


@pytest.mark.parametrize("op", [tiles.unpack_tiles, tiles.unpack_tiles_cuda])
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(2, 2, 256, dtype=torch.int32), r"\[2, 2, 256\], expected int32 \[2, 2, 128\]"),
        (torch.zeros(2, 128, dtype=torch.int32), r"\[2, 128\]"),
        (torch.zeros(0, 2, 128, dtype=torch.int32), r"16 rows by 64 columns, and \[0, 128\]"),
        (torch.zeros(2, 2, 128), "float32"),
        (torch.zeros(2, 128, 2, dtype=torch.int32).transpose(1, 2), "non-contiguous"),
    ],
)
@pytest.mark.usefixtures("emulated")
def test_tiles_that_are_none_are_refused(op: object, packed: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(packed, "rows", 4)


@pytest.mark.parametrize(("form", "bits"), FORMS_OF_BITS)
def test_torch_finds_the_ops_consistent(form: str, bits: int) -> None:
    packed = in_form(random_codes(bits, 32, 128), form, bits)
    perm = torch.arange(127, -1, -1, dtype=torch.int32)
    for permutation in (None, perm):
        torch.library.opcheck(tiles.pack_tiles, (packed, form, bits, 32, 128, permutation))
    torch.library.opcheck(tiles.unpack_tiles, (tiles.pack_tiles(packed, form, bits, 32, 128), form, bits))


def test_without_compiled_kernels_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTOOL_KERNELS", "0")
    codes = random_codes(4, 32, 128)
    packed = tiles.pack_tiles_cuda(codes, "codes", 4, 32, 128)
    assert torch.equal(packed, tiles.pack_tiles(codes, "codes", 4, 32, 128))
    assert torch.equal(tiles.unpack_tiles_cuda(packed, "codes", 4), codes)
