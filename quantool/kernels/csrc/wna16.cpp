// Rows of packed codes on the CPU: what `dequantize_rows` and `linear_wna16` of ops.py compute, compiled.
//
//     words    | 32 codes in Bits words | 32 codes | ...    a chunk: at any width it begins with a whole word
//     scales   | one for each group: a whole number of chunks, or all of the row
//     weight   (code - zero) * scale, in float32
//
// Lane l of a vector finds its code l * Bits bits further into the chunk, maybe half in one word and half in the next:
// one permutation brings every lane its word, one shift its code. OR'd into the last bits of 2^23 a code is a float
// already, 2^23 + code, from which 2^23 + zero is subtracted exactly.
//
// dequantize   rounds the weights once to the type that is asked for.
// linear       multiplies them by up to eight tokens while they are in a register: nothing but the codes is read from
//              memory. y[t, n] is added up in an order of its own columns, whatever the number of threads.

#include <algorithm>
#include <utility>
#include <vector>

#include "lanes.h"

namespace {

using namespace lanes;

constexpr int Chunk = 32, Vectors = Chunk / Lanes;
constexpr int RowsAtOnce = 4;            // of `linear`: threads share out these
constexpr int64_t Task = 1 << 15;        // weights: fewer are not worth a second thread
constexpr int32_t TwoTo23 = 0x4b000000;  // as a float

enum Type : int64_t { Float32, BFloat16, Float16 };

struct Packed {
  const int32_t* words;  // [rows, ceil(columns * bits / 32)]
  const void* scales;    // [rows, groups] of `scale_type`
  const uint8_t* zeros;  // [rows, groups], or null: half of the codes' range
  int64_t scale_type, rows, columns, groups;

  int64_t chunks() const { return (columns + Chunk - 1) / Chunk; }
};

// --- 16 bits to float32 and back -------------------------------------------------------------------------------------

typedef uint16_t Short __attribute__((vector_size(Lanes * sizeof(uint16_t))));

template <class Vector, class Element>
inline Vector load(const Element* from, int64_t count = Lanes) {
  Vector v{};
  if (count >= Lanes) std::memcpy(&v, from, sizeof v);
  else std::memcpy(&v, from, count * sizeof(Element));
  return v;
}

template <class Vector, class Element>
inline void store(Vector v, Element* to, int64_t count) {
  if (count >= Lanes) std::memcpy(to, &v, sizeof v);
  else std::memcpy(to, &v, count * sizeof(Element));
}

inline Int to_bfloat16(Float v) {
  const Int nearest = (bits(v) + 0x7fff + ((bits(v) >> 16) & 1)) >> 16;
  return select(v == v, nearest, splat(0x7fc0));
}

void widen(const void* from, int64_t type, int64_t at, int64_t count, float* to) {
  if (type == Float32) {
    std::copy_n(static_cast<const float*>(from) + at, count, to);
    return;
  }
  for (int64_t i = 0; i < count; i += Lanes) {
    const Int half = __builtin_convertvector(load<Short>(static_cast<const uint16_t*>(from) + at + i, count - i), Int);
    store(type == Float16 ? from_half(half) : from_bits(half << 16), to + i, count - i);
  }
}

template <int64_t type>
inline void narrow(Float v, void* to, int64_t at, int64_t count) {
  if (type == Float32) {
    store(v, static_cast<float*>(to) + at, count);
  } else {
    const Int half = type == Float16 ? to_half(v) : to_bfloat16(v);
    store(__builtin_convertvector(half, Short), static_cast<uint16_t*>(to) + at, count);
  }
}

// --- codes to weights ------------------------------------------------------------------------------------------------

// { words[index[0]], words[index[1]], ... } for indices below 8; reads 8 words.
inline Int pick(const int32_t* words, Int index) {
#if defined(__AVX512F__)
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(words));
  return (Int)_mm512_permutexvar_epi32((__m512i)index, _mm512_castsi256_si512(all));
#elif defined(__AVX2__)
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(words));
  return (Int)_mm256_permutevar8x32_epi32(all, (__m256i)index);
#else
  Int picked;
  for (int lane = 0; lane < Lanes; ++lane) picked[lane] = words[index[lane]];
  return picked;
#endif
}

