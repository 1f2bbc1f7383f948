// Launchers of pack.cuh. Forms: 0 codes uint8 [N, K]; 1 rows int32 [N, K bits / 32]; 2 GPTQ int32 [K bits / 32, N];
// 3 AWQ int32 [K, N / 8], 4 bits only. Tiles are int32 [N / 16, K / 64, 32 bits]; N % 16 == 0 and K % 64 == 0.
#include "pack.cuh"

namespace quantool {
namespace {

// The result of `launch_with` for the form of that number, or -1.
template <int Bits, class LaunchWith>
int with_form(int64_t form, const void* packed, int64_t rows, int64_t columns, LaunchWith launch_with) {
  uint32_t* words = (uint32_t*)packed;
  const int64_t words_per_row = columns * Bits / 32;
  if (form == 0) return launch_with(AlongRows<8, Bits>{words, columns / 4, 1});
  if (form == 1) return launch_with(AlongRows<Bits, Bits>{words, words_per_row, 1});
  if (form == 2) return launch_with(AlongRows<Bits, Bits>{words, 1, rows});
  if constexpr (Bits == 4) {
    if (form == 3) return launch_with(Awq{words, rows / 8});
  }
  return -1;
}

template <int Bits>
int pack(const void* packed, const void* perm, void* tiles, int64_t rows, int64_t columns, int64_t form, void* stream) {
  const int64_t tiles_per_row = columns / 64, count = rows / 16 * tiles_per_row;
  const dim3 grid((unsigned)((count + PACK_WARPS - 1) / PACK_WARPS));
  return with_form<Bits>(form, packed, rows, columns, [&](auto from) {
    return launch(pack_tiles<decltype(from), Bits>, grid, 32 * PACK_WARPS, 0, stream, from, (const int32_t*)perm,
                  (uint4*)tiles, count, tiles_per_row);
  });
}

template <int Bits>
int unpack(const void* tiles, void* packed, int64_t rows, int64_t columns, int64_t form, void* stream) {
  const int64_t tiles_per_row = columns / 64, count = rows / 16 * tiles_per_row;
  const dim3 grid((unsigned)((count + PACK_WARPS - 1) / PACK_WARPS));
  return with_form<Bits>(form, packed, rows, columns, [&](auto to) {
    return launch(unpack_tiles<decltype(to), Bits>, grid, 32 * PACK_WARPS, 0, stream, (const uint4*)tiles, to, count,
                  tiles_per_row);
  });
}

}  // namespace
}  // namespace quantool

// Column k of the tiles is column perm[k] (int32 [K]) of `packed`, or column k where `perm` is null.
extern "C" int quantool_pack_tiles(const void* packed, const void* perm, void* tiles, int64_t rows, int64_t columns,
                                   int64_t form, int64_t bits, void* stream) {
  if (bits == 4) return quantool::pack<4>(packed, perm, tiles, rows, columns, form, stream);
  if (bits == 8) return quantool::pack<8>(packed, perm, tiles, rows, columns, form, stream);
  return -1;
}

extern "C" int quantool_unpack_tiles(const void* tiles, void* packed, int64_t rows, int64_t columns, int64_t form,
                                     int64_t bits, void* stream) {
  if (bits == 4) return quantool::unpack<4>(tiles, packed, rows, columns, form, stream);
  if (bits == 8) return quantool::unpack<8>(tiles, packed, rows, columns, form, stream);
  return -1;
}
