// y = x W^T for up to 128 tokens.
//
// A block owns 128 rows and all tokens, and goes through its columns in stages that a ring in shared memory holds, all
// but one of them on their way. Four warps side by side take two row tiles each, so that what is read of x is used
// twice; up to four of them stand over 32 tokens each, and for few tokens two share the columns of a stage:
//
//   TOKENS         16         32         64         128
//   tokens/warp    2 x 8      4 x 8      4 x 8      4 x 8       mma tiles of B
//   warps          4 x 1 x 2  4 x 1 x 2  4 x 2 x 1  4 x 4 x 1   rows x tokens x columns
//   columns/stage  128        128        64         64          a tile to each warp of the columns
//
// x of a stage is [token][column], and the 64 columns of a tile are 128 bytes, all 32 banks. A 16-byte read is served
// eight lanes at a time: tokens g = 2i and 2i + 1, t = 0..3, which are four pieces of 16 bytes out of the eight of
// either token. They would lie in the same banks; so odd tokens have their halves exchanged (piece ^ 4), and eight
// lanes cover all banks.
#pragma once
#include "wna16.cuh"

namespace quantool {

template <class F, int TOKENS_>
struct Gemm {
  static constexpr int TOKENS = TOKENS_, N = TOKENS == 16 ? 2 : 4, STAGES = F::BITS == 4 ? 4 : 3;
  static constexpr int ROW_WARPS = 4, ROW_TILES = 2, ROWS = ROW_WARPS * ROW_TILES * TILE_ROWS;
  static constexpr int TOKEN_WARPS = TOKENS / (8 * N), TILES = TOKENS <= 32 ? 2 : 1;
  static constexpr int THREADS = 32 * ROW_WARPS * TOKEN_WARPS * TILES, BLOCKS_PER_SM = THREADS > 256 ? 1 : 2;
  static constexpr int ROW_CHUNKS = TILES * F::CHUNKS, CODE_CHUNKS = ROWS / TILE_ROWS * ROW_CHUNKS;
  static constexpr int TOKEN_CHUNKS = TILES * 8, X_CHUNKS = TOKENS * TOKEN_CHUNKS, SPANS = TILES * F::TILE_SPANS;
  static constexpr int CODE_COPIES = (CODE_CHUNKS + THREADS - 1) / THREADS, X_COPIES = X_CHUNKS / THREADS;
  using Groups = GroupCopy<F, ROWS / TILE_ROWS, SPANS>;
  static constexpr int STAGE_BYTES = 16 * (CODE_CHUNKS + X_CHUNKS) + Groups::BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
  static_assert(SHARED_BYTES >= TILES * TOKENS * SUM_STRIDE<ROWS> * (int)sizeof(float),
                "the sums have room in the ring");
  static_assert(SHARED_BYTES <= 99 * 1024, "what a block may have on the smallest cards, sm_86 and sm_89");
};

template <class F, int TOKENS>
__global__ void __launch_bounds__(Gemm<F, TOKENS>::THREADS, Gemm<F, TOKENS>::BLOCKS_PER_SM) wna16_gemm(const Wna16 p) {
  using G = Gemm<F, TOKENS>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp % G::ROW_WARPS, token_warp = warp / G::ROW_WARPS % G::TOKEN_WARPS;
  const int tile_warp = warp / (G::ROW_WARPS * G::TOKEN_WARPS);
  const int tiles = p.columns / TILE_COLUMNS, row_tile = blockIdx.x * (G::ROWS / TILE_ROWS);
  const TileRange range(p, blockIdx.y);

  // Of a stage a thread copies piece `code` of some row tiles and piece `piece` of some tokens, always from the same
  // places relative to the tile. Row tiles and tokens past the end repeat the last, and are not stored.
  const int code = threadIdx.x % G::ROW_CHUNKS, piece = threadIdx.x % G::TOKEN_CHUNKS;
  const int token = threadIdx.x / G::TOKEN_CHUNKS, x_to = token * G::TOKEN_CHUNKS + (piece ^ (token & 1) * 4);
  int codes_from[G::CODE_COPIES], x_from[G::X_COPIES];
#pragma unroll
  for (int i = 0; i < G::CODE_COPIES; i++) {
    const int row = (i * G::THREADS + threadIdx.x) / G::ROW_CHUNKS, rows = p.rows / TILE_ROWS - row_tile;
    codes_from[i] = (row < rows ? row : rows - 1) * tiles * F::CHUNKS + code;
  }
#pragma unroll
  for (int i = 0; i < G::X_COPIES; i++) {
    const int at = token + i * G::THREADS / G::TOKEN_CHUNKS;
    x_from[i] = (at < p.tokens ? at : p.tokens - 1) * (p.columns / 8) + piece;
  }
  const typename G::Groups copy_groups(p, threadIdx.x, row_tile);

  const auto copy = [&](int tile, uint8_t* stage) {
    if (tile < range.end) {
      const uint4* codes = static_cast<const uint4*>(p.tiles) + ((int64_t)row_tile * tiles + tile) * F::CHUNKS;
      const uint4* x = static_cast<const uint4*>(p.x) + tile * 8;
      const bool whole = G::TILES == 1 || tile + 1 < range.end;
#pragma unroll
      for (int i = 0; i < G::CODE_COPIES; i++)
        if (i * G::THREADS + threadIdx.x < G::CODE_CHUNKS)
          copy_async(stage + 16 * (i * G::THREADS + threadIdx.x), codes + codes_from[i], whole || code < F::CHUNKS);
#pragma unroll
      for (int i = 0; i < G::X_COPIES; i++)
        copy_async(stage + 16 * (G::CODE_CHUNKS + i * G::THREADS + x_to), x + x_from[i], whole || piece < 8);
      copy_groups(p, stage + 16 * (G::CODE_CHUNKS + G::X_CHUNKS), tile * F::TILE_SPANS, range.end * F::TILE_SPANS);
    }
    copy_async_commit();
  };

  uint8_t* ring = shared_memory();
  float sums[G::ROW_TILES][G::N][4] = {};
#pragma unroll
  for (int i = 0; i < G::STAGES - 1; i++) copy(range.begin + i * G::TILES, ring + i * G::STAGE_BYTES);
  uint8_t *stage = ring, *free = ring + (G::STAGES - 1) * G::STAGE_BYTES;
  for (int tile = range.begin; tile < range.end; tile += G::TILES) {
    copy_async_wait<G::STAGES - 2>();
    __syncthreads();
    copy(tile + (G::STAGES - 1) * G::TILES, free);
    const uint4* codes = reinterpret_cast<const uint4*>(stage);
    const uint4* x = codes + G::CODE_CHUNKS + (token_warp * 8 * G::N + g) * G::TOKEN_CHUNKS + tile_warp * 8;
    const uint8_t* groups = stage + 16 * (G::CODE_CHUNKS + G::X_CHUNKS);
    const int first_span = row_warp * G::ROW_TILES * G::SPANS + tile_warp * F::TILE_SPANS;
    const TileColumn w{codes + row_warp * G::ROW_TILES * G::ROW_CHUNKS + tile_warp * F::CHUNKS + lane,
                       reinterpret_cast<const uint32_t*>(groups) + first_span * 8 + g,
                       reinterpret_cast<const uint16_t*>(groups + 32 * G::Groups::COUNT) + first_span * 8 + g,
                       G::ROW_CHUNKS, G::SPANS};
    multiply<F>(w, [&](int half, int n) { return x[n * 8 * G::TOKEN_CHUNKS + ((4 * half + t) ^ (g & 1) * 4)]; }, sums);
    free = stage;
    stage = stage == ring + (G::STAGES - 1) * G::STAGE_BYTES ? ring : stage + G::STAGE_BYTES;
  }

  __syncthreads();
  float* shared = reinterpret_cast<float*>(ring) + tile_warp * TOKENS * SUM_STRIDE<G::ROWS>;
#pragma unroll
  for (int r = 0; r < G::ROW_TILES; r++)
#pragma unroll
    for (int n = 0; n < G::N; n++)
      put_sums<G::ROWS>(shared, (token_warp * G::N + n) * 8, (row_warp * G::ROW_TILES + r) * TILE_ROWS, sums[r][n]);
  __syncthreads();
  add_and_store<typename F::T, G::ROWS, TOKENS>(p, reinterpret_cast<const float*>(ring), G::TILES);
}

template <class F, int TOKENS>
int gemm(const Wna16& p, void* stream) {
  using G = Gemm<F, TOKENS>;
  const int error = launch(wna16_gemm<F, TOKENS>, dim3((p.rows + G::ROWS - 1) / G::ROWS, p.splits), dim3(G::THREADS),
                           G::SHARED_BYTES, stream, p);
  return error ? error : reduce<typename F::T>(p, stream);
}

// Compiled in a file for each width of codes.
template <int BITS>
int gemm(const Wna16& p, int64_t dtype, int64_t scale_dtype, void* stream);

template <int BITS>
int gemm_for_tokens(const Wna16& p, int64_t dtype, int64_t scale_dtype, void* stream) {
  return for_dtype<BITS>(p, dtype, scale_dtype, [&](auto f) {
    using F = decltype(f);
    return p.tokens <= 16   ? gemm<F, 16>(p, stream)
           : p.tokens <= 32 ? gemm<F, 32>(p, stream)
           : p.tokens <= 64 ? gemm<F, 64>(p, stream)
                            : gemm<F, 128>(p, stream);
  });
}

}  // namespace quantool
