// What the kernels of y = x W^T + bias with 4- and 8-bit W share: their arguments, scales, the end of a sum, the choice
// among their instances.
//
// The columns of a row are cut into spans, runs within one group: codes and x are multiplied and added in the tensor
// cores from zero for each span, exact products in float32 sums, and a span enters the sum of its row by one float32
// multiplication with the scale. So the 16-bit scales cost no accuracy, and little time.
#pragma once
#include "tiles.cuh"

namespace quantool {

// span / divisor by a multiplication: floor((2 span + 1) / (2 divisor)). Exact while span * divisor < 2^31.
struct Quotient {
  uint32_t reciprocal;
  explicit Quotient(uint32_t divisor) : reciprocal((1u << 31) / divisor + 1) {}
  QUANTOOL_HD int operator()(uint32_t span) const { return (int)((uint64_t)(2 * span) * reciprocal >> 32); }
};

struct Wna16 {
  const void* x;      // [tokens, columns]
  const void* tiles;  // tiles.cuh
  const void* scales;
  const void* zeros;  // null: 2^(bits - 1)
  const void* bias;   // [rows] or null
  void* y;            // [tokens, rows]
  float* partials;    // [splits, tokens, rows], when splits > 1
  int tokens, rows, columns, splits;
  int span, groups;  // columns of a span, groups of a row
  Quotient group;    // of a span
};

// The tiles begin..end-1 of a row of tiles that belong to one of `splits` parts.
struct TileRange {
  int begin, end;
  QUANTOOL_HD TileRange(const Wna16& p, int split) {
    const uint32_t tiles = p.columns / TILE_COLUMNS, splits = p.splits;  // below 2^14 and 2^16
    begin = tiles * split / splits, end = tiles * (split + 1) / splits;
  }
};

// What a kernel is compiled for. SPAN is 64 columns, a tile, or 32 where groups are no multiples of 64.
template <class T_, class Scale_, int BITS_, int SPAN_, bool ZEROS_>
struct Format {
  using T = T_;
  using Scale = Scale_;
  using Code = Codes<T_, BITS_>;
  static constexpr int BITS = BITS_, SPAN = SPAN_, CHUNKS = TILE_CHUNKS<BITS_>, TILE_SPANS = TILE_COLUMNS / SPAN_;
  static constexpr bool ZEROS = ZEROS_;
};

// One thread's part in bringing the scales and zeros of ROW_TILES x SPANS spans to shared memory, 16 bytes a thread:
//
//   scales [row tile][span][g][2], 32 bytes a span  |  zeros [row tile][span][g][2], 16 bytes a span
//
// A span past the end gets scales of 0, and so drops out of the sums, whatever its codes and zeros are. Row tiles past
// the end repeat the last one; they are not stored.
template <class F, int ROW_TILES, int SPANS>
struct GroupCopy {
  static constexpr int COUNT = ROW_TILES * SPANS, PIECES = (F::ZEROS ? 3 : 2) * COUNT, BYTES = 16 * PIECES;
  int piece, span, row_groups;  // groups of the rows before

  QUANTOOL_DEVICE GroupCopy(const Wna16& p, int piece_, int row_tile) : piece(piece_) {
    const int at = piece < 2 * COUNT ? piece / 2 : piece - 2 * COUNT;
    const int last = p.rows / TILE_ROWS - 1, mine = row_tile + at / SPANS;
    span = at % SPANS, row_groups = (mine < last ? mine : last) * p.groups;
  }

