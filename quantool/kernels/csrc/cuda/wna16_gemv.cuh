// y = x W^T for one to eight tokens, at the speed at which W can be read.
//
// The 16 rows of a tile are A of an mma, the tokens the eight columns of B. A block owns ROW_TILES x 16 rows. Its warps
// take stages of 2 KB of codes in turn, so that together they read a row of tiles front to back, and add up in the end:
//
//   row of tiles   | warp 0: TILES | warp 1 | ... | warp 7 | warp 0 | ...
//
// Each warp has a ring of STAGES in shared memory to itself, all but one of them on their way: copies need no
// registers, so that what is under way does not depend on the compiler, and no barrier of the block. x is read through
// L1, 16 bytes a lane for two steps; the columns of B beyond the last token repeat it and are not stored.
//
// Three blocks to an SM have 4 KB of each of their 24 warps under way, 96 KB. An H200, of which 4.3 TB/s are expected
// with 1 us of latency, needs 33, and at that speed has time for 4 instructions for each 4-bit weight; these are 2.4.
#pragma once
#include "wna16.cuh"

namespace quantool {

template <class F, int ROW_TILES>
struct Gemv {
  static constexpr int WARPS = 8, STAGES = 3, TILES = 16 / (F::BITS * ROW_TILES), ROWS = ROW_TILES * TILE_ROWS;
  static constexpr int CODE_BYTES = ROW_TILES * TILES * F::CHUNKS * 16;
  using Groups = GroupCopy<F, ROW_TILES, TILES * F::TILE_SPANS>;
  static constexpr int STAGE_BYTES = CODE_BYTES + Groups::BYTES;
};

template <class F, int ROW_TILES>
__global__ void __launch_bounds__(256, 3) wna16_gemv(const Wna16 p) {
  using G = Gemv<F, ROW_TILES>;
  constexpr int STEP = G::WARPS * G::TILES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row_chunks = p.columns / TILE_COLUMNS * F::CHUNKS, token = g < p.tokens ? g : p.tokens - 1;
  const int row_tile = blockIdx.x * ROW_TILES;
  const TileRange range(p, blockIdx.y);
  int tile = range.begin + warp * G::TILES;
  uint8_t* ring = shared_memory() + warp * G::STAGES * G::STAGE_BYTES;
  const uint4* codes = static_cast<const uint4*>(p.tiles) + (int64_t)row_tile * row_chunks + tile * F::CHUNKS + lane;
  const uint4* x = static_cast<const uint4*>(p.x) + (int64_t)token * (p.columns / 8) + tile * 8 + t;
  const typename G::Groups copy_groups(p, lane, row_tile);

  const auto copy = [&](int tile, uint8_t* stage) {
    const int left = range.end - tile;
    if (left > 0) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int i = 0; i < G::TILES * F::CHUNKS; i += 32)
          copy_async(stage + (r * G::TILES * F::CHUNKS + i) * 16 + lane * 16, codes + r * row_chunks + i,
                     i / F::CHUNKS < left);
      copy_groups(p, stage + G::CODE_BYTES, tile * F::TILE_SPANS, range.end * F::TILE_SPANS);
      codes += STEP * F::CHUNKS;
    }
    copy_async_commit();
  };

  float sums[ROW_TILES][1][4] = {};
#pragma unroll
  for (int i = 0; i < G::STAGES - 1; i++) copy(tile + i * STEP, ring + i * G::STAGE_BYTES);
  uint8_t *stage = ring, *const last_stage = ring + (G::STAGES - 1) * G::STAGE_BYTES;
  for (; tile < range.end; tile += STEP) {
    uint4 b[G::TILES][2];
    const int last = range.end - tile - 1;  // a tile past it has scales of 0, and any x
#pragma unroll
    for (int u = 0; u < G::TILES; u++)
#pragma unroll
      for (int half = 0; half < 2; half++) b[u][half] = x[(u && last < u ? last : u) * 8 + half * 4];
    x += STEP * 8;
    copy_async_wait<G::STAGES - 2>();
    __syncwarp();
    copy(tile + (G::STAGES - 1) * STEP, stage == ring ? last_stage : stage - G::STAGE_BYTES);
#pragma unroll
    for (int u = 0; u < G::TILES; u++) {
      if (ROW_TILES > 1 && u) __syncwarp();  // or nvcc mixes the tiles, and needs more registers than there are
      const TileColumn w{
          reinterpret_cast<const uint4*>(stage) + u * F::CHUNKS + lane,
          reinterpret_cast<const uint32_t*>(stage + G::CODE_BYTES) + u * F::TILE_SPANS * 8 + g,
          reinterpret_cast<const uint16_t*>(stage + G::CODE_BYTES + 32 * G::Groups::COUNT) + u * F::TILE_SPANS * 8 + g,
          G::TILES * F::CHUNKS, G::TILES * F::TILE_SPANS};
      multiply<F>(w, [&](int half, int) { return b[u][half]; }, sums);
    }
    stage = stage == last_stage ? ring : stage + G::STAGE_BYTES;
  }

  __syncthreads();
  float* shared = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
    put_sums<G::ROWS>(shared + warp * 8 * SUM_STRIDE<G::ROWS>, 0, TILE_ROWS * r, sums[r][0]);
  __syncthreads();
  add_and_store<typename F::T, G::ROWS, 8>(p, shared, G::WARPS);
}

template <class F, int ROW_TILES>
int gemv(const Wna16& p, void* stream) {
  using G = Gemv<F, ROW_TILES>;
  const int error = launch(wna16_gemv<F, ROW_TILES>, dim3(p.rows / G::ROWS, p.splits), dim3(32 * G::WARPS),
                           G::WARPS * G::STAGES * G::STAGE_BYTES, stream, p);
  return error ? error : reduce<typename F::T>(p, stream);
}

}  // namespace quantool
