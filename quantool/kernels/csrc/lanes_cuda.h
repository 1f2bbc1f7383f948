// The lane of a CUDA thread: the primitives of lanes.h for one number.
//
// Float is a struct because nvcc joins a product of plain floats to the sum that follows it. Behind each operator here
// stands the instruction that rounds it, and division and square root are the exact ones.

#pragma once

#include <stdint.h>

namespace lanes {

struct Float {
  float value;

  Float() = default;
  QUANTOOL_DEVICE Float(float v) : value(v) {}
};
typedef int32_t Int;  // also what a comparison gives: 0 or -1

QUANTOOL_DEVICE Float splat(float value) { return value; }
QUANTOOL_DEVICE Int splat(int32_t value) { return value; }

QUANTOOL_DEVICE Float operator+(Float a, Float b) { return __fadd_rn(a.value, b.value); }
QUANTOOL_DEVICE Float operator-(Float a, Float b) { return __fsub_rn(a.value, b.value); }
QUANTOOL_DEVICE Float operator*(Float a, Float b) { return __fmul_rn(a.value, b.value); }
QUANTOOL_DEVICE Float operator/(Float a, Float b) { return __fdiv_rn(a.value, b.value); }
QUANTOOL_DEVICE Float operator-(Float a) { return -a.value; }
QUANTOOL_DEVICE Float& operator+=(Float& a, Float b) { return a = a + b; }
QUANTOOL_DEVICE Float& operator-=(Float& a, Float b) { return a = a - b; }
QUANTOOL_DEVICE Float& operator*=(Float& a, Float b) { return a = a * b; }

QUANTOOL_DEVICE Int operator<(Float a, Float b) { return -(a.value < b.value); }
QUANTOOL_DEVICE Int operator>(Float a, Float b) { return -(a.value > b.value); }
QUANTOOL_DEVICE Int operator<=(Float a, Float b) { return -(a.value <= b.value); }
QUANTOOL_DEVICE Int operator>=(Float a, Float b) { return -(a.value >= b.value); }
QUANTOOL_DEVICE Int operator==(Float a, Float b) { return -(a.value == b.value); }
QUANTOOL_DEVICE Int operator!=(Float a, Float b) { return -(a.value != b.value); }

QUANTOOL_DEVICE Float select(Int mask, Float yes, Float no) { return mask ? yes.value : no.value; }
QUANTOOL_DEVICE Int select(Int mask, Int yes, Int no) { return mask ? yes : no; }
QUANTOOL_DEVICE bool any(Int mask) { return mask != 0; }

// b where either is NaN
QUANTOOL_DEVICE Float minimum(Float a, Float b) { return a.value < b.value ? a : b; }
QUANTOOL_DEVICE Float maximum(Float a, Float b) { return a.value > b.value ? a : b; }
QUANTOOL_DEVICE Int minimum(Int a, Int b) { return a < b ? a : b; }
QUANTOOL_DEVICE Int maximum(Int a, Int b) { return a > b ? a : b; }
// Bounds are no NaN, and then one instruction says which of two is larger: the bound if v is a NaN.
QUANTOOL_DEVICE Float clamp(Float v, Float low, Float high) { return fminf(fmaxf(v.value, low.value), high.value); }
QUANTOOL_DEVICE Int clamp(Int v, Int low, Int high) { return minimum(maximum(v, low), high); }

// A NaN has the bits that x86 gives the NaN it makes: `nearest` takes its integer from them.
QUANTOOL_DEVICE Int bits(Float v) { return (Int)(v.value == v.value ? __float_as_uint(v.value) : 0xffc00000u); }
QUANTOOL_DEVICE Float from_bits(Int v) { return __uint_as_float((uint32_t)v); }
QUANTOOL_DEVICE Float to_float(Int v) { return (float)v; }
QUANTOOL_DEVICE Int truncate(Float v) { return __float2int_rz(v.value); }
QUANTOOL_DEVICE Float absolute(Float v) { return fabsf(v.value); }
QUANTOOL_DEVICE Float sqrt(Float v) { return __fsqrt_rn(v.value); }

}  // namespace lanes