  QUANTOOL_DEVICE void operator()(const Wna16& p, uint8_t* shared, int first_span, int end_span) const {
    if (piece >= PIECES) return;
    const int64_t group = row_groups + p.group(first_span + span);
    const uint4* from = piece < 2 * COUNT ? static_cast<const uint4*>(p.scales) + 2 * group + piece % 2
                                          : static_cast<const uint4*>(p.zeros) + group;
    copy_async(shared + 16 * piece, from, first_span + span < end_span);
  }
};

// sums += a tile column of ROW_TILES row tiles times x. A lane's part of it, in shared memory: its codes, the scales
// and zeros of rows g and g + 8 of the first span, and the distances to the next row tile. x(half, n) is B of the n-th
// eight tokens.
struct TileColumn {
  const uint4* codes;
  const uint32_t* scales;
  const uint16_t* zeros;
  int next_codes, next_spans;
};

template <class F, int ROW_TILES, int N, class X>
QUANTOOL_DEVICE void multiply(const TileColumn& w, X x, float (&sums)[ROW_TILES][N][4]) {
  constexpr uint32_t SYMMETRIC = 1u << (F::BITS - 1);
  uint32_t words[ROW_TILES][4], offsets[ROW_TILES][2];
  float products[ROW_TILES][N][4];
  // How many halves are in one piece of code. For many tokens nvcc would read what both need at once, and run out of
  // 128 registers; with 4 bits the second half then moves to where the first was, as registers cannot be indexed.
  constexpr int HALVES = N > 2 && F::SPAN == 32 ? 1 : 2;
#pragma unroll HALVES
  for (int half = 0; half < 2; half++) {
    const bool starts = half * 32 % F::SPAN == 0, ends = (half + 1) * 32 % F::SPAN == 0;
    uint32_t a[ROW_TILES][2][4];
    float scales[ROW_TILES][2];
    if (N > 2 && HALVES == 2) __syncwarp();  // against the same
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      const int span = r * w.next_spans + half * 32 / F::SPAN;
      if (half == 0 || F::BITS == 8 || HALVES == 1)
        set_words(words[r], w.codes[r * w.next_codes + tile_chunk<F::BITS>(half)]);
      if (F::BITS == 4 && HALVES == 1 && half) words[r][0] = words[r][2], words[r][1] = words[r][3];
      if (starts) {
        const uint32_t zero = F::ZEROS ? w.zeros[span * 8] : SYMMETRIC * 0x0101u;
        offsets[r][0] = F::Code::offset(0, zero & 255), offsets[r][1] = F::Code::offset(1, zero >> 8);
      }
      if (ends) scales[r][0] = F::Scale::low(w.scales[span * 8]), scales[r][1] = F::Scale::high(w.scales[span * 8]);
#pragma unroll
      for (int e = 0; e < 2; e++) F::Code::fragment(a[r][e], words[r], HALVES == 1 ? 0 : half, e, offsets[r]);
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
      const uint4 b = x(half, n);
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        if (starts)
          for (int i = 0; i < 4; i++) products[r][n][i] = 0;
        F::T::mma(products[r][n], a[r][0], b.x, b.y);
        F::T::mma(products[r][n], a[r][1], b.z, b.w);
        if (ends)
          for (int i = 0; i < 4; i++) sums[r][n][i] += scales[r][i / 2] * products[r][n][i];
      }
    }
  }
}

// Two sums of a token in neighbouring rows: into y, or into the partials of a split.
template <class T>
QUANTOOL_DEVICE void store(const Wna16& p, int split, int token, int row, float2 sums) {
  const int64_t pair = ((int64_t)token * p.rows + row) / 2;
  if (p.splits > 1) {
    reinterpret_cast<float2*>(p.partials)[(int64_t)split * p.tokens * (p.rows / 2) + pair] = sums;
  } else {
    const uint32_t bias = p.bias ? static_cast<const uint32_t*>(p.bias)[row / 2] : 0;
    static_cast<uint32_t*>(p.y)[pair] = T::pair(sums.x + T::low(bias), sums.y + T::high(bias));
  }
}

// The end of a block: warps put the sums of their mma fragments side by side into shared memory as [warp][token][row],
// and after a barrier the block adds up what `warps` of them have of the same rows and tokens. Rows are four words
// longer than they need to be: the lanes (g, t) of a fragment write to words 8t + g of 32, each to its own bank.
template <int ROWS>
constexpr int SUM_STRIDE = ROWS + 4;

template <int ROWS>
QUANTOOL_DEVICE void put_sums(float* shared, int token, int row, const float (&sums)[4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; i++) shared[(token + 2 * t + i % 2) * SUM_STRIDE<ROWS> + row + g + 8 * (i / 2)] = sums[i];
}

