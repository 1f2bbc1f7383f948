// Where the codes of a weight are, and how the tensor cores get them.
//
// W [rows, columns] is cut into tiles of 16 x 64, stored one after another, a row of tiles at a time. Every lane of a
// warp owns 32 codes of a tile, the ones it has to hand to mma.m16n8k16 as its part of A. With g = lane / 4, t = lane %
// 4 these are rows g and g + 8, and columns 8t .. 8t + 7 of either half of 32 columns:
//
//             half 0: columns 0..31               half 1: columns 32..63
//           | t=0   | t=1   | t=2   | t=3   |   | t=0   | t=1   | t=2   | t=3   |
//   row 0   | lane 0| lane 1| lane 2| lane 3|   | lane 0| lane 1| lane 2| lane 3|
//   row 1   | lane 4| lane 5| ...                 and row 8 as row 0, row 9 as row 1, ...
//
// An mma adds 16 columns in any order, as long as A and x agree. Step v = 2 half + e takes four of the eight columns of
// every t: c = 8t + 4e + 2p + i, where p is the pair (registers j = 0, 1 of A hold pair 0 of rows g and g + 8,
// registers 2, 3 pair 1) and i the place in the pair. So one 16-byte load of x at column 32 half + 8t is B of the two
// steps of a half.
//
//   4 bits, 512 bytes:  [lane 32][step 4] words            8 bits, 1024 bytes:  [half 2][lane 32][e 2][p 2] words
//     bit  28  24  20  16  12   8   4   0                    byte      3         2        1        0
//     j,i  3,1 2,1 1,1 0,1 3,0 2,0 1,0 0,0                   row,i  g+8, 1    g+8, 0    g, 1     g, 0
//
// Scales and zeros are [row of tiles][group][g 8][2], rows g and g + 8 side by side: one word of two 16-bit scales.
#pragma once
#include "device.cuh"

namespace quantool {

constexpr int TILE_ROWS = 16, TILE_COLUMNS = 64;
template <int BITS>
constexpr int TILE_CHUNKS = 8 * BITS;  // of 16 bytes

// The 16 bytes of a lane that hold a half of its codes; with 4 bits both halves are in the same.
template <int BITS>
QUANTOOL_HD int tile_chunk(int half) {
  return BITS == 4 ? 0 : 32 * half;
}

QUANTOOL_HD void set_words(uint32_t (&words)[4], const uint4& chunk) {
  words[0] = chunk.x, words[1] = chunk.y, words[2] = chunk.z, words[3] = chunk.w;
}

// The code of row g or (upper) g + 8 and column 32 half + 8t + c, from those words.
template <int BITS>
QUANTOOL_HD uint32_t tile_code(const uint32_t (&words)[4], int half, int upper, int c) {
  const int e = c >> 2, p = c >> 1 & 1, i = c & 1;
  if (BITS == 4) return words[2 * half + e] >> (4 * (2 * p + upper) + 16 * i) & 15;
  return words[2 * e + p] >> (8 * (2 * upper + i)) & 255;
}

// From those words to A of step (half, e): code - zero, exact in 16 bits, as pairs. Each way writes the bits of a code
// into the mantissa of a float whose last bit is worth 1, and then subtracts that float and the zero at once. `offset`
// is minus both, as a pair (or a float), of row g and of row g + 8. Zeros go up to 2^BITS.
template <class T, int BITS>
struct Codes;

template <>
struct Codes<BF16, 4> {
  // -(128 + zero)
  static QUANTOOL_DEVICE uint32_t offset(int, uint32_t zero) { return 0xC300C300u + zero * 0x00010001u; }
  static QUANTOOL_DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[4], int half, int e,
                                       const uint32_t (&offsets)[2]) {
    for (int j = 0; j < 4; j++) {
      const uint32_t magic = and_or(words[2 * half + e] >> (4 * j), 0x000F000Fu, 0x43004300u);  // 128 + code
      a[j] = BF16::fma(magic, 0x3F803F80u, offsets[j & 1]);
    }
  }
};

template <>
struct Codes<FP16, 4> {  // ten bits of mantissa: rows g + 8 stay four bits up, at 1024 + 16 code, and fma divides by 16
  static QUANTOOL_DEVICE uint32_t offset(int upper, uint32_t zero) {
    return upper ? 0xD400D400u + zero * 0x00100010u   // -(64 + zero)
                 : 0xE400E400u + zero * 0x00010001u;  // -(1024 + zero)
  }
  static QUANTOOL_DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[4], int half, int e,
                                       const uint32_t (&offsets)[2]) {
    for (int p = 0; p < 2; p++) {
      const uint32_t word = words[2 * half + e] >> (8 * p);
      a[2 * p] = FP16::fma(and_or(word, 0x000F000Fu, 0x64006400u), 0x3C003C00u, offsets[0]);
      a[2 * p + 1] = FP16::fma(and_or(word, 0x00F000F0u, 0x64006400u), 0x2C002C00u, offsets[1]);
    }
  }
};

template <>
struct Codes<BF16, 8> {  // 8 bits are too many for that: by way of float32, whose upper half then is the bfloat16
  // -(2^23 + zero), a float32
  static QUANTOOL_DEVICE uint32_t offset(int, uint32_t zero) { return 0xCB000000u + zero; }
  static QUANTOOL_DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[4], int, int e,
                                       const uint32_t (&offsets)[2]) {
    for (int j = 0; j < 4; j++) {
      const uint32_t word = words[2 * e + (j >> 1)], byte = 2 * (j & 1);
      const float offset = __uint_as_float(offsets[j & 1]);
      const float low = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 + byte)) + offset;
      const float high = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7441 + byte)) + offset;
      a[j] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
    }
  }
};

template <>
struct Codes<FP16, 8> {
  static QUANTOOL_DEVICE uint32_t offset(int, uint32_t zero) { return 0xE400E400u + zero * 0x00010001u; }
  static QUANTOOL_DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[4], int, int e,
                                       const uint32_t (&offsets)[2]) {
    for (int j = 0; j < 4; j++) {
      const uint32_t magic = __byte_perm(words[2 * e + (j >> 1)], 0x64646464u, j & 1 ? 0x4342 : 0x4140);
      a[j] = FP16::fma(magic, 0x3C003C00u, offsets[j & 1]);  // 1024 + code
    }
  }
};

}  // namespace quantool
