// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: formats/ggml/legacy.py compiled, bit for bit. The searches are in ggml_line.h.

#include "ggml_line.h"

#include <vector>

namespace {

using namespace line;

// --- ggml's own -----------------------------------------------------------------------------------------------------

// make_qx_quants: the scale of least error under `weight`, and the factor and shift that give its codes.
template <int Top>
Float make_qx(const Float* x, const Float* weight, Float max, Float& scaling) {
  Float wx[Block], scale = {}, best = {}, chosen = {};
  for (int k = 0; k < Block; ++k) wx[k] = weight[k] * x[k];
  for (int n = 0; n < 19; ++n) {
    const int i = n == 0 ? 0 : n <= 9 ? n - 10 : n - 9;
    const Float inverse = -(Top + 0.1f * i) / max;
    Float a = {}, b = {};
    for (int k = 0; k < Block; ++k) {
      const Float q = Symmetric<-Top, Top - 1>::nearest(inverse * x[k]);
      a += wx[k] * q;
      b += weight[k] * q * q;
    }
    const Int better = n == 0 ? splat(-1) : (b > 0.f) & (a * a > best * b);
    scale = lanes::select(better, a / b, scale);
    if (n == 0) scale = lanes::select(b == 0.f, splat(0.f), scale);
    best = lanes::select(better, scale * a, best);
    chosen = lanes::select(better, inverse, chosen);
  }
  scaling = chosen;
  return lanes::select(absolute(max) < GroupMaxEps, splat(0.f), scale);
}

// make_qkx3_quants: the line of least error under `weight` with a minimum of at most 0, and the one that codes it.
template <int MaxCode>
Line make_qkx3(const Float* x, const Float* weight, Float low, Float high, Line& coding) {
  Float w = {}, wx = {};
  for (int k = 0; k < Block; ++k) {
    w += weight[k];
    wx += weight[k] * x[k];
  }
  low = lanes::select(low > 0.f, splat(0.f), low);
  const Int empty = high <= low;
  const auto code = [](Float v) { return to_float(clamp(nearest(v), splat(0), splat(MaxCode))); };
  const Float first = splat(float(MaxCode)) / (high - low);
  Float scale = 1.f / first, best = {}, q[Block];
  for (int k = 0; k < Block; ++k) {
    const Float difference = scale * code(first * (x[k] - low)) + low - x[k];
    best += weight[k] * (difference * difference);
  }
  coding = {first, low};
  for (int i = 0; i < 37; ++i) {
    const Float inverse = (-0.9f + 0.05f * i + MaxCode) / (high - low);
    Float sq = {}, sqq = {}, sqx = {}, error = {};
    for (int k = 0; k < Block; ++k) {
      q[k] = code(inverse * (x[k] - low));
      const Float wq = weight[k] * q[k];
      sq += wq;
      sqq += wq * q[k];
      sqx += wq * x[k];
    }
    const Float determinant = w * sqq - sq * sq;
    Float this_scale = (w * sqx - wx * sq) / determinant, this_low = (sqq * wx - sq * sqx) / determinant;
    this_scale = lanes::select(this_low > 0.f, sqx / sqq, this_scale);
    this_low = lanes::select(this_low > 0.f, splat(0.f), this_low);
    for (int k = 0; k < Block; ++k) {
      const Float difference = this_scale * q[k] + this_low - x[k];
      error += weight[k] * (difference * difference);
    }
    const Int better = (determinant > 0.f) & (error < best);
    if (!any(better)) continue;
    best = lanes::select(better, error, best);
    coding = select(better, {inverse, low}, coding);
    scale = lanes::select(better, this_scale, scale);
    low = lanes::select(better, this_low, low);
  }
  coding.step = lanes::select(empty, splat(0.f), coding.step);
  return {lanes::select(empty, splat(0.f), scale), low};
}

// --- the types ------------------------------------------------------------------------------------------------------

struct Tile {
  Float x[Block], users[Block], objective[Block];
};

// 1 / d as ggml has it: 0 where d is 0, and where the quotient overflows (there C's conversion to integers gives 0).
Float inverse_of(Float d, Int& usable) {
  const Float inverse = lanes::select(d == 0.f, splat(0.f), 1.f / d);
  usable = finite(inverse);
  return lanes::select(usable, inverse, splat(0.f));
}

// Without its fraction; 0 for NaN, which is what is left of C's conversion in a few bits.
Float integer(Float v) { return to_float(truncate(lanes::select(v == v, v, splat(0.f)))); }

// Where the largest weight is sent: picked greedily out of a fine grid, on Gaussian and on real rows.
constexpr float Tops4[] = {-8.2f, -7.2f, -8.6f, -7.8f};
constexpr float Tops5[] = {-16.2f, -15.2f, -15.8f, -16.6f, -14.2f, -14.8f};
constexpr float Tops8[] = {127.f, 125.f, 125.8f, 123.f, 124.2f, 121.f, 122.2f, 120.2f};
constexpr float WeightedTops4[] = {-9.f,  -8.8f, -8.6f, -8.4f, -8.2f, -8.f, -7.8f, -7.6f, -7.4f, -7.2f,
                                   -6.9f, -6.6f, -6.2f, 6.2f,  6.6f,  6.8f, 7.f,   7.2f,  7.4f,  7.8f};
constexpr float WeightedTops5[] = {-17.f,  -16.6f, -16.4f, -16.2f, -16.f, -15.8f, -15.5f, -15.2f, -14.8f, -14.2f,
                                   -13.8f, -13.f,  13.f,   13.6f,  14.f,  14.3f,  14.6f,  14.9f,  15.2f,  15.6f};

template <int Top>
struct SymmetricType {
  static constexpr int Words = Top == 8 ? 4 : 5, Bytes = 2 + 4 * Words;
  static constexpr bool HasMinimum = false;
  using Level = Symmetric<-Top, Top - 1>;

