// CUDA on a CPU, to run kernel bodies where there is no GPU: g++ compiles what nvcc compiles, against this header.
//
// Every CUDA thread is a fiber, and one OS thread runs them all, block after block. A fiber runs until it waits: at
// __syncthreads for its block, at a warp collective (shuffle, ballot, mma) for its warp. Which one runs next, and which
// block, is drawn from a seed, so that a result that depends on the order differs between seeds. Shared memory is filled
// with 0xFF, which is NaN, before each block, and ends where its last byte does. A copy_async lands in copy_async_wait.
//
// A launch fails with one line about the first thread that
// - writes memory, or reads what was written, that another thread wrote with no __syncthreads between them (nor, within
//   a warp, a __syncwarp): shared memory, and global memory across blocks too (races.cpp);
// - touches the target of a copy_async that nobody has waited for, or returns before it waited;
// - reads or writes at an address that is no multiple of the width;
// - waits at a barrier or collective that the others cannot reach, since they wait at one on another line;
// - calls a collective with a partial mask, or reads the register of a lane that has returned.
// Accesses past the end, and what C++ leaves undefined, are for AddressSanitizer and UBSan: EMULATED_SANITIZE=1.
//
// Not modelled: speed, occupancy, registers, bank conflicts; threads of a warp in lockstep; atomics and fences; the order
// in which tensor cores add (here: exact, rounded once). What is in PTX behind csrc/cuda/device.cuh only a GPU can test.
#pragma once
#include <stdint.h>
#include <string.h>

#include <cmath>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define QUANTOOL_HD inline
#define QUANTOOL_DEVICE inline

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

// Where a thread waits: the line of the kernel that calls it.
struct Site {
  const char* name;
  const char* file;
  int line;
};
// the last parameters of what may fail: the caller's line
#define EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

// The functions that emulator.cpp defines.
int run(dim3 grid, dim3 block, int shared_bytes, void (*body)(const void*), const void* context);
const char* error();  // what the last launch failed with
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void barrier(Site site);
// Called by every lane of a warp: once all wait, `together` runs over what they brought, null for lanes that returned.
void collective(Site site, unsigned mask, void (*together)(void** lanes), void* mine);
void warp_barrier(Site site, unsigned mask);
void check_aligned(Site site, const void* pointer);  // to 16 bytes
int lane();
uint8_t* shared();
void copy(Site site, void* to, const void* from);
void commit();
void wait(int pending);
// D += A B of one warp, the values of the registers in the order of PTX
void mma(Site site, float (&d)[4], const float (&a)[8], const float (&b)[4]);
void mma(Site site, int32_t (&d)[4], const int8_t (&a)[16], const int8_t (&b)[8]);

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// A float with these widths of exponent and mantissa, from a double, to nearest even: one rounding.
template <int EXPONENT, int MANTISSA>
uint32_t encode(double x) {
  constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, SMALLEST = 1 - BIAS;
  constexpr uint32_t INFINITE = ((1u << EXPONENT) - 1) << MANTISSA;
  const uint64_t u = bits<uint64_t>(x) & ~(1ull << 63);
  const uint32_t sign = std::signbit(x) ? 1u << (EXPONENT + MANTISSA) : 0;
  if (std::isnan(x)) return (1u << (EXPONENT + MANTISSA)) - 1;  // the one NaN that cvt makes
  const int exponent = (int)(u >> 52) - 1023;
  if (exponent > BIAS) return sign | INFINITE;
  const int stored = exponent < SMALLEST ? SMALLEST : exponent, drop = 52 - MANTISSA + stored - exponent;
  if (drop > 53) return sign;  // below half of the smallest
  const uint64_t mantissa = (u & ((1ull << 52) - 1)) | 1ull << 52;
  const uint64_t kept = (mantissa + (1ull << (drop - 1)) - 1 + (mantissa >> drop & 1)) >> drop;
  return sign | (uint32_t)(kept + ((uint64_t)(stored - SMALLEST) << MANTISSA));  // a carry goes into the exponent
}

// a b + c in double, rounded to odd: a narrower rounding of it is the rounding of the exact sum. The product is exact.
inline double fma_to_odd(float a, float b, float c) {
  const double product = (double)a * b, sum = product + c;
  const double part = sum - product, lost = (product - (sum - part)) + (c - part);
  const bool inexact = std::isfinite(sum) && lost != 0;
  if (!inexact || bits<uint64_t>(sum) & 1) return sum;
  return std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
}

inline float decode_fp16(uint32_t h) {
  const uint32_t sign = (h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return bits<float>(sign | bits<uint32_t>(bits<float>(rest << 13) * 0x1p112f));  // exact, subnormals too
}

inline void touch(const void* p) {  // its 16 bytes, where sanitizers see it
  const auto* words = static_cast<const volatile uint64_t*>(p);
  (void)words[0], (void)words[1];
}

template <class T>
struct Shuffle {
  T value, result;
  int source;
};
template <class T>
T shuffle(Site site, unsigned mask, T value, int source) {
  Shuffle<T> mine{value, value, source};
  const auto together = [](void** lanes) {
    for (int i = 0; i < WARP; i++) {
      if (!lanes[i]) continue;
      auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
      const auto* from = static_cast<const Shuffle<T>*>(lanes[lane->source]);
      if (!from) fail("lane %d shuffles from lane %d, which has returned", i, lane->source);
      lane->result = from->value;
    }
  };
  collective(site, mask, together, &mine);
  return mine.result;
}

}  // namespace emulator

