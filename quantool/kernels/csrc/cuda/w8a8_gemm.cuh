// products [tokens, rows] = codes [tokens, columns] times weight [rows, columns] transposed, int8 to int32, exact.
//
// Weights are the A operand of mma.m16n8k32 and tokens its B, so that 8 tokens fill one. A block owns ROWS x TOKENS
// products and walks over K in steps of DEPTH = 64 * WARPS_K columns, of which every group of warps takes its own 64:
// a slab. Four steps are in shared memory or on their way there (cp.async). The groups add their sums at the end.
//
//   which rows an mma multiplies is free: its row r is weight row 2r, its row r + 8 weight row 2r + 1, so that a lane
//   ends with neighbours of the result
//
//   a slab in shared memory, 128 bytes (all banks) across: two lines of four chunks of 16 bytes. `place` shuffles the
//   chunks of every pair of lines by another number, so that a chunk of lines 0, 1, .. 7 (tokens) and one of lines
//   0, 2, .. 14 (weights) are in different banks, as ldmatrix reads them; and all of a pair, as it is written:
//
//     | 0.0  0.1  0.2  0.3  1.0  1.1  1.2  1.3 |    line.chunk
//     | 2.1  2.0  2.3  2.2  3.1  3.0  3.3  3.2 |
//     | 4.2  4.3  4.0  4.1  5.2 ...
//
// With `products` the sums of split blockIdx.z are written to its plane [tokens, rows]. Else they are scaled: w8a8.cuh.
// columns % 16 == 0 and rows % 2 == 0; columns * 128 * 128 < 2^31, or sums overflow.
#pragma once
#include "w8a8.cuh"

namespace quantool {

constexpr int SLAB = 64;        // bytes of a line
constexpr int GEMM_STAGES = 4;  // steps in shared memory

// WARPS_N x WARPS_M warps, a group, share the products of a block; there are WARPS_K groups.
template <int ROWS_, int TOKENS_, int WARPS_N_, int WARPS_M_, int WARPS_K_>
struct GemmTile {
  static constexpr int ROWS = ROWS_, TOKENS = TOKENS_, WARPS_N = WARPS_N_, WARPS_M = WARPS_M_, WARPS_K = WARPS_K_;
  static constexpr int GROUP = 32 * WARPS_N * WARPS_M, THREADS = GROUP * WARPS_K, DEPTH = SLAB * WARPS_K;
  static constexpr int NI = ROWS / WARPS_N / 16, MJ = TOKENS / WARPS_M / 8;  // mma of a warp
  static constexpr int STAGE = (ROWS + TOKENS) * DEPTH;
  static constexpr int SHARED = GEMM_STAGES * STAGE;
  static_assert(ROWS * WARPS_K % (THREADS / 4) == 0 && TOKENS * WARPS_K % (THREADS / 4) == 0, "whole passes of copies");
  static_assert(THREADS / 4 % 16 == 0, "passes keep the place of a chunk among its pair");
  static_assert((WARPS_K - 1) * GROUP * NI * MJ * 16 <= SHARED, "sums of the other groups fit into the stages");
};

// Of 16 bytes of a slab: the byte they begin at.
QUANTOOL_DEVICE int place(int line, int chunk) {
  const int pair = line / 2;
  return pair * 128 + ((line % 2 * 4 + chunk) ^ pair % 8) * 16;
}

// What a thread copies of one operand in every step: 16 bytes of each PASS lines or, where a pass has more than LINES
// lines, of several slabs. All that differs between its passes is known to the compiler.
template <int LINES, class Tile>
struct SlabCopy {
  static constexpr int PASS = Tile::THREADS / 4;
  const int8_t* from;  // at the first column
  int to, column, lines_left;

  QUANTOOL_DEVICE SlabCopy(const int8_t* operand, int first_line, int lines, int columns) {
    const int line = threadIdx.x / 4 % LINES, chunk = threadIdx.x % 4, slab = threadIdx.x / (4 * LINES);
    column = slab * SLAB + chunk * 16;
    from = operand + (int64_t)(first_line + line) * columns + column;
    to = slab * LINES * SLAB + place(line, chunk);
    lines_left = lines - first_line - line;
  }

