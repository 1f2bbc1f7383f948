// Weights of 4-bit levels (nf4, fp4), as bitsandbytes stores them:
//
//   W.flatten()[i] = table[code i] * absmax[i / block_size]     codes two to a byte, the first in the high half
//
// nf4_dequantize writes W, rounded once from float32: the numbers of bitsandbytes. nf4_gemv multiplies up to 8 tokens
// by W without writing it.
#pragma once
#include "device.cuh"

namespace quantool {

constexpr int DEQUANTIZE_THREADS = 256;
constexpr int DEQUANTIZE_SHARED = 16 * sizeof(float);

// A thread turns 4 bytes into 8 weights; the last may be fewer. block_size % 8 == 0, count <= 2^34: 64 bits are slow
// to divide.
template <class Float>
__global__ void __launch_bounds__(DEQUANTIZE_THREADS)
    nf4_dequantize(const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
                   const float* __restrict__ table, uint16_t* __restrict__ weight, int64_t count,
                   uint32_t eights_of_block) {
  float* levels = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x < 16) levels[threadIdx.x] = table[threadIdx.x];
  __syncthreads();
  const uint32_t eight = blockIdx.x * DEQUANTIZE_THREADS + threadIdx.x;
  const int64_t first = 8 * (int64_t)eight;
  if (first >= count) return;
  const float scale = absmax[eight / eights_of_block];
  const auto pair = [&](uint32_t byte) {
    return Float::pair(__fmul_rn(levels[byte >> 4 & 15], scale), __fmul_rn(levels[byte & 15], scale));
  };
  if (first + 8 <= count) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + first / 2);
    *reinterpret_cast<uint4*>(weight + first) = {pair(word), pair(word >> 8), pair(word >> 16), pair(word >> 24)};
    return;
  }
  for (int64_t i = first; i < count; i++) {
    const uint32_t both = pair(codes[i / 2]);
    weight[i] = (uint16_t)(i % 2 ? both >> 16 : both);
  }
}

constexpr int GEMV_WARPS = 8;
constexpr int GEMV_ROWS = 16;     // of a block
constexpr int GEMV_TOKENS = 8;    // at most
constexpr int GEMV_COLUMNS = 64;  // that a warp takes at once: in one block of absmax, in every row
constexpr int GEMV_AHEAD = 4;     // times that it loads before it computes

// The two levels of every byte as a pair of 16-bit floats, in shared memory. Every lane has a copy of the 256 pairs in a
// bank of its own, so that 32 look-ups take one cycle: a byte costs a shift, a LOP3 and a load, where to permute the
// bytes of levels in registers costs four instructions a code, more than an H200 has time for.
//
//   byte 0: lane 0, lane 1, .. lane 31  |  byte 1: lane 0, ..                   128 bytes each
constexpr int PAIRS_SHARED = 256 * 128;
constexpr int GEMV_SHARED = PAIRS_SHARED;  // and in the end the sums
static_assert(GEMV_WARPS * GEMV_ROWS * GEMV_TOKENS * sizeof(float) <= GEMV_SHARED, "the sums have room");

template <class Float>
QUANTOOL_DEVICE void write_pairs(uint8_t* pairs, const float* table) {
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    const uint32_t pair = Float::pair(table[byte >> 4], table[byte & 15]);  // the first code is the high half
    uint4* copies = reinterpret_cast<uint4*>(pairs + 128 * byte);
#pragma unroll
    for (int i = 0; i < 8; i++) copies[(i + byte) % 8] = make_uint4(pair, pair, pair, pair);  // eight lanes, all banks
  }
}

// The levels of 8 codes in the order of memory, as four pairs.
QUANTOOL_DEVICE void look_up(const uint8_t* pairs, uint32_t codes, uint32_t (&found)[4]) {
  const uint32_t mine = threadIdx.x % 32 * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t shifted = i ? codes >> (8 * i - 7) : codes << 7;  // 128 times byte i
    found[i] = *reinterpret_cast<const uint32_t*>(pairs + and_or(shifted, 0x7F80u, mine));
  }
}

