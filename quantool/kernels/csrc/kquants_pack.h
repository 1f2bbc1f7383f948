// The bytes of a K-quant block of 256 weights from its codes and the integers that scale them (ggml-common.h).
//
// Four codes that share a byte stand 32 apart (64 for the halves of Q6_K's low nibbles), so that a runtime unpacks 32
// consecutive weights with one shift.
// A block may be packed by several threads: each takes every `Workers`-th byte, `worker` and on.

#pragma once

#include "lanes.h"

namespace kquants {

constexpr int SuperBlock = 256;

// One block: what is packed, without its type.
struct Fields {
  uint8_t codes[SuperBlock];
  uint8_t scales[16], mins[16];  // as stored: Q3_K with 32 added, Q6_K as the bits of an int8
  uint16_t d, dmin;
};

QUANTOOL_DEVICE void put_half(uint8_t* out, uint16_t half, int worker) {
  if (worker) return;
  out[0] = static_cast<uint8_t>(half);
  out[1] = static_cast<uint8_t>(half >> 8);
}

// `bits` bits of each code from bit `shift` on; 32 * (8 / bits) codes go to 32 bytes.
template <int Workers>
QUANTOOL_DEVICE void put_bits(uint8_t* out, const uint8_t* codes, int bits, int shift, int worker) {
  const int count = 8 / bits, mask = (1 << bits) - 1;
  for (int start = 0; start < SuperBlock; start += 32 * count, out += 32)
    for (int k = worker; k < 32; k += Workers) {
      int byte = 0;
      for (int part = 0; part < count; ++part)
        byte |= (codes[start + 32 * part + k] >> shift & mask) << bits * part;
      out[k] = static_cast<uint8_t>(byte);
    }
}

// Eight scales and eight mins of 6 bits in 12 bytes: the low four in full, of the rest nibbles, and their upper bits
// on top of the first eight bytes.
template <int Workers>
QUANTOOL_DEVICE void put_scales_and_mins(uint8_t* out, const Fields& f, int worker) {
  for (int j = worker; j < 4; j += Workers) {
    out[j] = static_cast<uint8_t>(f.scales[j] | (f.scales[j + 4] >> 4) << 6);
    out[j + 4] = static_cast<uint8_t>(f.mins[j] | (f.mins[j + 4] >> 4) << 6);
    out[j + 8] = static_cast<uint8_t>((f.scales[j + 4] & 15) | (f.mins[j + 4] & 15) << 4);
  }
}

template <int Workers>
QUANTOOL_DEVICE void pack_q2_k(uint8_t* out, const Fields& f, int worker) {
  for (int j = worker; j < 16; j += Workers) out[j] = static_cast<uint8_t>(f.scales[j] | f.mins[j] << 4);
  put_bits<Workers>(out + 16, f.codes, 2, 0, worker);
  put_half(out + 80, f.d, worker);
  put_half(out + 82, f.dmin, worker);
}

template <int Workers>
QUANTOOL_DEVICE void pack_q3_k(uint8_t* out, const Fields& f, int worker) {
  put_bits<Workers>(out, f.codes, 1, 2, worker);
  put_bits<Workers>(out + 32, f.codes, 2, 0, worker);
  uint8_t* scales = out + 96;
  for (int j = worker; j < 8; j += Workers)
    scales[j] = static_cast<uint8_t>((f.scales[j] & 15) | (f.scales[j + 8] & 15) << 4);
  for (int j = worker; j < 4; j += Workers) {
    int byte = 0;
    for (int part = 0; part < 4; ++part) byte |= (f.scales[j + 4 * part] >> 4) << 2 * part;
    scales[j + 8] = static_cast<uint8_t>(byte);
  }
  put_half(out + 108, f.d, worker);
}

template <int Workers>
QUANTOOL_DEVICE void pack_q4_k(uint8_t* out, const Fields& f, int worker) {
  put_half(out, f.d, worker);
  put_half(out + 2, f.dmin, worker);
  put_scales_and_mins<Workers>(out + 4, f, worker);
  put_bits<Workers>(out + 16, f.codes, 4, 0, worker);
}

template <int Workers>
QUANTOOL_DEVICE void pack_q5_k(uint8_t* out, const Fields& f, int worker) {
  put_half(out, f.d, worker);
  put_half(out + 2, f.dmin, worker);
  put_scales_and_mins<Workers>(out + 4, f, worker);
  put_bits<Workers>(out + 16, f.codes, 1, 4, worker);
  put_bits<Workers>(out + 48, f.codes, 4, 0, worker);
}

template <int Workers>
QUANTOOL_DEVICE void pack_q6_k(uint8_t* out, const Fields& f, int worker) {
  for (int half = 0; half < SuperBlock; half += 128)
    for (int k = worker; k < 64; k += Workers)
      out[half / 2 + k] = static_cast<uint8_t>((f.codes[half + k] & 15) | (f.codes[half + 64 + k] & 15) << 4);
  put_bits<Workers>(out + 128, f.codes, 2, 4, worker);
  for (int j = worker; j < 16; j += Workers) out[192 + j] = f.scales[j];
  put_half(out + 208, f.d, worker);
}

}  // namespace kquants
