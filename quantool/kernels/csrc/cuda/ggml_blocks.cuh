// ggml's blocks of 32 weights, one per thread, in and out of memory; the search itself is the CPU's (../ggml_line.h).
//
// A thread wants the 128 bytes of one block and a warp is fast at 128 bytes that follow each other, so what 32 threads
// need goes through 4608 bytes of shared memory that are their own:
//
//     global   warp reads 4 blocks at a time, 8 threads a block, 16 bytes a thread
//     shared   block b at 16-byte unit 9 b: neither the writes by rows nor the reads by threads collide in a bank
//
// and the packed blocks, which are 2 n bytes each, go back the same way. Nothing here waits for another warp.
#pragma once
#include "device.cuh"

#include "../ggml_line.h"

namespace quantool {

using line::Block, line::Float, line::Int;

constexpr int GGML_THREADS = 128, WARP_BYTES = 32 * 9 * 16, GGML_SHARED = GGML_THREADS / 32 * WARP_BYTES;

QUANTOOL_DEVICE int lane_of_warp() { return threadIdx.x % 32; }
QUANTOOL_DEVICE uint8_t* shared_of_warp() { return shared_memory() + threadIdx.x / 32 * WARP_BYTES; }
QUANTOOL_DEVICE int64_t first_of_warp() { return (int64_t)blockIdx.x * GGML_THREADS + threadIdx.x / 32 * 32; }

// What unit(0) to unit(255) give, 16 bytes each, as 32 blocks: that of this thread into x.
template <class Unit>
QUANTOOL_DEVICE void load_through_shared(Unit unit, Float* x) {
  uint4* tile = reinterpret_cast<uint4*>(shared_of_warp());
  const int lane = lane_of_warp();
#pragma unroll
  for (int i = lane; i < 256; i += 32) tile[i / 8 * 9 + i % 8] = unit(i);
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const uint4 v = tile[lane * 9 + j];
    x[4 * j] = __uint_as_float(v.x), x[4 * j + 1] = __uint_as_float(v.y);
    x[4 * j + 2] = __uint_as_float(v.z), x[4 * j + 3] = __uint_as_float(v.w);
  }
  __syncwarp();
}

// the block of this thread in a flat list of them; zeros past the end
QUANTOOL_DEVICE void load_weights(const uint4* weight, int64_t blocks, Float* x) {
  const uint4* from = weight + first_of_warp() * 8;
  const int64_t units = (blocks - first_of_warp()) * 8;
  load_through_shared([=](int i) { return i < units ? load_streaming(from + i) : make_uint4(0, 0, 0, 0); }, x);
}

// the importance of its columns; a row has `per_row` blocks
QUANTOOL_DEVICE void load_importance(const uint4* importance, uint32_t per_row, Float* users) {
  const uint32_t start = (uint32_t)(first_of_warp() % per_row) * 8;
  load_through_shared([=](int i) { return importance[(start + i) % (per_row * 8)]; }, users);
}

// words at an even address
template <int Count>
QUANTOOL_DEVICE void write_words(uint16_t* to, const Int* words) {
#pragma unroll
  for (int i = 0; i < Count; i++) {
    to[2 * i] = (uint16_t)words[i];
    to[2 * i + 1] = (uint16_t)((uint32_t)words[i] >> 16);
  }
}

// `bytes` bytes, an even number, that the warp has written to its shared memory
QUANTOOL_DEVICE void store_from_shared(uint8_t* blocks, int bytes) {
  __syncwarp();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(shared_of_warp());
  for (int i = lane_of_warp(); i < bytes / 4; i += 32) reinterpret_cast<uint32_t*>(blocks)[i] = words[i];
  if (bytes % 4 && lane_of_warp() == 0)
    reinterpret_cast<uint16_t*>(blocks)[bytes / 2 - 1] = (uint16_t)words[bytes / 4];
}

}  // namespace quantool