// y [tokens, rows] = x [tokens, columns] W^T + bias. Levels are the A operand of mma, 16 rows, and tokens its B:
// products with levels, rounded to the dtype of x, are summed in float32 over 64 columns, then scaled in float32.
//
//   lane g of eight has rows 2g and 2g+1 (as rows g and g+8 of an mma), lane t of four columns 16t to 16t+15 of the 64:
//   8 bytes of codes for each row, 32 bytes of x of token g. mma v takes of them columns 4v to 4v+3.
//
// A block of absmax is 64 << block_shift columns, and a row a whole number of blocks; rows % 2 == 0.
template <class Float>
__global__ void __launch_bounds__(32 * GEMV_WARPS)
    nf4_gemv(const uint4* __restrict__ x, const uint2* __restrict__ codes, const float* __restrict__ absmax,
             const float* __restrict__ table, const uint16_t* __restrict__ bias, uint32_t* __restrict__ y, int tokens,
             int rows, int columns, int block_shift) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = blockIdx.x * GEMV_ROWS + 2 * g, steps = columns / GEMV_COLUMNS, blocks = steps >> block_shift;
  const int64_t line = row < rows ? row : 0;  // what is computed for rows and tokens that are none, is not stored
  uint8_t* pairs = shared_memory();
  write_pairs<Float>(pairs, table);
  __syncthreads();
  x += (int64_t)(g < tokens ? g : 0) * (columns / 8) + 2 * t;
  codes += line * (columns / 16) + t;
  absmax += line * blocks;

  float sum[4] = {};
  const auto multiply = [&](int step, const uint2& even, const uint2& odd) {
    const uint4 values[2] = {x[8 * step], x[8 * step + 1]};
    const float scale_even = absmax[step >> block_shift], scale_odd = absmax[(step >> block_shift) + blocks];
    float d[4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t a[4], b[4];
      look_up(pairs, half ? even.y : even.x, a);
      look_up(pairs, half ? odd.y : odd.x, b);
      const uint32_t v0[4] = {a[0], b[0], a[1], b[1]}, v1[4] = {a[2], b[2], a[3], b[3]};
      Float::mma(d, v0, values[half].x, values[half].y);
      Float::mma(d, v1, values[half].z, values[half].w);
    }
    sum[0] += scale_even * d[0], sum[1] += scale_even * d[1], sum[2] += scale_odd * d[2], sum[3] += scale_odd * d[3];
  };
  int step = warp;
  for (; step + (GEMV_AHEAD - 1) * GEMV_WARPS < steps; step += GEMV_AHEAD * GEMV_WARPS) {
    uint2 even[GEMV_AHEAD], odd[GEMV_AHEAD];
#pragma unroll
    for (int u = 0; u < GEMV_AHEAD; u++) {
      even[u] = codes[4 * (step + u * GEMV_WARPS)];
      odd[u] = codes[4 * (step + u * GEMV_WARPS) + columns / 16];
    }
#pragma unroll
    for (int u = 0; u < GEMV_AHEAD; u++) multiply(step + u * GEMV_WARPS, even[u], odd[u]);
  }
#pragma unroll 1
  for (; step < steps; step += GEMV_WARPS) multiply(step, codes[4 * step], codes[4 * step + columns / 16]);

  // the sums of the warps, in order: [warp][token][row]
  __syncthreads();
  float* sums = reinterpret_cast<float*>(pairs);
#pragma unroll
  for (int i = 0; i < 4; i++)
    sums[(warp * GEMV_TOKENS + 2 * t + i % 2) * GEMV_ROWS + 2 * g + i / 2] = sum[i];
  __syncthreads();
  const int token = threadIdx.x / (GEMV_ROWS / 2), pair = threadIdx.x % (GEMV_ROWS / 2) * 2;
  const int out = blockIdx.x * GEMV_ROWS + pair;
  if (token >= tokens || out >= rows) return;
  float first = 0, second = 0;
#pragma unroll
  for (int w = 0; w < GEMV_WARPS; w++) {
    first += sums[(w * GEMV_TOKENS + token) * GEMV_ROWS + pair];
    second += sums[(w * GEMV_TOKENS + token) * GEMV_ROWS + pair + 1];
  }
  if (bias) first += Float::low(bias[out]), second += Float::low(bias[out + 1]);
  y[((int64_t)token * rows + out) / 2] = Float::pair(first, second);
}

}  // namespace quantool
