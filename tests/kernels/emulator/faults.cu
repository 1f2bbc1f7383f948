// One fault per launcher, for test_emulator.py: what the emulator, AddressSanitizer and UBSan have to find. The kernels
// whose names begin with `fine_` have none. Each is one or two blocks of 64 threads; y is float32 [128].
#include "device.cuh"

namespace quantool {

QUANTOOL_DEVICE float* floats() { return reinterpret_cast<float*>(shared_memory()); }

// 64 floats reversed through shared memory; the barrier between writing and reading is what is missing
template <bool Barrier>
__global__ void reverse(float* y) {
  floats()[threadIdx.x] = (float)threadIdx.x;
  if (Barrier) __syncthreads();
  y[threadIdx.x] = floats()[63 - threadIdx.x];
}

// two rounds through one buffer: the second round writes what others may still read
template <bool Barrier>
__global__ void rounds(float* y) {
  float sum = 0;
  for (int round = 0; round < 2; round++) {
    floats()[threadIdx.x] = (float)round;
    __syncthreads();
    sum += floats()[(threadIdx.x + 1) % 64];
    if (Barrier) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

// lanes read what their neighbours wrote; a shuffle exchanges registers and orders no memory
template <bool Barrier>
__global__ void neighbours(float* y) {
  floats()[threadIdx.x] = (float)threadIdx.x;
  if (Barrier) __syncwarp();
  const float value = __shfl_xor_sync(0xffffffffu, 1.f, 1);
  y[threadIdx.x] = value + floats()[threadIdx.x ^ 1];
}

// a __syncwarp orders nothing between warps
__global__ void other_warp(float* y) {
  floats()[threadIdx.x] = (float)threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = floats()[threadIdx.x ^ 32];
}

__global__ void other_block(float* y) {
  y[64 * blockIdx.x + threadIdx.x] = 1;
  if (blockIdx.x == 1) y[threadIdx.x] += 1;
}

__global__ void same_place(float* y) { y[0] = (float)threadIdx.x; }

// 16 bytes of x on their way to shared memory and out again
template <bool Wait, bool Barrier, int Shift>
__global__ void through(float* y, const float* x) {
  copy_async(floats() + 4 * threadIdx.x, x + 4 * (threadIdx.x % 16), threadIdx.x < 16);
  copy_async_commit();
  if (Wait) copy_async_wait<0>();
  if (Barrier) __syncthreads();
  y[threadIdx.x] = floats()[4 * ((threadIdx.x + Shift) % 64)];
  copy_async_wait<0>();
}

// two copies under way; the second is waited for at last
template <bool All>
__global__ void pipeline(float* y, const float* x) {
  float* mine = floats() + 8 * threadIdx.x;
  copy_async(mine, x, true);
  copy_async_commit();
  copy_async(mine + 4, x + 4, true);
  copy_async_commit();
  copy_async_wait<1>();
  y[threadIdx.x] = mine[0];
  if (All) copy_async_wait<0>();
}

__global__ void two_barriers(float* y) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void barrier_and_shuffle(float* y) {
  if (threadIdx.x < 32)
    __syncthreads();
  else if (threadIdx.x < 40)
    y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);
  else
    __syncthreads();
}

__global__ void two_shuffles(float* y) {
  if (threadIdx.x % 2)
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 2);
  else
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 2.f, 2);
}

__global__ void half_mask(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.f, 1);
}

// threads that have returned are missed by no barrier, only by those who read their registers
template <int From>
__global__ void returned(float* y) {
  if (threadIdx.x % 32 >= 16) return;
  __syncthreads();
  __syncwarp();
  y[threadIdx.x] = __shfl_sync(0xffffffffu, (float)threadIdx.x, From);
}

__global__ void mma_of_a_half(float* y) {
  if (threadIdx.x % 32 >= 16) return;
  float d[4] = {};
  BF16::mma(d, {0, 0, 0, 0}, 0, 0);
  y[threadIdx.x] = d[0];
}

__global__ void unwritten(float* y) { y[threadIdx.x] = floats()[threadIdx.x]; }

__global__ void load_at(float* y, const float* x, int64_t bytes) {
  const auto* from = reinterpret_cast<const uint8_t*>(x) + bytes;
  y[threadIdx.x] = (float)load_streaming(reinterpret_cast<const uint4*>(from)).x;
}

