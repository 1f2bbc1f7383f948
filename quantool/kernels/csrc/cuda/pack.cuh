// Codes from the forms in which artifacts hold them to the tiles that linears read (tiles.py), and back.
//
// One warp makes one tile of 16 rows and 64 columns. Lane l (g = l >> 2, t = l & 3) owns rows g and g + 8 of it, and in
// each half h the eight columns from 32 h + 8 t on. Eight codes of a row in order, in one word (4 bits) or two (8 bits),
// are what every form gives and takes; the rest is the same for all of them:
//
//     row g       a7 a6 a5 a4 | a3 a2 a1 a0          two words of the tile, 4 bits, highest nibble first:
//     row g + 8   b7 b6 b5 b4 | b3 b2 b1 b0              b3 a3 b1 a1 b2 a2 b0 a0      b7 a7 b5 a5 b6 a6 b4 a4
//
// and with 8 bits four words: (b1 b0 a1 a0), (b3 b2 a3 a2), ... Each is woven from 16 bits of either row.
#pragma once
#include "device.cuh"

namespace quantool {

template <int Bits>
struct Eight {
  uint32_t word[Bits / 4];  // codes 0..7, the first lowest
};

// four bytes below 16 -> 16 bits, and back
QUANTOOL_DEVICE uint32_t join_nibbles(uint32_t bytes) {
  bytes &= 0x0f0f0f0fu;
  bytes = (bytes | bytes >> 4) & 0x00ff00ffu;
  return (bytes | bytes >> 8) & 0xffffu;
}
QUANTOOL_DEVICE uint32_t spread_nibbles(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
}

// Words along a row, of 32 / Stored codes each: word j of row n is words[n * row_stride + j * word_stride]. These are
// codes in bytes, and the rows of compressed-tensors (word_stride 1) and of GPTQ (row_stride 1).
template <int Stored, int Bits>
struct AlongRows {
  uint32_t* words;
  int64_t row_stride, word_stride;

  QUANTOOL_DEVICE uint32_t* at(int64_t row, int64_t column) const {
    return words + row * row_stride + column / (32 / Stored) * word_stride;
  }

  // columns column..column+7 of the tiles, which are columns perm[...] here
  QUANTOOL_DEVICE Eight<Bits> load(int64_t row, int64_t column, const int32_t* perm) const {
    Eight<Bits> codes = {};
    if (perm) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int32_t source = perm[column + i];
        const uint32_t code = *at(row, source) >> source % (32 / Stored) * Stored & ((1u << Bits) - 1);
        codes.word[i * Bits / 32] |= code << i * Bits % 32;
      }
    } else if constexpr (Stored == Bits) {
#pragma unroll
      for (int i = 0; i < Bits / 4; i++) codes.word[i] = at(row, column)[i * word_stride];
    } else {
      codes.word[0] = join_nibbles(*at(row, column)) | join_nibbles(*at(row, column + 4)) << 16;
    }
    return codes;
  }

  QUANTOOL_DEVICE void store(int64_t row, int64_t column, const Eight<Bits>& codes) const {
    if constexpr (Stored == Bits) {
#pragma unroll
      for (int i = 0; i < Bits / 4; i++) at(row, column)[i * word_stride] = codes.word[i];
    } else {
      *at(row, column) = spread_nibbles(codes.word[0] & 0xffffu);
      *at(row, column + 4) = spread_nibbles(codes.word[0] >> 16);
    }
  }
};

// AWQ: word j of a column holds rows 8 j to 8 j + 7, the even ones in its low half. Lane g reads the word of the g-th of
// eight columns, and the eight lanes that differ in g exchange nibbles until each has its row of them.
struct Awq {
  uint32_t* words;
  int64_t words_per_column;

  QUANTOOL_DEVICE Eight<4> load(int64_t row, int64_t column, const int32_t* perm) const {
    const int64_t mine = column + row % 8, source = perm ? perm[mine] : mine;
    const uint32_t word = words[source * words_per_column + row / 8];
    return {{transpose(spread_nibbles(word & 0xffffu) | spread_nibbles(word >> 16) << 4, (int)(row % 8))}};
  }

