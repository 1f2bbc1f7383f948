// IQ4_NL, IQ4_XS: formats/ggml/iq4.py compiled, bit for bit. The searches are in ggml_iq4.h.

#include "ggml_iq4.h"

#include "ggml_tiles.h"

namespace {

using namespace line;

template <class Spread, bool Weighted, bool Exact>
void load_weights(const Problem& p, int64_t first, Weights<Spread>& w) {
  constexpr int Size = Spread::All * Block;
  load<Size>(p, first, w.x[0]);
  if (Weighted) load_importance<Size>(p, first, w.users[0]);
  weigh<Spread, Weighted, Exact>(w);
}

struct Iq4Nl {
  static constexpr int Size = Block, Bytes = 18;

  template <bool Weighted, bool Exact>
  static void quantize(const Problem& p, int64_t first, int64_t count) {
    Weights<Whole<1>> w;
    load_weights<Whole<1>, Weighted, Exact>(p, first, w);
    const Float step = find_step<Weighted, Exact>(w);
    Int words[4];
    pack_levels(w.x[0], step, words);
    const Int d = to_half(step);
    for (int lane = 0; lane < count; ++lane) {
      uint8_t* out = p.blocks + (first + lane) * Bytes;
      store_half(d, lane, out);
      store_words(words, 4, lane, out + 2);
    }
  }
};

struct Iq4Xs {
  static constexpr int Size = Groups * Block, Bytes = 136;

  template <bool Weighted, bool Exact>
  static void quantize(const Problem& p, int64_t first, int64_t count) {
    Weights<Whole<Groups>> w;
    load_weights<Whole<Groups>, Weighted, Exact>(p, first, w);
    const Scales<Whole<Groups>> s = find_scales<Whole<Groups>, Exact>(w);
    Int words[Groups][4], low, high;
    for (int g = 0; g < Groups; ++g) pack_levels(w.x[g], s.d * s.integer[g], words[g]);
    pack_integers(s, low, high);
    const Int d = to_half(s.d);
    for (int lane = 0; lane < count; ++lane) {
      uint8_t* out = p.blocks + (first + lane) * Bytes;
      store_half(d, lane, out);
      store_half(high, lane, out + 2);
      store_words(&low, 1, lane, out + 4);
      store_words(words[0], Groups * 4, lane, out + 8);
    }
  }
};

template <class Type, bool Weighted, bool Exact>
void quantize_tiles(int64_t begin, int64_t end, void* problem) {
  const Problem& p = *static_cast<const Problem*>(problem);
  const int64_t blocks = p.rows * p.columns / Type::Size;
  for (int64_t first = begin * Lanes; first < end * Lanes; first += Lanes)
    Type::template quantize<Weighted, Exact>(p, first, std::min<int64_t>(Lanes, blocks - first));
}

template <class Type>
int32_t quantize(const float* weight, const float* importance, int64_t rows, int64_t columns, int32_t exact,
                 uint8_t* blocks) {
  Problem p{weight, importance, rows, columns, blocks, nullptr};
  return with_flags(importance != nullptr, exact != 0, [&](auto weighted, auto exactly) {
    const int64_t tiles = (rows * columns / Type::Size + Lanes - 1) / Lanes;
    return torch_parallel_for(0, tiles, 1, quantize_tiles<Type, weighted, exactly>, &p);
  });
}

}  // namespace

// 0, or torch's error code: W [rows, columns], importance [columns] or null, blocks [rows, bytes].
extern "C" int32_t quantool_quantize_iq4_nl(const float* weight, const float* importance, int64_t rows, int64_t columns,
                                            int32_t exact, uint8_t* blocks) {
  return quantize<Iq4Nl>(weight, importance, rows, columns, exact, blocks);
}

extern "C" int32_t quantool_quantize_iq4_xs(const float* weight, const float* importance, int64_t rows, int64_t columns,
                                            int32_t exact, uint8_t* blocks) {
  return quantize<Iq4Xs>(weight, importance, rows, columns, exact, blocks);
}