inline void __syncthreads(EMULATOR_CALLER) { emulator::barrier({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = emulator::ALL, EMULATOR_CALLER) {
  emulator::warp_barrier({"__syncwarp", file, line}, mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, EMULATOR_CALLER) {
  return emulator::shuffle({"__shfl_sync", file, line}, mask, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATOR_CALLER) {
  return emulator::shuffle({"__shfl_xor_sync", file, line}, mask, value, (emulator::lane() ^ lanes) & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, EMULATOR_CALLER) {
  const int lane = emulator::lane(), source = lane + (int)by;
  return emulator::shuffle({"__shfl_down_sync", file, line}, mask, value, source < emulator::WARP ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, EMULATOR_CALLER) {
  struct Ballot {
    bool vote;
    uint32_t votes;
  } mine{vote, 0};
  const auto together = [](void** lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < emulator::WARP; i++)
      if (lanes[i] && static_cast<const Ballot*>(lanes[i])->vote) votes |= 1u << i;
    for (int i = 0; i < emulator::WARP; i++)
      if (lanes[i]) static_cast<Ballot*>(lanes[i])->votes = votes;
  };
  emulator::collective({"__ballot_sync", file, line}, mask, together, &mine);
  return mine.votes;
}

inline float __uint_as_float(uint32_t u) { return emulator::bits<float>(u); }
inline uint32_t __float_as_uint(float f) { return emulator::bits<uint32_t>(f); }
// Arithmetic makes this NaN; that of x86 is negative.
inline float hardware_nan(float f) { return f == f ? f : __uint_as_float(0x7fffffffu); }
inline float __fmul_rn(float a, float b) { return hardware_nan(a * b); }  // -ffp-contract=off
inline float __fadd_rn(float a, float b) { return hardware_nan(a + b); }
inline float __fsub_rn(float a, float b) { return hardware_nan(a - b); }
inline float __fdiv_rn(float a, float b) { return hardware_nan(a / b); }
inline float __fsqrt_rn(float a) { return hardware_nan(std::sqrt(a)); }
inline int __float2int_rz(float f) { return f == f ? (int)std::fmin(std::fmax((double)f, -0x1p31), 0x1p31 - 1) : 0; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = (uint64_t)y << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t s = selector >> (4 * i) & 7;  // nvcc clears the fourth bit, which PTX's prmt would look at
    out |= ((uint32_t)(both >> (8 * s)) & 0xff) << (8 * i);
  }
  return out;
}

namespace quantool {

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline uint4 load_streaming(const uint4* p, EMULATOR_CALLER) {
  emulator::check_aligned({"load_streaming", file, line}, p);
  return *p;
}
inline void copy_async(void* shared, const void* global, bool valid, EMULATOR_CALLER) {
  emulator::touch(shared);  // what is out of bounds is so here, not where the copy lands
  if (valid) emulator::touch(global);
  emulator::copy({"copy_async", file, line}, shared, valid ? global : nullptr);
}
inline void copy_async_commit() { emulator::commit(); }
template <int Pending>
void copy_async_wait() {
  emulator::wait(Pending);
}
inline uint8_t* shared_memory() { return emulator::shared(); }
inline void load_matrices(uint32_t (&r)[4], const void* row, EMULATOR_CALLER) {
  struct Lane {
    uint4 row;
    uint32_t* result;
  } mine{{}, r};
  emulator::check_aligned({"load_matrices", file, line}, row);
  mine.row = *static_cast<const uint4*>(row);
  const auto together = [](void** lanes) {
    for (int i = 0; i < emulator::WARP; i++)
      for (int j = 0; j < 4; j++) {
        const auto* from = static_cast<const Lane*>(lanes[8 * j + i / 4]);
        if (!from || !lanes[i]) emulator::fail("load_matrices without all lanes of its warp");
        memcpy(static_cast<Lane*>(lanes[i])->result + j, reinterpret_cast<const char*>(&from->row) + 4 * (i % 4), 4);
      }
  };
  emulator::collective({"load_matrices", file, line}, emulator::ALL, together, &mine);
}

// What two 16-bit formats share.
template <class Format>
struct Pairs {
  static float high(uint32_t pair) { return Format::low(pair >> 16); }
  static uint32_t pair(double low, double high) { return Format::encode(low) | Format::encode(high) << 16; }
  static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return pair(emulator::fma_to_odd(Format::low(a), Format::low(b), Format::low(c)),
                emulator::fma_to_odd(high(a), high(b), high(c)));
  }
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  EMULATOR_CALLER) {
    const float values[8] = {Format::low(a[0]), high(a[0]), Format::low(a[1]), high(a[1]),
                             Format::low(a[2]), high(a[2]), Format::low(a[3]), high(a[3])};
    emulator::mma({"mma", file, line}, d, values, {Format::low(b0), high(b0), Format::low(b1), high(b1)});
  }
};
struct BF16 : Pairs<BF16> {
  static float low(uint32_t pair) { return emulator::bits<float>(pair << 16); }
  static uint32_t encode(double x) { return emulator::encode<8, 7>(x); }
};
struct FP16 : Pairs<FP16> {
  static float low(uint32_t pair) { return emulator::decode_fp16(pair & 0xffff); }
  static uint32_t encode(double x) { return emulator::encode<5, 10>(x); }
};
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                   EMULATOR_CALLER) {
  int8_t rows[16], columns[8];  // the first value of a register is its lowest byte
  memcpy(rows, a, 16), memcpy(columns, &b0, 4), memcpy(columns + 4, &b1, 4);
  emulator::mma({"mma_s8", file, line}, d, rows, columns);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, void*, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  const auto body = [=] { kernel(static_cast<Parameters>(arguments)...); };
  return emulator::run(
      grid, block, shared_bytes, [](const void* context) { (*static_cast<const decltype(body)*>(context))(); }, &body);
}

}  // namespace quantool
