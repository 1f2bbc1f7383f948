// Rows to blocks of ggml's Q2_K, Q3_K, Q4_K, Q5_K and Q6_K: a thread has one group of a super-block in its registers.
//
//     thread       0 .. 7         8 .. 15        ...   127          groups of 32: 16 super-blocks to a block of threads
//     super-block  0              1                    15           groups of 16: 8
//
// What is computed is that of ../kquants.cpp, with the functions of ../kquants_*.h, so that the bytes are the same.
// What a super-block has in common goes through shared memory: its threads leave there what they found; the first
// threads of the block each make the integers of one super-block's scales or mins; sums over groups are taken by every
// thread of them, in order.
//
// A weight costs some 250 to 2000 instructions and five bytes: nothing here waits for memory.
#pragma once
#include "device.cuh"

#include "../kquants_refine.h"

namespace quantool {

using namespace kquants;

constexpr int KQUANT_THREADS = 128;

// As many values as `x` has, from a multiple of 16 bytes on.
template <int Count>
QUANTOOL_DEVICE void load_values(const float* from, Float (&x)[Count]) {
#pragma unroll
  for (int k = 0; k < Count; k += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + k);
    x[k] = v.x, x[k + 1] = v.y, x[k + 2] = v.z, x[k + 3] = v.w;
  }
}

// Of one super-block, in shared memory. The scales are first, the mins second.
template <class Type>
struct Super {
  static constexpr int Parts = Type::Signed ? 1 : 2;
  struct Integers {  // d or dmin, and what it is for
    float step, of[Type::Groups];
  };

  float variance;
  float found[Parts][Type::Groups], weights[Type::Groups];
  Integers ggml[Parts], start[Parts];
  Int zero;
  Errors errors[Type::Groups];
  Normal normals[Type::Groups];
  Fields fields;
  alignas(4) uint8_t block[Type::Bytes];
};

// The grid of one group.
struct GroupGrid {
  Float d, dmin, scale, min;
};

template <class Type>
QUANTOOL_DEVICE GroupGrid grid_of(const typename Super<Type>::Integers* integers, int g) {
  if constexpr (Type::Signed)
    return {integers[0].step, 0.f, integers[0].of[g], 0.f};
  else
    return {integers[0].step, integers[1].step, integers[0].of[g], integers[1].of[g]};
}

template <class Type>
QUANTOOL_DEVICE Line line_of(const GroupGrid& grid) {
  return kquants::line_of<Type>(grid.d, grid.dmin, grid.scale, grid.min);
}

// d and the integers of the scales of a super-block (`part` 0), or dmin and those of the mins, for ggml's block and for
// where the default search starts: there without negative scales.
template <class Type, bool Weighted>
QUANTOOL_DEVICE void find_integers(Super<Type>& super, int part, bool exact) {
  Float values[Type::Groups], weights[Type::Groups], integers[Type::Groups];
  Int negative = splat(0), zero = splat(0);
#pragma unroll
  for (int g = 0; g < Type::Groups; ++g) {
    values[g] = super.found[part][g];
    weights[g] = super.weights[g];
    if (!Type::Signed && part == 0) negative |= values[g] < 0.f;
  }
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    Float step;
    if constexpr (Type::Signed)
      step = signed_integers<Type, Weighted>(values, weights, integers, zero);
    else
      step = affine_integers<Type, Weighted>(values, weights, integers);
    step = store_half(step, exact);
    super.start[part].step = step.value;
    if (attempt == 0) super.ggml[part].step = step.value;
#pragma unroll
    for (int g = 0; g < Type::Groups; ++g) {
      super.start[part].of[g] = integers[g].value;
      if (attempt == 0) super.ggml[part].of[g] = integers[g].value;
      values[g] = maximum(values[g], splat(0.f));
    }
    if (exact || !any(negative)) break;
  }
  if (Type::Signed) super.zero = zero;
}

// What a thread has of its group. The weights of its errors are in shared memory, where registers are too few for them.
template <class Type>
struct Group {
  Float x[Type::Count];
  const Float* importance;
  float* kept;
  Super<Type>& super;
  int index;  // in its super-block