  QUANTOOL_DEVICE void store(int64_t row, int64_t column, const Eight<4>& codes) const {
    const uint32_t word = transpose(codes.word[0], (int)(row % 8));
    words[(column + row % 8) * words_per_column + row / 8] = join_nibbles(word) | join_nibbles(word >> 4) << 16;
  }

  // Nibble i of lane g goes to nibble g of lane i, one bit of g and i at a time.
  static QUANTOOL_DEVICE uint32_t transpose(uint32_t word, int g) {
    const uint32_t low_nibbles[3] = {0x0f0f0f0fu, 0x00ff00ffu, 0x0000ffffu};  // of which bit b of i is 0
#pragma unroll
    for (int b = 0; b < 3; b++) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, word, 4 << b), low = low_nibbles[b];
      const int shift = 4 << b;
      word = g >> b & 1 ? (word & ~low) | (other & ~low) >> shift : (word & low) | (other & low) << shift;
    }
    return word;
  }
};

// 16 bits of row g and of row g + 8 -> a word of the tile
template <int Bits>
QUANTOOL_DEVICE uint32_t weave(uint32_t a, uint32_t b) {
  if constexpr (Bits == 8) return a | b << 16;
  return (a & 0x0f0fu) | (b & 0x0f0fu) << 4 | (a & 0xf0f0u) << 12 | (b & 0xf0f0u) << 16;
}
template <int Bits>
QUANTOOL_DEVICE void unweave(uint32_t word, uint32_t* a, uint32_t* b) {
  if constexpr (Bits == 8) {
    *a = word & 0xffffu, *b = word >> 16;
  } else {
    *a = (word & 0x0f0fu) | (word >> 12 & 0xf0f0u), *b = (word >> 4 & 0x0f0fu) | (word >> 16 & 0xf0f0u);
  }
}

constexpr int PACK_WARPS = 4;

template <class Form, int Bits>
__global__ void __launch_bounds__(32 * PACK_WARPS)
    pack_tiles(Form form, const int32_t* perm, uint4* tiles, int64_t count, int64_t tiles_per_row) {
  const int64_t tile = (int64_t)blockIdx.x * PACK_WARPS + threadIdx.x / 32;
  if (tile >= count) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = tile / tiles_per_row * 16 + lane / 4, column = tile % tiles_per_row * 64 + lane % 4 * 8;
  uint32_t words[Bits];  // of this lane, half of them per half
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const Eight<Bits> a = form.load(row, column + 32 * h, perm), b = form.load(row + 8, column + 32 * h, perm);
#pragma unroll
    for (int i = 0; i < Bits / 2; i++) {
      const int shift = 16 * (i % 2);
      words[h * Bits / 2 + i] = weave<Bits>(a.word[i / 2] >> shift & 0xffffu, b.word[i / 2] >> shift & 0xffffu);
    }
  }
#pragma unroll
  for (int i = 0; i < Bits / 4; i++)
    tiles[(tile * (Bits / 4) + i) * 32 + lane] =
        make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

template <class Form, int Bits>
__global__ void __launch_bounds__(32 * PACK_WARPS)
    unpack_tiles(const uint4* tiles, Form form, int64_t count, int64_t tiles_per_row) {
  const int64_t tile = (int64_t)blockIdx.x * PACK_WARPS + threadIdx.x / 32;
  if (tile >= count) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = tile / tiles_per_row * 16 + lane / 4, column = tile % tiles_per_row * 64 + lane % 4 * 8;
  uint32_t words[Bits];
#pragma unroll
  for (int i = 0; i < Bits / 4; i++) {
    const uint4 four = load_streaming(tiles + (tile * (Bits / 4) + i) * 32 + lane);
    words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    Eight<Bits> a = {}, b = {};
#pragma unroll
    for (int i = 0; i < Bits / 2; i++) {
      uint32_t of_a, of_b;
      unweave<Bits>(words[h * Bits / 2 + i], &of_a, &of_b);
      a.word[i / 2] |= of_a << 16 * (i % 2), b.word[i / 2] |= of_b << 16 * (i % 2);
    }
    form.store(row, column + 32 * h, a);
    form.store(row + 8, column + 32 * h, b);
  }
}

}  // namespace quantool