// Where the codes of the lanes of vector `v` are among the words of a chunk.
template <int Bits>
struct Place {
  Int word, next, shift;

  explicit Place(int v) {
    for (int lane = 0; lane < Lanes; ++lane) {
      const int bit = (v * Lanes + lane) * Bits;
      word[lane] = bit / 32;
      next[lane] = std::min(bit / 32 + 1, Bits - 1);
      shift[lane] = bit % 32;
    }
  }

  // 2^23 + code
  Float codes(const int32_t* words) const {
    typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Int))));
    Int code = (Int)((Unsigned)pick(words, word) >> (Unsigned)shift);
    if (32 % Bits != 0) code |= (pick(words, next) << 1) << (31 - shift);
    return from_bits((code & ((1 << Bits) - 1)) | TwoTo23);
  }
};

// Rows of a matrix one after the other.
template <int Bits>
class Row {
 public:
  explicit Row(const Packed& p) : p_(p), tail_(p.chunks() * Bits + 8), scales_(p.groups) {}

  void open(int64_t row) {
    const int64_t count = (p_.columns * Bits + 31) / 32, size = tail_.size();
    words_ = p_.words + row * count;
    if ((p_.rows - row) * count < size) {  // whole chunks, and the 8 words of a load, would end past the matrix
      std::copy_n(words_, count, tail_.data());
      words_ = tail_.data();
    }
    widen(p_.scales, p_.scale_type, row * p_.groups, p_.groups, scales_.data());
    zeros_ = p_.zeros ? p_.zeros + row * p_.groups : nullptr;
  }

  const int32_t* words(int64_t chunk) const { return words_ + chunk * Bits; }
  Float scale(int64_t group) const { return scales_[group] - Float{}; }  // splat adds 0, which is no longer -0
  Float zero(int64_t group) const { return splat(0x1p23f + (zeros_ ? zeros_[group] : 1 << (Bits - 1))); }

 private:
  const Packed& p_;
  std::vector<int32_t> tail_;
  std::vector<float> scales_;
  const int32_t* words_ = nullptr;
  const uint8_t* zeros_ = nullptr;
};

// use(column, weights) for each `Lanes` columns: weights[r] are those of rows[r]. The last may reach past the row.
template <int Bits, int Rows, class Use, int... V>
inline void unpack(const Packed& p, const Row<Bits>* rows, std::integer_sequence<int, V...>, Use use) {
  const Place<Bits> places[] = {Place<Bits>(V)...};
  const int64_t chunks = p.chunks(), group_chunks = (chunks + p.groups - 1) / p.groups;
  for (int64_t group = 0, chunk = 0; group < p.groups; ++group) {
    Float zero[Rows], scale[Rows], weights[Rows];
    for (int r = 0; r < Rows; ++r) zero[r] = rows[r].zero(group), scale[r] = rows[r].scale(group);
    for (const int64_t end = chunk + group_chunks; chunk < end; ++chunk)
      for (int v = 0; v < Vectors; ++v) {
        for (int r = 0; r < Rows; ++r) weights[r] = (places[v].codes(rows[r].words(chunk)) - zero[r]) * scale[r];
        use(chunk * Chunk + v * Lanes, weights);
      }
  }
}

using AllVectors = std::make_integer_sequence<int, Vectors>;

// --- dequantize ------------------------------------------------------------------------------------------------------

struct Dequantize {
  Packed packed;
  void* weight;  // [rows, columns]
};

template <int Bits, int64_t type>
void dequantize_rows(int64_t begin, int64_t end, void* problem) {
  const Dequantize& p = *static_cast<const Dequantize*>(problem);
  const int64_t columns = p.packed.columns;
  Row<Bits> row(p.packed);
  for (int64_t r = begin; r < end; ++r) {
    row.open(r);
    unpack<Bits, 1>(p.packed, &row, AllVectors(), [&](int64_t column, const Float* weights) {
      if (column < columns) narrow<type>(weights[0], p.weight, r * columns + column, columns - column);
    });
  }
}

// --- linear ----------------------------------------------------------------------------------------------------------

struct Linear {
  Packed packed;
  const float* x;  // [tokens, columns up to a whole chunk]
  float* y;        // [tokens, rows]
};