  static void plain(const Problem& p, const Tile& t, Float& d, Float&, Float* code) {
    const Float max = signed_max<Block>(t.x);
    d = max / splat(float(-Top));
    if (p.exact) {
      Int usable;
      const Float inverse = inverse_of(d, usable), shift = lanes::select(usable, splat(Top + 0.5f), splat(0.f));
      for (int k = 0; k < Block; ++k) code[k] = integer(minimum(t.x[k] * inverse + shift, splat(2 * Top - 0.5f)));
      return;
    }
    const View<0> v{t.x, {}};
    d = Top == 8 ? refine<Level>(v, half(d), max, Tops4, 1) : refine<Level>(v, half(d), max, Tops5, 1);
    finish(t, d, code);
  }

  static void weighted(const Problem& p, const Tile& t, Float& d, Float&, Float* code) {
    const Float max = signed_max<Block>(t.x);
    Float scaling;
    const Float scale = make_qx<Top>(t.x, t.objective, max, scaling);
    d = scale;
    if (p.exact) {
      const Int empty = absolute(max) < GroupMaxEps;
      for (int k = 0; k < Block; ++k)
        code[k] = lanes::select(empty, splat(0.f), Level::nearest(scaling * t.x[k]) + float(Top));
      return;
    }
    const View<2> v{t.x, {t.users, t.objective}};
    d = half(lanes::select(d == d, d, max / splat(float(-Top))));
    d = Top == 8 ? refine<Level>(v, d, max, WeightedTops4, 2) : refine<Level>(v, d, max, WeightedTops5, 2);
    finish(t, d, code);
  }

  static void finish(const Tile& t, Float d, Float* code) {
    const Float inverse = reciprocal(d);
    for (int k = 0; k < Block; ++k) code[k] = Level::nearest(t.x[k] * inverse) + float(Top);
  }
};

struct Q8Type {
  static constexpr int Words = 8, Bytes = 34;
  static constexpr bool HasMinimum = false;
  using Level = Symmetric<-127, 127>;

  static void plain(const Problem& p, const Tile& t, Float& d, Float&, Float* code) {
    search<0>(p, View<0>{t.x, {}}, d, code);
  }

  static void weighted(const Problem& p, const Tile& t, Float& d, Float&, Float* code) {
    search<1>(p, View<1>{t.x, {t.users}}, d, code);
  }

