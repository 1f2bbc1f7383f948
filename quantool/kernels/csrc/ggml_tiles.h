// Blocks of all rows as one flat list, one in every lane, and their way in and out of memory (the CPU's).

#pragma once

#include "ggml_line.h"

namespace line {

struct Problem {
  const float* weight;      // [rows, columns], as units of `Size` weights one after the other
  const float* importance;  // [columns] or null
  int64_t rows, columns;
  uint8_t* blocks;
  float* mean;  // sum(x^2) / columns of every row, where ggml's objective needs it
};

#if !defined(__clang__)
// Lanes rows of Lanes numbers become columns: each pass interleaves the first half of the vectors with the second.
inline void transpose(Float* v) {
  Int low, high;  // which numbers of two vectors, one after the other, are interleaved
  for (int lane = 0; lane < Lanes; ++lane) {
    low[lane] = lane / 2 + lane % 2 * Lanes;
    high[lane] = low[lane] + Lanes / 2;
  }
  for (int pass = 1; pass < Lanes; pass *= 2) {
    Float mixed[Lanes];
    for (int i = 0; i < Lanes / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(v[i], v[i + Lanes / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(v[i], v[i + Lanes / 2], high);
    }
    for (int i = 0; i < Lanes; ++i) v[i] = mixed[i];
  }
}
#endif

// x[k][lane] = source[lane][k], with fewer stores than load_transposed where the compiler has two-vector shuffles.
template <int Size>
inline void load_columns(const float* const* source, Float* x) {
#if defined(__clang__)
  load_transposed(source, Size, x);
#else
  for (int start = 0; start < Size; start += Lanes) {
    for (int lane = 0; lane < Lanes; ++lane) std::memcpy(x + start + lane, source[lane] + start, sizeof(Float));
    transpose(x + start);
  }
#endif
}

// The weights of units first, first + 1, ... of `Size` weights, one unit in every lane; the last again past the end.
template <int Size>
inline void load(const Problem& p, int64_t first, Float* x) {
  const int64_t last = p.rows * p.columns / Size - 1;
  const float* source[Lanes];
  for (int lane = 0; lane < Lanes; ++lane) source[lane] = p.weight + std::min(first + lane, last) * Size;
  load_columns<Size>(source, x);
}

// The importance of their columns.
template <int Size>
inline void load_importance(const Problem& p, int64_t first, Float* importance) {
  const int64_t per_row = p.columns / Size;
  const float* source[Lanes];
  for (int lane = 0; lane < Lanes; ++lane) source[lane] = p.importance + (first + lane) % per_row * Size;
  load_columns<Size>(source, importance);
}

// lane `lane` of `count` words, at `out`.
inline void store_words(const Int* words, int count, int lane, uint8_t* out) {
  for (int w = 0; w < count; ++w) {
    const int32_t word = words[w][lane];
    std::memcpy(out + 4 * w, &word, 4);
  }
}

inline void store_half(Int halves, int lane, uint8_t* out) {
  const uint16_t half = static_cast<uint16_t>(halves[lane]);
  std::memcpy(out, &half, 2);
}

}  // namespace line