  // Lines past the last and columns past `columns` become zeros.
  QUANTOOL_DEVICE void begin(uint8_t* stage, int first_column, int columns) const {
#pragma unroll
    for (int i = 0; i < LINES * Tile::WARPS_K / PASS; i++) {
      const int line = LINES > PASS ? i % (LINES / PASS) * PASS : 0;
      const int slab = LINES > PASS ? i / (LINES / PASS) : i * (PASS / LINES);
      copy_async(stage + to + (slab * LINES + line) * SLAB, from + (int64_t)line * columns + first_column + slab * SLAB,
                 line < lines_left && first_column + column + slab * SLAB < columns);
    }
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS)
    w8a8_gemm(const int8_t* __restrict__ codes, const int8_t* __restrict__ weight, int32_t* __restrict__ products,
              Scaling scaling, int tokens, int rows, int columns) {
  constexpr int ROWS = Tile::ROWS, TOKENS = Tile::TOKENS, NI = Tile::NI, MJ = Tile::MJ;
  uint8_t* shared = shared_memory();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group = threadIdx.x / Tile::GROUP, warp = threadIdx.x % Tile::GROUP / 32;
  const int warp_row = warp % Tile::WARPS_N * (16 * NI), warp_token = warp / Tile::WARPS_N * (8 * MJ);
  const int first_row = blockIdx.y * ROWS, first_token = blockIdx.x * TOKENS;
  const unsigned all = (columns + Tile::DEPTH - 1) / Tile::DEPTH;  // at most 2^11, of at most 2^16 splits
  const int begin = all * blockIdx.z / gridDim.z, end = all * (blockIdx.z + 1) / gridDim.z;
  const SlabCopy<ROWS, Tile> copy_weight(weight, first_row, rows, columns);
  const SlabCopy<TOKENS, Tile> copy_codes(codes, first_token, tokens, columns);

  const auto stage_of = [&](int step) { return shared + (unsigned)(step - begin) % GEMM_STAGES * Tile::STAGE; };
  const auto copy_step = [&](int step) {
    if (step < end) {
      copy_weight.begin(stage_of(step), step * Tile::DEPTH, columns);
      copy_codes.begin(stage_of(step) + ROWS * Tile::DEPTH, step * Tile::DEPTH, columns);
    }
    copy_async_commit();  // an empty group too, so that the count below is right at the end
  };

  int32_t sum[NI][MJ][4] = {};
  for (int s = 0; s < GEMM_STAGES - 1; s++) copy_step(begin + s);
  for (int step = begin; step < end; step++) {
    copy_async_wait<GEMM_STAGES - 2>();
    __syncthreads();  // this step is there, and nobody reads the one before, whose place the next copy takes
    copy_step(step + GEMM_STAGES - 1);
    const uint8_t* a = stage_of(step) + group * ROWS * SLAB;
    const uint8_t* b = stage_of(step) + ROWS * Tile::DEPTH + group * TOKENS * SLAB;
    uint32_t of_tokens[MJ][4];  // two words for each mma over 32 of the slab's columns
#pragma unroll
    for (int j = 0; j < MJ; j++) load_matrices(of_tokens[j], b + place(warp_token + 8 * j + lane % 8, lane / 8));
#pragma unroll
    for (int i = 0; i < NI; i++)
#pragma unroll
      for (int v = 0; v < 2; v++) {
        uint32_t of_rows[4];
        const int line = warp_row + 16 * i + 2 * (lane % 8) + lane / 8 % 2;
        load_matrices(of_rows, a + place(line, 2 * v + lane / 16));
#pragma unroll
        for (int j = 0; j < MJ; j++) mma_s8(sum[i][j], of_rows, of_tokens[j][2 * v], of_tokens[j][2 * v + 1]);
      }
  }

  if constexpr (Tile::WARPS_K > 1) {  // the groups meet in shared memory
    int32_t* others = reinterpret_cast<int32_t*>(shared) + threadIdx.x % Tile::GROUP;
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < NI * MJ * 4; i++)
      if (group) others[((group - 1) * NI * MJ * 4 + i) * Tile::GROUP] = sum[i / 4 / MJ][i / 4 % MJ][i % 4];
    __syncthreads();
    if (group) return;
#pragma unroll
    for (int i = 0; i < NI * MJ * 4; i++)
      for (int k = 0; k < Tile::WARPS_K - 1; k++)
        sum[i / 4 / MJ][i / 4 % MJ][i % 4] += others[(k * NI * MJ * 4 + i) * Tile::GROUP];
  }

#pragma unroll
  for (int i = 0; i < NI; i++) {
    const int row = first_row + warp_row + 16 * i + 2 * g;
    if (row >= rows) continue;
    const RowPair pair = products ? RowPair{} : load_rows(scaling, row);
#pragma unroll
    for (int j = 0; j < MJ; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int token = first_token + warp_token + 8 * j + 2 * t + e;
        if (token >= tokens) continue;
        const int32_t even = sum[i][j][e], odd = sum[i][j][2 + e];
        const int64_t at = (int64_t)token * rows + row;
        if (products) {
          int32_t* plane = products + (int64_t)blockIdx.z * tokens * rows;
          *reinterpret_cast<uint2*>(plane + at) = make_uint2(even, odd);
        } else {
          store_rows(scaling, pair, at, scaling.steps[token] * even, scaling.steps[token] * odd);
        }
      }
  }
}

constexpr int FINISH_THREADS = 256;

// From products int32 [splits, planes, rows]: planes is tokens, or with zeros tokens + 1, and the last of a split has
// the sums of the weight's rows. (code - zero) * weight fits int32 where it is summed over 2^31 / (255 * 128) columns,
// so what overflows on the way there, wraps back.
__global__ void __launch_bounds__(FINISH_THREADS)
    w8a8_finish(const int32_t* __restrict__ products, const int32_t* __restrict__ zeros, Scaling scaling, int tokens,
                int rows, int splits) {
  const int row = 2 * (blockIdx.y * FINISH_THREADS + threadIdx.x), token = blockIdx.x;
  if (row >= rows) return;
  const int planes = zeros ? tokens + 1 : tokens;
  const uint32_t zero = zeros ? zeros[token] : 0;
  uint32_t even = 0, odd = 0;
#pragma unroll 1
  for (int s = 0; s < splits; s++) {
    const int32_t* plane = products + (int64_t)s * planes * rows + row;
    const uint2 pair = *reinterpret_cast<const uint2*>(plane + (int64_t)token * rows);
    even += pair.x, odd += pair.y;
    if (zeros) {
      const uint2 ones = *reinterpret_cast<const uint2*>(plane + (int64_t)tokens * rows);
      even -= zero * ones.x, odd -= zero * ones.y;
    }
  }
  const float step = scaling.steps[token];
  store_rows(scaling, load_rows(scaling, row), (int64_t)token * rows + row, step * (int32_t)even, step * (int32_t)odd);
}

}  // namespace quantool