  template <int Metrics>
  static void search(const Problem& p, const View<Metrics>& v, Float& d, Float* code) {
    Float max = {};
    for (int k = 0; k < Block; ++k) max = maximum(max, absolute(v.x[k]));
    d = max / splat(127.f);
    if (p.exact) {
      Int usable;
      const Float inverse = inverse_of(d, usable);
      for (int k = 0; k < Block; ++k) {  // half away from zero: the number before 0.5 is added, with the sign
        const Float q = v.x[k] * inverse;
        code[k] = integer(q + from_bits(bits(splat(0.49999997f)) | (bits(q) & INT32_MIN))) + 128.f;
      }
      return;
    }
    d = refine<Level>(v, half(d), max, Tops8, 1);
    const Float inverse = reciprocal(d);
    for (int k = 0; k < Block; ++k) code[k] = Level::nearest(v.x[k] * inverse) + 128.f;
  }
};

constexpr Shift Shifts15[] = {{.15f, .45f}, {-.45f, -.15f}};
constexpr Shift Shifts31[] = {{.15f, .3f}, {-.45f, -.15f}};
constexpr Shift WeightedShifts[] = {
    {-.45f, -.45f}, {-.45f, -.15f}, {-.45f, .15f}, {-.45f, .45f}, {-.15f, -.45f}, {-.15f, -.15f},
    {-.15f, .15f},  {-.15f, .45f},  {.15f, -.45f}, {.15f, -.15f}, {.15f, .15f},   {.15f, .45f},
    {.45f, -.45f},  {.45f, -.15f},  {.45f, .15f},  {.45f, .45f}};

template <int MaxCode>
struct AffineType {
  static constexpr int Words = MaxCode == 15 ? 4 : 5, Bytes = 4 + 4 * Words;
  static constexpr bool HasMinimum = true;

  static void range(const Float* x, Float& low, Float& high) {
    low = high = x[0];
    for (int k = 1; k < Block; ++k) {
      low = minimum(x[k], low);  // of 0 and -0 the first, as in C
      high = maximum(x[k], high);
    }
  }

  static void plain(const Problem& p, const Tile& t, Float& d, Float& m, Float* code) {
    Float high;
    range(t.x, m, high);
    d = (high - m) / splat(float(MaxCode));
    if (p.exact) {
      Int usable;
      const Float inverse = inverse_of(d, usable);
      for (int k = 0; k < Block; ++k)
        code[k] = minimum(integer((t.x[k] - m) * inverse + 0.5f), splat(float(MaxCode)));
      return;
    }
    const View<0> v{t.x, {}};
    const Line l{half(d), half(m)};
    const Line found = MaxCode == 15 ? refine_affine<MaxCode>(v, l, m, high, Shifts15, code)
                                     : refine_affine<MaxCode>(v, l, m, high, Shifts31, code);
    d = found.step;
    m = found.low;
  }

