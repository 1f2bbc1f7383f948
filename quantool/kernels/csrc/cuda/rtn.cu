// Launchers of rtn.cuh. dtype and scale_dtype: 0 bfloat16, 1 float16, 2 float32. K is a multiple of `group`, and `group`
// of 8; the weight is 16-byte aligned.
#include "rtn.cuh"

namespace quantool {
namespace {

template <class T>
int range(const void* weight, void* low, void* high, int64_t groups, int64_t group, void* stream) {
  const int64_t eights = group / 8;
  int lanes = 1;
  while (lanes < 32 && 2 * lanes <= eights) lanes *= 2;
  const dim3 grid((unsigned)((groups * lanes + RTN_THREADS - 1) / RTN_THREADS));
  return launch(group_range<T>, grid, RTN_THREADS, 0, stream, (const uint4*)weight, (float*)low, (float*)high, groups,
                eights, lanes);
}

template <class T>
int quantize(const void* weight, const void* scales, const void* zeros, void* codes, int64_t groups, int64_t group,
             int64_t bits, int64_t scale_dtype, void* stream) {
  const int64_t count = groups * (group / 8);
  if (count >= (int64_t)1 << 32 || scale_dtype < 0 || scale_dtype > 2) return -1;
  const dim3 grid((unsigned)((count + RTN_THREADS - 1) / RTN_THREADS));
  return launch(quantize_affine<T>, grid, RTN_THREADS, 0, stream, (const uint4*)weight, scales, (const uint8_t*)zeros,
                (uint2*)codes, (uint32_t)count, (uint32_t)(group / 8), (int)bits, (int)scale_dtype);
}

}  // namespace
}  // namespace quantool

// low and high float32 [groups], groups = N K / group
extern "C" int quantool_group_range(const void* weight, void* low, void* high, int64_t groups, int64_t group,
                                    int64_t dtype, void* stream) {
  if (dtype == 0) return quantool::range<quantool::BF16>(weight, low, high, groups, group, stream);
  if (dtype == 1) return quantool::range<quantool::FP16>(weight, low, high, groups, group, stream);
  if (dtype == 2) return quantool::range<quantool::F32>(weight, low, high, groups, group, stream);
  return -1;
}

// scales and zeros (uint8 or null) [groups] -> codes uint8 [N, K]
extern "C" int quantool_quantize_affine(const void* weight, const void* scales, const void* zeros, void* codes,
                                        int64_t groups, int64_t group, int64_t bits, int64_t dtype,
                                        int64_t scale_dtype, void* stream) {
  if (dtype == 0)
    return quantool::quantize<quantool::BF16>(weight, scales, zeros, codes, groups, group, bits, scale_dtype, stream);
  if (dtype == 1)
    return quantool::quantize<quantool::FP16>(weight, scales, zeros, codes, groups, group, bits, scale_dtype, stream);
  if (dtype == 2)
    return quantool::quantize<quantool::F32>(weight, scales, zeros, codes, groups, group, bits, scale_dtype, stream);
  return -1;
}
