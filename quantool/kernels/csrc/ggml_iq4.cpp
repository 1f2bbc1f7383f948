// IQ4_NL, IQ4_XS: formats/ggml/iq4.py compiled, bit for bit. The search for one step is in ggml_line.h.

#include "ggml_line.h"

namespace {

using namespace line;

constexpr float Levels[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int Super = 256, Groups = Super / Block, Tries = 7;
constexpr float Tops[] = {-141, -137, -133, -129, -125, -121, -117, -113, -109,
                          93,   97,   101,  105,  109,  113,  117,  121,  125};
constexpr int Negative = 9;  // of them
constexpr float Divisors[] = {-32, -31, -30, -29, -28, 31, 30, 29, 28};  // integers that the largest scale becomes
constexpr float Blend = 0.5f;

struct Iq4 {
  // The nearest level, the upper of two: a sum of the steps between levels whose middle is reached. All are exact.
  static Float nearest(Float v) {
    Float level = splat(Levels[0]);
    for (int i = 0; i < 15; ++i)
      level += lanes::select(v >= (Levels[i] + Levels[i + 1]) / 2, splat(Levels[i + 1] - Levels[i]), splat(0.f));
    return level;
  }
  static Float code(Float v) {
    Int code = {};
    for (int i = 0; i < 15; ++i) code -= v >= (Levels[i] + Levels[i + 1]) / 2;
    return to_float(code);
  }
};

// ggml's scale of least error under `objective`; NaN where it has no weight.
Float fit_scale(const Float* x, const Float* objective) {
  const Float top = signed_max<Block>(x);
  const View<1> v{x, {objective}};
  Float scale = {}, best = {};
  for (int n = 0; n < 2 * Tries + 2; ++n) {
    const Float inverse = n == 0 ? 1.f / (-top / splat(Levels[0])) : splat(n - 1 - Tries + Levels[0]) / top;
    StepSums<1> s;
    for (int k = 0; k < Block; ++k) s.add(v, k, Iq4::nearest(inverse * x[k]));
    const Float fitted = s.a[0] / s.b[0];
    const Int better = n == 0 ? splat(-1) : (s.b[0] > 0.f) & (s.a[0] * s.a[0] > best * s.b[0]);
    scale = n == 0 ? fitted : lanes::select(better, fitted, scale);
    best = n == 0 ? scale * s.a[0] : lanes::select(better, scale * s.a[0], best);
  }
  return lanes::select(absolute(top) < GroupMaxEps, splat(0.f), scale);
}

template <int Groups>
struct Tile {
  Float x[Groups][Block], users[Groups][Block], objective[Groups][Block];
  int64_t first;  // of the (super-)blocks
};

// The weights, the user's importance and ggml's objective of one (super-)block in every lane.
template <int Groups>
void load_tile(const Problem& p, Tile<Groups>& t) {
  constexpr int Size = Groups * Block;
  Float *x = t.x[0], *users = t.users[0], *objective = t.objective[0];
  load<Size>(p, t.first, x);
  if (p.importance == nullptr) {
    for (int k = 0; k < Size; ++k) {
      users[k] = splat(1.f);
      objective[k] = x[k] * x[k];
    }
    return;
  }
  load_importance<Size>(p, t.first, users);
  Float sum = {};
  for (int k = 0; k < Size; ++k) sum += x[k] * x[k];
  sum *= 2.f / Size;
  for (int k = 0; k < Size; ++k) {
    const Float square = sum + x[k] * x[k];
    objective[k] = users[k] * lanes::sqrt(p.exact ? square : minimum(square, splat(Huge)));
  }
}

// --- IQ4_NL ---------------------------------------------------------------------------------------------------------

void plain_tiles(int64_t begin, int64_t end, void* problem) {
  const Problem& p = *static_cast<const Problem*>(problem);
  constexpr int Bytes = 18;
  Tile<1> t;
  for (int64_t tile = begin; tile < end; ++tile) {
    t.first = tile * Lanes;
    load_tile(p, t);
    const Float* x = t.x[0];
    Float d = fit_scale(x, t.objective[0]);
    d = lanes::select(d == d, d, splat(0.f));
    const Float *bound = t.objective[0], *aim = t.users[0];
    if (p.importance != nullptr) std::swap(bound, aim);
    if (!p.exact) d = refine<Iq4>(View<2>{x, {bound, aim}}, half(d), signed_max<Block>(x), Tops, 2);
    const Float inverse = reciprocal(d);
    Float code[Block];
    Int words[4];
    for (int k = 0; k < Block; ++k) code[k] = Iq4::code(x[k] * inverse);
    pack_nibbles(code, words);
    const Int d16 = to_half(d);
    for (int lane = 0; lane < std::min<int64_t>(Lanes, p.rows * p.columns / Block - t.first); ++lane) {
      uint8_t* out = p.blocks + (t.first + lane) * Bytes;
      store_half(d16, lane, out);
      store_words(words, 4, lane, out + 2);
    }
  }
}

// --- IQ4_XS ---------------------------------------------------------------------------------------------------------

// d and the integers in front of it; codes are the nearest.
struct Scales {
  Float d, integer[Groups];
};

struct Errors {
  Float objective, users;
};

Errors errors_of(const Tile<Groups>& t, const Scales& s) {
  Errors sum = {splat(0.f), splat(0.f)};
  for (int g = 0; g < Groups; ++g) {
    Float errors[2];
    line_errors<Iq4>(View<2>{t.x[g], {t.objective[g], t.users[g]}}, s.d * s.integer[g], errors);
    sum.objective += errors[0];
    sum.users += errors[1];
  }
  return sum;
}

// The step of most gain in each group, with the largest weight near the first or near the last level.
void best_steps(const Tile<Groups>& t, const Float (*weight)[Block], Float (*steps)[Groups]) {
  for (int g = 0; g < Groups; ++g) {
    const Float scale = reciprocal(signed_max<Block>(t.x[g]));
    const View<1> v{t.x[g], {weight[g]}};
    Float best[2] = {}, found[2] = {}, gain;
    for (int i = 0; i < 2 * Negative; ++i) {
      const Float inverse = scale * Tops[i];
      StepSums<1> sums;
      for (int k = 0; k < Block; ++k) sums.add(v, k, Iq4::nearest(v.x[k] * inverse));
      const Float step = fit_step(sums, Float{}, Float{}, gain);
      const int sign = i >= Negative;
      const Int better = gain > best[sign];
      best[sign] = lanes::select(better, gain, best[sign]);
      found[sign] = lanes::select(better, step, found[sign]);
    }
    for (int sign = 0; sign < 2; ++sign) steps[sign][g] = found[sign];
  }
}

// For each group the integer of least error among those nearest to its two steps.
void nearest_integers(const Tile<Groups>& t, const Float (*weight)[Block], const Float (*steps)[Groups], Scales& s) {
  const Float inverse = reciprocal(s.d);
  for (int g = 0; g < Groups; ++g) {
    const View<1> v{t.x[g], {weight[g]}};
    Float best = splat(__builtin_inff()), found = {}, error;
    for (int sign = 0; sign < 2; ++sign) {
      const Float integer = clamp(rint(steps[sign][g] * inverse), splat(-32.f), splat(31.f));
      line_errors<Iq4>(v, s.d * integer, &error);
      const Int better = error < best;
      best = lanes::select(better, error, best);
      found = lanes::select(better, integer, found);
    }
    s.integer[g] = found;
  }
}

// The best d for the integers and codes of `s`.
Float refit(const Tile<Groups>& t, const Float (*weight)[Block], const Scales& s) {
  Float a = {}, b = {};
  for (int g = 0; g < Groups; ++g) {
    const View<1> v{t.x[g], {weight[g]}};
    const Float inverse = reciprocal(s.d * s.integer[g]);
    StepSums<1> sums;
    for (int k = 0; k < Block; ++k) sums.add(v, k, Iq4::nearest(v.x[k] * inverse));
    a += s.integer[g] * sums.a[0];
    b += s.integer[g] * (s.integer[g] * sums.b[0]);
  }
  return half(a * reciprocal(b));
}

void improve(const Tile<Groups>& t, Float largest, Scales& s) {
  const Errors limit = errors_of(t, s);
  const Float share = reciprocal(limit.objective) * Blend, rest = reciprocal(limit.users);
  Float weight[Groups][Block], steps[2][Groups], best = limit.users;
  for (int g = 0; g < Groups; ++g)
    for (int k = 0; k < Block; ++k) weight[g][k] = t.objective[g][k] * share + t.users[g][k] * rest;
  best_steps(t, weight, steps);
  for (float divisor : Divisors) {
    Scales fresh;
    fresh.d = half(largest / splat(divisor));
    nearest_integers(t, weight, steps, fresh);
    for (int i = 0; i < 2; ++i) {
      if (i) fresh.d = refit(t, weight, fresh);
      const Errors errors = errors_of(t, fresh);
      const Int better = (errors.objective <= limit.objective) & (errors.users < best);
      best = lanes::select(better, errors.users, best);
      s.d = lanes::select(better, fresh.d, s.d);
      for (int g = 0; g < Groups; ++g) s.integer[g] = lanes::select(better, fresh.integer[g], s.integer[g]);
    }
  }
}

void store(const Problem& p, const Tile<Groups>& t, const Scales& s) {
  constexpr int Bytes = 136;
  Float code[Block];
  Int words[Groups][4], high = {}, low = {};
  for (int g = 0; g < Groups; ++g) {
    const Float inverse = reciprocal(s.d * s.integer[g]);
    for (int k = 0; k < Block; ++k) code[k] = Iq4::code(t.x[g][k] * inverse);
    pack_nibbles(code, words[g]);
    const Int integer = truncate(s.integer[g]) + 32;
    low |= (integer & 15) << (4 * g);
    high |= (integer >> 4) << (2 * g);
  }
  const Int d16 = to_half(s.d);
  for (int lane = 0; lane < std::min<int64_t>(Lanes, p.rows * p.columns / Super - t.first); ++lane) {
    uint8_t* out = p.blocks + (t.first + lane) * Bytes;
    store_half(d16, lane, out);
    store_half(high, lane, out + 2);
    store_words(&low, 1, lane, out + 4);
    store_words(words[0], Groups * 4, lane, out + 8);
  }
}

void super_tiles(int64_t begin, int64_t end, void* problem) {
  const Problem& p = *static_cast<const Problem*>(problem);
  Tile<Groups> t;
  for (int64_t tile = begin; tile < end; ++tile) {
    t.first = tile * Lanes;
    load_tile(p, t);
    Float scales[Groups], most = {}, largest = {};
    for (int g = 0; g < Groups; ++g) {
      scales[g] = fit_scale(t.x[g], t.objective[g]);
      const Int larger = absolute(scales[g]) > most;
      most = lanes::select(larger, absolute(scales[g]), most);
      largest = lanes::select(larger, scales[g], largest);
    }
    Scales s;
    s.d = -largest / splat(32.f);
    const Float inverse = reciprocal(s.d);
    for (int g = 0; g < Groups; ++g)
      s.integer[g] = to_float(clamp(nearest(inverse * scales[g]), splat(-32), splat(31)));
    if (!p.exact) {
      s.d = half(s.d);
      improve(t, largest, s);
    }
    store(p, t, s);
  }
}

int32_t quantize(Problem p, int size, void (*tiles)(int64_t, int64_t, void*)) {
  return torch_parallel_for(0, (p.rows * p.columns / size + Lanes - 1) / Lanes, 1, tiles, &p);
}

}  // namespace

// 0, or torch's error code: W [rows, columns], importance [columns] or null, blocks [rows, bytes].
extern "C" int32_t quantool_quantize_iq4_nl(const float* weight, const float* importance, int64_t rows, int64_t columns,
                                            int32_t exact, uint8_t* blocks) {
  return quantize({weight, importance, rows, columns, exact != 0, blocks, nullptr}, Block, plain_tiles);
}

extern "C" int32_t quantool_quantize_iq4_xs(const float* weight, const float* importance, int64_t rows, int64_t columns,
                                            int32_t exact, uint8_t* blocks) {
  return quantize({weight, importance, rows, columns, exact != 0, blocks, nullptr}, Super, super_tiles);
}