  QUANTOOL_DEVICE void keep(const Float* w) {
#pragma unroll
    for (int k = 0; k < Type::Count; ++k) kept[k * KQUANT_THREADS] = w[k].value;
  }
  QUANTOOL_DEVICE void recall(Float* w) const {
#pragma unroll
    for (int k = 0; k < Type::Count; ++k) w[k] = kept[k * KQUANT_THREADS];
  }
  QUANTOOL_DEVICE void store(const Float* codes) {
#pragma unroll
    for (int k = 0; k < Type::Count; ++k)
      super.fields.codes[index * Type::Count + k] = (uint8_t)(truncate(codes[k]) - Type::Lowest);
  }
};

// The errors of the super-block, with the codes given or, where that is null, the nearest. They are read before the
// barrier of the next `normals`, so that the next to write them need not wait.
template <class Type, bool Weighted>
QUANTOOL_DEVICE Errors measure(Group<Type>& group, const GroupGrid& grid, const Float* codes) {
  Float w[Type::Count];
  group.recall(w);
  group.super.errors[group.index] =
      group_errors<Type, Weighted>(group.x, w, group.importance, codes, line_of<Type>(grid));
  __syncthreads();
  Errors sum = {splat(0.f), splat(0.f)};
#pragma unroll 1
  for (int i = 0; i < Type::Groups; ++i) sum.add(group.super.errors[i]);
  return sum;
}

// From ggml's grid and codes to those that are stored.
template <class Type, bool Weighted>
QUANTOOL_DEVICE void refine(Group<Type>& group, GroupGrid& best, Float* codes) {
  Super<Type>& super = group.super;
  Aims<Weighted> aims(measure<Type, Weighted>(group, best, codes));
  GroupGrid grid = grid_of<Type>(super.start, group.index);
  Int improved = splat(0);
#pragma unroll 1
  for (int round = 0; round < Rounds; ++round) {
    Float cost[Type::Count];
    const Float plain = aims.plain;
    group.recall(cost);
    mix<Type, Weighted>(cost, aims, cost);
    super.normals[group.index] = group_normal<Type, Linear<Type, Weighted>>(group.x, cost, plain, line_of<Type>(grid),
                                                                           grid.scale, grid.min);
    __syncthreads();
    Normal sums = {splat(0.f), splat(0.f), splat(0.f), splat(0.f), splat(0.f)};
#pragma unroll 1
    for (int i = 0; i < Type::Groups; ++i) sums.add(super.normals[i]);
    refit<Type>(sums, grid.d, grid.dmin);
    move_group<Type, Weighted>(group.x, cost, plain, grid.d, grid.dmin, grid.scale, grid.min);
    const Int better = aims.better(measure<Type, Weighted>(group, grid, nullptr));
    best.d = select(better, grid.d, best.d);
    best.dmin = select(better, grid.dmin, best.dmin);
    best.scale = select(better, grid.scale, best.scale);
    best.min = select(better, grid.min, best.min);
    improved |= better;
  }
  if (!any(improved)) return;
  round_again<Type>(group.x, line_of<Type>(best), codes);
  group.store(codes);
}

// sigma^2 of one super-block, whose squares are summed in order.
template <class Type>
QUANTOOL_DEVICE Float find_variance(const float* weight) {
  Float squares = splat(0.f);
#pragma unroll 1
  for (int k = 0; k < SuperBlock; k += Type::Count) {
    Float x[Type::Count];
    load_values(weight + k, x);
    squares = square_sum<Type::Count>(x, squares);
  }
  return variance_of<Type>(squares);
}

