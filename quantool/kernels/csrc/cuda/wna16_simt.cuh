// y = x W^T and W itself, from tiles without tensor cores: what the fast kernels are measured against, and what cards
// older than sm_80 use.
#pragma once
#include "wna16.cuh"

namespace quantool {

// The weights of rows g and g + 8 (upper), columns 32 half + 8t .. + 7 of a tile, in float32: scale * (code - zero).
template <class F>
QUANTOOL_DEVICE void tile_weights(float (&weights)[8], const Wna16& p, int row_tile, int tile, int half, int upper) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  const int64_t at = (int64_t)row_tile * (p.columns / TILE_COLUMNS) + tile;
  const int64_t group = (int64_t)row_tile * p.groups + p.group(tile * F::TILE_SPANS + half * 32 / F::SPAN);
  uint32_t words[4];
  set_words(words, static_cast<const uint4*>(p.tiles)[at * F::CHUNKS + tile_chunk<F::BITS>(half) + lane]);
  const uint32_t scales = static_cast<const uint32_t*>(p.scales)[group * 8 + g];
  const float scale = upper ? F::Scale::high(scales) : F::Scale::low(scales);
  const int zero = F::ZEROS ? static_cast<const uint8_t*>(p.zeros)[(group * 8 + g) * 2 + upper] : 1 << (F::BITS - 1);
#pragma unroll
  for (int c = 0; c < 8; c++) weights[c] = scale * (float)((int)tile_code<F::BITS>(words, half, upper, c) - zero);
}

// A warp to a row tile and a token; lane (g, t) adds up its columns of rows g and g + 8.
template <class F>
__global__ void __launch_bounds__(128) wna16_simt(const Wna16 p) {
  using T = typename F::T;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row_tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row_tile >= p.rows / TILE_ROWS) return;
  for (int token = blockIdx.y; token < p.tokens; token += gridDim.y) {
    const uint4* x = static_cast<const uint4*>(p.x) + (int64_t)token * (p.columns / 8) + t;
    float sums[2] = {};
    for (int half = 0; half < p.columns / 32; half++) {
      const uint4 pairs = x[half * 4];
      const float values[8] = {T::low(pairs.x), T::high(pairs.x), T::low(pairs.y), T::high(pairs.y),
                               T::low(pairs.z), T::high(pairs.z), T::low(pairs.w), T::high(pairs.w)};
      for (int upper = 0; upper < 2; upper++) {
        float weights[8];
        tile_weights<F>(weights, p, row_tile, half / 2, half % 2, upper);
#pragma unroll
        for (int c = 0; c < 8; c++) sums[upper] += weights[c] * values[c];
      }
    }
    for (int upper = 0; upper < 2; upper++) {
      for (int lanes = 1; lanes < 4; lanes *= 2) sums[upper] += __shfl_xor_sync(0xffffffffu, sums[upper], lanes);
      const int row = row_tile * TILE_ROWS + g + 8 * upper;
      const float bias = p.bias ? T::low(static_cast<const uint16_t*>(p.bias)[row]) : 0;
      if (t == 0) static_cast<uint16_t*>(p.y)[(int64_t)token * p.rows + row] = (uint16_t)T::pair(sums[upper] + bias, 0);
    }
  }
}

// W [rows, columns] in 16 bits, rounded once. A warp to a tile; of every row, four lanes write 64 bytes at a time. `w`
// is no part of p, so that __restrict__ lets loads pass stores. Fewer than 2^32 tiles: 64 bits are slow to divide.
template <class F>
__global__ void __launch_bounds__(256) wna16_dequantize(const Wna16 p, uint4* __restrict__ w) {
  using T = typename F::T;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, tiles = p.columns / TILE_COLUMNS;
  const int row_tile = (int)(at / tiles), tile = (int)(at % tiles);
  if (row_tile >= p.rows / TILE_ROWS) return;
#pragma unroll
  for (int upper = 0; upper < 2; upper++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float v[8];
      tile_weights<F>(v, p, row_tile, tile, half, upper);
      const int64_t row = (int64_t)row_tile * TILE_ROWS + g + 8 * upper;
      w[row * (p.columns / 8) + tile * 8 + half * 4 + t] =
          make_uint4(T::pair(v[0], v[1]), T::pair(v[2], v[3]), T::pair(v[4], v[5]), T::pair(v[6], v[7]));
    }
}

}  // namespace quantool