  static void weighted(const Problem& p, const Tile& t, Float& d, Float& m, Float* code) {
    Float low, high;
    range(t.x, low, high);
    Line coding;
    Line l = make_qkx3<MaxCode>(t.x, t.objective, low, high, coding);
    if (p.exact) {
      d = l.step;
      m = l.low;
      for (int k = 0; k < Block; ++k)
        code[k] = to_float(clamp(nearest(coding.step * (t.x[k] - coding.low)), splat(0), splat(MaxCode)));
      return;
    }
    const View<2> v{t.x, {t.users, t.objective}};
    const Int usable = finite(l.step) & finite(l.low);
    l = select(usable, l, {(high - low) / splat(float(MaxCode)), low});
    l = {half(l.step), half(l.low)};
    l = refine_affine<MaxCode>(v, l, low, high, WeightedShifts, code);
    d = l.step;
    m = l.low;
  }
};

// --- rows -----------------------------------------------------------------------------------------------------------

template <class Type>
void store(const Problem& p, int64_t first, Float d, Float m, Float* code) {
  Int words[8];
  if (Type::Words == 8) {
    for (int w = 0; w < 8; ++w) {
      words[w] = Int{};
      for (int b = 0; b < 4; ++b) words[w] |= truncate(code[4 * w + b]) << (8 * b);
      words[w] ^= 0x80808080;  // int8
    }
  } else {
    if (Type::Words == 5) {
      words[0] = Int{};
      for (int k = 0; k < Block; ++k) {
        const Int high = code[k] >= 16.f;
        words[0] |= high & static_cast<int32_t>(1u << k);
        code[k] -= lanes::select(high, splat(16.f), splat(0.f));
      }
    }
    pack_nibbles(code, words + Type::Words - 4);
  }
  const Int d16 = to_half(d), m16 = to_half(m);
  const int64_t count = std::min<int64_t>(Lanes, p.rows * p.columns / Block - first);
  for (int lane = 0; lane < count; ++lane) {
    uint8_t* out = p.blocks + (first + lane) * Type::Bytes;
    store_half(d16, lane, out);
    if (Type::HasMinimum) store_half(m16, lane, out + 2);
    store_words(words, Type::Words, lane, out + Type::Bytes - 4 * Type::Words);
  }
}

template <class Type>
void quantize_tiles(int64_t begin, int64_t end, void* problem) {
  const Problem& p = *static_cast<const Problem*>(problem);
  Tile t;
  Float code[Block];
  for (int64_t first = begin * Lanes; first < end * Lanes; first += Lanes) {
    Float d, m = {};
    load<Block>(p, first, t.x);
    if (p.importance == nullptr) {
      Type::plain(p, t, d, m, code);
    } else {
      load_importance<Block>(p, first, t.users);
      if (p.mean != nullptr) {
        const int64_t per_row = p.columns / Block;
        Float mean;
        for (int lane = 0; lane < Lanes; ++lane) mean[lane] = p.mean[std::min((first + lane) / per_row, p.rows - 1)];
        for (int k = 0; k < Block; ++k) {
          const Float square = mean + t.x[k] * t.x[k];
          t.objective[k] = t.users[k] * lanes::sqrt(p.exact ? square : minimum(square, splat(Huge)));
        }
      }
      Type::weighted(p, t, d, m, code);
    }
    store<Type>(p, first, d, m, code);
  }
}

void mean_squares(int64_t begin, int64_t end, void* problem) {
  const Problem& p = *static_cast<const Problem*>(problem);
  Float x[Block];
  for (int64_t row = begin * Lanes; row < std::min(end * Lanes, p.rows); row += Lanes) {
    Float sum = {};
    const float* source[Lanes];
    for (int64_t column = 0; column < p.columns; column += Block) {
      for (int lane = 0; lane < Lanes; ++lane)
        source[lane] = p.weight + std::min(row + lane, p.rows - 1) * p.columns + column;
      load_columns<Block>(source, x);
      for (int k = 0; k < Block; ++k) sum += x[k] * x[k];
    }
    sum = sum / splat(float(p.columns));
    for (int lane = 0; lane < Lanes && row + lane < p.rows; ++lane) p.mean[row + lane] = sum[lane];
  }
}

template <class Type>
int32_t quantize(const float* weight, const float* importance, int64_t rows, int64_t columns, int32_t exact,
                 uint8_t* blocks) {
  Problem p{weight, importance, rows, columns, exact != 0, blocks, nullptr};
  std::vector<float> mean;
  if (importance != nullptr && Type::Words != 8) {
    mean.resize(rows);
    p.mean = mean.data();
    const int32_t code = torch_parallel_for(0, (rows + Lanes - 1) / Lanes, 1, mean_squares, &p);
    if (code) return code;
  }
  return torch_parallel_for(0, (rows * columns / Block + Lanes - 1) / Lanes, 64, quantize_tiles<Type>, &p);
}

}  // namespace

// 0, or torch's error code: W [rows, columns], importance [columns] or null, blocks [rows, bytes].
#define QUANTOOL_LEGACY(name, Type)                                                                                 \
  extern "C" int32_t quantool_quantize_##name(const float* weight, const float* importance, int64_t rows,           \
                                              int64_t columns, int32_t exact, uint8_t* blocks) {                    \
    return quantize<Type>(weight, importance, rows, columns, exact, blocks);                                        \
  }

QUANTOOL_LEGACY(q4_0, SymmetricType<8>)
QUANTOOL_LEGACY(q4_1, AffineType<15>)
QUANTOOL_LEGACY(q5_0, SymmetricType<16>)
QUANTOOL_LEGACY(q5_1, AffineType<31>)
QUANTOOL_LEGACY(q8_0, Q8Type)
