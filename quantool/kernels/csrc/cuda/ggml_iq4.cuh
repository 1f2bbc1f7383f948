// IQ4_NL and IQ4_XS: a thread searches the 32 weights it has in registers, as a lane does in ../ggml_iq4.cpp. Of IQ4_XS
// 8 threads that follow each other have a super-block, and a warp 4 of them.
#pragma once
#include "ggml_blocks.cuh"

#include "../ggml_iq4.h"

namespace quantool {

// A thread has one group of a super-block and asks its neighbours for theirs: all threads of a warp ask together.
struct Octet {
  static constexpr int All = line::Groups, Here = 1;
  static QUANTOOL_DEVICE int own(int) { return 0; }
  static QUANTOOL_DEVICE int lane_of(int g) { return lane_of_warp() / All * All + g; }
  static QUANTOOL_DEVICE Float of(int g, Float v) { return __shfl_sync(0xffffffffu, v.value, lane_of(g)); }
  static QUANTOOL_DEVICE Int of(int g, Int v) { return __shfl_sync(0xffffffffu, v, lane_of(g)); }
};

template <class Spread, bool Weighted, bool Exact>
QUANTOOL_DEVICE void load_all(const uint4* weight, const uint4* importance, int64_t blocks, uint32_t per_row,
                              line::Weights<Spread>& w) {
  load_weights(weight, blocks, w.x[0]);
  if constexpr (Weighted) load_importance(importance, per_row, w.users[0]);
  line::weigh<Spread, Weighted, Exact>(w);
}

template <bool Weighted, bool Exact>
__global__ void __launch_bounds__(GGML_THREADS)
    quantize_iq4_nl(const uint4* weight, const uint4* importance, uint8_t* out, int64_t blocks, uint32_t per_row) {
  constexpr int Bytes = 18;
  const int64_t first = first_of_warp();
  if (first >= blocks) return;
  line::Weights<line::Whole<1>> w;
  load_all<line::Whole<1>, Weighted, Exact>(weight, importance, blocks, per_row, w);
  const Float d = line::find_step<Weighted, Exact>(w);
  Int words[4];
  line::pack_levels(w.x[0], d, words);
  uint16_t* to = reinterpret_cast<uint16_t*>(shared_of_warp() + lane_of_warp() * Bytes);
  to[0] = (uint16_t)lanes::to_half(d);
  write_words<4>(to + 1, words);
  store_from_shared(out + first * Bytes, (int)min((int64_t)32, blocks - first) * Bytes);
}

template <bool Weighted, bool Exact>
__global__ void __launch_bounds__(GGML_THREADS)
    quantize_iq4_xs(const uint4* weight, const uint4* importance, uint8_t* out, int64_t blocks, uint32_t per_row) {
  constexpr int Bytes = 136;
  const int64_t first = first_of_warp();
  if (first >= blocks) return;
  line::Weights<Octet> w;
  load_all<Octet, Weighted, Exact>(weight, importance, blocks, per_row, w);
  const line::Scales<Octet> s = line::find_scales<Octet, Exact>(w);
  Int low, high, words[4];
  line::pack_levels(w.x[0], s.d * s.integer[0], words);
  line::pack_integers(s, low, high);
  const int group = lane_of_warp() % line::Groups;
  uint32_t* to = reinterpret_cast<uint32_t*>(shared_of_warp() + lane_of_warp() / line::Groups * Bytes);
  if (group == 0) {
    to[0] = (uint32_t)lanes::to_half(s.d) | (uint32_t)high << 16;
    to[1] = (uint32_t)low;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) to[2 + 4 * group + i] = (uint32_t)words[i];
  store_from_shared(out + first / line::Groups * Bytes, (int)min((int64_t)32, blocks - first) / line::Groups * Bytes);
}

}  // namespace quantool