template <class T, int ROWS, int TOKENS>
QUANTOOL_DEVICE void add_and_store(const Wna16& p, const float* shared, int warps) {
  for (int i = threadIdx.x; i < TOKENS * ROWS / 2; i += blockDim.x) {
    const int token = i / (ROWS / 2), row = i % (ROWS / 2) * 2, first = blockIdx.x * ROWS;
    if (token >= p.tokens || first + row >= p.rows) continue;
    float2 sums = make_float2(0, 0);
    for (int warp = 0; warp < warps; warp++) {
      const float* from = shared + (warp * TOKENS + token) * SUM_STRIDE<ROWS> + row;
      sums.x += from[0], sums.y += from[1];
    }
    store<T>(p, blockIdx.y, token, first + row, sums);
  }
}

// y from the partials, added in the order of the splits.
template <class T>
__global__ void __launch_bounds__(128) wna16_reduce(Wna16 p) {
  const int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, pairs = (int64_t)p.tokens * (p.rows / 2);
  if (pair >= pairs) return;
  float2 sums = make_float2(0, 0);
  for (int split = 0; split < p.splits; split++) {
    const float2 partial = reinterpret_cast<const float2*>(p.partials)[split * pairs + pair];
    sums.x += partial.x, sums.y += partial.y;
  }
  p.splits = 1;
  store<T>(p, 0, (int)(pair / (p.rows / 2)), (int)(pair % (p.rows / 2)) * 2, sums);
}

template <class T>
int reduce(const Wna16& p, void* stream) {
  if (p.splits == 1) return 0;
  const int64_t pairs = (int64_t)p.tokens * (p.rows / 2);
  return launch(wna16_reduce<T>, dim3((unsigned)((pairs + 127) / 128)), dim3(128), 0, stream, p);
}

// Whether there are kernels for these shapes at all.
inline bool fits(int64_t tokens, int64_t rows, int64_t columns, int64_t group, int64_t splits, const void* partials) {
  return tokens >= 1 && rows >= TILE_ROWS && rows % TILE_ROWS == 0 && rows <= 1 << 30 && columns >= TILE_COLUMNS &&
         columns % TILE_COLUMNS == 0 && columns <= 1 << 20 && group >= 32 && group % 32 == 0 && columns % group == 0 &&
         rows / TILE_ROWS * (columns / group) <= INT32_MAX && splits >= 1 && splits <= 65535 &&
         (splits == 1 || partials);
}

inline Wna16 problem(const void* x, const void* tiles, const void* scales, const void* zeros, const void* bias, void* y,
                     void* partials, int64_t tokens, int64_t rows, int64_t columns, int64_t group, int64_t splits) {
  const int span = group % 64 ? 32 : 64, groups = (int)(columns / group);
  const Quotient quotient((uint32_t)(group / span));
  return {x, tiles, scales, zeros, bias, y, static_cast<float*>(partials), (int)tokens, (int)rows, (int)columns,
          (int)splits, span, groups, quotient};
}

// action(Format<...>()) for what is in memory, or -1.
template <class T, class Scale, int BITS, class Action>
int for_group(const Wna16& p, Action action) {
  if (p.span == 32)
    return p.zeros ? action(Format<T, Scale, BITS, 32, true>()) : action(Format<T, Scale, BITS, 32, false>());
  return p.zeros ? action(Format<T, Scale, BITS, 64, true>()) : action(Format<T, Scale, BITS, 64, false>());
}
template <int BITS, class Action>
int for_dtype(const Wna16& p, int64_t dtype, int64_t scale_dtype, Action action) {
  if (dtype == 0 && scale_dtype == 0) return for_group<BF16, BF16, BITS>(p, action);
  if (dtype == 0 && scale_dtype == 1) return for_group<BF16, FP16, BITS>(p, action);
  if (dtype == 1 && scale_dtype == 0) return for_group<FP16, BF16, BITS>(p, action);
  if (dtype == 1 && scale_dtype == 1) return for_group<FP16, FP16, BITS>(p, action);
  return -1;
}
template <class Action>
int for_bits(const Wna16& p, int64_t bits, int64_t dtype, int64_t scale_dtype, Action action) {
  if (bits == 4) return for_dtype<4>(p, dtype, scale_dtype, action);
  if (bits == 8) return for_dtype<8>(p, dtype, scale_dtype, action);
  return -1;
}

}  // namespace quantool