__global__ void copy_at(const float* x, int64_t bytes) {
  copy_async(shared_memory() + 16 * threadIdx.x + bytes, x, true);
  copy_async_commit();
  copy_async_wait<0>();
}

__global__ void copy_from(const float* x, int64_t bytes) {
  copy_async(shared_memory() + 16 * threadIdx.x, reinterpret_cast<const uint8_t*>(x) + bytes, true);
  copy_async_commit();
  copy_async_wait<0>();
}

__global__ void read_at(float* y, const float* x, int64_t bytes) {
  y[threadIdx.x] = *reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(x) + bytes);
}

__global__ void shared_at(float* y, int64_t index) { y[threadIdx.x] = floats()[index]; }

__global__ void add_to(float* y, int32_t number) { y[threadIdx.x] = (float)(number + (int32_t)threadIdx.x); }

__global__ void shift_by(float* y, int32_t number) { y[threadIdx.x] = (float)(1 << number); }

__global__ void element(float* y, int64_t index) {
  int32_t four[4] = {1, 2, 3, 4};
  y[threadIdx.x] = (float)four[index];
}

__global__ void nothing(float*) {}

}  // namespace quantool

using namespace quantool;

#define LAUNCHER(name, kernel, blocks, shared, ...)                               \
  extern "C" int name(float* y, const float* x, int64_t number) {                 \
    (void)y, (void)x, (void)number;                                                        \
    return launch(kernel, dim3(blocks), dim3(64), shared, nullptr, __VA_ARGS__);  \
  }
LAUNCHER(no_barrier, reverse<false>, 1, 256, y)
LAUNCHER(fine_barrier, reverse<true>, 1, 256, y)
LAUNCHER(no_second_barrier, rounds<false>, 1, 256, y)
LAUNCHER(fine_rounds, rounds<true>, 1, 256, y)
LAUNCHER(no_warp_barrier, neighbours<false>, 1, 256, y)
LAUNCHER(fine_warp_barrier, neighbours<true>, 1, 256, y)
LAUNCHER(warp_barrier_for_a_block, other_warp, 1, 256, y)
LAUNCHER(reads_another_block, other_block, 2, 0, y)
LAUNCHER(all_write_one_place, same_place, 1, 0, y)
LAUNCHER(no_wait, (through<false, true, 1>), 1, 1024, y, x)
LAUNCHER(no_wait_for_its_own, (through<false, false, 0>), 1, 1024, y, x)
LAUNCHER(no_barrier_after_wait, (through<true, false, 1>), 1, 1024, y, x)
LAUNCHER(fine_wait, (through<true, true, 1>), 1, 1024, y, x)
LAUNCHER(fine_wait_for_its_own, (through<true, false, 0>), 1, 1024, y, x)
LAUNCHER(returns_before_its_copy, pipeline<false>, 1, 2048, y, x)
LAUNCHER(fine_pipeline, pipeline<true>, 1, 2048, y, x)
LAUNCHER(divergent_barrier, two_barriers, 1, 0, y)
LAUNCHER(barrier_against_shuffle, barrier_and_shuffle, 1, 0, y)
LAUNCHER(divergent_shuffle, two_shuffles, 1, 0, y)
LAUNCHER(partial_mask, half_mask, 1, 0, y)
LAUNCHER(shuffle_from_the_returned, returned<20>, 1, 0, y)
LAUNCHER(fine_returned, returned<3>, 1, 0, y)
LAUNCHER(mma_without_all_lanes, mma_of_a_half, 1, 0, y)
LAUNCHER(unwritten_shared_memory, unwritten, 1, 256, y)
LAUNCHER(streaming_load, load_at, 1, 0, y, x, number)
LAUNCHER(async_copy, copy_at, 1, 2048, x, number)
LAUNCHER(async_copy_from, copy_from, 1, 1024, x, number)
LAUNCHER(plain_load, read_at, 1, 0, y, x, number)
LAUNCHER(shared_load, shared_at, 1, 256, y, number)
LAUNCHER(addition, add_to, 1, 0, y, number)
LAUNCHER(shift, shift_by, 1, 0, y, number)
LAUNCHER(array_element, element, 1, 0, y, number)
LAUNCHER(too_much_shared_memory, nothing, 1, 228 * 1024, y)
LAUNCHER(too_deep_a_grid, nothing, dim3(1, 65536), 0, y)