template <class Type, bool Weighted>
__global__ void __launch_bounds__(KQUANT_THREADS, 4)
    quantize_kquants(const float* weight, const float* importance, uint8_t* blocks, int64_t super_blocks,
                     int64_t per_row, bool exact) {
  constexpr int Groups = Type::Groups, Count = Type::Count, Parts = Super<Type>::Parts;
  constexpr int Supers = KQUANT_THREADS / Groups;  // to a block of threads
  auto* supers = reinterpret_cast<Super<Type>*>(shared_memory());
  const int thread = threadIdx.x, g = thread % Groups;
  const int64_t first = (int64_t)blockIdx.x * Supers, last = super_blocks - 1;
  const auto block_of = [&](int i) { return first + i < last ? first + i : last; };  // past the end: the last again

  if (NeedsVariance<Type, Weighted>) {
    if (thread < Supers) supers[thread].variance = find_variance<Type>(weight + block_of(thread) * SuperBlock).value;
    __syncthreads();
  }

  Super<Type>& super = supers[thread / Groups];
  float* kept = reinterpret_cast<float*>(supers + Supers) + thread;
  Group<Type> group = {{}, nullptr, kept, super, g};
  const int64_t mine = block_of(thread / Groups);
  load_values(weight + mine * SuperBlock + g * Count, group.x);
  if (Weighted)
    group.importance = reinterpret_cast<const Float*>(importance + mine % per_row * SuperBlock + g * Count);

  Float w[Count], codes[Count];
  weigh<Type, Weighted>(group.x, group.importance,
                        NeedsVariance<Type, Weighted> ? Float(super.variance) : splat(0.f), w);
  Affine found;
  if constexpr (Type::Signed) {
    search_groups<Type, Weighted, 1>(group.x, w, codes, &found.scale);
  } else {
    found = search_group<Type, Weighted>(group.x, w);
    super.found[1][g] = found.min.value;
  }
  super.found[0][g] = found.scale.value;
  super.weights[g] = total<Count>(w).value;
  group.keep(w);
  __syncthreads();
  if (thread < Parts * Supers) find_integers<Type, Weighted>(supers[thread / Parts], thread % Parts, exact);
  __syncthreads();

  GroupGrid best = grid_of<Type>(super.ggml, g);
  const Line line = line_of<Type>(best);
  if constexpr (Type::Signed)
    requantize_signed<Type>(group.x, line.step, super.zero, codes);
  else
    requantize_affine<Type>(group.x, found, line.step, line.offset, codes);
  group.store(codes);
  if (!exact) refine<Type, Weighted>(group, best, codes);

  super.fields.scales[g] = (uint8_t)(truncate(best.scale) - (Type::Coarse ? Type::LowestScale : 0));
  super.fields.mins[g] = (uint8_t)truncate(best.min);
  if (g == 0) super.fields.d = (uint16_t)to_half(best.d), super.fields.dmin = (uint16_t)to_half(best.dmin);
  __syncthreads();
  Type::template pack<Groups>(super.block, super.fields, g);
  __syncthreads();
  constexpr int Pairs = Type::Bytes / 2;  // all types have an even number of bytes
  auto* out = reinterpret_cast<uint16_t*>(blocks) + first * Pairs;
  const int count = (int)(super_blocks - first < Supers ? super_blocks - first : Supers) * Pairs;
#pragma unroll 1
  for (int i = thread; i < count; i += KQUANT_THREADS)
    out[i] = reinterpret_cast<const uint16_t*>(supers[i / Pairs].block)[i % Pairs];
}

template <class Type>
int encode_kquants(const void* weight, const void* importance, void* blocks, int64_t rows, int64_t columns,
                   int64_t exact, void* stream) {
  constexpr int Supers = KQUANT_THREADS / Type::Groups;
  const int64_t per_row = columns / SuperBlock, super_blocks = rows * per_row;
  const int64_t grid = (super_blocks + Supers - 1) / Supers;
  if (columns % SuperBlock || grid > INT32_MAX) return -1;
  const auto kernel = importance ? quantize_kquants<Type, true> : quantize_kquants<Type, false>;
  const int shared = Supers * (int)sizeof(Super<Type>) + Type::Count * KQUANT_THREADS * (int)sizeof(float);
  return launch(kernel, dim3((unsigned)grid), KQUANT_THREADS, shared, stream, (const float*)weight,
                (const float*)importance, (uint8_t*)blocks, super_blocks, per_row, exact != 0);
}

}  // namespace quantool

// weight float32 [rows, columns], importance float32 [columns] or null, 16-byte aligned; blocks [rows, bytes]; nothing
// uses the workspace.
#define QUANTOOL_QUANTIZE(name, Type)                                                                             \
  extern "C" int quantool_quantize_##name##_cuda(const void* weight, const void* importance, void* workspace,     \
                                                 void* blocks, int64_t rows, int64_t columns, int64_t exact,      \
                                                 void* stream) {                                                  \
    return quantool::encode_kquants<kquants::Type>(weight, importance, blocks, rows, columns, exact, stream);     \
  }