inline Float multiply_add(Float a, Float b, Float sum) {
#if defined(__AVX512F__)
  return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
  return a * b + sum;
#endif
}

inline float total(Float v) {
  float sum[Lanes];
  store(v, sum, Lanes);
  for (int width = Lanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
  return sum[0];
}

template <int Bits, int Tokens>
void linear_rows(int64_t begin, int64_t end, void* problem) {
  constexpr int Tile = (Tokens > 2 ? 2 : 4) / (Lanes == 16 ? 1 : 2);  // rows whose sums are registers together
  const Linear& p = *static_cast<const Linear*>(problem);
  const int64_t stride = p.packed.chunks() * Chunk, num_rows = p.packed.rows, last = num_rows - 1;
  std::vector<Row<Bits>> rows(Tile, Row<Bits>(p.packed));
  for (int64_t first = begin * RowsAtOnce; first < std::min(end * RowsAtOnce, num_rows); first += Tile) {
    for (int r = 0; r < Tile; ++r) rows[r].open(std::min(first + r, last));
    Float sums[Tokens][Tile] = {};
    unpack<Bits, Tile>(p.packed, rows.data(), AllVectors(), [&](int64_t column, const Float* weights) {
      for (int t = 0; t < Tokens; ++t) {
        const Float x = load<Float>(p.x + t * stride + column);
        for (int r = 0; r < Tile; ++r) sums[t][r] = multiply_add(x, weights[r], sums[t][r]);
      }
    });
    for (int t = 0; t < Tokens; ++t)
      for (int r = 0; r < Tile; ++r) p.y[t * num_rows + std::min(first + r, last)] = total(sums[t][r]);
  }
}

typedef void (*Body)(int64_t, int64_t, void*);

// By type, and by the logarithm of the number of tokens.
template <int Bits>
constexpr Body dequantize_bodies[] = {dequantize_rows<Bits, Float32>, dequantize_rows<Bits, BFloat16>,
                                      dequantize_rows<Bits, Float16>};
template <int Bits>
constexpr Body linear_bodies[] = {linear_rows<Bits, 1>, linear_rows<Bits, 2>, linear_rows<Bits, 4>,
                                  linear_rows<Bits, 8>};

int32_t run(Body body, int64_t count, int64_t weights_each, void* problem) {
  return torch_parallel_for(0, count, std::max<int64_t>(1, Task / weights_each), body, problem);
}

}  // namespace

// What the pointers hold is said at the structs; types are 0 float32, 1 bfloat16, 2 float16; bits are 2 to 8. Both
// return 0, or torch's error code.
extern "C" int32_t quantool_dequantize_rows(const int32_t* words, const void* scales, const uint8_t* zeros,
                                            int64_t scale_type, int64_t rows, int64_t columns, int64_t groups,
                                            int64_t bits, void* weight, int64_t type) {
  static constexpr const Body* bodies[] = {dequantize_bodies<2>, dequantize_bodies<3>, dequantize_bodies<4>,
                                           dequantize_bodies<5>, dequantize_bodies<6>, dequantize_bodies<7>,
                                           dequantize_bodies<8>};
  Dequantize p{{words, scales, zeros, scale_type, rows, columns, groups}, weight};
  return run(bodies[bits - 2][type], rows, columns, &p);
}

extern "C" int32_t quantool_linear_rows(const int32_t* words, const void* scales, const uint8_t* zeros,
                                        int64_t scale_type, int64_t rows, int64_t columns, int64_t groups, int64_t bits,
                                        const float* x, int64_t tokens, float* y) {
  static constexpr const Body* bodies[] = {linear_bodies<2>, linear_bodies<3>, linear_bodies<4>, linear_bodies<5>,
                                           linear_bodies<6>, linear_bodies<7>, linear_bodies<8>};
  const Packed packed{words, scales, zeros, scale_type, rows, columns, groups};
  for (int log = 3; tokens > 0; --log)
    for (; tokens >> log > 0; tokens -= 1 << log) {
      Linear p{packed, x, y};
      const int32_t failed =
          run(bodies[bits - 2][log], (rows + RowsAtOnce - 1) / RowsAtOnce, RowsAtOnce * columns, &p);
      if (failed) return failed;
      x += packed.chunks() * Chunk << log;
      y += rows << log;
    }
  return 0;
}
