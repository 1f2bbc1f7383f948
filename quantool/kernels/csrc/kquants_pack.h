// The bytes of a K-quant block of 256 weights from its codes and the integers that scale them (ggml-common.h).
//
// Four codes that share a byte stand 32 apart (64 for the halves of Q6_K's low nibbles), so that a runtime unpacks 32
// consecutive weights with one shift.

#pragma once

#include <cstdint>
#include <cstring>

namespace kquants {

constexpr int SuperBlock = 256;

// One block: what is packed, without its type.
struct Fields {
  uint8_t codes[SuperBlock];
  uint8_t scales[16], mins[16];  // as stored: Q3_K with 32 added, Q6_K as the bits of an int8
  uint16_t d, dmin;
};

inline void put_half(uint8_t* out, uint16_t half) { std::memcpy(out, &half, sizeof half); }

// `bits` bits of each code from bit `shift` on; 32 * (8 / bits) codes go to 32 bytes.
inline void put_bits(uint8_t* out, const uint8_t* codes, int bits, int shift) {
  const int count = 8 / bits, mask = (1 << bits) - 1;
  for (int start = 0; start < SuperBlock; start += 32 * count, out += 32)
    for (int k = 0; k < 32; ++k) {
      int byte = 0;
      for (int part = 0; part < count; ++part)
        byte |= (codes[start + 32 * part + k] >> shift & mask) << bits * part;
      out[k] = static_cast<uint8_t>(byte);
    }
}

// Eight scales and eight mins of 6 bits in 12 bytes: the low four in full, of the rest nibbles, and their upper bits
// on top of the first eight bytes.
inline void put_scales_and_mins(uint8_t* out, const Fields& f) {
  for (int j = 0; j < 4; ++j) {
    out[j] = static_cast<uint8_t>(f.scales[j] | (f.scales[j + 4] >> 4) << 6);
    out[j + 4] = static_cast<uint8_t>(f.mins[j] | (f.mins[j + 4] >> 4) << 6);
    out[j + 8] = static_cast<uint8_t>((f.scales[j + 4] & 15) | (f.mins[j + 4] & 15) << 4);
  }
}

inline void pack_q2_k(uint8_t* out, const Fields& f) {
  for (int j = 0; j < 16; ++j) out[j] = static_cast<uint8_t>(f.scales[j] | f.mins[j] << 4);
  put_bits(out + 16, f.codes, 2, 0);
  put_half(out + 80, f.d);
  put_half(out + 82, f.dmin);
}

inline void pack_q3_k(uint8_t* out, const Fields& f) {
  put_bits(out, f.codes, 1, 2);
  put_bits(out + 32, f.codes, 2, 0);
  uint8_t* scales = out + 96;
  for (int j = 0; j < 8; ++j) scales[j] = static_cast<uint8_t>((f.scales[j] & 15) | (f.scales[j + 8] & 15) << 4);
  for (int j = 0; j < 4; ++j) {
    int byte = 0;
    for (int part = 0; part < 4; ++part) byte |= (f.scales[j + 4 * part] >> 4) << 2 * part;
    scales[j + 8] = static_cast<uint8_t>(byte);
  }
  put_half(out + 108, f.d);
}

inline void pack_q4_k(uint8_t* out, const Fields& f) {
  put_half(out, f.d);
  put_half(out + 2, f.dmin);
  put_scales_and_mins(out + 4, f);
  put_bits(out + 16, f.codes, 4, 0);
}

inline void pack_q5_k(uint8_t* out, const Fields& f) {
  put_half(out, f.d);
  put_half(out + 2, f.dmin);
  put_scales_and_mins(out + 4, f);
  put_bits(out + 16, f.codes, 1, 4);
  put_bits(out + 48, f.codes, 4, 0);
}

inline void pack_q6_k(uint8_t* out, const Fields& f) {
  for (int half = 0; half < SuperBlock; half += 128)
    for (int k = 0; k < 64; ++k)
      out[half / 2 + k] = static_cast<uint8_t>((f.codes[half + k] & 15) | (f.codes[half + 64 + k] & 15) << 4);
  put_bits(out + 128, f.codes, 2, 4);
  std::memcpy(out + 192, f.scales, 16);
  put_half(out + 208, f.d);
}

}  // namespace kquants
